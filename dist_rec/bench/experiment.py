"""Published protocols, repeated: every variant of a base config, over splits and seeds.

An experiment file holds a whole training config under `config`, and what varies as overrides:

    seeds: [0, 1, 2]
    splits: {random: {data.train: ...}, time: {...}}
    variants: {mmoe: {model.body.kind: mmoe}, single: {per_domain: true, ...}, ...}
    metrics: {ctr: [auc, logloss], relevance: [ndcg@10, auc]}
    comparisons: {bodies: {reference: mmoe, variants: [mmoe, ple, single]}}

A variant with `per_domain` is one run for each domain of its data, trained on that domain alone; of each only the
figures of its domain count. One with `splits` has runs on those alone. One with `pretrained` starts from the run that
the split names as `finetune.run`, which the others leave alone; so a split is a data set, with what there is to start
from. Each run is a torchrun of its own. Results are a JSON list that grows run by run, and a run that was cut goes on
from its last checkpoint, so an interrupted experiment goes on where it stopped. Knows no model: a run is what `train`
does. What the results say is told by `compare.py`, and by `paired_runs.py` where runs keep every row's place.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from time import monotonic
from typing import Any

import yaml
from pydantic import Field

from ..config import Config, apply_overrides, check_names, load_config
from ..config.training import UNORDERED
from ..data.index import read_index
from ..errors import UserError
from ..files import write_text
from ..strict import from_dict, read_yaml, strict, to_dict

# Of results that were written when there was one task.
METRICS = ("auc", "gauc", "logloss")
FOUNDATION = "finetune.run"


@strict
class Comparison:
    """Variants, by the names of their runs, side by side; each is tested against `reference`."""

    reference: str
    variants: list[str] = Field(min_length=1)


@strict
class Settings:
    """What a variant says besides overrides, which are written with a point in their name."""

    per_domain: bool = False
    pretrained: bool = False
    splits: list[str] = field(default_factory=list)


@strict
class Experiment:
    """What is repeated: `config` with each of `variants`, on each of `splits`, for each seed.

    `texts` are appended to every variant's name. `metrics` names, by task, what is told of it, the most important
    first.
    """

    config: dict[str, Any]
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    splits: dict[str, dict[str, Any]] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    metrics: dict[str, list[str]] = field(default_factory=lambda: {"ctr": ["auc", "logloss"]})
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    texts: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})

    def names(self) -> list[str]:
        """Of all variants, with their texts."""
        return [variant + suffix for suffix in self.texts for variant in self.variants]


@dataclass(frozen=True)
class Run:
    """One training; `domain` is set where it is one of a `per_domain` variant."""

    name: str
    split: str
    seed: int
    domain: str | None
    overrides: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{self.split}/{self.name}/{self.seed}" + (f"/{self.domain}" if self.domain else "")

    @property
    def key(self) -> tuple[str, str, int, str | None]:
        return self.name, self.split, self.seed, self.domain

    @property
    def foundation(self) -> str | None:
        """Run folder that it starts from."""
        return self.overrides.get(FOUNDATION)

    def matches(self, glob: str) -> bool:
        """Whether the glob is of this run, or of all domains of its variant, split and seed."""
        return fnmatch(self.label, glob) or fnmatch(f"{self.split}/{self.name}/{self.seed}", glob)


def folder_of(runs: Path, label: str) -> Path:
    """Of the run of a label."""
    return runs / label.replace("/", "-")


def load_experiment(path: Path) -> Experiment:
    """Read and check an experiment file.

    Raises:
        UserError: it is none, or names variants or splits that it does not have; every fault is listed.
    """
    experiment = from_dict(Experiment, read_yaml(path), str(path))
    faults, names = [], experiment.names()
    for variant in experiment.variants:
        settings, _ = _parts(experiment, variant, path)
        faults += check_names(list(experiment.splits), settings.splits, f"variants.{variant}.splits")
    for title, one in experiment.comparisons.items():
        faults += check_names(names, [one.reference], f"comparisons.{title}.reference")
        faults += check_names(names, one.variants, f"comparisons.{title}.variants")
    if faults:
        raise UserError(f"{path}:\n" + "\n".join(f"  - {fault}" for fault in faults))
    return experiment


def _parts(experiment: Experiment, variant: str, path: Path) -> tuple[Settings, dict[str, Any]]:
    """A variant's settings, and its overrides."""
    given = experiment.variants[variant]
    settings = {key: value for key, value in given.items() if "." not in key}
    overrides = {key: value for key, value in given.items() if "." in key}
    return from_dict(Settings, settings, f"{path}, variants.{variant}"), overrides


