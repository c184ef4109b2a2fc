"""A rank's stream of batches: blocks in the canonical order, read and put together ahead of use.

`Stream` assembles windows and batches as `order.Order` says, from the blocks that `reader` decodes.
A background thread keeps a bounded number of batches ready. Held in memory at any time: a window of
every stream, the few blocks that it shares with windows to come, and those batches.
"""

from __future__ import annotations

import queue
import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from ..errors import UserError
from ..schema import Schema
from .batch import Batch, make_batch
from .candidates import Candidates
from .order import Order, Piece
from .reader import ShardReader
from .rows import Ragged, Rows
from .textpool import TextPool
from .vocabulary import IdMap, IdParts
from .window import Window, cut


class _Blocks:
    """The blocks that the streams of a rank read next: fetched ahead, and decoded once for all who share one."""

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader
        reader.keep = 1  # what is worth keeping is kept here
        self.streams: list[_LogicalStream] = []
        self.held: dict[int, Rows] = {}

    def announce(self, stream: _LogicalStream) -> None:
        """Tell the reader what is read next: by this stream, by those after it, and so round."""
        at = self.streams.index(stream)
        self.reader.prefetch([block for s in self.streams[at:] + self.streams[:at] for block in s.coming])

    def rows(self, number: int) -> Rows:
        if number not in self.held:
            self.held[number] = self.reader.rows(number)
        return self.held[number]

    def forget(self) -> None:
        """Let go of what no stream reads in its next window."""
        coming = {block for stream in self.streams for block in stream.coming}
        self.held = {number: rows for number, rows in self.held.items() if number in coming}


class _LogicalStream:
    """One of the S streams: holds the window that is being read, and cuts batches from it.

    Attributes:
        coming: the blocks that it will ask for next, soonest first.
    """

    def __init__(self, order: Order, blocks: _Blocks, number: int, pool: TextPool, segment: int) -> None:
        self.order, self.blocks, self.number, self.pool, self.segment = order, blocks, number, pool, segment
        self.held: Window | None = None
        self.coming: list[int] = []

    def open(self, epoch: int, start: int) -> None:
        """Get ready to read an epoch from row `start`."""
        self.epoch, self.window = epoch, -1
        self.before = self.order.windows(epoch, self.number)
        self.edges: list[int] = self.before.sum(axis=1).tolist()
        self._expect(self._window_of(start))

    def take(self, start: int, stop: int) -> list[tuple[Window, int, int]]:
        """Rows start .. stop of this epoch, as slices of windows (see `window.cut`)."""
        stop = min(stop, self.edges[-1])
        slices = []
        while start < stop:
            window = self._window_of(start)
            if window != self.window:
                slices = self._set_aside(slices)
                self._load(window)
            first, end = self.edges[window], min(stop, self.edges[window + 1])
            slices.append((self.held, start - first, end - first))
            start = end
        return slices

    def _set_aside(self, slices: list[tuple[Window, int, int]]) -> list[tuple[Window, int, int]]:
        """The same rows as a small window of their own, before a new window takes the place of their texts."""
        if not slices:
            return []
        rows = cut(slices, self.pool)
        aside = Window([rows], np.arange(len(rows)), self.blocks.reader.index.schema, self.pool, self.segment + 1)
        return [(aside, 0, len(rows))]

    def _window_of(self, row: int) -> int:
        return bisect_right(self.edges, row) - 1

    def _load(self, window: int) -> None:
        pieces = self._expect(window)
        self.blocks.announce(self)
        # Not two windows at a time, and none where reading this one fails.
        self.held, self.window = None, -1
        found = (self.blocks.rows(p.block).slice(p.start, p.stop) for p in pieces)
        counts = self.before[window + 1] - self.before[window]
        # Here and not batch by batch: one stream's window fits the processor's cache, all of them do not.
        arrangement = self.order.arrangement(self.epoch, self.number, window, counts)
        self.held = Window(found, arrangement, self.blocks.reader.index.schema, self.pool, self.segment)
        self.window = window
        self._expect(window + 1)
        self.blocks.forget()

    def _expect(self, window: int) -> list[Piece]:
        """The pieces of a window, which is read next; none past the last."""
        ended = window >= len(self.before) - 1
        pieces = [] if ended else self.order.window_pieces(self.epoch, self.number, *self.before[window : window + 2])
        self.coming = [piece.block for piece in pieces]
        return pieces


