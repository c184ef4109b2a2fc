"""From a text's vector to an item's: a mixture of parametric whitenings (UniSRec, KDD'22).

    x_k  = (dropout(x) - b_k) W_k                          k = 1 .. G, each with a dropout of its own
    g    = softmax(x W_gate + delta),   delta = N(0, 1) * (softplus(x W_noise) + 0.01) in training, else 0
    v    = sum_k g_k x_k                                   x is the text's vector times `scale`

Dropout before the subtraction, the gate on x as it is, and the least deviation of 0.01 are the public code's. The
softmax is dense: every expert sees every text. Nothing balances the experts' loads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dropout import Dropout

# Standard deviation of every weight at the start, here and in the sequence encoder.
INIT_STD = 0.02
LEAST_DEVIATION = 0.01


class WhiteningMixture(nn.Module):
    """G whitening experts under a noisy gate.

    Parameters: `weight` `[G, D, H]`, N(0, 0.02^2); `bias` `[G, D]`, zeros; `gate` and, with `noise`, `gate_noise`
    `[D, G]`, zeros, so that all experts begin with equal shares but for the noise.

    Args:
        inputs: D, width of a text's vector.
        width: H.
        experts: G.
        dropout: on x, in training.
        noise: of the gate, in training.
        scale: of x.
    """

    def __init__(self, inputs: int, width: int, experts: int, dropout: float, noise: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(experts, inputs, width))
        self.bias = nn.Parameter(torch.zeros(experts, inputs))
        self.gate = nn.Parameter(torch.zeros(inputs, experts))
        # Without noise it would never have a gradient, which ZeRO does not take.
        self.gate_noise = nn.Parameter(torch.zeros(inputs, experts)) if noise else None
        self.dropout = Dropout(dropout)
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[T, D]`, T may be 0 -> `[T, H]`."""
        x = x * self.scale
        gates = self.gates(x)
        dropped = self.dropout(x.expand(len(self.weight), *x.shape))
        # (x - b) W = x W - b W, and b W is one row an expert.
        experts = torch.baddbmm(-torch.bmm(self.bias[:, None], self.weight), dropped, self.weight)
        return torch.einsum("tg,gth->th", gates, experts)

    def gates(self, x: Tensor) -> Tensor:
        """Share of each expert in each `x` `[T, D]`: `[T, G]`, rows adding up to 1."""
        logits = x @ self.gate
        if self.training and self.gate_noise is not None:
            deviation = F.softplus(x @ self.gate_noise) + LEAST_DEVIATION
            logits = logits + torch.randn_like(logits) * deviation
        return torch.softmax(logits, 1)
