"""Writing a safetensors file as a stream, hashed on the way. Knows neither ranks nor checkpoints.

The format is simple: 8 bytes with the header's length (little endian), the header (JSON: per tensor its dtype, shape
and byte range), then the tensors' bytes. The library writes only what is in memory as a whole and hashes nothing; this
writes tensors that come in blocks, from a GPU or from other files. Reading is left to the library.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .manifest import FileInfo

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `blocks` yields its elements in order, on any device, in `dtype`."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Tensor]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def split(tensor: Tensor, dtype: torch.dtype, chunk_bytes: int) -> tuple[Tensor, ...]:
    """`tensor` along its first dimension in parts of about `chunk_bytes` once they are of `dtype`."""
    if tensor.numel() == 0:
        return ()
    row = tensor[0].numel() * dtype.itemsize
    return tensor.split(max(chunk_bytes // row, 1))


def write_tensors(path: Path, entries: list[Entry], metadata: dict[str, str] | None = None) -> FileInfo:
    """Write `entries` into a new file, down to the disk.

    Raises:
        OSError: the disk's fault; what was written stays.
    """
    header, at = ({"__metadata__": metadata} if metadata else {}), 0
    for entry in entries:
        end = at + entry.bytes
        header[entry.key] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("xb", buffering=0) as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            view = memoryview(data)
            while len(view):
                view = view[file.write(view) :]

        put(len(text).to_bytes(8, "little"))
        put(text)
        for entry in entries:
            written = 0
            for block in entry.blocks():
                data = memoryview(block.reshape(-1).view(torch.uint8).numpy())
                put(data)
                written += len(data)
            if written != entry.bytes:
                raise RuntimeError(f"{entry.key} has {written} bytes, not {entry.bytes}")
        os.fsync(file.fileno())
    return FileInfo(bytes=8 + len(text) + at, sha256=digest.hexdigest())
