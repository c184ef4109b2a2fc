"""Sizes and rates as people write them: `80 GiB`, `3.35 TB/s`, `400 Gbit/s`, `67 TFLOP/s`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15} | {
    f"{letter}i": 1024.0**power for power, letter in enumerate("kmgtp", 1)
}
_PARTS = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S*)")
_UNIT = re.compile(r"([kmgtp]i?)?(bit|b|flop)?(/s|ps)?", re.IGNORECASE)
# What a unit is of, by its last parts.
_KINDS = {("b", False): "size", ("bit", False): "size", ("b", True): "rate", ("bit", True): "rate"}
_KINDS |= {("flop", True): "compute", ("flop", False): "count"}
_NAMES = {"size": "a size", "rate": "a rate", "compute": "a rate of computing", "count": "a number of operations"}
# How much of what somebody wrote a message repeats.
SHOWN = 50


@dataclass(frozen=True)
class Dimension:
    """What a field holds, the units that it is written in, and within what it must be unless it is 0."""

    kind: str
    units: str
    example: str
    least: float
    most: float


# Nothing that computes is slower than a millionth or faster than a million times what there is: a number outside has
# lost its unit, and times that are made of it would overflow.
SIZE = Dimension("size", "GiB or GB", "80 GiB", 1, 2.0**60)
RATE = Dimension("rate", "GB/s or Gbit/s", "100 GB/s", 1e6, 1e18)
COMPUTE = Dimension("compute", "TFLOP/s", "67 TFLOP/s", 1e6, 1e21)


def number(text: Any) -> Any:
    """Text that is a number, with a unit or without, as one; bits as bytes. Anything else as it is."""
    parts = _PARTS.fullmatch(text.strip()) if isinstance(text, str) else None
    unit = _UNIT.fullmatch(parts[2]) if parts else None
    if unit is None or unit[3] not in (None, "/s"):
        return text
    value = float(parts[1]) * _factor(unit)
    return int(value) if value.is_integer() else value


def _factor(unit: re.Match) -> float:
    return _PREFIXES[(unit[1] or "").lower()] / (8 if (unit[2] or "").lower() == "bit" else 1)


def quantity(value: Any, dimension: Dimension) -> Any:
    """What a field of this dimension means, in bytes, bytes/s or FLOP/s; sizes are cut to whole bytes.

    Raises:
        ValueError: it is no number, of another dimension, ambiguous or out of bounds; how to write it is said.
    """
    write = f"write it as {dimension.example}"
    shown = repr(value) if isinstance(value, bool) else ascii(value)[:SHOWN].strip("'") or "nothing"
    if isinstance(value, str):
        value = _read(value.strip(), shown, dimension)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{shown} is no number: {write}")
    if value < 0 or isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{shown} is {'negative' if value < 0 else 'no finite number'}: {write}")
    if value and not dimension.least <= value <= dimension.most:
        bound = f"less than {dimension.least:,.0f}" if value < dimension.least else f"more than {dimension.most:.3g}"
        unit = {"size": "bytes", "rate": "bytes/s", "compute": "FLOP/s"}[dimension.kind]
        raise ValueError(f"{shown} is {bound} {unit}, which no machine has: {write}")
    return int(value) if dimension is SIZE else float(value)


def _read(text: str, shown: str, dimension: Dimension) -> float:
    write = f"write it as {dimension.example}"
    parts = _PARTS.fullmatch(text)
    if parts is None:
        raise ValueError(f"{shown} is no number with a unit: {write}")
    value = float(parts[1])
    if not parts[2]:
        return value
    unit = _UNIT.fullmatch(parts[2])
    if unit is None or unit[2] is None:
        raise ValueError(f"{shown} has an unknown unit: {write}")
    prefix, what, per_second = unit[1] or "", unit[2], unit[3]
    if what == "b":
        forms = f"{prefix}bit/s or {prefix}B/s" if per_second else f"{prefix}B, or {prefix}bit"
        raise ValueError(f"{shown} may be bits or bytes: write {forms}")
    if per_second not in (None, "/s"):
        raise ValueError(f"{shown} has an unknown unit: write {prefix}{what}/s")
    kind = _KINDS[what.lower(), per_second is not None]
    if kind != dimension.kind:
        raise ValueError(f"{shown} is {_NAMES[kind]}, write {dimension.units}")
    return value * _factor(unit)
