"""A sequence model's run from end to end: any number of ranks, with and without tables, interrupted, evaluated."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import run_command
from finetunes import tensors
from safetensors.torch import load_file
from sequence_sets import NUM_ITEMS, NUM_USERS, WIDTH, build_sequences, config_of, item_rows, sequence_rows

from dist_rec.config import Config, load_config
from dist_rec.data.index import read_index
from dist_rec.errors import UserError
from dist_rec.strict import from_dict, to_dict
from dist_rec.text.embed import embed
from dist_rec.training import checkpoint
from dist_rec.training.evaluate import evaluate_run
from dist_rec.training.finetuning import how_it_starts
from dist_rec.training.kinds import kind_of
from dist_rec.training.prepare import prepare
from dist_rec.training.row_ranks import read_ranks

SECONDS = 180
MODELS = {
    "in_batch": {"contrast": {"weight": 0.1, "item_drop_share": 0.6}},
    "full": {"item": "text+id", "loss": "full", "repeats": True},
    "sampled": {"item": "text+id", "loss": "sampled", "samples": 13, "sampling": "popularity"},
}


@pytest.fixture(scope="module")
def sequences(tmp_path_factory, tiny_model) -> Path:
    """Data sets in shards/, vectors of their texts in store/ and of those with words dropped in dropped/."""
    folder = tmp_path_factory.mktemp("sequences")
    data = build_sequences(folder)
    common = {"max_tokens": 32, "store_dtype": "float32"}
    embed([f"{data}/train"], tiny_model, str(folder / "store"), **common)
    embed([f"{data}/train"], tiny_model, str(folder / "dropped"), word_drop=0.4, **common)
    return folder


def tree_of(folder: Path, name: str, **model) -> dict:
    tree = config_of(str(folder / "shards"), str(folder / "store"), **(MODELS[name] | model))
    tree["run"]["root"] = str(folder / "runs")
    if name == "in_batch":
        tree["text"]["dropped_store"] = str(folder / "dropped")
    return tree


@pytest.fixture(scope="module", params=MODELS)
def runs(request, sequences) -> tuple[Path, Path]:
    """One model on one rank; and on two, which stopped after a checkpoint and went on."""
    (path := sequences / f"{request.param}.yaml").write_text(yaml.safe_dump(tree_of(sequences, request.param)))
    found = [sequences / "runs" / f"{request.param}-{ranks}" for ranks in (1, 2)]
    dist_rec("train", path, "--run.name", found[0].name)
    two = ["--run.name", found[1].name, "--nproc-per-node", "2"]
    dist_rec("train", path, *two, "--train.steps", "7")
    said = dist_rec("train", path, *two)
    assert "going on from step-00000007 bit for bit" in said
    assert "1 of 30 items" in said and "have no text" in said
    return tuple(found)


def dist_rec(verb: str, *arguments) -> str:
    done = run_command([sys.executable, "-m", "dist_rec", verb, *map(str, arguments)], SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stderr


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[dict]:
    return [line["losses"] for line in lines_of(run) if "losses" in line]


def evaluation(run: Path, name: str = "evaluation") -> dict:
    found = json.loads((run / f"{name}.json").read_text())
    return {part: found[part] for part in ("overall", "domains")}


def test_ranks_and_interruptions_change_nothing(runs):
    one, two = map(losses, runs)
    assert len(one) == len(two) == 10
    # What is dropped from copies is drawn by each rank.
    compared = ["sequence_item"] if "sequence_sequence" in one[0] else list(one[0])
    steps = 1 if "sequence_sequence" in one[0] else len(one)
    for key in compared:
        assert [x[key] for x in two][:steps] == pytest.approx([x[key] for x in one][:steps], abs=1e-5), key
    assert one[-1]["loss"] < one[0]["loss"]
    found, wanted = evaluation(runs[1])["overall"]["next"], evaluation(runs[0])["overall"]["next"]
    assert found["rows"] == wanted["rows"] == NUM_USERS and 0 < found["mrr"] < 1
    if steps > 1:
        assert found == pytest.approx(wanted, abs=1e-3)


def test_evaluate_says_what_training_said(runs):
    before = evaluation(runs[1])
    dist_rec("evaluate", runs[1], "--nproc-per-node", "1")
    assert evaluation(runs[1])["overall"]["next"] == pytest.approx(before["overall"]["next"], abs=1e-9)
    dist_rec("evaluate", runs[1], "--split", "valid", "--nproc-per-node", "2")
    assert set(evaluation(runs[1], "evaluation-valid")["domains"]) == {"books", "films"}
    assert "overrides" not in json.loads((runs[1] / "evaluation.json").read_text())


def test_what_an_evaluation_overrides_stands_beside_its_figures(runs, tmp_path):
    if not runs[0].name.startswith("full"):
        pytest.skip("one will do")
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    dist_rec("evaluate", run, "--evaluate.mask_history", "true", "--evaluate.batch_size", "16")
    told = json.loads((run / "evaluation.json").read_text())
    assert told["overrides"] == {"evaluate.mask_history": True, "evaluate.batch_size": 16}
    assert read_ranks(run, "test")[1].overrides == {"evaluate.mask_history": True}
    assert read_ranks(runs[0], "test")[1].overrides == {}
    dist_rec("report", run)
    assert "test split, step 10, --evaluate.batch_size 16, --evaluate.mask_history true" in (
        (run / "report.html").read_text().replace("&quot;", '"')
    )


def test_data_built_anew_in_another_order_are_other_ids_unless_ids_are_nothing_to_the_model(runs, tmp_path):
    """Tables of the same sizes would be read as if nothing had happened."""
    if runs[0].name.startswith("sampled"):
        pytest.skip("as full")
    run, data = tmp_path / "run", Path(build_sequences(tmp_path, sequence_rows()[::-1]))
    shutil.copytree(runs[0], run)
    splits = [w for name in ("train", "valid", "test", "catalogue") for w in (f"--data.{name}", str(data / name))]
    command = [sys.executable, "-m", "dist_rec", "evaluate", str(run), *splits]
    if runs[0].name.startswith("in_batch"):
        assert run_command(command, SECONDS).returncode == 0
        assert evaluation(run)["overall"]["next"] == pytest.approx(evaluation(runs[0])["overall"]["next"], abs=1e-6)
        return
    done = run_command(command, SECONDS)
    assert done.returncode == 2 and f"{run} was trained on other ids of item_id: {data}/train has been" in done.stderr
    for index in data.glob("*/index.json"):  # as of a data set from before there were digests
        tree = json.loads(index.read_text())
        tree["schema"]["features"]["item_id"]["vocabulary"]["digests"] = []
        index.write_text(json.dumps(tree))
    assert run_command(command, SECONDS).returncode == 0


def test_a_report_has_curves_and_metrics_by_domain_and_no_gates(runs):
    if not runs[0].name.startswith("full"):
        pytest.skip("one will do")
    dist_rec("report", runs[0])
    told, page = json.loads((runs[0] / "report.json").read_text()), (runs[0] / "report.html").read_text()
    assert "of foundation models" in told["left_out"]["aspects' gates, experts and distances of domains"]
    assert told["evaluation"]["overall"] == evaluation(runs[0])["overall"]
    assert {"recall@10", "ndcg@10", "mrr"} <= told["curves"]["evaluation"].keys()
    assert [*told["curves"]["losses"]] == ["sequence_item", "loss"]
    assert all(said in page for said in ("<th>recall@10", "books", "films", 'id="curves"', "item_id"))
    assert 'id="distances"' not in page and "Figures of gates" not in page


def test_tables_are_there_where_ids_are(runs):
    tables = checkpoint.read_state(checkpoint.find(runs[1])).manifest.tables
    if runs[1].name.startswith("in_batch"):
        assert tables == {}
    else:
        rows = read_index(load_config(runs[1] / "config.yaml").data.train).schema.table_sizes()["item_id"]
        assert {name: table.shape for name, table in tables.items()} == {"item_id": [rows, WIDTH]}


@pytest.mark.parametrize(
    ("name", "changes", "fault"),
    [
        ("full", {"tables": {"dim": 8}}, "table item_id is 8 wide, .* set tables.dim, or .* to model.width 16"),
        ("full", {"data": {"exclude_features": ["history"]}}, "reads the ids of a history, one feature, and none is"),
        ("full", {"data": {"exclude_features": ["title"]}}, "reads the item's text, one feature, and none is there"),
        ("in_batch", {"text": {"dropped_store": "store"}}, "text.dropped_store .* no words dropped"),
        ("in_batch", {"text": {"store": "dropped"}}, "text.store .* has words dropped"),
        (
            "in_batch",
            {"data": {"catalogue": None}, "train": {"evaluate_every": 1, "early_stopping": {"metric": "next.mrr"}}},
            "train.early_stopping goes by places among the items of data.catalogue",
        ),
        (
            "in_batch",
            {"data": {"catalogue": None}, "train": {"evaluate_every": "epoch"}},
            "train.evaluate_every: a sequence model is measured by .* data.catalogue, and there is none",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_training(sequences, name, changes, fault):
    tree = tree_of(sequences, name)
    for section, keys in changes.items():
        tree[section] |= {key: str(sequences / v) if "store" in key else v for key, v in keys.items()}
    with pytest.raises(UserError, match=fault):
        prepare(from_dict(Config, tree, "mine"))


def test_events_that_the_encoder_has_no_room_for_are_told(sequences):
    """Sequences have 5 events at most before their last."""
    tree = tree_of(sequences, "full")
    for most, told in ((6, False), (5, False), (3, True)):
        tree["model"]["encoder"] = tree["model"]["encoder"] | {"max_length": most}
        prepared = prepare(config := from_dict(Config, tree, "mine"))
        statistics = prepared.indexes["train"].statistics
        said = prepared.kind.not_trained_on(prepared.schema, config, prepared.features, statistics)
        assert bool(said) == told, most
    assert "up to 5 events" in said and "model.encoder.max_length is 3" in said and "--max-length 3" in said


def test_a_run_without_a_catalogue_ends_without_an_evaluation_and_says_so(sequences):
    tree, run = tree_of(sequences, "in_batch"), sequences / "runs" / "nothing-to-rank"
    tree["run"]["name"] = run.name
    tree["data"] |= {"catalogue": None, "valid": None, "test": None}
    tree["train"]["steps"] = 2
    tree["model"]["encoder"] = tree["model"]["encoder"] | {"max_length": 4}
    (path := sequences / "nothing-to-rank.yaml").write_text(yaml.safe_dump(tree))
    done = run_command([sys.executable, "-m", "dist_rec", "train", str(path), "--json"], SECONDS)
    assert done.returncode == 0 and "step 2, not evaluated: a sequence model is measured by" in done.stdout, done.stderr
    assert "of longer ones the newest 4 are read and predicted" in done.stderr
    found = json.loads((run / "evaluation.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == {"run": str(run), **found}
    assert (found["split"], found["step"], found["overall"], found["domains"]) == (None, 2, {}, {})
    assert "data.catalogue" in found["not_evaluated"] and found["rates"].keys() == {"train_seconds", "train_rows_per_s"}
    assert not list(run.glob("ranks-*")) and not any("evaluation" in line for line in lines_of(run))
    # It is a finished run like any other.
    again = run_command([sys.executable, "-m", "dist_rec", "train", str(path)], SECONDS)
    assert again.returncode == 2 and "holds a finished run" in again.stderr
    dist_rec("report", run, "--split", "train")
    told = json.loads((run / "report.json").read_text())
    assert told["left_out"]["evaluation"] == found["not_evaluated"] and told["curves"]["losses"]["sequence_sequence"]
    with pytest.raises(UserError, match="cannot be evaluated: .* --data.catalogue"):
        evaluate_run(load_config(run / "config.yaml"), run, "train")
    catalogue = ["--data.catalogue", sequences / "shards" / "catalogue"]
    dist_rec("evaluate", run, "--split", "train", *catalogue)
    assert evaluation(run, "evaluation-train")["overall"]["next"]["unranked"] == 0


@pytest.mark.parametrize(("at", "metric"), [([1, 10, 50], "next.ndcg@10"), ([1, 5, 20], "next.ndcg@20")])
def test_a_finetuned_run_stops_by_what_its_evaluations_have(at, metric):
    tree = config_of("shards", "store") | {"evaluate": {"at": at}}
    config = from_dict(Config, tree, "mine")
    tree = to_dict(config)
    kind_of(config).finetuned(tree)
    assert tree["train"]["early_stopping"]["metric"] == metric


@pytest.mark.parametrize("own", [set(), {"gates"}])
def test_domains_begin_as_others_where_something_is_theirs_alone(own):
    prepared = SimpleNamespace(
        config=from_dict(Config, config_of("shards", "store"), "mine"),
        origin=SimpleNamespace(starts={"games": "mean"}, domains=["books", "films"], left_out=[]),
        names=SimpleNamespace(own=own),
        specs=[],
        indexes={"train": SimpleNamespace(rows_of=lambda domain: 1)},
        schema=SimpleNamespace(domains=SimpleNamespace(names=["books", "films", "games"])),
    )
    said = how_it_starts(prepared, SimpleNamespace(folder="run", passed_over=[]), [])
    assert ("games begins as the mean of 2" in said) == bool(own)


def test_ids_of_pretraining_have_no_rows_where_the_catalogue_has_none_of_them(tmp_path):
    """A data set of other items that extends a first one, of which its runs read nothing."""
    first, others = build_sequences(tmp_path / "first"), {f"i{n}": f"j{n}" for n in range(NUM_ITEMS)}
    rows = [row | {"item_id": others[row["item_id"]], "domain": "games"} for row in sequence_rows(40)]
    rows = [row | {"history": [others[item] for item in row["history"]]} for row in rows]
    items = [item | {"item_id": others[item["item_id"]], "domain": "games"} for item in item_rows()]
    extended = build_sequences(tmp_path / "extended", rows, items, ("games",), extends=first)

    def tree_of(data: str) -> dict:
        tree = config_of(data, "", item="id", loss="full") | {"text": {"mode": "none"}}
        # One row could not be cut so.
        tree["tables"]["sharding"] = "row_wise"
        return tree

    tree = tree_of(extended)
    tree["run"] = {"root": str(tmp_path / "runs")}
    tree["data"]["domains"] = ["games"]
    found = prepare(from_dict(Config, tree, "mine"))
    assert {s.name: s.rows for s in found.specs} == {"item_id": 1, "item_id@1": NUM_ITEMS} and found.unread == {
        "item_id"
    }
    # A catalogue with items of before needs their rows.
    whole = prepare(from_dict(Config, tree_of(first), "mine"))
    assert [s.rows for s in whole.specs] == [NUM_ITEMS + 1] and not whole.unread
    (path := tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    dist_rec("train", path, "--nproc-per-node", "2", "--train.steps", "3")
    run = tmp_path / "runs" / "run"
    tables = checkpoint.read_state(checkpoint.find(run)).manifest.tables
    assert {name: table.shape[0] for name, table in tables.items()} == {"item_id": 1, "item_id@1": NUM_ITEMS}
    before = evaluation(run)["overall"]["next"]
    assert before["rows"] == 40 and before["mrr"] > 0
    dist_rec("evaluate", run)
    assert evaluation(run)["overall"]["next"] == pytest.approx(before, abs=1e-9)


def test_a_pretrained_run_is_finetuned_with_ids(runs):
    """What a run of texts alone did not have begins anew: tables, and what tells repeats. The rest is taken over."""
    pretrained = runs[0]
    if not pretrained.name.startswith("in_batch"):
        pytest.skip("pretraining is in_batch")
    data = pretrained.parent.parent / "shards"
    keys = {"--model.item": "text+id", "--model.repeats": "true", "--train.steps": "2"}
    given = [word for pair in keys.items() for word in pair]
    said = dist_rec("finetune", pretrained, "--data", data, "--name", "finetuned", *given)
    assert f"starting from {pretrained}" in said
    run = pretrained.parent / "finetuned"
    config = load_config(run / "config.yaml")
    assert config.data.catalogue == str(data / "catalogue") and config.model.item == "text+id"
    assert config.model.loss == "full" and config.model.contrast.weight == 0 and config.text.dropped_store is None
    assert config.train.early_stopping.metric == "next.ndcg@10" and config.train.evaluate_every == "epoch"
    manifest = checkpoint.read_state(checkpoint.find(run)).manifest
    assert set(manifest.tables) == {"item_id"}
    # As in the paper: positions and blocks of the transformer stay.
    assert config.finetune.freeze == "adaptor"
    before, after = tensors(pretrained), tensors(run)
    known = checkpoint.read_state(checkpoint.find(pretrained)).manifest.dense.keys()
    assert manifest.dense.keys() - known == {"repeats.weight", "repeats.bias"} and known < manifest.dense.keys()
    for name in known:
        stays = name.startswith(("encoder.positions", "encoder.blocks."))
        assert torch.equal(before[name], after[name]) == stays, name
    assert after["repeats.weight"].any() and after["repeats.bias"].any()
    assert evaluation(run)["overall"]["next"]["rows"] == NUM_USERS


@pytest.mark.parametrize(
    "model",
    [
        {"contrast": {"weight": 0.1, "item_drop_share": 1.0}},
        {"item": "text+id", "loss": "full", "contrast": {"weight": 0.0}},
    ],
    ids=["in_batch", "full"],
)
def test_a_language_model_is_trained_along(tmp_path, tiny_model, model):
    """Its texts' tokens come with the rows and the catalogue; ranks encode their own."""
    data = build_sequences(tmp_path, tokenizer=tiny_model)
    tree = config_of(data, None, **model)
    tree["text"] = {"mode": "full", "model": tiny_model, "learning_rate": 0.01}
    tree["run"]["root"] = str(tmp_path / "runs")
    (path := tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    runs = [tmp_path / "runs" / f"of-{ranks}" for ranks in (1, 2)]
    for ranks, run in enumerate(runs, 1):
        dist_rec("train", path, "--run.name", run.name, "--nproc-per-node", str(ranks))
    one, two = map(losses, runs)
    # What is dropped from copies is drawn by each rank.
    steps = 1 if "sequence_sequence" in one[0] else len(one)
    found, wanted = ([step["sequence_item"] for step in run][:steps] for run in (two, one))
    assert found == pytest.approx(wanted, abs=1e-4)
    assert one[-1]["loss"] < one[0]["loss"]
    start, words = load_file(f"{tiny_model}/model.safetensors"), "embeddings.word_embeddings.weight"
    (trained,) = (value for name, value in tensors(runs[1]).items() if name.endswith(words))
    moved = (trained.view_as(start[words]) - start[words]).abs().amax(1) > 0
    assert 10 < int(moved.sum()) < 200  # the words that occur
    dist_rec("evaluate", runs[1], "--nproc-per-node", "1")
    assert evaluation(runs[1])["overall"]["next"] == pytest.approx(evaluation(runs[0])["overall"]["next"], abs=0.05)


def test_matrix_products_are_as_exact_as_asked_for(sequences, monkeypatch):
    """Training takes fp32 ones by `matmul_precision` and those of a bf16 model in bf16; evaluation highest always."""
    tree = tree_of(sequences, "full")
    tree["dense"] = {"precision": "bf16", "matmul_precision": "medium"}
    (path := sequences / "exact.yaml").write_text(yaml.safe_dump(tree))
    # Takes torch away from "highest" at its start.
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    words = ["tests/precision_worker.py", sequences / "seen"]
    for verb in (["train", path, "--run.name", "exact"], ["evaluate", sequences / "runs" / "exact"]):
        done = run_command([sys.executable, *map(str, [*words, *verb])], SECONDS)
        assert done.returncode == 0, done.stderr
    seen = (sequences / "seen").read_text().splitlines()
    assert set(seen) == {
        "train medium torch.bfloat16",
        "evaluate highest torch.bfloat16",
        "evaluate highest torch.float32",
    }
