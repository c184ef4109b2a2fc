"""A model's two towers: what it says of users and of items apart makes the scores that it gives to them together."""

from __future__ import annotations

import pytest
import torch
from sequence_batches import NUM_ITEMS, SCHEMA, Row, Whole, as_batch, make_rows

from dist_rec.errors import UserError
from dist_rec.models import foundation, unisrec
from dist_rec.schema import Schema
from dist_rec.strict import from_dict

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("item", ["text", "id", "text+id"])
def test_unisrec_towers_make_its_score(item):
    whole = Whole(item=item, loss="full").eval()
    rows = make_rows(20, longest=9)
    batch = as_batch(rows, len(rows) + 2, list(range(NUM_ITEMS)))
    of_both = whole.model(whole.embeddings(batch), batch)["logits"]["next"]
    users = [Row(r.number, r.domain, r.items) for r in rows]
    # Of a user nothing but the history is known, of an item nothing but itself.
    items = as_batch([Row(r.number, r.domain, r.items[-1:]) for r in rows], len(batch))
    user, item = (
        whole.model(whole.embeddings(b), b, side=side)["vectors"]["next"]
        for side, b in (("user", as_batch(users, len(batch))), ("item", items))
    )
    towers = unisrec.towers_of(SCHEMA, whole.model.config, ["history", "history_text", "item", "text"])
    assert towers.exact["next"] and towers.bias["next"] == 0
    scores = towers.scale["next"] * (user * item).sum(1)
    torch.testing.assert_close(scores, of_both, rtol=1e-12, atol=1e-12)
    # Some rows have no history, and masked rows have nothing.
    known = [float(len(row.items) > 1) for row in rows] + [0.0, 0.0]
    assert user.norm(dim=1).tolist() == pytest.approx(known) and 0.0 in known[:-2]


def test_a_users_vector_knows_nothing_of_the_rows_item():
    whole = Whole(item="text+id", loss="in_batch").eval()
    rows = make_rows()
    other = [Row(r.number, r.domain, [*r.items[:-1], (r.items[-1] + 1) % NUM_ITEMS]) for r in rows]
    one, two = (
        whole.model(whole.embeddings(b), b, side="user")["vectors"]["next"]
        for b in (as_batch(x, 12) for x in (rows, other))
    )
    assert torch.equal(one, two)


FEATURES = {
    "query": {"role": "query", "kind": "text"},
    "title": {"role": "item", "kind": "text"},
    "item": {"role": "item", "kind": "id", "aspect": "id", "vocabulary": {"size": 5}},
}


def schema_of(*features: str) -> Schema:
    tree = {
        "name": "s",
        "domains": {"names": ["a"]},
        "features": {n: FEATURES[n] for n in features},
        "labels": {"click": {}},
    }
    return from_dict(Schema, tree, "test")


def test_a_foundation_without_a_query_has_no_towers():
    towers = foundation.towers_of(schema_of("query", "title", "item"), ["query", "title", "item"])
    assert (towers.user_features, towers.item_features) == (("query",), ("title",))
    assert not towers.exact["text"] and "experts" in towers.why["text"]
    with pytest.raises(UserError, match="reads no text of the query, so it has no two towers"):
        foundation.towers_of(schema_of("title", "item"), ["title", "item"])
    with pytest.raises(UserError, match="no text of the query and of the item"):
        foundation.towers_of(schema_of("query", "title", "item"), ["item"])
