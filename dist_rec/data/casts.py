"""SQL that turns a raw column of any type into what it is used for, or complains about a value.

A value that cannot be cast raises inside the SQL engine with a message between marks, which
`COMPLAINT` finds again. Knows DuckDB's types, not files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ..schema import RAW_IDS, Schema

Use = Literal["string", "list", "vector", "number", "time"]
SQL_TYPE = {"string": "VARCHAR", "list": "VARCHAR[]", "vector": "FLOAT[]", "number": "DOUBLE", "time": "BIGINT"}
# Of seconds that 64 bits hold with room for differences.
LATEST = 2**61
# The column of every table that names the file a row is from.
FILE = "__file__"
COMPLAINT = re.compile(r"<<dist_rec (.*?)>>", re.DOTALL)


@dataclass(frozen=True)
class Need:
    """A raw column and what it is used for; `separator` splits strings into lists, `prefix` stands before each."""

    column: str
    use: Use
    separator: str | None = None
    prefix: str = ""


def quote(name: str) -> str:
    """A SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def cast_sql(need: Need, kind: str) -> str:
    """SQL that turns the raw column, of DuckDB type `kind`, into what its use needs."""
    column = quote(need.column)
    if need.use == "string":
        value = _string(column, kind)
        return f"{literal(need.prefix)} || ({value})" if need.prefix else value
    if need.use == "list":
        value = _list(need, column, kind)
        return f"list_transform({value}, lambda x: {literal(need.prefix)} || x)" if need.prefix else value
    if need.use == "vector":
        return _vector(need, column, kind)
    text = f"nullif(trim({column} ->> '$'), '')" if kind == "JSON" else f"nullif(trim({column}), '')"
    untyped = kind in ("JSON", "VARCHAR") or kind.startswith("ENUM")
    if need.use == "number":
        if not untyped:
            value = f"CAST({column} AS DOUBLE)"
            return f"CASE WHEN NOT isnan({value}) THEN {value} END"
        value = f"coalesce(TRY_CAST({text} AS DOUBLE), TRY_CAST(TRY_CAST({text} AS BOOLEAN) AS DOUBLE))"
        return (
            f"CASE WHEN {text} IS NULL OR isnan({value}) THEN NULL WHEN {value} IS NULL "
            f"THEN {_complain(need, text, 'is no number')} ELSE {value} END"
        )
    if not untyped:
        if is_instant(kind):
            return f"CAST(floor(epoch({instant(column, kind)})) AS BIGINT)"
        seconds = f"CAST({column} AS DOUBLE)"
        text = f"CAST({column} AS VARCHAR)"
    else:
        seconds = f"coalesce(TRY_CAST({text} AS DOUBLE), epoch(TRY_CAST({text} AS TIMESTAMPTZ)))"
    return (
        f"CASE WHEN {text} IS NULL OR isnan({seconds}) THEN NULL WHEN {seconds} IS NULL OR abs({seconds}) > {LATEST} "
        f"THEN {_complain(need, text, 'is neither seconds nor a date')} ELSE CAST(floor({seconds}) AS BIGINT) END"
    )


def is_instant(kind: str) -> bool:
    """Does a DuckDB type hold points in time?"""
    return kind.startswith(("TIMESTAMP", "DATE"))


def instant(column: str, kind: str) -> str:
    """SQL of a column of points in time that DuckDB's `epoch` functions take."""
    return f"CAST({column} AS TIMESTAMPTZ)" if kind == "TIMESTAMPTZ_NS" else column


def _complain(need: Need, text: str, fault: str, tail: str = "") -> str:
    """SQL that stops the query with a message of ours."""
    start, end = literal(f"<<dist_rec column {need.column}: "), literal(f" {fault}.{tail}>>")
    return f"error({start} || '''' || left({text}, 80) || '''' || ' in ' || {FILE} || {end})"


