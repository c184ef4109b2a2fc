"""Exact ranking metrics over all ranks: Recall, NDCG and MRR of rows that ask for one item, by domain.

Of a row whose item stands at place r among all candidates (1 is the best; where others score the same, r is the middle
of their places, so it may end in .5):

* `recall@k` = 1 if r <= k, else 0, which is also the hit rate: a row has one item;
* `ndcg@k` = 1 / log2(1 + r) if r <= k, else 0: the ideal DCG of one item is 1;
* `mrr` = 1 / r.

A metric is the mean over the `rows` that have a place. Rows without one (NaN: their item cannot be scored) enter no
metric, and `unranked` counts them. A mean over no rows is None. Reals are summed in fixed point, so results depend
neither on the number of ranks nor on which rank saw which row.

Memory: a rank keeps 28 bytes for each row that it added; `per_row` brings them all to rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from .exchange import Exchange
from .metrics import Metrics, fixed, mean, to_numpy

TASK = "next"


@dataclass
class RowRanks:
    """The places of n rows, in ascending order of `row`.

    Attributes:
        domains: names; `domain` is a position in this list.
        row: int64 `[n]`, all different, numbers of rows in the data set.
        domain: int32 `[n]`.
        user: int64 `[n]`, -1 where unknown.
        rank: float64 `[n]`, NaN where the row's item could not be scored.
    """

    domains: list[str]
    row: np.ndarray
    domain: np.ndarray
    user: np.ndarray
    rank: np.ndarray

    def __len__(self) -> int:
        return len(self.row)


def rank_metrics(rank: np.ndarray, at: Sequence[int]) -> dict[str, np.ndarray]:
    """Every metric of every row, float64 `[n]` each, by name.

    Args:
        rank: float64 `[n]`, at least 1.
        at: cuts of recall and NDCG.
    """
    gain = 1 / np.log2(1 + rank)
    found = {f"recall@{k}": (rank <= k).astype(np.float64) for k in at}
    found |= {f"ndcg@{k}": np.where(rank <= k, gain, 0.0) for k in at}
    return found | {"mrr": 1 / rank}


class RankingEvaluation:
    """Collects places batch by batch on every rank; `compute` gives every rank the result.

    Args:
        domains: names; `domain` in `add` is a position in this list.
        at: cuts of recall and NDCG, each at least 1.
        group: process group; None is the default one, or this process alone.
    """

    def __init__(
        self, domains: list[str], at: Sequence[int] = (1, 5, 10, 50), group: dist.ProcessGroup | None = None
    ) -> None:
        if not at or min(at) < 1:
            raise ValueError(f"at must be cuts of at least 1, got {list(at)}")
        self.domains, self.at, self.group = list(domains), sorted(set(at)), group
        self._chunks: list[tuple[np.ndarray, ...]] = []

    def add(self, rank: Tensor, valid: Tensor, domain: Tensor, user: Tensor, row: Tensor) -> None:
        """Keep the valid rows of one local batch. Local: ranks may call it unequally often.

        Args:
            rank: float `[B]`, place of the row's item among all candidates, NaN where it has none.
            valid: bool `[B]`, False on masked rows.
            domain: int64 `[B]`.
            user: int64 `[B]`, -1 where unknown.
            row: int64 `[B]`, row numbers.

        Raises:
            ValueError: unequal lengths, a domain that is none, a place before the first.
        """
        kinds = (np.int64, np.int32, np.int64, np.float64)
        columns = [to_numpy(c, kind) for c, kind in zip((row, domain, user, rank), kinds, strict=True)]
        mask = to_numpy(valid, np.bool_)
        shapes = [column.shape for column in (*columns, mask)]
        if len(set(shapes)) != 1 or mask.ndim != 1:
            raise ValueError(f"all arguments must be [B], got {shapes}")
        row, domain, user, rank = (column[mask] for column in columns)
        if len(domain) and (domain.min() < 0 or domain.max() >= len(self.domains)):
            raise ValueError(f"domains {domain.min()}..{domain.max()}, but there are {len(self.domains)}")
        if wrong := np.flatnonzero((rank < 1) | np.isinf(rank)).tolist():
            raise ValueError(f"row {row[wrong[0]]} has place {rank[wrong[0]]}, and {len(wrong) - 1} more are like it")
        self._chunks.append((row, domain, user, rank))

    def compute(self) -> dict[str, Any]:
        """All metrics of all rows on all ranks. Collective; may be called again after more `add`.

        Returns:
            `{"overall": {"next": {metric: value}}, "domains": {name: {"next": {metric: value}}}}`, the same on every
            rank, ready for JSON.
        """
        _, domain, _, rank = self._columns()
        ranked = ~np.isnan(rank)
        metrics = rank_metrics(rank[ranked], self.at)
        counts = np.column_stack([ranked, ~ranked]).astype(np.int64)
        # Columns: rows, unranked, and two for each metric.
        table = np.zeros((len(self.domains) + 1, 2 + 2 * len(metrics)), np.int64)
        np.add.at(table[:, :2], domain, counts)
        np.add.at(table[:, 2:], domain[ranked], np.concatenate([fixed(v) for v in metrics.values()], axis=1))
        table[-1] = table.sum(axis=0)
        table = Exchange(self.group).sum(table)

        def told(sums: np.ndarray) -> dict[str, Metrics]:
            rows, unranked = int(sums[0]), int(sums[1])
            means = {name: mean(sums[2 + 2 * i : 4 + 2 * i], rows) for i, name in enumerate(metrics)}
            return {TASK: {"rows": rows, "unranked": unranked, **means}}

        domains = {name: told(sums) for name, sums in zip(self.domains, table, strict=False)}
        return {"overall": told(table[-1]), "domains": domains}

    def per_row(self) -> RowRanks | None:
        """Every row of all ranks, on rank 0; None on the others. Collective."""
        exchange = Exchange(self.group)
        columns = self._columns()
        row, *others = exchange.route(np.zeros(len(columns[0]), np.int64), columns)
        if exchange.rank:
            return None
        order = np.argsort(row)
        return RowRanks(self.domains, row[order], *(column[order] for column in others))

    def _columns(self) -> list[np.ndarray]:
        """Row, domain, user and place of all rows that were added here."""
        if not self._chunks:
            return [np.zeros(0, kind) for kind in (np.int64, np.int32, np.int64, np.float64)]
        if len(self._chunks) > 1:
            self._chunks = [tuple(np.concatenate(columns) for columns in zip(*self._chunks, strict=True))]
        return list(self._chunks[0])
