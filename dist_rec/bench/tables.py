"""`dist-rec bench tables`: how large tables may become, and what that costs.

For each number of rows, a job of its own fills one table of so many rows, trains it, saves it, spoils it,
and loads it again (`tables_case`). This process watches from outside: the memory of a job is the sum of the
proportional set sizes (PSS) of all its processes, in which a page that several of them share counts once.

Every row looks up `VISITS` ids of the table, drawn in two ways: all alike (`uniform`: almost every lookup goes to
memory that no cache holds, the worst case), and by Zipf's law (`zipf`: a few ids are most of the lookups, as in logs).
The data are the same for every number of rows: 63-bit ids, which the table's `hash: N` sends to its rows.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..data.build import build
from ..errors import UserError
from ..schema import RAW_IDS, Schema
from ..strict import from_dict

DEFAULT_ROWS = (1_000_000, 10_000_000, 100_000_000, 200_000_000)
DIM = 16
# Row-wise Adagrad has one fp32 number a row beside the fp32 weights.
ROW_BYTES = 4 * DIM + 4
VISITS = 16
RANK_ROWS = 2048
WARM_UP_STEPS = 5
DRAWS = ("uniform", "zipf")
ZIPF_IDS = 1e9
PHASES = ("init", "train", "save", "load")
# Ranks, their agent and their libraries, without any table; measured, then rounded up.
RANK_BYTES, AGENT_BYTES = 1 << 30, 1 << 29
GIBIBYTE = 1 << 30
# Reading the PSS of a process walks its pages and holds it up, so it is done for at most this share of the time.
WATCHED_SHARE = 0.1
PATIENCE_SECONDS = 3600.0
SHOWN_LINES = 30

SCHEMA = {
    "name": "visits",
    "domains": {"names": list(DRAWS)},
    "features": {
        "visits": {"role": "user", "kind": "ids", "max_length": VISITS, "vocabulary": {"kind": "raw"}},
        "item": {"role": "item", "kind": "id", "vocabulary": {"kind": "integer", "size": 1000}},
    },
    "labels": {"click": {}},
}


def bench_tables(rows: list[int], steps: int, ranks: int, folder: Path | None) -> dict[str, Any]:
    """Measure a table of every size of `rows`.

    Args:
        rows: sizes.
        steps: of each kind of draw, after `WARM_UP_STEPS` that do not count.
        ranks: of every job.
        folder: where temporary files go: the data, and one checkpoint at a time.

    Returns:
        What `dist-rec bench tables --json` prints: `cases`, of each its `rows`, `gib` of weights and optimizer state,
        `rows_per_s` of training (uniform ids) and `rows_per_s_zipf` (global batch over the median step, data ready),
        `step_ms`, `init_s`, `save_s`, `verify_s`, `load_s`, whether what was loaded is what was saved to the bit, and
        `peak_gib` of the job's memory, of each phase and as a whole.

    Raises:
        UserError: a number makes no sense, memory or disk are too small, or a job failed.
    """
    if min(rows, default=0) < ranks or steps < 1 or ranks < 1:
        raise UserError("--rows must be at least --nproc-per-node, and that and --steps at least 1.")
    _check_room(max(rows), ranks, folder)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="dist-rec-tables-", dir=folder) as temporary:
        work = Path(temporary)
        _invent(work, (WARM_UP_STEPS + steps) * RANK_ROWS * ranks)
        cases = []
        for size in rows:
            cases.append(_measure(work, size, steps, ranks))
            console.print(_sentence(cases[-1]), highlight=False, soft_wrap=True)
            shutil.rmtree(work / "case")
    return {
        "dim": DIM,
        "lookups_per_row": VISITS,
        "batch_size": RANK_ROWS * ranks,
        "ranks": ranks,
        "steps": steps,
        "cases": cases,
    }


def _check_room(rows: int, ranks: int, folder: Path | None) -> None:
    needed, free = rows * ROW_BYTES, psutil.virtual_memory().available
    disk = shutil.disk_usage(folder or tempfile.gettempdir()).free
    if needed + ranks * RANK_BYTES + AGENT_BYTES > free:
        raise UserError(
            f"a table of {rows:,} rows and {ranks} rank(s) need "
            f"{(needed + ranks * RANK_BYTES + AGENT_BYTES) / GIBIBYTE:.1f} GiB of memory, and {free / GIBIBYTE:.1f} "
            "are free: leave it out with --rows, or end what else is running."
        )
    if needed > disk:
        raise UserError(
            f"the checkpoint of a table of {rows:,} rows takes {needed / GIBIBYTE:.1f} GiB, and "
            f"{disk / GIBIBYTE:.1f} are free on the disk: name another place with --folder."
        )


def _invent(work: Path, rows: int) -> None:
    """`rows` rows a domain, at work/data."""
    draw = np.random.default_rng(0)
    # A number of ids to the power of an even share: every tenfold of them is drawn as often, which is Zipf's law of
    # exponent 1.
    ids = {
        "uniform": draw.integers(0, RAW_IDS, (rows, VISITS)),
        "zipf": np.power(ZIPF_IDS, draw.random((rows, VISITS))).astype(np.int64),
    }
    visits = np.concatenate([ids[name] for name in DRAWS]).reshape(-1)
    both = rows * len(DRAWS)
    table = pa.table(
        {
            "domain": np.repeat(list(DRAWS), rows),
            "visits": pa.ListArray.from_arrays(np.arange(both + 1, dtype=np.int32) * VISITS, visits),
            "item": draw.integers(0, 1000, both),
            "click": draw.integers(0, 2, both).astype(np.float32),
        }
    )
    pq.write_table(table, work / "raw.parquet")
    build(from_dict(Schema, SCHEMA, "visits"), [str(work / "raw.parquet")], str(work / "data"), workers=1)


def case_config(work: Path, rows: int, ranks: int) -> dict[str, Any]:
    """The config of one size, as `dist-rec train` would take it."""
    return {
        "run": {"root": str(work / "case" / "runs")},
        "data": {"train": str(work / "data"), "batch_size": RANK_ROWS * ranks, "streams": ranks},
        "tables": {"dim": DIM, "overrides": {"visits": {"hash": rows, "sharding": "row_wise"}}},
        "model": {
            "width": 16,
            "history": {"kind": "none"},
            "adaptation": {"enabled": False},
            "body": {"kind": "shared_bottom", "experts": 1, "expert_hidden": [16], "tower_hidden": []},
        },
        # Whatever the machine has: a copy of the tables is what this is about to do without.
        "checkpoint": {"write": "chunks"},
    }


def _measure(work: Path, rows: int, steps: int, ranks: int) -> dict[str, Any]:
    case = work / "case"
    case.mkdir()
    (case / "config.yaml").write_text(yaml.safe_dump(case_config(work, rows, ranks)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "dist_rec.bench.tables_case", str(case), str(steps)]
    log = case / "log"
    with log.open("w") as out:
        threads = os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // ranks, 1)))
        job = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": threads})
    watch = Watch(job.pid)
    watch.start()
    try:
        code = job.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"the case of {rows:,} rows was not done after {PATIENCE_SECONDS / 60:.0f} minutes.") from None
    finally:
        watch.stop()
        _end(job)
    if code:
        # First the rank's fault, then torchrun's account of it.
        said = "\n".join(log.read_text().splitlines()[:SHOWN_LINES])
        raise UserError(f"the case of {rows:,} rows failed with exit code {code}. It began to say:\n{said}")
    told = json.loads((case / "result.json").read_text())
    ends = told.pop("ends")
    peaks = dict(zip(PHASES, watch.peaks([ends[phase] for phase in PHASES]), strict=True))
    return {
        "rows": rows,
        "gib": round(rows * ROW_BYTES / GIBIBYTE, 3),
        **told,
        "peak_gib": {name: round(peak / GIBIBYTE, 2) for name, peak in (*peaks.items(), ("all", watch.peak))},
    }


def _end(job: subprocess.Popen) -> None:
    """Leave nothing of a job."""
    for process in family(job.pid):
        with suppress(psutil.Error):
            process.kill()
    job.wait()


def family(pid: int) -> Iterator[psutil.Process]:
    """A process and all that descend from it; nothing where it has gone."""
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        yield from (parent, *parent.children(recursive=True))


def resident(pid: int) -> int:
    """Bytes of memory that a process and its descendants take together: the sum of their PSS.

    A process that keeps its page tables to itself counts with its RSS, which is no smaller.
    """
    total = 0
    for process in family(pid):
        with suppress(psutil.NoSuchProcess):
            try:
                total += process.memory_full_info().pss
            except psutil.AccessDenied:
                total += process.memory_info().rss
    return total


class Watch(threading.Thread):
    """Looks at the memory of a job again and again, until `stop`."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.seen: list[tuple[float, int]] = []
        self._ended = threading.Event()

    def run(self) -> None:
        while True:
            began = time.monotonic()
            self.seen.append((time.time(), resident(self.pid)))
            if self._ended.wait(max((time.monotonic() - began) / WATCHED_SHARE, 0.1)):
                return

    def stop(self) -> None:
        self._ended.set()
        self.join()

    @property
    def peak(self) -> int:
        return max(bytes_ for _, bytes_ in self.seen)

    def peaks(self, ends: list[tuple[float, int]]) -> list[int]:
        """Bytes of the largest look in each phase, whose own end (when, bytes held) counts as one."""
        starts = [0.0, *(at for at, _ in ends[:-1])]
        return [
            max([held, *(b for at, b in self.seen if start < at <= end)])
            for start, (end, held) in zip(starts, ends, strict=True)
        ]


