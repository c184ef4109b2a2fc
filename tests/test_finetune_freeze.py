"""What stays as it was: presets, globs, and that frozen parameters do not move by one bit under any ZeRO stage."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from conftest import build_small
from finetunes import build_fresh, dist_rec, foundation_config, tensors
from language_models import make_language_model

from dist_rec.config import FinetuneConfig, ModelConfig, UniSRecConfig
from dist_rec.errors import UserError
from dist_rec.finetune.derive import Wishes, derive
from dist_rec.finetune.describe import describe
from dist_rec.training import checkpoint
from dist_rec.training.kinds import KINDS
from dist_rec.training.prepare import prepare
from dist_rec.training.start.freeze import Names, freeze_faults, frozen_names
from dist_rec.training.start.old_domains import compared, read_old

NAMES = Names(
    dense=[
        "text_encoder.model.layer.weight",
        "text_encoder.model.layer.lora_A.default.weight",
        "text_projection.weight",
        "history_encoders.0.positions",
        "user.join.weight",
        "entities.item.layers.id.weight",
        "entities.item.gate.null",
        "domains.weight",
        "adaptation.weight",
        "body.levels.0.shared.layers.0.weight",
        "body.levels.0.gate.weight",
        "body.towers.layers.0.weight",
        "body.skip.weight",
    ],
    own={"entities.item.gate.null", "domains.weight", "adaptation.weight", "body.levels.0.gate.weight"}
    | {"body.towers.layers.0.weight"},
    tables=["item", "item@1"],
    known={"item"},
    levels=KINDS[ModelConfig].levels,
)
TRAINED = {
    "none": set(NAMES.all),
    "L0": set(NAMES.all) - {"tables.item"},
    "L0+L1": {"tables.item@1", *NAMES.own, "body.levels.0.shared.layers.0.weight", "body.skip.weight"},
    "adaptor": {"tables.item@1", *NAMES.own},
    "lora": {"tables.item@1", *NAMES.own, "text_encoder.model.layer.lora_A.default.weight"},
    "head": {"tables.item@1", "body.towers.layers.0.weight"},
}


SEQUENCES = Names(
    dense=["adaptor.weight", "adaptor.gate", "encoder.input_norm.weight", "encoder.positions", "encoder.blocks.0.qkv"],
    own=(),
    tables=["item"],
    known=(),
    levels=KINDS[UniSRecConfig].levels,
)


@pytest.mark.parametrize("preset", ["L0+L1", "adaptor"])
def test_a_preset_of_a_sequence_model_leaves_the_transformer_as_it_is(preset):
    stays = frozen_names(FinetuneConfig(freeze=preset), SEQUENCES)
    assert stays == {"encoder.positions", "encoder.blocks.0.qkv"}


@pytest.mark.parametrize("preset", TRAINED)
def test_a_preset_trains_its_level_and_the_rows_of_new_ids(preset):
    assert set(NAMES.all) - frozen_names(FinetuneConfig(freeze=preset), NAMES) == TRAINED[preset]


def test_the_later_list_of_globs_wins():
    config = FinetuneConfig(freeze="head", freeze_names=["*"], train_names=["body.s*", "tables.item"])
    assert set(NAMES.all) - frozen_names(config, NAMES) == {"body.skip.weight", "tables.item"}


@pytest.mark.parametrize(
    ("config", "mode", "said"),
    [
        (FinetuneConfig(freeze="lora"), "frozen", "text.mode is frozen: set text.mode lora, or take adaptor"),
        (FinetuneConfig(train_names=["adaptaton.weight"]), "none", "'adaptaton.weight' is .* Did you mean 'adaptation"),
        (FinetuneConfig(freeze_names=["*"]), "none", "leaves no dense parameter to train"),
        (FinetuneConfig(freeze_names=["*"], train_names=["tables.*"]), "none", "leaves no dense parameter to train"),
    ],
)
def test_what_cannot_be_is_refused(config, mode, said):
    import re

    assert len(faults := freeze_faults(config, NAMES, mode)) == 1 and re.search(said, faults[0]), faults


def test_a_glob_of_nothing_is_refused_before_any_rank_starts(foundation):
    config, _, _ = derive(*foundation, Wishes(train_names=["domain.weight"]), 1)
    with pytest.raises(UserError, match="finetune.train_names: 'domain.weight'.*Did you mean 'domains.weight'"):
        prepare(config)


def test_a_dry_run_counts_every_parameter_once(foundation):
    run, data = foundation
    said = dist_rec("finetune", run, "--data", data, "--name", "dry", "--freeze", "L0+L1", "--dry-run", "--json")
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout.splitlines()[-1])
    assert not (run.parent / "dry").exists()
    config, _, _ = derive(run, data, Wishes(name="dry", freeze="L0+L1"), 1)
    assert told == describe(prepare(config)) and told["domains"] == {"fresh": "mean"}
    every = [*told["modules"].values(), *told["tables"].values()]
    saved = checkpoint.read_manifest(checkpoint.find(run)).manifest
    before = sum(torch.Size(info.shape).numel() for info in [*saved.dense.values(), *saved.tables.values()])
    assert told["total"]["trained"] + told["total"]["frozen"] - told["total"]["new"] == before
    assert told["tables"]["item_id@1"]["trained"] == told["tables"]["item_id@1"]["new"] > 0
    assert told["tables"]["item_id"]["trained"] == told["modules"]["user"]["trained"] == 0
    assert all(entry["trained"] + entry["frozen"] > 0 for entry in every)
    assert told["modules"]["entities.item.gate"]["frozen"] == 0


@pytest.mark.parametrize(("stage", "ranks", "text"), [(0, 1, []), (1, 2, []), (3, 2, ["--dense.precision", "bf16"])])
def test_adaptor_leaves_the_old_domains_as_they_were_to_the_bit(foundation, stage, ranks, text):
    run, data = foundation
    name = f"adaptor-{stage}"
    many = ["--nproc-per-node", str(ranks)] if ranks > 1 else []
    keys = ["--dense.zero_stage", str(stage), "--train.epochs", "2", "--train.device", "cpu", *text]
    done = dist_rec("finetune", run, "--data", data, "--name", name, "--freeze", "adaptor", *keys, *many)
    assert done.returncode == 0, done.stderr
    new = run.parent / name
    held = read_old(new)
    assert held["before"]["domains"] == held["after"]["domains"] and len(compared(held)) >= 5
    if text:
        return
    before, after = tensors(run), tensors(new)
    config, _, _ = derive(run, data, Wishes(name="unmade", freeze="adaptor"), 1)
    own = prepare(config).names.own
    for weight, values in before.items():
        assert torch.equal(after[weight][: len(values)], values), weight
        assert (len(after[weight]) > len(values)) == (weight in own), weight
    moved = [n for n in own if not torch.equal(after[n][len(before[n]) :], _mean_row(before[n], 3))]
    assert {"adaptation.weight", "body.towers.layers.0.weight", "domains.weight"} <= set(moved)


def test_a_decoder_that_was_trained_whole_is_adapted_and_stays(tmp_path):
    """`lora` trains the adapters that it gets and the domains' own parameters; its weights and the tables keep every
    bit."""
    model = make_language_model("llama", tmp_path / "llama")
    base = build_small(tmp_path / "base", {"big": 96, "middle": 48, "tiny": 8}, tokenizer=model, split="random:2,0,1")
    fresh = build_fresh(tmp_path / "new", base, 96)
    config = foundation_config(tmp_path, base) | {"text": {"mode": "full", "model": model, "learning_rate": 0.01}}
    config["data"].pop("valid")
    config["train"] |= {"steps": 2}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    done = dist_rec("train", tmp_path / "base.yaml")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "base"
    keys = ["--text.mode", "lora", "--train.steps", "2", "--train.epochs", "1", "--no-old"]
    done = dist_rec("finetune", run, "--data", fresh, "--name", "new", "--freeze", "lora", *keys)
    assert done.returncode == 0, done.stderr
    before, after = tensors(run), tensors(run.parent / "new")
    own = names_of_domains(before, after)
    adapters = {name: after.pop(name) for name in list(after) if ".lora_" in name}
    after = {name.replace(".base_layer.", "."): values for name, values in after.items()}
    assert len(adapters) == 2 * 2 * 7 and all(v.any() for n, v in adapters.items() if "lora_B" in n)
    text = [name for name in before if name.startswith("text_encoder.")]
    assert len(text) > 10
    for name in {*text, "user.join.weight", "item_id", "user_id"} & before.keys():
        assert torch.equal(after[name], before[name]), name
    moved = [name for name in own if not torch.equal(after[name][len(before[name]) :], _mean_row(before[name], 3))]
    assert {"adaptation.weight", "body.towers.layers.0.weight"} <= set(moved)


def names_of_domains(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    """The parameters that have become longer."""
    return [name for name, values in before.items() if name in after and len(after[name]) > len(values)]


def _mean_row(flat: torch.Tensor, domains: int) -> torch.Tensor:
    return flat.view(domains, -1).mean(0)


def test_weight_decay_that_shrinks_domains_without_rows_is_said(foundation):
    run, data = foundation
    keys = ["--dense.weight_decay", "0.1", "--train.steps", "2", "--train.device", "cpu", "--no-old"]
    done = dist_rec("finetune", run, "--data", data, "--name", "decayed", "--freeze", "adaptor", *keys)
    assert done.returncode == 0 and "weight_decay 0.1 shrinks" in done.stderr and "(big, middle, tiny)" in done.stderr
    assert "was not asked for" in done.stdout
    before, after = tensors(run), tensors(run.parent / "decayed")
    assert not torch.equal(after["adaptation.weight"][: len(before["adaptation.weight"])], before["adaptation.weight"])
