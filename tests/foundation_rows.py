"""Rows of every kind of feature as a rank's batch, and a foundation model with tables: small, with nulls."""

from __future__ import annotations

import numpy as np
import torch
from ranks import gradients
from torch import Tensor, nn

from dist_rec.config import ModelConfig
from dist_rec.data.batch import Batch, make_batch
from dist_rec.data.rows import Ragged, Rows
from dist_rec.layers.reduction import Reduction
from dist_rec.models.foundation import FoundationModel
from dist_rec.schema import Schema
from dist_rec.strict import from_dict

TEXT_WIDTH = 6

SCHEMA = from_dict(
    Schema,
    {
        "name": "test",
        "domains": {"names": ["search", "feed", "shop"]},
        "keys": {"user": "u", "time": "t"},
        "features": {
            "user": {"role": "user", "kind": "id", "vocabulary": {"size": 20}},
            "interests": {"role": "user", "kind": "ids", "vocabulary": {"size": 9}},
            "age": {"role": "user", "kind": "dense", "width": 2},
            "bio": {"role": "user", "kind": "text"},
            "query_id": {"role": "query", "kind": "id", "aspect": "id", "vocabulary": {"size": 15}},
            "query_text": {"role": "query", "kind": "text"},
            "item": {"role": "item", "kind": "id", "aspect": "id", "vocabulary": {"size": 30}},
            "category": {"role": "item", "kind": "ids", "vocabulary": {"size": 7}},
            "price": {"role": "item", "kind": "dense"},
            "title": {"role": "item", "kind": "text"},
            "clicked": {"role": "history", "kind": "ids", "shares": "item"},
            "clicked_category": {"role": "history", "kind": "ids", "shares": "category"},
            "clicked_title": {"role": "history", "kind": "texts"},
            "bought": {"role": "history", "kind": "ids", "shares": "item", "events": {"of": "item", "label": "cvr"}},
        },
        "labels": {"ctr": {}, "cvr": {}, "relevance": {"kind": "graded", "maximum": 3.0}},
    },
    "test",
)
DIMS = {"user": 5, "interests": 3, "query_id": 4, "item": 6, "category": 3}
EVERYTHING = list(SCHEMA.features)
NUM_TEXTS = 12
# Features that are null in all rows, by what that means.
ABSENT = {
    "nothing absent": (),
    "no history": ("clicked", "clicked_category", "clicked_title", "bought"),
    "no text": ("bio", "query_text", "title", "clicked_title"),
    "no query": ("query_id", "query_text"),
    "nothing at all": tuple(EVERYTHING),
}


def make_rows(n: int = 24, domains: list[int] | None = None, seed: int = 0, empty: tuple[str, ...] = ()) -> Rows:
    """Random rows with nulls of every kind; features in `empty` are null in all rows."""
    random = np.random.default_rng(seed)
    domain = np.array(domains if domains is not None else random.integers(0, 3, n), np.int64)
    rows = Rows(domain=domain, row=random.permutation(1000)[:n].astype(np.int64))
    rows.text_keys = np.arange(NUM_TEXTS, dtype=np.int64)
    token_lengths = random.integers(1, 5, NUM_TEXTS)
    rows.tokens = Ragged.from_lengths(random.integers(1, 50, token_lengths.sum()), token_lengths)
    listed = random.integers(0, 6, n)
    for name, feature in SCHEMA.features.items():
        most = 2 if feature.kind in ("id", "text") else 4
        lengths = random.integers(0, most, n)
        if name.startswith("clicked"):
            lengths = listed.copy()
        if name in empty:
            lengths[:] = 0
        if feature.kind in ("id", "ids"):
            size = SCHEMA.features[SCHEMA.table_of(name)].vocabulary.size
            rows.ids[name] = Ragged.from_lengths(random.integers(0, size, lengths.sum()), lengths)
        elif feature.kind == "dense":
            values = random.standard_normal((n, feature.width)).astype(np.float32)
            rows.dense[name] = np.where(random.random(values.shape) < (2 if name in empty else 0.3), np.nan, values)
        else:
            rows.texts[name] = Ragged.from_lengths(random.integers(0, NUM_TEXTS, lengths.sum()), lengths)
    for name, label in SCHEMA.labels.items():
        values = random.integers(0, int(label.maximum) + 1, n).astype(np.float32)
        rows.labels[name] = np.where(random.random(n) < 0.3, np.nan, values)
    rows.keys = {key: np.full(n, -1, np.int64) for key in ("user", "query", "time")}
    return rows


