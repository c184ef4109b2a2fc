"""The recipes as modules, and the raw data that most of their tests need (DIST_REC_RAW, else ../shared/data beside the
repository)."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "shards" / "recipes"
sys.path.insert(0, str(RECIPES))

import amazon  # noqa: E402
import amazon2018  # noqa: E402
import common  # noqa: E402
import foundation  # noqa: E402
import movielens  # noqa: E402
import overlap  # noqa: E402
import queries  # noqa: E402
import retail  # noqa: E402
import rows as recipe_rows  # noqa: E402
import sequence_rows  # noqa: E402
import sequence_sources  # noqa: E402
import sequences  # noqa: E402

from dist_rec.data.rows import Ragged  # noqa: E402

__all__ = [
    "amazon",
    "amazon2018",
    "common",
    "foundation",
    "movielens",
    "overlap",
    "queries",
    "recipe_rows",
    "retail",
    "sequence_rows",
    "sequence_sources",
    "sequences",
]
RAW = common.raw_root(None)
needs_raw = pytest.mark.skipif(not RAW.is_dir(), reason=f"no raw data: {RAW} does not exist (set DIST_REC_RAW)")
UNIFORM = recipe_rows.Sampling()


def part_of(domain: str, folder: Path, sampling=UNIFORM, **options) -> pa.Table:
    return pq.read_table(foundation.write_domain(domain, RAW, folder, sampling, **options).path)


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.parquet"))}


def lists(ragged: Ragged) -> list[list[int]]:
    return [ragged.values[a:b].tolist() for a, b in zip(ragged.offsets[:-1], ragged.offsets[1:], strict=True)]
