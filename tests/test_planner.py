"""The planner: TorchRec's estimates, the search's optimum, memory, and what does not fit."""

from __future__ import annotations

import itertools
import json
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, kill_family, run_command, start
from machines import GIB, cpus, gpus
from planned_tables import collections, planned, stock_options, table
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.perf_models import NoopPerfModel

from dist_rec.bench.plan import BATCH_ROWS, invented_tables, parse_case
from dist_rec.embeddings.description import describe_plan, plan_from_description
from dist_rec.embeddings.planner import Cost, DoesNotFit, Option, Reserved, make_plan
from dist_rec.embeddings.planner.options import allowed, enumerate_options, topology_of
from dist_rec.embeddings.planner.search import Full, Search
from dist_rec.embeddings.sharders import sharders
from dist_rec.embeddings.tables import TableSpec
from dist_rec.errors import UserError

TYPES = ["table_wise", "column_wise", "row_wise", "table_row_wise", "table_column_wise", "grid_shard", "data_parallel"]


@pytest.mark.parametrize("cluster", [cpus(6, 3), gpus(16)], ids=["cpu", "gpu"])
def test_estimates_are_those_of_torchrec(cluster):
    """Of every shard of every type: milliseconds by part, and bytes, without optimizer state."""
    lengths = {"f_a": 7.5, "f_s": 30.0}
    for sharding in TYPES:
        specs = [table("a", 1003, 48, sharding=sharding)]
        if sharding in TYPES[:3]:
            specs.append(table("s", 5009, 48, sequence=True, sharding=sharding))
        tables = collections(specs)
        ours = enumerate_options(tables, specs, cluster, batch_size=512, pooling_factors=lengths, wire="fp32")
        for spec in specs:
            (option,) = ours[spec.name]
            given = {
                "sharding_types": [sharding],
                "compute_kernels": [option.kernel],
                "pooling_factors": [lengths[f] for f in spec.features],
                "min_partition": option.width,
            }
            theirs = [o for o in stock_options(tables, cluster, 512, **{spec.name: given}) if o.name == spec.name]
            (theirs,) = [o for o in theirs if o.sharding_type == sharding]
            assert [(s.offset, s.size) for s in theirs.shards] == option.shards
            assert len(option.costs) == len(theirs.shards)
            for cost, shard in zip(option.costs, theirs.shards, strict=True):
                perf = shard.perf
                parts = perf.fwd_compute, perf.fwd_comms, perf.bwd_compute, perf.bwd_comms, perf.prefetch_compute
                assert cost == Cost(*parts) and cost.total == perf.total
            gradients = 2 * option.weight_bytes if sharding == "data_parallel" else 0
            own = option.device_bytes, option.host_bytes
            own = [b - gradients if b.any() else b for b in own]
            assert own[0].tolist() == [shard.storage.hbm for shard in theirs.shards]
            assert own[1].tolist() == [shard.storage.ddr for shard in theirs.shards]


