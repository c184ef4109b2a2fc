"""A schema that extends another: what it takes over, what it may add, and old blocks read under it.

An extension appends domains, features and labels, and new values behind the old ones of dictionaries. So every
domain keeps its number and every value its id, and blocks of the old schema stand as they are. Knows schemas and
indexes, not raw tables nor tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import UserError
from ..schema import Feature, Label, Schema, Vocabulary
from ..strict import from_dict, strict, to_dict
from .index import Extension, FeatureStatistics, Index
from .rows import id_dtype

# How raw tables carry a feature, label or key: blocks know nothing of it.
_RAW_FORM = ("column", "separator", "events")


def extension_faults(new: Schema, old: Schema) -> list[str]:
    """What keeps rows of `old` from meaning under `new` what they mean under `old`; nothing where it extends it.

    Args:
        new, old: resolved schemas, of indexes.
    """
    faults = []
    kept = new.domains.names[: len(old.domains.names)]
    if kept != old.domains.names:
        faults.append(
            f"domains.names begins with {', '.join(kept)}, so domains would change their numbers: it must begin with "
            f"{', '.join(old.domains.names)}"
        )
    for what, have, had in (("features", new.features, old.features), ("labels", new.labels, old.labels)):
        for name, entry in had.items():
            place = f"{what}.{name}"
            faults += _differences(place, have[name], entry) if name in have else [f"{place} is missing"]
    for key in ("user", "query", "time"):
        if getattr(old.keys, key) is not None and getattr(new.keys, key) is None:
            faults.append(f"keys.{key} is missing, which old rows have")
    return faults


def _differences(place: str, new: Feature | Label, old: Feature | Label) -> list[str]:
    """Values of one feature or label that blocks or models depend on."""
    faults = []
    for key in (field.name for field in fields(old) if field.name not in _RAW_FORM):
        have, had = getattr(new, key), getattr(old, key)
        if key == "vocabulary":
            if old.kind in ("id", "ids") and old.shares is None:
                faults += _vocabulary_differences(f"{place}.vocabulary", new, old)
        elif have != had:
            faults.append(f"{place}.{key} is {have!r}, it was {had!r}")
    return faults


def _vocabulary_differences(place: str, new: Feature, old: Feature) -> list[str]:
    have, had = new.vocabulary, old.vocabulary
    if have.kind != had.kind:
        return [f"{place}.kind is {have.kind!r}, it was {had.kind!r}"]
    if had.kind != "dictionary":
        return [] if have.size == had.size else [f"{place}.size is {have.size}, it was {had.size}"]
    if have.steps[: len(had.steps)] != had.steps:
        return [
            f"{place} has grown by the sizes {', '.join(map(str, have.steps))}, which are to begin with "
            f"{', '.join(map(str, had.steps))}: its values are not numbered after the old ones"
        ]
    if renumbered(have, had):
        return [f"{place} has other values in its first {had.size} rows, or in another order, by its digests"]
    if id_dtype(have.size) != id_dtype(had.size):
        return [f"{place} has grown to {have.size} rows: ids in its blocks take 64 bits, in old blocks 32"]
    return []


def renumbered(one: Vocabulary, other: Vocabulary) -> bool:
    """Do a number's values in two dictionaries, of which one may extend the other, differ, where digests can tell?"""
    return any(a != b for a, b in zip(one.digests, other.digests, strict=False))


@strict
class ExtendedIndex(Index):
    """An index whose blocks were written under a schema that `schema` extends.

    What `written` lacks is null in every row.
    """

    written: Schema

    @property
    def stored(self) -> Schema:
        return self.written


def as_extended(index: Index, schema: Schema) -> Index:
    """The data set of `index` read under `schema`, which extends its own: same rows, ids and domain numbers.

    What the blocks lack is null: features, labels (NaN) and keys (-1). Statistics and label counts say so.

    Args:
        index: as read.
        schema: of the index of a data set that extends this one, at whatever remove, or this one's own.

    Raises:
        UserError: `schema` is no extension; every fault is listed.
    """
    if schema == index.schema:
        return index
    faults = extension_faults(schema, index.schema)
    if faults:
        raise UserError(
            f"data set {index.name} ({index.split}) cannot be read under schema {schema.name!r}, which does not extend "
            "its own:\n"
            + "\n".join(f"  - {fault}" for fault in faults)
            + "\nBuild the new data set with `dist-rec shards build --extends` this one."
        )
    nulls = FeatureStatistics(null_share=1.0, mean_length=0.0, max_length=0)
    missing = {"valid": 0, "positive": 0, "missing": index.rows}
    common = {field.name: getattr(index, field.name) for field in fields(Index)}
    return ExtendedIndex(
        **common
        | {
            "schema": schema,
            "statistics": {name: index.statistics.get(name, nulls) for name in schema.features},
            "label_counts": {name: index.label_counts.get(name, dict(missing)) for name in schema.labels},
        },
        written=index.stored,
    )


