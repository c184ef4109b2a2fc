"""`Prepared`: a checked config with what it names, before any ranks have met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..config import Config
from ..data.catalogue import Catalogue
from ..data.extend import as_extended
from ..data.index import CATALOGUE, Index, read_index
from ..embeddings.tables import TableSpec
from ..schema import Schema
from ..text.onthefly import FrozenVectors, OnTheFly, SideBySide
from ..text.store import VectorStore
from .kinds import Kind, kind_of
from .reading import retry_of
from .start.foundation import Foundation
from .start.freeze import Names
from .start.origin import OldTest, Origin


@dataclass
class Prepared:
    """A checked config with what it names.

    `features` are those that this run reads; `indexes` has `train` and, as configured, `valid`
    and `test`, of which the run sees what `view` makes of them, and `CATALOGUE`. Of a run that starts from another,
    `origin` is what it keeps of that one, `foundation` that one itself, as long as the run has no checkpoint of its
    own, and `names` all that may stay or train; `indexes` may then have the test rows of that one and those before it
    too (`old_tests`), with the text vectors of each in `old_stores`. `missing` makes the vectors that `store` lacks,
    where text.missing is encode; `dropped` has those of texts with words dropped. `catalogue` is read when it is first
    asked for, and `asked` counts how often the training rows ask for its items; `unread` are tables that have one row
    alone (`catalogue.unread_tables`).
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
    dropped: VectorStore | None = None
    catalogue: Catalogue | None = None
    asked: np.ndarray | None = None
    unread: frozenset[str] = frozenset()

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
        if split == CATALOGUE:
            return index
        return as_extended(index, self.schema) if split in self.old_tests else self.view(index)

    def vectors(self, split: str, training: bool = False) -> FrozenVectors | SideBySide | None:
        """Where the batches of a split get their texts' frozen vectors from.

        Args:
            training: whether a model is trained on them, which may read texts with words dropped, too.
        """
        store = self.old_stores.get(split, self.store)
        if store is None:
            return None
        missing = self.missing if store.info.recipe == self.store.info.recipe else None
        whole = FrozenVectors(store, self.root(split), missing and missing.load())
        if not training or self.dropped is None:
            return whole
        return SideBySide(whole, FrozenVectors(self.dropped, self.root(split)))

    @property
    def kind(self) -> Kind:
        """Of model."""
        return kind_of(self.config)

    @property
    def given(self) -> tuple[Schema, list[str]]:
        """The schema and features as the model and its tables see them (`Kind.given`)."""
        return self.kind.given(self.schema, self.config, self.features)

    @property
    def num_items(self) -> int:
        """Of the catalogue; 0 without one."""
        return self.indexes[CATALOGUE].rows if CATALOGUE in self.indexes else 0

    @property
    def reads_tokens(self) -> bool:
        """Whether texts' tokens are read: for a language model that trains, or that makes what a store lacks."""
        return self.config.text.trains or self.missing is not None

    @property
    def dims(self) -> dict[str, int]:
        """Width of every table."""
        return {spec.name: spec.dim for spec in self.specs}

    def reopen_store(self) -> None:
        """See the text vectors that were added since."""
        if self.store is not None:
            self.store = VectorStore.open(self.config.text.store)
        if self.dropped is not None:
            self.dropped = VectorStore.open(self.config.text.dropped_store)
