"""Clusters to plan for: how many ranks, what each holds, how fast it computes and talks.

A machine file (configs/clusters/*.yaml) has the rated numbers of one host and the share of them that
is assumed to be reached; a `Cluster` is any number of its ranks, with what is expected of them.
"""

from __future__ import annotations

import os
import re
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ..errors import UserError, nearest
from ..strict import from_dict, read_yaml, strict
from .quantities import COMPUTE, RATE, SIZE, quantity

MACHINES = Path(__file__).parents[2] / "configs" / "clusters"
THIS_MACHINE = "here"
MOST_RANKS = 65536
# Of rated numbers: what is less is no machine, and times would overflow.
LEAST_SHARE = 0.001
# Of a CPU that is only known by its number of cores: what one server core (AVX-512 with bf16) reached when this project
# measured, in models of its kind, whose products are small (of 80 and 205 GFLOP/s in products of 1,024 x 1,024), with
# rows gathered at random from a table beyond the caches, and with gloo over loopback.
CORE_FLOPS = {"fp32": 20e9, "bf16": 32e9}
CORE_BANDWIDTH = 2e9
LOOPBACK_BANDWIDTH = 1e9
# Whose rates a GPU without a machine file gets.
UNKNOWN_GPU = "a100-80"


@strict
class Cluster:
    """`ranks` equal ranks, `ranks_per_host` neighbours in rank order to a host. Bytes, bytes/s, FLOP/s.

    All rates are what is expected, not what is rated.

    * `device_memory`: of one rank's accelerator; 0 on CPU hosts.
    * `host_memory`: of one host, shared by its ranks.
    * `device_bandwidth`, `host_bandwidth`: of that memory; the host's is shared by its ranks.
    * `host_to_device_bandwidth`: between host and one accelerator.
    * `intra_host_bandwidth`, `inter_host_bandwidth`: what one rank sends to ranks of its host, of others.
    * `flops`: dense matrix products of one rank, by precision (fp32, bf16).
    * `reserved_share`: of memory, for everything that is neither table nor dense model.
    * `basis`: where the rates come from, a sentence each.
    """

    name: str
    device: Literal["cpu", "cuda"]
    ranks: int = Field(ge=1, le=MOST_RANKS)
    ranks_per_host: int = Field(ge=1)
    device_memory: int = Field(default=0, ge=0)
    host_memory: int = Field(ge=1)
    device_bandwidth: float = Field(default=0.0, ge=0)
    host_bandwidth: float = Field(gt=0)
    host_to_device_bandwidth: float = Field(default=0.0, ge=0)
    intra_host_bandwidth: float = Field(gt=0)
    inter_host_bandwidth: float = Field(gt=0)
    flops: dict[str, float] = field(default_factory=dict)
    reserved_share: float = Field(default=0.15, ge=0, lt=1)
    basis: list[str] = field(default_factory=list)

    @property
    def hosts(self) -> int:
        return -(-self.ranks // self.ranks_per_host)

    def memory_of_a_rank(self) -> int:
        """Bytes that one rank may use where its tables lie: device memory, else its part of the host's."""
        memory = self.device_memory if self.device == "cuda" else self.host_memory // self.ranks_per_host
        return int(memory * (1 - self.reserved_share))


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number: write one")
    return value


_Size = Annotated[int, BeforeValidator(lambda value: quantity(value, SIZE))]
_Rate = Annotated[float, BeforeValidator(lambda value: quantity(value, RATE))]
_Compute = Annotated[float, BeforeValidator(lambda value: quantity(value, COMPUTE))]
_Count = Annotated[int, Field(ge=1, le=MOST_RANKS), BeforeValidator(_no_boolean)]
_Share = Annotated[float, BeforeValidator(_no_boolean)]


@strict
class Efficiency:
    """Shares of the rated numbers that are assumed to be reached."""

    memory: _Share = Field(ge=LEAST_SHARE, le=1)
    network: _Share = Field(ge=LEAST_SHARE, le=1)
    flops: _Share = Field(ge=LEAST_SHARE, le=1)


@strict
class Machine:
    """One host as its data sheet has it. Sizes and rates are numbers, or text: `80 GiB`, `3.35 TB/s`, `67 TFLOP/s`
    (see `quantity`).

    Fields are those of `Cluster`, rated; `ranks_per_host` is how many ranks a host has, `ranks` how many there are
    where nobody says (a host's).
    """

    name: str
    device: Literal["cpu", "cuda"]
    ranks_per_host: _Count
    device_memory: _Size = 0
    host_memory: _Size = Field(gt=0)
    device_bandwidth: _Rate = 0.0
    host_bandwidth: _Rate = Field(gt=0)
    host_to_device_bandwidth: _Rate = 0.0
    intra_host_bandwidth: _Rate = Field(gt=0)
    inter_host_bandwidth: _Rate = Field(gt=0)
    flops: dict[Literal["fp32", "bf16"], _Compute]
    reserved_share: _Share = Field(default=0.15, ge=0, lt=1)
    efficiency: Efficiency
    ranks: _Count | None = None

    @model_validator(mode="after")
    def _whole(self):
        of_device = ("device_memory", "device_bandwidth", "host_to_device_bandwidth")
        lacking = [name for name in of_device if not getattr(self, name)]
        if self.device == "cuda" and lacking:
            raise ValueError(f"device: cuda needs {', '.join(lacking)}")
        given = [name for name in of_device if getattr(self, name)]
        if self.device == "cpu" and given:
            raise ValueError(f"device: cpu has no {', '.join(given)}: leave it out, or write device: cuda")
        if set(self.flops) != {"fp32", "bf16"} or min(self.flops.values()) <= 0:
            raise ValueError("flops needs fp32 and bf16, both above 0")
        return self

    def cluster(self, ranks: int | None = None) -> Cluster:
        """`ranks` ranks of this machine; without, those of the file, else one host's.

        Raises:
            UserError: they do not fill their hosts.
        """
        ranks = ranks or self.ranks or self.ranks_per_host
        per_host = min(ranks, self.ranks_per_host)
        if ranks % per_host or ranks > MOST_RANKS:
            raise UserError(
                f"{ranks} ranks of {self.name}: it has {self.ranks_per_host} a host, so take a multiple of that, up to "
                f"{MOST_RANKS}, or fewer than one host has."
            )
        share = self.efficiency
        return Cluster(
            name=f"{ranks}x{self.name}",
            device=self.device,
            ranks=ranks,
            ranks_per_host=per_host,
            device_memory=self.device_memory,
            host_memory=self.host_memory,
            device_bandwidth=self.device_bandwidth * share.memory,
            host_bandwidth=self.host_bandwidth * share.memory,
            host_to_device_bandwidth=self.host_to_device_bandwidth * share.memory,
            intra_host_bandwidth=self.intra_host_bandwidth * share.network,
            inter_host_bandwidth=self.inter_host_bandwidth * share.network,
            flops={precision: rate * share.flops for precision, rate in self.flops.items()},
            reserved_share=self.reserved_share,
            basis=[
                f"{self.name}: rated numbers, of which {share.memory:.0%} of the memory's, {share.network:.0%} of the "
                f"network's and {share.flops:.0%} of the matrix products' rate are assumed to be reached; "
                f"{self.reserved_share:.0%} of memory is kept free."
            ],
        )


def machine_names() -> list[str]:
    return sorted(path.stem for path in MACHINES.glob("*.yaml"))


def find_machine(name: str) -> Machine:
    """The machine of this name in configs/clusters."""
    return read_machine(MACHINES / f"{name}.yaml")


def read_machine(path: str | Path) -> Machine:
    """A machine file.

    Raises:
        UserError: it is missing or none; every fault is listed.
    """
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a machine is a mapping with name, device, ranks_per_host and so on; see {MACHINES}.")
    return from_dict(Machine, tree, str(path))


def find_cluster(spec: str, ranks: int | None = None) -> Cluster:
    """The cluster that `64xh100`, `h100` (one host), `64xmine.yaml` or `mine.yaml` names.

    Args:
        ranks: how many of its ranks, instead of what `spec` says.

    Raises:
        UserError: there is no such machine, or not so many ranks of it.
    """
    found = re.fullmatch(r"(\d{1,9})\s*[x×]\s*(.+)", spec.strip(), re.IGNORECASE)
    count, name = (int(found[1]), found[2]) if found else (None, spec.strip())
    if count == 0:
        raise UserError(f"cluster {spec!r}: has no rank.")
    if name.endswith((".yaml", ".yml")):
        return read_machine(name).cluster(ranks or count)
    names = machine_names()
    if name.lower() not in names:
        raise UserError(
            f"cluster {spec!r}: no machine is called {name!r}.{nearest(name.lower(), names)} There is "
            f"{', '.join(names)}; write 64x{names[0]} for 64 ranks of one, or the path of a machine file like those in "
            f"{MACHINES}."
        )
    return find_machine(name.lower()).cluster(ranks or count)


def host_memory_bytes() -> int:
    """Memory of this host, or of the control group that this process is confined to."""
    import psutil

    limits = [psutil.virtual_memory().total]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return min(limits)


def this_machine(ranks: int, device: str = "cpu", ranks_per_host: int | None = None) -> Cluster:
    """`ranks` ranks of hosts like this one. The same on every rank: memory is looked up, rates are taken.

    Args:
        ranks_per_host: all of them without.

    Raises:
        UserError: `device` is cuda and this host has no GPU.
    """
    per_host = ranks_per_host or ranks
    if device == "cuda":
        return _this_gpu(ranks, per_host)
    cores = len(os.sched_getaffinity(0))
    part = cores / per_host
    return Cluster(
        name=f"{ranks}x{THIS_MACHINE}",
        device="cpu",
        ranks=ranks,
        ranks_per_host=per_host,
        host_memory=host_memory_bytes(),
        host_bandwidth=CORE_BANDWIDTH * cores,
        intra_host_bandwidth=LOOPBACK_BANDWIDTH,
        inter_host_bandwidth=LOOPBACK_BANDWIDTH,
        flops={precision: rate * part for precision, rate in CORE_FLOPS.items()},
        basis=[
            f"This machine: memory is looked up; rates are taken, not measured: {CORE_BANDWIDTH / 1e9:.0f} GB/s of "
            f"rows gathered and {CORE_FLOPS['fp32'] / 1e9:.0f} GFLOP/s for each of {cores} cores, "
            f"{LOOPBACK_BANDWIDTH / 1e9:.0f} GB/s between ranks. `--verify` measures."
        ],
    )


def _this_gpu(ranks: int, per_host: int) -> Cluster:
    """This host's GPUs with the rates of the machine file of their kind."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("this machine has no GPU that torch sees: name a cluster, or set train.device: cpu.")
    properties = torch.cuda.get_device_properties(0)
    gpus = [m for m in map(find_machine, machine_names()) if m.device == "cuda"]
    like = next((m for m in gpus if m.name.split("-")[0].upper() in properties.name), None)
    base = (like or find_machine(UNKNOWN_GPU)).cluster()
    taken = f"rates are those of {base.name}" if like else f"rates of a {properties.name} are not known: {base.name}'s"
    values = {name: getattr(base, name) for name in base.__dataclass_fields__}
    return Cluster(
        **values
        | {
            "name": f"{ranks}x{THIS_MACHINE}",
            "ranks": ranks,
            "ranks_per_host": per_host,
            "device_memory": properties.total_memory,
            "host_memory": host_memory_bytes(),
            "basis": [f"This machine: memory is looked up; {taken}.", *base.basis],
        }
    )
