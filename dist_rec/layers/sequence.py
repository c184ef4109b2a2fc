"""The behaviour history: jagged events in, one vector a row out.

Events stay packed, `[N, .]` without padding, through every linear map, norm and feed-forward;
only attention sees them padded, rows of like length together. N = 0 is an ordinary case:
every parameter then has a zero gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import HistoryConfig
from .moves import place, take


class Events(NamedTuple):
    """N events of B rows, row after row, oldest first.

    Attributes:
        values: one `[N, dim]` for each feature; zeros where a feature lacks the event.
        length: int64 `[B]`.
        row: int64 `[N]`, to which row an event belongs.
        age: int64 `[N]`, 0 for a row's newest event.
    """

    values: list[Tensor]
    length: Tensor
    row: Tensor
    age: Tensor


def align_events(values: Sequence[Tensor], lengths: Sequence[Tensor], max_length: int) -> Events:
    """Bring the lists of several features to common events, the newest `max_length` of each row.

    Lists are aligned at their newest end, since that is the end a builder keeps when it cuts a
    list: where one feature has fewer entries than another, its oldest are missing.

    Args:
        values: `[N_f, dim_f]` of each feature, rows concatenated, oldest event first.
        lengths: int64 `[B]` of each feature, adding up to N_f.
        max_length: events of a row to keep.

    A graph that is exported has shapes that follow from B alone: there every row has `max_length` events, the newest
    first, of which those beyond `length` hold anything.
    """
    length = lengths[0] if len(lengths) == 1 else torch.stack(list(lengths)).amax(0)
    if torch.compiler.is_exporting():
        length = length.clamp_max(max_length)
        row = torch.arange(length.shape[0], device=length.device).repeat_interleave(max_length)
        age = torch.arange(max_length, device=length.device).repeat(length.shape[0])
        return Events([_newest(v, n, row, age) for v, n in zip(values, lengths, strict=True)], length, row, age)
    longest = int(length.max()) if len(length) else 0
    as_is = len(lengths) == 1 and longest <= max_length
    if not as_is:
        length = length.clamp_max(max_length)
    total = len(values[0]) if as_is else int(length.sum())
    row = torch.repeat_interleave(torch.arange(len(length), device=length.device), length, output_size=total)
    age = length.cumsum(0)[row] - 1 - torch.arange(total, device=length.device)
    kept = list(values) if as_is else [_newest(v, n, row, age) for v, n in zip(values, lengths, strict=True)]
    return Events(kept, length, row, age)


def _newest(values: Tensor, length: Tensor, row: Tensor, age: Tensor) -> Tensor:
    source = length.cumsum(0)[row] - 1 - age
    source = torch.where(age < length[row], source, values.shape[0])
    return take(torch.cat([values, values.new_zeros(1, values.shape[1])]), source)


def pad_in_buckets(events: Events, num_buckets: int = 4) -> tuple[Tensor, list[Tensor]]:
    """Where each event lies when rows of like length are padded together.

    Rows sorted by length and cut into a few buckets, each padded to its own longest row: with
    lengths spread evenly this halves the work of attention, and rows without events cost nothing.

    Args:
        events: N events of B rows.
        num_buckets: at most this many.

    Returns:
        `(slot, keys)`: int64 `[N]`, all different, into the buckets' slots laid one after
        another; and for each bucket bool `[b, L]`, the slots that may be attended to.
    """
    length, device = events.length, events.length.device
    if torch.compiler.is_exporting():
        most = events.age.shape[0] // length.shape[0]
        return events.row * most + events.age, [torch.arange(most, device=device) < length.clamp_min(1)[:, None]]
    rows = len(length)
    size = max(-(-rows // num_buckets), 1)
    lengths, order = length.sort(stable=True)
    at = torch.empty_like(order)
    at[order] = torch.arange(rows, device=device)
    starts = list(range(0, max(rows, 1), size))
    last = torch.tensor([min(start + size, rows) - 1 for start in starts], device=device)
    longest = lengths[last].clamp_min(1) if rows else length.new_ones(1)
    counts = [min(start + size, rows) - start for start in starts]
    keys = [
        # A row without events has a slot of zeros that nobody reads: without any key softmax is NaN.
        torch.arange(most, device=device) < part.clamp_min(1)[:, None]
        for part, most in zip(lengths.split(counts), longest.tolist(), strict=True)
    ]
    # All buckets but the last have `size` rows, so this is where each starts.
    base = F.pad(longest.cumsum(0)[:-1] * size, (1, 0))
    bucket, within = at // size, at % size
    first = base[bucket] + within * longest[bucket]
    return first[events.row] + events.age, keys


class AttentionBlock(nn.Module):
    """A pre-norm transformer layer over packed events; attention is bidirectional within a row.

    x = x + dropout(Attention(LayerNorm(x)));   x = x + dropout(W_2 GELU(W_1 LayerNorm(x)))

    Dropout is on the two branches only: on the attention weights it would cost the fused kernel,
    and drawing its mask was a third of the step on CPU.
    """

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, feedforward)
        self.contract = nn.Linear(feedforward, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, slot: Tensor, keys: list[Tensor]) -> Tensor:
        """One layer.

        Args:
            x: `[N, H]`.
            slot: int64 `[N]`, of `pad_in_buckets`.
            keys: bool `[b, L]` of each bucket.

        Returns:
            `[N, H]`.
        """
        sizes = [k.numel() for k in keys]
        padded = place(self.qkv(self.attention_norm(x)), slot, sum(sizes))
        mixed = []
        for part, bucket in zip(padded.split(sizes), keys, strict=True):
            part = part.view(*bucket.shape, 3, self.heads, x.shape[1] // self.heads)
            q, k, v = part.permute(2, 0, 3, 1, 4).unbind(0)
            part = F.scaled_dot_product_attention(q, k, v, attn_mask=bucket[:, None, None, :])
            mixed.append(part.transpose(1, 2).reshape(bucket.numel(), x.shape[1]))
        mixed = take(torch.cat(mixed), slot)
        x = x + self.dropout(self.out(mixed))
        hidden = F.gelu(self.expand(self.feedforward_norm(x)))
        return x + self.dropout(self.contract(hidden))


class HistoryEncoder(nn.Module):
    """One sequence of events, pooled.

        e_j = sum_f W_f e_fj (+ E_lm,j)
        mean:         the average of e_j
        transformer:  LayerNorm(blocks(LayerNorm(e_j + P[age_j]))), then the average or the newest

    Positions count from the newest event, so that a longer history does not move the recent
    ones. A row without events gets a learned vector. The paper says "transformer" and no more:
    all of this is ours.

    Args:
        config: `model.history`.
        width: H.
        dims: width of each id feature.
        has_text: whether a last input holds the events' projected texts, `[N, H]`.
    """

    def __init__(self, config: HistoryConfig, width: int, dims: Sequence[int], has_text: bool) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.pooling = "mean" if config.kind == "mean" else config.pooling
        self.projections = nn.ModuleList([nn.Linear(dim, width, bias=False) for dim in dims])
        self.has_text = has_text
        self.empty = nn.Parameter(torch.zeros(width))
        self.transforms = config.kind == "transformer"
        if self.transforms:
            self.positions = nn.Parameter(torch.empty(config.max_length, width))
            nn.init.normal_(self.positions, std=0.02)
            self.input_norm = nn.LayerNorm(width)
            self.blocks = nn.ModuleList(
                [AttentionBlock(width, config.heads, config.feedforward, config.dropout) for _ in range(config.layers)]
            )
            self.output_norm = nn.LayerNorm(width)

    def forward(self, values: list[Tensor], lengths: list[Tensor]) -> Tensor:
        """Encode B histories.

        Args:
            values: `[N_f, dim_f]` of each id feature, and `[N_f, H]` of the texts if there are any;
                rows concatenated, oldest event first.
            lengths: int64 `[B]` of each.

        Returns:
            `[B, H]`.
        """
        events = align_events(values, lengths, self.max_length)
        parts = [project(v) for project, v in zip(self.projections, events.values, strict=False)]
        if self.has_text:
            parts.append(events.values[-1])
        x = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        if self.transforms:
            x = self._transform(x, events)
        return self._pool(x, events)

    def _transform(self, x: Tensor, events: Events) -> Tensor:
        x = self.input_norm(x + F.embedding(events.age, self.positions))
        slot, keys = pad_in_buckets(events)
        for block in self.blocks:
            x = block(x, slot, keys)
        return self.output_norm(x)

    def _pool(self, x: Tensor, events: Events) -> Tensor:
        ends, some = events.length.cumsum(0), (events.length > 0)[:, None]
        if torch.compiler.is_exporting():
            x = x.view(some.shape[0], self.max_length, x.shape[1])
            kept = (events.age < events.length[events.row]).view(some.shape[0], self.max_length, 1)
            sums = torch.where(kept, x, x.new_zeros(())).sum(1)
            pooled = x[:, 0] if self.pooling == "last" else sums / events.length.clamp_min(1)[:, None]
        elif self.pooling == "last":
            # Rows without events read the extra row, whose gradient nobody asks for.
            source = torch.where(some[:, 0], ends - 1, len(x))
            pooled = take(torch.cat([x, x.new_zeros(1, x.shape[1])]), source)
        else:
            sums = torch.segment_reduce(x, "sum", lengths=events.length, axis=0, unsafe=True, initial=0)
            pooled = sums / events.length.clamp_min(1)[:, None]
        return torch.where(some, pooled, self.empty)
