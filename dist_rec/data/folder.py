"""The folder that a data set is written to: it is there whole, or as it was. Knows nothing of what is written."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from .index import INDEX_NAME, SPLITS


def check_target(out: str, overwrite: bool) -> Path:
    """The local folder `out`, if it may be written.

    Raises:
        UserError: it is a URL, a file, or not empty and not to be overwritten.
    """
    if "://" in out:
        raise UserError(f"{out}: data sets are built in a local folder; build it here, then copy it.")
    target = Path(out).absolute()
    if target.exists() and not target.is_dir():
        raise UserError(f"{out} is a file: name a folder.")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise UserError(f"{out} is not empty: name another folder, or pass overwrite to replace it.")
        if not any((target / name / INDEX_NAME).is_file() for name in (".", *SPLITS)):
            raise UserError(f"{out} is not empty and holds no data set, so it is not overwritten: name another folder.")
    return target


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into, which takes its place at the end; after a failure nothing is left."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield partial
        _publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, target: Path) -> None:
    """Rename the finished folder into place; the old one is only removed once the new one stands."""
    partial.chmod(0o755)
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        target.rename(old / "data")
        try:
            partial.rename(target)
        except OSError:
            (old / "data").rename(target)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(target)
