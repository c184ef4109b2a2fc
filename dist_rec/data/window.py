"""A shuffled window of rows, laid out so that the rows of a batch are cheap to cut from it.

All columns of one value a row lie side by side as records: a batch copies the records of a stream at
once instead of column by column. Lists stay `Ragged`. Texts are in a `TextPool`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..schema import Schema
from .rows import Ragged, Rows
from .textpool import TextPool

_NOTHING = np.zeros(0, np.int64)
# Keys of texts among the columns of a window.
_KEYS = "text_keys"
# Stands for a null among ids and texts, which are never negative.
_NULL = -1


# Room in a buffer of lists beyond what its first part leads to expect.
_ROOM = 1.1


class Window:
    """The rows of `parts`, one part after another, then taken in the order `arrangement`.

    Args:
        parts: at least one, all with the same columns; each is copied before the next is asked for, while it is in
            the processor's cache.
        arrangement: int64 `[n]`, numbers of the rows.
        schema: tells features of one value from lists.
        pool, segment: where its texts go.

    Attributes:
        places: (attribute of `Rows`, key in it or None) of each field of the records; a text has one for its key, too.
        dtype: of the records.
        records: uint8 `[n, dtype.itemsize]`. A structured array itself is copied ten times slower.
        lists: (`ids` or `texts`, feature) -> lists of ids, or of texts as entries of the segment.
        features: `ids` or `texts` -> names in the schema's order.
    """

    def __init__(
        self, parts: Iterable[Rows], arrangement: np.ndarray, schema: Schema, pool: TextPool, segment: int
    ) -> None:
        n, at, self.segment = len(arrangement), 0, segment
        pool.clear(segment)
        for part in parts:
            shift = pool.append(segment, part, (at + len(part)) / n if n else 1.0)
            columns, lists = _columns(part, schema, shift)
            if not at:
                self.features = {"ids": list(part.ids), "texts": list(part.texts)}
                self.places = list(columns)
                kinds = [(str(i), column.dtype, column.shape[1:]) for i, column in enumerate(columns.values())]
                self.dtype = np.dtype(kinds, align=True)
                records = np.empty(n, self.dtype)
                growing = {place: _Growing(n, lists[place].values.dtype) for place in lists}
            for name, column in zip(self.dtype.names, columns.values(), strict=True):
                records[name][at : at + len(part)] = column
            for place, column in lists.items():
                growing[place].extend(column, at)
            at += len(part)
        self.lists = {place: lists.whole().take(arrangement) for place, lists in growing.items()}
        self.records = np.take(records.view(np.uint8).reshape(n, self.dtype.itemsize), arrangement, axis=0)


Place = tuple[str, str | None]


def _columns(rows: Rows, schema: Schema, shift: int) -> tuple[dict[Place, np.ndarray], dict[Place, Ragged]]:
    """Columns of one value a row, and lists; texts as entries of a segment where theirs begin at `shift`."""
    columns: dict[Place, np.ndarray] = {("domain", None): rows.domain, ("row", None): rows.row}
    columns |= {("dense", name): column for name, column in rows.dense.items()}
    columns |= {("labels", name): column for name, column in rows.labels.items()}
    # Keys that no row has would cost as much as any column.
    columns |= {("keys", name): column for name, column in rows.keys.items() if getattr(schema.keys, name)}
    found = {("ids", name): column for name, column in rows.ids.items()}
    found |= {("texts", n): Ragged(c.values.astype(np.int32) + shift, c.offsets) for n, c in rows.texts.items()}
    single = {place: schema.features[place[1]].kind in ("id", "text") for place in found}
    columns |= {place: column.first(_NULL) for place, column in found.items() if single[place]}
    for place, column in rows.texts.items():
        if single["texts", place]:
            # Looked up here, in a small table; among all windows' texts each look-up would miss the cache.
            keys = rows.text_keys if len(rows.text_keys) else np.zeros(1, np.int64)
            columns[_KEYS, place] = keys[column.first(0)]
    return columns, {place: column for place, column in found.items() if not single[place]}


class _Growing:
    """Lists for n rows, put together part by part."""

    def __init__(self, rows: int, dtype: np.dtype) -> None:
        self.values, self.used = np.empty(0, dtype), 0
        self.offsets = np.zeros(rows + 1, np.int64)

    def extend(self, part: Ragged, at: int) -> None:
        """Add the lists of rows `at` and following."""
        end, stop = self.used + len(part.values), at + len(part)
        if end > len(self.values) and stop:
            grown = np.empty(int(end / stop * (len(self.offsets) - 1) * _ROOM), self.values.dtype)
            grown[: self.used] = self.values[: self.used]
            self.values = grown
        self.values[self.used : end] = part.values
        np.add(part.offsets[1:], self.used, out=self.offsets[at + 1 : stop + 1])
        self.used = end

    def whole(self) -> Ragged:
        return Ragged(self.values[: self.used], self.offsets)


def cut(slices: Sequence[tuple[Window, int, int]], pool: TextPool) -> Rows:
    """Rows start .. stop of each window, one after another, with every text they use once, sorted by key.

    `Rows.keys` has those that the schema has.
    """
    first = slices[0][0]
    records = np.concatenate([window.records[start:stop] for window, start, stop in slices])
    records = records.view(first.dtype).reshape(-1)
    columns: dict[Place, Any] = {}
    for field, (attribute, name) in zip(first.dtype.names, first.places, strict=True):
        values = np.ascontiguousarray(records[field])
        single = attribute in first.features
        columns[attribute, name] = Ragged.from_optional(values, _NULL) if single else values
    for place in first.lists:
        columns[place] = Ragged.concat([window.lists[place].slice(start, stop) for window, start, stop in slices])
    edges = np.cumsum([0] + [stop - start for _, start, stop in slices])
    bases = pool.first[[window.segment for window, _, _ in slices]]
    uses, known = {}, [_NOTHING]
    for name in first.features["texts"]:
        column = columns["texts", name]
        uses[name] = column.values + np.repeat(bases, np.diff(column.offsets[edges]))
        keys = columns.get((_KEYS, name))
        known.append(pool.keys[uses[name]] if keys is None else keys[column.lengths > 0])
    keys, tokens, numbers = pool.collect(np.concatenate([_NOTHING, *uses.values()]), np.concatenate(known))
    texts, at = {}, 0
    for name, used in uses.items():
        texts[name] = Ragged(numbers[at : at + len(used)], columns["texts", name].offsets)
        at += len(used)
    return Rows(
        domain=columns["domain", None],
        row=columns["row", None],
        ids={name: columns["ids", name] for name in first.features["ids"]},
        texts=texts,
        text_keys=keys,
        tokens=tokens,
        **{kind: {n: c for (a, n), c in columns.items() if a == kind} for kind in ("dense", "labels", "keys")},
    )
