"""`dist-rec bench checkpoint`: how long saving stops training, and how fast checkpoints are written and read."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from ..config import Config
from ..strict import from_dict, to_dict
from ..training import checkpoint
from ..training.prepare import prepare
from ..training.process import choose_device, process_group, quieten
from ..training.trainer import Trainer
from .tiny import invent

WIDTH = 64
STEPS = 7
MEBIBYTE = 1 << 20


def bench_checkpoint(users: int, repeats: int, folder: Path | None = None) -> dict[str, Any]:
    """Save and load a small model with one large row-wise table (row-wise Adagrad). Collective.

    Args:
        users: rows of the large table, 64 floats and a momentum each.
        repeats: saves of each kind; medians are returned.
        folder: where temporary files go.

    Returns:
        `mebibytes` of a checkpoint; for `background` and `chunks`: `stopped_ms` of training,
        `written_s` until it is published, `mebibytes_per_s`, and `step_ms` before and meanwhile;
        `verify_mebibytes_per_s` and `load_mebibytes_per_s`.
    """
    quieten()
    tree = {
        "data": {"train": "", "batch_size": 64, "shuffle_window": 256},
        "tables": {"dim": WIDTH, "sharding": "row_wise", "overrides": {"item_id": {"dim": 8, "sharding": "auto"}}},
        "model": {"width": 16},
    }
    config = from_dict(Config, tree, "bench")
    with process_group(config, choose_device(config)) as process:
        place: list[Any] = [None]
        if process.is_main:
            place = [tempfile.mkdtemp(prefix="dist-rec-checkpoint-", dir=folder)]
            invent(Path(place[0]), 2 * STEPS * config.data.batch_size, 0, users)
        dist.broadcast_object_list(place)
        work = Path(place[0])
        try:
            return _measure(config, process, work, repeats)
        finally:
            dist.barrier()
            if process.is_main:
                shutil.rmtree(work)


def _measure(config: Config, process, work: Path, repeats: int) -> dict[str, Any]:
    config.data.train, config.run.root = str(work / "data"), str(work / "runs")
    trainer = Trainer(prepare(config), process)
    batches = trainer.passes.stream.batches
    result: dict[str, Any] = {}

    def step_ms() -> float:
        stream = batches(0, 0, STEPS)
        return median(_seconds(lambda: trainer.hybrid.train_step(stream)) for _ in range(STEPS)) * 1e3

    step_ms()
    for write in ("background", "chunks"):
        folder = work / write
        writer = checkpoint.Writer(folder, replace(config.checkpoint, write=write))
        turns = []
        for step in range(1, repeats + 1):
            before = step_ms()
            dist.barrier()
            started = time.perf_counter()
            writer.save(
                step, trainer.hybrid.sharded, trainer.engine, state={}, config=to_dict(config), plan=trainer.plan
            )
            stopped = time.perf_counter() - started
            meanwhile = step_ms()
            writer.wait()
            turns.append((stopped * 1e3, time.perf_counter() - started, before, meanwhile))
        stopped_ms, written_s, before, meanwhile = (median(column) for column in zip(*turns, strict=True))
        size = sum(info.bytes for info in checkpoint.read_manifest(checkpoint.find(folder)).manifest.files.values())
        result["mebibytes"] = round(size / MEBIBYTE, 1)
        result[write] = {
            "stopped_ms": round(stopped_ms, 1),
            "written_s": round(written_s, 2),
            "mebibytes_per_s": round(size / MEBIBYTE / written_s, 1),
            "step_ms": round(before, 1),
            "step_ms_meanwhile": round(meanwhile, 1),
        }
    verify_s = median(_seconds(lambda: checkpoint.last_good(folder)) for _ in range(repeats))
    saved = checkpoint.last_good(folder)

    def load() -> None:
        checkpoint.load_tables(saved, trainer.hybrid.sharded)
        checkpoint.load_dense_into_engine(saved, trainer.engine)

    load_s = median(_seconds(load) for _ in range(repeats))
    result["verify_mebibytes_per_s"] = round(result["mebibytes"] / verify_s, 1)
    result["load_mebibytes_per_s"] = round(result["mebibytes"] / load_s, 1)
    return result


def _seconds(work: Callable[[], Any]) -> float:
    """How long the slowest rank takes."""
    dist.barrier()
    started = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - started
