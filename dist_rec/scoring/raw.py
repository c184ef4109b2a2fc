"""Raw rows, as the raw tables have them, to the numbers that the builder of a data set writes for them.

A raw row is a dict: raw column -> value. A history that the builder collects from events is in no raw table: a row has
its list under the feature's own name, oldest first, None where an event lacks the value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import numpy as np

from .hashes import RAW_IDS, md5_number, text_key


class RowError(ValueError):
    """A raw row is not what the schema says of rows; says which, where, and what would be."""


@dataclass
class Lists:
    """n lists, one after the other: list i has `lengths[i]` of the `values`."""

    values: np.ndarray
    lengths: np.ndarray

    def take(self, chosen: np.ndarray) -> Lists:
        """Lists `chosen`, int64 `[m]`, in that order."""
        ends = self.lengths.cumsum()
        parts = [self.values[end - n : end] for end, n in zip(ends[chosen], self.lengths[chosen], strict=True)]
        return Lists(np.concatenate([self.values[:0], *parts]), self.lengths[chosen])


@dataclass
class Columns:
    """n rows as numbers.

    Attributes:
        domain: int64 `[n]`, position among the schema's domains.
        ids: per `id` and `ids` feature, ids of its vocabulary, int64.
        dense: per `dense` feature, float32 `[n, width]`, NaN where null.
        texts: per `text` and `texts` feature, positions in `text_keys`, int64.
        text_keys: int64 `[T]`, `hashes.text_key` of the distinct texts, ascending.
        said: the texts by key; may lack those that `tokens` has.
        tokens: token ids of the texts; None has them made of what is `said`.
    """

    domain: np.ndarray
    ids: dict[str, Lists] = field(default_factory=dict)
    dense: dict[str, np.ndarray] = field(default_factory=dict)
    texts: dict[str, Lists] = field(default_factory=dict)
    text_keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    said: dict[int, str] = field(default_factory=dict)
    tokens: Lists | None = None

    def __len__(self) -> int:
        return len(self.domain)


class Vocabulary:
    """Ids of a table's values.

    Args:
        kind: `dictionary`, `hash`, `integer` or `raw`, as the schema has it.
        size: of all but raw ones.
        keys: of a dictionary: `text_key` of its values, int64 `[V]`, ascending.
        ids: int64 `[V]`, of each.
    """

    def __init__(self, kind: str, size: int, keys: np.ndarray | None = None, ids: np.ndarray | None = None) -> None:
        self.kind, self.size, self.keys, self.ids = kind, size, keys, ids

    def __call__(self, value: str) -> int:
        """The id of a value; of a dictionary 0 where it does not know it.

        Raises:
            RowError: the value is outside an integer vocabulary.
        """
        if self.kind == "dictionary":
            key = text_key(value)
            at = int(np.searchsorted(self.keys, key))
            return int(self.ids[at]) if at < len(self.keys) and self.keys[at] == key else 0
        if self.kind == "hash":
            return md5_number(value) % self.size
        number = _whole(value)
        if self.kind == "raw":
            # "007" is not 7.
            itself = number is not None and 0 <= number < RAW_IDS and str(number) == value
            return number if itself else md5_number(value) % RAW_IDS
        if number is None or not 0 <= number < self.size:
            raise RowError(f"is {value!r}, but its integer vocabulary holds 0 .. {self.size - 1}")
        return number

    @property
    def nothing(self) -> int:
        """What an event of a history has that has no value."""
        return md5_number("") % RAW_IDS if self.kind == "raw" else 0


class RawRows:
    """Reads raw rows.

    Args:
        schema: as an index.json has it.
        prefixes: by role, what stands before its texts.
        vocabularies: by table.
    """

    def __init__(
        self, schema: Mapping[str, Any], prefixes: Mapping[str, str], vocabularies: Mapping[str, Vocabulary]
    ) -> None:
        self.features, self.domains = schema["features"], schema["domains"]
        self.prefixes, self.vocabularies = prefixes, vocabularies
        others = [self.domains["column"], *(key for key in schema["keys"].values() if key is not None)]
        others += [label["column"] or name for name, label in schema["labels"].items()]
        self.known = {*map(self.column, self.features), *others}

    def column(self, feature: str) -> str:
        """The key of raw rows that a feature is read from."""
        about = self.features[feature]
        return feature if about["events"] is not None else about["column"] or feature

    def __call__(self, rows: Sequence[Mapping[str, Any]], features: Collection[str]) -> Columns:
        """Read `features` of n rows; labels, keys and other features may be there and are not looked at.

        Raises:
            RowError: a column is missing or unknown, or a value is not what its feature needs.
        """
        needed = {self.column(name): name for name in features}
        for number, row in enumerate(rows):
            if missing := [column for column in needed if column not in row]:
                raise RowError(
                    f"row {number} lacks {', '.join(map(repr, missing))}: give None where a value is not known"
                )
            if unknown := [column for column in row if column not in self.known]:
                close = get_close_matches(str(unknown[0]), sorted(self.known), 1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise RowError(f"row {number} has {unknown[0]!r}, which the schema does not know.{hint}")
        found = Columns(np.array([self._domain(number, row) for number, row in enumerate(rows)], np.int64))
        texts: dict[str, list[list[str]]] = {}
        for name in features:
            column, kind = self.column(name), self.features[name]["kind"]
            values = []
            for number, row in enumerate(rows):
                try:
                    values.append(self._read(name, row[column]))
                except RowError as error:
                    raise RowError(f"row {number}: {column!r} {error}") from None
            if kind in ("id", "ids"):
                found.ids[name] = _lists(values)
            elif kind == "dense":
                found.dense[name] = np.array(values, np.float32).reshape(len(rows), self.features[name]["width"])
            else:
                texts[name] = values
        self._number(found, texts)
        return found

    def _domain(self, number: int, row: Mapping[str, Any]) -> int:
        column, names = self.domains["column"], self.domains["names"]
        if column not in row and len(names) == 1:
            return 0
        if row.get(column) not in names:
            raise RowError(f"row {number}: {column!r} is {row.get(column)!r}: it must be one of {', '.join(names)}")
        return names.index(row[column])

    def _read(self, name: str, value: Any) -> list:
        """A feature's ids, floats or texts in a row."""
        about = self.features[name]
        if about["kind"] == "dense":
            return _vector(value, about["width"], about["separator"])
        if about["kind"] in ("id", "text"):
            values = [one for one in [_string(value)] if one is not None]
        else:
            values = _list(value, about["separator"])
            if about["role"] != "history":
                values = [one for one in values if one is not None]
            values = values[-about["max_length"] :]
        if about["kind"] in ("id", "ids"):
            vocabulary = self.vocabularies[about["shares"] or name]
            return [vocabulary.nothing if one is None else vocabulary(one) for one in values]
        # What a history's texts tell of is items, or what it collects.
        of = self.features[about["events"]["of"]]["role"] if about["events"] is not None else about["role"]
        prefix = self.prefixes.get("item" if of == "history" else of, "")
        return ["" if one is None else prefix + one for one in values]

    @staticmethod
    def _number(found: Columns, texts: Mapping[str, list[list[str]]]) -> None:
        keys = {text: text_key(text) for lists in texts.values() for row in lists for text in row}
        found.said = {key: text for text, key in keys.items()}
        found.text_keys = np.array(sorted(found.said), np.int64)
        for name, lists in texts.items():
            used = _lists([[keys[text] for text in row] for row in lists])
            found.texts[name] = Lists(np.searchsorted(found.text_keys, used.values), used.lengths)


