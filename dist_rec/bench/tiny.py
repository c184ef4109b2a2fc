"""A tiny invented data set of two domains, for measurements that are not about data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.build import build
from ..schema import Schema
from ..strict import from_dict

USER = {"role": "user", "kind": "id"}
SCHEMA = {
    "name": "tiny",
    "domains": {"names": ["large", "small"]},
    "features": {
        "user_id": USER,
        "history": {"role": "history", "kind": "ids", "shares": "item_id", "max_length": 8},
        "item_id": {"role": "item", "kind": "id"},
        "price": {"role": "item", "kind": "dense"},
    },
    "labels": {"ctr": {}},
    "keys": {"user": "user_id"},
}


def invent(folder: Path, rows: int, seed: int, users: int) -> str:
    """A data set below `folder` whose table of users has `users` rows; returns its root."""
    draw = np.random.default_rng(seed)
    vocabulary = {"kind": "integer", "size": users}
    table = pa.table(
        {
            "domain": np.where(draw.random(rows) < 0.8, "large", "small"),
            "user_id": draw.integers(0, users, rows),
            "history": pa.array([draw.integers(0, 500, draw.integers(0, 8)).tolist() for _ in range(rows)]),
            "item_id": draw.integers(0, 500, rows),
            "price": draw.random(rows).astype(np.float32),
            "ctr": draw.integers(0, 2, rows).astype(np.float32),
        }
    )
    pq.write_table(table, folder / "raw.parquet")
    tree = SCHEMA | {"features": SCHEMA["features"] | {"user_id": {**USER, "vocabulary": vocabulary}}}
    schema = from_dict(Schema, tree, "tiny")
    build(schema, [str(folder / "raw.parquet")], str(folder / "data"), block_rows=64, shard_rows=128, workers=1)
    return str(folder / "data")
