"""A run's catalogue: read once, and what of it the batches of a rank carry."""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.distributed as dist

from ..config import Config
from ..data.candidates import Candidates, Sampled, Whole
from ..data.catalogue import Catalogue, contents, count_targets, read_catalogue
from ..data.index import CATALOGUE, read_index
from ..data.reader import ShardReader
from ..data.vocabulary import tables_of, undivided
from ..errors import UserError
from ..schema import Schema
from .kinds import item_of, kind_of
from .prepared import Prepared
from .process import choose_device
from .reading import retry_of


def candidates_of(prepared: Prepared, rank: int, world_size: int, training: bool) -> Candidates | None:
    """What a rank's batches are to tell the next item from; None where they have the targets of the batch alone.

    Evaluation takes the whole catalogue, with its first batch. Collective, where a sample is drawn by popularity.

    Args:
        training: whether the model is trained on the batches, rather than evaluated.

    Raises:
        UserError: the catalogue is at fault, or smaller than the sample.
    """
    model = prepared.config.model
    if CATALOGUE not in prepared.indexes or training and model.loss == "in_batch":
        return None
    catalogue = open_catalogue(prepared, rank)
    if not training or model.loss == "full":
        return Whole(catalogue, rank, world_size, once=not training)
    if model.samples > len(catalogue):
        raise UserError(
            f"model.samples is {model.samples}, and the catalogue {prepared.config.data.catalogue} has "
            f"{len(catalogue)} items: draw fewer, or set model.loss: full."
        )
    odds = None
    if model.sampling == "popularity":
        if prepared.asked is None:
            prepared.asked = _count(prepared, catalogue, rank, world_size)
        odds = prepared.asked + 1.0
    return Sampled(catalogue, model.samples, prepared.config.run.seed, rank, world_size, odds)


def open_catalogue(prepared: Prepared, rank: int) -> Catalogue:
    """The run's catalogue, read when it is first asked for; rank 0 says how many of its items have no text.

    Raises:
        UserError: it cannot be read, or is none.
    """
    if prepared.catalogue is None:
        schema, text = prepared.schema, None
        item = item_of(schema, prepared.features)
        if prepared.config.model.with_text:
            of_item = schema.select("item", ("text",))
            text = next(name for name in prepared.features if name in of_item)
        reader = _reader(prepared, CATALOGUE, [item, text] if text else [item], with_tokens=prepared.reads_tokens)
        prepared.catalogue = read_catalogue(reader, item, text)
        without = prepared.catalogue.without_text
        if text and without and rank == 0:
            print(
                f"dist-rec: {without:,} of {len(prepared.catalogue):,} items of {reader.root} have no text: their "
                "texts' vectors are zero.",
                file=sys.stderr,
            )
    return prepared.catalogue


def catalogue_contents(prepared: Prepared) -> str | None:
    """What the run's catalogue has, as a fingerprint: the same of data sets that were built apart from the same items.
    None where items have no text to be known by.

    Raises:
        UserError: it cannot be read.
    """
    schema = prepared.indexes[CATALOGUE].schema
    text = next(iter(schema.select("item", ("text",))), None)
    item = item_of(schema, prepared.features)
    if text is None:
        return None
    return contents(read_catalogue(_reader(prepared, CATALOGUE, [item, text], False), item, text), schema.domains.names)


def unread_tables(config: Config, schema: Schema, features: list[str]) -> frozenset[str]:
    """Tables of whose ids a run reads none: of a data set that its own extends, pretraining's say, where the catalogue
    has none of its items. Such a table has one row, for whatever else is met.

    Raises:
        UserError: the catalogue cannot be read, or is none.
    """
    kind, item, root = kind_of(config), item_of(schema, features), config.data.catalogue
    if root is None or not kind.reads_catalogue or item not in kind.looked_up(schema, config, features):
        return frozenset()
    tables = tables_of(schema, config.tables.overrides)
    parts = {name: ids for name, ids in tables.items() if undivided(name) == schema.table_of(item)}
    if len(parts) == 1:
        return frozenset()
    retry = retry_of(config.data)
    found = read_catalogue(ShardReader(root, read_index(root, retry), [item], keep=1, retry=retry), item, None).ids
    return frozenset(name for name, ids in parts.items() if not ((found >= ids.start) & (found < ids.stop)).any())


def _reader(prepared: Prepared, split: str, features: list[str], with_tokens: bool) -> ShardReader:
    retry = retry_of(prepared.config.data)
    return ShardReader(prepared.root(split), prepared.indexes[split], features, with_tokens, keep=1, retry=retry)


def _count(prepared: Prepared, catalogue: Catalogue, rank: int, world_size: int) -> np.ndarray:
    """How often the training rows ask for every item, int64 `[M]`, from a pass over their ids of which each rank makes
    a part. Collective."""
    features = prepared.kind.identified(prepared.schema, prepared.config, prepared.features)
    item = item_of(prepared.schema, features)
    (history,) = (name for name in features if name != item)
    reader = _reader(prepared, "train", features, with_tokens=False)
    mine = range(rank, len(reader.places), world_size)
    counts = count_targets((reader.rows(number) for number in mine), history, item, catalogue)
    if world_size > 1:
        total = torch.from_numpy(counts).to(choose_device(prepared.config))
        dist.all_reduce(total)
        counts = total.cpu().numpy()
    return counts
