"""Whether a cluster has the bytes for a request's tables at all, before any plan is searched."""

from __future__ import annotations

from ..embeddings.clusters import Cluster
from ..embeddings.tables import DATA_PARALLEL, TableSpec
from .request import Request, row_bytes


def could_fit(request: Request, cluster: Cluster) -> bool:
    """Whether the ranks have room for weights and states: a plan that cannot be need not be searched."""
    optimizer = request.config.tables.optimizer
    share = 1 - cluster.reserved_share
    cuda = cluster.device == "cuda"
    host = int(cluster.host_memory * share) // cluster.ranks_per_host
    rooms = {"device": cluster.memory_of_a_rank() if cuda else host, "host": host}
    taken = dict.fromkeys(rooms, 0)
    for spec in request.specs:
        memory = "host" if cuda and spec.kernel != "fused" else "device"
        needed = spec.rows * row_bytes(spec, optimizer)
        if spec.sharding == DATA_PARALLEL:
            needed *= cluster.ranks
        if needed > rooms[memory] * _places(spec, cluster):
            return False
        taken[memory] += needed
    return all(taken[memory] <= rooms[memory] * cluster.ranks for memory in rooms)


def _places(spec: TableSpec, cluster: Cluster) -> int:
    """The most ranks that a table lies on."""
    if spec.sharding == "table_wise":
        return 1
    return cluster.ranks_per_host if spec.sharding in ("table_row_wise", "table_column_wise") else cluster.ranks
