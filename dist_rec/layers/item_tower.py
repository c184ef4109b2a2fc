"""From an item's (a tag's) fields to its vectors: a perceptron, or virtual kernels on this side too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ItemTowerConfig, KernelsConfig
from .fields import Fields
from .per_domain import PerDomainMLP, all_rows
from .virtual_kernels import KernelExperts


class ItemTower(nn.Module):
    """V vectors, each the outputs of J experts: one, or those of J virtual kernels.

    Args:
        config: `model.item`.
        kernels: `model.kernels`, whose attention the kernels of this side have.
        fields: F.
        width: d.
        vectors: V.
    """

    def __init__(self, config: ItemTowerConfig, kernels: KernelsConfig, fields: int, width: int, vectors: int) -> None:
        super().__init__()
        self.vectors, self.width = vectors, width
        self.num_experts = 1 if config.kind == "mlp" else config.kernels
        if config.kind == "mlp":
            self.tower = PerDomainMLP(
                1,
                fields * width,
                [*config.hidden, width],
                copies=vectors,
                activate_last=False,
                dropout=config.dropout,
            )
        else:
            count = vectors * self.num_experts
            self.kernels = nn.Embedding(count, width)
            nn.init.normal_(self.kernels.weight, std=kernels.init_std)
            attention = (kernels.activation, kernels.combine, kernels.scaled, kernels.maps_std)
            self.tower = KernelExperts(count, fields, width, *attention, config.hidden, config.dropout)

    def forward(self, fields: Fields) -> tuple[Tensor, Tensor]:
        """F fields of B rows.

        Returns:
            `(E, W_VK)`: `[B, V, J, d]` and `[V, J, d]`; `[V, 0, d]` without kernels.
        """
        rows = fields.values.shape[0]
        if isinstance(self.tower, KernelExperts):
            numbers = torch.arange(self.vectors * self.num_experts, device=fields.values.device)
            kernels = self.kernels(numbers)
            experts, _ = self.tower(kernels, fields)
            kernels = kernels.view(self.vectors, self.num_experts, self.width)
        else:
            experts = self.tower(fields.values.flatten(1)[:, None], all_rows(fields.values))
            kernels = fields.values.new_zeros(self.vectors, 0, self.width)
        return experts.view(rows, self.vectors, self.num_experts, self.width), kernels
