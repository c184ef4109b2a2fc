"""A run from end to end under torchrun: what it leaves, what it repeats, what `evaluate` makes of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from conftest import build_small, run_command, run_ranks
from safetensors.torch import load_file

from dist_rec.config import load_config
from dist_rec.training import checkpoint

DOMAINS, TASKS = ("big", "middle", "tiny"), ("ctr", "relevance")
SECONDS = 240


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One config twice on 2 ranks: `first` by --nproc-per-node, `again` by plain torchrun.

    `first` is evaluated every few steps, `again` only at the end.
    """
    folder = tmp_path_factory.mktemp("train")
    data = build_small(folder, {"big": 330, "middle": 160, "tiny": 40}, split="random:4,1,1")
    config = {
        "run": {"root": str(folder / "runs"), "name": "first", "seed": 5},
        "data": {split: f"{data}/{split}" for split in ("train", "valid", "test")}
        | {"batch_size": 40, "streams": 8, "shuffle_window": 128},
        "tables": {"dim": 8},
        "model": {"width": 16, "dropout": 0.2, "history": {"feedforward": 16}, "regulariser": {"kind": "js"}},
        "train": {"epochs": 2, "log_every": 3, "evaluate_every": 6},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "dist_rec", "train", str(folder / "c.yaml"), "--json"]
    first = run_command([*command, "--nproc-per-node", "2"], SECONDS)
    again = run_ranks(2, [*command[1:], "--run.name", "again", "--train.evaluate_every", "0"], SECONDS)
    for name, done in (("first", first), ("again", again)):
        assert done.returncode == 0, done.stderr
        (folder / f"{name}.out").write_text(done.stdout)
        (folder / f"{name}.err").write_text(done.stderr)
    return folder


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_is_whole(runs):
    run = runs / "runs" / "first"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "plan.json",
        "schema.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "evaluation.json",
        "summary.json",
    }
    assert load_config(run / "config.yaml") == load_config(runs / "c.yaml")
    plan = json.loads((run / "plan.json").read_text())
    assert plan.keys() == {"user_id", "item_id", "tags"}
    for table in plan.values():
        assert table["sharding_type"] and {shard["rank"] for shard in table["shards"]} <= {0, 1}
    steps = [line for line in lines(run) if "losses" in line]
    total = steps[-1]["step"]
    assert [line["step"] for line in steps] == sorted({*range(3, total + 1, 3), total})
    assert steps[0].keys() == {"time", "step", "seconds", "losses", "rows_per_s"}
    assert {"loss", *TASKS} <= steps[0]["losses"].keys()
    evaluations = [line for line in lines(run) if "evaluation" in line]
    assert [line["step"] for line in evaluations] == [*range(6, total, 6), total]
    assert len(list((run / "tensorboard").glob("events.*"))) == 1
    folder = checkpoint.find(run)
    assert folder.name == f"step-{total:08d}" and (run / "checkpoints" / "latest").read_text().strip() == folder.name
    state = checkpoint.read_state(folder).manifest
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == state.files.keys() | {"checkpoint.json"} and state.step == total
    assert all(name.endswith((".safetensors", ".json")) for name in files) and state.plan == plan


def test_evaluation_json_has_the_shape_that_is_promised(runs):
    evaluation = json.loads((runs / "runs" / "first" / "evaluation.json").read_text())
    assert evaluation["split"] == "test" and evaluation["step"] == lines(runs / "runs" / "first")[-1]["step"]
    assert set(evaluation["overall"]) == set(TASKS) and tuple(evaluation["domains"]) == DOMAINS
    for tasks in (evaluation["overall"], *evaluation["domains"].values()):
        for metrics in tasks.values():
            assert {"rows", "auc", "gauc", "logloss", "calibration"} <= metrics.keys()
            assert (metrics["auc"] is None or 0 <= metrics["auc"] <= 1) and isinstance(metrics["rows"], int)
    for task in TASKS:
        rows = [evaluation["domains"][domain][task]["rows"] for domain in DOMAINS]
        assert sum(rows) == evaluation["overall"][task]["rows"] > 10
    assert evaluation["domains"]["middle"]["ctr"]["rows"] == evaluation["domains"]["big"]["relevance"]["rows"] == 0
    assert {"train_seconds", "train_rows_per_s", "evaluate_seconds"} <= evaluation["rates"].keys()


