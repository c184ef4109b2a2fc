"""Sizes for tables from how often ids occur: `dist-rec plan --suggest`. Reads the index's counts, no rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from rich.markup import escape

from ..data.index import Frequency
from ..embeddings.tables import TableSpec
from ..errors import UserError
from .answer import GIB
from .request import Request, row_bytes
from .text import console, say, table_of

# Of all occurrences, what a managed table's rows should hold by themselves.
COVERED = "99"
# A table is worth changing where that takes less than this share of its rows.
WORTH = 0.5
# Managed tables keep rows for ids on their way in and out, and one that all others share.
SPARE = 1.25


@dataclass(frozen=True)
class Suggestion:
    """What a table's ids need. Counts of ids; `bytes_now` and `bytes_then` with optimizer state."""

    table: str
    rows: int
    counted: str | None
    distinct: int | None
    coverage: dict[str, int] | None
    key: str | None
    value: int | None
    bytes_now: int
    bytes_then: int
    why: str


def suggest(request: Request) -> list[Suggestion]:
    """A suggestion for every table. The tables of a divided vocabulary, whose ids are counted together, count as one.

    Raises:
        UserError: the data set has no counts.
    """
    if request.statistics is None:
        raise UserError("--suggest reads how often ids occur from a built data set: leave --schema out.")
    rows = Counter()
    for spec in request.specs:
        rows[spec.vocabulary] += spec.rows
    wholes = [replace(s, rows=rows[s.name]) for s in request.specs if s.name == s.vocabulary]
    found = [_of(request, spec) for spec in wholes]
    if all(one.distinct is None for one in found):
        raise UserError(
            f"the index of {request.config.data.train} was built before ids were counted: build the data set again."
        )
    return found


def _of(request: Request, spec: TableSpec) -> Suggestion:
    """By the feature of the table that occurs most: features that share a table mostly have the same ids."""
    optimizer = request.config.tables.optimizer
    counts: dict[str, Frequency] = {
        name: request.statistics[name].frequency
        for name in spec.features
        if name in request.statistics and request.statistics[name].frequency is not None
    }
    now = spec.rows * row_bytes(spec, optimizer)
    if not counts:
        return Suggestion(spec.name, spec.rows, None, None, None, None, None, now, now, "its ids were never counted")
    name = max(counts, key=lambda n: counts[n].occurrences)
    count = counts[name]
    rows = max(int(max(c.coverage[COVERED] for c in counts.values()) * SPARE), 2)
    # Every rank gets equally many rows of a managed table: a multiple of 64 suits up to as many ranks, or a divisor.
    rows = -(-rows // 64) * 64
    distinct = max(c.distinct for c in counts.values())
    key, value, then = None, None, now
    if spec.managed or rows < spec.rows * WORTH:
        key, value = "managed", rows
        then = rows * row_bytes(spec, optimizer)
        why = (
            f"{COVERED} % of {name}'s occurrences are of its {count.coverage[COVERED]:,} most frequent ids, so "
            f"{rows:,} managed rows hold them with room to come and go"
        )
    elif distinct > spec.rows:
        key, value = "hash", distinct
        then = distinct * row_bytes(spec, optimizer)
        why = f"{distinct:,} different ids share {spec.rows:,} rows: as many rows as ids would part most of them"
    else:
        why = (
            f"its {spec.rows:,} rows are needed: even {COVERED} % of occurrences are of {count.coverage[COVERED]:,} ids"
        )
    return Suggestion(spec.name, spec.rows, name, distinct, dict(count.coverage), key, value, now, then, why)


def describe_suggestions(found: list[Suggestion]) -> list[dict[str, Any]]:
    return [vars(one) for one in found]


def print_suggestions(found: list[Suggestion]) -> None:
    out = console()
    heads = ("table", "rows", "distinct ids", "50 %", "90 %", "99 %", "99.9 %", "GiB now", "GiB then")
    table = table_of("how many of the most frequent ids make up so much of what occurs", *heads)
    for one in found:
        shares = [f"{one.coverage[share]:,}" if one.coverage else "-" for share in ("50", "90", "99", "99.9")]
        distinct = f"{one.distinct:,}" if one.distinct is not None else "-"
        gib = [f"{size / GIB:.4f}" for size in (one.bytes_now, one.bytes_then)]
        table.add_row(escape(one.table), f"{one.rows:,}", distinct, *shares, *gib)
    out.print(table)
    for one in found:
        say(out, f"  {escape(one.table)}: {escape(one.why)}.")
    changed = [one for one in found if one.key]
    if changed:
        say(out, "\nIn the config:\n\ntables:\n  overrides:")
        for one in changed:
            say(out, f"    {escape(one.table)}: {{{one.key}: {one.value}}}")
        say(out, "\nManaged tables are cut row_wise; rows evicted start anew when their id returns.")
