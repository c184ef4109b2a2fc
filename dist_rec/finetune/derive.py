"""A foundation's config made into that of a run that finetunes it on a new domain's data.

What is the model stays the foundation's. What was for millions of rows is chosen anew by the number of rows (`Pace`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config, apply_overrides
from ..data.extend import extension_faults
from ..data.index import CATALOGUE, INDEX_NAME, SPLITS, Index, join, read_index
from ..data.remote import Files, Unreadable
from ..errors import UserError
from ..schema import Schema
from ..strict import from_dict, to_dict
from ..training.kinds import kind_of
from ..training.reading import retry_of
from ..training.start.foundation import Foundation, read_foundation

# Steps that an epoch has at least, batches permitting, and that a run has about.
EPOCH_STEPS, RUN_STEPS = 32, 256
SMALLEST_BATCH = 16
STREAMS = 8
# Of a run's steps, how many its warm-up may take.
WARM_UP_SHARE = 0.1


@dataclass(frozen=True)
class Pace:
    """How a run goes through n rows. `batch_size` is a multiple of `streams`."""

    batch_size: int
    streams: int
    epochs: int
    warmup_steps: int

    @classmethod
    def of(cls, rows: int, foundation: Config, ranks: int) -> Pace:
        """The rule.

        * streams: 8, or the number of ranks if they are more;
        * batch: the largest `streams` * 2 ** k that leaves an epoch 32 steps, at least 16 and at most the foundation's;
        * epochs: as many as make 256 steps, at least 1 and at most the kind's, for a few rows seen often are learnt by
          heart;
        * warm-up: the foundation's, at most a tenth of the steps.

        Args:
            rows: to train on.
            foundation: whose batch and warm-up are upper bounds.
            ranks: of the run.
        """
        streams = max(STREAMS, ranks)
        batch = streams
        most = max(min(foundation.data.batch_size, max(rows // EPOCH_STEPS, SMALLEST_BATCH)), streams)
        while batch * 2 <= most:
            batch *= 2
        steps = -(-max(rows, 1) // batch)
        epochs = min(max(-(-RUN_STEPS // steps), 1), kind_of(foundation).finetune_epochs)
        warmup = min(foundation.dense.warmup_steps, int(WARM_UP_SHARE * steps * epochs))
        return cls(batch, streams, epochs, warmup)


@dataclass(frozen=True)
class Splits:
    """A new domain's data sets by split, and the training set's index."""

    roots: dict[str, str]
    train: Index

    @property
    def domains(self) -> list[str]:
        """Those with rows to train on."""
        return [domain for domain in self.train.schema.domains.names if self.train.rows_of(domain)]

    @property
    def rows(self) -> int:
        return self.train.rows


def find_splits(data: str, config: Config) -> Splits:
    """The splits of a new domain's data.

    Args:
        data: the folder (or URL) above `train`, `valid` and `test`, or a training set itself, whose neighbours of
            these names, and its neighbour `catalogue`, are then the others.

    Raises:
        UserError: there is no training set.
    """
    data = data.rstrip("/")
    if _is_data_set(data, config):
        above, _, name = data.rpartition("/")
        roots = {split: join(above or ".", split) for split in (*SPLITS[1:], CATALOGUE)} if name == SPLITS[0] else {}
        roots = {SPLITS[0]: data} | {s: root for s, root in roots.items() if _is_data_set(root, config)}
    else:
        roots = {split: root for split in (*SPLITS, CATALOGUE) if _is_data_set(root := join(data, split), config)}
    if SPLITS[0] not in roots:
        raise UserError(
            f"--data {data}: no {INDEX_NAME} there, nor in {join(data, SPLITS[0])}: name the folder above the splits, "
            "or a training set. `dist-rec shards build --extends` makes one."
        )
    index = read_index(roots[SPLITS[0]], retry_of(config.data))
    if index.split in (*SPLITS[1:], CATALOGUE):
        raise UserError(
            f"--data {data} is the {index.split} split of a data set: name the folder above the splits, or the "
            "training set."
        )
    return Splits(roots, index)


def _is_data_set(root: str, config: Config) -> bool:
    try:
        return Files(root, retry_of(config.data)).size(INDEX_NAME) > 0
    except Unreadable as error:
        if error.missing:
            return False
        raise UserError(f"cannot read {join(root, INDEX_NAME)}: {error}.") from None


@dataclass(frozen=True)
class Wishes:
    """What the command line asks for: `domains` and `freeze` as in `finetune` of the config, and any other key.

    `freeze` None is what is usual for the foundation's kind of model.
    """

    name: str | None = None
    freeze: str | None = None
    domains: str = "mean"
    train_names: Sequence[str] = ()
    keys: dict[str, str] | None = None


def derive(run: Path, data: str, wishes: Wishes, ranks: int) -> tuple[Config, Foundation, Splits]:
    """The config that finetunes the run in folder `run` on `data`.

    Raises:
        UserError: there is no such run or data, the data does not extend the run's, or a key is wrong.
    """
    foundation = read_foundation(str(run))
    splits = find_splits(data, foundation.config)
    check_extends(foundation, splits)
    tree = derived_tree(foundation, splits, splits.rows, ranks)
    tree["run"]["name"] = wishes.name or f"{run.resolve().name}-{_name_of(data)}"
    tree["finetune"] = {
        "run": str(run),
        "domains": wishes.domains,
        "freeze": wishes.freeze or kind_of(foundation.config).usual_freeze,
        "train_names": list(wishes.train_names),
    }
    override(tree, foundation, wishes.keys or {})
    return from_dict(Config, tree, f"{run}/config.yaml with what was given"), foundation, splits


def check_extends(foundation: Foundation, splits: Splits) -> None:
    """Refuse data that does not extend the foundation's, before anything is made of it.

    Raises:
        UserError: every fault.
    """
    schema, root = splits.train.schema, splits.roots["train"]
    if schema != foundation.schema and (faults := extension_faults(schema, foundation.schema)):
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise UserError(
            f"{root} does not extend the data of {foundation.run}:\n{lines}\nBuild it with `dist-rec shards build "
            f"--extends {foundation.config.data.train}`."
        )


def derived_tree(foundation: Foundation, splits: Splits, rows: int, ranks: int) -> dict[str, Any]:
    """The foundation's config for a new domain's data, as a tree of values; without name and `finetune`."""
    tree = to_dict(foundation.config)
    pace = Pace.of(rows, foundation.config, ranks)
    tree["run"]["root"] = str(foundation.run.resolve().parent)
    tree["data"] |= {split: splits.roots.get(split) for split in (*SPLITS, CATALOGUE)}
    tree["data"] |= {"domains": splits.domains, "weights": {}, "temperature": 1.0, "from_watermark": False}
    tree["data"] |= {"batch_size": pace.batch_size, "streams": pace.streams, "drop_last": False}
    left_out = foundation.left_out(splits.train.schema, foundation.config)
    tree["data"]["exclude_features"] = [*tree["data"]["exclude_features"], *left_out]
    tree["tables"]["plan"] = None
    if foundation.tasks():
        tree["model"]["tasks"] = to_dict(foundation.config.model.tasks) or _tasks_of(foundation.schema)
    # It would shrink what the domains without rows have of their own.
    tree["dense"] |= {"weight_decay": 0.0, "warmup_steps": pace.warmup_steps}
    tree["train"] |= {"epochs": pace.epochs, "steps": 0, "evaluate_every": 0, "early_stopping": {}}
    kind_of(foundation.config).finetuned(tree)
    return tree


def override(tree: dict[str, Any], foundation: Foundation, keys: dict[str, str]) -> None:
    """Set what was given in place, and an evaluation's batch to about the foundation's, which the streams divide."""
    config = foundation.config
    tree["evaluate"]["batch_size"] = 0
    apply_overrides(tree, keys)
    streams, batch = tree["data"]["streams"], config.evaluate.batch_size or config.data.batch_size
    if "evaluate.batch_size" not in keys and isinstance(streams, int) and streams > 0:
        tree["evaluate"]["batch_size"] = max(batch // streams, 1) * streams


def _tasks_of(schema: Schema) -> dict[str, Any]:
    return {label: {"label": label} for label in schema.labels}


def _name_of(data: str) -> str:
    """What the folder above the splits is called, however `data` says where it is."""
    *above, last = (data if "://" in data else str(Path(data).resolve())).rstrip("/").split("/")
    return above[-1] if last == SPLITS[0] and above else last
