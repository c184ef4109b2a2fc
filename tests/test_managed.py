"""Managed tables: every id its own row, hot ids keep theirs, and a checkpoint brings all of it back on any ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import SMALL_SCHEMA, build_small, check_verdicts, run_command, run_ranks, small_table
from safetensors.torch import load_file
from test_vocabulary import RAW, hashed
from torchrec.sparse.jagged_tensor import JaggedTensor

from dist_rec.config import Config
from dist_rec.config.model import ManagedConfig
from dist_rec.data.append import append
from dist_rec.data.build import build
from dist_rec.embeddings.ids import (
    COUNT,
    FREE,
    ID,
    LAST_SEEN,
    POLICIES,
    ManagedIds,
    fault_of_rows,
    first_vectors,
    owner_of,
    policy_of,
)
from dist_rec.errors import UserError
from dist_rec.schema import RAW_IDS, Schema
from dist_rec.scoring.hashes import mix
from dist_rec.strict import from_dict
from dist_rec.training import checkpoint
from dist_rec.training.prepare import prepare

SECONDS = 240
WORKER = "tests/managed_worker.py"
PARITY = {2: ["rowwise_adagrad/1/distance_lfu/fp32"], 3: ["adagrad/3/lru/fp32"], 1: ["sgd/0/lfu/fp32"]}
SAVED = {
    "distance": "rowwise_adagrad/1/distance_lfu/fp32",
    "recent": "adagrad/2/lru/fp16",
    "frequent": "sgd/3/lfu/fp32",
}


def managed(policy: str = "distance_lfu", rows: int = 9, interval: int = 1) -> ManagedIds:
    """The ids of a whole table, as one rank has them."""
    return ManagedIds(
        name="item",
        zch_size=rows,
        device=torch.device("cpu"),
        eviction_policy=policy_of(ManagedConfig(policy=policy)),
        eviction_interval=interval,
        input_hash_size=RAW_IDS,
    )


def look_up(ids: ManagedIds, *values: int) -> list[int]:
    """One step: the rows of these ids."""
    jagged = JaggedTensor(values=torch.tensor(values, dtype=torch.int64), lengths=torch.tensor([len(values)]))
    rows = ids.remap(ids.profile({"item": jagged}))["item"].values().tolist()
    ids.evict()
    return rows


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("policy", POLICIES)
def test_hot_ids_keep_their_rows_under_pressure(policy):
    """Five ids come every step, 20 others once each: 8 rows are enough for those who come again."""
    draw, ids, hot = np.random.default_rng(0), managed(policy, interval=2), [3, 7 << 40, 11, RAW_IDS - 1, 0]
    look_up(ids, *hot)
    rows = look_up(ids, *hot)
    assert len(set(rows)) == 5 and 8 not in rows
    for _ in range(40):
        assert look_up(ids, *hot, *draw.integers(100, 2**62, 20).tolist())[:5] == rows
    # Under lfu, the first three of the others stay: nobody else came more often.
    assert ids.occupied == 8 and (ids.counts(evaluated=False)[5] > 20) == (policy != "lfu")


def test_cold_ids_lose_their_rows_to_those_that_come_now():
    for policy in ("lru", "distance_lfu"):
        ids = managed(policy, rows=4)
        look_up(ids, 1, 2, 3)
        look_up(ids, 1)
        for _ in range(3):
            look_up(ids, 1, 10, 11)
        kept = ids.by_row()
        assert set(kept[ID].tolist()) == {1, 10, 11, FREE}, policy
        # Rows, occupied, lookups, collisions, admitted, evicted.
        assert ids.counts(evaluated=False).tolist()[:2] == [3, 3] and ids.counts(evaluated=False)[5] == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_worth_is_what_the_policy_scores_by(policy):
    """What a look keeps is worth no less than what it lets go, reckoned from outside."""
    draw, ids, compared = np.random.default_rng(1), managed(policy, rows=21, interval=4), 0
    for step in range(1, 81):
        # Fashions that change.
        values = (draw.integers(0, 12, draw.integers(5, 25)) + step // 4 * 5).tolist()
        before, came = ids.by_row(), {*values, *ids.pending()[ID].tolist()}
        look_up(ids, *values)
        # Of those who did not come, and whose numbers are what they were.
        absent = torch.tensor([i != FREE and i not in came for i in before[ID].tolist()])
        stays = torch.isin(before[ID], ids.by_row()[ID])
        score = ids.worth({kind: before[kind] for kind in ids.kinds}, ids.clock)
        if (absent & stays).any() and (absent & ~stays).any():
            assert score[absent & ~stays].max() <= score[absent & stays].min(), step
            compared += 1
    assert compared > 3


def test_no_id_of_an_interval_is_forgotten():
    """TorchRec makes room for as many as the first batch had, and 25 % more."""
    ids = managed(rows=200, interval=4)
    look_up(ids, 5)
    for step in range(3):
        look_up(ids, *range(100 + 40 * step, 140 + 40 * step), 5)
    rows = ids.by_row()
    assert set(rows[ID].tolist()) == {5, FREE, *range(100, 220)}
    assert rows[COUNT][rows[ID] == 5].item() == 4 and rows[LAST_SEEN][rows[ID] == 5].item() == 4


def test_evaluation_neither_admits_nor_counts():
    ids = managed()
    look_up(ids, 1, 2)
    kept, counts = ids.by_row(), ids.counts(evaluated=False)
    ids.eval()
    assert look_up(ids, 1, 50)[1] == 8 and ids.clock == 1
    assert same(kept, ids.by_row()) and torch.equal(counts, ids.counts(evaluated=False))
    assert ids.counts(evaluated=True).tolist() == [8, 2, 2, 1, 0, 0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("taken", [8, 9, 10])
def test_restored_ids_go_on_as_they_would_have(policy, taken):
    """At, before and after a look; rows, numbers and counts of 20 more steps."""
    draw = np.random.default_rng(2)
    steps = [(draw.zipf(1.2, 12) % 50).tolist() for _ in range(taken + 20)]
    one, other = managed(policy, interval=3), managed(policy, interval=3)
    for values in steps[:taken]:
        look_up(one, *values)
    look_up(other, 77, 78)
    other.restore(one.by_row(), one.pending(), taken)
    assert same(one.by_row(), other.by_row()) and same(one.pending(), other.pending())
    for values in steps[taken:]:
        assert look_up(one, *values) == look_up(other, *values)
    assert same(one.by_row(), other.by_row())


def test_a_first_vector_is_a_function_of_the_id():
    ids = np.arange(200_000)
    vectors = first_vectors(ids, 7, 0.5, 3, "item")
    assert (
        vectors.dtype == np.float32 and (vectors[[9, 70]] == first_vectors(np.array([9, 70]), 7, 0.5, 3, "item")).all()
    )
    for other in (first_vectors(ids[:9], 7, 0.5, 4, "item"), first_vectors(ids[:9], 7, 0.5, 3, "user")):
        assert not np.isclose(other, vectors[:9]).any()
    assert abs(vectors.mean()) < 2e-3 and abs(vectors.std() - 0.5) < 2e-3
    assert abs((vectors**4).mean() / vectors.var() ** 2 - 3) < 0.05
    assert abs(np.corrcoef(vectors.T) - np.eye(7)).max() < 0.01
    assert abs(np.corrcoef(vectors[:-1, 0], vectors[1:, 0])[0, 1]) < 0.01


@pytest.mark.parametrize("ranks", range(1, 9))
def test_the_owner_of_an_id_is_whom_the_exchange_sends_it_to(ranks):
    size = -(-RAW_IDS // ranks)
    edges = [e for r in range(ranks) for e in (r * size - 1, r * size, r * size + 1) if 0 <= e < RAW_IDS]
    ids = torch.cat([torch.randint(0, RAW_IDS, (2000,)), torch.tensor([*edges, 0, RAW_IDS - 1])])
    lengths, sent, *_ = torch.ops.fbgemm.block_bucketize_sparse_features(
        torch.tensor([len(ids)]),
        ids,
        bucketize_pos=False,
        sequence=True,
        block_sizes=torch.tensor([size]),
        total_num_blocks=torch.tensor([ranks]),
        my_size=ranks,
        keep_orig_idx=True,
    )
    assert torch.equal(owner_of(sent, ranks), torch.repeat_interleave(torch.arange(ranks), lengths))


def test_what_cannot_be_managed_is_refused_before_the_start(tmp_path, monkeypatch):
    data = build_small(tmp_path)

    def refused(override, **tables):
        tables = {"overrides": {"item_id": override}, **tables}
        with pytest.raises(UserError) as fault:
            prepare(from_dict(Config, {"data": {"train": data, "batch_size": 24, "streams": 8}, "tables": tables}, ""))
        return str(fault.value)

    assert "cut into rows over all ranks, not column_wise" in refused({"managed": 9, "sharding": "column_wise"})
    assert "fused_uvm_caching's cache" in refused({"managed": 9, "kernel": "fused_uvm_caching"})
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "tables.overrides.item_id.managed: 9 rows cut over 4 ranks" in refused({"managed": 9})
    assert "give a multiple of 4 that is 8 or more" in refused({"managed": 9})
    assert fault_of_rows("t", 8, 4) is None and fault_of_rows("t", 7, 4) and fault_of_rows("t", 10**6, 1025)


def words(kind: str, layouts: dict[str, str]) -> list[str]:
    return [f"{kind}:{name}:{layout}" for name, layout in layouts.items()]


def parity(ranks: int) -> list[str]:
    return [f"parity:{i}:{layout}" for i, layout in enumerate(PARITY[ranks])]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return build_small(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def by_two(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("managed")
    faults = words("faults", {"distance": SAVED["distance"]})
    jobs = [*parity(2), *words("save", SAVED), *words("load", SAVED), *faults]
    return folder, run_ranks(2, [WORKER, data, str(folder), *jobs], SECONDS), len(jobs)


def test_a_managed_run_is_that_of_plain_tables_and_goes_on_exactly(by_two):
    """Rows for all: plain tables' losses and vectors, features sharing a table under row-wise Adagrad included. Few
    rows, saved between two looks: the same bits after loading, then the same losses; evaluation changes nothing."""
    check_verdicts(by_two[1], by_two[2])


@pytest.mark.parametrize("ranks", [1, 3])
def test_ids_keep_what_they_have_on_other_ranks(by_two, data, ranks):
    """Vectors, states, numbers and what waits go by value, the coldest are dropped in words, unseen ids find rows."""
    jobs = [*words("load", SAVED), *words("faults", {"recent": SAVED["recent"]}), *parity(ranks)]
    check_verdicts(run_ranks(ranks, [WORKER, data, str(by_two[0]), *jobs], SECONDS), len(jobs))


def raw_file(path: Path, prefix: str, rows: int) -> str:
    """`small_table` of which all ids begin with `prefix`."""
    table = small_table({"big": rows, "middle": rows // 2, "tiny": 7})

    def named(value):
        return [named(v) for v in value] if isinstance(value, list) else value and prefix + value

    for name in ("user_id", "item_id", "history"):
        at, column = table.schema.get_field_index(name), table[name]
        table = table.set_column(at, name, pa.array([named(v) for v in column.to_pylist()], column.type))
    pq.write_table(table, path)
    return str(path)


@pytest.mark.slow
def test_a_run_takes_unseen_ids_and_says_what_becomes_of_them(tmp_path, monkeypatch, capsys):
    """Raw ids: 2 ranks train; ids that did not exist are appended; 3 ranks go on with them."""
    features = {name: dict(feature) for name, feature in SMALL_SCHEMA["features"].items()}
    for name in ("user_id", "item_id"):
        features[name]["vocabulary"] = RAW
    build(
        from_dict(Schema, SMALL_SCHEMA | {"features": features}, "raw"),
        [raw_file(tmp_path / "old.parquet", "", 180)],
        str(tmp_path / "shards"),
        block_rows=32,
        workers=1,
    )
    config = {
        "run": {"root": str(tmp_path), "name": "run"},
        "data": {"train": str(tmp_path / "shards"), "batch_size": 48, "streams": 12, "shuffle_window": 64},
        "tables": {
            "dim": 8,
            "managed": {"interval": 2},
            "overrides": {"user_id": {"managed": 150}, "item_id": {"managed": 121, "dim": 12}},
        },
        "model": {"width": 16, "history": {"feedforward": 16}},
        "train": {"log_every": 2},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "dist_rec", "train", str(tmp_path / "c.yaml")]
    first = run_command([*command, "--nproc-per-node", "2"], SECONDS)
    assert first.returncode == 0, first.stderr
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())["managed"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [line["managed"] for line in lines if "managed" in line]
    assert set(summary) == {"user_id", "item_id"} and told
    assert all(set(one) == {"occupancy", "collisions", "admitted", "evicted"} for line in told for one in line.values())
    assert sum(line["user_id"]["admitted"] for line in told) <= summary["user_id"]["admitted"] == 40
    assert summary["user_id"] | {"lookups": 0, "collisions": 0} == {
        "rows": 148,
        "occupied": 40,
        "lookups": 0,
        "collisions": 0,
        "admitted": 40,
        "evicted": 0,
    }
    evaluated = json.loads((run / "evaluation.json").read_text())["managed"]
    assert evaluated["user_id"] == {"occupancy": round(40 / 148, 4), "collisions": 0.0}
    append(str(tmp_path / "shards"), [raw_file(tmp_path / "new.parquet", "new-", 180)], workers=1)
    again = run_command([*command, "--nproc-per-node", "3", "--data.from_watermark", "true"], SECONDS)
    assert again.returncode == 0, again.stderr
    after = json.loads((run / "summary.json").read_text())["managed"]
    assert after["user_id"]["admitted"] == 80 and after["user_id"]["rows"] == 147
    assert after["user_id"]["lookups"] > summary["user_id"]["lookups"]
    saved = checkpoint.find(run)
    out = tmp_path / "all.safetensors"
    monkeypatch.setattr("sys.argv", ["dist-rec", "checkpoint", "export-full", str(saved), "--out", str(out)])
    from dist_rec.cli import main

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0, capsys.readouterr().err
    exported = load_file(out)["tables.user_id.id"]
    wanted = mix(np.array([hashed(f"{prefix}u{n}") for prefix in ("", "new-") for n in range(40)]))
    assert set(exported[exported != FREE].tolist()) == set(wanted.tolist())
