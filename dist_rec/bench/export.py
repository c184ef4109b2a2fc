"""How fast a trained run becomes an index that answers, and what the index misses.

The vectors are computed by `dist-rec export` itself, on as many ranks as asked for, in processes of their own; then an
index of every kind is built from the same vectors and asked the same users. Without a run, one is trained on invented
sequences: users stay in one of GROUPS groups of items most of the time, so that vectors are as clustered as a trained
model's are, and not as spread as random ones. Nothing of all users times all items exists at any time: recall is of a
sample of users, against exact search in pieces.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from ..data.build import build, parse_split
from ..errors import UserError
from ..retrieval.index import build_index, measure, parse_index, write_index
from ..retrieval.manifest import ITEMS, USERS, read_manifest
from ..retrieval.parts import Parts
from ..schema import Schema
from ..strict import from_dict

KINDS = ("flat", "ivf", "hnsw", "pq")
GROUPS, STAYS, EVENTS, WIDTH, STEPS = 200, 0.9, 12, 64, 150
K = 50
MODEL = {
    "kind": "unisrec",
    "item": "id",
    "width": WIDTH,
    "loss": "sampled",
    "samples": 1024,
    "contrast": {"weight": 0.0},
}
SCHEMA = {
    "name": "invented",
    "domains": {"names": ["shop"]},
    "features": {
        "history": {"role": "history", "kind": "ids", "shares": "item", "max_length": EVENTS},
        "item": {"role": "item", "kind": "id", "aspect": "id"},
    },
    "labels": {"next": {}},
    "keys": {"user": "user"},
}


def invent(folder: Path, items: int, users: int, seed: int) -> str:
    """Sequences of users, and their catalogue, as data sets; returns the folder above them."""
    draw = np.random.default_rng(seed)
    group = draw.integers(0, GROUPS, users)
    of_group = np.where(draw.random((users, EVENTS)) < STAYS, group[:, None], draw.integers(0, GROUPS, (users, EVENTS)))
    events = of_group + GROUPS * draw.integers(0, max(items // GROUPS, 1), (users, EVENTS))
    events = np.minimum(events, items - 1)
    lists = pa.list_(pa.int64())
    nothing = pa.nulls(items, lists)
    rows = {
        "split": ["catalogue"] * items,
        "user": pa.nulls(items, pa.string()),
        "history": nothing,
        "item": np.arange(items),
        "next": np.ones(items, np.float32),
    }
    tables = [pa.table(rows)]
    for split, stop in (("train", EVENTS - 1), ("test", EVENTS)):
        history = pa.FixedSizeListArray.from_arrays(pa.array(events[:, : stop - 1].reshape(-1)), stop - 1).cast(lists)
        columns = {
            "split": [split] * users,
            "user": [f"u{u}" for u in range(users)],
            "history": history,
            "item": events[:, stop - 1],
            "next": np.ones(users, np.float32),
        }
        tables.append(pa.table(columns))
    pq.write_table(pa.concat_tables(tables), folder / "raw.parquet")
    item = SCHEMA["features"]["item"] | {"vocabulary": {"kind": "integer", "size": items}}
    schema = from_dict(Schema, SCHEMA | {"features": SCHEMA["features"] | {"item": item}}, "invented")
    build(schema, [str(folder / "raw.parquet")], str(folder / "data"), split=parse_split("column:split"), workers=1)
    return str(folder / "data")


def invented_run(folder: Path, items: int, users: int, seed: int, ranks: int) -> Path:
    """A run that was trained for some steps on invented sequences."""
    data = invent(folder, items, users, seed)
    tree = {
        "run": {"root": str(folder / "runs"), "name": "invented", "seed": seed},
        "data": {split: f"{data}/{split}" for split in ("train", "test", "catalogue")} | {"batch_size": 1024},
        "tables": {"dim": WIDTH, "optimizer": "adagrad", "learning_rate": 0.1},
        "model": MODEL,
        "train": {"steps": STEPS, "evaluate_every": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    _dist_rec("train", folder / "config.yaml", "--nproc-per-node", ranks)
    return folder / "runs" / "invented"


def bench_export(
    run: Path | None,
    options: list[str],
    kind: str,
    items: int,
    users: int,
    queries: int,
    seed: int,
    ranks: int,
    folder: Path | None,
) -> dict[str, Any]:
    """Export a run, or an invented one, and measure every kind of index on its vectors.

    Args:
        run: None invents one of `items` items and `users` users by `seed`.
        options: further ones of `dist-rec export`.
        kind: the index whose numbers stand at the top of the result.
        queries: users that indexes are asked for.
        ranks: of the jobs.
        folder: where temporary files go.

    Returns:
        `vectors_per_s` of items and users together, `max_score_error`, and of the first task's index of this kind
        `index_seconds`, `queries_per_s`, `recall_at_50`; `quality`, where `options` have --judge; and `indexes`, those
        of every kind.

    Raises:
        UserError: the run cannot be exported, or `kind` is none.
    """
    if kind not in KINDS:
        raise UserError(f"--index {kind} is not known: there is {', '.join(KINDS)}.")
    invented = run is None
    work = Path(tempfile.mkdtemp(prefix="dist_rec-export-", dir=folder))
    try:
        run = run or invented_run(work, items, users, seed, ranks)
        out = work / "export"
        _dist_rec("export", run, "--out", out, "--nproc-per-node", ranks, *options)
        manifest = read_manifest(out)
        found = {one: _index(out, one, queries, work / "index") for one in KINDS}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    told = [manifest.items, *([manifest.users] if manifest.users else [])]
    task = next(iter(manifest.tasks.values()))
    chosen = found[kind]
    return {
        "vectors_per_s": round(sum(t.count for t in told) / sum(t.seconds for t in told), 1),
        "index_seconds": chosen["index_seconds"],
        "queries_per_s": chosen["queries_per_s"],
        "recall_at_50": chosen["recall_at_50"],
        "max_score_error": task.scores.get("max_score_error"),
        "max_relative_error": task.scores.get("max_relative_error"),
        "quality": task.quality,
        "index": kind,
        "items": manifest.items.count,
        "users": manifest.users.count if manifest.users else 0,
        "items_per_s": manifest.items.vectors_per_s,
        "users_per_s": manifest.users.vectors_per_s if manifest.users else None,
        "width": task.width,
        "ranks": manifest.ranks,
        "model": manifest.model,
        "invented": invented,
        "indexes": found,
    }


def _index(out: Path, kind: str, queries: int, path: Path) -> dict[str, Any]:
    """An index of one kind of the first task's vectors."""
    task, config = next(iter(read_manifest(out).tasks)), parse_index(kind, {})
    items, asked = Parts(out / ITEMS), Parts(out / (USERS if (out / USERS).is_dir() else ITEMS))

    def vectors() -> Iterator[np.ndarray]:
        return items.vectors(task)

    started = time.monotonic()
    index = build_index(config, items.width(task), len(items), vectors)
    seconds = time.monotonic() - started
    some = np.linspace(0, len(asked) - 1, min(queries, len(asked))).astype(np.int64)
    chosen, answers = measure(index, config, asked.vectors_at(some, task), K, vectors)
    write_index(index, path)
    sizes = {k: v for k, v in (config.resolved(len(items), items.width(task)) | chosen).items() if k != "kind"}
    return {"index_seconds": round(seconds, 3), "bytes": path.stat().st_size, **answers, **sizes}


def _dist_rec(*arguments: Any) -> None:
    done = subprocess.run([sys.executable, "-m", "dist_rec", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"dist-rec {' '.join(map(str, arguments))} failed:\n{done.stderr[-2000:]}")


def print_summary(found: dict[str, Any]) -> None:
    """The measurements as a table."""
    print(
        f"{found['items']:,} items and {found['users']:,} users, width {found['width']}, {found['ranks']} ranks: "
        f"{found['vectors_per_s']:,.0f} vectors/s; scores differ from the model's by at most {found['max_score_error']}"
    )
    table = Table("index", "built in s", "MB", "recall@50", "ms a query", "queries/s", box=None)
    for kind, one in found["indexes"].items():
        table.add_row(
            kind,
            f"{one['index_seconds']:.2f}",
            f"{one['bytes'] / 1e6:.1f}",
            f"{one['recall_at_50']:.4f}",
            f"{one['query_ms']:.3f}",
            f"{one['queries_per_s']:,.0f}",
        )
    Console().print(table)
