"""One domain of a data set as a data set of its own: what a model that knows nothing else is trained on."""

from __future__ import annotations

from dataclasses import replace

from ..data.index import Index
from ..errors import UserError


def narrowed(index: Index, domain: str) -> Index:
    """The same data set with the rows of one domain alone, under a schema that has that domain alone (K = 1).

    Blocks do not name their domain, their shard does: they are read as they stand. Vocabularies and statistics stay
    those of the whole.

    Raises:
        UserError: it has no row of that domain.
    """
    shards = [shard for shard in index.shards if shard.domain == domain]
    if not shards:
        raise UserError(f"data set {index.name} ({index.split}) has no row of domain {domain!r}.")
    schema = replace(index.schema, domains=replace(index.schema.domains, names=[domain]))
    return replace(index, schema=schema, shards=shards)
