"""A small checkpoint made by hand, that tests damage and read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_rec.errors import UserError
from dist_rec.training import checkpoint
from dist_rec.training.checkpoint.manifest import _checksum
from dist_rec.training.checkpoint.tensor_file import Entry, write_tensors

TABLE_FILE, DENSE_FILE = "tables/rank-00000.safetensors", "dense/rank-00000.safetensors"


def entry(key: str, tensor: torch.Tensor) -> Entry:
    return Entry(key, tensor.dtype, tuple(tensor.shape), lambda: [tensor])


def whole_table() -> torch.Tensor:
    return torch.arange(24.0).view(6, 4)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def make(folder: Path, step: int = 7) -> Path:
    """A small checkpoint as two ranks would have written it: one table in two row shards, one linear layer."""
    (folder / "tables").mkdir(parents=True)
    (folder / "dense").mkdir()
    files, pieces = {}, []
    for rank, rows in enumerate((4, 2)):
        name, offset = f"tables/rank-{rank:05d}.safetensors", [4 * rank, 0]
        part = whole_table()[4 * rank : 4 * rank + rows]
        written = write_tensors(
            folder / name,
            [entry(f"item|weight|{offset[0]},0", part), entry(f"item|momentum1|{offset[0]},0", part[:, 0].clone())],
        )
        files[name] = vars(written)
        pieces.append({"file": name, "offset": offset, "size": [rows, 4]})
    model = linear()
    parts = {"weight": model.weight.detach().view(-1), "bias": model.bias.detach()}
    written = write_tensors(folder / DENSE_FILE, [entry(f"{n}|parameter|0", part) for n, part in parts.items()])
    files[DENSE_FILE] = vars(written)
    kinds = {"weight": {"dtype": "F32"}, "momentum1": {"dtype": "F32", "per_row": True}}
    write(
        folder,
        {
            "format": checkpoint.FORMAT,
            "step": step,
            "dense_steps": 7,
            "state": {"position": 1},
            "config": {},
            "plan": {"item": {"sharding_type": "row_wise"}},
            "environment": {"world size": 2, "torch": "2"},
            "tables": {"item": {"shape": [6, 4], "flat": False, "kinds": kinds, "pieces": pieces}},
            "dense": {
                name: {
                    "shape": list(getattr(model, name).shape),
                    "flat": True,
                    "kinds": {"parameter": {"dtype": "F32"}},
                    "pieces": [{"file": DENSE_FILE, "offset": [0], "size": [part.numel()]}],
                }
                for name, part in parts.items()
            },
            "files": files,
        },
    )
    return folder


def write(folder: Path, data) -> None:
    """checkpoint.json with a right checksum of its own, as an attacker would make it."""
    if isinstance(data, dict):
        data = data | {"sha256": _checksum(data)}
    (folder / checkpoint.STATE_NAME).write_text(json.dumps(data))


def read(folder: Path) -> dict:
    return json.loads((folder / checkpoint.STATE_NAME).read_text())


def put(folder: Path, name: str, content: bytes) -> None:
    """Another file in the place of `name`, with length and checksum as promised."""
    (folder / name).write_bytes(content)
    data = read(folder)
    data["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write(folder, data)


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.read_state(folder)
    return str(caught.value)
