"""Texts to token ids, and those to what a language model reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .raw import Lists


def open_tokenizer(path: Path, max_tokens: int) -> Any:
    """The tokenizer of a tokenizer.json, cutting texts at `max_tokens`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    # The file may carry padding and truncation of its own.
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def token_lists(tokenizer: Any, texts: list[str]) -> Lists:
    """Token ids of texts."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
    return Lists(np.array([i for ids in encoded for i in ids], np.int64), np.array([len(x) for x in encoded], np.int64))


def padded(tokens: Lists, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Token ids as int64 `[T, L]`, padded on the right with 0, L >= `least`, and bool `[T, L]`, True on real ones."""
    mask = np.arange(max(int(tokens.lengths.max(initial=0)), least))[None, :] < tokens.lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = tokens.values
    return ids, mask
