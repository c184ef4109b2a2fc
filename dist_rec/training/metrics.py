"""Exact evaluation over all ranks: AUC, grouped AUC, log loss, calibration and NDCG by task and domain.

No rank ever holds all predictions. AUC sends rows to ranks by score range, grouped AUC and NDCG
by hash of the user or query. Results do not depend on the number of ranks nor on which rank saw
which row: counts are integers, and reals are summed in fixed point.

Definitions, for the valid rows of a task with score p, soft target y in 0..1, graded label g:

* `rows`, `positives` (y >= 0.5), `mean_label` (of y), `mean_score`, `calibration` = mean p / mean y.
* `logloss` = mean of -(y log p + (1 - y) log(1 - p)), p clipped to [1e-7, 1 - 1e-7] because a float32
  sigmoid reaches 1.
* `auc`: probability that a positive outranks a negative, ties 1/2.
* `gauc`: AUC within each user, averaged with the user's rows as weights; users with one class
  only and rows without a user are left out.
* `ndcg@k`: mean over queries of DCG@k / ideal DCG@k with gain 2^g - 1 and discount 1 / log2(1 + rank).
  Rows with equal scores share the mean of their gains (the expectation over random tie-breaking,
  as scikit-learn does), so that no row order matters. Queries without a positive gain and rows
  without a query are left out.

In `overall` a user or query is one group across domains; in `domains` it is cut by domain.
A metric that is undefined (no rows, one class) is None.

Memory, measured: a rank keeps 50 bytes for each valid row it added, per task. `compute` needs 200 bytes a row of
the largest task on top, on each rank for its share of the rows. All rows of a user or a query must fit one
rank; equal scores are merged before they travel, so a constant prediction overloads nobody.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError
from .exchange import Exchange

Metrics = dict[str, float | int | None]

CLIP = 1e-7
FINE, COARSE = 2.0**56, 2.0**24


class Evaluation:
    """Collects predictions batch by batch on every rank; `compute` gives every rank the result.

    Args:
        domains: names; `domain` in `add` is a position in this list.
        tasks: names; the same lists on every rank.
        ndcg_at: k of NDCG@k.
        group: process group; None is the default one, or this process alone.
    """

    def __init__(self, domains: list[str], tasks: list[str], ndcg_at: int = 10, group: dist.ProcessGroup | None = None):
        if ndcg_at < 1:
            raise ValueError(f"ndcg_at must be at least 1, got {ndcg_at}")
        self.domains, self.tasks, self.ndcg_at, self.group = list(domains), list(tasks), ndcg_at, group
        self._chunks: dict[str, list[dict[str, np.ndarray]]] = {task: [] for task in tasks}
        self._bad: dict[str, tuple[int, int]] = dict.fromkeys(tasks, (0, -1))

    def add(
        self,
        task: str,
        scores: Tensor,
        labels: Tensor,
        gains: Tensor,
        valid: Tensor,
        domain: Tensor,
        user: Tensor,
        query: Tensor,
        row: Tensor,
    ) -> None:
        """Keep the valid rows of one local batch. Local: ranks may call it unequally often.

        Args:
            task: one of `tasks`.
            scores: float `[B]`, probabilities.
            labels: float `[B]`, soft targets in 0..1 (graded label / maximum).
            gains: float `[B]`, raw graded labels, >= 0.
            valid: bool `[B]`, False on masked rows and missing labels.
            domain: int64 `[B]`.
            user: int64 `[B]`, -1 where unknown.
            query: int64 `[B]`, -1 where unknown.
            row: int64 `[B]`, row numbers, which only name a faulty row in an error.

        Raises:
            ValueError: unknown task, unequal lengths, a domain that is none.
        """
        if task not in self._chunks:
            raise ValueError(f"task {task!r} is none of {self.tasks}")
        columns = {
            "score": to_numpy(scores, np.float64),
            "label": to_numpy(labels, np.float64),
            "gain": to_numpy(gains, np.float64),
            "domain": to_numpy(domain, np.int64),
            "user": to_numpy(user, np.int64),
            "query": to_numpy(query, np.int64),
            "row": to_numpy(row, np.int64),
        }
        mask = to_numpy(valid, np.bool_)
        shapes = {name: column.shape for name, column in columns.items()} | {"valid": mask.shape}
        if len(set(shapes.values())) != 1 or mask.ndim != 1:
            raise ValueError(f"task {task!r}: all arguments must be [B], got {shapes}")
        columns = {name: column[mask] for name, column in columns.items()}
        found = columns["domain"]
        if len(found) and (found.min() < 0 or found.max() >= len(self.domains)):
            raise ValueError(f"task {task!r}: domains {found.min()}..{found.max()}, but there are {len(self.domains)}")
        rows = columns.pop("row")
        good = (columns["score"] >= 0) & (columns["score"] <= 1)
        good &= (columns["label"] >= 0) & (columns["label"] <= 1)
        good &= (columns["gain"] >= 0) & np.isfinite(columns["gain"])
        if not good.all():
            count, first = self._bad[task]
            self._bad[task] = (count + int((~good).sum()), first if count else int(rows[~good][0]))
        columns["domain"] = columns["domain"].astype(np.int32)
        self._chunks[task].append(columns)

    def compute(self) -> dict[str, Any]:
        """All metrics of all rows on all ranks. Collective; may be called again after more `add`.

        Returns:
            `{"overall": {task: {metric: value}}, "domains": {name: {task: {metric: value}}}}`, the
            same on every rank, ready for JSON.

        Raises:
            UserError: on every rank, where a score is no probability or a label is out of range.
        """
        exchange = Exchange(self.group)
        self._refuse_faulty(exchange)
        result = {"overall": {}, "domains": {name: {} for name in self.domains}}
        for task in self.tasks:
            metrics = self._compute_task(exchange, self._columns(task))
            for name, values in zip(self.domains, metrics, strict=False):
                result["domains"][name][task] = values
            result["overall"][task] = metrics[-1]
        return result

    def _refuse_faulty(self, exchange: Exchange) -> None:
        faults = exchange.gather(np.array([self._bad[task] for task in self.tasks], dtype=np.int64).reshape(-1, 2))
        for position, task in enumerate(self.tasks):
            count = int(faults[:, position, 0].sum())
            if count:
                rank = int(np.flatnonzero(faults[:, position, 0])[0])
                raise UserError(
                    f"task {task!r}: {count} rows cannot be evaluated, the first on rank {rank} is row "
                    f"{faults[rank, position, 1]} of the data set: its score is no probability (NaN or outside 0..1) "
                    "or its label is outside 0..maximum. NaN scores mean that the model has diverged: go back to an "
                    "earlier checkpoint and lower dense.learning_rate or tables.learning_rate; for labels, run "
                    "`dist-rec shards verify`."
                )

    def _columns(self, task: str) -> dict[str, np.ndarray]:
        """The task's rows as one array a column; the batches are given up for it."""
        chunks = self._chunks[task]
        if not chunks:
            kinds = dict.fromkeys(("score", "label", "gain"), np.float64)
            kinds |= {"domain": np.int32, "user": np.int64, "query": np.int64}
            return {name: np.empty(0, dtype=kind) for name, kind in kinds.items()}
        if len(chunks) > 1:
            whole = {}
            for name in list(chunks[0]):
                whole[name] = np.concatenate([chunk.pop(name) for chunk in chunks])
            self._chunks[task] = [whole]
        return self._chunks[task][0]

    def _compute_task(self, exchange: Exchange, rows: dict[str, np.ndarray]) -> list[Metrics]:
        """Metrics by domain, and overall as the last entry."""
        score, label, domain = rows["score"], rows["label"], rows["domain"]
        positive = label >= 0.5
        clipped = np.clip(score, CLIP, 1 - CLIP)
        loss = -(label * np.log(clipped) + (1 - label) * np.log1p(-clipped))
        local = {
            "count": self._by_domain(domain, np.stack([np.ones_like(domain), positive], axis=1)),
            "label": self._by_domain(domain, fixed(label)),
            "score": self._by_domain(domain, fixed(score)),
            "loss": self._by_domain(domain, fixed(loss)),
        }
        del clipped, loss
        local["gauc"] = self._grouped_auc(exchange, rows["user"], domain, score, positive)
        local["ndcg"] = self._ndcg(exchange, rows["query"], domain, score, rows["gain"])
        sums = dict(zip(local, exchange.sum(np.stack([_pad3(table) for table in local.values()])), strict=True))
        auc = self._auc(exchange, domain, score, positive)
        return [self._row(sums, auc, position) for position in range(len(self.domains) + 1)]

    def _row(self, sums: dict[str, np.ndarray], auc: list[float | None], at: int) -> Metrics:
        count, positives, _ = (int(v) for v in sums["count"][at])
        mean_label, mean_score = mean(sums["label"][at], count), mean(sums["score"][at], count)
        return {
            "rows": count,
            "positives": positives,
            "auc": auc[at],
            "gauc": mean(sums["gauc"][at], int(sums["gauc"][at][2])),
            "logloss": mean(sums["loss"][at], count),
            "calibration": mean_score / mean_label if mean_label else None,
            f"ndcg@{self.ndcg_at}": mean(sums["ndcg"][at], int(sums["ndcg"][at][2])),
            "mean_label": mean_label,
            "mean_score": mean_score,
        }

    def _by_domain(self, domain: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Integer sums `[D + 1, c]` of `values` `[n, c]` by domain, and overall in the last row."""
        table = np.zeros((len(self.domains) + 1, values.shape[1]), dtype=np.int64)
        for column in range(values.shape[1]):
            np.add.at(table[:, column], domain, values[:, column])
        table[-1] = table.sum(axis=0)
        return table

    def _auc(
        self, exchange: Exchange, domain: np.ndarray, score: np.ndarray, positive: np.ndarray
    ) -> list[float | None]:
        """AUC by domain, and overall last.

        With all rows in score order over the ranks, twice the number of concordant pairs is the sum
        over ties of positives x (2 x negatives below + negatives in the tie): an integer, exact below
        four billion rows.
        """
        (domain,), score, counts = _merge_ties((domain,), score, _classes(positive))
        ranks = np.searchsorted(exchange.split_points(score), score, side="right")
        columns = exchange.route(ranks, [domain, score, *counts.T])
        domain, score, counts = columns[0], columns[1], np.stack(columns[2:], axis=1)

        local = np.zeros((len(self.domains) + 1, 3), dtype=np.int64)
        for keys in (domain, np.full_like(domain, len(self.domains))):
            (key,), _, merged = _merge_ties((keys,), score, counts)
            (group,), pairs, classes = _concordance((key,), merged)
            local[group] = np.column_stack([pairs, classes])
        by_rank = exchange.gather(local)
        negatives_below = np.cumsum(by_rank[:, :, 2], axis=0) - by_rank[:, :, 2]
        pairs = (by_rank[:, :, 0] + 2 * by_rank[:, :, 1] * negatives_below).sum(axis=0)
        positives, negatives = by_rank[:, :, 1].sum(axis=0), by_rank[:, :, 2].sum(axis=0)
        return [
            int(twice) / (2 * int(p) * int(n)) if p and n else None
            for twice, p, n in zip(pairs, positives, negatives, strict=True)
        ]

    def _grouped_auc(
        self, exchange: Exchange, user: np.ndarray, domain: np.ndarray, score: np.ndarray, positive: np.ndarray
    ) -> np.ndarray:
        """Local sums `[D + 1, 3]`: AUC x rows in fixed point (two columns), and rows."""
        known = user != -1
        user, domain, score, positive = user[known], domain[known], score[known], positive[known].astype(np.uint8)
        user, domain, score, positive = exchange.route(exchange.hashed(user), [user, domain, score, positive])

        def weighted(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            tied, _, counts = _merge_ties(keys, score, _classes(positive))
            groups, pairs, classes = _concordance(tied, counts)
            both = (classes > 0).all(axis=1)
            weight = classes[both].sum(axis=1)
            auc = pairs[both] / (2.0 * classes[both].prod(axis=1))
            return groups[0][both], np.column_stack([fixed(auc * weight), weight])

        return self._cut_and_whole(weighted, domain, user)

    def _ndcg(
        self, exchange: Exchange, query: np.ndarray, domain: np.ndarray, score: np.ndarray, gain: np.ndarray
    ) -> np.ndarray:
        """Local sums `[D + 1, 3]`: NDCG in fixed point (two columns), and queries."""
        known = query != -1
        query, domain, score, gain = query[known], domain[known], score[known], gain[known]
        query, domain, score, gain = exchange.route(exchange.hashed(query), [query, domain, score, gain])

        def averaged(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            groups, values = _ndcg(keys, score, gain, self.ndcg_at)
            return groups[0], np.column_stack([fixed(values), np.ones(len(values), dtype=np.int64)])

        return self._cut_and_whole(averaged, domain, query)

    def _cut_and_whole(self, measure, domain: np.ndarray, key: np.ndarray) -> np.ndarray:
        """`measure` of the groups (domain, key) summed by domain, and of the groups (key) in the last row."""
        table = self._by_domain(*measure(domain, key))
        table[-1] = measure(key)[1].sum(axis=0)
        return table


def to_numpy(values: Tensor, kind: type) -> np.ndarray:
    values = torch.as_tensor(values).detach().cpu()
    if values.dtype == torch.bfloat16:
        values = values.float()
    return values.numpy().astype(kind)


def fixed(values: np.ndarray) -> np.ndarray:
    """Reals as two int64 columns, coarse x 2^-24 + fine x 2^-56, whose sums do not depend on order.

    For sums of up to 2^31 rows with |value| below 2^29 each and 2^38 together; the error is 2^-57 a value.
    """
    coarse = np.rint(values * COARSE)
    fine = np.rint((values - coarse / COARSE) * FINE)
    return np.column_stack([coarse, fine]).astype(np.int64)


def mean(sums: np.ndarray, count: int) -> float | None:
    """Mean from the two columns of `fixed`."""
    if count == 0:
        return None
    return (int(sums[0]) * int(FINE / COARSE) + int(sums[1])) / (int(FINE) * count)


def _pad3(table: np.ndarray) -> np.ndarray:
    return np.pad(table, ((0, 0), (0, 3 - table.shape[1])))


def _classes(positive: np.ndarray) -> np.ndarray:
    """Counts `[n, 2]` of positives and negatives, of rows."""
    positive = positive.astype(np.int64)
    return np.column_stack([positive, 1 - positive])


def _order(*columns: np.ndarray) -> np.ndarray:
    """What sorts rows by the first column, then the next, and so on; rows equal in all are in any order.

    A fifth faster than `np.lexsort` at four million rows: the first pass need not be stable, domains go by radix.
    """
    *rest, last = columns
    order = np.argsort(last)
    for column in reversed(rest):
        column = column[order]
        if column.dtype == np.int32 and column.max(initial=0) < 2**16 and column.min(initial=0) >= 0:
            column = column.astype(np.uint16)
        order = order[np.argsort(column, kind="stable")]
    return order


def _starts(*columns: np.ndarray) -> np.ndarray:
    """Where runs of equal rows begin."""
    new = np.zeros(len(columns[0]), dtype=bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(new)


def _lengths(starts: np.ndarray, total: int) -> np.ndarray:
    return np.diff(np.append(starts, total))


def _merge_ties(
    keys: tuple[np.ndarray, ...], score: np.ndarray, counts: np.ndarray
) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]:
    """Rows of equal keys and score become one, in ascending order of (keys, score), their counts summed."""
    order = _order(*keys, score)
    keys, score = tuple(key[order] for key in keys), score[order]
    first = _starts(*keys, score)
    return tuple(key[first] for key in keys), score[first], np.add.reduceat(counts[order], first, axis=0)


def _concordance(
    keys: tuple[np.ndarray, ...], counts: np.ndarray
) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]:
    """Of what `_merge_ties` gave: the groups of equal keys, twice their concordant pairs, their class counts."""
    group = _starts(*keys)
    positives, negatives = counts.T
    below = np.cumsum(negatives) - negatives
    below -= np.repeat(below[group], _lengths(group, len(below)))
    pairs = np.add.reduceat(positives * (2 * below + negatives), group)
    return tuple(key[group] for key in keys), pairs, np.add.reduceat(counts, group, axis=0)


def _ndcg(
    keys: tuple[np.ndarray, ...], score: np.ndarray, gain: np.ndarray, k: int
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The groups of equal keys that have a positive gain, and NDCG@k of each.

    Gains are scaled by 2^-(the group's best), which cancels in the ratio and keeps 2^g finite for any g.
    """
    # Gain is the last sort key so that sums over a tie add in one order, whatever the order of the rows.
    order = _order(*keys, -score, gain)
    keys, score, gain = tuple(key[order] for key in keys), score[order], gain[order]
    total = len(gain)
    group, tie = _starts(*keys), _starts(*keys, score)
    size, tie_size = _lengths(group, total), _lengths(tie, total)
    position = np.arange(total) - np.repeat(group, size)
    best = np.maximum.reduceat(gain, group)
    value = np.exp2(gain - np.repeat(best, size)) - np.exp2(-np.repeat(best, size))

    cut = int(min(k, size.max(initial=0)))
    reached = np.append(0.0, np.cumsum(1 / np.log2(np.arange(cut) + 2.0)))
    first, last = np.minimum(position[tie], cut), np.minimum(position[tie] + tie_size, cut)
    tied = np.add.reduceat(value, tie) / tie_size * (reached[last] - reached[first])
    dcg = np.add.reduceat(tied, np.searchsorted(tie, group))

    ideal = value[_order(np.repeat(np.arange(len(group)), size), -gain)]
    share = reached[np.minimum(position + 1, cut)] - reached[np.minimum(position, cut)]
    ideal_dcg = np.add.reduceat(ideal * share, group)
    kept = best > 0
    return tuple(key[group][kept] for key in keys), dcg[kept] / ideal_dcg[kept]