def _sentence(case: dict[str, Any]) -> str:
    return (
        f"{case['rows']:>13,} rows, {case['gib']:6.2f} GiB: {case['rows_per_s']:>9,} rows/s, init {case['init_s']} s, "
        f"save {case['save_s']} s, verify {case['verify_s']} s, load {case['load_s']} s, "
        f"peak {case['peak_gib']['all']} GiB"
    )


def print_summary(summary: dict[str, Any]) -> None:
    """The cases as a table."""
    title = f"batches of {summary['batch_size']:,} rows on {summary['ranks']} rank(s), dim {DIM}; GiB and seconds"
    table = Table(title=title, box=SIMPLE)
    for heading in ("rows", "GiB", "peak", "rows/s", "Zipf", "init", "save", "verify", "load"):
        table.add_column(heading, justify="right")
    for case in summary["cases"]:
        numbers = [f"{case['rows'] / 1e6:g} M", str(case["gib"]), str(case["peak_gib"]["all"])]
        numbers += [f"{case[key]:,}" for key in ("rows_per_s", "rows_per_s_zipf")]
        table.add_row(*numbers, *(str(case[key]) for key in ("init_s", "save_s", "verify_s", "load_s")))
    Console().print(table)
    if wrong := [f"{case['rows']:,}" for case in summary["cases"] if not case["bitwise_equal"]]:
        Console().print(f"What was loaded is not what was saved: {', '.join(wrong)} rows.")
