"""`dist-rec bench text`: what it counts, and that naive and ours compute the same."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import build_small, run_command
from language_models import make_language_model

from dist_rec.bench import text as bench
from dist_rec.errors import UserError
from dist_rec.text.encoder import TextEncoder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_language_model("bert", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory, model) -> str:
    return build_small(tmp_path_factory.mktemp("data"), tokenizer=model)


def test_bench_text_measures_every_mode(data, model):
    words = ["bench", "text", "--data", data, "--model", model, "--rows", "16", "--batch-size", "16", "--repeats", "2"]
    done = run_command([sys.executable, "-m", "dist_rec", *words, "--json"], 240)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["rows"] == 314 and said["distinct_texts"] == 35 and said["texts"] > 300
    assert said["distinct_by_feature"] == {"query": 5, "title": 30}
    for mode in ("frozen", "lora", "full"):
        assert said[f"{mode}_ratio"] > 0 and said[f"{mode}_ratio_batch_padded"] > 0
        assert set(said["texts_per_s"][mode]) == {"ours", "naive", "batch_padded"}
        assert min(said["texts_per_s"][mode].values()) > 0


def test_ours_and_naive_do_the_same_work(data, model, monkeypatch):
    """Both count the batch's texts, and leave the same gradients."""
    made = []
    monkeypatch.setattr(bench, "cotrained_encoder", keep(bench.cotrained_encoder, made))
    splits = bench._splits(bench.Path(data), model)
    cases = bench._training(model, "full", splits[0], 40, 1, 32, torch.device("cpu"))
    found = {}
    for name, case in cases.items():
        count, seconds = case(0)
        grads = {n: p.grad.clone() for n, p in made[0].named_parameters() if p.grad is not None}
        found[name] = count, grads
        assert seconds > 0
    counts = {count for count, _ in found.values()}
    assert len(counts) == 1 and counts.pop() > 32
    ours = found[bench.OURS][1]
    largest = max(float(gradient.abs().max()) for gradient in ours.values())
    for name in (bench.NAIVE, bench.PADDED):
        for parameter, gradient in found[name][1].items():
            assert float((gradient - ours[parameter]).abs().max()) <= 1e-4 * largest, parameter


def test_naive_pads_to_the_longest_of_all_and_ours_encodes_each_text_once(data, model, monkeypatch):
    seen = []
    forward = TextEncoder.forward
    monkeypatch.setattr(
        TextEncoder, "forward", lambda self, ids, mask: seen.append(tuple(ids.shape)) or forward(self, ids, mask)
    )
    pool = bench._pool(bench._splits(bench.Path(data), model))
    cases = bench._frozen(model, pool, 1000, 16, torch.device("cpu"))
    cases[bench.OURS](0)
    assert sum(count for count, _ in seen) == 35
    seen.clear()
    cases[bench.NAIVE](0)
    assert sum(count for count, _ in seen) == pool.num_uses and {width for _, width in seen} == {pool.longest}


def test_what_cannot_be_measured_is_refused(data, model, tmp_path):
    def run(root=data, rows=8, batch=8):
        bench.bench_text(bench.Path(root), model, rows, 1, batch, ["frozen"], tmp_path)

    with pytest.raises(UserError, match="--batch-size a multiple of 8"):
        run(batch=12)
    with pytest.raises(UserError, match="no data set there"):
        run(root=tmp_path)
    with pytest.raises(UserError, match="no token ids"):
        run(root=build_small(tmp_path / "plain"))


def keep(make, made):
    def kept(*arguments, **named):
        made.append(make(*arguments, **named))
        return made[-1]

    return kept
