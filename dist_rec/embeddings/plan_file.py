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
from .clusters import MOST_RANKS
from .description import describe_plan
from .planner import Planned
from .planner.options import allowed
from .sharders import REPLICATED_KERNEL
from .tables import DATA_PARALLEL, TableSpec

FORMAT = "dist_rec-plan/1"
# Of 512 ranks and a thousand row-wise tables, twice over.
LARGEST = 64 << 20
# Of a message about a plan: faults that it lists, and how much of a foreign value it repeats.
LISTED, SHOWN = 20, 100
MOST_ROWS = 2**62
# What of a table a plan depends on.
OF_A_TABLE = ("rows", "dim", "precision", "kernel", "managed", "frozen")
AGAIN = "Plan again with `dist-rec plan CONFIG --out FILE`."


@strict
class PlannedTable:
    """What a table was when it was planned."""

    rows: int = Field(ge=1, le=MOST_ROWS, strict=True)
    dim: int = Field(ge=1, le=MOST_ROWS, strict=True)
    precision: str
    kernel: str
    managed: bool = Field(strict=True)
    frozen: bool = Field(default=False, strict=True)


@strict
class PlanFile:
    """`plan` is what `describe_plan` gives; `cluster` names what it was made for."""

    format: Literal["dist_rec-plan/1"]
    cluster: str
    ranks: int = Field(ge=1, le=MOST_RANKS, strict=True)
    ranks_per_host: int = Field(ge=1, le=MOST_RANKS, strict=True)
    optimizer: str
    tables: dict[str, PlannedTable]
    plan: dict[str, Any]


def write_plan(path: Path, planned: Planned, specs: list[TableSpec], config: TablesConfig) -> None:
    """Write what `train --plan` needs.

    Raises:
        UserError: it cannot be written there, or is larger than `read_plan` takes.
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
    text = json.dumps(tree)
    if len(text) > LARGEST:
        raise UserError(f"the plan is not written: it has {len(text):,} bytes, and train reads {LARGEST:,} at most.")
    try:
        write_text(path, text)
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
    try:
        return from_dict(PlanFile, tree, "plan")
    except UserError as error:
        faults = [_plain(line.removeprefix("  - "), 3 * SHOWN) for line in str(error).splitlines()[1:]]
        raise _refusal(path, "is not valid", faults) from None


def _refusal(path: str | Path, what: str, faults: list[str]) -> UserError:
    shown = faults[:LISTED] + ["and more"] * (len(faults) > LISTED)
    return UserError("\n      ".join([f"tables.plan: {path} {what}:", *shown, AGAIN]))


def _plain(value: Any, most: int = SHOWN) -> str:
    """A foreign value of bearable length, without anything that a terminal would act on."""
    known = isinstance(value, str | int | None)
    text = ascii(str(value)[:most])[1:-1] if known else f"a {type(value).__name__}"
    return text if len(text) <= most else text[:most] + "..."


def check_plan(path: str | Path, specs: list[TableSpec], config: TablesConfig, ranks: int, ranks_per_host: int) -> None:
    """Refuse a plan that was made for other tables or ranks than this run's.

    Args:
        ranks_per_host: of this host.

    Raises:
        UserError: every difference, in words.
    """
    held = read_plan(path)
    faults = []
    if held.ranks != ranks:
        faults.append(f"it is for {held.ranks} rank(s) ({_plain(held.cluster)}), and this run has {ranks}")
    elif held.ranks_per_host != ranks_per_host:
        faults.append(f"it is for {held.ranks_per_host} rank(s) a host, and this run has {ranks_per_host}")
    if held.optimizer != config.optimizer:
        faults.append(f"it counts the state of {_plain(held.optimizer)}, and tables.optimizer is {config.optimizer}")
    now = {spec.name: spec for spec in specs}
    faults += [f"it has no table {name}, which this run has" for name in now if name not in held.tables]
    faults += [f"it has a table {_plain(name)}, which this run has not" for name in held.tables if name not in now]
    for name in now:
        if name in held.tables:
            faults += _differences(held, now[name])
    if faults:
        raise _refusal(path, "is not a plan for this run", faults)


def _differences(held: PlanFile, spec: TableSpec) -> list[str]:
    faults = []
    for key in OF_A_TABLE:
        before, now = getattr(held.tables[spec.name], key), getattr(spec, key)
        if before != now:
            shown = [f"{value:,}" if type(value) is int else _plain(value) for value in (before, now)]
            faults.append(f"{spec.name}: {key} was {shown[0]}, and is {shown[1]} now")
    planned = held.plan.get(spec.name)
    if not isinstance(planned, dict):
        return [*faults, f"{spec.name}: it does not say how this table is cut"]
    kind, kernel = planned.get("sharding_type"), planned.get("compute_kernel")
    # A table with too few rows for the type that is asked for gets another one.
    if spec.sharding != "auto" and kind not in allowed(spec, held.ranks, held.ranks_per_host, rows_whole=False):
        faults.append(f"{spec.name}: it is cut {_plain(kind)}, and the config asks for {spec.sharding}")
    wanted = REPLICATED_KERNEL if kind == DATA_PARALLEL else spec.kernel
    if kernel != wanted:
        faults.append(f"{spec.name}: its compute kernel is {_plain(kernel)}, and must be {wanted}")
    return faults
