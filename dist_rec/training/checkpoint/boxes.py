"""Boxes of indices: which part of a tensor a piece is, where two overlap, whether pieces tile it. Knows no tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """Indices offset[d] .. offset[d] + size[d] in every dimension d."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> Box:
        return Box((0,) * len(shape), tuple(shape))

    @property
    def volume(self) -> int:
        return math.prod(self.size)

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(o + s for o, s in zip(self.offset, self.size, strict=True))

    def overlap(self, other: Box) -> Box | None:
        """What both contain; None if that is nothing."""
        offset = tuple(map(max, self.offset, other.offset))
        size = tuple(e - o for o, e in zip(offset, map(min, self.end, other.end), strict=True))
        return Box(offset, size) if all(s > 0 for s in size) else None

    def within(self, outer: Box) -> tuple[slice, ...]:
        """This box as slices of a tensor that holds `outer`."""
        return tuple(slice(a - b, a - b + s) for a, b, s in zip(self.offset, outer.offset, self.size, strict=True))

    def rows(self, most: int) -> Iterable[Box]:
        """This box cut along its first dimension into boxes of at most `most` rows."""
        first, count = self.offset[0], self.size[0]
        for start in range(0, count, most):
            yield Box((first + start, *self.offset[1:]), (min(most, count - start), *self.size[1:]))

    def __str__(self) -> str:
        return " x ".join(f"{o}..{e}" for o, e in zip(self.offset, self.end, strict=True))


def fault_of_tiling(shape: Sequence[int], boxes: Iterable[Box]) -> str | None:
    """Why `boxes` do not cover every index of `shape` exactly once; None if they do."""
    outer, boxes = Box.whole(shape), sorted(boxes, key=lambda box: box.offset)
    active: list[Box] = []
    for box in boxes:
        if len(box.offset) != len(shape) or len(box.size) != len(shape):
            return f"piece at {box.offset} of size {box.size} has not {len(shape)} dimensions"
        if min(box.size) < 1 or any(e > s for e, s in zip(box.end, outer.size, strict=True)):
            return f"piece {box} lies outside {' x '.join(map(str, shape))}"
        active = [other for other in active if other.end[0] > box.offset[0]]
        for other in active:
            if other.overlap(box) is not None:
                return f"pieces {other} and {box} overlap"
        active.append(box)
    covered = sum(box.volume for box in boxes)
    if covered != outer.volume:
        return f"pieces cover {covered} of {outer.volume} elements"
    return None
