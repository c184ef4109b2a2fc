"""What a config trains on what data, as far as planning needs to know: tables, lengths, texts, rows of a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from ..config import Config
from ..data.index import FeatureStatistics
from ..data.vocabulary import undivided
from ..embeddings.tables import TableSpec
from ..schema import Schema
from ..text.store import STORE_NAME, read_store_info

# Of a text vector where the store is not built yet: MiniLM's.
USUAL_TEXT_WIDTH = 384
# Tokens of a text that nobody has counted.
USUAL_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A checked config, and what is known of its data.

    Attributes:
        features: that the model reads.
        lengths: mean number of ids, tokens or texts a row, by feature.
        text_width: of a text vector; 0 without texts or where the language model says.
        texts: per text feature, the share of rows that have one.
        tokens: mean tokens of one text.
    """

    config: Config
    schema: Schema
    features: list[str]
    specs: list[TableSpec]
    lengths: dict[str, float]
    text_width: int
    texts: dict[str, float]
    tokens: float

    def with_tables(self, changes: dict[str, dict[str, Any]]) -> Self:
        """The same with other fields of single tables' specs."""
        return replace(self, specs=[replace(s, **changes.get(s.name, {})) for s in self.specs])

    @property
    def key_lengths(self) -> dict[str, float]:
        """Mean number of ids a row by key of the tables' specs. Nobody has counted those of a divided vocabulary's
        parts: they are taken to have as much of a feature's ids as of its rows."""
        rows = Counter()
        for spec in self.specs:
            rows[spec.vocabulary] += spec.rows
        return {
            key: self.lengths[undivided(key)] * (spec.rows / rows[spec.vocabulary])
            for spec in self.specs
            for key in spec.features
            if undivided(key) in self.lengths
        }

    def batch_rows(self, ranks: int) -> int:
        """Rows of one rank's batch, the largest of all ranks."""
        data = self.config.data
        if ranks > data.streams:
            return -(-data.batch_size // ranks)
        return -(-data.streams // ranks) * (data.batch_size // data.streams)


def mean_lengths(
    schema: Schema, features: list[str], statistics: Mapping[str, FeatureStatistics] | None
) -> dict[str, float]:
    """Mean number of ids, tokens or texts a row, by feature; without statistics, lists count as full."""
    if statistics is not None:
        return {name: statistics[name].mean_length for name in features if name in statistics}
    return {
        name: float(f.max_length if f.kind in ("ids", "texts") else USUAL_TOKENS if f.kind == "text" else 1)
        for name, f in schema.features.items()
        if name in features
    }


def text_shares(
    schema: Schema, features: list[str], statistics: Mapping[str, FeatureStatistics] | None
) -> dict[str, float]:
    """Per text feature, the share of rows that have one."""
    named = [name for name in features if schema.features[name].kind == "text"]
    return {name: 1 - statistics[name].null_share if statistics else 1.0 for name in named}


def stored_width(config: Config) -> int | None:
    """Width of the stored text vectors; 0 where there are none, None where they are not made yet."""
    if config.text.mode != "frozen":
        return 0
    if (Path(config.text.store) / STORE_NAME).exists():
        return read_store_info(config.text.store).recipe.width
    return None


def mean_tokens(texts: dict[str, float], lengths: dict[str, float], longest: int | None) -> float:
    """Mean tokens of one text: of the text features whose tokens are counted, else what is usual.

    Args:
        longest: that the data set's tokenizer makes; None without one.
    """
    counted = [lengths[name] / share for name, share in texts.items() if share and lengths.get(name, 0) > 0]
    return sum(counted) / len(counted) if counted else float(min(longest or USUAL_TOKENS, USUAL_TOKENS))
