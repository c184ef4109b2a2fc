"""Raw files → one DuckDB table `source` whose columns have the type that their use needs.

Reads globs of Parquet, CSV, TSV and JSON lines, checks that every column the schema asks for is
there, casts it (`casts`), and joins side tables. Knows what a column is *used* for (a string, a
list, a number, ...), not what becomes of it: vocabularies, splits and histories are `ingest`'s.

CSV and JSON columns are read untyped and cast explicitly, so a value that shows up after the
sniffer's sample cannot change a column's type, and "007" stays "007".
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import duckdb
import pyarrow as pa

from ..errors import UserError, nearest
from ..schema import Schema
from .casts import FILE, SQL_TYPE, Need, Use, cast_sql, literal
from .index import Extension
from .raw_files import check_header, read_error, reader, sniffing_error


@dataclass(frozen=True)
class Join:
    """A side table: its columns are looked up by the value of `key`, a column of both tables.

    A row whose key the side table lacks gets nulls; a key that the side table has twice is an error.
    """

    path: str
    key: str


@dataclass
class Relation:
    """Files of one format, as something that can stand after FROM."""

    pattern: str
    sql: str
    types: dict[str, str]


@dataclass
class Source:
    """The table `source`: `n` numbers its rows in input order from 0, `__file__` names the file.

    Attributes:
        con: the connection that holds it.
        schema: what it was read for.
        domains: of the schema, that its rows may be of.
        columns: place in the schema (`features.title`, `keys.time`, ...) → column of the table.
        rows: its number of rows.
        first: rows before this one are past: events of histories, but not written.
    """

    con: duckdb.DuckDBPyConnection
    schema: Schema
    domains: list[str]
    columns: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    first: int = 0

    def where(self, n: int) -> str:
        """File and row (from 1, headers not counted) of row `n`, for messages."""
        file, first = self.con.execute(
            f"SELECT {FILE}, (SELECT min(n) FROM source b WHERE b.{FILE} = a.{FILE}) FROM source a WHERE n = {n}"
        ).fetchone()
        return f"{file}, row {n - first + 1}"


def stream(con: duckdb.DuckDBPyConnection, query: str, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """A query's rows as Arrow batches, drawn as they are needed; nothing is collected first."""
    cursor = con.cursor()
    try:
        # `execute` would keep a copy of the whole result; a relation is streamed.
        yield from cursor.sql(query).to_arrow_reader(batch_rows)
    finally:
        cursor.close()


def needs_of(schema: Schema, split_columns: dict[str, str], prefixes: Mapping[str, str]) -> dict[str, Need]:
    """Place in the schema → the raw column it needs. `split_columns` adds places of the split."""
    needs = {"domains.column": Need(schema.domains.column, "string")}
    use: dict[str, Use] = {"id": "string", "text": "string", "ids": "list", "texts": "list", "dense": "vector"}
    for name, feature in schema.features.items():
        if feature.events is None:
            # What a history's texts tell of is items.
            role = "item" if feature.role == "history" else feature.role
            prefix = prefixes.get(role, "") if feature.kind in ("text", "texts") else ""
            needs[f"features.{name}"] = Need(feature.column or name, use[feature.kind], feature.separator, prefix)
    for name, label in schema.labels.items():
        needs[f"labels.{name}"] = Need(label.column or name, "number")
    for key in ("user", "query", "time"):
        column = getattr(schema.keys, key)
        if column:
            needs[f"keys.{key}"] = Need(column, "time" if key == "time" else "string")
    for place, column in split_columns.items():
        needs[place] = Need(column, "string")
    return needs


