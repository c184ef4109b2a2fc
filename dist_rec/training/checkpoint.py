"""Model checkpoints: tables and dense parameters as safetensors, the rest as JSON, never pickle.

    checkpoints/step-00000100/  tables/*.safetensors   every rank writes its shards
                                dense.safetensors      whole parameters, fp32
                                checkpoint.json        step, table shapes, plan, checksums
    checkpoints/latest          name of the newest folder

Written beside, renamed, `latest` last. Loads onto any plan and any world size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torchrec.distributed.model_parallel import DistributedModelParallel

from ..embeddings.sharding import table_weights
from ..errors import UserError

FORMAT = "dist_rec-checkpoint/1"
STATE_NAME = "checkpoint.json"


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def save(
    folder: Path, step: int, sharded: DistributedModelParallel, dense: dict[str, Tensor], plan: dict[str, Any]
) -> Path:
    """Write the checkpoint of `step` below `folder`. Collective.

    Args:
        dense: whole parameters by name; only rank 0's are written.
        plan: what `describe_plan` gave: which ranks hold shards, and for the reader's information.

    Raises:
        UserError: `folder` is not one folder for all ranks.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    main = dist.get_rank() == 0
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "tables").mkdir(parents=True)
    dist.barrier()
    weights = table_weights(sharded)
    with _quiet():
        dcp.save(weights, storage_writer=HuggingFaceStorageWriter(str(partial / "tables"), save_distributed=True))
    if main:
        _check_all_came(partial / "tables", plan)
        save_file(dense, partial / "dense.safetensors")
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        state = {
            "format": FORMAT,
            "step": step,
            "tables": {name: list(weight.size()) for name, weight in sorted(weights.items())},
            "plan": plan,
            "checksums": {str(p.relative_to(partial)): _sha256(p) for p in files},
        }
        (partial / STATE_NAME).write_text(json.dumps(state, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        (folder / ".latest.partial").write_text(final.name + "\n")
        (folder / ".latest.partial").rename(folder / "latest")
    dist.barrier()
    return final


def _check_all_came(tables: Path, plan: dict[str, Any]) -> None:
    """Refuse to publish a checkpoint whose other shards lie on other hosts."""
    expected = {shard["rank"] for table in plan.values() for shard in table["shards"]}
    missing = expected - {int(path.name.split("-")[1]) - 1 for path in tables.glob("shard-*.safetensors")}
    if missing:
        raise UserError(
            f"the checkpoint lacks the table shards of ranks {sorted(missing)}: run.root must lie on a file "
            "system that all hosts share."
        )


def find(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the latest of a run or checkpoints folder.

    Raises:
        UserError: there is none.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / STATE_NAME).is_file():
            return folder
        if (folder / "latest").is_file():
            latest = folder / (folder / "latest").read_text().strip()
            if (latest / STATE_NAME).is_file():
                return latest
    raise UserError(f"no checkpoint at {path}: give a run folder, or a folder with {STATE_NAME}.")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checked checkpoint.json.

    Raises:
        UserError: it is not of this format, or a file is missing or damaged.
    """
    try:
        state = json.loads((checkpoint / STATE_NAME).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / STATE_NAME} cannot be read: {error}.") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{checkpoint / STATE_NAME} is not of format {FORMAT}.")
    for name, checksum in state["checksums"].items():
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"checkpoint {checkpoint} is incomplete: {name} is missing.")
        if _sha256(path) != checksum:
            raise UserError(f"checkpoint {checkpoint} is damaged: {name} does not match its checksum.")
    return state


def load_tables(checkpoint: Path, state: dict[str, Any], sharded: DistributedModelParallel) -> None:
    """Read table weights into `sharded`, whatever its plan. Collective.

    Raises:
        UserError: a table is missing or has another shape.
    """
    weights = table_weights(sharded)
    for name, weight in sorted(weights.items()):
        saved, wanted = state["tables"].get(name), list(weight.size())
        if saved != wanted:
            found = f"is {saved[0]} x {saved[1]}" if saved else "is not there"
            raise UserError(
                f"checkpoint {checkpoint}: table {name!r} {found}, the config wants {wanted[0]} x {wanted[1]}."
            )
    with _quiet():
        dcp.load(weights, storage_reader=HuggingFaceStorageReader(str(checkpoint / "tables")))


def load_dense(checkpoint: Path, model: nn.Module) -> None:
    """Read the whole dense parameters into an unsharded model.

    Raises:
        UserError: the config's model has other parameters, or other shapes.
    """
    saved, wanted = load_file(checkpoint / "dense.safetensors"), model.state_dict()
    faults = [f"{name} is not in the model" for name in saved.keys() - wanted.keys()]
    faults += [f"{name} is not in the checkpoint" for name in wanted.keys() - saved.keys()]
    faults += [
        f"{name} is {list(saved[name].shape)}, the model wants {list(wanted[name].shape)}"
        for name in saved.keys() & wanted.keys()
        if saved[name].shape != wanted[name].shape
    ]
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in sorted(faults)[:10])
        raise UserError(
            f"checkpoint {checkpoint} is of another model than the config ({len(faults)} differences):\n{lines}"
        )
    model.load_state_dict(saved)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
