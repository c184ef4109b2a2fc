"""old_domains.json: the test rows of the runs that came before, before and after a run that started from them.

Both are measured by the run itself, the first before its first step: the same model code on the same batches in the
same order, so that what differs is what training has changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ...files import write_text

OLD_NAME = "old_domains.json"
BEFORE, AFTER, SKIPPED = "before", "after", "skipped"
# The domains that the foundation knew.
KNOWN = "known"
METRICS = ("auc", "logloss", "ndcg")


def read_old(folder: Path) -> dict[str, Any]:
    """What a run folder says of the foundation's domains; empty where it says nothing."""
    try:
        held = json.loads((folder / OLD_NAME).read_text())
        return held if isinstance(held, dict) else {}
    except (OSError, ValueError):
        return {}


def write_old(folder: Path, held: dict[str, Any]) -> None:
    write_text(folder / OLD_NAME, json.dumps(held, indent=1))


def metric(metrics: dict[str, Any], name: str) -> float | None:
    """One of `METRICS` of a domain and task; of NDCG, whatever its cut."""
    found = [value for key, value in metrics.items() if key == name or name == "ndcg" and key.startswith("ndcg")]
    return found[0] if found else None


def compared(held: dict[str, Any]) -> list[dict[str, Any]]:
    """Every domain, task and metric that has rows, with `before`, `after` and `difference`."""
    if not {BEFORE, AFTER} <= held.keys():
        return []
    found = []
    for domain, tasks in held[BEFORE]["domains"].items():
        for task, was in tasks.items():
            for name in METRICS:
                before, after = metric(was, name), metric(held[AFTER]["domains"].get(domain, {}).get(task, {}), name)
                if before is not None and after is not None:
                    entry = {"domain": domain, "task": task, "metric": name, BEFORE: before, AFTER: after}
                    found.append({**entry, "difference": after - before})
    return found


def has_rows(tasks: dict[str, Any]) -> bool:
    """Whether a domain's metrics, by task, are of any row."""
    return any(metrics["rows"] for metrics in tasks.values())


def unseen(held: dict[str, Any]) -> list[str]:
    """The domains that the foundation knew and that none of the test rows which were read is of."""
    domains = held[BEFORE]["domains"] if BEFORE in held else {}
    known = {domain: domains[domain] for domain in held.get(KNOWN, []) if domain in domains}
    return [domain for domain, tasks in known.items() if not has_rows(tasks)]


def print_old(folder: Path) -> None:
    """What became of the domains that the foundation knew, as a table."""
    held, console = read_old(folder), Console()
    if SKIPPED in held:
        console.print(f"test rows of earlier runs were not read: {held[SKIPPED]}", highlight=False, soft_wrap=True)
    if missing := unseen(held):
        console.print(
            f"the earlier runs' test rows have none of {', '.join(missing)}: what became of these is not known",
            highlight=False,
            soft_wrap=True,
        )
    rows = compared(held)
    if not rows:
        return
    table = Table(
        title="the earlier runs' test rows, before and after",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in ("domain", "task", "metric"):
        table.add_column(column)
    for column in (BEFORE, AFTER, "difference"):
        table.add_column(column, justify="right")
    for row in rows:
        shown = [row["domain"], row["task"], row["metric"], f"{row[BEFORE]:.4f}", f"{row[AFTER]:.4f}"]
        table.add_row(*shown, f"{row['difference']:+.4f}")
    console.print(table)
