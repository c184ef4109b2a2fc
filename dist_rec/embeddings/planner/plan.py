"""A plan with its numbers: where every shard lies, what each rank holds and needs, and why nothing fits."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardMetadata,
)

from ...errors import UserError
from ..clusters import Cluster
from ..tables import DATA_PARALLEL, TableSpec
from .options import Option, enumerate_options, hosts_of
from .search import Full, Item, Packing, Ranks, Search

GIB = 2**30
MEMORIES = ("device", "host")
# Tables that an error message lists, the largest first.
LISTED = 10


@dataclass(frozen=True)
class Reserved:
    """Bytes of one rank that the tables must leave to others: the dense model, its optimizer, text vectors."""

    device: int = 0
    host: int = 0


@dataclass(frozen=True, eq=False)
class Load:
    """What lies on every rank, `[ranks]` each: float64 milliseconds of a step, int64 bytes of device and host."""

    ms: np.ndarray
    device_bytes: np.ndarray
    host_bytes: np.ndarray


class DoesNotFit(UserError):
    """Nothing fits, not even what takes the least memory.

    Attributes:
        table: the first that finds no room, with the largest placed first.
        option: how it would be cut.
        rank: where the least is missing; every rank where it must lie on all.
        memory: which memory is short, `device` or `host`.
        needed, available: bytes of one of its shards, and what that rank has left.
        excess: what is missing.
    """

    def __init__(self, full: Full, specs: list[TableSpec], options: list[list[Option]], cluster: Cluster) -> None:
        self.table, self.option = full.option.table, full.option
        needs = np.stack([full.option.device_bytes, full.option.host_bytes]).max(axis=1, keepdims=True)
        left = full.ranks.capacity - full.ranks.bytes
        missing = (needs - left).max(axis=0)
        self.rank = int(missing.argmax() if full.option.num_shards >= cluster.ranks else missing.argmin())
        which = int((needs[:, 0] - left[:, self.rank]).argmax())
        self.memory = MEMORIES[which]
        self.needed, self.available = int(needs[which, 0]), int(left[which, self.rank])
        self.excess = self.needed - self.available
        room = int(full.ranks.capacity[which, 0])
        taken = [(min(o.total_bytes for o in several), spec) for several, spec in zip(options, specs, strict=True)]
        least = sorted(taken, key=lambda pair: -pair[0])
        rows = "\n".join(
            f"  - {s.name}: {s.rows:,} x {s.dim} {s.precision}, {bytes_ / GIB:.3f} GiB, sharding: {s.sharding}"
            for bytes_, s in least[:LISTED]
        )
        more = f"\n  and {len(least) - LISTED} smaller ones" if len(least) > LISTED else ""
        total = sum(bytes_ for bytes_, _ in least)
        super().__init__(
            f"the tables do not fit {cluster.ranks} rank(s) of {cluster.name}: a {full.option.sharding_type} shard of "
            f"{self.table} needs {self.needed / GIB:.3f} GiB of {self.memory} memory, and rank {self.rank} has "
            f"{self.available / GIB:.3f} of its {room / GIB:.3f} GiB left: {self.excess / GIB:.3f} GiB too many. With "
            f"optimizer state and buffers all tables take {total / GIB:.1f} GiB:\n{rows}{more}\n"
            "Use more ranks, a smaller dim, fewer rows, precision: fp16, or sharding: row_wise for what is cut into "
            "fewer parts."
        )


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan, and what the search knew.

    Attributes:
        chosen: every table's option.
        ranks: the rank of each of its shards.
        options: all that was considered for it, best first.
        instead: milliseconds of the step if the table had that option and the others stayed; infinite where it would
            not fit. Beside `options`.
        per_rank: what tables take of every rank.
        per_table: the same by table.
        capacity: bytes of device and host that one rank has for tables.
        rated_ms: of the slowest rank, as TorchRec's performance model rates a plan.
        bound_ms: what no plan of these options can beat.
        seconds: that planning took.
    """

    cluster: Cluster
    chosen: dict[str, Option]
    ranks: dict[str, tuple[int, ...]]
    options: dict[str, list[Option]]
    instead: dict[str, list[float]]
    per_rank: Load
    per_table: dict[str, Load]
    capacity: tuple[int, int]
    rated_ms: float
    bound_ms: float
    seconds: float

    @property
    def bottleneck(self) -> int:
        """The slowest rank."""
        return int(self.per_rank.ms.argmax())

    @property
    def imbalance(self) -> float:
        """Time of the slowest rank over the mean; 1 is even."""
        mean = self.per_rank.ms.mean()
        return float(self.per_rank.ms.max() / mean) if mean else 1.0

    @cached_property
    def plan(self) -> ShardingPlan:
        """For TorchRec's `DistributedModelParallel`."""
        plan: dict[str, EmbeddingModuleShardingPlan] = {}
        _, local = hosts_of(self.cluster)
        places = [placement(self.cluster.device, rank, local) for rank in range(self.cluster.ranks)]
        for table, option in self.chosen.items():
            ranks = list(self.ranks[table])
            spec = None
            if option.sharding_type != DATA_PARALLEL:
                spec = EnumerableShardingSpec(
                    [
                        ShardMetadata(offset, size, places[rank])
                        for (offset, size), rank in zip(option.shards, ranks, strict=True)
                    ]
                )
            plan.setdefault(option.path, EmbeddingModuleShardingPlan())[table] = ParameterSharding(
                sharding_type=option.sharding_type, compute_kernel=option.kernel, ranks=ranks, sharding_spec=spec
            )
        return ShardingPlan(plan)