def cut(rows: Rows, mask: np.ndarray) -> Rows:
    """Some rows of `rows`, as a reader would deal them to a rank."""
    return rows.take(np.flatnonzero(mask))


def text_vectors(keys: np.ndarray, tokens: Ragged | None = None) -> np.ndarray:
    table = np.random.default_rng(1).standard_normal((NUM_TEXTS, TEXT_WIDTH)).astype(np.float32)
    return table[keys]


def as_batch(rows: Rows, size: int) -> Batch:
    batch = make_batch(rows, SCHEMA, size, text_vectors)
    batch.dense = {n: v.double() for n, v in batch.dense.items()}
    return batch


class Tables(nn.Module):
    """What TorchRec gives: means of rows, zeros where null; every event of a history."""

    def __init__(self) -> None:
        super().__init__()
        sizes = SCHEMA.table_sizes()
        self.tables = nn.ModuleDict({f"table_{t}": nn.Embedding(sizes[t], d) for t, d in DIMS.items()})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        out = {}
        for name, feature in SCHEMA.select(kinds=("id", "ids")).items():
            weight = self.tables["table_" + SCHEMA.table_of(name)].weight
            values, lengths = weight[batch.ids[name].values()], batch.ids[name].lengths()
            if feature.role != "history":
                row = torch.repeat_interleave(torch.arange(len(batch)), lengths)
                values = weight.new_zeros(len(batch), weight.shape[1]).index_add(0, row, values)
                values = values / lengths.clamp_min(1)[:, None]
            out[name] = values
        return out


class TinyEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, TEXT_WIDTH)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return (self.tokens(tokens) * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


class Whole(nn.Module):
    """Tables and model together: one process of a hybrid run."""

    def __init__(self, config: dict, reduction: Reduction | None = None, features=EVERYTHING, encoder=None) -> None:
        super().__init__()
        parsed = from_dict(ModelConfig, config, "test")
        self.tables = Tables()
        args = (SCHEMA, parsed, DIMS, TEXT_WIDTH, encoder, list(features))
        self.model = FoundationModel(*args, reduction or Reduction()).double()
        self.double()

    def forward(self, batch: Batch) -> dict:
        return self.model(self.tables(batch), batch)


def config(**changes) -> dict:
    base = {
        "width": 8,
        "history": {"feedforward": 8, "dropout": 0.0, "use_text": True, "max_length": 4},
        "body": {"expert_hidden": [8], "tower_hidden": [4]},
        "regulariser": {"kind": "none", "weight": 0.7, "samples": 4, "kernels": 3},
        "tasks": {t: {"label": t, "weight": w} for t, w in (("ctr", 1.0), ("cvr", 0.5), ("relevance", 2.0))},
    }
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) and key in base else value
    return base


def check_masked_rows(module: nn.Module) -> None:
    """Rows that fill a batch up change neither losses, nor gradients, nor the logits of others."""
    rows, found = make_rows(), []
    for size in (24, 37):
        module.zero_grad()
        batch = as_batch(rows, size)
        for known in batch.label_valid.values():
            known |= ~batch.valid  # `valid` alone decides, whatever else a masked row claims
        output = module(batch)
        output["loss"].backward()
        found.append((output["losses"], gradients(module), {t: v[:24] for t, v in output["logits"].items()}))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
