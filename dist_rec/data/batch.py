"""`Batch`: what one rank's step sees, as tensors.

IDs are one `KeyedJaggedTensor`, lists stay jagged, and every distinct text appears once with an
index for each use, because the language model is the dearest part. Rows that only pad the
batch, and void ones (`Rows.void`), are *masked*: no ids, no texts, no labels, `valid` False. Only the candidates of a
sequence model are listed on the first row whatever it is, for they are the batch's and no row's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from ..schema import Schema
from .blocks import text_key
from .candidates import CANDIDATES, CANDIDATES_TEXT, Share
from .rows import Ragged, Rows
from .vocabulary import IdMap, IdParts, part_name, undivided

# What a history has where it lacks a text.
_EMPTY = text_key("")


@dataclass
class Batch(Pipelineable):
    """B rows (masked ones included) of which T distinct texts are known.

    Attributes:
        ids: every `id` and `ids` feature, keys in schema order, int64 values, stride B. A null
            is an empty list. Values are rows of the feature's table, or `vocabulary.mix` of its ids where
            the table is managed. A feature f of a divided vocabulary has keys f, f@1 and so on beside each other, with
            the ids of each part.
        event_places: per history of a divided vocabulary, int64 `[N]`: where each of its events stands when those of
            its keys stand one after the other.
        dense: per `dense` feature, float32 `[B, width]`, NaN where null.
        text_index: per text feature, int64 `[n]`, positions among the T texts, rows
            concatenated; T is no text, of a candidate or an event.
        text_lengths: per text feature, int64 `[B]`, how many of those each row has.
        text_tokens: int64 `[T, L]` token ids, padded with 0; `[T, 0]` where not asked for.
        text_mask: bool `[T, L]`, True on real tokens.
        text_vectors: float32 `[T, D]` vectors of a frozen encoder; `[T, 0]` where not asked for.
        labels: per label, float32 `[B]`, 0 where missing.
        label_valid: per label, bool `[B]`.
        domain: int64 `[B]`, 0 on masked rows.
        valid: bool `[B]`, False on masked rows.
        row: int64 `[B]`, number of the row in the data set, -1 on masked rows.
        user: int64 `[B]`, key of grouped metrics, -1 where unknown.
        query: int64 `[B]`, likewise for NDCG.
        identity: per feature that was asked for, and the candidates, int64 `[n]`, ids as they are in the data, rows
            concatenated: what tells items apart, whether their ids are looked up or not.
        identity_lengths: per such feature, int64 `[B]`, how many of those each row has.
        candidate_weight: float32 `[M]`, what each candidate counts (`candidates.Share`).
    """

    ids: KeyedJaggedTensor
    event_places: dict[str, Tensor]
    dense: dict[str, Tensor]
    text_index: dict[str, Tensor]
    text_lengths: dict[str, Tensor]
    text_tokens: Tensor
    text_mask: Tensor
    text_vectors: Tensor
    labels: dict[str, Tensor]
    label_valid: dict[str, Tensor]
    domain: Tensor
    valid: Tensor
    row: Tensor
    user: Tensor
    query: Tensor
    identity: dict[str, Tensor] = field(default_factory=dict)
    identity_lengths: dict[str, Tensor] = field(default_factory=dict)
    candidate_weight: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __len__(self) -> int:
        return self.domain.shape[0]

    def id_lengths(self) -> dict[str, Tensor]:
        """How many ids each row has of each `id` and `ids` feature: int64 `[B]` by feature."""
        keys, found = self.ids.keys(), {}
        for key, lengths in zip(keys, self.ids.lengths().view(len(keys), len(self)).unbind(0), strict=True):
            name = undivided(key)
            found[name] = found[name] + lengths if name in found else lengths
        return found

    def _map(self, move: Callable[[Any], Any]) -> Batch:
        moved = {}
        for one in fields(self):
            value = getattr(self, one.name)
            moved[one.name] = {k: move(v) for k, v in value.items()} if isinstance(value, dict) else move(value)
        return Batch(**moved)

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return self._map(lambda t: t.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(lambda t: t.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        self._map(lambda t: t.record_stream(stream))


def make_batch(
    rows: Rows,
    schema: Schema,
    size: int,
    vectors: Callable[[np.ndarray, Ragged | None], np.ndarray] | None = None,
    id_maps: Mapping[str, IdMap | IdParts] | None = None,
    identify: Collection[str] = (),
    look_up: bool = True,
    candidates: Share | None = None,
) -> Batch:
    """Turn rows into a batch of exactly `size` rows, masking what is missing.

    Args:
        rows: at most `size` rows, their text table as `window.cut` leaves it: all of it becomes part of the batch.
        schema: the data set's schema; its feature order is the key order.
        size: B.
        vectors: makes of text keys, int64 `[T]`, and their tokens the frozen vectors, float32 `[T, D]`. None
            where the model needs none.
        id_maps: per feature what becomes of its ids; a feature without one keeps them.
        identify: features whose ids the batch has as they are in the data, too. Where there are any, events of
            histories are items like others, and an empty text is none.
        look_up: whether any ids are looked up: `ids` has none otherwise.
        candidates: of this batch.

    Raises:
        UserError: an id has no place in its table.
    """
    n, present = len(rows), rows.row >= 0
    if n > size:
        raise ValueError(f"{n} rows do not fit a batch of {size}")
    lists, places = _mapped(rows.ids, rows.row, schema, id_maps or {}) if look_up else ({}, {})
    if candidates is not None and look_up:
        # Mapped as items of the catalogue, then listed on one row.
        own, place = _mapped({CANDIDATES: _one_each(candidates.ids)}, candidates.row, schema, id_maps or {})
        lists |= {key: _on_first_row(ids.values) for key, ids in own.items()}
        places |= place
    lengths = np.zeros((len(lists), size), np.int64)
    for i, ids in enumerate(lists.values()):
        lengths[i, : len(ids)] = ids.lengths
    values = [ids.values for ids in lists.values()]
    ids = KeyedJaggedTensor(
        keys=list(lists),
        values=torch.from_numpy(np.concatenate(values, dtype=np.int64) if values else np.zeros(0, np.int64)),
        lengths=torch.from_numpy(lengths.reshape(-1)),
        stride=size,
    )
    identified = {name: rows.ids[name] for name in identify}
    texts, keys, text_tokens, unknown = rows.texts, rows.text_keys, rows.tokens, np.full(n, -1, np.int64)
    if candidates is not None:
        identified[CANDIDATES] = _on_first_row(candidates.ids)
        if candidates.text_keys is not None:
            texts, keys, text_tokens = _with_texts(rows, candidates)
    if identify and (is_empty := keys == _EMPTY).any():
        number = np.append(np.where(is_empty, len(keys), np.arange(len(keys))), len(keys))
        texts = {name: Ragged(number[used.values], used.offsets) for name, used in texts.items()}
    tokens, mask = _padded_tokens(text_tokens, len(keys))
    labels, valid = {}, {}
    for name in schema.labels:
        known = ~np.isnan(rows.labels[name])
        labels[name] = _padded(np.where(known, rows.labels[name], np.float32(0)), size, 0)
        valid[name] = _padded(known, size, False)
    return Batch(
        ids=ids,
        event_places={n_: torch.from_numpy(place) for n_, place in places.items()},
        dense={n_: _padded(v, size, np.nan) for n_, v in rows.dense.items()},
        text_index={n_: torch.from_numpy(t.values) for n_, t in texts.items()},
        text_lengths={n_: _padded(t.lengths, size, 0) for n_, t in texts.items()},
        text_tokens=tokens,
        text_mask=mask,
        text_vectors=torch.from_numpy(vectors(keys, text_tokens)) if vectors else torch.zeros(len(keys), 0),
        labels=labels,
        label_valid=valid,
        domain=_padded(np.where(present, rows.domain, 0), size, 0),
        valid=_padded(present, size, False),
        row=_padded(rows.row, size, -1),
        user=_padded(rows.keys.get("user", unknown), size, -1),
        query=_padded(rows.keys.get("query", unknown), size, -1),
        identity={name: torch.from_numpy(ids.values.astype(np.int64)) for name, ids in identified.items()},
        identity_lengths={name: _padded(ids.lengths, size, 0) for name, ids in identified.items()},
        candidate_weight=torch.zeros(0) if candidates is None else torch.from_numpy(candidates.weight.copy()),
    )


def _one_each(values: np.ndarray) -> Ragged:
    return Ragged(values, np.arange(len(values) + 1))


def _on_first_row(values: np.ndarray) -> Ragged:
    return Ragged(values, np.array([0, len(values)]))


def _with_texts(rows: Rows, candidates: Share) -> tuple[dict[str, Ragged], np.ndarray, Ragged | None]:
    """The batch's texts with those of the candidates: uses by feature, sorted distinct keys, and their tokens."""
    there = np.flatnonzero(candidates.has_text)
    both = np.concatenate([rows.text_keys, candidates.text_keys[there]])
    keys, first, number = np.unique(both, return_index=True, return_inverse=True)
    texts = {name: Ragged(number[used.values], used.offsets) for name, used in rows.texts.items()}
    tokens = None
    if rows.tokens is not None:
        tokens = Ragged.concat([rows.tokens, candidates.tokens.take(there)]).take(first)
    # Without any text at all, `_padded_tokens` makes one up.
    uses = np.full(len(candidates), max(len(keys), 1) if tokens is not None else len(keys), np.int64)
    uses[there] = number[len(rows.text_keys) :]
    return {**texts, CANDIDATES_TEXT: _on_first_row(uses)}, keys, tokens


