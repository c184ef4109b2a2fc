"""`dist-rec bench crash`: a job that is struck again and again must end as if nothing had happened.

Trains an invented data set twice: once in peace, once under strokes of `KINDS`, each followed by
what an operator (or torchrun itself) would do. Then compares: every step's rows in the final
history, and every bit of the last checkpoint, optimizer states included.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from ..data.index import read_index
from ..launch import STOPPED
from ..training import checkpoint
from ..training.row_record import history
from .tiny import invent

KINDS = {
    "rank": "SIGKILL of one rank; the agent starts all again",
    "all": "SIGKILL of all ranks and the agent",
    "saving": "SIGKILL of one rank while a checkpoint is being written",
    "publishing": "SIGKILL of rank 0 when another rank's part of a checkpoint is written",
    "sigterm": "SIGTERM to the agent: the ranks save and end",
    "disk full": "writes of checkpoints fail for a while (RLIMIT_FSIZE)",
    "shard gone": "a shard vanishes, and is back when the job has given up",
}
SAVE_EVERY = 5
STEPS_PER_STROKE = 12
BATCH_ROWS = 60
# Of the largest file that ranks under "disk full" can write: more than the row record, less than a table.
FULL_BYTES = 1 << 20
PATIENCE_SECONDS = 240.0
# With the width of write_config, every rank's file of tables is more than FULL_BYTES.
USERS = 60_000


class Failure(Exception):
    """The job did not do what it must; the message says what was seen."""


def write_config(folder: Path, data: str, epochs: int, seed: int) -> Path:
    """A config with everything that could make a resumed run differ: dropout, shuffling, schedules, momenta."""
    config = {
        "run": {"root": str(folder / "runs"), "seed": seed},
        "data": {"train": data, "batch_size": BATCH_ROWS, "streams": 12, "shuffle_window": 240},
        "tables": {"dim": 64, "sharding": "row_wise", "overrides": {"item_id": {"dim": 8, "sharding": "auto"}}},
        "model": {"width": 16, "dropout": 0.2, "history": {"feedforward": 16}, "regulariser": {"kind": "js"}},
        "dense": {"schedule": "cosine", "warmup_steps": 2 * SAVE_EVERY},
        "train": {"epochs": epochs, "log_every": 1, "record_rows": True},
        "checkpoint": {"every_steps": SAVE_EVERY, "every_minutes": 0.0},
    }
    path = folder / "crash.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Job:
    """A training job as its operator sees it: an agent, its ranks, a run folder, and what it says."""

    def __init__(self, config: Path, name: str, ranks: int, restarts: int) -> None:
        self.run = Path(yaml.safe_load(config.read_text())["run"]["root"]) / name
        self.log = config.parent / f"{name}.log"
        command = [sys.executable, "-m", "dist_rec", "train", str(config), "--run.name", name]
        self.command = [*command, "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
        self.starts = 0

    def start(self) -> None:
        self.starts += 1
        with self.log.open("a") as log:
            self.agent = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            )

    def ranks(self) -> dict[int, psutil.Process]:
        """The living ranks by number."""
        found = {}
        with suppress(psutil.Error):
            for child in psutil.Process(self.agent.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if "RANK" in (environment := child.environ()) and child.status() != psutil.STATUS_ZOMBIE:
                        found[int(environment["RANK"])] = child
        return found

    def step(self) -> int:
        """Steps done, as metrics.jsonl says."""
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return 0
        for line in reversed(lines):
            with suppress(ValueError):
                if "losses" in (entry := json.loads(line)):
                    return entry["step"]
        return 0

    def wait_for(self, what: str, reached) -> bool:
        """Wait until `reached()`; False if the job ended before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not reached():
            if self.agent.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise Failure(f"{what}: not within {PATIENCE_SECONDS:.0f} s. The end of {self.log}:\n{self.tail()}")
            time.sleep(0.002)
        return True

    def wait_end(self) -> int:
        try:
            return self.agent.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failure(f"the job does not end. The end of {self.log}:\n{self.tail()}") from None

    def tail(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-30:])

    def partial(self, pattern: str = "") -> bool:
        """Whether a checkpoint is being written, and has files like `pattern`."""
        return any((self.run / "checkpoints").glob(f".step-*.partial-*{pattern}"))

    def kill(self) -> None:
        """Nothing of the job is left."""
        victims = [*self.ranks().values()]
        with suppress(ProcessLookupError):
            self.agent.kill()
        for victim in victims:
            with suppress(psutil.Error):
                victim.kill()
        self.agent.wait()


