"""MVKE's runs from end to end: parity of ranks, interrupted training, evaluation, planning, finetuning, two towers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import build_small, run_command
from finetunes import FOUNDATION_ROWS, build_fresh, tensors
from test_parity import check_parity

from dist_rec.config import Config
from dist_rec.data.index import read_index
from dist_rec.strict import from_dict
from dist_rec.text.embed import embed
from dist_rec.training import checkpoint
from dist_rec.training.kinds import kind_of

SECONDS = 240
HISTORY = "history: {dropout: 0.0, feedforward: 16}"
# Vectors are small where training begins, and so are gradients.
MODELS = {
    "official": f"{{kind: mvke, width: 16, {HISTORY}, user: {{hidden: [8]}}, embedding_l2: 0.01}}",
    "options": f"{{kind: mvke, preset: paper, width: 24, {HISTORY}, user: {{hidden: [8]}}, item: {{kind: vke_vkg}}, "
    "kernels: {crossed: true, shared: 1}, score: {kind: parts, scale: 5.0}, "
    "tasks: {ctr: {label: ctr}, relevance: {label: relevance, given: ctr, kernels: 2}}}",
    "ple": f"{{kind: mvke, width: 16, {HISTORY}, user: {{kind: ple, hidden: [8]}}}}",
    "interests": f"{{kind: mvke, width: 16, {HISTORY}, user: {{kind: multi_interest, hidden: [8]}}}}",
}


@pytest.mark.parametrize(
    ("name", "ranks", "layouts", "stages"),
    [
        ("official", 2, "row_wise,column_wise", "0,3"),
        ("official", 3, "table_wise+item_id=row_wise", "1,2"),
        ("options", 2, "row_wise", "1,3"),
        ("ple", 2, "row_wise", "3"),
        ("interests", 3, "column_wise", "3"),
    ],
)
def test_any_layout_equals_one_process(small, name, ranks, layouts, stages):
    check_parity(ranks, small, layouts, stages, f"model={MODELS[name]}")


def test_any_layout_equals_one_process_with_a_language_model(tmp_path, tiny_model):
    """Co-trained in the engine; the last batches leave ranks without texts."""
    data = build_small(tmp_path, tokenizer=tiny_model)
    few_at_the_end = ("data.batch_size=104", f"model={MODELS['official']}")
    check_parity(3, data, "row_wise", "1,3", "text.mode=full", f"text.model={tiny_model}", *few_at_the_end)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model) -> Path:
    """Data of three domains in shards/, vectors of its texts in store/, a config, and the data of a fourth domain."""
    folder = tmp_path_factory.mktemp("mvke")
    data = build_small(folder, FOUNDATION_ROWS, split="random:4,1,1", tokenizer=tiny_model)
    fresh = build_fresh(folder / "new", data)
    embed([data, fresh], tiny_model, str(folder / "store"), max_tokens=32, store_dtype="float32")
    tree = {
        "run": {"root": str(folder / "runs"), "name": "mvke", "seed": 5},
        "data": {split: f"{data}/{split}" for split in ("train", "valid", "test")}
        | {"batch_size": 40, "streams": 8, "shuffle_window": 128},
        "tables": {"dim": 8},
        "text": {"mode": "frozen", "store": str(folder / "store")},
        "model": yaml.safe_load(MODELS["official"]) | {"width": 8},
        "train": {"epochs": 2, "device": "cpu", "log_every": 1},
    }
    (folder / "mvke.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="module")
def run(folder) -> Path:
    """A run on two ranks that stopped after a checkpoint and went on."""
    ranks = ["--nproc-per-node", "2"]
    dist_rec("train", folder / "mvke.yaml", *ranks, "--train.steps", "7")
    assert "going on from step-00000007 bit for bit" in dist_rec("train", folder / "mvke.yaml", *ranks)
    return folder / "runs" / "mvke"


def dist_rec(verb: str, *arguments) -> str:
    done = run_command([sys.executable, "-m", "dist_rec", verb, *map(str, arguments)], SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout if "--json" in arguments else done.stderr


def losses(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["losses"] for line in lines if "losses" in line]


def test_ranks_and_interruptions_change_nothing(folder, run):
    dist_rec("train", folder / "mvke.yaml", "--run.name", "one")
    one, two = losses(folder / "runs" / "one"), losses(run)
    assert len(one) == len(two) > 15 and set(one[0]) == {"ctr", "relevance", "embedding_l2", "loss"}
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, abs=1e-5)
    found, wanted = (
        json.loads((path / "evaluation.json").read_text())["overall"] for path in (run, folder / "runs" / "one")
    )
    assert set(found) == {"ctr", "relevance"} and 0 < found["ctr"]["auc"] < 1
    for task in found:
        assert found[task]["logloss"] == pytest.approx(wanted[task]["logloss"], abs=1e-5)


def test_evaluate_says_what_training_said(run):
    before = json.loads((run / "evaluation.json").read_text())["overall"]
    dist_rec("evaluate", run, "--nproc-per-node", "1")
    after = json.loads((run / "evaluation.json").read_text())["overall"]
    for task in before:
        for metric, value in before[task].items():
            assert after[task][metric] == pytest.approx(value, abs=1e-6), (task, metric)


def test_a_plan_counts_the_dense_parameters(folder, run):
    said = dist_rec("plan", folder / "mvke.yaml", "--json")
    manifest = checkpoint.read_state(checkpoint.find(run)).manifest
    # Parameters of the checkpoint, as a plan counts them before there is one.
    counted = sum(int(torch.tensor(info.shape).prod()) for info in manifest.dense.values())
    assert json.loads(said.splitlines()[-1])["dense"]["parameters"]["towers"] == counted


@pytest.mark.parametrize(
    ("freeze", "stays", "moves"),
    [
        ("L0+L1", ("user_fields.", "item_fields.", "text_projection."), ("kernels.", "experts.", "item.")),
        ("adaptor", ("user_fields.", "experts.", "item.tower."), ("kernels.",)),
    ],
)
def test_a_new_domain_finetunes_the_parts_that_a_preset_leaves(folder, run, freeze, stays, moves):
    data = folder / "new" / "fresh"
    name = freeze.replace("+", "")
    dist_rec("finetune", run, "--data", data, "--name", name, "--freeze", freeze, "--train.device", "cpu")
    before, after = tensors(run), tensors(folder / "runs" / name)
    for key in before:
        if key.startswith(stays):
            assert torch.equal(before[key], after[key]), key
        elif key.startswith(moves):
            assert not torch.equal(before[key], after[key]), key
    found = json.loads((folder / "runs" / name / "evaluation.json").read_text())
    assert found["domains"]["fresh"]["ctr"]["rows"] > 0


def test_a_bundle_scores_old_ids_and_those_of_a_new_domain(folder, run):
    """They are in tables of their own, which a bundle joins."""
    data = folder / "new" / "fresh"
    dist_rec("finetune", run, "--data", data, "--name", "bundled", "--freeze", "L0", "--train.device", "cpu")
    tables = checkpoint.read_state(checkpoint.find(folder / "runs" / "bundled")).manifest.tables
    wanted = ["--bundle", folder / "bundle", "--precision", "fp32", "--json"]
    told = json.loads(dist_rec("export", folder / "runs" / "bundled", *wanted).splitlines()[-1])
    assert any("@1" in name for name in tables) and not any("@" in name for name in told["tables"])
    sizes = {name: feature["vocabulary"]["size"] for name, feature in told["schema"]["features"].items()}
    assert all(about["rows"] == sizes[name] for name, about in told["tables"].items())
    assert told["scores"]["rows"] > 20
    assert all(task["max_relative_error"] < 1e-6 for task in told["scores"]["tasks"].values())


def config_of(**changes) -> Config:
    tree = {"data": {"train": "x"}, "model": {"kind": "mvke"}} | changes
    return from_dict(Config, tree, "mine")


def test_what_is_read_of_the_data(small):
    schema, every = read_index(small).schema, ["user_id", "age", "history", "item_id", "tags", "title"]
    for changes, lacks in (
        ({"text": {"mode": "frozen", "store": "x"}}, set()),
        ({}, {"title"}),
        ({"model": {"kind": "mvke", "history": {"kind": "none"}}}, {"title", "history"}),
        ({"data": {"train": "x", "exclude_features": ["age"]}}, {"title", "age"}),
    ):
        config = config_of(**changes)
        features = kind_of(config).features(schema, config)
        assert features == [name for name in every if name not in lacks]
        towers = kind_of(config).towers(schema, config, features)
        assert (*towers.user_features, *towers.item_features) == tuple(features) and towers.exact["ctr"]


def test_a_report_shows_what_kernels_learned(run):
    """The same on two ranks as on one; every mixture adds up to 1."""
    found = []
    for ranks in (1, 2):
        out = run.parent / f"report-{ranks}.html"
        said = dist_rec("report", run, "--rows", 0, "--out", out, "--nproc-per-node", ranks, "--json")
        found.append(json.loads(said.splitlines()[-1]))
        html = out.read_text()
        for part in ("kernels-attention", "kernels-gates-0", "kernels-gates-1", "kernel of relevance"):
            assert part in html
    one, two = (report["kernels"] for report in found)
    assert one["names"] == ["shared 1", "shared 2", "ctr 1", "relevance 1"]
    assert one["fields"] == ["user_id", "age", "history"] and found[0]["left_out"] == {}
    assert found[0]["rows"] == found[1]["rows"] and sum(found[0]["rows"].values()) == found[0]["rows_of_split"]
    for a, b in zip(one["attention"], two["attention"], strict=True):
        assert a == pytest.approx(b, abs=1e-5) and 0.9 < sum(a) <= 1.00001
    for task, own in (("ctr", [0, 1, 2]), ("relevance", [0, 1, 3])):
        assert one["tasks"][task]["kernels"] == own and len(one["tasks"][task]["best"]) == 3
        for a, b in zip(one["tasks"][task]["tags"], two["tasks"][task]["tags"], strict=True):
            assert (a["tag"], a["rows"]) == (b["tag"], b["rows"]) and a["tag"].startswith("i")
            assert a["weights"] == pytest.approx(b["weights"], abs=1e-5) and sum(a["weights"]) == pytest.approx(1)
