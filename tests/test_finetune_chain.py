"""Finetuning what was finetuned: the test rows of every earlier run are measured, and what cannot be is said."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from conftest import build_small
from finetunes import build_fresh, dist_rec

from dist_rec.cli.run import embed as embed_command
from dist_rec.config import TextConfig
from dist_rec.data.index import read_index
from dist_rec.errors import UserError
from dist_rec.finetune.derive import Wishes, derive
from dist_rec.text.embed import embed
from dist_rec.text.store import VectorStore
from dist_rec.training import looking_back
from dist_rec.training.prepare import prepare
from dist_rec.training.start.foundation import foundation_faults, read_foundation
from dist_rec.training.start.old_domains import AFTER, BEFORE, KNOWN, SKIPPED, compared, print_old, read_old, unseen
from dist_rec.training.start.origin import OldTest, Origin, read_origin

SHORT = ["--train.device", "cpu", "--train.epochs", "1"]


@pytest.fixture(scope="module")
def chain(foundation, tmp_path_factory):
    """The foundation's data; the runs finetuned on `fresh`, and from that on `other`."""
    run, data = foundation
    folder = tmp_path_factory.mktemp("chain")
    first = shutil.copytree(run, folder / "runs" / "base")
    done = dist_rec("finetune", first, "--data", data, "--name", "one", *SHORT)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(first)
    other = build_fresh(folder / "new", data, 120, "other")
    done = dist_rec("finetune", folder / "runs" / "one", "--data", other, "--name", "two", *SHORT)
    assert done.returncode == 0, done.stderr
    return folder / "runs", other, done


def test_all_older_domains_are_measured_before_and_after(foundation, chain):
    """Also those of a foundation's foundation, whose folder is gone: its test rows are named in finetune.json."""
    runs, _, done = chain
    held = read_old(runs / "two")
    assert {entry["domain"] for entry in compared(held)} == {"big", "middle", "tiny", "fresh"}
    assert unseen(held) == [] and SKIPPED not in held
    assert held[KNOWN] == ["big", "middle", "tiny", "fresh"]
    base = read_index(f"{foundation[0].parent.parent}/base/shards/test")
    tests = {"big": base, "fresh": read_index(f"{foundation[1]}/test")}
    for name, index in tests.items():
        assert held[BEFORE]["domains"][name]["ctr"]["rows"] == index.rows_of(name) > 0
    # What the first foundation's domains were after the first finetuning, they are before the second.
    after, before = read_old(runs / "one")[AFTER]["domains"]["big"]["ctr"], held[BEFORE]["domains"]["big"]["ctr"]
    assert before["auc"] == pytest.approx(after["auc"], abs=1e-6)
    assert "big" in done.stdout and "fresh" in done.stdout


def test_a_run_inherits_the_test_rows_of_those_before_its_foundation(chain):
    origin = read_origin(chain[0] / "two")
    assert [one.run.rsplit("/", 1)[1] for one in origin.old_tests().values()] == ["one", "base"]
    older = [OldTest(run="b", test="t"), OldTest(run="a", test="u")]
    again = Origin(run="c", step=1, domains=["a"], tables=[], test="t", older=older)
    assert [one.test for one in again.old_tests().values()] == ["t", "u"]


def test_test_rows_that_are_gone_are_said_and_the_others_measured(chain, capsys):
    runs, other, _ = chain
    two = shutil.copytree(runs / "two", runs / "gone")
    origin = (two / "finetune.json").read_text()
    (two / "finetune.json").write_text(origin.replace("/base/shards/", "/nowhere/"))
    done = dist_rec("train", two / "config.yaml", "--run.name", "gone", "--train.epochs", "2")
    assert done.returncode == 0, done.stderr
    held = read_old(two)
    assert "nowhere/test" in held[SKIPPED] and "/base: " in held[SKIPPED]
    assert {entry["domain"] for entry in compared(held)} == {"fresh"}
    print_old(two)
    assert "test rows of earlier runs were not read" in capsys.readouterr().out


def test_old_rows_with_other_text_vectors_are_not_read(foundation, tiny_model, tmp_path):
    run, data = foundation
    base = f"{run.parent.parent}/base/shards"
    stores = {"now": "mean", "same": "mean", "other": "cls"}
    for name, pooling in stores.items():
        embed([base, data], tiny_model, str(tmp_path / name), max_tokens=16, pooling=pooling)
    config, _, _ = derive(run, data, Wishes(name="unmade"), 1)
    prepared = prepare(config)
    config = replace(config, text=TextConfig(mode="frozen", store=str(tmp_path / "now")))
    prepared = replace(prepared, config=config, store=VectorStore.open(tmp_path / "now"))
    old = OldTest(run="base", test=f"{base}/test", store=str(tmp_path / "same"))
    index = looking_back._read(prepared, "old-0", old)
    assert index.schema == prepared.schema and str(prepared.vectors("old-0").store.folder) == old.store
    with pytest.raises(UserError, match="other were made by pooling cls instead of mean"):
        looking_back._read(prepared, "old-0", replace(old, store=str(tmp_path / "other")))


def test_another_pooling_than_the_language_model_was_trained_with_is_refused(foundation, tiny_model):
    run, data = foundation
    found, (config, _, splits) = read_foundation(str(run)), derive(run, data, Wishes(name="unmade"), 1)

    def faults(then: str, now: str, mode: str = "full") -> list[str]:
        texts = [TextConfig(mode=mode, model=tiny_model, store="s", pooling=pooling) for pooling in (then, now)]
        before = replace(found, config=replace(found.config, text=texts[0]))
        return foundation_faults(before, replace(config, text=texts[1]), splits.train.schema)

    assert faults("auto", "mean") == faults("mean", "mean") == faults("mean", "cls", mode="frozen") == []
    for mode in ("full", "lora"):
        (fault,) = faults("auto", "cls", mode)
        assert "trained with text.pooling auto (mean), this config has cls (cls)" in fault


@pytest.mark.parametrize("here", [".", "./", "train", "../new shop/train/"])
def test_a_run_is_named_by_the_folder_wherever_one_stands(foundation, tmp_path, monkeypatch, here):
    run, data = foundation
    shutil.copytree(data, tmp_path / "new shop")
    monkeypatch.chdir(tmp_path / "new shop")
    assert derive(run, here, Wishes(), 1)[0].run.name == "base-new shop"


def test_the_command_cuts_texts_where_it_is_told(tmp_path, tiny_model):
    data = build_small(tmp_path / "data", {"big": 20, "middle": 20, "tiny": 20})
    embed_command([data], tiny_model, str(tmp_path / "store"), max_tokens=7)
    assert VectorStore.open(tmp_path / "store").info.recipe.max_tokens == 7
