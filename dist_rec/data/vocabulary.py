"""From the ids that blocks hold to the rows, or mixed ids, that embedding tables are asked for.

A table has the rows of its schema's vocabulary unless `tables.overrides` gives it another:

    size N     the id is the row; N or more is an error        raw vocabularies only: others are checked when read
    hash N     row mix(id) modulo N                             several ids may share a row
    managed N  mix(id); managed collision finds it a row        a table cuts ids into one range a rank

`mix` is a bijection of 0 .. RAW_IDS - 1, after which ids that were counted up, or that carry meaning in some of their
bits, lie evenly over the whole range.

A dictionary that extends earlier ones (`Vocabulary.inherited`), and that the config gives none of these, is *divided*:
rows that an earlier one had are a table of their own, NAME, and what was added by and by NAME@1, NAME@2. A batch then
has keys f, f@1, f@2 for every feature f of it. Knows neither ranks nor what tables are made of.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..config.model import VOCABULARY_KEYS, TableConfig
from ..errors import UserError
from ..schema import Schema
from ..scoring.hashes import mix
from .rows import Ragged

# Between a name and the number of a part; no name of a feature has it.
PART = "@"


@dataclass(frozen=True)
class IdMap:
    """What becomes of a feature's ids on their way to its table.

    Attributes:
        kind: which of `tables.overrides`' vocabularies.
        rows: its N.
        table: the table's name.
    """

    kind: Literal["size", "hash", "managed"]
    rows: int
    table: str

    def __call__(self, feature: str, ids: Ragged, row: np.ndarray) -> np.ndarray:
        """Map the values of n rows' lists.

        Args:
            feature: whose they are.
            ids: as stored, 0 <= id < RAW_IDS.
            row: int64 `[n]`, numbers of the rows in the data set.

        Returns:
            int64 `[values]`.

        Raises:
            UserError: an id is beyond a vocabulary of kind `size`.
        """
        if self.kind == "size":
            if len(ids.values) and ids.values.max() >= self.rows:
                at = int(np.flatnonzero(ids.values >= self.rows)[0])
                first = row[np.searchsorted(ids.offsets, at, side="right") - 1]
                raise UserError(
                    f"row {first} of the data set: {feature!r} has id {ids.values[at]}, but tables.overrides."
                    f"{self.table}.size is {self.rows}, for ids below it. Raise it, or give the table hash or managed "
                    "instead, which take any id."
                )
            return ids.values
        mixed = mix(ids.values)
        return mixed % self.rows if self.kind == "hash" else mixed


@dataclass(frozen=True)
class IdParts:
    """How a feature's ids are dealt to the parts of its divided vocabulary.

    Attributes:
        firsts: the first row of every part, ascending from 0.
        unread: parts whose ids all read row 0 of the part, which has no other.
    """

    firsts: tuple[int, ...]
    unread: frozenset[int] = frozenset()

    def __call__(self, ids: Ragged) -> tuple[list[Ragged], np.ndarray]:
        """Deal n rows' lists.

        Returns:
            Of every part the n rows' lists, int64, counted from the part's first row; and int64 `[values]`, where every
            value stands when the parts' values stand one after the other.
        """
        part = np.searchsorted(self.firsts, ids.values, side="right") - 1
        row = np.repeat(np.arange(len(ids)), ids.lengths)
        place, found, before = np.empty(len(part), np.int64), [], 0
        for number, first in enumerate(self.firsts):
            here = part == number
            values = ids.values[here].astype(np.int64) - first
            if number in self.unread:
                values = np.zeros_like(values)
            found.append(Ragged.from_lengths(values, np.bincount(row[here], minlength=len(ids))))
            place[here] = np.arange(before, before + len(values))
            before += len(values)
        return found, place


def part_name(name: str, number: int) -> str:
    """What part `number` of a divided vocabulary, or a feature's key to it, is called."""
    return f"{name}{PART}{number}" if number else name


def undivided(name: str) -> str:
    """The vocabulary, or feature, of which this may be a part's name."""
    return name.partition(PART)[0]


