"""A clock that ranks read together."""

from __future__ import annotations

import time

import torch.distributed as dist


def together() -> float:
    """Seconds, when every rank is here. Collective."""
    dist.barrier()
    return time.perf_counter()
