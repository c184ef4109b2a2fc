"""`dist-rec bench exchange`: what ranks send each other for the tables, how long steps take, and what loss results.

Trains one config in every way that ids and vectors can travel (`CASES`), all from the same start on the same batches.
The cases take turns, step by step, so that whatever else keeps the machine busy meets them alike.

Bytes are those of the tensors that TorchRec hands to collectives and that are for other ranks, summed over ranks:
`id_bytes` of ids and list lengths, `vector_bytes` of vectors and their gradients. What dense parameters exchange is
not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import fmean, median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchrec.distributed import comm_ops, dist_data

from ..config import Config
from ..errors import UserError
from ..training.hybrid import Hybrid, learning_rate_factor
from ..training.prepare import prepare
from ..training.prepared import Prepared
from ..training.process import Process, choose_device, process_group, quieten
from ..training.setup import build_engine, build_stream, build_tables, build_training_stream
from ..training.trainer import seed_step
from .clock import together

# How vectors travel, and whether a rank's equal ids travel once; the first is what the others are compared with.
CASES = [(wire, deduplicate) for wire in ("fp32", "bf16", "fp16") for deduplicate in (False, True)]
WARM_UP_STEPS = 5
# Batches whose ids the pipeline sends around ahead of a step: without them, the last steps would send less.
AHEAD = 3
# Of the steps, over which the last losses are averaged.
LAST_SHARE = 0.1
HELD_OUT_BATCHES = 10


@dataclass
class Sent:
    """Bytes that this rank has sent to others, `ids` (whole numbers) and `vectors`."""

    ids: int = 0
    vectors: int = 0

    def add(self, bytes_: int, dtype: torch.dtype) -> None:
        if dtype.is_floating_point:
            self.vectors += bytes_
        else:
            self.ids += bytes_


class _Counting:
    """`torch.distributed` as TorchRec sees it, with collectives that count what they send."""

    def __init__(self, sent: Sent) -> None:
        self.sent = sent

    def __getattr__(self, name: str) -> Any:
        found = getattr(dist, name)
        if name not in _OTHERS:
            return found

        def counted(*arguments: Any, **named: Any) -> Any:
            self.sent.add(*_OTHERS[name](*arguments, **named))
            return found(*arguments, **named)

        return counted


def _all_to_all(
    output: Tensor, input: Tensor, output_split_sizes=None, input_split_sizes=None, **_: Any
) -> tuple[int, torch.dtype]:
    rank, ranks, size = dist.get_rank(), dist.get_world_size(), input.shape[0] if input.ndim else 0
    own = input_split_sizes[rank] if input_split_sizes else size // ranks
    return input.nbytes * (size - own) // max(size, 1), input.dtype


def _scatter_whole(output: Tensor, input: Tensor, **_: Any) -> tuple[int, torch.dtype]:
    return input.nbytes - output.nbytes, input.dtype


def _scatter_list(output: Tensor, input_list: list[Tensor], **_: Any) -> tuple[int, torch.dtype]:
    return sum(part.nbytes for part in input_list) - output.nbytes, output.dtype


def _gather(output: Any, input: Tensor, **_: Any) -> tuple[int, torch.dtype]:
    return input.nbytes * (dist.get_world_size() - 1), input.dtype


# For each collective, the bytes that are for other ranks.
_OTHERS: dict[str, Callable[..., tuple[int, torch.dtype]]] = {
    "all_to_all_single": _all_to_all,
    "reduce_scatter_tensor": _scatter_whole,
    "reduce_scatter": _scatter_list,
    "all_gather_into_tensor": _gather,
    "all_gather": _gather,
}


@contextmanager
def counting() -> Iterator[Sent]:
    """Count what TorchRec sends to other ranks of the default group."""
    sent = Sent()
    with mock.patch.object(comm_ops, "dist", _Counting(sent)), mock.patch.object(dist_data, "dist", _Counting(sent)):
        yield sent


@dataclass
class _Case:
    """One way, while it trains."""

    wire: str
    deduplicate: bool
    hybrid: Hybrid
    batches: Iterator
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    held_out: float | None = None


def bench_exchange(config: Config, steps: int) -> dict[str, Any]:
    """Train `config` in every way of `CASES`. Collective.

    Args:
        steps: that are timed, after `WARM_UP_STEPS`; losses are of both.

    Returns:
        `world`, `batch_size`, `steps`, and `cases` as `compare` has them.

    Raises:
        UserError: there is one rank alone, or too little data.
    """
    quieten()
    if steps < 1:
        raise UserError("--steps must be at least 1.")
    with process_group(config, choose_device(config)) as process:
        if process.world_size < 2:
            raise UserError("one rank sends nothing: give --nproc-per-node 2 or more.")
        return {
            "world": process.world_size,
            "batch_size": config.data.batch_size,
            "steps": steps,
            "cases": compare(prepare(config), process, steps, CASES),
        }


def compare(prepared: Prepared, process: Process, steps: int, ways: list[tuple[str, bool]]) -> list[dict[str, Any]]:
    """Train a config in each of `ways` (wire, deduplicate) and compare them with the first. Collective.

    Returns:
        Of each way its `wire` and `deduplicate`; `id_bytes`, `vector_bytes` and `bytes` a step, over all ranks;
        `step_ms` (median); `loss`, of the last tenth of the steps, and `loss_difference` to the first's;
        `largest_loss_difference` of a step; `held_out_loss` and `held_out_difference`, None without data.valid.

    Raises:
        UserError: too little data.
    """
    config = prepared.config
    stream = build_training_stream(prepared, process.rank, process.world_size)
    wanted = WARM_UP_STEPS + steps
    batches = list(islice(stream.batches(0), wanted + AHEAD))
    if len(batches) < wanted + AHEAD:
        raise UserError(
            f"{config.data.train} has {len(batches)} batches of {config.data.batch_size} rows, and {steps} steps need "
            f"{wanted + AHEAD}: lower --steps or --data.batch_size."
        )
    with counting() as sent:
        cases = [_begin(prepared, process, stream.batch_rows, wanted, way, batches) for way in ways]
        for step in range(wanted):
            for case in cases:
                _train_step(case, sent, config.run.seed, step, process.rank)
    _hold_out(cases, prepared, process)
    return [_told(case, cases[0]) for case in cases]


def _begin(
    prepared: Prepared, process: Process, batch_rows: int, steps: int, way: tuple[str, bool], batches: list
) -> _Case:
    wire, deduplicate = way
    config = prepared.config
    tables_config = replace(config.tables, wire=wire, deduplicate=deduplicate)
    prepared = replace(prepared, config=replace(config, tables=tables_config))
    tables, sharded, _ = build_tables(prepared, process)
    engine = build_engine(prepared, process, batch_rows)
    hybrid = Hybrid(tables, sharded, engine, process.device, lambda s: learning_rate_factor(config.dense, s, steps))
    return _Case(wire, deduplicate, hybrid, iter(batches))


def _train_step(case: _Case, sent: Sent, seed: int, step: int, rank: int) -> None:
    seed_step(seed, step, rank)
    sent.ids = sent.vectors = 0
    began = together()
    output = case.hybrid.train_step(case.batches)
    seconds = together() - began
    loss = output["loss"].detach().clone()
    dist.all_reduce(loss)
    case.losses.append(float(loss) / dist.get_world_size())
    if step >= WARM_UP_STEPS:
        case.seconds.append(seconds)
        case.sent.append(replace(sent))


def _hold_out(cases: list[_Case], prepared: Prepared, process: Process) -> None:
    """The loss of each case on the first batches of data.valid."""
    if "valid" not in prepared.indexes:
        return
    stream = build_stream(prepared, "valid", process.rank, process.world_size)
    batches = list(stream.batches(0, 0, HELD_OUT_BATCHES))
    for case in cases:
        losses = torch.stack([output["loss"].float() for _, output in case.hybrid.predict(iter(batches))]).mean()
        dist.all_reduce(losses)
        case.held_out = float(losses) / process.world_size


def _told(case: _Case, first: _Case) -> dict[str, Any]:
    sent = torch.tensor([[one.ids, one.vectors] for one in case.sent], dtype=torch.float64).mean(0)
    dist.all_reduce(sent)
    ids, vectors = (round(value) for value in sent.tolist())
    last = max(round(len(case.losses) * LAST_SHARE), 1)
    loss, least = fmean(case.losses[-last:]), fmean(first.losses[-last:])
    held_out = case.held_out
    return {
        "wire": case.wire,
        "deduplicate": case.deduplicate,
        "id_bytes": ids,
        "vector_bytes": vectors,
        "bytes": ids + vectors,
        "step_ms": round(median(case.seconds) * 1e3, 2),
        "loss": round(loss, 6),
        "loss_difference": round(loss - least, 6),
        "largest_loss_difference": round(max(abs(a - b) for a, b in zip(case.losses, first.losses, strict=True)), 6),
        "held_out_loss": None if held_out is None else round(held_out, 6),
        "held_out_difference": None if held_out is None else round(held_out - first.held_out, 6),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """The cases as a table."""
    title = f"a step of {summary['batch_size']:,} rows on {summary['world']} ranks, over {summary['steps']}"
    table = Table("wire", "ids once", title=title, box=SIMPLE)
    for heading in ("id KiB", "vector KiB", "ms", "loss", "+-", "held out +-"):
        table.add_column(heading, justify="right")
    for case in summary["cases"]:
        held_out = case["held_out_difference"]
        table.add_row(
            case["wire"],
            "yes" if case["deduplicate"] else "no",
            f"{case['id_bytes'] / 1024:,.0f}",
            f"{case['vector_bytes'] / 1024:,.0f}",
            f"{case['step_ms']:.1f}",
            f"{case['loss']:.5f}",
            f"{case['loss_difference']:+.0e}",
            "" if held_out is None else f"{held_out:+.0e}",
        )
    Console().print(table)
