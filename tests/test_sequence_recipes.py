"""Sequence recipes: published counts, the sources' own splits, every event a target once, honest overlap.

Needs the raw folder for some tests (DIST_REC_RAW, else ../shared/data beside the repository).
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "shards" / "recipes"
sys.path.insert(0, str(RECIPES))

import amazon2018  # noqa: E402
import common  # noqa: E402
import overlap  # noqa: E402
import sequence_rows  # noqa: E402
import sequence_sources  # noqa: E402
import sequences as recipe  # noqa: E402
from rows import Catalog, Targets  # noqa: E402

from dist_rec.data.index import read_index  # noqa: E402
from dist_rec.data.rows import Ragged  # noqa: E402
from dist_rec.errors import UserError  # noqa: E402

RAW = common.raw_root(None)
needs_raw = pytest.mark.skipif(not RAW.is_dir(), reason=f"no raw data: {RAW} does not exist (set DIST_REC_RAW)")


def source(domain: str) -> sequence_rows.Sequences:
    return recipe.SOURCES[domain](domain, RAW)


def lists(ragged: Ragged) -> list[list[int]]:
    return [ragged.values[a:b].tolist() for a, b in zip(ragged.offsets[:-1], ragged.offsets[1:], strict=True)]


def prefixes(targets: Targets, longest: int) -> Counter:
    """What prefix expansion makes of the training rows: (history, item) pairs."""
    rows = np.flatnonzero(targets.split == 0)
    found = Counter()
    for events in lists(sequence_rows.whole(targets, rows)):
        found.update((tuple(events[max(at - longest, 0) : at]), events[at]) for at in range(1, len(events)))
    return found


def lines(path: Path) -> list[list[str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n").split("\t") for line in file]


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


# Public sources ------------------------------------------------------------------------------


@needs_raw
def test_scientific_is_the_public_split_prefix_by_prefix():
    folder = RAW / "amazon2018_scientific_cowpirec"
    found = source("scientific")
    rows = {name: lines(folder / f"Scientific.{name}.inter.gz")[1:] for name in common.SPLITS}
    published = Counter((numbers(history), int(item)) for _, history, item in rows["train"])
    assert published.total() == 34_101
    assert prefixes(found.targets, 50) == published
    assert (found.targets.split == 0).sum() == 8_442
    for number, name in ((1, "valid"), (2, "test")):
        held = found.targets.take(np.flatnonzero(found.targets.split == number))
        ours = zip(held.user.to_pylist(), map(tuple, lists(held.history)), held.item.tolist(), strict=True)
        assert list(ours) == [(user, numbers(history), int(item)) for user, history, item in rows[name]]
    asins = {int(number): asin for asin, number in lines(folder / "Scientific.item2index.gz")}
    texts = dict(lines(folder / "Scientific.text.gz")[1:])
    assert found.catalog.ids.to_pylist() == [asins[number] for number in range(4_385)]
    assert found.catalog.texts.to_pylist() == [texts[asins[number]] for number in range(4_385)]
    users = {number: name for name, number in lines(folder / "Scientific.user2index.gz")}
    named = zip(found.targets.user.to_pylist(), found.targets.user_id.to_pylist(), strict=True)
    assert all(users[number] == name for number, name in named)


@needs_raw
@pytest.mark.parametrize(("domain", "rows"), [("cds", 49_251), ("movies_tv", 21_937)])
def test_rows_without_users_fold_to_sequences_that_expand_to_them(domain, rows):
    folder = RAW / sequence_sources.BY_TIME[domain]
    found = source(domain)
    published = Counter((numbers(history), int(item)) for history, item in lines(folder / "train.tsv.gz")[1:])
    assert published.total() == rows
    assert prefixes(found.targets, 10) == published
    # One sequence for each row of one event's history: it begins nowhere else.
    assert (found.targets.split == 0).sum() == sum(n for (past, _), n in published.items() if len(past) == 1)
    assert not found.left_out["training sequences that begin inside a history"]


@needs_raw
@pytest.mark.parametrize(
    ("domain", "users", "items", "interactions", "positions"),
    [
        ("scientific", 8_442, 4_385, 59_427, 34_101),
        ("online_retail", 16_520, 3_469, 519_906, 470_346),
        ("online_retail_shuffled", 16_520, 3_469, 519_906, 470_346),
        ("beauty", 22_363, 12_101, 198_502, 198_502 - 3 * 22_363),
        ("toys", 19_412, 11_924, 167_597, 167_597 - 3 * 19_412),
        ("games", 50_546, 16_859, 440_264, 440_264 - 3 * 50_546),
        ("ml1m", 6_040, 3_416, 999_611, 999_611 - 3 * 6_040),
    ],
)
def test_counts_are_the_published_ones(domain, users, items, interactions, positions):
    found = sequence_rows.framed(source(domain), 50)
    counts = sequence_rows.statistics(found)
    assert [counts[name] for name in ("users", "items", "interactions", "positions")] == [
        users,
        items,
        interactions,
        positions,
    ]
    assert counts["rows"]["valid"] == counts["rows"]["test"] == users
    lengths = found.targets.history.lengths
    # The source of games cuts whole sequences at 50.
    assert lengths.max() == (49 if domain == "games" else 50) and lengths.min() >= 1
    assert found.catalog.texts.null_count == 0


@needs_raw
def test_beauty_holds_out_the_last_two_of_every_line():
    found = source("beauty")
    with gzip.open(RAW / "amazon2014_beauty" / "sequential_data.txt.gz", "rt") as file:
        raw = {user: [int(item) for item in items] for user, *items in (line.split() for line in file)}
    events = lists(sequence_rows.whole(found.targets, np.arange(len(found.targets))))
    for user, split, one in zip(found.targets.user.to_pylist(), found.targets.split, events, strict=True):
        assert one == raw[user][: len(raw[user]) - 2 + split]


@needs_raw
def test_office_keeps_its_split_and_trains_before_it():
    found = source("office")
    targets, time = found.targets, found.targets.time.to_numpy()
    assert np.bincount(targets.split)[1:].tolist() == [4_866, 4_866] and len(found.catalog) == 3_459
    assert time[targets.split == 0].max() < time[targets.split == 1].min()
    assert found.asins.null_count < 200


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
    catalog = Catalog(pa.array(map(str, range(size))), pa.array([f"text {n}." for n in range(size)]))
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
    catalog = Catalog(pa.array(list("abcdef")), pa.array(list("abcdef")))
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
    targets = Targets(
        item=np.array([one[-1] for one in events]),
        history=history,
        split=np.zeros(len(events), np.int64),
        owner=np.arange(len(events)),
        user=pa.array([str(n) for n in range(len(events))]),
        user_id=pa.array(users, pa.string()),
    )
    catalog = Catalog(pa.array(map(str, range(len(asins)))), pa.array([f"{t}. More." for t in titles]))
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


# The paper's raw files -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "clean"),
    [
        ("Soap", "Soap."),
        ("Soap...", "Soap."),
        ('8" &amp;\nwide', "8 &wide."),
        (["Home &amp; Kitchen", "Bath"], "Home & Kitchen Bath."),
        ("", "."),
        ("x" * 1_998, "x" * 1_998 + "."),
        ("x" * 1_999, ""),
    ],
)
def test_fields_are_cleaned_as_in_the_paper(value, clean):
    assert amazon2018.cleaned(value) == clean


def raw_category(root: Path) -> None:
    """Six users with six items each, all at one moment for the first; one of the items has no metadata."""
    (root / "Ratings").mkdir(parents=True)
    (root / "Metadata").mkdir()
    rows = []
    for user in range(6):
        for at in range(7):
            time = 500 if user == 0 else 500 + (at * 3 + user) % 7
            rows.append(f"{'NOMETA' if at == 6 else f'A{at}'},U{user},5.0,{time}")
    rows += [rows[0], "A0,LONER,1.0,3"]
    (root / "Ratings" / "Prime_Pantry.csv").write_text("\n".join(rows) + "\n")
    items = [
        {"asin": f"A{at}", "title": f"Thing {at}", "category": ["Pantry", f"Shelf {at}"], "brand": "B"}
        for at in range(6)
    ]
    items[1] = {"asin": "A1"}
    items[2] = {"asin": "A2", "title": "", "brand": "Only"}
    items += [{"asin": "A0", "title": "A second line is not read"}, {"asin": "A9", "title": "never rated"}]
    with gzip.open(root / "Metadata" / "meta_Prime_Pantry.json.gz", "wt") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)


def test_a_raw_category_follows_the_papers_steps(tmp_path):
    raw_category(tmp_path)
    found = amazon2018.category("amazon_pantry", tmp_path)
    assert found.catalog.ids.to_pylist() == [f"A{at}" for at in range(6)]
    assert found.catalog.texts.to_pylist()[:4] == [
        "Thing 0. Pantry Shelf 0. B. ",
        ".",
        ". Only. ",
        "Thing 3. Pantry Shelf 3. B. ",
    ]
    assert found.left_out["ratings of items without metadata"] == 6
    assert found.left_out["repeated ratings"] == 1 and found.left_out["items without text"] == 1
    counts = sequence_rows.statistics(sequence_rows.framed(found, 50))
    assert (counts["users"], counts["interactions"], counts["positions"]) == (6, 36, 36 - 3 * 6)
    assert set(found.targets.user_id.to_pylist()) == {f"U{user}" for user in range(6)}
    test = found.targets.take(np.flatnonzero(found.targets.split == 2))
    events = dict(zip(test.user.to_pylist(), lists(sequence_rows.whole(test, np.arange(6))), strict=True))
    assert events["U0"] == [0, 1, 2, 3, 4, 5]
    assert events["U1"] == sorted(range(6), key=lambda at: (at * 3 + 1) % 7)


def test_the_shops_file_gives_invoices_as_users(tmp_path):
    rows = ["InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country"]
    for invoice in range(5):
        rows += [
            f"C{invoice},{code},{' TEA  CUP ' if not invoice else 'other'},-1,12/1/2010 8:26,1,,UK" for code in "vwxyz"
        ]
    rows += [
        "C0,v,repeated,-1,12/1/2010 8:26,1,,UK",
        "C0,q,,1,12/1/2010 8:26,1,,UK",
        "C1,\xa3,pound,1,12/1/2010 8:26,1,,UK",
    ]
    (tmp_path / "data.csv").write_text("\n".join(rows) + "\n", encoding="latin1")
    found = amazon2018.shop("kaggle_online_retail", tmp_path)
    assert found.catalog.ids.to_pylist() == list("vwxyz")
    assert set(found.catalog.texts.to_pylist()) == {"tea  cup."}
    assert sequence_rows.statistics(sequence_rows.framed(found, 50))["interactions"] == 25
    assert found.left_out["lines without description"] == 1


def test_an_invoice_is_shuffled_alike_each_time(monkeypatch):
    lines = pa.table(
        {
            "InvoiceNo": [str(at // 40) for at in range(240)],
            "StockCode": [f"{at % 40:05d}" for at in range(240)],
            "Description": ["cup"] * 240,
            "Quantity": [1] * 240,
            # One moment an invoice but for the fourth, of two: what is later stays later.
            "InvoiceDate": pa.array([60 * (at // 40) + (120 <= at < 140) * -1 for at in range(240)], pa.timestamp("s")),
        }
    )
    monkeypatch.setattr(sequence_sources, "read_lines", lambda root: lines)

    def orders(domain: str) -> dict[str, list[int]]:
        targets = sequence_sources.SOURCES[domain](domain, RAW).targets
        test = targets.take(np.flatnonzero(targets.split == 2))
        return dict(zip(test.user.to_pylist(), lists(sequence_rows.whole(test, np.arange(6))), strict=True))

    found = orders("online_retail_shuffled")
    assert found == orders("online_retail_shuffled")
    assert set(map(tuple, orders("online_retail").values())) == {tuple(range(40))}
    assert all(sorted(order) == list(range(40)) for order in found.values())
    assert len(set(map(tuple, found.values()))) == 6
    assert set(found["3"][:20]) == set(range(20)) and set(found["0"][:20]) != set(range(20))


# The whole way -------------------------------------------------------------------------------


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(RECIPES / "sequences.py"), "--workers", "1", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def stored(folder: Path) -> list[dict]:
    """Every row of a data set."""
    rows = []
    for shard in read_index(str(folder)).shards:
        for sample in webdataset.WebDataset(str(folder / shard.file), shardshuffle=False, empty_check=False):
            rows += pa.ipc.open_stream(sample["arrow"]).read_all().to_pylist()
    return rows


def test_the_recipe_builds_rows_and_a_catalogue_that_share_ids_and_texts(tmp_path):
    raw_category(tmp_path / "raw")
    out = tmp_path / "built"
    done = run("--out", out, "--raw", tmp_path / "raw", "--domains", "amazon_pantry", "--max-length", 3)
    assert done.returncode == 0, done.stderr
    assert "6 users, 6 items, 36 interactions" in done.stdout and not list(tmp_path.glob(".recipe-*"))
    catalogue, train = stored(out / "catalogue"), stored(out / "train")
    assert [row["item_id"] for row in catalogue] == [1, 2, 3, 4, 5, 6]
    assert all(row["label:next"] is None and row["history"] is None for row in catalogue)
    texts = {row["item_id"]: row["title"]["text"] for row in catalogue}
    assert texts[2] == "."
    for row in [*train, *stored(out / "valid"), *stored(out / "test")]:
        assert row["label:next"] == 1 and row["key:user"] is not None and row["key:time"] >= 500
        assert row["title"]["text"] == texts[row["item_id"]]
        assert [text["text"] for text in row["history_text"]] == [texts[item] for item in row["history"]]
        assert 1 <= len(row["history"]) <= 3
    assert sum(len(row["history"]) for row in train) == 18
    held = set(pq.read_table(out / "texts.parquet")["text"].to_pylist())
    assert set(texts.values()) <= held
    schema = read_index(str(out / "catalogue")).schema
    assert schema == read_index(str(out / "train")).schema and schema.features["item_id"].vocabulary.size == 7
    assert json.loads((out / "statistics.json").read_text())["amazon_pantry"]["positions"] == 18
    for name in ("kaggle_online_retail", "amazon_pantry"):
        (tmp_path / "raw" / "data.csv").write_text("")
        done = run("--out", tmp_path / "more", "--raw", tmp_path / "raw", "--domains", name, "--extends", out)
        assert done.returncode == 2 and "Traceback" not in done.stderr, name


@needs_raw
def test_a_target_extends_what_is_pretrained_on(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    options = ("--domains", "movies_tv", "--train-only", "--max-rows-per-domain", 500, "--without-overlap", "office")
    done = run("--out", old, *options)
    assert done.returncode == 0, done.stderr
    assert not (old / "test").exists() and "target office" in done.stdout
    found = json.loads((old / "overlap.json").read_text())
    assert found["targets"]["office"]["users_shared"] == 28 and found["pairs"][0]["removed"]
    done = run("--out", new, "--domains", "office", "--max-rows-per-domain", 500, "--extends", old)
    assert done.returncode == 0, done.stderr
    schema = read_index(str(new / "train")).schema
    assert schema.domains.names == ["movies_tv", "office"]
    assert schema.features["item_id"].vocabulary.inherited == [2_654]
    assert min(row["item_id"] for row in stored(new / "catalogue")) == 2_654


def test_wrong_command_lines_fail_in_words(tmp_path):
    for options, words in (
        (["--domains", "beuty"], "Did you mean 'beauty'"),
        (["--domains", ","], "names no domain"),
        (["--domains", "toys", "--overlap-with", "toy"], "Did you mean 'toys'"),
        (["--domains", "toys", "--without-overlap", "office"], "--train-only"),
        (["--domains", "toys", "--without-overlap", "toys", "--train-only"], "nothing of toys"),
        (["--domains", "toys", "--raw", str(tmp_path)], "DIST_REC_RAW"),
        (["--domains", "amazon_home", "--raw", str(tmp_path)], "Home_and_Kitchen.csv"),
        (["--domains", "kaggle_online_retail", "--raw", str(tmp_path)], "data.csv"),
    ):
        done = run("--out", tmp_path / "out", *options)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_the_schema_knows_every_source_and_no_other():
    assert sorted(recipe.sequence_schema(list(recipe.SOURCES)).domains.names) == sorted(recipe.SOURCES)
    history = recipe.sequence_schema(["toys"], 7).features["history_text"]
    assert history.max_length == 7
    with pytest.raises(UserError, match="unknown domain"):
        recipe.sequence_schema(["home"])
