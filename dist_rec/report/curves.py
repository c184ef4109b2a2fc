"""Learning curves out of a run's metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS = ("auc", "logloss", "ndcg", "recall", "mrr")

Line = tuple[list[float], list[float]]


def read_curves(path: Path) -> dict[str, Any]:
    """What metrics.jsonl holds, as lines of (steps, values); empty where there is no file.

    Returns:
        `losses` by name, `rows_per_s`, and `evaluation` by metric (`METRICS`, with their cuts) and task, without what
        was never defined.
    """
    losses: dict[str, Line] = {}
    rates: Line = ([], [])
    evaluation: dict[str, dict[str, Line]] = {}
    entries = _entries(path)
    stops_early = any("early_stopping" in entry for entry in entries)
    for entry in entries:
        step = entry["step"]
        for name, value in entry.get("losses", {}).items():
            _put(losses.setdefault(name, ([], [])), step, value)
        if "rows_per_s" in entry:
            _put(rates, step, entry["rows_per_s"])
        if stops_early and entry.get("split") != "valid":
            continue  # another split's, of a step that the curve has passed already
        for task, metrics in entry.get("evaluation", {}).items():
            for metric, value in metrics.items():
                if value is not None and metric.startswith(METRICS):
                    _put(evaluation.setdefault(metric, {}).setdefault(task, ([], [])), step, value)
    return {"losses": losses, "rows_per_s": rates, "evaluation": evaluation}


def _put(line: Line, step: float, value: float) -> None:
    line[0].append(step)
    line[1].append(value)


def _entries(path: Path) -> list[dict[str, Any]]:
    found = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue  # the process died writing it
    return found
