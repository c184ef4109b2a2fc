"""Small files that are there whole or not at all, and a folder that one job has to itself. Knows no formats."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path
from typing import IO

from .errors import UserError

# A job that was told to stop may still be saving.
LOCK_SECONDS = 60.0


def sync(path: Path) -> None:
    """Put on disk what a file holds, or which names a folder holds."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_bytes(path: Path, data: bytes) -> None:
    """Put a file into place whole, down to the disk."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(data)
    sync(beside)
    beside.replace(path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def lock(folder: Path) -> IO[bytes]:
    """Have `folder` to oneself, by a lock file beside it, until that is closed or the process ends.

    Raises:
        UserError: another process has it, and keeps it.
    """
    file = folder.with_name(f".{folder.name}.lock").open("ab")
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{folder} is being written by another job, for {LOCK_SECONDS:.0f} s at least: stop that one, or "
                    "choose another --run.name."
                ) from None
        except OSError as error:
            print(f"dist-rec: {file.name} cannot be locked ({error}): see to it that one job runs.", file=sys.stderr)
            return file
        time.sleep(0.2)
