"""Several interests of a user, and an item that chooses among them: ComiRec and MIND, to compare with.

    A   = softmax_j(W_2 tanh(W_1 h_j))              one row for each interest (Cen et al., KDD'20, ComiRec-SA)
    u_k = MLP((sum_j A_kj h_j) (+) profile)
    w   = softmax_k(p <u_k, e>)                     label-aware attention (Li et al., CIKM'19, MIND)

The h_j are the events of the user's histories and the fields of the profile, so that users without events have
interests too (ours). MIND's power p of the inner products is read as a factor within the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from .fields import Fields
from .per_domain import PerDomainMLP, all_rows


class MultiInterest(nn.Module):
    """I interests of each row.

    Args:
        interests: I.
        fields: F, of the profile.
        width: d.
        hidden: widths of the hidden layers of W_1 (the first) and of the perceptron, which all interests share.
        dropout: of the perceptron.
    """

    def __init__(self, interests: int, fields: int, width: int, hidden: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.interests = interests
        self.inner = nn.Linear(width, hidden[0], bias=False)
        self.outer = nn.Linear(hidden[0], interests, bias=False)
        self.combine = PerDomainMLP(1, (1 + fields) * width, [*hidden, width], activate_last=False, dropout=dropout)

    def forward(self, profile: Fields, histories: Sequence[Fields]) -> Tensor:
        """The profile's F fields and the events of each history -> `[B, I, d]`."""
        values, present = reduce(Fields.followed_by, histories, profile)
        scores = self.outer(torch.tanh(self.inner(values))).transpose(1, 2)
        scores = scores.masked_fill(~present[:, None], torch.finfo(scores.dtype).min)
        interests = torch.bmm(torch.softmax(scores, 2) * present[:, None], values)
        rows = values.shape[0]
        about = profile.values.flatten(1)[:, None].expand(-1, self.interests, -1)
        x = torch.cat([interests, about], 2).view(rows * self.interests, 1, -1)
        return self.combine(x, all_rows(x)).view(rows, self.interests, -1)


def label_aware_weights(interests: Tensor, item: Tensor, sharpness: float) -> Tensor:
    """w, `[B, I]`, of `interests` `[B, I, d]` and `item` `[B, d]`."""
    return torch.softmax(sharpness * torch.bmm(interests, item[:, :, None])[:, :, 0], 1)
