"""Which passes over the data a run makes, and where it stands in them: a handful of integers.

An epoch reads the shards of a range of *generations* (appended shards count up): all there are
when it begins, or, after a watermark, only what came since. Order within an epoch is
`data.order`'s affair.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import Field

from ..config import Config
from ..data.batch import Batch
from ..data.index import Index
from ..data.order import Order
from ..data.reader import ShardReader
from ..data.stream import Stream
from ..errors import UserError
from ..strict import strict, to_dict

FROM_THE_START = -1


@strict
class Position:
    """Where a run stands after `step` steps.

    Attributes:
        step: steps done.
        epoch, epoch_step: the epoch in progress, and the steps of it done.
        after, upto: the epoch reads generations after < g <= upto.
        data: `fingerprint` of the data set up to `upto`.
    """

    step: int = Field(ge=0)
    epoch: int = Field(ge=0)
    epoch_step: int = Field(ge=0)
    after: int = Field(ge=FROM_THE_START)
    upto: int = Field(ge=0)
    data: str


def fingerprint(index: Index) -> str:
    """SHA-256 of what decides which row has which number: schema, and shards in order."""
    shards, schema = [(s.file, s.domain, s.sha256, s.generation) for s in index.shards], to_dict(index.schema)
    for feature in schema["features"].values():
        if not feature["vocabulary"]["digests"]:  # as before there were any: runs of then go on
            del feature["vocabulary"]["digests"]
    return hashlib.sha256(json.dumps([schema, shards]).encode()).hexdigest()


@dataclass(frozen=True)
class Pass:
    """One epoch's reading; its step k is the run's step `first + k`.

    `total` are the steps of the whole run as planned when the epoch begins; the schedule ends there.
    `first_row` is the number, in the whole data set, of the first row that it reads.
    """

    epoch: int
    after: int
    upto: int
    first: int
    total: int
    data: str
    first_row: int
    order: Order
    reader: ShardReader

    @property
    def end(self) -> int:
        """Steps of the run when the epoch is through."""
        return self.first + self.order.steps

    @property
    def stop(self) -> int:
        """Steps of the run when it leaves this pass."""
        return min(self.end, self.total)

    def rows(self, start: int, stop: int, rank: int = 0, world_size: int = 1) -> int:
        """Rows, masked ones left out, that a rank gets in the run's steps start .. stop."""
        order, k = self.order, self.order.per_stream
        lengths = [order.stream_rows(s) for s in range(rank, order.streams, world_size)]
        return sum(min(n, (stop - self.first) * k) - min(n, (start - self.first) * k) for n in lengths)


class Passes:
    """The passes of a run, opened one after the other as batches are asked for.

    Batches are asked for ahead of training, so that the next pass may be open while the steps of
    the last one are still being trained: everything here is asked by the step it is about.

    Only the stream that is read from is held: a stream holds windows of rows.

    Args:
        config: of the run.
        newest: the data set's index as it is now. Collective: all ranks get the same.
        open_stream: this rank's stream over an index; the second argument asks for every row once,
            whatever the weights.
        start: where an earlier run stood.
    """

    def __init__(
        self,
        config: Config,
        newest: Callable[[], Index],
        open_stream: Callable[[Index, bool], Stream],
        start: Position | None = None,
    ) -> None:
        self.config, self.newest, self.open_stream = config, newest, open_stream
        self.start_step = start.step if start else 0
        self.opened: list[Pass] = []
        index = newest()
        if start is None:
            self.opened.append(self._pass(0, FROM_THE_START, 0, index))
        else:
            self.opened.append(self._reopen(start, index))
            if self.opened[0].first + self.opened[0].order.steps < start.step:
                raise UserError(f"the checkpoint is at step {start.epoch_step} of an epoch that has fewer.")
            if start.step >= self.opened[0].stop and self._may_go_on():
                self._open_next(index)

    def _reopen(self, start: Position, index: Index) -> Pass:
        known = index.between(FROM_THE_START, start.upto)
        if fingerprint(known) != start.data:
            raise UserError(
                "the data set is not the one that the checkpoint was trained on: its schema or its shards up to "
                f"generation {start.upto} differ. Restore it, or start a new run with --run.name."
            )
        return self._pass(start.epoch, start.after, start.step - start.epoch_step, known)

    def _pass(self, epoch: int, after: int, first: int, index: Index) -> Pass:
        """The pass over everything in `index` that is newer than generation `after`."""
        read = index.between(after, index.generation)
        last = self.opened[-1] if self.opened else None
        if last is None or (last.after, last.upto) != (after, index.generation):
            self.stream = self.open_stream(read, after != FROM_THE_START)
        order, reader = self.stream.order, self.stream.reader
        if order.steps < 1:
            raise UserError(
                f"an epoch of {read.rows:,} rows has no full batch: lower data.batch_size, or set data.drop_last: "
                "false."
            )
        epochs = 1 if after != FROM_THE_START else max(self.config.train.epochs - epoch, 1)
        total = first + order.steps * epochs
        if self.config.train.steps:
            total = min(total, self.config.train.steps)
        return Pass(
            epoch, after, index.generation, first, total, fingerprint(index), index.rows - read.rows, order, reader
        )

    def _may_go_on(self) -> bool:
        """Whether another pass may follow the last opened one, as far as the config says."""
        last, steps = self.opened[-1], self.config.train.steps
        if 0 < steps <= last.end:
            return False
        return self.config.data.from_watermark or last.epoch + 1 < self.config.train.epochs

    def _open_next(self, index: Index) -> bool:
        """Open what follows the last opened pass, the data set being `index` now; False if nothing does."""
        last, after = self.opened[-1], FROM_THE_START
        if self.config.data.from_watermark:
            after = last.upto
            if not self._is_enough(index, after):
                return False
        self.opened.append(self._pass(last.epoch + 1, after, last.end, index))
        return True

    def _is_enough(self, index: Index, after: int) -> bool:
        """Whether what was appended after a generation makes a batch; if not, it waits for more."""
        data = self.config.data
        if index.generation <= after:
            return False
        new = index.between(after, index.generation)
        rows = sum(new.rows_of(domain) for domain in data.domains or index.schema.domains.names)
        return rows >= (data.batch_size if data.drop_last else 1)

    def batches(self) -> Iterator[Batch]:
        """This rank's batches from `start` to the end of the run."""
        step = self.start_step
        while True:
            one = self.opened[-1]
            yield from self.stream.batches(one.epoch, step - one.first, one.stop - one.first)
            step = max(step, one.stop)
            if not (self._may_go_on() and self._open_next(self.newest())):
                return

    def at(self, step: int) -> Pass:
        """The pass in progress when `step` steps are done; at its very end the next one, if it is open."""
        return next(one for one in reversed(self.opened) if one.first <= step or one is self.opened[0])

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train at the start."""
        return self.start_step >= self.opened[-1].stop

    def position(self, step: int) -> Position:
        """Where the run stands when `step` steps are done; at an epoch's end, in that epoch."""
        one = next((one for one in self.opened if one.first <= step <= one.end), self.opened[-1])
        return Position(
            step=step,
            epoch=one.epoch,
            epoch_step=step - one.first,
            after=one.after,
            upto=one.upto,
            data=one.data,
        )

    def rows_until(self, step: int) -> int:
        """Rows over all ranks of the steps from `start` to `step`, masked ones left out."""
        return sum(
            one.rows(max(self.start_step, one.first), min(step, one.end)) for one in self.opened if one.first < step
        )
