"""The dense model filled from a foundation's checkpoint, with rows for the domains that it did not know.

A parameter that is stacked by domain has the foundation's rows first, as its domains come first; a further row is
the mean of those, or a copy of one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import nn

from ...errors import UserError
from ...schema import Schema
from ..checkpoint import Saved
from ..checkpoint.boxes import Box
from ..checkpoint.dense import buffers
from ..checkpoint.manifest import BUFFER, PARAMETER
from .freeze import LANGUAGE_MODEL

Shapes = dict[str, tuple[int, ...]]
MOST_SHOWN = 5
# What peft puts into the name of a layer that gets an adapter.
BESIDE_ADAPTER = ".base_layer."


def shapes_of(model: nn.Module) -> Shapes:
    """Shape of every parameter and buffer that a checkpoint holds."""
    return {name: tuple(one.shape) for name, one in [*model.named_parameters(), *buffers(model).items()]}


def own_parameters(model: nn.Module, schema: Schema, build: Callable[[Schema], nn.Module]) -> set[str]:
    """Names of the parameters that are stacked by domain: those that one more domain makes longer.

    Args:
        model: of `schema`.
        build: the model of a schema, as cheaply as can be (on the meta device).
    """
    names = schema.domains.names
    more = replace(schema, domains=replace(schema.domains, names=[*names, "one more " + "".join(names)]))
    before, after = shapes_of(model), shapes_of(build(more))
    return {name for name, shape in before.items() if after[name] != shape}


def stored_name(name: str, found: Collection[str]) -> str:
    """The name under which a checkpoint has a parameter of a model: without what an adapter beside it adds, where
    that layer had none when it was saved."""
    if name in found or not name.startswith(LANGUAGE_MODEL):
        return name
    return name.replace(BESIDE_ADAPTER, ".")


def shape_faults(
    wanted: Shapes, own: Collection[str], saved: Saved, known_domains: int, later: tuple[str, ...] = ()
) -> list[str]:
    """Which dense parameters of a model the checkpoint cannot fill; a handful, and how many more.

    The language model's own may be missing: then they are as `text.model` has them.

    Args:
        wanted: of the model.
        own: names of those that are stacked by domain.
        known_domains: K of the checkpoint.
        later: beginnings of further names that may be missing: they start as in a run from scratch.
    """
    found = {name: tuple(info.shape) for name, info in saved.manifest.dense.items()}
    faults = []
    read = {name: stored_name(name, found) for name in wanted}
    for name, shape in wanted.items():
        there = found.get(read[name])
        if there is None:
            if not name.startswith((LANGUAGE_MODEL, *later)):
                faults.append(f"{name} is not in the foundation's checkpoint")
        elif there != (expected := (known_domains, *shape[1:]) if name in own else shape):
            faults.append(f"{name} is {list(there)} in the foundation's checkpoint, this config wants {list(expected)}")
    faults += [
        f"{name} is in the foundation's checkpoint, this config has no use for it"
        for name in found.keys() - set(read.values())
    ]
    faults.sort()
    more = [f"and {len(faults) - MOST_SHOWN} more parameters"] if len(faults) > MOST_SHOWN else []
    return faults[:MOST_SHOWN] + more


def fill_dense(
    saved: Saved,
    model: nn.Module,
    own: Collection[str],
    known_domains: int,
    starts: list[int | None],
    later: tuple[str, ...] = (),
) -> None:
    """Fill an unsharded model. Every rank reads the whole of it.

    Args:
        saved: the foundation's checkpoint, verified.
        own: names of the parameters that are stacked by domain.
        known_domains: K of the checkpoint.
        starts: of every further domain, the number of the one that it begins as; None for the mean of all.
        later: see `shape_faults`.

    Raises:
        UserError: the checkpoint is of another model.
    """
    if faults := shape_faults(shapes_of(model), own, saved, known_domains, later):
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise UserError(f"the model of {saved.folder} is not that of this config:\n{lines}")
    tensors = [(name, PARAMETER, one.data) for name, one in model.named_parameters()]
    tensors += [(name, BUFFER, one) for name, one in buffers(model).items()]
    stored = saved.manifest.dense
    for name, kind, tensor in tensors:
        source = stored_name(name, stored)
        if source not in stored or not tensor.numel():
            continue
        target = tensor[:known_domains] if name in own else tensor
        flat = target.view(-1)
        saved.fill(source, stored[source], kind, Box.whole(flat.shape), flat)
        if name in own:
            with torch.no_grad():
                for row, start in enumerate(starts, known_domains):
                    tensor[row] = target.mean(0) if start is None else target[start]
