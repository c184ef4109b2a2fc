"""The foundation's own test rows, evaluated before and after a run that started from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..errors import UserError
from ..text.store import VectorStore
from .prepared import Prepared
from .start.old_domains import AFTER, BEFORE, KNOWN, SKIPPED, read_old, write_old
from .start.origin import OLD
from .trainer import Trainer


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
        if prepared.kind.reads_catalogue:
            raise UserError("a sequence model ranks the items of its own catalogue, and those rows ask for others.")
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
            write_old(self.folder, held | found | {KNOWN: self.trainer.prepared.origin.domains})
