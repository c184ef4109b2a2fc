"""A domain of your own for `sequences.py`: who had what when, and what the items are called.

    python shards/recipes/sequences.py --out shop --domains shop --interactions 'logs/*.parquet' --items items.csv \\
        --columns user=visitor,item=sku,time=seen_at --text name,brand

Parquet, CSV, TSV, JSON lines or RecBole's atomic files. Interactions have a user, an item and a time (seconds, with
fractions or without, or dates, which are UTC unless they say otherwise), items an item and texts, which become one, a
sentence each; a list's entries, and those of lists in it, are one sentence. Every item of the file is of the catalogue,
had or not. The newest event of a user is held out for test, the one before for valid; events of one moment keep the
files' order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rows import Catalog
from sequence_rows import Sequences, core, described, held_out, with_texts, without_target

from dist_rec.data.casts import FILE, Need, cast_sql, instant, is_instant, quote
from dist_rec.data.raw_files import read_error
from dist_rec.data.sources import relations
from dist_rec.errors import UserError, nearest

COLUMNS = {"user": "user", "item": "item", "time": "time"}
# The items' own name of theirs, where it is not that of the interactions.
OF_ITEMS = "catalogue_item"
TEXTS = ("title", "categories", "brand")
# Seconds of the year 5138, which milliseconds of 1973 pass.
LATEST = 10**11


@dataclass(frozen=True)
class Own:
    """Where a domain's files are, and how their columns are called.

    Attributes:
        interactions, items: globs.
        columns: raw column of `user`, `item` and `time`, and of `catalogue_item` where the items call it otherwise.
        texts: raw columns of the items' texts; None is those of `TEXTS` that there are.
        least: events that users and items must have, those of fewer going again and again; 1 keeps all.
    """

    interactions: str
    items: str
    columns: Mapping[str, str] = field(default_factory=lambda: dict(COLUMNS))
    texts: tuple[str, ...] | None = None
    least: int = 1

    def sequences(self, domain: str) -> Sequences:
        """Leave-one-out sequences over the whole catalogue.

        Raises:
            UserError: files or columns are missing, a value is none, or nothing is left.
        """
        with duckdb.connect() as con:
            con.execute("SET TimeZone = 'UTC'")
            items = self._items(con)
            events = self._events(con)
        number = pc.index_in(events["item"], items["item"])
        known = pc.is_valid(number)
        unknown = number.null_count
        if unknown == len(events):
            log, own = events["item"][0].as_py(), items["item"][0].as_py()
            raise UserError(
                f"{self.interactions}: none of {unknown:,} events is of an item of {self.items}: the first is of "
                f"{log!r}, and the first item is {own!r}. Ids have to be written alike."
            )
        events, number = events.filter(known), number.filter(known)
        encoded = events["user"].dictionary_encode().unify_dictionaries()
        user = np.concatenate([np.asarray(chunk.indices) for chunk in encoded.chunks]).astype(np.int64)
        # `held_out` knows whole seconds.
        order = np.argsort(np.asarray(events["moment"]), kind="stable")
        user, item, time = (np.asarray(of)[order] for of in (user, number, events["time"]))
        kept = core(user, item.astype(np.int64), self.least)
        if not len(kept):
            raise UserError(
                f"{self.interactions}: nothing is left of {len(user):,} events of known items; users and items need "
                f"{self.least} each."
            )
        used, user = np.unique(user[kept], return_inverse=True)
        names = encoded.chunk(0).dictionary.take(pa.array(used))
        targets, history_time = held_out(user, item[kept].astype(np.int64), time[kept], names)
        targets.user_id = pa.nulls(len(targets), pa.string())
        left_out = {
            "events of items that the items lack": unknown,
            f"events of users or items with fewer than {self.least}": len(order) - len(kept),
            **without_target(user),
        }
        catalog = Catalog(items["item"].combine_chunks(), items["texts"].combine_chunks())
        return with_texts(Sequences(domain, catalog, targets, history_time, left_out=left_out), catalog.texts)

    def _events(self, con: duckdb.DuckDBPyConnection) -> pa.Table:
        """`user`, `item`, `time` in whole seconds and `moment` in microseconds, in the files' order."""
        table = _read(con, self.interactions, {name: self.columns[name] for name in COLUMNS})
        if not len(table):
            raise UserError(f"{self.interactions} has no rows.")
        if pc.max(table["time"]).as_py() > LATEST:
            raise UserError(
                f"{self.interactions}: {self.columns['time']} has {pc.max(table['time'])} seconds, which looks like "
                "milliseconds or finer: give seconds or dates."
            )
        return table

    def _items(self, con: duckdb.DuckDBPyConnection) -> pa.Table:
        """`item`, each once, and `texts`, null where there is none."""
        there = {name for relation in relations(con, self.items) for name in relation.types}
        texts = [name for name in TEXTS if name in there] if self.texts is None else list(self.texts)
        if missing := [name for name in texts if name not in there] or ([] if texts else list(TEXTS)):
            raise UserError(
                f"{self.items} has no text {' or '.join(missing)}.{nearest(missing[0], there)} It has "
                f"{', '.join(sorted(there))}: name its texts with --text."
            )
        columns = {f"text{i}": name for i, name in enumerate(texts)}
        table = _read(con, self.items, {OF_ITEMS: self.columns.get(OF_ITEMS, self.columns["item"])}, columns)
        if not len(table):
            raise UserError(f"{self.items} has no rows.")
        counts = table[OF_ITEMS].value_counts()
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(twice):
            raise UserError(
                f"{self.items} has item {twice[0]['values'].as_py()!r} more than once: keep one row an item."
            )
        parts = [table[name].to_pylist() for name in columns]
        found = pa.array([described(one) for one in zip(*parts, strict=True)], pa.string())
        return pa.table({"item": table[OF_ITEMS], "texts": found})


