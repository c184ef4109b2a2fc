"""What a run says while it runs: metrics.jsonl, TensorBoard, and a progress line.

Only rank 0 tracks; the other ranks hold a `NoTracker`, so that the loop has no `if`. What cannot be
written (a full disk) is said once and does not end the run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..files import write_text

PLAIN_SECONDS = 5.0


class Stopwatch:
    """Seconds of training alone, and rows per second from lap to lap."""

    def __init__(self) -> None:
        self.started = self.last = time.monotonic()
        self.rows = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def lap(self, rows: int) -> float:
        """Rows per second since the last lap, `rows` being those since the start."""
        now = time.monotonic()
        rate = (rows - self.rows) / (now - self.last)
        self.last, self.rows = now, rows
        return rate

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out what happens inside."""
        before = time.monotonic()
        yield
        away = time.monotonic() - before
        self.started += away
        self.last += away


class NoTracker:
    """Tracks nothing."""

    def step(
        self,
        step: int,
        total: int,
        losses: dict[str, float],
        rows_per_s: float,
        managed: dict[str, dict[str, float]] | None = None,
    ) -> None: ...

    def evaluation(self, step: int, split: str, result: dict[str, Any], news: dict[str, Any] | None = None) -> None: ...

    def data(self, step: int, epoch: int, summary: dict[str, dict[str, int]]) -> None: ...

    def has_evaluation(self, step: int) -> bool:
        return False

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class Tracker(NoTracker):
    """Writes below `folder` and shows progress.

    A terminal gets a live bar; anything else a line every few seconds.

    Args:
        start: steps that an earlier run has done; what it wrote beyond them is taken back, for
            those steps are trained again.
    """

    def __init__(self, folder: Path, start: int = 0, console: Console | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.console = console or Console()
        self.started = self.last_said = time.monotonic()
        self.start = start
        self.failed = False
        path = folder / "metrics.jsonl"
        self.evaluated = _cut(path, start) if path.exists() else set()
        self.lines = path.open("a", buffering=1)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
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
        self.task = self.progress.add_task("train", completed=start, loss=float("nan"), rate=0.0)
        self.progress.start()

    def step(
        self,
        step: int,
        total: int,
        losses: dict[str, float],
        rows_per_s: float,
        managed: dict[str, dict[str, float]] | None = None,
    ) -> None:
        """Record that `step` steps of `total` are done, the last with these losses of the global batch.

        Args:
            managed: what happened to the ids of each managed table since the last record.
        """
        now = time.monotonic()
        entry = {"step": step, "seconds": round(now - self.started, 3), "losses": losses, "rows_per_s": rows_per_s}
        self._write(entry | ({"managed": managed} if managed else {}))
        scalars = {f"loss/{name}": value for name, value in losses.items()} | {"rows_per_s": rows_per_s}
        for table, numbers in (managed or {}).items():
            scalars |= {f"managed/{table}/{name}": value for name, value in numbers.items()}
        self._draw(scalars, step)
        self.progress.update(self.task, completed=step, total=total, loss=losses["loss"], rate=rows_per_s)
        if not self.console.is_terminal and (now - self.last_said >= PLAIN_SECONDS or step == total):
            self.last_said = now
            left = (now - self.started) / (step - self.start) * (total - step)
            self.console.print(
                f"train {step}/{total}  loss {losses['loss']:.4f}  {rows_per_s:,.0f} rows/s  ETA {left:.0f} s",
                highlight=False,
            )

    def evaluation(self, step: int, split: str, result: dict[str, Any], news: dict[str, Any] | None = None) -> None:
        """Record an evaluation's `overall` metrics and, on TensorBoard, each domain's.

        Args:
            step: steps that the evaluated model was trained for.
            news: of early stopping: the best so far.
        """
        entry = {"step": step, "split": split, "evaluation": result["overall"]}
        self._write(entry | ({"early_stopping": news} if news else {}))
        # Another split's values are no point of the curve of data.valid.
        prefix = "" if split == "valid" else f"{split}/"
        scalars = {
            f"{prefix}{scope}/{task}/{name}": value
            for scope, tasks in {"overall": result["overall"], **result["domains"]}.items()
            for task, metrics in tasks.items()
            for name, value in metrics.items()
            if value is not None
        }
        if news and news["best"] is not None:
            scalars["early_stopping/best"] = news["best"]
        self._draw(scalars, step)

    def has_evaluation(self, step: int) -> bool:
        """Whether the earlier run has recorded one of data.valid after `step` steps."""
        return step in self.evaluated

    def data(self, step: int, epoch: int, summary: dict[str, dict[str, int]]) -> None:
        """Record what the epoch that step number `step` is the first of reads of each domain.

        Says where that is not every row once.
        """
        self._write({"step": step, "epoch": epoch, "data": summary})
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
        for file in (self.lines, self.board):
            with self._surviving():
                file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        with self._surviving():
            self.lines.write(json.dumps({"time": time.time(), **entry}) + "\n")

    def _draw(self, scalars: dict[str, float], step: int) -> None:
        with self._surviving():
            for name, value in scalars.items():
                self.board.add_scalar(name, value, step)

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.failed:
                self.failed = True
                print(f"dist-rec: metrics cannot be written: {error}; training goes on without them.", file=sys.stderr)


def _cut(path: Path, step: int) -> set[int]:
    """Take back the lines of metrics.jsonl that are about later steps than `step`.

    Returns:
        Steps with an evaluation of data.valid.
    """
    kept, evaluated = [], set()
    for line in path.read_text().splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the process died writing it
        if entry["step"] <= step:
            kept.append(line)
            if "evaluation" in entry and entry.get("split", "valid") == "valid":
                evaluated.add(entry["step"])
    write_text(path, "".join(kept))
    return evaluated
