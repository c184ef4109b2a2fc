"""The sharding plan: TorchRec's planner, asked with real constraints and answered in words.

Makes the plan that training uses. Needs no process group: a plan is a function of tables,
topology and batch size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingType

from ..errors import UserError
from .tables import TableSpec

SHARDING_TYPES = [ShardingType.TABLE_WISE.value, ShardingType.COLUMN_WISE.value, ShardingType.ROW_WISE.value]
COLUMN_STEP = 4


class _BagSharder(EmbeddingBagCollectionSharder):
    """Offers row-wise on CPU, which trains there though TorchRec's sharder keeps it for CUDA.

    Data-parallel is left out of both: no optimizer would own such a table.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return SHARDING_TYPES


class _SequenceSharder(EmbeddingCollectionSharder):
    def sharding_types(self, compute_device_type: str) -> list[str]:
        return SHARDING_TYPES


def sharders() -> list[ModuleSharder[nn.Module]]:
    """The sharders that plan and shard our collections."""
    return [_BagSharder(), _SequenceSharder()]


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
        batch_size: rows of one rank's batch.
        pooling_factors: mean number of ids a row, per feature (from the index's statistics).
        memory_bytes: what one rank may use for tables.

    Raises:
        UserError: nothing fits; names the sizes and the ways out.
    """
    constraints = {
        spec.name: ParameterConstraints(
            sharding_types=_allowed(spec, world_size),
            compute_kernels=[EmbeddingComputeKernel.FUSED.value],
            pooling_factors=[max(pooling_factors.get(f, 1.0), 1e-3) for f in spec.features],
            min_partition=_partition(spec, world_size),
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
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=batch_size, constraints=constraints)
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


def _allowed(spec: TableSpec, world_size: int) -> list[str]:
    """Sharding types this table may get.

    `auto` leaves column-wise to whoever asks for it: under row-wise Adagrad it is another
    algorithm, with one momentum a column shard, and so would depend on the number of ranks.

    A row-wise cut that leaves a rank without rows makes fbgemm's CPU kernels read past their
    arrays (seen as a random "more than 2B rows"), so such a small table goes table-wise.
    """
    row_wise, table_wise = ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value
    if spec.sharding in ("auto", row_wise) and spec.rows <= -(-spec.rows // world_size) * (world_size - 1):
        return [table_wise]
    return [table_wise, row_wise] if spec.sharding == "auto" else [spec.sharding]


def _partition(spec: TableSpec, world_size: int) -> int:
    """Narrowest column shard: an even cut over at most `world_size` ranks, in fbgemm's steps of 4."""
    widths = range(COLUMN_STEP, spec.dim + 1, COLUMN_STEP)
    return next((w for w in widths if spec.dim % w == 0 and spec.dim // w <= world_size), spec.dim)


def describe_plan(plan: ShardingPlan) -> dict[str, dict[str, Any]]:
    """The plan as plain data: per table its sharding type, kernel, and shards with rank, offset
    and size."""
    described = {}
    for module in plan.plan.values():
        for table, sharding in module.items():
            shards = sharding.sharding_spec.shards
            described[table] = {
                "sharding_type": sharding.sharding_type,
                "compute_kernel": sharding.compute_kernel,
                "ranks": sharding.ranks,
                "shards": [
                    {"rank": s.placement.rank(), "offset": list(s.shard_offsets), "size": list(s.shard_sizes)}
                    for s in shards
                ],
            }
    return described
