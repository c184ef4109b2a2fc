"""From a request and a cluster to the answer, and from an answer to JSON."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..embeddings.clusters import Cluster
from ..embeddings.planner import DoesNotFit
from ..embeddings.sharders import check_kernels
from ..training.dense_cost import count_dense
from ..training.planning import plan_tables
from .answer import Answer, Refused, TooDense
from .explain import explain
from .request import Request
from .ways_out import ways_out


def find_answer(request: Request, cluster: Cluster, spec: str | None = None) -> Answer:
    """Plan, and where nothing fits, look for ways out.

    Args:
        spec: the cluster as `--cluster` takes it, or `here`; its name without.

    Raises:
        UserError: the question makes no sense of this cluster.
    """
    check_kernels(request.specs, cluster.device)
    dense = count_dense(request)
    found = Answer(request, cluster, spec or cluster.name, request.batch_rows(cluster.ranks), dense)
    if found.dense_bytes >= found.capacity:
        activations = dense.activation_bytes(found.rows)
        found = replace(found, failure=TooDense(found.dense_bytes, found.capacity, activations, found.rows))
    else:
        try:
            return replace(found, planned=plan_tables(request, cluster, dense))
        except DoesNotFit as failure:
            found = replace(found, failure=failure)
    ways, tried = ways_out(found)
    return replace(found, ways=ways, tried=tried)


def describe(answer: Answer | Refused) -> dict[str, Any]:
    """Ready for JSON. Bytes, milliseconds."""
    if isinstance(answer, Refused):
        return {"cluster": {"name": answer.name}, "fits": False, "refused": answer.why}
    cluster = answer.cluster
    result: dict[str, Any] = {
        "cluster": {
            "name": cluster.name,
            "device": cluster.device,
            "ranks": cluster.ranks,
            "ranks_per_host": cluster.ranks_per_host,
            "bytes_of_a_rank": answer.capacity,
        },
        "fits": answer.planned is not None,
        "rows_of_a_rank": answer.rows,
        "dense": answer.dense.describe(cluster, answer.rows),
        "assumptions": answer.assumptions(),
    }
    if answer.planned is None:
        return result | {
            "failure": describe_failure(answer.failure),
            "ways_out": [vars(way) for way in answer.ways],
            "tried": answer.tried,
        }
    planned, why = answer.planned, explain(answer)
    load = planned.per_rank
    result |= {
        "tables": {
            spec.name: {
                "rows": spec.rows,
                "dim": spec.dim,
                "precision": spec.precision,
                "sharding_type": planned.chosen[spec.name].sharding_type,
                "kernel": planned.chosen[spec.name].kernel,
                "ranks": list(planned.ranks[spec.name]),
                "bytes": answer.table_bytes(spec.name),
                "weight_bytes": int(planned.chosen[spec.name].weight_bytes.sum()),
                "state_bytes": int(planned.chosen[spec.name].state_bytes.sum()),
                "ms": dict(vars(planned.chosen[spec.name].cost)),
                "why": why[spec.name],
            }
            for spec in answer.request.specs
        },
        "per_rank": {
            "table_ms": [round(float(ms), 6) for ms in load.ms],
            "device_bytes": load.device_bytes.tolist(),
            "host_bytes": load.host_bytes.tolist(),
            "dense_bytes": answer.dense_bytes,
        },
        "bottleneck_rank": planned.bottleneck,
        "imbalance": planned.imbalance,
        "step_ms": {**answer.step, "total": answer.step_ms},
        "rows_per_s": answer.rows_per_s,
        "planning_seconds": round(planned.seconds, 3),
    }
    return result


def describe_failure(failure: DoesNotFit | TooDense) -> dict[str, Any]:
    if isinstance(failure, TooDense):
        return {"message": str(failure), "needed": failure.needed, "available": failure.available}
    return {
        "message": str(failure),
        "table": failure.table,
        "rank": failure.rank,
        "memory": failure.memory,
        "needed": failure.needed,
        "available": failure.available,
        "excess": failure.excess,
    }
