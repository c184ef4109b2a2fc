"""UniSRec and SASRec, models of sequences, to what trains them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ...config import Config
from ...data.candidates import CANDIDATES, CANDIDATES_TEXT
from ...errors import UserError
from ...schema import Feature, Schema
from ..evaluators import Evaluator, RankingEvaluator
from ..ranking import TASK
from ..start.freeze import Levels
from .kind import Kind, item_of

if TYPE_CHECKING:
    from ...data.index import FeatureStatistics
    from ...embeddings.tables import TableSpec
    from ...models.towers import TwoTowers

# Of a finetuned sequence model that stops early: epochs, and the cut of the NDCG that it goes by.
MOST_EPOCHS, STOPS_AT = 300, 10


class UniSRecKind(Kind):
    """Reads sequences: the history's ids and texts, the item's id and text. The rest of the data is left alone."""

    reads_catalogue = True
    # As in the paper, whose finetuning leaves positions and blocks of the transformer alone.
    levels = Levels(
        encoders=("text_encoder.", "encoder."),
        adaptors=("adaptor.", "encoder.input_norm.", "repeats."),
        heads=(),
        later=("repeats.",),
    )
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
        from ...models.unisrec import UniSRec

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
        from ...models.unisrec import towers_of

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

    def not_trained_on(
        self, schema: Schema, config: Config, features: Sequence[str], statistics: Mapping[str, FeatureStatistics]
    ) -> str | None:
        longest = max(statistics[name].max_length for name in features if schema.features[name].kind == "ids")
        most = config.model.encoder.max_length
        if longest <= most:
            return None
        return (
            f"training sequences have up to {longest:,} events before their last, and model.encoder.max_length is "
            f"{most:,}: of longer ones the newest {most:,} are read and predicted, the others are not trained on. "
            f"Build the data with --max-length {most}, which cuts sequences into windows, or set "
            f"model.encoder.max_length {longest}."
        )

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
