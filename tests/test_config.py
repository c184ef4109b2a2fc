"""A config says all its faults at once, in words, and what is saved with a run is the run's."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from dist_rec.config import Config, DataConfig, ModelConfig, UniSRecConfig, apply_overrides, load_config, save_config
from dist_rec.errors import UserError
from dist_rec.strict import from_dict

CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if "data" in (yaml.safe_load(p.read_text()) or {}))


def faults(tree: dict) -> list[str]:
    """The lines of a refusal."""
    with pytest.raises(UserError) as caught:
        from_dict(Config, tree, "mine.yaml")
    title, *lines = str(caught.value).splitlines()
    assert title == "mine.yaml is not valid:" and all(line.startswith("  - ") for line in lines)
    return [line.removeprefix("  - ") for line in lines]


def test_every_fault_is_said_at_once_with_the_nearest_key():
    found = faults(
        {
            "data": {"batch_size": 100, "streams": 8, "shuffle_windw": 5, "weights": {"big": -1, "tiny": float("nan")}},
            "tables": {"overrides": {"item_id": {"dmi": 8, "sharding": "rowwise"}}, "dim": 0},
            "model": {
                "body": {"experts": "many", "expert_hidden": [8, 0]},
                "tasks": {"ctr": {"label": "ctr", "wieght": 1}},
            },
            "text": {"mode": "frozen", "stor": "x"},
            "dense": {"precision": "fp16", "gradient_accumulation": 4, "zro_stage": 1},
            "train": None,
            "evalute": {"batch_size": 7},
        }
    )
    for start in (
        "data.train: is required.",
        "data.shuffle_windw: unknown key. Did you mean 'shuffle_window'?",
        "data.weights.big: Input should be greater than or equal to 0 (got -1)",
        "data.weights.tiny: Input should be a finite number",
        "tables.dim: Input should be greater than or equal to 4 (got 0)",
        "tables.overrides.item_id.dmi: unknown key. Did you mean 'dim'?",
        "tables.overrides.item_id.sharding: Input should be 'auto', 'data_parallel', 'table_wise'",
        "model.body.experts: Input should be a valid integer",
        "model.body.expert_hidden.1: Input should be greater than or equal to 1 (got 0)",
        "model.tasks.ctr.wieght: unknown key. Did you mean 'weight'?",
        "text.stor: unknown key. Did you mean 'store'?",
        "text: mode: frozen needs store: the folder that `dist-rec embed` wrote",
        "dense.precision: fp16 is refused, because loss scaling reaches the tables' in-backward optimizer too late",
        "dense.gradient_accumulation: must be 1, because tables step on every micro-batch",
        "dense.zro_stage: unknown key. Did you mean 'zero_stage'?",
        "train: is a section: write its keys below it, or leave it out.",
        "evalute: unknown key. Did you mean 'evaluate'?",
    ):
        assert len([line for line in found if line.startswith(start)]) == 1, (start, found)
    assert len(found) == 17, found


@pytest.mark.parametrize(
    ("tree", "fault"),
    [
        (
            {"data": {"batch_size": 100, "strems": 8}},
            "data: batch_size 100 is not a multiple of data.streams 8: take 96",
        ),
        ({"data": {"weights": {"big": 0}}}, "data.weights: not all weights may be 0"),
        ({"evaluate": {"batch_size": 7}}, "evaluate: batch_size 7 is not a multiple of data.streams 8: take 8"),
        ({"text": {"mode": "full"}}, "text: mode: full needs model: a Hugging Face folder"),
        ({"model": {"width": 33}}, "model: width 33 is not a multiple of history.heads 2"),
        ({"dense": {"precision": "bf16", "zero_stage": 0}}, "dense.precision: bf16 with zero_stage: 0 is not trusted"),
        ({"dense": {"precision": "half"}}, "dense.precision: must be fp32 or bf16, got 'half'"),
        ({"run": "big"}, "run: is a section"),
        ({7: {}}, "7: Keys should be strings"),
    ],
)
def test_what_no_run_could_do_is_refused(tree, fault):
    tree["data"] = {"train": "x"} | tree.get("data", {})
    assert [line for line in faults(tree) if line.startswith(fault)], faults(tree)


def test_overrides_are_yaml_at_dotted_keys(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {train: x}\nrun:\n")
    config = load_config(
        path,
        {
            "train.steps": "100",
            "run.name": "again",
            "data.domains": "[a, b]",
            "tables.overrides.item_id.dim": "32",
            "dense.learning_rate": "1e-4",
            "data.valid": "null",
            "model.products": "false",
        },
    )
    assert (config.train.steps, config.run.name, config.data.domains) == (100, "again", ["a", "b"])
    assert config.tables.overrides["item_id"].dim == 32 and config.dense.learning_rate == 1e-4
    assert config.data.valid is None and config.model.products is False and str(config.run_folder) == "runs/again"
    for overrides, match in (
        ({"train.stpes": "1"}, r"train\.stpes: unknown key\. Did you mean 'steps'"),
        ({"data.train.x": "1"}, r"--data\.train\.x: 'train' is a value, not a section"),
        ({"data.domains": "[a"}, r"--data\.domains: '\[a' is not a YAML value; quote it"),
        ({"train.steps": "-1"}, r"train\.steps: Input should be greater than or equal to 0"),
    ):
        with pytest.raises(UserError, match=match):
            load_config(path, overrides)


def test_unreadable_configs_are_refused(tmp_path):
    path = tmp_path / "c.yaml"
    with pytest.raises(UserError, match=f"cannot read {path}: No such file"):
        load_config(path)
    for text, match in (
        ("data: {train: x\nrun: [", r"c\.yaml line \d+, column \d+: not YAML"),
        ("", "a config is a mapping with sections"),
        ("- data", "a config is a mapping with sections"),
        ("a: \x00", "not YAML"),
        (b"data: \xff", "not"),
    ):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=match):
            load_config(path)


KINDS = [kind.kind for kind in typing.get_args(typing.get_type_hints(Config)["model"])]


def sections(cls: type, kind: str) -> dict[str, type]:
    """The fields of a section that are sections themselves, `kind` being that of the model."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        several = [option for option in typing.get_args(hint) if getattr(option, "kind", None) == kind]
        for section in filter(dataclasses.is_dataclass, (hint, *several)):
            found[name] = section
    return found


