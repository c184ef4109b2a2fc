"""Two shops, and what opens later: raw rows and schemas of data sets that extend one another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from toy_shards import TOKENIZER, schema, write

from dist_rec.data.build import build, parse_split

OLD = schema(
    {
        "user": {"role": "user", "kind": "id"},
        "age": {"role": "user", "kind": "dense", "width": 2},
        "query": {"role": "query", "kind": "text"},
        "item": {"role": "item", "kind": "id", "aspect": "id"},
        "tags": {"role": "item", "kind": "ids", "max_length": 3},
        "bucket": {"role": "item", "kind": "id", "column": "item", "vocabulary": {"kind": "hash", "size": 50}},
        "any": {"role": "item", "kind": "id", "column": "item", "vocabulary": {"kind": "raw"}},
        "title": {"role": "item", "kind": "text"},
        "past": {
            "role": "history",
            "kind": "ids",
            "shares": "item",
            "max_length": 4,
            "events": {"of": "item", "label": "click"},
        },
        "titles": {"role": "history", "kind": "texts", "max_length": 4, "events": {"of": "title", "label": "click"}},
    },
    {"click": {}, "grade": {"kind": "graded", "maximum": 3}},
    {"user": "user", "query": "query", "time": "time"},
    ("books", "films"),
)
# What a shop of lamps has: no tags, no ages, no grades, other columns, a feature and a label of its own.
SHOP = {
    "name": "lamps",
    "domains": {"names": ["lamps"]},
    "features": {
        "user": {"column": "customer"},
        "item": {"role": "item", "kind": "id", "column": "sku"},
        "title": {},
        "past": {"events": {"of": "item", "label": "click"}},
        "titles": {"events": {"of": "title", "label": "click"}},
        "colour": {"role": "item", "kind": "id"},
        "seen": {"role": "history", "kind": "ids", "shares": "item"},
    },
    "labels": {"click": {"column": "bought"}, "kept": {}},
    "keys": {"user": "customer", "time": "day"},
}
# And a search domain without users or times.
SEARCH = {
    "name": "search",
    "domains": {"names": ["drills", "saws"], "column": "shop"},
    "features": {"query": {"column": "words"}, "title": {}, "item": {}},
    "labels": {"grade": {}},
    "keys": {"query": "words"},
}


def old_rows(n: int = 60) -> list[dict]:
    draw = np.random.default_rng(0)
    return [
        {
            "domain": ["books", "films"][i % 2],
            "user": None if i % 7 == 0 else f"u{draw.integers(5)}",
            "age": [1.0, float(i)],
            "query": f"find {i % 4}" if i % 3 == 0 else None,
            "item": f"i{draw.integers(12)}",
            "tags": [f"t{draw.integers(6)}" for _ in range(i % 3)],
            "title": f"thing {draw.integers(12)}",
            "click": int(draw.integers(2)),
            "grade": i % 4 if i % 3 == 0 else None,
            "time": i // 3,
        }
        for i in range(n)
    ]


def shop_rows(n: int = 40) -> list[dict]:
    draw = np.random.default_rng(1)
    return [
        {
            "customer": f"{'u' if i % 2 else 'v'}{draw.integers(4)}",
            "sku": f"{'i' if i % 3 else 'new'}{draw.integers(9)}",
            "title": f"{'thing' if i % 3 else 'lamp'} {draw.integers(9)}",
            "colour": ["red", "blue"][i % 2],
            "seen": ["i3", f"late{i % 2}"],
            "bought": int(draw.integers(2)),
            "kept": i % 2,
            "day": 100 + i // 2,
        }
        for i in range(n)
    ]


def search_rows(n: int = 20) -> list[dict]:
    return [
        {
            "shop": ["saws", "drills"][i % 2],
            "words": f"find {i % 6}",
            "item": f"d{i % 5}" if i % 4 else "i1",
            "title": f"drill {i % 5}",
            "grade": i % 4,
        }
        for i in range(n)
    ]


def build_old(folder: Path) -> Path:
    """The two shops' data set, split by time, from its raw tables; both below `folder`."""
    source = write(folder / "rows.parquet", old_rows())
    options = {"workers": 1, "block_rows": 8, "shard_rows": 16, "tokenizer": TOKENIZER, "max_tokens": 9}
    build(OLD, [source], str(folder / "out"), split=parse_split("time:6,2,2"), **options)
    return folder / "out"


def extend(old: Path, folder: Path, name: str, tree: dict, rows: list[dict], **options) -> Path:
    """Build `rows` under the schema `tree` as a data set that extends `old`; both lie below `folder`."""
    source = write(folder / f"{name}.parquet", rows)
    options = {"workers": 1, "block_rows": 8, "shard_rows": 16} | options
    build(tree, [source], str(folder / name), extends=str(old), **options)
    return folder / name
