"""One step of the whole: sharded tables, then the DeepSpeed engine, in one autograd graph.

    embeddings = tables(batch.ids); output = engine(embeddings, batch)
    engine.backward(output.loss); engine.step()

The tables' optimizer runs inside backward, except for data-parallel tables, which step with the engine. TorchRec's
`TrainPipelineSparseDist` sends the next batch's ids around while this one computes; only its backward and step are
ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from ..config import DenseConfig
from ..data.batch import Batch
from ..embeddings.sharding import ShardedTables
from ..embeddings.tables import EmbeddingTables


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Take fp32 matrix products as `torch.set_float32_matmul_precision` names it, and then as before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def learning_rate_factor(dense: DenseConfig, step: int, total: int) -> float:
    """What both learning rates are multiplied with at `step` (from 0) of `total`."""
    if step < dense.warmup_steps:
        return (step + 1) / dense.warmup_steps
    if dense.schedule == "constant":
        return 1.0
    progress = min((step - dense.warmup_steps) / max(total - dense.warmup_steps, 1), 1.0)
    return 1 - progress if dense.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


class _Pipeline(TrainPipelineSparseDist):
    """TorchRec's pipeline with DeepSpeed's backward, which also reduces the dense gradients."""

    engine: Any

    def _backward(self, losses: Tensor) -> None:
        self.engine.backward(losses)


class _AllOptimizers:
    """What the pipeline calls an optimizer: sets this step's learning rates, steps replicated tables and engine."""

    def __init__(self, tables: ShardedTables, engine: Any, factor: Callable[[int], float], start: int) -> None:
        self.engine, self.factor, self.step_number = engine, factor, start
        self.fused, self.replicated = tables.fused_optimizer, tables.replicated
        optimizers = (self.fused, self.replicated, engine.optimizer)
        self.groups = [(g, g["lr"]) for o in optimizers for g in o.param_groups]

    def zero_grad(self) -> None:
        factor = self.factor(self.step_number)
        for group, base in self.groups:
            group["lr"] = base * factor
        # The kernels learn their rate here; their step has no gradient left to apply.
        self.fused.zero_grad()

    def step(self) -> None:
        self.replicated.step()
        self.engine.step()
        self.step_number += 1


class Hybrid:
    """Tables and engine as one model that trains and predicts.

    Args:
        tables: what `tables.vectors` reads.
        sharded: `tables` under a plan.
        engine: the DeepSpeed engine around the dense model.
        device: of this rank.
        factor: learning rate factor by step.
        start: steps that an earlier run has done.
        matmul_precision: of training's fp32 matrix products, as `torch.set_float32_matmul_precision` names it.
    """

    def __init__(
        self,
        tables: EmbeddingTables,
        sharded: ShardedTables,
        engine: Any,
        device: torch.device,
        factor: Callable[[int], float],
        start: int = 0,
        matmul_precision: str = "highest",
    ) -> None:
        self.matmul_precision = matmul_precision
        self.tables, self.sharded, self.engine, self.device = tables, sharded, engine, device
        self.optimizer = _AllOptimizers(sharded, engine, factor, start)
        self.pipeline = _Pipeline(
            sharded, self.optimizer, device, execute_all_batches=True, custom_model_fwd=self._forward
        )
        self.pipeline.engine = engine

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        output = self.engine(self.tables.vectors(self.sharded(batch), batch), batch)
        return output["loss"], {**output, "batch": batch}

    def train_step(self, batches: Iterator[Batch]) -> dict[str, Any] | None:
        """Train on the next batch; None when there is none.

        Returns:
            The model's output, `loss`, `losses`, `logits`, and the `batch` it is of.
        """
        self.sharded.train()
        self.engine.train()
        try:
            with matmul_precision(self.matmul_precision):
                return self.pipeline.progress(batches)
        except StopIteration:
            return None

    def predict(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Outputs without training. Every rank must offer equally many batches."""
        self.pipeline.detach()
        self.sharded.eval()
        self.engine.eval()
        for batch in batches:
            batch = batch.to(self.device, non_blocking=True)
            with torch.no_grad(), matmul_precision("highest"):
                output = self._forward(batch)[1]
            yield batch, output
        # Left to itself, the pipeline would send the ids of the batches in flight around once more.
        self.pipeline.attach(sparse_dist=False)
