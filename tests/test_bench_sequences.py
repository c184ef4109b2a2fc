"""`bench sequences`: both ways give the same losses and gradients on the same rows, so their speed may be compared."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import run_command
from sequence_sets import WIDTH, build_sequences, config_of

from dist_rec.bench.sequences import SCHEMA, TEXT_WIDTH, bench_sequences, invent
from dist_rec.bench.usual_sequences import Draws, UsualUniSRec, expand, take_weights
from dist_rec.config.unisrec import AdaptorConfig, ContrastConfig, SequenceEncoderConfig, UniSRecConfig
from dist_rec.errors import UserError
from dist_rec.layers import augment
from dist_rec.layers.reduction import Reduction
from dist_rec.models import unisrec
from dist_rec.models.unisrec import UniSRec
from dist_rec.text.embed import embed

STILL = {
    "adaptor": AdaptorConfig(experts=3, dropout=0.0, noise=False, scale=3.0),
    "encoder": SequenceEncoderConfig(feedforward=32, dropout=0.0, attention_dropout=0.0, max_length=12),
}


def both(**changes) -> tuple[UniSRec, UsualUniSRec]:
    torch.manual_seed(0)
    config = UniSRecConfig(width=24, **STILL | changes)
    ours = UniSRec(SCHEMA, config, {}, TEXT_WIDTH, None, list(SCHEMA.features), Reduction())
    with torch.no_grad():
        for parameter in ours.parameters():  # biases and gates begin as zeros, which would hide much
            parameter.add_(0.05 * torch.randn_like(parameter))
    usual = UsualUniSRec(config, TEXT_WIDTH)
    take_weights(usual, ours)
    return ours.double(), usual.double()


def few(users: int = 9):
    """Sequences that repeat items, some of them longer than is read."""
    batch = invent(users, 3)
    batch.text_vectors = batch.text_vectors.double()
    for name in batch.identity:
        batch.identity[name] = batch.identity[name] % 17
    distinct, _ = torch.unique(torch.cat([batch.identity["history"], batch.identity["item"]]), return_inverse=True)
    for text, name in (("history_text", "history"), ("item_text", "item")):
        batch.text_index[text] = torch.searchsorted(distinct, batch.identity[name])
    assert int(batch.identity_lengths["history"].max()) > STILL["encoder"].max_length
    return batch


@pytest.mark.parametrize("share", [1.0, 0.0, 0.5])
def test_both_ways_give_the_same_losses_and_gradients(share, monkeypatch):
    contrast = ContrastConfig(weight=0.5, item_drop=0.4, word_drop=0.4, item_drop_share=share)
    ours, usual = both(contrast=contrast)
    batch = few()
    rows = expand(ours, batch)
    kind, event = (
        torch.rand(len(batch)),
        torch.rand(int(rows.length[rows.sequence.diff(append=torch.tensor([-1])) != 0].sum())),
    )
    monkeypatch.setattr(unisrec, "draw", lambda _: augment.Draws(kind, event))
    found = ours({}, batch)
    expected = usual(rows, batch.text_vectors, Draws(kind[rows.sequence], event[rows.event]))
    for name in ("sequence_item", "sequence_sequence", "loss"):
        torch.testing.assert_close(found["losses"][name], expected[name].detach(), rtol=1e-9, atol=0, msg=name)
    assert expected["sequence_item"] > 1 and expected["sequence_sequence"] > 0.1
    found["loss"].backward()
    expected["loss"].backward()
    torch.testing.assert_close(
        ours.adaptor.weight.grad, torch.stack([e.linear.weight.grad.t() for e in usual.adaptor.experts])
    )
    torch.testing.assert_close(ours.adaptor.bias.grad, torch.stack([e.bias.grad for e in usual.adaptor.experts]))
    torch.testing.assert_close(ours.adaptor.gate.grad, usual.adaptor.gate.grad)
    torch.testing.assert_close(ours.encoder.positions.grad, usual.positions.weight.grad)
    for block, layer in zip(ours.encoder.blocks, usual.layers, strict=True):
        qkv = torch.cat([layer.query.weight.grad, layer.key.weight.grad, layer.value.weight.grad])
        torch.testing.assert_close(block.qkv.weight.grad, qkv)
        torch.testing.assert_close(block.contract.weight.grad, layer.contract.weight.grad)


def test_prefixes_are_every_position_once():
    ours, _ = both()
    batch = few()
    rows = expand(ours, batch)
    longest = STILL["encoder"].max_length
    kept = batch.identity_lengths["history"].clamp_max(longest)
    assert len(rows.length) == int(kept.sum()) and rows.items.shape[1] == longest
    row = int(kept.argmax())
    mine = rows.sequence == row
    assert rows.length[mine].tolist() == list(range(1, longest + 1))
    whole = batch.text_index["history_text"].split(batch.identity_lengths["history"].tolist())[row]
    assert rows.items[mine][-1].tolist() == whole[-longest:].tolist()
    assert rows.target[mine].tolist() == [*whole[-longest + 1 :].tolist(), int(batch.text_index["item_text"][row])]
    assert (rows.items[mine][0][1:] == 0).all()


def test_an_item_without_a_text_is_refused():
    ours, _ = both()
    batch = few()
    lengths = batch.text_lengths["item_text"].clone()
    lengths[0] = 0
    lacking = replace(batch, text_lengths={**batch.text_lengths, "item_text": lengths})
    lacking.text_index["item_text"] = batch.text_index["item_text"][1:]
    with pytest.raises(UserError, match="no text"):
        expand(ours, lacking)


def test_invented_rows_are_as_unequal_as_reviews():
    batch = invent(4000, 0)
    events = batch.identity_lengths["history"] + 1
    assert int(events.min()) == 3 and int(events.max()) == 51
    assert 7.5 < float(events.float().mean()) < 9 and 5 <= float(events.median()) <= 7


def test_the_verb_tells_rates_and_sizes():
    command = [sys.executable, "-m", "dist_rec", "bench", "sequences", "--users", "4", "--repeats", "1", "--json"]
    done = run_command(command, 240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ratio"] == pytest.approx(found["rows_per_s"] / found["usual_rows_per_s"], rel=0.02)
    assert found["ratio"] > 5 and found["processor_ratio"] > 5
    assert (found["text_width"], found["width"], found["experts"], found["layers"]) == (384, 300, 8, 2)
    assert found["sequences"] == 4 and found["device"] in ("cpu", "cuda")


@pytest.mark.parametrize("option", [["--users", "1"], ["--repeats", "0"]])
def test_numbers_that_make_no_sense_are_refused(option):
    done = run_command([sys.executable, "-m", "dist_rec", "bench", "sequences", *option], 120)
    assert done.returncode == 2 and "must be at least" in done.stderr


def test_a_config_is_measured_on_its_own_rows(tmp_path, tiny_model):
    data = build_sequences(tmp_path)
    embed([f"{data}/train"], tiny_model, str(tmp_path / "store"), max_tokens=32, store_dtype="float32")
    tree = config_of(data, str(tmp_path / "store"), contrast={"weight": 0.1, "item_drop_share": 1.0})
    (path := tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    found = bench_sequences(users=2, repeats=2, seed=0, config=path)
    assert (found["data"], found["width"], found["text_width"], found["turns"]) == (str(path), WIDTH, 16, 2)
    assert 0 < found["sequences"] <= 32 < found["rows"] and found["rows_per_s"] > 0
    tree["model"]["loss"] = "full"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="loss: in_batch"):
        bench_sequences(users=2, repeats=1, seed=0, config=path)
