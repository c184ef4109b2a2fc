"""Start the ranks of this host with torchrun's own elastic agent, and end with their exit code.

Plain `torchrun ... -m dist_rec train ...` works as well; it reports a rank's exit code 2 as its own
error 1 with a long trace, which this does not. Also what a rank needs to end well: to say a fault
that all ranks meet once, and to know that a failure is only the echo of another rank's.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import signal
import socket
import sys
import time
import uuid
from datetime import timedelta

from .errors import UserError

STOPPED = 128 + signal.SIGTERM
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
RENDEZVOUS = "DIST_REC_RENDEZVOUS"
_STORE = "dist_rec/store"
_ECHOES = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "remote process exited", "imed out")


def under_torchrun() -> bool:
    """Whether this process is a rank that torchrun started."""
    return "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ


def launch(nproc_per_node: int, arguments: list[str], max_restarts: int = 0) -> int:
    """Run `python -m dist_rec <arguments>` as `nproc_per_node` ranks.

    Args:
        max_restarts: how often all ranks start again after one has failed.

    Returns:
        0; 2 if a rank met the user's fault; 143 if the job was stopped by SIGTERM; else the exit
        code of the rank that failed first, 1 if a signal ended it.
    """
    if nproc_per_node < 1 or max_restarts < 0:
        raise UserError(
            f"--nproc-per-node {nproc_per_node} must be at least 1, and --max-restarts {max_restarts} at least 0."
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // nproc_per_node, 1)))
    ours = ["--standalone", "--nproc-per-node", str(nproc_per_node), "--max-restarts", str(max_restarts)]
    parsed = get_args_parser().parse_args([*ours, "-m", "dist_rec", *arguments])
    # The agent would log at length what the ranks and the line below say shortly.
    logging.disable()
    try:
        run(parsed)
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for told in (2, STOPPED):
            if told in codes:
                return told
        # Ranks that the agent stopped afterwards are failures too, ended by SIGTERM.
        rank, failure = next(
            ((r, f) for r, f in error.failures.items() if f.exitcode != -signal.SIGTERM), error.get_first_failure()
        )
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        print(f"dist-rec: rank {rank} ended with {how}; the other ranks were stopped.", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def _agent_store():
    """The store that torchrun keeps for all ranks and restarts of a job; None where there is none.

    torchrun names it where its agent shares it with the ranks; where each start gets a store of its
    own, `launchers/torchrun_multinode.sh` names the rendezvous'.
    """
    from torch.distributed import TCPStore

    if not under_torchrun():
        return None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    elif RENDEZVOUS in os.environ:
        address, _, port = os.environ[RENDEZVOUS].rpartition(":")
    else:
        return None
    try:
        return TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=5))
    except RuntimeError:
        return None


def fresh_store(timeout: timedelta):
    """A store for this start of the ranks alone, where torchrun's is shared by all starts; else None.

    In a shared store, ranks that start again find the addresses of their dead predecessors. So
    rank 0 keeps a new store, and says in the shared one where; whoever still finds an old
    one there, reaches nobody, and looks again.
    """
    from torch.distributed import TCPStore

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, deadline = os.environ["MASTER_ADDR"], time.monotonic() + timeout.total_seconds()
    shared = TCPStore(address, int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    if os.environ["RANK"] == "0":
        own, token = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout), uuid.uuid4().hex
        own.set(_STORE, token)
        shared.set(_STORE, f"{own.port}/{token}")
        return own
    while True:
        port, token = shared.get(_STORE).decode().split("/")
        try:
            # A client would say at length that nobody answers there.
            socket.create_connection((address, int(port)), timeout=1).close()
            own = TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=2))
            if own.check([_STORE]) and own.get(_STORE).decode() == token:
                own.set_timeout(timeout)
                return own
        except (OSError, RuntimeError):
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def first_to_say(message: str, is_final: bool = False) -> bool:
    """Whether no other rank has said `message` yet.

    From here on the agent's SIGTERM is ignored: a rank that says something ends by itself.

    Args:
        is_final: no restart can help; see `has_failed_for_good`.
    """
    if not under_torchrun():
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    store = _agent_store()
    if store is None:
        return True
    said = hashlib.sha256(message.encode()).hexdigest()
    try:
        if is_final:
            store.set(_final_key(), said)
        store.set(_said_key(), said)
        return store.add(f"{_said_key()}/{said}", 1) == 1
    except RuntimeError:
        return True


def anyone_said() -> bool:
    """Whether a rank of this start has said why it ends, as far as can be known."""
    store = _agent_store()
    try:
        return store is not None and store.check([_said_key()])
    except RuntimeError:
        return False


def has_failed_for_good() -> bool:
    """Whether an earlier start of this job met a fault of the user's.

    torchrun starts failed ranks again whatever their exit code; these end at once, until it gives up.
    """
    if not is_restart():
        return False
    store = _agent_store()
    return store is not None and store.check([_final_key()])


def _final_key() -> str:
    """Jobs that follow each other at one rendezvous differ in their id."""
    return f"dist_rec/failed-for-good/{os.environ['TORCHELASTIC_RUN_ID']}"


def _said_key() -> str:
    return f"dist_rec/said/{os.environ['TORCHELASTIC_RUN_ID']}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def is_restart() -> bool:
    """Whether torchrun has started the ranks before."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def die_with_agent() -> None:
    """Let the kernel send SIGTERM when the agent dies, which could otherwise start a second set of ranks beside."""
    if under_torchrun():
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def is_echo(error: BaseException) -> bool:
    """Whether `error` only says that another rank has gone or does not answer."""
    if not under_torchrun() or not isinstance(error, RuntimeError):
        return False
    from torch.distributed import DistError

    text = str(error)
    return ("gloo" in text or isinstance(error, DistError)) and any(echo in text for echo in _ECHOES)