def _mapped(
    lists_of: Mapping[str, Ragged], row: np.ndarray, schema: Schema, maps: Mapping[str, IdMap | IdParts]
) -> tuple[dict[str, Ragged], dict[str, np.ndarray]]:
    """By key the rows' lists of what tables are asked for, and by history `Batch.event_places`.

    Args:
        lists_of: by feature, the ids of n rows.
        row: int64 `[n]`, numbers of the rows in the data set.
    """
    lists, places = {}, {}
    for name, ids in lists_of.items():
        if isinstance(mapped := maps.get(name), IdParts):
            parts, place = mapped(ids)
            lists |= {part_name(name, number): part for number, part in enumerate(parts)}
            if schema.features[name].role == "history":
                places[name] = place
        else:
            lists[name] = Ragged(mapped(name, ids, row), ids.offsets) if mapped is not None else ids
    return lists, places


def _padded(values: np.ndarray, size: int, fill: Any) -> Tensor:
    if len(values) == size and values.flags.writeable:  # torch has no read-only tensors
        return torch.from_numpy(values)
    out = np.full((size, *values.shape[1:]), fill, values.dtype)
    out[: len(values)] = values
    return torch.from_numpy(out)


def _padded_tokens(tokens: Ragged | None, texts: int) -> tuple[Tensor, Tensor]:
    """Token ids `[T, L]` and mask; `[T, 0]` without tokens.

    A language model must run on every rank in every step, so no text at all becomes one
    text of one token that nothing refers to.
    """
    if tokens is None:
        return torch.zeros(texts, 0, dtype=torch.int64), torch.zeros(texts, 0, dtype=torch.bool)
    if texts == 0:
        return torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    longest = max(int(tokens.lengths.max()), 1)
    narrow = np.min_scalar_type(longest)  # eight times as many comparisons at once
    mask = np.arange(longest, dtype=narrow)[None, :] < tokens.lengths.astype(narrow)[:, None]
    padded = np.zeros(mask.shape, np.int64)
    padded[mask] = tokens.values
    return torch.from_numpy(padded), torch.from_numpy(mask)
