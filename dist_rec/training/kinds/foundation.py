"""The foundation model of search and recommendation, to what trains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ...config import Config
from ...schema import Schema
from ..evaluators import Evaluator, TaskEvaluator
from ..start.freeze import Levels
from .kind import Kind

if TYPE_CHECKING:
    from ...models.towers import TwoTowers


class FoundationKind(Kind):
    levels = Levels(
        encoders=("text_encoder.", "text_projection.", "user.", "history_encoders.", "entities."),
        adaptors=(),
        heads=("body.towers.", "text_match."),
    )
    # Chosen on validation rows of two domains (configs/experiments/cold_start.yaml) among 2, 4 and 16.
    finetune_epochs = 2

    def features(self, schema: Schema, config: Config) -> list[str]:
        text = config.text.mode != "none"
        history = config.model.history.kind != "none"
        history_text = text and history and config.model.history.use_text
        used = []
        for name, feature in schema.features.items():
            if name in config.data.exclude_features:
                continue
            if feature.kind == "text" and not text or feature.kind == "texts" and not history_text:
                continue
            if feature.role == "history" and not history:
                continue
            used.append(name)
        return used

    def heads(self, schema: Schema, config: Config) -> dict[str, str]:
        from ...models.foundation import tasks_of

        return {task: spec.label for task, spec in tasks_of(schema, config.model).items()}

    def model(self, schema, config, table_dims, text_width, text_encoder, features, reduction) -> nn.Module:
        from ...models.foundation import FoundationModel

        return FoundationModel(schema, config.model, table_dims, text_width, text_encoder, features, reduction)

    def towers(self, schema: Schema, config: Config, features: Sequence[str]) -> TwoTowers:
        from ...models.foundation import towers_of

        return towers_of(schema, features)

    def evaluator(self, schema: Schema, config: Config) -> Evaluator:
        return TaskEvaluator(schema, self.heads(schema, config), config.evaluate.ndcg_at)

    def finetuned(self, tree: dict[str, Any]) -> None:
        """Nothing."""

    def most_events(self, config: Config) -> int:
        return config.model.history.max_length

    def used_by(self, parameter: str) -> Literal["event", "text", "row"]:
        if parameter.startswith("history_encoders."):
            return "event"
        return "text" if parameter.startswith("text_projection") else "row"

    def attention_layers(self, config: Config, model: nn.Module) -> int:
        history = config.model.history
        return len(model.history_encoders) * history.layers if history.kind == "transformer" else 0