def load(
    con: duckdb.DuckDBPyConnection,
    schema: Schema,
    sources: list[str],
    joins: tuple[Join, ...],
    split_columns: dict[str, str],
    past: tuple[str, ...] = (),
    own: Extension | None = None,
    prefixes: Mapping[str, str] = MappingProxyType({}),
) -> Source:
    """Read, cast and join everything that the schema needs into the table `source`.

    Args:
        con: where the table is made.
        schema: what a row is; histories that `own` lacks are collected from no events (`extend.carried`).
        sources: globs of the rows.
        joins: side tables.
        split_columns: place → column that the split needs.
        past: globs of rows that come first.
        own: what of the schema the tables carry; None is all. The rest is null.
        prefixes: by role, what stands before its texts.

    Raises:
        UserError: no such files, an unreadable file, missing or ambiguous columns (all at once),
            a value that cannot be cast, a key that a side table has twice, or no rows at all.
    """
    if not sources:
        raise UserError("no sources: name at least one file or glob.")
    earlier = [relation for pattern in past for relation in relations(con, pattern)]
    mains = earlier + [relation for pattern in sources for relation in relations(con, pattern)]
    sides = [(join, list(relations(con, join.path))) for join in joins]
    needs = needs_of(schema, split_columns, prefixes)
    lacking = {place: needs.pop(place) for place in (own.missing if own else ()) if place in needs}
    domains = own.domains if own else schema.domains.names
    main_columns = {c for relation in mains for c in relation.types}
    if len(domains) == 1 and not any(
        schema.domains.column in columns
        for columns in [main_columns, *({c for r in parts for c in r.types} for _, parts in sides)]
    ):
        # One domain needs no column that says so.
        del needs["domains.column"]
    homes = _homes(needs, mains, main_columns, sides)
    names = {need: f"c{i}" for i, need in enumerate(dict.fromkeys(needs.values()))}
    keys = {i: Need(join.key, "string") for i, join in enumerate(joins)}
    in_main = [need for need in names if homes[need] is None]
    in_main += [need for need in dict.fromkeys(keys.values()) if need not in in_main]
    key_names = {need: names.get(need, f"j{i}") for i, need in keys.items()}
    stored = _store(con, "main_rows", mains, [(need, names.get(need) or key_names[need]) for need in in_main])
    selected, joined = [f"m.rowid AS n, m.{FILE}"], ""
    selected += [f"m.{names[need]}" for need in in_main if need in names]
    for i, (join, parts) in enumerate(sides):
        held = [need for need in names if homes[need] == i]
        _store(con, f"side{i}", parts, [(keys[i], "k"), *((need, names[need]) for need in held)])
        twice = con.execute(
            f"SELECT k, count(*) AS c FROM side{i} WHERE k IS NOT NULL GROUP BY k HAVING c > 1 "
            "ORDER BY c DESC, k LIMIT 1"
        ).fetchone()
        if twice:
            raise UserError(
                f"{join.path}: {join.key} {twice[0]!r} stands in {twice[1]} rows, so joining by it is ambiguous. "
                "Keep one row a key."
            )
        selected += [f"s{i}.{names[need]}" for need in held]
        joined += f" LEFT JOIN side{i} s{i} ON s{i}.k = m.{key_names[keys[i]]}"
    columns = {place: names[need] for place, need in needs.items()}
    for place, need in lacking.items():
        columns[place] = f"c{len(columns)}_null"
        selected.append(f"NULL::{SQL_TYPE[need.use]} AS {columns[place]}")
    kind = "TABLE" if sides else "VIEW"
    con.execute(f"CREATE {kind} source AS SELECT {', '.join(selected)} FROM main_rows m{joined}")
    rows, first = sum(stored), sum(stored[: len(earlier)])
    if rows == first:
        raise UserError(f"the input has no rows: {', '.join(sources)}.")
    return Source(con, schema, domains, columns, rows, first)


