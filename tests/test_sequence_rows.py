"""Sequences as the recipes fold, cut and thin them, and what two domains share."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from raw_recipes import lists, overlap, recipe_rows, sequence_rows, sequence_sources

from dist_rec.data.rows import Ragged

# Folding, windows, cores ---------------------------------------------------------------------


def test_folding_prefers_the_user_and_survives_circles():
    histories = [(1,), (1, 2), (1,), (1, 2), (7,), (1, 2, 3)]
    items = [2, 3, 2, 4, 8, 5]
    users = [None, "a", None, "b", None, "a"]
    assert sorted(sequence_rows.fold(histories, items, users, 10)) == [[0, 1, 5], [2, 3], [4]]
    # Of two rows that fit, the user's own, though the other stands first.
    own = sequence_rows.fold([(1,), (1,), (1, 2)], [2, 2, 3], [None, "a", "a"], 10)
    assert sorted(own) == [[0], [1, 2]]
    # Another known user's row is never continued.
    assert sequence_rows.fold([(1,), (1, 2)], [2, 3], ["a", "b"], 10) == [[0], [1]]
    # Cut to two, one item again and again: rows that each continue the other.
    assert sorted(sequence_rows.fold([(9,), (9, 9), (9, 9), (9, 9)], [9, 9, 9, 9], ["a"] * 4, 2)[0]) == [0, 1, 2, 3]
    circle = sequence_rows.fold([(1, 2), (2, 1)], [1, 2], [None, None], 2)
    assert sorted(row for chain in circle for row in chain) == [0, 1]


def invented(lengths: list[int], domain: str = "shop") -> sequence_rows.Sequences:
    """Leave-one-out sequences of users with so many events; events and times count up."""
    user = np.repeat(np.arange(len(lengths)), lengths)
    item = np.arange(len(user)) % 97
    size = int(item.max()) + 1
    catalog = recipe_rows.Catalog(pa.array(map(str, range(size))), pa.array([f"text {n}." for n in range(size)]))
    names = pa.array([f"u{n}" for n in range(len(lengths))])
    return sequence_sources.from_interactions(domain, catalog, user, item, 1_000 + np.arange(len(user)), names)


@pytest.mark.parametrize("max_length", [1, 3, 4, 50])
def test_windows_make_every_event_but_the_first_a_target_once(max_length):
    lengths = [1, 2, 3, 4, 5, 6, 9, 10, 11, 30]
    given = invented(lengths)
    cut = sequence_rows.framed(given, max_length)
    targets, start = cut.targets, np.cumsum([0, *lengths])
    for user, length in enumerate(lengths):
        of = np.flatnonzero((targets.owner == user) & (targets.split == 0))
        # Items and times count up along a user's events: what is seen as a target, and when.
        events = lists(sequence_rows.whole(targets, of))
        expected = [(start[user] + at) % 97 for at in range(max(length - 2, 0))]
        joined = [event for number, one in enumerate(events) for event in one[bool(number) :]]
        assert joined == (expected if len(expected) > 1 else [])
        assert all(one[-1] == after[0] for one, after in zip(events[:-1], events[1:], strict=True))
        assert all(len(one) == max_length + 1 for one in events[1:])
        assert all(2 <= len(one) <= max_length + 1 for one in events)
        times = targets.time.take(pa.array(of)).to_pylist()
        assert [time - 1_000 - start[user] for time in times] == [expected.index(one[-1]) for one in events]
        held = np.flatnonzero((targets.owner == user) & (targets.split > 0))
        assert [len(one) for one in lists(targets.history.take(held))] == [
            min(past, max_length) for past in (length - 2, length - 1) if past > 0
        ]
    counts = sequence_rows.statistics(cut)
    assert counts["positions"] == sum(max(length - 3, 0) for length in lengths)
    assert counts["left_out"]["users of one event"] == 1


def test_events_of_one_moment_stay_in_the_order_given():
    item = np.array([5, 3, 4, 1, 2, 0])
    time = np.array([7, 7, 7, 7, 3, 7])
    catalog = recipe_rows.Catalog(pa.array(list("abcdef")), pa.array(list("abcdef")))
    found = sequence_sources.from_interactions("x", catalog, np.zeros(6, np.int64), item, time, pa.array(["u"]))
    test = found.targets.take(np.flatnonzero(found.targets.split == 2))
    assert lists(sequence_rows.whole(test, np.arange(1))) == [[2, 5, 3, 4, 1, 0]]


def test_a_core_is_a_fixed_point():
    # User 2 falls with item 9, then item 1 with user 2, then nothing.
    user = np.array([0, 0, 1, 1, 2, 2, 0, 1])
    item = np.array([0, 2, 0, 2, 1, 9, 1, 3])
    assert sequence_rows.core(user, item, 2).tolist() == [0, 1, 2, 3]
    assert sequence_rows.core(user[:0], item[:0]).tolist() == []
    assert len(sequence_rows.core(user, item, 3)) == 0


def test_a_cap_keeps_whole_users():
    given = sequence_rows.framed(invented([6] * 40), 50)
    few = sequence_rows.capped(given, 30, 0)
    assert len(few.targets) == 30 and len(few.catalog) == len(given.catalog)
    assert set(np.bincount(few.targets.owner)) == {0, 3}
    assert few.left_out["rows of users beyond 30 rows"] == 3 * 40 - 30
    assert sequence_rows.training_only(given).left_out["valid and test rows"] == 2 * 40
    assert not np.array_equal(few.targets.owner, sequence_rows.capped(given, 30, 1).targets.owner)


# Overlap -------------------------------------------------------------------------------------


def named(domain: str, users: list[str | None], events: list[list[int]], asins, titles) -> sequence_rows.Sequences:
    """Training sequences of these users, and a test row each of its last event."""
    history = Ragged.from_lengths(
        np.array([x for one in events for x in one[:-1]], np.int64), np.array([len(one) - 1 for one in events])
    )
    targets = recipe_rows.Targets(
        item=np.array([one[-1] for one in events]),
        history=history,
        split=np.zeros(len(events), np.int64),
        owner=np.arange(len(events)),
        user=pa.array([str(n) for n in range(len(events))]),
        user_id=pa.array(users, pa.string()),
    )
    catalog = recipe_rows.Catalog(pa.array(map(str, range(len(asins)))), pa.array([f"{t}. More." for t in titles]))
    known = None if domain == "target" else pa.array(titles)
    return sequence_rows.Sequences(domain, catalog, targets, asins=pa.array(asins, pa.string()), titles=known)


def test_overlap_is_counted_from_both_sides_and_taken_out():
    target = named("target", ["a", "b", "c"], [[0, 1], [1, 2], [2, 0]], ["A", "B", "C"], ["One", "Two. Half", "Three"])
    # By raw id: 0 (its other title does not matter). By title: 1, without a raw id. Not 2: it has another raw id.
    shop = named(
        "shop",
        ["a", None, "z"],
        [[0, 3, 1], [1, 2, 3], [0, 2, 3]],
        ["A", None, "X", None],
        ["?", "two. half", "Three", "four"],
    )
    found = overlap.Overlap([target], ["target"])
    users, items = found.add(shop)
    assert users == {"a"} and items.tolist() == [True, True, False, False]
    (pair,) = found.pairs
    here, there = pair["pretraining"], pair["target"]
    assert pair["users_shared"] == 1 and pair["removed"]
    assert (here["users"], here["users_with_raw_id"], here["users_shared_of_named"]) == (3, 2, pytest.approx(1 / 3))
    assert there["users_shared_of_named"] == pytest.approx(1 / 3)
    assert (here["items_shared_by_id"], here["items_shared_by_title"], here["items_with_raw_id"]) == (1, 1, 2)
    assert (there["items"], there["items_shared_by_id"], there["items_shared_by_title"]) == (3, 1, 1)
    assert here["training_events_of_shared_items"] == pytest.approx(4 / 9, abs=1e-6)
    assert here["training_events_of_shared_users"] == pytest.approx(3 / 9, abs=1e-6)
    assert found.totals()["target"]["users_shared"] == 1 and found.totals()["target"]["items_shared"] == 2
    assert "1 of 3 users and 2 of 3 items" in found.in_words()[-1]
    left = sequence_rows.without(shop, users, items)
    assert left.catalog.ids.to_pylist() == ["2", "3"] and left.titles.to_pylist() == ["Three", "four"]
    assert lists(sequence_rows.whole(left.targets, np.arange(len(left.targets)))) == [[0, 1], [0, 1]]
    assert left.left_out["training sequences of users of a target"] == 1
    assert left.left_out["items of a target"] == 2
    again = overlap.Overlap([target])
    again.add(left)
    assert again.totals()["target"]["users_shared"] == again.totals()["target"]["items_shared"] == 0


def test_taking_items_out_keeps_times_beside_their_events():
    given = invented([8, 9])
    gone = np.zeros(len(given.catalog), bool)
    gone[[2, 5, 12]] = True
    left = sequence_rows.without(given, set(), gone)
    cut = sequence_rows.framed(left, 2).targets
    ids = left.catalog.ids.to_pylist()
    # An item's number is also its moment here.
    assert [int(ids[item]) + 1_000 for item in cut.item] == cut.time.to_pylist()
    # 4 and 6 training events are left.
    assert len(cut) == 2 + 3


def test_a_domain_shares_every_user_with_itself_and_none_with_a_namesake():
    one, other = invented([6, 7]), invented([6, 7], "other")
    found = overlap.Overlap([one])
    found.add(one)
    found.add(other)
    assert [pair["users_shared"] for pair in found.pairs] == [2, 0]
