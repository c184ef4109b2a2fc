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
    """Per domain and task: rows, AUC, grouped AUC, log loss, calibration, NDCG; then the rates."""
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
    for scope, tasks in {**evaluation["domains"], "all": evaluation["overall"]}.items():
        if tasks is evaluation["overall"]:
            table.add_section()
        for task, metrics in tasks.items():
            if metrics["rows"]:
                ndcg = next((v for k, v in metrics.items() if k.startswith("ndcg")), None)
                shown = [_shown({**metrics, "ndcg": ndcg}[c]) for c in COLUMNS]
                table.add_row(scope, task, *shown)
    console = Console()
    console.print(table)
    for name, value in evaluation["rates"].items():
        console.print(f"{name.replace('_', ' ')}: {value:,.1f}", highlight=False)
    console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)


def _shown(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
