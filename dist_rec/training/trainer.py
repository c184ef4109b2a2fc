"""The loop: build, train, evaluate, save. One call a rank; the run folder is rank 0's."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from ..config import Config, save_config
from ..data.index import Index, read_index
from ..data.stream import Stream
from ..embeddings.planner import describe_plan
from ..errors import Stopped, UserError
from ..strict import from_dict, to_dict
from . import checkpoint
from .agreement import Agreement
from .checkpoint import Saved
from .collectives import DistributedReduction
from .engine import make_engine
from .hybrid import Hybrid, learning_rate_factor
from .metrics import Evaluation
from .passes import FROM_THE_START, Pass, Passes, Position
from .process import Process, choose_device, process_group
from .resume import changes, differences, find_earlier
from .row_record import NoRecord, RowRecord
from .setup import Prepared, build_model, build_stream, build_tables, build_training_stream, prepare
from .summary import Summary
from .tracking import NoTracker, Stopwatch, Tracker


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
        earlier: the checkpoint to go on from, None for a new run.

    Raises:
        UserError: the checkpoint is of another model or data set, or there is nothing left to do.
    """

    def __init__(self, prepared: Prepared, process: Process, earlier: Saved | None = None) -> None:
        self.prepared, self.process = prepared, process
        config = self.config = prepared.config
        state = earlier.manifest.state if earlier else {}
        position = from_dict(Position, state["position"], str(earlier.folder)) if earlier else None
        self.index, self.looked = prepared.indexes["train"], False
        self.passes = Passes(config.train, self._newest, self._open_stream, config.data.from_watermark, position)
        self.step = self.saved_step = self.passes.start_step
        _check_something_is_left(config, self.passes)
        batch_rows = self.passes.stream.batch_rows
        tables, sharded, plan = build_tables(prepared, process, batch_rows, _plan_to_keep(earlier, process, config))
        self.plan = describe_plan(plan)
        model = build_model(prepared, DistributedReduction())
        with redirect_stdout(StringIO()):  # DeepSpeed prints which op it built
            self.engine = make_engine(model, config.dense, config.text, batch_rows, process.world_size, process.device)
        self.hybrid = Hybrid(tables, sharded, self.engine, process.device, self._learning_rate_factor, self.step)
        self.converted = []
        if earlier:
            self.converted = checkpoint.load_tables(earlier, sharded)
            checkpoint.load_dense_into_engine(earlier, self.engine)
        self.tasks = {task: spec.label for task, spec in model.tasks.items()}
        self.summary = Summary(process, state.get("summary"))
        self.writer = checkpoint.Writer(config.run_folder / "checkpoints", config.checkpoint)

    def _newest(self) -> Index:
        """The training data as it is now; equal on all ranks, whose looks may fall before and after an append."""
        if self.process.is_main and self.looked:
            self.index = read_index(self.prepared.root("train"))
        self.looked = True
        newest = torch.tensor(self.index.generation, device=self.process.device)
        torch.distributed.broadcast(newest, 0)
        if self.index.generation < newest:
            self.index = read_index(self.prepared.root("train"))
        return self.index.between(FROM_THE_START, int(newest))

    def _open_stream(self, index: Index, every_row: bool) -> Stream:
        if index.generation > self.prepared.indexes["train"].generation:
            self.prepared.reopen_store()
        return build_training_stream(self.prepared, self.process.rank, self.process.world_size, index, every_row)

    def _learning_rate_factor(self, step: int) -> float:
        return learning_rate_factor(self.config.dense, step, self.passes.at(step).total)

    def train(self, tracker: NoTracker) -> dict[str, float]:
        """Train to the end; returns seconds and rows per second of training alone.

        Raises:
            Stopped: a rank was told to stop; what was done is saved.
        """
        config = self.config
        agreement = Agreement(config.checkpoint, self.process.timeout)
        record = RowRecord(config.run_folder / "rows") if config.train.record_rows else NoRecord()
        watch = Stopwatch()
        try:
            self._train(tracker, agreement, record, watch)
        finally:
            agreement.close()
            record.close()
        rows, seconds = self.passes.rows_until(self.step), watch.seconds
        return {"train_seconds": round(seconds, 2), "train_rows_per_s": round(rows / seconds, 1)}

    def _train(self, tracker: NoTracker, agreement: Agreement, record: RowRecord | NoRecord, watch: Stopwatch) -> None:
        config, batches = self.config, self.passes.batches()
        begun = None
        while not self.passes.finished:
            agreement.begin(self.summary.lost_in_epoch)
            seed_step(config.run.seed, self.step, self.process.rank)
            output = self.hybrid.train_step(batches)
            agreement.end(self.step + 1)
            if output is None:
                return
            one = self.passes.at(self.step)
            self.step += 1
            if one is not begun:
                begun = one
                self.summary.begin(one)
                tracker.data(one.epoch, one.order.summary())
            rows = output["batch"].row[output["batch"].valid]
            record.step(self.step, one.epoch, rows + one.first_row)
            self.summary.count(one, self.step, len(rows))
            self._check_lost(one, agreement.lost_rows)
            is_told = self.step % config.train.log_every == 0 or self.step == one.total
            if is_told or agreement.save:
                losses = self._losses(output)
            if is_told:
                rate = watch.lap(self.passes.rows_until(self.step))
                tracker.step(self.step, one.total, losses, round(rate, 1))
            if agreement.save:
                self.save()
            if agreement.stop:
                self.writer.wait()
                raise Stopped(
                    f"stopped by SIGTERM after step {self.step} of {one.total}, which is saved; the same command goes "
                    "on from there."
                )
            every = config.train.evaluate_every
            if every and self.step % every == 0 and self.step < one.total and "valid" in self.prepared.indexes:
                with watch.pause():
                    tracker.evaluation(self.step, self.evaluate("valid"))

    def _losses(self, output: dict[str, Any]) -> dict[str, float]:
        losses = {name: float(value) for name, value in output["losses"].items()}
        if not all(value == value for value in losses.values()):
            raise UserError(
                f"the loss is not a number at step {self.step}: {losses}. Lower the learning rates "
                "(dense.learning_rate, tables.learning_rate)."
            )
        return losses

    def _check_lost(self, one: Pass, lost_rows: int) -> None:
        """Refuse to go on when the ranks together have left out more of an epoch than the config allows."""
        most = self.config.data.max_damaged_share * one.reader.index.rows
        if lost_rows > most:
            raise UserError(
                f"{lost_rows:,} rows could not be read, which is more than data.max_damaged_share "
                f"{self.config.data.max_damaged_share:g} of {one.reader.index.rows:,}. Run `dist-rec shards "
                f"verify {self.prepared.root('train')}`."
            )

    def evaluate(self, split: str) -> dict[str, Any]:
        """Metrics over a whole split. Collective."""
        stream = build_stream(self.prepared, split, self.process.rank, self.process.world_size)
        return evaluate(self.prepared, self.tasks, stream, self.hybrid.predict)

    def save(self) -> None:
        """Begin to write a checkpoint, unless this step has one. Collective."""
        if self.step == self.saved_step:
            return
        self.saved_step = self.step
        state = {"position": to_dict(self.passes.position(self.step)), "summary": self.summary.gather(self.passes)}
        self.writer.save(
            step=self.step,
            sharded=self.hybrid.sharded,
            engine=self.engine,
            state=state,
            config=to_dict(self.config),
            plan=self.plan,
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
    """Train a config under torchrun, or alone, from its last good checkpoint if it has one.

    Returns:
        The run folder.

    Raises:
        UserError: config or data are at fault; before any process group where that can be known.
        Stopped: a rank was told to stop; the same config goes on.
    """
    quieten()
    folder = find_earlier(config)
    prepared = prepare(config)
    device = choose_device(config)
    with process_group(config, device) as process:
        earlier = checkpoint.last_good(folder / "checkpoints") if folder else None
        if config.data.from_watermark and not earlier:
            raise UserError(
                f"data.from_watermark trains on what was appended since a checkpoint, and {config.run_folder} has "
                "none: train it without that key first."
            )
        trainer = Trainer(prepared, process, earlier)
        folder = config.run_folder
        tracker = NoTracker()
        if process.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            save_config(config, folder / "config.yaml")
            (folder / "plan.json").write_text(json.dumps(trainer.plan, indent=1))
            tracker = Tracker(folder, trainer.step)
            if earlier:
                print(_how_it_goes_on(earlier, trainer), file=sys.stderr)
        torch.distributed.barrier()  # the folder is there
        try:
            rates = trainer.train(tracker)
            trainer.save()
            split = next(s for s in ("test", "valid", "train") if s in prepared.indexes)
            result = trainer.evaluate(split)
            tracker.evaluation(trainer.step, result)
            trainer.writer.wait()
        finally:
            tracker.close()
        summary = trainer.summary.gather(trainer.passes)
        if process.is_main:
            rates |= result["rates"]
            (folder / "summary.json").write_text(json.dumps({"steps": trainer.step, **summary}, indent=1))
            write_evaluation(folder, {"split": split, "step": trainer.step, **result, "rates": rates})
    return folder


def _check_something_is_left(config: Config, passes: Passes) -> None:
    """Refuse to go on with a run that is through, unless its evaluation is missing."""
    path = config.run_folder / "evaluation.json"
    if not passes.finished or not path.exists() or json.loads(path.read_text())["step"] != passes.start_step:
        return
    if config.data.from_watermark:
        raise UserError(
            f"nothing was appended to {config.data.train} since generation {passes.opened[-1].upto}, which "
            f"{config.run_folder} has been trained on."
        )
    raise UserError(
        f"{config.run_folder} holds a finished run: choose another --run.name, remove that folder, or raise "
        "train.epochs or train.steps to go on with it."
    )


def _plan_to_keep(earlier: Saved | None, process: Process, config: Config) -> dict[str, Any] | None:
    """The checkpoint's plan where it still holds: the same ranks, the same wishes."""
    if earlier is None or earlier.manifest.environment["world size"] != process.world_size:
        return None
    asked = [change.key for change in changes(earlier.manifest.config, to_dict(config))]
    return None if any(key.startswith("tables.") for key in asked) else earlier.manifest.plan


def _how_it_goes_on(earlier: Saved, trainer: Trainer) -> str:
    manifest = earlier.manifest
    changed = changes(manifest.config, to_dict(trainer.config))
    said = differences(manifest.environment, checkpoint.environment(), changed)
    if manifest.plan != trainer.plan:
        said.append("the sharding plan")
    said += trainer.converted
    exact = "bit for bit as without the interruption" if not said else "not bit for bit, for these differ:"
    passed = [f"dist-rec: passed over: {fault}" for fault in earlier.passed_over]
    return "\n".join(
        [
            *passed,
            f"dist-rec: going on from {earlier.folder.name} {exact}",
            *(f"  - {difference}" for difference in said),
        ]
    )


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
