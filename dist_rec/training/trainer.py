"""The loop: build, train, evaluate, save. One call a rank; the run folder is rank 0's."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from ..config import Config, save_config
from ..data.batch import Batch
from ..data.stream import Stream
from ..embeddings.planner import describe_plan
from ..errors import UserError
from . import checkpoint
from .collectives import DistributedReduction
from .engine import full_parameters, make_engine
from .hybrid import Hybrid, learning_rate_factor
from .metrics import Evaluation
from .process import Process, choose_device, process_group
from .setup import Prepared, build_model, build_stream, build_tables, check_new_run, prepare
from .tracking import NoTracker, Tracker


def quieten() -> None:
    """Silence the engines' chatter, which is neither an error nor actionable."""
    warnings.filterwarnings("ignore", module=r"(torch|torchrec|deepspeed|fbgemm_gpu|tensordict)\b.*")
    # Blamed on the caller's line, which is ours.
    warnings.filterwarnings("ignore", message=".*ShardedTensor", category=FutureWarning)
    for name in ("torch", "torchrec", "fbgemm_gpu", "DeepSpeed", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Trainer:
    """Everything one rank needs to train, evaluate and save a run.

    Args:
        prepared: the checked config.
        process: this rank.
        folder: the run folder.
    """

    def __init__(self, prepared: Prepared, process: Process, folder: Path) -> None:
        self.prepared, self.process, self.folder = prepared, process, folder
        config = self.config = prepared.config
        self.stream = build_stream(prepared, "train", process.rank, process.world_size, training=True)
        every = self.stream.steps * config.train.epochs
        self.total_steps = min(every, config.train.steps) if config.train.steps else every
        if self.total_steps < 1:
            raise UserError(
                f"an epoch of {config.data.train} has no full batch of {config.data.batch_size}: lower "
                "data.batch_size, or set data.drop_last: false."
            )
        tables, sharded, plan = build_tables(prepared, process, self.stream.batch_rows)
        self.plan = describe_plan(plan)
        model = build_model(prepared, DistributedReduction())
        with redirect_stdout(StringIO()):  # DeepSpeed prints which op it built
            self.engine = make_engine(
                model, config.dense, config.text, self.stream.batch_rows, process.world_size, process.device
            )
        self.hybrid = Hybrid(
            tables,
            sharded,
            self.engine,
            process.device,
            partial(learning_rate_factor, config.dense, total=self.total_steps),
        )
        self.tasks = {task: spec.label for task, spec in model.tasks.items()}
        self.step = 0

    def batches(self) -> Iterator[Batch]:
        """The training batches of all epochs."""
        done = 0
        for epoch in range(self.config.train.epochs):
            steps = min(self.stream.steps, self.total_steps - done)
            yield from self.stream.batches(epoch, 0, steps)
            done += steps

    def train(self, tracker: NoTracker) -> dict[str, float]:
        """Train to the end; returns seconds and rows per second of training alone."""
        config, batches = self.config, self.batches()
        seed_step(config.run.seed, 0, self.process.rank)
        started = last = time.monotonic()
        evaluating, last_step = 0.0, 0
        while (output := self.hybrid.train_step(batches)) is not None:
            self.step += 1
            seed_step(config.run.seed, self.step, self.process.rank)
            if self.step % config.train.log_every == 0 or self.step == self.total_steps:
                losses = {name: float(value) for name, value in output["losses"].items()}
                now = time.monotonic()
                rate = (self.rows_until(self.step) - self.rows_until(last_step)) / (now - last)
                last, last_step = now, self.step
                if not all(value == value for value in losses.values()):
                    raise UserError(
                        f"the loss is not a number at step {self.step}: {losses}. Lower the learning rates "
                        "(dense.learning_rate, tables.learning_rate)."
                    )
                tracker.step(self.step, losses, round(rate, 1))
            every = config.train.evaluate_every
            if every and self.step % every == 0 and self.step < self.total_steps and "valid" in self.prepared.indexes:
                before = time.monotonic()
                tracker.evaluation(self.step, self.evaluate("valid"))
                evaluating += time.monotonic() - before
                last, last_step = time.monotonic(), self.step
        seconds = time.monotonic() - started - evaluating
        return {"train_seconds": round(seconds, 2), "train_rows_per_s": round(self.rows_until(self.step) / seconds, 1)}

    def rows_until(self, step: int) -> int:
        """Rows of the first `step` steps over all ranks, masked ones left out."""
        full, rest = divmod(step, self.stream.steps)
        order = self.stream.order
        short = sum(min(order.stream_rows(s), rest * order.per_stream) for s in range(order.streams))
        epoch = sum(min(order.stream_rows(s), order.steps * order.per_stream) for s in range(order.streams))
        return full * epoch + short

    def evaluate(self, split: str) -> dict[str, Any]:
        """Metrics over a whole split. Collective."""
        stream = build_stream(self.prepared, split, self.process.rank, self.process.world_size)
        return evaluate(self.prepared, self.tasks, stream, self.hybrid.predict)

    def save(self) -> Path:
        """Write a checkpoint of the model as it is. Collective."""
        return checkpoint.save(
            self.folder / "checkpoints", self.step, self.hybrid.sharded, full_parameters(self.engine), self.plan
        )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Key dropout by (seed, step, rank)."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**63)


def evaluate(prepared: Prepared, tasks: dict[str, str], stream: Stream, predict) -> dict[str, Any]:
    """Run `predict` over a stream and compute every metric, and how fast it went. Collective.

    Args:
        tasks: label of each task.
        predict: iterator of batches -> iterator of (batch, output with `logits`).
    """
    started, schema = time.monotonic(), prepared.schema
    evaluation = Evaluation(schema.domains.names, list(tasks), prepared.config.evaluate.ndcg_at)
    for batch, output in predict(stream.batches(epoch=0)):
        for task, label in tasks.items():
            gains = batch.labels[label]
            evaluation.add(
                task,
                torch.sigmoid(output["logits"][task].float()),
                gains / schema.labels[label].maximum,
                gains,
                batch.label_valid[label] & batch.valid,
                batch.domain,
                batch.user,
                batch.query,
                batch.row,
            )
    metrics = evaluation.compute()
    seconds = time.monotonic() - started
    rates = {"evaluate_seconds": round(seconds, 2), "evaluate_rows_per_s": round(stream.reader.index.rows / seconds, 1)}
    return {"rates": rates, **metrics}


def train(config: Config) -> Path:
    """Train a config under torchrun, or alone. Returns the run folder.

    Raises:
        UserError: config or data are at fault; before any process group where that can be known.
    """
    quieten()
    check_new_run(config)
    prepared = prepare(config)
    device = choose_device(config)
    with process_group(config, device) as process:
        folder = config.run_folder
        folder.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(prepared, process, folder)
        tracker = NoTracker()
        if process.is_main:
            save_config(config, folder / "config.yaml")
            (folder / "plan.json").write_text(json.dumps(trainer.plan, indent=1))
            tracker = Tracker(folder, trainer.total_steps)
        tracker.data(trainer.stream.order.summary())
        try:
            rates = trainer.train(tracker)
            trainer.save()
            split = next(s for s in ("test", "valid", "train") if s in prepared.indexes)
            result = trainer.evaluate(split)
            tracker.evaluation(trainer.step, result)
        finally:
            tracker.close()
        if process.is_main:
            rates |= result["rates"]
            write_evaluation(folder, {"split": split, "step": trainer.step, **result, "rates": rates})
    return folder


def write_evaluation(folder: Path, entry: dict[str, Any]) -> None:
    """evaluation.json of the run folder: split, step, rates, overall, domains.

    Evaluated again, the split it holds is replaced and the rates of training stay; another split
    goes to evaluation-<split>.json beside it.
    """
    path = folder / "evaluation.json"
    if path.exists():
        held = json.loads(path.read_text())
        if held["split"] == entry["split"]:
            entry = {**entry, "rates": {**held["rates"], **entry["rates"]}}
        else:
            path = folder / f"evaluation-{entry['split']}.json"
    path.write_text(json.dumps(entry, indent=1))