def keys(kind: str, cls: type = Config) -> set[str]:
    """Every key of the tree, dotted; keys below user-given names are left out."""
    inner = sections(cls, kind)
    own = {field.name for field in dataclasses.fields(cls)} - inner.keys()
    return own | {f"{name}.{key}" for name, section in inner.items() for key in keys(kind, section)}


def kind_in(path: Path) -> str:
    return (yaml.safe_load(path.read_text()).get("model") or {}).get("kind", KINDS[0])


def test_the_resolved_config_is_whole_and_loads_as_the_same(tmp_path):
    config = from_dict(
        Config,
        {
            "data": {"train": "x", "weights": {"big": 0.5}},
            "tables": {"overrides": {"item_id": {"dim": 8}}},
            "model": {"tasks": {"ctr": {"label": "click"}}},
            "dense": {"betas": [0.8, 0.9], "eps": 1e-7},
        },
        "mine",
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for key in keys(KINDS[0]):
        place = saved
        for part in key.split("."):
            place = place[part]


def lines_with_keys(path: Path) -> dict[str, int]:
    """Every dotted key that a YAML file writes, and its line (from 0)."""
    found = {}

    def walk(node: yaml.Node, place: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                found[".".join((*place, key.value))] = key.start_mark.line
                walk(value, (*place, key.value))

    walk(yaml.compose(path.read_text()), ())
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_config_loads(path):
    load_config(path)


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.parent.name == "configs"], ids=lambda p: p.name)
def test_every_key_is_commented(path):
    lines, at = path.read_text().splitlines(), lines_with_keys(path)

    def commented(key: str) -> bool:
        """On its own line, on the one above, or, for names that the user gives, on the first of them."""
        first = [line for inner, line in at.items() if inner.startswith(f"{key}.")][:1]
        return any(" #" in lines[line] for line in (at[key], *first)) or lines[at[key] - 1].lstrip().startswith("#")

    bare = [key for key in keys(kind_in(path)) & at.keys() if not commented(key)]
    assert not bare, f"{path.name}: no comment at {', '.join(sorted(bare))}"


def test_every_key_stands_in_a_leading_config():
    for kind in KINDS:
        leading = [p for p in CONFIGS if p.name in ("demo.yaml", f"{kind}.yaml") and kind_in(p) == kind]
        written = {key for path in leading for key in lines_with_keys(path)}
        assert not sorted(keys(kind) - written)


