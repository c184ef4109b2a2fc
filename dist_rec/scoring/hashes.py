"""Numbers that stand for values: of texts, of raw ids, and of ids spread over a range."""

from __future__ import annotations

import hashlib

import numpy as np

# Raw ids are 0 .. RAW_IDS - 1: what is not negative in 64 bits, but for the largest, which is free to mean "no id".
RAW_IDS = 2**63 - 1
BITS = 63
_MASK = np.uint64(2**BITS - 1)
# Doug Lea's mixer, whose shift of more than half the bits undoes itself, here modulo 2 ** 63.
_SHIFT = np.uint64(32)
_FACTOR = 0xDABA0B6EB09322E3
_TIMES = np.uint64(_FACTOR & (2**BITS - 1))
_UNTIMES = np.uint64(pow(_FACTOR, -1, 2**BITS))


def text_key(text: str) -> int:
    """Signed 64-bit BLAKE2b of the UTF-8 text: the name of a text across blocks and runs."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def md5_number(text: str) -> int:
    """The last 64 bits of the text's MD5, what DuckDB calls `md5_number_lower`."""
    return int.from_bytes(hashlib.md5(text.encode(), usedforsecurity=False).digest()[8:], "little")


def mix(ids: np.ndarray) -> np.ndarray:
    """Spread ids evenly over 0 .. RAW_IDS - 1, each to a number of its own, the same in every run.

    Args:
        ids: int32 or int64 `[n]`, 0 <= id < RAW_IDS = 2 ** 63 - 1.

    Returns:
        int64 `[n]` in the same range; `unmix` of it is `ids`.
    """
    return _within(ids, _TIMES)


def unmix(mixed: np.ndarray) -> np.ndarray:
    """The ids that `mix` sent to `mixed`, int64 `[n]`."""
    return _within(mixed, _UNTIMES)


def _mixed(x: np.ndarray, factor: np.uint64) -> np.ndarray:
    """A bijection of uint64 values below 2 ** 63, in place; that with the inverse factor undoes it."""
    for _ in range(2):
        x ^= x >> _SHIFT
        x *= factor
        x &= _MASK
    x ^= x >> _SHIFT
    return x


def _within(ids: np.ndarray, factor: np.uint64) -> np.ndarray:
    x = _mixed(ids.astype(np.uint64), factor)
    # 2 ** 63 - 1 is no id. The one id that is sent there goes on, as in a permutation's cycle, to where that is sent.
    while (out := x == RAW_IDS).any():
        x[out] = _mixed(x[out], factor)
    return x.view(np.int64)
