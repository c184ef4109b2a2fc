"""Domain adaptation: a linear map of its own for each domain (CIKM'23).

    x_hat = W_k (x (+) E_Dk) + b_k

with k the row's domain, (+) concatenation, and E_D the embedding that also keys the domain gate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .per_domain import per_domain_linear


class DomainAdaptation(nn.Module):
    """x_hat = W_k (x (+) E_Dk) + b_k on rows sorted by domain.

    W_k is kept as its two blocks, `weight` `[K, 1, in, out]` for x and `domain_weight`
    `[K, H, out]` for E_D. The second meets one vector a domain, not one a row, so
    c_k = E_Dk W_k^D + b_k is computed K times and x is never copied to be concatenated.

    The paper names no initialisation. Ours starts near "no adaptation": the block for x is the
    same for all domains, the identity where in = out and random with orthonormal rows or columns
    where not, plus noise N(0, 0.01 / (in + H)) on both blocks, so that the experts first see the
    domains in one common space and domains drift apart only as far as the data asks.

    Args:
        num_domains: K.
        inputs: width of x.
        domain_width: H, width of E_D.
        outputs: width of x_hat; 0 keeps `inputs`.
    """

    def __init__(self, num_domains: int, inputs: int, domain_width: int, outputs: int = 0) -> None:
        super().__init__()
        self.outputs = outputs or inputs
        self.weight = nn.Parameter(torch.empty(num_domains, 1, inputs, self.outputs))
        self.domain_weight = nn.Parameter(torch.empty(num_domains, domain_width, self.outputs))
        self.bias = nn.Parameter(torch.empty(num_domains, self.outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        inputs, domain_width = self.weight.shape[2], self.domain_weight.shape[1]
        common = torch.empty(inputs, self.outputs)
        if inputs == self.outputs:
            nn.init.eye_(common)
        else:
            nn.init.orthogonal_(common)
        noise = 0.1 * (inputs + domain_width) ** -0.5
        nn.init.normal_(self.weight, std=noise)
        with torch.no_grad():
            self.weight += common.to(self.weight)
        nn.init.normal_(self.domain_weight, std=noise)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, domains: Tensor, sizes: Tensor) -> Tensor:
        """Adapt every row by its domain.

        Args:
            x: `[B, in]`, rows sorted by domain.
            domains: E_D `[K, H]`.
            sizes: int64 `[K]` on the CPU, rows of each domain.

        Returns:
            x_hat `[B, out]`.
        """
        constant = torch.baddbmm(self.bias[:, None], domains[:, None], self.domain_weight)
        return per_domain_linear(x[:, None], self.weight, constant, sizes)[:, 0]
