"""Stacked per-domain linear maps over rows sorted by domain.

Rows are sorted once a batch (`sort_by_domain`); everything between that and the logits works on
the sorted rows, so each domain is one contiguous slice and one matrix product. All K slices are
computed, empty ones too: a domain without rows has a zero gradient, never none, as ZeRO needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sort_by_domain(domain: Tensor, num_domains: int) -> tuple[Tensor, Tensor]:
    """The order that makes each domain's rows contiguous.

    Args:
        domain: int64 `[B]`, 0 <= domain < K.
        num_domains: K.

    Returns:
        `(order, sizes)`: int64 `[B]`, stable, so that `domain[order]` ascends; and int64 `[K]`
        rows of each domain **on the CPU** (on CUDA this is one synchronisation a batch).
    """
    order = torch.argsort(domain, stable=True)
    sizes = F.one_hot(domain, num_domains).sum(0)
    return order, sizes.cpu()


def all_rows(x: Tensor) -> Tensor:
    """All rows of `x`, as the sizes of a single domain."""
    return torch.full((1,), x.shape[0])


class _SlicedLinear(torch.autograd.Function):
    """`y[b, s] = x[b, s] @ weight[k(b), s] + bias[k(b), s]`, written into place slice by slice.

    Split, multiply and concatenate would copy every activation twice, forward and backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        y = x.new_empty(*x.shape[:-1], weight.shape[-1])
        for k, rows in enumerate(_slices(sizes)):
            for s in range(weight.shape[1]):
                torch.addmm(bias[k, s], x[rows, s], weight[k, s], out=y[rows, s])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight, dbias = torch.empty_like(weight), weight.new_empty(*weight.shape[:2], weight.shape[-1])
        for k, rows in enumerate(_slices(ctx.sizes)):
            for s in range(weight.shape[1]):
                torch.mm(x[rows, s].t(), grad[rows, s], out=dweight[k, s])
                if dx is not None:
                    torch.mm(grad[rows, s], weight[k, s].t(), out=dx[rows, s])
            torch.sum(grad[rows], 0, out=dbias[k])
        return dx, dweight, dbias, None


def _slices(sizes: Sequence[int]) -> list[slice]:
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def per_domain_linear(x: Tensor, weight: Tensor, bias: Tensor, sizes: Tensor) -> Tensor:
    """`y[b, s] = x[b, s] W[k, s] + c[k, s]` with k the domain of row b.

    Args:
        x: `[B, S, in]`, rows sorted by domain.
        weight: `[K, S, in, out]`.
        bias: `[K, S, out]`.
        sizes: int64 `[K]` on the CPU, rows of each domain, adding up to B.

    Returns:
        `[B, S, out]`.

    Raises:
        ValueError: the sizes do not add up to B, or there are not K of them.
    """
    if torch.compiler.is_exporting():
        # What `sizes` holds no graph can know: every domain's map, and of those the row's own.
        every = torch.einsum("bsi,ksio->bkso", x, weight) + bias
        domain = torch.repeat_interleave(sizes, output_size=x.shape[0])
        return every[torch.arange(x.shape[0]), domain] if weight.shape[0] > 1 else every[:, 0].contiguous()
    counts = sizes.tolist()
    if sum(counts) != x.shape[0] or len(counts) != weight.shape[0]:
        what = f"{len(counts)} domains of {sum(counts)} rows"
        raise ValueError(f"{what} for {weight.shape[0]} maps and {x.shape[0]} rows")
    return _SlicedLinear.apply(x, weight, bias, counts)


class PerDomainLinear(nn.Module):
    """S linear maps for each of K domains.

    Parameters `weight` `[K, S, in, out]` and `bias` `[K, S, out]`, initialised as `nn.Linear`.

    Args:
        num_domains: K. With 1 it is a plain stack of maps.
        inputs: width in.
        outputs: width out.
        stack: S, independent maps side by side, each with an input of its own.
    """

    def __init__(self, num_domains: int, inputs: int, outputs: int, stack: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_domains, stack, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(num_domains, stack, outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[2])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        """`x` `[B, S, in]` sorted by domain, `sizes` int64 `[K]` on the CPU -> `[B, S, out]`."""
        return per_domain_linear(x, self.weight, self.bias, sizes)


class PerDomainMLP(nn.Module):
    """G * C multi-layer perceptrons for each of K domains: linear, ReLU, dropout, and so on.

    Args:
        num_domains: K.
        inputs: width of the input.
        widths: output width of each layer.
        groups: G inputs for each row.
        copies: C perceptrons read each input; their first layers are one product.
        activate_last: whether the last layer has its ReLU and dropout (experts) or not (towers).
        dropout: after each ReLU.
    """

    def __init__(
        self,
        num_domains: int,
        inputs: int,
        widths: Sequence[int],
        groups: int = 1,
        copies: int = 1,
        activate_last: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.stack = groups * copies
        self.activate_last = activate_last
        self.layers = nn.ModuleList([PerDomainLinear(num_domains, inputs, copies * widths[0], groups)])
        for a, b in itertools.pairwise(widths):
            self.layers.append(PerDomainLinear(num_domains, a, b, self.stack))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        """`x` `[B, G, in]` sorted by domain, `sizes` int64 `[K]` on the CPU -> `[B, G * C, out]`."""
        for i, layer in enumerate(self.layers):
            x = layer(x, sizes)
            x = x.view(x.shape[0], self.stack, x.shape[1] * x.shape[2] // self.stack)
            if self.activate_last or i + 1 < len(self.layers):
                x = self.dropout(F.relu(x))
        return x
