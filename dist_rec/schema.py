"""What a row is: its features (role, kind, vocabulary), labels, domains and keys.

A schema is written by hand as YAML for `dist-rec shards build` and travels, resolved, inside
every `index.json`. It knows nothing of files, tensors or models.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import field
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from .errors import UserError, nearest
from .scoring.hashes import RAW_IDS
from .strict import from_dict, read_yaml, strict

Role = Literal["user", "history", "query", "item"]
Kind = Literal["id", "ids", "dense", "text", "texts"]


@strict
class Vocabulary:
    """How raw values become rows of an embedding table.

    * `dictionary`: distinct values are numbered in order of first appearance, from 1; row 0 is
      kept for values that the dictionary does not know. `size` is filled in by the builder.
    * `hash`: a stable 64-bit hash modulo `size`.
    * `integer`: the value is the row, 0 <= value < `size`; anything else is an error.
    * `raw`: the value is a 64-bit id and no row: a config's `tables.overrides` says how ids find rows, so values that
      did not exist yesterday need nothing new. Whole numbers 0 .. `RAW_IDS` - 1 are themselves, any other value its
      stable hash to that range. It has no size.

    `inherited` is filled in by the builder where a data set extends others: the sizes that a dictionary had in them,
    the oldest first. Rows from one size up to the next live in an embedding table of their own.

    `digests` tells dictionaries of one size apart, filled in by the builder: for each of `inherited`, then for `size`,
    128 bits in hex of the values below it and their rows. Empty in data sets that were built before it was there.
    """

    kind: Literal["dictionary", "hash", "integer", "raw"] = "dictionary"
    size: int = Field(default=0, ge=0)
    inherited: list[int] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    @model_validator(mode="after")
    def _size_is_given(self):
        if self.kind in ("hash", "integer") and self.size < 1:
            raise ValueError(f"a vocabulary of kind '{self.kind}' needs size: <number of rows>")
        if self.kind == "raw" and self.size:
            raise ValueError("a vocabulary of kind 'raw' has no size: a config's tables.overrides gives its table rows")
        sizes = [0, *self.inherited, self.size]
        if self.inherited and (
            self.kind != "dictionary" or sorted(set(sizes[:-1])) != sizes[:-1] or sizes[-2] > sizes[-1]
        ):
            raise ValueError(f"inherited must be ascending sizes of a dictionary, none above {self.size}")
        if self.digests and (self.kind != "dictionary" or len(self.digests) != len(self.steps)):
            raise ValueError("digests are a dictionary's, one for each of inherited and one for size")
        return self

    @property
    def steps(self) -> list[int]:
        """The sizes that a dictionary has had, with its own."""
        return [*self.inherited, self.size]


@strict
class Events:
    """A history that the builder collects: the same user's earlier rows, oldest first.

    Point-in-time: only rows whose `keys.time` is strictly before the row's own, from all domains.
    `of` is the feature whose value each event contributes. With `label`, only events count whose
    label is at least half its maximum.
    """

    of: str
    label: str | None = None


@strict
class Feature:
    """One column of a row.

    * `role`: whom it describes. `history` features are aligned lists: one entry an event.
    * `kind`: `id` one categorical value, `ids` a list of them, `dense` `width` floats,
      `text` one string, `texts` a list of strings. Every kind may be null.
    * `column`: the raw column, if it is not called like the feature.
    * `aspect`: for query and item ids: `id` is the entity's identity, `sparse` an attribute.
    * `shares`: the feature whose vocabulary and embedding table this one uses.
    * `events`: for histories that the raw data does not carry as a list column.
    * `max_length`: lists keep their last `max_length` entries (histories are oldest first).
    * `separator`: for list columns that the raw data writes as one string: with `"|"`,
      `Animation|Comedy` is a list of two. Without it such a string must be a JSON list.
    """

    role: Role
    kind: Kind
    column: str | None = None
    aspect: Literal["id", "sparse"] = "sparse"
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    shares: str | None = None
    events: Events | None = None
    max_length: int = Field(default=50, ge=1)
    width: int = Field(default=1, ge=1)
    separator: str | None = Field(default=None, min_length=1)


@strict
class Label:
    """A target; null where the row has none.

    `binary` is 0 or 1. `graded` is 0 .. `maximum`; losses use label / maximum as a soft target.
    """

    kind: Literal["binary", "graded"] = "binary"
    maximum: float = Field(default=1.0, gt=0)
    column: str | None = None

    @model_validator(mode="after")
    def _binary_is_zero_or_one(self):
        if self.kind == "binary" and self.maximum != 1.0:
            raise ValueError("a binary label is 0 or 1: leave maximum out, or use kind: graded")
        return self


@strict
class Keys:
    """Raw columns that metrics and order need, none of which is a feature by itself.

    `user` groups rows for grouped AUC, `query` for NDCG, `time` (seconds since 1970, or a date)
    orders rows and histories.
    """

    user: str | None = None
    query: str | None = None
    time: str | None = None


@strict
class Domains:
    """The raw column that names a row's domain and the names it may take, in their order."""

    column: str = "domain"
    names: list[str] = Field(min_length=1)