def _string(column: str, kind: str) -> str:
    if kind == "JSON":
        return f"nullif({column} ->> '$', '')"
    if kind == "VARCHAR":
        return f"nullif({column}, '')"
    if kind in ("DOUBLE", "FLOAT"):
        # pandas turns integers with nulls into floats; 7.0 must be the id "7" of the other file.
        whole = f"{column} = floor({column}) AND abs({column}) < 9007199254740992"
        return (
            f"CASE WHEN isnan({column}) THEN NULL WHEN {whole} THEN CAST(CAST({column} AS BIGINT) AS VARCHAR) "
            f"ELSE CAST({column} AS VARCHAR) END"
        )
    return f"CAST({column} AS VARCHAR)"


def _list(need: Need, column: str, kind: str) -> str:
    element = re.fullmatch(r"(.*)\[\d*\]", kind)
    if element:
        return f"list_transform(CAST({column} AS {element.group(1)}[]), lambda x: {_string('x', element.group(1))})"
    text = f"({column} ->> '$')" if kind == "JSON" else f"nullif(CAST({column} AS VARCHAR), '')"
    as_json = column if kind == "JSON" else f"CAST({text} AS JSON)"
    is_list = f"json_type({column}) = 'ARRAY'"
    if kind != "JSON":
        is_list = f"(json_valid({text}) AND json_type({text}) = 'ARRAY')"
    parsed = f"list_transform(CAST({as_json} AS VARCHAR[]), lambda x: nullif(x, ''))"
    if need.separator is not None:
        pieces = f"list_transform(string_split({text}, {literal(need.separator)}), lambda x: nullif(trim(x), ''))"
        pieces = f"list_filter({pieces}, lambda x: x IS NOT NULL)"
        if kind != "JSON":
            return pieces
        return f"CASE WHEN {is_list} THEN {parsed} ELSE {pieces} END"
    hint = " Write JSON lists, or give the feature a separator."
    return (
        f"CASE WHEN {text} IS NULL THEN NULL WHEN {is_list} THEN {parsed} "
        f"ELSE {_complain(need, text, 'is no list', hint)} END"
    )


def _vector(need: Need, column: str, kind: str) -> str:
    full = "list_transform({}, lambda x: coalesce(x, CAST('nan' AS FLOAT)))"
    if re.fullmatch(r".*\[\d*\]", kind):
        return full.format(f"CAST({column} AS FLOAT[])")
    if kind not in ("JSON", "VARCHAR"):
        number = f"CAST({column} AS FLOAT)"
        return f"CASE WHEN {number} IS NOT NULL AND NOT isnan({number}) THEN [{number}] END"
    text = f"nullif(trim({column} ->> '$'), '')" if kind == "JSON" else f"nullif(trim({column}), '')"
    number = f"TRY_CAST({text} AS FLOAT)"
    many = (
        f"TRY_CAST(list_filter(string_split({text}, {literal(need.separator)}), lambda x: trim(x) <> '') AS FLOAT[])"
        if need.separator is not None
        else f"CASE WHEN json_valid({text}) THEN TRY_CAST(CAST({text} AS JSON) AS FLOAT[]) END"
    )
    return (
        f"CASE WHEN {text} IS NULL OR isnan({number}) THEN NULL WHEN {number} IS NOT NULL THEN [{number}] "
        f"WHEN ({many}) IS NULL THEN {_complain(need, text, 'is neither a number nor a list of numbers')} "
        f"ELSE {full.format(f'({many})')} END"
    )


def raw_id(value: str) -> str:
    """A whole number in range, written as numbers are, is itself; anything else is hashed: "007" is not 7."""
    number, hashed = f"TRY_CAST({value} AS BIGINT)", f"CAST(md5_number_lower({value}) % {RAW_IDS}::UBIGINT AS BIGINT)"
    itself = f"{number} BETWEEN 0 AND {RAW_IDS - 1} AND CAST({number} AS VARCHAR) = {value}"
    return f"CASE WHEN {value} IS NOT NULL THEN CASE WHEN {itself} THEN {number} ELSE {hashed} END END"


def no_id(schema: Schema, feature: str) -> str:
    """What stands in a history for an event without an id: of a raw vocabulary the id of the empty string, which is
    null and so no event's own; of others row 0."""
    return raw_id("''") if schema.features[schema.table_of(feature)].vocabulary.kind == "raw" else "0"
