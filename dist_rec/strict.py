"""Strict dataclass trees: YAML or JSON in, unknown keys refused, all faults at once.

Schema, index and config are trees of `strict` dataclasses. pydantic does the checking and
collects every fault; this file only turns its findings into one `UserError` whose lines
name the place, the fault and, for a mistyped key, the nearest known key.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from pydantic.dataclasses import dataclass as _pydantic_dataclass

from .errors import UserError, nearest

T = TypeVar("T")

_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
# Bounds of what a person writes as YAML: bytes of a file, values in it with every alias written out, sections in
# sections. A few lines of aliases of aliases stand for billions of values.
LARGEST_YAML = 1 << 20
MOST_VALUES = 100_000
DEEPEST = 50
# Of a message.
MOST_FAULTS = 50
LONGEST_VALUE = 200


@typing.dataclass_transform(kw_only_default=True)
def strict(cls: type[T]) -> type[T]:
    """A keyword-only dataclass that refuses unknown keys, values of another type, and floats that are no numbers."""
    return _pydantic_dataclass(cls, config=pydantic.ConfigDict(extra="forbid", allow_inf_nan=False), kw_only=True)


def _options(annotation: Any) -> tuple[Any, ...]:
    """What a value may be: the members of a union, without what is only said of them."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return tuple(typing.get_args(o)[0] if typing.get_origin(o) is typing.Annotated else o for o in options)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _sections(annotation: Any) -> list[type]:
    return [option for option in _options(annotation) if dataclasses.is_dataclass(option)]


def _step_into(annotation: Any, key: Any) -> Any:
    """The annotation found below `annotation` at `key`, or None where nothing is known."""
    for option in _options(annotation):
        if dataclasses.is_dataclass(option):
            hints = typing.get_type_hints(option)
            if key in hints:
                return hints[key]
        elif typing.get_origin(option) is dict:
            return typing.get_args(option)[1]
        elif typing.get_origin(option) in (list, tuple):
            return typing.get_args(option)[0]
    return None


def _walk(root: type, loc: tuple) -> tuple[tuple, Any]:
    """The keys of pydantic's `loc`, and the annotation of what holds the last one.

    Where one of several sections is told by its `kind`, `loc` has that beside the keys.
    """
    place, annotation, holder, tagged = [], root, root, False
    for key in loc:
        sections = _sections(annotation)
        if len(sections) > 1 and not tagged:
            # The next entry is no key, but which of them it is.
            annotation = next((s for s in sections if _kind_of(s) == key), annotation)
            tagged = True
            continue
        tagged, holder = False, annotation
        place.append(key)
        step = _step_into(annotation, key)
        annotation = step if step is not None else annotation
    return tuple(place), holder


def _kind_of(section: type) -> Any:
    return next((f.default for f in dataclasses.fields(section) if f.name == "kind"), None)


def faults_of(error: pydantic.ValidationError, root: type) -> list[str]:
    """One line a fault: `place: what is wrong, and the nearest known key`."""
    lines = []
    for fault in error.errors(include_url=False)[:MOST_FAULTS]:
        place, holder = _walk(root, tuple(fault["loc"]))
        where = ".".join(_shown(p, str) for p in place) or root.__name__
        if fault["type"] in _UNKNOWN:
            known = [f.name for section in _sections(holder) for f in dataclasses.fields(section)]
            lines.append(f"{where}: unknown key.{nearest(str(place[-1]), known)}")
        elif fault["type"] in ("missing", "missing_keyword_only_argument", "missing_argument"):
            lines.append(f"{where}: is required.")
        elif fault["type"] == "dataclass_type":
            lines.append(f"{where}: is a section: write its keys below it, or leave it out.")
        elif fault["type"] == "union_tag_invalid":
            known = fault["ctx"]["expected_tags"].replace("'", "").split(", ")
            kind = fault["ctx"]["tag"]
            lines.append(f"{where}.kind: {_shown(kind, repr)} is none of {', '.join(known)}.{nearest(kind, known)}")
        elif fault["type"] == "value_error":
            lines.append(f"{where}: {fault['msg'].removeprefix('Value error, ')}")
        else:
            message = fault["msg"]
            value = fault.get("input")
            small = isinstance(value, str | int | float | bool | type(None))
            lines.append(f"{where}: {message}" + (f" (got {_shown(value, repr)})" if small else ""))
    if error.error_count() > MOST_FAULTS:
        lines.append(f"and {error.error_count() - MOST_FAULTS} more.")
    return lines


