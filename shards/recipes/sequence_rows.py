"""The common row of the sequence data sets, and how whole sequences become such rows.

A source module (`sequence_sources`, `amazon2018`) says which items there are and which sequences
were observed (`Sequences`); folding prefixes, windows, counts and Parquet columns are here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from amazon import leave_one_out
from common import keep_groups, mix, split_names, stable_hash
from rows import Catalog, Targets, as_rows, prefixed, windows

from dist_rec.data.index import CATALOGUE
from dist_rec.data.rows import Ragged

ROW = pa.schema(
    [
        ("domain", pa.string()),
        ("split", pa.string()),
        ("user", pa.string()),
        ("history", pa.list_(pa.string())),
        ("history_text", pa.list_(pa.string())),
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("time", pa.int64()),
        ("next", pa.int8()),
    ]
)
# Longer than any history: loaders that clip are told not to.
WHOLE = 2**40
# What UniSRec's cleaning makes of an empty title.
NO_TEXT = "."
# Rows that become one row group: the texts of every history, written out.
CHUNK = 8_192


@dataclass
class Sequences:
    """What was observed in one domain.

    Attributes:
        domain: its name.
        catalog: the items; no text is null.
        targets: of training one row a user, whose history and item are the user's whole training sequence; of valid
            and test one row a held-out target. `user_id` is the source's raw user id, null where unknown.
        history_time: times aligned with the histories, or None where only the targets' are known.
        asins: raw item ids, null where unknown: what tells items of two sources to be one.
        titles: without categories and brand, null where unknown; None where texts cannot be taken apart.
        left_out: what was counted and is not in the rows, by reason.
    """

    domain: str
    catalog: Catalog
    targets: Targets
    history_time: Ragged | None = None
    asins: pa.Array | None = None
    titles: pa.Array | None = None
    left_out: dict[str, int] = field(default_factory=dict)


# Texts ---------------------------------------------------------------------------------------


def described(parts: Sequence[str | None]) -> str | None:
    """Texts as sentences in a row: each ends in one full stop. Empty ones are left out; None if all are."""
    kept = [part for text in parts if text and (part := text.strip().rstrip(".").rstrip())]
    return " ".join(f"{part}." for part in kept) or None


def with_texts(sequences: Sequences, texts: pa.Array) -> Sequences:
    """The sequences with `texts` (null where there is none) as the items' texts; missing ones are "." and counted."""
    missing = {"items without text": texts.null_count}
    catalog = Catalog(sequences.catalog.ids, texts.fill_null(NO_TEXT))
    return replace(sequences, catalog=catalog, left_out=sequences.left_out | missing)


# Sequences -----------------------------------------------------------------------------------


def core(user: np.ndarray, item: np.ndarray, least: int = 5) -> np.ndarray:
    """Rows (sorted) that are left when users and items with fewer than `least` rows go, again and again.

    Args:
        user, item: int64 `[n]`, 0 and up.
    """
    rows = np.arange(len(user))
    while True:
        often = [np.bincount(of[rows]) >= least if len(rows) else np.zeros(0, bool) for of in (user, item)]
        kept = rows[often[0][user[rows]] & often[1][item[rows]]]
        if len(kept) == len(rows):
            return rows
        rows = kept


def held_out(user: np.ndarray, item: np.ndarray, time: np.ndarray, names: pa.Array) -> tuple[Targets, Ragged]:
    """Sequences of interactions, the last held out for test and the one before for valid.

    They are ordered by time; those of one moment stay in the order in which they are given.

    Args:
        user: int64 `[n]`, positions in `names`.
        item: int64 `[n]`, positions in a catalogue.
        time: int64 `[n]`, seconds.
        names: string, the users.

    Returns:
        the targets, of training the longest a user, and the times of their histories.
    """
    order = np.lexsort((np.arange(len(user)), time, user))
    events = Ragged.from_lengths(order, np.bincount(user, minlength=len(names)))
    targets = leave_one_out(events, names, 1, WHOLE)
    past = targets.history
    targets.time = pa.array(time[targets.item])
    targets.item = item[targets.item]
    targets.history = Ragged(item[past.values], past.offsets)
    return targets, Ragged(time[past.values], past.offsets)


def without_target(user: np.ndarray) -> dict[str, int]:
    """What of `held_out` interactions no row is about, by reason.

    Args:
        user: int64 `[n]`, 0 and up.
    """
    events = np.bincount(user)
    return {
        "users of one event": int((events == 1).sum()),
        "first events of users of two or three, who have no training row": int(((events == 2) | (events == 3)).sum()),
    }