def _homes(needs, mains, main_columns, sides) -> dict[Need, int | None]:
    """Where each need is found: None for the main sources, else the number of the join."""
    faults, homes = [], {}
    side_columns = [{c for r in parts for c in r.types} for _, parts in sides]
    known = main_columns.union(*side_columns)
    for i, (join, _) in enumerate(sides):
        if join.key not in main_columns:
            faults.append(f"join {join.path}: the sources lack column {join.key!r}.{nearest(join.key, main_columns)}")
        if join.key not in side_columns[i]:
            faults.append(f"join {join.path}: it lacks column {join.key!r}.{nearest(join.key, side_columns[i])}")
    join_keys = {join.key for join, _ in sides}
    for place, need in needs.items():
        found: list[int | None] = [None] if need.column in main_columns else []
        if need.column not in join_keys or not found:
            found += [i for i, columns in enumerate(side_columns) if need.column in columns]
        if not found:
            faults.append(f"{place}: no column {need.column!r}.{nearest(need.column, known)}")
        elif len(found) > 1:
            inputs = ", ".join("the sources" if i is None else sides[i][0].path for i in found)
            faults.append(f"{place}: column {need.column!r} is in several inputs ({inputs}): rename one")
        else:
            homes[need] = found[0]
            for relation in mains if found[0] is None else sides[found[0]][1]:
                kind = relation.types.get(need.column, "VARCHAR")
                if need.use in ("string", "number", "time") and re.search(r"[\]\)]$", kind) and "DECIMAL" not in kind:
                    where = f"column {need.column!r} of {relation.pattern}"
                    faults.append(f"{place}: {where} holds {kind}, one value is needed")
    if faults:
        tables = ", ".join(sorted(main_columns))
        raise UserError(
            "the input lacks what the schema asks for:\n"
            + "\n".join(f"  - {f}" for f in faults)
            + f"\nThe sources have: {tables}."
        )
    return homes


def files_of(pattern: str) -> list[str]:
    """The files of a glob, in sorted order.

    Raises:
        UserError: there is none.
    """
    if "://" in pattern:
        raise UserError(f"{pattern}: raw tables are read from local files; copy them here first.")
    files = sorted(glob.glob(pattern, recursive=True)) or ([pattern] if Path(pattern).is_file() else [])
    files = [file for file in files if Path(file).is_file()]
    if not files:
        raise UserError(f"no file matches {pattern}.")
    return files


def relations(con: duckdb.DuckDBPyConnection, pattern: str) -> Iterator[Relation]:
    """The files of a glob, in sorted order, grouped by format.

    Raises:
        UserError: there is none, all are empty, or one cannot be read.
    """
    runs: list[tuple[str, list[str]]] = []
    files = files_of(pattern)
    if not any(Path(file).stat().st_size for file in files):
        raise UserError(f"{pattern}: {'the file is' if len(files) == 1 else f'all {len(files)} files are'} empty.")
    for file in files:
        form = reader(file)
        if runs and runs[-1][0] == form:
            runs[-1][1].append(file)
        else:
            runs.append((form, [file]))
    for form, group in runs:
        sql = form.format(files=", ".join(literal(file) for file in group))
        try:
            for file in group:
                check_header(con, file)
            described = con.execute(f"DESCRIBE SELECT * FROM {sql}").fetchall()
        except duckdb.Error as error:
            raise sniffing_error(con, error, pattern) from None
        yield Relation(pattern, sql, {name: kind for name, kind, *_ in described if name != FILE})


def _store(con, table: str, parts: list[Relation], columns: list[tuple[Need, str]]) -> list[int]:
    """CREATE TABLE with the cast columns; parts are inserted one after another to keep their order.

    Returns:
        Rows of every part.
    """
    rows = []
    declared = ", ".join(f"{name} {SQL_TYPE[need.use]}" for need, name in columns)
    con.execute(f"CREATE TABLE {table} ({declared + ', ' if declared else ''}{FILE} VARCHAR)")
    for part in parts:
        casts = [
            cast_sql(need, part.types[need.column]) if need.column in part.types else f"NULL::{SQL_TYPE[need.use]}"
            for need, _ in columns
        ]
        try:
            inserted = con.execute(f"INSERT INTO {table} SELECT {', '.join([*casts, FILE])} FROM {part.sql}")
            rows.append(inserted.fetchone()[0])
        except duckdb.Error as error:
            raise read_error(error, part.pattern) from None
    return rows
