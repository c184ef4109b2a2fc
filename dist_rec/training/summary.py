"""What a run tells at its end about its data: what every epoch read, and which rows could not be read.

Goes through checkpoints, so that it is of the whole history however often the run was interrupted.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from .passes import Pass, Passes
from .process import Process


class Summary:
    """One rank's share of the summary.

    Args:
        process: this rank.
        earlier: what `gather` gave for the checkpoint that the run goes on from.
    """

    def __init__(self, process: Process, earlier: dict[str, Any] | None = None) -> None:
        self.process = process
        self.earlier = earlier or {"attempts": 0, "epochs": [], "lost": {"rows": 0, "blocks": []}}
        self.epochs = {entry["epoch"]: entry for entry in self.earlier["epochs"]}
        self.lost_rows = self.lost_in_epoch = 0

    def begin(self, one: Pass) -> None:
        """Note what an epoch reads."""
        self.lost_in_epoch = 0
        self.epochs[one.epoch] = {
            "epoch": one.epoch,
            "after_generation": one.after,
            "upto_generation": one.upto,
            "domains": one.order.summary(),
        }

    def count(self, one: Pass, step: int, rows: int) -> None:
        """Note that this rank trained `rows` rows in the step that made it `step` steps."""
        lost = one.rows(step - 1, step, self.process.rank, self.process.world_size) - rows
        self.lost_rows += lost
        self.lost_in_epoch += lost

    def gather(self, passes: Passes) -> dict[str, Any]:
        """The summary of all ranks so far: `attempts`, `epochs`, `lost` rows and blocks. Collective."""
        readers = {id(one.reader): one.reader for one in passes.opened}.values()
        mine = (self.lost_rows, [entry for reader in readers for entry in reader.lost_summary()])
        everyone: list[Any] = [None] * self.process.world_size
        dist.all_gather_object(everyone, mine)
        blocks = {(b["shard"], b["block"]): b for b in self.earlier["lost"]["blocks"]}
        blocks |= {(b["shard"], b["block"]): b for _, found in everyone for b in found}
        return {
            "attempts": self.earlier["attempts"] + 1,
            "epochs": [self.epochs[epoch] for epoch in sorted(self.epochs)],
            "lost": {
                "rows": self.earlier["lost"]["rows"] + sum(rows for rows, _ in everyone),
                "blocks": [blocks[key] for key in sorted(blocks)],
            },
        }
