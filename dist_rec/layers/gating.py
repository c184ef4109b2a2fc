"""Aspect gating: one vector of a query or item from those of its aspects (CIKM'23).

    E = sum_a w_a E_a,   a in {id, text, sparse}

    mean:    w_a = 1 / (number of present aspects)      (1/3 in the paper, where none is missing)
    cls:     w = softmax_a(E_CLS . E_a)
    domain:  w = softmax_a(E_Dk . E_a),  k the row's domain

A missing aspect (a cold item without an id row, a query without text) has weight exactly 0: the
softmax runs over the present ones. A row without any aspect, as a recommendation row without a
query, gets a learned vector of its domain. Masking and null vector are ours; so is reading the
paper's E_CLS as a learned vector for each role, where it may mean the language model's [CLS].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class AspectGate(nn.Module):
    """Weighs the aspects of one role.

    Parameters: `null` `[K, H]`, and for `cls` also `cls` `[H]`; both start as N(0, 1 / H).

    Args:
        kind: `mean`, `cls` or `domain`.
        width: H.
        num_domains: K.
    """

    def __init__(self, kind: Literal["mean", "cls", "domain"], width: int, num_domains: int) -> None:
        super().__init__()
        self.kind = kind
        self.null = nn.Parameter(torch.empty(num_domains, width))
        if kind == "cls":
            self.cls = nn.Parameter(torch.empty(width))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=width**-0.5)

    def forward(self, aspects: Tensor, present: Tensor, domain: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Gate every row's aspects.

        Args:
            aspects: E_a, `[B, A, H]`; A may be 0. Finite where missing.
            present: bool `[B, A]`.
            domain: one-hot `[B, K]`, of the dtype of `aspects`.
            keys: `[B, H]`, the row's E_Dk. Only `domain` reads it; `[B, 0]` does for the others.

        Returns:
            `(E, w)`: `[B, H]` and the weights `[B, A]`, which add up to 1, or 0 if none is present.
        """
        # A product with the one-hot rows is exact, and its backward is repeatable on CUDA.
        null = domain @ self.null
        if self.kind == "mean":
            weights = present / present.sum(1, keepdim=True).clamp_min(1)
            weights = weights.to(aspects.dtype)
        else:
            key = self.cls.expand(aspects.shape[0], -1) if self.kind == "cls" else keys
            scores = (aspects * key[:, None]).sum(2)
            scores = scores.masked_fill(~present, torch.finfo(scores.dtype).min)
            # Rows without any aspect get an even softmax here, which the product sets to 0.
            weights = torch.softmax(scores, 1) * present
        mixed = (aspects * weights[:, :, None]).sum(1)
        return torch.where(present.any(1, keepdim=True), mixed, null), weights
