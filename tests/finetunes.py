"""A foundation of three invented domains, and a fourth that extends its data: what tests of finetuning start from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from conftest import SMALL_SCHEMA, build_small, run_command, small_table
from safetensors.torch import load_file

from dist_rec.data.build import build, parse_split
from dist_rec.training import checkpoint

SECONDS = 240
FOUNDATION_ROWS = {"big": 330, "middle": 160, "tiny": 40}


def fresh_table(rows: int, seed: int = 7, domain: str = "fresh") -> pa.Table:
    """Rows of a new domain: users that the foundation knows, and items of which half are the domain's alone."""
    table, mark = small_table({domain: rows}, seed), domain[0]
    names = [name and (f"{mark}{name}" if int(name[1:]) % 2 else name) for name in table["item_id"].to_pylist()]
    return table.set_column(table.schema.get_field_index("item_id"), "item_id", pa.array(names))


def build_fresh(folder: Path, extends: str, rows: int = 400, domain: str = "fresh") -> str:
    """The new domain's data, extending that at `extends`; returns the folder above its splits."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(fresh_table(rows, domain=domain), folder / "raw.parquet")
    build(
        {**SMALL_SCHEMA, "domains": {"names": [domain]}},
        [str(folder / "raw.parquet")],
        str(folder / domain),
        split=parse_split("random:2,1,1"),
        block_rows=32,
        shard_rows=64,
        workers=1,
        extends=extends,
    )
    return str(folder / domain)


def foundation_config(folder: Path, data: str) -> dict[str, Any]:
    return {
        "run": {"root": str(folder / "runs"), "name": "base", "seed": 5},
        "data": {split: f"{data}/{split}" for split in ("train", "valid", "test")}
        | {"batch_size": 40, "streams": 8, "shuffle_window": 128},
        "tables": {"dim": 8},
        "model": {"width": 16, "history": {"feedforward": 16}, "body": {"kind": "ple", "expert_hidden": [16]}},
        "train": {"epochs": 2, "device": "cpu"},
    }


def dist_rec(*arguments: Any, seconds: float = SECONDS):
    """The console command, to its end."""
    return run_command([sys.executable, "-m", "dist_rec", *map(str, arguments)], seconds)


def make_foundation(folder: Path) -> tuple[Path, str]:
    """A trained foundation's run folder, and the data of a new domain."""
    base = build_small(folder / "base", FOUNDATION_ROWS, split="random:4,1,1")
    fresh = build_fresh(folder / "new", base)
    (folder / "base.yaml").write_text(yaml.safe_dump(foundation_config(folder, base)))
    done = dist_rec("train", folder / "base.yaml")
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "base", fresh


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """The flat weights of a run's checkpoint of one rank, by name."""
    folder, found = checkpoint.find(run), {}
    manifest = checkpoint.read_manifest(folder).manifest
    for name, info in {**manifest.dense, **manifest.tables}.items():
        kind = next(kind for kind in info.kinds if kind in ("parameter", "weight"))
        pieces = sorted(info.pieces, key=lambda piece: piece.offset)
        files = {piece.file: load_file(folder / piece.file) for piece in pieces}
        parts = [
            value.flatten()
            for piece in pieces
            for key, value in files[piece.file].items()
            if key == checkpoint.reader.key_of(name, kind, piece.box)
        ]
        found[name] = torch.cat(parts)
    return found
