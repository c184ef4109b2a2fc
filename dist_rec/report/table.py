"""A run's evaluation as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

COLUMNS = ("rows", "auc", "gauc", "logloss", "calibration", "ndcg")


def print_evaluation(evaluation: dict[str, Any], folder: Path) -> None:
    """Per domain and task the metrics of `columns_of`, or why there are none; then the rates.

    Baselines, where there are, stand below the task whose rows they score.
    """
    console = Console()
    if why := evaluation.get("not_evaluated"):
        console.print(f"step {evaluation['step']}, not evaluated: {why}", highlight=False, soft_wrap=True)
    else:
        console.print(_table_of(evaluation))
    for name, baseline in evaluation.get("baselines", {}).items():
        said = baseline.get("about") or f"left out: {baseline['left_out']}"
        console.print(f"{name}: {said}", highlight=False, soft_wrap=True)
    for name, value in evaluation["rates"].items():
        console.print(f"{name.replace('_', ' ')}: {value:,.1f}", highlight=False)
    console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)


def _table_of(evaluation: dict[str, Any]) -> Table:
    columns = columns_of(evaluation)
    # The whole must fit 80 columns, or names of domains and numbers are cut.
    apart = 1 if len(columns) <= len(COLUMNS) else 0
    table = Table(
        title=title_of(evaluation),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, apart, 0, 0),
    )
    table.add_column("domain")
    table.add_column("task")
    for column in columns:
        table.add_column(short(column), justify="right")
    scope = None
    for line in evaluation_lines(evaluation):
        if line["scope"] == "all" and scope != "all":
            table.add_section()
        scope = line["scope"]
        table.add_row("" if line["baseline"] else line["scope"], line["baseline"] or line["task"], *line["values"])
    return table


def title_of(evaluation: dict[str, Any]) -> str:
    """Of what rows, of which step, and what was other than in the run's config."""
    asked = [f"--{key} {json.dumps(value)}" for key, value in evaluation.get("overrides", {}).items()]
    return ", ".join([f"{evaluation['split']} split", f"step {evaluation['step']:,}", *asked])


def columns_of(evaluation: dict[str, Any]) -> list[str]:
    """The metrics that a table of an evaluation shows: of labels' probabilities, or of ranked items."""
    metrics = next(iter(evaluation["overall"].values()), {})
    if "mrr" not in metrics:
        return list(COLUMNS)
    # Recall and NDCG at 1 are the same.
    return ["rows", *(name for name in metrics if "@" in name and name != "ndcg@1"), "mrr"]


def short(column: str) -> str:
    """A metric's name as a table has it."""
    return {"calibration": "calib."}.get(column, column).replace("recall@", "R@").replace("ndcg@", "N@")


def evaluation_lines(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """One line a domain (`all` last), task with rows, and baseline: `scope`, `task`, `baseline` ("" is the model
    itself) and `values`, the metrics of `columns_of` as they are shown."""
    columns = columns_of(evaluation)
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
                    values = [_shown({**found, "ndcg": ndcg}.get(c)) for c in columns]
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


def print_against(compared: dict[str, Any], step: int, run: Path) -> None:
    """The paired bootstrap of two runs (`training.paired.compare`): every metric, of all rows and by domain."""
    table = Table(
        title=f"{run} (step {step}) minus {compared['run']} (step {compared['step']})",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in ("domain", "metric"):
        table.add_column(column)
    for column in ("this", "other", "difference", "95 % interval", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    scopes = compared["domains"] if len(compared["domains"]) > 1 else {}
    for scope, found in {**scopes, "all": compared["overall"]}.items():
        for number, (name, m) in enumerate(found["metrics"].items()):
            interval = f"{signed(m['low'])} .. {signed(m['high'])}"
            values = [f"{m['ours']:.4f}", f"{m['other']:.4f}", signed(m["difference"]), interval, shown_p(m["p"])]
            table.add_row("" if number else scope, name, *values)
        table.add_section()
    console = Console()
    console.print(table)
    whole = compared["overall"]
    left_out = f", {compared['unranked']:,} without a place left out" if compared["unranked"] else ""
    console.print(
        f"paired bootstrap over {whole['users']:,} users ({whole['rows']:,} rows, recognised by "
        f"{compared['paired_by']}{left_out}), {compared['resamples']:,} resamples, seed {compared['seed']}; p is "
        "two-sided, and not corrected for the number of metrics",
        highlight=False,
        soft_wrap=True,
    )


def signed(value: float | None) -> str:
    """A difference, with its sign."""
    return "-" if value is None else f"{value:+.4f}"


def shown_p(value: float | None) -> str:
    """A p-value."""
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
