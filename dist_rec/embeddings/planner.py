"""The sharding plan: TorchRec's planner, asked with real constraints and answered in words.

Makes the plan that training uses. Needs no process group: a plan is a function of tables,
topology and batch size, the same in every process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets, placement
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ModuleSharder,
    ParameterSharding,
    ShardingPlan,
    ShardMetadata,
)
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from ..errors import UserError
from .tables import SEQUENCE_SHARDING_TYPES, TableSpec

# These cut a table over the ranks of a host.
WITHIN_HOSTS = ("table_row_wise", "table_column_wise", "grid_shard")
SHARDING_TYPES = (*SEQUENCE_SHARDING_TYPES, *WITHIN_HOSTS)
COMPUTE_KERNEL = EmbeddingComputeKernel.FUSED.value
COLUMN_STEP = 4
# How much of a foreign value, and how many of them, an error message repeats.
SHOWN = 50


class _BagSharder(EmbeddingBagCollectionSharder):
    """Offers every cut of rows on CPU, which train there though TorchRec's sharder keeps them for CUDA.

    Data-parallel is left out of both: no optimizer would own such a table.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SHARDING_TYPES)


class _SequenceSharder(EmbeddingCollectionSharder):
    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SEQUENCE_SHARDING_TYPES)


class _Enumerator(EmbeddingEnumerator):
    """Lists a table's options in one order.

    TorchRec's own order is that of a set of strings, another one in each process. On a tie, as of
    row_wise and table_row_wise on one host, ranks would choose different plans, and then wait for
    each other forever in collectives that only some of them join.
    """

    def _filter_sharding_types(self, *arguments: object) -> list[str]:
        return sorted(super()._filter_sharding_types(*arguments), key=SHARDING_TYPES.index)


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


def plan_from_description(
    description: Any, tables: nn.Module, *, world_size: int, local_world_size: int, device: torch.device
) -> ShardingPlan:
    """The plan of which `describe_plan` gave `description`, for the same tables and ranks.

    Nothing in a description is trusted: it must be what the planner could have made.

    Args:
        description: plain data, as read from a file.
        tables: the unsharded collections.
        local_world_size: ranks of every host, neighbours in rank order.

    Raises:
        UserError: it is not a plan for these tables on these ranks; every table's fault, one a line.
    """
    collections = {
        path: module
        for path, module in tables.named_modules()
        if isinstance(module, EmbeddingBagCollection | EmbeddingCollection)
    }
    known = {path: _configs(module) for path, module in collections.items()}
    names = [config.name for configs in known.values() for config in configs]
    if not isinstance(description, dict):
        raise UserError(f"a sharding plan is a mapping of tables, got {type(description).__name__}.")
    wrong = [f"lacks {n}" for n in names if n not in description]
    wrong += [f"has {str(n)[:SHOWN]!r}, which is no table" for n in description if n not in names][:SHOWN]
    if wrong:
        raise UserError(f"the sharding plan is not for these tables: it {', '.join(wrong)}.")
    plan, faults = {}, []
    for path, module in collections.items():
        plan[path] = EmbeddingModuleShardingPlan()
        types = SHARDING_TYPES if isinstance(module, EmbeddingBagCollection) else SEQUENCE_SHARDING_TYPES
        for config in known[path]:
            entry = description[config.name]
            try:
                _check_description(entry, config, types, world_size, local_world_size)
            except ValueError as error:
                faults.append(f"{config.name}: {error}")
                continue
            shards = [
                ShardMetadata(s["offset"], s["size"], placement(device.type, s["rank"], local_world_size))
                for s in entry["shards"]
            ]
            plan[path][config.name] = ParameterSharding(
                sharding_type=entry["sharding_type"],
                compute_kernel=entry["compute_kernel"],
                ranks=[s["rank"] for s in entry["shards"]],
                sharding_spec=EnumerableShardingSpec(shards),
            )
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise UserError(
            f"the sharding plan is not for these tables on {world_size} rank(s), {local_world_size} a host:\n{lines}"
        )
    return ShardingPlan(plan)


def _configs(module: EmbeddingBagCollection | EmbeddingCollection) -> list[BaseEmbeddingConfig]:
    return module.embedding_bag_configs() if isinstance(module, EmbeddingBagCollection) else module.embedding_configs()


def _check_description(
    entry: Any, config: BaseEmbeddingConfig, types: tuple[str, ...], world_size: int, local_world_size: int
) -> None:
    """Raise ValueError unless `entry` describes a legal cut and placement of the table of `config`."""
    fields = {"sharding_type", "compute_kernel", "ranks", "shards"}
    if not isinstance(entry, dict) or set(entry) != fields:
        raise ValueError(f"must have exactly {sorted(fields)}")
    kind, shards = entry["sharding_type"], entry["shards"]
    if kind not in types:
        raise ValueError(f"sharding_type must be one of {', '.join(types)}, got {str(kind)[:SHOWN]!r}")
    if entry["compute_kernel"] != COMPUTE_KERNEL:
        raise ValueError(f"compute_kernel must be {COMPUTE_KERNEL}, got {str(entry['compute_kernel'])[:SHOWN]!r}")
    most = world_size * config.embedding_dim // COLUMN_STEP
    if not isinstance(shards, list) or not 0 < len(shards) <= most or not all(map(_is_shard, shards)):
        raise ValueError("shards must be a list of {rank: r, offset: [row, column], size: [rows, columns]}")
    width = shards[0]["size"][1]
    if width < COLUMN_STEP or width % COLUMN_STEP or config.embedding_dim % width:
        raise ValueError(f"shards {width} wide do not cut {config.embedding_dim} columns evenly in steps of 4")
    table = torch.empty(config.num_embeddings, config.embedding_dim, device="meta")
    sizes, offsets = calculate_shard_sizes_and_offsets(table, world_size, local_world_size, kind, width)
    if [s["size"] for s in shards] != sizes or [s["offset"] for s in shards] != offsets:
        raise ValueError(f"its shards are not the {kind} cut of {config.num_embeddings} x {config.embedding_dim}")
    if not all(rows for rows, _ in sizes):
        raise ValueError(f"too few rows for {kind}: a shard has none")
    ranks = [s["rank"] for s in shards]
    if entry["ranks"] != ranks:
        raise ValueError(f"ranks must be {ranks}, as in its shards")
    if not _is_placement(kind, ranks, world_size, local_world_size):
        raise ValueError(f"ranks {ranks} are not a placement of {kind} shards on {world_size} ranks")


def _is_shard(value: Any) -> bool:
    def pair(numbers: Any) -> bool:
        return isinstance(numbers, list) and len(numbers) == 2 and all(type(n) is int for n in numbers)

    return (
        isinstance(value, dict)
        and set(value) == {"rank", "offset", "size"}
        and type(value["rank"]) is int
        and pair(value["offset"])
        and pair(value["size"])
    )


def _is_placement(kind: str, ranks: list[int], world_size: int, local_world_size: int) -> bool:
    """Whether shards of this sharding type may lie on `ranks`, in their order."""
    if not all(0 <= rank < world_size for rank in ranks):
        return False
    if kind == "row_wise":
        return ranks == list(range(world_size))
    if kind == "table_column_wise":
        return len({rank // local_world_size for rank in ranks}) == 1
    if kind in ("table_row_wise", "grid_shard"):
        hosts = [ranks[i : i + local_world_size] for i in range(0, len(ranks), local_world_size)]
        return all(h[0] % local_world_size == 0 and h == list(range(h[0], h[0] + len(h))) for h in hosts)
    return True
