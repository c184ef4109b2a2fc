"""Clusters to plan for in tests."""

from __future__ import annotations

from dist_rec.embeddings.clusters import Cluster

GIB = 2**30


def cpus(ranks: int, ranks_per_host: int, memory: int = GIB) -> Cluster:
    """CPU ranks that have `memory` bytes each for tables."""
    return Cluster(
        name=f"{ranks} CPUs",
        device="cpu",
        ranks=ranks,
        ranks_per_host=ranks_per_host,
        host_memory=memory * min(ranks_per_host, ranks),
        host_bandwidth=50e9,
        intra_host_bandwidth=10e9,
        inter_host_bandwidth=1e9,
        reserved_share=0.0,
    )


def gpus(ranks: int, ranks_per_host: int = 8, memory: int = 64 * GIB) -> Cluster:
    """GPU ranks that have `memory` bytes each for tables, and four times as much of their host's."""
    return Cluster(
        name=f"{ranks} GPUs",
        device="cuda",
        ranks=ranks,
        ranks_per_host=ranks_per_host,
        device_memory=memory,
        host_memory=4 * memory * min(ranks_per_host, ranks),
        device_bandwidth=2e12,
        host_bandwidth=300e9,
        host_to_device_bandwidth=25e9,
        intra_host_bandwidth=300e9,
        inter_host_bandwidth=25e9,
        reserved_share=0.0,
    )
