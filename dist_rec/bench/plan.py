"""How fast plans are made and how good they are, against TorchRec's own planner.

Both plan the same invented tables onto the same cluster with the same estimators, and TorchRec's performance model
rates both plans. TorchRec's planner may choose among all sharding types that it offers for weights in the device's
memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from ..embeddings.clusters import Cluster, find_cluster
from ..embeddings.planner import Planned, make_plan
from ..embeddings.planner.options import topology_of
from ..embeddings.sharders import COMPUTE_KERNEL, REPLICATED_KERNEL, sharders
from ..embeddings.tables import TableSpec
from ..errors import UserError
from ..training.process import quieten

CASES = ("16x24", "64x54", "512x24", "512x200")
BATCH_ROWS = 1024
FEWEST_ROWS, MOST_ROWS = 1e3, 1e9
DIMS = (16, 32, 64, 96, 128, 192, 256)
MOST_IDS = 100.0
# One table in so many is read by two features, and one in so many as a sequence.
SHARED, SEQUENCES = 5, 8


def invented_tables(number: int, seed: int) -> tuple[nn.Module, list[TableSpec], dict[str, float]]:
    """Unsharded collections on the meta device, their specs, and mean ids a row by feature.

    Rows and ids a row are log-uniform. Plain SGD steps the tables: it lets columns be cut, as TorchRec's planner does.
    """
    random = np.random.default_rng(seed)
    specs, lengths = [], {}
    for i in range(number):
        rows = int(np.exp(random.uniform(np.log(FEWEST_ROWS), np.log(MOST_ROWS))))
        dim = int(random.choice(DIMS))
        features = (f"f{i}", f"g{i}") if i % SHARED == 0 else (f"f{i}",)
        lengths |= {f: float(np.exp(random.uniform(0, np.log(MOST_IDS)))) for f in features}
        specs.append(TableSpec(f"t{i}", rows, dim, features, sequence=i % SEQUENCES == 0, sharding="auto"))
    meta = torch.device("meta")
    bags = [
        EmbeddingBagConfig(name=s.name, num_embeddings=s.rows, embedding_dim=s.dim, feature_names=list(s.features))
        for s in specs
        if not s.sequence
    ]
    tables = nn.ModuleDict({"bags": EmbeddingBagCollection(tables=bags, device=meta)})
    # TorchRec wants one width in a collection of sequence tables.
    for dim in sorted({s.dim for s in specs if s.sequence}):
        sequences = [
            EmbeddingConfig(name=s.name, num_embeddings=s.rows, embedding_dim=s.dim, feature_names=list(s.features))
            for s in specs
            if s.sequence and s.dim == dim
        ]
        tables[f"sequences{dim}"] = EmbeddingCollection(tables=sequences, device=meta)
    apply_optimizer_in_backward(torch.optim.SGD, tables.parameters(), {"lr": 0.1})
    return tables, specs, lengths


def our_plan(number: int, cluster: Cluster, seed: int) -> Planned:
    tables, specs, lengths = invented_tables(number, seed)
    return make_plan(tables, specs, cluster, batch_size=BATCH_ROWS, pooling_factors=lengths)


def stock_plan(number: int, cluster: Cluster, seed: int) -> tuple[float, float | None]:
    """Seconds that TorchRec's planner takes, and milliseconds of its plan; None where it finds none."""
    tables, specs, lengths = invented_tables(number, seed)
    constraints = {
        s.name: ParameterConstraints(
            pooling_factors=[lengths[f] for f in s.features], compute_kernels=[COMPUTE_KERNEL, REPLICATED_KERNEL]
        )
        for s in specs
    }
    topology = topology_of(cluster)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=BATCH_ROWS,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(cluster.reserved_share),
        debug=False,
    )
    start = time.perf_counter()
    try:
        planner.plan(tables, sharders())
    except PlannerError:
        return time.perf_counter() - start, None
    return time.perf_counter() - start, NoopPerfModel(topology).rate(planner._best_plan)


def parse_case(text: str) -> tuple[int, int]:
    """`512x200` as ranks and tables."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,3})", text)
    if found is None:
        raise UserError(f"--case {text!r}: write RANKSxTABLES, as in {CASES[0]}.")
    return int(found[1]), int(found[2])


def bench_plan(cases: list[tuple[int, int]], machine: str, seed: int, stock_seconds: float) -> dict[str, Any]:
    """Plan every (ranks, tables) with both planners.

    Args:
        machine: of the cluster, as `find_cluster` knows it.
        stock_seconds: after which TorchRec's planner is stopped.

    Raises:
        UserError: there is no such machine, or the tables do not fit it.
    """
    quieten()
    told = []
    for world, number in cases:
        cluster = find_cluster(machine, world)
        planned = our_plan(number, cluster, seed)
        start = time.perf_counter()
        # TorchRec's object of it is made when asked for.
        planned.plan  # noqa: B018
        seconds = planned.seconds + time.perf_counter() - start
        stock_took, stock_ms = _stock_in_a_child(number, machine, world, seed, stock_seconds)
        told.append(
            {
                "world": world,
                "tables": number,
                "seconds": round(seconds, 3),
                "ms": planned.rated_ms,
                "bound_ms": planned.bound_ms,
                "stock_seconds": stock_took,
                "stock_ms": stock_ms,
                "cost_ratio": stock_ms and planned.rated_ms / stock_ms,
            }
        )
    return {"cases": told}


def _stock_in_a_child(
    number: int, machine: str, world: int, seed: int, seconds: float
) -> tuple[float | None, float | None]:
    """`stock_plan` in a process of its own, which is killed after `seconds`; that gives nothing."""
    arguments = [str(number), machine, str(world), str(seed)]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dist_rec.bench.plan", *arguments],
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return None, None
    if done.returncode:
        raise RuntimeError(f"TorchRec's planner failed on {number} tables, {world} ranks:\n{done.stderr[-2000:]}")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def print_summary(result: dict[str, Any]) -> None:
    for case in result["cases"]:
        stock = "stopped" if case["stock_seconds"] is None else f"{case['stock_seconds']:.1f} s"
        ratio = "" if case["cost_ratio"] is None else f", ours takes {case['cost_ratio']:.3f} of its plan's time"
        print(
            f"{case['world']} ranks, {case['tables']} tables: {case['seconds']} s, {case['ms']:.2f} ms a step, at most "
            f"{case['ms'] / case['bound_ms'] - 1:.1%} above the best; TorchRec's planner: {stock}{ratio}"
        )


def main() -> None:
    """A child: NUMBER MACHINE WORLD SEED."""
    quieten()
    number, machine, world, seed = sys.argv[1:]
    print(json.dumps(stock_plan(int(number), find_cluster(machine, int(world)), int(seed))))


if __name__ == "__main__":
    main()
