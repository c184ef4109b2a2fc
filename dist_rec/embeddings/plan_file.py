"""The plan file: what `dist-rec plan --out` writes and `train --plan` reads. Trusts nothing it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..config import TablesConfig
from ..errors import UserError
from ..files import write_text
from ..strict import from_dict, parse_json, strict
from .description import describe_plan
from .planner import Planned
from .planner.options import allowed
from .tables import TableSpec

FORMAT = "dist_rec-plan/1"
# Of 512 ranks and a thousand row-wise tables, many times over.
LARGEST = 1 << 30
# What of a table a plan depends on.
OF_A_TABLE = ("rows", "dim", "precision", "kernel", "managed")
AGAIN = "Plan again with `dist-rec plan CONFIG --out FILE`."


@strict
class PlannedTable:
    """What a table was when it was planned."""

    rows: int = Field(ge=1)
    dim: int = Field(ge=1)
    precision: str
    kernel: str
    managed: bool


@strict
class PlanFile:
    """`plan` is what `describe_plan` gives; `cluster` names what it was made for."""

    format: Literal["dist_rec-plan/1"]
    cluster: str
    ranks: int = Field(ge=1)
    ranks_per_host: int = Field(ge=1)
    optimizer: str
    tables: dict[str, PlannedTable]
    plan: dict[str, Any]


def write_plan(path: Path, planned: Planned, specs: list[TableSpec], config: TablesConfig) -> None:
    """Write what `train --plan` needs.

    Raises:
        UserError: it cannot be written there.
    """
    tree = {
        "format": FORMAT,
        "cluster": planned.cluster.name,
        "ranks": planned.cluster.ranks,
        "ranks_per_host": planned.cluster.ranks_per_host,
        "optimizer": config.optimizer,
        "tables": {s.name: {key: getattr(s, key) for key in OF_A_TABLE} for s in specs},
        "plan": describe_plan(planned.plan),
    }
    try:
        write_text(path, json.dumps(tree))
    except OSError as error:
        raise UserError(f"the plan cannot be written to {path}: {error.strerror}.") from None


def read_plan(path: str | Path) -> PlanFile:
    """Read a plan file.

    Raises:
        UserError: it is missing, or no plan file.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"tables.plan: cannot read {path}: {error.strerror}.") from None
    if len(data) > LARGEST:
        raise UserError(f"tables.plan: {path} has more than {LARGEST:,} bytes and is no plan.")
    try:
        tree = parse_json(data, str(path))
    except UserError as error:
        raise UserError(f"tables.plan: {str(error).removesuffix(' Build the data set again.')} {AGAIN}") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise UserError(f"tables.plan: {path} is no plan file of `dist-rec plan --out` ({FORMAT}).")
    return from_dict(PlanFile, tree, f"tables.plan: {path}")


def check_plan(path: str | Path, specs: list[TableSpec], config: TablesConfig, ranks: int) -> None:
    """Refuse a plan that was made for other tables or ranks than this run's.

    Raises:
        UserError: every difference, in words.
    """
    held = read_plan(path)
    faults = []
    if held.ranks != ranks:
        faults.append(f"it is for {held.ranks} rank(s) ({held.cluster}), and this run has {ranks}")
    if held.optimizer != config.optimizer:
        faults.append(f"it counts the state of {held.optimizer}, and tables.optimizer is {config.optimizer}")
    now = {spec.name: spec for spec in specs}
    faults += [f"it has no table {name}, which this run has" for name in now if name not in held.tables]
    faults += [f"it has a table {name}, which this run has not" for name in held.tables if name not in now]
    for name in now:
        if name in held.tables:
            faults += _differences(held, now[name])
    if faults:
        lines = "\n".join(f"      {fault}" for fault in faults)
        raise UserError(f"tables.plan: {path} is not a plan for this run:\n{lines}\n      {AGAIN}")


def _differences(held: PlanFile, spec: TableSpec) -> list[str]:
    faults = []
    for key in OF_A_TABLE:
        before, now = getattr(held.tables[spec.name], key), getattr(spec, key)
        if before != now:
            shown = [f"{value:,}" if type(value) is int else str(value) for value in (before, now)]
            faults.append(f"{spec.name}: {key} was {shown[0]}, and is {shown[1]} now")
    planned = held.plan.get(spec.name)
    kind = planned.get("sharding_type") if isinstance(planned, dict) else None
    # A table with too few rows for the type that is asked for gets another one.
    if spec.sharding != "auto" and kind not in allowed(spec, held.ranks, held.ranks_per_host, rows_whole=False):
        faults.append(f"{spec.name}: it is cut {kind}, and the config asks for {spec.sharding}")
    return faults
