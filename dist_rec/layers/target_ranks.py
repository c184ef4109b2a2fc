"""The ranks of targets among candidates of all ranks, by cosine, exactly: ties share their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .contrastive import CHUNK, WHOLE, Candidates, Earlier, matches, of_all_ranks
from .reduction import Reduction

# Cosines that differ by less are equal: one text on two ranks goes through matrix products of other shapes.
TIE = 1e-6


class Seen(NamedTuple):
    """Items that rows had before: `identity` int64 `[n]`, rows concatenated, and `length` int64 `[B]`, adding to n."""

    identity: Tensor
    length: Tensor


@torch.no_grad()
def target_ranks(
    states: Tensor,
    targets: Tensor,
    identity: Tensor,
    candidates: Candidates,
    reduction: Reduction,
    seen: Seen | None = None,
    earlier: Earlier | None = None,
) -> Tensor:
    """Rank of each row's target among the candidates of all ranks: 1 + (number of higher ones) + (ties) / 2.

    Candidates of the target's identity do not count, nor do those that the row had before. A score that is no number
    is the worst.

    Args:
        states: `[B, H]` of length 1, zeros where unknown, which ties all.
        targets: `[B, H]`, the targets' vectors.
        identity: int64 `[B]`, theirs, not negative.
        candidates: this rank's, of different identities.
        reduction: gathers rows and sums over ranks.
        seen: items to leave out.
        earlier: of the rows; here an offset is one of cosines.

    Returns:
        float64 `[B]`.
    """
    size = len(states)
    most = reduction.largest(size, states.device)
    gathered = of_all_ranks(states, most, reduction)
    score = (states * targets).sum(1)
    if earlier is not None:
        score = score + earlier.of(identity)
        repeated, offset = earlier.of_all_ranks(most, reduction)
    score = of_all_ranks(score, most, reduction)
    left_out = of_all_ranks(identity[:, None], most, reduction, -1)
    if seen is not None:
        left_out = torch.cat([left_out, of_all_ranks(_padded(seen, reduction), most, reduction, -1)], 1)
    catalogue = candidates.identity.sort()
    # 2 * (higher) + ties
    behind = torch.zeros(len(gathered), dtype=torch.int64, device=states.device)
    columns = len(candidates.vectors)
    high = max(CHUNK[states.device.type] // max(columns, 1), 1)
    for start in range(0, len(gathered) if columns else 0, high):
        rows = slice(start, start + high)
        difference = gathered[rows] @ candidates.vectors.t() - score[rows, None]
        if earlier is not None:
            row, column = matches(repeated[rows], *catalogue)
            difference[row, column] = difference[row, column] + offset[rows][row]
        # What does not count is lower than all.
        difference[matches(left_out[rows], *catalogue)] = -torch.inf
        # Counted from below, so that what is no number counts as higher.
        behind[rows] = 2 * columns - (_count(torch.lt, difference, -TIE) + _count(torch.le, difference, TIE))
    behind = reduction.sum(behind)
    mine = behind[reduction.rank * most : reduction.rank * most + size]
    return 1 + mine.double() / 2


def _padded(seen: Seen, reduction: Reduction) -> Tensor:
    """int64 `[B, L]`, -1 where there is nothing; L is the longest of all ranks."""
    device = seen.length.device
    longest = reduction.largest(int(seen.length.max()) if len(seen.length) else 0, device)
    out = seen.identity.new_full((len(seen.length), longest), -1)
    out[torch.arange(longest, device=device) < seen.length[:, None]] = seen.identity
    return out


def _count(compare: Callable, x: Tensor, bound: float) -> Tensor:
    """How many of each row of `[n, m]` compare so: int64 `[n]`. Sums of floats take a quarter of booleans' time."""
    exact = x.dtype if x.shape[1] <= WHOLE else torch.float64
    return compare(x, bound, out=torch.empty_like(x, dtype=exact)).sum(1).long()
