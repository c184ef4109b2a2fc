"""A run's evaluation as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

COLUMNS = ("rows", "auc", "gauc", "logloss", "calibration", "ndcg")
SHORT = {"calibration": "calib."}


def print_evaluation(evaluation: dict[str, Any], folder: Path) -> None:
    """Per domain and task: rows, AUC, grouped AUC, log loss, calibration, NDCG; then the rates.

    Baselines, where there are, stand below the task whose rows they score.
    """
    table = Table(
        title=f"{evaluation['split']} split, step {evaluation['step']}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("domain")
    table.add_column("task")
    for column in COLUMNS:
        # The whole must fit 80 columns, or names of domains are cut.
        table.add_column(SHORT.get(column, column), justify="right")
    scope = None
    for line in evaluation_lines(evaluation):
        if line["scope"] == "all" and scope != "all":
            table.add_section()
        scope = line["scope"]
        table.add_row("" if line["baseline"] else line["scope"], line["baseline"] or line["task"], *line["values"])
    console = Console()
    console.print(table)
    for name, baseline in evaluation.get("baselines", {}).items():
        said = baseline.get("about") or f"left out: {baseline['left_out']}"
        console.print(f"{name}: {said}", highlight=False, soft_wrap=True)
    for name, value in evaluation["rates"].items():
        console.print(f"{name.replace('_', ' ')}: {value:,.1f}", highlight=False)
    console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)


def evaluation_lines(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """One line a domain (`all` last), task with rows, and baseline: `scope`, `task`, `baseline` ("" is the model
    itself) and `values`, the metrics of `COLUMNS` as they are shown."""
    scopes = {**{name: ("domains", name) for name in evaluation["domains"]}, "all": ("overall",)}
    baselines = {n: b for n, b in evaluation.get("baselines", {}).items() if "left_out" not in b}
    lines = []
    for scope, path in scopes.items():
        for task, metrics in _at(evaluation, path).items():
            if not metrics["rows"]:
                continue
            others = {name: _at(held, path).get(task) for name, held in baselines.items()}
            for name, found in {"": metrics, **others}.items():
                if found:
                    ndcg = next((v for k, v in found.items() if k.startswith("ndcg")), None)
                    values = [_shown({**found, "ndcg": ndcg}.get(c)) for c in COLUMNS]
                    lines.append({"scope": scope, "task": task, "baseline": name, "values": values})
    return lines


def _at(held: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path:
        held = held[key]
    return held


def _shown(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
