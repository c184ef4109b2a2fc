"""`TextPool`: the text tables of the windows that a rank reads from, as one table.

A batch takes rows of every stream's window. With their texts in one table it finds its distinct
ones, and their tokens, at once instead of window by window.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from .rows import Ragged, Rows

# Room that a segment gets beyond what it was asked for, so that windows of about one size stay in place.
_ROOM = 1.25
# More uses than this share of the table are marked in it before they are sorted.
_MANY = 0.25
_TOKEN = np.dtype(np.int32)


class TextPool:
    """One table of texts in segments; a segment's entries are numbered from `first[segment]`.

    Args:
        sizes: int `[segments]`; segments of one number are of about one size, and get the same room.

    Attributes:
        first: int64 `[segments]`; changes when segments grow.
        keys: int64 `[size]`, content hashes; they may repeat.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = np.array(sizes)
        self.texts = np.zeros(len(sizes), np.int64)
        self.used = np.zeros(len(sizes), np.int64)  # tokens of those texts
        self.room = np.zeros((len(sizes), 2), np.int64)  # for texts, and for their tokens
        self.with_tokens = False
        self._lay_out()

    def clear(self, segment: int) -> None:
        self.texts[segment] = self.used[segment] = 0

    def append(self, segment: int, part: Rows, share: float) -> int:
        """Add the text table of `part` to a segment.

        Args:
            share: of what the segment will hold, this part included.

        Returns:
            How many texts stood there before.
        """
        before, tokens = int(self.texts[segment]), part.tokens
        self.with_tokens = tokens is not None
        count, size = len(part.text_keys), len(tokens.values) if self.with_tokens else 0
        needed = np.array([before + count, self.used[segment] + size])
        if (needed > self.room[segment]).any():
            self._grow(segment, needed / share)
        at, value = int(self.first[segment]) + before, int(self.first_token[segment] + self.used[segment])
        self.keys[at : at + count] = part.text_keys
        if self.with_tokens:
            self.tokens[value : value + size] = tokens.values
            starts = self.starts[at : at + count + 1]
            np.multiply(tokens.offsets, _TOKEN.itemsize, out=starts)
            starts += value * _TOKEN.itemsize
        self.texts[segment], self.used[segment] = needed
        return before

    def collect(self, uses: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, Ragged | None, np.ndarray]:
        """The distinct texts among entries `uses` (int64 `[u]`), whose keys are `keys` (int64 `[u]`).

        Returns:
            Their keys, int64 `[t]`, sorted; their tokens, if there are tokens; which of them each use
            is, int64 `[u]`.
        """
        numbers: np.ndarray | slice = slice(None)
        if len(uses) > _MANY * len(self.keys):
            # Sorting so many keys would cost more than a pass over the table.
            used = np.zeros(len(self.keys), bool)
            used[uses] = True
            entries = np.flatnonzero(used)
            places = np.empty(len(used), np.int64)
            places[entries] = np.arange(len(entries))
            uses, keys, numbers = entries, self.keys[entries], places[uses]
        distinct, firsts, merged = np.unique(keys, return_index=True, return_inverse=True)
        return distinct, self._take(uses[firsts]) if self.with_tokens else None, merged[numbers]

    def _take(self, entries: np.ndarray) -> Ragged:
        if not len(entries):
            return Ragged(np.zeros(0, _TOKEN), np.zeros(1, np.int64))
        return Ragged.from_runs(self._runs.take(pa.array(entries)), _TOKEN)

    def _grow(self, segment: int, needed: np.ndarray) -> None:
        """Lay everything out anew, with more room for this segment and those like it."""
        keys, starts, tokens = self.keys, self.starts, self.tokens
        places = zip(
            self.first.tolist(), self.first_token.tolist(), self.texts.tolist(), self.used.tolist(), strict=True
        )
        alike = self.sizes == self.sizes[segment]
        self.room[alike] = np.maximum(self.room[alike], np.ceil(needed * _ROOM).astype(np.int64))
        self._lay_out()
        for other, (at, value, count, size) in enumerate(places):
            to, to_value = int(self.first[other]), int(self.first_token[other])
            self.keys[to : to + count] = keys[at : at + count]
            self.starts[to : to + count + 1] = starts[at : at + count + 1] + (to_value - value) * _TOKEN.itemsize
            self.tokens[to_value : to_value + size] = tokens[value : value + size]

    def _lay_out(self) -> None:
        # One more in each segment, for the end of its last text.
        edges = np.cumsum(self.room + [1, 0], axis=0)
        self.first, self.first_token = (edges - self.room - [1, 0]).T
        size, tokens = edges[-1]
        self.keys, self.starts = np.zeros(size, np.int64), np.zeros(size + 1, np.int64)
        self.tokens = np.zeros(tokens, _TOKEN)
        buffers = [None, pa.py_buffer(self.starts), pa.py_buffer(self.tokens)]
        self._runs = pa.LargeBinaryArray.from_buffers(pa.large_binary(), int(size), buffers)
