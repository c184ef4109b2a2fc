"""curve.json: what every point of a few-shot curve measured, and what that says over its seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..errors import UserError
from ..files import write_text
from ..strict import from_dict, parse_json, strict, to_dict

CURVE_NAME, SETTINGS_NAME = "curve.json", "settings.json"
FINETUNED, SCRATCH, SINGLE = "finetuned", "scratch", "single"


@strict
class Entry:
    """One domain and task of the test rows, as one model predicts them.

    * `n`, `seed`: the rows that it was trained on, of the sample of that seed.
    * `kind`: `finetuned` from the foundation under `preset`, the same model from `scratch`, or a `single`-domain model.
    * `auc`, `logloss`, `ndcg`, `recall`: null where the rows have none.
    * `seconds`: of training.
    * `metric`: which of these is drawn, with the cut of NDCG and recall where that is one of them.
    """

    n: int = Field(ge=0)
    seed: int
    kind: Literal["finetuned", "scratch", "single"]
    preset: str | None
    domain: str
    task: str
    auc: float | None
    logloss: float | None
    ndcg: float | None
    seconds: float
    recall: float | None = None
    metric: str = "auc"

    @property
    def value(self) -> float | None:
        """Of `metric`."""
        return getattr(self, self.metric.partition("@")[0])

    @property
    def line(self) -> str:
        """The line of the picture that it lies on."""
        return line_of(self.kind, self.preset)


def line_of(kind: str, preset: str | None) -> str:
    return f"{kind}, freeze {preset}" if kind == FINETUNED else {SCRATCH: "from scratch", SINGLE: "single domain"}[kind]


class Results:
    """The entries of a curve's folder, which grow point by point.

    Args:
        folder: of the curve.
        settings: what decides its numbers beside rows, seeds and presets.

    Raises:
        UserError: the folder holds a curve of other settings, or something that is none.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.path = folder, folder / CURVE_NAME
        self.entries: list[Entry] = []
        held = folder / SETTINGS_NAME
        if held.is_file():
            before = parse_json(held.read_bytes(), str(held))
            differ = sorted(k for k in before.keys() | settings.keys() if before.get(k) != settings.get(k))
            if differ:
                raise UserError(
                    f"{folder} holds a curve of other settings ({', '.join(differ)} differ): choose another --out, or "
                    "remove that folder."
                )
        if self.path.is_file():
            held = {"entries": parse_json(self.path.read_bytes(), str(self.path))}
            self.entries = from_dict(_Entries, held, str(self.path)).entries
        self.settings = settings

    def begin(self) -> None:
        """Make the folder and keep the settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / SETTINGS_NAME, json.dumps(self.settings, indent=1))

    def add(self, entries: Iterable[Entry]) -> None:
        self.entries += entries
        write_text(self.path, json.dumps([to_dict(entry) for entry in self.entries], indent=1))


@strict
class _Entries:
    entries: list[Entry]


def panels(entries: list[Entry]) -> list[tuple[str, str]]:
    """Every domain and task of which some entry has a value."""
    return list(dict.fromkeys((e.domain, e.task) for e in entries if e.value is not None))


def shown(metric: str) -> str:
    """A metric's name in titles."""
    return metric.upper()


def lines(entries: list[Entry]) -> list[str]:
    return list(dict.fromkeys(entry.line for entry in entries))


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def summary(entries: list[Entry]) -> list[dict[str, Any]]:
    """Per domain, task, number of rows and line: `metric`, and by its name the mean, and `spread`, over `seeds`, and
    likewise of the paired `difference` to scratch, that is of the same seed and rows; null where there is none."""
    found = []
    for domain, task in panels(entries):
        mine = [e for e in entries if (e.domain, e.task) == (domain, task) and e.value is not None]
        scratch = {(e.n, e.seed): e.value for e in mine if e.kind == SCRATCH}
        for n in sorted({e.n for e in mine}):
            for line in lines(mine):
                at = [e for e in mine if (e.n, e.line) == (n, line)]
                if not at:
                    continue
                value, around = spread([e.value for e in at])
                entry = {"domain": domain, "task": task, "n": n, "line": line, "seeds": len(at)}
                entry |= {
                    "metric": at[0].metric,
                    at[0].metric: value,
                    "spread": around,
                    "difference": None,
                    "difference_spread": None,
                }
                pairs = [e.value - scratch[e.n, e.seed] for e in at if (e.n, e.seed) in scratch]
                if pairs and at[0].kind != SCRATCH:
                    entry["difference"], entry["difference_spread"] = spread(pairs)
                found.append(entry)
    return found


def print_summary(entries: list[Entry]) -> None:
    """Every line and number of rows, mean and standard deviation over seeds, one table a domain and task."""
    console, told = Console(), summary(entries)
    for domain, task in panels(entries):
        lines_here = [e for e in told if (e["domain"], e["task"]) == (domain, task)]
        metric = lines_here[0]["metric"]
        table = Table(
            title=f"{domain}, {task}: {shown(metric)} on the same test rows, mean ± standard deviation over seeds",
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        table.add_column("rows", justify="right")
        table.add_column("model")
        for column in ("seeds", metric, "minus scratch"):
            table.add_column(column, justify="right")
        last = None
        for entry in lines_here:
            if last is not None and entry["n"] != last:
                table.add_section()
            last = entry["n"]
            against = "-"
            if entry["difference"] is not None:
                against = f"{entry['difference']:+.4f} ± {entry['difference_spread']:.4f}"
            value = f"{entry[metric]:.4f} ± {entry['spread']:.4f}"
            table.add_row(f"{entry['n']:,}", entry["line"], str(entry["seeds"]), value, against)
        console.print(table)
