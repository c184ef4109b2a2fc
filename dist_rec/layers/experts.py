"""Multi-task bodies over x_hat: shared bottom, MMoE (KDD'18) and PLE (RecSys'20).

Every gate and every tower belongs to one (domain, task); all are stacked parameters on rows
sorted by domain, so a domain without rows still has its (zero) gradient on every rank.

    y_kt = sum_e g_kt,e(r) f_e(r),   g_kt = softmax(G_kt r),   logit_kt = tower_kt(y_kt) (+ w_t x_hat)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import BodyConfig
from .per_domain import PerDomainLinear, PerDomainMLP


class ExpertLevel(nn.Module):
    """One level of experts and the gates that mix them.

    MMoE is one last level without specific experts. In PLE (a stack of CGC levels) each group
    has P experts of its own beside the E shared ones. A group is a task, or a domain; a row
    belongs to all tasks but to one domain, so with domains it has G = 1 group, its own.

    Gates, each with parameters per domain (ours where `specific_to` is task):

    * a group's gate reads the group's representation and weighs its P experts and the E shared;
    * the last level has one gate for each task instead, which reads its group's representation;
    * the shared gate, absent from the last level, reads the shared representation and weighs the
      G * P specific and the E shared experts *of the row*. With tasks these are all experts, as in
      the PLE paper; with domains the experts of other domains are left out (ours), since running
      K times as many experts on each row would undo what specific experts are for.

    Args:
        config: kind, counts, widths, dropout.
        inputs: width of the representations.
        num_domains: K.
        num_tasks: T.
        last: whether towers follow.
    """

    def __init__(self, config: BodyConfig, inputs: int, num_domains: int, num_tasks: int, last: bool) -> None:
        super().__init__()
        by_task = config.specific_to == "task"
        self.groups = num_tasks if config.kind == "ple" and by_task else 1
        self.num_specific = config.specific_experts if config.kind == "ple" else 0
        self.num_shared = config.experts
        self.mixtures = num_tasks if last else self.groups
        widths, dropout = config.expert_hidden, config.dropout
        self.shared = PerDomainMLP(1, inputs, widths, copies=self.num_shared, dropout=dropout)
        self.by_task = by_task
        if self.num_specific:
            owners = 1 if by_task else num_domains
            self.specific = PerDomainMLP(owners, inputs, widths, self.groups, self.num_specific, dropout=dropout)
        seen = self.num_specific + self.num_shared
        self.gate = PerDomainLinear(num_domains, inputs, self.mixtures // self.groups * seen, self.groups)
        if not last:
            self.shared_gate = PerDomainLinear(num_domains, inputs, self.groups * self.num_specific + self.num_shared)
        self.last = last

    def forward(self, common: Tensor, own: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Run experts and gates on rows sorted by domain.

        Args:
            common: `[B, 1, in]`, the shared representation.
            own: `[B, G, in]`, the groups'.
            sizes: int64 `[K]` on the CPU.

        Returns:
            `(common, own)` of the next level, `[B, 1, out]` and `[B, G, out]`. Of the last level
            `common` as it came and the tasks' mixtures `[B, T, out]`.
        """
        rows, groups, specific = common.shape[0], self.groups, self.num_specific
        every = sizes.sum(0, keepdim=True)
        experts = self.shared(common, every)
        gates = self.weights(own, sizes)
        mixed = torch.bmm(gates[:, :, specific:], experts)
        if specific:
            mine = self.specific(own, every if self.by_task else sizes)
            weights = gates[:, :, :specific].reshape(rows * groups, self.mixtures // groups, specific)
            mixed = mixed + torch.bmm(weights, mine.view(rows * groups, specific, -1)).view_as(mixed)
            experts = torch.cat([mine, experts], 1)
        if not self.last:
            common = torch.bmm(self.shared_weights(common, sizes), experts)
        return common, mixed

    def weights(self, own: Tensor, sizes: Tensor) -> Tensor:
        """What each mixture gives its group's P experts and the E shared ones, `[B, M, P + E]`, adding up to 1.

        M is the number of tasks on the last level, of groups before it; arguments as `forward`.
        """
        gates = self.gate(own, sizes)
        return torch.softmax(gates.view(own.shape[0], self.mixtures, self.num_specific + self.num_shared), 2)

    def shared_weights(self, common: Tensor, sizes: Tensor) -> Tensor:
        """What the shared gate, which the last level lacks, gives the G * P specific and the E shared experts of a
        row, `[B, 1, G * P + E]`."""
        return torch.softmax(self.shared_gate(common, sizes), 2)


class SharedBottom(nn.Module):
    """One expert for all domains and tasks, without gates; towers follow."""

    def __init__(self, config: BodyConfig, inputs: int, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.bottom = PerDomainMLP(1, inputs, config.expert_hidden, dropout=config.dropout)

    def forward(self, common: Tensor, own: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """As `ExpertLevel.forward` of the last level: `own` becomes T views of the bottom."""
        return common, self.bottom(common, sizes.sum(0, keepdim=True)).expand(-1, self.num_tasks, -1)


class ExpertBody(nn.Module):
    """Experts, gates and towers: x_hat in, one logit a task out.

    Args:
        config: `model.body`.
        inputs: width of x_hat.
        num_domains: K.
        num_tasks: T.
    """

    def __init__(self, config: BodyConfig, inputs: int, num_domains: int, num_tasks: int) -> None:
        super().__init__()
        outputs = config.expert_hidden[-1]
        if config.kind == "shared_bottom":
            levels = [SharedBottom(config, inputs, num_tasks)]
        else:
            num_levels = config.levels if config.kind == "ple" else 1
            levels = [
                ExpertLevel(config, outputs if i else inputs, num_domains, num_tasks, last=i + 1 == num_levels)
                for i in range(num_levels)
            ]
        self.groups = num_tasks if config.kind == "ple" and config.specific_to == "task" else 1
        self.levels = nn.ModuleList(levels)
        self.towers = PerDomainMLP(
            num_domains,
            outputs,
            [*config.tower_hidden, 1],
            groups=num_tasks,
            activate_last=False,
            dropout=config.dropout,
        )
        self.skip = nn.Linear(inputs, num_tasks) if config.skip else None

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        """x_hat `[B, in]`, rows sorted by domain, and `sizes` int64 `[K]` on the CPU -> logits `[B, T]`."""
        common = x[:, None]
        own = common.expand(-1, self.groups, -1)
        for level in self.levels:
            common, own = level(common, own, sizes)
        logits = self.towers(own, sizes)[:, :, 0]
        return logits if self.skip is None else logits + self.skip(x)
