"""The catalogue of a sequence model: every item once, with its id, its text and its domain.

It is a data set like any other, one row an item, of which only the item's id and text are read. Held in memory are some
numbers of each item, and their texts' tokens where a language model reads them. An item without a text is as good as
one whose vector is zero: it stays, and is counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .reader import ShardReader
from .rows import Ragged, Rows


@dataclass(frozen=True)
class Catalogue:
    """M items, in the data set's order.

    Attributes:
        ids: int64 `[M]`, as in the data, all different.
        row: int64 `[M]`, their rows.
        domain: int64 `[M]`, positions in the schema's list.
        text_keys: int64 `[M]`, 0 where an item has none; None where texts are not read.
        has_text: bool `[M]`.
        tokens: their texts' tokens, where they were asked for.
    """

    ids: np.ndarray
    row: np.ndarray
    domain: np.ndarray
    text_keys: np.ndarray | None
    has_text: np.ndarray
    tokens: Ragged | None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def without_text(self) -> int:
        """Items that have none."""
        return int((~self.has_text).sum())


def read_catalogue(reader: ShardReader, item: str, text: str | None) -> Catalogue:
    """Read the whole of it, block by block.

    Args:
        reader: of the data set, decoding `item` and, if given, `text`, with their tokens if those are wanted.
        item: the feature that is the item's id.
        text: the feature that is its text; None does not read texts.

    Raises:
        UserError: a row has no id, or one that another has; a block cannot be read.
    """
    parts = [_read(reader, number, item, text) for number in range(len(reader.places))]
    ids = np.concatenate([part.ids for part in parts])
    found = Catalogue(
        ids=ids,
        row=np.concatenate([part.row for part in parts]),
        domain=np.concatenate([part.domain for part in parts]),
        text_keys=np.concatenate([part.text_keys for part in parts]) if text else None,
        has_text=np.concatenate([part.has_text for part in parts]),
        tokens=Ragged.concat([part.tokens for part in parts]) if text and reader.with_tokens else None,
    )
    distinct, first, counts = np.unique(ids, return_index=True, return_counts=True)
    if (counts > 1).any():
        twice = distinct[counts > 1][0]
        rows = found.row[ids == twice]
        schema, why = reader.index.schema, ""
        if schema.features[schema.table_of(item)].vocabulary.kind == "hash":
            why = " Its vocabulary is hashed, so these may be different items of one id: give it more rows."
        raise UserError(
            f"the catalogue {reader.root} has item {twice} of {item!r} in rows {rows[0]} and {rows[1]}; "
            f"{int((counts > 1).sum()):,} items are there more than once: a catalogue has one row an item.{why}"
        )
    return found


def _read(reader: ShardReader, number: int, item: str, text: str | None) -> Catalogue:
    """The items of a block."""
    rows = reader.rows(number)
    ids = rows.ids[item]
    _check_ids(reader, rows, item, number)
    has_text, keys, tokens = np.zeros(len(rows), bool), None, None
    if text:
        has_text = rows.texts[text].lengths > 0
        keys = np.zeros(len(rows), np.int64)
        keys[has_text] = rows.text_keys[rows.texts[text].values]
        if reader.with_tokens:
            taken = rows.tokens.take(rows.texts[text].values)
            lengths = np.zeros(len(rows), np.int64)
            lengths[has_text] = taken.lengths
            tokens = Ragged.from_lengths(taken.values, lengths)
    return Catalogue(ids.values.astype(np.int64), rows.row, rows.domain, keys, has_text, tokens)


def _check_ids(reader: ShardReader, rows: Rows, item: str, number: int) -> None:
    ids, schema = rows.ids[item], reader.index.schema
    without = np.flatnonzero(ids.lengths == 0)
    what = "is null"
    if not len(without) and schema.features[schema.table_of(item)].vocabulary.kind == "dictionary":
        without, what = np.flatnonzero(ids.values == 0), "is an id that the dictionary does not know"
    if len(without):
        raise UserError(
            f"the catalogue, {reader.where(number)}, row {without[0]}: {item!r} {what}: give every row of a "
            "catalogue its item's id, and build it together with the data it is of."
        )


def count_targets(blocks: Iterable[Rows], history: str, item: str, catalogue: Catalogue) -> np.ndarray:
    """How often each item of the catalogue is what rows of training ask for: int64 `[M]`.

    A row asks for each of its events but the oldest, so an event that ends one window of a long sequence and begins the
    next counts once.

    Args:
        blocks: rows with these features decoded.
        history, item: the ids of the events before, and of the newest; features of the catalogue's vocabulary.
    """
    order = np.argsort(catalogue.ids)
    known, counts = catalogue.ids[order], np.zeros(len(catalogue), np.int64)
    for rows in blocks:
        before, newest = rows.ids[history], rows.ids[item]
        asked = np.ones(len(before.values), bool)
        some = before.lengths > 0
        asked[before.offsets[:-1][some]] = False
        for values in (before.values[asked], newest.values[np.repeat(some, newest.lengths)]):
            at = np.minimum(np.searchsorted(known, values), len(known) - 1)
            counts += np.bincount(order[at[known[at] == values]], minlength=len(counts))
    return counts


def contents(catalogue: Catalogue, domains: Sequence[str]) -> str:
    """SHA-256 of the items by domain and text, however they are numbered and in whatever order they stand.

    Args:
        domains: names; a catalogue's `domain` is a position in this list.
    """
    keys = np.where(catalogue.has_text, catalogue.text_keys, 0)
    order = np.lexsort([keys, names := np.array(domains)[catalogue.domain]])
    return hashlib.sha256("\n".join(names[order]).encode() + keys[order].tobytes()).hexdigest()
