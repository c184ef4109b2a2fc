"""Texts that the store lacks: refused by name, or encoded as `embed` would have, in training and in evaluation."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import build_small, run_command

from dist_rec.config import Config
from dist_rec.data.blocks import text_key
from dist_rec.data.index import read_index
from dist_rec.data.rows import Ragged
from dist_rec.errors import UserError
from dist_rec.strict import from_dict, to_dict
from dist_rec.text import onthefly
from dist_rec.text.embed import embed
from dist_rec.text.onthefly import FrozenVectors, OnTheFly
from dist_rec.text.paths import tokenizer_fingerprint
from dist_rec.text.store import VectorStore
from dist_rec.training.prepare import prepare
from dist_rec.training.resume import check_vectors
from dist_rec.training.setup import build_stream

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def texts(tmp_path_factory, tiny_model) -> Path:
    """A data set with token ids in `shards`, a store of all its texts in `whole`, and of half of them in `half`."""
    folder = tmp_path_factory.mktemp("missing")
    rows = {"big": 330, "middle": 160, "tiny": 40}
    data = Path(build_small(folder, rows, split="random:4,1,1", tokenizer=tiny_model))
    some = folder / "some"
    shutil.copytree(data, some)
    table = pq.read_table(some / "texts.parquet")
    pq.write_table(table.filter(pc.equal(pc.bit_wise_and(table["key"], 1), 0)), some / "texts.parquet")
    embed([str(data)], tiny_model, str(folder / "whole"))
    embed([str(some)], tiny_model, str(folder / "half"))
    assert len(VectorStore.open(folder / "half")) < 0.8 * len(VectorStore.open(folder / "whole"))
    return folder


def open_texts(folder: Path) -> tuple[np.ndarray, Ragged]:
    table = pq.read_table(folder / "shards" / "texts.parquet").combine_chunks()
    lists = table["tokens"].chunk(0)
    return table["key"].to_numpy(), Ragged.from_lengths(lists.flatten().to_numpy(), lists.value_lengths().to_numpy())


def on_the_fly(folder: Path, model: str, store: VectorStore, batch_tokens: int = 0) -> OnTheFly:
    root = str(folder / "shards" / "train")
    return OnTheFly(store.info.recipe, model, read_index(root).tokenizer, CPU, batch_tokens, root).load()


def config(folder: Path, store: str, **text) -> dict:
    return {
        "run": {"root": str(folder / "runs"), "name": store + text.get("missing", ""), "seed": 5},
        "data": {split: f"{folder}/shards/{split}" for split in ("train", "valid", "test")}
        | {"batch_size": 40, "streams": 8, "shuffle_window": 128},
        "tables": {"dim": 8},
        "text": {"mode": "frozen", "store": str(folder / store), **text},
        "model": {"width": 16, "dropout": 0.2, "history": {"feedforward": 16}},
        "train": {"epochs": 1, "log_every": 1},
    }


def test_a_text_that_the_store_lacks_gets_the_vector_it_would_have_there(texts, tiny_model):
    whole, half = VectorStore.open(texts / "whole"), VectorStore.open(texts / "half")
    keys, tokens = open_texts(texts)
    missing = on_the_fly(texts, tiny_model, half, batch_tokens=64)
    vectors = FrozenVectors(half, "", missing)
    order = np.random.default_rng(0).permutation(len(keys))
    found = vectors(keys[order], tokens.take(order))
    assert missing.num_encoded == len(whole) - len(half) and found.dtype == np.float32
    # The last bit of float16 depends on the batch.
    np.testing.assert_allclose(found, whole.lookup(keys[order]), atol=2e-3)
    assert (found == whole.lookup(keys[order])).mean() > 0.98
    np.testing.assert_array_equal(found, found.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(vectors(keys, tokens)[order], found)
    assert missing.num_encoded == len(whole) - len(half), "kept ones were computed again"
    assert vectors(keys[:0], tokens.take(order[:0])).shape == (0, 16)


def test_what_is_kept_is_bounded(texts, tiny_model, monkeypatch):
    half = VectorStore.open(texts / "half")
    keys, tokens = open_texts(texts)
    rows = np.flatnonzero(~half.find(keys)[1])
    monkeypatch.setattr(onthefly, "CACHE_BYTES", 5 * half.width * 4)
    missing = on_the_fly(texts, tiny_model, half)
    first = missing(keys[rows], tokens.take(rows))
    assert len(missing._kept) == 5
    again = missing(keys[rows], tokens.take(rows))
    np.testing.assert_allclose(again, first, atol=2e-3)
    assert missing.num_encoded == 2 * len(rows) - 5


def test_loading_the_model_leaves_random_numbers_alone(texts, tiny_model):
    half = VectorStore.open(texts / "half")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    on_the_fly(texts, tiny_model, half)
    assert torch.equal(torch.rand(3), expected)


def test_a_refusal_names_the_text_and_the_command_that_adds_it(texts):
    prepared = prepare(from_dict(Config, config(texts, "half"), "test"))
    stream = build_stream(prepared, "train", 0, 1)
    with pytest.raises(UserError) as refused:
        list(stream.batches(0))
    message = str(refused.value)
    named = pq.read_table(texts / "shards" / "texts.parquet")["text"].to_pylist()
    half = VectorStore.open(texts / "half")
    lacking = [text for text in named if not half.find(np.array([text_key(text)]))[1][0]]
    assert any(f"the first is {text!r}, key {text_key(text)}" in message for text in lacking), message
    command = message.partition("`")[2].partition("`")[0]
    assert command.startswith(f"dist-rec embed {texts}/shards/train --model") and "text.missing: encode" in message
    # It does what it says.
    shutil.copytree(texts / "half", texts / "mended")
    words = command.replace("dist-rec", "dist_rec").replace("half", "mended").split()
    done = run_command([sys.executable, "-m", *words], 120)
    assert done.returncode == 0, done.stderr
    assert len(VectorStore.open(texts / "mended")) == len(VectorStore.open(texts / "whole"))


def test_what_cannot_be_encoded_alike_is_refused(texts, small, tiny_model, tmp_path):
    def start(**text):
        prepare(from_dict(Config, config(texts, "half", missing="encode", **text), "test"))

    start()
    start(model=tiny_model, pooling="mean")
    with pytest.raises(UserError, match="text.pooling is cls, the vectors in .*half are of pooling mean"):
        start(pooling="cls")
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"layer_norm_eps": 1e-6}))
    with pytest.raises(UserError, match="other is not the language model of text.store"):
        start(model=str(other))
    bare = config(texts, "half", missing="encode")
    bare["data"] = {"train": small}
    with pytest.raises(UserError, match="was built without token ids: build it with --tokenizer"):
        prepare(from_dict(Config, bare, "test"))
    assert tokenizer_fingerprint(tiny_model) == VectorStore.open(texts / "half").info.recipe.tokenizer_fingerprint
    longer = build_small(tmp_path / "longer", {"big": 20, "middle": 20, "tiny": 20}, tokenizer=tiny_model)
    index = json.loads((Path(longer) / "index.json").read_text())
    index["tokenizer"]["max_length"] = 40
    (Path(longer) / "index.json").write_text(json.dumps(index))
    bare["data"] = {"train": longer}
    with pytest.raises(UserError, match="cuts texts at 40 tokens and the texts of text.store were cut at 32"):
        prepare(from_dict(Config, bare, "test"))


@pytest.mark.slow
def test_a_model_is_not_read_with_vectors_of_another_kind(texts, tiny_model, tmp_path):
    """Of the same width, so that no shape tells; precision may differ, and what notes nothing is taken."""

    class Saved:
        folder = "saved"

    def saved(**state):
        Saved.manifest = type("Manifest", (), {"state": state})
        return Saved

    whole = VectorStore.open(texts / "whole")
    made = to_dict(whole.info.recipe)
    check_vectors(saved(vectors=made), whole)
    check_vectors(saved(vectors={**made, "compute": "bf16", "dtype": "float32"}), whole)
    for state in ({}, {"vectors": None}):
        check_vectors(saved(**state), whole)
    check_vectors(saved(vectors=made), None)
    with pytest.raises(UserError, match="saved was trained on other text vectors: .*by another language model"):
        check_vectors(saved(vectors={**made, "model_fingerprint": "x"}), whole)
    embed([str(texts / "shards")], tiny_model, str(tmp_path / "cls"), pooling="cls")
    with pytest.raises(UserError, match="by pooling cls instead of mean"):
        check_vectors(saved(vectors=made), VectorStore.open(tmp_path / "cls"))


def test_half_a_store_and_the_model_train_as_the_whole_store_does(texts):
    losses, evaluations = [], []
    for given in (config(texts, "whole"), config(texts, "half", missing="encode")):
        path = texts / "c.yaml"
        path.write_text(yaml.safe_dump(given))
        done = run_command([sys.executable, "-m", "dist_rec", "train", str(path)], 240)
        assert done.returncode == 0, done.stderr
        run = Path(given["run"]["root"]) / given["run"]["name"]
        entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([entry["losses"]["loss"] for entry in entries if "losses" in entry])
        evaluations.append(json.loads((run / "evaluation.json").read_text())["overall"])
    assert len(losses[0]) > 5
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    for task, metrics in evaluations[0].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert evaluations[1][task][name] == pytest.approx(value, abs=2e-3), (task, name)
