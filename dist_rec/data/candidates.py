"""Candidates: the items of the catalogue that a rank's batch carries, for a sequence model to tell the next item from.

A batch has a share of them, so that all ranks' shares together are every candidate once. They ride as two features of
the batch, CANDIDATES (ids) and CANDIDATES_TEXT (texts), all listed on its first row, so that tables and text vectors
know them without being told.

    the whole catalogue    rank r of W has items M r // W .. M (r + 1) // W: in training with every batch, in evaluation
                           with the first of a pass, for the model keeps their vectors as long as nothing trains
    a sample of a step     n of the M items, a function of (seed, epoch, step) that all ranks draw alike; rank r has the
                           same share of those

A sample is systematic: along the items, in an order drawn anew, laid end to end with lengths n p_i, one is taken where
each of n points with distance 1 falls. An item's expected number is n p_i exactly, its number is that rounded down or
up, and its weight is its number over that expectation: so a weighted sum over the sample has the sum over the whole
catalogue as its expectation. With n = M and p uniform it is the whole catalogue, every item with weight 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .catalogue import Catalogue
from .rows import Ragged

CANDIDATES, CANDIDATES_TEXT = "candidates", "candidates_text"
# Keys the draws of samples apart from those of orders.
_DRAW = 0x5A


@dataclass(frozen=True)
class Share:
    """The m candidates of one rank's batch.

    Attributes:
        ids: int64 `[m]`, as in the data.
        row: int64 `[m]`, their rows in the catalogue.
        weight: float32 `[m]`, what each counts.
        text_keys: int64 `[m]`, anything where an item has no text; None where texts are not read.
        has_text: bool `[m]`.
        tokens: their texts' tokens, where they were asked for.
    """

    ids: np.ndarray
    row: np.ndarray
    weight: np.ndarray
    text_keys: np.ndarray | None
    has_text: np.ndarray
    tokens: Ragged | None

    def __len__(self) -> int:
        return len(self.ids)


# The candidates of (epoch, step).
Candidates = Callable[[int, int], Share]


def share_of(total: int, rank: int, world_size: int) -> slice:
    """What of `total` things in a row is rank `rank`'s."""
    return slice(total * rank // world_size, total * (rank + 1) // world_size)


def _share(catalogue: Catalogue, items: np.ndarray | slice, weight: np.ndarray) -> Share:
    tokens = catalogue.tokens
    if tokens is not None:
        tokens = tokens.slice(items.start, items.stop) if isinstance(items, slice) else tokens.take(items)
    return Share(
        ids=catalogue.ids[items],
        row=catalogue.row[items],
        weight=weight,
        text_keys=catalogue.text_keys[items] if catalogue.text_keys is not None else None,
        has_text=catalogue.has_text[items],
        tokens=tokens,
    )


class Whole:
    """A rank's share of the whole catalogue, the same in every step, every item with weight 1.

    Args:
        catalogue: all of it.
        rank, world_size: whose share.
        once: the first step of an epoch alone has it; those after have none.
    """

    def __init__(self, catalogue: Catalogue, rank: int, world_size: int, once: bool = False) -> None:
        mine = share_of(len(catalogue), rank, world_size)
        self.share = _share(catalogue, mine, np.ones(mine.stop - mine.start, np.float32))
        self.after = _share(catalogue, slice(0, 0), np.ones(0, np.float32)) if once else self.share

    def __call__(self, epoch: int, step: int) -> Share:
        return self.after if step else self.share


class Sampled:
    """A rank's share of each step's sample.

    Args:
        catalogue: to draw from.
        samples: n, of all ranks; not more than the catalogue has.
        seed: of the run.
        rank, world_size: whose share.
        odds: float64 `[M]`, above 0, to which p is proportional; None draws uniformly.
    """

    def __init__(
        self, catalogue: Catalogue, samples: int, seed: int, rank: int, world_size: int, odds: np.ndarray | None = None
    ) -> None:
        self.catalogue, self.samples, self.seed, self.rank, self.world_size = catalogue, samples, seed, rank, world_size
        odds = np.ones(len(catalogue)) if odds is None else odds
        self.expected = samples * (odds / odds.sum())

    def sample(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The step's distinct items, int64 ascending, and how often each was drawn."""
        draw = np.random.default_rng([self.seed, epoch, step, _DRAW])
        order = draw.permutation(len(self.catalogue))
        ends = np.cumsum(self.expected[order])
        # Rounding would leave the last point beyond the last item.
        places = np.searchsorted(ends[:-1], np.arange(self.samples) + draw.random(), side="right")
        return np.unique(order[places], return_counts=True)

    def __call__(self, epoch: int, step: int) -> Share:
        items, counts = self.sample(epoch, step)
        mine = share_of(len(items), self.rank, self.world_size)
        items, counts = items[mine], counts[mine]
        return _share(self.catalogue, items, (counts / self.expected[items]).astype(np.float32))