def _shown(value: Any, how: Callable[[Any], str]) -> str:
    """`value` as text of a bearable length; Python refuses to write out an integer of thousands of digits."""
    try:
        text = how(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "…"


def _without_unknown_keys(data: Any, error: pydantic.ValidationError, root: type) -> Any:
    """A copy of `data` that lacks the keys which `error` calls unknown."""
    kept = copy.deepcopy(data)
    for fault in error.errors(include_url=False):
        if fault["type"] in _UNKNOWN:
            *sections, last = _walk(root, tuple(fault["loc"]))[0]
            place = kept
            for key in sections:
                place = place[key]
            del place[last]
    return kept


def from_dict(cls: type[T], data: Any, origin: str) -> T:
    """Build `cls` from plain data.

    Args:
        cls: a `strict` dataclass.
        data: what YAML or JSON gave.
        origin: the file's name, for the message.

    Raises:
        UserError: with every fault, one a line.
    """
    try:
        return _validated(cls, data, origin)
    except RecursionError:
        raise UserError(f"{origin} is not valid: it is nested too deeply.") from None


def _validated(cls: type[T], data: Any, origin: str) -> T:
    adapter = pydantic.TypeAdapter(cls)
    try:
        return adapter.validate_python(data)
    except pydantic.ValidationError as error:
        lines = faults_of(error, cls)
        try:
            # An unknown key keeps the checks over several keys of its section from running.
            adapter.validate_python(_without_unknown_keys(data, error, cls))
        except pydantic.ValidationError as again:
            lines += [line for line in faults_of(again, cls) if line not in lines]
        faults = "\n".join(f"  - {line}" for line in lines)
        raise UserError(f"{origin} is not valid:\n{faults}") from None


def to_dict(value: Any) -> Any:
    """The tree as plain dicts, lists and scalars, ready for YAML or JSON."""
    return pydantic.TypeAdapter(type(value)).dump_python(value, mode="json")


def parse_json(text: bytes, origin: str) -> Any:
    """Parse JSON that may be damaged or meant to do damage.

    Raises:
        UserError: it is not JSON, has a number that is none (NaN, Infinity, 1e999) or one of
            thousands of digits, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise UserError(f"{origin} is damaged: it is nested too deeply.") from None
    except ValueError as error:
        raise UserError(f"{origin} is damaged: not JSON ({error}). Build the data set again.") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:LONGEST_VALUE]} is no number")
    return number


def read_yaml(path: str | Path) -> Any:
    """Parse a YAML file.

    Raises:
        UserError: it is missing, larger than LARGEST_YAML, or `parse_yaml` refuses it.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_YAML + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    if len(data) > LARGEST_YAML:
        raise UserError(f"{path} is no config or schema: it has more than {LARGEST_YAML:,} bytes.")
    try:
        return parse_yaml(data.decode(), str(path))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not YAML: it is not text in UTF-8.") from None


class _Loader(yaml.SafeLoader):
    def fetch_flow_collection_start(self, token: type) -> None:
        # Each bracket costs as much as there are open ones.
        if self.flow_level > DEEPEST:
            raise RecursionError
        super().fetch_flow_collection_start(token)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML of plain values: no tags that make objects, no aliases that stand for millions of values.

    Args:
        origin: the file's name, for the message.

    Raises:
        UserError: it is not such YAML.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            # Before values are made of them: merge keys multiply while they are.
            _count_values(node, {}, 0)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{origin}{where}: not YAML: {getattr(error, 'problem', error)}.") from None
    except RecursionError:
        raise UserError(f"{origin}: sections are nested more than {DEEPEST} deep.") from None
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        # A date that does not exist, an integer of thousands of digits, or a tag on a value that is none of the kind:
        # PyYAML looks before none of these.
        raise UserError(f"{origin}: not YAML: {error}.") from None


def _count_values(node: yaml.Node, counted: dict[yaml.Node, int], depth: int) -> int:
    """Values below `node`, each alias counted as what it stands for."""
    if depth > DEEPEST:
        raise RecursionError
    if node in counted:
        return counted[node]
    count = 1
    if isinstance(node, yaml.CollectionNode):
        for part in node.value:
            for inner in part if isinstance(part, tuple) else (part,):
                count += _count_values(inner, counted, depth + 1)
    if count > MOST_VALUES:
        raise ValueError(f"with its aliases written out it has more than {MOST_VALUES:,} values")
    counted[node] = count
    return count
