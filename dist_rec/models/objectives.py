"""The objectives of MVKE: tasks that may presuppose one another, and what their probabilities are of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import MVKEConfig, ObjectiveConfig, check_names
from ..data.batch import Batch
from ..errors import UserError
from ..schema import Schema
from .foundation import EMBEDDING_L2, TOTAL


def both(first: Tensor, second: Tensor) -> Tensor:
    """The logit of sigma(first) * sigma(second): -log(e^-a + e^-b + e^-(a + b)), `[B]`."""
    return -torch.logsumexp(torch.stack([-first, -second, -first - second]), 0)


def tasks_of(schema: Schema, config: MVKEConfig) -> dict[str, ObjectiveConfig]:
    """The tasks of a config, by name; without any, one for each label.

    Raises:
        UserError: a task names no label, or is called like an entry of the returned losses.
    """
    tasks = config.tasks or {label: ObjectiveConfig(label=label) for label in schema.labels}
    faults = [f"model.tasks: no task may be called {name!r}" for name in (EMBEDDING_L2, TOTAL) if name in tasks]
    for task, spec in tasks.items():
        faults += check_names(list(schema.labels), [spec.label], f"model.tasks.{task}.label")
    if faults:
        raise UserError("\n".join(faults))
    return tasks


def targets_of(
    tasks: Mapping[str, ObjectiveConfig], maxima: Mapping[str, float], batch: Batch
) -> tuple[Tensor, Tensor]:
    """What the tasks' probabilities are of: label / maximum, times that of the task that one presupposes.

    Args:
        tasks: of `tasks_of`.
        maxima: by task, of its label.

    Returns:
        `[B, T]`, and bool `[B, T]`, which of them are known. Where what a task presupposes did not happen it is known
        to be 0, whether its own label is or not.
    """
    own = {task: batch.labels[spec.label] / maxima[task] for task, spec in tasks.items()}
    known = {task: batch.label_valid[spec.label] for task, spec in tasks.items()}
    targets, valid = [], []
    for task, spec in tasks.items():
        if spec.given is None:
            targets.append(own[task])
            valid.append(known[task])
        else:
            first = own[spec.given]
            targets.append(first * own[task])
            valid.append(known[spec.given] & (known[task] | (first == 0)))
    return torch.stack(targets, 1), torch.stack(valid, 1)
