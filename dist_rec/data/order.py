"""The canonical order of an epoch: a pure function of (seed, epoch, index), never of the ranks.

`shuffled` and `index`: each domain's blocks, shuffled by epoch or as they stand, form an *axis* of rows.
Every axis is cut into S equal intervals, one a logical stream; where S does not divide, the
streams that get a row more are dealt cyclically over all domains, so that streams differ by one
row at most. A stream is read in windows, each holding every domain in its proportion, shuffled
inside. `time`: the earliest rows of all domains first, batch by batch (`timeline`); every epoch alike.

Step t takes rows t*k .. (t+1)*k of every stream; rank r serves streams r, r+W, r+2W ...
Everything here is arithmetic on a few integers: skipping to a step costs nothing. Knows no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import UserError
from .index import Index
from .timeline import Timeline

Arrangement = Literal["shuffled", "index", "time"]

_AXIS, _WINDOW, _PHASE = 1, 2, 3
# Batches that a stream holds at once where nothing is said.
_WINDOW_BATCHES = 4


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *key))))


@dataclass(frozen=True)
class Piece:
    """Rows start .. stop of one block (`block` counts over the whole index, in its order)."""

    block: int
    start: int
    stop: int


def quotas(rows: list[int], weights: list[float] | None) -> list[int]:
    """Rows of each domain in an epoch.

    Natural weights (None) take every row once. Otherwise an epoch keeps the total of the
    domains that have any weight, shared by largest remainder.
    """
    if weights is None:
        return list(rows)
    total = sum(n for n, w in zip(rows, weights, strict=True) if w > 0)
    exact = np.array(weights) / sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    for i in np.argsort(-(exact - shares), kind="stable")[: total - int(shares.sum())]:
        shares[i] += 1
    return [int(s) for s in shares]


def temperature_weights(rows: list[int], temperature: float) -> list[float]:
    """Weights proportional to rows ** (1 / temperature), the largest being 1; 0 for a domain without rows."""
    largest = max(rows)
    return [(n / largest) ** (1 / temperature) if n else 0.0 for n in rows]


class Order:
    """The order of all epochs of one data set.

    Args:
        index: the data set.
        streams: S.
        batch_size: rows of a global batch, S * k.
        seed: of the run.
        window: rows over all streams that are held together, and shuffled together in `shuffled`, which
            needs it; None is a few batches.
        arrangement: `shuffled`; `index`, as the rows stand in the index; or `time`.
        weights: per domain of the schema, or None for natural.
        drop_last: whether the short last batch is left out.

    Raises:
        UserError: a domain with weight has no rows, or there is none at all; time order is asked of blocks
            without times, or together with other weights than natural ones.
    """

    def __init__(
        self,
        index: Index,
        *,
        streams: int,
        batch_size: int,
        seed: int,
        window: int | None = None,
        arrangement: Arrangement = "shuffled",
        weights: list[float] | None = None,
        drop_last: bool = False,
    ) -> None:
        if window is None and arrangement == "shuffled":
            raise ValueError("a shuffled order needs its window")
        self.streams, self.seed = streams, seed
        self.per_stream = batch_size // streams
        self.shuffled = arrangement == "shuffled"
        self.domains = index.schema.domains.names
        domain_of = {name: i for i, name in enumerate(self.domains)}
        self.block_rows = np.array([b.rows for s in index.shards for b in s.blocks], np.int64)
        self.block_domain = np.repeat(
            [domain_of[s.domain] for s in index.shards], [len(s.blocks) for s in index.shards]
        ).astype(np.int64)
        self.domain_blocks = [np.flatnonzero(self.block_domain == d) for d in range(len(domain_of))]
        self.domain_rows = [int(self.block_rows[blocks].sum()) for blocks in self.domain_blocks]
        self.quotas = quotas(self.domain_rows, weights)
        for name, rows, quota in zip(self.domains, self.domain_rows, self.quotas, strict=True):
            if quota and not rows:
                raise UserError(f"domain {name!r} has a weight but no rows in data set {index.name}.")
        if not any(self.quotas):
            raise UserError(f"data set {index.name} has no row of a domain that is to be read.")
        self._axes: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray, int]] = {}
        self.timeline: Timeline | None = None
        if arrangement == "time":
            self.timeline = self._timeline(index, batch_size, max((window or 0) // batch_size, 1))
            self.totals = self.timeline.totals()
        else:
            self._cut()
            self.totals = self.counts.sum(axis=1)
            self.window = _WINDOW_BATCHES * self.per_stream if window is None else max(window // streams, 1)
        steps = -(-int(self.totals.max()) // self.per_stream)
        self.steps = int(self.totals.min()) // self.per_stream if drop_last else steps

    def _timeline(self, index: Index, batch_size: int, window: int) -> Timeline:
        """The rows of all domains with a quota, which must be all they have."""
        read = np.zeros(len(self.domains), bool)
        for d, (name, rows, quota) in enumerate(zip(self.domains, self.domain_rows, self.quotas, strict=True)):
            if quota not in (0, rows):
                raise UserError(
                    f"data.order: time reads every row once, but data.weights or data.temperature ask for {quota} of "
                    f"the {rows} rows of domain {name!r}: leave them out (data.domains chooses domains), or use "
                    "data.order: shuffled."
                )
            read[d] = quota > 0
        blocks = np.flatnonzero(read[self.block_domain])
        places = [(shard, block) for shard in index.shards for block in shard.blocks]
        for number in blocks.tolist():
            shard, block = places[number]
            if block.time is None or block.time[0] > block.time[1]:
                raise UserError(
                    f"data.order: time needs times, but {shard.file}, block {block.name} has {block.time or 'none'}: "
                    "name the column in keys.time of the schema and build the data set again, or use data.order: "
                    "shuffled."
                )
        return Timeline(
            self.block_domain[blocks],
            blocks,
            self.block_rows[blocks],
            np.array([places[number][1].time for number in blocks.tolist()], np.int64),
            num_domains=len(self.domains),
            streams=self.streams,
            batch_size=batch_size,
            window=window,
        )

    def _cut(self) -> None:
        """Interval of every stream on every domain's axis: `starts`, `counts`, int64 `[S, D]`."""
        self.counts = np.zeros((self.streams, len(self.quotas)), np.int64)
        turn = 0
        for d, quota in enumerate(self.quotas):
            base, extra = divmod(quota, self.streams)
            self.counts[:, d] = base
            self.counts[(turn + np.arange(extra)) % self.streams, d] += 1
            turn += extra
        self.starts = np.cumsum(self.counts, axis=0) - self.counts

    def stream_rows(self, stream: int) -> int:
        """Length of a stream."""
        return int(self.totals[stream])

    def windows(self, epoch: int, stream: int) -> np.ndarray:
        """How many rows of each domain precede each window: int64 `[num_windows + 1, D]`."""
        if self.timeline is not None:
            return self.timeline.windows(stream)
        counts = self.counts[stream]
        num = max(-(-int(counts.sum()) // self.window), 1)
        phase = _generator(self.seed, _PHASE, epoch, stream).integers(0, num, len(counts))
        return (counts[None, :] * np.arange(num + 1)[:, None] + phase[None, :]) // num

    def window_pieces(self, epoch: int, stream: int, before: np.ndarray, after: np.ndarray) -> list[Piece]:
        """The block pieces of one window, domain after domain, from its two rows of `windows`."""
        if self.timeline is not None:
            window = int(before.sum()) // (self.per_stream * self.timeline.window)
            return [
                piece
                for lane, start, stop in self.timeline.ranges(stream, window)
                for piece in _pieces(lane.blocks, lane.edges, start, stop)
            ]
        pieces = []
        for d, start in enumerate(self.starts[stream]):
            pieces += self._axis_pieces(epoch, d, int(start + before[d]), int(start + after[d]))
        return pieces

    def _axis_pieces(self, epoch: int, domain: int, start: int, stop: int) -> list[Piece]:
        """Rows start .. stop of a domain's axis; past its end, the axis goes on reshuffled.

        A pass over the axis starts at a row of its own and comes round, so that a domain that gives
        an epoch only some of its rows gives others in the next.
        """
        length, pieces = self.domain_rows[domain], []
        while start < stop:
            passed, position = divmod(start, length)
            blocks, edges, first = self._axis(epoch, domain, passed)
            offset = (first + position) % length
            taken = min(length - offset, length - position, stop - start)
            pieces += _pieces(blocks, edges, offset, offset + taken)
            start += taken
        return pieces

    def _axis(self, epoch: int, domain: int, passed: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Blocks of a domain in the order of this epoch and pass, their row edges, the row it starts at."""
        key = (epoch, domain, passed)
        found = self._axes.get(key)
        if found is None:
            blocks, first = self.domain_blocks[domain], 0
            if self.shuffled:
                generator = _generator(self.seed, _AXIS, *key)
                blocks = generator.permutation(blocks)
                first = int(generator.integers(self.domain_rows[domain]))
            found = blocks, np.concatenate([[0], np.cumsum(self.block_rows[blocks])]), first
            self._axes = {k: axis for k, axis in self._axes.items() if k[0] == epoch} | {key: found}
        return found

    def arrangement(self, epoch: int, stream: int, window: int, counts: np.ndarray) -> np.ndarray:
        """Where the rows of a window go: int64 permutation over its pieces' rows.

        Shuffled; or every domain spread evenly, in its own order; or batch after batch, by time.
        """
        if self.timeline is not None:
            return self.timeline.arrangement(stream, window)
        total = int(counts.sum())
        if self.shuffled:
            return _generator(self.seed, _WINDOW, epoch, stream, window).permutation(total)
        moments = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in counts])
        return np.argsort(moments, kind="stable")

    def summary(self) -> dict[str, dict[str, int]]:
        """Per domain: rows there are, rows read an epoch, how many of those again, how many not at all."""
        return {
            name: {"rows": n, "quota": q, "repeated": max(q - n, 0), "left_out": max(n - q, 0)}
            for name, n, q in zip(self.domains, self.domain_rows, self.quotas, strict=True)
        }


def _pieces(blocks: np.ndarray, edges: np.ndarray, start: int, stop: int) -> list[Piece]:
    """Rows start .. stop of blocks that stand one after another; `edges` are the rows before each."""
    pieces = []
    at = int(np.searchsorted(edges, start, side="right")) - 1
    while start < stop:
        first, end = int(edges[at]), min(int(edges[at + 1]), stop)
        pieces.append(Piece(int(blocks[at]), start - first, end - first))
        start, at = end, at + 1
    return pieces
