"""What a run says while it runs: metrics.jsonl, TensorBoard, and a progress line.

Only rank 0 tracks; the other ranks hold a `NoTracker`, so that the loop has no `if`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 5.0


class NoTracker:
    """Tracks nothing."""

    def step(self, step: int, losses: dict[str, float], rows_per_s: float) -> None: ...

    def evaluation(self, step: int, result: dict[str, Any]) -> None: ...

    def data(self, summary: dict[str, dict[str, int]]) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class Tracker(NoTracker):
    """Writes below `folder` and shows progress towards `total` steps.

    A terminal gets a live bar; anything else a line every few seconds.
    """

    def __init__(self, folder: Path, total: int, console: Console | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.console = console or Console()
        self.started = self.last_said = time.monotonic()
        self.total = total
        self.lines = (folder / "metrics.jsonl").open("a", buffering=1)
        self.board = SummaryWriter(str(folder / "tensorboard"))
        self.progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[rate]:,.0f} rows/s"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("train", total=total, loss=float("nan"), rate=0.0)
        self.progress.start()

    def step(self, step: int, losses: dict[str, float], rows_per_s: float) -> None:
        """Record that `step` steps are done, the last with these losses of the global batch."""
        now = time.monotonic()
        self._write({"step": step, "seconds": round(now - self.started, 3), "losses": losses, "rows_per_s": rows_per_s})
        for name, value in losses.items():
            self.board.add_scalar(f"loss/{name}", value, step)
        self.board.add_scalar("rows_per_s", rows_per_s, step)
        self.progress.update(self.task, completed=step, loss=losses["loss"], rate=rows_per_s)
        if not self.console.is_terminal and (now - self.last_said >= PLAIN_SECONDS or step == self.total):
            self.last_said = now
            left = (now - self.started) / step * (self.total - step)
            self.console.print(
                f"train {step}/{self.total}  loss {losses['loss']:.4f}  {rows_per_s:,.0f} rows/s  ETA {left:.0f} s",
                highlight=False,
            )

    def evaluation(self, step: int, result: dict[str, Any]) -> None:
        """Record an evaluation's `overall` metrics and, on TensorBoard, each domain's."""
        self._write({"step": step, "evaluation": result["overall"]})
        for scope, tasks in {"overall": result["overall"], **result["domains"]}.items():
            for task, metrics in tasks.items():
                for name, value in metrics.items():
                    if value is not None:
                        self.board.add_scalar(f"{scope}/{task}/{name}", value, step)

    def data(self, summary: dict[str, dict[str, int]]) -> None:
        """Record what an epoch reads of each domain; say where that is not every row once."""
        self._write({"data": summary})
        for name, rows in summary.items():
            if rows["repeated"] or rows["left_out"]:
                self.say(
                    f"{name}: an epoch reads {rows['quota']:,} of {rows['rows']:,} rows "
                    f"({rows['repeated']:,} again, {rows['left_out']:,} not at all)"
                )

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def close(self) -> None:
        self.progress.stop()
        self.lines.close()
        self.board.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self.lines.write(json.dumps({"time": time.time(), **entry}) + "\n")
