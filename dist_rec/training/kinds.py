"""The kinds of models: the only place that knows which classes there are, and how they differ to what trains them.

What a kind is asked: which features of the data it reads, which of those it looks up in tables, what else it is given
beside them, how it is built, and how it is measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from ..config import Config, ModelConfig, MVKEConfig, UniSRecConfig
from ..data.candidates import CANDIDATES, CANDIDATES_TEXT
from ..errors import UserError
from ..layers.reduction import Reduction
from ..schema import Feature, Schema
from .evaluators import Evaluator, RankingEvaluator, TaskEvaluator
from .ranking import TASK
from .start.freeze import Levels

if TYPE_CHECKING:
    from ..embeddings.tables import TableSpec
    from ..models.towers import TwoTowers

# Of a finetuned sequence model that stops early: epochs, and the cut of the NDCG that it goes by.
MOST_EPOCHS, STOPS_AT = 300, 10


class Kind(ABC):
    """One kind of model.

    Attributes:
        reads_catalogue: whether `data.catalogue` means anything to it.
        levels: what presets of finetuning call its parts.
        usual_freeze: the preset that `dist-rec finetune` takes where none is asked for.
        finetune_epochs: most epochs that it takes, where nothing says when to stop.
    """

    reads_catalogue: ClassVar[bool] = False
    levels: ClassVar[Levels]
    usual_freeze: ClassVar[str] = "none"
    finetune_epochs: ClassVar[int]

    def reads_dropped(self, config: Config) -> bool:
        """Whether training reads `text.dropped_store`."""
        return False

    @abstractmethod
    def features(self, schema: Schema, config: Config) -> list[str]:
        """The features that this config's model reads of the data, in schema order."""

    def looked_up(self, schema: Schema, config: Config, features: Sequence[str]) -> list[str]:
        """Those of `features` that are looked up in tables."""
        return [name for name in features if schema.features[name].kind in ("id", "ids")]

    def identified(self, schema: Schema, config: Config, features: Sequence[str]) -> list[str]:
        """Those of `features` whose ids the model is given as they are in the data (`Batch.identity`)."""
        return []

    def given(self, schema: Schema, config: Config, features: list[str]) -> tuple[Schema, list[str]]:
        """The schema and features as the model and its tables see them: the data's, and what batches carry besides."""
        return schema, features

    def carried(self, config: Config, num_items: int) -> dict[str, float]:
        """Mean number, a row, of what training batches carry besides the data's features.

        Args:
            num_items: of the catalogue.
        """
        return {}

    def heads(self, schema: Schema, config: Config) -> dict[str, str]:
        """Label of each task that the model predicts."""
        return {}

    def faults(self, schema: Schema, config: Config, features: Sequence[str]) -> list[str]:
        """What of the data this config's model cannot do with."""
        return []

    def table_faults(self, config: Config, specs: Sequence[TableSpec]) -> list[str]:
        """What of the tables this config's model cannot do with."""
        return []

    @abstractmethod
    def model(
        self,
        schema: Schema,
        config: Config,
        table_dims: dict[str, int],
        text_width: int,
        text_encoder: nn.Module | None,
        features: Sequence[str],
        reduction: Reduction,
    ) -> nn.Module:
        """The model of a schema and features as `given` has them.

        Raises:
            UserError: there is none.
        """

    @abstractmethod
    def towers(self, schema: Schema, config: Config, features: Sequence[str]) -> TwoTowers:
        """What an index of inner products can serve of the model, of a schema and features as the data has them.

        Raises:
            UserError: nothing, and why.
        """

    @abstractmethod
    def evaluator(self, schema: Schema, config: Config) -> Evaluator:
        """A fresh one for a split."""

    def not_bundled(self, config: Config) -> str | None:
        """Why its forward cannot be a graph that scores rows; None if it can."""
        return None

    def not_evaluated(self, config: Config) -> str | None:
        """Why there is nothing to measure of this config's model, in words; None where there is."""
        return None

    def told(self, dataset: str, config: Config, overall: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """What an experiment's results tell of a run in keys of their own, beside metrics by task.

        Args:
            dataset: what the experiment calls the run's data.
            overall: metrics by task.
        """
        return {}

    def drawn(self, config: Config) -> str:
        """The metric of a task that a few-shot curve draws."""
        return "auc"

    @abstractmethod
    def finetuned(self, tree: dict[str, Any]) -> None:
        """Change in place what of a foundation's config, as a tree of values whose data is the new one, is another when
        it is finetuned."""

    @abstractmethod
    def most_events(self, config: Config) -> int:
        """Events of a history that the model reads."""

    @abstractmethod
    def used_by(self, parameter: str) -> Literal["event", "text", "row"]:
        """What uses a parameter of this name once: every event of a history, every distinct text, or every row."""

    @abstractmethod
    def attention_layers(self, config: Config, model: nn.Module) -> int:
        """Layers in which events attend to events."""


class _Foundation(Kind):
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
        from ..models.foundation import tasks_of

        return {task: spec.label for task, spec in tasks_of(schema, config.model).items()}

    def model(self, schema, config, table_dims, text_width, text_encoder, features, reduction) -> nn.Module:
        from ..models.foundation import FoundationModel

        return FoundationModel(schema, config.model, table_dims, text_width, text_encoder, features, reduction)

    def towers(self, schema: Schema, config: Config, features: Sequence[str]) -> TwoTowers:
        from ..models.foundation import towers_of

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


class _UniSRec(Kind):
    """Reads sequences: the history's ids and texts, the item's id and text. The rest of the data is left alone."""

    reads_catalogue = True
    # As in the paper, whose finetuning leaves positions and blocks of the transformer alone.
    levels = Levels(encoders=("text_encoder.", "encoder."), adaptors=("adaptor.", "encoder.input_norm."), heads=())
    usual_freeze = "adaptor"
    finetune_epochs = 16

    def reads_dropped(self, config: Config) -> bool:
        return config.text.dropped_store is not None and config.model.contrast.drops_words

    def features(self, schema: Schema, config: Config) -> list[str]:
        used, model = [], config.model
        for name, feature in schema.features.items():
            wanted = feature.role == "item" and feature.kind == "id" and feature.aspect == "id"
            wanted |= feature.role == "history" and feature.kind == "ids"
            wanted |= model.with_text and (feature.role, feature.kind) in (("item", "text"), ("history", "texts"))
            if wanted and name not in config.data.exclude_features:
                used.append(name)
        return used

    def looked_up(self, schema: Schema, config: Config, features: Sequence[str]) -> list[str]:
        return super().looked_up(schema, config, features) if config.model.with_ids else []

    def identified(self, schema: Schema, config: Config, features: Sequence[str]) -> list[str]:
        # Those of the candidates are given with them.
        return [n for n in features if n != CANDIDATES and schema.features[n].kind in ("id", "ids")]

    def given(self, schema: Schema, config: Config, features: list[str]) -> tuple[Schema, list[str]]:
        item = item_of(schema, features)
        if config.data.catalogue is None or item is None:
            return schema, features
        added = {CANDIDATES: Feature(role="history", kind="ids", shares=schema.table_of(item))}
        if config.model.with_text:
            added[CANDIDATES_TEXT] = Feature(role="history", kind="texts")
        taken = [name for name in added if name in schema.features]
        if taken:
            raise UserError(
                f"the data set has a feature {taken[0]!r}, which is what a sequence model calls the items that it ranks"
                ": build it under another name"
            )
        return replace(schema, features=schema.features | added), [*features, *added]

    def carried(self, config: Config, num_items: int) -> dict[str, float]:
        candidates = {"in_batch": 0, "full": num_items, "sampled": config.model.samples}[config.model.loss]
        return dict.fromkeys((CANDIDATES, CANDIDATES_TEXT), candidates / config.data.batch_size)

    def faults(self, schema: Schema, config: Config, features: Sequence[str]) -> list[str]:
        model, faults = config.model, []
        for what, role, kind, needed in (
            ("the ids of a history", "history", "ids", True),
            ("the item's id (aspect: id)", "item", "id", True),
            ("the texts of a history", "history", "texts", model.with_text),
            ("the item's text", "item", "text", model.with_text),
        ):
            named = [n for n in features if (schema.features[n].role, schema.features[n].kind) == (role, kind)]
            if needed and len(named) != 1:
                found = f"{', '.join(named)} are" if named else "none is"
                faults.append(
                    f"model.kind unisrec reads {what}, one feature, and {found} there: build the data set as "
                    "sequences, or see data.exclude_features"
                )
        if config.train.early_stopping.metric is not None and config.data.catalogue is None:
            faults.append(
                "train.early_stopping goes by places among the items of data.catalogue, and there is none: name it, or "
                "set train.early_stopping: null"
            )
        elif config.train.evaluate_every and config.data.valid is not None and (why := self.not_evaluated(config)):
            faults.append(f"train.evaluate_every: {why}: name it, or set train.evaluate_every: 0")
        item, histories = item_of(schema, features), [n for n in features if schema.features[n].kind == "ids"]
        for history in histories:
            if item is not None and schema.table_of(history) != schema.table_of(item):
                faults.append(f"features.{history} must share the vocabulary of {item}, whose ids it lists")
        return faults

    def table_faults(self, config: Config, specs: Sequence[TableSpec]) -> list[str]:
        width = config.model.width
        return [
            f"table {spec.name} is {spec.dim} wide, and the vectors of an item's id and of its text are added: set "
            f"tables.dim, or tables.overrides.{spec.vocabulary}.dim, to model.width {width}"
            for spec in specs
            if spec.dim != width
        ]

    def model(self, schema, config, table_dims, text_width, text_encoder, features, reduction) -> nn.Module:
        from ..models.unisrec import UniSRec

        return UniSRec(
            schema,
            config.model,
            table_dims,
            text_width,
            text_encoder,
            features,
            reduction,
            mask_history=config.evaluate.mask_history,
        )

    def towers(self, schema: Schema, config: Config, features: Sequence[str]) -> TwoTowers:
        from ..models.unisrec import towers_of

        return towers_of(schema, config.model, features)

    def not_bundled(self, config: Config) -> str | None:
        return "its events are packed, row after row, and how many there are no graph can know beforehand"

    def evaluator(self, schema: Schema, config: Config) -> Evaluator:
        return RankingEvaluator(schema, config.evaluate.at, {"mask_history": config.evaluate.mask_history})

    def not_evaluated(self, config: Config) -> str | None:
        if config.data.catalogue is not None:
            return None
        return "a sequence model is measured by its items' places among those of data.catalogue, and there is none"

    def drawn(self, config: Config) -> str:
        return _first_ndcg(config.evaluate.at)

    def told(self, dataset: str, config: Config, overall: dict[str, dict[str, Any]]) -> dict[str, Any]:
        is_pretrained = config.finetune.run is not None
        return {"dataset": dataset, "mode": config.model.item, "pretrained": is_pretrained, **overall.get(TASK, {})}

    def finetuned(self, tree: dict[str, Any]) -> None:
        model, data = tree["model"], tree["data"]
        # As the paper has it: the whole catalogue's softmax and no augmented copies.
        model["contrast"]["weight"] = 0.0
        if data["catalogue"] is not None and model["loss"] == "in_batch":
            model["loss"] = "full"
        tree["text"]["dropped_store"] = None
        # What pretraining has no use for: an id's vector is added to a text's.
        tree["tables"]["dim"] = model["width"]
        if data["valid"] is not None and data["catalogue"] is not None:
            stopping = {"metric": f"{TASK}.{_first_ndcg(tree['evaluate']['at'])}"}
            tree["train"] |= {"epochs": MOST_EPOCHS, "evaluate_every": "epoch", "early_stopping": stopping}

    def most_events(self, config: Config) -> int:
        return config.model.encoder.max_length

    def used_by(self, parameter: str) -> Literal["event", "text", "row"]:
        return "text" if parameter.startswith("adaptor.") else "event"

    def attention_layers(self, config: Config, model: nn.Module) -> int:
        return config.model.encoder.layers


def _first_ndcg(at: Sequence[int]) -> str:
    """The NDCG to go by, of those with these cuts."""
    return f"ndcg@{STOPS_AT if STOPS_AT in at else max(at)}"


class _MVKE(Kind):
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
        from ..models.mvke import tasks_of

        return {task: spec.label for task, spec in tasks_of(schema, config.model).items()}

    def model(self, schema, config, table_dims, text_width, text_encoder, features, reduction) -> nn.Module:
        from ..models.mvke import MVKE

        return MVKE(schema, config.model, table_dims, text_width, text_encoder, features, reduction)

    def towers(self, schema: Schema, config: Config, features: Sequence[str]) -> TwoTowers:
        from ..models.mvke import two_towers

        return two_towers(schema, config.model, features)

    def evaluator(self, schema: Schema, config: Config) -> Evaluator:
        return TaskEvaluator(schema, self.heads(schema, config), config.evaluate.ndcg_at)

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


KINDS: dict[type, Kind] = {ModelConfig: _Foundation(), UniSRecConfig: _UniSRec(), MVKEConfig: _MVKE()}


def kind_of(config: Config) -> Kind:
    """The kind of model that a config has."""
    return KINDS[type(config.model)]


def item_of(schema: Schema, features: Sequence[str]) -> str | None:
    """The feature among `features` that is the item's identity."""
    return next(
        (n for n in features if (f := schema.features[n]).role == "item" and f.kind == "id" and f.aspect == "id"), None
    )
