"""The few-shot curve: how good a new domain is after n of its rows, by finetuning and without a foundation.

Every point trains on a nested sample of the training rows (the 64 rows of a seed are among its 256) and is evaluated on
the same test rows. Three kinds of model:

* `finetuned`, under each preset; with 0 rows the foundation as it starts, untrained;
* `scratch`: the same model and the same rows, started at random;
* `single`: a shared bottom without adaptation that knows one domain alone (K = 1). A sequence model from scratch is
  that already, so it has none; its rows are training sequences, what is drawn is NDCG, and it stops by validation rows
  where there are any.

All follow the same rule of batch size, epochs and warm-up (`derive.Pace`). One job does all points, one after another
in one process group: starting a rank takes longer than most points do.
"""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..config import Config
from ..data.index import Index, read_index
from ..data.sample import sample
from ..errors import UserError
from ..files import lock
from ..strict import from_dict
from ..training.checkpoint import Saved
from ..training.finetuning import start_of
from ..training.kinds import kind_of
from ..training.passes import fingerprint
from ..training.prepare import prepare
from ..training.prepared import Prepared
from ..training.process import Process, choose_device, process_group, quieten
from ..training.reading import retry_of
from ..training.setup import agree_on_index
from ..training.start.foundation import Foundation
from ..training.start.old_domains import METRICS, metric
from ..training.start.origin import Origin
from ..training.tracking import NoTracker
from ..training.trainer import Trainer
from .curve_picture import draw
from .curve_results import CURVE_NAME, FINETUNED, SCRATCH, SINGLE, Entry, Results, print_summary, shown, summary
from .derive import Splits, Wishes, derive, derived_tree, override
from .single import narrowed

ALL = "all"
# Keys that a curve sets by itself, point by point: given, they would make its labels untrue.
OWN_KEYS = ("data.train", "data.test", "data.domains", "finetune.run", "finetune.domains", "finetune.freeze")
INSTEAD = {"finetune.domains": "--domains", "finetune.freeze": "--freeze"}
PICTURE_NAME = "curve.png"
# Of the point that is being measured.
SAMPLES_NAME, RUNS_NAME = "samples", "runs"


@dataclass(frozen=True)
class Point:
    """One training: `n` rows of the sample of `seed`; `preset` of a finetuned, `domain` of a single-domain model."""

    n: int
    seed: int
    kind: str
    preset: str | None = None
    domain: str | None = None

    @property
    def label(self) -> str:
        return "-".join(
            str(part) for part in (self.n, self.seed, self.kind, self.preset, self.domain) if part is not None
        )

    def has(self, entry: Entry) -> bool:
        """Whether `entry` is of this point."""
        same = (entry.n, entry.seed, entry.kind, entry.preset) == (self.n, self.seed, self.kind, self.preset)
        return same and self.domain in (None, entry.domain)


def parse_sizes(text: str) -> list[int | str]:
    """`0,64,all` as numbers of rows and `all`.

    Raises:
        UserError: it is no such list.
    """
    sizes: list[int | str] = []
    for part in (part.strip() for part in text.split(",")):
        if part != ALL and not part.isdecimal():
            raise UserError(f"--curve {text}: {part!r} is no number of rows: write them as 0,64,256,all.")
        sizes.append(part if part == ALL else int(part))
    return sizes


def _check_keys(keys: dict[str, str]) -> None:
    """Refuse overrides of what a curve sets by itself.

    Raises:
        UserError: which, and what to use instead.
    """
    for own in OWN_KEYS:
        if own in keys:
            use = f"use {INSTEAD[own]}" if own in INSTEAD else "the run and --data say it"
            raise UserError(f"--{own}: a curve sets this key itself, point by point: leave it out, {use}.")


def _points(sizes: list[int], seeds: int, presets: list[str], domains: list[str]) -> list[Point]:
    found = []
    for seed in range(seeds):
        for n in sizes:
            found += [Point(n, seed, FINETUNED, preset) for preset in presets]
            if n:
                found.append(Point(n, seed, SCRATCH))
                found += [Point(n, seed, SINGLE, domain=domain) for domain in domains]
    return found


