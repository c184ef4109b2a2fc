"""Which rows every step was trained on: `rows/<attempt>-<rank>.jsonl` of the run folder.

A rank writes one line a step. Whoever resumes begins a new attempt, and trains some steps of the one
before again; `history` keeps of each step what its last attempt saw.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist
from torch import Tensor


class RowRecord:
    """Writes the lines of one rank. Collective: made by all ranks together."""

    def __init__(self, folder: Path) -> None:
        attempt = [0]
        if dist.get_rank() == 0:
            folder.mkdir(exist_ok=True)
            attempt = [1 + max((int(p.name.split("-")[0]) for p in folder.glob("*.jsonl")), default=-1)]
        dist.broadcast_object_list(attempt)
        self.file = (folder / f"{attempt[0]:05d}-{dist.get_rank():05d}.jsonl").open("w", buffering=1)

    def step(self, step: int, epoch: int, rows: Tensor) -> None:
        """Record that step number `step` (from 1) was trained on `rows`, int64 `[n]`, of `epoch`."""
        self.file.write(json.dumps({"step": step, "epoch": epoch, "rows": rows.tolist()}) + "\n")

    def close(self) -> None:
        self.file.close()


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
