"""Moving rows: take and place by distinct indices, each the other's backward.

`index_select`'s own backward is an `index_add`, which is serial on CPU and atomic, so not
repeatable, on CUDA. Where no index occurs twice a copy does the same.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Place.apply(grad, ctx.saved_tensors[0], ctx.rows), None


class _Place(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Take.apply(grad, ctx.saved_tensors[0]), None, None


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `x[index]`.

    Args:
        x: `[R, ...]`.
        index: int64 `[n]`, all different. (A row whose gradient nobody asks for may repeat.)

    Returns:
        `[n, ...]`.
    """
    return _Take.apply(x, index)


def place(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """A zero tensor of `rows` rows with `out[index] = x`: the inverse of `take`.

    Args:
        x: `[n, ...]`.
        index: int64 `[n]`, all different, below `rows`.

    Returns:
        `[rows, ...]`.
    """
    return _Place.apply(x, index, rows)