@dataclass
class _Curve:
    """What all points share."""

    foundation: Foundation
    splits: Splits
    wishes: Wishes
    ranks: int
    folder: Path

    def domains(self) -> list[str]:
        """The domains that are measured, those with rows to train on and to test.

        Raises:
            UserError: there is none.
        """
        if "test" not in self.splits.roots:
            raise UserError(
                f"a curve needs test rows, and there is no test split beside {self.splits.roots['train']}: build the "
                "data set with --split."
            )
        test = read_index(self.splits.roots["test"], retry_of(self.foundation.config.data))
        found = [domain for domain in self.splits.domains if test.rows_of(domain)]
        if not found:
            raise UserError(f"{self.splits.roots['test']} has no row of {', '.join(self.splits.domains)}.")
        return found

    def config(self, point: Point, train: str, index: Index) -> Config:
        """The config of a point that trains on the data set at `train`."""
        splits = Splits({**self.splits.roots, "train": train}, index)
        tree = derived_tree(self.foundation, splits, splits.rows, self.ranks)
        if not tree["train"]["early_stopping"]:
            tree["data"]["valid"] = None
        tree["checkpoint"] |= {"every_steps": 0, "every_minutes": 0.0}
        tree["finetune"] = {}
        if point.kind == FINETUNED:
            wishes = self.wishes
            tree["finetune"] = {"run": str(self.foundation.run), "domains": wishes.domains, "freeze": point.preset}
            tree["finetune"]["train_names"] = list(wishes.train_names)
        override(tree, self.foundation, self.wishes.keys or {})
        if point.kind != FINETUNED:
            tree["finetune"] = {}
        if point.kind == SINGLE:
            tree["data"]["domains"] = [point.domain]
            tree["model"]["adaptation"]["enabled"] = False
            tree["model"]["body"]["kind"] = "shared_bottom"
            tree["model"]["regulariser"]["kind"] = "none"
        tree["run"] |= {
            "seed": tree["run"]["seed"] + point.seed,
            "root": str(self.folder / RUNS_NAME),
            "name": point.label,
        }
        return from_dict(Config, tree, f"point {point.label}")

    def prepare(self, point: Point, train: str, index: Index) -> Prepared:
        view = partial(narrowed, domain=point.domain) if point.kind == SINGLE else None
        # The curve's folder has no checkpoints; a point's has where a job was stopped, and begins anew all the same.
        return prepare(self.config(point, train, index), self.ranks, run=self.folder, view=view)


def draw_curve(
    run: Path,
    data: str,
    wishes: Wishes,
    presets: list[str],
    sizes: list[int | str],
    seeds: int,
    out: Path | None,
    ranks: int,
) -> dict[str, Any]:
    """Measure the points that `out` lacks, and draw them all. Under torchrun, or alone.

    Args:
        run: the foundation's folder.
        data: the new domain's data, with a test split.
        wishes: as of a single run; `name` gives `out` its name.
        presets: what stays, one line each; none is what is usual.
        sizes: numbers of rows; those of more rows than there are, are left out, and this is said.
        seeds: samples and starts, from the config's `run.seed` upwards.
        out: folder of curve.json and curve.png.

    Returns:
        `folder`, and the `curve_results.summary`.

    Raises:
        UserError: the data is none for this run, has no test rows, or a point's config is wrong; before any training.
    """
    quieten()
    _check_keys(wishes.keys or {})
    config, foundation, splits = derive(run, data, wishes, ranks)
    if seeds < 1:
        raise UserError(f"--seeds {seeds} must be at least 1.")
    folder = Path(out) if out else Path(config.run.root) / f"{config.run.name}-curve"
    kind = kind_of(config)
    if why := kind.not_evaluated(config):
        raise UserError(f"--curve measures models on test rows, and {why}: build one beside the splits.")
    curve = _Curve(foundation, splits, wishes, ranks, folder)
    rows = splits.rows
    counts = sorted({rows if size == ALL else size for size in sizes})
    domains = curve.domains()
    alone = domains if kind.heads(foundation.schema, config) else []
    points = _points([n for n in counts if n <= rows], seeds, presets or [kind.usual_freeze], alone)
    results = Results(folder, _settings(curve))
    # One of each kind, so that what is wrong is said before anything is trained.
    whole = splits.roots["train"]
    first = {(p.kind, p.preset, p.domain): curve.prepare(p, whole, splits.train) for p in points}
    with process_group(config, choose_device(config)) as process:
        if process.is_main:
            if more := [f"{n:,}" for n in counts if n > rows]:
                print(
                    f"dist-rec: left out {', '.join(more)}, for there are {rows:,} rows to train on.", file=sys.stderr
                )
            results.begin()
            held = lock(folder)  # noqa: F841  for as long as this function runs
            for left in (SAMPLES_NAME, RUNS_NAME):
                # Of a job that was stopped: its point begins anew.
                shutil.rmtree(folder / left, ignore_errors=True)
        todo = [[p for p in points if not any(p.has(entry) for entry in results.entries)]]
        dist.broadcast_object_list(todo)
        start, origin = None, None
        if tuned := next((prepared for prepared in first.values() if prepared.foundation), None):
            start, origin = start_of(tuned), tuned.origin
        for done, point in enumerate(todo[0], 1):
            with _rows(curve, point, process) as (train, index):
                entries = list(_measure(curve, point, train, index, process, start, origin))
            if process.is_main:
                results.add(entries)
                said = ", ".join(f"{e.domain} {e.task} {e.value:.4f}" for e in entries if e.value is not None)
                metric = shown(entries[0].metric)
                print(f"{done}/{len(todo[0])}  {point.label}  {metric} {said}  {entries[0].seconds:.1f} s", flush=True)
        if process.is_main:
            draw(results.entries, folder / PICTURE_NAME, rows)
            print_summary(results.entries)
            print(f"{folder / CURVE_NAME}, {folder / PICTURE_NAME}")
    return {"folder": str(folder), "summary": summary(results.entries)}


