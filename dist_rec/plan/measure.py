"""One rank of `dist-rec plan --verify`: builds the tables by each plan, steps them, and says what they took.

    torchrun --standalone --nproc-per-node 2 -m dist_rec.plan.measure FOLDER

FOLDER holds config.yaml and plans.json; rank 0 leaves measured.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.types import ShardedTensor

from ..config import Config, load_config
from ..data.stream import Stream
from ..embeddings.sharding import local_parts, table_weights
from ..errors import UserError
from ..training.hybrid import Hybrid
from ..training.prepare import prepare
from ..training.prepared import Prepared
from ..training.process import Process, choose_device, process_group, quieten
from ..training.setup import build_engine, build_tables, build_training_stream

WARM_UP = 2
# Before what a rank that fails says on stderr, a line without its traceback.
FAULT = "dist-rec measure: "
LONGEST_FAULT = 2000


def measure(config: Config, plans: dict[str, Any], steps: int, rounds: int) -> dict[str, Any] | None:
    """Build and step every plan. Collective.

    Returns:
        `plans`: by name, `tables_ms`, the median over steps of the slowest rank's lookup, exchange and backward, and
        `bytes` of weights and optimizer state by rank; `step_ms`, likewise of whole steps under the first plan. None
        but on rank 0.
    """
    prepared = prepare(config)
    with process_group(config, choose_device(config)) as process:
        stream = build_training_stream(prepared, process.rank, process.world_size)
        batches = [stream.batch(0, step).to(process.device) for step in range(min(steps, stream.steps))]
        built = {name: build_tables(prepared, process, plan)[:2] for name, plan in plans.items()}
        times: dict[str, list[float]] = {name: [] for name in plans}
        for turn in range(rounds):
            # There and back, so that what slows the machine down for a while falls on all.
            for name in list(plans)[:: 1 if turn % 2 == 0 else -1]:
                tables, sharded = built[name]
                for number in range(-WARM_UP, len(batches)):
                    seconds = _step(tables, sharded, batches[max(number, 0)], process.device)
                    if number >= 0:
                        times[name].append(seconds)
        found = {
            name: {
                "tables_ms": 1e3 * median(_slowest(times[name], process.device)),
                "bytes": _bytes_of_ranks(built[name][1]),
            }
            for name in plans
        }
        first = built[next(iter(plans))]
        step_ms = 1e3 * _whole_steps(prepared, process, stream, *first, len(batches))
        return {"plans": found, "step_ms": step_ms} if process.is_main else None


def _step(tables, sharded, batch, device: torch.device) -> float:
    dist.barrier()
    started = time.perf_counter()
    vectors = tables.vectors(sharded(batch), batch)
    total = sum(v.sum() for v in vectors.values())
    if total.requires_grad:  # unless all tables are frozen
        total.backward()
    sharded.replicated.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _slowest(seconds: list[float], device: torch.device) -> list[float]:
    """Of every step, the slowest rank's time."""
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.tolist()


def _bytes_of_ranks(sharded) -> list[int]:
    """Weights and optimizer states of every rank: what tensors there are, not what should be."""
    own = sum(_local_bytes(weight) for weight in table_weights(sharded).values())
    states = list(sharded.fused_optimizer.state_dict()["state"].values())
    states += [sharded.replicated.state(name) for name in sharded.replicated.parameters]
    own += sum(_local_bytes(tensor) for state in states for tensor in state.values())
    taken: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(taken, own)
    return taken


def _local_bytes(tensor: ShardedTensor | Tensor) -> int:
    return sum(part.numel() * part.element_size() for _, _, part in local_parts(tensor))


def _whole_steps(prepared: Prepared, process: Process, stream: Stream, tables, sharded, steps: int) -> float:
    """Median seconds of training steps, reading included."""
    engine = build_engine(prepared, process, stream.batch_rows)
    hybrid = Hybrid(tables, sharded, engine, process.device, lambda step: 1.0)
    batches, seconds = stream.batches(0), []
    for number in range(min(WARM_UP + steps, stream.steps)):
        dist.barrier()
        started = time.perf_counter()
        hybrid.train_step(batches)
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - started)
    return median(_slowest(seconds or [0.0], process.device))


def main() -> None:
    quieten()
    folder = Path(sys.argv[1])
    asked = json.loads((folder / "plans.json").read_text())
    try:
        result = measure(load_config(folder / "config.yaml"), asked["plans"], asked["steps"], asked["rounds"])
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        words = kind + " ".join(str(error).split())
        print(f"{FAULT}{words[:LONGEST_FAULT]}", file=sys.stderr, flush=True)
        # Other ranks may wait in a collective, and so may threads of this one: torchrun ends them all.
        os._exit(1)
    if result is not None:
        (folder / "measured.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
