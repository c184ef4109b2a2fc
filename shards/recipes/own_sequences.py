"""A domain of your own for `sequences.py`: who had what when, and what the items are called.

    python shards/recipes/sequences.py --out shop --domains shop --interactions 'logs/*.parquet' --items items.csv \\
        --columns user=visitor,item=sku,time=seen_at --text name,brand

Parquet, CSV, TSV, JSON lines or RecBole's atomic files. Interactions have a user, an item and a time (seconds or
dates), items an item and texts, of which all that are named and there become one, a sentence each; a list's entries are
one sentence. Every item of the file is of the catalogue, had or not. The newest event of a user is held out for test,
the one before for valid; events of one moment keep the files' order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rows import Catalog
from sequence_rows import Sequences, core, described, held_out, with_texts

from dist_rec.data.casts import Need, cast_sql, quote
from dist_rec.data.sources import relations
from dist_rec.errors import UserError, nearest

COLUMNS = {"user": "user", "item": "item", "time": "time"}
TEXTS = ("title", "categories", "brand")


@dataclass(frozen=True)
class Own:
    """Where a domain's files are, and how their columns are called.

    Attributes:
        interactions, items: globs.
        columns: raw column of `user`, `item` and `time`.
        texts: raw columns of the items' texts.
        least: events that users and items must have, those of fewer going again and again; 1 keeps all.
    """

    interactions: str
    items: str
    columns: Mapping[str, str] = field(default_factory=lambda: dict(COLUMNS))
    texts: tuple[str, ...] = TEXTS
    least: int = 1

    def sequences(self, domain: str) -> Sequences:
        """Leave-one-out sequences over the whole catalogue.

        Raises:
            UserError: files or columns are missing, a value is none, or nothing is left.
        """
        with duckdb.connect() as con:
            items = self._items(con)
            events = _read(con, self.interactions, {name: self.columns[name] for name in COLUMNS}, time="time")
        for name in COLUMNS:
            if events[name].null_count:
                row = pc.index(pc.is_null(events[name]), True).as_py()
                raise UserError(f"{self.interactions}: row {row + 1:,} has no {self.columns[name]}.")
        number = pc.index_in(events["item"], items["item"])
        known = pc.is_valid(number)
        left_out = {"events of items that the items lack": len(events) - pc.sum(known).as_py()}
        events, number = events.filter(known), number.filter(known)
        users = events["user"].combine_chunks().dictionary_encode()
        user, item = (np.asarray(of).astype(np.int64) for of in (users.indices, number))
        kept = core(user, item, self.least)
        if not len(kept):
            raise UserError(
                f"{self.interactions}: nothing is left of {len(user):,} events of known items; users and items need "
                f"{self.least} each."
            )
        names, user = np.unique(user[kept], return_inverse=True)
        names = users.dictionary.take(pa.array(names))
        targets, history_time = held_out(user, item[kept], np.asarray(events["time"])[kept], names)
        targets.user_id = pa.nulls(len(targets), pa.string())
        left_out["users of one event"] = int((np.bincount(user) == 1).sum())
        titles = items["texts"].combine_chunks()
        catalog = Catalog(items["item"].combine_chunks(), titles)
        return with_texts(Sequences(domain, catalog, targets, history_time, None, titles, left_out), titles)

    def _items(self, con: duckdb.DuckDBPyConnection) -> pa.Table:
        """`item`, each once, and `texts`, null where there is none."""
        there = {name for relation in relations(con, self.items) for name in relation.types}
        texts = [name for name in self.texts if name in there]
        if not texts:
            raise UserError(
                f"{self.items} has none of the texts {', '.join(self.texts)}: it has {', '.join(sorted(there))}. Name "
                "them with --text."
            )
        columns = {"item": self.columns["item"]} | {f"text{i}": name for i, name in enumerate(texts)}
        table = _read(con, self.items, columns, lists=True)
        counts = table["item"].combine_chunks().value_counts()
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(twice) or table["item"].null_count:
            what = f"item {twice[0]['values'].as_py()!r} more than once" if len(twice) else "a row without an item"
            raise UserError(f"{self.items} has {what}: keep one row an item.")
        parts = [table[name].to_pylist() for name in columns if name != "item"]
        found = pa.array([described(one) for one in zip(*parts, strict=True)], pa.string())
        return pa.table({"item": table["item"], "texts": found})


def _read(
    con: duckdb.DuckDBPyConnection, pattern: str, columns: Mapping[str, str], time: str = "", lists: bool = False
) -> pa.Table:
    """Columns by our names: `time` int64 in seconds, the others strings; with `lists`, a list is its entries joined."""
    parts = list(relations(con, pattern))
    there = {name for part in parts for name in part.types}
    for ours, column in columns.items():
        if column not in there:
            raise UserError(
                f"{pattern} has no column {column!r} for {ours}.{nearest(column, there)} It has "
                f"{', '.join(sorted(there))}; name another with --columns {ours}=NAME."
            )
    tables = []
    for part in parts:
        selected = []
        for ours, column in columns.items():
            kind = part.types.get(column, "VARCHAR")
            sql = cast_sql(Need(column, "time" if ours == time else "string"), kind)
            if lists and (kind == "JSON" or kind.endswith("]")):
                joined = f"array_to_string({cast_sql(Need(column, 'list'), kind)}, ' ')"
                is_list = f"json_type({quote(column)}) = 'ARRAY'" if kind == "JSON" else "true"
                sql = f"CASE WHEN {is_list} THEN {joined} ELSE {sql} END"
            selected.append(f"{sql} AS {ours}")
        try:
            tables.append(con.sql(f"SELECT {', '.join(selected)} FROM {part.sql}").to_arrow_table())
        except duckdb.Error as error:
            raise UserError(f"cannot read {pattern}: {str(error).splitlines()[0]}") from None
    return pa.concat_tables(tables, promote_options="permissive")
