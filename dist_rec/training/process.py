"""This process among the ranks: device, process group, and an end that never hangs."""

from __future__ import annotations

import ctypes
import datetime
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..config import Config
from ..errors import UserError
from ..launch import fresh_store

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**30


@dataclass(frozen=True)
class Process:
    """Who this rank is, and where it computes."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    timeout: datetime.timedelta

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_size() -> int:
    """World size that torchrun announced, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def ranks_here(ranks: int) -> int:
    """Ranks of this host as torchrun announced them, all `ranks` without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


def choose_device(config: Config) -> torch.device:
    """The device that `train.device` asks for.

    Raises:
        UserError: CUDA is asked for and there is none, or this rank has no GPU of its own.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if config.train.device == "cpu" or (config.train.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device: cuda, but torch sees no GPU. Run `dist-rec doctor`, or set train.device: cpu.")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"this host has {torch.cuda.device_count()} GPU(s), and local rank {local_rank} needs one of its own: "
            "start fewer ranks a host (--nproc-per-node)."
        )
    return torch.device("cuda", local_rank)


def quieten() -> None:
    """Silence the engines' chatter, which is neither an error nor actionable."""
    warnings.filterwarnings("ignore", module=r"(torch|torchrec|deepspeed|fbgemm_gpu|tensordict)\b.*")
    # Blamed on the caller's line, which is ours.
    warnings.filterwarnings("ignore", message=".*ShardedTensor", category=FutureWarning)
    for name in ("torch", "torchrec", "fbgemm_gpu", "DeepSpeed", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _keep_freed_memory() -> None:
    """Have malloc keep freed blocks up to `KEPT_BYTES` each for the next step.

    Left to itself it maps every large tensor anew, whose pages then come one fault at a time: an elementwise product of
    13 million floats took 34 ms, and 4 ms in kept memory. A user's own settings (mallopt(3)) stay; before glibc 2.35,
    which takes no such threshold, all stays as it is.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        # Either alone would end malloc's own adaptation, and be slower than nothing.
        if libc.mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES):
            libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


@contextmanager
def process_group(config: Config, device: torch.device) -> Iterator[Process]:
    """Join the ranks (alone without torchrun), and leave them when all are done.

    After a fault nobody leaves: the process is about to end.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if device.type == "cpu":
        _keep_freed_memory()
    # DeepSpeed guesses its accelerator at import; the run's choice must win.
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(minutes=config.train.timeout_minutes)
    store = fresh_store(timeout)
    by_store = {"store": store, "rank": int(os.environ["RANK"]), "world_size": world_size()} if store else {}
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timeout,
        **by_store,
        device_id=device if device.type == "cuda" else None,
    )
    yield Process(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        # Set, because TorchRec reads it too, with another default.
        local_world_size=int(os.environ.setdefault("LOCAL_WORLD_SIZE", str(dist.get_world_size()))),
        device=device,
        timeout=timeout,
    )
    # Not in a finally: after a fault, destroying the group waits for ranks that may never come.
    dist.barrier()
    dist.destroy_process_group()
