"""Recipes of the foundation: honest splits and negatives, the same parts on every run."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest
from raw_recipes import (
    RAW,
    RECIPES,
    ROOT,
    UNIFORM,
    amazon,
    common,
    digest,
    foundation,
    needs_raw,
    part_of,
    recipe_rows,
    retail,
)

from dist_rec.data.index import read_index
from dist_rec.data.rows import Ragged
from dist_rec.errors import UserError


@needs_raw
@pytest.mark.parametrize("domain", ["homedepot", "chorus", "elastic_movies"])
def test_a_query_is_in_one_split_and_grades_fill_the_scale(domain, tmp_path):
    table = part_of(domain, tmp_path, max_rows=20_000)
    query, split = (table[c].to_pylist() for c in ("query_key", "split"))
    assert len(set(zip(query, split, strict=True))) == len(set(query))
    assert set(split) == set(common.SPLITS)
    known = {s for s, name in zip(split, table["query_id"].to_pylist(), strict=True) if name is not None}
    assert known == {"train"}
    relevance = table["relevance"].to_numpy()
    assert relevance.min() == 0 and relevance.max() == 3
    assert table["ctr"].null_count == table["history"].null_count == table["user_id"].null_count == len(table)
    assert len(table) <= 20_000


def raw_sequences(domain: str) -> dict[str, list[str]]:
    with gzip.open(RAW / f"amazon2014_{domain}" / "sequential_data.txt.gz", "rt") as file:
        return {user: items for user, *items in (line.split() for line in file)}


@needs_raw
@pytest.mark.parametrize("kind", recipe_rows.SAMPLING)
def test_negatives_are_never_the_users_items(kind, tmp_path):
    table = part_of("beauty", tmp_path, recipe_rows.Sampling(2, kind), max_rows=30_000)
    sequences = {f"beauty:{u}": {f"beauty:{i}" for i in items} for u, items in raw_sequences("beauty").items()}
    columns = [table[c].to_pylist() for c in ("user", "item_id", "ctr")]
    assert all((item in sequences[user]) == bool(ctr) for user, item, ctr in zip(*columns, strict=True))
    ctr = table["ctr"].to_numpy().reshape(-1, 3)
    assert (ctr == [1, 0, 0]).all()
    assert len(table) <= 30_000
    pairs = np.array(table["item_id"].to_pylist()).reshape(-1, 3)
    assert (pairs[:, 1] != pairs[:, 2]).all()


@needs_raw
def test_leave_one_out_histories_are_the_raw_prefixes(tmp_path):
    table = part_of("toys", tmp_path, max_rows=4_000, targets_per_user=2)
    sequences = raw_sequences("toys")
    seen = defaultdict(list)
    for row in table.select(["user", "item_id", "history", "history_text", "split", "ctr"]).to_pylist():
        assert len(row["history"]) == len(row["history_text"])
        if row["ctr"]:
            items = sequences[row["user"].split(":")[1]]
            at = len(items) - 4 + len(seen[row["user"]])
            assert row["item_id"] == f"toys:{items[at]}"
            assert row["history"] == [f"toys:{i}" for i in items[max(at - 50, 0) : at]]
            seen[row["user"]].append(row["split"])
    assert all(splits == ["train", "train", "valid", "test"] for splits in seen.values()) and seen


@needs_raw
def test_retail_keeps_the_known_lines_and_looks_only_backwards(tmp_path):
    lines = retail.read_invoices(RAW)
    assert len(lines) == 397_924 and len(set(lines["CustomerID"].to_pylist())) == 4_339
    bought = defaultdict(set)
    customers, codes, times = (lines[c].to_pylist() for c in ("CustomerID", "StockCode", "InvoiceDate"))
    for user, code, time in zip(customers, codes, times, strict=True):
        bought[user].add((code.upper(), time))
    table = part_of("online_retail", tmp_path, max_rows=3_000)
    for row in table.to_pylist():
        user, name = row["user"].split(":")[1], row["item_id"].split(":")[1]
        assert (name in {code for code, _ in bought[user]}) == bool(row["ctr"])
        earlier = {code for code, time in bought[user] if time < row["time"]}
        assert {i.split(":")[1] for i in row["history"]} <= earlier
        assert bool(row["history"]) == any(code[:5].isdigit() for code in earlier)
    split, time = table["split"].to_numpy(zero_copy_only=False), table["time"].to_numpy()
    assert time[split == "train"].max() < time[split == "valid"].min()
    assert time[split == "valid"].max() < time[split == "test"].min()


@needs_raw
def test_rows_without_users_are_chained_so_that_negatives_stay_unowned():
    _, targets, owned = amazon.load_by_time("cds", RAW, None, 50)
    users = np.array(targets.user.to_pylist(), object)
    assert all(user is None for user in users[targets.split == 0])
    drawn = recipe_rows.sample_negatives("cds", targets, owned, 5_841, UNIFORM)[:, 0]
    had = defaultdict(set)
    evaluated = np.flatnonzero(targets.split > 0)
    history = targets.history
    for row in evaluated:
        had[users[row]] |= {targets.item[row], *history.values[history.offsets[row] : history.offsets[row + 1]]}
    assert all(drawn[row] not in had[users[row]] for row in evaluated)
    assert len(np.unique(targets.owner)) > 6_000


def test_chains_join_what_continues_and_nothing_else():
    histories = [[1], [1, 2], [7], [1, 2, 3], [9, 9], [5]]
    owner = amazon.chain_rows(histories, [2, 3, 8, 4, 1, 6], [None, None, None, "a", "b", "a"])
    assert owner.tolist() == [0, 0, 2, 0, 4, 0]


@needs_raw
def test_given_splits_of_scientific_are_kept(tmp_path):
    _, targets, _ = amazon.load_scientific("scientific", RAW, None, 50)
    assert np.bincount(targets.split).tolist() == [34_101, 8_442, 8_442]
    _, few, _ = amazon.load_scientific("scientific", RAW, 1, 50)
    assert np.bincount(few.split).tolist() == [8_442, 8_442, 8_442]
    lengths = few.history.lengths
    train, valid = lengths[few.split == 0], lengths[few.split == 1]
    train, valid = train[np.argsort(few.owner[few.split == 0])], valid[np.argsort(few.owner[few.split == 1])]
    # The files themselves cut histories at 50.
    assert np.array_equal(np.minimum(train + 1, 50), valid)


@needs_raw
def test_office_trains_only_before_validation(tmp_path):
    table = part_of("office", tmp_path)
    split, time = table["split"].to_numpy(zero_copy_only=False), table["time"].to_numpy()
    assert time[split == "train"].max() < time[split == "valid"].min()
    assert {s: int((split == s).sum()) // 2 for s in ("valid", "test")} == {"valid": 4_866, "test": 4_866}


def test_the_new_domain_comes_last_so_that_older_ones_keep_their_numbers():
    assert foundation.foundation_schema().domains.names[-1] == "ml1m"


@needs_raw
def test_parts_repeat_and_a_cap_only_leaves_out(tmp_path):
    folders = [tmp_path / name for name in ("first", "again", "seed", "full")]
    for folder in folders:
        folder.mkdir()
    first, again, seed, full = folders
    tables = {}
    for folder, sampling, cap in (
        (first, UNIFORM, 5_000),
        (again, UNIFORM, 5_000),
        (seed, recipe_rows.Sampling(seed=1), 5_000),
        (full, UNIFORM, None),
    ):
        tables[folder] = {d: part_of(d, folder, sampling, max_rows=cap) for d in ("homedepot", "office")}
    assert digest(first) == digest(again)
    assert all(digest(seed)[name] != digest(first)[name] for name in digest(first))
    for domain, table in tables[first].items():
        whole = {str(row) for row in tables[full][domain].to_pylist()}
        assert 0 < len(table) <= 5_000 < len(whole)
        assert all(str(row) in whole for row in table.to_pylist())


# Shared pieces -------------------------------------------------------------------------------


def test_owner_of_everything_gets_no_negative():
    targets = recipe_rows.Targets(
        item=np.array([0, 1]),
        history=Ragged.from_lengths(np.array([1, 2], np.int64), np.array([2, 0])),
        split=np.zeros(2, np.int64),
        owner=np.array([0, 1]),
        user=pa.array(["a", "b"]),
        user_id=pa.array(["a", "b"]),
    )
    owned = recipe_rows.Owned(np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 0, 1]))
    drawn = recipe_rows.sample_negatives("x", targets, owned, 3, recipe_rows.Sampling(2))
    assert drawn.tolist() == [[-1, -1], [2, -1]]
    catalog = recipe_rows.Catalog(pa.array(["p", "q", "r"]), pa.array(["P", None, "R"]))
    (table,) = recipe_rows.recommendation_tables("x", catalog, targets, owned, recipe_rows.Sampling(2))
    assert table["item_id"].to_pylist() == ["x:p", "x:q", "x:r"]
    assert table["history_text"].to_pylist() == [["", "R"], [], []]


def test_texts_are_cleaned():
    assert common.clean_text("8.5&rdquo; x &amp;amp;\n 11") == "8.5” x & 11"
    assert common.clean_text('<span class="a-size-medium a-color-secondary a-text-normal') == ""
    assert common.clean_text("I <3 &lt;b&gt;you</b>") == "I <3 you"
    assert common.clean_texts(["", " a "]).to_pylist() == [None, "a"]


def test_hashes_never_move():
    assert common.stable_hash(["a", "ä"]).tolist() == [3405396810240292928, 4152366542966443504]
    assert common.mix(1, np.array([2, 3])).tolist() == [9550467469912592448, 13625131664576196015]
    values = common.uniform(0, np.arange(20_000))
    assert values.min() >= 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.01
    parts = np.bincount(common.split_groups(common.mix(np.arange(20_000)), 0)) / 20_000
    assert np.allclose(parts, [0.8, 0.1, 0.1], atol=0.01)


def test_every_missing_raw_folder_is_named(tmp_path):
    for domain in foundation.foundation_schema().domains.names:
        with pytest.raises(UserError, match=r"DIST_REC_RAW") as caught:
            foundation.write_domain(domain, tmp_path, tmp_path, UNIFORM)
        assert str(tmp_path) in str(caught.value)


def test_unknown_domain_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'beauty'"):
        foundation.foundation_schema(["beuty"])
    assert foundation.foundation_schema(["toys", "chorus"]).domains.names == ["chorus", "toys"]


# The whole way -------------------------------------------------------------------------------


def recipe(script: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(RECIPES / script), *arguments], env=environment, capture_output=True, text=True
    )


def test_command_line_fails_in_words(tmp_path):
    done = recipe("foundation.py", "--out", str(tmp_path / "out"), "--raw", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: raw data folder") and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


@needs_raw
def test_foundation_recipe_builds_a_data_set(tmp_path):
    out = tmp_path / "built"
    options = ("--domains", "chorus,office,cds", "--max-rows-per-domain", "1500", "--workers", "1")
    done = recipe("foundation.py", "--out", str(out), "--raw", str(RAW), *options)
    assert done.returncode == 0, done.stderr
    assert list(out.rglob("index.json"))
    assert not list(tmp_path.glob(".recipe-*"))

    # One domain more, as an extension: to finetune on.
    new = tmp_path / "new"
    options = ("--domains", "scientific", "--extends", str(out), "--max-rows-per-domain", "1500", "--workers", "1")
    done = recipe("foundation.py", "--out", str(new), "--raw", str(RAW), *options)
    assert done.returncode == 0, done.stderr
    old, index = read_index(str(out / "train")), read_index(str(new / "train"))
    assert index.extension.domains == ["scientific"]
    assert index.schema.domains.names == [*old.schema.domains.names, "scientific"]
    assert index.schema.features["item_id"].vocabulary.inherited == [old.schema.features["item_id"].vocabulary.size]
