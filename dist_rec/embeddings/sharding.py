"""Sharded tables: `DistributedModelParallel` over a plan, with the optimizer inside backward."""

from __future__ import annotations

import json
import zlib

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardedTensor, ShardingEnv, ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from ..config import TablesConfig
from ..errors import UserError
from .description import describe_plan
from .sharders import WITHIN_HOSTS, sharders
from .tables import EmbeddingTables, TableSpec, initial_rows

OPTIMIZERS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rowwise_adagrad": RowWiseAdagrad}


def optimizer_arguments(config: TablesConfig) -> dict[str, float]:
    """Keyword arguments of the tables' optimizer class."""
    arguments = {"lr": config.learning_rate}
    if config.optimizer != "sgd":
        arguments["eps"] = config.eps
    return arguments


def attach_optimizer(tables: nn.Module, config: TablesConfig) -> None:
    """Name the optimizer that steps inside backward. Comes before planning, which counts its state."""
    apply_optimizer_in_backward(OPTIMIZERS[config.optimizer], tables.parameters(), optimizer_arguments(config))


def ranks_per_host(local_world_size: int, specs: list[TableSpec], device: torch.device) -> int:
    """What all ranks plan with: the ranks of every host, 1 where hosts have unequally many. Collective.

    Args:
        local_world_size: ranks of this host.

    Raises:
        UserError: a table is to be cut within hosts, and hosts have unequally many ranks.
    """
    extremes = torch.tensor([local_world_size, -local_world_size], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    most, least = int(extremes[0]), -int(extremes[1])
    if most == least:
        return most
    within = [f"{s.name}: {s.sharding}" for s in specs if s.sharding in WITHIN_HOSTS]
    if within:
        raise UserError(
            f"hosts have {least} to {most} ranks, and {', '.join(within)} needs equally many on each: start as many "
            "everywhere (--nproc-per-node), or choose another tables.sharding."
        )
    return 1


def shard(
    tables: EmbeddingTables,
    specs: list[TableSpec],
    plan: ShardingPlan,
    config: TablesConfig,
    device: torch.device,
    seed: int,
) -> DistributedModelParallel:
    """Place `tables` (meta device) as planned and fill them with their layout-free start. Collective."""
    _check_same_plan(plan, device)
    sharded = DistributedModelParallel(
        module=tables,
        env=ShardingEnv.from_process_group(dist.GroupMember.WORLD),
        device=device,
        plan=plan,
        sharders=sharders(),
        init_data_parallel=False,
    )
    by_name = {spec.name: spec for spec in specs}
    with torch.no_grad():
        for name, parameter in table_weights(sharded).items():
            spec = by_name[name]
            for local in parameter.local_shards():
                (row, column), (rows, columns) = local.metadata.shard_offsets, local.metadata.shard_sizes
                fresh = initial_rows(spec, config, seed, row, row + rows)
                local.tensor.copy_(fresh[:, column : column + columns])
    return sharded


def _check_same_plan(plan: ShardingPlan, device: torch.device) -> None:
    """Raise where ranks hold different plans, for they would wait for each other forever."""
    digest = zlib.crc32(json.dumps(describe_plan(plan), sort_keys=True).encode())
    extremes = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if int(extremes[0]) != -int(extremes[1]):
        raise RuntimeError(f"ranks hold different sharding plans; rank {dist.get_rank()} has {describe_plan(plan)}")


def table_weights(sharded: DistributedModelParallel) -> dict[str, ShardedTensor]:
    """Every table's weight by table name."""
    return {key.split(".")[-2]: tensor for key, tensor in sharded.state_dict().items()}
