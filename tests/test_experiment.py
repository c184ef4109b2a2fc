"""`dist-rec bench experiment`: which runs a file means, that they are done once, and what the results say."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, build_small, kill_family, run_command, start
from scipy.stats import ttest_rel, wilcoxon

from dist_rec.bench import experiment as experiments
from dist_rec.bench.compare import by_seed, caution, comparisons, paired, print_results, values_of
from dist_rec.bench.experiment import load_experiment, planned_runs, read_results, run_experiment
from dist_rec.errors import UserError

DOMAINS = ["big", "middle", "tiny"]
EXPERIMENT = {
    "seeds": [0, 1],
    "splits": {"whole": {"data.train": "set below"}, "other": {"data.train": "set below", "data.batch_size": 80}},
    "metrics": {"ctr": ["auc", "logloss"], "relevance": ["ndcg@10"]},
    "variants": {
        "mmoe": {"model.body.kind": "mmoe"},
        "bottom": {"model.body.kind": "shared_bottom", "splits": ["whole"]},
        "single": {"model.body.kind": "shared_bottom", "per_domain": True, "splits": ["whole"]},
    },
    "comparisons": {"bodies": {"reference": "mmoe", "variants": ["bottom", "mmoe", "single"]}},
    "config": {"data": {"train": "", "batch_size": 40}, "tables": {"dim": 4}, "model": {"width": 8}},
}


def write(folder: Path, data: str, **changes) -> Path:
    whole = json.loads(json.dumps({**EXPERIMENT, **changes}))
    for split in whole["splits"].values():
        split["data.train"] = data
    path = folder / "e.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path


@pytest.fixture
def trainings(monkeypatch) -> list[dict]:
    """Configs that would have been trained; a run's figures follow from its seed, body and domain."""
    seen: list[dict] = []

    def train(config: Path, folder: Path, nproc_per_node: int) -> dict:
        held = yaml.safe_load(config.read_text())
        seen.append(held)
        body, seed = held["model"]["body"]["kind"], held["run"]["seed"]
        alone = 0.1 if held["data"].get("domains") else 0.0

        def metrics(n: int, rows: int) -> dict:
            value = 0.5 + 0.01 * seed + 0.02 * n + alone + 0.001 * len(body) + 0.0003 * seed * n
            shared = {"auc": value, "gauc": None, "logloss": 1 - value, "ndcg@10": value / 2}
            return {"rows": rows, "positives": 1, "calibration": 1.0, **shared}

        of_domain = {
            name: {"ctr": metrics(n, 9), "relevance": metrics(n, 5 if name == "middle" else 0)}
            for n, name in enumerate(DOMAINS)
        }
        told = {"rates": {"train_rows_per_s": 1000.4, "train_seconds": 3.14}, "split": "test", "step": 7}
        told |= {"summary": {"epochs": [{}, {}]}, "resumed": False}
        return {"overall": {"ctr": metrics(5, 27), "relevance": metrics(5, 5)}, "domains": of_domain, **told}

    monkeypatch.setattr(experiments, "_train", train)
    return seen


def test_a_file_means_these_runs(small, tmp_path):
    path = write(tmp_path, small)
    labels = [run.label for run in planned_runs(load_experiment(path), path)]
    assert labels == [
        "whole/mmoe/0",
        "whole/bottom/0",
        *(f"whole/single/0/{d}" for d in DOMAINS),
        "whole/mmoe/1",
        "whole/bottom/1",
        *(f"whole/single/1/{d}" for d in DOMAINS),
        "other/mmoe/0",
        "other/mmoe/1",
    ]


def test_runs_are_done_once_and_go_on_where_they_stopped(small, tmp_path, trainings, monkeypatch):
    path, results = write(tmp_path, small), tmp_path / "r.json"
    done = run_experiment(path, results, 1, ["whole/single/0", "whole/mmoe/*"], tmp_path / "runs")
    assert [(e["name"], e["seed"], e["domain"]) for e in done] == [
        ("mmoe", 0, None),
        *(("single", 0, d) for d in DOMAINS),
        ("mmoe", 1, None),
    ]
    assert [c["data"].get("domains") for c in trainings] == [None, ["big"], ["middle"], ["tiny"], None]
    assert trainings[1]["model"]["body"]["kind"] == "shared_bottom" and trainings[4]["run"]["seed"] == 1

    whole, count = experiments._train, itertools.count()

    def fails(*given):
        if next(count) == 2:
            raise UserError("the power went")
        return whole(*given)

    monkeypatch.setattr(experiments, "_train", fails)
    with pytest.raises(UserError, match="the power went"):
        run_experiment(path, results, 1, [], tmp_path / "runs")
    assert len(read_results(results)) == 7
    monkeypatch.setattr(experiments, "_train", whole)
    done = run_experiment(path, results, 1, [], tmp_path / "runs")
    assert len(done) == 12 == len({(e["name"], e["split"], e["seed"], e["domain"]) for e in done})
    before = len(trainings)
    assert run_experiment(path, results, 1, [], tmp_path / "runs") == done and len(trainings) == before == 12


