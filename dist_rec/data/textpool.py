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
# Fewer uses than this share of the table are looked up one by one, without a pass over the table.
_FEW = 0.25
_TOKEN = np.dtype(np.int32)


class TextPool:
    """One table of texts in segments, one a stream; a segment's entries are numbered from `first[segment]`.

    Args:
        segments: how many.

    Attributes:
        first: int64 `[segments]`; changes when a segment grows.
        keys: int64 `[size]`, content hashes; they may repeat.
    """

    def __init__(self, segments: int) -> None:
        self.texts = np.zeros(segments, np.int64)
        self.room = np.zeros((segments, 2), np.int64)  # of texts, and of their tokens
        self.with_tokens = False
        self._lay_out()

    def put(self, segment: int, parts: Sequence[Rows]) -> None:
        """Fill a segment with the text tables of `parts`, one after another, in place of what it held."""
        keys = np.concatenate([p.text_keys for p in parts])
        self.with_tokens = parts[0].tokens is not None
        tokens = [p.tokens for p in parts] if self.with_tokens else []
        needed = np.array([len(keys), sum(len(t.values) for t in tokens)])
        self.texts[segment] = 0
        if (needed > self.room[segment]).any():
            self._grow(segment, needed)
        at, value = int(self.first[segment]), int(self.first_token[segment])
        self.texts[segment] = len(keys)
        self.keys[at : at + len(keys)] = keys
        for part in tokens:
            self.tokens[value : value + len(part.values)] = part.values
            ends = self.starts[at + 1 : at + 1 + len(part)]
            np.multiply(part.offsets[1:], _TOKEN.itemsize, out=ends)
            ends += value * _TOKEN.itemsize
            if part is tokens[0]:
                self.starts[at] = value * _TOKEN.itemsize
            at, value = at + len(part), value + len(part.values)

    def collect(self, uses: np.ndarray) -> tuple[np.ndarray, Ragged | None, np.ndarray]:
        """The distinct texts among entries `uses` (int64 `[u]`).

        Returns:
            Their keys, int64 `[t]`, sorted; their tokens, if there are tokens; which of them each use
            is, int64 `[u]`.
        """
        entries, numbers = _entries(uses, len(self.keys))
        keys, firsts, merged = np.unique(self.keys[entries], return_index=True, return_inverse=True)
        return keys, self._take(entries[firsts]) if self.with_tokens else None, merged[numbers]

    def _take(self, entries: np.ndarray) -> Ragged:
        if not len(entries):
            return Ragged(np.zeros(0, _TOKEN), np.zeros(1, np.int64))
        return Ragged.from_runs(self._runs.take(pa.array(entries)), _TOKEN)

    def _grow(self, segment: int, needed: np.ndarray) -> None:
        """Lay everything out anew, with more room for a segment that holds nothing worth keeping."""
        old = self.keys, self.starts, self.tokens, self.first.tolist(), self.first_token.tolist()
        self.room[segment] = np.maximum(self.room[segment], np.ceil(needed * _ROOM))
        self._lay_out()
        for other, (texts, at, value) in enumerate(zip(self.texts.tolist(), *old[3:], strict=True)):
            if texts:
                to, to_value = int(self.first[other]), int(self.first_token[other])
                self.keys[to : to + texts] = old[0][at : at + texts]
                bytes_moved = (to_value - value) * _TOKEN.itemsize
                self.starts[to : to + texts + 1] = old[1][at : at + texts + 1] + bytes_moved
                held = int(old[1][at + texts]) // _TOKEN.itemsize - value
                self.tokens[to_value : to_value + held] = old[2][value : value + held]

    def _lay_out(self) -> None:
        # One more in each segment, for the end of its last text.
        edges = np.cumsum(self.room + [1, 0], axis=0)
        self.first, self.first_token = (edges - self.room - [1, 0]).T
        size, tokens = edges[-1]
        self.keys, self.starts = np.zeros(size, np.int64), np.zeros(size + 1, np.int64)
        self.tokens = np.zeros(tokens, _TOKEN)
        buffers = [None, pa.py_buffer(self.starts), pa.py_buffer(self.tokens)]
        self._runs = pa.LargeBinaryArray.from_buffers(pa.large_binary(), int(size), buffers)


def _entries(uses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray | slice]:
    """Entries of a table of `size` that `uses` name, int64 `[e]`, and which of them each use means."""
    if len(uses) < _FEW * size:
        return uses, slice(None)
    used = np.zeros(size, bool)
    used[uses] = True
    entries = np.flatnonzero(used)
    numbers = np.empty(size, np.int64)
    numbers[entries] = np.arange(len(entries))
    return entries, numbers[uses]
