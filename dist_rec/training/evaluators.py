"""What is measured of a model's output: one evaluator for each way to evaluate, all of one shape.

`evaluation.evaluate` feeds an evaluator batch by batch and knows no metric; which one a model needs is its kind's to
say. Knows batches and outputs, no models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.batch import Batch
from ..schema import Schema
from .metrics import Evaluation
from .ranking import RankingEvaluation, RowRanks


class Evaluator(Protocol):
    """Collects what a model says of a split's rows.

    Attributes:
        ranks_rows: whether every row gets a place of its own, so that runs can be compared row by row.
        at: cuts of recall and NDCG, where rows get places.
        protocol: what those places depend on beside the rows and the model.
    """

    ranks_rows: bool
    at: list[int]
    protocol: dict[str, Any]

    def add_batch(self, batch: Batch, output: dict[str, Any]) -> None:
        """Take a batch of this rank and the model's output for it. Local."""

    def compute(self) -> dict[str, Any]:
        """`overall` and `domains` of evaluation.json, equal on all ranks. Collective."""

    def per_row(self) -> RowRanks | None:
        """Every row's place, on rank 0. Collective; None on the other ranks, and where `ranks_rows` is False."""


class TaskEvaluator:
    """Probabilities of labelled rows, by task (`metrics.Evaluation`).

    Args:
        schema: of the data.
        tasks: label of each task.
        ndcg_at: cut of NDCG by query.
        targets: of a batch what the probabilities are of, `[B, T]` in 0 .. 1, and bool `[B, T]`, which of them are
            known; None where that is each task's label.
    """

    ranks_rows = False

    def __init__(
        self,
        schema: Schema,
        tasks: dict[str, str],
        ndcg_at: int,
        targets: Callable[[Batch], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.at, self.protocol = [], {}
        self.schema, self.tasks, self.targets = schema, tasks, targets
        self.evaluation = Evaluation(schema.domains.names, list(tasks), ndcg_at)

    def add_batch(self, batch: Batch, output: dict[str, Any]) -> None:
        """Reads `output["logits"]`: by task, float `[B]`."""
        targets = self.targets(batch) if self.targets else None
        for number, (task, label) in enumerate(self.tasks.items()):
            gains, known, maximum = batch.labels[label], batch.label_valid[label], self.schema.labels[label].maximum
            if targets is not None:
                gains, known = maximum * targets[0][:, number], targets[1][:, number]
            self.evaluation.add(
                task,
                torch.sigmoid(output["logits"][task].float()),
                gains / maximum,
                gains,
                known & batch.valid,
                batch.domain,
                batch.user,
                batch.query,
                batch.row,
            )

    def compute(self) -> dict[str, Any]:
        return self.evaluation.compute()

    def per_row(self) -> None:
        return None


class RankingEvaluator:
    """The place of each row's item among all candidates (`ranking.RankingEvaluation`).

    Args:
        schema: of the data.
        at: cuts of recall and NDCG.
        protocol: what places depend on beside the rows and the model, such as whether a row's history is left out of
            its candidates: runs are compared row by row only where these are equal.
    """

    ranks_rows = True

    def __init__(self, schema: Schema, at: Sequence[int], protocol: dict[str, Any] | None = None) -> None:
        self.evaluation, self.protocol = RankingEvaluation(schema.domains.names, at), protocol or {}
        self.at = self.evaluation.at

    def add_batch(self, batch: Batch, output: dict[str, Any]) -> None:
        """Reads `output["rank"]`: float64 `[B]`, NaN where a row has no place."""
        self.evaluation.add(output["rank"], batch.valid, batch.domain, batch.user, batch.row)

    def compute(self) -> dict[str, Any]:
        return self.evaluation.compute()

    def per_row(self) -> RowRanks | None:
        return self.evaluation.per_row()