def _lists(values: list[list[int]]) -> Lists:
    flat = [one for row in values for one in row]
    return Lists(np.array(flat, np.int64), np.array([len(row) for row in values], np.int64))


def _whole(value: str) -> int | None:
    try:
        return int(value)
    except ValueError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating | np.bool_)


def _string(value: Any) -> str | None:
    """A value as a string, as the builder casts it: an empty one is null, and 7.0 is the id "7"."""
    if value is None or isinstance(value, str):
        return value or None
    if not _is_number(value):
        raise RowError(f"is {value!r}: a string or a number was expected, or None")
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, float | np.floating):
        if math.isnan(value):
            return None
        # Beyond that not every whole number is a float.
        return str(int(value)) if abs(value) < 2**53 and value == math.floor(value) else str(value)
    return str(int(value))


def _list(value: Any, separator: str | None) -> list[str | None]:
    if value is None or (isinstance(value, str) and not value):
        return []
    if isinstance(value, str) and separator is not None:
        return [piece for piece in map(str.strip, value.split(separator)) if piece]
    if isinstance(value, str):
        try:
            value = json.loads(value, parse_float=str, parse_int=str)
        except ValueError:
            value = None
    if not isinstance(value, list | tuple | np.ndarray):
        raise RowError("is no list: give a list, a JSON list, or None")
    return [_string(one) for one in value]


def _vector(value: Any, width: int, separator: str | None) -> list[float]:
    if isinstance(value, str):
        value = _numbers(value.strip(), separator)
    if value is None or (_is_number(value) and math.isnan(value)):
        return [math.nan] * width
    found = [value] if _is_number(value) else value
    if not isinstance(found, list | tuple | np.ndarray) or not all(one is None or _is_number(one) for one in found):
        raise RowError(f"is {value!r}: a number, a list of numbers or None was expected")
    if len(found) != width:
        raise RowError(f"has {len(found)} values, its width is {width}")
    return [math.nan if one is None else float(one) for one in found]


def _numbers(text: str, separator: str | None) -> Any:
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    try:
        if separator is not None:
            return [float(piece) for piece in text.split(separator) if piece.strip()]
        return json.loads(text)
    except ValueError:
        raise RowError(f"is {text!r}, which is neither a number nor a list of numbers") from None