def test_comments_tell_the_true_defaults():
    told = 0
    for path in CONFIGS:
        lines, kind = path.read_text().splitlines(), kind_in(path)
        for key, at in lines_with_keys(path).items():
            found = re.search(r"\(type: .*default: (.*)\)$", lines[at - 1])
            if key in keys(kind) and found:
                section, *inner, last = Config, *key.split(".")
                for name in inner:
                    section = sections(section, kind)[name]
                needed = {"train": "x"} if section is DataConfig else {}
                tree = dict(needed)
                apply_overrides(tree, {last: found[1]})
                assert from_dict(section, tree, path.name) == from_dict(section, needed, "defaults"), f"{path}: {key}"
                told += 1
    assert told > 140


LEAST = {"data": {"train": "x"}, "text": {"mode": "frozen", "store": "s"}, "model": {"kind": "unisrec"}}


def unisrec(**changes) -> dict:
    """LEAST without augmentation, and with `changes` of sections."""
    tree = {name: section | changes.pop(name, {}) for name, section in LEAST.items()}
    tree["model"] = {"contrast": {"weight": 0}} | tree["model"]
    return tree | changes


def test_the_kind_decides_which_keys_a_model_has():
    found = faults(unisrec(model={"widht": 3, "encoder": {"hedas": 2}, "body": {}, "samples": -1}))
    for start in (
        "model.widht: unknown key. Did you mean 'width'?",
        "model.encoder.hedas: unknown key. Did you mean 'heads'?",
        "model.body: unknown key.",
        "model.samples: Input should be greater than or equal to 0 (got -1)",
    ):
        assert len([line for line in found if line.startswith(start)]) == 1, (start, found)
    assert len(found) == 4, found
    # The nearest key is of this kind, not of the other.
    assert faults(unisrec(model={"adaptation": {}})) == ["model.adaptation: unknown key. Did you mean 'adaptor'?"]
    foundation = {"data": {"train": "x"}, "model": {"adaptor": {}}}
    assert faults(foundation) == ["model.adaptor: unknown key. Did you mean 'adaptation'?"]
    for kind in ("unisrek", 7, [1], None):
        (line,) = faults({"data": {"train": "x"}, "model": {"kind": kind}})
        assert line.startswith(f"model.kind: {str(kind)!r} is none of foundation, unisrec, mvke."), line
    assert line.endswith("mvke.") and "Did you mean 'unisrec'?" in faults(unisrec(model={"kind": "unisrek"}))[0]
    (line,) = faults({"data": {"train": "x"}, "model": 5})
    assert line == "model: is a section: write its keys below it, or leave it out."


def test_overrides_reach_the_kind(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(unisrec()))
    config = load_config(path, {"model.width": "64", "model.encoder.heads": "4", "evaluate.at": "[3]"})
    assert (config.model.width, config.model.encoder.heads, config.evaluate.at) == (64, 4, [3])
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config and isinstance(config.model, UniSRecConfig)
    # Another kind has other keys.
    with pytest.raises(UserError, match=r"model\.contrast: unknown key"):
        load_config(path, {"model.kind": "foundation"})
    path.write_text("data: {train: x}")
    assert load_config(path).model == load_config(path, {"model.kind": "foundation"}).model == ModelConfig()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"model": {"loss": "full"}}, "loss: full needs data.catalogue"),
        ({"model": {"loss": "sampled"}}, "loss: sampled needs samples"),
        ({"model": {"loss": "in_batch", "repeats": True}}, "repeats needs loss full or sampled"),
        ({"model": {"loss": "sampled", "samples": 9}}, "loss: sampled needs data.catalogue"),
        ({"model": {"samples": 9}}, "samples 9 is of loss: sampled, and loss is in_batch"),
        ({"model": {"item": "text+id"}}, "item: text+id needs loss full or sampled"),
        ({"model": {"width": 30, "encoder": {"heads": 4}}}, "width 30 is not a multiple of encoder.heads 4"),
        ({"model": {"contrast": {}}}, "contrast: item_drop_share 0.9 drops words in the other sequences"),
        (
            {"model": {"contrast": {}, "item": "id", "loss": "full"}, "data": {"catalogue": "y"}},
            "contrast: an item that is its id has no words to drop",
        ),
        ({"text": {"mode": "none", "store": None}}, "item: text needs texts: set text.mode"),
    ],
)
def test_what_no_sequence_model_could_do_is_refused(changes, fault):
    (line,) = faults(unisrec(**changes))
    assert line.startswith(f"model: {fault}"), line


def test_dropped_texts_are_of_frozen_vectors():
    (line,) = faults({"data": {"train": "x"}, "text": {"dropped_store": "y"}})
    assert line == "text: dropped_store is of mode: frozen, and mode is none: leave it out"
