"""The tables' part of a checkpoint: this rank's shards and their optimizer state, out and in again.

A shard's state is laid out as the shard is: of the same shape, or one number a row (row-wise Adagrad).

Row-wise Adagrad sums the mean squared gradient of a row *as far as the shard reaches*: a table that is cut into
columns has one number a row and column shard. Loaded into shards whose columns

* lie in one saved shard of the same columns, it is the same to the bit;
* span several saved shards, it is their mean, weighted by width: what a whole row would have summed;
* are part of one saved shard, it is that shard's.

The last two are other numbers than a run that had always been cut that way would have; both are said. So is a weight
that was saved in another precision, which is rounded or widened.

A table that every rank holds whole (data-parallel) is written once, each rank its share of the rows.

A frozen table has no optimizer state: one that was frozen and is not begins with none, and of one that is frozen now
the saved state is left. Both are said.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ...data.vocabulary import undivided
from ...embeddings.managed import managed_ids
from ...embeddings.sharding import ShardedTables, local_parts, table_weights
from ...errors import UserError
from .boxes import Box
from .managed import Moved, faults_of_ids, move_ids, restore_ids, said_of, same_cut
from .manifest import MOST_FAULTS, VOCABULARY_KINDS, WEIGHT
from .reader import READ_BYTES, Saved, row_state
from .tensor_file import DTYPES


@dataclass(frozen=True)
class Shard:
    """One table shard of this rank.

    Attributes:
        shape: of the whole table.
        box: rows and columns of this shard.
        tensors: the live memory by kind: `weight` `[rows, columns]`, optimizer states of that
            shape or `[rows]`.
        replicated: whether every rank holds the same.
    """

    table: str
    shape: tuple[int, int]
    box: Box
    tensors: dict[str, Tensor]
    replicated: bool = False

    def share(self, rank: int, ranks: int) -> Shard | None:
        """What `rank` writes of it: of what all hold, the rank's part of the rows, None if there are too few."""
        if not self.replicated:
            return self
        first, end = (self.shape[0] * r // ranks for r in (rank, rank + 1))
        if first == end:
            return None
        box = Box((first, 0), (end - first, self.shape[1]))
        return replace(self, box=box, tensors={kind: tensor[first:end] for kind, tensor in self.tensors.items()})


def local_shards(sharded: ShardedTables) -> list[Shard]:
    """This rank's table shards. No collective: ranks may differ in which tables they hold."""
    states: dict[tuple[str, Box], dict[str, Tensor]] = {}
    fused = sharded.fused_optimizer
    for parameter in fused.params.values():
        for name, state in fused.state[parameter].items():
            table, kind = name.rsplit(".", 1)
            # The state of a row has no columns to tell column shards apart by.
            for (offset, size, _), (_, _, local) in zip(local_parts(parameter), local_parts(state), strict=True):
                states.setdefault((table, Box(offset, size)), {})[kind] = local
    shards = []
    for table, weight in sorted(table_weights(sharded).items()):
        replicated = table in sharded.replicated.parameters
        for offset, size, local in local_parts(weight):
            box = Box(offset, size)
            state = sharded.replicated.state(table) if replicated else states.get((table, box), {})
            if box.volume:
                shards.append(Shard(table, tuple(weight.size()), box, {WEIGHT: local, **state}, replicated))
    return shards


def load_tables(
    saved: Saved, sharded: ShardedTables, with_optimizer: bool = True, only: Collection[str] | None = None
) -> list[str]:
    """Fill every shard of this rank. Collective.

    Args:
        saved: a verified checkpoint.
        sharded: the model's tables, under any plan.
        with_optimizer: also the states of the tables' optimizer; else they stay as they are.
        only: names of the tables to fill; the model's others stay as they are, whatever the checkpoint has. Without,
            model and checkpoint must have the same tables.

    Returns:
        What had to be converted, in words, the same on all ranks; mostly nothing.

    Raises:
        UserError: the checkpoint's tables or optimizer are not the model's.
    """
    weights, managed = table_weights(sharded), managed_ids(sharded)
    names = weights.keys() | saved.manifest.tables.keys() if only is None else set(only)
    shards = [shard for shard in local_shards(sharded) if shard.table in names]
    shapes = {name: list(weight.size()) for name, weight in weights.items() if name in names}
    changed = {name for name in names & saved.manifest.tables.keys() if saved.manifest.tables[name].frozen}
    changed ^= sharded.frozen & names
    stated = [shard for shard in shards if shard.table not in changed] if with_optimizer else []
    faults = [*_faults(saved, names, shapes, stated), *faults_of_ids(saved, managed, names)]
    mean, shared, converted, fresh, left = set(), set(), set(), set(), set()
    moved: dict[str, Moved | None] = {}
    if not faults:
        for shard in shards:
            info = saved.manifest.tables[shard.table]
            precision = info.kinds[WEIGHT].dtype, DTYPES[shard.tensors[WEIGHT].dtype]
            converted |= {(*precision, shard.table)} if precision[0] != precision[1] else set()
            kinds = list(shard.tensors) if with_optimizer and shard.table not in changed else [WEIGHT]
            if with_optimizer and shard.table in changed:
                for kind in shard.tensors.keys() - {WEIGHT}:
                    shard.tensors[kind].zero_()
                    fresh.add(shard.table)
                if info.kinds.keys() - {WEIGHT, *VOCABULARY_KINDS}:
                    left.add(shard.table)
            if (ids := managed.get(shard.table)) is not None:
                if not same_cut(saved, shard.table, shard.box):
                    found, moved[shard.table] = move_ids(
                        saved, shard.table, {kind: shard.tensors[kind] for kind in kinds}, ids
                    )
                    faults += found
                    kinds = []
                else:
                    faults += restore_ids(saved, shard.table, shard.box, ids)
            for kind in kinds:
                target = shard.tensors[kind]
                if not info.kinds[kind].per_row:
                    saved.fill(shard.table, info, kind, shard.box, target)
                else:
                    for rows in shard.box.rows(READ_BYTES // torch.float64.itemsize):
                        with torch.no_grad():
                            target[rows.within(shard.box)[0]].copy_(row_state(saved, shard.table, info, kind, rows))
                    widths = [(whole.size[1], both.size[1]) for _, whole, both in saved.sources(info, shard.box)]
                    mean |= {shard.table for _, taken in widths if taken < shard.box.size[1]}
                    shared |= {shard.table for width, taken in widths if width > taken}
            if precision[0] != precision[1] and not shard.tensors[WEIGHT].isfinite().all():
                faults.append(f"table {shard.table!r} has weights that {precision[1]} cannot hold: keep {precision[0]}")
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (faults, mean, shared, converted, fresh, left, moved))
    faults = sorted({fault for found, *_ in everyone for fault in found})
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults[:MOST_FAULTS])
        raise UserError(
            f"the tables of checkpoint {saved.folder} are not the config's ({len(faults)} differences):\n{lines}"
        )
    _, *sets, taken = zip(*everyone, strict=True)
    by_table = {table: [one[table] for one in taken if table in one] for table in set().union(*taken)}
    for name in managed.keys() - names:
        # Of tables that this run adds: all have one clock.
        managed[name].clock = saved.clock
    return [*_said(*(set().union(*some) for some in sets)), *said_of(by_table)]


