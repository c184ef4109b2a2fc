"""Threads that stand for ranks: what several processes compute, with gradients, in one."""

from __future__ import annotations

import copy
import threading

import torch
from torch import Tensor, nn

from dist_rec.layers.reduction import Reduction


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters()}


class Wire:
    """All-reduce and all-gather between threads that stand for ranks."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=30)
        self.slots: list[Tensor | None] = [None] * world_size

    def exchange(self, rank: int, x: Tensor) -> Tensor:
        self.slots[rank] = x.detach().clone()
        self.barrier.wait()
        everyone = torch.stack(self.slots)
        self.barrier.wait()
        return everyone


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, wire, rank):
        ctx.wire, ctx.rank = wire, rank
        return wire.exchange(rank, x).sum(0)

    @staticmethod
    def backward(ctx, grad):
        return ctx.wire.exchange(ctx.rank, grad).sum(0), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, wire, rank):
        ctx.wire, ctx.rank = wire, rank
        return wire.exchange(rank, x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.wire.exchange(ctx.rank, grad).sum(0)[ctx.rank], None, None


class ThreadReduction(Reduction):
    def __init__(self, wire: Wire, rank: int) -> None:
        self.wire, self.rank, self.world_size = wire, rank, wire.world_size

    def sum(self, x: Tensor) -> Tensor:
        return _Sum.apply(x, self.wire, self.rank)

    def gather(self, x: Tensor) -> Tensor:
        return _Gather.apply(x, self.wire, self.rank) if x.is_floating_point() else self.wire.exchange(self.rank, x)

    def largest(self, number: int, device: torch.device) -> int:
        return int(self.wire.exchange(self.rank, torch.tensor(number)).max())


def run_ranks(module: nn.Module, batches: list) -> tuple[dict[str, Tensor], list[dict]]:
    """Gradients averaged over ranks, and what each rank returned."""
    wire = Wire(len(batches))
    ranks = [copy.deepcopy(module) for _ in batches]
    outputs: list[dict | None] = [None] * len(batches)
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            ranks[rank].model.reduction = ThreadReduction(wire, rank)
            outputs[rank] = ranks[rank](batches[rank])
            outputs[rank]["loss"].backward()
        except BaseException as error:
            errors.append(error)
            wire.barrier.abort()

    threads = [threading.Thread(target=work, args=(r,)) for r in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    every = [gradients(rank) for rank in ranks]
    return {n: torch.stack([g[n] for g in every]).mean(0) for n in every[0]}, outputs
