"""How good retrieved items are: against held-out positives, of the index, of exact scoring and of popularity.

    recall@k = |best k of the user and P| / |P|        P: the user's held-out items whose label of the task is positive
    NDCG@k   = DCG@k / DCG of the best order, with gains of 0 and 1
    popularity: items by how many positive rows training has of each

Means over users with a positive. What a user had in training is no answer and no positive: the best k are of the
others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from ..data.reader import ShardReader
from ..schema import Schema
from .answer import best_items
from .compact import Gated, SubIndexes
from .entities import item_keys
from .index import IndexConfig, exact_top
from .parts import Parts

# Users that are asked for together.
ASKED = 512
# Of those of whom something is held out, as many, evenly chosen, stand for all.
MOST_USERS = 20_000


@dataclass(frozen=True)
class Seen:
    """Who had what in a data set: row j is user `user[j]` and item `item[j]`, int64 `[n]` positions in the export.

    Attributes:
        positive: by task, bool `[n]`.
        strangers: rows of users or items that the export lacks.
    """

    user: np.ndarray
    item: np.ndarray
    positive: dict[str, np.ndarray]
    strangers: int


def read_seen(
    reader: ShardReader,
    schema: Schema,
    item: str,
    users: np.ndarray,
    items: np.ndarray,
    labels: Mapping[str, str | None],
) -> Seen:
    """All rows of a data set that have a user and an item.

    Args:
        reader: decoding `item`.
        item: the feature that tells items apart.
        users, items: int64, the keys of the export's users and ids of its items, in their positions.
        labels: of each task; None where every row is a positive.
    """
    keys, parts, strangers = item_keys(schema, item), [], 0
    place_user, place_item = _places(users), _places(items)
    for number in range(len(reader.places)):
        rows = reader.rows(number)
        user, of_item = place_user(rows.keys["user"]), place_item(keys(rows))
        there = (user >= 0) & (of_item >= 0)
        strangers += int((~there).sum())
        positive = [
            # A missing label is no positive.
            there if label is None else rows.labels[label] >= schema.labels[label].maximum / 2
            for label in labels.values()
        ]
        parts.append(np.stack([user, of_item, *positive])[:, there])
    found = np.concatenate(parts, axis=1)
    return Seen(found[0], found[1], {t: found[2 + n] > 0 for n, t in enumerate(labels)}, strangers)


def _places(keys: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    order = np.argsort(keys)
    ascending = keys[order]

    def place(wanted: np.ndarray) -> np.ndarray:
        at = np.searchsorted(ascending, wanted).clip(max=len(ascending) - 1)
        return np.where(ascending[at] == wanted, order[at], -1)

    return place


def judge(
    index: faiss.Index | Gated | SubIndexes,
    config: IndexConfig,
    users: Parts,
    items: Parts,
    task: str,
    train: Seen,
    held_out: Seen,
    k: int,
) -> dict[str, Any]:
    """What users are answered, against what they had later.

    Returns:
        `recall_at_<k>` and `ndcg_at_<k>` of `index`, of `exact` (the inner product of every item) and of `popularity`;
        the `users` and `positives` judged by; and of how many held-out rows the export lacks user or item
        (`strangers`).
    """
    count = len(items)
    had = np.unique(train.user * count + train.item)
    wanted = np.unique((held_out.user * count + held_out.item)[held_out.positive[task]])
    wanted = wanted[~np.isin(wanted, had, assume_unique=True)]
    judged = np.unique(wanted // count)
    if len(judged) > MOST_USERS:
        judged = judged[np.linspace(0, len(judged) - 1, MOST_USERS).astype(np.int64)]
        wanted = wanted[np.isin(wanted // count, judged)]
    told: dict[str, Any] = {"users": len(judged), "positives": len(wanted), "strangers": held_out.strangers}
    if not len(judged):
        return told
    popular = np.argsort(-np.bincount(train.item[train.positive[task]], minlength=count), kind="stable")
    in_training = np.bincount(had // count, minlength=len(users))
    found: dict[str, list[np.ndarray]] = {"index": [], "exact": [], "popularity": []}
    # Users who had about as much: each is asked for as many more answers.
    judged = judged[np.argsort(in_training[judged], kind="stable")]
    for start in range(0, len(judged), ASKED):
        some = judged[start : start + ASKED]
        vectors = users.vectors_at(some, task)
        enough = min(k + int(in_training[some].max()), count)
        answers = {
            "index": best_items(index, config, items, task, vectors, enough)[0],
            "exact": exact_top(vectors, enough, items.vectors(task))[1],
            "popularity": np.broadcast_to(popular[:enough], (len(some), enough)),
        }
        for name, positions in answers.items():
            found[name].append(_scores(some, positions, count, had, wanted, k))
    for name, parts in found.items():
        recall, ndcg = np.concatenate(parts, axis=1).mean(1)
        told[name] = {f"recall_at_{k}": round(float(recall), 6), f"ndcg_at_{k}": round(float(ndcg), 6)}
    return told


def _scores(
    users: np.ndarray, positions: np.ndarray, count: int, had: np.ndarray, wanted: np.ndarray, k: int
) -> np.ndarray:
    """Recall and NDCG of each user, `[2, Q]`, of positions `[Q, m]`, best first, -1 for none."""
    codes = users[:, None] * count + positions
    left_out = (positions < 0) | np.isin(codes, had)
    order = np.argsort(left_out, axis=1, kind="stable")[:, :k]
    hits = np.isin(np.take_along_axis(codes, order, 1), wanted) & ~np.take_along_axis(left_out, order, 1)
    number = np.searchsorted(wanted, (users + 1) * count) - np.searchsorted(wanted, users * count)
    gains = 1 / np.log2(np.arange(k) + 2)
    ideal = gains.cumsum()[np.minimum(number, k) - 1]
    return np.stack([hits.sum(1) / number, hits @ gains[: hits.shape[1]] / ideal])
