"""Histories from events, point-in-time: per row, which of the user's earlier events it may see.

Histories are never written out as lists. Events lie once in a flat file, ordered by user and time,
and a row's history is a range of it; `encode` cuts the last `max_length` of that range when it
makes a block. So the cost is one external sort and one pass over the rows, whatever the length of
a user's past, and memory is that of a record batch. Knows nothing of splits' names or tars.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..schema import Schema
from .casts import literal, no_id, quote
from .sources import stream

BATCH_ROWS = 131_072


@dataclass(frozen=True)
class EventGroup:
    """Histories that see the same events and are therefore aligned, entry by entry.

    These are the ones with the same `events.label` that collect features of the same role. A row
    is an event of the group if at least one of the collected values is there; a value that is
    missing beside another is row 0, or the empty text.

    Attributes:
        number: names the group's range columns `h<number>:user` and `h<number>:end`.
        label: the label an event must have half the maximum of, if any.
        features: history feature → the feature it collects.
    """

    number: int
    label: str | None
    features: dict[str, str]


def groups_of(schema: Schema) -> list[EventGroup]:
    """The event groups of a schema, in order."""
    found: dict[tuple, dict[str, str]] = {}
    for name, feature in schema.features.items():
        if feature.events is not None:
            role = schema.features[feature.events.of].role
            found.setdefault((feature.events.label, role), {})[name] = feature.events.of
    return [EventGroup(i, label, features) for i, ((label, _), features) in enumerate(found.items())]


def values_path(folder: Path, feature: str) -> Path:
    """Flat int64 file with what every event contributes to a history feature."""
    return folder / f"events-{feature}.i64"


def collect(con: duckdb.DuckDBPyConnection, schema: Schema, folder: Path, train_only: bool, empty_text: int) -> bool:
    """Create the table `ranges` (n, and per group `h<i>:user`, `h<i>:end`) and the event files.

    With `e` a group's events in the order (user, time, n), a row's history is the last
    `max_length` of `e[h:user : h:end]`: `h:user` is the user's first event, and `h:end` stands
    before the first event that is not strictly earlier than the row.

    Args:
        con: connection that holds `encoded`.
        schema: resolved or not.
        folder: where the event files go.
        train_only: only rows of the train split, and past ones, are events.
        empty_text: row number of the empty text, for events without one.

    Returns:
        Whether there are such histories; without any, there is no table.
    """
    groups = groups_of(schema)
    if not groups:
        return False
    selected = ["n", '"key:user"', '"key:time"']
    for group in groups:
        present = " OR ".join(f"{quote(f'f:{of}')} IS NOT NULL" for of in group.features.values())
        conditions = [f"({present})"]
        if group.label is not None:
            # A missing label is no event, and null must not reach numpy.
            half = schema.labels[group.label].maximum / 2
            conditions.append(f"coalesce({quote(f'label:{group.label}')} >= {half!r}, false)")
        if train_only:
            conditions.append("split <= 0")
        selected.append(f"CAST({' AND '.join(conditions)} AS TINYINT) AS e{group.number}")
        for feature, of in group.features.items():
            missing = empty_text if schema.features[feature].kind == "texts" else no_id(schema, feature)
            selected.append(f"CAST(coalesce({quote(f'f:{of}')}, {missing}) AS BIGINT) AS {quote(f'v:{feature}')}")
    query = (
        f"SELECT {', '.join(selected)} FROM encoded "
        'WHERE "key:user" IS NOT NULL AND "key:time" IS NOT NULL ORDER BY "key:user", "key:time", n'
    )
    fields = [("n", pa.int64())] + [(f"h{g.number}:{end}", pa.int64()) for g in groups for end in ("user", "end")]
    target = folder / "ranges.parquet"
    files = {feature: open(values_path(folder, feature), "wb") for g in groups for feature in g.features}  # noqa: SIM115
    try:
        with pq.ParquetWriter(target, pa.schema(fields)) as writer:
            ranges = {g.number: _Ranges() for g in groups}
            for batch in stream(con, query, BATCH_ROWS):
                column = {name: batch.column(name).to_numpy(zero_copy_only=False) for name in batch.schema.names}
                arrays = [batch.column("n")]
                for group in groups:
                    event = column[f"e{group.number}"].astype(bool)
                    for feature in group.features:
                        column[f"v:{feature}"][event].astype(np.int64, copy=False).tofile(files[feature])
                    arrays += map(pa.array, ranges[group.number].advance(column["key:user"], column["key:time"], event))
                writer.write_batch(pa.record_batch(arrays, schema=pa.schema(fields)))
    finally:
        for file in files.values():
            file.close()
    con.execute(f"CREATE TABLE ranges AS SELECT * FROM read_parquet({literal(str(target))})")
    target.unlink()
    return True


class _Ranges:
    """Walks rows in the order (user, time) and numbers the events before each.

    The count of events before a row never falls, so "its value at the start of this user" (or of
    this instant) is a running maximum over the starts; the carry joins batches.
    """

    def __init__(self) -> None:
        self.events = self.user_start = self.instant_start = 0
        self.last: tuple[int, int] | None = None

    def advance(self, user: np.ndarray, time: np.ndarray, event: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 `[n]` first event of the row's user, and first event not before the row's time."""
        if not len(user):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        new_user, new_instant = np.empty(len(user), bool), np.empty(len(user), bool)
        new_user[0] = self.last is None or user[0] != self.last[0]
        new_user[1:] = user[1:] != user[:-1]
        new_instant[0] = new_user[0] or time[0] != self.last[1]
        new_instant[1:] = new_user[1:] | (time[1:] != time[:-1])
        before = self.events + np.cumsum(event) - event
        starts = np.maximum.accumulate(np.where(new_user, before, self.user_start))
        ends = np.maximum.accumulate(np.where(new_instant, before, self.instant_start))
        self.events += int(event.sum())
        self.user_start, self.instant_start = int(starts[-1]), int(ends[-1])
        self.last = (int(user[-1]), int(time[-1]))
        return starts, ends
