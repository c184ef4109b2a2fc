"""`dist-rec checkpoint ...`: inspect, verify, export-full."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Json, print_json

app = typer.Typer(help="What is in a checkpoint; every checksum; whole tensors in one file.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="A checkpoint, or a run folder: its best or latest one.")]


@app.command("inspect")
def checkpoint_inspect(folder: Folder, as_json: Json = False) -> None:
    """Step, position, tables with their sharding and optimizer state, versions."""
    from ..training.checkpoint import find, read_manifest
    from ..training.checkpoint.export import inspect, print_inspection

    found = inspect(read_manifest(find(folder)))
    print_inspection(found)
    print_json(as_json, found)


@app.command("verify")
def checkpoint_verify(folder: Folder, as_json: Json = False) -> None:
    """Read every byte; every fault is named."""
    from ..training.checkpoint import find, read_state

    saved = read_state(find(folder))
    files = saved.manifest.files
    read = sum(info.bytes for info in files.values())
    print(f"{saved.folder}: every checksum of {len(files)} files is in order ({read:,} bytes).")
    print_json(as_json, {"checkpoint": str(saved.folder), "step": saved.step, "files": len(files), "bytes": read})


@app.command("export-full")
def checkpoint_export_full(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")] = Path("model.safetensors"),
    with_optimizer: Annotated[bool, typer.Option("--with-optimizer", help="Optimizer states too.")] = False,
    as_json: Json = False,
) -> None:
    """Whole tables and dense parameters in one plain safetensors file."""
    from ..training.checkpoint import find, read_state
    from ..training.checkpoint.export import export_full

    written = export_full(read_state(find(folder)), out, with_optimizer)
    print(f"{written['file']}: {written['tensors']} tensors, {written['bytes']:,} bytes")
    print_json(as_json, written)
