"""A checkpoint as people look at it: what is in it, and whole tensors in one file. Knows no ranks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from .boxes import Box
from .managed import whole_numbers
from .manifest import DENSE, ID, MODEL_KINDS, PARAMETER, TABLES, VOCABULARY_KINDS, WEIGHT, TensorInfo
from .reader import READ_BYTES, Saved, row_state
from .tensor_file import DTYPES, Entry, write_tensors

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def inspect(saved: Saved) -> dict[str, Any]:
    """What a checkpoint holds, as plain data."""
    manifest = saved.manifest
    tables = {
        name: {
            "shape": info.shape,
            "dtype": info.kinds[WEIGHT].dtype,
            "sharding_type": manifest.plan.get(name, {}).get("sharding_type"),
            "shards": len(info.pieces),
            "optimizer": {
                kind: "row" if about.per_row else "weight"
                for kind, about in info.kinds.items()
                if kind not in (WEIGHT, *VOCABULARY_KINDS)
            },
            "managed": ID in info.kinds,
            "frozen": info.frozen,
        }
        for name, info in manifest.tables.items()
    }
    return {
        "checkpoint": str(saved.folder),
        "step": manifest.step,
        "state": manifest.state,
        "tables": tables,
        "table_parameters": sum(math.prod(info.shape) for info in manifest.tables.values()),
        "dense_parameters": sum(math.prod(i.shape) for i in manifest.dense.values() if PARAMETER in i.kinds),
        "dense_optimizer": sorted({k for i in manifest.dense.values() for k in i.kinds if k not in MODEL_KINDS[DENSE]}),
        "files": len(manifest.files),
        "bytes": sum(info.bytes for info in manifest.files.values()),
        "environment": manifest.environment,
    }


def print_inspection(found: dict[str, Any]) -> None:
    """For people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(
        f"{found['checkpoint']}: step {found['step']}, {found['bytes']:,} bytes in {found['files']} files",
        highlight=False,
        soft_wrap=True,
    )
    for name, value in (*found["state"].items(), *found["environment"].items()):
        console.print(f"  {name}: {value}", highlight=False, markup=False, soft_wrap=True)
    table = Table("table", "rows", "dim", "dtype", "sharding", "shards", "optimizer state")
    for name, info in found["tables"].items():
        rows, dim = info["shape"]
        none = "frozen" if info["frozen"] else "none"
        states = ", ".join(f"{kind} a {per}" for kind, per in info["optimizer"].items()) or none
        sharding = str(info["sharding_type"] or "?")
        counted = f"{rows:,} managed" if info["managed"] else f"{rows:,}"
        table.add_row(escape(name), counted, str(dim), info["dtype"], sharding, str(info["shards"]), states)
    console.print(table)
    states = ", ".join(found["dense_optimizer"]) or "none"
    console.print(f"dense: {found['dense_parameters']:,} parameters, optimizer state {states}", highlight=False)


def export_full(saved: Saved, out: Path, with_optimizer: bool) -> dict[str, Any]:
    """Write whole tables and dense parameters into one safetensors file, in bounded memory.

    Names are `tables.NAME`, `dense.NAME` and, for optimizer states, `optimizer.tables.NAME.KIND` and
    `optimizer.dense.NAME.KIND`. Row-wise states of column shards become their width-weighted mean.

    A managed table has `tables.NAME.id` beside it, int64 `[rows]`: what `data.vocabulary.mix` makes of a row's id, the
    largest int64 where a row has none. The file's metadata has its `tables.NAME.ranges`: the ids 0 .. RAW_IDS - 1 are
    cut into so many equal ranges, the rows, too, and an id that is not there reads the last row of its range's. Ids
    that wait for a row are left out.

    Args:
        saved: a verified checkpoint.
        out: the file; must not exist.

    Returns:
        `file`, `tensors`, `bytes`.

    Raises:
        UserError: the file exists or cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} exists: name another file with --out, or remove it.")
    entries = [entry for entry, is_model in _entries(saved) if is_model or with_optimizer]
    metadata = {"format": "pt", "step": str(saved.step)}
    metadata |= {
        f"tables.{name}.ranges": str(len(info.pieces))
        for name, info in saved.manifest.tables.items()
        if ID in info.kinds
    }
    if with_optimizer:
        metadata["dense_steps"] = str(saved.manifest.dense_steps)
    beside = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        written = write_tensors(beside, entries, metadata)
        beside.rename(out)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {out}: {error}.") from None
    return {"file": str(out), "tensors": len(entries), "bytes": written.bytes}


def _entries(saved: Saved) -> Iterator[tuple[Entry, bool]]:
    """Every whole tensor, and whether it is the model's and not the optimizer's."""
    for group, tensors in ((TABLES, saved.manifest.tables), (DENSE, saved.manifest.dense)):
        for name, info in sorted(tensors.items()):
            for kind, about in info.kinds.items():
                is_model = kind in MODEL_KINDS[group]
                key = f"{group}.{name}" if is_model else f"optimizer.{group}.{name}.{kind}"
                if group == TABLES and kind == ID:
                    # Without it, nobody could tell whose vectors the rows are.
                    is_model, key = True, f"{group}.{name}.{ID}"
                shape = info.shape[:1] if about.per_row else info.shape
                blocks = partial(_blocks, saved, name, info, kind)
                yield Entry(key, TORCH_DTYPES[about.dtype], tuple(shape), blocks), is_model


def _blocks(saved: Saved, name: str, info: TensorInfo, kind: str) -> Iterator[Tensor]:
    """A whole tensor block after block of rows."""
    box = Box.whole(info.space)
    if not box.volume:
        return
    about = info.kinds[kind]
    dtype = TORCH_DTYPES[about.dtype]
    width = box.volume // box.size[0] * dtype.itemsize
    for block in box.rows(max(READ_BYTES // width, 1)):
        if about.per_row and not dtype.is_floating_point:
            yield whole_numbers(saved, name, info, kind, block)
        elif about.per_row:
            yield row_state(saved, name, info, kind, block).to(dtype)
        else:
            target = torch.empty(block.size, dtype=dtype)
            saved.fill(name, info, kind, block, target)
            yield target
