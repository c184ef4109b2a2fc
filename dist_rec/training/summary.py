"""What a run tells at its end about its data: what every epoch read, and which rows could not be read.

Goes through checkpoints, so that it is of the whole history however often the run was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch.distributed as dist
from pydantic import Field

from ..embeddings.ids import IdCounts
from ..strict import strict
from .passes import FROM_THE_START, Pass, Passes
from .process import Process


@strict
class LostBlock:
    """A block that could not be read; `rows` are the first and the last, numbered in the whole data set."""

    shard: str
    block: str
    rows: tuple[int, int]
    reason: str


@strict
class Lost:
    """`rows` counts rows that steps lack, again in every epoch."""

    rows: int = Field(default=0, ge=0)
    blocks: list[LostBlock] = field(default_factory=list)

    @property
    def rows_of_blocks(self) -> int:
        return sum(last - first + 1 for first, last in (block.rows for block in self.blocks))


@strict
class Epoch:
    """What an epoch read: generations `after_generation` < g <= `upto_generation`, and `Order.summary` by domain."""

    epoch: int = Field(ge=0)
    after_generation: int = Field(ge=FROM_THE_START)
    upto_generation: int = Field(ge=0)
    domains: dict[str, dict[str, int]]


@strict
class Summary:
    """The whole summary; `attempts` counts how often the run was started, `managed` what became of ids, by table."""

    attempts: int = Field(default=0, ge=0)
    epochs: list[Epoch] = field(default_factory=list)
    lost: Lost = field(default_factory=Lost)
    managed: dict[str, IdCounts] = field(default_factory=dict)


class Account:
    """One rank's part of the summary.

    Args:
        process: this rank.
        earlier: the summary in the checkpoint that the run goes on from.
        count_ids: what became of managed ids since this process began, over all ranks.
    """

    def __init__(self, process: Process, earlier: Summary, count_ids: Callable[[], dict[str, IdCounts]]) -> None:
        self.process, self.earlier, self.count_ids = process, earlier, count_ids
        self.epochs = {entry.epoch: entry for entry in earlier.epochs}
        self.lost_rows = 0

    def begin(self, one: Pass) -> None:
        """Note what an epoch reads."""
        self.epochs[one.epoch] = Epoch(
            epoch=one.epoch, after_generation=one.after, upto_generation=one.upto, domains=one.order.summary()
        )

    def count(self, one: Pass, step: int, rows: int) -> None:
        """Note that this rank trained `rows` rows in the step that made it `step` steps."""
        self.lost_rows += one.rows(step - 1, step, self.process.rank, self.process.world_size) - rows

    def _lost_blocks(self, passes: Passes) -> list[LostBlock]:
        first_rows = {id(one.reader): (one.reader, one.first_row) for one in passes.opened}
        found = []
        for reader, first in first_rows.values():
            for entry in reader.lost_summary():
                start, stop = entry["rows"]
                found.append(LostBlock(**{**entry, "rows": (first + start, first + stop)}))
        return found

    def rows_of_lost_blocks(self, passes: Passes) -> int:
        """Rows of the blocks that this rank could not read."""
        return Lost(blocks=self._lost_blocks(passes)).rows_of_blocks

    def gather(self, passes: Passes) -> Summary:
        """The summary of all ranks so far. Collective."""
        everyone: list[Any] = [None] * self.process.world_size
        dist.all_gather_object(everyone, (self.lost_rows, self._lost_blocks(passes)))
        found = [*self.earlier.lost.blocks, *(block for _, blocks in everyone for block in blocks)]
        distinct = {(block.shard, block.block): block for block in found}
        return Summary(
            attempts=self.earlier.attempts + 1,
            epochs=[self.epochs[epoch] for epoch in sorted(self.epochs)],
            lost=Lost(
                rows=self.earlier.lost.rows + sum(rows for rows, _ in everyone),
                blocks=[distinct[key] for key in sorted(distinct)],
            ),
            managed={
                table: now.after(self.earlier.managed.get(table, IdCounts())) for table, now in self.count_ids().items()
            },
        )
