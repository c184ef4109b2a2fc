"""What `finetune` of a config means for a run that is being set up: where it starts, and what of it stays.

Between `setup` and `run`, which ask, and `finetune`, which knows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..config import Config
from ..embeddings.tables import TableSpec, table_specs
from ..errors import UserError
from ..finetune.foundation import Foundation, foundation_faults, model_faults, origin_of, read_foundation, with_starts
from ..finetune.freeze import Names, freeze_faults, frozen_tables
from ..finetune.old_domains import AFTER, BEFORE, SKIPPED, read_old, write_old
from ..finetune.origin import MEAN, OLD, Origin, read_origin
from ..finetune.warm_start import own_parameters, shapes_of
from ..layers.reduction import Reduction
from ..models.foundation import FoundationModel
from ..schema import Schema
from ..text.store import VectorStore
from .checkpoint import Saved, checkpoints, last_good

if TYPE_CHECKING:
    from .setup import Prepared
    from .trainer import Trainer


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


def specs_of(schema: Schema, config: Config, features: list[str], origin: Origin | None) -> list[TableSpec]:
    """The tables of a run, those that stay as they were marked so."""
    specs = table_specs(schema, config.tables, features)
    frozen = frozen_tables(config.finetune, [spec.name for spec in specs], origin.tables) if origin else set()
    return table_specs(schema, config.tables, features, frozen) if frozen else specs


def empty_model(prepared: Prepared, schema: Schema) -> FoundationModel:
    """The dense model of a schema like the run's, without memory (on the meta device)."""
    config, encoder, width = prepared.config, None, prepared.store.width if prepared.store else 0
    if config.text.trains:
        from ..text.cotrain import cotrained_encoder

        encoder = cotrained_encoder(config.text, Reduction(), empty=True)
        width = encoder.width
    with torch.device("meta"):
        return FoundationModel(schema, config.model, prepared.dims, width, encoder, prepared.features, Reduction())


def names_of(prepared: Prepared) -> Names:
    """Every name of a finetuned run that may stay or train."""
    model = empty_model(prepared, prepared.schema)
    return Names(
        dense=[name for name, _ in model.named_parameters()],
        own=own_parameters(lambda schema: empty_model(prepared, schema), prepared.schema),
        tables=[spec.name for spec in prepared.specs],
        known=prepared.origin.tables,
    )


def finetune_faults(prepared: Prepared) -> list[str]:
    """What of a run whose parts are sound by themselves does not go with where it starts, or with what is to stay."""
    config, names = prepared.config, names_of(prepared)
    faults = freeze_faults(config.finetune, names, config.text.mode)
    if prepared.foundation is not None:
        wanted = shapes_of(empty_model(prepared, prepared.schema))
        faults += model_faults(prepared.foundation, config, prepared.specs, wanted, names.own)
    return faults


def start_of(prepared: Prepared) -> Saved | None:
    """The foundation's last good checkpoint, for a new run; None where it starts at random. Collective.

    Completes `prepared.origin`: which checkpoint it is, and what further domains begin as.

    Raises:
        UserError: none is whole, or there is nothing to choose a nearest domain by.
    """
    foundation = prepared.foundation
    if foundation is None:
        return None
    saved = last_good(foundation.run / "checkpoints")
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


def how_it_starts(prepared: Prepared, start: Saved, converted: list[str]) -> str:
    """For the reader of a run's first lines."""
    origin, config = prepared.origin, prepared.config
    said = [f"dist-rec: passed over: {fault}" for fault in start.passed_over]
    said.append(f"dist-rec: starting from {start.folder}")
    for domain, begun in origin.starts.items():
        said.append(f"  - domain {domain} begins as {f'the mean of {len(origin.domains)}' if begun == MEAN else begun}")
    if origin.left_out:
        said.append(f"  - left out, for the foundation did not read them: {', '.join(origin.left_out)}")
    said += [f"  - {one}" for one in converted]
    train, names = prepared.indexes["train"], prepared.schema.domains.names
    without = [d for d in names if not train.rows_of(d) or config.data.domains and d not in config.data.domains]
    if config.dense.weight_decay and without:
        said.append(
            f"  - dense.weight_decay {config.dense.weight_decay:g} shrinks the parameters of domains without rows too "
            f"({', '.join(without)}): set it to 0 to keep them"
        )
    return "\n".join(said)


def add_old_test(prepared: Prepared) -> str | None:
    """Let a run read the foundation's own test rows, as `OLD`. Collective.

    Returns:
        Why not, in words; None where it does, or started at random.
    """
    origin, config = prepared.origin, prepared.config
    if origin is None:
        return None
    fault = None
    try:
        if origin.test is None:
            raise UserError("the foundation's config names no data.test.")
        index = prepared.read(OLD)
        if config.text.mode == "frozen":
            same = origin.store is None or Path(origin.store).resolve() == Path(config.text.store).resolve()
            prepared.old_store = prepared.store if same else VectorStore.open(origin.store)
            prepared.old_store.check_tokenizer(index.tokenizer)
            if prepared.old_store.width != prepared.store.width:
                raise UserError(f"the vectors in {origin.store} are not as wide as those in {config.text.store}.")
        if config.text.trains and index.tokenizer != prepared.indexes["train"].tokenizer:
            raise UserError(f"the token ids of {origin.test} are of another tokenizer.")
    except UserError as error:
        fault = str(error)
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, fault)
    fault = next((one for one in everyone if one is not None), None)
    if fault is None:
        prepared.indexes[OLD] = index
    return fault


class LookingBack:
    """Evaluates the foundation's own test rows around a run's training. Made, and its methods called, by all ranks.

    Args:
        folder: of the run.
        trainer: of the run.
        why_not: why those rows are not read; None where they are.
    """

    def __init__(self, folder: Path, trainer: Trainer, why_not: str | None) -> None:
        self.folder, self.trainer, self.why_not = folder, trainer, why_not

    def before(self) -> None:
        """Before the first step. Collective."""
        self._keep({SKIPPED: self.why_not} if self.why_not else {BEFORE: self.trainer.evaluate(OLD)})

    def after(self) -> None:
        """After the last step. Collective."""
        if self.why_not:
            self._keep({SKIPPED: self.why_not})
        else:
            self._keep({AFTER: self.trainer.evaluate(OLD)})

    def _keep(self, found: dict[str, Any]) -> None:
        if self.trainer.process.is_main:
            held = {} if BEFORE in found else {k: v for k, v in read_old(self.folder).items() if k != SKIPPED}
            write_old(self.folder, held | found)
