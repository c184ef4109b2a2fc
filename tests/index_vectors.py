"""Clustered vectors to index, and the parts in which ranks write them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from dist_rec.retrieval.parts import Parts, PartWriter, as_lists, vector_column

COUNT, WIDTH = 3000, 24


def clustered(count: int = COUNT, seed: int = 0) -> np.ndarray:
    """Vectors around fifty centres, of different lengths."""
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((50, WIDTH))
    found = centres[draw.integers(0, 50, count)] + 0.4 * draw.standard_normal((count, WIDTH))
    return found.astype(np.float32)


def pieces(vectors: np.ndarray, size: int = 700):
    return lambda: (vectors[at : at + size] for at in range(0, len(vectors), size))


def write_parts(folder, vectors: dict[str, np.ndarray], ranks: int, key: bool) -> Parts:
    """Items or users of several ranks, in order."""
    count = len(next(iter(vectors.values())))
    for rank in range(ranks):
        mine = np.arange(count * rank // ranks, count * (rank + 1) // ranks)
        writer = PartWriter(folder, rank)
        for some in np.array_split(mine, 3):
            columns = {"id": pa.array([f"n{i}" for i in some]), "domain": pa.array(["d"] * len(some))}
            columns |= {"key": pa.array(some)} if key else {"title": pa.array([f"title {i}" for i in some])}
            columns |= {vector_column(t): as_lists(v[some]) for t, v in vectors.items()}
            writer.write(pa.RecordBatch.from_pydict(columns))
        writer.close()
    return Parts(folder)
