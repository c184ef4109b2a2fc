"""How rows are dealt to train, valid and test: what the user writes, and its SQL over `source`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UserError
from ..schema import Schema
from .index import CATALOGUE, SPLITS
from .sources import Source

# In the order in which they are numbered; only a column can name the last.
PARTS = (*SPLITS, CATALOGUE)


@dataclass(frozen=True)
class Split:
    """How rows are dealt to train, valid and test.

    * `random`: by a hash of the row's position and the seed, or, with `by`, of the value of that
      raw column (or of `keys.user` / `keys.query` when `by` is `user` / `query`), so that all rows
      of one value stay together.
    * `time`: the oldest rows train, the newest test; the borders are quantiles of `keys.time`, and
      rows of one instant stay together.
    * `column`: a raw column that says `train`, `valid`, `test` or `catalogue`. The last is for rows that are items, not
      examples: they get the ids and texts that the others use, in a data set of their own.

    A split of weight 0 is not written.
    """

    kind: Literal["random", "time", "column"]
    weights: tuple[float, float, float] = (8, 1, 1)
    column: str | None = None
    by: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("random", "time", "column"):
            raise UserError(f"split {self.kind!r} is unknown: use random, time or column.")
        if self.kind == "column" and not self.column:
            raise UserError("a split by column names the column: column:<name>.")
        if self.kind != "random" and self.by:
            raise UserError("only a random split goes by a column: random:8,1,1:by=<column>.")
        if len(self.weights) != 3 or not all(0 <= w < float("inf") for w in self.weights) or not self.weights[0] > 0:
            raise UserError(f"split weights {self.weights}: three numbers >= 0 for train, valid, test, the first > 0.")

    @property
    def bounds(self) -> tuple[float, float]:
        """Shares of the rows that end train and valid."""
        total = sum(self.weights)
        return self.weights[0] / total, (self.weights[0] + self.weights[1]) / total


def parse_split(text: str) -> Split:
    """`random:8,1,1`, `random:8,1,1:by=query`, `time:8,1,1` or `column:split`.

    Raises:
        UserError: it is none of these.
    """
    kind, *parts = text.split(":")
    usage = f"split {text!r}: write random:8,1,1, random:8,1,1:by=<column>, time:8,1,1 or column:<name>."
    if kind == "column" and len(parts) >= 1:
        return Split("column", column=":".join(parts))
    by = None
    if kind == "random" and len(parts) >= 2 and parts[1].startswith("by="):
        by = ":".join(parts[1:]).removeprefix("by=")
        parts = parts[:1]
    if kind not in ("random", "time") or len(parts) > 1 or by == "":
        raise UserError(usage)
    try:
        weights = tuple(float(w) for w in parts[0].split(",")) if parts else (8.0, 1.0, 1.0)
    except ValueError:
        raise UserError(usage) from None
    return Split(kind, weights=weights, by=by)


def split_columns(split: Split | None, schema: Schema) -> dict[str, str]:
    """Place → raw column that the split itself needs."""
    if split is None:
        return {}
    if split.kind == "time" and schema.keys.time is None:
        raise UserError("a split by time needs keys.time in the schema.")
    if split.kind == "column":
        return {"split.column": split.column}
    if split.by is None:
        return {}
    known = {"user": schema.keys.user, "query": schema.keys.query}
    return {"split.by": known.get(split.by) or split.by}


def split_sql(source: Source, split: Split | None, seed: int) -> str:
    """SQL over `source s` for the row's position in `PARTS`; that of past rows means nothing."""
    con, written = source.con, f"n >= {source.first}"
    if split is None:
        return "0"
    low, high = split.bounds
    if split.kind == "random":
        value = f"CAST(s.n - {source.first} AS VARCHAR)"
        if split.by is not None:
            value = f"coalesce(s.{source.columns['split.by']}, {value})"
        share = f"CAST(md5_number_lower({value} || ':' || {seed}) >> 11 AS DOUBLE) / 9007199254740992"
        return f"CASE WHEN {share} < {low!r} THEN 0 WHEN {share} < {high!r} THEN 1 ELSE 2 END"
    if split.kind == "time":
        time = source.columns["keys.time"]
        missing = con.execute(f"SELECT count(*), min(n) FROM source WHERE {time} IS NULL AND {written}").fetchone()
        if missing[0]:
            raise UserError(f"{missing[0]} rows have no time to be split by; the first is {source.where(missing[1])}.")
        # An ORDER BY with OFFSET sorts on disk; quantile aggregates hold every value in memory.
        rows = source.rows - source.first
        low_time, high_time = (
            con.execute(
                f"SELECT {time} FROM source WHERE {written} ORDER BY {time} LIMIT 1 "
                f"OFFSET {max(round(share * rows) - 1, 0)}"
            ).fetchone()[0]
            for share in (low, high)
        )
        return f"CASE WHEN s.{time} <= {low_time} THEN 0 WHEN s.{time} <= {high_time} THEN 1 ELSE 2 END"
    column = source.columns["split.column"]
    found = con.execute(
        f"SELECT {column}, count(*), min(n) FROM source WHERE {written} AND ({column} IS NULL OR "
        f"{column} NOT IN {PARTS}) GROUP BY 1 ORDER BY 3 LIMIT 1"
    ).fetchone()
    if found:
        raise UserError(
            f"{source.where(found[2])}: column {split.column!r} says {found[0]!r} ({found[1]} rows), "
            f"a split is one of {', '.join(PARTS)}."
        )
    return f"list_position({list(PARTS)}, s.{column}) - 1"