def planned_runs(experiment: Experiment, path: Path) -> Iterator[Run]:
    """Every run of the experiment, those of one seed together.

    Raises:
        UserError: a run's config is wrong, or the data whose domains it needs, or the run that it starts from, are not
            there.
    """
    for split, of_split in experiment.splits.items():
        for seed in experiment.seeds:
            for suffix, of_text in experiment.texts.items():
                for variant in experiment.variants:
                    settings, own = _parts(experiment, variant, path)
                    if settings.splits and split not in settings.splits:
                        continue
                    name = variant + suffix
                    overrides = {**of_split, **of_text, **own, "run.seed": seed}
                    if not settings.pretrained and FOUNDATION not in own:
                        overrides.pop(FOUNDATION, None)
                    if settings.pretrained and FOUNDATION not in overrides:
                        raise UserError(f"{path}: {name} is pretrained, and splits.{split} has no {FOUNDATION}.")
                    config = _resolved(experiment, overrides, f"{path}, run {split}/{name}")
                    for domain in _domains(config) if settings.per_domain else [None]:
                        alone = {} if domain is None else {"data.domains": [domain]}
                        yield Run(name, split, seed, domain, {**overrides, **alone})


def _domains(config: dict[str, Any]) -> list[str]:
    """The domains that a config trains on."""
    index = read_index(config["data"]["train"])
    chosen = config["data"].get("domains") or index.schema.domains.names
    return [domain for domain in chosen if index.rows_of(domain)]


def run_experiment(path: Path, results: Path, nproc_per_node: int, only: list[str], runs: Path) -> list[dict[str, Any]]:
    """Do the runs that `results` lacks, write it after each, and return all of it (`read_results`).

    Args:
        only: globs of `split/name/seed` or `split/name/seed/domain`; a run that matches any is done. Empty does all.

    Raises:
        UserError: the file is no experiment, a variant's config is wrong, or a run to start from is not there; before
            the first run.
    """
    experiment = load_experiment(path)
    planned = list(planned_runs(experiment, path))
    for glob in only:
        if not any(run.matches(glob) for run in planned):
            raise UserError(f"{path} has no run {glob!r}: runs are called like {planned[0].label!r}.")
    lines = _read(results)
    have = {(e["name"], e["split"], e["seed"], e.get("domain")) for e in lines}
    left = [run for run in planned if run.key not in have and (not only or any(run.matches(g) for g in only))]
    for foundation in dict.fromkeys(run.foundation for run in left if run.foundation):
        _check_foundation(foundation)
    for number, run in enumerate(left, 1):
        folder = folder_of(runs, run.label)
        config = runs / f"{folder.name}.yaml"
        runs.mkdir(parents=True, exist_ok=True)
        own = {"run.name": folder.name, "run.root": str(runs)}
        tree = _resolved(experiment, {**run.overrides, **own}, run.label)
        config.write_text(yaml.safe_dump(tree))
        print(f"{number}/{len(left)} {run.label} ...", end=" ", flush=True)
        started = monotonic()
        evaluation = _train(config, folder, nproc_per_node)
        entry = {"name": run.name, "seed": run.seed, "split": run.split}
        entry |= {"domain": run.domain} if run.domain else {}
        entry |= _told(run, from_dict(Config, tree, run.label), evaluation) | _figures(evaluation, run.domain)
        lines.append(entry | {"seconds": round(monotonic() - started, 1)})
        write_text(results, "[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")
        print(_shown(lines[-1], experiment), flush=True)
    return read_results(results)


def _read(results: Path) -> list[dict[str, Any]]:
    try:
        lines = json.loads(results.read_text()) if results.exists() else []
        if not all({"name", "split", "seed"} <= line.keys() for line in lines):
            raise ValueError("an entry has no name, split or seed")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{results} are no results of an experiment: {error}. Name another file.") from None
    return lines


