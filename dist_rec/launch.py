"""Start the ranks of this host with torchrun's own elastic agent, and end with their exit code.

Plain `torchrun ... -m dist_rec train ...` works as well; it reports a rank's exit code 2 as its own
error 1 with a long trace, which this does not.
"""

from __future__ import annotations

import os
import sys

from .errors import UserError


def under_torchrun() -> bool:
    """Whether this process is a rank that torchrun started."""
    return "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ


def launch(nproc_per_node: int, arguments: list[str]) -> int:
    """Run `python -m dist_rec <arguments>` as `nproc_per_node` ranks.

    Returns:
        0, or the exit code of the rank that failed first; 1 if a signal ended it.
    """
    if nproc_per_node < 1:
        raise UserError(f"--nproc-per-node must be at least 1, got {nproc_per_node}.")
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // nproc_per_node, 1)))
    parsed = get_args_parser().parse_args(
        ["--standalone", "--nproc-per-node", str(nproc_per_node), "-m", "dist_rec", *arguments]
    )
    try:
        run(parsed)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == 2:
            return 2
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        print(f"dist-rec: rank {rank} ended with {how}; the other ranks were stopped.", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0
