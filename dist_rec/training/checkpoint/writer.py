"""Saves checkpoints while training goes on: copies to host memory, then writes in the background.

Collectives happen on the calling thread alone. A write that fails is said and given up; the checkpoints that are there
stay as they are, and the next save starts afresh.
"""

from __future__ import annotations

import json
import shutil
import socket
import threading
import traceback
import uuid
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel

from ...config import CheckpointConfig
from ...errors import UserError
from ...files import write_text
from ...strict import to_dict
from .contents import contents_of
from .folder import name_of, sweep
from .manifest import DENSE, TABLES, environment
from .publish import FAULT, Publisher, result_path, say_not_written
from .tensor_file import Entry, write_tensors

# Of the memory that is free, what a copy may take; the rest is for what training itself still needs.
COPY_SHARE = 0.7
CGROUP = Path("/sys/fs/cgroup")


class Writer:
    """Writes a run's checkpoints. Made, and its methods called, by all ranks together.

    Args:
        folder: of all checkpoints, on a file system that all hosts share.
        config: how to write, and how many to keep.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.saved: Path | None = None
        self.fault: str | None = None
        self._job: _Job | None = None
        self._publisher: Publisher | None = None
        # torch keeps pinned memory for the next copy, to which it is as good as free.
        self._pinned = 0
        if self.rank == 0:
            sweep(folder)

    def save(
        self,
        step: int,
        sharded: DistributedModelParallel,
        engine,
        *,
        state: dict[str, Any],
        config: dict[str, Any],
        plan: dict[str, Any],
        best: int | None = None,
    ) -> None:
        """Save tables, dense parameters and optimizer states as they are now. Collective.

        Returns as soon as they are copied or, in chunks, written by this rank. If the previous save
        is still under way, waits for it first. A fault is said on stderr and kept for `wait`.

        Args:
            step: optimizer steps done.
            state: JSON that resuming needs, such as the position in the data; rank 0's is written.
            config: the resolved config.
            plan: what `describe_plan` gave.
            best: step of the checkpoint that stands for the run from now on, this one or an earlier one, and stays;
                None where it is the newest.
        """
        self.settle()
        contents = contents_of(sharded, engine)
        partial, background = self._agree(step, contents.bytes)
        if partial is None:
            return
        files = contents.entries(self.config.chunk_bytes, copied=background)
        if background:
            self._pinned = contents.pinned_bytes
        if self.rank == 0:
            about = {"step": step, "state": state, "config": config, "plan": plan, "environment": environment()}
            about |= {"clock": contents.clock, "best": best}
            self._publisher = Publisher(self.folder, partial, about, self.ranks, self.config.keep)
            self._publisher.start()
        self._job = _Job(self.folder, partial, step, contents.described(), files)
        if background:
            self._job.start()
        else:
            self._job.run()

    def wait(self) -> Path | None:
        """Wait for the last save. Collective.

        Returns:
            The last checkpoint; None if none was asked for.

        Raises:
            UserError: it could not be written.
        """
        self.settle()
        if self.fault is not None:
            last = f"the last good one is {self.saved}" if self.saved else "there is none"
            raise UserError(f"the last checkpoint was not written: {self.fault}; {last}.")
        return self.saved

    def settle(self) -> None:
        """Wait until the previous save is published or given up, and learn which (`saved`, `fault`). Collective."""
        if self._job is None:
            return
        if self._job.is_alive():
            self._job.join()
        results = [None] * self.ranks if self.rank == 0 else None
        dist.gather_object(self._job.result, results)
        outcome: list[tuple[Path | None, str | None]] = [(None, None)]
        if self.rank == 0:
            self._publisher.tell(results)
            self._publisher.join()
            outcome = [(self._publisher.final, self._publisher.fault)]
        dist.broadcast_object_list(outcome)
        final, self.fault = outcome[0]
        if self.fault is None:
            self.saved = final
        self._job = self._publisher = None

    def _agree(self, step: int, size: int) -> tuple[Path | None, bool]:
        """The hidden folder to write into, None if it cannot be made; and whether to write in the background."""
        name, fault = f".{name_of(step)}.partial-{uuid.uuid4().hex}", None
        if self.rank == 0:
            try:
                for group in (TABLES, DENSE):
                    (self.folder / name / group).mkdir(parents=True)
            except OSError as error:
                fault = f"rank 0: {error}"
                say_not_written(self.folder, step, fault)
                shutil.rmtree(self.folder / name, ignore_errors=True)
        free = available_memory() + self._pinned
        everyone: list = [None] * self.ranks
        dist.all_gather_object(everyone, (socket.gethostname(), size, free, name, fault))
        _, _, _, name, self.fault = everyone[0]
        if self.fault is not None:
            return None, False
        needed: dict[str, int] = {}
        for host, bytes_, *_ in everyone:
            needed[host] = needed.get(host, 0) + bytes_
        fits = all(needed[host] <= COPY_SHARE * least for host, _, least, *_ in everyone)
        return self.folder / name, self.config.write == "background" or (self.config.write == "auto" and fits)


class _Job(threading.Thread):
    """One rank's files of one checkpoint: as a thread (`start`), or at once (`run`).

    `result` is what rank 0 needs to know, or why it failed; it also lies in the hidden folder.
    """

    def __init__(
        self, folder: Path, partial: Path, step: int, described: dict[str, Any], files: dict[str, list[Entry]]
    ) -> None:
        super().__init__(daemon=True)
        self.folder, self.partial, self.step = folder, partial, step
        self.described, self.files = described, files
        self.rank = dist.get_rank()
        self.result: dict[str, Any] = {}

    def run(self) -> None:
        try:
            files = {name: to_dict(write_tensors(self.partial / name, es)) for name, es in self.files.items()}
            self.result = {**self.described, "files": files}
            write_text(result_path(self.partial, self.rank), json.dumps(self.result))
        except OSError as error:
            hint = ""
            if isinstance(error, FileNotFoundError):
                hint = " (run.root must lie on a file system that all hosts share, and its folders stay)"
            self._fail(f"rank {self.rank}: {error}{hint}")
        except Exception as error:
            traceback.print_exception(error)
            self._fail(f"rank {self.rank}: {error!r}")
        finally:
            self.files = {}

    def _fail(self, fault: str) -> None:
        self.result = {FAULT: fault}
        try:
            # What is there of the files takes the space that the word of the fault may need.
            for name in self.files:
                (self.partial / name).unlink(missing_ok=True)
            write_text(result_path(self.partial, self.rank), json.dumps(self.result))
        except OSError:
            # Rank 0 cannot read it, and would only learn it at the next save.
            if self.rank > 0:
                say_not_written(self.folder, self.step, fault)


def available_memory() -> int:
    """Bytes of host memory that are free for all processes of this host, or of this container."""
    free = psutil.virtual_memory().available
    try:
        limit, used = ((CGROUP / f"memory.{what}").read_text().strip() for what in ("max", "current"))
        counters = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    # What files have cached is given back on demand.
    return free if limit == "max" else min(free, int(limit) - int(used) + int(counters["inactive_file"]))
