"""A sharding plan as plain data, and back: what plan.json, checkpoints and `--plan` hold. Trusts nothing it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets, placement
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardMetadata,
)
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from ..errors import UserError
from .managed import collections_of
from .sharders import COLUMN_STEP, SHARDING_TYPES, kernels_of
from .tables import DATA_PARALLEL, MANAGED_SHARDING_TYPE, SEQUENCE_SHARDING_TYPES

# How much of a foreign value, and how many of them, an error message repeats.
SHOWN = 50


def describe_plan(plan: ShardingPlan) -> dict[str, dict[str, Any]]:
    """The plan as plain data: per table its sharding type, kernel, ranks, and shards with rank, offset
    and size. A data-parallel table has no shards: all of it is on all ranks."""
    described = {}
    for module in plan.plan.values():
        for table, sharding in module.items():
            shards = [] if sharding.sharding_type == DATA_PARALLEL else sharding.sharding_spec.shards
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
    collections = {path: (module, managed) for path, module, managed in collections_of(tables)}
    known = {path: _configs(module) for path, (module, _) in collections.items()}
    names = [config.name for configs in known.values() for config in configs]
    if not isinstance(description, dict):
        raise UserError(f"a sharding plan is a mapping of tables, got {type(description).__name__}.")
    wrong = [f"lacks {n}" for n in names if n not in description]
    wrong += [f"has {str(n)[:SHOWN]!r}, which is no table" for n in description if n not in names][:SHOWN]
    if wrong:
        raise UserError(f"the sharding plan is not for these tables: it {', '.join(wrong)}.")
    plan, faults = {}, []
    for path, (module, managed) in collections.items():
        plan[path] = EmbeddingModuleShardingPlan()
        types = SHARDING_TYPES if isinstance(module, EmbeddingBagCollection) else SEQUENCE_SHARDING_TYPES
        types = (MANAGED_SHARDING_TYPE,) if managed else types
        for config in known[path]:
            entry = description[config.name]
            try:
                _check_description(entry, config, types, world_size, local_world_size, device.type)
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
                ranks=entry["ranks"],
                sharding_spec=EnumerableShardingSpec(shards) if shards else None,
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
    entry: Any,
    config: BaseEmbeddingConfig,
    types: tuple[str, ...],
    world_size: int,
    local_world_size: int,
    device_type: str,
) -> None:
    """Raise ValueError unless `entry` describes a legal cut and placement of the table of `config`."""
    fields = {"sharding_type", "compute_kernel", "ranks", "shards"}
    if not isinstance(entry, dict) or set(entry) != fields:
        raise ValueError(f"must have exactly {sorted(fields)}")
    kind, shards = entry["sharding_type"], entry["shards"]
    if kind not in types:
        raise ValueError(f"sharding_type must be one of {', '.join(types)}, got {str(kind)[:SHOWN]!r}")
    kernels = kernels_of(kind, device_type)
    if entry["compute_kernel"] not in kernels:
        raise ValueError(f"compute_kernel must be {' or '.join(kernels)}, got {str(entry['compute_kernel'])[:SHOWN]!r}")
    if kind == DATA_PARALLEL:
        if shards != [] or not _are_numbers(entry["ranks"]) or entry["ranks"] != list(range(world_size)):
            raise ValueError(f"{DATA_PARALLEL} must have no shards, and ranks 0 .. {world_size - 1}")
        if config.data_type != DataType.FP32:
            raise ValueError(f"{DATA_PARALLEL} takes {DataType.FP32.value} tables, not {config.data_type.value}")
        return
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


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int for n in value)


def _is_shard(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"rank", "offset", "size"}
        and type(value["rank"]) is int
        and all(_are_numbers(value[field]) and len(value[field]) == 2 for field in ("offset", "size"))
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
