"""The config: one tree of dataclasses, YAML in, strict, every fault at once.

What a key means is said here and, with its default, beside it in configs/*.yaml. The model's
maths, the data and the engines each read their own branch and nothing else.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Discriminator, Tag, ValidationInfo, field_validator

from ..errors import UserError, nearest
from ..files import write_text
from ..strict import from_dict, parse_yaml, read_yaml, strict, to_dict
from .data import DataConfig, check_multiple
from .finetune import FinetuneConfig
from .model import (
    AdaptationConfig,
    BodyConfig,
    HistoryConfig,
    LoraConfig,
    ModelConfig,
    RegulariserConfig,
    TableConfig,
    TablesConfig,
    TaskConfig,
    TextConfig,
)
from .mvke import (
    GateConfig,
    ItemTowerConfig,
    KernelsConfig,
    MVKEConfig,
    ObjectiveConfig,
    ScoreConfig,
    UserTowerConfig,
)
from .training import CheckpointConfig, DenseConfig, EarlyStoppingConfig, EvaluateConfig, RunConfig, TrainConfig
from .unisrec import AdaptorConfig, ContrastConfig, SequenceEncoderConfig, UniSRecConfig, unisrec_faults

__all__ = [
    "Config",
    "AdaptationConfig",
    "AdaptorConfig",
    "BodyConfig",
    "CheckpointConfig",
    "ContrastConfig",
    "DataConfig",
    "DenseConfig",
    "EarlyStoppingConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "GateConfig",
    "HistoryConfig",
    "ItemTowerConfig",
    "KernelsConfig",
    "LoraConfig",
    "MVKEConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "RegulariserConfig",
    "RunConfig",
    "ScoreConfig",
    "SequenceEncoderConfig",
    "TableConfig",
    "TablesConfig",
    "TaskConfig",
    "TextConfig",
    "TrainConfig",
    "UniSRecConfig",
    "UserTowerConfig",
    "apply_overrides",
    "check_multiple",
    "check_names",
    "load_config",
    "save_config",
]

FOUNDATION = "foundation"


def _kind_of_model(model: Any) -> str:
    """`kind` of `model`, whether it is what YAML gave or made already; one that is no section counts as the default."""
    if isinstance(model, dict):
        return str(model.get("kind", FOUNDATION))
    return getattr(model, "kind", FOUNDATION)


AnyModel = Annotated[
    Annotated[ModelConfig, Tag(FOUNDATION)]
    | Annotated[UniSRecConfig, Tag("unisrec")]
    | Annotated[MVKEConfig, Tag("mvke")],
    Discriminator(_kind_of_model),
]


@strict
class Config:
    """Everything a run needs; the resolved tree is saved as config.yaml in the run folder."""

    data: DataConfig
    run: RunConfig = field(default_factory=RunConfig)
    tables: TablesConfig = field(default_factory=TablesConfig)
    text: TextConfig = field(default_factory=TextConfig)
    model: AnyModel = field(default_factory=ModelConfig)
    dense: DenseConfig = field(default_factory=DenseConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

    @field_validator("train")
    @classmethod
    def _what_stops_it_is_evaluated(cls, train: TrainConfig, before: ValidationInfo) -> TrainConfig:
        if train.early_stopping.metric is not None and "data" in before.data and before.data["data"].valid is None:
            raise ValueError("early_stopping needs data.valid, whose evaluations it goes by")
        return train

    @field_validator("evaluate")
    @classmethod
    def _evaluated_batch_divides(cls, evaluate: EvaluateConfig, before: ValidationInfo) -> EvaluateConfig:
        if "data" in before.data:
            check_multiple(evaluate.batch_size, before.data["data"].streams)
        return evaluate

    @field_validator("model")
    @classmethod
    def _goes_with_the_data(cls, model: AnyModel, before: ValidationInfo) -> AnyModel:
        is_sound = {"data", "text"} <= before.data.keys()
        if is_sound and isinstance(model, UniSRecConfig):
            faults = unisrec_faults(model, before.data["data"], before.data["text"])
            if faults:
                raise ValueError("; ".join(faults))
        return model

    @property
    def run_folder(self) -> Path:
        return Path(self.run.root) / self.run.name


def apply_overrides(data: dict[str, Any], overrides: dict[str, str]) -> None:
    """Set dotted keys in place: `{"train.steps": "100"}`; values are read as YAML.

    Raises:
        UserError: a path runs through something that is no section.
    """
    for path, text in overrides.items():
        *sections, last = path.split(".")
        place = data
        for section in sections:
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise UserError(f"--{path}: {section!r} is a value, not a section.")
        try:
            place[last] = parse_yaml(text, f"--{path}")
        except UserError:
            raise UserError(f"--{path}: {text!r} is not a YAML value; quote it.") from None


def load_config(path: str | Path, overrides: dict[str, str] | None = None) -> Config:
    """Read a config file and apply `--section.key value` overrides.

    Raises:
        UserError: missing file, unknown key, wrong value; every fault is listed.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config is a mapping with sections data, tables, model and so on.")
    apply_overrides(data, overrides or {})
    return from_dict(Config, data, str(path))


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML."""
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))


def check_names(known: list[str], used: list[str], place: str) -> list[str]:
    """Faults for names in `used` that `known` lacks, each with the nearest known name, or with all."""
    there = f" There is {', '.join(known)}." if known else ""
    return [f"{place}: {name!r} is not known.{nearest(name, known) or there}" for name in used if name not in known]
