"""What `finetune` of a config means for a run that is being set up: where it starts, and what of it stays.

Between `prepare`, `setup` and `run`, which ask, and `start`, which knows.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ..config import Config
from ..embeddings.tables import TableSpec, table_specs
from ..errors import UserError
from ..layers.reduction import Reduction
from ..schema import Schema
from .checkpoint import Saved, checkpoints, last_good
from .kinds import kind_of
from .prepared import Prepared
from .resume import check_vectors
from .start.foundation import Foundation, foundation_faults, model_faults, origin_of, read_foundation, with_starts
from .start.freeze import Names, freeze_faults, frozen_tables
from .start.origin import MEAN, Origin, read_origin
from .start.warm_start import own_parameters, shapes_of


def where_it_starts(config: Config, schema: Schema, folder: Path) -> tuple[Origin, Foundation | None]:
    """What a run keeps of its foundation; and that one itself, which a run with a checkpoint no longer needs.

    Args:
        folder: of the run.

    Raises:
        UserError: the foundation cannot be read, or the data set does not extend its.
    """
    if checkpoints(folder / "checkpoints"):
        return read_origin(folder), None
    foundation = read_foundation(config.finetune.run)
    if faults := foundation_faults(foundation, config, schema):
        raise UserError("\n  - ".join(faults))
    return origin_of(foundation, config, schema), foundation


def specs_of(
    schema: Schema, config: Config, features: list[str], origin: Origin | None, unread: Collection[str] = ()
) -> list[TableSpec]:
    """The tables of a run that reads `features` of its data, those that stay as they were marked so.

    Args:
        unread: see `catalogue.unread_tables`.
    """
    kind = kind_of(config)
    schema, features = kind.given(schema, config, features)
    features = kind.looked_up(schema, config, features)
    specs = table_specs(schema, config.tables, features, unread=unread)
    frozen = frozen_tables(config.finetune, [spec.name for spec in specs], origin.tables) if origin else set()
    return table_specs(schema, config.tables, features, frozen, unread) if frozen else specs


def empty_model(prepared: Prepared, schema: Schema) -> nn.Module:
    """The dense model of a schema like the run's, without memory (on the meta device)."""
    config, encoder, width = prepared.config, None, prepared.store.width if prepared.store else 0
    if config.text.trains:
        from ..text.cotrain import cotrained_encoder

        encoder = cotrained_encoder(config.text, Reduction(), empty=True)
        width = encoder.width
    schema, features = prepared.kind.given(schema, config, prepared.features)
    with torch.device("meta"):
        return prepared.kind.model(schema, config, prepared.dims, width, encoder, features, Reduction())


def names_of(prepared: Prepared, model: nn.Module) -> Names:
    """Every name of a finetuned run that may stay or train.

    Args:
        model: its empty one.
    """
    return Names(
        dense=[name for name, _ in model.named_parameters()],
        own=own_parameters(model, prepared.schema, lambda schema: empty_model(prepared, schema)),
        tables=[spec.name for spec in prepared.specs],
        known=prepared.origin.tables,
        levels=prepared.kind.levels,
    )


def finetune_faults(prepared: Prepared) -> list[str]:
    """What of a run whose parts are sound by themselves does not go with where it starts, or with what is to stay.

    Completes `prepared.names`.
    """
    config, model = prepared.config, empty_model(prepared, prepared.schema)
    prepared.names = names = names_of(prepared, model)
    faults = freeze_faults(config.finetune, names, config.text.mode)
    if prepared.foundation is not None:
        # What is not read needs not be filled.
        specs = [spec for spec in prepared.specs if spec.name not in prepared.unread]
        faults += model_faults(
            prepared.foundation, config, specs, shapes_of(model), names.own, prepared.unread, names.levels.later
        )
        try:
            check_vectors(prepared.foundation.saved, prepared.store)
        except UserError as error:
            faults.append(str(error))
    return faults


def start_of(prepared: Prepared) -> Saved | None:
    """The foundation's best or last good checkpoint, for a new run; None where it starts at random. Collective.

    Completes `prepared.origin`: which checkpoint it is, and what further domains begin as.

    Raises:
        UserError: none is whole, or there is nothing to choose a nearest domain by.
    """
    foundation = prepared.foundation
    if foundation is None:
        return None
    saved = last_good(foundation.run / "checkpoints", best=True)
    if saved is None:
        raise UserError(f"finetune.run: {foundation.run} has no checkpoint any more.")
    found: list[Origin | UserError | None] = [None]
    if dist.get_rank() == 0:
        # The others would read the same rows of both data sets.
        try:
            origin = replace(prepared.origin, step=saved.step)
            found = [with_starts(origin, foundation, prepared.config, prepared.indexes["train"], prepared.store)]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    prepared.origin = found[0]
    return saved


def of_managed(prepared: Prepared) -> list[str]:
    """What those who expect new ids to be trained are to know of tables that stay."""
    return [
        f"table {spec.name} stays, and its ids are managed: those that the foundation does not know share a row"
        for spec in prepared.specs
        if spec.managed and spec.frozen
    ]


def how_it_starts(prepared: Prepared, start: Saved, converted: list[str]) -> str:
    """For the reader of a run's first lines."""
    origin, config = prepared.origin, prepared.config
    said = [f"dist-rec: passed over: {fault}" for fault in start.passed_over]
    said.append(f"dist-rec: starting from {start.folder}")
    # What is no domain's own begins as it is.
    for domain, begun in origin.starts.items() if prepared.names.own else ():
        said.append(f"  - domain {domain} begins as {f'the mean of {len(origin.domains)}' if begun == MEAN else begun}")
    if origin.left_out:
        said.append(f"  - left out, for the foundation did not read them: {', '.join(origin.left_out)}")
    said += [f"  - {one}" for one in [*of_managed(prepared), *converted]]
    train, names = prepared.indexes["train"], prepared.schema.domains.names
    without = [d for d in names if not train.rows_of(d) or config.data.domains and d not in config.data.domains]
    if config.dense.weight_decay and without:
        said.append(
            f"  - dense.weight_decay {config.dense.weight_decay:g} shrinks the parameters of domains without rows too "
            f"({', '.join(without)}): set it to 0 to keep them"
        )
    return "\n".join(said)
