"""Strict dataclass trees: YAML or JSON in, unknown keys refused, all faults at once.

Schema, index and config are trees of `strict` dataclasses. pydantic does the checking and
collects every fault; this file only turns its findings into one `UserError` whose lines
name the place, the fault and, for a mistyped key, the nearest known key.
"""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from pydantic.dataclasses import dataclass as _pydantic_dataclass

from .errors import UserError, nearest

T = TypeVar("T")

_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


@typing.dataclass_transform(kw_only_default=True)
def strict(cls: type[T]) -> type[T]:
    """A keyword-only dataclass that refuses unknown keys and values of another type."""
    return _pydantic_dataclass(cls, config=pydantic.ConfigDict(extra="forbid"), kw_only=True)


def _step_into(annotation: Any, key: Any) -> Any:
    """The annotation found below `annotation` at `key`, or None where nothing is known."""
    for option in typing.get_args(annotation) if _is_union(annotation) else (annotation,):
        if dataclasses.is_dataclass(option):
            hints = typing.get_type_hints(option)
            if key in hints:
                return hints[key]
        elif typing.get_origin(option) is dict:
            return typing.get_args(option)[1]
        elif typing.get_origin(option) in (list, tuple):
            return typing.get_args(option)[0]
    return None


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _known_keys(root: type, place: tuple) -> list[str]:
    """Field names of the dataclass that holds the last key of `place`."""
    annotation: Any = root
    for key in place[:-1]:
        step = _step_into(annotation, key)
        annotation = step if step is not None else annotation
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return [f.name for o in options if dataclasses.is_dataclass(o) for f in dataclasses.fields(o)]


def faults_of(error: pydantic.ValidationError, root: type) -> list[str]:
    """One line a fault: `place: what is wrong, and the nearest known key`."""
    lines = []
    for fault in error.errors(include_url=False):
        place = tuple(fault["loc"])
        where = ".".join(str(p) for p in place) or root.__name__
        if fault["type"] in _UNKNOWN:
            known = _known_keys(root, place)
            lines.append(f"{where}: unknown key.{nearest(str(place[-1]), known)}")
        elif fault["type"] in ("missing", "missing_keyword_only_argument", "missing_argument"):
            lines.append(f"{where}: is required.")
        elif fault["type"] == "dataclass_type":
            lines.append(f"{where}: is a section: write its keys below it, or leave it out.")
        elif fault["type"] == "value_error":
            lines.append(f"{where}: {fault['msg'].removeprefix('Value error, ')}")
        else:
            message = fault["msg"]
            shown = fault.get("input")
            small = isinstance(shown, str | int | float | bool | type(None))
            lines.append(f"{where}: {message}" + (f" (got {shown!r})" if small else ""))
    return lines


def _without_unknown_keys(data: Any, error: pydantic.ValidationError) -> Any:
    """A copy of `data` that lacks the keys which `error` calls unknown."""
    kept = copy.deepcopy(data)
    for fault in error.errors(include_url=False):
        if fault["type"] in _UNKNOWN:
            *sections, last = fault["loc"]
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
    adapter = pydantic.TypeAdapter(cls)
    try:
        return adapter.validate_python(data)
    except pydantic.ValidationError as error:
        lines = faults_of(error, cls)
        try:
            # An unknown key keeps the checks over several keys of its section from running.
            adapter.validate_python(_without_unknown_keys(data, error))
        except pydantic.ValidationError as again:
            lines += [line for line in faults_of(again, cls) if line not in lines]
        faults = "\n".join(f"  - {line}" for line in lines)
        raise UserError(f"{origin} is not valid:\n{faults}") from None


def to_dict(value: Any) -> Any:
    """The tree as plain dicts, lists and scalars, ready for YAML or JSON."""
    return pydantic.TypeAdapter(type(value)).dump_python(value, mode="json")


def read_yaml(path: str | Path) -> Any:
    """Parse a YAML file; a missing or malformed one is the user's fault, said in words."""
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not YAML: it is not text in UTF-8.") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: not YAML: {getattr(error, 'problem', error)}.") from None
