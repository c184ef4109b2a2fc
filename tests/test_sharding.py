"""Sharding plans: what each type cuts, what is refused, one plan for all ranks, and plans written and read."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from conftest import run_hosts
from machines import cpus

from dist_rec.config import Config, TablesConfig
from dist_rec.embeddings.description import describe_plan, plan_from_description
from dist_rec.embeddings.planner import make_plan
from dist_rec.embeddings.sharders import SHARDING_TYPES
from dist_rec.embeddings.sharding import attach_optimizer
from dist_rec.embeddings.tables import EmbeddingTables, table_specs
from dist_rec.errors import UserError
from dist_rec.schema import Schema
from dist_rec.strict import from_dict
from dist_rec.training.prepare import prepare

CPU = torch.device("cpu")
ROWS = {"user": 41, "kind": 4, "item": 31}


def id_feature(rows: int, **more) -> dict:
    return {"role": "item", "kind": "id", "vocabulary": {"kind": "integer", "size": rows}, **more}


SCHEMA = from_dict(
    Schema,
    {
        "name": "plans",
        "domains": {"names": ["all"]},
        "features": {
            **{name: id_feature(rows) for name, rows in ROWS.items()},
            "history": {"role": "history", "kind": "ids", "shares": "item"},
        },
        "labels": {"ctr": {}},
    },
    "plans",
)


def planned(sharding: str, world_size: int, local_world_size: int, dim: int = 24, **overrides: str):
    """Unsharded collections, their specs, and the described plan."""
    single = {"item": "auto"} | overrides
    config = from_dict(
        TablesConfig,
        {"dim": dim, "sharding": sharding, "overrides": {name: {"sharding": s} for name, s in single.items()}},
        "tables",
    )
    specs = table_specs(SCHEMA, config, list(SCHEMA.features))
    tables = EmbeddingTables(specs, SCHEMA, config, torch.device("meta"))
    attach_optimizer(tables, config)
    ranks = {"world_size": world_size, "local_world_size": local_world_size, "device": CPU}
    plan = make_plan(tables, specs, cpus(world_size, local_world_size), batch_size=16, pooling_factors={}).plan
    return tables, plan, ranks


def shards_of(sharding: str, world_size: int, local_world_size: int, dim: int = 24, table: str = "user") -> list[tuple]:
    _, plan, _ = planned(sharding, world_size, local_world_size, dim)
    entry = describe_plan(plan)[table]
    assert entry["sharding_type"] == sharding
    return [(s["rank"], *s["offset"], *s["size"]) for s in entry["shards"]]


def test_every_type_cuts_what_its_name_says():
    """rank, row, column, rows, columns of each shard, on two hosts of two ranks."""
    assert len(shards_of("table_wise", 4, 2)) == 1
    assert shards_of("row_wise", 4, 2) == [(0, 0, 0, 11, 24), (1, 11, 0, 11, 24), (2, 22, 0, 11, 24), (3, 33, 0, 8, 24)]
    assert {s[1:] for s in shards_of("column_wise", 4, 2, 16)} == {(0, c, 41, 4) for c in (0, 4, 8, 12)}
    first = shards_of("table_row_wise", 4, 2)
    assert [s[1:] for s in first] == [(0, 0, 21, 24), (21, 0, 20, 24)]
    assert [s[0] for s in first] in ([0, 1], [2, 3])
    columns = shards_of("table_column_wise", 4, 2)
    assert [s[1:] for s in columns] == [(0, 0, 41, 12), (0, 12, 41, 12)]
    assert {s[0] for s in columns} in ({0, 1}, {2, 3})
    grid = shards_of("grid_shard", 4, 2)
    assert [s[1:] for s in grid] == [(0, 0, 21, 12), (21, 0, 20, 12), (0, 12, 21, 12), (21, 12, 20, 12)]
    assert sorted(s[0] for s in grid) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("dim", "ranks", "hosts", "host"), [(4, 4, 4, 4), (12, 4, 4, 12), (20, 4, 20, 20), (24, 4, 8, 12)]
)
def test_columns_are_cut_evenly_in_steps_of_four(dim, ranks, hosts, host):
    """The width of column shards on six ranks, three hosts of two, by who can take a column."""
    for sharding, width in (("column_wise", ranks), ("grid_shard", hosts), ("table_column_wise", host)):
        assert {s[4] for s in shards_of(sharding, 6, 2, dim)} == {width}


def test_a_grid_has_columns_on_one_host_too():
    assert {s[4] for s in shards_of("grid_shard", 2, 2)} == {12}


@pytest.mark.parametrize(("world", "local"), [(3, 3), (6, 3), (6, 6), (8, 1)])
def test_no_rank_is_left_without_rows(world, local):
    """4 rows are too few for 3 ranks (2, 2, 0): such a table is placed whole."""
    for sharding in ("row_wise", "table_row_wise", "grid_shard", "auto"):
        for table, entry in describe_plan(planned(sharding, world, local)[1]).items():
            assert all(shard["size"][0] > 0 for shard in entry["shards"]), (sharding, table)
    if local == 3:
        assert describe_plan(planned("grid_shard", world, local)[1])["kind"]["sharding_type"] == "table_wise"


@pytest.mark.parametrize("sharding", ["table_row_wise", "table_column_wise", "grid_shard", "data_parallel"])
def test_types_that_histories_cannot_have_are_refused_before_start(small, sharding):
    def wanted(**tables) -> Config:
        return from_dict(Config, {"data": {"train": small}, "tables": tables}, "c")

    why = "TorchRec.*would pool" if sharding == "data_parallel" else f"no {sharding}"
    with pytest.raises(UserError, match=rf"item_id: a history reads.*{why}.*tables\.overrides\.item_id\.shard"):
        prepare(wanted(sharding=sharding))
    prepare(wanted(sharding=sharding, overrides={"item_id": {"sharding": "row_wise"}}))
    no_history = wanted(sharding=sharding)
    no_history.data.exclude_features = ["history"]
    prepare(no_history)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            {"managed": 20, "sharding": "table_wise"},
            r"its ids are managed, .* not table_wise: choose auto or row_wise in",
        ),
        ({"managed": 20, "sharding": "data_parallel"}, "its ids are managed, .* not data_parallel"),
        (
            {"precision": "fp16", "sharding": "data_parallel"},
            r"data_parallel.*summed over ranks in fp16: .*\.precision",
        ),
        ({"kernel": "fused_uvm", "sharding": "data_parallel"}, r"data_parallel.*, fused_uvm in the host's: .*\.kernel"),
    ],
)
def test_what_no_engine_can_do_is_refused_before_start(override, words):
    config = from_dict(TablesConfig, {"overrides": {"user": override}}, "tables")
    with pytest.raises(UserError, match=f"user: .*{words}") as refused:
        table_specs(SCHEMA, config, list(SCHEMA.features))
    assert "tables.overrides.user." in str(refused.value)


def test_kernels_of_another_device_are_refused_before_start(small):
    tables = {"kernel": "fused_uvm", "overrides": {"tags": {"kernel": "fused"}}}
    config = from_dict(Config, {"data": {"train": small}, "train": {"device": "cpu"}, "tables": tables}, "c")
    with pytest.raises(UserError, match="CUDA, and this run is on cpu.*: set fused for user_id: fused_uvm, item_id: f"):
        prepare(config)


def test_tables_are_what_the_config_says():
    """Rows, widths, precisions and kernels of single tables and of all."""
    tables = {
        "dim": 16,
        "precision": "fp16",
        "kernel": "fused_uvm",
        "overrides": {
            "user": {"hash": 1000, "dim": 8, "precision": "fp32", "kernel": "fused"},
            "kind": {"size": 5},
            "item": {"managed": 64, "sharding": "row_wise"},
        },
    }
    config = from_dict(TablesConfig, tables, "tables")
    specs = table_specs(SCHEMA, config, list(SCHEMA.features))
    found = {s.name: (s.rows, s.dim, s.sharding, s.precision, s.kernel, s.managed, s.sequence) for s in specs}
    assert found == {
        "user": (1000, 8, "auto", "fp32", "fused", False, False),
        "kind": (5, 16, "auto", "fp16", "fused_uvm", False, False),
        "item": (64, 16, "row_wise", "fp16", "fused_uvm", True, True),
    }
    assert [s.name for s in specs if s.replicable] == ["user"]


def test_a_copied_table_has_no_shards_and_is_on_all_ranks():
    tables, plan, ranks = planned("data_parallel", 4, 2)
    described = json.loads(json.dumps(describe_plan(plan)))
    copied = {"sharding_type": "data_parallel", "compute_kernel": "dense", "ranks": [0, 1, 2, 3], "shards": []}
    assert described["user"] == described["kind"] == copied
    assert describe_plan(plan_from_description(described, tables, **ranks)) == described


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"ranks": [0, 1, 2]}, "data_parallel must have no shards, and ranks 0 .. 3"),
        ({"ranks": [False, True, 2, 3]}, "data_parallel must have no shards, and ranks 0 .. 3"),
        ({"ranks": None}, "data_parallel must have no shards"),
        ({"shards": [{"rank": 0, "offset": [0, 0], "size": [41, 24]}]}, "data_parallel must have no shards"),
        ({"shards": None}, "data_parallel must have no shards"),
        ({"compute_kernel": "fused"}, "compute_kernel must be dense"),
        ({"sharding_type": "row_wise"}, "compute_kernel must be fused"),
        ({"sharding_type": "row_wise", "compute_kernel": "fused"}, "shards must be a list"),
    ],
)
def test_a_damaged_description_of_a_copied_table_is_refused(damage, words):
    tables, plan, ranks = planned("data_parallel", 4, 2)
    description = describe_plan(plan)
    description["user"] |= damage
    with pytest.raises(UserError, match=f"user: {words}"):
        plan_from_description(description, tables, **ranks)


def test_no_description_copies_a_half_precision_table():
    """It would train in another precision than that of the config."""
    tables, plan, ranks = planned("data_parallel", 2, 2)
    description = describe_plan(plan)
    config = from_dict(TablesConfig, {"dim": 24, "precision": "fp16"}, "tables")
    halves = EmbeddingTables(table_specs(SCHEMA, config, list(SCHEMA.features)), SCHEMA, config, torch.device("meta"))
    with pytest.raises(UserError, match="user: data_parallel takes FP32 tables, not FP16"):
        plan_from_description(description, halves, **ranks)


def test_hosts_with_unequally_many_ranks(small):
    """They plan alike, all refuse cuts within hosts, and different plans raise instead of waiting."""
    done = run_hosts([2, 1], ["tests/hosts_worker.py", small], 120)
    lines = [line for one in done for line in one.stdout.splitlines() if line.startswith("RANK ")]
    assert len(lines) == 3, "".join(one.stderr[-3000:] for one in done)
    said = [json.loads(line[len("RANK ") :]) for line in lines]
    assert sorted(one["local_world_size"] for one in said) == [1, 2, 2]
    assert said[0]["plan"] == said[1]["plan"] == said[2]["plan"]
    assert {one["within hosts"] for one in said} == {
        "UserError: hosts have 1 to 2 ranks, and user_id: grid_shard needs equally many on each: start as many "
        "everywhere (--nproc-per-node), or choose another tables.sharding."
    }
    assert all(one["different plans"].startswith("RuntimeError: ranks hold different sharding plans") for one in said)


@pytest.mark.parametrize(("world", "local"), [(1, 1), (2, 2), (4, 2), (6, 3)])
@pytest.mark.parametrize("sharding", SHARDING_TYPES)
def test_a_plan_survives_its_description(sharding, world, local):
    """Through a file's text, down to every shard's place."""
    tables, plan, ranks = planned(sharding, world, local, item="column_wise")
    again = plan_from_description(json.loads(json.dumps(describe_plan(plan))), tables, **ranks)
    assert {path: dict(module) for path, module in again.plan.items()} == {
        path: dict(module) for path, module in plan.plan.items()
    }


def change(*path, to):
    def apply(description):
        *parents, last = path
        for key in parents:
            description = description[key]
        description[last] = to

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: d.pop("user"), "it lacks user"),
        (lambda d: d.update(extra=d["user"]), "it has 'extra', which is no table"),
        (change("user", to=[]), "user: must have exactly"),
        (change("item", "sharding_type", to="data_parallel"), "item: sharding_type must be one of"),
        (change("user", "sharding_type", to=["row_wise"]), "user: sharding_type must be one of"),
        (change("item", "sharding_type", to="grid_shard"), "item: sharding_type must be one of"),
        (change("user", "compute_kernel", to="fused_uvm"), "user: compute_kernel must be fused"),
        (change("user", "shards", to=7), "user: shards must be a list"),
        (change("user", "shards", to=[]), "user: shards must be a list"),
        (change("user", "shards", to=[{}] * 10**6), "user: shards must be a list"),
        (change("user", "shards", 0, "rank", to=True), "user: shards must be a list"),
        (change("user", "shards", 0, "size", to=[21.0, 12]), "user: shards must be a list"),
        (change("user", "shards", 0, "size", to=[21, 0]), "user: shards 0 wide"),
        (change("user", "shards", 0, "size", to=[21, 6]), "user: shards 6 wide"),
        (
            change("user", "shards", 0, "size", to=[10**30, 12]),
            "user: its shards are not the grid_shard cut of 41 x 24",
        ),
        (change("user", "shards", 1, "offset", to=[0, 0]), "user: its shards are not"),
        (lambda d: d["user"]["shards"].pop(), "user: its shards are not"),
        (change("user", "ranks", to=[0, 1, 0, 1]), "user: ranks must be"),
        (change("user", "ranks", to="0123"), "user: ranks must be"),
        (change("user", "sharding_type", to="row_wise"), "user: its shards are not the row_wise cut"),
    ],
)
def test_a_damaged_description_is_refused(damage, words):
    tables, plan, ranks = planned("grid_shard", 4, 2)
    description = json.loads(json.dumps(describe_plan(plan)))
    plan_from_description(deepcopy(description), tables, **ranks)
    damage(description)
    with pytest.raises(UserError, match=words):
        plan_from_description(description, tables, **ranks)


@pytest.mark.parametrize(
    ("sharding", "ranks"),
    [
        ("table_wise", [4]),
        ("table_wise", [-1]),
        ("row_wise", [0, 1, 3, 2]),
        ("table_row_wise", [1, 2]),
        ("table_row_wise", [1, 0]),
        ("table_column_wise", [1, 2]),
        ("grid_shard", [0, 1, 1, 2]),
    ],
)
def test_a_description_cannot_place_shards_anywhere(sharding, ranks):
    tables, plan, world = planned(sharding, 4, 2)
    description = json.loads(json.dumps(describe_plan(plan)))
    description["user"]["ranks"] = ranks
    for shard_, rank in zip(description["user"]["shards"], ranks, strict=True):
        shard_["rank"] = rank
    with pytest.raises(UserError, match="user: ranks .* are not a placement"):
        plan_from_description(description, tables, **world)


def test_a_description_cannot_leave_a_rank_without_rows():
    tables, plan, ranks = planned("row_wise", 3, 3)
    description = describe_plan(plan)
    cut = [{"rank": rank, "offset": [2 * rank, 0], "size": [rows, 24]} for rank, rows in enumerate((2, 2, 0))]
    description["kind"] |= {"sharding_type": "row_wise", "ranks": [0, 1, 2], "shards": cut}
    with pytest.raises(UserError, match="kind: too few rows for row_wise"):
        plan_from_description(description, tables, **ranks)


def test_a_plan_of_another_world_is_refused():
    tables, plan, ranks = planned("row_wise", 4, 2)
    with pytest.raises(UserError, match="not for these tables on 2 rank"):
        plan_from_description(describe_plan(plan), tables, **ranks | {"world_size": 2})