def strike(job: Job, kind: str, draw: random.Random, data: Path) -> bool:
    """One stroke of `kind` and its repair; False if the job had ended before it fell."""
    before = job.step()
    ahead = draw.randint(1, 2 * SAVE_EVERY)
    if not job.wait_for(f"{ahead} steps after step {before}", lambda: job.step() >= before + ahead and job.ranks()):
        return False
    if kind in ("rank", "saving", "publishing"):
        if kind == "saving" and not job.wait_for("a save", job.partial):
            return False
        if kind == "publishing" and not job.wait_for("a part of a save", lambda: job.partial("/rank-*.json")):
            return False
        ranks = job.ranks()
        if not ranks:
            return False
        victim = ranks.get(0, next(iter(ranks.values()))) if kind == "publishing" else draw.choice([*ranks.values()])
        with suppress(psutil.Error):
            victim.kill()
        return job.wait_for("the ranks' new start", lambda: (now := job.ranks()) and victim.pid not in pids(now))
    if kind == "all":
        job.kill()
    elif kind == "sigterm":
        job.agent.terminate()
        if (code := job.wait_end()) != STOPPED:
            raise Failure(f"after SIGTERM the job ended with {code}, not {STOPPED}:\n{job.tail()}")
    elif kind == "disk full":
        return fill_disk(job)
    elif kind == "shard gone":
        shard = draw.choice(read_index(str(data)).shards).file
        away = data / f".{shard}.away"
        (data / shard).rename(away)
        try:
            if job.wait_end() not in (0, 2):
                raise Failure(f"without a shard the job did not end in words:\n{job.tail()}")
        finally:
            away.rename(data / shard)
    if job.agent.poll() == 0:
        return False
    job.start()
    return True


def pids(ranks: dict[int, psutil.Process]) -> set[int]:
    return {rank.pid for rank in ranks.values()}


def fill_disk(job: Job) -> bool:
    """Let writes of large files fail until the job has said so, then let them pass again."""
    said = job.log.read_text().count("was not written")
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    ranks = job.ranks()
    for limits in ((FULL_BYTES, resource.RLIM_INFINITY), unlimited):
        for rank in ranks.values():
            with suppress(psutil.Error):
                rank.rlimit(psutil.RLIMIT_FSIZE, limits)
        if limits is not unlimited and not job.wait_for(
            "the report of a failed write", lambda: job.log.read_text().count("was not written") > said
        ):
            return False
    return True


def crash(strokes: int, *, seed: int = 0, ranks: int = 2, kinds: list[str] | None = None) -> dict[str, Any]:
    """Strike a job `strokes` times and compare it with one in peace.

    Args:
        strokes: how many; all kinds come in turn, in random order.
        seed: of data, training, and moments of the strokes.
        ranks: of the job.
        kinds: of `KINDS`; all if None.

    Returns:
        `kills` that fell, by `kinds`; `starts` of the job; whether it `completed`, whether
        `rows_seen_exactly_once` holds of every epoch, and whether the end is `bitwise_equal`.

    Raises:
        Failure: the job hung, or ended in a way it must not.
    """
    draw, kinds = random.Random(seed), kinds or list(KINDS)
    rows = 20 * BATCH_ROWS
    epochs = -(-(strokes * STEPS_PER_STROKE + 2 * SAVE_EVERY) // (rows // BATCH_ROWS))
    plan: list[str] = []
    while len(plan) < strokes:
        plan += draw.sample(kinds, len(kinds))
    fallen = dict.fromkeys(kinds, 0)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dist-rec-crash-") as name:
        folder = Path(name)
        data = invent(folder, rows, seed, USERS)
        config = write_config(folder, data, epochs, seed)
        peace, struck = (Job(config, name, ranks, restarts=strokes) for name in ("peace", "struck"))
        try:
            peace.start()
            if peace.wait_end() != 0:
                raise Failure(f"the job in peace failed:\n{peace.tail()}")
            struck.start()
            for kind in plan[:strokes]:
                if not strike(struck, kind, draw, Path(data)):
                    break
                fallen[kind] += 1
            code = struck.wait_end()
            if code not in (0, 2):
                raise Failure(f"the struck job ended with {code}:\n{struck.tail()}")
        finally:
            for job in (peace, struck):
                if job.starts:
                    job.kill()
        return {
            "kills": sum(fallen.values()),
            "kinds": fallen,
            "starts": struck.starts,
            "steps": peace.step(),
            "completed": code == 0 and (struck.run / "evaluation.json").exists(),
            "rows_seen_exactly_once": seen_once(struck.run, rows, epochs)
            and history(struck.run / "rows").keys() == history(peace.run / "rows").keys(),
            "bitwise_equal": equal_checkpoints(peace.run, struck.run),
            "seconds": round(time.monotonic() - started, 1),
        }


def seen_once(run: Path, rows: int, epochs: int) -> bool:
    """Whether every epoch of the final history has every row exactly once."""
    seen: dict[int, list[int]] = {}
    for epoch, numbers in history(run / "rows").values():
        seen.setdefault(epoch, []).extend(numbers)
    return sorted(seen) == list(range(epochs)) and all(sorted(n) == list(range(rows)) for n in seen.values())


def equal_checkpoints(*runs: Path) -> bool:
    """Whether the last checkpoints hold the same bits: layout, tables, dense parameters, optimizer states."""
    held = []
    for run in runs:
        saved = checkpoint.read_manifest(checkpoint.find(run))
        if checkpoint.verify(saved):
            return False
        manifest = saved.manifest
        held.append((manifest.step, manifest.dense_steps, manifest.tables, manifest.dense, manifest.files))
    return all(one == held[0] for one in held)
