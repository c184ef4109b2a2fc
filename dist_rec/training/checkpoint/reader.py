"""A checkpoint that is being read: checked headers, any box of any tensor, checksums. Knows no models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import UserError
from .boxes import Box
from .manifest import Manifest, TensorInfo, key_of, parse_manifest

# How much is read at once into a tensor that is there already.
READ_BYTES = 16 << 20
# Far below the number of files that a process may have open, as there may be a thousand ranks' files.
MOST_OPEN_FILES = 64


@dataclass
class Saved:
    """A checkpoint on disk, its manifest checked; `verify` says whether its files are what that promises.

    `passed_over`: why newer checkpoints were left aside, newest first.
    """

    folder: Path
    manifest: Manifest
    passed_over: list[str] = field(default_factory=list)
    _open: dict[str, Any] = field(default_factory=dict, repr=False)
    _read: dict[str, int] = field(default_factory=dict, repr=False)

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def clock(self) -> int:
        """Steps that managed tables have seen."""
        return self.step if self.manifest.clock is None else self.manifest.clock

    def _file(self, name: str) -> Any:
        if name not in self._open:
            if len(self._open) >= MOST_OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"checkpoint {self.folder} is damaged: {name}: {error}.") from None
        return self._open[name]

    def sources(self, info: TensorInfo, box: Box) -> Iterator[tuple[str, Box, Box]]:
        """File and box of every piece that overlaps `box`, and the overlap."""
        for piece in info.pieces:
            whole = piece.box
            if (both := whole.overlap(box)) is not None:
                yield piece.file, whole, both

    def slices(self, name: str, info: TensorInfo, kind: str, box: Box) -> Iterator[tuple[Box, Box, Tensor]]:
        """What lies saved of `box`: per block the piece's whole box, the block's own and its values on the host.

        A block of a `per_row` kind has one number a row.
        """
        per_row = info.kinds[kind].per_row
        for file, whole, both in self.sources(info, box):
            width = 1 if per_row else both.volume // both.size[0]
            for block in both.rows(max(READ_BYTES // (width * torch.float64.itemsize), 1)):
                where = block.within(whole)
                values = self._file(file).get_slice(key_of(name, kind, whole))[where[:1] if per_row else where]
                self._count(file, values.nbytes)
                yield whole, block, values

    def _count(self, name: str, read: int) -> None:
        """Let a file go of which much has been read: what is mapped of it counts as this process's memory."""
        self._read[name] = self._read.get(name, 0) + read
        if self._read[name] >= READ_BYTES:
            self._open.pop(name, None)
            self._read[name] = 0

    def fill(self, name: str, info: TensorInfo, kind: str, box: Box, target: Tensor) -> None:
        """Copy `box` of a kind that is not `per_row` into `target`, which has its shape."""
        with torch.no_grad():
            for _, block, values in self.slices(name, info, kind, box):
                target[block.within(box)].copy_(values)

    def expected(self) -> dict[str, dict[str, tuple[list[int], str]]]:
        """Shape and dtype of every key of every file, as the manifest has them."""
        expected: dict[str, dict[str, tuple[list[int], str]]] = {name: {} for name in self.manifest.files}
        for tensors in self.manifest.groups().values():
            for name, info in tensors.items():
                for piece in info.pieces:
                    for kind, about in info.kinds.items():
                        shape = piece.size[:1] if about.per_row else piece.size
                        expected[piece.file][key_of(name, kind, piece.box)] = (shape, about.dtype)
        return expected

    def faults_of(self, name: str, wanted: dict[str, tuple[list[int], str]], checksum: bool) -> list[str]:
        """What is wrong with one file: its size, its header, and, if asked, its bytes."""
        path, promised = self.folder / name, self.manifest.files[name]
        if path.is_symlink() or not path.is_file():
            return [f"{name} is missing"]
        if (size := path.stat().st_size) != promised.bytes:
            return [f"{name} has {size:,} bytes, not {promised.bytes:,}"]
        try:
            if checksum:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != promised.sha256:
                        return [f"{name} does not match its checksum"]
            with safe_open(path, framework="pt") as file:
                keys = set(file.keys())
                faults = [f"{name} lacks {key!r}" for key in sorted(wanted.keys() - keys)]
                faults += [f"{name} has a strange {key!r}" for key in sorted(keys - wanted.keys())]
                for key in sorted(keys & wanted.keys()):
                    part = file.get_slice(key)
                    found = (part.get_shape(), part.get_dtype())
                    if found != wanted[key]:
                        faults.append(
                            f"{name}: {key!r} is {found[1]} {found[0]}, not {wanted[key][1]} {wanted[key][0]}"
                        )
                return faults
        except (OSError, SafetensorError) as error:
            return [f"{name} is no safetensors file ({error})"]


def row_state(saved: Saved, name: str, info: TensorInfo, kind: str, box: Box) -> Tensor:
    """The `per_row` numbers of a shard with `box`, float32 `[rows]`: mean over its columns of what was saved."""
    # In float64 a single source comes out as it went in, to the bit.
    total = torch.zeros(box.size[0], dtype=torch.float64)
    for _, block, values in saved.slices(name, info, kind, box):
        total[block.within(box)[0]] += values.double() * block.size[1]
    return (total / box.size[1]).float()


def read_manifest(folder: Path) -> Saved:
    """The checkpoint at `folder`, its manifest checked, its files not yet.

    Raises:
        UserError: there is none, or its manifest is damaged, of another format, or contradicts itself.
    """
    return Saved(folder, parse_manifest(folder))


def damaged(folder: Path, faults: list[str]) -> UserError:
    """The fault of a checkpoint with these faults."""
    if len(faults) == 1:
        return UserError(f"checkpoint {folder} is damaged: {faults[0]}.")
    lines = "\n".join(f"  - {fault}" for fault in faults)
    return UserError(f"checkpoint {folder} is damaged ({len(faults)} faults):\n{lines}")


def verify(saved: Saved, checksums: bool = True) -> list[str]:
    """Every fault of every file. Collective where there are ranks: each reads its share.

    Args:
        saved: the checkpoint; its manifest has been checked.
        checksums: read every byte, not only the headers.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # By size, so that no rank gets all the large ones.
    files = sorted(saved.manifest.files.items(), key=lambda file: (-file[1].bytes, file[0]))
    expected = saved.expected()
    mine = [fault for name, _ in files[rank::ranks] for fault in saved.faults_of(name, expected[name], checksums)]
    if ranks == 1:
        return sorted(mine)
    everyone: list[list[str]] = [[]] * ranks
    dist.all_gather_object(everyone, mine)
    return sorted(fault for faults in everyone for fault in faults)
