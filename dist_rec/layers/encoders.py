"""E(U), E(Q) and E(I): one vector of width H for the user, the query and the item (CIKM'23).

    E(U) = W_U (GELU(W_p profile) (+) history)
    E(Q), E(I) = the gate's mixture of E_ID = W_ID e,  E_lm = W_lm t,  E_S = MLP(sparse)

The paper does not say how profile and history are joined; the line for E(U) is ours.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gating import AspectGate


class UserEncoder(nn.Module):
    """E(U) from profile columns and encoded histories.

    A schema without either still has a user: a learned constant.

    Args:
        profile: C, width of the profile columns; 0 if there are none.
        histories: total width of the histories' vectors; 0 if there are none.
        width: H.
    """

    def __init__(self, profile: int, histories: int, width: int) -> None:
        super().__init__()
        self.constant = profile + histories == 0
        self.profile = nn.Linear(profile, width) if profile else None
        self.join = nn.Linear((width if profile else 0) + histories or 1, width)

    def forward(self, profile: Tensor, histories: Tensor) -> Tensor:
        """`profile` `[B, C]` and `histories` `[B, G * H]`, either of width 0 -> `[B, H]`."""
        if self.profile is not None:
            profile = F.gelu(self.profile(profile))
        x = torch.cat([profile, histories], 1)
        return self.join(x.new_ones(x.shape[0], 1) if self.constant else x)


class EntityEncoder(nn.Module):
    """E(Q) or E(I) from the aspects that the schema has.

    A schema that gives the role no aspect at all (no query features anywhere) takes the same
    path with A = 0: every row then is its domain's null vector.

    Args:
        gating: `mean`, `cls` or `domain`.
        width: H.
        num_domains: K.
        id_dim: width of the id's embedding; 0 if there is no id aspect.
        has_text: whether there is a text aspect; its vectors come projected to H.
        sparse: width of the sparse columns; 0 if there are none.
        dropout: between the layers of the sparse aspect's MLP.
    """

    def __init__(
        self,
        gating: Literal["mean", "cls", "domain"],
        width: int,
        num_domains: int,
        id_dim: int,
        has_text: bool,
        sparse: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.width = width
        self.aspects = [a for a, there in (("id", id_dim), ("text", has_text), ("sparse", sparse)) if there]
        layers: dict[str, nn.Module] = {}
        if id_dim:
            layers["id"] = nn.Linear(id_dim, width)
        if sparse:
            hidden = [nn.Linear(sparse, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width)]
            layers["sparse"] = nn.Sequential(*hidden)
        self.layers = nn.ModuleDict(layers)
        self.gate = AspectGate(gating, width, num_domains)

    def forward(self, inputs: dict[str, Tensor], present: dict[str, Tensor], domain: Tensor, keys: Tensor) -> Tensor:
        """Encode every row.

        Args:
            inputs: by aspect: `id` `[B, dim]`, `text` `[B, H]`, `sparse` `[B, C]`.
            present: by aspect, bool `[B]`.
            domain: one-hot `[B, K]`.
            keys: the rows' domain embeddings `[B, H]`, or `[B, 0]` where the gate reads none.

        Returns:
            `[B, H]`.
        """
        vectors = [self.layers[a](inputs[a]) if a in self.layers else inputs[a] for a in self.aspects]
        if vectors:
            stacked, there = torch.stack(vectors, 1), torch.stack([present[a] for a in self.aspects], 1)
        else:
            stacked = domain.new_zeros(domain.shape[0], 0, self.width)
            there = torch.zeros(domain.shape[0], 0, dtype=torch.bool, device=domain.device)
        return self.gate(stacked, there, domain, keys)[0]