def read_results(results: Path) -> list[dict[str, Any]]:
    """The runs of a results file: `name`, `split`, `seed`, `domain` (of a run on one domain alone, else None), `tasks`
    and `domains` with the metrics by task, `train_rows_per_s`.

    Files that were written when there was one task, `ctr`, are read too.

    Raises:
        UserError: it is no such file.
    """
    return [_as_now(line) for line in _read(results)]


def _as_now(line: dict[str, Any]) -> dict[str, Any]:
    now = {"domain": None, **line}
    if "tasks" not in line:
        now["tasks"] = {"ctr": {name: line[name] for name in METRICS if name in line}}
        now["domains"] = {domain: {"ctr": metrics} for domain, metrics in line["domains"].items()}
    return now


def _resolved(experiment: Experiment, overrides: dict[str, Any], origin: str) -> dict[str, Any]:
    data = json.loads(json.dumps(experiment.config))
    apply_overrides(data, {key: json.dumps(value) for key, value in overrides.items()})
    from_dict(Config, data, origin)
    return data


def _train(config: Path, folder: Path, nproc_per_node: int) -> dict[str, Any]:
    """The run's evaluation.json, with its summary.json as `summary`, and whether it was `resumed`.

    A run of this config that was cut goes on from its last checkpoint; anything else in `folder` makes room.
    """
    resumed = _was_cut(config, folder)
    if not resumed:
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "dist_rec", "train", str(config), "--nproc-per-node", str(nproc_per_node)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise UserError(f"the run of {config} ended with {finished.returncode}:\n{finished.stderr[-2000:]}")
    found = [json.loads((folder / f"{name}.json").read_text()) for name in ("evaluation", "summary")]
    return {**found[0], "summary": found[1], "resumed": resumed}


def _was_cut(config: Path, folder: Path) -> bool:
    """Does `folder` hold an unfinished run of this very config, with a checkpoint?"""
    from ..training.checkpoint import checkpoints
    from ..training.resume import changes

    if (folder / "summary.json").exists() or not checkpoints(folder / "checkpoints"):
        return False
    try:
        held = load_config(folder / "config.yaml")
    except UserError:
        return False
    return not changes(to_dict(held), to_dict(load_config(config)))


def _check_foundation(run: str) -> None:
    from ..training.start.foundation import read_foundation

    read_foundation(run)


def _told(run: Run, config: Config, evaluation: dict[str, Any]) -> dict[str, Any]:
    """Keys of the run's kind of model."""
    from ..training.kinds import kind_of

    return _rounded(kind_of(config).told(run.split, config, evaluation["overall"]))


def _rounded(metrics: dict[str, Any]) -> dict[str, Any]:
    """What says how good a model is."""
    return {
        name: round(value, 5) if isinstance(value, float) else value
        for name, value in metrics.items()
        if name not in UNORDERED
    }


def _figures(evaluation: dict[str, Any], domain: str | None) -> dict[str, Any]:
    """What is kept of an evaluation; of a run on one domain, that domain's figures alone."""

    def kept(tasks: dict[str, Any]) -> dict[str, Any]:
        return {task: _rounded(metrics) for task, metrics in tasks.items() if metrics["rows"]}

    domains = {name: kept(tasks) for name, tasks in evaluation["domains"].items() if domain in (None, name)}
    rates, summary = evaluation["rates"], evaluation["summary"]
    stopped = summary.get("early_stopping")
    return {
        "tasks": kept(evaluation["overall"]) if domain is None else {},
        "domains": domains,
        "evaluated": evaluation["split"],
        "step": evaluation["step"],
        "epochs": len(summary["epochs"]),
        **({"valid": {stopped["metric"]: stopped["best"]}} if stopped else {}),
        **({"resumed": True} if evaluation["resumed"] else {}),
        "train_rows_per_s": round(rates["train_rows_per_s"]),
        "train_seconds": round(rates["train_seconds"], 1),
    }


def _shown(line: dict[str, Any], experiment: Experiment) -> str:
    """What a run gave, in a line."""
    tasks = line["tasks"] or next(iter(line["domains"].values()))
    said = []
    for task, metrics in experiment.metrics.items():
        value = tasks.get(task, {}).get(metrics[0])
        if value is not None:
            said.append(f"{task} {metrics[0]} {value:.4f}")
    return "  ".join([*said, f"{line['train_rows_per_s']:,.0f} rows/s"])
