"""Sums over ranks: how a loss on one rank's rows becomes the loss of the global batch.

This file is the single-process side and the contract; the distributed subclass lives in
`dist_rec.training`, so that layers and models never import `torch.distributed`.

Every rank r returns a scalar loss_r, and the engine *averages* gradients over the W ranks. Two
shapes of loss then give exactly the gradient of one process on the global batch:

* **A sum of row terms**, L = sum_b l_b / n with n valid terms in the global batch. Each rank
  returns loss_r = W / n * (its own sum): the mean over ranks of d loss_r is d L.
* **A function of global statistics**, L = f(s), s = sum_r s_r. Each rank returns the full value
  f(`sum(s_r)`). The backward of `sum` adds the incoming gradients of all ranks, which gives
  every rank W * f'(s) on its own s_r; the mean over ranks is f'(s) * sum_r ds_r = d L.

So `sum` is an all-reduce both forward and backward, `gather` is an all-gather whose backward
adds what all ranks send to a rank's slice, and no rank needs to know the others' rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Reduction:
    """The reduction of a single process: nothing to reduce.

    A subclass for several processes overrides all members. All methods are called by every rank in the same order
    in every step, with equal shapes.
    """

    world_size: int = 1
    # Where this rank's part of `gather` lies.
    rank: int = 0

    def sum(self, x: Tensor) -> Tensor:
        """Differentiable sum over ranks, same shape and dtype as `x`; its backward sums too."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Stack over ranks, `[W, *x.shape]`, in rank order.

        Differentiable for floating dtypes. Integer tensors are gathered exactly, without gradient.
        """
        return x[None]

    def largest(self, number: int, device: torch.device) -> int:
        """The largest number of all ranks. `device` is where this rank's tensors lie."""
        return number


def masked_means(terms: Tensor, valid: Tensor, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """Means over the valid rows of the global batch, all columns in one reduction.

    Args:
        terms: float `[B, C]`, a term for each row and column (task).
        valid: bool `[B, C]`; the others enter neither sum nor count.
        reduction: sums over ranks.

    Returns:
        `(local, value)`, both `[C]`. `local` = (local sum) * W / max(global count, 1) carries the
        gradient; its mean over ranks is the global mean. `value` is the global mean, detached.
        A column without any valid term is 0 with zero gradients.
    """
    # where, not a product: a masked row may hold anything.
    sums = torch.where(valid, terms, terms.new_zeros(())).sum(0)
    totals, counts = reduction.sum(torch.stack([sums.detach(), valid.sum(0).to(sums.dtype)])).unbind(0)
    counts = counts.clamp_min(1)
    return sums * (reduction.world_size / counts), totals / counts


def full_precision(x: Tensor) -> Tensor:
    """`x` in at least float32: losses and statistics are not taken in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