def _read(
    con: duckdb.DuckDBPyConnection, pattern: str, columns: Mapping[str, str], texts: Mapping[str, str] | None = None
) -> pa.Table:
    """Columns by our names: of `columns` no value is null; of `texts` any may be, and a list is its entries joined."""
    parts, tables = list(relations(con, pattern)), []
    for part in parts:
        for ours, column in columns.items():
            kind = part.types.get(column)
            if kind is None:
                raise UserError(
                    f"{pattern} has no column {column!r} for {ours}.{nearest(column, part.types)} It has "
                    f"{', '.join(sorted(part.types))}; name another with --columns {ours}=NAME."
                )
            if re.search(r"[\])]$", kind) and "DECIMAL" not in kind:
                raise UserError(f"{pattern}: column {column!r} holds {kind}, and one {ours} a row is needed.")
        selected = {
            ours: cast_sql(Need(column, "time" if ours == "time" else "string"), part.types[column])
            for ours, column in columns.items()
        }
        if "time" in selected:
            selected["moment"] = _microseconds(columns["time"], part.types[columns["time"]])
        needed = list(selected)
        selected |= {ours: _sentence(column, part.types.get(column)) for ours, column in (texts or {}).items()}
        listed = ", ".join(f"{sql} AS {ours}" for ours, sql in selected.items())
        try:
            table = con.sql(f"SELECT {listed} FROM {part.sql}").to_arrow_table()
            for ours in needed:
                if table[ours].null_count:
                    absent = f"SELECT {FILE} FROM {part.sql} WHERE {selected[ours]} IS NULL LIMIT 1"
                    raise UserError(f"{con.execute(absent).fetchone()[0]} has a row without {columns[ours]}.")
        except duckdb.Error as error:
            raise read_error(error, pattern) from None
        tables.append(table)
    return pa.concat_tables(tables)


def _sentence(column: str, kind: str | None) -> str:
    """SQL of a text, or of a list of texts, of a DuckDB type; None where the column is not there."""
    if kind is None:
        return "NULL::VARCHAR"
    text, name = cast_sql(Need(column, "string"), kind), quote(column)
    if kind.endswith("]"):
        return _leaves(f"to_json({name})")
    if kind not in ("JSON", "VARCHAR"):
        return text
    a_list = f"json_valid({name}) AND json_type({name}) = 'ARRAY'"
    return f"CASE WHEN {a_list} THEN {_leaves(f'CASE WHEN {a_list} THEN {name} END')} ELSE {text} END"


def _leaves(array: str) -> str:
    """SQL of a JSON list's texts in a row, whatever it nests them in; null and empty ones are left out."""
    return f"(SELECT string_agg(nullif(atom ->> '$', ''), ' ' ORDER BY id) FROM json_tree({array}))"


def _microseconds(column: str, kind: str) -> str:
    """SQL of a time, of a DuckDB type, as a double; what is none is left to the cast to seconds to tell."""
    name = quote(column)
    if is_instant(kind):
        return f"CAST(epoch_us({instant(name, kind)}) AS DOUBLE)"
    if kind in ("JSON", "VARCHAR") or kind.startswith("ENUM"):
        text = f"trim({name} ->> '$')" if kind == "JSON" else f"trim({name})"
        return f"coalesce(TRY_CAST({text} AS DOUBLE) * 1e6, CAST(epoch_us(TRY_CAST({text} AS TIMESTAMPTZ)) AS DOUBLE))"
    return f"CAST({name} AS DOUBLE) * 1e6"
