"""The canonical order of an epoch: a pure function of (seed, epoch, index), never of the ranks.

Each domain's blocks, shuffled by epoch, form an *axis* of rows. Every axis is cut into S equal
intervals, one a logical stream; where S does not divide, the streams that get a row more are
dealt cyclically over all domains, so that streams differ by one row at most. A stream is
read in windows, each holding every domain in its proportion, shuffled inside. Step t takes rows
t*k .. (t+1)*k of every stream; rank r serves streams r, r+W, r+2W ...

Everything here is arithmetic on a few integers: skipping to a step costs nothing. Knows no files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .index import Index

_AXIS, _WINDOW, _PHASE = 1, 2, 3


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


class Order:
    """The order of all epochs of one data set.

    Args:
        index: the data set.
        streams: S.
        batch_size: rows of a global batch, S * k.
        window: rows over all streams that are shuffled together; 0 keeps the index's order.
        seed: of the run.
        weights: per domain of the schema, or None for natural.
        drop_last: whether the short last batch is left out.
    """

    def __init__(
        self,
        index: Index,
        *,
        streams: int,
        batch_size: int,
        window: int,
        seed: int,
        weights: list[float] | None = None,
        drop_last: bool = False,
    ) -> None:
        self.streams, self.seed = streams, seed
        self.per_stream = batch_size // streams
        self.shuffled = window > 0
        self.domains = index.schema.domains.names
        domain_of = {name: i for i, name in enumerate(self.domains)}
        num_domains = len(domain_of)
        self.block_rows = np.array([b.rows for s in index.shards for b in s.blocks], np.int64)
        self.block_domain = np.array([domain_of[s.domain] for s in index.shards for _ in s.blocks], np.int64)
        self.domain_blocks = [np.flatnonzero(self.block_domain == d) for d in range(num_domains)]
        self.domain_rows = [int(self.block_rows[blocks].sum()) for blocks in self.domain_blocks]
        self.quotas = quotas(self.domain_rows, weights)
        self._cut()
        self.window = max(window // streams, 1) if self.shuffled else 4 * self.per_stream
        totals = self.counts.sum(axis=1)
        steps = int(totals.min()) // self.per_stream if drop_last else -(-int(totals.max()) // self.per_stream)
        self.steps = steps

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
        return int(self.counts[stream].sum())

    def windows(self, epoch: int, stream: int) -> np.ndarray:
        """How many rows of each domain precede each window: int64 `[num_windows + 1, D]`."""
        counts = self.counts[stream]
        num = max(-(-int(counts.sum()) // self.window), 1)
        phase = _generator(self.seed, _PHASE, epoch, stream).integers(0, num, len(counts))
        return (counts[None, :] * np.arange(num + 1)[:, None] + phase[None, :]) // num

    def window_pieces(self, epoch: int, stream: int, before: np.ndarray, after: np.ndarray) -> list[Piece]:
        """The block pieces of one window, domain after domain, from its two rows of `windows`."""
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
            at = int(np.searchsorted(edges, offset, side="right")) - 1
            inside = offset - int(edges[at])
            taken = min(int(edges[at + 1]) - offset, length - position, stop - start)
            pieces.append(Piece(int(blocks[at]), inside, inside + taken))
            start += taken
        return pieces

    def _axis(self, epoch: int, domain: int, passed: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Blocks of a domain in the order of this epoch and pass, their row edges, the row it starts at."""
        key = (epoch, domain, passed)
        if getattr(self, "_cached_epoch", None) != epoch:
            self._cached_epoch, self._axes = epoch, {}
        if key not in self._axes:
            blocks, first = self.domain_blocks[domain], 0
            if self.shuffled:
                generator = _generator(self.seed, _AXIS, *key)
                blocks = generator.permutation(blocks)
                first = int(generator.integers(self.domain_rows[domain]))
            self._axes[key] = blocks, np.concatenate([[0], np.cumsum(self.block_rows[blocks])]), first
        return self._axes[key]

    def arrangement(self, epoch: int, stream: int, window: int, counts: np.ndarray) -> np.ndarray:
        """Where the rows of a window go: int64 permutation over its pieces' rows.

        Shuffled if so configured, else every domain spread evenly, in its own order.
        """
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
