"""FAISS indexes of inner products, built from a stream of vectors, and exact search to measure them by.

    flat    every vector, compared with every query: exact
    ivf     vectors in clusters; the nearest clusters' are compared: less work
    hnsw    a graph of near vectors, walked: least work, more memory
    pq      vectors as codes of a few bytes: least memory

An index answers with positions of the vectors that it was given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import faiss
import numpy as np
import yaml
from pydantic import Field

from ..errors import UserError
from ..strict import from_dict, strict
from .graph import ask, build_graph, graph_of

if TYPE_CHECKING:
    from .compact import Gated, SubIndexes

# Vectors that a clustering needs of each of its centroids: what FAISS asks for.
PER_CENTROID = 39
# Of a query's scores at most so many exist at a time, all queries together.
SCORES = 2**24
# Scores that differ by less, of the largest, are one score: two ways to add a product up.
ROUNDING = 1e-6
# Where a search begins that is widened until it finds enough.
USUAL_PROBES, USUAL_WIDTH = 4, 64


@strict
class IndexConfig:
    """`--index.KEY VALUE` of `dist-rec export`; 0 takes what suits the vectors.

    * `kind`: flat, ivf, hnsw or pq.
    * `recall`: what ivf's `probes` and hnsw's `search_width` are doubled for, where they are 0 and there are queries.
    * `lists`: clusters of ivf (4 sqrt(n), where there are vectors enough); `probes`: how many of them are searched.
    * `links`: of a vector in hnsw; `build_width`, `search_width`: how wide the graph is searched, building and asking.
    * `codes`: pieces into which pq cuts a vector, which divide its width (a quarter of it, or less); `bits` of each's
      code; `rescored`: of pq's answers so many times as many as are asked for get their exact score from the vectors.
    * `train_rows`: vectors, of the whole, that clusters and codes are learned from.
    """

    kind: Literal["flat", "ivf", "hnsw", "pq"] = "flat"
    recall: float = Field(default=0.95, gt=0, le=1)
    lists: int = Field(default=0, ge=0)
    probes: int = Field(default=0, ge=0)
    links: int = Field(default=32, ge=2)
    build_width: int = Field(default=200, ge=1)
    search_width: int = Field(default=0, ge=0)
    codes: int = Field(default=0, ge=0)
    bits: int = Field(default=0, ge=0, le=12)
    rescored: int = Field(default=4, ge=1)
    train_rows: int = Field(default=262_144, ge=1)

    def resolved(self, count: int, width: int) -> dict[str, int | str]:
        """What is built of `count` vectors of `width`.

        Raises:
            UserError: it cannot be.
        """
        if self.kind == "ivf":
            lists = self.lists or max(min(4 * math.isqrt(count), count // PER_CENTROID), 1)
            if lists > count:
                raise UserError(f"--index.lists is {lists}, and there are {count} vectors: name fewer.")
            return {"kind": "ivf", "lists": lists, "probes": min(self.probes or USUAL_PROBES, lists)}
        if self.kind == "hnsw":
            widths = {"build_width": self.build_width, "search_width": self.search_width or USUAL_WIDTH}
            return {"kind": "hnsw", "links": self.links, **widths}
        if self.kind == "pq":
            codes = self.codes or max(m for m in range(1, max(width // 4, 1) + 1) if width % m == 0)
            if width % codes:
                raise UserError(f"--index.codes is {codes}, which does not divide the vectors' width {width}.")
            if count < 2:
                raise UserError(f"--index pq learns its codes from the vectors, and there is {count}: take flat.")
            bits = self.bits or min(8, int(math.log2(count)))
            if 2**bits > count:
                raise UserError(
                    f"--index.bits is {bits}: its {2**bits} codes are learned from more than {count} vectors."
                )
            return {"kind": "pq", "codes": codes, "bits": bits, "rescored": self.rescored}
        return {"kind": "flat"}


def build_index(
    config: IndexConfig, width: int, count: int, vectors: Callable[[], Iterator[np.ndarray]]
) -> faiss.Index:
    """An index of `count` vectors, read once, and once more where something is learned of them.

    Args:
        vectors: float32 `[n, width]` pieces, in order, whenever it is called.

    Raises:
        UserError: the config cannot be of these vectors.
    """
    sizes = config.resolved(count, width)
    product = faiss.METRIC_INNER_PRODUCT
    if config.kind == "ivf":
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, sizes["lists"], product)
        index.nprobe, index.cp.spherical, index.cp.min_points_per_centroid = sizes["probes"], True, 1
    elif config.kind == "hnsw":
        return build_graph(width, sizes["links"], sizes["build_width"], sizes["search_width"], vectors)
    elif config.kind == "pq":
        index = faiss.IndexPQ(width, sizes["codes"], sizes["bits"], product)
        index.pq.cp.min_points_per_centroid = 1
    else:
        index = faiss.IndexFlatIP(width)
    if not index.is_trained:
        index.train(_every(vectors(), -(-count // config.train_rows)))
    for piece in vectors():
        index.add(np.ascontiguousarray(piece, np.float32))
    return index


def _every(pieces: Iterable[np.ndarray], stride: int) -> np.ndarray:
    """Every `stride`-th vector."""
    found, at = [], 0
    for piece in pieces:
        found.append(piece[-at % stride :: stride])
        at += len(piece)
    return np.ascontiguousarray(np.concatenate(found), np.float32)


def exact_top(
    queries: np.ndarray,
    k: int,
    vectors: Iterable[np.ndarray],
    answers: np.ndarray | None = None,
    product: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda queries, part: queries @ part.T,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The k largest inner products of every query, in one pass over the vectors.

    Args:
        queries: float32 `[Q, D]`.
        k: not more than there are vectors.
        vectors: float32 `[n, D]` pieces, in order.
        answers: int64 `[Q, m]` positions whose scores are wanted too, -1 for none.
        product: what makes scores `[Q, n]` of queries and a piece.

    Returns:
        Scores float32 and positions int64 `[Q, k]`, best first; and the scores of `answers`, -inf of none.
    """
    best = np.full((len(queries), k), -np.inf, np.float32)
    where = np.full((len(queries), k), -1, np.int64)
    of_answers = None if answers is None else np.full(answers.shape, -np.inf, np.float32)
    first, most = 0, max(SCORES // max(len(queries), 1), 1)
    for piece in vectors:
        for start in range(0, len(piece), most):
            part = piece[start : start + most]
            scores = product(queries, part)
            if answers is not None:
                row, column = np.nonzero((answers >= first) & (answers < first + len(part)))
                of_answers[row, column] = scores[row, answers[row, column] - first]
            together = np.concatenate([best, scores], axis=1)
            places = np.concatenate([where, np.broadcast_to(first + np.arange(len(part)), scores.shape)], axis=1)
            top = np.argpartition(-together, k - 1, axis=1)[:, :k]
            best, where = np.take_along_axis(together, top, 1), np.take_along_axis(places, top, 1)
            first += len(part)
    order = np.argsort(-best, axis=1, kind="stable")
    return np.take_along_axis(best, order, 1), np.take_along_axis(where, order, 1), of_answers


def measure(
    index: faiss.Index | Gated | SubIndexes,
    config: IndexConfig,
    queries: np.ndarray,
    k: int,
    vectors: Callable[[], Iterator[np.ndarray]],
    repeats: int = 200,
) -> tuple[dict[str, int], dict[str, Any]]:
    """How good and how fast an index answers, its search first widened as `config` wants it.

    recall@k is the share of its k answers whose exact score is at least that of the k-th best vector: of equal ones it
    may name any.

    Args:
        queries: float32 `[Q, D]`, Q > 0.
        k: all answers, where the index has no more.
        vectors: all of its vectors, in order, whenever it is called.
        repeats: queries that are asked one by one.

    Returns:
        What was chosen (`probes` or `search_width`); and `recall_at_<k>`, `queries` of that, and of the index alone
        `query_ms`, the median of queries asked one by one, and `queries_per_s` asked together.
    """
    asked, k = k, min(k, index.ntotal)
    candidates = min(k * rescored(config), index.ntotal)
    chosen: dict[str, int] = {}
    if config.kind in ("ivf", "hnsw"):
        best, _, _ = exact_top(queries, k, vectors())
        chosen = _widen(index, config, queries, k, _least(best))
    started = time.perf_counter()
    _, answers = ask(index, queries, candidates)
    together = time.perf_counter() - started
    alone = []
    for query in queries[:repeats]:
        started = time.perf_counter()
        ask(index, query[None], candidates)
        alone.append(time.perf_counter() - started)
    best, _, scores = exact_top(queries, k, vectors(), answers)
    return chosen, {
        f"recall_at_{asked}": float((-np.sort(-scores, axis=1)[:, :k] >= _least(best)).mean()),
        "queries": len(queries),
        "query_ms": round(1e3 * float(np.median(alone)), 4),
        "queries_per_s": round(len(queries) / together, 1),
    }


def rescored(config: IndexConfig) -> int:
    """How many times as many answers an index is asked for as are wanted."""
    return config.rescored if config.kind == "pq" else 1


def _least(best: np.ndarray) -> np.ndarray:
    """The score, `[Q, 1]`, that makes a vector one of the k best, given theirs."""
    return best[:, -1:] - ROUNDING * np.abs(best).max(initial=0.0)


def _widen(
    index: faiss.Index | SubIndexes, config: IndexConfig, queries: np.ndarray, k: int, least: np.ndarray
) -> dict[str, int]:
    """Search wider and wider until recall@k is what is wanted; ivf and hnsw answer with exact scores."""
    of_lists, parts = config.kind == "ivf", getattr(index, "indexes", [index])
    if of_lists:
        every = [one for one in parts if isinstance(one, faiss.IndexIVF)]
    else:
        every = [graph for graph in map(graph_of, parts) if graph is not None]
    if not every:
        return {}
    widths = [(one.nprobe, one.nlist) if of_lists else (one.hnsw.efSearch, one.ntotal) for one in every]
    wide, most = (max(sizes) for sizes in zip(*widths, strict=True))
    given = config.probes if of_lists else config.search_width
    while not given and wide < most:
        scores, _ = ask(index, queries, k)
        if (scores >= least).mean() >= config.recall:
            break
        wide = min(2 * wide, most)
        for one, (_, all_of_it) in zip(every, widths, strict=True):
            if of_lists:
                one.nprobe = min(wide, all_of_it)
            else:
                one.hnsw.efSearch = wide
    return {"probes" if of_lists else "search_width": wide}


def write_index(index: faiss.Index, path: Path) -> None:
    faiss.write_index(index, str(path))


def read_index_file(path: Path) -> faiss.Index:
    """Raises `UserError` where there is no index."""
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise UserError(f"{path} is no index that FAISS can read: {str(error).splitlines()[0]}") from None


def parse_index(kind: str, keys: dict[str, str]) -> IndexConfig:
    """`--index KIND --index.KEY VALUE ...`.

    Raises:
        UserError: every key or value that is wrong.
    """
    values = {}
    for key, text in keys.items():
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--index.{key}: {text!r} is no number.") from None
    return from_dict(IndexConfig, values | {"kind": kind}, "--index")
