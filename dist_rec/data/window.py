"""A shuffled window of rows, laid out so that the rows of a batch are cheap to cut from it.

All columns of one value a row lie side by side as records: a batch copies the records of a stream at
once instead of column by column. Lists stay `Ragged`. Texts are in a `TextPool`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..schema import Schema
from .rows import Ragged, Rows
from .textpool import TextPool

# Stands for a null among ids and texts, which are never negative.
_NULL = -1


class Window:
    """The rows of `parts`, one part after another, then taken in the order `arrangement`.

    Args:
        parts: at least one, all with the same columns.
        arrangement: int64 `[n]`, numbers of the rows.
        schema: tells features of one value from lists.
        pool, segment: where its texts go.

    Attributes:
        places: (attribute of `Rows`, key in it or None) of each field of the records.
        dtype: of the records.
        records: uint8 `[n, dtype.itemsize]`. A structured array itself is copied ten times slower.
        lists: (`ids` or `texts`, feature) -> lists of ids, or of texts as entries of the segment.
        features: `ids` or `texts` -> names in the schema's order.
    """

    def __init__(
        self, parts: Sequence[Rows], arrangement: np.ndarray, schema: Schema, pool: TextPool, segment: int
    ) -> None:
        self.segment = segment
        pool.put(segment, parts)
        rows = Rows.concat(parts)
        columns: dict[tuple[str, str | None], np.ndarray] = {("domain", None): rows.domain, ("row", None): rows.row}
        for attribute in ("dense", "labels", "keys"):
            columns |= {(attribute, name): column for name, column in getattr(rows, attribute).items()}
        self.features = {"ids": list(rows.ids), "texts": list(rows.texts)}
        self.lists: dict[tuple[str, str], Ragged] = {}
        for attribute, names in self.features.items():
            for name in names:
                column = getattr(rows, attribute)[name]
                if schema.features[name].kind in ("id", "text"):
                    columns[attribute, name] = column.first(_NULL)
                else:
                    self.lists[attribute, name] = column.take(arrangement)
        self.places = list(columns)
        kinds = [(str(i), column.dtype, column.shape[1:]) for i, column in enumerate(columns.values())]
        records = np.empty(len(rows), np.dtype(kinds, align=True))
        for field, column in zip(records.dtype.names, columns.values(), strict=True):
            records[field] = column
        self.dtype = records.dtype
        self.records = np.take(records.view(np.uint8).reshape(len(rows), -1), arrangement, axis=0)


def cut(slices: Sequence[tuple[Window, int, int]], pool: TextPool) -> Rows:
    """Rows start .. stop of each window, one after another, with every text they use once, sorted by key."""
    first = slices[0][0]
    records = np.concatenate([window.records[start:stop] for window, start, stop in slices])
    records = records.view(first.dtype).reshape(-1)
    columns: dict[tuple[str, str | None], Any] = {}
    for field, (attribute, name) in zip(first.dtype.names, first.places, strict=True):
        values = np.ascontiguousarray(records[field])
        single = attribute in first.features
        columns[attribute, name] = Ragged.from_optional(values, _NULL) if single else values
    for place in first.lists:
        columns[place] = Ragged.concat([window.lists[place].slice(start, stop) for window, start, stop in slices])
    edges = np.cumsum([0] + [stop - start for _, start, stop in slices])
    bases = pool.first[[window.segment for window, _, _ in slices]]
    uses = {}
    for name in first.features["texts"]:
        column = columns["texts", name]
        uses[name] = column.values + np.repeat(bases, np.diff(column.offsets[edges]))
    keys, tokens, numbers = pool.collect(np.concatenate([np.zeros(0, np.int64), *uses.values()]))
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
