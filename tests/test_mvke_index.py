"""What an index of MVKE's vectors can give: the model's scores, or a reason why not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foundation_rows import SCHEMA, as_batch, make_rows
from mvke_modules import GIVEN, ITEM, KINDS, READ, USER, Whole, config
from torch import nn

from dist_rec.data.rows import Rows
from dist_rec.models.mvke import MVKE, two_towers
from dist_rec.models.objectives import both

pytestmark = pytest.mark.usefixtures("seeded")


def pairs(rows: Rows) -> Rows:
    """Every row's user with every row's item."""
    n = len(rows)
    users, items = rows.take(np.repeat(np.arange(n), n)), rows.take(np.tile(np.arange(n), n))
    for name in ITEM:
        for of_kind in ("ids", "dense", "texts"):
            if name in getattr(items, of_kind):
                getattr(users, of_kind)[name] = getattr(items, of_kind)[name]
    users.row = np.arange(n * n)
    return users


EXACT = [
    {},
    {"score": {"kind": "parts", "scale": 8.0}},
    {"preset": "paper", "score": {"kind": "dot"}},
    {"preset": "paper", "score": {"kind": "parts"}},
    {"gate": {"kind": "argmax"}},
    {"item": {"kind": "vke"}},
    {
        "kernels": {"combine": "sum", "shared": 0},
        "score": {"kind": "parts"},
        "tasks": {"ctr": {"label": "ctr", "kernels": 3}},
    },
    # One vector, whose weight is 1, is as good as the whole.
    {"kernels": {"shared": 1, "specific": 0}, "score": {"kind": "cosine"}},
    {"user": {"kind": "multi_interest", "interests": 1}, "score": {"kind": "cosine"}},
    {"preset": "paper", "item": {"kind": "vke_vkg", "kernels": 1}, "score": {"kind": "dot"}},
    *({"user": {"kind": kind}, "score": {"kind": "cosine"}} for kind in KINDS[1:-1]),
]
NOT_EXACT = {
    "cosine divides by the length": {"preset": "paper"},
    "vke_vkg makes the item's vector depend": {"item": {"kind": "vke_vkg"}},
    "crossed makes the kernels depend": {"kernels": {"crossed": True}},
    "multi_interest weighs interests": {"user": {"kind": "multi_interest"}},
}


def scores(changes: dict, dtype=torch.float32) -> tuple[dict, dict, MVKE]:
    """Of every user with every item: what the model says, and what products of the sides' vectors say."""
    module = Whole(config(**changes), dtype=dtype)
    # Far from their start, where kernels and interests are all but alike.
    for name, parameter in module.model.named_parameters():
        if any(part in name for part in ("kernels", "crossed", "interests")):
            nn.init.normal_(parameter)
    rows = make_rows(9)
    one, every = as_batch(rows, 9), as_batch(pairs(rows), 81)
    if dtype == torch.float32:
        for batch in (one, every):
            batch.dense = {name: values.float() for name, values in batch.dense.items()}
    logits = {task: x.view(9, 9) for task, x in module(every)["logits"].items()}
    users, items = (module(one, side=side)["vectors"] for side in ("user", "item"))
    towers = two_towers(SCHEMA, module.model.config, READ)
    assert towers.tasks == tuple(logits) and towers.user_features == tuple(USER) and towers.item_features == tuple(ITEM)
    products = {task: towers.scale[task] * users[task] @ items[task].t() + towers.bias[task] for task in towers.tasks}
    return logits, products, towers


@pytest.mark.parametrize("changes", EXACT, ids=str)
def test_an_index_gives_the_models_scores(changes):
    """In float32, of all pairs, relative to the size of what is added up."""
    logits, products, towers = scores(changes)
    for task, wanted in logits.items():
        assert towers.exact[task] and task not in towers.why
        assert products[task].dtype == torch.float32
        worst = (products[task] - wanted).abs().max() / wanted.abs().max()
        assert worst < 1e-5, (task, worst)
        assert wanted.std() > 1e-4


@pytest.mark.parametrize("reason", list(NOT_EXACT))
def test_what_no_index_serves_says_so_and_differs(reason):
    logits, products, towers = scores(NOT_EXACT[reason], torch.float64)
    for task, wanted in logits.items():
        assert not towers.exact[task] and reason in towers.why[task]
        assert (products[task] - wanted).abs().max() > 1e-4 * wanted.abs().max()
        # Approximate is not arbitrary.
        found, wanted = products[task].flatten(), wanted.flatten()
        assert torch.corrcoef(torch.stack([found, wanted]))[0, 1] > 0.3, task


def test_a_task_that_is_given_another_is_no_product():
    logits, products, towers = scores({"tasks": config()["tasks"] | GIVEN})
    assert towers.exact == {"ctr": True, "cvr": False, "relevance": True} and "ctr" in towers.why["cvr"]
    torch.testing.assert_close(both(products["ctr"], products["cvr"]), logits["cvr"], rtol=1e-4, atol=1e-5)


def test_vectors_of_items_are_their_tags_by_weight():
    module = Whole(config(tasks=config()["tasks"] | {"cvr": {"label": "cvr", "kernels": 3}}))
    out = module(as_batch(make_rows(), 24), side="item")
    for task, count in (("ctr", 3), ("cvr", 5), ("relevance", 3)):
        tags, weights = out["tags"][task], out["weights"][task]
        assert weights.shape == (24, count) and tags.shape == (24, 6)
        torch.testing.assert_close(weights.sum(1), torch.ones(24, dtype=torch.float64))
        torch.testing.assert_close(out["vectors"][task], torch.cat([weights[:, [k]] * tags for k in range(count)], 1))