def test_the_terminal_shows_our_words_only(runs):
    said = json.loads((runs / "first.out").read_text().splitlines()[-1])
    evaluation = json.loads((runs / "runs" / "first" / "evaluation.json").read_text())
    assert said == {"run": str(runs / "runs" / "first"), **evaluation}
    assert (runs / "first.err").read_text() == ""
    stars = [line for line in (runs / "again.err").read_text().splitlines() if line.strip("* ")]
    assert all("OMP_NUM_THREADS" in line for line in stars), stars
    for name in ("first", "again"):
        words = (runs / f"{name}.out").read_text()
        assert words.startswith("train ") and "DeepSpeed" not in words and "Warning" not in words


def test_the_same_seed_is_bitwise_the_same_run_however_often_it_is_evaluated(runs):
    first, again = (lines(runs / "runs" / name) for name in ("first", "again"))
    losses = [[(line["step"], line["losses"]) for line in run if "losses" in line] for run in (first, again)]
    assert losses[0] == losses[1] and len({str(loss) for _, loss in losses[0]}) == len(losses[0]) > 5
    assert first[-1]["evaluation"] == again[-1]["evaluation"]
    assert tensors(runs / "runs" / "first") == tensors(runs / "runs" / "again")


def tensors(run: Path) -> dict[str, list]:
    """Every tensor of a run's checkpoint."""
    files = checkpoint.find(run).rglob("*.safetensors")
    return {f"{file.parent.name}/{file.name} {n}": t.tolist() for file in files for n, t in load_file(file).items()}


@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluate_on_any_number_of_ranks_gives_the_run_s_metrics(runs, ranks):
    run = runs / "runs" / "first"
    before = json.loads((run / "evaluation.json").read_text())
    many = ["--nproc-per-node", str(ranks)] if ranks > 1 else []
    done = run_command([sys.executable, "-m", "dist_rec", "evaluate", str(run), "--json", *many], SECONDS)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    after = json.loads(done.stdout.splitlines()[-1])
    assert after["step"] == before["step"] and after["split"] == "test"
    for scope in ("overall", *DOMAINS):
        found, wanted = (e["overall"] if scope == "overall" else e["domains"][scope] for e in (after, before))
        for task in TASKS:
            assert found[task] == pytest.approx(wanted[task], abs=1e-6), (scope, task)


def test_a_run_folder_is_never_written_over(runs):
    before = {path: path.stat().st_mtime_ns for path in (runs / "runs" / "first").rglob("*")}
    done = run_command([sys.executable, "-m", "dist_rec", "train", str(runs / "c.yaml")], SECONDS)
    assert done.returncode == 2 and "runs/first holds a finished run: choose another --run.name" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (runs / "runs" / "first").rglob("*")} == before


def test_bf16_under_zero_3_with_weighted_domains(runs):
    """The other end of what the config offers; and evaluating another split leaves the run's own alone."""
    half = ["--run.name", "half", "--dense.precision", "bf16", "--dense.zero_stage", "3"]
    weighted = ["--data.weights", "{big: 1, middle: 1, tiny: 0}", "--nproc-per-node", "2"]
    done = run_command([sys.executable, "-m", "dist_rec", "train", str(runs / "c.yaml"), *half, *weighted], SECONDS)
    assert done.returncode == 0, done.stderr
    assert "middle: an epoch reads " in done.stdout and " again, 0 not at all)" in done.stdout
    run = runs / "runs" / "half"
    losses = [line["losses"]["loss"] for line in lines(run) if "losses" in line]
    assert sum(losses[-3:]) < sum(losses[:3])
    before = (run / "evaluation.json").read_bytes()
    done = run_command([sys.executable, "-m", "dist_rec", "evaluate", str(run), "--split", "valid"], SECONDS)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "evaluation-valid.json").read_text())["split"] == "valid"
    assert (run / "evaluation.json").read_bytes() == before