def test_the_rating_is_that_of_torchrecs_model():
    cluster = gpus(16)
    tables, specs, lengths = invented_tables(20, 3)
    ours = make_plan(tables, specs, cluster, batch_size=BATCH_ROWS, pooling_factors=lengths)
    wanted = {
        s.name: {
            "sharding_types": [ours.chosen[s.name].sharding_type],
            "compute_kernels": [ours.chosen[s.name].kernel],
            "pooling_factors": [lengths[f] for f in s.features],
            "min_partition": ours.chosen[s.name].width,
        }
        for s in specs
    }
    options = stock_options(tables, cluster, BATCH_ROWS, **wanted)
    assert len(options) == len(specs)
    for option in options:
        for shard, rank in zip(option.shards, ours.ranks[option.name], strict=True):
            shard.rank = rank
    assert ours.rated_ms == pytest.approx(NoopPerfModel(topology_of(cluster)).rate(options), rel=1e-12)
    assert ours.per_rank.ms.max() == ours.rated_ms == ours.per_rank.ms[ours.bottleneck]
    assert sum(load.ms for load in ours.per_table.values()) == pytest.approx(ours.per_rank.ms)
    assert (sum(load.device_bytes for load in ours.per_table.values()) == ours.per_rank.device_bytes).all()
    assert ours.bound_ms <= ours.rated_ms * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_no_plan_is_worse_than_torchrecs(seed):
    cluster = gpus(16, memory=GIB * 200)
    tables, specs, lengths = invented_tables(14, 100 + seed)
    ours = make_plan(tables, specs, cluster, batch_size=BATCH_ROWS, pooling_factors=lengths)
    topology = topology_of(cluster)
    constraints = {
        s.name: ParameterConstraints(
            pooling_factors=[lengths[f] for f in s.features], compute_kernels=["fused", "dense"]
        )
        for s in specs
    }
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=BATCH_ROWS, constraints=constraints, debug=False)
    planner.plan(tables, sharders())
    assert ours.rated_ms <= 1.05 * NoopPerfModel(topology).rate(planner._best_plan)


def option(name: str, kind: str, ms: float, shards: int = 1, bytes_: int = 0) -> Option:
    """An option of invented cost and bytes."""
    zeros = np.zeros(shards, dtype=np.int64)
    return Option(name, "bags", kind, "fused", 8, 8, 8, 1, 1, Cost(ms, 0, 0, 0, 0), zeros, zeros, zeros + bytes_, zeros)


def best_of_all(options: list[list[Option]], ranks: int, capacity: int) -> float:
    """By trying everything."""
    best = np.inf
    for chosen in itertools.product(*options):
        places = [
            [tuple(range(ranks))] if o.num_shards == ranks else list(itertools.combinations(range(ranks), o.num_shards))
            for o in chosen
        ]
        for placed in itertools.product(*places):
            ms, bytes_ = np.zeros(ranks), np.zeros(ranks)
            for o, on in zip(chosen, placed, strict=True):
                ms[list(on)] += o.cost.total
                bytes_[list(on)] += o.device_bytes[0]
            if bytes_.max() <= capacity:
                best = min(best, ms.max())
    return best


