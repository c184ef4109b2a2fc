"""A rank's stream of batches: blocks fetched by WebDataset, in the canonical order, ahead of use.

`Stream` assembles windows and batches as `order.Order` says, from the blocks that `reader` decodes.
A background thread keeps a bounded number of batches ready.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np

from ..errors import UserError
from .batch import Batch, make_batch
from .order import Order
from .reader import ShardReader
from .rows import Rows


class _LogicalStream:
    """One of the S streams: holds the window that is being read."""

    def __init__(self, order: Order, reader: ShardReader, number: int) -> None:
        self.order, self.reader, self.number = order, reader, number
        self.epoch = self.window = -1
        self.rows: Rows | None = None

    def take(self, epoch: int, start: int, stop: int) -> list[Rows]:
        """Rows start .. stop of this epoch, as slices of windows."""
        if epoch != self.epoch:
            self.epoch, self.window = epoch, -1
            self.before = self.order.windows(epoch, self.number)
            self.edges = self.before.sum(axis=1)
        stop = min(stop, int(self.edges[-1]))
        parts = []
        while start < stop:
            window = int(np.searchsorted(self.edges, start, side="right")) - 1
            if window != self.window:
                self._load(window)
            first = int(self.edges[window])
            end = min(stop, int(self.edges[window + 1]))
            parts.append(self.rows.slice(start - first, end - first))
            start = end
        return parts

    def _load(self, window: int) -> None:
        before, after = self.before[window], self.before[window + 1]
        pieces = self.order.window_pieces(self.epoch, self.number, before, after)
        rows = Rows.concat([self.reader.rows(p.block).slice(p.start, p.stop) for p in pieces])
        self.rows = rows.take(self.order.arrangement(self.epoch, self.number, window, after - before))
        self.window = window


class Stream:
    """The batches of one rank.

    Args:
        reader: of the data set's blocks.
        order: the data set's canonical order.
        rank, world_size: which streams this rank serves.
        vectors: looks up frozen text vectors (see `make_batch`).
        read_ahead: batches kept ready.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: Order,
        *,
        rank: int = 0,
        world_size: int = 1,
        vectors: Callable[[np.ndarray], np.ndarray] | None = None,
        read_ahead: int = 4,
    ) -> None:
        if world_size > order.streams:
            raise UserError(
                f"{world_size} ranks need at least as many logical streams, data.streams is {order.streams}: raise it "
                "(and data.batch_size to a multiple of it)."
            )
        self.reader, self.order, self.vectors, self.read_ahead = reader, order, vectors, read_ahead
        mine = range(rank, order.streams, world_size)
        reader.keep = 4 * len(mine)
        self.streams = [_LogicalStream(order, reader, s) for s in mine]
        self.batch_rows = -(-order.streams // world_size) * order.per_stream

    @property
    def steps(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return self.order.steps

    def batch(self, epoch: int, step: int) -> Batch:
        """This rank's part of global batch `step`: always `batch_rows` rows, masked where short."""
        k = self.order.per_stream
        parts = [part for s in self.streams for part in s.take(epoch, step * k, (step + 1) * k)]
        if not parts:
            parts = [self.streams[0].rows.slice(0, 0)] if self.streams[0].rows else [self._no_rows()]
        rows = Rows.concat([part.compact() for part in parts])
        return make_batch(rows, self.reader.index.schema, self.batch_rows, self.vectors)

    def _no_rows(self) -> Rows:
        return self.reader.rows(0).slice(0, 0)

    def batches(self, epoch: int, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches start_step .. stop_step (default: to the epoch's end), prepared in the background.

        Raises:
            UserError: as soon as the consumer reaches the batch whose data is at fault.
        """
        stop_step = self.steps if stop_step is None else min(stop_step, self.steps)
        ready: queue.Queue = queue.Queue(maxsize=self.read_ahead)
        cancelled = threading.Event()

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
