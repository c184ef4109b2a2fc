"""Paired bootstrap between two runs: is one better at ranking for the same users, beyond the luck of who was asked?

Users are drawn anew with replacement, each with all their rows and with what *both* runs say of them, and the
difference of the runs' means is taken, RESAMPLES times. Its 2.5 and 97.5 percentiles are the interval; the two-sided
p is twice the smaller share of resamples on either side of 0, those at 0 being on both, so that p < 0.05 where the
interval leaves out 0 (one is added to each count: p is never 0). It says what other users of this population would
show with these two models: not what other seeds would, for which see `bench.compare`. Nothing is corrected for the
number of metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .ranking import RowRanks, rank_metrics
from .row_ranks import Evaluated

RESAMPLES, SEED = 10_000, 0
INTERVAL = (2.5, 97.5)
# Counts of drawn users that are held at once: 16 bytes each.
CELLS = 4_000_000


@dataclass
class Pairs:
    """n rows that both runs have a place of.

    Attributes:
        domains: names; `domain` is a position in this list.
        domain, user: int `[n]`; an unknown user is one that no other row has, equal in all pairs of a data set's runs.
        ours, other: float64 `[n]`, places.
        unranked: rows without a place in either run, left out.
        by: what rows were recognised by, `row` or `user`.
    """

    domains: list[str]
    domain: np.ndarray
    user: np.ndarray
    ours: np.ndarray
    other: np.ndarray
    unranked: int
    by: str


def pair(ours: tuple[RowRanks, Evaluated], other: tuple[RowRanks, Evaluated]) -> Pairs:
    """Put the two runs' places of each row side by side.

    The same data set is known by its fingerprint, and its rows by their numbers. In two data sets, which may be of
    the same raw data in other shards, a row is its domain and user, if no user has two rows of a domain.

    Raises:
        UserError: the rows are not the same, or cannot be told apart, or are ranked by other rules.
    """
    (mine, about), (theirs, about_theirs) = ours, other
    differing = [
        k
        for k in sorted(about.protocol.keys() | about_theirs.protocol.keys())
        if about.protocol.get(k) != about_theirs.protocol.get(k)
    ]
    if differing:
        said = ", ".join(
            f"{k} {about.protocol.get(k)} here and {about_theirs.protocol.get(k)} there" for k in differing
        )
        raise UserError(f"the two runs do not rank by the same rules: {said}. Evaluate both alike.")
    if about.data == about_theirs.data:
        keys, by = [mine.row, theirs.row], "row"
    else:
        keys, by = _users(mine, theirs), "user"
    places = [np.argsort(key) for key in keys]
    sorted_keys = [key[at] for key, at in zip(keys, places, strict=True)]
    if not np.array_equal(*sorted_keys):
        common = len(np.intersect1d(*sorted_keys))
        raise UserError(
            f"the two runs were not evaluated on the same {about.split} rows: {len(keys[0]):,} rows here, "
            f"{len(keys[1]):,} there, {common:,} of them in both. Evaluate both on one data set."
        )
    at, at_theirs = places
    first, second = mine.rank[at], theirs.rank[at_theirs]
    known = ~(np.isnan(first) | np.isnan(second))
    at = at[known]
    # Users are not negative.
    user = np.where(mine.user == -1, -1 - mine.row, mine.user)[at]
    return Pairs(mine.domains, mine.domain[at], user, first[known], second[known], int((~known).sum()), by)


def together(several: Sequence[Pairs]) -> Pairs:
    """The pairs of several runs on one data set, such as those of several seeds, as one: a user is drawn with the rows
    of all of them, and a mean is over all of them."""
    first, columns = several[0], ("domain", "user", "ours", "other")
    joined = {name: np.concatenate([getattr(pairs, name) for pairs in several]) for name in columns}
    return Pairs(first.domains, **joined, unranked=sum(pairs.unranked for pairs in several), by=first.by)


def _users(mine: RowRanks, theirs: RowRanks) -> list[np.ndarray]:
    """A key of each row of either side, equal where domain and user are."""
    names = {name: n for n, name in enumerate(dict.fromkeys([*mine.domains, *theirs.domains]))}
    pairs = []
    for where, ranks in (("here", mine), ("there", theirs)):
        if (ranks.user == -1).any():
            raise UserError(
                "the two runs read different data sets, and rows without a user (keys.user of the schema) cannot be "
                f"recognised: {int((ranks.user == -1).sum()):,} {where}. Evaluate both on one data set."
            )
        domain = np.array([names[name] for name in ranks.domains], np.int64)[ranks.domain]
        pairs.append(np.column_stack([domain, ranks.user]))
    _, key = np.unique(np.concatenate(pairs), axis=0, return_inverse=True)
    key = key.reshape(-1)
    keys = [key[: len(mine)], key[len(mine) :]]
    if any(len(np.unique(one)) < len(one) for one in keys):
        raise UserError(
            "the two runs read different data sets, and users have several rows, which cannot be told apart: evaluate "
            "both on one data set."
        )
    return keys


def compare(pairs: Pairs, at: Sequence[int], resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, Any]:
    """The paired bootstrap of every metric, of all rows and by domain.

    Returns:
        `overall` and `domains` (those with rows): each with `rows`, `users` and by metric `ours`, `other`,
        `difference` (ours - other), `low`, `high`, `p`; and `resamples`, `seed`, `paired_by`, `unranked`.
    """
    user = pairs.user
    ours, other = (rank_metrics(rank, at) for rank in (pairs.ours, pairs.other))

    def told(rows: np.ndarray) -> dict[str, Any]:
        units, unit = np.unique(user[rows], return_inverse=True)
        counts = np.bincount(unit)
        sums = [np.column_stack([np.bincount(unit, weights=v[rows]) for v in s.values()]) for s in (ours, other)]
        found = {"ours": sums[0], "other": sums[1], "difference": sums[0] - sums[1]}
        found = {name: column.sum(axis=0) / counts.sum() for name, column in found.items()}
        found |= bootstrap(sums[0] - sums[1], counts, resamples, seed)
        metrics = {name: {key: float(column[n]) for key, column in found.items()} for n, name in enumerate(ours)}
        return {"rows": int(counts.sum()), "users": len(units), "metrics": metrics}

    whole = np.ones(len(user), bool)
    if not len(user):
        raise UserError("the two runs have no row that both give a place.")
    present = [(name, pairs.domain == n) for n, name in enumerate(pairs.domains)]
    return {
        "resamples": resamples,
        "seed": seed,
        "paired_by": pairs.by,
        "unranked": pairs.unranked,
        "overall": told(whole),
        "domains": {name: told(rows) for name, rows in present if rows.any()},
    }


def bootstrap(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Interval and p of means over rows, by drawing units anew.

    Args:
        sums: float64 `[U, M]`, each unit's differences summed over its rows.
        counts: int64 `[U]`, each unit's rows.
        resamples: how often U units are drawn with replacement.
        seed: of the draws.

    Returns:
        `low`, `high` and `p`, float64 `[M]` each.
    """
    draw, units = np.random.default_rng(seed), len(sums)
    both = np.column_stack([sums, counts])
    means = np.empty((resamples, sums.shape[1]))
    at_once = max(CELLS // units, 1)
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        drawn = draw.integers(0, units, (size, units)) + np.arange(size)[:, None] * units
        times = np.bincount(drawn.reshape(-1), minlength=size * units).reshape(size, units)
        # Row by row: a product of matrices may round otherwise by their heights.
        totals = np.stack([row @ both for row in times])
        means[start : start + size] = totals[:, :-1] / totals[:, -1:]
    low, high = np.percentile(means, INTERVAL, axis=0)
    side = 1 + np.minimum((means <= 0).sum(axis=0), (means >= 0).sum(axis=0))
    return {"low": low, "high": high, "p": np.minimum(2 * side / (resamples + 1), 1.0)}
