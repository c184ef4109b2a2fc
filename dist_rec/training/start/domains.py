"""What a domain that the foundation did not know begins as: the mean of those that it knew, the nearest one by what
their items' texts say, or one by name.

Nearness is the cosine of centroids, the mean text vectors of a bounded sample of each domain's rows: the only thing
that two domains without a common user or item can be compared by before anyone has clicked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...config import Config
from ...data.index import Index
from ...data.reader import ShardReader
from ...data.remote import Retry
from ...errors import UserError
from ...schema import Schema
from ...text.store import VectorStore
from .origin import MEAN

NEAREST = "nearest"
# Blocks of a domain that its centroid is of, spread evenly over it.
SAMPLE_BLOCKS = 16


@dataclass(frozen=True)
class Texts:
    """Where the texts of some domains are, and their vectors."""

    root: str
    index: Index
    store: VectorStore
    retry: Retry


def text_features(schema: Schema, features: Sequence[str]) -> list[str]:
    """Whose texts a centroid is of: the items'; the queries' where items have none."""
    for role in ("item", "query"):
        if found := [name for name in schema.select(role=role, kinds=("text",)) if name in features]:
            return found
    return []


def centroid(texts: Texts, features: Sequence[str], domain: str) -> np.ndarray | None:
    """Mean of the unit vectors of a domain's distinct texts, itself a unit vector, float64 `[D]`.

    Of `SAMPLE_BLOCKS` blocks; None where none of their texts has a vector.
    """
    reader = ShardReader(texts.root, texts.index, list(features), retry=texts.retry)
    numbers = [number for number, (shard, _) in enumerate(reader.places) if shard.domain == domain]
    chosen = numbers[:: max(-(-len(numbers) // SAMPLE_BLOCKS), 1)]
    found = []
    for number in chosen:
        rows = reader.rows(number)
        found += [rows.text_keys[rows.texts[name].values] for name in features]
    keys = np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
    keys = keys[texts.store.find(keys)[1]] if len(keys) else keys
    if not len(keys):
        return None
    mean = _unit(texts.store.lookup(keys).astype(np.float64)).mean(0)
    return _unit(mean[None])[0]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def rule_faults(rule: str, known: Sequence[str], new: Sequence[str], configs: Sequence[Config]) -> list[str]:
    """What is wrong with `finetune.domains`, as far as configs tell.

    Args:
        known, new: the foundation's domains, and those beside them.
        configs: the foundation's and the run's.
    """
    if rule == MEAN or rule in known:
        return []
    if rule != NEAREST:
        return [
            f"finetune.domains: {rule!r} is no domain of the foundation: take mean, nearest, or one of "
            f"{', '.join(known)}"
        ]
    if new and any(config.text.store is None for config in configs):
        return [
            "finetune.domains: nearest compares the domains' text vectors, and one of the two runs has no text.store: "
            f"take mean, or name one of {', '.join(known)}"
        ]
    return []


def choose_starts(
    rule: str, known: Sequence[str], new: Sequence[str], old_texts: Texts, new_texts: Texts, features: Sequence[str]
) -> dict[str, str]:
    """What each new domain begins as where `rule` is `nearest`.

    Raises:
        UserError: a domain has no text to be compared by, or the vectors are of two language models.
    """
    instead = f"set finetune.domains to mean, or to one of {', '.join(known)}"
    if not features:
        raise UserError(f"finetune.domains: {rule} compares texts, and neither items nor queries have any: {instead}.")
    if old_texts.store.info.recipe.width != new_texts.store.info.recipe.width or (
        old_texts.store.info.recipe.model_fingerprint != new_texts.store.info.recipe.model_fingerprint
    ):
        raise UserError(
            f"finetune.domains: {rule} compares vectors of {old_texts.store.folder} and {new_texts.store.folder}, "
            f"which are of two language models: {instead}."
        )
    old = {domain: centroid(old_texts, features, domain) for domain in known}
    old = {domain: found for domain, found in old.items() if found is not None}
    if not old:
        raise UserError(
            f"finetune.domains: no text of {old_texts.root} has a vector in {old_texts.store.folder}: {instead}."
        )
    starts = {}
    for domain in new:
        mine = centroid(new_texts, features, domain)
        if mine is None:
            raise UserError(
                f"finetune.domains: no text of domain {domain!r} in {new_texts.root} has a vector in "
                f"{new_texts.store.folder}: embed them, or {instead}."
            )
        starts[domain] = max(old, key=lambda name: float(old[name] @ mine))
    return starts
