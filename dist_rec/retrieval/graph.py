"""HNSW by inner product, as a graph of nearest neighbours.

In a graph by inner product vectors of unequal lengths are everybody's best or nobody's, and those no search reaches,
however wide. One more number makes them equally long (Bachrach et al., RecSys'14), and the nearest is then the one
with the largest product:

    x -> (x, sqrt(M^2 - |x|^2)), M the longest;   q -> (q, 0);   |q - x|^2 = |q|^2 + M^2 - 2 <q, x>

The file is FAISS's own, padding of the query and then HNSW by L2, so that FAISS alone answers in the right order, with
distances. `ask` gives products, of the vectors that the graph holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import faiss
import numpy as np

# Of vectors read back at a time, numbers.
NUMBERS = 2**24


def build_graph(
    width: int, links: int, build_width: int, search_width: int, vectors: Callable[[], Iterator[np.ndarray]]
) -> faiss.IndexPreTransform:
    """A graph of vectors, which are read twice.

    Args:
        width: D.
        links, build_width, search_width: as in `index.IndexConfig`.
        vectors: float32 `[n, D]` pieces, in order, whenever it is called.
    """
    longest = max((float(_squares(piece).max(initial=0.0)) for piece in vectors()), default=0.0)
    graph = faiss.IndexHNSWFlat(width + 1, links, faiss.METRIC_L2)
    graph.hnsw.efConstruction, graph.hnsw.efSearch = build_width, search_width
    for piece in vectors():
        rest = np.sqrt(np.maximum(longest - _squares(piece), 0.0))
        graph.add(np.ascontiguousarray(np.column_stack([piece, rest]), np.float32))
    return faiss.IndexPreTransform(faiss.RemapDimensionsTransform(width, width + 1, False), graph)


def _squares(piece: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", piece, piece, dtype=np.float64)


def graph_of(index: Any) -> faiss.IndexHNSWFlat | None:
    """The graph inside what `build_graph` made; None of any other index."""
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else None


def ask(index: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """What an index answers.

    Args:
        index: FAISS's, by inner product or of `build_graph`, or one of `compact`.
        queries: float32 `[Q, D]`.
        k: not more than it has.

    Returns:
        Inner products float32 and positions int64 `[Q, k]`, best first; -inf and -1 where it finds fewer.
    """
    products, positions = index.search(np.ascontiguousarray(queries, np.float32), k)
    graph = graph_of(index)
    if graph is not None:
        storage = faiss.downcast_index(graph.storage)
        held = faiss.rev_swig_ptr(storage.get_xb(), storage.ntotal * storage.d).reshape(storage.ntotal, storage.d)
        products = products_at(queries, positions, lambda at: held[at, :-1])
    return np.where(positions < 0, -np.inf, products).astype(np.float32), positions


def products_at(
    queries: np.ndarray, positions: np.ndarray, vectors_at: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Inner products of queries and the vectors at some positions, a few queries at a time.

    Args:
        queries: float32 `[Q, D]`.
        positions: int64 `[Q, k]`, -1 for none.
        vectors_at: of positions int64 `[n]` the vectors, `[n, D]`.

    Returns:
        float32 `[Q, k]`, -inf where there is none.
    """
    products = np.empty(positions.shape, np.float32)
    high = max(NUMBERS // max(positions.shape[1] * queries.shape[1], 1), 1)
    for start in range(0, len(queries), high):
        rows = slice(start, start + high)
        distinct, back = np.unique(positions[rows], return_inverse=True)
        # Position -1, of nobody, is the first there where there is any.
        vectors = vectors_at(np.maximum(distinct, 0))[back.reshape(positions[rows].shape)]
        products[rows] = np.einsum("qd,qkd->qk", queries[rows], vectors)
    return np.where(positions < 0, -np.inf, products)
