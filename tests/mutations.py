"""Damage to bytes and texts, drawn from a random generator: what bad disks, bad copies and bad people do."""

from __future__ import annotations

import random
import re
import struct

EDGES = [0, 1, 2, 3, 7, 8, 255, 256, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1]
NUMBER = re.compile(rb"-?\d+(\.\d+)?")
WORDS = [
    b"null", b"true", b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1", b"1e3", b"0x" + b"f" * 5000, b"9" * 5000,
    b"9" * 400, b'"x"', b'"../x"', b'"http://x/y"', b'"\\ud800"', b'"\\u0000"', b"[]", b"{}", b"[" * 2000,
    b'{"a":' * 500,
    b"-9223372036854775809", b"18446744073709551616", b".inf", b".nan", b"2001-99-99", b"1:61:61", b"1_000",
]  # fmt: skip
YAML_WORDS = [
    b"&a ", b"*a", b"<<: *a\n", b"!!python/object/apply:os.system [id]", b"!!binary x", b"!!set {a, b}",
    b"!!timestamp x", b"!!int x", b"? [a]\n: b\n", b"- ", b": ", b"\t", b"---\n", b"...\n", b"%YAML 9.9\n", b"| \n",
    b"> \n", b"{a: &b [*b]}",
    b"\xff\xfe", b"\xef\xbb\xbf", b"'", b'"', b"[", b"{", b"#", b"~", b"[" * 300, b"\n  x: ", b"\x00", b"\x85",
]  # fmt: skip


def damage(data: bytes, draw: random.Random, others: list[bytes], numbers: tuple[int, int] | None = None) -> bytes:
    """One to three mutations of `data`.

    Args:
        others: what pieces are spliced in from.
        numbers: with it, only bits and numbers inside this span are changed, and nothing moves.
    """
    out = bytearray(data)
    ways = (_flip, _number, _number) if numbers else (_flip, _flip, _number, _number, _cut, _splice, _repeat, _remove)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if out:
            draw.choice(ways)(out, draw, others, numbers or (0, len(out)))
    return bytes(out)


def _flip(out: bytearray, draw: random.Random, others, numbers) -> None:
    for _ in range(draw.choice((1, 1, 2, 8))):
        out[draw.randrange(*numbers)] ^= 1 << draw.randrange(8)


def _number(out: bytearray, draw: random.Random, others, numbers) -> None:
    size, code = draw.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
    low, high = numbers
    if high - low < size:
        return
    at = low + draw.randrange(high - low - size + 1) // size * size
    (old,) = struct.unpack_from(f"<{code}", out, at)
    edges = (*EDGES, len(out), 8 * len(out), old + 1, old - 1, old * 2, old + 8, -old)
    value = draw.choice((1, 1, 1, -1)) * draw.choice(edges)
    struct.pack_into(f"<{code}", out, at, value % 2 ** (8 * size))


def _cut(out: bytearray, draw: random.Random, others, numbers) -> None:
    del out[draw.randrange(len(out)) :]


def _span(length: int, draw: random.Random) -> slice:
    start = draw.randrange(length)
    return slice(start, start + draw.choice((1, 4, 8, 16, 64, 512, length)))


def _splice(out: bytearray, draw: random.Random, others, numbers) -> None:
    other = draw.choice(others)
    place = _span(len(out), draw)
    out[place] = other[_span(len(other), draw)]


def _repeat(out: bytearray, draw: random.Random, others, numbers) -> None:
    place = _span(len(out), draw)
    out[place.start : place.start] = out[place] * draw.choice((1, 1, 3))


def _remove(out: bytearray, draw: random.Random, others, numbers) -> None:
    del out[_span(len(out), draw)]


def damage_text(text: bytes, draw: random.Random, others: list[bytes], words: list[bytes]) -> bytes:
    """As `damage`, but numbers are digits, and words of the language are put in."""
    out = bytearray(text)
    for _ in range(draw.choice((1, 1, 2, 3))):
        kind = draw.randrange(4)
        found = list(NUMBER.finditer(bytes(out))) if kind < 2 else []
        if kind < 2 and found:
            match = draw.choice(found)
            value = draw.choice((*EDGES, *(-e for e in EDGES), 0.5, 1e300))
            out[match.start() : match.end()] = draw.choice((repr(value).encode(), draw.choice(words)))
        elif kind == 2 and out:
            place = draw.randrange(len(out))
            out[place:place] = draw.choice(words)
        else:
            out[:] = damage(bytes(out), draw, others)
    return bytes(out)
