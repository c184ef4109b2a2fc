"""A run that may stop early: what it counts, where it ends, and that no interruption changes either."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, build_small, run_command, run_ranks
from safetensors.torch import load_file
from test_passes import config_of, generations, passes  # noqa: F401

from dist_rec.config import Config
from dist_rec.config.training import EarlyStoppingConfig
from dist_rec.errors import UserError
from dist_rec.finetune.derive import derived_tree
from dist_rec.report.curves import read_curves
from dist_rec.strict import from_dict, to_dict
from dist_rec.training import checkpoint
from dist_rec.training.early_stopping import EarlyStopping, Standing, value_of
from dist_rec.training.resume import changes, differences
from dist_rec.training.start.foundation import read_foundation
from dist_rec.training.trainer import Trainer

SECONDS = 240
WORKER = str(ROOT / "tests" / "stopping_worker.py")
# Of the run below: the best evaluation is that of step 15, those of 3, 6 and 12 were it before.
BEST, EVERY, PATIENCE = 15, 3, 3
LAST = BEST + PATIENCE * EVERY


def stopping(metric: str = "ctr.auc", standing: Standing | None = None, **keys) -> EarlyStopping:
    return EarlyStopping(EarlyStoppingConfig(metric=metric, **keys), standing)


def counted(one: EarlyStopping, *values: float | None, start: int = 1) -> list[bool]:
    task, _, name = one.config.metric.rpartition(".")
    return [one.count(step, {task: {name: value}}) for step, value in enumerate(values, start)]


def test_the_best_is_what_is_better_and_patience_counts_what_is_not():
    one = stopping(patience=3)
    assert counted(one, 0.5, 0.5, 0.6, 0.6, 0.55) == [True, False, True, False, False]
    assert one.standing == Standing(metric="ctr.auc", evaluated=5, value=0.6, step=3, without_improvement=2)
    assert not one.done and one.best == 3 and one.has_counted(5) and not one.has_counted(4)
    # As a checkpoint gives it back.
    again = stopping(patience=3, standing=from_dict(Standing, json.loads(json.dumps(to_dict(one.standing))), "state"))
    assert counted(again, 0.6, start=6) == [False] and again.done and again.best == 3
    assert not stopping(patience=4, standing=again.standing).done
    assert stopping("relevance.auc", standing=again.standing).standing is None


def test_of_logloss_less_is_better_and_small_gains_are_none():
    assert counted(stopping("a.b.logloss"), 0.7, 0.8, 0.6) == [True, False, True]
    # Exact in binary: a gain must be more than min_delta.
    assert counted(stopping(min_delta=0.125), 0.5, 0.625, 0.75) == [True, False, True]
    assert counted(stopping("ctr.logloss", min_delta=0.125), 0.5, 0.375, 0.25) == [True, False, True]


def test_what_is_undefined_is_no_improvement():
    one = stopping(patience=2)
    assert counted(one, None, float("nan")) == [False, False]
    assert one.done and one.best is None and one.said() == "ctr.auc: no value so far, 2 evaluations without improvement"
    assert counted(stopping(), None, 0.0, None) == [False, True, False]
    off = EarlyStopping(EarlyStoppingConfig())
    assert not off.count(1, {}) and not off.done and off.best is None and off.news() is None


def test_a_best_that_is_not_there_is_none():
    one = stopping(patience=2)
    counted(one, 0.5, 0.6)
    one.take_back()
    assert one.standing == Standing(metric="ctr.auc", evaluated=2, value=0.5, step=1, without_improvement=1)
    first = stopping()
    counted(first, 0.5)
    first.take_back()
    assert first.standing == Standing(metric="ctr.auc", evaluated=1, without_improvement=1)
    one.forget_best()
    assert one.best is None and counted(one, 0.1, start=3) == [True]


def test_a_metric_that_is_not_there_is_refused_with_all_that_are():
    overall = {"ctr": {"rows": 3, "auc": None, "calibration": 1.0, "ndcg@10": 0.5}, "next": {"mrr": 0.1}}
    assert value_of(overall, "ctr.auc") is None and value_of(overall, "next.mrr") == 0.1
    with pytest.raises(UserError, match=r"'ctr.ndcg@5'. Did you mean 'ctr.ndcg@10'\? There is ctr.auc, ctr.ndcg@10, n"):
        value_of(overall, "ctr.ndcg@5")


@pytest.mark.parametrize(
    ("train", "fault"),
    [
        ({"early_stopping": {"metric": "a.auc"}, "evaluate_every": 2}, "train: early_stopping needs data.valid"),
        ({"early_stopping": {"metric": "a.auc"}}, "train.early_stopping: needs train.evaluate_every"),
        ({"early_stopping": {"metric": "auc"}}, "train.early_stopping.metric: is <task>.<metric>"),
        ({"early_stopping": {"metric": "a.calibration"}}, "train.early_stopping.metric: calibration is neither"),
        ({"early_stopping": {"metric": "next.unranked"}}, "train.early_stopping.metric: unranked is neither"),
        ({"evaluate_every": "epochs"}, "train.evaluate_every: is a number of steps >= 0, or epoch, got 'epochs'"),
        ({"evaluate_every": -1}, "train.evaluate_every: is a number of steps >= 0, or epoch, got -1"),
    ],
)
def test_what_cannot_stop_a_run_is_refused(train, fault):
    with pytest.raises(UserError) as caught:
        from_dict(Config, {"data": {"train": "x"}, "train": train}, "mine")
    assert f"  - {fault}" in str(caught.value) and str(caught.value).count("\n") == 1


def test_null_is_off_and_neither_changes_the_bits():
    assert config_of(train={"early_stopping": None}).train.early_stopping == EarlyStoppingConfig()
    before, now = ({"train": {"early_stopping": {"metric": None, "patience": n}}} for n in (1, 2))
    assert differences({}, {}, changes(before, now), "cosine") == []


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("every", [3, "epoch"])
def test_evaluations_are_due_every_so_many_steps_or_at_the_end_of_an_epoch(generations, every, enabled):  # noqa: F811
    early = {"metric": "ctr.auc"} if enabled else None
    train = {"epochs": 3, "evaluate_every": every, "early_stopping": early}
    config = config_of(data={"train": "x", "valid": "y", "batch_size": 40, "streams": 8}, train=train)
    index = generations.between(-1, 0)
    one = SimpleNamespace(
        config=config,
        passes=passes(config, index),
        prepared=SimpleNamespace(indexes={"train": 1, "valid": 1}),
        stopping=EarlyStopping(config.train.early_stopping),
    )
    steps = len(list(one.passes.batches()))
    due = []
    for one.step in range(steps + 1):
        # The pass at whose end a run was stopped is opened again, and the next.
        resumed = passes(config, index, one.passes.position(one.step))
        is_due = Trainer._evaluation_is_due(one)
        assert Trainer._evaluation_is_due(SimpleNamespace(**{**vars(one), "passes": resumed})) == is_due
        due += [one.step] if is_due else []
    wanted = range(every, steps, every) if every == 3 else [steps // 3, 2 * steps // 3]
    assert due == [*wanted, *([steps] if enabled else [])]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopping")
    data = build_small(folder, {"big": 330, "middle": 160, "tiny": 40}, split="random:4,1,1")
    tree = {
        "run": {"root": str(folder / "runs"), "name": "peace", "seed": 7},
        "data": {split: f"{data}/{split}" for split in ("train", "valid", "test")}
        | {"batch_size": 40, "streams": 8, "shuffle_window": 128},
        "tables": {"dim": 8},
        "model": {"width": 16, "dropout": 0.2, "history": {"feedforward": 16}},
        "train": {
            "epochs": 20,
            "evaluate_every": EVERY,
            "early_stopping": {"metric": "ctr.auc", "patience": PATIENCE},
        },
        "checkpoint": {"keep": 1, "every_steps": 4},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    return folder / "c.yaml"


def train(config: Path, name: str, *arguments: object, event: str = "", ranks: int = 1) -> subprocess.CompletedProcess:
    start = [WORKER, event] if event else ["-m", "dist_rec", "train"]
    command = [*start, str(config), "--run.name", name, *map(str, arguments)]
    return run_ranks(ranks, command, SECONDS) if ranks > 1 else run_command([sys.executable, *command], SECONDS)


@pytest.fixture(scope="module")
def peace(config) -> Path:
    done = train(config, "peace")
    assert done.returncode == 0, done.stderr
    assert f"stopped early after step {LAST} of " in done.stdout
    return config.parent / "runs" / "peace"


def tensors(folder: Path) -> dict[str, list]:
    files = folder.rglob("*.safetensors")
    return {f"{file.parent.name}/{file.name} {n}": t.tolist() for file in files for n, t in load_file(file).items()}


def lines(run: Path, key: str) -> list[dict]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("time", "seconds")} for line in found if key in line]


def evaluation(run: Path) -> dict:
    return json.loads((run / "evaluation.json").read_text())


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(run / "checkpoints")]


def test_it_ends_with_the_best_checkpoint(peace):
    run, best = peace, checkpoint.name_of(BEST)
    told = lines(run, "early_stopping")
    assert [line["step"] for line in told] == list(range(EVERY, LAST + 1, EVERY))
    values = [line["evaluation"]["ctr"]["auc"] for line in told]
    assert max(values) == values[BEST // EVERY - 1] and [line["split"] for line in told] == ["valid"] * len(told)
    news = {"metric": "ctr.auc", "best": max(values), "best_step": BEST, "without_improvement": PATIENCE}
    assert told[-1]["early_stopping"] == news
    assert json.loads((run / "summary.json").read_text())["early_stopping"] == news
    assert (evaluation(run)["step"], evaluation(run)["split"]) == (BEST, "test")
    assert lines(run, "evaluation")[-1] | {"step": BEST, "split": "test"} == lines(run, "evaluation")[-1]
    assert read_curves(run / "metrics.jsonl")["evaluation"]["auc"]["ctr"][0] == [line["step"] for line in told]
    # The best outlives checkpoint.keep; what is to be judged is the best, what is gone on from the newest.
    assert names(run) == [checkpoint.name_of(LAST), best]
    assert checkpoint.find(run) == checkpoint.find(run / "checkpoints") == run / "checkpoints" / best
    assert checkpoint.find(run / "checkpoints" / names(run)[0]).name == names(run)[0]
    assert checkpoint.last_good(run / "checkpoints").step == LAST
    assert checkpoint.last_good(run / "checkpoints", best=True).step == BEST
    assert tensors(run / "checkpoints" / best) != tensors(run / "checkpoints" / names(run)[0])


def test_evaluate_measures_the_best(peace):
    before = evaluation(peace)
    done = run_command([sys.executable, "-m", "dist_rec", "evaluate", str(peace), "--json"], SECONDS)
    assert done.returncode == 0, done.stderr
    after = json.loads(done.stdout.splitlines()[-1])
    assert after["step"] == BEST
    for task, metrics in before["overall"].items():
        assert after["overall"][task] == pytest.approx(metrics, abs=1e-6)


def test_a_finetuned_run_starts_from_the_best(peace, tmp_path):
    foundation = read_foundation(str(peace))
    assert foundation.saved.step == BEST
    splits = SimpleNamespace(roots={}, train=SimpleNamespace(schema=foundation.schema), domains=[])
    tree = derived_tree(foundation, splits, 100, 1)
    assert tree["train"]["early_stopping"] == {} and from_dict(EarlyStoppingConfig, {}, "off").metric is None
    # Without a whole best, the newest is what there is.
    copy = tmp_path / "copy"
    shutil.copytree(peace, copy)
    file = next((copy / "checkpoints" / checkpoint.name_of(BEST) / "tables").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"\x01\x02")
    found = checkpoint.last_good(copy / "checkpoints", best=True)
    assert found.step == LAST and checkpoint.name_of(BEST) in found.passed_over[0]
    shutil.rmtree(file.parents[1])
    assert read_foundation(str(copy)).saved.step == LAST
    with pytest.raises(UserError, match=f"names {checkpoint.name_of(BEST)} the best checkpoint, which is gone"):
        checkpoint.find(copy)


def test_a_finished_run_says_so(config, peace):
    before = {path: path.stat().st_mtime_ns for path in peace.rglob("*")}
    done = train(config, "peace")
    assert done.returncode == 2 and f"a finished run, which stopped early at step {LAST}: ctr.auc: best" in done.stderr
    assert "Raise train.early_stopping.patience" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in peace.rglob("*")} == before


def test_interrupted_anywhere_it_stops_at_the_same_step_with_the_same_best(config, peace):
    """And with more patience it goes on from its newest checkpoint, as if it had always had it."""
    run = peace.parent / "struck"
    less = ["--train.early_stopping.patience", PATIENCE - 1]
    # Told to stop where an evaluation is due; dead when that is told, not saved; dead between two evaluations.
    for event, newest in (("term:6", 6), ("save:6", 6), ("saved:20", 20)):
        done = train(config, "struck", *less, event=event)
        assert done.returncode != 0 and not (run / "evaluation.json").exists()
        assert names(run)[0] == checkpoint.name_of(newest), (event, done.stderr)
    assert checkpoint.find(run).name == checkpoint.name_of(BEST)
    done = train(config, "struck", *less)
    assert done.returncode == 0 and f"stopped early after step {LAST - EVERY} of " in done.stdout, done.stderr
    assert "bit for bit as without the interruption" in done.stderr
    assert names(run) == [checkpoint.name_of(LAST - EVERY), checkpoint.name_of(BEST)]
    done = train(config, "struck")
    assert done.returncode == 0 and "bit for bit as without the interruption" in done.stderr, done.stderr
    for name in names(peace):
        assert tensors(run / "checkpoints" / name) == tensors(peace / "checkpoints" / name)
    assert names(run) == names(peace)
    assert lines(run, "early_stopping") == lines(peace, "early_stopping")
    for key in ("step", "overall", "domains"):
        assert evaluation(run)[key] == evaluation(peace)[key]


def test_two_ranks_agree_and_go_on_bit_for_bit(config):
    """To the end of train.steps, where the last evaluation counts too."""
    runs, steps = config.parent / "runs", 3 * EVERY + 1
    for name, event in (("two", ""), ("both", f"saved:{2 * EVERY + 2}"), ("both", "")):
        done = train(config, name, "--train.steps", steps, event=event, ranks=2)
        assert (done.returncode == 0) == (event == ""), done.stderr
    two, both = runs / "two", runs / "both"
    told = lines(both, "early_stopping")
    assert [line["step"] for line in told] == [*range(EVERY, steps, EVERY), steps]
    assert told == lines(two, "early_stopping")
    assert names(both) == names(two) and evaluation(both)["step"] == evaluation(two)["step"]
    for name in names(two):
        assert tensors(both / "checkpoints" / name) == tensors(two / "checkpoints" / name)
    # A run that was to be longer would not have evaluated there.
    done = train(config, "two", "--train.steps", steps + 1, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "not bit for bit" in done.stderr and f"counted an evaluation after step {steps}, where none" in done.stderr


def test_a_best_that_cannot_be_written_is_none(config, peace):
    done = train(config, "full", event=f"full:{BEST}")
    run = peace.parent / "full"
    assert done.returncode == 0 and "the disk is full; training goes on" in done.stderr, done.stderr
    told = lines(run, "early_stopping")
    # The next is compared with the best that was kept.
    assert [line["evaluation"] for line in told[: BEST // EVERY + 1]] == [
        line["evaluation"] for line in lines(peace, "early_stopping")[: BEST // EVERY + 1]
    ]
    assert told[BEST // EVERY]["early_stopping"]["best_step"] == BEST + EVERY
    assert evaluation(run)["step"] == BEST + EVERY == checkpoint.last_good(run / "checkpoints", best=True).step


def test_a_best_that_is_gone_is_looked_for_anew(config, peace):
    run = peace.parent / "gone"
    shutil.copytree(peace, run)
    shutil.rmtree(run / "checkpoints" / checkpoint.name_of(BEST))
    done = train(config, "gone", "--train.early_stopping.patience", PATIENCE + 1, "--train.steps", LAST + 2 * EVERY)
    assert done.returncode == 0 and f"the best checkpoint so far, that of step {BEST}, is gone" in done.stderr
    assert lines(run, "early_stopping")[LAST // EVERY]["early_stopping"]["best_step"] == LAST + EVERY
    assert evaluation(run)["step"] >= LAST + EVERY


def test_a_metric_that_no_evaluation_has_ends_the_run_before_it_begins(config):
    done = train(config, "typo", "--train.early_stopping.metric", "ctr.acu")
    assert done.returncode == 2 and "an evaluation has no 'ctr.acu'. Did you mean 'ctr.auc'? There is " in done.stderr
    assert not (config.parent / "runs" / "typo" / "metrics.jsonl").exists()
