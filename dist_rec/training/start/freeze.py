"""Which parameters stay as they were: presets by the levels of the paper, and globs of names.

Names are the dense parameters' own, and `tables.NAME` of embedding tables. Nothing here trains what `text` of the
config holds (a language model's bottom layers, or what its adapters stand beside).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from ...config import FinetuneConfig
from ...errors import nearest

TABLES = "tables."
LANGUAGE_MODEL = "text_encoder."
ADAPTER = ".lora_"


@dataclass(frozen=True)
class Levels:
    """The parts of a model's kind, as beginnings of names: `encoders` (L1), `adaptors`, which are a domain's own though
    not stacked by domain, and `heads`; `later`, what a foundation may lack because pretraining has no use for it."""

    encoders: tuple[str, ...]
    adaptors: tuple[str, ...]
    heads: tuple[str, ...]
    later: tuple[str, ...] = ()


@dataclass(frozen=True)
class Names:
    """Everything that may stay or train.

    Attributes:
        dense: of the dense parameters.
        own: those of them that are stacked by domain.
        tables: of the embedding tables.
        known: those of them that the foundation has; the others hold ids that are new.
        levels: of the model's kind.
    """

    dense: Sequence[str]
    own: Collection[str]
    tables: Sequence[str]
    known: Collection[str]
    levels: Levels

    @property
    def all(self) -> list[str]:
        return [*self.dense, *(TABLES + table for table in self.tables)]


def _is_frozen(preset: str, name: str, names: Names) -> bool:
    """What a preset says of one name."""
    if preset == "none":
        return False
    if name.startswith(TABLES):
        return name.removeprefix(TABLES) in names.known
    levels, own = names.levels, name in names.own or name.startswith(names.levels.adaptors)
    if preset == "L0":
        return False
    if preset == "L0+L1":
        return name.startswith(levels.encoders) and not own
    if preset == "head":
        return not name.startswith(levels.heads)
    adapter = preset == "lora" and name.startswith(LANGUAGE_MODEL) and ADAPTER in name
    return not (own or adapter)


def frozen_names(config: FinetuneConfig, names: Names) -> set[str]:
    """The names that stay as they were: `freeze`, then `freeze_names`, then `train_names`, the later winning."""
    frozen = {name for name in names.all if _is_frozen(config.freeze, name, names)}
    frozen |= _matched(config.freeze_names, names.all)
    return frozen - _matched(config.train_names, names.all)


def frozen_tables(config: FinetuneConfig, tables: Sequence[str], known: Collection[str]) -> set[str]:
    """Names of the tables that stay as they were."""
    names = Names(dense=(), own=(), tables=tables, known=known, levels=Levels((), (), ()))
    frozen = frozen_names(config, names)
    return {name.removeprefix(TABLES) for name in frozen}


def _matched(globs: Sequence[str], names: Sequence[str]) -> set[str]:
    return {name for name in names for glob in globs if fnmatchcase(name, glob)}


def freeze_faults(config: FinetuneConfig, names: Names, text_mode: str) -> list[str]:
    """What is wrong with what a config wants to stay; empty if nothing is."""
    faults = []
    if config.freeze == "lora" and text_mode != "lora":
        faults.append(
            f"finetune.freeze: lora trains the adapters of a language model, and text.mode is {text_mode}: set "
            "text.mode lora, or take adaptor, which trains the domains' own parameters alone"
        )
    for key in ("freeze_names", "train_names"):
        for glob in getattr(config, key):
            if not _matched([glob], names.all):
                hint = nearest(glob, names.all) or " `dist-rec finetune ... --dry-run` shows the names."
                faults.append(f"finetune.{key}: {glob!r} is the name of no parameter and no table.{hint}")
    if not faults and frozen_names(config, names).issuperset(names.dense):
        faults.append(
            f"finetune.freeze {config.freeze} with finetune.freeze_names leaves no dense parameter to train, and the "
            "engine needs one: name some in finetune.train_names"
        )
    return faults


def freeze(model: nn.Module, frozen: Collection[str]) -> None:
    """Take the parameters of these names out of training. Comes before the engine, which is made for the others."""
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
