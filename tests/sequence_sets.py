"""Tiny invented data sets of users' sequences, with their catalogue, and configs that train on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_rec.data.build import build, parse_split
from dist_rec.schema import Schema
from dist_rec.strict import from_dict

NUM_ITEMS, NUM_USERS, WIDTH = 30, 150, 16
DOMAINS = ("books", "films")
WORDS = ("red", "old", "long", "new", "small", "cold", "fast")
SCHEMA = {
    "name": "sequences",
    "domains": {"names": list(DOMAINS)},
    "features": {
        "history": {"role": "history", "kind": "ids", "shares": "item_id", "max_length": 6},
        "history_text": {"role": "history", "kind": "texts", "max_length": 6},
        "item_id": {"role": "item", "kind": "id", "aspect": "id"},
        "title": {"role": "item", "kind": "text"},
    },
    "labels": {"next": {}},
    "keys": {"user": "user"},
}


def title(item: int) -> str:
    return f"{WORDS[item % len(WORDS)]} thing number {item} of {DOMAINS[item % len(DOMAINS)]}"


def item_rows(items: range = range(NUM_ITEMS)) -> list[dict]:
    """The catalogue; the item of the highest number has no text."""
    return [
        {"domain": DOMAINS[i % 2], "item_id": f"i{i}", "title": title(i) if i < NUM_ITEMS - 1 else None} for i in items
    ]


def sequence_rows(users: int = NUM_USERS, seed: int = 0) -> list[dict]:
    """Rows of train, valid and test: items follow one another in steps of 2, now and then not. User 0 has one event."""
    draw, rows = np.random.default_rng(seed), []
    for user in range(users):
        length = 3 if user == 0 else int(draw.integers(4, 9))
        # Domains keep to their own items, which are even or odd.
        first = int(draw.integers(0, NUM_ITEMS - 1))
        steps = np.where(draw.random(length) < 0.2, 2 * draw.integers(1, 9, length), 2)
        items = ((first + np.cumsum(steps)) % (NUM_ITEMS - 2)).tolist()
        for split, stop in (("train", length - 2), ("valid", length - 1), ("test", length)):
            known = items[:stop]
            rows.append(
                {
                    "split": split,
                    "domain": DOMAINS[first % 2],
                    "user": f"u{user}",
                    "history": [f"i{i}" for i in known[:-1]],
                    "history_text": [title(i) for i in known[:-1]],
                    "item_id": f"i{known[-1]}",
                    "title": title(known[-1]),
                    "next": 1.0,
                }
            )
    return rows


def build_sequences(
    folder: Path,
    rows: list[dict] | None = None,
    items: list[dict] | None = None,
    domains: tuple[str, ...] = DOMAINS,
    **options,
) -> str:
    """The data sets train, valid, test and catalogue below `folder`; returns their folder."""
    table = [{"split": "catalogue"} | item for item in (item_rows() if items is None else items)]
    names = ("split", "domain", "user", "history", "history_text", "item_id", "title", "next")
    lists = {"history", "history_text"}
    kinds = [(n, pa.list_(pa.string()) if n in lists else pa.float32() if n == "next" else pa.string()) for n in names]
    folder.mkdir(parents=True, exist_ok=True)
    everything = [{name: row.get(name) for name in names} for row in [*(rows or sequence_rows()), *table]]
    pq.write_table(pa.Table.from_pylist(everything, pa.schema(kinds)), folder / "raw.parquet")
    build(
        from_dict(Schema, SCHEMA | {"domains": {"names": list(domains)}}, "sequences"),
        [str(folder / "raw.parquet")],
        str(folder / "shards"),
        split=parse_split("column:split"),
        block_rows=16,
        shard_rows=64,
        workers=1,
        **options,
    )
    return str(folder / "shards")


def config_of(data: str, store: str, **model) -> dict:
    """A config without dropout, so that any number of ranks computes the same."""
    return {
        "run": {"seed": 5},
        "data": {split: f"{data}/{split}" for split in ("train", "valid", "test", "catalogue")}
        | {"batch_size": 32, "streams": 8, "shuffle_window": 64},
        "tables": {"dim": WIDTH, "optimizer": "adagrad"},
        "text": {"mode": "frozen", "store": store},
        "model": {
            "kind": "unisrec",
            "width": WIDTH,
            "adaptor": {"experts": 3, "dropout": 0.0, "noise": False},
            "encoder": {
                "layers": 1,
                "feedforward": 16,
                "dropout": 0.0,
                "attention_dropout": 0.0,
                "max_length": 6,
            },
            "contrast": {"weight": 0.0},
        }
        | model,
        "train": {"epochs": 2, "log_every": 1},
    }
