"""What to change where nothing fits: every way is planned, and told only if it does fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ..embeddings.clusters import MOST_RANKS, Cluster
from ..embeddings.planner import DoesNotFit, Planned
from ..embeddings.sharders import COLUMN_STEP
from ..embeddings.tables import TableSpec
from ..errors import UserError
from ..training.dense_cost import STAGES, Dense, count_dense
from ..training.planning import plan_tables
from .answer import GIB, Answer, TooDense, WayOut
from .request import Request

# How often ranks are doubled, and how many sizes of a table are tried.
DOUBLINGS = 6
TRIALS = 6
# Of one row's optimizer state, which is fp32.
STATE_BYTES = {"sgd": lambda dim: 0, "adagrad": lambda dim: 4 * dim, "rowwise_adagrad": lambda dim: 4}
PRECISION_BYTES = {"fp32": 4, "fp16": 2}


def ways_out(answer: Answer) -> list[WayOut]:
    """Changes of one thing each under which the request fits, with what it then takes."""
    tries = _of_dense(answer) if isinstance(answer.failure, TooDense) else _of_tables(answer)
    return [way for attempt in tries if (way := attempt()) is not None]


def _planned(request: Request, cluster: Cluster) -> tuple[Planned, Dense] | None:
    """The plan, None where it does not fit or cannot be."""
    dense = count_dense(request)
    rows = request.batch_rows(cluster.ranks)
    needed = dense.rank_bytes(dense.stage, cluster.ranks, rows)
    if needed >= cluster.memory_of_a_rank() or not _could_fit(request, cluster):
        return None
    try:
        return plan_tables(request, cluster, dense), dense
    except UserError:
        return None


def _could_fit(request: Request, cluster: Cluster) -> bool:
    """Whether all ranks together have room for weights and states: a plan that cannot be need not be searched."""
    optimizer = request.config.tables.optimizer
    capacity = cluster.memory_of_a_rank() * cluster.ranks
    if cluster.device == "cuda":
        host = [s for s in request.specs if s.kernel != "fused"]
        if sum(_bytes(s, optimizer) for s in host) > cluster.host_memory * cluster.hosts:
            return False
    else:
        host = []
    return sum(_bytes(s, optimizer) for s in request.specs if s not in host) <= capacity


def _bytes(spec: TableSpec, optimizer: str) -> int:
    return spec.rows * row_bytes(spec, optimizer)


def row_bytes(spec: TableSpec, optimizer: str) -> int:
    """Weights and optimizer state of one row."""
    return spec.dim * PRECISION_BYTES[spec.precision] + STATE_BYTES[optimizer](spec.dim)


def _way(answer: Answer, change: str, setting: str, request: Request, cluster: Cluster | None = None) -> WayOut | None:
    cluster = cluster or answer.cluster
    found = _planned(request, cluster)
    if found is None:
        return None
    planned, dense = found
    load = planned.per_rank.device_bytes if answer.memory == "device" else planned.per_rank.host_bytes
    beside = dense.rank_bytes(dense.stage, cluster.ranks, request.batch_rows(cluster.ranks))
    return WayOut(change, setting, int(load.max()) + beside, cluster.memory_of_a_rank(), planned.rated_ms)


def _of_tables(answer: Answer) -> Iterator[Callable[[], WayOut | None]]:
    failure: DoesNotFit = answer.failure
    request, cluster, name = answer.request, answer.cluster, failure.table
    spec = next(s for s in request.specs if s.name == name)

    def changed(change: str, key: str, value, **fields) -> WayOut | None:
        return _way(answer, change, f"--set tables.{name}.{key}={value}", request.with_tables({name: fields}))

    yield lambda: _more_ranks(answer)
    if spec.sharding not in ("auto", "row_wise"):
        yield lambda: changed(
            f"{name} cut row_wise instead of {spec.sharding}", "sharding", "row_wise", sharding="row_wise"
        )
    yield lambda: _smaller(answer, spec, "dim")
    if spec.precision == "fp32" and spec.sharding != "data_parallel":
        yield lambda: changed(f"{name} in fp16", "precision", "fp16", precision="fp16") or _all_half(answer)
    if cluster.device == "cuda" and spec.kernel == "fused" and spec.sharding != "data_parallel":
        kernel = "fused_uvm_caching"
        yield lambda: changed(f"{name} in the host's memory, cached on the device", "kernel", kernel, kernel=kernel)
    yield lambda: _smaller(answer, spec, "rows")


def _all_half(answer: Answer) -> WayOut | None:
    names = [s.name for s in answer.request.specs if s.sharding != "data_parallel"]
    request = answer.request.with_tables({name: {"precision": "fp16"} for name in names})
    return _way(answer, "all tables in fp16", "--set tables.precision=fp16", request)


def _more_ranks(answer: Answer) -> WayOut | None:
    cluster = answer.cluster
    for doubling in range(1, DOUBLINGS + 1):
        ranks = cluster.ranks << doubling
        if ranks > MOST_RANKS:
            return None
        per_host = cluster.ranks_per_host
        larger = replace(cluster, ranks=ranks, name=f"{ranks}x{cluster.name.partition('x')[2]}")
        if cluster.hosts == 1 and cluster.device == "cpu":
            hosts = "hosts like this" if ranks // per_host > 1 else "host like this"
            what = f"{ranks} ranks on {ranks // per_host} {hosts} instead of {cluster.ranks} on one"
        else:
            what = f"{ranks} ranks instead of {cluster.ranks}"
        found = _way(answer, what, f"--world {ranks}", answer.request, larger)
        if found is not None:
            return found
    return None


def _smaller(answer: Answer, spec: TableSpec, field: str) -> WayOut | None:
    """The largest of a few smaller sizes of the table that fits: halves, then between the last that did not and it."""
    step = COLUMN_STEP if field == "dim" else 1
    size = getattr(spec, field)

    def attempt(value: int) -> WayOut | None:
        request = answer.request.with_tables({spec.name: {field: value}})
        key = "dim" if field == "dim" else "hash"
        what = f"{spec.name} of {value:,} instead of {size:,} {'columns' if field == 'dim' else 'rows'}"
        return _way(answer, what, f"--set tables.{spec.name}.{key}={value}", request)

    low, high, best = 0, size, None
    for _ in range(TRIALS):
        middle = (low + high) // 2 // step * step
        if middle <= low or middle >= high:
            break
        found = attempt(middle)
        low, high, best = (middle, high, found) if found else (low, middle, best)
    return best


def _of_dense(answer: Answer) -> Iterator[Callable[[], WayOut | None]]:
    request = answer.request
    config = request.config

    def changed(change: str, setting: str, dense) -> WayOut | None:
        return _way(answer, change, setting, replace(request, config=replace(config, dense=dense)))

    for stage in STAGES[config.dense.zero_stage + 1 :]:
        dense = replace(config.dense, zero_stage=stage)
        yield lambda stage=stage, dense=dense: changed(f"ZeRO {stage}", f"--set dense.zero_stage={stage}", dense)
    if config.dense.precision == "fp32" and config.dense.zero_stage > 0:
        bf16 = replace(config.dense, precision="bf16")
        yield lambda: changed("the dense model in bf16", "--set dense.precision=bf16", bf16)
    yield lambda: _more_ranks(answer)
    batch = config.data.batch_size // 2 // config.data.streams * config.data.streams
    if batch:
        halved = replace(request, config=replace(config, data=replace(config.data, batch_size=batch)))
        yield lambda: _way(answer, f"batches of {batch:,} rows", f"--set data.batch_size={batch}", halved)


def failure_in_words(answer: Answer) -> str:
    """Which table, how many GiB too many, on which rank."""
    failure = answer.failure
    if isinstance(failure, TooDense):
        return f"{failure}."
    spec = next(s for s in answer.request.specs if s.name == failure.table)
    everywhere = " (as on every rank)" if failure.option.num_shards >= answer.cluster.ranks > 1 else ""
    return (
        f"{spec.name} ({spec.rows:,} x {spec.dim}, {spec.precision}) does not fit: cut {failure.option.sharding_type}, "
        f"a shard of it needs {failure.needed / GIB:.2f} GiB of {failure.memory} memory with optimizer state and "
        f"buffers; rank {failure.rank}{everywhere} has {max(failure.available, 0) / GIB:.2f} GiB left, so "
        f"{failure.excess / GIB:.2f} GiB are too many."
    )