def _said(
    mean: set[str], shared: set[str], converted: set[tuple[str, str, str]], fresh: set[str], left: set[str]
) -> Iterator[str]:
    for before, now, table in sorted(converted):
        yield f"table {table}: weights were saved as {before} and are {now} now"
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
    if fresh:
        yield f"tables {', '.join(sorted(fresh))}: they were frozen, so their optimizer states begin anew"
    if left:
        yield f"tables {', '.join(sorted(left))}: they are frozen, so their saved optimizer states are left out"


def _faults(saved: Saved, names: set[str], shapes: dict[str, list[int]], shards: list[Shard]) -> list[str]:
    """Why these tables cannot be filled.

    Args:
        shapes: of those that the model has.
        shards: of those whose states must be alike.
    """
    tables = {name: info for name, info in saved.manifest.tables.items() if name in names}
    faults = [f"table {name!r} is not in the config" for name in names - shapes.keys()]
    faults += [f"table {name!r} is not in the checkpoint" for name in names - tables.keys()]
    for name in tables.keys() & shapes.keys():
        (rows, dim), wanted = tables[name].shape, shapes[name]
        if [rows, dim] != wanted:
            ways = [f"set tables.overrides.{undivided(name)}.dim to {dim}"] if dim != wanted[1] else []
            if rows != wanted[0]:
                ways.append(
                    "take the data set that it was trained on, or one that extends it, with the size, hash or managed "
                    f"that tables.overrides.{undivided(name)} had"
                )
            sizes = f"{rows} x {dim}, the config wants {wanted[0]} x {wanted[1]}"
            faults.append(f"table {name!r} is {sizes}: {'; '.join(ways)}")
    for shard in shards:
        if shard.table in tables:
            kinds = tables[shard.table].kinds.items()
            found = {kind: about.per_row for kind, about in kinds if kind not in VOCABULARY_KINDS}
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
