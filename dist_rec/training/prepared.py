"""`Prepared`: a checked config with what it names, before any ranks have met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..config import Config
from ..data.extend import as_extended
from ..data.index import Index, read_index
from ..embeddings.tables import TableSpec
from ..schema import Schema
from ..text.onthefly import FrozenVectors, OnTheFly
from ..text.store import VectorStore
from .reading import retry_of
from .start.foundation import Foundation
from .start.freeze import Names
from .start.origin import OldTest, Origin


@dataclass
class Prepared:
    """A checked config with what it names.

    `features` are those that this run reads; `indexes` has `train` and, as configured, `valid`
    and `test`, of which the run sees what `view` makes of them. Of a run that starts from another, `origin` is what it
    keeps of that one, `foundation` that one itself, as long as the run has no checkpoint of its own, and `names` all
    that may stay or train; `indexes` may then have the test rows of that one and those before it too (`old_tests`),
    with the text vectors of each in `old_stores`. `missing` makes the vectors that `store` lacks, where text.missing is
    encode.
    """

    config: Config
    schema: Schema
    indexes: dict[str, Index]
    features: list[str]
    specs: list[TableSpec]
    store: VectorStore | None
    view: Callable[[Index], Index]
    origin: Origin | None
    foundation: Foundation | None
    names: Names | None = None
    old_stores: dict[str, VectorStore] = field(default_factory=dict)
    missing: OnTheFly | None = None

    @property
    def old_tests(self) -> dict[str, OldTest]:
        """Test rows of the runs that came before, by split."""
        return self.origin.old_tests() if self.origin else {}

    def root(self, split: str) -> str:
        old = self.old_tests.get(split)
        return old.test if old else getattr(self.config.data, split)

    def read(self, split: str) -> Index:
        """What the run sees of a split as it is now."""
        index = read_index(self.root(split), retry_of(self.config.data))
        return as_extended(index, self.schema) if split in self.old_tests else self.view(index)

    def vectors(self, split: str) -> FrozenVectors | None:
        """Where the batches of a split get their texts' frozen vectors from."""
        store = self.old_stores.get(split, self.store)
        if store is None:
            return None
        missing = self.missing if store.info.recipe == self.store.info.recipe else None
        return FrozenVectors(store, self.root(split), missing and missing.load())

    @property
    def dims(self) -> dict[str, int]:
        """Width of every table."""
        return {spec.name: spec.dim for spec in self.specs}

    def reopen_store(self) -> None:
        """See the text vectors that were added since."""
        if self.store is not None:
            self.store = VectorStore.open(self.config.text.store)
