"""Frozen tables: not a bit moves, nothing runs or travels back for them, they have no optimizer state anywhere."""

from __future__ import annotations

import pytest
import yaml
from conftest import build_small, check_verdicts, run_ranks
from machines import cpus, gpus

from dist_rec.config import Config
from dist_rec.embeddings.plan_file import check_plan, read_plan, write_plan
from dist_rec.embeddings.tables import table_specs
from dist_rec.errors import UserError
from dist_rec.plan.answer import latency_ms
from dist_rec.plan.request import read_request, row_bytes
from dist_rec.strict import from_dict
from dist_rec.training import checkpoint
from dist_rec.training.checkpoint.export import inspect
from dist_rec.training.planning import plan_tables
from dist_rec.training.prepare import prepare

SECONDS = 240
WORKER = "tests/frozen_worker.py"
ALL = "user_id,item_id,tags"
# Optimizer, sharding, what single tables have, and which are frozen; by ranks.
STILL = {
    1: [
        f"rowwise_adagrad/table_wise/{ALL}",
        "adagrad/row_wise+item_id=managed~40+tags=managed~8/item_id",
        "sgd/table_wise/tags,user_id",
    ],
    2: [
        "rowwise_adagrad/row_wise+user_id=sharding~data_parallel/user_id,item_id",
        f"adagrad/table_wise+user_id=sharding~data_parallel/{ALL}",
        "adagrad/row_wise+user_id=sharding~data_parallel+tags=sharding~data_parallel/tags",
        "sgd/row_wise+item_id=precision~fp16/item_id",
        "rowwise_adagrad/row_wise+user_id=managed~50+tags=managed~8/tags",
        "rowwise_adagrad/row_wise+item_id=managed~40+user_id=managed~50/item_id,user_id",
        "adagrad/column_wise+tags=sharding~table_wise/user_id",
        "rowwise_adagrad/row_wise/",
    ],
}
SAVED = {"some": "rowwise_adagrad/row_wise/item_id,tags", "none": "adagrad/table_wise/", "all": f"sgd/row_wise/{ALL}"}
# Frozen ones that train, trained ones that are frozen, and the same again: that goes on exactly.
LOADED = {
    2: {
        "some": [SAVED["some"], "rowwise_adagrad/table_wise/user_id,tags", "rowwise_adagrad/row_wise/"],
        "none": ["adagrad/row_wise+user_id=sharding~data_parallel/user_id,item_id", f"adagrad/table_wise/{ALL}"],
        "all": [SAVED["all"]],
    },
    1: {"some": ["rowwise_adagrad/table_wise/user_id"], "none": [f"adagrad/row_wise/{ALL}"]},
}
PARTLY = "rowwise_adagrad/table_wise+tags=dim~8/tags"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return build_small(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def by_two(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    jobs = [f"still:{i}:{layout}" for i, layout in enumerate(STILL[2])]
    jobs += [f"save:{name}:{layout}" for name, layout in SAVED.items()]
    jobs += [f"load:{name}:{layout}" for name, layouts in LOADED[2].items() for layout in layouts]
    jobs.append(f"some:some:{PARTLY}")
    return folder, run_ranks(2, [WORKER, data, str(folder), *jobs], SECONDS), len(jobs)


def test_frozen_tables_stand_still_on_two_ranks(by_two):
    """In every bit, ids included, beside tables that train as ever, and nothing of theirs runs or goes back. Saved,
    they go on exactly, or train, or freeze."""
    check_verdicts(by_two[1], by_two[2])


def test_frozen_tables_stand_still_on_one_rank(by_two, data):
    jobs = [f"still:{i}:{layout}" for i, layout in enumerate(STILL[1])]
    jobs += [f"load:{name}:{layout}" for name, layouts in LOADED[1].items() for layout in layouts]
    check_verdicts(run_ranks(1, [WORKER, data, str(by_two[0]), *jobs], SECONDS), len(jobs))


def test_a_checkpoint_tells_which_tables_were_frozen(by_two):
    found = inspect(checkpoint.read_manifest(checkpoint.find(by_two[0] / "some")))["tables"]
    assert {name: info["frozen"] for name, info in found.items()} == {"item_id": True, "tags": True, "user_id": False}
    assert found["item_id"]["optimizer"] == {} and found["user_id"]["optimizer"] == {"momentum1": "row"}


def request_of(data: str, tmp_path, optimizer: str = "adagrad"):
    config = {
        "data": {"train": data, "batch_size": 40, "streams": 8, "shuffle_window": 64},
        "tables": {"dim": 8, "optimizer": optimizer},
        "model": {"width": 16, "history": {"feedforward": 16}},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    return read_request(tmp_path / "c.yaml", {})


def frozen(request, *names: str):
    return request.with_tables({name: {"frozen": True} for name in names})


@pytest.mark.parametrize("cluster", [cpus(2, 2), gpus(2, 2)], ids=["cpu", "cuda"])
@pytest.mark.parametrize("sharding", ["row_wise", "data_parallel", "auto"])
def test_the_planner_counts_no_state_gradient_or_backward_of_frozen_tables(data, tmp_path, cluster, sharding):
    request = request_of(data, tmp_path)
    request = request.with_tables({s.name: {"sharding": sharding} for s in request.specs if not s.sequence})
    plain, some = (plan_tables(r, cluster, None) for r in (request, frozen(request, "user_id", "tags")))
    for name in ("user_id", "tags"):
        for option in some.options[name]:
            assert option.state_bytes.sum() == 0 == option.cost.backward_compute + option.cost.backward_comms
            (same,) = [
                o for o in plain.options[name] if (o.sharding_type, o.width) == (option.sharding_type, option.width)
            ] or [None]
            if same is None:  # cuts of rows are offered where row-wise momenta do not keep them whole
                continue
            gradients = 2 * option.weight_bytes if option.sharding_type == "data_parallel" else 0
            more = same.device_bytes + same.host_bytes - option.device_bytes - option.host_bytes
            assert (more == same.state_bytes + gradients).all() and same.state_bytes.sum() > 0
    (item,) = [o for o in some.options["item_id"] if o is some.chosen["item_id"]]
    assert item.state_bytes.sum() == item.weight_bytes.sum()
    if sharding == "row_wise":
        # Both pooled tables are frozen: of eight collectives, one sent their gradients.
        assert latency_ms(some) == pytest.approx(latency_ms(plain) * 7 / 8)
        every = frozen(request, "user_id", "tags", "item_id")
        assert latency_ms(plan_tables(every, cluster, None)) == pytest.approx(latency_ms(plain) * 3 / 4)
    assert row_bytes(frozen(request, "tags").specs[-1], "adagrad") == 32


def test_a_plan_is_for_tables_that_are_frozen_or_not(data, tmp_path):
    request = request_of(data, tmp_path)
    path, some = tmp_path / "plan.json", frozen(request, "tags")
    write_plan(path, plan_tables(some, cpus(2, 2), None), some.specs, request.config.tables)
    check_plan(path, some.specs, request.config.tables, 2, 2)
    with pytest.raises(UserError, match="tags: frozen was True, and is False now"):
        check_plan(path, request.specs, request.config.tables, 2, 2)
    assert read_plan(path).tables["tags"].frozen and not read_plan(path).tables["user_id"].frozen


def test_a_frozen_table_must_be_one(data):
    config = {"data": {"train": data}, "tables": {"dim": 8}}
    prepared = prepare(from_dict(Config, config, "test"))
    with pytest.raises(UserError, match="frozen tables: 'item' is not known"):
        table_specs(prepared.schema, prepared.config.tables, prepared.features, {"item"})
