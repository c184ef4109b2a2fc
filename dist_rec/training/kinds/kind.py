"""What every kind of model is asked: which features of the data it reads, which of those it looks up in tables, what
else it is given beside them, how it is built, and how it is measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from ...config import Config
from ...layers.reduction import Reduction
from ...schema import Schema
from ..evaluators import Evaluator
from ..start.freeze import Levels

if TYPE_CHECKING:
    from ...data.index import FeatureStatistics
    from ...embeddings.tables import TableSpec
    from ...models.towers import TwoTowers


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

    def not_trained_on(
        self, schema: Schema, config: Config, features: Sequence[str], statistics: Mapping[str, FeatureStatistics]
    ) -> str | None:
        """What of the training rows it leaves aside, in words; None where nothing.

        Args:
            features: of the data, those that it reads.
            statistics: of the training rows, by feature.
        """
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


def item_of(schema: Schema, features: Sequence[str]) -> str | None:
    """The feature among `features` that is the item's identity."""
    return next(
        (n for n in features if (f := schema.features[n]).role == "item" and f.kind == "id" and f.aspect == "id"), None
    )