def make_plan(
    tables: nn.Module,
    specs: list[TableSpec],
    cluster: Cluster,
    *,
    batch_size: int,
    pooling_factors: dict[str, float],
    reserved: Reserved | None = None,
    wire: str = "fp32",
) -> Planned:
    """Plan `tables` (on the meta device, their optimizer attached) onto `cluster`.

    Args:
        batch_size: rows of one rank's batch.
        pooling_factors: mean number of ids a row, per key of `TableSpec.features`.
        reserved: bytes of every rank that are taken already.
        wire: precision of vectors between ranks, `fp32`, `bf16` or `fp16`.

    Raises:
        DoesNotFit: with numbers and the ways out.
        UserError: a table has no option, or the ranks do not fill their hosts.
    """
    start = time.perf_counter()
    hosts, local = hosts_of(cluster)
    options = enumerate_options(
        tables, specs, cluster, batch_size=batch_size, pooling_factors=pooling_factors, wire=wire
    )
    listed = list(options.values())
    search = Search(listed, hosts, local, _capacity(cluster, local, reserved or Reserved()))
    try:
        packing = search.run()
    except Full as full:
        raise DoesNotFit(full, specs, listed, cluster) from None
    return _planned(search, packing, listed, cluster, start)


def _capacity(cluster: Cluster, local: int, reserved: Reserved) -> tuple[int, int]:
    share = 1 - cluster.reserved_share
    device = int(cluster.device_memory * share) - reserved.device if cluster.device != "cpu" else 0
    return max(device, 0), max(int(cluster.host_memory * share) // local - reserved.host, 0)


def _planned(search: Search, packing: Packing, options: list[list[Option]], cluster: Cluster, start: float) -> Planned:
    chosen, ranks, best, instead, loads = {}, {}, {}, {}, {}
    for t, several in enumerate(options):
        option = several[packing.chosen[t]]
        name = option.table
        chosen[name], ranks[name] = option, tuple(packing.ranks[t].tolist())
        alone = Ranks(search.hosts, search.local, search.capacity)
        alone.add(search.items[t][packing.chosen[t]], packing.ranks[t])
        loads[name] = Load(alone.ms, *alone.bytes)
        ms = _instead(search, packing, t)
        order = sorted(range(len(several)), key=lambda o: (o != packing.chosen[t], ms[o], several[o].work))
        best[name], instead[name] = [several[o] for o in order], [ms[o] for o in order]
    return Planned(
        cluster=cluster,
        chosen=chosen,
        ranks=ranks,
        options=best,
        instead=instead,
        per_rank=Load(packing.load.ms, *packing.load.bytes),
        per_table=loads,
        capacity=search.capacity,
        rated_ms=packing.ms,
        bound_ms=search.bound,
        seconds=time.perf_counter() - start,
    )


def _instead(search: Search, packing: Packing, table: int) -> list[float]:
    """Of every option of a table, the step's milliseconds if it alone were changed."""
    load, number = packing.load, packing.chosen[table]
    old: Item = search.items[table][number]
    load.add(old, packing.ranks[table], -1)
    found = []
    for o, item in enumerate(search.items[table]):
        placed = packing.ranks[table] if o == number else load.place(item)
        ms = float("inf")
        if placed is not None:
            load.add(item, placed)
            ms = float(load.ms.max())
            load.add(item, placed, -1)
        found.append(ms)
    load.add(old, packing.ranks[table])
    return found