@dataclass(frozen=True)
class Extended:
    """A new domain's schema merged with the one that it extends.

    Attributes:
        schema: old, then new; dictionaries have their old sizes yet.
        own: what of it the new raw tables carry.
    """

    schema: Schema
    own: Extension


def merge(new: Schema | Mapping[str, Any], old: Schema, origin: str) -> Extended:
    """A new domain's schema on top of a built one.

    Features and labels of both are one and the same: what the new one leaves unsaid is as in the old one, except how
    its raw tables carry them (`column`, `separator`, `events`), which is its own.

    Args:
        new: what its schema.yaml says (`strict.read_yaml`); a `Schema` says all.
        old: schema of an index.
        origin: of the old one, for messages.

    Raises:
        UserError: it contradicts the old one, has a domain of it, or is no schema together with it; all faults at once.
    """
    tree = to_dict(new) if isinstance(new, Schema) else new
    sections = ("domains", "features", "labels", "keys")
    if not isinstance(tree, Mapping) or not all(isinstance(tree.get(s) or {}, Mapping) for s in sections):
        from_dict(Schema, tree, "the schema")  # says what is wrong with it
    names = (tree.get("domains") or {}).get("names")
    if not isinstance(names, list) or not names:
        raise UserError("the schema is not valid:\n  - domains.names: is required: the names of the new domains.")
    faults = [
        f"domains.names: {name!r} is a domain of {origin} already, to which `dist-rec shards append` adds rows; give a "
        "new domain another name"
        for name in names
        if name in old.domains.names
    ]
    keys = {key: column for key, column in (tree.get("keys") or {}).items() if column is not None}
    merged = {"name": old.name} | dict(tree)
    merged["domains"] = dict(tree["domains"]) | {"names": [*old.domains.names, *names]}
    merged["keys"] = to_dict(old.keys) | keys
    missing = [f"keys.{key}" for key, column in to_dict(old.keys).items() if column is not None and key not in keys]
    for section in ("features", "labels"):
        given = tree.get(section) or {}
        merged[section] = dict(to_dict(getattr(old, section)))
        missing += [f"{section}.{name}" for name in merged[section] if name not in given]
        for name, said in given.items():
            entry = merged[section].get(name)
            if entry is None or not isinstance(said, Mapping):
                merged[section][name] = said
            else:
                merged[section][name] = _overlaid(f"{section}.{name}", said, entry, faults)
    if not tree.get("labels"):
        faults.append("labels is empty: name at least one")
    if faults:
        raise UserError(f"the schema does not extend that of {origin}:\n" + "\n".join(f"  - {f}" for f in faults))
    schema = from_dict(Schema, merged, f"the schema, put on top of that of {origin},")
    faults = _event_faults(schema, missing)
    if faults:
        raise UserError("the schema is not valid:\n" + "\n".join(f"  - {f}" for f in faults))
    return Extended(schema, Extension(domains=schema.domains.names[len(old.domains.names) :], missing=missing))


def _overlaid(place: str, said: Mapping[str, Any], entry: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    """A feature or label of both: what it says, and what the old `entry` has where it says nothing."""
    kept = {key: value for key, value in entry.items() if key not in _RAW_FORM}
    result = kept | dict(said)
    for key in said.keys() & kept.keys():
        if key == "vocabulary" and isinstance(said[key], Mapping):
            # A dictionary's size is the builder's, so 0 says nothing.
            named = {k: v for k, v in said[key].items() if v or k not in ("size", "inherited", "digests")}
            result[key] = kept[key] | named
            differing = {f"{key}.{k}": (v, kept[key][k]) for k, v in named.items() if k in kept[key]}
        else:
            differing = {key: (said[key], kept[key])}
        for where, (have, had) in sorted(differing.items()):
            if have != had:
                faults.append(f"{place}.{where} is {have!r}, it was {had!r}: leave it out, or take another name")
    return result


def _event_faults(schema: Schema, missing: list[str]) -> list[str]:
    """Histories that were to be collected from what the new raw tables lack, and would be empty in every row."""
    faults = []
    for name, feature in schema.features.items():
        if feature.events is None or f"features.{name}" in missing:
            continue
        needed = ["keys.user", "keys.time", f"features.{feature.events.of}"]
        needed += [f"labels.{feature.events.label}"] if feature.events.label is not None else []
        lacking = [place for place in needed if place in missing]
        if lacking:
            faults.append(f"features.{name}.events: needs {', '.join(lacking)}, which the schema does not name")
    return faults


def carried(schema: Schema, own: Extension | None) -> Schema:
    """`schema` as the raw tables of a data set carry it: a history that they lack is collected from no events."""
    if own is None:
        return schema
    features = {
        name: replace(feature, events=None) if f"features.{name}" in own.missing else feature
        for name, feature in schema.features.items()
    }
    return replace(schema, features=features)
