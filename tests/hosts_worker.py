"""One rank on hosts that have unequally many: what `tests/test_sharding.py` starts.

torchrun ... tests/hosts_worker.py DATA
"""

from __future__ import annotations

import json
import sys

import torch
from hybrids import end
from machines import cpus

from dist_rec.config import Config
from dist_rec.embeddings.description import describe_plan
from dist_rec.embeddings.planner import make_plan
from dist_rec.embeddings.sharding import attach_optimizer, shard
from dist_rec.embeddings.tables import EmbeddingTables
from dist_rec.errors import UserError
from dist_rec.strict import from_dict
from dist_rec.training.prepare import prepare
from dist_rec.training.process import process_group
from dist_rec.training.setup import build_tables


def config(**tables) -> Config:
    return from_dict(Config, {"data": {"train": sys.argv[1]}, "tables": {"dim": 8, **tables}}, "hosts")


def different_plans(prepared, process) -> None:
    """Shard by a plan that rank 0 alone has."""
    tables = EmbeddingTables(prepared.specs, prepared.schema, prepared.config.tables, torch.device("meta"))
    attach_optimizer(tables, prepared.config.tables)
    cluster = cpus(process.world_size, 1)
    plan = make_plan(tables, prepared.specs, cluster, batch_size=8, pooling_factors={}).plan
    if process.is_main:
        entry = plan.plan["trained.bags"]["user_id"]
        entry.ranks = [(entry.ranks[0] + 1) % process.world_size]
    shard(tables, prepared.specs, plan, prepared.config.tables, process.device, 0)


def said_by(attempt) -> str:
    try:
        attempt()
    except (UserError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main() -> None:
    with process_group(config(), torch.device("cpu")) as process:
        within = prepare(config(overrides={"user_id": {"sharding": "grid_shard"}}))
        whole = prepare(config(sharding="table_wise"))
        _, _, plan = build_tables(prepare(config()), process)
        said = {
            "local_world_size": process.local_world_size,
            "plan": describe_plan(plan),
            "within hosts": said_by(lambda: build_tables(within, process)),
            "different plans": said_by(lambda: different_plans(whole, process)),
        }
        # In one piece: ranks of a host write to the same pipe.
        print(f"RANK {json.dumps(said)}\n", end="", flush=True)
    end()


main()