def fold(
    histories: Sequence[tuple[int, ...]], items: Sequence[int], users: Sequence[object], longest: int
) -> list[list[int]]:
    """Rows of a prefix-augmented file joined to the sequences that they are prefixes of.

    A row continues another if its history is the last `longest` of that one's history and item. Every row has at most
    one row before and one after it. Where several would fit, the same user's come first, and of those the one that
    stands nearest in the file.

    Args:
        histories: of n rows, oldest first, cut to the last `longest`.
        items: what comes next.
        users: whose the row is; None where unknown. Rows of two known users are never joined.
        longest: where histories were cut.

    Returns:
        row numbers, one list a sequence, oldest first. Together they are all n rows, each once.
    """
    ends: dict[tuple, list[int]] = defaultdict(list)
    for row, (history, item, user) in enumerate(zip(histories, items, users, strict=True)):
        ends[user, (*history, item)[-longest:]].append(row)
    after: dict[int, int] = {}
    for row, (history, user) in enumerate(zip(histories, users, strict=True)):
        for owner in dict.fromkeys((user, None)):
            fitting = ends.get((owner, tuple(history)), [])
            # One item again and again, cut, continues itself.
            before = min((end for end in fitting if end != row), key=lambda end: abs(end - row), default=None)
            if before is not None:
                fitting.remove(before)
                after[before] = row
                break
    continued = set(after.values())
    # First what nothing comes before, then circles, which are broken at their first row.
    starts = [row for row in range(len(items)) if row not in continued]
    sequences, seen = [], set()
    for start in [*starts, *range(len(items))]:
        sequence, row = [], start
        while row is not None and row not in seen:
            seen.add(row)
            sequence.append(row)
            row = after.get(row)
        if sequence:
            sequences.append(sequence)
    return sequences


def whole(targets: Targets, rows: np.ndarray) -> Ragged:
    """History and item of `rows` (int64) as one list each."""
    history = targets.history.take(rows)
    lengths = history.lengths + 1
    out = Ragged.from_lengths(np.zeros(lengths.sum(), np.int64), lengths)
    last = np.zeros(len(out.values), bool)
    last[out.offsets[1:] - 1] = True
    out.values[~last] = history.values
    out.values[last] = targets.item[rows]
    return out


def _parted(events: Ragged) -> tuple[Ragged, np.ndarray]:
    """`whole` undone: the lists without their last entries, and these."""
    last = events.offsets[1:] - 1
    return windows(events.values, events.offsets[:-1], last, WHOLE), events.values[last]


def training_only(sequences: Sequences) -> Sequences:
    """The sequences without their valid and test rows."""
    rows = np.flatnonzero(sequences.targets.split == 0)
    times = sequences.history_time
    return replace(
        sequences,
        targets=sequences.targets.take(rows),
        history_time=None if times is None else times.take(rows),
        left_out=sequences.left_out | {"valid and test rows": len(sequences.targets) - len(rows)},
    )


def without(sequences: Sequences, users: set[str], items: np.ndarray) -> Sequences:
    """The training sequences of other users, without some items, which leave the catalogue too.

    Valid and test rows are left out: their targets would go, or their users. What goes is counted.

    Args:
        users: raw user ids.
        items: bool `[catalogue]`, those that go.
    """
    targets = sequences.targets
    foreign = np.array([user not in users for user in targets.user_id.to_pylist()], bool)
    rows = np.flatnonzero((targets.split == 0) & foreign)
    events = whole(targets, rows)
    kept = ~items[events.values]
    of_row = np.repeat(np.arange(len(rows)), events.lengths)[kept]
    number = np.cumsum(~items) - 1
    left = Ragged.from_lengths(number[events.values[kept]], np.bincount(of_row, minlength=len(rows)))
    times = sequences.history_time
    if times is not None:
        moments = whole(replace(targets, item=targets.time.to_numpy(), history=times), rows)
        times = Ragged(moments.values[kept], left.offsets)
    two = np.flatnonzero(left.lengths > 1)
    out = targets.take(rows[two])
    out.history, out.item = _parted(left.take(two))
    out.time = None
    if times is not None:
        times, last = _parted(times.take(two))
        out.time = pa.array(last)
    stay = pa.array(np.flatnonzero(~items))

    def taken(column: pa.Array | None) -> pa.Array | None:
        return None if column is None else column.take(stay)

    catalog = sequences.catalog
    return replace(
        sequences,
        catalog=Catalog(catalog.ids.take(stay), catalog.texts.take(stay)),
        targets=out,
        history_time=times,
        asins=taken(sequences.asins),
        titles=taken(sequences.titles),
        left_out=sequences.left_out
        | {
            "training sequences of users of a target": int((targets.split == 0).sum()) - len(rows),
            "items of a target": int(items.sum()),
            "training sequences of one event without items of a target": len(rows) - len(two),
        },
    )


# Rows ----------------------------------------------------------------------------------------


