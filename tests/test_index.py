"""Indexes over vectors: what they find, what they miss, and what cannot be built."""

from __future__ import annotations

import numpy as np
import pytest
from index_vectors import COUNT, WIDTH, clustered, pieces, write_parts

from dist_rec.errors import UserError
from dist_rec.retrieval import graph
from dist_rec.retrieval.answer import best_items
from dist_rec.retrieval.graph import ask, graph_of
from dist_rec.retrieval.index import build_index, exact_top, measure, parse_index, read_index_file, write_index


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw", "pq"])
def test_every_kind_of_index_finds_what_exact_search_finds(kind):
    vectors, queries = clustered(), clustered(200, seed=1)
    config = parse_index(kind, {})
    index = build_index(config, WIDTH, COUNT, pieces(vectors))
    chosen, found = measure(index, config, queries, 50, pieces(vectors), repeats=5)
    assert index.ntotal == COUNT and found["recall_at_50"] >= (1.0 if kind == "flat" else 0.95), found
    assert set(chosen) == {"ivf": {"probes"}, "hnsw": {"search_width"}}.get(kind, set())
    assert found["query_ms"] > 0 and found["queries_per_s"] > 0 and found["queries"] == 200


def test_recall_is_what_a_careless_index_misses():
    vectors, queries = clustered(), clustered(200, seed=1)
    config = parse_index("ivf", {"lists": "60", "probes": "1"})
    chosen, found = measure(
        build_index(config, WIDTH, COUNT, pieces(vectors)), config, queries, 50, pieces(vectors), repeats=1
    )
    assert chosen == {"probes": 1}
    right = np.sort(queries @ vectors.T, axis=1)[:, -50]
    index = build_index(config, WIDTH, COUNT, pieces(vectors))
    answered = index.search(queries, 50)[0]
    assert found["recall_at_50"] == pytest.approx((answered >= right[:, None] - 1e-4).mean(), abs=1e-3)
    assert found["recall_at_50"] < 0.9


def test_every_vector_of_a_graph_can_be_reached(tmp_path, monkeypatch):
    """Those of unequal lengths and few directions, as trained ones are; by inner product a quarter of these cannot."""
    draw = np.random.default_rng(0)
    directions = draw.standard_normal((6, WIDTH))
    vectors, queries = (draw.standard_normal((n, 6)) @ directions for n in (COUNT, 200))
    lengths = draw.lognormal(0, 0.6, COUNT) / np.linalg.norm(vectors, axis=1)
    vectors, queries = (vectors * lengths[:, None]).astype(np.float32), queries.astype(np.float32)
    config = parse_index("hnsw", {})
    index = build_index(config, WIDTH, COUNT, pieces(vectors))
    _, found = measure(index, config, queries, 50, pieces(vectors), repeats=1)
    assert found["recall_at_50"] >= 0.95
    write_index(index, tmp_path / "graph.faiss")
    index = read_index_file(tmp_path / "graph.faiss")
    assert (index.ntotal, index.d) == (COUNT, WIDTH)
    graph_of(index).hnsw.efSearch = COUNT
    monkeypatch.setattr(graph, "NUMBERS", 7 * COUNT * WIDTH)
    products, positions = ask(index, queries, COUNT)
    assert len(np.unique(positions)) == COUNT
    exact = np.take_along_axis(queries @ vectors.T, positions, axis=1)
    np.testing.assert_allclose(products, exact, rtol=1e-4, atol=1e-5)


def test_codes_are_rescored_a_few_queries_at_a_time(tmp_path, monkeypatch):
    vectors, queries = clustered(500), clustered(30, seed=1)
    parts = write_parts(tmp_path, {"a": vectors}, ranks=2, key=False)
    config = parse_index("pq", {"codes": "4", "bits": "4"})
    index = build_index(config, WIDTH, 500, pieces(vectors))
    together = best_items(index, config, parts, "a", queries, 10)
    monkeypatch.setattr(graph, "NUMBERS", 4 * 40 * WIDTH)
    for one, other in zip(best_items(index, config, parts, "a", queries, 10), together, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(together[1], np.take_along_axis(queries @ vectors.T, together[0], 1), rtol=1e-4)


def test_exact_search_is_brute_force_in_pieces():
    vectors, queries = clustered(500), clustered(9, seed=1)
    scores = queries @ vectors.T
    wanted = np.argsort(-scores, axis=1, kind="stable")[:, :20]
    answers = np.array([[0, 499, -1]] * 9)
    best, where, of_answers = exact_top(queries, 20, pieces(vectors, 7)(), answers)
    np.testing.assert_array_equal(where, wanted)
    np.testing.assert_allclose(best, np.take_along_axis(scores, wanted, 1), rtol=1e-5)
    np.testing.assert_allclose(of_answers[:, :2], scores[:, [0, 499]], rtol=1e-4, atol=1e-5)
    assert np.isneginf(of_answers[:, 2]).all()


@pytest.mark.parametrize(
    ("kind", "keys", "fault"),
    [
        ("flatt", {}, "kind: Input should be 'flat', 'ivf', 'hnsw' or 'pq'"),
        ("ivf", {"lits": "4"}, "lits: unknown key. Did you mean 'lists'"),
        ("ivf", {"lists": "4000"}, "--index.lists is 4000, and there are 3000 vectors"),
        ("pq", {"codes": "7"}, "--index.codes is 7, which does not divide the vectors' width 24"),
        ("pq", {"bits": "12"}, "its 4096 codes are learned from more than 3000 vectors"),
    ],
)
def test_an_index_that_cannot_be_is_refused(kind, keys, fault):
    with pytest.raises(UserError, match=fault):
        build_index(parse_index(kind, keys), WIDTH, COUNT, pieces(clustered()))


def test_one_vector_is_too_few_to_learn_codes_from():
    with pytest.raises(UserError, match="learns its codes from the vectors, and there is 1: take flat"):
        build_index(parse_index("pq", {}), WIDTH, 1, pieces(clustered()[:1]))
