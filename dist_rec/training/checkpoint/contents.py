"""What this rank writes of a model: the entries of its two files, and what the manifest says of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...embeddings.ids import ID
from ...embeddings.managed import managed_ids
from ...embeddings.sharding import ShardedTables
from ...strict import to_dict
from .boxes import Box
from .dense import DenseState, mine
from .managed import pending_parts
from .manifest import DENSE, FOLDERS, PARAMETER, PENDING, TABLES, KindInfo, PieceInfo, TensorInfo, key_of
from .tables import local_shards
from .tensor_file import DTYPES, Entry, split


@dataclass(frozen=True)
class Source:
    """A live tensor that is to be written as `dtype` under `key`."""

    key: str
    tensor: Tensor
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize

    def entry(self, chunk_bytes: int, copied: bool) -> Entry:
        """For the file: a copy in (pinned) host memory, or the tensor as it is when its turn comes.

        A copy from a GPU is under way when this returns.
        """
        blocks = partial(_host_blocks, self.tensor, self.dtype, chunk_bytes)
        if copied:
            parts = split(self.tensor.detach(), self.dtype, chunk_bytes)
            blocks = partial(_drained, [_copy(part, self.dtype) for part in parts])
        return Entry(self.key, self.dtype, tuple(self.tensor.shape), blocks)


def _host_blocks(tensor: Tensor, dtype: torch.dtype, chunk_bytes: int) -> Iterator[Tensor]:
    for part in split(tensor.detach(), dtype, chunk_bytes):
        yield part.to(dtype).cpu().contiguous()


def _copy(part: Tensor, dtype: torch.dtype) -> Tensor:
    copy = torch.empty(part.shape, dtype=dtype, pin_memory=part.is_cuda)
    return copy.copy_(part, non_blocking=True)


def _drained(blocks: list[Tensor]) -> Iterator[Tensor]:
    """`blocks` in order, each let go when it is written."""
    blocks.reverse()
    while blocks:
        yield blocks.pop()


@dataclass
class Contents:
    """One rank's part of a checkpoint.

    Attributes:
        sources: of each file, by its name in the checkpoint.
        tensors: `tables`, `dense` and `pending` as in the manifest, with this rank's pieces only.
        dense_steps: steps that the dense optimizer has counted.
        clock: as in the manifest.
    """

    dense_steps: int
    clock: int | None
    sources: dict[str, list[Source]] = field(default_factory=dict)
    tensors: dict[str, dict[str, TensorInfo]] = field(default_factory=lambda: {group: {} for group in FOLDERS})

    def _sizes(self, only_gpu: bool) -> int:
        found = [source for sources in self.sources.values() for source in sources]
        return sum(source.bytes for source in found if source.tensor.is_cuda or not only_gpu)

    @property
    def bytes(self) -> int:
        return self._sizes(only_gpu=False)

    @property
    def pinned_bytes(self) -> int:
        """How much of a copy is in pinned memory."""
        return self._sizes(only_gpu=True)

    def add(
        self,
        group: str,
        name: str,
        shape: tuple[int, ...],
        box: Box,
        tensors: dict[str, tuple[Tensor, torch.dtype]],
        frozen: bool = False,
    ) -> None:
        """One piece with all its kinds; an empty one only says that there are such tensors."""
        file = f"{FOLDERS[group]}/rank-{dist.get_rank():05d}.safetensors"
        kinds = {
            kind: KindInfo(dtype=DTYPES[dtype], per_row=tensor.ndim < len(box.size))
            for kind, (tensor, dtype) in tensors.items()
        }
        info = self.tensors[group].setdefault(
            name, TensorInfo(shape=list(shape), flat=group != TABLES, kinds=kinds, pieces=[], frozen=frozen)
        )
        if not box.volume:
            return
        info.pieces.append(PieceInfo(file=file, offset=list(box.offset), size=list(box.size)))
        sources = self.sources.setdefault(file, [])
        sources += [Source(key_of(name, kind, box), tensor, dtype) for kind, (tensor, dtype) in tensors.items()]

    def entries(self, chunk_bytes: int, copied: bool) -> dict[str, list[Entry]]:
        """What each file gets; copies are complete when this returns."""
        files = {
            file: [source.entry(chunk_bytes, copied) for source in sources] for file, sources in self.sources.items()
        }
        if copied and self.pinned_bytes:
            torch.cuda.synchronize()
        return files

    def described(self) -> dict[str, Any]:
        """`tensors` and `dense_steps` as plain data."""
        tensors = {group: {n: to_dict(i) for n, i in found.items()} for group, found in self.tensors.items()}
        return {**tensors, "dense_steps": self.dense_steps}


def contents_of(sharded: ShardedTables, engine) -> Contents:
    """This rank's part of the model as it is; reads no values yet. Collective where tables have managed ids."""
    state = DenseState(engine)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    managed = managed_ids(sharded)
    # That of frozen tables stands still.
    contents = Contents(state.steps, max((ids.clock for ids in managed.values()), default=None))
    for shard in filter(None, (shard.share(rank, ranks) for shard in local_shards(sharded))):
        numbers = managed[shard.table].by_row() if shard.table in managed else {}
        tensors = {kind: (tensor, tensor.dtype) for kind, tensor in (shard.tensors | numbers).items()}
        contents.add(TABLES, shard.table, shard.shape, shard.box, tensors, shard.table in sharded.frozen)
    for table, (total, first, pending) in pending_parts(sharded).items():
        tensors = {kind: (tensor, tensor.dtype) for kind, tensor in pending.items()}
        contents.add(PENDING, table, (total,), Box((first,), (len(pending[ID]),)), tensors)
    for one in mine(state.ranges(), rank, ranks):
        # Parameters in fp32 whatever the model's precision, so that any other can load them.
        tensors = {k: (t, torch.float32 if k == PARAMETER else t.dtype) for k, t in one.tensors.items()}
        contents.add(DENSE, one.name, one.shape, one.box, tensors)
    if rank == 0:
        for name, (shape, kinds) in state.layout().items():
            if 0 in shape:
                about = {kind: KindInfo(dtype="F32") for kind in kinds}
                contents.tensors[DENSE][name] = TensorInfo(shape=list(shape), flat=True, kinds=about, pieces=[])
    return contents
