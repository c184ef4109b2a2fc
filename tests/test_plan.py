"""`dist-rec plan`: clusters that are not here, reasons, ways out, a plan that training takes, and the truth."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import ROOT, SMALL_SCHEMA, run_command
from torch.utils.flop_counter import FlopCounterMode

from dist_rec.config import load_config
from dist_rec.embeddings.clusters import find_cluster, machine_names, read_machine, this_machine
from dist_rec.embeddings.plan_file import read_plan
from dist_rec.embeddings.quantities import number
from dist_rec.embeddings.tables import EmbeddingTables
from dist_rec.errors import UserError
from dist_rec.layers.reduction import Reduction
from dist_rec.plan.answer import GIB
from dist_rec.plan.ask import find_answer
from dist_rec.plan.command import Wishes, run
from dist_rec.plan.request import parse_settings, read_request
from dist_rec.plan.verify import spearman
from dist_rec.training.dense_cost import count_dense
from dist_rec.training.prepare import prepare
from dist_rec.training.setup import build_model, build_training_stream

TABLES = ("user_id", "item_id", "tags")
OURS = {
    "name": "ours",
    "device": "cuda",
    "ranks_per_host": 4,
    "device_memory": "16 GiB",
    "host_memory": "256 GiB",
    "device_bandwidth": "1 TB/s",
    "host_bandwidth": "200 GB/s",
    "host_to_device_bandwidth": "16 GB/s",
    "intra_host_bandwidth": "100 GB/s",
    "inter_host_bandwidth": "100 Gbit/s",
    "flops": {"fp32": "10 TFLOP/s", "bf16": "100 TFLOP/s"},
    "efficiency": {"memory": 0.5, "network": 0.5, "flops": 0.5},
}


@pytest.fixture(scope="module")
def config(small, tmp_path_factory):
    """A config of the small data set."""
    path = tmp_path_factory.mktemp("plan") / "config.yaml"
    tree = {
        "data": {"train": small, "batch_size": 48, "streams": 8},
        "tables": {"dim": 16},
        "model": {"width": 16, "history": {"feedforward": 16}},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def ask(config, *settings: str, cluster: str | None = None, schema=None, **wishes):
    return run(config, {}, list(settings), schema, Wishes(cluster=cluster, **wishes))


def refused(config, *settings: str, **wishes) -> str:
    with pytest.raises(UserError) as caught:
        ask(config, *settings, **wishes)
    return str(caught.value)


# Clusters


def test_every_machine_is_rated_with_a_source():
    assert {"a100-80", "h100", "h200", "b200", "cpu"} <= set(machine_names())
    for name in machine_names():
        for ranks in (1, 8, 64, 512):
            cluster = find_cluster(f"{ranks}x{name}")
            assert cluster.ranks == ranks and cluster.ranks_per_host == min(ranks, find_cluster(name).ranks)
        path = ROOT / "configs" / "clusters" / f"{name}.yaml"
        machine, comments = read_machine(path), [x for x in path.read_text().splitlines() if "https://" in x]
        assert machine.name == name and comments and all(line.startswith("#") for line in comments)
        # What a cluster computes with is what is assumed to be reached, not what is rated.
        assert cluster.intra_host_bandwidth == machine.intra_host_bandwidth * machine.efficiency.network
        assert cluster.flops["bf16"] == machine.flops["bf16"] * machine.efficiency.flops


def test_numbers_are_read_as_people_write_them():
    for text, value in {
        "2e9": 2_000_000_000, "80 GiB": 80 * 2**30, "3.35 TB/s": 3.35e12, "400 Gbit/s": 50e9, "67 TFLOP/s": 67e12,
        "0.5": 0.5, "12": 12, "h100": "h100", "row_wise": "row_wise", "": "",
    }.items():  # fmt: skip
        assert number(text) == value, text


def test_clusters_of_ones_own_are_read_and_their_faults_named(tmp_path):
    path = tmp_path / "ours.yaml"
    path.write_text(yaml.safe_dump(OURS))
    cluster = find_cluster(f"16x{path}")
    assert (cluster.ranks, cluster.hosts, cluster.device_memory) == (16, 4, 16 * 2**30)
    assert cluster.inter_host_bandwidth == 100e9 / 8 / 2
    path.write_text(yaml.safe_dump(OURS | {"device_memry": 1, "device_memory": 0, "flops": {"fp32": "1 TFLOP/s"}}))
    with pytest.raises(UserError) as caught:
        find_cluster(str(path))
    assert "Did you mean 'device_memory'?" in str(caught.value) and "cuda needs device_memory" in str(caught.value)
    for spec, message in {
        "64xh1oo": "Did you mean 'h100'?",
        "12xh100": "it has 8 a host, so take a multiple",
        "0xh100": "has no rank",
        str(tmp_path / "none.yaml"): "cannot read",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            find_cluster(spec)


# Answers


def test_a_cluster_that_is_not_here_is_answered_in_full(config, capsys):
    code, told = ask(config, "tables.item_id.rows=2e9", "data.batch_size=8192", cluster="64xh100")
    said = capsys.readouterr().out
    assert code == 0 and told["fits"] and not dist.is_initialized()
    assert json.loads(json.dumps(told)) == told
    assert set(told["tables"]) == set(TABLES)
    item = told["tables"]["item_id"]
    # fp32 weights, and row-wise Adagrad's number a row.
    assert item["weight_bytes"] == 2_000_000_000 * 16 * 4 and item["state_bytes"] == 2_000_000_000 * 4
    assert item["sharding_type"] == "row_wise" and item["ranks"] == list(range(64)) and item["kernel"] == "fused"
    assert min(item["ms"].values()) >= 0 and set(told["dense"]["bytes_by_stage"]) == {"0", "1", "2", "3"}
    ranks = told["per_rank"]
    assert len(ranks["table_ms"]) == len(ranks["device_bytes"]) == 64
    assert told["bottleneck_rank"] == int(np.argmax(ranks["table_ms"])) and told["imbalance"] >= 1
    parts = {name: ms for name, ms in told["step_ms"].items() if name != "total"}
    assert told["step_ms"]["total"] == pytest.approx(sum(parts.values()))
    assert told["rows_per_s"] == pytest.approx(8192 / told["step_ms"]["total"] * 1e3)
    for name in (*TABLES, "bottleneck: rank", "imbalance", "ZeRO", "assuming", "64xh100", "█"):
        assert name in said, name


def test_every_table_has_its_reason(config):
    told = ask(config, "tables.item_id.rows=2e9", cluster="64xh100")[1]["tables"]
    assert re.match(
        r"row_wise, because table_wise does not fit: it puts 12\d\.\d\d GiB on one rank", told["item_id"]["why"]
    )
    forced = ask(config, "tables.user_id.sharding=table_wise", cluster="8xh100")[1]["tables"]["user_id"]
    assert forced["sharding_type"] == "table_wise" and "because the config asks for it" in forced["why"]
    for table in told.values():
        assert table["why"].startswith(table["sharding_type"]) and table["why"].endswith(".")


def test_what_ifs_need_no_file(config):
    def plan(*settings, cluster="8xh100"):
        return ask(config, *settings, cluster=cluster)[1]

    assert plan("tables.tags.dim=64")["tables"]["tags"]["dim"] == 64
    half = plan("tables.tags.precision=fp16", "tables.tags.rows=1e6")["tables"]["tags"]
    assert half["weight_bytes"] == 1_000_000 * 16 * 2 and half["rows"] == 1_000_000
    assert plan("dense.zero_stage=3")["dense"]["stage"] == 3
    short, long = (plan(f"features.tags.mean_length={n}", "tables.tags.sharding=table_wise") for n in (1, 40))
    assert long["tables"]["tags"]["ms"]["forward_compute"] > 5 * short["tables"]["tags"]["ms"]["forward_compute"]
    assert plan("tables.tags.managed=4096")["tables"]["tags"]["sharding_type"] == "row_wise"


def test_wrong_what_ifs_are_refused_in_words(config):
    for setting, message in {
        "tables.itm_id.rows=5": "Did you mean 'item_id'?",
        "tables.item_id.rwos=5": "Did you mean 'rows'?",
        "tables.item_id.rows=many": "must be a whole number above 0",
        "tables.item_id.rows=0": "must be a whole number above 0",
        "tables.item_id.rows=1e40": "must be a whole number above 0",
        "features.tgas.mean_length=5": "Did you mean 'tags'?",
        "features.tags.length=5": "only features.FEATURE.mean_length",
        "data.batch_sise=5": "Did you mean 'batch_size'?",
        "item_id=5": "write KEY=VALUE",
    }.items():
        assert message in refused(config, setting, cluster="8xh100"), setting
    for wishes, message in (
        ({"world": "3,x"}, "--world 'x'"),
        ({"cluster": "8xh100", "clusters": "8xh100"}, "two ways to say the same"),
        ({"clusters": "8xh100,8xb200", "out": ROOT / "p.json"}, "--out is of one plan"),
        ({"cluster": "8xh100", "verify": True}, "--verify runs the plan on this machine"),
    ):
        assert message in refused(config, **wishes)


def test_clusters_stand_side_by_side(config, capsys):
    code, told = ask(config, "tables.item_id.rows=2e9", "tables.item_id.dim=128", clusters="8xh100,16xb200,512xa100-80")
    said = capsys.readouterr().out
    assert code == 0 and [one["fits"] for one in told["clusters"]] == [False, True, True]
    assert all(name in said for name in ("8xh100", "16xb200", "512xa100-80", "Ways out"))
    told = ask(config, cluster="h100", world="8,64")[1]
    assert [one["cluster"]["ranks"] for one in told["clusters"]] == [8, 64]


# What does not fit


def test_what_does_not_fit_is_named_with_ways_out_that_do(config, capsys):
    huge = ("tables.item_id.rows=2e9", "tables.item_id.dim=128")
    code, told = ask(config, *huge, cluster="8xh100")
    said = " ".join(capsys.readouterr().out.split())
    failure = told["failure"]
    assert code == 2 and not told["fits"] and failure["table"] == "item_id" and failure["memory"] == "device"
    # 2e9 rows of 128 fp32 and one number on 8 ranks.
    assert failure["needed"] == pytest.approx(2e9 * (128 * 4 + 4) / 8, rel=0.01)
    assert failure["excess"] == failure["needed"] - failure["available"]
    assert f"{failure['excess'] / GIB:.2f} GiB are too many" in said and f"rank {failure['rank']}" in said
    ways = told["ways_out"]
    assert len(ways) >= 3 and all(way["fullest"] <= way["capacity"] for way in ways)
    settings = [way["setting"] for way in ways]
    for key in ("dim=", "precision=fp16", "kernel=fused_uvm_caching", "hash=", "--world "):
        assert any(key in setting for setting in settings), (key, settings)
    for way in ways:
        option, value = way["setting"].split(" ")
        wish = {"world": value} if option == "--world" else {}
        chosen = [value] if option == "--set" else []
        kept = [setting for setting in huge if setting not in way["replaces"]]
        assert ask(config, *kept, *chosen, cluster="8xh100", **wish)[1]["fits"], way


def test_a_column_or_copy_that_does_not_fit_is_told_to_be_cut_row_wise(config):
    for sharding in ("table_wise", "data_parallel"):
        settings = ("tables.user_id.rows=1e9", "tables.user_id.dim=64", f"tables.user_id.sharding={sharding}")
        told = ask(config, *settings, cluster="64xh100")[1]
        assert told["failure"]["table"] == "user_id"
        assert "--set tables.user_id.sharding=row_wise" in [way["setting"] for way in told["ways_out"]]


def test_a_dense_model_that_does_not_fit_is_said_to_be_the_cause(config, tmp_path):
    path = tmp_path / "ours.yaml"
    path.write_text(yaml.safe_dump(OURS | {"device_memory": "1 GiB"}))
    told = ask(config, "model.width=1536", "model.history.feedforward=1536", cluster=f"8x{path}")[1]
    assert not told["fits"] and "the dense model alone takes" in told["failure"]["message"]
    assert "--set dense.zero_stage=3" in [way["setting"] for way in told["ways_out"]]


# The dense model


def test_bytes_of_each_zero_stage_are_deepspeeds(config):
    dense = count_dense(read_request(config, {}))
    p, n = dense.towers.trained, 8
    part = -(-p // n)
    # Weights, gradients, AdamW's two states, and from stage 1 on the fp32 copy that is stepped.
    wanted = {0: 16 * p, 1: 8 * p + 12 * part, 2: 4 * p + 16 * part, 3: 20 * part}
    assert {stage: dense.state_bytes(dense.towers, stage, n) for stage in range(4)} == wanted
    half = replace(dense, precision="bf16")
    assert half.state_bytes(dense.towers, 1, n) == 4 * p + 12 * part
    assert replace(dense, optimizer="sgd").state_bytes(dense.towers, 0, n) == 8 * p


def test_parameters_and_products_are_those_of_the_real_model(config):
    prepared = prepare(load_config(config))
    model, batch = build_model(prepared, Reduction()), build_training_stream(prepared, 0, 1).batch(0, 0)
    tables = EmbeddingTables(prepared.specs, prepared.schema, prepared.config.tables, torch.device("cpu"))
    dense = count_dense(read_request(config, {}))
    assert dense.towers.parameters == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(tables.vectors(tables(batch), batch), batch)["loss"].backward()
    assert dense.towers.flops == pytest.approx(counter.get_total_flops() / len(batch), rel=0.35)


def test_a_language_model_is_counted_without_its_weights(config, tiny_model, monkeypatch):
    from transformers import AutoModel

    from dist_rec.text.encoder import load_text_encoder

    wanted = sum(p.numel() for n, p in load_text_encoder(tiny_model).named_parameters() if "pooler" not in n)
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    request = read_request(config, parse_settings(["text.mode=full", f"text.model={tiny_model}"]))
    found = count_dense(request).language_model
    assert found.trained == wanted and found.flops > 2 * wanted / 10 and found.kept > 0
    told = ask(config, "text.mode=full", f"text.model={tiny_model}", cluster="8xh100")[1]
    assert (
        told["dense"]["bytes_by_stage"]["3"]["language_model"] < told["dense"]["bytes_by_stage"]["1"]["language_model"]
    )
    assert "no such folder" in refused(config, "text.mode=full", "text.model=/no/such", cluster="8xh100")


# Plans for train


def test_train_takes_the_plan(config, tmp_path):
    plan = tmp_path / "plan.json"
    # Under row-wise Adagrad auto never cuts columns.
    ask(config, "tables.item_id.sharding=column_wise", "tables.tags.sharding=column_wise", world="2", out=plan)
    train = [sys.executable, "-m", "dist_rec", "train", str(config), "--plan", str(plan), "--run.root", str(tmp_path)]
    done = run_command([*train, "--train.steps", "2", "--nproc-per-node", "2"], 150)
    assert done.returncode == 0, done.stderr[-3000:]
    used = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert used == read_plan(plan).plan and used["item_id"]["sharding_type"] == "column_wise"


def test_a_stale_plan_is_refused_in_words(config, tmp_path, monkeypatch):
    plan = tmp_path / "plan.json"
    ask(config, world="4", out=plan)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def said(**overrides) -> str:
        with pytest.raises(UserError) as caught:
            prepare(load_config(config, {"tables.plan": str(plan), **overrides}))
        return str(caught.value)

    assert "it is for 4 rank(s) (4xhere), and this run has 2" in said()
    monkeypatch.setenv("WORLD_SIZE", "4")
    prepare(load_config(config, {"tables.plan": str(plan)}))
    assert "user_id: dim was 16, and is 32 now" in said(**{"tables.overrides.user_id.dim": "32"})
    assert "tags: rows was 4, and is 4,096 now" in said(**{"tables.overrides.tags.hash": "4096"})
    assert "tags: precision was fp32, and is fp16 now" in said(**{"tables.precision": "fp16"})
    assert "it counts the state of rowwise_adagrad" in said(**{"tables.optimizer": "sgd"})
    assert "it has a table tags, which this run has not" in said(**{"data.exclude_features": "[tags]"})
    assert "and the config asks for column_wise" in said(**{"tables.sharding": "column_wise"})
    for text, message in {
        "{": "damaged: not JSON",
        "[]": "is no plan file",
        '{"format": "dist_rec-plan/1"}': "cluster: is required",
    }.items():
        plan.write_text(text)
        assert message in said(), text
    plan.unlink()
    assert "cannot read" in said()


# Pictures, suggestions, schemas without data, the command


def test_the_picture_is_written(config, tmp_path):
    picture = tmp_path / "plan.png"
    ask(config, "tables.item_id.rows=2e9", cluster="512xh100", plot=picture)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert "there is no folder" in refused(config, cluster="8xh100", plot=tmp_path / "no" / "plan.png")


def test_suggestions_size_tables_by_what_occurs(config, tmp_path, capsys):
    code, told = ask(config, "tables.item_id.hash=1e6", suggest=True)
    found = {one["table"]: one for one in told["suggestions"]}
    item = found["item_id"]
    assert code == 0 and item["key"] == "managed" and item["coverage"]["99"] <= item["value"] < 1000
    assert item["bytes_now"] == 1_000_000 * 68 and item["bytes_then"] == item["value"] * 68
    assert found["tags"]["key"] is None
    assert "item_id: {managed: " in capsys.readouterr().out


def test_a_schema_is_planned_before_its_data_is_built(config, tmp_path):
    path = tmp_path / "schema.yaml"
    path.write_text(yaml.safe_dump(SMALL_SCHEMA))
    text = refused(config, schema=path, cluster="8xh100")
    assert "item_id, tags, user_id are built from data" in text and "--set tables.item_id.rows=1e6" in text
    sizes = [f"tables.{name}.rows=1e8" for name in TABLES]
    told = ask(config, *sizes, "data.train=/not/built", schema=path, cluster="8xh100")[1]
    assert told["fits"] and told["tables"]["tags"]["rows"] == 100_000_000
    assert "--schema schema.yaml" in refused(config, "data.train=/not/built", cluster="8xh100")


def test_the_command_says_it_all_on_one_line_and_by_its_exit_code(config):
    plan = [sys.executable, "-m", "dist_rec", "plan", str(config), "--cluster", "8xh100", "--json"]
    done = run_command([*plan, "--data.batch_size", "96"], 60)
    told = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and told["fits"] and told["rows_of_a_rank"] == 12 and done.stderr == ""
    done = run_command([*plan, "--set", "tables.item_id.rows=1e12"], 120)
    assert done.returncode == 2 and json.loads(done.stdout.splitlines()[-1])["fits"] is False


# The truth


def test_rank_order_is_spearmans():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2], [3, 3, 9]) == pytest.approx(1) and spearman([1, 2], [3, 3]) == 0


def test_measured_memory_is_the_estimate_to_the_byte(config):
    told = ask(config, world="2", verify=True)[1]["verified"]
    assert told["memory_exact"] and len(told["alternatives"]) >= 4
    for one in told["alternatives"]:
        assert one["measured_ms"] > 0 and len(one["measured_bytes"]) == 2 and sum(one["measured_bytes"]) > 0
    assert -1 <= told["rank_order"] <= 1 and told["step_ms"]["measured"] > 0
    assert "--set tables.TABLE.rows" in refused(config, "tables.tags.rows=1e6", world="2", verify=True)


def test_this_machine_is_the_same_for_every_process():
    assert this_machine(2) == this_machine(2) and this_machine(4, ranks_per_host=2).hosts == 2
    assert 0 < this_machine(1).memory_of_a_rank() < this_machine(1).host_memory


def test_answers_do_not_change_the_request(config):
    request = read_request(config, {})
    before = list(request.specs)
    find_answer(request, find_cluster("8xh100"))
    assert request.specs == before