def test_a_run_on_one_domain_keeps_that_domain_s_figures_alone(small, tmp_path, trainings):
    path, results = write(tmp_path, small), tmp_path / "r.json"
    done = run_experiment(path, results, 1, ["whole/single/*", "whole/mmoe/*"], tmp_path / "runs")
    (one,) = [e for e in done if e["domain"] == "big" and e["seed"] == 1]
    assert list(one["domains"]) == ["big"] and one["tasks"] == {}
    assert one["domains"]["big"] == {"ctr": {"auc": 0.623, "gauc": None, "logloss": 0.377, "ndcg@10": 0.3115}}
    # Tasks without rows in a domain are left out.
    (shared, _) = [e for e in done if e["name"] == "mmoe"]
    assert set(shared["domains"]["middle"]) == {"ctr", "relevance"} and set(shared["domains"]["tiny"]) == {"ctr"}
    line = values_of(done, "whole", "single", "ctr", "auc")
    assert set(line) == {(s, d) for s in (0, 1) for d in DOMAINS}


def test_tests_are_scipy_s_on_the_pairs_that_both_have():
    draw = np.random.default_rng(0)
    reference = {(s, d): float(draw.random()) for s in range(3) for d in "abcd"}
    other = {key: value + float(draw.normal(0.02, 0.03)) for key, value in reference.items() if key != (2, "d")}
    other[7, "a"] = 1.0
    found, keys = paired(reference, other), sorted(reference.keys() & other.keys())
    ours, theirs = [other[k] for k in keys], [reference[k] for k in keys]
    assert found["pairs"] == len(keys) == 11
    assert found["mean"] == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert found["t"] == pytest.approx(ttest_rel(ours, theirs).pvalue)
    assert found["wilcoxon"] == pytest.approx(wilcoxon(ours, theirs).pvalue)
    assert found["better"] == sum(a > b for a, b in zip(ours, theirs, strict=True))
    # Seed 2 lacks a domain, so its mean would be of others.
    means = [[statistics.fmean(v[s, d] for d in "abcd") for s in (0, 1)] for v in (other, reference)]
    assert found["seeds"] == 2 and found["seeds_t"] == pytest.approx(ttest_rel(*means).pvalue)
    assert found["seeds_mean"] == pytest.approx(np.mean(means[0]) - np.mean(means[1]))


def test_what_cannot_be_tested_has_no_p():
    same = {(0, "a"): 0.5, (1, "a"): 0.6}
    assert paired(same, same)["t"] is None and paired(same, same)["wilcoxon"] is None
    one = paired({(0, "a"): 0.5}, {(0, "a"): 0.6})
    assert (one["pairs"], one["t"], one["wilcoxon"], one["seeds_t"]) == (1, None, None, None)
    assert paired(same, {})["mean"] is None
    assert "0.25" in caution(3) and "2 degree(s) of freedom" in caution(3)
    assert by_seed({(0, "a"): 1.0, (0, "b"): 2.0, (1, "a"): 3.0}, ["a", "b"]) == {0: 1.5}


def test_tables_by_domain_have_means_spreads_and_tests(small, tmp_path, trainings, capsys):
    path, results = write(tmp_path, small), tmp_path / "r.json"
    experiment = load_experiment(path)
    done = run_experiment(path, results, 1, [], tmp_path / "runs")
    found = comparisons(experiment, done)
    assert [(e["split"], e["task"], e["metric"]) for e in found] == [
        (s, t, m) for s in ("whole", "other") for t, m in (("ctr", "auc"), ("ctr", "logloss"), ("relevance", "ndcg@10"))
    ]
    auc = found[0]
    assert list(auc["variants"]) == ["bottom", "mmoe", "single"] and auc["domains"] == DOMAINS
    single, mmoe = auc["variants"]["single"], auc["variants"]["mmoe"]
    assert mmoe["test"] is None and single["test"]["pairs"] == 6
    assert single["test"]["mean"] == pytest.approx(0.1 + 0.009) and single["test"]["better"] == 6
    assert mmoe["mean"]["big"] == pytest.approx((0.504 + 0.514) / 2)
    assert mmoe["spread"]["big"] == pytest.approx(statistics.stdev([0.504, 0.514]))
    assert mmoe["mean"]["all"] == pytest.approx(statistics.fmean(mmoe["mean"][d] for d in DOMAINS))
    assert found[2]["domains"] == ["middle"]
    print_results(experiment, done)
    said = capsys.readouterr().out
    assert "bodies: auc of ctr, split whole" in said and "+0.1090" in said and "minus mmoe" in said
    assert "2 seed(s)" in said and "not independent" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comparisons": {"x": {"reference": "mmo", "variants": ["mmoe"]}}}, "Did you mean 'mmoe'"),
        ({"comparisons": {"x": {"reference": "mmoe", "variants": ["botom"]}}}, "comparisons.x.variants: 'botom'"),
        ({"variants": {"a": {"splits": ["hole"]}}, "comparisons": {}}, "Did you mean 'whole'"),
        ({"variants": {"a": {"per_domains": True}}, "comparisons": {}}, "per_domain"),
        ({"variants": {"a": {"model.boody": 1}}, "comparisons": {}}, "boody"),
    ],
)
def test_a_wrong_file_is_refused_before_the_first_run(small, tmp_path, trainings, changes, message):
    path = write(tmp_path, small, **changes)
    with pytest.raises(UserError) as caught:
        run_experiment(path, tmp_path / "r.json", 1, [], tmp_path / "runs")
    assert message in str(caught.value) and not trainings