@strict
class Schema:
    """The whole row. Feature, label and domain names are unique; order is as written."""

    name: str
    domains: Domains
    features: dict[str, Feature]
    labels: dict[str, Label]
    keys: Keys = field(default_factory=Keys)

    @model_validator(mode="after")
    def _consistent(self):
        faults = []
        if len(set(self.domains.names)) != len(self.domains.names):
            faults.append("domains.names has a name twice")
        if not self.labels:
            faults.append("labels is empty: name at least one")
        for what, names in (("features", self.features), ("labels", self.labels)):
            lowered = Counter(name.lower() for name in names)
            for name in names:
                # Names become names of files and of SQL columns.
                if not re.fullmatch(r"\w[\w.-]*", name):
                    faults.append(f"{what}.{name}: use letters, digits, '_', '-', '.'; begin with no '-' or '.'")
                if lowered[name.lower()] > 1:
                    faults.append(f"{what}.{name}: two names differ in nothing but upper and lower case")
        for name, feature in self.features.items():
            if feature.shares is None:
                continue
            owner = self.features.get(feature.shares)
            if owner is None:
                close = nearest(feature.shares, self.features)
                faults.append(f"features.{name}.shares names no feature.{close}")
            elif owner.shares is not None:
                faults.append(f"features.{name}.shares must name the table's first owner {owner.shares!r}")
            elif feature.kind not in ("id", "ids") or owner.kind not in ("id", "ids"):
                faults.append(f"features.{name}.shares: only id and ids features have tables")
        for name, feature in self.features.items():
            if feature.role == "history" and feature.kind not in ("ids", "texts"):
                faults.append(f"features.{name}: a history feature is of kind ids or texts")
            if feature.separator is not None and (feature.kind in ("id", "text") or feature.events is not None):
                faults.append(f"features.{name}.separator: only ids, texts and dense columns are split into lists")
            if feature.kind == "texts" and feature.role != "history":
                faults.append(f"features.{name}: texts is for histories; use text")
            if feature.events is not None:
                faults += self._event_faults(name, feature)
        for role in ("query", "item"):
            for what, test in (
                ("aspect: id", lambda f: f.kind == "id" and f.aspect == "id"),
                ("kind: text", lambda f: f.kind == "text"),
            ):
                named = [n for n, f in self.features.items() if f.role == role and test(f)]
                if len(named) > 1:
                    faults.append(f"{role} has several features with {what} ({', '.join(named)}): keep one")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _event_faults(self, name: str, feature: Feature) -> list[str]:
        place, events = f"features.{name}.events", feature.events
        if feature.role != "history":
            return [f"{place}: only history features are collected from events"]
        faults = []
        source = self.features.get(events.of)
        if source is None:
            faults.append(f"{place}.of names no feature.{nearest(events.of, self.features)}")
        elif {"id": "ids", "text": "texts"}.get(source.kind) != feature.kind:
            faults.append(f"{place}.of: a history of kind {feature.kind} cannot collect {source.kind} values")
        elif feature.kind == "ids" and self.table_of(name) != self.table_of(events.of):
            faults.append(f"{place}: set shares: {events.of}, whose ids it collects")
        if events.label is not None and events.label not in self.labels:
            faults.append(f"{place}.label names no label.{nearest(events.label, self.labels)}")
        if self.keys.user is None or self.keys.time is None:
            faults.append(f"{place}: needs keys.user and keys.time")
        return faults

    def table_of(self, feature: str) -> str:
        """Name of the vocabulary and embedding table that an `id` or `ids` feature uses."""
        return self.features[feature].shares or feature

    def select(self, role: Role | None = None, kinds: tuple[str, ...] = ()) -> dict[str, Feature]:
        """Features of a role (any if None) and of the given kinds (any if empty), in order."""
        return {
            name: feature
            for name, feature in self.features.items()
            if (role is None or feature.role == role) and (not kinds or feature.kind in kinds)
        }

    def table_sizes(self) -> dict[str, int]:
        """How many ids every table's vocabulary has, by table name: the bound of the ids in blocks.

        They are the table's rows too, unless a config says otherwise; for a raw one (`RAW_IDS`) it must.

        Raises:
            UserError: a dictionary vocabulary has no size yet, so this schema was never built.
        """
        sizes = {}
        for name, feature in self.select(kinds=("id", "ids")).items():
            if feature.shares is None:
                raw = feature.vocabulary.kind == "raw"
                if feature.vocabulary.size < 1 and not raw:
                    raise UserError(
                        f"feature {name!r} of schema {self.name!r} has no vocabulary size: "
                        "take the schema of a built data set's index.json."
                    )
                sizes[name] = RAW_IDS if raw else feature.vocabulary.size
        return sizes


def load_schema(path: str | Path) -> Schema:
    """Read a schema.yaml.

    Raises:
        UserError: the file is missing or is no valid schema; every fault is listed.
    """
    return from_dict(Schema, read_yaml(path), str(path))
