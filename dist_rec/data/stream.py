"""A rank's stream of batches: blocks fetched by WebDataset, in the canonical order, ahead of use.

`ShardReader` fetches a block's byte range, which is tar by itself, and lets WebDataset read it;
`Stream` assembles windows and batches as `order.Order` says. A background thread keeps a
bounded number of batches ready.
"""

from __future__ import annotations

import io
import queue
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator

import fsspec
import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from ..errors import UserError
from .batch import Batch, make_batch
from .blocks import decode_block
from .index import Index, join
from .order import Order
from .rows import Rows


class ShardReader:
    """Random access to the blocks of a data set, counted over its whole index.

    Args:
        root: folder or fsspec URL.
        index: of that data set.
        features: which features to decode.
        with_tokens: whether token ids are wanted.
        keep: how many decoded blocks stay in memory.
    """

    def __init__(self, root: str, index: Index, features: list[str], with_tokens: bool, keep: int) -> None:
        self.root, self.index, self.features, self.with_tokens = root, index, features, with_tokens
        self.fs, _ = fsspec.core.url_to_fs(root)
        self.places = [(shard, block) for shard in index.shards for block in shard.blocks]
        self.first_rows = np.cumsum([0] + [block.rows for _, block in self.places])
        self.domain_of = {name: i for i, name in enumerate(index.schema.domains.names)}
        self.keep = keep
        self._decoded: OrderedDict[int, Rows] = OrderedDict()

    def payload(self, number: int) -> bytes:
        """The bytes of a block, checked against the index.

        Raises:
            UserError: shard missing or short, member not readable, checksum wrong.
        """
        shard, block = self.places[number]
        where = f"{join(self.root, shard.file)}, block {block.name}"
        try:
            data = self.fs.cat_file(join(self.root, shard.file), start=block.offset, end=block.offset + block.bytes)
        except FileNotFoundError:
            raise UserError(f"{where}: the shard is missing. Restore it, or build the data set again.") from None
        except Exception as error:  # what a file system raises is its own affair, HTTP's are no OSErrors
            raise UserError(f"{where}: cannot be read: {error}.") from None
        if len(data) != block.bytes:
            raise UserError(
                f"{where} is damaged: {len(data)} bytes came where {block.bytes} were asked for; the shard is short, "
                "or its server ignores byte ranges. Run `dist-rec shards verify`."
            )
        members = tar_file_expander(iter([{"url": shard.file, "stream": io.BytesIO(data)}]))
        try:
            samples = list(group_by_keys(members))
        except Exception as error:
            raise UserError(f"{where} is damaged: {error}. Run `dist-rec shards verify`.") from None
        if len(samples) != 1 or "arrow" not in samples[0]:
            raise UserError(f"{where} is damaged: its byte range holds no Arrow member. Run `dist-rec shards verify`.")
        found = samples[0]["arrow"]
        if zlib.crc32(found) != block.crc32:
            first = int(self.first_rows[number])
            raise UserError(
                f"{where} (rows {first} .. {first + block.rows - 1}) is damaged: its checksum is not the index's. "
                "Restore the shard, or build the data set again."
            )
        return found

    def rows(self, number: int) -> Rows:
        """A block's decoded rows."""
        if number in self._decoded:
            self._decoded.move_to_end(number)
            return self._decoded[number]
        shard, block = self.places[number]
        where = f"{join(self.root, shard.file)}, block {block.name}"
        rows = decode_block(
            self.payload(number),
            self.index.schema,
            where,
            int(self.first_rows[number]),
            self.domain_of[shard.domain],
            self.features,
            self.with_tokens,
        )
        if len(rows) != block.rows:
            raise UserError(f"{where}: has {len(rows)} rows, the index says {block.rows}. Build the data set again.")
        self._decoded[number] = rows
        if len(self._decoded) > self.keep:
            self._decoded.popitem(last=False)
        return rows


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
        root, index: the data set.
        order: its canonical order.
        features: which features batches carry.
        rank, world_size: which streams this rank serves.
        with_tokens: whether batches carry token ids.
        vectors: looks up frozen text vectors (see `make_batch`).
        read_ahead: batches kept ready.
    """

    def __init__(
        self,
        root: str,
        index: Index,
        order: Order,
        features: list[str],
        *,
        rank: int = 0,
        world_size: int = 1,
        with_tokens: bool = False,
        vectors: Callable[[np.ndarray], np.ndarray] | None = None,
        read_ahead: int = 4,
    ) -> None:
        if world_size > order.streams:
            raise UserError(
                f"{world_size} ranks need at least as many logical streams, data.streams is {order.streams}: raise it "
                "(and data.batch_size to a multiple of it)."
            )
        self.index, self.order, self.vectors, self.read_ahead = index, order, vectors, read_ahead
        mine = range(rank, order.streams, world_size)
        reader = ShardReader(root, index, features, with_tokens, keep=4 * len(mine))
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
        return make_batch(rows, self.index.schema, self.batch_rows, self.vectors)

    def _no_rows(self) -> Rows:
        return self.streams[0].reader.rows(0).slice(0, 0)

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
