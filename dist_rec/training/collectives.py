"""`Reduction` over a process group: the sums that make a rank's loss the global batch's.

`layers.reduction` holds the contract and the reasoning; this is its distributed half.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..layers.reduction import Reduction


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def _stack(x: Tensor) -> Tensor:
    out = x.new_empty(dist.get_world_size(), *x.shape)
    dist.all_gather_into_tensor(out.view(-1), x.contiguous().view(-1))
    return out


class _StackOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _stack(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[dist.get_rank()]


class DistributedReduction(Reduction):
    """Sums and gathers over the default process group."""

    def __init__(self) -> None:
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()

    def sum(self, x: Tensor) -> Tensor:
        return _SumOverRanks.apply(x)

    def gather(self, x: Tensor) -> Tensor:
        return _StackOverRanks.apply(x) if x.is_floating_point() else _stack(x)

    def largest(self, number: int, device: torch.device) -> int:
        found = torch.tensor(number, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)
