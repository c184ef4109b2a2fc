"""Invented impressions for `bench stream`, and our shards of them.

A row has a user, an item, a history of 1 .. 50 items (any length as often; MDS cannot store an empty array), the
item's title of 24 tokens, 8 floats and two labels, and is of one of three domains. Each of 100,000 items has one
title; items are drawn by Zipf's law, so that a title comes back as often as it does in logs: 2,048 rows hold some
1,200 distinct ones. The second label is missing in half of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from isal.isal_zlib import crc32

from ..data.blocks import TEXT, arrow_schema, encode_block, text_key
from ..data.encode import EncodedBlock
from ..data.index import Index, TokenizerInfo, write_index
from ..data.rows import Ragged
from ..data.writer import DatasetWriter
from ..schema import Schema
from ..strict import from_dict

NUM_ITEMS, NUM_USERS, NUM_WORDS = 100_000, 1_000_000, 30_000
HISTORY, TOKENS, FLOATS = 50, 24, 8
DOMAIN_SHARES = (0.6, 0.3, 0.1)
MISSING = 0.5
MAX_RATING = 5
SHARD_ROWS = 262_144
_PLAIN = ("row", "domain", "user", "item", "profile", "click", "rating")

SCHEMA: Schema = from_dict(
    Schema,
    {
        "name": "bench",
        "domains": {"names": ["a", "b", "c"]},
        "features": {
            "user": {"role": "user", "kind": "id", "vocabulary": {"kind": "integer", "size": NUM_USERS}},
            "profile": {"role": "user", "kind": "dense", "width": FLOATS},
            "history": {"role": "history", "kind": "ids", "shares": "item", "max_length": HISTORY},
            "item": {"role": "item", "kind": "id", "vocabulary": {"kind": "integer", "size": NUM_ITEMS}},
            "title": {"role": "item", "kind": "text"},
        },
        "labels": {"click": {}, "rating": {"kind": "graded", "maximum": MAX_RATING}},
        "keys": {"user": "user"},
    },
    "bench",
)


@dataclass
class Impressions:
    """n rows as columns, in an order in which domains are mixed.

    Attributes:
        row: int64 `[n]`, the row's number in our data set, where domains come one after another.
        domain, user, item: int64 and int32 `[n]`.
        history: int32 lists of items.
        profile: float32 `[n, 8]`.
        click, rating: float32 `[n]`; a missing rating is NaN.
        title_keys: int64 `[items]`, key of an item's title.
        title_tokens: int32 `[items, 24]`.
    """

    row: np.ndarray
    domain: np.ndarray
    user: np.ndarray
    item: np.ndarray
    history: Ragged
    profile: np.ndarray
    click: np.ndarray
    rating: np.ndarray
    title_keys: np.ndarray
    title_tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def first(self, n: int) -> Impressions:
        """The first n rows."""
        columns = {name: getattr(self, name)[:n] for name in _PLAIN}
        return replace(self, history=self.history.slice(0, min(n, len(self))), **columns)


def invent(rows: int, seed: int = 0) -> Impressions:
    """The first `rows` impressions of a seed."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(1, NUM_WORDS, (NUM_ITEMS, TOKENS), dtype=np.int32)
    keys = np.array([text_key(title(item)) for item in range(NUM_ITEMS)], np.int64)
    zipf = np.cumsum(1 / np.arange(1, NUM_ITEMS + 1))
    zipf /= zipf[-1]
    names = draw.permutation(NUM_ITEMS).astype(np.int32)

    def items(n: int) -> np.ndarray:
        return names[np.searchsorted(zipf, draw.random(n, np.float32))]

    domain = draw.choice(len(DOMAIN_SHARES), rows, p=DOMAIN_SHARES)
    row = np.empty(rows, np.int64)
    row[np.argsort(domain, kind="stable")] = np.arange(rows)
    lengths = draw.integers(1, HISTORY + 1, rows)
    rating = draw.integers(0, MAX_RATING + 1, rows).astype(np.float32)
    rating[draw.random(rows) < MISSING] = np.nan
    return Impressions(
        row=row,
        domain=domain,
        user=draw.integers(0, NUM_USERS, rows, dtype=np.int32),
        item=items(rows),
        history=Ragged.from_lengths(items(int(lengths.sum())), lengths),
        profile=draw.random((rows, FLOATS), np.float32),
        click=draw.integers(0, 2, rows).astype(np.float32),
        rating=rating,
        title_keys=keys,
        title_tokens=tokens,
    )


def title(item: int) -> str:
    """What the title's tokens are of; a row has the tokens, and our blocks have it beside them."""
    return f"title {item}"


def write_shards(rows: Impressions, folder: Path, block_rows: int) -> Index:
    """Our shards of the rows, as `shards build` would write them, with token ids.

    Not through `build`, whose dictionaries and tokenizer invented ids have no use for.
    """
    info = TokenizerInfo(name="invented", fingerprint="", max_length=TOKENS)
    writer = DatasetWriter(folder, "all", SCHEMA, info, SHARD_ROWS)
    in_order = np.argsort(rows.row)
    edges = np.searchsorted(rows.domain[in_order], np.arange(len(DOMAIN_SHARES) + 1))
    for domain, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        for first in range(start, stop, block_rows):
            payload = _block(rows, in_order[first : min(first + block_rows, stop)])
            writer.add(domain, EncodedBlock(payload, min(block_rows, stop - first), crc32(payload), None))
    index = writer.close()
    write_index(str(folder), index)
    return index


def _block(rows: Impressions, taken: np.ndarray) -> bytes:
    items, uses = np.unique(rows.item[taken], return_inverse=True)
    tokens = rows.title_tokens[items]
    titles = pa.StructArray.from_arrays(
        [
            pa.array(rows.title_keys[items]),
            pa.array([title(item) for item in items.tolist()]),
            lists(Ragged.from_lengths(tokens.reshape(-1), np.full(len(items), TOKENS))),
        ],
        fields=list(TEXT),
    )
    columns = [
        pa.array(rows.user[taken]),
        pa.FixedSizeListArray.from_arrays(pa.array(rows.profile[taken].reshape(-1)), FLOATS),
        lists(rows.history.take(taken)),
        pa.array(rows.item[taken]),
        pa.DictionaryArray.from_arrays(pa.array(uses.astype(np.int32)), titles),
        pa.array(rows.click[taken]),
        pa.array(rows.rating[taken], from_pandas=True),
        pa.array(rows.user[taken].astype(np.int64)),
    ]
    return encode_block(pa.record_batch(columns, schema=arrow_schema(SCHEMA)))


def lists(ragged: Ragged) -> pa.ListArray:
    """The same lists as Arrow has them."""
    return pa.ListArray.from_arrays(pa.array(ragged.offsets.astype(np.int32)), pa.array(ragged.values))