def test_other_results_and_unknown_runs_are_refused(small, tmp_path, trainings):
    path, results = write(tmp_path, small), tmp_path / "r.json"
    with pytest.raises(UserError, match="runs are called like 'whole/mmoe/0'"):
        run_experiment(path, results, 1, ["whole/nothing/*"], tmp_path / "runs")
    results.write_text('[{"name": "x"}]')
    with pytest.raises(UserError, match="no results of an experiment"):
        read_results(results)


@pytest.mark.parametrize("name", ["ml1m_three_domains", "foundation_table2"])
def test_the_files_of_this_repository_are_experiments(name, monkeypatch):
    path = ROOT / "configs" / "experiments" / f"{name}.yaml"
    monkeypatch.setattr(experiments, "_domains", lambda config: DOMAINS)
    runs = list(planned_runs(load_experiment(path), path))
    assert len({run.key for run in runs}) == len(runs) > 30


def test_the_old_results_are_still_read(capsys):
    folder = ROOT / "configs" / "experiments"
    experiment = load_experiment(folder / "ml1m_three_domains.yaml")
    done = read_results(folder / "results" / "ml1m_three_domains.json")
    assert len(done) == 48
    held = values_of(done, "random", "mmoe+DA", "ctr", "auc")
    assert len(held) == 9 and held[0, "young"] == 0.80673
    print_results(experiment, done)
    assert "0.8104 .. 0.8112" in capsys.readouterr().out


def test_an_experiment_from_end_to_end(tmp_path):
    data = build_small(tmp_path, {"big": 160, "middle": 90, "tiny": 24}, split="random:3,1,1")
    roots = {f"data.{name}": f"{data}/{name}" for name in ("train", "valid", "test")}
    whole = {
        **EXPERIMENT,
        "seeds": [3],
        "splits": {"whole": roots},
        "variants": {"single": {"per_domain": True, "data.domains": ["big", "middle"]}},
        "comparisons": {},
    }
    path, results = tmp_path / "e.yaml", tmp_path / "r.json"
    path.write_text(yaml.safe_dump(whole))
    command = [sys.executable, "-m", "dist_rec", "bench", "experiment", str(path), "--results", str(results)]
    done = run_command([*command, "--runs", str(tmp_path / "runs"), "--json"], 240)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])["results"]
    assert [(e["domain"], sorted(e["domains"][e["domain"]])) for e in said] == [
        ("big", ["ctr"]),
        ("middle", ["relevance"]),
    ]
    assert all(0 <= e["domains"][e["domain"]][t]["auc"] <= 1 for e, t in zip(said, ("ctr", "relevance"), strict=True))


def test_a_run_that_was_cut_goes_on_unless_its_config_is_another(small, tmp_path):
    def write_it(**changes) -> Path:
        config = {"data": {"batch_size": 40}, "tables": {"dim": 4}, "model": {"width": 8}, "train": {"epochs": 30}}
        config |= {"checkpoint": {"every_steps": 5}, **changes}
        variants = {"plain": {"model.body.kind": "shared_bottom"}}
        return write(tmp_path, small, seeds=[3], variants=variants, comparisons={}, config=config)

    path, results, runs = write_it(), tmp_path / "r.json", tmp_path / "runs"
    command = [sys.executable, "-m", "dist_rec", "bench", "experiment", str(path), "--results", str(results)]
    command += ["--runs", str(runs), "--only", "whole/plain/3"]
    job, deadline, folder = start(command), time.monotonic() + 240, runs / "whole-plain-3"
    try:
        while not (folder / "checkpoints" / "latest").exists():
            assert job.poll() is None and time.monotonic() < deadline, job.communicate(timeout=9)
            time.sleep(0.02)
    finally:
        kill_family(job)
    assert not results.exists() and not (folder / "summary.json").exists()

    def line() -> dict:
        done = run_command(command, 240)
        assert done.returncode == 0, done.stderr
        return json.loads(results.read_text())[0]

    def steps() -> list[int]:
        told = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [entry["step"] for entry in told if "losses" in entry]

    before = steps()
    assert line()["resumed"] is True and steps()[: len(before)] == before and (folder / "summary.json").exists()
    for finished in (True, False):
        results.unlink()
        if not finished:
            (folder / "summary.json").unlink()
            write_it(train={"epochs": 2})
        assert "resumed" not in line()
