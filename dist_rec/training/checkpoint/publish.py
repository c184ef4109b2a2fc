"""Rank 0's part of saving: waits until every rank has written, then makes a checkpoint of it. Runs in a thread.

Talks to the other ranks through files alone, for a collective in a thread would meet those of the training.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import sync, write_text
from .folder import LATEST, checkpoints, latest, name_of, remove
from .manifest import FOLDERS, FORMAT, STATE_NAME, FileInfo, Manifest, TensorInfo, manifest_text

POLL_SECONDS = 0.1
# A rank that writes this much longer than rank 0 waits for something that will not come.
PATIENCE_SECONDS = 3600.0
FAULT = "fault"


def result_path(partial: Path, rank: int) -> Path:
    """Where a rank says what it has written, or why it could not."""
    return partial / f"rank-{rank:05d}.json"


def say_not_written(folder: Path, step: int, fault: str) -> None:
    """Tell the user at once; training goes on."""
    good = latest(folder)
    last = f"the last good one is step {int(good.name.partition('-')[2])}" if good else "there is none yet"
    print(
        f"dist-rec: the checkpoint of step {step} was not written: {fault}; training goes on; {last}.",
        file=sys.stderr,
        flush=True,
    )


class Publisher(threading.Thread):
    """Publishes one checkpoint.

    Args:
        folder: of all checkpoints.
        partial: hidden folder in which the ranks write.
        about: step, state, config, plan, environment, clock and best, as in the manifest.
        ranks: how many write.
        keep: how many of the newest checkpoints stay.
    """

    def __init__(self, folder: Path, partial: Path, about: dict[str, Any], ranks: int, keep: int) -> None:
        super().__init__(daemon=True)
        self.folder, self.partial, self.about = folder, partial, about
        self.ranks, self.keep = ranks, keep
        self.fault: str | None = None
        self._told = threading.Event()
        self._results: list[dict[str, Any]] | None = None

    @property
    def final(self) -> Path:
        return self.folder / name_of(self.about["step"])

    @property
    def token(self) -> str:
        return self.partial.name.rpartition("-")[2]

    def tell(self, results: list[dict[str, Any]]) -> None:
        """All ranks' results, from a collective of the training thread: no need to wait for files any more."""
        self._results = results
        self._told.set()

    def run(self) -> None:
        try:
            results = self._collect()
            if self.fault is None:
                self._publish(results)
                self._retain()
        except (OSError, UserError) as error:
            self._fail(f"rank 0: {error}")
        except Exception as error:
            traceback.print_exception(error)
            self._fail(f"rank 0: {error!r}")
        if self.fault is not None:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _fail(self, fault: str) -> None:
        if self.fault is None:
            self.fault = fault
            say_not_written(self.folder, self.about["step"], fault)

    def _collect(self) -> list[dict[str, Any]]:
        """Every rank's result; the first fault among them is said as soon as it is seen."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        results: dict[int, dict[str, Any]] = {}
        while len(results) < self.ranks:
            told = self._told.wait(POLL_SECONDS)
            for rank in range(self.ranks):
                if rank in results:
                    continue
                if told:
                    results[rank] = self._results[rank]
                elif (path := result_path(self.partial, rank)).is_file():
                    results[rank] = json.loads(path.read_bytes())
                if FAULT in results.get(rank, {}):
                    self._fail(results[rank][FAULT])
            if not self.partial.is_dir():
                raise UserError(f"{self.partial} has vanished")
            if time.monotonic() > deadline:
                missing = sorted(set(range(self.ranks)) - results.keys())
                raise UserError(f"ranks {missing} were not done within {PATIENCE_SECONDS / 60:.0f} minutes")
        return [results[rank] for rank in range(self.ranks)]

    def _merge(self, results: list[dict[str, Any]]) -> Manifest:
        tensors: dict[str, dict[str, TensorInfo]] = {group: {} for group in FOLDERS}
        files, steps = {}, set()
        for result in results:
            files |= {name: FileInfo(**info) for name, info in result["files"].items()}
            steps.add(result["dense_steps"])
            for group, found in tensors.items():
                for name, data in result[group].items():
                    part = TensorInfo(**data)
                    whole = found.setdefault(name, part)
                    if whole is not part:
                        if (whole.shape, whole.kinds) != (part.shape, part.kinds):
                            raise RuntimeError(f"ranks differ in {name}: {whole.kinds} and {part.kinds}")
                        whole.pieces += part.pieces
        if len(steps) > 1:
            raise RuntimeError(f"ranks differ in the dense optimizer's steps: {steps}")
        manifest = Manifest(format=FORMAT, **self.about, **tensors, dense_steps=steps.pop(), files=files)
        if faults := manifest.faults():
            raise RuntimeError(f"the ranks' pieces do not make a whole: {faults}")
        return manifest

    def _publish(self, results: list[dict[str, Any]]) -> None:
        manifest = self._merge(results)
        for name, info in manifest.files.items():
            path = self.partial / name
            if not path.is_file() or path.stat().st_size != info.bytes:
                raise UserError(f"{path} is not there: run.root must lie on a file system that all hosts share")
        write_text(self.partial / STATE_NAME, manifest_text(manifest))
        for rank in range(self.ranks):
            result_path(self.partial, rank).unlink(missing_ok=True)
        for folder in (*{(self.partial / name).parent for name in manifest.files}, self.partial):
            sync(folder)
        if self.final.exists():
            remove(self.final, self.token)
        self.partial.rename(self.final)
        write_text(self.folder / LATEST, self.final.name + "\n")
        sync(self.folder)

    def _retain(self) -> None:
        """Keep the newest and the best; what is newer still was left by a run that went on from an earlier step."""
        found, best = checkpoints(self.folder), self.about["best"]
        newest = found.index(self.final)
        old = [path for path in found[newest + self.keep :] if best is None or path.name != name_of(best)]
        for path in found[:newest] + old:
            try:
                remove(path, self.token)
            except OSError as error:
                print(f"dist-rec: the old checkpoint {path} could not be removed: {error}", file=sys.stderr, flush=True)
