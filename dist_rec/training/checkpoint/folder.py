"""Which checkpoints a run has, and which of them is good. Knows names and files, not their contents."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch.distributed as dist

from ...errors import UserError
from .manifest import STATE_NAME
from .reader import Saved, damaged, read_manifest, verify

LATEST = "latest"
_NAME = re.compile(r"step-([0-9]{8,18})")


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def latest(folder: Path) -> Path | None:
    """The checkpoint that `folder`/latest names, None if there is none."""
    try:
        name = (folder / LATEST).read_text().strip()
    except (OSError, ValueError):
        return None
    found = folder / name if _NAME.fullmatch(name) else None
    return found if found is not None and (found / STATE_NAME).is_file() else None


def find(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the one that stands for a run or checkpoints folder.

    That is the latest, or the best that it names.

    Raises:
        UserError: there is none.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / STATE_NAME).is_file():
            return folder
        if (found := latest(folder)) is not None:
            best = _best(read_manifest(found))
            if not (best / STATE_NAME).is_file():
                raise UserError(
                    f"{found} names {best.name} the best checkpoint, which is gone: restore it, or give the path of "
                    "another checkpoint."
                )
            return best
    raise UserError(f"no checkpoint at {path}: give a run folder, or a folder with {STATE_NAME}.")


def read_state(checkpoint: Path) -> Saved:
    """The checkpoint, everything checked. Collective where there are ranks: each checks its share.

    Raises:
        UserError: not of this format, damaged, or incomplete; every fault is named.
    """
    saved = read_manifest(checkpoint)
    if faults := verify(saved):
        raise damaged(checkpoint, faults)
    return saved


def _best(saved: Saved) -> Path:
    """The checkpoint that stands for the run, as one of its checkpoints says."""
    best = saved.manifest.best
    return saved.folder if best is None else saved.folder.with_name(name_of(best))


def best_first(folder: Path) -> list[Path]:
    """The checkpoint that stands for the run, as the newest that can be read says; then the others, newest first."""
    found = checkpoints(folder)
    for path in found:
        try:
            best = _best(read_manifest(path))
        except UserError:
            continue
        if best != path:
            return [best, *(other for other in found if other != best)]
        break
    return found


def last_good(folder: Path, best: bool = False) -> Saved | None:
    """The newest checkpoint of `folder` that is whole, None if there is none at all.

    Collective where there are ranks: all get the same.

    Args:
        best: rather the one that stands for the run (`best_first`).

    Returns:
        The checkpoint; its `passed_over` says why each one before it was left aside.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    names = [[path.name for path in (best_first if best else checkpoints)(folder)]]
    if dist.is_initialized():
        dist.broadcast_object_list(names)
    passed: list[str] = []
    for name in names[0]:
        saved, fault = None, None
        try:
            saved = read_manifest(folder / name)
        except UserError as error:
            fault = str(error)
        fault = _first(fault)
        if fault is None:
            faults = verify(saved)
            if not faults:
                saved.passed_over = passed
                return saved
            fault = str(damaged(folder / name, faults))
        passed.append(fault)
    if passed:
        lines = "\n".join(f"  - {fault}" for fault in passed)
        raise UserError(
            f"no checkpoint in {folder} is whole:\n{lines}\nRestore one, or start a new run with --run.name."
        )
    return None


def _first(fault: str | None) -> str | None:
    """The first fault of any rank."""
    if not dist.is_initialized():
        return fault
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, fault)
    return next((found for found in everyone if found is not None), None)


def sweep(folder: Path) -> None:
    """Remove what killed writers have left."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def remove(path: Path, token: str) -> None:
    """Remove a checkpoint such that it is never seen half removed."""
    gone = path.with_name(f".{path.name}.removed-{token}")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