class Stream:
    """The batches of one rank.

    Args:
        reader: of the data set's blocks.
        order: the data set's canonical order.
        rank, world_size: which streams this rank serves.
        vectors: gives frozen text vectors (see `make_batch`).
        id_maps: what becomes of features' ids (see `make_batch`).
        identify, look_up: see `make_batch`.
        candidates: of this rank's batches.
        schema: of its batches, which is the data set's with the candidates' features; None is the data set's.
        read_ahead: batches kept ready.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: Order,
        *,
        rank: int = 0,
        world_size: int = 1,
        vectors: Callable[[np.ndarray, Ragged | None], np.ndarray] | None = None,
        id_maps: Mapping[str, IdMap | IdParts] | None = None,
        identify: Collection[str] = (),
        look_up: bool = True,
        candidates: Candidates | None = None,
        schema: Schema | None = None,
        read_ahead: int = 4,
    ) -> None:
        if world_size > order.streams:
            raise UserError(
                f"{world_size} ranks need at least as many logical streams, data.streams is {order.streams}: raise it "
                "(and data.batch_size to a multiple of it)."
            )
        self.reader, self.order, self.vectors, self.read_ahead = reader, order, vectors, read_ahead
        self.id_maps, self.identify, self.look_up = id_maps, identify, look_up
        self.candidates, self.schema = candidates, schema or reader.index.schema
        mine = range(rank, order.streams, world_size)
        blocks = _Blocks(reader)
        # Two segments a stream: its window's, and one for the end of the window before.
        self.pool = TextPool([0, 1] * len(mine))
        self.streams = [_LogicalStream(order, blocks, s, self.pool, 2 * i) for i, s in enumerate(mine)]
        blocks.streams = self.streams
        self.epoch: int | None = None
        self.batch_rows = -(-order.streams // world_size) * order.per_stream

    @property
    def steps(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return self.order.steps

    def batch(self, epoch: int, step: int) -> Batch:
        """This rank's part of global batch `step`: always `batch_rows` rows, masked where short."""
        start, stop = step * self.order.per_stream, (step + 1) * self.order.per_stream
        if epoch != self.epoch:
            self.epoch = epoch
            for stream in self.streams:
                stream.open(epoch, start)
        slices = [part for stream in self.streams for part in stream.take(start, stop)]
        schema = self.reader.index.schema
        if not slices:
            # Past this rank's last row; any window has the columns.
            no_rows = np.zeros(0, np.int64)
            some = self.reader.rows(0).slice(0, 0)
            held = self.streams[0].held or Window([some], no_rows, schema, self.pool, 0)
            slices = [(held, 0, 0)]
        return make_batch(
            cut(slices, self.pool),
            self.schema,
            self.batch_rows,
            self.vectors,
            self.id_maps,
            self.identify,
            self.look_up,
            self.candidates(epoch, step) if self.candidates else None,
        )

    def batches(self, epoch: int, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches start_step .. stop_step (default: to the epoch's end), prepared in the background.

        Raises:
            UserError: as soon as the consumer reaches the batch whose data is at fault.
        """
        stop_step = self.steps if stop_step is None else min(stop_step, self.steps)
        ready: queue.Queue = queue.Queue(maxsize=self.read_ahead)
        # A read that waits for a server ends with its consumer.
        cancelled = self.reader.cancelled = threading.Event()

        def offer(item: Batch | Exception | None) -> bool:
            while not cancelled.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def prepare() -> None:
            try:
                for step in range(start_step, stop_step):
                    if not offer(self.batch(epoch, step)):
                        return
                offer(None)
            except Exception as error:  # handed to the consumer, who raises it
                offer(error)

        thread = threading.Thread(target=prepare, name="read-ahead", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            cancelled.set()
            thread.join()
            self.reader.prefetch([])
            self.reader.cancelled = threading.Event()
