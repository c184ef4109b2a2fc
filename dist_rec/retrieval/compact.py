"""Items as E_T and the weights w of their kernels, instead of the concatenation of w_k E_T, K times as wide.

    score = <concat_k E_u^k, concat_k w_k E_T> = sum_k w_k <E_u^k, E_T>

`Gated` compares every item with every query: for ranking what is there. `SubIndexes` are for the arg-max gate, whose
weights are 1 for one kernel and 0 for the others: an item is in the index of its kernel, where E_u^k looks for it. Both
answer as an index of the concatenation would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np

from ..errors import UserError
from .graph import ask
from .index import PER_CENTROID, IndexConfig, build_index, exact_top
from .parts import Parts

SUFFIX = ".npz"


class Gated:
    """n items, all compared with every query.

    Args:
        rows: float32 `[n, d + K]`, E_T and the weights.
        kernels: K.
    """

    def __init__(self, rows: np.ndarray, kernels: int) -> None:
        self.rows, self.kernels = rows, kernels
        self.ntotal, self.d = len(rows), kernels * (rows.shape[1] - kernels)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions `[Q, k]` of queries float32 `[Q, K * d]`, best first."""
        best, where, _ = exact_top(queries, k, [self.rows], product=self._product)
        return best, where

    def _product(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """`[Q, n]`."""
        tags, weights = rows[:, : -self.kernels], rows[:, -self.kernels :]
        each = queries.reshape(len(queries) * self.kernels, -1) @ tags.T
        return np.einsum("qkn,nk->qn", each.reshape(len(queries), self.kernels, -1), weights)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"kernels": np.array(self.kernels), "rows": self.rows}


class SubIndexes:
    """An index of E_T for each kernel, of the items that it has.

    Args:
        indexes: by kernel; None of one without items.
        positions: int64, of each kernel's items among all.
    """

    def __init__(self, indexes: list[faiss.Index | None], positions: list[np.ndarray]) -> None:
        self.indexes, self.positions = indexes, positions
        self.ntotal = sum(map(len, positions))
        self.d = len(indexes) * next(index.d for index in indexes if index is not None)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions `[Q, k]` of queries float32 `[Q, K * d]`, best first; -1 where there are fewer."""
        parts = queries.reshape(len(queries), len(self.indexes), -1)
        scores, where = [np.full((len(queries), k), -np.inf, np.float32)], [np.full((len(queries), k), -1, np.int64)]
        for kernel, (index, positions) in enumerate(zip(self.indexes, self.positions, strict=True)):
            if index is None:
                continue
            found, at = ask(index, parts[:, kernel], min(k, index.ntotal))
            scores.append(found)
            where.append(np.where(at < 0, -1, positions[at]))
        all_scores, all_where = np.concatenate(scores, 1), np.concatenate(where, 1)
        order = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(all_scores, order, 1), np.take_along_axis(all_where, order, 1)

    def arrays(self) -> dict[str, np.ndarray]:
        found = {"kernels": np.array(len(self.indexes))}
        for kernel, (index, positions) in enumerate(zip(self.indexes, self.positions, strict=True)):
            found[f"positions-{kernel}"] = positions
            if index is not None:
                found[f"index-{kernel}"] = faiss.serialize_index(index)
        return found


def build_compact(config: IndexConfig, items: Parts, task: str, one_kernel: bool) -> Gated | SubIndexes:
    """The compact index of a task's items.

    Args:
        items: with tags and weights.
        one_kernel: whether each item has one kernel alone, so that there are sub-indexes of the kind in `config`; items
            of which a kernel has too few to learn clusters or codes from are compared one by one.

    Raises:
        UserError: the config cannot be of these items.
    """
    pieces = list(items.gated(task))
    tags, weights = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    kernels = weights.shape[1]
    if not one_kernel:
        if config.kind != "flat":
            raise UserError(
                f"--compact with --index {config.kind}: a softmax gate weighs every kernel of an item, so there is no "
                "index of its vector alone. Leave --index flat, or --compact out."
            )
        return Gated(np.concatenate([tags, weights], axis=1), kernels)
    kernel = weights.argmax(1)
    indexes, positions = [], []
    for number in range(kernels):
        mine = np.flatnonzero(kernel == number)
        positions.append(mine)
        own = config if len(mine) >= PER_CENTROID else replace(config, kind="flat")

        def vectors(mine: np.ndarray = mine) -> Iterator[np.ndarray]:
            yield tags[mine]

        indexes.append(build_index(own, tags.shape[1], len(mine), vectors) if len(mine) else None)
    return SubIndexes(indexes, positions)


def write_compact(index: Gated | SubIndexes, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **index.arrays())


def read_compact(path: Path) -> Gated | SubIndexes:
    """Raises `UserError` where there is none."""
    try:
        with np.load(path) as file:
            found = dict(file)
        kernels = int(found["kernels"])
        if "rows" in found:
            return Gated(found["rows"], kernels)
        blobs = [found.get(f"index-{kernel}") for kernel in range(kernels)]
        indexes = [None if blob is None else faiss.deserialize_index(blob) for blob in blobs]
        return SubIndexes(indexes, [found[f"positions-{kernel}"] for kernel in range(kernels)])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is no compact index: {str(error).splitlines()[0]}") from None
