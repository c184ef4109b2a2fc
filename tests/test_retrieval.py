"""Vectors on disk, every task's index, compact forms; whose rows stand for items and users."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from conftest import build_small
from index_vectors import COUNT, WIDTH, clustered, pieces, write_parts

from dist_rec.data.index import read_index
from dist_rec.data.reader import ShardReader
from dist_rec.errors import UserError
from dist_rec.models.towers import TwoTowers
from dist_rec.retrieval.compact import build_compact, read_compact, write_compact
from dist_rec.retrieval.entities import item_feature, item_keys, last_rows, user_key
from dist_rec.retrieval.export import Wishes, _check_count, _tasks
from dist_rec.retrieval.index import build_index, exact_top, measure, parse_index
from dist_rec.retrieval.judge import Seen, judge, read_seen
from dist_rec.retrieval.manifest import INDEX, ITEMS, USERS, Told
from dist_rec.retrieval.names import RawIds, key_of, user_feature
from dist_rec.retrieval.parts import Parts, PartWriter, as_lists
from dist_rec.retrieval.rows import RowSource, of_run, only, pairs
from dist_rec.training.exchange import Exchange


def test_positions_go_through_all_parts(tmp_path):
    vectors = clustered(1000)
    parts = write_parts(tmp_path / "items", {"a": vectors, "b": vectors[:, :3]}, ranks=3, key=False)
    assert len(parts) == 1000 and (parts.width("a"), parts.width("b")) == (WIDTH, 3)
    np.testing.assert_array_equal(np.concatenate(list(parts.vectors("a"))), vectors)
    at = np.array([999, 0, 500, 500, 332, 333, 334])
    np.testing.assert_array_equal(parts.vectors_at(at, "b"), vectors[at, :3])
    assert parts.take(at, ["id"])["id"].to_pylist() == [f"n{i}" for i in at]
    assert len(parts.take(np.zeros(0, np.int64), ["id"])) == 0
    with pytest.raises(UserError, match="has no parts of vectors"):
        Parts(tmp_path)


def towers(exact: bool) -> TwoTowers:
    return TwoTowers(
        ("click", "buy"),
        ("user",),
        ("item",),
        {"click": True, "buy": exact},
        {} if exact else {"buy": "its score is a cosine of whole vectors"},
        {"click": 2.0, "buy": 1.0},
        {"click": -1.0, "buy": 0.5},
    )


@pytest.fixture
def two_tasks(tmp_path):
    """Vectors of two tasks of different widths, random pairs, and the scores that they make."""
    users, items = clustered(300, seed=2), clustered(400, seed=3)
    user = {"click": users, "buy": users[:, :5]}
    item = {"click": items, "buy": items[:, :5]}
    write_parts(tmp_path / USERS, user, 2, key=True)
    write_parts(tmp_path / ITEMS, item, 2, key=False)
    some = np.random.default_rng(0).integers(0, 300, (2, 200))
    products = {t: (user[t][some[0]].astype(np.float64) * item[t][some[1]]).sum(1) for t in user}
    own = {"click": 2 * products["click"] - 1, "buy": products["buy"] + 0.5}
    return tmp_path, some, own


def test_every_task_has_its_index_and_its_measured_error(two_tasks):
    folder, some, own = two_tasks
    found = _tasks(folder, towers(exact=True), Wishes(folder), some, own)
    assert [(t.exact, t.width) for t in found.values()] == [(True, WIDTH), (True, 5)]
    assert all(t.scores["max_relative_error"] < 1e-6 and t.answers["recall_at_50"] == 1 for t in found.values())
    assert all((folder / t.file).stat().st_size == t.bytes for t in found.values())
    assert len(list((folder / INDEX).iterdir())) == 2


def test_scores_that_are_not_the_models_are_refused_or_labelled(two_tasks, capsys):
    folder, some, own = two_tasks
    own["buy"] = own["buy"] * 1.001
    with pytest.raises(UserError, match="differ from the model's own, by more than 1e-05:\n  - buy: by up to"):
        _tasks(folder, towers(exact=True), Wishes(folder), some, own)
    (folder / INDEX).rmdir()
    found = _tasks(folder, towers(exact=True), Wishes(folder, approximate=True), some, own)
    assert found["click"].exact and not found["buy"].exact and "measured" in found["buy"].why
    assert "buy: by up to" in capsys.readouterr().err
    assert found["buy"].scores["max_score_error"] == pytest.approx(np.abs(own["buy"] * (1 - 1 / 1.001)).max())


def test_an_index_that_finds_too_little_is_said(two_tasks, capsys):
    folder, some, own = two_tasks
    careless = parse_index("ivf", {"lists": "20", "probes": "1"})
    _tasks(folder, towers(exact=True), Wishes(folder, index=careless, k=10), some, own)
    assert "dist-rec: buy: recall@10 of the index is 0." in capsys.readouterr().err


def test_a_score_that_is_no_number_is_not_the_models(two_tasks):
    folder, some, own = two_tasks
    own["buy"][3] = np.nan
    with pytest.raises(UserError, match="  - buy: by up to nan"):
        _tasks(folder, towers(exact=True), Wishes(folder), some, own)


def test_vectors_that_other_hosts_keep_are_missed(tmp_path):
    write_parts(tmp_path, {"a": clustered(90)}, ranks=2, key=False)
    told = Told(data="d", fingerprint="f", count=90, rows=90, nameless=0, seconds=1.0, vectors_per_s=90.0)
    _check_count(tmp_path, told)
    (tmp_path / "part-00001.parquet").unlink()
    with pytest.raises(UserError, match="has 45 vectors of 90: .* a file system that all hosts share"):
        _check_count(tmp_path, told)


def test_an_approximate_task_is_measured_too(two_tasks):
    folder, some, own = two_tasks
    own["buy"] = np.tanh(own["buy"] / 9)
    found = _tasks(folder, towers(exact=False), Wishes(folder, approximate=True), some, own)["buy"]
    assert not found.exact and found.why == "its score is a cosine of whole vectors"
    assert found.scores["max_score_error"] > 0.1 and found.scores["rank_correlation"]["buy"] == 1


def gated(folder, count: int, kernels: int, one_kernel: bool) -> tuple[Parts, np.ndarray]:
    """Items in compact form and the concatenation that they are of."""
    tags, draw = clustered(count), np.random.default_rng(5)
    weights = draw.dirichlet(np.ones(kernels), count).astype(np.float32)
    if one_kernel:
        # The last kernel has no item, the first few.
        kernel = draw.integers(1, kernels - 1, count)
        kernel[:7] = 0
        weights = np.eye(kernels, dtype=np.float32)[kernel]
    writer = PartWriter(folder, 0)
    writer.write(pa.RecordBatch.from_pydict({"tag:buy": as_lists(tags), "weights:buy": as_lists(weights)}))
    writer.close()
    return Parts(folder), (weights[:, :, None] * tags[:, None]).reshape(count, -1)


@pytest.mark.parametrize("kind", ["scan", "flat", "ivf", "hnsw", "pq"])
def test_compact_form_answers_as_the_concatenation_does(kind, tmp_path):
    kernels, config = 4, parse_index("flat" if kind == "scan" else kind, {})
    items, whole = gated(tmp_path / "items", COUNT, kernels, one_kernel=kind != "scan")
    queries = clustered(kernels * 100, seed=1).reshape(100, -1)
    assert items.width("buy") == kernels * WIDTH
    np.testing.assert_array_equal(np.concatenate(list(items.vectors("buy"))), whole)
    index = build_compact(config, items, "buy", kind != "scan")
    chosen, found = measure(index, config, queries, 50, lambda: items.vectors("buy"), repeats=3)
    assert found["recall_at_50"] >= (1.0 if kind in ("scan", "flat") else 0.95), found
    assert set(chosen) == {"ivf": {"probes"}, "hnsw": {"search_width"}}.get(kind, set())
    write_compact(index, tmp_path / "index.npz")
    again = read_compact(tmp_path / "index.npz")
    assert (again.ntotal, again.d) == (COUNT, kernels * WIDTH)
    for mine, theirs in zip(again.search(queries, 9), index.search(queries, 9), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    if kind in ("scan", "flat"):
        scores, where = index.search(queries, 20)
        best, right, _ = exact_top(queries, 20, [whole])
        np.testing.assert_allclose(scores, best, rtol=1e-5)
        assert (where == right).mean() > 0.999
        assert (tmp_path / "index.npz").stat().st_size < (0.3 + 0.1) * whole.nbytes
    # Fewer items than are asked for.
    few, _ = gated(tmp_path / "few", 9, kernels, one_kernel=kind != "scan")
    few = build_compact(config, few, "buy", kind != "scan")
    scores, where = few.search(queries[:2], 9)
    assert sorted(where[0].tolist()) == list(range(9)) and (np.diff(scores) <= 0).all()


def test_compact_forms_that_cannot_be_are_refused(tmp_path):
    items, _ = gated(tmp_path / "items", 100, 3, one_kernel=False)
    with pytest.raises(UserError, match="a softmax gate weighs every kernel of an item"):
        build_compact(parse_index("hnsw", {}), items, "buy", one_kernel=False)
    (tmp_path / "x.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="is no compact index"):
        read_compact(tmp_path / "x.npz")


def test_answers_are_judged_as_one_would_by_hand(tmp_path):
    count, people, k = 60, 40, 5
    draw = np.random.default_rng(3)
    vectors = {USERS: clustered(people, seed=4), ITEMS: clustered(count, seed=5)}
    users, items = (write_parts(tmp_path / n, {"buy": v}, 2, key=n == USERS) for n, v in vectors.items())

    def seen(rows: int) -> Seen:
        user, item = draw.integers(0, people - 3, rows), draw.integers(0, count, rows)
        return Seen(user, item, {"buy": draw.random(rows) < 0.5}, strangers=7)

    train, later = seen(300), seen(200)
    index = build_index(parse_index("flat", {}), WIDTH, count, pieces(vectors[ITEMS]))
    told = judge(index, parse_index("flat", {}), users, items, "buy", train, later, k)
    popularity = np.bincount(train.item[train.positive["buy"]], minlength=count)
    scores = {"exact": vectors[USERS] @ vectors[ITEMS].T, "popularity": np.tile(popularity, (people, 1)).astype(float)}
    for name, of in scores.items():
        found = []
        for user in range(people):
            had = set(train.item[train.user == user].tolist())
            right = set(later.item[(later.user == user) & later.positive["buy"]].tolist()) - had
            best = [i for i in np.argsort(-of[user], kind="stable").tolist() if i not in had][:k]
            gains = [(i in right) / np.log2(place + 2) for place, i in enumerate(best)]
            ideal = sum(1 / np.log2(place + 2) for place in range(min(k, len(right))))
            if right:
                found.append((len(right & set(best)) / len(right), sum(gains) / ideal))
        recall, ndcg = np.mean(found, axis=0)
        assert told[name] == {
            "recall_at_5": pytest.approx(recall, abs=1e-6),
            "ndcg_at_5": pytest.approx(ndcg, abs=1e-6),
        }
        assert told["users"] == len(found) and 0 < recall < 1
    assert told["index"] == told["exact"] and told["strangers"] == 7
    nothing = Seen(later.user, later.item, {"buy": np.zeros(200, bool)}, 0)
    assert judge(index, parse_index("flat", {}), users, items, "buy", train, nothing, k) == {
        "users": 0,
        "positives": 0,
        "strangers": 0,
    }


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    root = build_small(tmp_path_factory.mktemp("shop"), block_rows=16)
    return root, read_index(root)


def test_an_item_is_its_last_row_and_has_its_raw_name(shop):
    root, index = shop
    schema = index.schema
    reader = ShardReader(root, index, ["item_id", "title"])
    found = last_rows(reader, item_keys(schema, "item_id"), Exchange())
    everything = [reader.rows(n) for n in range(len(reader.places))]
    keys = np.concatenate([rows.ids["item_id"].first(-1) for rows in everything])
    last = {int(key): row for row, key in enumerate(keys) if key > 0}
    assert found.row.tolist() == sorted(last.values()) and found.rows == 314 == len(keys)
    assert found.nameless == (keys <= 0).sum() > 0
    source = RowSource(reader, "title")
    order = np.random.default_rng(0).permutation(found.row)
    rows, titles = source.take(order)
    names = RawIds(root, schema, "item_id")(rows.ids["item_id"].first(-1)).to_pylist()
    assert rows.row.tolist() == order.tolist() and len(set(names)) == len(order)
    # The invented title of item i12 is "thing number 12", or missing.
    assert {t.replace("thing number ", "i") == n for t, n in zip(titles, names, strict=True) if t} == {True}
    assert any(t is None for t in titles)


def test_rows_are_of_the_exports_users_and_items(shop):
    root, index = shop
    schema, reader = index.schema, ShardReader(root, index, ["item_id"])
    items = last_rows(reader, item_keys(schema, "item_id"), Exchange())
    users = last_rows(reader, lambda rows: rows.keys["user"], Exchange())
    some = items.key[:10]
    found = read_seen(reader, schema, "item_id", users.key, some, {"ctr": "ctr", "graded": "relevance", "any": None})
    everything = [reader.rows(n) for n in range(len(reader.places))]
    item = np.concatenate([rows.ids["item_id"].first(-1) for rows in everything])
    user = np.concatenate([rows.keys["user"] for rows in everything])
    label = {n: np.concatenate([rows.labels[n] for rows in everything]) for n in ("ctr", "relevance")}
    there = np.isin(item, some) & (user >= 0)
    assert found.strangers == 314 - there.sum() > 0
    np.testing.assert_array_equal(some[found.item], item[there])
    np.testing.assert_array_equal(users.key[found.user], user[there])
    np.testing.assert_array_equal(found.positive["ctr"], label["ctr"][there] == 1)
    np.testing.assert_array_equal(found.positive["graded"], label["relevance"][there] >= 1.5)
    assert found.positive["any"].all() and 0 < found.positive["ctr"].sum() < there.sum()


def test_later_rows_stand_for_earlier_ones():
    class Reader:
        places, index = [0, 1], type("Index", (), {"rows": 6})

        def rows(self, number):
            from dist_rec.data.rows import Rows

            keys = {"user": np.array([[5, 6, -1], [6, 5, 7]][number]), "time": np.array([[9, 1, 1], [1, 3, 2]][number])}
            return Rows(domain=np.zeros(3, np.int64), row=np.arange(3) + 3 * number, keys=keys)

    found = last_rows(Reader(), lambda rows: rows.keys["user"], Exchange())
    # User 5's row 0 is later in time than row 4; user 6's rows are of one time.
    assert found.row.tolist() == [0, 3, 5] and found.nameless == 1


def test_users_are_found_by_their_raw_keys(shop):
    root, index = shop
    schema = index.schema
    queries = TwoTowers(("text",), ("query",), ("title",), {}, {}, {}, {})
    people = TwoTowers(("a",), ("user_id", "history"), ("item_id",), {}, {}, {}, {})
    assert (user_key(schema, queries), user_key(schema, people)) == ("query", "user")
    assert item_feature(schema, list(schema.features), people) == "item_id" and user_feature(schema) == "user_id"
    reader = ShardReader(root, index, ["user_id"])
    rows = reader.rows(0)
    names = RawIds(root, schema, "user_id")(rows.ids["user_id"].first(-1)).to_pylist()
    assert {key_of(n) == k for n, k in zip(names, rows.keys["user"].tolist(), strict=True) if n} == {True}


def test_sides_know_only_their_features_and_pairs_both(shop):
    root, index = shop
    names = ["user_id", "age", "history", "item_id", "tags", "title", "query"]
    rows = RowSource(ShardReader(root, index, names)).take(np.arange(40))[0]
    users, items = (
        RowSource(ShardReader(root, index, names)).take(at)[0] for at in (np.arange(40), np.arange(40) + 99)
    )
    side = only(of_run(rows, names[:-1]), ["history", "title"])
    assert "query" not in side.texts and side.ids["item_id"].lengths.sum() == 0 and np.isnan(side.dense["age"]).all()
    np.testing.assert_array_equal(side.ids["history"].values, rows.ids["history"].values)
    both = pairs(users, items, {"item_id", "tags", "title"})
    for name, of in (("user_id", users), ("history", users), ("item_id", items), ("tags", items)):
        np.testing.assert_array_equal(both.ids[name].values, of.ids[name].values)
    for name, of in (("title", items), ("query", users)):
        used = of.texts[name]
        np.testing.assert_array_equal(both.text_keys[both.texts[name].values], of.text_keys[used.values])
    assert (np.diff(both.text_keys) > 0).all() and np.isnan(both.labels["ctr"]).all()
    np.testing.assert_array_equal(both.dense["age"], users.dense["age"])


@pytest.mark.parametrize(
    ("kind", "sizes", "most"), [("ivf", {"lists": "60"}, "0.999"), ("hnsw", {"links": "4"}, "0.99")]
)
def test_search_is_widened_until_it_finds_enough(kind, sizes, most):
    vectors, queries = clustered(), clustered(200, seed=1)
    found = {}
    for recall in ("0.5", most):
        config = parse_index(kind, sizes | {"recall": recall})
        chosen, answers = measure(
            build_index(config, WIDTH, COUNT, pieces(vectors)), config, queries, 50, pieces(vectors), repeats=1
        )
        assert answers["recall_at_50"] >= float(recall)
        found[recall] = next(iter(chosen.values()))
    assert found["0.5"] < found[most]
