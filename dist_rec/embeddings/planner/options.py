"""What may be done with each table, and what TorchRec's model says it costs.

TorchRec estimates every shard of every option one by one. Shards of one option are alike except that the last cut of
rows may be smaller, so here each option has one shard estimated, or two, by the same estimators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn
from torchrec.distributed.planner.constants import DEFAULT_PERF_ESTIMATOR
from torchrec.distributed.planner.enumerators import get_partition_by_type
from torchrec.distributed.planner.estimator import EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import (
    Shard,
    SharderData,
    ShardingOption,
    StorageUsageType,
    Topology,
)
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets
from torchrec.distributed.types import CommOp
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from ...errors import UserError
from ..clusters import Cluster
from ..ids import ROW_BYTES
from ..sharders import COLUMN_STEP, REPLICATED_KERNEL, SHARDING_TYPES
from ..tables import DATA_PARALLEL, SEQUENCE_SHARDING_TYPES, TableSpec

WIRE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}
# Of an optimizer state's number; it stays so beside fp16 weights.
STATE_BYTES = 4
MILLISECONDS = 1000
# A data-parallel table's gradient is dense, and DDP keeps it once more in its buckets.
DENSE_GRADIENTS = 2
# What TorchRec takes for a feature of which nothing is known, and the least that it can divide by.
UNKNOWN_LENGTH, LEAST_LENGTH = 1.0, 1e-3


@dataclass(frozen=True)
class Cost:
    """Milliseconds of one step, as TorchRec's model estimates them for one shard."""

    forward_compute: float
    forward_comms: float
    backward_compute: float
    backward_comms: float
    prefetch: float

    @property
    def total(self) -> float:
        # In TorchRec's order, for the same rounding.
        return self.forward_compute + self.backward_compute + self.forward_comms + self.backward_comms + self.prefetch


@dataclass(frozen=True, eq=False)
class Option:
    """One way to cut a table.

    Attributes:
        path: of the collection that has the table.
        rows, dim: of the whole table.
        width: of every shard.
        cost: of every shard; all cost the same.
        weight_bytes, state_bytes: int64 `[shards]`, weights and optimizer state, exactly.
        device_bytes, host_bytes: int64 `[shards]`, what a shard takes of the accelerator's and of the host's memory,
            with optimizer state, inputs and outputs.
    """

    table: str
    path: str
    sharding_type: str
    kernel: str
    rows: int
    dim: int
    width: int
    ranks: int
    ranks_per_host: int
    cost: Cost
    weight_bytes: np.ndarray
    state_bytes: np.ndarray
    device_bytes: np.ndarray
    host_bytes: np.ndarray

    @property
    def num_shards(self) -> int:
        return len(self.device_bytes)

    @property
    def costs(self) -> list[Cost]:
        return [self.cost] * self.num_shards

    @property
    def work(self) -> float:
        """Milliseconds of all ranks together."""
        return self.cost.total * self.num_shards

    @property
    def total_bytes(self) -> int:
        return int(self.device_bytes.sum() + self.host_bytes.sum())

    @cached_property
    def shards(self) -> list[tuple[list[int], list[int]]]:
        """Offset and size of every shard, each `[rows, columns]`."""
        table = torch.empty(self.rows, self.dim, device="meta")
        sizes, offsets = cut(table, self.sharding_type, self.width, self.ranks, self.ranks_per_host)
        return list(zip(offsets, sizes, strict=True))