@pytest.mark.parametrize("capacity", [10**6, 40])
def test_small_searches_find_the_optimum(capacity):
    """Of random cases of four tables on three ranks, with room and without."""
    random = np.random.default_rng(5)
    full = 0
    for _ in range(12):
        options = []
        for t in range(4):
            ms, size = random.uniform(1, 10), int(random.integers(3, 30))
            options.append(
                [
                    option(f"t{t}", "table_wise", ms, 1, size),
                    option(f"t{t}", "row_wise", ms * random.uniform(0.3, 0.9), 3, size // 3),
                    option(f"t{t}", "column_wise", ms * random.uniform(0.5, 0.7), 2, size // 2),
                ]
            )
        least = best_of_all(options, 3, capacity)
        search = Search(options, 3, 1, (capacity, 0))
        try:
            found = search.run()
        except Full:
            assert not np.isfinite(least)
            full += 1
            continue
        assert search.bound <= least * (1 + 1e-9) and found.ms == pytest.approx(least)
        assert (found.load.bytes <= found.load.capacity).all()
    assert full < 6


def test_memory_decides_where_time_would_not():
    """Packed by time, the two slow small tables would part, and the large one not fit."""
    sizes = {"a": (9.0, 5), "b": (8.0, 5), "c": (1.0, 10)}
    tables = [[option(name, "table_wise", ms, 1, size)] for name, (ms, size) in sizes.items()]
    found = Search(tables, 2, 1, (10, 0)).run()
    assert found.load.bytes[0].tolist() == [10, 10] and found.ms == 17


def test_shards_lie_where_their_type_allows():
    """On three hosts of four: columns of one table on different ranks, hosts whole, a grid's columns on other hosts."""
    cluster = cpus(12, 4)
    kinds = {"column_wise": 12, "table_row_wise": 4, "table_column_wise": 4, "grid_shard": 12, "row_wise": 12}
    specs = [table(f"{kind}{i}", 997, 48, sharding=kind) for kind in kinds for i in range(3)]
    plan = planned(specs, cluster, optimizer="adagrad")
    for spec in specs:
        ranks = plan.ranks[spec.name]
        assert len(set(ranks)) == len(ranks) == kinds[spec.sharding]
        hosts = [rank // 4 for rank in ranks]
        if spec.sharding in ("table_row_wise", "table_column_wise"):
            assert len(set(hosts)) == 1
        if spec.sharding == "grid_shard":
            assert sorted(set(hosts)) == [0, 1, 2] and hosts == sorted(hosts, key=hosts.index)
    assert {plan.ranks[f"table_row_wise{i}"][0] // 4 for i in range(3)} == {0, 1, 2}
    ranks = {"world_size": 12, "local_world_size": 4, "device": torch.device("cpu")}
    description = json.loads(json.dumps(describe_plan(plan.plan)))
    again = plan_from_description(description, collections(specs), **ranks)
    assert describe_plan(again) == description


def offered(spec: TableSpec, ranks: int, local: int, *, rows_whole: bool = True) -> list[str]:
    return allowed(spec, ranks, local, rows_whole=rows_whole)


def test_auto_keeps_rows_whole_and_knows_hosts():
    whole = ["table_wise", "row_wise"]
    user, history = table("user", 41), table("item", 31, sequence=True)
    for ranks, local in ((2, 2), (2, 1)):
        assert offered(user, ranks, local) == [*whole, "data_parallel"]
        assert offered(history, ranks, local) == whole
    assert offered(user, 4, 2) == [*whole, "table_row_wise", "data_parallel"]
    assert offered(user, 4, 2, rows_whole=False) == [*whole, "column_wise", "table_row_wise", "data_parallel"]
    assert offered(history, 4, 2, rows_whole=False) == [*whole, "column_wise"]
    assert offered(user, 1, 1) == whole
    assert offered(table("user", 41, precision="fp16"), 2, 2) == whole
    assert offered(table("user", 41, kernel="fused_uvm"), 2, 2) == whole
    assert offered(table("user", 4), 3, 3) == ["table_wise", "data_parallel"]
    assert offered(table("user", 41, managed=True), 4, 2) == ["row_wise"]
    with pytest.raises(UserError, match=r"user: a managed table is cut row_wise, and 4 rows are too few for 3 ranks"):
        offered(table("user", 4, managed=True), 3, 3)


def test_rowwise_adagrad_is_never_cut_through_rows():
    """Though that would be faster."""
    specs = [table("a", 10**6, 256)]
    assert planned(specs, gpus(16), "adagrad").chosen["a"].width < 256
    assert planned(specs, gpus(16), "rowwise_adagrad").chosen["a"].width == 256


def test_small_tables_are_replicated_where_that_is_faster():
    found = planned([table(f"t{i}", 100) for i in range(64)], gpus(16), "rowwise_adagrad")
    kinds = {o.sharding_type for o in found.chosen.values()}
    assert "data_parallel" in kinds
    replicated = next(o for o in found.chosen.values() if o.sharding_type == "data_parallel")
    assert found.ranks[replicated.table] == tuple(range(16)) and replicated.kernel == "dense"


PLAN_OF_TIES = """
import json
from test_planner import *
specs = [table(name, 4096, 32) for name in "abcdef"] + [table("s", 4096, 32, sequence=True)]
found = planned(specs, cpus(4, 2))
given = {"batch_size": 512, "pooling_factors": {}, "wire": "fp32"}
listed = enumerate_options(collections(specs), specs, cpus(4, 2), **given)
print(json.dumps([describe_plan(found.plan), [[o.sharding_type for o in several] for several in listed.values()]]))
"""


def test_every_process_makes_the_same_plan(monkeypatch):
    """Ranks that plan differently would wait for each other forever."""
    makers = []
    for seed in "12":
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        makers.append(start([sys.executable, "-c", PLAN_OF_TIES], ROOT / "tests"))
    try:
        plans = [maker.communicate(timeout=90)[0] for maker in makers]
    finally:
        for maker in makers:
            kill_family(maker)
    assert plans[0] and plans[0] == plans[1], "options in another order win where costs are equal"


def test_alike_options_are_chosen_in_their_order():
    """On one host row_wise and table_row_wise cost the same."""
    several = [option("t", "table_wise", 4.0), option("t", "row_wise", 2.0, 2), option("t", "table_row_wise", 2.0, 2)]
    assert Search([several], 1, 2, (1, 1)).run().chosen == [1]


@pytest.mark.parametrize(
    ("optimizer", "precision", "a_row"),
    [
        ("sgd", "fp32", 64),
        ("adagrad", "fp32", 128),
        ("rowwise_adagrad", "fp32", 68),
        ("adagrad", "fp16", 96),
        ("rowwise_adagrad", "fp16", 36),
    ],
)
def test_optimizer_state_is_counted_exactly(optimizer, precision, a_row):
    """It is fp32 whatever the weights are; a row of 16 here. Row-wise Adagrad has one number a row and shard."""
    specs = [table("a", 1000, 16, sharding="row_wise", precision=precision)]
    of = planned(specs, cpus(3, 3), optimizer).chosen["a"]
    assert (of.weight_bytes + of.state_bytes).tolist() == [334 * a_row, 334 * a_row, 332 * a_row]
    assert (of.host_bytes > of.weight_bytes + of.state_bytes).all() and not of.device_bytes.any()
    if optimizer == "rowwise_adagrad":
        specs = [table("a", 1000, 16, sharding="column_wise", precision=precision)]
        assert planned(specs, cpus(2, 2), optimizer).chosen["a"].state_bytes.tolist() == [4000, 4000]


def test_weights_in_the_hosts_memory_leave_the_device_free():
    rows = {"fused": 0, "fused_uvm": 0, "fused_uvm_caching": 0}
    for kernel in rows:
        of = planned([table("a", 10**8, 64, sharding="table_wise", kernel=kernel)], gpus(8), "rowwise_adagrad")
        rows[kernel] = of.chosen["a"].device_bytes[0], of.chosen["a"].host_bytes[0]
        assert of.chosen["a"].kernel == kernel
    weights, state = 10**8 * 64 * 4, 10**8 * 4
    assert rows["fused"][1] == 0 and rows["fused"][0] > weights + state
    assert rows["fused_uvm"][0] < weights / 100 and rows["fused_uvm"][1] == weights + state
    assert weights / 5 < rows["fused_uvm_caching"][0] < weights / 2
    assert rows["fused_uvm_caching"][1] == weights + state


def test_what_does_not_fit_is_named_with_numbers():
    specs = [table("big", 10**9, 64, sharding="table_wise"), table("small", 1000)]
    with pytest.raises(DoesNotFit) as caught:
        planned(specs, cpus(4, 4, 100 * GIB))
    found = caught.value
    assert (found.table, found.memory) == ("big", "host")
    assert found.needed > 10**9 * 64 * 4 > 100 * GIB == found.available
    assert found.excess == found.needed - found.available
    words = str(found)
    assert "big" in words and f"{found.excess / GIB:.3f} GiB too many" in words and "rank 0" in words
    assert "1,000,000,000 x 64 fp32" in words and "row_wise" in words
    specs[0] = table("big", 10**9, 64, sharding="row_wise")
    assert planned(specs, cpus(4, 4, 100 * GIB)).chosen["big"].sharding_type == "row_wise"
    specs += [table(f"other{i}", 10**9, 64) for i in range(3)]
    with pytest.raises(DoesNotFit, match=r"tables take 95\d\.\d GiB"):
        planned(specs, cpus(4, 4, 100 * GIB))


def test_a_plan_that_just_fits_is_found():
    """Twelve tables that fill six ranks to 96 %."""
    specs = [table(f"t{i}", (8 if i < 6 else 4) * 10**6, 64) for i in range(12)]
    need = sum(s.rows * s.dim * 4 for s in specs)
    found = planned(specs, cpus(6, 6, int(need / 6 / 0.96)), lengths={f"f_t{i}": 1.0 + i for i in range(12)})
    assert found.per_rank.host_bytes.max() <= found.capacity[1]
    with pytest.raises(DoesNotFit):
        planned(specs, cpus(6, 6, need // 6))


def test_what_others_need_is_left_to_them():
    specs = [table("a", 10**6, 64, sharding="table_wise")]
    need = int(planned(specs, gpus(8)).chosen["a"].device_bytes[0])
    for device, fits in ((64 * GIB - need, True), (64 * GIB - need + 1, False)):
        if fits:
            assert planned(specs, gpus(8), reserved=Reserved(device=device)).capacity[0] == need
        else:
            with pytest.raises(DoesNotFit) as caught:
                planned(specs, gpus(8), reserved=Reserved(device=device))
            assert (caught.value.memory, caught.value.excess) == ("device", 1)


def test_half_precision_on_the_wire_halves_exchanges():
    specs = [table("a", 10**6, 64, sharding="row_wise")]
    full, half = (planned(specs, gpus(16), wire=wire).chosen["a"].cost for wire in ("fp32", "bf16"))
    assert half.forward_comms == full.forward_comms / 2


def test_every_option_is_told_with_what_it_would_cost():
    tables, specs, lengths = invented_tables(10, 1)
    found = make_plan(tables, specs, gpus(16), batch_size=BATCH_ROWS, pooling_factors=lengths)
    for spec in specs:
        options, instead = found.options[spec.name], found.instead[spec.name]
        assert options[0] is found.chosen[spec.name] and instead[0] == pytest.approx(found.rated_ms)
        assert instead[1:] == sorted(instead[1:]) and len(options) > 2
        # No single change makes the plan better.
        assert min(instead) >= found.rated_ms * (1 - 1e-9)


def test_ranks_must_fill_their_hosts():
    with pytest.raises(UserError, match=r"10 ranks do not fill hosts of 8 each: choose a multiple of 8"):
        planned([table("a", 100)], gpus(10))
    assert len(planned([table("a", 100)], gpus(4)).per_rank.ms) == 4


def test_200_tables_on_512_ranks_are_planned_in_seconds():
    """Processor seconds, for other processes may be busy; and the plan is near what no plan can beat."""
    tables, specs, lengths = invented_tables(200, 0)
    begin = time.process_time()
    found = make_plan(tables, specs, gpus(512, memory=68 * GIB), batch_size=BATCH_ROWS, pooling_factors=lengths)
    assert len(found.plan.plan["bags"]) == sum(not s.sequence for s in specs)
    assert time.process_time() - begin < 10
    assert found.rated_ms <= 1.1 * found.bound_ms
    assert found.per_rank.device_bytes.max() <= found.capacity[0]


def test_bench_plan_stops_a_slow_planner():
    command = [sys.executable, "-m", "dist_rec", "bench", "plan", "--case", "16x6", "--stock-seconds", "0.2", "--json"]
    done = run_command(command, 90)
    assert done.returncode == 0, done.stderr[-2000:]
    (case,) = json.loads(done.stdout.splitlines()[-1])["cases"]
    assert (case["world"], case["tables"]) == (16, 6) and case["seconds"] > 0
    assert case["stock_seconds"] is None and case["cost_ratio"] is None
    for wrong in ("16by6", "0x6", "16x", "-1x2"):
        with pytest.raises(UserError, match="write RANKSxTABLES"):
            parse_case(wrong)
