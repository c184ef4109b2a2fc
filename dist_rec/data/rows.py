"""`Rows`: decoded rows as numpy columns, ragged where they are lists.

What a block decodes to, what the shuffle window holds, and what a batch is made of. No torch:
decoding and shuffling need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa

from ..schema import Schema

KEY_NAMES = ("user", "query", "time")


def id_dtype(size: int) -> type[np.integer]:
    """The integer type that holds table rows 0 .. size - 1."""
    return np.int32 if size < 2**31 else np.int64


@dataclass
class Ragged:
    """n lists in one array: list i is `values[offsets[i]:offsets[i + 1]]`. Not to be changed in place.

    Attributes:
        values: `[total]`, any dtype.
        offsets: int64 `[n + 1]`, starting at 0.
    """

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return self.offsets[1:] - self.offsets[:-1]

    @classmethod
    def from_lengths(cls, values: np.ndarray, lengths: np.ndarray) -> Ragged:
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(values, offsets)

    @classmethod
    def from_runs(cls, runs: pa.LargeBinaryArray, dtype: np.dtype) -> Ragged:
        """The lists whose bytes are the (one or more) entries of `runs`, as views."""
        _, ends, data = runs.buffers()
        offsets = np.frombuffer(ends, np.int64, len(runs) + 1) // dtype.itemsize
        return cls(np.frombuffer(data, dtype, offsets[-1]) if offsets[-1] else np.zeros(0, dtype), offsets)

    @classmethod
    def concat(cls, parts: Sequence[Ragged]) -> Ragged:
        offsets = np.zeros(sum(map(len, parts)) + 1, np.int64)
        at = total = 0
        for part in parts:
            np.add(part.offsets[1:], total, out=offsets[at + 1 : at + 1 + len(part)])
            at, total = at + len(part), total + int(part.offsets[-1])
        return cls(np.concatenate([part.values for part in parts]), offsets)

    @classmethod
    def from_optional(cls, values: np.ndarray, null: int) -> Ragged:
        """A list of one entry for every value, an empty one for `null`."""
        there = values != null
        if there.all():
            return cls(values, np.arange(len(values) + 1))
        return cls.from_lengths(values[there], there)

    def first(self, null: int) -> np.ndarray:
        """The first entry of every list, `null` for an empty one: `from_optional` undone."""
        if self._one_each:
            return self.values
        first, filled = np.full(len(self), null, self.values.dtype), self.lengths > 0
        first[filled] = self.values[self.offsets[:-1][filled]]
        return first

    def slice(self, start: int, stop: int) -> Ragged:
        """Lists start .. stop as views."""
        offsets = self.offsets[start : stop + 1]
        return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    def take(self, rows: np.ndarray) -> Ragged:
        """Lists `rows` (int64 `[m]`), in that order, copied."""
        if self._one_each:
            return Ragged(self.values[rows], np.arange(len(rows) + 1))
        if not len(rows):
            return Ragged(self.values[:0], np.zeros(1, np.int64))
        return Ragged.from_runs(self._runs.take(pa.array(rows)), self.values.dtype)

    @cached_property
    def _one_each(self) -> bool:
        """Whether every list has one entry, as an id that is never null: then lists are an array."""
        return len(self.values) == len(self) and bool((self.lengths == 1).all())

    @cached_property
    def _runs(self) -> pa.LargeBinaryArray:
        """The lists as runs of bytes, which Arrow copies whole: twice as fast as an index for every entry."""
        values = np.ascontiguousarray(self.values)
        buffers = [None, pa.py_buffer(self.offsets * values.itemsize), pa.py_buffer(values)]
        return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self), buffers)


@dataclass
class Rows:
    """n rows as columns.

    Attributes:
        domain: int64 `[n]`, position of the domain in the schema's list.
        row: int64 `[n]`, number of the row in the data set (canonical, by shard and block); -1 on
            void rows, which stand for lost ones (see `void`).
        ids: per `id`/`ids` feature, lists of table rows; a null is an empty list.
        dense: per `dense` feature, float32 `[n, width]`; a null is NaN.
        texts: per `text`/`texts` feature, lists of positions in `text_keys`; null is empty.
        text_keys: int64 `[t]`, content hashes; those of a batch are what its rows use, each once,
            sorted; before that they may repeat and be more.
        tokens: token ids of those texts, or None where they were not asked for.
        labels: per label, float32 `[n]`; missing is NaN.
        keys: `user`, `query`, `time`, int64 `[n]`; a missing key is -1.
    """

    domain: np.ndarray
    row: np.ndarray
    ids: dict[str, Ragged] = field(default_factory=dict)
    dense: dict[str, np.ndarray] = field(default_factory=dict)
    texts: dict[str, Ragged] = field(default_factory=dict)
    text_keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    tokens: Ragged | None = None
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    keys: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def void(cls, schema: Schema, features: Iterable[str], with_tokens: bool, domain: int, n: int) -> Rows:
        """n rows that hold the places of lost ones, so that no other row moves: a batch masks them.

        Args:
            schema, features, with_tokens: what the lost block would have been decoded with.
            domain: position of its domain in the schema.
            n: how many rows were lost.
        """
        rows = cls(domain=np.full(n, domain, np.int64), row=np.full(n, -1, np.int64))
        for name in features:
            feature = schema.features[name]
            if feature.kind in ("id", "ids"):
                size = schema.table_sizes()[schema.table_of(name)]
                rows.ids[name] = Ragged(np.zeros(0, id_dtype(size)), np.zeros(n + 1, np.int64))
            elif feature.kind == "dense":
                rows.dense[name] = np.full((n, feature.width), np.nan, np.float32)
            else:
                rows.texts[name] = Ragged(np.zeros(0, np.int32), np.zeros(n + 1, np.int64))
        if with_tokens:
            rows.tokens = Ragged(np.zeros(0, np.int32), np.zeros(1, np.int64))
        rows.labels = {name: np.full(n, np.nan, np.float32) for name in schema.labels}
        rows.keys = {name: np.full(n, -1, np.int64) for name in KEY_NAMES}
        return rows

    @classmethod
    def concat(cls, parts: Sequence[Rows]) -> Rows:
        """All rows of `parts` in order; their text tables stand one after another."""
        first = parts[0]
        if len(parts) == 1:
            return first
        starts = np.cumsum([0] + [len(p.text_keys) for p in parts[:-1]]).tolist()
        tables = list(zip(parts, starts, strict=True))
        return cls(
            domain=np.concatenate([p.domain for p in parts]),
            row=np.concatenate([p.row for p in parts]),
            ids={n: Ragged.concat([p.ids[n] for p in parts]) for n in first.ids},
            dense={n: np.concatenate([p.dense[n] for p in parts]) for n in first.dense},
            texts={
                name: Ragged.concat([Ragged(p.texts[name].values + s, p.texts[name].offsets) for p, s in tables])
                for name in first.texts
            },
            text_keys=np.concatenate([p.text_keys for p in parts]),
            tokens=None if first.tokens is None else Ragged.concat([p.tokens for p in parts]),
            labels={n: np.concatenate([p.labels[n] for p in parts]) for n in first.labels},
            keys={n: np.concatenate([p.keys[n] for p in parts]) for n in first.keys},
        )

    def slice(self, start: int, stop: int) -> Rows:
        """Rows start .. stop; columns are views and the text table is shared."""
        if start == 0 and stop == len(self):
            return self
        return self._each(lambda column: column[start:stop], lambda lists: lists.slice(start, stop))

    def take(self, rows: np.ndarray) -> Rows:
        """Rows `rows` (int64 `[m]`) in that order; the text table is shared."""
        return self._each(lambda column: column[rows], lambda lists: lists.take(rows))

    def _each(self, plain: Callable[[np.ndarray], np.ndarray], ragged: Callable[[Ragged], Ragged]) -> Rows:
        return Rows(
            domain=plain(self.domain),
            row=plain(self.row),
            ids={n: ragged(c) for n, c in self.ids.items()},
            dense={n: plain(c) for n, c in self.dense.items()},
            texts={n: ragged(c) for n, c in self.texts.items()},
            text_keys=self.text_keys,
            tokens=self.tokens,
            labels={n: plain(c) for n, c in self.labels.items()},
            keys={n: plain(c) for n, c in self.keys.items()},
        )
