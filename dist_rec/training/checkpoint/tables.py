"""The tables' part of a checkpoint: this rank's shards and their optimizer state, out and in again.

A shard's state is laid out as the shard is: of the same shape, or one number a row (row-wise Adagrad).

Row-wise Adagrad sums the mean squared gradient of a row *as far as the shard reaches*: a table that is cut into
columns has one number a row and column shard. Loaded into shards whose columns

* lie in one saved shard of the same columns, it is the same to the bit;
* span several saved shards, it is their mean, weighted by width: what a whole row would have summed;
* are part of one saved shard, it is that shard's.

The last two are other numbers than a run that had always been cut that way would have; both are said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from ...embeddings.sharding import table_weights
from ...errors import UserError
from .boxes import Box
from .manifest import MOST_FAULTS, WEIGHT
from .reader import Saved, row_state


@dataclass(frozen=True)
class Shard:
    """One table shard of this rank.

    Attributes:
        shape: of the whole table.
        box: rows and columns of this shard.
        tensors: the live memory by kind: `weight` `[rows, columns]`, optimizer states of that
            shape or `[rows]`.
    """

    table: str
    shape: tuple[int, int]
    box: Box
    tensors: dict[str, Tensor]


def local_shards(sharded: DistributedModelParallel) -> list[Shard]:
    """This rank's table shards. No collective: ranks may differ in which tables they hold."""
    states = {}
    fused = sharded.fused_optimizer
    for parameter in fused.params.values():
        for name, state in fused.state[parameter].items():
            table, kind = name.rsplit(".", 1)
            for shard, local in zip(parameter.local_shards(), state.local_shards(), strict=True):
                states.setdefault((table, _box(shard.metadata)), {})[kind] = local.tensor
    shards = []
    for table, weight in sorted(table_weights(sharded).items()):
        for local in weight.local_shards():
            box = _box(local.metadata)
            if box.volume:
                shards.append(
                    Shard(table, tuple(weight.size()), box, {WEIGHT: local.tensor, **states.get((table, box), {})})
                )
    return shards


def _box(metadata) -> Box:
    return Box(tuple(metadata.shard_offsets), tuple(metadata.shard_sizes))


def load_tables(saved: Saved, sharded: DistributedModelParallel, with_optimizer: bool = True) -> list[str]:
    """Fill every shard of this rank. Collective.

    Args:
        saved: a verified checkpoint.
        sharded: the model's tables, under any plan.
        with_optimizer: also the states of the tables' optimizer; else they stay as they are.

    Returns:
        What had to be converted, in words, the same on all ranks; mostly nothing.

    Raises:
        UserError: the checkpoint's tables or optimizer are not the model's.
    """
    shards = local_shards(sharded)
    shapes = {name: list(weight.size()) for name, weight in table_weights(sharded).items()}
    faults = _faults(saved, shapes, shards if with_optimizer else [])
    mean, shared = set(), set()
    if not faults:
        for shard in shards:
            info = saved.manifest.tables[shard.table]
            for kind in shard.tensors if with_optimizer else [WEIGHT]:
                target = shard.tensors[kind]
                if not info.kinds[kind].per_row:
                    saved.fill(shard.table, info, kind, shard.box, target)
                else:
                    with torch.no_grad():
                        target.copy_(row_state(saved, shard.table, info, kind, shard.box))
                    widths = [(whole.size[1], both.size[1]) for _, whole, both in saved.sources(info, shard.box)]
                    mean |= {shard.table for _, taken in widths if taken < shard.box.size[1]}
                    shared |= {shard.table for width, taken in widths if width > taken}
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (faults, mean, shared))
    faults = sorted({fault for found, _, _ in everyone for fault in found})
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults[:MOST_FAULTS])
        raise UserError(
            f"the tables of checkpoint {saved.folder} are not the config's ({len(faults)} differences):\n{lines}"
        )
    return list(_said(set().union(*(m for _, m, _ in everyone)), set().union(*(s for _, _, s in everyone))))


def _said(mean: set[str], shared: set[str]) -> Iterator[str]:
    if mean:
        yield (
            f"tables {', '.join(sorted(mean))}: the optimizer state of a row is the width-weighted mean of those that "
            "its column shards had (row-wise Adagrad)"
        )
    if shared:
        yield (
            f"tables {', '.join(sorted(shared))}: every column shard starts with the optimizer state of the wider "
            "shard that it was part of (row-wise Adagrad)"
        )


def _faults(saved: Saved, shapes: dict[str, list[int]], shards: list[Shard]) -> list[str]:
    tables = saved.manifest.tables
    faults = [f"table {name!r} is not in the config" for name in tables.keys() - shapes.keys()]
    faults += [f"table {name!r} is not in the checkpoint" for name in shapes.keys() - tables.keys()]
    for name in tables.keys() & shapes.keys():
        (rows, dim), wanted = tables[name].shape, shapes[name]
        if [rows, dim] != wanted:
            faults.append(f"table {name!r} is {rows} x {dim}, the config wants {wanted[0]} x {wanted[1]}")
    for shard in shards:
        if shard.table in tables:
            found = {kind: about.per_row for kind, about in tables[shard.table].kinds.items()}
            wanted = {kind: tensor.ndim == 1 for kind, tensor in shard.tensors.items()}
            if found != wanted:
                faults.append(
                    f"table {shard.table!r} has the optimizer state {_kinds(found)}, tables.optimizer wants "
                    f"{_kinds(wanted)}"
                )
    return faults


def _kinds(kinds: dict[str, bool]) -> str:
    states = [f"{kind} ({'a number a row' if per_row else 'a number a weight'})" for kind, per_row in kinds.items()]
    return ", ".join(s for s in states if not s.startswith(f"{WEIGHT} ")) or "none"
