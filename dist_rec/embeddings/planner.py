"""The sharding plan: TorchRec's planner, asked with real constraints and answered in words.

Makes the plan that training uses. Needs no process group: a plan is a function of tables,
topology and batch size, the same in every process.
"""

from __future__ import annotations

import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingPlan

from ..errors import UserError
from .sharders import COLUMN_STEP, COMPUTE_KERNEL, SHARDING_TYPES, sharders
from .tables import TableSpec


class _Enumerator(EmbeddingEnumerator):
    """Lists a table's options in one order.

    TorchRec's own order is that of a set of strings, another one in each process. On a tie, as of
    row_wise and table_row_wise on one host, ranks would choose different plans, and then wait for
    each other forever in collectives that only some of them join.
    """

    def _filter_sharding_types(self, *arguments: object) -> list[str]:
        return sorted(super()._filter_sharding_types(*arguments), key=SHARDING_TYPES.index)


def make_plan(
    tables: nn.Module,
    specs: list[TableSpec],
    *,
    world_size: int,
    local_world_size: int,
    device: torch.device,
    batch_size: int,
    pooling_factors: dict[str, float],
    memory_bytes: int,
) -> ShardingPlan:
    """Plan `tables` (on the meta device) onto `world_size` ranks.

    Args:
        local_world_size: ranks of every host, neighbours in rank order.
        batch_size: rows of one rank's batch.
        pooling_factors: mean number of ids a row, per feature (from the index's statistics).
        memory_bytes: what one rank may use for tables.

    Raises:
        UserError: nothing fits; names the sizes and the ways out.
    """
    constraints = {
        spec.name: ParameterConstraints(
            sharding_types=_allowed(spec, world_size, local_world_size),
            compute_kernels=[COMPUTE_KERNEL],
            pooling_factors=[max(pooling_factors.get(f, 1.0), 1e-3) for f in spec.features],
            min_partition=_partition(spec, world_size, local_world_size),
        )
        for spec in specs
    }
    on_gpu = device.type == "cuda"
    topology = Topology(
        world_size=world_size,
        local_world_size=local_world_size,
        compute_device=device.type,
        hbm_cap=memory_bytes if on_gpu else 0,
        ddr_cap=memory_bytes,
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=_Enumerator(topology, batch_size, constraints),
        constraints=constraints,
    )
    try:
        return planner.plan(tables, sharders())
    except PlannerError as error:
        rows = "\n".join(
            f"  - {s.name}: {s.rows:,} x {s.dim} = {s.rows * s.dim * 4 / 2**30:.3f} GiB, {s.sharding}"
            for s in sorted(specs, key=lambda s: -s.rows * s.dim)
        )
        raise UserError(
            f"the tables do not fit {world_size} rank(s) with {memory_bytes / 2**30:.1f} GiB each "
            f"({str(error).splitlines()[0]}):\n{rows}\n"
            "Use more ranks, a smaller tables.dim, or row_wise sharding for the largest table."
        ) from None


def _allowed(spec: TableSpec, world_size: int, local_world_size: int) -> list[str]:
    """Sharding types this table may get.

    `auto` chooses among cuts that keep rows whole: under row-wise Adagrad a cut through rows is
    another algorithm, with one momentum a column shard, and so would depend on the number of ranks.
    It offers table_row_wise where the world has several hosts of several ranks: row_wise sends every
    rank's partial sums to all hosts, table_row_wise adds them up within the host first. On one host
    the two are alike.

    A cut of rows that leaves a rank without any makes fbgemm's CPU kernels read past their
    arrays (seen as a random "more than 2B rows"), so such a small table goes table-wise.
    """
    parts = {"row_wise": world_size, "table_row_wise": local_world_size, "grid_shard": local_world_size}
    wanted = [spec.sharding]
    if spec.sharding == "auto":
        wanted = ["table_wise", "row_wise"]
        if not spec.sequence and 1 < local_world_size < world_size:
            wanted.append("table_row_wise")
    fitting = [t for t in wanted if t not in parts or _rows_for_all(spec.rows, parts[t])]
    return fitting or ["table_wise"]


def _rows_for_all(rows: int, parts: int) -> bool:
    """Whether TorchRec's cut, in blocks of ceil(rows / parts), leaves no part empty."""
    return rows > -(-rows // parts) * (parts - 1)


def _partition(spec: TableSpec, world_size: int, local_world_size: int) -> int:
    """Narrowest column shard: an even cut, in fbgemm's steps of 4, over at most as many places as
    there are: ranks, ranks of one host (table_column_wise), or hosts (grid_shard).

    A grid has two columns of shards on one host too: with one it would be table_row_wise.
    """
    places = {"table_column_wise": local_world_size, "grid_shard": max(world_size // local_world_size, 2)}
    most = places.get(spec.sharding, world_size)
    widths = range(COLUMN_STEP, spec.dim + 1, COLUMN_STEP)
    return next((w for w in widths if spec.dim % w == 0 and spec.dim // w <= most), spec.dim)
