"""`dist-rec bench experiment` of sequences: pretrained and from scratch, data sets as splits, compared row by row."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, run_command
from sequence_sets import NUM_USERS, build_sequences, config_of

from dist_rec.bench import experiment as experiments
from dist_rec.bench.experiment import load_experiment, planned_runs, run_experiment
from dist_rec.bench.paired_runs import paired_runs, path_of, print_paired
from dist_rec.errors import UserError
from dist_rec.text.embed import embed
from dist_rec.training.paired import compare, pair, together
from dist_rec.training.ranking import RowRanks
from dist_rec.training.row_ranks import Evaluated, write_ranks
from dist_rec.training.row_ranks import path_of as ranks_of

FIGURES = ["recall@1", "recall@10", "ndcg@1", "ndcg@10", "mrr"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, tiny_model) -> Path:
    """An experiment file, beside data sets, text vectors and a run of pretraining."""
    folder = tmp_path_factory.mktemp("experiment")
    data = build_sequences(folder)
    embed([f"{data}/train"], tiny_model, str(folder / "store"), max_tokens=32, store_dtype="float32")
    contrast = {"weight": 0.1, "item_drop_share": 1.0}
    tree = config_of(data, str(folder / "store"), contrast=contrast)
    tree["data"] |= {"valid": None, "test": None, "catalogue": None}
    tree["run"] = {"root": str(folder), "name": "pretraining"}
    dist_rec("train", written(folder / "pretraining.yaml", tree))
    config = config_of(data, str(folder / "store"), loss="full")
    config["train"] = {"epochs": 3, "evaluate_every": "epoch", "early_stopping": {"metric": "next.ndcg@10"}}
    config["evaluate"] = {"at": [1, 10]}
    whole = {
        "seeds": [4],
        "splits": {"books": {"finetune.run": str(folder / "pretraining")}, "other": {}},
        "metrics": {"next": ["ndcg@10"]},
        "variants": {
            "id": {"model.item": "id", "text.mode": "none", "text.store": None, "splits": ["books"]},
            "text": {"model.item": "text"},
            "text pretrained": {"pretrained": True, "finetune.freeze": "adaptor", "splits": ["books"]},
        },
        "comparisons": {"transfer": {"reference": "text", "variants": ["text", "text pretrained"]}},
        "config": config,
    }
    return written(folder / "experiment.yaml", whole)


def written(path: Path, tree: dict) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def dist_rec(*arguments) -> str:
    done = run_command([sys.executable, "-m", "dist_rec", *map(str, arguments)], 240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pretrained_and_scratch_from_end_to_end(experiment, monkeypatch):
    results, runs = experiment.parent / "r.json", experiment.parent / "runs"
    command = ["bench", "experiment", experiment, "--results", results, "--runs", runs, "--only", "books/*"]
    said = dist_rec(*command, "--json")
    found = json.loads(said.splitlines()[-1])
    lines = {line["name"]: line for line in json.loads(results.read_text())}
    assert [(n, e["dataset"], e["mode"], e["pretrained"], e["seed"]) for n, e in lines.items()] == [
        ("id", "books", "id", False, 4),
        ("text", "books", "text", False, 4),
        ("text pretrained", "books", "text", True, 4),
    ]
    for line in lines.values():
        assert [line[name] for name in FIGURES] == [line["tasks"]["next"][name] for name in FIGURES]
        assert 0 < line["ndcg@10"] < line["recall@10"] <= 1 and line["seconds"] > line["train_seconds"] > 0
        assert line["epochs"] == 3 and 0 < line["valid"]["next.ndcg@10"] < 1
    # Only the pretrained one starts from the run that the split names.
    configs = {name: yaml.safe_load((runs / f"books-{name}-4" / "config.yaml").read_text()) for name in lines}
    assert [tree["finetune"]["run"] is not None for tree in configs.values()] == [False, False, True]
    # Places are compared user by user, and kept when the runs are gone.
    (paired,) = found["paired"]
    assert paired == json.loads(path_of(results).read_text())[0]
    assert (paired["split"], paired["variant"], paired["reference"]) == ("books", "text pretrained", "text")
    assert (paired["seeds"], paired["paired_by"], paired["overall"]["users"]) == ([4], "row", NUM_USERS)
    metric = paired["overall"]["metrics"]["ndcg@10"]
    difference = lines["text pretrained"]["ndcg@10"] - lines["text"]["ndcg@10"]
    assert metric["difference"] == pytest.approx(difference, abs=2e-5) == paired["by_seed"]["ndcg@10"]["4"]
    assert "transfer: text pretrained minus text, books" in said and "seed 4" in said
    shutil.rmtree(runs)
    monkeypatch.setattr(experiments, "_train", lambda *_: pytest.fail("trained again"))
    done = run_experiment(experiment, results, 1, ["books/*"], runs)
    assert paired_runs(load_experiment(experiment), done, results, runs) == [paired]


def test_a_few_shot_curve_is_of_training_sequences(experiment):
    """NDCG of finetuned models and of those from scratch, which know the new data alone: no others do."""
    folder, out = experiment.parent, experiment.parent / "curve"
    command = ["finetune", folder / "pretraining", "--data", folder / "shards", "--curve", "0,40", "--seeds", "1"]
    said = dist_rec(*command, "--train.epochs", "2", "--out", out, "--json")
    entries = json.loads((out / "curve.json").read_text())
    assert [(e["n"], e["kind"], e["preset"], e["domain"]) for e in entries] == [
        (n, kind, preset, domain)
        for n, kind, preset in ((0, "finetuned", "adaptor"), (40, "finetuned", "adaptor"), (40, "scratch", None))
        for domain in ("books", "films")
    ]
    for entry in entries:
        assert entry["metric"] == "ndcg@10" and entry["auc"] is None
        assert 0 < entry["ndcg"] < entry["recall"] <= 1
    found = json.loads(said.splitlines()[-1])["summary"]
    (tuned,) = (e for e in found if (e["n"], e["domain"], e["line"][:9]) == (40, "films", "finetuned"))
    assert tuned["ndcg@10"] == entries[3]["ndcg"] and tuned["difference"] == entries[3]["ndcg"] - entries[5]["ndcg"]
    assert (out / "curve.png").stat().st_size > 1000 and "NDCG@10 on the same test rows" in said
    assert not (out / "runs").exists() or not list((out / "runs").iterdir())


def test_what_pretrained_runs_start_from_must_be_there(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "_train", lambda *_: pytest.fail("trained"))
    tree = yaml.safe_load(experiment.read_text())
    tree["variants"]["text pretrained"]["splits"] = ["other"]
    path = written(tmp_path / "e.yaml", tree)
    with pytest.raises(UserError, match="text pretrained is pretrained, and splits.other has no finetune.run"):
        run_experiment(path, tmp_path / "r.json", 1, [], tmp_path / "runs")
    tree["variants"]["text pretrained"]["splits"] = ["books"]
    tree["splits"]["books"]["finetune.run"] = str(tmp_path / "nowhere")
    path = written(tmp_path / "e.yaml", tree)
    with pytest.raises(UserError, match="nowhere is no run folder"):
        run_experiment(path, tmp_path / "r.json", 1, [], tmp_path / "runs")


def places(runs: Path, name: str, seed: int, rank: np.ndarray, user: np.ndarray, step: int = 3, **changed) -> dict:
    """A run's folder with its places, and its line."""
    row = np.arange(len(rank))
    what = {"split": "test", "step": step, "data": "x", "domains": ["a"], "at": [10], "protocol": {}} | changed
    folder = runs / f"s-{name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    ranks = RowRanks(["a"], row, np.zeros(len(row), np.int32), user, rank.astype(np.float64))
    write_ranks(ranks_of(folder, "test"), ranks, Evaluated(**what))
    return {"name": name, "split": "s", "seed": seed, "domain": None, "evaluated": "test", "step": 3}


