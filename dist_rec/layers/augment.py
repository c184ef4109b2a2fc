"""Augmented copies of sequences for the sequence-sequence loss: items dropped, or words of their texts.

One copy a sequence. Position j of the original is paired with the copy's state at the last event, up to j, that the
copy kept: causal attention makes that the state of one augmentation of the prefix that ends at j.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config.unisrec import ContrastConfig
from .causal import Sequences


class Draws(NamedTuple):
    """Uniform numbers from 0 to 1: `sequence` `[B]`, for the kind of augmentation, and `event` `[N]`, for the drops."""

    sequence: Tensor
    event: Tensor


class Copy(NamedTuple):
    """What becomes of N events of B sequences.

    Attributes:
        kept: bool `[N]`, the events that the copy has.
        words: bool `[N]`, those that read their word-dropped text; all of these are kept.
        partner: int64 `[N]`, for each original event the number, among all kept events, of the one it is paired with.
        paired: bool `[N]`, whether there is one.
    """

    kept: Tensor
    words: Tensor
    partner: Tensor
    paired: Tensor


def draw(sequences: Sequences) -> Draws:
    """From torch's own generator of the device."""
    device = sequences.length.device
    return Draws(torch.rand(len(sequences), device=device), torch.rand(len(sequences.row), device=device))


def augment(sequences: Sequences, draws: Draws, config: ContrastConfig, with_words: bool, official: bool) -> Copy:
    """Drop items from some sequences and words from the others.

    With probability `item_drop_share` a sequence loses each item but its first with probability `item_drop`; else each
    item reads its word-dropped text with probability `word_drop`.

    With `official`, as the public code: one draw decides for all sequences of the call, and a dropped item overwrites
    the kept one before it, so that the copy has the items *before* each kept one, and the last; its first item may
    be missing, and earlier positions have no partner.

    Args:
        sequences: B of N events in all.
        draws: of `draw`.
        config: `model.contrast`.
        with_words: whether there are word-dropped texts; without them every copy loses items.
        official: as said.
    """
    by_sequence = draws.sequence[:1].expand_as(draws.sequence) if official else draws.sequence
    drops_items = (by_sequence < config.item_drop_share)[sequences.row]
    if not with_words:
        drops_items = torch.ones_like(drops_items)
    kept = (draws.event >= config.item_drop) | (sequences.position == 0)
    if official:
        last = sequences.position == (sequences.length - 1)[sequences.row]
        kept = last | F.pad(kept[1:], (0, 1))
    kept = kept | ~drops_items
    words = (draws.event < config.word_drop) & ~drops_items
    so_far = kept.cumsum(0)
    starts = sequences.length.cumsum(0) - sequences.length
    before = F.pad(so_far, (1, 0))[starts][sequences.row]
    return Copy(kept, words, (so_far - 1).clamp_min(0), so_far > before)
