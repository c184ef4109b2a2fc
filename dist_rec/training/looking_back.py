"""The test rows of the runs that came before, evaluated before and after a run that started from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..data.index import Index
from ..errors import UserError
from ..text.store import VectorStore
from .prepared import Prepared
from .resume import vectors_differ
from .start.old_domains import AFTER, BEFORE, KNOWN, SKIPPED, has_rows, read_old, write_old
from .start.origin import OldTest
from .trainer import Trainer


def add_old_tests(prepared: Prepared) -> list[str]:
    """Let a run read the test rows of its foundation and of the runs before that, as `old_tests`. Collective.

    Returns:
        Which it does not and why not, in words; nothing of a run that started at random.
    """
    indexes, faults = {}, {}
    for split, old in prepared.old_tests.items():
        try:
            indexes[split] = _read(prepared, split, old)
        except UserError as error:
            faults[split] = str(error)
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, faults)
    faults = {split: fault for some in reversed(everyone) for split, fault in some.items()}
    prepared.indexes |= {split: index for split, index in indexes.items() if split not in faults}
    return [f"{old.run}: {faults[split]}" for split, old in prepared.old_tests.items() if split in faults]


def _read(prepared: Prepared, split: str, old: OldTest) -> Index:
    """The index of an earlier run's test rows; opens the store of their text vectors.

    Raises:
        UserError: they cannot be read, or not by this run's model.
    """
    text, store = prepared.config.text, prepared.store
    if prepared.kind.reads_catalogue:
        raise UserError("a sequence model ranks the items of its own catalogue, and those rows ask for others.")
    if old.test is None:
        raise UserError("its config names no data.test.")
    index = prepared.read(split)
    if text.mode == "frozen":
        if old.store is not None and Path(old.store).resolve() != Path(text.store).resolve():
            store = VectorStore.open(old.store)
        store.check_tokenizer(index.tokenizer)
        if differs := vectors_differ(prepared.store.info.recipe, store.info.recipe):
            raise UserError(f"the text vectors in {old.store} were made {differs}, as those in {text.store} are.")
        prepared.old_stores[split] = store
    if text.trains and index.tokenizer != prepared.indexes["train"].tokenizer:
        raise UserError(f"the token ids of {old.test} are of another tokenizer.")
    return index


class LookingBack:
    """Evaluates the earlier runs' test rows around a run's training. Made, and its methods called, by all ranks.

    Args:
        folder: of the run.
        trainer: of the run.
        skipped: which of those rows are not read, and why.
    """

    def __init__(self, folder: Path, trainer: Trainer, skipped: list[str]) -> None:
        self.folder, self.trainer, self.skipped = folder, trainer, skipped
        self.splits = [split for split in trainer.prepared.old_tests if split in trainer.prepared.indexes]

    def before(self) -> None:
        """Before the first step. Collective."""
        self._keep(BEFORE, {})

    def after(self) -> None:
        """After the last step. Collective."""
        self._keep(AFTER, {BEFORE: held[BEFORE]} if BEFORE in (held := read_old(self.folder)) else {})

    def _keep(self, when: str, held: dict[str, Any]) -> None:
        found = {when: {"domains": self._evaluate()}} if self.splits else {}
        if self.trainer.process.is_main:
            skipped = {SKIPPED: " ".join(self.skipped)} if self.skipped else {}
            write_old(self.folder, skipped | held | found | {KNOWN: self.trainer.prepared.origin.domains})

    def _evaluate(self) -> dict[str, Any]:
        """Metrics by domain and task, a domain's on the test rows of the nearest run that has some of it."""
        domains: dict[str, Any] = {}
        for split in self.splits:
            for domain, tasks in self.trainer.evaluate(split)["domains"].items():
                if not has_rows(domains.get(domain, {})):
                    domains[domain] = tasks
        return domains