def cut(
    table: torch.Tensor, sharding_type: str, width: int, ranks: int, ranks_per_host: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Sizes and offsets of a table's shards."""
    return calculate_shard_sizes_and_offsets(table, ranks, ranks_per_host, sharding_type, width)


def hosts_of(cluster: Cluster) -> tuple[int, int]:
    """Hosts, and ranks of each.

    Raises:
        UserError: hosts would have unequally many ranks.
    """
    local = min(cluster.ranks_per_host, cluster.ranks)
    if cluster.ranks % local:
        raise UserError(
            f"{cluster.name}: {cluster.ranks} ranks do not fill hosts of {local} each: choose a multiple of {local}."
        )
    return cluster.ranks // local, local


def topology_of(cluster: Cluster) -> Topology:
    """The cluster in TorchRec's terms."""
    _, local = hosts_of(cluster)
    return Topology(
        world_size=cluster.ranks,
        local_world_size=local,
        compute_device=cluster.device,
        hbm_cap=cluster.device_memory,
        ddr_cap=cluster.host_memory // local,
        hbm_mem_bw=cluster.device_bandwidth / MILLISECONDS,
        ddr_mem_bw=cluster.host_bandwidth / local / MILLISECONDS,
        hbm_to_ddr_mem_bw=cluster.host_to_device_bandwidth / MILLISECONDS,
        intra_host_bw=cluster.intra_host_bandwidth / MILLISECONDS,
        inter_host_bw=cluster.inter_host_bandwidth / MILLISECONDS,
    )


def enumerate_options(
    tables: nn.Module,
    specs: list[TableSpec],
    cluster: Cluster,
    *,
    batch_size: int,
    pooling_factors: dict[str, float],
    wire: str,
) -> dict[str, list[Option]]:
    """Every table's options, in the order of `specs` and, within a table, of preference at equal cost.

    Raises:
        UserError: a table has none.
    """
    _, local = hosts_of(cluster)
    topology = topology_of(cluster)
    sizes = (WIRE_BYTES[wire], WIRE_BYTES[wire])
    exchanges = (
        CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL,
        CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL,
        CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER,
    )
    data = SharderData({}, {exchange.name: sizes for exchange in exchanges}, StorageUsageType.BASE)
    found = {name: (path, module, weight) for name, path, module, weight in _weights(tables)}
    listed = []
    for spec in specs:
        path, module, weight = found[spec.name]
        optimizer = getattr(weight, "_optimizer_classes", [None])[0]
        # Without its optimizer's mark, whose state TorchRec sizes by the weights' precision.
        table = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        lengths = [max(pooling_factors.get(f, UNKNOWN_LENGTH), LEAST_LENGTH) for f in spec.features]
        for sharding_type in allowed(spec, cluster.ranks, local, rows_whole=optimizer is RowWiseAdagrad):
            for width in _widths(spec, sharding_type, cluster.ranks, local):
                shapes, _ = cut(table, sharding_type, width, cluster.ranks, local)
                estimated = ShardingOption(
                    name=spec.name,
                    tensor=table,
                    module=(path, module),
                    input_lengths=lengths,
                    batch_size=batch_size,
                    sharding_type=sharding_type,
                    partition_by=get_partition_by_type(sharding_type),
                    compute_kernel=_kernel(spec, sharding_type),
                    shards=[Shard(size=list(size), offset=[0, 0]) for size in _different(shapes)],
                    is_pooled=not spec.sequence,
                    # The kernels' answers are fp32 whatever the table's precision.
                    output_dtype=DataType.FP32,
                )
                listed.append((spec, path, optimizer, shapes, width, estimated))
    types = {estimated.module_type_key: data for *_, estimated in listed}
    every = [estimated for *_, estimated in listed]
    EmbeddingPerfEstimatorFactory.create(DEFAULT_PERF_ESTIMATOR, topology=topology).estimate(every, types)
    EmbeddingStorageEstimator(topology).estimate(every, types)
    options: dict[str, list[Option]] = {spec.name: [] for spec in specs}
    for spec, path, optimizer, shapes, width, estimated in listed:
        options[spec.name].append(_option(spec, path, optimizer, shapes, width, estimated, cluster, local))
    return options


def _option(
    spec: TableSpec,
    path: str,
    optimizer: type | None,
    shapes: list[list[int]],
    width: int,
    estimated: ShardingOption,
    cluster: Cluster,
    local: int,
) -> Option:
    by_shape = {tuple(shard.size): shard for shard in estimated.shards}
    perf = estimated.shards[0].perf
    rows = np.array([rows for rows, _ in shapes], dtype=np.int64)
    weights = rows * width * estimated.tensor.element_size()
    state = _state_numbers(optimizer, rows, width) * STATE_BYTES
    device = np.array([by_shape[tuple(shape)].storage.hbm for shape in shapes], dtype=np.int64)
    host = np.array([by_shape[tuple(shape)].storage.ddr for shape in shapes], dtype=np.int64)
    backward = (0.0, 0.0) if spec.frozen else (perf.bwd_compute, perf.bwd_comms)
    more = state
    if estimated.sharding_type == DATA_PARALLEL and not spec.frozen:
        more = state + DENSE_GRADIENTS * weights
    if spec.managed:
        more = more + ROW_BYTES * rows
    if cluster.device == "cpu" or estimated.compute_kernel.startswith("fused_uvm"):
        host = host + more
    else:
        device = device + more
    return Option(
        table=spec.name,
        path=path,
        sharding_type=estimated.sharding_type,
        kernel=estimated.compute_kernel,
        rows=spec.rows,
        dim=spec.dim,
        width=width,
        ranks=cluster.ranks,
        ranks_per_host=local,
        cost=Cost(perf.fwd_compute, perf.fwd_comms, *backward, perf.prefetch_compute),
        weight_bytes=weights,
        state_bytes=state,
        device_bytes=device,
        host_bytes=host,
    )


def _weights(tables: nn.Module) -> Iterator[tuple[str, str, nn.Module, nn.Parameter]]:
    """Name, path of the collection, collection and weight of every table."""
    inner = set()
    for path, module in tables.named_modules():
        collection = module
        if isinstance(module, BaseManagedCollisionEmbeddingCollection):
            collection = module._embedding_module
            inner.add(collection)
        elif module in inner or not isinstance(module, EmbeddingBagCollection | EmbeddingCollection):
            continue
        bags = isinstance(collection, EmbeddingBagCollection)
        for name, one in (collection.embedding_bags if bags else collection.embeddings).items():
            yield name, path, module, one.weight


def _state_numbers(optimizer: type | None, rows: np.ndarray, width: int) -> np.ndarray:
    """Numbers that the optimizer keeps of shards of these sizes; none where none is attached."""
    if optimizer is None or optimizer is torch.optim.SGD:
        return np.zeros_like(rows)
    return {RowWiseAdagrad: rows, torch.optim.Adagrad: rows * width}[optimizer]


def _different(shapes: list[list[int]]) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(map(tuple, shapes)))