def _settings(curve: _Curve) -> dict[str, Any]:
    """What decides the numbers of a curve beside rows, seeds and presets, which may grow."""
    wishes = curve.wishes
    return {
        "run": str(curve.foundation.run.resolve()),
        "checkpoint": curve.foundation.saved.manifest.sha256,
        "data": curve.splits.roots,
        "training rows": fingerprint(curve.splits.train),
        "domains": wishes.domains,
        "train_names": list(wishes.train_names),
        "overrides": wishes.keys or {},
        "ranks": curve.ranks,
    }


@contextmanager
def _rows(curve: _Curve, point: Point, process: Process) -> Iterator[tuple[str, Index]]:
    """Root and index of the rows that a point trains on: a sample that is gone afterwards, or the whole. Collective.

    Of 0 rows it is the whole, of which nothing is trained.
    """
    whole = curve.splits.roots["train"]
    if point.n in (0, curve.splits.rows):
        yield whole, curve.splits.train
        return
    root, fault = curve.folder / SAMPLES_NAME / f"{point.n}-{point.seed}", [None]
    if process.is_main:
        try:
            root.parent.mkdir(exist_ok=True)
            retry = retry_of(curve.foundation.config.data)
            sample(whole, point.n, point.seed, str(root), overwrite=True, retry=retry)
        except UserError as error:
            fault = [str(error)]
    dist.broadcast_object_list(fault)
    if fault[0] is not None:
        raise UserError(fault[0])
    yield str(root), read_index(str(root))
    dist.barrier()
    if process.is_main:
        shutil.rmtree(root)


def _measure(
    curve: _Curve,
    point: Point,
    train: str,
    index: Index,
    process: Process,
    start: Saved | None,
    origin: Origin | None,
) -> Iterator[Entry]:
    """Train one point and evaluate it. Collective; its run folder is gone afterwards.

    Args:
        start, origin: of the foundation, as the whole training set finds them.
    """
    folder = curve.folder / RUNS_NAME / point.label
    drawn = kind_of(curve.foundation.config).drawn(curve.foundation.config)
    if point.domain is not None and not index.rows_of(point.domain):
        # A sample of several domains may lack one.
        yield from (_entry(point, point.domain, task, {}, 0.0, drawn) for task in curve.foundation.tasks())
        return
    prepared = curve.prepare(point, train, index)
    for split in prepared.indexes:
        agree_on_index(prepared, split)
    if point.kind == FINETUNED:
        prepared.origin = origin
    trainer = Trainer(prepared, process, None, start if point.kind == FINETUNED else None)
    seconds = trainer.train(NoTracker(), save=False)["train_seconds"] if point.n else 0.0
    found = trainer.evaluate("test")["domains"]
    trainer.close()
    del trainer
    # Engine, pipeline and tables refer to each other, and a GPU's memory waits for no collector.
    gc.collect()
    if process.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    for domain in [point.domain] if point.domain else curve.domains():
        for task, metrics in found[domain].items():
            yield _entry(point, domain, task, metrics, seconds, drawn)


def _entry(point: Point, domain: str, task: str, metrics: dict[str, Any], seconds: float, drawn: str) -> Entry:
    # Of the cut that is drawn, or of the only one.
    _, _, cut = drawn.partition("@")
    held = {name: metric(metrics, name) for name in METRICS}
    if cut:
        held |= {name: metrics.get(f"{name}@{cut}") for name in ("ndcg", "recall")}
    return Entry(
        n=point.n,
        seed=point.seed,
        kind=point.kind,
        preset=point.preset,
        domain=domain,
        task=task,
        **held,
        seconds=seconds,
        metric=drawn,
    )
