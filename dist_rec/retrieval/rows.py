"""Rows of a data set by number, one side of them, and pairs of two sides: what retrieval makes batches of.

Knows data, not models.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from ..data.batch import Batch, make_batch
from ..data.candidates import CANDIDATES, CANDIDATES_TEXT, Share
from ..data.index import Index
from ..data.reader import ShardReader
from ..data.rows import Ragged, Rows
from ..data.vocabulary import id_maps
from ..text.onthefly import FrozenVectors
from ..training.prepared import Prepared
from ..training.reading import retry_of


@dataclass(frozen=True)
class DataSet:
    """A data set of the run's schema, on every rank the same."""

    root: str
    index: Index

    def reader(self, prepared: Prepared, features: list[str]) -> ShardReader:
        retry = retry_of(prepared.config.data)
        return ShardReader(self.root, self.index, features, prepared.reads_tokens, keep=2, retry=retry)


class RowSource:
    """Decoded rows of a data set by their numbers.

    Args:
        reader: decoding what is asked for of them.
        text: a feature of kind text whose texts themselves are wanted; None wants none.
    """

    def __init__(self, reader: ShardReader, text: str | None = None) -> None:
        self.reader, self.text = reader, text
        self._texts: tuple[int, pa.RecordBatch] | None = None

    def take(self, numbers: np.ndarray) -> tuple[Rows, list[str | None]]:
        """Rows int64 `[n]` in that order, and their texts; None where there is none.

        Raises:
            UserError: a block cannot be read.
        """
        if not len(numbers):
            # Any block has the columns.
            return self.reader.rows(0).slice(0, 0), []
        firsts = self.reader.first_rows
        ordered, back = np.unique(numbers, return_inverse=True)
        blocks = np.searchsorted(firsts, ordered, side="right") - 1
        parts, texts = [], []
        for of_block in np.split(ordered, np.flatnonzero(np.diff(blocks)) + 1):
            block = int(np.searchsorted(firsts, of_block[0], side="right")) - 1
            within = of_block - int(firsts[block])
            parts.append(self.reader.rows(block).take(within))
            texts += self._text(block, within)
        return Rows.concat(parts).take(back), [texts[at] for at in back.tolist()]

    def _text(self, block: int, within: np.ndarray) -> list[str | None]:
        if self.text is None:
            return [None] * len(within)
        if self._texts is None or self._texts[0] != block:
            self._texts = block, self.reader.batch(block)
        column = self._texts[1].column(self.text)
        return column.dictionary.field("text").take(column.indices.take(pa.array(within))).to_pylist()


def of_run(rows: Rows, features: Collection[str]) -> Rows:
    """The same rows without the columns of other features."""
    ids, texts, dense = ({n: x for n, x in x.items() if n in features} for x in (rows.ids, rows.texts, rows.dense))
    return replace(rows, ids=ids, texts=texts, dense=dense)


def only(rows: Rows, features: Collection[str]) -> Rows:
    """The same rows of which nothing but `features` is known: what others have is null."""

    def nothing(lists: Ragged) -> Ragged:
        return Ragged(lists.values[:0], np.zeros(len(lists) + 1, np.int64))

    return with_distinct_texts(
        replace(
            rows,
            ids={name: ids if name in features else nothing(ids) for name, ids in rows.ids.items()},
            texts={name: used if name in features else nothing(used) for name, used in rows.texts.items()},
            dense={n: x if n in features else np.full_like(x, np.nan) for n, x in rows.dense.items()},
        )
    )


def pairs(users: Rows, items: Rows, of_items: Collection[str]) -> Rows:
    """Row j has the features `of_items` of `items`' row j, and all else of `users`'; nobody knows its labels."""
    shift = len(users.text_keys)
    moved = {name: Ragged(used.values.astype(np.int64) + shift, used.offsets) for name, used in items.texts.items()}

    def each(of_users: dict, others: dict) -> dict:
        return {name: others[name] if name in of_items else value for name, value in of_users.items()}

    return with_distinct_texts(
        replace(
            users,
            ids=each(users.ids, items.ids),
            dense=each(users.dense, items.dense),
            texts=each(users.texts, moved),
            text_keys=np.concatenate([users.text_keys, items.text_keys]),
            tokens=None if users.tokens is None else Ragged.concat([users.tokens, items.tokens]),
            labels={name: np.full(len(users), np.nan, np.float32) for name in users.labels},
        )
    )


def with_distinct_texts(rows: Rows) -> Rows:
    """The same rows with every text that they use once, sorted by key, as a batch wants them."""
    uses = np.concatenate([np.zeros(0, np.int64), *(used.values for used in rows.texts.values())])
    keys, first, number = np.unique(rows.text_keys[uses], return_index=True, return_inverse=True)
    texts, at = {}, 0
    for name, used in rows.texts.items():
        texts[name] = Ragged(number[at : at + len(used.values)], used.offsets)
        at += len(used.values)
    tokens = None if rows.tokens is None else rows.tokens.take(uses[first])
    return replace(rows, texts=texts, text_keys=keys, tokens=tokens)


class Batches:
    """Makes of rows the batches that a run's model reads.

    Args:
        prepared: the run.
        data: the root of the rows' data set, for messages.
    """

    def __init__(self, prepared: Prepared, data: str) -> None:
        config, kind, (self.schema, features) = prepared.config, prepared.kind, prepared.given
        looked_up = kind.looked_up(self.schema, config, features)
        self.look_up = bool(looked_up)
        self.id_maps = id_maps(self.schema, config.tables.overrides, looked_up)
        self.identify = kind.identified(self.schema, config, features)
        self.vectors = None
        if prepared.store is not None:
            self.vectors = FrozenVectors(prepared.store, data, prepared.missing and prepared.missing.load())
        self.candidates = CANDIDATES in features
        self.candidates_text = CANDIDATES_TEXT in features

    def __call__(self, rows: Rows, size: int, item: str | None = None, text: str | None = None) -> Batch:
        """Rows, at most `size`, as a batch of `size`.

        Args:
            rows: with distinct texts.
            size: B.
            item: id of the rows' items, which a model that ranks candidates is given as those; None gives it none.
            text: their text, if the model reads it.
        """
        candidates = self._share(rows, item, text) if self.candidates else None
        given = (self.schema, size, self.vectors, self.id_maps, self.identify, self.look_up, candidates)
        return make_batch(rows, *given)

    def _share(self, rows: Rows, item: str | None, text: str | None) -> Share:
        some = rows.take(np.zeros(0, np.int64))
        if item is not None:
            _, first = np.unique(rows.ids[item].first(-1), return_index=True)
            some = rows.take(np.sort(first))
            some = some.take(np.flatnonzero(some.ids[item].lengths))
        texts = (
            some.texts[text] if text is not None else Ragged(np.zeros(0, np.int64), np.zeros(len(some) + 1, np.int64))
        )
        has_text = texts.lengths > 0
        keys = np.zeros(len(some), np.int64)
        keys[has_text] = rows.text_keys[texts.values]
        tokens = None
        if rows.tokens is not None:
            taken, lengths = rows.tokens.take(texts.values), np.zeros(len(some), np.int64)
            lengths[has_text] = taken.lengths
            tokens = Ragged.from_lengths(taken.values, lengths)
        return Share(
            ids=(some.ids[item].values if item is not None else np.zeros(0)).astype(np.int64),
            row=some.row,
            weight=np.ones(len(some), np.float32),
            text_keys=keys if self.candidates_text else None,
            has_text=has_text,
            tokens=tokens,
        )