def test_users_are_drawn_with_the_rows_of_all_seeds(tmp_path, capsys):
    """The same two runs thrice say no more than once; other seeds' runs do."""
    draw = np.random.default_rng(0)
    rank, user = draw.integers(1, 40, (2, 4, 300)), np.append(np.arange(250), np.full(50, -1))
    rank[0] = np.maximum(rank[0] - 3, 1)
    setting = {"config": {}, "splits": {"s": {}}, "seeds": [0, 1, 2], "variants": {"a": {}, "b": {}}}
    setting["comparisons"] = {"x": {"reference": "b", "variants": ["a"]}}
    experiment = load_experiment(written(tmp_path / "e.yaml", setting))

    def of(numbers: list[int], folder: str) -> list[dict]:
        runs = tmp_path / folder
        lines = [places(runs, n, s, rank[i, k], user) for s, k in enumerate(numbers) for i, n in enumerate("ab")]
        return paired_runs(experiment, lines, runs / "r.json", runs)

    once, thrice, three = of([0], "once"), of([0, 0, 0], "thrice"), of([0, 1, 2], "three")
    (one,), (same,), (other,) = ([e["overall"]["metrics"]["ndcg@10"] for e in x] for x in (once, thrice, three))
    assert same == pytest.approx(one) and once[0]["overall"]["users"] == thrice[0]["overall"]["users"] == 300
    assert thrice[0]["overall"]["rows"] == 900 and other["high"] - other["low"] < 0.8 * (one["high"] - one["low"])
    assert other["difference"] == pytest.approx(np.mean(list(three[0]["by_seed"]["ndcg@10"].values())))
    # A run of another training than the line's is none; what was written of more seeds stays.
    lines = [places(tmp_path / "three", "a", 2, rank[0, 2], user, step=9)]
    lines += [places(tmp_path / "three", n, s, rank[i, s], user) for s in (0, 1) for i, n in enumerate("ab")]
    lines.append(places(tmp_path / "three", "b", 2, rank[1, 2], user))
    assert paired_runs(experiment, lines, tmp_path / "three" / "r.json", tmp_path / "three") == three
    path_of(tmp_path / "three" / "r.json").unlink()
    (fewer,) = paired_runs(experiment, lines, tmp_path / "three" / "r.json", tmp_path / "three")
    assert fewer["seeds"] == [0, 1]
    # Places by other rules are not those of the line, though both runs have them.
    for i, name in enumerate("ab"):
        places(tmp_path / "three", name, 1, rank[i, 0], user, overrides={"evaluate.mask_history": True})
    assert paired_runs(experiment, lines, tmp_path / "three" / "r.json", tmp_path / "three") == [fewer]
    assert json.loads(path_of(tmp_path / "three" / "r.json").read_text()) == [fewer]
    noted = capsys.readouterr().err
    assert "s-a-1" in noted and "evaluate.mask_history: true" in noted and "dist-rec evaluate" in noted
    print_paired(three)
    shown = capsys.readouterr().out
    assert "x: a minus b, s" in shown
    # All of it stands in 80 columns.
    told = three[0]["overall"]["metrics"]["ndcg@10"]
    values = [f"{told['ours']:.4f}", *(f"{three[0]['by_seed']['ndcg@10'][seed]:+.4f}" for seed in "012")]
    assert "N@10" in shown and all(value in shown for value in values)


