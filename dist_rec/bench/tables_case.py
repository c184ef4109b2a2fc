"""One rank of one case of `dist-rec bench tables`: fill, train, save, spoil, load.

    torchrun --standalone --nproc-per-node 2 -m dist_rec.bench.tables_case CASE STEPS

CASE holds config.yaml; rank 0 leaves result.json there. Built of the parts that training is built of.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from isal.isal_zlib import crc32

from ..config import Config, load_config
from ..embeddings.description import describe_plan
from ..errors import UserError
from ..strict import to_dict
from ..training import checkpoint
from ..training.checkpoint.tables import local_shards
from ..training.hybrid import Hybrid
from ..training.prepare import prepare
from ..training.prepared import Prepared
from ..training.process import Process, choose_device, process_group, quieten
from ..training.setup import build_engine, build_tables, build_training_stream
from .clock import together
from .tables import DRAWS, WARM_UP_STEPS, resident


def main() -> None:
    quieten()
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    config = load_config(folder / "config.yaml")
    with process_group(config, choose_device(config)) as process:
        result = run_case(config, process, steps)
        if process.is_main:
            (folder / "result.json").write_text(json.dumps(result))


def run_case(config: Config, process: Process, steps: int) -> dict[str, Any]:
    """Measure one case. Collective; `ends` has the end of each phase: seconds since 1970, and the bytes held."""
    prepared = {draw: prepare(replace(config, data=replace(config.data, domains=[draw]))) for draw in DRAWS}
    ends: dict[str, tuple[float, int]] = {}
    result: dict[str, Any] = {"ends": ends}
    first = prepared[DRAWS[0]]
    batch_rows = config.data.batch_size // process.world_size
    began = together()
    tables, sharded, plan = build_tables(first, process)
    result["init_s"] = round(together() - began, 2)
    engine = build_engine(first, process, batch_rows)
    hybrid = Hybrid(tables, sharded, engine, process.device, lambda step: 1.0)
    ends["init"] = _held(process)

    for draw in DRAWS:
        seconds = _step_seconds(hybrid, prepared[draw], process, steps)
        name = "" if draw == DRAWS[0] else f"_{draw}"
        result[f"rows_per_s{name}"] = round(config.data.batch_size / seconds)
        result[f"step_ms{name}"] = round(seconds * 1e3, 2)
    ends["train"] = _held(process)

    writer = checkpoint.Writer(config.run_folder / "checkpoints", config.checkpoint)
    held = _checksums(sharded)
    began = together()
    step = len(DRAWS) * (WARM_UP_STEPS + steps)
    writer.save(step, sharded, engine, state={}, config=to_dict(config), plan=describe_plan(plan))
    writer.wait()
    result["save_s"] = round(together() - began, 2)
    ends["save"] = _held(process)

    for shard in local_shards(sharded):
        for tensor in shard.tensors.values():
            tensor.zero_()
    began = together()
    saved = checkpoint.last_good(config.run_folder / "checkpoints")
    result["verify_s"] = round(together() - began, 2)
    began = together()
    checkpoint.load_tables(saved, sharded)
    checkpoint.load_dense_into_engine(saved, engine)
    result["load_s"] = round(together() - began, 2)
    differ = torch.tensor(int(_checksums(sharded) != held))
    dist.all_reduce(differ)
    result["bitwise_equal"] = not differ
    ends["load"] = _held(process)
    return result


def _held(process: Process) -> tuple[float, int]:
    """The time and the bytes of the job, all ranks being at the same place; only the main rank looks."""
    together()
    held = resident(os.getppid()) if process.is_main else 0
    return time.time(), held


def _step_seconds(hybrid: Hybrid, prepared: Prepared, process: Process, steps: int) -> float:
    """Median time of a step whose batch lies ready."""
    stream = build_training_stream(prepared, process.rank, process.world_size)
    batches = list(stream.batches(0, 0, WARM_UP_STEPS + steps))
    if len(batches) < WARM_UP_STEPS + steps:
        raise UserError(f"the data have {len(batches)} batches, not {WARM_UP_STEPS + steps}.")
    ready, times = iter(batches), []
    for _ in batches:
        began = together()
        hybrid.train_step(ready)
        times.append(together() - began)
    return median(times[WARM_UP_STEPS:])


def _checksums(sharded) -> list[tuple[str, str, int]]:
    """Of everything that this rank holds of the tables, where it lies."""
    return [
        (f"{shard.table} {shard.box}", kind, crc32(tensor.reshape(-1).view(torch.uint8).numpy()))
        for shard in local_shards(sharded)
        for kind, tensor in sorted(shard.tensors.items())
    ]


if __name__ == "__main__":
    main()
