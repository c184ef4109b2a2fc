"""`dist-rec evaluate`: a trained run's checkpoint over any split, on any number of ranks.

Needs no engine: the dense model is loaded whole on every rank, the tables are sharded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import Config
from ..data.batch import Batch
from ..errors import UserError
from . import checkpoint
from .collectives import DistributedReduction
from .evaluation import evaluate, write_evaluation
from .process import choose_device, process_group, quieten
from .setup import agree_on_index, build_model, build_stream, build_tables, prepare


def evaluate_run(config: Config, run: Path, split: str) -> dict[str, Any]:
    """Evaluate the latest checkpoint of `run` and write its evaluation.json.

    Raises:
        UserError: no checkpoint, no such split, or a checkpoint that does not fit the config.
    """
    quieten()
    found = checkpoint.find(run)
    # Of the ranks that trained: these may be others.
    config = replace(config, tables=replace(config.tables, plan=None))
    prepared = prepare(config)
    if split not in prepared.indexes:
        raise UserError(f"the config names no data.{split}: it has {', '.join(prepared.indexes)}.")
    device = choose_device(config)
    with process_group(config, device) as process:
        for name in prepared.indexes:
            agree_on_index(prepared, name)
        saved = checkpoint.read_state(found)
        stream = build_stream(prepared, split, process.rank, process.world_size)
        tables, sharded, _ = build_tables(prepared, process)
        converted = checkpoint.load_tables(saved, sharded, with_optimizer=False)
        if converted and process.is_main:
            lines = "\n".join(f"  - {one}" for one in converted)
            print(f"dist-rec: not quite the tables that were trained, for these differ:\n{lines}", file=sys.stderr)
        model = build_model(prepared, DistributedReduction())
        checkpoint.load_dense(saved, model)
        model.to(device).eval()
        sharded.eval()

        def predict(batches: Iterator[Batch]) -> Iterator[tuple[Batch, dict[str, Any]]]:
            for batch in batches:
                batch = batch.to(device, non_blocking=True)
                with torch.no_grad():
                    yield batch, model(tables.vectors(sharded(batch), batch), batch)

        tasks = {task: spec.label for task, spec in model.tasks.items()}
        result = evaluate(prepared, tasks, stream, predict, sharded)
        entry = {"split": split, "step": saved.step, **({"converted": converted} if converted else {}), **result}
        if process.is_main:
            write_evaluation(run, entry)
    return entry
