"""The loop: build, train, save. One `Trainer` a rank."""

from __future__ import annotations

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
        self.step = self.saved_step = self.passes.start_step
        self._check_something_is_left()
        batch_rows = self.passes.stream.batch_rows
        tables, sharded, plan = build_tables(prepared, process, plan_to_keep(earlier, process, config))
        self.plan = describe_plan(plan)
        self.engine = build_engine(prepared, process, batch_rows, start)
        self.hybrid = Hybrid(tables, sharded, self.engine, process.device, self._learning_rate_factor, self.step)
        self.converted = []
        if earlier:
            self.converted = checkpoint.load_tables(earlier, sharded)
            checkpoint.load_dense_into_engine(earlier, self.engine)
        elif start:
            self.converted = checkpoint.load_tables(start, sharded, with_optimizer=False, only=start.manifest.tables)
        self.account = Account(process, state.summary, self._count_ids)
        self.told_ids: dict[str, IdCounts] = {}
        self.lost_block_rows = 0
        self.writer = checkpoint.Writer(config.run_folder / "checkpoints", config.checkpoint)

    def _check_something_is_left(self) -> None:
        """Refuse to go on with a run that is through, unless its evaluation is missing."""
        config, passes = self.config, self.passes
        held = read_evaluation(config.run_folder)
        if not passes.finished or held is None or held["step"] != passes.start_step:
            return
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
        """Train to the end and save, if asked; returns seconds and rows per second of training alone.

        Raises:
            Stopped: a rank was told to stop; what was done is saved.
            UserError: a loss is not a number, data cannot be had, or the last checkpoint not written.
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
        finally:
            agreement.close()
            record.close()
        agreement.leave()
        rows = self.passes.rows_until(self.step)
        return {"train_seconds": round(seconds, 2), "train_rows_per_s": round(rows / seconds, 1)}

    def _train(self, tracker: NoTracker, agreement: Agreement, record: RowRecord | NoRecord, watch: Stopwatch) -> None:
        config, batches = self.config, self.passes.batches()
        one = self.passes.at(self.step)
        begun = one if one.first < self.step else None  # an earlier start has told of it
        self._evaluate_what_is_due(tracker, one, watch, again=True)
        while not self.passes.finished:
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
            if is_told or agreement.save:
                losses = self._losses(output)
            if is_told:
                rate = watch.lap(self.passes.rows_until(self.step))
                tracker.step(self.step, one.total, losses, round(rate, 1), self._news_of_ids())
            if agreement.save:
                self.save()
            if agreement.stop:
                self.writer.wait()
                raise Stopped(
                    f"stopped by SIGTERM after step {self.step} of {one.total}, which is saved; the same command goes "
                    "on from there."
                )
            self._evaluate_what_is_due(tracker, one, watch)

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

    def _evaluate_what_is_due(self, tracker: NoTracker, one: Pass, watch: Stopwatch, again: bool = False) -> None:
        """Evaluate data.valid if this step asks for it; `again`, if an earlier start has not. Collective."""
        every = self.config.train.evaluate_every
        if not every or self.step % every or not 0 < self.step < one.total or "valid" not in self.prepared.indexes:
            return
        if again:
            done = [tracker.has_evaluation(self.step)]
            torch.distributed.broadcast_object_list(done)
            if done[0]:
                return
        with watch.pause():
            tracker.evaluation(self.step, self.evaluate("valid"))

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
            keep_ranks(evaluator, self.prepared, split, self.step, self.config.run_folder)
        return found

    def close(self) -> None:
        """Let go of what the engine holds beside its memory, where the process goes on to another run."""
        self.engine.destroy()

    def save(self) -> None:
        """Begin to write a checkpoint, unless this step has one. Collective."""
        if self.step == self.saved_step:
            return
        self.saved_step = self.step
        store = self.prepared.store
        state = State(
            position=self.passes.position(self.step),
            summary=self.account.gather(self.passes),
            vectors=store.info.recipe if store else None,
        )
        self.writer.save(
            step=self.step,
            sharded=self.hybrid.sharded,
            engine=self.engine,
            state=to_dict(state),
            config=to_dict(self.config),
            plan=self.plan,
        )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Key dropout by (seed, step, rank)."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**63)