def _kernel(spec: TableSpec, sharding_type: str) -> str:
    return REPLICATED_KERNEL if sharding_type == DATA_PARALLEL else spec.kernel


def allowed(spec: TableSpec, ranks: int, ranks_per_host: int, *, rows_whole: bool) -> list[str]:
    """Sharding types this table may get, the simplest first.

    `auto` keeps rows whole where `rows_whole`: under row-wise Adagrad a cut through rows is another algorithm, with one
    momentum a column shard, and so would depend on the number of ranks. It offers table_row_wise where the world has
    several hosts of several ranks: row_wise sends every rank's partial sums to all hosts, table_row_wise adds them up
    within the host first; on one host the two are alike. It never offers table_column_wise, which costs what
    column_wise does and can be placed in fewer ways, nor grid_shard, as TorchRec's own planner does not.

    A cut of rows that leaves a rank without any makes fbgemm's CPU kernels read past their arrays (seen as a random
    "more than 2B rows"), so such a small table goes table-wise.

    Raises:
        UserError: a managed table too small for its only type.
    """
    parts = {"row_wise": ranks, "table_row_wise": ranks_per_host, "grid_shard": ranks_per_host}
    if spec.managed:
        if not _rows_for_all(spec.rows, ranks):
            raise UserError(
                f"{spec.name}: a managed table is cut row_wise, and {spec.rows} rows are too few for {ranks} ranks: "
                f"raise tables.overrides.{spec.name}.managed."
            )
        return ["row_wise"]
    wanted = [spec.sharding]
    if spec.sharding == "auto":
        wanted = ["table_wise", "row_wise"]
        if not rows_whole:
            wanted.append("column_wise")
        if 1 < ranks_per_host < ranks:
            wanted.append("table_row_wise")
        if ranks > 1:
            wanted.append(DATA_PARALLEL)
        offered = SEQUENCE_SHARDING_TYPES if spec.sequence else SHARDING_TYPES
        wanted = [t for t in wanted if t in offered and (t != DATA_PARALLEL or spec.replicable)]
    fitting = [t for t in wanted if t not in parts or _rows_for_all(spec.rows, parts[t])]
    return fitting or ["table_wise"]


def _rows_for_all(rows: int, parts: int) -> bool:
    """Whether TorchRec's cut, in blocks of ceil(rows / parts), leaves no part empty."""
    return rows > -(-rows // parts) * (parts - 1)


def _widths(spec: TableSpec, sharding_type: str, ranks: int, ranks_per_host: int) -> list[int]:
    """Widths of column shards to try: even cuts, in fbgemm's steps of 4, over at most as many places as there are:
    ranks, ranks of one host (table_column_wise), or hosts (grid_shard). Only the narrowest where the type is asked for.

    A grid has two columns of shards on one host too: with one it would be table_row_wise.
    """
    most = {
        "column_wise": ranks,
        "table_column_wise": ranks_per_host,
        "grid_shard": max(ranks // ranks_per_host, 2),
    }.get(sharding_type, 1)
    widths = range(COLUMN_STEP, spec.dim + 1, COLUMN_STEP)
    even = [w for w in widths if spec.dim % w == 0 and spec.dim // w <= most] or [spec.dim]
    if spec.sharding != "auto":
        return even[:1]
    return [w for w in even if w < spec.dim] if sharding_type == "column_wise" else [spec.dim]
