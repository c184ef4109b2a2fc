"""Batches of texts of about one length, so that hardly any padding goes through a language model.

Shared by all that runs one: `embed`, encoding what a store lacks, and co-training. Knows lengths
and token ids, no models.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..data.rows import Ragged
from ..scoring.raw import Lists
from ..scoring.texts import padded

# Tokens, padding included, at once, where no one asks for another number. Larger batches leave a CPU's caches (half as
# fast at 8192).
DEFAULT_BATCH_TOKENS = {"cpu": 512, "cuda": 32768}


def length_batches(lengths: np.ndarray | Tensor, batch_tokens: int, at_least: int = 1) -> list[np.ndarray]:
    """Texts by falling length, cut into batches of at most `batch_tokens` tokens with padding.

    A longer text is a batch of its own. Longest first, so that too large a batch fails at once.

    Args:
        lengths: int `[T]`, tokens of each text; one without any counts as one.
        batch_tokens: positive.
        at_least: how many batches come back at least, the last ones empty; what the rank with most has, where ranks
            must run the model equally often.

    Returns:
        int64 positions among the T texts, each in one batch.
    """
    lengths = np.maximum(np.asarray(lengths), 1)
    order = np.argsort(-lengths, kind="stable")
    batches, at = [], 0
    while at < len(order):
        size = max(batch_tokens // int(lengths[order[at]]), 1)
        batches.append(order[at : at + size])
        at += size
    return batches + [np.zeros(0, np.int64)] * (at_least - len(batches))


def pad(tokens: Ragged) -> tuple[Tensor, Tensor]:
    """Token ids of T >= 1 texts as int64 `[T, L]`, padded on the right with 0, and bool `[T, L]`, True on real ones."""
    ids, mask = padded(Lists(tokens.values, tokens.lengths))
    return torch.from_numpy(ids), torch.from_numpy(mask)
