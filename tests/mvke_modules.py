"""A small MVKE config, and the model with tables."""

from __future__ import annotations

import torch
from foundation_rows import DIMS, SCHEMA, TEXT_WIDTH, Tables
from torch import nn

from dist_rec.config import MVKEConfig
from dist_rec.layers.reduction import Reduction
from dist_rec.models.mvke import MVKE
from dist_rec.strict import from_dict

READ = [name for name, feature in SCHEMA.features.items() if feature.role != "query"]
USER = [name for name in READ if SCHEMA.features[name].role != "item"]
ITEM = [name for name in READ if SCHEMA.features[name].role == "item"]
KINDS = ["mvke", "single_task", "shared_bottom", "mmoe", "cgc", "ple", "multi_interest"]


def config(**changes) -> dict:
    base = {
        "kind": "mvke",
        "width": 6,
        "history": {"feedforward": 8, "dropout": 0.0, "use_text": True, "max_length": 4},
        "user": {"hidden": [5], "experts": 2, "specific_experts": 1, "interests": 3},
        "kernels": {"shared": 2, "specific": 1},
        "item": {"hidden": [7]},
        "tasks": {t: {"label": t, "weight": w} for t, w in (("ctr", 1.0), ("cvr", 0.5), ("relevance", 2.0))},
    }
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) and key != "tasks" and key in base else value
    return base


GIVEN = {"cvr": {"label": "cvr", "given": "ctr", "weight": 0.5}}


class Whole(nn.Module):
    """Tables and model together: one process of a hybrid run."""

    def __init__(self, tree: dict, features=READ, encoder=None, dtype=torch.float64) -> None:
        super().__init__()
        self.tables = Tables()
        # Nobody trains the one that queries would read.
        queries = self.tables.tables["table_query_id"]
        weight = queries.weight.detach()
        del queries.weight
        queries.register_buffer("weight", weight)
        args = (SCHEMA, from_dict(MVKEConfig, tree, "test"), DIMS, TEXT_WIDTH, encoder, list(features), Reduction())
        self.model = MVKE(*args)
        self.to(dtype)

    def forward(self, batch, side=None) -> dict:
        return self.model(self.tables(batch), batch, side=side)


def parameters(tree: dict) -> int:
    return sum(p.numel() for p in Whole(tree).model.parameters())
