"""May a config go on from an earlier run, and would the result be the same to the bit?

A changed key that would make the run another one (its order of rows, its parameters) is refused;
any other is allowed and said. Reads configs and versions, no tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..config import Config, load_config
from ..errors import UserError
from ..launch import is_restart
from ..strict import from_dict, strict, to_dict
from ..text.store import Recipe, VectorStore
from .checkpoint import Saved, checkpoints
from .early_stopping import Standing
from .passes import Position
from .process import Process
from .summary import Summary

FIXED = (
    "run.seed",
    "data.batch_size",
    "data.streams",
    "data.order",
    "data.shuffle_window",
    "data.domains",
    "data.weights.*",
    "data.temperature",
    "data.drop_last",
    "data.exclude_features",
    "tables.dim",
    "tables.optimizer",
    "tables.managed.policy",
    "tables.pooling",
    "tables.overrides.*.dim",
    "tables.overrides.*.size",
    "tables.overrides.*.hash",
    "tables.overrides.*.managed",
    "text.mode",
    "text.model",
    "text.pooling",
    "text.freeze_layers",
    "text.lora.*",
    "model.*",
    "dense.optimizer",
    "finetune.*",
)
# What changes neither rows, nor parameters, nor how they are computed.
IDLE = (
    "run.name",
    "run.root",
    "data.train",
    "data.valid",
    "data.test",
    "data.from_watermark",
    "data.read_ahead",
    "data.damaged",
    "data.max_damaged_share",
    "data.retries",
    "data.retry_seconds",
    "data.timeout_seconds",
    "text.missing",
    "text.store",
    "train.*",
    "checkpoint.*",
    "evaluate.*",
)
# Of `train`, what stays so where the schedule reaches to the end of the run.
TRAIN_IDLE = (
    "train.log_every",
    "train.evaluate_every",
    "train.early_stopping.*",
    "train.timeout_minutes",
    "train.resume",
    "train.record_rows",
)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


@dataclass(frozen=True)
class Change:
    """One config key that differs from the earlier run's."""

    key: str
    before: Any
    now: Any

    def among(self, patterns: tuple[str, ...]) -> bool:
        return any(fnmatch(self.key, pattern) or fnmatch(f"{self.key}.", pattern) for pattern in patterns)

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.now)}"


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Every key that differs between two resolved configs."""
    old, new = _flat(before), _flat(now)
    keys = sorted(old.keys() | new.keys())
    return [Change(k, old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)]


def find_earlier(config: Config) -> Path | None:
    """The run folder if it holds a run that this config may go on with, None if it holds none.

    One that ended before its first checkpoint has left nothing to go on with, and may be followed by any.

    Raises:
        UserError: it holds a run of another config, or `train.resume` is `never`.
    """
    folder = config.run_folder
    if not checkpoints(folder / "checkpoints"):
        return None
    if not (folder / "config.yaml").exists():
        raise UserError(
            f"{folder} has checkpoints but no config.yaml, which says of what: restore it, choose another --run.name, "
            "or remove that folder."
        )
    if config.train.resume == "never" and not is_restart():
        raise UserError(f"{folder} holds a run already: choose another --run.name, or remove that folder.")
    differ = changes(to_dict(load_config(folder / "config.yaml")), to_dict(config))
    refused = [change for change in differ if change.among(FIXED)]
    if refused:
        lines = "\n".join(f"  - {change}" for change in refused)
        raise UserError(
            f"{folder} holds a run that this config cannot go on with, for these keys make it another one:\n{lines}\n"
            "Restore them, or choose another --run.name."
        )
    return folder


def differences(before: dict[str, Any], now: dict[str, Any], config: list[Change], schedule: str) -> list[str]:
    """What keeps a resumed run from being the uninterrupted one to the bit; empty if nothing does.

    Args:
        before, now: world size, thread count, versions and so on, by name.
        config: what changed in the config.
        schedule: of the learning rates, which may depend on how long the run is.
    """
    idle = IDLE if schedule == "constant" else (*(k for k in IDLE if k != "train.*"), *TRAIN_IDLE)
    said = [f"{name}: {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]
    return said + [str(change) for change in config if not change.among(idle)]


@strict
class State:
    """What a checkpoint holds beside tensors.

    `vectors` is how the frozen text vectors that it read were made; `early_stopping` what its evaluations have shown.
    """

    position: Position | None = None
    summary: Summary = field(default_factory=Summary)
    vectors: Recipe | None = None
    early_stopping: Standing | None = None


def state_of(earlier: Saved | None) -> State:
    """The checked state of a checkpoint; an empty one without.

    Raises:
        UserError: it is not a training's state, or not that of its step.
    """
    if earlier is None:
        return State()
    state = from_dict(State, earlier.manifest.state, f"the state in {earlier.folder}")
    if state.position is None or state.position.step != earlier.step:
        raise UserError(
            f"the state in {earlier.folder} is not that of step {earlier.step}: restore an older checkpoint."
        )
    return state


def check_vectors(saved: Saved | None, store: VectorStore | None) -> None:
    """Refuse to read a checkpoint's model with text vectors of another kind than it was trained on.

    Precision may differ, and where texts were cut. Checkpoints from before this was kept are taken as they are.

    Raises:
        UserError: the vectors of `store` are another language model's, or pooled otherwise.
    """
    held = saved.manifest.state.get("vectors") if saved is not None else None
    if held is None or store is None:
        return
    differs = vectors_differ(from_dict(Recipe, held, f"the state in {saved.folder}"), store.info.recipe)
    if differs:
        raise UserError(
            f"{saved.folder} was trained on other text vectors: those in {store.folder} were made {differs}. Name its "
            "own store in text.store, or embed the texts anew."
        )


def vectors_differ(then: Recipe, now: Recipe) -> str | None:
    """How text vectors of `now` were made otherwise than a model knows them, in words; None where it may read them."""
    if then.model_fingerprint != now.model_fingerprint:
        return "by another language model"
    return f"by pooling {now.pooling} instead of {then.pooling}" if then.pooling != now.pooling else None


def plan_to_keep(earlier: Saved | None, process: Process, config: Config) -> dict[str, Any] | None:
    """The checkpoint's plan where it still holds: the same ranks, the same wishes."""
    if earlier is None or earlier.manifest.environment.get("world size") != process.world_size:
        return None
    asked = [change.key for change in changes(earlier.manifest.config, to_dict(config))]
    return None if any(key.startswith("tables.") for key in asked) else earlier.manifest.plan
