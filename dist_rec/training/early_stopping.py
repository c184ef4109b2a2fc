"""When a run has stopped improving: the best evaluation so far, and how many since have not been better.

Knows metrics by name and value; neither how they are computed nor where checkpoints lie.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from pydantic import Field

from ..config.training import UNORDERED, EarlyStoppingConfig
from ..errors import UserError, nearest
from ..strict import strict

LOWER_IS_BETTER = ("logloss",)


@strict
class Standing:
    """What the evaluations of `metric` have shown so far; goes through checkpoints.

    Attributes:
        evaluated: steps done at the last evaluation that was counted.
        value, step: of the best evaluation; None before any had a value.
        without_improvement: evaluations since the best.
    """

    metric: str
    evaluated: int = Field(ge=0)
    value: float | None = None
    step: int | None = Field(default=None, ge=0)
    without_improvement: int = Field(default=0, ge=0)


class EarlyStopping:
    """Counts evaluations; without a metric it counts none, is never done and has no best.

    Args:
        config: the metric, and how patient to be.
        standing: of the checkpoint that the run goes on from. That of another metric begins anew.
    """

    def __init__(self, config: EarlyStoppingConfig, standing: Standing | None = None) -> None:
        self.config = config
        self.standing = standing if standing is not None and standing.metric == config.metric else None
        self.before = self.standing

    @property
    def enabled(self) -> bool:
        return self.config.metric is not None

    @property
    def best(self) -> int | None:
        """Step of the best evaluation, None where there is none."""
        return self.standing.step if self.standing is not None else None

    @property
    def done(self) -> bool:
        """Whether patience is used up."""
        return self.standing is not None and self.standing.without_improvement >= self.config.patience

    def has_counted(self, step: int) -> bool:
        """Whether the last evaluation that was counted is that after `step` steps."""
        return self.standing is not None and self.standing.evaluated == step

    def count(self, step: int, overall: dict[str, dict[str, Any]]) -> bool:
        """Count the evaluation after `step` steps; returns whether it is the best so far.

        A metric that is undefined (None, NaN) is no improvement.

        Args:
            overall: metrics by task.

        Raises:
            UserError: they lack the metric.
        """
        if not self.enabled:
            return False
        value, held = value_of(overall, self.config.metric), self.standing
        self.before = held
        if held is None:
            held = Standing(metric=self.config.metric, evaluated=step)
        if self._improves(value, held.value):
            self.standing = replace(held, evaluated=step, value=value, step=step, without_improvement=0)
            return True
        self.standing = replace(held, evaluated=step, without_improvement=held.without_improvement + 1)
        return False

    def _improves(self, value: float | None, best: float | None) -> bool:
        if value is None or math.isnan(value):
            return False
        if best is None:
            return True
        gain = best - value if self.config.metric.rpartition(".")[2] in LOWER_IS_BETTER else value - best
        return gain > self.config.min_delta

    def take_back(self) -> None:
        """Count the last evaluation, the best, as no improvement after all: what it measured could not be kept."""
        held, before = self.standing, self.before
        if before is None:
            before = Standing(metric=held.metric, evaluated=held.evaluated)
        self.standing = replace(before, evaluated=held.evaluated, without_improvement=before.without_improvement + 1)

    def forget_best(self) -> None:
        """The best is gone: any value is better than none."""
        self.standing = replace(self.standing, value=None, step=None)

    def news(self) -> dict[str, Any] | None:
        """For metrics.jsonl: the best so far."""
        held = self.standing
        if held is None:
            return None
        return {
            "metric": held.metric,
            "best": held.value,
            "best_step": held.step,
            "without_improvement": held.without_improvement,
        }

    def said(self) -> str:
        """The same for people."""
        held, n = self.standing, self.standing.without_improvement
        best = "no value so far" if held.step is None else f"best {held.value:.6g} at step {held.step}"
        since = f", {n} evaluation{'s' if n > 1 else ''} without improvement" if n else ""
        return f"{held.metric}: {best}{since}"


def value_of(overall: dict[str, dict[str, Any]], metric: str) -> float | None:
    """The value of `<task>.<metric>` among metrics by task.

    Raises:
        UserError: there is none of this name.
    """
    task, _, name = metric.rpartition(".")
    if name not in overall.get(task, {}):
        known = [f"{t}.{n}" for t, metrics in overall.items() for n in metrics if n not in UNORDERED]
        raise UserError(
            f"train.early_stopping.metric: an evaluation has no {metric!r}.{nearest(metric, known)} "
            f"There is {', '.join(known)}."
        )
    return overall[task][name]
