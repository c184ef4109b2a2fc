"""One vector for each task from a user's fields, by what virtual kernels are compared with.

    single_task     an expert for each task, which share nothing
    shared_bottom   one expert for all tasks (hard sharing), then the tasks' towers
    mmoe            experts for all tasks, mixed by each task's gate (Ma et al., KDD'18), then towers
    cgc, ple        experts of each task beside those for all (Tang et al., RecSys'20), then towers; ple in levels

Experts and gates read all fields side by side, zeros where a row lacks one. They are the foundation's
(`layers.experts`), of one domain.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..config import BodyConfig, UserTowerConfig
from .experts import ExpertLevel, SharedBottom
from .fields import Fields
from .per_domain import PerDomainMLP, all_rows


class TaskTowers(nn.Module):
    """T vectors of width d.

    Args:
        config: `model.user`, of a kind of the list above.
        fields: F.
        width: d.
        tasks: T.
    """

    def __init__(self, config: UserTowerConfig, fields: int, width: int, tasks: int) -> None:
        super().__init__()
        inputs, outputs, dropout = fields * width, config.hidden[-1], config.dropout
        self.groups, self.levels, self.towers, self.single = 1, nn.ModuleList(), None, None
        if config.kind == "single_task":
            self.single = PerDomainMLP(
                1, inputs, [*config.hidden, width], copies=tasks, activate_last=False, dropout=dropout
            )
            return
        body = BodyConfig(
            kind=config.kind if config.kind in ("shared_bottom", "mmoe") else "ple",
            experts=config.experts,
            specific_experts=config.specific_experts,
            specific_to="task",
            expert_hidden=config.hidden,
            dropout=dropout,
        )
        if config.kind == "shared_bottom":
            self.levels.append(SharedBottom(body, inputs, tasks))
        else:
            levels = config.levels if config.kind == "ple" else 1
            for i in range(levels):
                self.levels.append(ExpertLevel(body, outputs if i else inputs, 1, tasks, last=i + 1 == levels))
            self.groups = self.levels[0].groups
        self.towers = PerDomainMLP(
            1, outputs, [*config.tower_hidden, width], groups=tasks, activate_last=False, dropout=dropout
        )

    def forward(self, fields: Fields) -> Tensor:
        """`[B, T, d]`."""
        common, sizes = fields.values.flatten(1)[:, None], all_rows(fields.values)
        if self.single is not None:
            return self.single(common, sizes)
        own = common.expand(-1, self.groups, -1)
        for level in self.levels:
            common, own = level(common, own, sizes)
        return self.towers(own, sizes)
