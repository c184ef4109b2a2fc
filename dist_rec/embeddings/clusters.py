"""Clusters to plan for: how many ranks, what each holds, how fast it computes and talks."""

from __future__ import annotations

from dataclasses import field

from pydantic import Field

from ..strict import strict


@strict
class Cluster:
    """`ranks` equal ranks, `ranks_per_host` neighbours in rank order to a host. Bytes, bytes/s, FLOP/s.

    * `device_memory`: of one rank's accelerator; 0 on CPU hosts.
    * `host_memory`: of one host, shared by its ranks.
    * `device_bandwidth`, `host_bandwidth`: of that memory; the host's is shared by its ranks.
    * `host_to_device_bandwidth`: between host and one accelerator.
    * `intra_host_bandwidth`, `inter_host_bandwidth`: what one rank sends to ranks of its host, of others.
    * `flops`: dense matrix products of one rank, by precision (fp32, bf16).
    * `reserved_share`: of memory, for everything that is neither table nor dense model.
    """

    name: str
    device: str
    ranks: int = Field(ge=1)
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
