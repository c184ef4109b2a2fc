"""`checkpoint.json`: what a checkpoint holds and where, with checksums of every file and of itself.

Read from files that may be damaged or hostile: everything is checked before anything is believed.
Knows no ranks and no models.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field

from ...embeddings.ids import COUNT, ID, LAST_SEEN
from ...errors import UserError
from ...strict import from_dict, strict, to_dict
from .boxes import Box, fault_of_tiling

FORMAT = "dist_rec-checkpoint/2"
STATE_NAME = "checkpoint.json"
TABLES, DENSE, PENDING = "tables", "dense", "pending"
# Where the pieces of a group lie.
FOLDERS = {TABLES: "tables", DENSE: "dense", PENDING: "tables"}
WEIGHT, PARAMETER, BUFFER = "weight", "parameter", "buffer"
# The kinds that are the model itself; every other is a state of the optimizer.
MODEL_KINDS = {TABLES: (WEIGHT,), DENSE: (PARAMETER, BUFFER), PENDING: (ID,)}
# Those of a managed table that are about its ids, one whole number a row each.
VOCABULARY_KINDS = (ID, COUNT, LAST_SEEN)
# Larger than that of thousands of ranks; what is larger still is not ours, and would fill the memory.
MOST_MANIFEST_BYTES = 1 << 30
MOST_FAULTS = 20

Size = Annotated[int, Field(ge=0, lt=2**48)]
FileName = Annotated[str, Field(pattern=r"^(tables|dense)/rank-[0-9]{5,}\.safetensors$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@strict
class KindInfo:
    """One tensor of a parameter: itself, or a state of its optimizer.

    `per_row`: one number for each row of a piece, whatever the piece's columns.
    """

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    per_row: bool = False


@strict
class PieceInfo:
    """A box of the parameter; all its kinds lie in `file` under `key_of(name, kind, box)`."""

    file: FileName
    offset: list[Size]
    size: list[Size]

    @property
    def box(self) -> Box:
        return Box(tuple(self.offset), tuple(self.size))


@strict
class TensorInfo:
    """One parameter. Pieces of a table are boxes of its rows and columns, those of a dense
    parameter (`flat`) ranges of its elements in row-major order, as are those of pending ids. A table that was
    `frozen` has no optimizer states, whatever the optimizer."""

    shape: list[Size]
    flat: bool
    kinds: dict[str, KindInfo]
    pieces: list[PieceInfo]
    frozen: bool = False

    @property
    def space(self) -> tuple[int, ...]:
        """Shape that the pieces tile."""
        return (math.prod(self.shape),) if self.flat else tuple(self.shape)


@strict
class FileInfo:
    """One safetensors file."""

    bytes: Size
    sha256: Sha256


@strict
class Manifest:
    """The whole of checkpoint.json.

    Attributes:
        step: optimizer steps of the run.
        dense_steps: steps that the dense optimizer has counted (Adam corrects its bias with it).
        state: whatever the trainer wants back, such as the position in the data.
        config: the resolved config.
        plan: the tables' sharding plan, for the reader.
        environment: what must be equal for the same bits: versions, ranks, threads.
        pending: of every managed table the ids that wait for a row.
        clock: steps that managed tables have seen, in this run and those that it started from; None where there are no
            such tables, or they have seen this run's steps.
        best: step of the checkpoint that stands for the run, where that need not be the newest.
        sha256: of all the rest.
    """

    format: Literal["dist_rec-checkpoint/2"]
    step: int = Field(ge=0)
    dense_steps: int = Field(ge=0)
    state: dict[str, Any]
    config: dict[str, Any]
    plan: dict[str, dict[str, Any]]
    environment: dict[str, str | int]
    tables: dict[str, TensorInfo]
    dense: dict[str, TensorInfo]
    files: dict[FileName, FileInfo]
    pending: dict[str, TensorInfo] = field(default_factory=dict)
    clock: int | None = Field(default=None, ge=0)
    best: int | None = Field(default=None, ge=0)
    sha256: str = ""

    def groups(self) -> dict[str, dict[str, TensorInfo]]:
        return {TABLES: self.tables, DENSE: self.dense, PENDING: self.pending}

    def faults(self) -> list[str]:
        """What contradicts itself: pieces that do not tile their tensor, or lie in unknown files."""
        faults = []
        for group, tensors in self.groups().items():
            for name, info in tensors.items():
                whole = [kind for kind in info.kinds if kind in MODEL_KINDS[group]]
                per_row = [kind for kind, about in info.kinds.items() if about.per_row]
                dimensions = {TABLES: 2, PENDING: 1}.get(group, len(info.shape))
                if info.flat != (group != TABLES) or len(info.shape) != dimensions:
                    faults.append(f"{group} {name!r} has shape {info.shape}, flat {info.flat}")
                elif len(whole) != 1 or (per_row and (group != TABLES or whole[0] in per_row)):
                    faults.append(f"{group} {name!r} has impossible kinds {sorted(info.kinds)}")
                elif numbers := [k for k in info.kinds if k in VOCABULARY_KINDS and _is_odd(info.kinds[k], group)]:
                    faults.append(f"{group} {name!r} has impossible {sorted(numbers)}")
                elif fault := fault_of_tiling(info.space, [piece.box for piece in info.pieces]):
                    faults.append(f"{group} {name!r}: {fault}")
                folder = FOLDERS[group]
                strange = {p.file for p in info.pieces if p.file not in self.files or not p.file.startswith(folder)}
                faults += [f"{group} {name!r} has a piece in {file}, which is not listed" for file in sorted(strange)]
        return faults


def _is_odd(kind: KindInfo, group: str) -> bool:
    """Whether this cannot be one of VOCABULARY_KINDS."""
    return kind.dtype != "I64" or kind.per_row != (group == TABLES)


def key_of(name: str, kind: str, box: Box) -> str:
    """Under which name a piece lies in its file."""
    return f"{name}|{kind}|{','.join(map(str, box.offset))}"


def environment() -> dict[str, str | int]:
    """What must be equal for two runs to be equal to the bit, by name."""
    found: dict[str, str | int] = {
        "world size": dist.get_world_size() if dist.is_initialized() else 1,
        "ranks of a host": int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        "backend": dist.get_backend() if dist.is_initialized() else "none",
        "threads": torch.get_num_threads(),
    }
    for package in ("torch", "fbgemm-gpu-cpu", "fbgemm-gpu", "torchrec", "deepspeed"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _checksum(data: dict[str, Any]) -> str:
    rest = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def manifest_text(manifest: Manifest) -> str:
    """What goes into checkpoint.json."""
    data = to_dict(manifest)
    return json.dumps(data | {"sha256": _checksum(data)}, indent=1)


def parse_manifest(folder: Path) -> Manifest:
    """The checked manifest of the checkpoint at `folder`; reads no tensors.

    Raises:
        UserError: there is none, it is damaged, of another format, or contradicts itself.
    """
    path = folder / STATE_NAME
    try:
        if path.stat().st_size > MOST_MANIFEST_BYTES:
            raise UserError(f"{path} is larger than {MOST_MANIFEST_BYTES >> 20} MiB: it is not a checkpoint's.")
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path} is not of format {FORMAT}.")
    if data.get("sha256") != _checksum(data):
        raise UserError(f"checkpoint {folder} is damaged: {STATE_NAME} does not match its own checksum.")
    manifest = from_dict(Manifest, data, str(path))
    if faults := manifest.faults():
        lines = "\n".join(f"  - {fault}" for fault in faults[:MOST_FAULTS])
        raise UserError(f"{path} contradicts itself ({len(faults)} faults):\n{lines}")
    return manifest
