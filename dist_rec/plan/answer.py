"""One request on one cluster: the tables' plan, the dense model beside it, the step's time; or what does not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from ..embeddings.clusters import Cluster
from ..embeddings.planner import DoesNotFit, Option, Planned
from ..embeddings.tables import DATA_PARALLEL
from ..training.dense_cost import Dense
from .request import Request

GIB = 2**30
# Rough seconds of a collective that moves next to nothing: on one host, over several, and for each rank that it reaches
# (NCCL's all-to-all is a message to each). Gloo's were measured on two ranks.
LATENCY = {"cuda": (20e-6, 50e-6, 0.5e-6), "cpu": (0.5e-3, 0.5e-3, 50e-6)}
# Of the tables of one collection that are cut alike: lengths and ids, vectors; and gradients, but of frozen ones.
COLLECTIVES = 4


@dataclass(frozen=True)
class TooDense:
    """The dense model alone is more than a rank holds; bytes. `activations` are those of `rows` rows."""

    needed: int
    available: int
    activations: int
    rows: int

    def __str__(self) -> str:
        return (
            f"the dense model alone takes {self.needed / GIB:.2f} GiB of every rank, which has "
            f"{self.available / GIB:.2f} GiB: {(self.needed - self.available) / GIB:.2f} GiB too many; "
            f"{self.activations / GIB:.2f} GiB of it are activations of {self.rows:,} rows, by a rough estimate"
        )


@dataclass(frozen=True)
class WayOut:
    """A change under which it fits, and what it then takes: of the fullest rank and of the step.

    Attributes:
        setting: the options that make it, to be added to the command; None where no option does.
        replaces: `KEY=VALUE` that were given already, in whose place they stand.
        fullest, capacity: bytes of one rank's `memory`, `device` or `host`: that which was short.
    """

    change: str
    setting: str | None
    replaces: list[str]
    memory: str
    fullest: int
    capacity: int
    tables_ms: float

    def __str__(self) -> str:
        instead = f", in place of {' and '.join(self.replaces)}" if self.replaces else ""
        setting = f" ({self.setting}{instead})" if self.setting else ""
        return (
            f"{self.change}: fits; the fullest rank then holds {self.fullest / GIB:.2f} of {self.capacity / GIB:.2f} "
            f"GiB of {self.memory} memory, and tables take {self.tables_ms:.3g} ms a step{setting}"
        )


@dataclass(frozen=True)
class Refused:
    """Beside other clusters, one for which the question cannot be put: its name, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Answer:
    """What `dist-rec plan` says of one cluster. Exactly one of `planned` and `failure` is there.

    `rows`: of one rank's batch. `spec`: the cluster as `--cluster` takes it, or `here`. `tried`: changes that do not
    make it fit.
    """

    request: Request
    cluster: Cluster
    spec: str
    rows: int
    dense: Dense
    planned: Planned | None = None
    failure: DoesNotFit | TooDense | None = None
    ways: list[WayOut] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)

    @property
    def memory(self) -> str:
        return "device" if self.cluster.device == "cuda" else "host"

    @property
    def dense_bytes(self) -> int:
        return self.dense.rank_bytes(self.dense.stage, self.cluster.ranks, self.rows)

    @property
    def capacity(self) -> int:
        """Bytes of one rank for tables and dense model, where the tables' `fused` kernels put them."""
        return self.cluster.memory_of_a_rank()

    @cached_property
    def step(self) -> dict[str, float]:
        """Milliseconds of a step by part, one after the other."""
        return {
            "tables": self.planned.rated_ms,
            "latency": latency_ms(self.planned),
            "dense_compute": self.dense.compute_ms(self.cluster, self.rows),
            "dense_comms": self.dense.comms_ms(self.cluster, self.dense.stage),
            "dense_optimizer": self.dense.optimizer_ms(self.cluster, self.dense.stage),
        }

    @property
    def step_ms(self) -> float:
        return sum(self.step.values())

    @property
    def rows_per_s(self) -> float:
        return self.request.config.data.batch_size / self.step_ms * 1e3

    def table_bytes(self, name: str) -> int:
        """Weights and optimizer state of a table on all ranks together."""
        option = self.planned.chosen[name]
        return int(option.weight_bytes.sum() + option.state_bytes.sum())

    def used(self):
        """Bytes of each rank, tables and dense model. `[ranks]`"""
        load = self.planned.per_rank
        return (load.device_bytes if self.memory == "device" else load.host_bytes) + self.dense_bytes

    def assumptions(self) -> list[str]:
        config, cluster = self.request.config, self.cluster
        rate = cluster.flops[self.dense.precision] / 1e12
        said = [
            *cluster.basis,
            f"{cluster.name}: {self.dense.precision} products at {rate:.3g} TFLOP/s a rank.",
            "Tables: TorchRec's cost model of the slowest rank, for its part of a global batch of "
            f"{config.data.batch_size:,} rows, with the mean number of ids of the data's statistics; wire "
            f"{config.tables.wire}.",
            f"Dense: matrix products forward and backward ({self.dense.precision}), or launching the kernels where "
            f"that takes longer; a ring exchange of gradients (ZeRO {self.dense.stage}) and the optimizer's traffic.",
            f"Latency: {COLLECTIVES} collectives for the tables of a collection that are cut alike, rough.",
            "Step: parts one after the other, none overlapped; reading data is not counted.",
        ]
        if self.dense.language_model:
            said.append(
                f"Language model: every text of a batch is different and has {self.request.tokens:.0f} tokens; equal "
                "texts of a batch cost once, so it may take less."
            )
        if self.cluster.ranks > config.data.streams:
            said.append(
                f"data.streams is {config.data.streams}: training on {cluster.ranks} ranks needs it, and "
                "data.batch_size as a multiple of it, raised to at least that many."
            )
        return said + self.request.notes


def latency_ms(planned: Planned) -> float:
    """Of the tables' collectives."""
    cluster = planned.cluster
    if cluster.ranks == 1:
        return 0.0
    groups = {
        (o.path, o.sharding_type): COLLECTIVES if o.cost.backward_compute else COLLECTIVES - 1
        for o in planned.chosen.values()
        if o.sharding_type != DATA_PARALLEL
    }
    one_host, several, each = LATENCY[cluster.device]
    return 1e3 * sum(groups.values()) * ((several if cluster.hosts > 1 else one_host) + each * cluster.ranks)


def shard_bytes(option: Option, memory: str) -> int:
    """Of the largest shard, with optimizer state and buffers."""
    return int((option.device_bytes if memory == "device" else option.host_bytes).max())
