"""MVKE and its baselines, towers of a user and a tag, to what trains them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ...config import Config
from ...schema import Schema
from ..evaluators import Evaluator, TaskEvaluator
from ..start.freeze import Levels
from .kind import Kind

if TYPE_CHECKING:
    from ...models.towers import TwoTowers


class MVKEKind(Kind):
    """Reads the user, with histories, and the item, which is the tag; queries are left alone."""

    levels = Levels(
        encoders=("text_encoder.", "text_projection.", "user_fields.", "item_fields."),
        adaptors=("kernels.", "gate.", "crossed.", "item.kernels.", "item_gate."),
        heads=("item.", "item_gate.", "gate."),
    )
    finetune_epochs = 2

    def features(self, schema: Schema, config: Config) -> list[str]:
        text, history = config.text.mode != "none", config.model.history
        used = []
        for name, feature in schema.features.items():
            wanted = feature.role in ("user", "item") or feature.role == "history" and history.kind != "none"
            wanted &= feature.kind != "text" or text
            wanted &= feature.kind != "texts" or text and history.use_text
            if wanted and name not in config.data.exclude_features:
                used.append(name)
        return used

    def heads(self, schema: Schema, config: Config) -> dict[str, str]:
        from ...models.objectives import tasks_of

        return {task: spec.label for task, spec in tasks_of(schema, config.model).items()}

    def model(self, schema, config, table_dims, text_width, text_encoder, features, reduction) -> nn.Module:
        from ...models.mvke import MVKE

        return MVKE(schema, config.model, table_dims, text_width, text_encoder, features, reduction)

    def towers(self, schema: Schema, config: Config, features: Sequence[str]) -> TwoTowers:
        from ...models.mvke import two_towers

        return two_towers(schema, config.model, features)

    def evaluator(self, schema: Schema, config: Config) -> Evaluator:
        from ...models.objectives import targets_of, tasks_of

        tasks, targets = tasks_of(schema, config.model), None
        if any(spec.given for spec in tasks.values()):
            maxima = {task: schema.labels[spec.label].maximum for task, spec in tasks.items()}
            targets = partial(targets_of, tasks, maxima)
        return TaskEvaluator(schema, self.heads(schema, config), config.evaluate.ndcg_at, targets)

    def finetuned(self, tree: dict[str, Any]) -> None:
        """Nothing."""

    def most_events(self, config: Config) -> int:
        return config.model.history.max_length

    def used_by(self, parameter: str) -> Literal["event", "text", "row"]:
        if parameter.startswith("user_fields.encoders."):
            return "event"
        return "text" if parameter.startswith("text_projection") else "row"

    def attention_layers(self, config: Config, model: nn.Module) -> int:
        history = config.model.history
        if history.kind != "transformer" or config.model.user.kind == "multi_interest":
            return 0
        return len(model.user_fields.encoders) * history.layers
