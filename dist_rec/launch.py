"""Start the ranks of this host with torchrun's own elastic agent, and end with their exit code.

Plain `torchrun ... -m dist_rec train ...` works as well; it reports a rank's exit code 2 as its own
error 1 with a long trace, which this does not. Also what a rank needs to end well: to say a fault
that all ranks meet once, and to know that a failure is only the echo of another rank's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sys
from datetime import timedelta

from .errors import UserError

_ECHOES = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "remote process exited", "imed out")


def under_torchrun() -> bool:
    """Whether this process is a rank that torchrun started."""
    return "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ


def launch(nproc_per_node: int, arguments: list[str]) -> int:
    """Run `python -m dist_rec <arguments>` as `nproc_per_node` ranks.

    Returns:
        0; 2 if a rank met the user's fault; else the exit code of the rank that failed first, 1 if
        a signal ended it.
    """
    if nproc_per_node < 1:
        raise UserError(f"--nproc-per-node must be at least 1, got {nproc_per_node}.")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // nproc_per_node, 1)))
    parsed = get_args_parser().parse_args(
        ["--standalone", "--nproc-per-node", str(nproc_per_node), "-m", "dist_rec", *arguments]
    )
    # The agent would log at length what the ranks and the line below say shortly.
    logging.disable()
    try:
        run(parsed)
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        if any(failure.exitcode == 2 for failure in error.failures.values()):
            return 2
        # Ranks that the agent stopped afterwards are failures too, ended by SIGTERM.
        rank, failure = next(
            ((r, f) for r, f in error.failures.items() if f.exitcode != -signal.SIGTERM), error.get_first_failure()
        )
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        print(f"dist-rec: rank {rank} ended with {how}; the other ranks were stopped.", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def first_to_say(message: str) -> bool:
    """Whether no other rank has said `message` yet; asks the store that torchrun's agent keeps.

    From here on the agent's SIGTERM is ignored: a rank that says something ends by itself.
    """
    if not under_torchrun():
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore

    said = hashlib.sha256(message.encode()).hexdigest()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"dist_rec/said/{attempt}/{said}", 1) == 1
    except RuntimeError:
        return True


def is_echo(error: BaseException) -> bool:
    """Whether `error` only says that another rank has gone or does not answer."""
    if not under_torchrun() or not isinstance(error, RuntimeError):
        return False
    from torch.distributed import DistError

    text = str(error)
    return ("gloo" in text or isinstance(error, DistError)) and any(echo in text for echo in _ECHOES)
