"""Sharded tables: `DistributedModelParallel` over a plan, with the optimizer inside backward.

All but data-parallel ones, which every rank holds whole: TorchRec only averages their gradients, and `Replicated`
steps them. Frozen tables step by no means.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardedTensor, ShardingEnv, ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from ..config import TablesConfig
from ..errors import UserError
from .description import describe_plan
from .managed import start_managed
from .sharders import WITHIN_HOSTS, sharders
from .tables import DATA_PARALLEL, INIT_CHUNK_ROWS, EmbeddingTables, TableSpec, initial_rows

# fbgemm's name of Adagrad's sum of squares.
ACCUMULATOR = "momentum1"
OPTIMIZERS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rowwise_adagrad": RowWiseAdagrad}


def optimizer_arguments(config: TablesConfig) -> dict[str, float]:
    """Keyword arguments of the tables' optimizer class."""
    arguments = {"lr": config.learning_rate}
    if config.optimizer != "sgd":
        arguments["eps"] = config.eps
    return arguments


def attach_optimizer(tables: EmbeddingTables, config: TablesConfig) -> None:
    """Name the optimizer that steps inside backward. Comes before planning, which counts its state.

    Nothing runs backward through frozen tables. They get one without state whose rate is 0, for fbgemm's kernels
    without any come with a rate of their own.
    """
    trained = tables.trained.parameters()
    apply_optimizer_in_backward(OPTIMIZERS[config.optimizer], trained, optimizer_arguments(config))
    apply_optimizer_in_backward(torch.optim.SGD, tables.frozen.parameters(), {"lr": 0.0})


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


class Replicated:
    """The data-parallel tables of a model, and their optimizer: the same computation as in the kernels.

    Args:
        weights: of each table `[rows, dim]`, as TorchRec has them; their gradients are means over ranks.
        frozen: names of those that stay as they are.
    """

    def __init__(self, weights: dict[str, nn.Parameter], config: TablesConfig, frozen: Collection[str] = ()) -> None:
        # TorchRec's are slices of one flat parameter, of which a rank's optimizer states would be slices, too.
        self.parameters = {n: nn.Parameter(w.detach().as_subclass(Tensor)) for n, w in weights.items()}
        self._weights = {name: weight for name, weight in weights.items() if name not in frozen}
        self.optimizer: Optimizer | None = None
        if self._weights:
            arguments = optimizer_arguments(config)
            stepped = [self.parameters[name] for name in self._weights]
            self.optimizer = OPTIMIZERS[config.optimizer](stepped, **arguments)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups if self.optimizer else []

    def step(self) -> None:
        """Apply the gradients of the last backward, and forget them."""
        for name, weight in self._weights.items():
            self.parameters[name].grad = weight.grad
        if self.optimizer:
            self.optimizer.step()
        for name, weight in self._weights.items():
            self.parameters[name].grad = weight.grad = None

    def state(self, table: str) -> dict[str, Tensor]:
        """The live optimizer state of a table by the kernels' names: of its shape, or `[rows]`."""
        found = self.optimizer.state[self.parameters[table]] if table in self._weights else {}
        if "sum" not in found:
            return {}
        total = found["sum"]
        return {ACCUMULATOR: total[:, 0] if total.shape[1] == 1 else total}


class ShardedTables(DistributedModelParallel):
    """`EmbeddingTables` under a plan; `replicated` are those of its tables that every rank holds whole, `frozen` the
    names of those that stay as they are."""

    replicated: Replicated
    frozen: frozenset[str]


def shard(
    tables: EmbeddingTables,
    specs: list[TableSpec],
    plan: ShardingPlan,
    config: TablesConfig,
    device: torch.device,
    seed: int,
) -> ShardedTables:
    """Place `tables` (meta device) as planned and fill them with their layout-free start. Collective."""
    _check_same_plan(plan, device)
    sharded = ShardedTables(
        module=tables,
        env=ShardingEnv.from_process_group(dist.GroupMember.WORLD),
        device=device,
        plan=plan,
        sharders=sharders(config.wire, config.deduplicate),
        init_data_parallel=False,
    )
    by_name = {spec.name: spec for spec in specs}
    with torch.no_grad():
        for name, parameter in table_weights(sharded).items():
            spec = by_name[name]
            for (row, column), _, local in local_parts(parameter):
                _fill(local, spec, config, seed, row, column)
    start_managed(sharded, config, seed)
    types = {name: sharding.sharding_type for module in plan.plan.values() for name, sharding in module.items()}
    weights = {path.split(".")[-2]: weight for path, weight in sharded.named_parameters()}
    copied = {n: weights[n] for n, kind in types.items() if kind == DATA_PARALLEL}
    sharded.frozen = frozenset(spec.name for spec in specs if spec.frozen)
    sharded.replicated = Replicated(copied, config, sharded.frozen)
    _without_gradients(tables.frozen)
    return sharded


def _without_gradients(collections: nn.Module) -> None:
    """Let go of the memory, as much as the weights', in which TorchRec would sum up the gradients of copied tables."""
    for module in collections.modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            module._lookups = [
                lookup.module if isinstance(lookup, DistributedDataParallel) else lookup for lookup in module._lookups
            ]


def _fill(shard: Tensor, spec: TableSpec, config: TablesConfig, seed: int, row: int, column: int) -> None:
    """Give a shard that begins at `row` and `column` of its table its start, in the pieces that this is drawn in:
    a whole one beside it would take its memory twice."""
    end, columns = row + shard.shape[0], slice(column, column + shard.shape[1])
    for chunk in range(row // INIT_CHUNK_ROWS, -(-end // INIT_CHUNK_ROWS)):
        first, last = max(chunk * INIT_CHUNK_ROWS, row), min((chunk + 1) * INIT_CHUNK_ROWS, end)
        shard[first - row : last - row].copy_(initial_rows(spec, config, seed, first, last)[:, columns])


def _check_same_plan(plan: ShardingPlan, device: torch.device) -> None:
    """Raise where ranks hold different plans, for they would wait for each other forever."""
    digest = zlib.crc32(json.dumps(describe_plan(plan), sort_keys=True).encode())
    extremes = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if int(extremes[0]) != -int(extremes[1]):
        raise RuntimeError(f"ranks hold different sharding plans; rank {dist.get_rank()} has {describe_plan(plan)}")


def table_weights(sharded: DistributedModelParallel) -> dict[str, ShardedTensor | Tensor]:
    """Every table's weight by table name; a plain tensor where every rank holds the whole."""
    state = sharded.state_dict()
    return {key.split(".")[-2]: tensor for key, tensor in state.items() if key.endswith(".weight")}


def local_parts(weight: ShardedTensor | Tensor) -> list[tuple[tuple[int, int], tuple[int, int], Tensor]]:
    """Offset, size and live memory of what this rank holds of a table, or of an optimizer state of it."""
    if not isinstance(weight, ShardedTensor):
        return [((0, 0), tuple(weight.shape), weight)]
    return [(tuple(s.metadata.shard_offsets), tuple(s.metadata.shard_sizes), s.tensor) for s in weight.local_shards()]
