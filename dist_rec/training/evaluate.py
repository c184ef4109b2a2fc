"""`dist-rec evaluate`: a trained run's checkpoint over any split, on any number of ranks.

Needs no engine: the dense model is loaded whole on every rank, the tables are sharded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import Config, load_config
from ..data.batch import Batch
from ..data.extend import renumbered
from ..data.index import CATALOGUE
from ..embeddings.tables import EmbeddingTables
from ..errors import UserError
from ..strict import to_dict
from . import checkpoint
from .baselines import Baselines
from .collectives import DistributedReduction
from .evaluation import evaluate, write_evaluation
from .hybrid import matmul_precision
from .kinds import kind_of
from .paired import compare, pair
from .prepare import prepare
from .prepared import Prepared
from .process import Process, choose_device, process_group, quieten
from .resume import changes, check_vectors
from .row_ranks import keep_ranks, read_ranks
from .setup import agree_on_index, build_model, build_stream, build_tables
from .start.origin import read_schema


@dataclass
class Trained:
    """A run's last good checkpoint on this rank, ready to predict.

    `step` is the checkpoint's; `converted` says what of the tables is not quite as it was trained.
    """

    prepared: Prepared
    process: Process
    tables: EmbeddingTables
    sharded: nn.Module
    model: nn.Module
    step: int
    converted: list[str]

    def predict(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Each batch, moved to this rank's device, with the model's output. Collective."""
        for batch in batches:
            batch = batch.to(self.process.device, non_blocking=True)
            with torch.no_grad(), matmul_precision("highest"):
                output = self.model(self.tables.vectors(self.sharded(batch), batch), batch)
            yield batch, output


@contextmanager
def trained(config: Config, run: Path, split: str) -> Iterator[Trained]:
    """Join the ranks and load the latest checkpoint of `run`, to be read with `split`. Collective.

    Raises:
        UserError: no checkpoint, no such split, or a checkpoint that does not fit the config.
    """
    quieten()
    found = checkpoint.find(run)
    # Of the ranks that trained: these may be others.
    config = replace(config, tables=replace(config.tables, plan=None))
    prepared = prepare(config, run=run)
    splits = [name for name in prepared.indexes if name != CATALOGUE]
    if split not in splits:
        raise UserError(f"the config names no data.{split}: it has {', '.join(splits)}.")
    device = choose_device(config)
    with process_group(config, device) as process:
        for name in prepared.indexes:
            agree_on_index(prepared, name)
        saved = checkpoint.read_state(found)
        check_vectors(saved, prepared.store)
        _check_vocabularies(run, prepared)
        tables, sharded, _ = build_tables(prepared, process)
        converted = checkpoint.load_tables(saved, sharded, with_optimizer=False)
        if converted and process.is_main:
            lines = "\n".join(f"  - {one}" for one in converted)
            print(f"dist-rec: not quite the tables that were trained, for these differ:\n{lines}", file=sys.stderr)
        model = build_model(prepared, DistributedReduction())
        checkpoint.load_dense(saved, model)
        model.to(device).eval()
        sharded.eval()
        yield Trained(prepared, process, tables, sharded, model, saved.step, converted)


def _check_vocabularies(run: Path, prepared: Prepared) -> None:
    """Refuse data whose ids name other values than those that the run's tables were trained for.

    Raises:
        UserError: they do, as digests tell, which older data sets and runs lack.
    """
    schema, data = read_schema(run), prepared.config.data.train
    tables = {spec.vocabulary for spec in prepared.specs if spec.name not in prepared.unread}
    for table in sorted(tables & schema.features.keys() if schema else ()):
        if renumbered(prepared.schema.features[table].vocabulary, schema.features[table].vocabulary):
            raise UserError(
                f"{run} was trained on other ids of {table}: {data} has been built anew since then, of other rows or "
                "in another order. Restore the data set that it was trained on, or train again."
            )


def evaluate_run(
    config: Config, run: Path, split: str, baselines: bool = False, against: Path | None = None
) -> dict[str, Any]:
    """Evaluate the latest checkpoint of `run` and write its evaluation.json, and every row's place where rows have one.

    Args:
        baselines: score the rows with a query by BM25 and by the cosine of frozen vectors too.
        against: another run, whose places of the same rows were kept: the result of rank 0 has `against`, the paired
            bootstrap of the two (`paired.compare`), which is not written.

    Raises:
        UserError: as `trained`; nothing can be measured of the model; baselines of data without a text of the query
            and of the item; `against` keeps no places, or those of other rows; this run's rows have none.
    """
    if why := kind_of(config).not_evaluated(config):
        raise UserError(f"{run} cannot be evaluated: {why}. Name one of the same vocabularies: --data.catalogue.")
    other = read_ranks(against, split) if against else None
    with trained(config, run, split) as loaded:
        prepared, process = loaded.prepared, loaded.process
        stream = build_stream(prepared, split, process.rank, process.world_size)
        tasks = prepared.kind.heads(prepared.schema, config)
        others = Baselines(prepared, tasks, split, process) if baselines else None
        predict = others.watch(loaded.predict) if others else loaded.predict
        entry: dict[str, Any] = {"split": split, "step": loaded.step}
        asked = changes(to_dict(load_config(run / "config.yaml")), to_dict(config))
        if asked:
            entry["overrides"] = {change.key: change.now for change in asked}
        if loaded.converted:
            entry["converted"] = loaded.converted
        evaluator = prepared.kind.evaluator(prepared.schema, config)
        if other and not evaluator.ranks_rows:
            raise UserError(
                f"{run} cannot be compared row by row: its model says how probable labels are and ranks no catalogue. "
                "Compare metrics over several seeds (dist-rec bench experiment)."
            )
        entry |= evaluate(prepared, evaluator, stream, predict, loaded.sharded)
        keep_ranks(evaluator, prepared, split, loaded.step, run, asked)
        if others:
            entry["baselines"] = others.compute()
        if process.is_main:
            write_evaluation(run, entry)
    if other and process.is_main:
        compared = compare(pair(read_ranks(run, split), other), evaluator.at)
        entry["against"] = {"run": str(against), "step": other[1].step, **compared}
    return entry
