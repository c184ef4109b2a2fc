"""The loop: build, train, save. One `Trainer` a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..data.index import Index
from ..data.stream import Stream
from ..embeddings.description import describe_plan
from ..embeddings.ids import IdCounts
from ..embeddings.managed import id_counts
from ..errors import Stopped, UserError
from ..strict import to_dict
from . import checkpoint
from .agreement import Agreement
from .checkpoint import Saved
from .early_stopping import EarlyStopping, value_of
from .evaluation import evaluate, read_evaluation
from .hybrid import Hybrid, learning_rate_factor
from .passes import Pass, Passes
from .prepared import Prepared
from .process import Process
from .resume import State, plan_to_keep, state_of
from .row_ranks import keep_ranks
from .row_record import NoRecord, RowRecord
from .setup import agree_on_index, build_engine, build_stream, build_tables, build_training_stream
from .summary import Account
from .tracking import NoTracker, Stopwatch


class Trainer:
    """Everything one rank needs to train, evaluate and save a run.

    Args:
        prepared: the checked config.
        process: this rank.
        earlier: the checkpoint to go on from, None for a new run.
        start: the foundation's checkpoint that a new run starts from, None for a start at random.

    Raises:
        UserError: the checkpoint is of another model or data set, or there is nothing left to do.
    """

    def __init__(
        self, prepared: Prepared, process: Process, earlier: Saved | None = None, start: Saved | None = None
    ) -> None:
        self.prepared, self.process = prepared, process
        config = self.config = prepared.config
        state = state_of(earlier)
        self.looked = False
        self.passes = Passes(config, self._newest, self._open_stream, state.position)
        self.step = self.passes.start_step
        self.saved = (self.step, state.early_stopping)
        self.converted = []
        self.stopping = EarlyStopping(config.train.early_stopping, state.early_stopping)
        self._check_best_is_there()
        self._check_something_is_left()
        if self.stopping.has_counted(self.step) and not self._evaluation_is_due():
            self.converted.append(f"early stopping has counted an evaluation after step {self.step}, where none is due")
        batch_rows = self.passes.stream.batch_rows
        tables, sharded, plan = build_tables(prepared, process, plan_to_keep(earlier, process, config))
        self.plan = describe_plan(plan)
        self.engine = build_engine(prepared, process, batch_rows, start)
        self.hybrid = Hybrid(
            tables,
            sharded,
            self.engine,
            process.device,
            self._learning_rate_factor,
            self.step,
            config.dense.matmul_precision,
        )
        if earlier:
            self.converted += checkpoint.load_tables(earlier, sharded)
            checkpoint.load_dense_into_engine(earlier, self.engine)
        elif start:
            read = start.manifest.tables.keys() - prepared.unread
            self.converted += checkpoint.load_tables(start, sharded, with_optimizer=False, only=read)
        self._check_metric()
        self.account = Account(process, state.summary, self._count_ids)
        self.told_ids: dict[str, IdCounts] = {}
        self.lost_block_rows = 0
        self.writer = checkpoint.Writer(config.run_folder / "checkpoints", config.checkpoint)

    def _check_something_is_left(self) -> None:
        """Refuse to go on with a run that is through, unless its evaluation is missing."""
        config, passes = self.config, self.passes
        held = read_evaluation(config.run_folder)
        is_counted = not self.stopping.enabled or self.stopping.has_counted(self.step)
        is_through = passes.finished and is_counted or self.stopping.done
        if not is_through or held is None or held["step"] != self.evaluated_step:
            return
        if self.stopping.done:
            raise UserError(
                f"{config.run_folder} holds a finished run, which stopped early at step {self.step}: "
                f"{self.stopping.said()}. Raise train.early_stopping.patience to go on with it, or choose another "
                "--run.name."
            )
        if 0 < config.train.steps <= passes.start_step:
            raise UserError(
                f"{config.run_folder} holds a finished run: its train.steps {config.train.steps} are done. Raise them, "
                "set 0 for no limit, or choose another --run.name."
            )
        if config.data.from_watermark:
            raise UserError(
                f"too little to train on was appended to {config.data.train} since generation "
                f"{passes.opened[-1].upto}, which {config.run_folder} has been trained on."
            )
        raise UserError(
            f"{config.run_folder} holds a finished run: choose another --run.name, remove that folder, or raise "
            "train.epochs to go on with it."
        )

    def _check_best_is_there(self) -> None:
        """Forget the best evaluation where its checkpoint is gone. Collective."""
        best = self.stopping.best
        if best is None or best == self.step:
            return
        fault = [None]
        if self.process.is_main:
            try:
                checkpoint.read_manifest(self._checkpoint(best))
            except UserError as error:
                fault = [str(error)]
        torch.distributed.broadcast_object_list(fault)
        if fault[0] is not None:
            self.stopping.forget_best()
            self.converted.append(f"the best checkpoint so far, that of step {best}, is gone: {fault[0]}")

    def _check_metric(self) -> None:
        """Refuse a metric that evaluations will lack. Collective."""
        if self.stopping.enabled:
            nothing = self.prepared.kind.evaluator(self.prepared.schema, self.config)
            value_of(nothing.compute()["overall"], self.config.train.early_stopping.metric)

    def _checkpoint(self, step: int) -> Path:
        return self.config.run_folder / "checkpoints" / checkpoint.name_of(step)

    @property
    def evaluated_step(self) -> int:
        """Steps of the model that the run ends with: the best where it may stop early, else the newest."""
        return self.step if self.stopping.best is None else self.stopping.best

    def _newest(self) -> Index:
        """The training data as it is now; equal on all ranks. Collective."""
        if self.looked:
            agree_on_index(self.prepared, "train", look_again=True)
        self.looked = True
        return self.prepared.indexes["train"]

    def _open_stream(self, index: Index, every_row: bool) -> Stream:
        if index.generation > 0:
            self.prepared.reopen_store()  # which may have learnt what was appended
        return build_training_stream(self.prepared, self.process.rank, self.process.world_size, index, every_row)

    def _learning_rate_factor(self, step: int) -> float:
        return learning_rate_factor(self.config.dense, step, self.passes.at(step).total)

    def train(self, tracker: NoTracker, save: bool = True) -> dict[str, float]:
        """Train to the end, save if asked, and go back to the best checkpoint, where the run may stop early.

        Returns:
            Seconds and rows per second of training alone.

        Raises:
            Stopped: a rank was told to stop; what was done is saved.
            UserError: a loss is not a number, data cannot be had, the last checkpoint not written, or the best not
                read.
        """
        config = self.config
        agreement = Agreement(config.checkpoint, self.process.timeout)
        record = RowRecord(config.run_folder / "rows") if config.train.record_rows else NoRecord()
        watch = Stopwatch()
        try:
            self._train(tracker, agreement, record, watch)
            seconds = watch.seconds
            if save:
                self.save()
            self.writer.wait()
            # What a rank was told since the last step began.
            agreement.begin(0)
            agreement.end(self.step)
            if agreement.stop:
                raise self._stopped()
        finally:
            agreement.close()
            record.close()
        agreement.leave()
        self._take_best()
        rows = self.passes.rows_until(self.step)
        return {"train_seconds": round(seconds, 2), "train_rows_per_s": round(rows / seconds, 1)}

    def _train(self, tracker: NoTracker, agreement: Agreement, record: RowRecord | NoRecord, watch: Stopwatch) -> None:
        config, batches = self.config, self.passes.batches()
        one = self.passes.at(self.step)
        begun = one if one.first < self.step else None  # an earlier start has told of it
        if self._evaluate_what_is_due(tracker, watch, again=True):
            self.save()
        while not (self.passes.finished or self.stopping.done):
            agreement.begin(self.account.rows_of_lost_blocks(self.passes))
            seed_step(config.run.seed, self.step, self.process.rank)
            output = self.hybrid.train_step(batches)
            agreement.end(self.step + 1)
            if output is None:
                return
            one = self.passes.at(self.step)
            self.step += 1
            if one is not begun:
                begun = one
                self.account.begin(one)
                tracker.data(self.step, one.epoch, one.order.summary())
            rows = output["batch"].row[output["batch"].valid]
            record.step(self.step, one.epoch, rows + one.first_row)
            self.account.count(one, self.step, len(rows))
            self._check_lost(one, agreement.lost_rows)
            is_told = self.step % config.train.log_every == 0 or self.step == one.total
            if is_told or agreement.save or self._evaluation_is_due():
                losses = self._losses(output)
            if is_told:
                rate = watch.lap(self.passes.rows_until(self.step))
                tracker.step(self.step, one.total, losses, round(rate, 1), self._news_of_ids())
            if agreement.stop:
                self.save()
                self.writer.wait()
                raise self._stopped()
            is_best = self._evaluate_what_is_due(tracker, watch)
            if agreement.save or is_best:
                self.save()
        if self.stopping.done and self.step < one.total:
            tracker.say(f"stopped early after step {self.step} of {one.total}: {self.stopping.said()}")

    def _stopped(self) -> Stopped:
        total = self.passes.at(max(self.step - 1, 0)).total
        return Stopped(
            f"stopped by SIGTERM after step {self.step} of {total}, which is saved; the same command goes on from "
            "there."
        )

    def _count_ids(self) -> dict[str, IdCounts]:
        return id_counts(self.hybrid.sharded, self.process.device)

    def _news_of_ids(self) -> dict[str, dict[str, float]]:
        """What happened to managed ids since this was last asked, by table. Collective."""
        before, self.told_ids = self.told_ids, self._count_ids()
        return {table: now.since(before.get(table, IdCounts())).shares() for table, now in self.told_ids.items()}

    def _losses(self, output: dict[str, Any]) -> dict[str, float]:
        losses = {name: float(value) for name, value in output["losses"].items()}
        if not all(value == value for value in losses.values()):
            raise UserError(
                f"the loss is not a number at step {self.step}: {losses}. Lower the learning rates "
                "(dense.learning_rate, tables.learning_rate)."
            )
        return losses

    def _evaluation_is_due(self) -> bool:
        """Whether this step asks for an evaluation of data.valid."""
        every, one = self.config.train.evaluate_every, self.passes.at(self.step - 1)
        if not every or self.step == 0 or "valid" not in self.prepared.indexes:
            return False
        if self.step >= one.total:
            return self.stopping.enabled  # else the run's own last evaluation follows
        return self.step == one.end if every == "epoch" else self.step % every == 0

    def _evaluate_what_is_due(self, tracker: NoTracker, watch: Stopwatch, again: bool = False) -> bool:
        """Evaluate data.valid if this step asks for it; `again`, if an earlier start has not. Collective.

        Returns:
            Whether it is the best so far of a run that may stop early.
        """
        if not self._evaluation_is_due():
            return False
        is_told = [False]
        if again:
            is_told = [tracker.has_evaluation(self.step)]
            torch.distributed.broadcast_object_list(is_told)
        # What is told has not been counted where the run died before it was saved.
        if self.stopping.has_counted(self.step) if self.stopping.enabled else is_told[0]:
            return False
        self._check_best_is_written()
        with watch.pause():
            result = self.evaluate("valid")
            is_best = self.stopping.count(self.step, result["overall"])
        if not is_told[0]:
            tracker.evaluation(self.step, "valid", result, self.stopping.news())
            if self.stopping.enabled:
                tracker.say(f"valid at step {self.step}: {self.stopping.said()}")
        return is_best

    def _check_best_is_written(self) -> None:
        """Take a best back whose checkpoint could not be written. Collective."""
        self.writer.settle()
        if self.writer.fault is not None and self.saved == (self.stopping.best, self.stopping.standing):
            self.stopping.take_back()

    def _take_best(self) -> None:
        """Load the best checkpoint, unless it is what is there. Collective.

        Raises:
            UserError: it is damaged.
        """
        if self.evaluated_step == self.step:
            return
        saved = checkpoint.read_state(self._checkpoint(self.evaluated_step))
        self.converted += checkpoint.load_tables(saved, self.hybrid.sharded, with_optimizer=False)
        checkpoint.load_dense_into_engine(saved, self.engine, with_optimizer=False)

    def _check_lost(self, one: Pass, lost_rows: int) -> None:
        """Refuse to go on when more of the data is lost than the config allows. Collective.

        Args:
            lost_rows: sum over ranks, which may have met the same block.
        """
        data, rows = self.config.data, one.first_row + one.reader.index.rows
        if lost_rows == self.lost_block_rows:
            return
        self.lost_block_rows = lost_rows
        lost = self.account.gather(self.passes).lost.rows_of_blocks
        if lost > data.max_damaged_share * rows:
            raise UserError(
                f"blocks of {lost:,} rows could not be read, which is more than data.max_damaged_share "
                f"{data.max_damaged_share:g} of {rows:,}. Run `dist-rec shards verify {data.train}`."
            )

    def evaluate(self, split: str, keep: bool = False) -> dict[str, Any]:
        """Metrics over a whole split. Collective.

        Args:
            keep: write every row's place into the run folder, where rows have places.
        """
        stream = build_stream(self.prepared, split, self.process.rank, self.process.world_size)
        evaluator = self.prepared.kind.evaluator(self.prepared.schema, self.config)
        found = evaluate(self.prepared, evaluator, stream, self.hybrid.predict, self.hybrid.sharded)
        if keep:
            keep_ranks(evaluator, self.prepared, split, self.evaluated_step, self.config.run_folder)
        return found

    def close(self) -> None:
        """Let go of what the engine holds beside its memory, where the process goes on to another run."""
        self.engine.destroy()

    def save(self) -> None:
        """Begin to write a checkpoint, unless this step has one that says the same. Collective."""
        self._check_best_is_written()
        if (self.step, self.stopping.standing) == self.saved:
            return
        self.saved = (self.step, self.stopping.standing)
        store = self.prepared.store
        state = State(
            position=self.passes.position(self.step),
            summary=self.account.gather(self.passes),
            vectors=store.info.recipe if store else None,
            early_stopping=self.stopping.standing,
        )
        self.writer.save(
            step=self.step,
            sharded=self.hybrid.sharded,
            engine=self.engine,
            state=to_dict(state),
            config=to_dict(self.config),
            plan=self.plan,
            best=self.stopping.best,
        )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Key dropout by (seed, step, rank)."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**63)