def framed(sequences: Sequences, max_length: int) -> Sequences:
    """Training sequences in windows of at most `max_length` + 1 events, other histories cut to their last `max_length`.

    Windows of a sequence overlap by one event, so every event but the first is a target once; all but the oldest
    window are full. A training sequence of one event, and a held-out item without history, have nothing to be predicted
    from: they are left out and counted.
    """
    targets = sequences.targets
    length = targets.history.lengths
    train = targets.split == 0
    count = np.where(train, -(-length // max_length), np.minimum(length, 1))
    row = np.repeat(np.arange(len(targets)), count)
    within = Ragged.from_lengths(np.zeros(0, np.int64), count)
    later = count[row] - 1 - (np.arange(len(row)) - within.offsets[row])
    end = targets.history.offsets[row] + length[row] - later * max_length
    cut = targets.take(row)
    cut.history = windows(targets.history.values, targets.history.offsets[row], end, max_length)
    inner = np.flatnonzero(later)
    cut.item[inner] = targets.history.values[end[inner]]
    if cut.time is not None and len(inner):
        seconds = pa.nulls(len(inner), pa.int64())
        if sequences.history_time is not None:
            seconds = pa.array(sequences.history_time.values[end[inner]])
        cut.time = pc.replace_with_mask(cut.time, pa.array(later > 0), seconds)
    short = {
        "training sequences of one event": int((train & (length == 0)).sum()),
        "held-out items without history": int((~train & (length == 0)).sum()),
    }
    return replace(sequences, targets=cut, history_time=None, left_out=sequences.left_out | short)


def capped(sequences: Sequences, max_rows: int | None, seed: int) -> Sequences:
    """Whole users, in hashed order, within `max_rows` rows; the catalogue stays. What goes is counted."""
    targets = sequences.targets
    owners = mix(stable_hash([sequences.domain])[0], targets.owner)
    kept = np.flatnonzero(keep_groups(owners, max_rows, seed))
    lost = {f"rows of users beyond {max_rows:,} rows": len(targets) - len(kept)} if max_rows is not None else {}
    return replace(sequences, targets=targets.take(kept), left_out=sequences.left_out | lost)


def statistics(sequences: Sequences) -> dict[str, int | dict[str, int]]:
    """Counts of `framed` sequences.

    Returns:
        users; items (of the catalogue); interactions (training events and held-out items); rows by split; positions
        (supervised in training: what prefix expansion would make rows of); dates, the first and last day (UTC) of
        targets, none where the source tells no times; left_out by reason.
    """
    targets = sequences.targets
    train = targets.split == 0
    positions = int(targets.history.lengths[train].sum())
    # Windows of one user share an event.
    trained = len(np.unique(targets.owner[train]))
    rows = np.bincount(targets.split, minlength=3)
    return {
        "users": len(np.unique(targets.owner)),
        "items": len(sequences.catalog),
        "interactions": positions + trained + int(rows[1:].sum()),
        "rows": dict(zip(("train", "valid", "test"), rows.tolist(), strict=True)),
        "positions": positions,
        "dates": _dates(targets.time),
        "left_out": sequences.left_out,
    }


def _dates(seconds: pa.Array | None) -> list[str]:
    if seconds is None or seconds.null_count == len(seconds):
        return []
    ends = pc.min_max(seconds)
    days = [np.datetime64(ends[which].as_py(), "s").astype("datetime64[D]") for which in ("min", "max")]
    return [str(day) for day in days]


def sequence_tables(sequences: Sequences) -> Iterator[pa.Table]:
    """The catalogue, an item a row, then `framed` sequences, as tables of `ROW`.

    The catalogue comes first, so items are numbered in its order, and all of them are.
    """
    domain, catalog, targets = sequences.domain, sequences.catalog, sequences.targets
    ids = prefixed(domain, catalog.ids)
    items = {
        "domain": pa.repeat(domain, len(ids)),
        "split": pa.repeat(CATALOGUE, len(ids)),
        "item_id": ids,
        "title": catalog.texts,
    }
    yield as_rows(items, len(ids), ROW)
    for start in range(0, len(targets), CHUNK):
        part = targets.take(np.arange(start, min(start + CHUNK, len(targets))))
        offsets, past = pa.array(part.history.offsets.astype(np.int32)), pa.array(part.history.values)
        item = pa.array(part.item)
        columns = {
            "domain": pa.repeat(domain, len(part)),
            "split": split_names(part.split),
            "user": prefixed(domain, part.user),
            "history": pa.ListArray.from_arrays(offsets, ids.take(past)),
            "history_text": pa.ListArray.from_arrays(offsets, catalog.texts.take(past)),
            "item_id": ids.take(item),
            "title": catalog.texts.take(item),
            "time": part.time,
            "next": pa.repeat(1, len(part)),
        }
        yield as_rows(columns, len(part), ROW)
