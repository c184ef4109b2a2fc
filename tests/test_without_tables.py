"""A run without any embedding table is a run like any other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from conftest import build_small, run_command

from dist_rec.config import load_config
from dist_rec.training import checkpoint
from dist_rec.training.prepare import prepare

SECONDS = 120
IDS = ["user_id", "history", "item_id", "tags"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`one`, a run on one rank, and `two`, the same on two ranks that stopped half way and went on."""
    folder = tmp_path_factory.mktemp("without")
    data = build_small(folder, {"big": 330, "middle": 160, "tiny": 40}, split="random:4,1,1")
    config = {
        "run": {"root": str(folder / "runs"), "seed": 5},
        "data": {split: f"{data}/{split}" for split in ("train", "test")}
        | {"batch_size": 40, "streams": 8, "shuffle_window": 128, "exclude_features": IDS},
        "model": {"width": 16, "history": {"kind": "none"}},
        "train": {"log_every": 1},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    dist_rec(folder, "train", "--run.name", "one")
    two = ["--run.name", "two", "--nproc-per-node", "2"]
    dist_rec(folder, "train", *two, "--train.steps", "4")
    said = dist_rec(folder, "train", *two).stderr
    assert "going on from step-00000004 bit for bit" in said
    return folder


def dist_rec(folder: Path, verb: str, *arguments: str, what: str = "c.yaml"):
    done = run_command([sys.executable, "-m", "dist_rec", verb, str(folder / what), *arguments], SECONDS)
    assert done.returncode == 0, done.stderr
    return done


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["losses"]["loss"] for line in lines if "losses" in line]


def test_it_learns_the_same_on_any_number_of_ranks_and_from_its_checkpoint(folder):
    assert prepare(load_config(folder / "c.yaml")).specs == []
    one, two = (losses(folder / "runs" / name) for name in ("one", "two"))
    assert len(one) == 10 and two == pytest.approx(one, abs=1e-5) and len(set(one)) > 5
    manifest = checkpoint.read_state(checkpoint.find(folder / "runs" / "two")).manifest
    assert manifest.tables == {} and manifest.dense


def test_it_is_evaluated_and_planned(folder):
    dist_rec(folder, "evaluate", what="runs/two")
    found = json.loads((folder / "runs" / "two" / "evaluation.json").read_text())
    assert found["overall"]["ctr"]["rows"] > 0
    plan = json.loads(dist_rec(folder, "plan", "--json").stdout.splitlines()[-1], parse_constant=pytest.fail)
    assert plan["fits"] and plan["tables"] == {}
