"""Virtual kernels (Xu et al., KDD'22): interests that attend to a user's fields, and a tag's gate over them.

    VKE   a_kf = softmax_f(q_k . k_f [/ sqrt(d)])    q = s(W_Q W_VK^k + b_Q), k = s(W_K e_f + b_K), v = s(W_V e_f + b_V)
          E^k  = f^k(C^k),  C^k of concat            (+)_f a_kf v_f
                                   sum               sum_f a_kf v_f
                                   residual_norm     (+)_f LayerNorm(e_f + a_kf v_f)
    VKG   w_k  = softmax_k(q . k_k [/ sqrt(d)])      q = E_T, k = W_VK^k, of the experts E^k; or, projected,
                                                     q = s(W_Q E_T + b_Q), k = s(W_K W_VK^k + b_K), of s(W_V E^k + b_V)

s is the activation. The weight of a field that a row lacks is 0; a row without fields has weights of 0 alone. Neither
module holds the kernels: both are given them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fields import Fields
from .per_domain import PerDomainMLP, all_rows

ACTIVATIONS = {"none": nn.Identity, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}
# TensorFlow's: fields that start as N(0, 0.01) are not small beside it.
NORM_EPS = 1e-12
Combine = Literal["concat", "sum", "residual_norm"]


class KernelExperts(nn.Module):
    """VKE and the kernels' own expert nets, each a perceptron that ends in d numbers.

    Args:
        kernels: K.
        fields: F.
        width: d.
        activation: of query, key and value.
        combine: what experts read.
        scaled: divide scores by sqrt(d).
        maps_std: the maps of query, key and value start as N(0, maps_std); None as `nn.Linear` does.
        hidden: widths of the experts' hidden layers.
        dropout: after each of those.
    """

    def __init__(
        self,
        kernels: int,
        fields: int,
        width: int,
        activation: str,
        combine: Combine,
        scaled: bool,
        maps_std: float | None,
        hidden: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        self.combine, self.scale = combine, width**-0.5 if scaled else 1.0
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.activation = ACTIVATIONS[activation]()
        if maps_std is not None:
            for linear in (self.query, self.key, self.value):
                nn.init.normal_(linear.weight, std=maps_std)
                nn.init.zeros_(linear.bias)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS) if combine == "residual_norm" else None
        inputs = width if combine == "sum" else fields * width
        self.experts = PerDomainMLP(1, inputs, [*hidden, width], groups=kernels, activate_last=False, dropout=dropout)

    def forward(self, kernels: Tensor, fields: Fields) -> tuple[Tensor, Tensor]:
        """Attend and run the experts.

        Args:
            kernels: W_VK, `[K, d]`, or `[B, K, d]` where they depend on the row.
            fields: F of B rows.

        Returns:
            `(E, a)`: `[B, K, d]` and the attention `[B, K, F]`.
        """
        values, present = fields
        query, key, value = (
            self.activation(project(x))
            for project, x in ((self.query, kernels), (self.key, values), (self.value, values))
        )
        scores = torch.matmul(query, key.transpose(1, 2)) * self.scale
        scores = scores.masked_fill(~present[:, None], torch.finfo(scores.dtype).min)
        # A row without any field gets an even softmax, which the product sets to 0.
        weights = torch.softmax(scores, 2) * present[:, None]
        if self.combine == "sum":
            mixed = torch.bmm(weights, value)
        else:
            mixed = weights[:, :, :, None] * value[:, None]
            if self.norm is not None:
                mixed = self.norm(values[:, None] + mixed) * present[:, None, :, None]
            mixed = mixed.flatten(2)
        return self.experts(mixed, all_rows(mixed)), weights


class KernelGate(nn.Module):
    """VKG: how a tag weighs experts. `value` is the map of what it weighs of them.

    Args:
        width: d.
        project: whether query, key and value have maps.
        activation: of theirs.
        scaled: divide scores by sqrt(d).
        kind: `softmax`, or `argmax`, which weighs the best kernel 1 and the others 0, with softmax's gradient.
    """

    def __init__(
        self, width: int, project: bool, activation: str, scaled: bool, kind: Literal["softmax", "argmax"]
    ) -> None:
        super().__init__()
        self.scale, self.kind = width**-0.5 if scaled else 1.0, kind
        if project:
            maps = [nn.Sequential(nn.Linear(width, width), ACTIVATIONS[activation]()) for _ in range(3)]
        else:
            maps = [nn.Identity() for _ in range(3)]
        self.query, self.key, self.value = maps

    def forward(self, tag: Tensor, kernels: Tensor) -> Tensor:
        """`tag` E_T `[B, d]` and `kernels` `[K, d]`, or `[B, K, d]` -> w, `[B, K]`."""
        query, key = self.query(tag), self.key(kernels)
        scores = torch.bmm(key, query[:, :, None])[:, :, 0] if key.ndim == 3 else query @ key.t()
        soft = torch.softmax(scores * self.scale, 1)
        if self.kind == "softmax":
            return soft
        return _StraightThrough.apply(F.one_hot(soft.argmax(1), soft.shape[1]).to(soft.dtype), soft)


class _StraightThrough(torch.autograd.Function):
    """The first argument, to the bit, and the second one's gradient."""

    @staticmethod
    def forward(ctx, hard: Tensor, soft: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, gradient


class CrossedKernels(nn.Module):
    """Kernels of a row: W_VK^k + M_k (user * item), the M_k starting as 0.

    Args:
        kernels: K.
        width: d.
    """

    def __init__(self, kernels: int, width: int) -> None:
        super().__init__()
        self.kernels = kernels
        self.move = nn.Linear(width, kernels * width, bias=False)
        nn.init.zeros_(self.move.weight)

    def forward(self, kernels: Tensor, user: Tensor, item: Tensor) -> Tensor:
        """`kernels` `[K, d]`, `user` and `item` `[B, d]` -> `[B, K, d]`."""
        return kernels + self.move(user * item).view(user.shape[0], self.kernels, kernels.shape[1])