def test_pairs_of_several_runs_are_those_of_each():
    """What `together` puts side by side is compared as one."""
    row, domain = np.arange(40), np.zeros(40, np.int32)
    about = Evaluated(split="test", step=1, data="x", domains=["a"], at=[5], protocol={})
    draw = np.random.default_rng(1)

    def one():
        return RowRanks(["a"], row, domain, row // 2, draw.integers(1, 12, 40).astype(np.float64)), about

    pairs = [pair(one(), one()) for _ in range(3)]
    found = compare(together(pairs), [5], 50)["overall"]
    each = [compare(p, [5], 50)["overall"]["metrics"]["recall@5"]["difference"] for p in pairs]
    assert found["users"] == 20 and found["rows"] == 120
    assert found["metrics"]["recall@5"]["difference"] == pytest.approx(np.mean(each))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "experiments" / "unisrec").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_files_of_this_repository_are_experiments_or_pretraining(path):
    tree = yaml.safe_load(path.read_text())
    if "seeds" not in tree:
        from dist_rec.config import load_config

        assert load_config(path, {}).model.loss == "in_batch"
        return
    runs = list(planned_runs(load_experiment(path), path))
    assert len({run.key for run in runs}) == len(runs) > 2


def test_a_variant_may_name_what_it_starts_from_by_itself(experiment, tmp_path):
    tree = yaml.safe_load(experiment.read_text())
    mine = str(tmp_path / "mine")
    tree["variants"] = {"text": tree["variants"]["text"], "own": {**tree["variants"]["text"], "finetune.run": mine}}
    tree["comparisons"] = {}
    path = written(tmp_path / "e.yaml", tree)
    runs = experiments.planned_runs(load_experiment(path), path)
    assert {run.name: run.overrides.get("finetune.run") for run in runs} == {"text": None, "own": mine}
