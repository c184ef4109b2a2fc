"""Rows of users' sequences as a rank's batch, and a UniSRec model with tables: small, and with every oddity."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dist_rec.config import UniSRecConfig
from dist_rec.data.batch import Batch, make_batch
from dist_rec.data.rows import Ragged, Rows
from dist_rec.layers.augment import Draws
from dist_rec.layers.reduction import Reduction
from dist_rec.models.unisrec import UniSRec
from dist_rec.schema import Schema
from dist_rec.strict import from_dict

NUM_ITEMS, NUM_TEXTS, TEXT_WIDTH, WIDTH = 30, 20, 6, 8
SCHEMA = from_dict(
    Schema,
    {
        "name": "sequences",
        "domains": {"names": ["a", "b", "c"]},
        "features": {
            "history": {"role": "history", "kind": "ids", "shares": "item"},
            "history_text": {"role": "history", "kind": "texts"},
            "item": {"role": "item", "kind": "id", "aspect": "id", "vocabulary": {"size": NUM_ITEMS}},
            "text": {"role": "item", "kind": "text"},
            "candidates": {"role": "history", "kind": "ids", "shares": "item"},
            "candidates_text": {"role": "history", "kind": "texts"},
        },
        "labels": {"next": {}},
    },
    "test",
)
# By item: several share one text, and every seventh has none.
TEXT_OF = np.where(np.arange(NUM_ITEMS) % 7 == 6, NUM_TEXTS, np.arange(NUM_ITEMS) % NUM_TEXTS)


class Row(NamedTuple):
    number: int
    domain: int
    items: list[int]


def make_rows(n: int = 12, longest: int = 7, seed: int = 0) -> list[Row]:
    """Sequences of 1 .. `longest` events; the first ones have 1 and 2."""
    random = np.random.default_rng(seed)
    sizes = [1, 2, *random.integers(1, longest + 1, n - 2)]
    domains = random.integers(0, 3, n)
    return [
        Row(100 + i, int(d), random.integers(0, NUM_ITEMS, size).tolist())
        for i, (size, d) in enumerate(zip(sizes, domains, strict=True))
    ]


def text_vectors() -> np.ndarray:
    """`[T, 2D]`: of the texts, and of the texts with words dropped."""
    return np.random.default_rng(1).standard_normal((NUM_TEXTS, 2 * TEXT_WIDTH)).astype(np.float32)


def as_batch(
    rows: list[Row],
    size: int,
    candidates: list[int] | None = None,
    weight: list[float] | None = None,
    vectors: np.ndarray | None = None,
) -> Batch:
    """One rank's rows, and the items that it compares with."""
    table = text_vectors() if vectors is None else vectors
    raw = Rows(domain=np.array([r.domain for r in rows], np.int64), row=np.array([r.number for r in rows], np.int64))
    raw.text_keys = np.arange(len(table), dtype=np.int64)
    histories, items = [r.items[:-1] for r in rows], [r.items[-1:] for r in rows]
    compared = [list(candidates or [])] + [[] for _ in rows[1:]] if rows else []
    for name, lists in (("history", histories), ("item", items), ("candidates", compared)):
        lengths = np.array([len(x) for x in lists], np.int64)
        raw.ids[name] = Ragged.from_lengths(np.array(sum(lists, []), np.int64), lengths)
        text = {"history": "history_text", "item": "text", "candidates": "candidates_text"}[name]
        of_items = [[TEXT_OF[i] for i in x] for x in lists]
        if name == "item":
            of_items = [[t for t in x if t < NUM_TEXTS] for x in of_items]
        lengths = np.array([len(x) for x in of_items], np.int64)
        raw.texts[text] = Ragged.from_lengths(np.array(sum(of_items, []), np.int64), lengths)
    raw.labels["next"] = np.ones(len(rows), np.float32)
    batch = make_batch(raw, SCHEMA, size, lambda keys, tokens: table[keys])
    batch.text_vectors = batch.text_vectors.double()
    batch.identity = {name: batch.ids[name].values() for name in ("history", "item")}
    batch.identity_lengths = {name: batch.ids[name].lengths() for name in ("history", "item")}
    if candidates is not None:
        # Also on a rank without any row.
        batch.identity["candidates"] = torch.tensor(candidates, dtype=torch.int64)
        batch.text_index["candidates_text"] = torch.tensor([TEXT_OF[i] for i in candidates], dtype=torch.int64)
    batch.candidate_weight = torch.tensor(weight if weight is not None else [1.0] * len(candidates or []))
    return batch


class Whole(nn.Module):
    """The item table and the model: one process of a hybrid run, without dropout and noise unless told otherwise."""

    def __init__(self, reduction: Reduction | None = None, **changes) -> None:
        super().__init__()
        config = {
            "width": WIDTH,
            "temperature": 0.3,
            "adaptor": {"experts": 3, "dropout": 0.0, "noise": False},
            "encoder": {"feedforward": 5, "dropout": 0.0, "attention_dropout": 0.0, "max_length": 5},
            "contrast": {"weight": 0.0},
        }
        for key, value in changes.items():
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
        if config.get("loss") == "sampled":
            config["samples"] = 4
        config = from_dict(UniSRecConfig, config, "test")
        self.table = nn.Embedding(NUM_ITEMS, WIDTH) if config.with_ids else None
        features = list(SCHEMA.features)
        dims = {"item": WIDTH} if config.with_ids else {}
        self.model = UniSRec(SCHEMA, config, dims, TEXT_WIDTH, None, features, reduction or Reduction())
        self.double()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                # What starts at 0 or small would hide faults.
                if parameter.ndim > 1 or "bias" in name:
                    parameter.normal_(std=0.6)

    def embeddings(self, batch: Batch) -> dict[str, Tensor]:
        if self.table is None:
            return {}
        found = {"history": self.table(batch.identity["history"])}
        there = batch.identity_lengths["item"] > 0
        items = torch.zeros(len(batch), WIDTH, dtype=torch.float64)
        found["item"] = items.masked_scatter(there[:, None], self.table(batch.identity["item"]))
        if "candidates" in batch.identity:
            found["candidates"] = self.table(batch.identity["candidates"])
        return found

    def forward(self, batch: Batch) -> dict:
        return self.model(self.embeddings(batch), batch)


def draws_of_rows(batch: Batch, sequences) -> Draws:
    """Draws that a row has on whichever rank."""
    generators = [np.random.default_rng(abs(int(number))) for number in batch.row]
    lengths = sequences.length.tolist()
    of_rows = [torch.from_numpy(g.random(1)) for g in generators]
    events = [torch.from_numpy(g.random(n)) for g, n in zip(generators, lengths, strict=True)]
    return Draws(torch.cat(of_rows), torch.cat(events))
