"""Published protocols, repeated: every variant of a base config, over splits and seeds.

An experiment file holds a whole training config under `config`, and what varies as overrides:

    seeds: [0, 1, 2]
    splits: {random: {data.train: ...}, time: {...}}
    variants: {mmoe: {model.body.kind: mmoe}, ...}

Each run is a torchrun of its own. Results are a JSON list that grows run by run, so an
interrupted experiment goes on where it stopped. Knows no model: a run is what `train` does.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field
from rich.console import Console
from rich.table import Table

from ..config import Config, apply_overrides
from ..errors import UserError
from ..strict import from_dict, read_yaml, strict


@strict
class Experiment:
    """What is repeated: `config` with each of `variants`, on each of `splits`, for each seed."""

    config: dict[str, Any]
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    splits: dict[str, dict[str, Any]] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    task: str = "ctr"
    texts: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})

    def runs(self) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
        """Name, split, seed and overrides of every run."""
        for split, of_split in self.splits.items():
            for suffix, of_text in self.texts.items():
                for variant, of_variant in self.variants.items():
                    for seed in self.seeds:
                        name = variant + suffix
                        yield name, split, seed, {**of_split, **of_text, **of_variant, "run.seed": seed}


def run_experiment(path: Path, results: Path, nproc_per_node: int, only: list[str], runs: Path) -> list[dict[str, Any]]:
    """Do the runs that `results` lacks, write it after each, and return all of it.

    Args:
        only: globs of `split/name/seed`; a run that matches any is done. Empty does all.

    Raises:
        UserError: the file is no experiment, or a variant's config is wrong; before the first run.
    """
    experiment = from_dict(Experiment, read_yaml(path), str(path))
    planned = list(experiment.runs())
    for glob in only:
        if not any(fnmatch(_label(*run), glob) for run in planned):
            raise UserError(f"{path} has no run {glob!r}: runs are called like {_label(*planned[0])!r}.")
    for name, split, _, overrides in planned:
        _resolved(experiment, overrides, f"{path}, run {split}/{name}")
    done = json.loads(results.read_text()) if results.exists() else []
    have = {(r["name"], r["split"], r["seed"]) for r in done}
    for name, split, seed, overrides in planned:
        label = _label(name, split, seed)
        if (name, split, seed) in have or only and not any(fnmatch(label, glob) for glob in only):
            continue
        label = label.replace("/", "-")
        config = runs / f"{label}.yaml"
        runs.mkdir(parents=True, exist_ok=True)
        run_keys = {"run.name": label, "run.root": str(runs)}
        config.write_text(yaml.safe_dump(_resolved(experiment, {**overrides, **run_keys}, label)))
        print(f"{label} ...", end=" ", flush=True)
        entry = {
            "name": name,
            "seed": seed,
            "split": split,
            **_run(config, runs / label, nproc_per_node, experiment.task),
        }
        done.append(entry)
        results.write_text("[\n" + ",\n".join(json.dumps(r) for r in done) + "\n]\n")
        print(f"AUC {entry['auc']:.4f}  {entry['train_rows_per_s']:,.0f} rows/s", flush=True)
    return done


def _label(name: str, split: str, seed: int, *_: Any) -> str:
    return f"{split}/{name}/{seed}"


def _resolved(experiment: Experiment, overrides: dict[str, Any], origin: str) -> dict[str, Any]:
    data = json.loads(json.dumps(experiment.config))
    apply_overrides(data, {key: json.dumps(value) for key, value in overrides.items()})
    from_dict(Config, data, origin)
    return data


def _run(config: Path, folder: Path, nproc_per_node: int, task: str) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "dist_rec", "train", str(config), "--nproc-per-node", str(nproc_per_node)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise UserError(f"the run of {config} ended with {finished.returncode}:\n{finished.stderr[-2000:]}")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    overall = evaluation["overall"][task]
    return {
        **_rounded(overall),
        "domains": {name: _rounded(tasks[task]) for name, tasks in evaluation["domains"].items()},
        "train_rows_per_s": round(evaluation["rates"]["train_rows_per_s"]),
    }


def _rounded(metrics: dict[str, Any]) -> dict[str, float | None]:
    return {name: None if metrics[name] is None else round(metrics[name], 5) for name in ("auc", "logloss")}


def print_results(results: list[dict[str, Any]]) -> None:
    """Mean and range over seeds, by split and name."""
    table = Table("split", "name", "seeds", "AUC", "range", "logloss", "rows/s")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in results:
        groups.setdefault((entry["split"], entry["name"]), []).append(entry)
    for (split, name), entries in groups.items():
        auc = [e["auc"] for e in entries]
        table.add_row(
            split,
            name,
            str(len(entries)),
            f"{statistics.mean(auc):.4f}",
            f"{min(auc):.4f} .. {max(auc):.4f}",
            f"{statistics.mean(e['logloss'] for e in entries):.4f}",
            f"{statistics.median(e['train_rows_per_s'] for e in entries):,.0f}",
        )
    Console().print(table)
