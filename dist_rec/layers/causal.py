"""The causal transformer over sequences of items: post-norm, as SASRec's in RecBole and UniSRec's.

    f_j   = dropout(LayerNorm(x_j + p_j))                       p counts from a sequence's oldest event
    f     = LayerNorm(f + dropout(Attention(f)))
    f     = LayerNorm(f + dropout(W_2 GELU(W_1 f)))             with dropout on attention's weights too

Events stay packed, `[N, H]` without padding, but in attention, where sequences of like length are padded together.
An event's state depends on its own sequence up to itself and on nothing else, so one pass gives every prefix's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.unisrec import SequenceEncoderConfig
from .dropout import Dropout
from .moves import place, take
from .sequence import Events, pad_in_buckets
from .whitening import INIT_STD

NORM_EPS = 1e-12
# Attention's padding falls with their number, and kernels to launch rise.
NUM_BUCKETS = 8


class Sequences(NamedTuple):
    """N events of B sequences, sequence after sequence, oldest first.

    Attributes:
        length: int64 `[B]`, adding up to N.
        row: int64 `[N]`, to which sequence an event belongs.
        position: int64 `[N]`, 0 for a sequence's oldest event.
    """

    length: Tensor
    row: Tensor
    position: Tensor

    def __len__(self) -> int:
        return self.length.shape[0]

    def keep(self, kept: Tensor) -> Sequences:
        """The events of bool `[N]`, and their positions anew."""
        before = F.pad(kept.cumsum(0), (1, 0))
        ends = self.length.cumsum(0)
        starts = before[ends - self.length]
        row = self.row[kept]
        position = before[:-1][kept] - starts[row]
        return Sequences(before[ends] - starts, row, position)

    def followed_by(self, other: Sequences) -> Sequences:
        """These sequences and then the others."""
        return Sequences(
            torch.cat([self.length, other.length]),
            torch.cat([self.row, other.row + len(self)]),
            torch.cat([self.position, other.position]),
        )


class CausalBlock(nn.Module):
    """One layer."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.expand = nn.Linear(width, feedforward)
        self.contract = nn.Linear(feedforward, width)
        self.feedforward_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, slot: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """One layer.

        Args:
            x: `[N, H]`.
            slot: int64 `[N]`, where each event lies in the buckets laid one after another, oldest first.
            shapes: sequences and padded length of each bucket.

        Returns:
            `[N, H]`.
        """
        sizes = [rows * longest for rows, longest in shapes]
        padded = place(self.qkv(x), slot, sum(sizes))
        dropout, mixed = self.attention_dropout if self.training else 0.0, []
        for part, shape in zip(padded.split(sizes), shapes, strict=True):
            part = part.view(*shape, 3, self.heads, x.shape[1] // self.heads)
            q, k, v = part.permute(2, 0, 3, 1, 4).unbind(0)
            # Padding comes after all of a sequence's events, so none of them sees it.
            part = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
            mixed.append(part.transpose(1, 2).reshape(-1, x.shape[1]))
        x = self.attention_norm(x + self.dropout(self.out(take(torch.cat(mixed), slot))))
        return self.feedforward_norm(x + self.dropout(self.contract(F.gelu(self.expand(x)))))


class CausalEncoder(nn.Module):
    """Positions, input norm, blocks.

    Weights start as N(0, 0.02^2), biases as 0.

    Args:
        config: `model.encoder`.
        width: H.
    """

    def __init__(self, config: SequenceEncoderConfig, width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(config.max_length, width))
        self.input_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = Dropout(config.dropout)
        sizes = (width, config.heads, config.feedforward, config.dropout, config.attention_dropout)
        self.blocks = nn.ModuleList([CausalBlock(*sizes) for _ in range(config.layers)])
        nn.init.normal_(self.positions, std=INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """States of all events.

        Args:
            x: `[N, H]`, the events' vectors.
            sequences: none longer than `max_length`; B at least 1, N may be 0.

        Returns:
            `[N, H]`.
        """
        x = self.dropout(self.input_norm(x + F.embedding(sequences.position, self.positions)))
        # Ages that rise from the oldest event make slots that do.
        events = Events([], sequences.length, sequences.row, sequences.position)
        slot, keys = pad_in_buckets(events, NUM_BUCKETS)
        shapes = [(bucket.shape[0], bucket.shape[1]) for bucket in keys]
        for block in self.blocks:
            x = block(x, slot, shapes)
        return x
