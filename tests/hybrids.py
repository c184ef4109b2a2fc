"""The parts of a training run as the workers of the tests put them together, and how they do their jobs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from dist_rec.config import Config
from dist_rec.embeddings.description import describe_plan
from dist_rec.training.hybrid import Hybrid
from dist_rec.training.process import Process, choose_device, process_group, quieten
from dist_rec.training.setup import build_engine, build_tables, build_training_stream

MOST_SHOWN = 8


def make_hybrid(prepared, process, planned=None):
    """A fresh hybrid with its stream and plan; with the described plan, if given."""
    stream = build_training_stream(prepared, process.rank, process.world_size)
    tables, sharded, plan = build_tables(prepared, process, planned)
    engine = build_engine(prepared, process, stream.batch_rows)
    return stream, Hybrid(tables, sharded, engine, process.device, lambda step: 1.0), describe_plan(plan)


def end(failed: bool = False) -> NoReturn:
    """End a rank as `dist_rec.cli.main` does: Python's own clean-up can crash over the engines' threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if failed else 0)


def do_jobs(jobs: list[str], first: Config, do: Callable[[str, Process], list[str]]) -> None:
    """One rank's jobs, one after another, and their verdicts as `conftest.check_verdicts` reads them. Ends the process.

    Args:
        jobs: words of the command line.
        first: a config by which the ranks meet.
        do: does one job; returns what is wrong, as this rank sees it.
    """
    quieten()
    failed = False
    with process_group(first, choose_device(first)) as process:
        for job in jobs:
            found = do(job, process)
            everyone = [None] * process.world_size
            dist.all_gather_object(everyone, found)
            found = sorted({fault for some in everyone for fault in some})
            failed |= bool(found)
            if process.is_main:
                said = "FAIL" if found else "ok"
                print(said, job, f"{process.world_size} ranks", *found[:MOST_SHOWN], flush=True)
    end(failed)
