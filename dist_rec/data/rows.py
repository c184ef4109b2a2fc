"""`Rows`: decoded rows as numpy columns, ragged where they are lists.

What a block decodes to, what the shuffle window holds, and what a batch is made of. numpy
only: decoding and shuffling need no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Ragged:
    """n lists in one array: list i is `values[offsets[i]:offsets[i + 1]]`.

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
        return np.diff(self.offsets)

    @classmethod
    def from_lengths(cls, values: np.ndarray, lengths: np.ndarray) -> Ragged:
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(values, offsets)

    @classmethod
    def concat(cls, parts: Sequence[Ragged]) -> Ragged:
        return cls.from_lengths(np.concatenate([p.values for p in parts]), np.concatenate([p.lengths for p in parts]))

    def slice(self, start: int, stop: int) -> Ragged:
        """Lists start .. stop as views."""
        offsets = self.offsets[start : stop + 1]
        return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    def take(self, rows: np.ndarray) -> Ragged:
        """Lists `rows` (int64 `[m]`), in that order, copied."""
        starts, lengths = self.offsets[rows], self.lengths[rows]
        taken = Ragged.from_lengths(self.values, lengths)
        within = np.arange(taken.offsets[-1]) - np.repeat(taken.offsets[:-1], lengths)
        taken.values = self.values[np.repeat(starts, lengths) + within]
        return taken


@dataclass
class Rows:
    """n rows as columns.

    Attributes:
        domain: int64 `[n]`, position of the domain in the schema's list.
        row: int64 `[n]`, number of the row in the data set (canonical, by shard and block).
        ids: per `id`/`ids` feature, lists of table rows; a null is an empty list.
        dense: per `dense` feature, float32 `[n, width]`; a null is NaN.
        texts: per `text`/`texts` feature, lists of positions in `text_keys`; null is empty.
        text_keys: int64 `[t]`, distinct content hashes, sorted.
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
    def concat(cls, parts: Sequence[Rows]) -> Rows:
        """All rows of `parts` in order; equal texts become one."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        all_keys = np.concatenate([p.text_keys for p in parts])
        keys, firsts, inverse = np.unique(all_keys, return_index=True, return_inverse=True)
        starts = np.cumsum([0] + [len(p.text_keys) for p in parts])
        texts = {
            name: Ragged.concat(
                [Ragged(inverse[starts[i] + p.texts[name].values], p.texts[name].offsets) for i, p in enumerate(parts)]
            )
            for name in first.texts
        }
        tokens = None
        if first.tokens is not None:
            tokens = Ragged.concat([p.tokens for p in parts]).take(firsts)
        return cls(
            domain=np.concatenate([p.domain for p in parts]),
            row=np.concatenate([p.row for p in parts]),
            ids={n: Ragged.concat([p.ids[n] for p in parts]) for n in first.ids},
            dense={n: np.concatenate([p.dense[n] for p in parts]) for n in first.dense},
            texts=texts,
            text_keys=keys,
            tokens=tokens,
            labels={n: np.concatenate([p.labels[n] for p in parts]) for n in first.labels},
            keys={n: np.concatenate([p.keys[n] for p in parts]) for n in first.keys},
        )

    def slice(self, start: int, stop: int) -> Rows:
        """Rows start .. stop; columns are views and the text table is shared."""
        return Rows(
            domain=self.domain[start:stop],
            row=self.row[start:stop],
            ids={n: c.slice(start, stop) for n, c in self.ids.items()},
            dense={n: c[start:stop] for n, c in self.dense.items()},
            texts={n: c.slice(start, stop) for n, c in self.texts.items()},
            text_keys=self.text_keys,
            tokens=self.tokens,
            labels={n: c[start:stop] for n, c in self.labels.items()},
            keys={n: c[start:stop] for n, c in self.keys.items()},
        )

    def take(self, rows: np.ndarray) -> Rows:
        """Rows `rows` (int64 `[m]`) in that order; the text table is shared."""
        return Rows(
            domain=self.domain[rows],
            row=self.row[rows],
            ids={n: c.take(rows) for n, c in self.ids.items()},
            dense={n: c[rows] for n, c in self.dense.items()},
            texts={n: c.take(rows) for n, c in self.texts.items()},
            text_keys=self.text_keys,
            tokens=self.tokens,
            labels={n: c[rows] for n, c in self.labels.items()},
            keys={n: c[rows] for n, c in self.keys.items()},
        )

    def compact(self) -> Rows:
        """The same rows with a text table that holds only the texts they use."""
        if not self.texts:
            return self
        used = np.zeros(len(self.text_keys), bool)
        for uses in self.texts.values():
            used[uses.values] = True
        kept = np.flatnonzero(used)
        renumber = np.cumsum(used) - 1
        return dataclasses.replace(
            self,
            texts={n: Ragged(renumber[uses.values], uses.offsets) for n, uses in self.texts.items()},
            text_keys=self.text_keys[kept],
            tokens=self.tokens.take(kept) if self.tokens is not None else None,
        )