def tables_of(schema: Schema, overrides: Mapping[str, TableConfig]) -> dict[str, range]:
    """Every table by name, and which ids of the schema's vocabulary are its rows, unless the config says otherwise."""
    found = {}
    for name, size in schema.table_sizes().items():
        firsts = _firsts(schema, overrides, name)
        for number, (first, end) in enumerate(zip(firsts, [*firsts[1:], size], strict=True)):
            found[part_name(name, number)] = range(first, end)
    return found


def _firsts(schema: Schema, overrides: Mapping[str, TableConfig], table: str) -> list[int]:
    """The first rows of a vocabulary's parts; a data set that added nothing has none."""
    vocabulary = schema.features[table].vocabulary
    if _override(overrides, table) is not None:
        return [0]
    return sorted({0, *(size for size in vocabulary.inherited if size < vocabulary.size)})


def _override(overrides: Mapping[str, TableConfig], table: str) -> tuple[str, int] | None:
    """Kind and N of a table's vocabulary where the config gives it one."""
    given = {key: getattr(overrides[table], key) for key in VOCABULARY_KEYS} if table in overrides else {}
    return next(((key, rows) for key, rows in given.items() if rows is not None), None)


def _users_of(schema: Schema, features: Sequence[str]) -> dict[str, str]:
    """The table of every id or ids feature among `features`."""
    return {name: schema.table_of(name) for name in features if schema.features[name].kind in ("id", "ids")}


def vocabulary_faults(schema: Schema, overrides: Mapping[str, TableConfig], features: Sequence[str]) -> list[str]:
    """What is wrong with the vocabularies that a config gives to the tables of `features`, one entry a fault."""
    faults, sizes = [], schema.table_sizes()
    for name, given in overrides.items():
        whole = undivided(name)
        wrong = [key for key in ("dim", *VOCABULARY_KEYS) if getattr(given, key) is not None]
        if whole != name and wrong:
            faults.append(
                f"tables.overrides.{name}: {', '.join(wrong)} can be said of {whole} as a whole only: its parts answer "
                "for the same features"
            )
    for table in dict.fromkeys(_users_of(schema, features).values()):
        kind, found = schema.features[table].vocabulary.kind, _override(overrides, table)
        if kind == "raw" and found is None:
            faults.append(
                f"{table}: its vocabulary is raw, any 64-bit id, so the config must say how many rows the table has: "
                f"give tables.overrides.{table} managed: N (every id its own row, cold ones lose theirs), hash: N "
                "(ids share rows) or size: N (ids are known to be below N)"
            )
        elif kind != "raw" and found is not None and found[0] == "size" and found[1] < sizes[table]:
            fault = (
                f"tables.overrides.{table}.size is {found[1]}, but the data's vocabulary has {sizes[table]} ids: raise "
                "it to that at least, or give the table hash or managed instead, which may have fewer rows"
            )
            if inherited := schema.features[table].vocabulary.inherited:
                fault += (
                    f". {inherited[0]} of them were there before the data set was extended: a foundation that is to "
                    "take the others is trained without this key, which gives them a table of their own, or with a "
                    "size that leaves room for them"
                )
            faults.append(fault)
    return faults


def id_maps(
    schema: Schema, overrides: Mapping[str, TableConfig], features: Sequence[str], unread: Collection[str] = ()
) -> dict[str, IdMap | IdParts]:
    """The map of every feature whose stored ids are not the rows of one table already.

    Args:
        schema: the data set's.
        overrides: of the config, without `vocabulary_faults`.
        features: those that the run reads.
        unread: names of parts of divided vocabularies that have one row for all their ids.
    """
    maps: dict[str, IdMap | IdParts] = {}
    for name, table in _users_of(schema, features).items():
        found = _override(overrides, table)
        # Ids of the other vocabularies were checked against their own size when they were read.
        if found is not None and (found[0] != "size" or schema.features[table].vocabulary.kind == "raw"):
            maps[name] = IdMap(found[0], found[1], table)
        elif len(firsts := _firsts(schema, overrides, table)) > 1:
            alone = (n for n in range(len(firsts)) if part_name(table, n) in unread)
            maps[name] = IdParts(tuple(firsts), frozenset(alone))
    return maps
