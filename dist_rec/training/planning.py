"""The tables' plan of a workload on a cluster: what `dist-rec plan` shows is what training makes."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from ..embeddings.clusters import Cluster, this_machine
from ..embeddings.planner import DoesNotFit, Planned, make_plan
from ..embeddings.sharding import attach_optimizer
from ..embeddings.tables import EmbeddingTables
from .dense_cost import Dense, count_dense
from .process import Process
from .workload import Workload


def plan_tables(workload: Workload, cluster: Cluster, dense: Dense | None) -> Planned:
    """The plan of the workload's tables, beside the dense model if one is given.

    Raises:
        DoesNotFit: they do not fit.
        UserError: a table has no way to be cut on these ranks.
    """
    config = workload.config
    tables = EmbeddingTables(workload.specs, workload.schema, config.tables, torch.device("meta"))
    attach_optimizer(tables, config.tables)
    rows = workload.batch_rows(cluster.ranks)
    return make_plan(
        tables,
        workload.specs,
        cluster,
        batch_size=rows,
        pooling_factors=workload.key_lengths,
        reserved=dense.reserved(cluster, rows) if dense else None,
        wire=config.tables.wire,
    )


def plan_here(workload: Workload, process: Process, local_world_size: int) -> Planned:
    """The plan that this run trains with, the same on all ranks. Collective.

    What the dense model needs is partly a rough estimate, and a run is not refused for it: where tables fit only
    without, that is said, and they get what is there.

    Raises:
        DoesNotFit: the tables alone do not fit.
    """
    cluster = _agreed_cluster(process, local_world_size)
    try:
        return plan_tables(workload, cluster, count_dense(workload))
    except DoesNotFit as short:
        planned = plan_tables(workload, cluster, None)
        if process.is_main:
            print(
                "dist-rec: memory may run out, for tables and the dense model's estimated need fit no rank together "
                f"({short.excess / 2**30:.2f} GiB too many; see `dist-rec plan`); going on.",
                file=sys.stderr,
            )
        return planned


def _agreed_cluster(process: Process, local_world_size: int) -> Cluster:
    """The machines of this run as rank 0 sees them, with the least memory that a rank has. Collective."""
    seen = this_machine(process.world_size, process.device.type, local_world_size)
    # Of as many ranks as plans count on a host, which are fewer than there are where hosts differ.
    host_memory = seen.host_memory // process.local_world_size * local_world_size
    least = torch.tensor([seen.device_memory, host_memory], device=process.device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    device_memory, host_memory = least.tolist()
    shared = [replace(seen, device_memory=device_memory, host_memory=host_memory)]
    dist.broadcast_object_list(shared, device=process.device)
    return shared[0]
