"""Time order: global batch t holds the t-th B earliest rows of all domains, whatever the streams.

The index knows the first and last time of every block; between them, rows are taken to be evenly
spaced. So a row's place follows from the index alone. It is exact within a domain whose blocks do not
overlap in time, as a builder that sorts by time leaves them; across domains, and where blocks that
were appended late overlap older ones, it is exact to a block's own unevenness. Rows of one second go
by domain, then by block. Rows without a time count as early as the first one of their block.

A *lane* is a run of blocks of one domain that do not overlap. How many of its rows have a time
<= tau is arithmetic; the boundary of every batch is the tau, found by bisection, at which all lanes together
have as many rows as the batches before it. Each batch, lane after lane, is cut into equal
parts, one a stream; so a block is read by few streams, for all that every stream is in every batch.
Knows no files.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from ..errors import UserError

MOST_LANES = 1_000
BATCHES_AT_ONCE = 65_536


@dataclass(frozen=True)
class _Lane:
    """Blocks of one domain by time, none beginning before the end of the one before it.

    int64 `[n]` each: `blocks` numbers, `rows`, first and last times; `edges` `[n + 1]`, rows before each.
    """

    domain: int
    blocks: np.ndarray
    rows: np.ndarray
    first: np.ndarray
    last: np.ndarray
    edges: np.ndarray

    def until(self, time: np.ndarray) -> np.ndarray:
        """Rows with a time <= `time` (int64 `[p]`), int64 `[p]`; never falls as time rises."""
        found = np.searchsorted(self.first, time, side="right") - 1
        at = np.maximum(found, 0)
        first, last, rows = self.first[at], self.last[at], self.rows[at]
        # Multiplied first: below 2**53 the quotient's floor is exact.
        passed = (time - first).astype(np.float64) * (rows - 1) / np.maximum(last - first, 1)
        inside = np.where(time >= last, rows, 1 + np.minimum(passed, rows - 1).astype(np.int64))
        return np.where(found < 0, 0, self.edges[at] + inside)


def _lanes(domain: int, blocks: np.ndarray, rows: np.ndarray, first: np.ndarray, last: np.ndarray) -> list[_Lane]:
    """As few lanes as hold these blocks of one domain; a block that overlaps none is in the first one free."""
    order = np.lexsort((blocks, last, first))
    blocks, rows, first, last = blocks[order], rows[order], first[order], last[order]
    lane_of = np.zeros(len(blocks), np.int64)
    if (last[:-1] > first[1:]).any():
        ends: list[tuple[int, int]] = []
        for i, (begin, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            if ends and ends[0][0] <= begin:
                lane_of[i] = ends[0][1]
                heapq.heapreplace(ends, (end, ends[0][1]))
            else:
                lane_of[i] = len(ends)
                heapq.heappush(ends, (end, len(ends)))
    lanes = []
    for number in range(int(lane_of.max(initial=-1)) + 1):
        mine = lane_of == number
        edges = np.concatenate([[0], np.cumsum(rows[mine])])
        lanes.append(_Lane(domain, blocks[mine], rows[mine], first[mine], last[mine], edges))
    return lanes


class Timeline:
    """Rows of some blocks by time, dealt in batches to streams.

    Args:
        domain: int64 `[n]`, domain of every block.
        blocks: int64 `[n]`, their numbers in the index.
        rows: int64 `[n]`, their rows.
        times: int64 `[n, 2]`, first and last time.
        num_domains: of the schema.
        streams, batch_size: how each batch is cut.
        window: batches that a stream reads together; no effect on the order.

    Raises:
        UserError: too many blocks overlap.
    """

    def __init__(
        self,
        domain: np.ndarray,
        blocks: np.ndarray,
        rows: np.ndarray,
        times: np.ndarray,
        *,
        num_domains: int,
        streams: int,
        batch_size: int,
        window: int,
    ) -> None:
        self.num_domains, self.streams, self.batch_size, self.window = num_domains, streams, batch_size, window
        self.lanes: list[_Lane] = []
        for d in range(num_domains):
            mine = domain == d
            self.lanes += _lanes(d, blocks[mine], rows[mine], times[mine, 0], times[mine, 1])
        if len(self.lanes) > MOST_LANES:
            raise UserError(
                f"data.order: time: {len(self.lanes)} blocks of a domain overlap in time, at most {MOST_LANES} can be "
                "merged. Build the data set from all its rows again, which sorts them, or use data.order: shuffled."
            )
        self.rows = int(rows.sum())
        self.batches = -(-self.rows // batch_size)
        # Between two neighbouring marks no block begins or ends, so bisection starts there.
        self.marks = np.unique(times)
        self.rows_at_marks = sum(lane.until(self.marks) for lane in self.lanes)
        self._boundaries: np.ndarray | None = None

    def before(self, rows: np.ndarray) -> np.ndarray:
        """How many rows of each lane are among the `rows` (int64 `[p]`) earliest: int64 `[p, lanes]`."""
        at = np.minimum(np.searchsorted(self.rows_at_marks, rows), len(self.marks) - 1)
        late, early = self.marks[at], self.marks[np.maximum(at - 1, 0)]
        early = np.where(at == 0, late - 1, early)
        while (late - early > 1).any():
            middle = early + (late - early) // 2
            enough = sum(lane.until(middle) for lane in self.lanes) >= rows
            late, early = np.where(enough, middle, late), np.where(enough, early, middle)
        surely = np.stack([lane.until(late - 1) for lane in self.lanes], axis=1)
        tied = np.stack([lane.until(late) for lane in self.lanes], axis=1) - surely
        missing = rows - surely.sum(axis=1)
        return surely + np.clip(missing[:, None] - (np.cumsum(tied, axis=1) - tied), 0, tied)

    @property
    def boundaries(self) -> np.ndarray:
        """Rows of each lane before each batch: int64 `[batches + 1, lanes]`."""
        if self._boundaries is None:
            wanted = np.minimum(np.arange(self.batches + 1) * self.batch_size, self.rows)
            parts = [self.before(wanted[i : i + BATCHES_AT_ONCE]) for i in range(0, len(wanted), BATCHES_AT_ONCE)]
            self._boundaries = np.concatenate(parts)
        return self._boundaries

    def totals(self) -> np.ndarray:
        """Length of every stream, int64 `[streams]`."""
        full, rest = divmod(self.rows, self.batch_size)
        base, extra = divmod(rest, self.streams)
        return full * (self.batch_size // self.streams) + base + (np.arange(self.streams) < extra)

    def _shares(self, stream: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows start .. stop of each lane that a stream has of batches first .. last: int64 `[last - first, lanes]`."""
        before = self.boundaries[first : last + 1]
        counts = np.diff(before, axis=0)
        in_batch = np.cumsum(counts, axis=1) - counts
        base, extra = np.divmod(counts.sum(axis=1), self.streams)
        low = base * stream + np.minimum(extra, stream)
        high = low + base + (stream < extra)
        start = np.clip(low[:, None] - in_batch, 0, counts)
        stop = np.clip(high[:, None] - in_batch, 0, counts)
        return before[:-1] + start, before[:-1] + stop

    def windows(self, stream: int) -> np.ndarray:
        """How many of a stream's rows of each domain precede each window: int64 `[num_windows + 1, D]`."""
        start, stop = self._shares(stream, 0, self.batches)
        counts = np.zeros((self.batches + 1, self.num_domains), np.int64)
        for i, lane in enumerate(self.lanes):
            counts[1:, lane.domain] += stop[:, i] - start[:, i]
        counts = np.cumsum(counts, axis=0)
        edges = counts[[*range(0, self.batches, self.window), self.batches]]
        # The short last batch may leave a stream nothing.
        return edges[:-1] if len(edges) > 2 and (edges[-1] == edges[-2]).all() else edges

    def ranges(self, stream: int, window: int) -> list[tuple[_Lane, int, int]]:
        """Rows of lanes that make one window of a stream, lane after lane, batch after batch."""
        first = window * self.window
        start, stop = self._shares(stream, first, min(first + self.window, self.batches))
        found: list[tuple[_Lane, int, int]] = []
        for i, batch in np.argwhere((stop > start).T):
            lane, begin, end = self.lanes[i], int(start[batch, i]), int(stop[batch, i])
            if found and found[-1][0] is lane and found[-1][2] == begin:
                begin = found.pop()[1]
            found.append((lane, begin, end))
        return found

    def arrangement(self, stream: int, window: int) -> np.ndarray:
        """Where the rows of `ranges` go so that each batch has its own: int64 permutation."""
        first = window * self.window
        start, stop = self._shares(stream, first, min(first + self.window, self.batches))
        batch = np.tile(np.arange(len(start)), len(self.lanes))
        return np.argsort(np.repeat(batch, (stop - start).T.ravel()), kind="stable")
