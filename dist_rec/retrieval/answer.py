"""What an index answers: the best items of some users, and of an index of codes with their exact products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import faiss
import numpy as np

from .graph import ask, products_at
from .index import IndexConfig, rescored
from .parts import Parts

if TYPE_CHECKING:
    from .compact import Gated, SubIndexes


def best_items(
    index: faiss.Index | Gated | SubIndexes, config: IndexConfig, items: Parts, task: str, users: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best items of users.

    Args:
        index: of the task's items, built as `config` says.
        users: float32 `[Q, D]`.
        k: how many; fewer where there are not so many items.

    Returns:
        Positions int64 and inner products `[Q, k]`, best first; position -1 and -inf where an index finds fewer.
    """
    times, k = rescored(config), min(k, index.ntotal)
    products, positions = ask(index, users, min(times * k, index.ntotal))
    if times == 1:
        return positions, products
    products = products_at(users, positions, lambda at: items.vectors_at(at, task))
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(positions, order, 1), np.take_along_axis(products, order, 1)
