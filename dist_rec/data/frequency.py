"""How often every id of a data set occurs, boiled down to what sizes embedding tables.

Counts are SQL over the table `encoded`, which works on disk where memory is short. Histories from events are never
written out there (see `histories`): a row uses a range of events, so an event's uses are the ranges that began at or
before it, less those that ended. Runs before shards are written; knows neither blocks nor tars.
"""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from ..schema import Schema
from .casts import quote
from .encode import map_array
from .histories import BATCH_ROWS, EventGroup, groups_of, values_path
from .index import SHARES, Frequency
from .sources import stream

EVENT_USES = "event_uses"


def count_ids(con: duckdb.DuckDBPyConnection, schema: Schema, folder: Path) -> dict[int, dict[str, Frequency]]:
    """Per split (its number) and per id or ids feature, over the rows that will be written.

    Args:
        con: connection that holds `encoded`, and `ranges` where there are histories from events.
        schema: resolved or not.
        folder: with the event files; other files come and go there.
    """
    rows = dict(con.execute("SELECT split, count(*) FROM encoded WHERE split >= 0 GROUP BY 1 ORDER BY 1").fetchall())
    groups = {name: group for group in groups_of(schema) for name in group.features}
    found: dict[int, dict[str, Frequency]] = {split: {} for split in rows}
    for name, feature in schema.select(kinds=("id", "ids")).items():
        column = quote(f"f:{name}")
        if name in groups:
            _count_events(con, groups[name], name, feature.max_length, folder, max(rows) + 1)
            counts = f"SELECT split, sum(uses) AS uses FROM {EVENT_USES} GROUP BY split, id"
        else:
            ids = f"unnest({column})" if feature.kind == "ids" else column
            uses = f"SELECT split, {ids} AS id FROM encoded WHERE split >= 0 AND {column} IS NOT NULL"
            counts = f"SELECT split, count(*) AS uses FROM ({uses}) GROUP BY split, id"
        histogram = con.execute(
            f"SELECT split, uses::BIGINT, count(*) FROM ({counts}) GROUP BY 1, 2 ORDER BY 1, 2 DESC"
        ).fetchnumpy()
        split, uses, ids = (np.asarray(column, np.int64) for column in histogram.values())
        for number in rows:
            of = split == number
            found[number][name] = frequency(uses[of], ids[of], rows[number])
    con.execute(f"DROP TABLE IF EXISTS {EVENT_USES}")
    return found


def frequency(uses: np.ndarray, ids: np.ndarray, rows: int) -> Frequency:
    """From how many `ids` occur how often.

    Args:
        uses: int64 `[k]`, falling.
        ids: int64 `[k]`, how many ids occur so often.
        rows: that were counted.
    """
    occurrences, distinct = int((uses * ids).sum()), int(ids.sum())
    held, made_up = np.cumsum(ids), np.cumsum(uses * ids)
    coverage = {}
    for name, share in SHARES.items():
        wanted = -(-occurrences * share // 1000)
        step = int(np.searchsorted(made_up, wanted))
        if not wanted:
            coverage[name] = 0
            continue
        surplus = int(made_up[step]) - wanted
        coverage[name] = int(held[step]) - surplus // int(uses[step])
    return Frequency(rows=rows, occurrences=occurrences, distinct=distinct, coverage=coverage)


def _count_events(
    con: duckdb.DuckDBPyConnection, group: EventGroup, name: str, max_length: int, folder: Path, splits: int
) -> None:
    """Create `event_uses` (split, id, uses): a row an event of the history feature `name` that is in use."""
    values = map_array(values_path(folder, name), np.int64)
    path, width = folder / "edges.i64", len(values) + 1
    edges = np.memmap(path, np.int64, "w+", shape=(splits * width,)).view(np.ndarray)
    columns = ", ".join(quote(f"h{group.number}:{end}") for end in ("user", "end"))
    query = f"SELECT split, {columns} FROM ranges JOIN encoded USING (n) WHERE split >= 0"
    for batch in stream(con, query, BATCH_ROWS):
        split, first, stop = (c.to_numpy(zero_copy_only=False).astype(np.int64) for c in batch.columns)
        np.add.at(edges, split * width + np.maximum(first, stop - max_length), 1)
        np.subtract.at(edges, split * width + stop, 1)
    con.execute(f"CREATE OR REPLACE TABLE {EVENT_USES} (split BIGINT, id BIGINT, uses BIGINT)")
    for number in range(splits):
        running = 0
        for start in range(0, len(values), BATCH_ROWS):
            stop = min(start + BATCH_ROWS, len(values))
            uses = running + np.cumsum(edges[number * width + start : number * width + stop])
            running, there = int(uses[-1]), uses > 0
            columns = {"split": np.full(there.sum(), number), "id": values[start:stop][there], "uses": uses[there]}
            con.register("chunk", pa.table(columns))
            con.execute(f"INSERT INTO {EVENT_USES} SELECT split, id, uses FROM chunk")
            con.unregister("chunk")
    del edges
    path.unlink()


class IdCounter:
    """Counts of integers, merged in bulk; memory is that of the distinct ones."""

    def __init__(self) -> None:
        self.values = self.counts = np.zeros(0, np.int64)
        self.pending: list[tuple[np.ndarray, np.ndarray]] = []
        self.num_pending = 0

    def add(self, values: np.ndarray) -> None:
        self.pending.append(np.unique(values, return_counts=True))
        self.num_pending += len(self.pending[-1][0])
        # Merging only when as much is pending as is held keeps the whole linear.
        if self.num_pending > max(len(self.values), 100_000):
            self.merge()

    def merge(self) -> None:
        values = np.concatenate([self.values, *(v for v, _ in self.pending)]).astype(np.int64)
        counts = np.concatenate([self.counts, *(c for _, c in self.pending)]).astype(np.int64)
        self.values, inverse = np.unique(values, return_inverse=True)
        self.counts = np.bincount(inverse, counts, len(self.values)).astype(np.int64)
        self.pending, self.num_pending = [], 0

    def top(self, k: int) -> list[tuple[int, int]]:
        self.merge()
        order = np.lexsort((self.values, -self.counts))[:k]
        return [(int(self.values[i]), int(self.counts[i])) for i in order]

    def frequency(self, rows: int) -> Frequency:
        self.merge()
        uses, ids = np.unique(self.counts, return_counts=True)
        return frequency(uses[::-1], ids[::-1], rows)
