"""A run that starts from another: what it takes over, what it refuses, and that it needs that one only once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import build_small
from finetunes import dist_rec

from dist_rec.config import Config, load_config, save_config
from dist_rec.data.extend import as_extended
from dist_rec.data.index import read_index
from dist_rec.errors import UserError
from dist_rec.finetune.derive import Pace, Wishes, derive
from dist_rec.layers.reduction import Reduction
from dist_rec.strict import from_dict
from dist_rec.training import checkpoint
from dist_rec.training.finetuning import empty_model, of_managed
from dist_rec.training.prepare import prepare
from dist_rec.training.resume import find_earlier
from dist_rec.training.setup import build_model
from dist_rec.training.start.domains import Texts as StoredTexts
from dist_rec.training.start.domains import centroid, choose_starts, rule_faults
from dist_rec.training.start.old_domains import BEFORE, KNOWN, compared, read_old, unseen
from dist_rec.training.start.origin import read_origin
from dist_rec.training.start.warm_start import fill_dense, own_parameters, shapes_of

SMALL = ["--train.device", "cpu", "--train.epochs", "2"]


@pytest.fixture(scope="module")
def prepared(foundation):
    config, _, _ = derive(foundation[0], foundation[1], Wishes(keys={"run.name": "nothing", "run.seed": "9"}), 1)
    return prepare(config)


def test_a_run_folder_keeps_its_schema_so_that_its_data_may_be_gone(foundation, tmp_path):
    run, data = foundation
    copy = shutil.copytree(run, tmp_path / "base")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("/base/shards/", "/nowhere/"))
    _, found, _ = derive(copy, data, Wishes(), 1)
    assert found.schema == read_index(str(run.parent.parent / "base" / "shards" / "train")).schema
    (copy / "schema.json").unlink()
    with pytest.raises(UserError, match="written before run folders kept their schema.*nowhere"):
        derive(copy, data, Wishes(), 1)


def test_stacked_parameters_are_found_by_what_one_more_domain_makes_longer(prepared):
    model = empty_model(prepared, prepared.schema)
    own = own_parameters(model, prepared.schema, lambda schema: empty_model(prepared, schema))
    shapes = shapes_of(model)
    assert {name.split(".layers.")[0] for name in own} == {
        "domains.weight",
        "adaptation.weight",
        "adaptation.domain_weight",
        "adaptation.bias",
        "entities.query.gate.null",
        "entities.item.gate.null",
        "body.levels.0.specific",
        "body.levels.0.gate.weight",
        "body.levels.0.gate.bias",
        "body.towers",
    }
    assert {shapes[name][0] for name in own} == {4}


@pytest.mark.parametrize(("starts", "expected"), [([None], "mean"), ([1], "middle")])
def test_every_old_row_is_the_checkpoint_s_and_a_new_one_what_was_asked(prepared, starts, expected):
    saved, names = prepared.foundation.saved, prepared.names
    model, trained = build_model(prepared, Reduction()), {}
    for name, info in saved.manifest.dense.items():
        trained[name] = torch.empty(info.shape)
        kind = next(kind for kind in info.kinds if kind in ("parameter", "buffer"))
        flat = trained[name].view(-1)
        saved.fill(name, info, kind, checkpoint.dense.Box.whole(flat.shape), flat)
    fill_dense(saved, model, names.own, 3, starts)
    for name, value in model.state_dict().items():
        if name not in names.own:
            assert torch.equal(value, trained[name]), name
            continue
        assert torch.equal(value[:3], trained[name]), name
        wanted = trained[name].mean(0) if expected == "mean" else trained[name][1]
        assert torch.equal(value[3], wanted), name


def test_nearest_is_by_the_texts_mean_vectors(foundation):
    """Invented vectors: those of a domain point one way, and the new domain's lie beside `middle`'s."""
    run, data = foundation
    root = f"{run.parent.parent}/base/shards/train"
    old, new = read_index(root), read_index(f"{data}/train")

    class Store:
        folder = "invented"

        def __init__(self, vectors):
            self.vectors = vectors
            self.info = replace_recipe(2)

        def find(self, keys):
            return np.zeros(len(keys), int), np.isin(keys, list(self.vectors))

        def lookup(self, keys):
            return np.stack([self.vectors[key] for key in keys])

    def replace_recipe(width):
        recipe = type("Recipe", (), {"width": width, "model_fingerprint": "m"})
        return type("Info", (), {"recipe": recipe})

    from dist_rec.data.reader import ShardReader

    way = {"big": (1.0, 0.0), "middle": (0.0, 1.0), "tiny": (-1.0, 0.0), "fresh": (0.2, 1.0)}
    stores = {}
    for name, (where, index) in {"old": (root, old), "new": (f"{data}/train", new)}.items():
        reader, vectors = ShardReader(where, index, ["query", "title"]), {}
        for number, (shard, _) in enumerate(reader.places):
            rows = reader.rows(number)
            feature = "query" if shard.domain == "middle" else "title"
            for key in rows.text_keys[rows.texts[feature].values]:
                vectors.setdefault(int(key), np.array(way[shard.domain], np.float32))
        stores[name] = Store(vectors)
    from dist_rec.data.remote import DEFAULT_RETRY

    texts = [StoredTexts(root, old, stores["old"], DEFAULT_RETRY)]
    texts.append(StoredTexts(f"{data}/train", new, stores["new"], DEFAULT_RETRY))
    known, features = old.schema.domains.names, ["query", "title"]
    assert choose_starts("nearest", known, ["fresh"], *texts, features) == {"fresh": "middle"}
    assert centroid(texts[0], ["query"], "tiny") is None
    with pytest.raises(UserError, match="neither items nor queries have any: set finetune.domains to mean"):
        choose_starts("nearest", known, ["fresh"], *texts, [])
    stores["new"].info = replace_recipe(3)
    with pytest.raises(UserError, match="two language models"):
        choose_starts("nearest", known, ["fresh"], *texts, features)


def test_nearest_without_texts_and_unknown_names_are_refused_with_what_to_use(foundation):
    run, data = foundation
    for rule, said in (("nearest", "has no text.store: take mean, or name one of big"), ("bgi", "no domain of the")):
        config, _, _ = derive(run, data, Wishes(domains=rule), 1)
        with pytest.raises(UserError, match=said):
            prepare(config)
    assert rule_faults("big", ["big"], ["fresh"], [config]) == []


def test_what_does_not_fit_is_refused_in_words_all_at_once(foundation):
    run, data = foundation
    keys = {"model.width": "32", "tables.dim": "16", "data.streams": "7", "data.batch_size": "14"}
    config, _, _ = derive(run, data, Wishes(keys=keys), 8)
    with pytest.raises(UserError) as refused:
        prepare(config, 8)
    said = str(refused.value)
    assert "model.width: 16 -> 32 (the foundation's first)" in said and "tables.dim: 8 -> 16" in said
    assert "table 'user_id' is 41 x 8 in the foundation's checkpoint, this config wants 41 x 16" in said
    assert "data.streams is 7" in said and "more parameters" in said and len(said.splitlines()) < 20
    one_more = {"model.tasks": "{ctr: {label: ctr}}"}
    config, _, _ = derive(run, data, Wishes(keys=one_more), 1)
    with pytest.raises(UserError, match="heads for ctr, relevance, this config for ctr"):
        prepare(config)


def test_data_that_does_not_extend_is_refused_before_anything_is_made_of_it(foundation, tmp_path):
    small = build_small(tmp_path, {"big": 9, "middle": 9, "tiny": 9})
    with pytest.raises(UserError, match="does not extend the data of"):
        derive(foundation[0], small, Wishes(), 1)
    with pytest.raises(UserError, match="name the folder above the splits"):
        derive(foundation[0], f"{small}/nothing", Wishes(), 1)
    with pytest.raises(UserError, match="is the test split of a data set: name the folder above"):
        derive(foundation[0], f"{foundation[1]}/test", Wishes(), 1)


def test_features_that_the_foundation_did_not_read_are_left_out(foundation, tmp_path):
    run, data = foundation
    copy = shutil.copytree(run, tmp_path / "base")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("exclude_features: []", "exclude_features: [age]"))
    config, found, _ = derive(copy, data, Wishes(), 1)
    config = replace(config, data=replace(config.data, exclude_features=[]))
    assert found.left_out(read_index(f"{data}/train").schema, config) == ["age"]
    # Whose checkpoint read it after all, as this copy's did, has other shapes.
    with pytest.raises(UserError, match=r"user\.profile\.weight"):
        prepare(config)


@pytest.mark.parametrize(
    ("rows", "ranks", "expected"),
    [
        (64, 1, Pace(16, 8, 2, 0)),
        (1024, 1, Pace(32, 8, 2, 6)),
        (4096, 1, Pace(128, 8, 2, 6)),
        (4096, 12, Pace(96, 12, 2, 8)),
        (100_000, 1, Pace(2048, 8, 2, 9)),
        (10_000_000, 1, Pace(4096, 8, 1, 100)),
    ],
)
def test_the_pace_follows_the_rows(rows, ranks, expected):
    tree = {"data": {"train": "x", "batch_size": 4096}, "dense": {"warmup_steps": 100}}
    assert Pace.of(rows, from_dict(Config, tree, ""), ranks) == expected


def test_a_finetuned_run_goes_on_and_is_evaluated_without_its_foundation(foundation, tmp_path):
    """Two ranks; the foundation's folder is gone before the run goes on, and again before it is evaluated."""
    run, data = foundation
    copy = shutil.copytree(run, tmp_path / "runs" / "base")
    first = dist_rec("finetune", copy, "--data", data, "--name", "new", *SMALL, "--nproc-per-node", "2")
    assert first.returncode == 0, first.stderr
    new = tmp_path / "runs" / "new"
    assert "domain fresh begins as the mean of 3" in first.stderr
    origin = read_origin(new)
    assert origin.starts == {"fresh": "mean"} and origin.tables == ["item_id", "tags", "user_id"]
    held = read_old(new)
    assert {entry["domain"] for entry in compared(held)} == {"big", "middle", "tiny"}
    assert any(entry["difference"] for entry in compared(held)), "freeze none moves old domains"
    before = json.loads((run / "evaluation.json").read_text())["domains"]["big"]["ctr"]
    for name in ("auc", "logloss"):
        assert held["before"]["domains"]["big"]["ctr"][name] == pytest.approx(before[name], abs=1e-6)
    shutil.rmtree(copy)
    steps = checkpoint.find(new).name
    again = dist_rec("train", new / "config.yaml", "--train.epochs", "3")
    assert again.returncode == 0 and "going on from " + steps in again.stderr, again.stderr
    assert "starting from" not in again.stderr and checkpoint.find(new).name > steps
    after = json.loads((new / "evaluation.json").read_text())
    evaluated = dist_rec("evaluate", new, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    found = json.loads(evaluated.stdout.splitlines()[-1])["domains"]["fresh"]["ctr"]
    assert found == pytest.approx(after["domains"]["fresh"]["ctr"], abs=1e-6)
    with pytest.raises(UserError, match="finetune.freeze"):
        find_earlier(load_config(new / "config.yaml", {"finetune.freeze": "L0"}))


def test_a_dry_run_says_what_the_command_would_of_a_run_that_is_there(foundation):
    """It would describe what that one began as, whatever is asked now."""
    run, data = foundation
    given = ["finetune", run, "--data", data, "--name", "there"]
    config, _, _ = derive(run, data, Wishes(name="there"), 1)
    (config.run_folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    save_config(config, config.run_folder / "config.yaml")
    again = dist_rec(*given, "--domains", "bigg", "--freeze", "head", "--dry-run")
    assert again.returncode == 2 and "holds a run that this config cannot go on with" in again.stderr
    assert "finetune.domains" in again.stderr and "finetune.freeze" in again.stderr


def test_old_rows_are_read_under_the_new_schema(foundation):
    index = read_index(f"{foundation[0].parent.parent}/base/shards/test")
    schema = read_index(f"{foundation[1]}/train").schema
    assert as_extended(index, schema).schema.domains.names == ["big", "middle", "tiny", "fresh"]


def test_old_domains_without_test_rows_are_said():
    """As those before the foundation's own, where that was finetuned itself; the new one is none of them."""
    domains = {name: {"ctr": {"rows": rows}} for name, rows in {"first": 0, "second": 3, "new": 0}.items()}
    assert unseen({BEFORE: {"domains": domains}, KNOWN: ["first", "second"]}) == ["first"]
    assert unseen({"skipped": "why"}) == []


def test_new_ids_of_a_managed_table_that_stays_are_said_to_share_a_row(prepared):
    specs = [replace(spec, managed=spec.name == "user_id", frozen=spec.name != "tags") for spec in prepared.specs]
    assert [one.split()[1] for one in of_managed(replace(prepared, specs=specs))] == ["user_id"]
