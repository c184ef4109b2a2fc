"""The torchrun job of an export: a trained model's item and user vectors, streamed to Parquet by every rank.

A rank computes a contiguous share of the items and then of the users, batch by batch, and writes its part. It holds one
batch of vectors at a time; no rank ever has all items, and nobody pairs all users with all items.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from ..data.batch import Batch
from ..data.candidates import share_of
from ..data.index import read_index
from ..data.rows import Rows
from ..errors import UserError
from ..models.towers import Side, TwoTowers
from ..training.evaluate import Trained
from ..training.exchange import Exchange
from ..training.prepared import Prepared
from ..training.reading import retry_of
from .entities import Entities, item_feature, item_keys, last_rows, user_key
from .names import RawIds, user_feature
from .parts import TAG, WEIGHTS, PartWriter, as_lists, vector_column
from .rows import Batches, DataSet, RowSource, of_run, only, pairs

Thing = TypeVar("Thing")
QUERY = "query"


@dataclass(frozen=True)
class Members:
    """The items, or the users, of an export.

    Attributes:
        side: which.
        data: where their rows lie.
        found: which rows those are.
        rows: reads them.
        read: the features that the side reads.
        ids: of rows and their texts, what people call them: strings, null where nobody does.
        key: the users' key (`user` or `query`); None of items.
    """

    side: Side
    data: DataSet
    found: Entities
    rows: RowSource
    read: tuple[str, ...]
    ids: Callable[[Rows, list[str | None]], pa.Array]
    key: str | None = None


def open_data(root: str, prepared: Prepared, option: str) -> DataSet:
    """A data set that the run's model can read, on every rank as rank 0 sees it. Collective.

    Raises:
        UserError: there is none, or it has another schema or tokenizer than the run's data.
    """
    shared = [read_index(root, retry_of(prepared.config.data)) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    index, train = shared[0], prepared.indexes["train"]
    if index.schema != train.schema:
        raise UserError(
            f"{option} {root}: its schema or vocabularies are not those of the run's data {prepared.root('train')}: "
            "build it together with that, or name one that was."
        )
    if index.tokenizer != train.tokenizer:
        raise UserError(
            f"{option} {root}: its texts were not cut into tokens as those of {prepared.root('train')}: build it with "
            "the same --tokenizer and --max-tokens."
        )
    return DataSet(root, index)


def items_of(root: str, prepared: Prepared, towers: TwoTowers, vocabulary: Path | None) -> tuple[str, Members]:
    """The feature that tells items apart, and the items of a data set. Collective.

    Raises:
        UserError: it cannot be read, is not of the run's schema, or has no item.
    """
    schema, data = prepared.schema, open_data(root, prepared, "--items")
    item = item_feature(schema, prepared.features, towers)
    found = last_rows(data.reader(prepared, [item]), item_keys(schema, item), Exchange())
    if not len(found):
        raise UserError(
            f"the catalogue {root} is empty: none of its {found.rows:,} rows has an id of {item!r} that the vocabulary "
            "knows. Name a data set with one row an item in --items."
        )
    raw = RawIds(root, schema, item, vocabulary)
    title = next(iter(schema.select("item", ("text",))), None)
    rows = RowSource(data.reader(prepared, _with(prepared.features, item)), title)
    return item, Members("item", data, found, rows, towers.item_features, lambda r, _: raw(r.ids[item].first(-1)))


def users_of(root: str, prepared: Prepared, towers: TwoTowers, vocabulary: Path | None) -> Members:
    """The users, or queries, of a data set. Collective.

    Raises:
        UserError: as `items_of`, or the data has no key of users.
    """
    schema, data = prepared.schema, open_data(root, prepared, "--users")
    key = user_key(schema, towers)
    found = last_rows(data.reader(prepared, []), lambda rows: rows.keys[key], Exchange())
    if not len(found):
        raise UserError(f"{root}: none of its {found.rows:,} rows has keys.{key}. Name another data set in --users.")
    name, text = user_feature(schema) if key == "user" else None, None
    if key == QUERY:
        text = next((n for n in towers.user_features if schema.features[n].kind == "text"), None)
    raw = RawIds(root, schema, name, vocabulary) if name else None
    rows = RowSource(data.reader(prepared, _with(prepared.features, name)), text)

    def ids(of: Rows, texts: list[str | None]) -> pa.Array:
        return raw(of.ids[name].first(-1)) if raw else pa.array(texts, pa.string())

    return Members("user", data, found, rows, towers.user_features, ids, key)


def _with(features: list[str], name: str | None) -> list[str]:
    return features if name is None or name in features else [*features, name]


def batch_rows(prepared: Prepared, world_size: int) -> int:
    """Rows of a rank's batch: its part of an evaluation's."""
    return -(-(prepared.config.evaluate.batch_size or prepared.config.data.batch_size) // world_size)


class VectorJob:
    """A run's model on the ranks that have joined, asked for one side or for its own scores.

    Args:
        loaded: the run.
        towers: its two-tower reading.
        item: the feature that tells items apart.
        compact: write items as what their vectors are made of.
    """

    def __init__(self, loaded: Trained, towers: TwoTowers, item: str, compact: bool = False) -> None:
        self.loaded, self.towers, self.item, self.compact = loaded, towers, item, compact
        self.prepared, self.exchange = loaded.prepared, Exchange()
        self.size = batch_rows(self.prepared, self.exchange.world_size)
        features, schema = self.prepared.features, self.prepared.schema
        # What a pair has of the item's row.
        self.of_items = {n for n in features if schema.features[n].role == "item"} | set(towers.item_features)
        self.text = next((n for n in towers.item_features if schema.features[n].kind == "text"), None)

    @torch.no_grad()
    def _model(self, batch: Batch, side: Side | None = None) -> dict[str, dict[str, Tensor]]:
        loaded = self.loaded
        batch = batch.to(loaded.process.device)
        return loaded.model(loaded.tables.vectors(loaded.sharded(batch), batch), batch, side=side)

    def write(self, members: Members, folder: Path) -> float:
        """Write the vectors of all members to `folder`, a part a rank; seconds that it took. Collective."""
        exchange, size = self.exchange, self.size
        mine = members.found.row[share_of(len(members.found), exchange.rank, exchange.world_size)]
        steps = int(exchange.gather(np.array([-(-len(mine) // size)])).max())
        batches, started = Batches(self.prepared, members.data.root), time.monotonic()
        writer = PartWriter(folder, exchange.rank) if len(mine) else None

        def read() -> Iterator[tuple[Rows, list[str | None], Batch]]:
            for step in range(steps):
                chosen = mine[step * size : (step + 1) * size]
                rows, texts = members.rows.take(chosen)
                yield rows, texts, batches(only(of_run(rows, self.prepared.features), members.read), size)

        for rows, texts, batch in ahead(read()):
            found = self._model(batch, members.side)
            if len(rows):
                columns = {"id": members.ids(rows, texts), **self._described(members, rows, texts)}
                parts = {vector_column(task): vectors for task, vectors in found["vectors"].items()}
                if self.compact and members.side == "item":
                    parts = {TAG + task: tags for task, tags in found["tags"].items()}
                    parts |= {WEIGHTS + task: weights for task, weights in found["weights"].items()}
                columns |= {name: as_lists(part[: len(rows)].float().cpu().numpy()) for name, part in parts.items()}
                writer.write(pa.RecordBatch.from_pydict(columns))
        if writer is not None:
            writer.close()
        return time.monotonic() - started

    def _described(self, members: Members, rows: Rows, texts: list[str | None]) -> dict[str, pa.Array]:
        domains = pa.array(self.prepared.schema.domains.names)
        found = {"domain": domains.take(pa.array(rows.domain)), "row": pa.array(rows.row)}
        if members.key is None:
            return {"title": pa.array(texts, pa.string()), **found}
        return {"key": pa.array(rows.keys[members.key]), **found}

    def own_scores(self, users: Members, items: Members, pairs_of: np.ndarray) -> dict[str, np.ndarray] | None:
        """The model's own logits of pairs, from its whole forward, on rank 0. Collective.

        Args:
            pairs_of: int64 `[2, n]`, numbers of users and of items among the members, the same on all ranks.

        Returns:
            float64 `[n]` by task of the model's; None on the other ranks.
        """
        exchange, size = self.exchange, self.size
        mine = pairs_of[:, share_of(pairs_of.shape[1], exchange.rank, exchange.world_size)]
        steps = int(exchange.gather(np.array([-(-mine.shape[1] // size)])).max())
        batches, found = Batches(self.prepared, items.data.root), {}
        for step in range(steps):
            user, item = mine[:, step * size : (step + 1) * size]
            of_users, of_items = (
                of_run(members.rows.take(members.found.row[chosen])[0], self.prepared.features)
                for members, chosen in ((users, user), (items, item))
            )
            batch = batches(pairs(of_users, of_items, self.of_items), size, self.item, self.text)
            for task, logits in self._model(batch)["logits"].items():
                found.setdefault(task, []).append(logits[: len(user)].double().cpu().numpy())
        # A rank has as many rows as every other or one less; all know the tasks from their steps.
        received = {
            task: exchange.route(np.zeros(mine.shape[1], np.int64), [np.concatenate(parts)])[0]
            for task, parts in found.items()
        }
        return None if exchange.rank else received


def ahead(things: Iterable[Thing]) -> Iterator[Thing]:
    """The same, the next one made in the background while one is used."""
    iterator, end = iter(things), object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, end)
        while (thing := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield thing
