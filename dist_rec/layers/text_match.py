"""How well texts match: cosines of text vectors, as inputs of the experts and as a term of each logit (ours).

    m_bj      = cos(a_bj, t_I)    a_bj the query's text vector, or the mean direction of a history's texts
    term_bt   = s (m_b (+) known_b) V_kt + c_kt    k the row's domain, t the task

What a projection to H keeps of a text is not enough to match words, and one input among hundreds has little say
before it is learned. As a term of the logit a match ranks from the first step, for a domain without a single click too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .per_domain import PerDomainLinear

# Cosine that says nothing either way where the slopes begin.
MIDDLE = 0.5


class TextMatch(nn.Module):
    """The term of the logits.

    Args:
        num_domains: K.
        matches: J.
        tasks: number of logits.
        slope: by how much a logit rises with each cosine before anything is learned.
        speed: s, by which a parameter is multiplied.
    """

    def __init__(self, num_domains: int, matches: int, tasks: int, slope: float, speed: float) -> None:
        super().__init__()
        self.speed = speed
        self.map = PerDomainLinear(num_domains, 2 * matches, tasks)
        nn.init.constant_(self.map.weight[:, :, :matches], slope / speed)
        nn.init.constant_(self.map.weight[:, :, matches:], -MIDDLE * slope / speed)
        nn.init.zeros_(self.map.bias)

    def forward(self, matches: Tensor, sizes: Tensor) -> Tensor:
        """`matches` `[B, 2J]` of `cosines`, rows sorted by domain, `sizes` int64 `[K]` on the CPU -> `[B, tasks]`."""
        return self.speed * self.map(matches[:, None], sizes)[:, 0]


def mean_directions(directions: Tensor, index: Tensor, lengths: Tensor) -> Tensor:
    """The mean of each row's texts.

    Args:
        directions: `[T, D]`, unit vectors, one a distinct text.
        index: int64 `[n]`, 0 .. T, the rows' texts in row order; T is no text and counts nowhere.
        lengths: int64 `[B]`, adding up to n.

    Returns:
        `[B, D]` unit vectors, zeros where a row has no text.
    """
    padded = torch.cat([directions, directions.new_zeros(1, directions.shape[1])])
    starts = lengths.cumsum(0) - lengths
    # Zeros without it, too; but it saves their gradient, and a graph would take the number for a constant.
    nothing = None if torch.compiler.is_exporting() else len(directions)
    sums = F.embedding_bag(index, padded, starts, mode="sum", padding_idx=nothing)
    return F.normalize(sums, dim=1)


def cosines(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of J pairs of unit vectors `[B, D]`: m, then 1 where both are known, `[B, 2J]`; zeros where either is a zero
    vector."""
    found = [(a * b).sum(1) for a, b in pairs]
    known = [(a.detach().any(1) & b.detach().any(1)).to(a.dtype) for a, b in pairs]
    return torch.stack(found + known, 1)
