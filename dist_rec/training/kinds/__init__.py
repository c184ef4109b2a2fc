"""The kinds of models: the only place that knows which classes there are, and how they differ to what trains them."""

from __future__ import annotations

from ...config import Config, ModelConfig, MVKEConfig, UniSRecConfig
from .foundation import FoundationKind
from .kind import Kind, item_of
from .mvke import MVKEKind
from .unisrec import UniSRecKind

__all__ = ["KINDS", "Kind", "item_of", "kind_of"]

KINDS: dict[type, Kind] = {ModelConfig: FoundationKind(), UniSRecConfig: UniSRecKind(), MVKEConfig: MVKEKind()}


def kind_of(config: Config) -> Kind:
    """The kind of model that a config has."""
    return KINDS[type(config.model)]
