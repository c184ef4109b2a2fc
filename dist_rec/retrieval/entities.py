"""Whom an export is of: of any data set every item once, and every user (or query) once, by its last row.

The last row of a key is that of the latest time, where the data has times; of equal ones, or without times, that of the
highest number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..data.candidates import share_of
from ..data.reader import ShardReader
from ..data.rows import Rows
from ..errors import UserError
from ..models.towers import TwoTowers
from ..schema import Schema
from ..training.exchange import Exchange
from ..training.kinds import item_of


@dataclass(frozen=True)
class Entities:
    """The rows that stand for n items or users of a data set.

    Attributes:
        row: int64 `[n]`, ascending.
        key: int64 `[n]`, of each.
        rows: of the data set.
        nameless: rows that are of nobody.
    """

    row: np.ndarray
    key: np.ndarray
    rows: int
    nameless: int

    def __len__(self) -> int:
        return len(self.row)


def item_feature(schema: Schema, features: list[str], towers: TwoTowers) -> str:
    """The feature by which items are told apart: the item's id, or the one id that the item side reads.

    Raises:
        UserError: there is none.
    """
    found = item_of(schema, list(schema.features))
    read = [name for name in towers.item_features if schema.features[name].kind == "id"]
    if found in features or not read and found is not None:
        return found
    if len(read) != 1:
        raise UserError(
            f"the item side of this model reads {len(read)} ids ({', '.join(read) or 'none'}) and the data has no item "
            "id of aspect id: an export needs one feature to tell items apart."
        )
    return read[0]


def item_keys(schema: Schema, item: str) -> Callable[[Rows], np.ndarray]:
    """Of rows the ids of their items, int64 `[n]`, -1 where there is none, or one that the dictionary does not know."""
    unknown = 0 if schema.features[schema.table_of(item)].vocabulary.kind == "dictionary" else -1

    def keys(rows: Rows) -> np.ndarray:
        found = rows.ids[item].first(-1).astype(np.int64)
        return np.where(found == unknown, -1, found)

    return keys


def user_key(schema: Schema, towers: TwoTowers) -> str:
    """What the user side is a vector of: `query`, where it reads nothing else and queries have keys, or `user`.

    Raises:
        UserError: the data has no such key.
    """
    of_queries = all(schema.features[name].role == "query" for name in towers.user_features)
    if of_queries and schema.keys.query is not None:
        return "query"
    if schema.keys.user is None:
        raise UserError(
            f"schema {schema.name!r} has no keys.{'query' if of_queries else 'user'}, so the rows of one cannot be "
            "told from those of another: name its raw column in the schema and build the data set again, or export "
            "items alone (--users none)."
        )
    return "user"


def last_rows(reader: ShardReader, keys: Callable[[Rows], np.ndarray], exchange: Exchange) -> Entities:
    """The last row of every key, the same on all ranks, each of which reads a part of the blocks. Collective.

    Args:
        reader: decoding what `keys` reads.
        keys: of rows, int64 `[n]`, -1 where a row is of nobody.
    """
    mine = share_of(len(reader.places), exchange.rank, exchange.world_size)
    parts, nameless = [np.zeros((3, 0), np.int64)], 0
    for number in range(mine.start, mine.stop):
        rows = reader.rows(number)
        key = keys(rows)
        there = key >= 0
        nameless += int((~there).sum())
        time = rows.keys.get("time", np.zeros(len(rows), np.int64))
        parts.append(_last(np.stack([key, time, rows.row])[:, there]))
    found = _last(np.concatenate(parts, axis=1))
    most = int(exchange.gather(np.array([found.shape[1]])).max())
    padded = np.full((3, most), -1, np.int64)
    padded[:, : found.shape[1]] = found
    everyone = np.concatenate(list(exchange.gather(padded)), axis=1)
    key, _, row = _last(everyone[:, everyone[0] >= 0])
    order = np.argsort(row)
    return Entities(row[order], key[order], reader.index.rows, int(exchange.sum(np.array([nameless]))[0]))


def _last(found: np.ndarray) -> np.ndarray:
    """Of key, time and row, int64 `[3, n]`, the last of every key."""
    key, time, row = found
    order = np.lexsort((row, time, key))
    ends = np.append(np.diff(key[order]) != 0, True)[: len(order)]
    return found[:, order[ends]]
