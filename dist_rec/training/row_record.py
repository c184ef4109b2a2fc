"""Which rows every step was trained on: `rows/<attempt>-<rank>.jsonl` of the run folder.

A rank writes one line a step. Whoever resumes begins a new attempt, and trains some steps of the one
before again; `history` keeps of each step what its last attempt saw.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from ..errors import UserError


class RowRecord:
    """Writes the lines of one rank. Collective: made by all ranks together.

    Lines that cannot be written (a full disk) wait for the next step.
    """

    def __init__(self, folder: Path) -> None:
        attempt = [0]
        if dist.get_rank() == 0:
            folder.mkdir(exist_ok=True)
            attempt = [1 + max((int(p.name.split("-")[0]) for p in folder.glob("*.jsonl")), default=-1)]
        dist.broadcast_object_list(attempt)
        self.file = (folder / f"{attempt[0]:05d}-{dist.get_rank():05d}.jsonl").open("wb", buffering=0)
        self.written, self.waiting, self.fault = 0, b"", None

    def step(self, step: int, epoch: int, rows: Tensor) -> None:
        """Record that step number `step` (from 1) was trained on `rows`, int64 `[n]`, of `epoch`."""
        self.waiting += json.dumps({"step": step, "epoch": epoch, "rows": rows.tolist()}).encode() + b"\n"
        try:
            # What of it fits would be half a line.
            if self.file.write(self.waiting) < len(self.waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.written, self.waiting, self.fault = self.written + len(self.waiting), b"", None
        except OSError as error:
            self.file.truncate(self.written)
            self.file.seek(self.written)
            if self.fault is None:
                self.fault = error
                print(f"dist-rec: {self.file.name} cannot be written: {error}; its lines wait.", file=sys.stderr)

    def close(self) -> None:
        """Leave off.

        Raises:
            UserError: lines are still waiting.
        """
        self.file.close()
        if self.waiting:
            raise UserError(f"{self.file.name} lacks its last lines: {self.fault}. Make room, and resume the run.")


class NoRecord:
    """Records nothing."""

    def step(self, step: int, epoch: int, rows: Tensor) -> None: ...

    def close(self) -> None: ...


def history(folder: Path) -> dict[int, tuple[int, list[int]]]:
    """The final history: step -> (epoch, row numbers of all ranks), as the last attempt saw it."""
    attempts: dict[int, dict[int, tuple[int, list[int]]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        steps = attempts.setdefault(int(path.name.split("-")[0]), {})
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # else the rank died writing it
                entry = json.loads(line)
                epoch, rows = steps.get(entry["step"], (entry["epoch"], []))
                steps[entry["step"]] = (epoch, rows + entry["rows"])
    final: dict[int, tuple[int, list[int]]] = {}
    for attempt in sorted(attempts):
        if attempts[attempt]:
            resumed = min(attempts[attempt])
            final = {step: seen for step, seen in final.items() if step < resumed} | attempts[attempt]
    return final
