"""The one exception that means "your input is wrong": config, data, schema, plan.

`dist_rec.cli` turns it into words on stderr and exit code 2, without a traceback. Any other
exception is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Says what is wrong, where, and what to do next."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


class Stopped(Exception):
    """The run was asked to stop (SIGTERM), has saved, and can go on; the message says where."""
