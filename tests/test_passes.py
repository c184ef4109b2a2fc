"""Positions of a run in its data, and what a run folder or a checkpoint must hold to be gone on with."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import build_small

from dist_rec import files
from dist_rec.config import Config, load_config, save_config
from dist_rec.data.index import read_index
from dist_rec.data.order import Order
from dist_rec.errors import UserError
from dist_rec.strict import from_dict, to_dict
from dist_rec.training.evaluation import read_evaluation, write_evaluation
from dist_rec.training.passes import Passes
from dist_rec.training.resume import find_earlier, state_of

BATCH = 40


@pytest.fixture(scope="module")
def generations(tmp_path_factory):
    """An index of 318 rows, of which the last shard counts as appended; and the same before that."""
    index = read_index(build_small(tmp_path_factory.mktemp("passes")))
    index.shards[-1] = replace(index.shards[-1], generation=1)
    return index


def config_of(**sections) -> Config:
    tree = {"data": {"train": "x", "batch_size": BATCH, "streams": 8}, "train": {"epochs": 2}}
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return from_dict(Config, tree, "test")


def passes(config: Config, index, start=None) -> Passes:
    def open_stream(read, every_row):
        order = Order(read, streams=8, batch_size=BATCH, seed=0, window=128, drop_last=config.data.drop_last)

        def batches(epoch, first, stop):
            yield from ((epoch, step) for step in range(first, stop))

        return SimpleNamespace(order=order, reader=SimpleNamespace(index=read), batches=batches)

    return Passes(config, lambda: index, open_stream, start)


def test_every_position_leads_to_the_batches_that_are_left(generations):
    config, index = config_of(), generations.between(-1, 0)
    whole = passes(config, index)
    wanted = list(whole.batches())
    steps = whole.opened[0].order.steps
    assert wanted == [(epoch, step) for epoch in range(2) for step in range(steps)]
    for step in range(len(wanted) + 1):
        position = whole.position(step)
        assert position.step == step and from_dict(type(position), to_dict(position), "position") == position
        resumed = passes(config, index, position)
        assert (step == len(wanted)) == resumed.finished
        if not resumed.finished:
            assert list(resumed.batches()) == wanted[step:]
            assert resumed.at(step).total == len(wanted)
    # Read ahead or not, an epoch's end is that epoch's.
    assert (whole.position(steps).epoch, whole.position(steps).epoch_step) == (0, steps)


def test_a_cap_of_steps_ends_inside_an_epoch_and_can_be_raised(generations):
    index = generations.between(-1, 0)
    steps = passes(config_of(), index).opened[0].order.steps
    capped = passes(config_of(train={"steps": steps - 2}), index)
    assert len(list(capped.batches())) == steps - 2
    position = capped.position(steps - 2)
    assert passes(config_of(train={"steps": steps - 2}), index, position).finished
    assert len(list(passes(config_of(), index, position).batches())) == steps + 2


@pytest.mark.parametrize("cap", [True, False], ids=["train.steps", "train.epochs"])
def test_at_the_end_of_a_run_the_index_is_not_asked_for(generations, cap):
    steps = passes(config_of(), generations).opened[0].order.steps
    ended = passes(config_of(train={"steps": steps} if cap else {"epochs": 1}), generations)
    ended.newest = lambda: pytest.fail("nothing needs it")
    assert len(list(ended.batches())) == steps and len(ended.opened) == 1


def test_the_next_epoch_reads_what_was_appended_and_the_one_in_progress_does_not(generations):
    old = generations.between(-1, 0)
    position = passes(config_of(), old).position(2)
    resumed = passes(config_of(), generations, position)
    list(resumed.batches())
    assert [(one.after, one.upto) for one in resumed.opened] == [(-1, 0), (-1, 1)]
    assert [one.reader.index.rows for one in resumed.opened] == [old.rows, generations.rows]


def test_from_a_watermark_only_what_is_new_and_enough_for_a_batch_is_read(generations):
    old, new = generations.between(-1, 0), generations.rows - generations.between(-1, 0).rows
    ended = passes(config_of(), old).position(0)
    done = replace(ended, epoch=1, step=16, epoch_step=passes(config_of(), old).opened[0].order.steps)
    after = {"from_watermark": True}
    caught_up = passes(config_of(data=after), generations, done)
    list(caught_up.batches())
    assert [(one.after, one.upto, one.first_row) for one in caught_up.opened][-1] == (0, 1, old.rows)
    assert caught_up.rows_until(10**6) == new < BATCH
    # Nothing new, too little for a batch, or of no domain that is trained on: it waits.
    for index, data in (
        (old, after),
        (generations, after | {"drop_last": True}),
        (generations, after | {"domains": ["big"]}),
    ):
        start = replace(done, epoch_step=passes(config_of(data=data), old).opened[0].order.steps)
        assert passes(config_of(data=data), index, start).finished


def test_another_data_set_is_refused(generations):
    position = passes(config_of(), generations).position(3)
    other = replace(generations, shards=[replace(s, sha256="0" * 64) for s in generations.shards])
    for wrong in (other, generations.between(-1, 0)):
        with pytest.raises(UserError, match="the data set is not the one that the checkpoint was trained on"):
            passes(config_of(), wrong, position)
    with pytest.raises(UserError, match="of an epoch that has fewer"):
        passes(config_of(), generations, replace(position, epoch_step=99, step=99))


@pytest.mark.parametrize(
    "state",
    [{}, {"position": {"step": -5}}, {"position": None}, {"summary": {"epochs": [1]}}, {"position": {"step": 4}}],
    ids=str,
)
def test_a_foreign_state_is_refused_in_words(generations, state, tmp_path):
    good = to_dict(passes(config_of(), generations).position(3))
    if isinstance(state.get("position"), dict):
        state = {"position": good | state["position"]}
    saved = SimpleNamespace(folder=tmp_path, step=3, manifest=SimpleNamespace(state=state))
    with pytest.raises(UserError, match=r"the state in|not a valid|Input should"):
        state_of(saved)
    saved.manifest.state = {"position": good}
    assert state_of(saved).position.step == 3


def test_checkpoints_without_their_config_are_never_written_over(tmp_path):
    config = config_of(run={"root": str(tmp_path), "name": "run"})
    assert find_earlier(config) is None
    (tmp_path / "run" / "checkpoints" / "step-00000004").mkdir(parents=True)
    with pytest.raises(UserError, match="has checkpoints but no config.yaml"):
        find_earlier(config)


def test_never_resuming_does_not_stop_the_agent_s_own_restart(tmp_path, monkeypatch):
    config = config_of(run={"root": str(tmp_path), "name": "run"}, train={"resume": "never"})
    (tmp_path / "run" / "checkpoints" / "step-00000004").mkdir(parents=True)
    save_config(config, tmp_path / "run" / "config.yaml")
    assert load_config(tmp_path / "run" / "config.yaml") == config
    with pytest.raises(UserError, match="holds a run already"):
        find_earlier(config)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_earlier(config) == tmp_path / "run"


def test_a_run_folder_has_one_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.3)
    (tmp_path / "run").mkdir()
    held = files.lock(tmp_path / "run")
    with pytest.raises(UserError, match="is being written by another job"):
        files.lock(tmp_path / "run")
    held.close()
    files.lock(tmp_path / "run").close()


def test_evaluation_json_is_what_training_ended_with(tmp_path):
    assert read_evaluation(tmp_path) is None
    write_evaluation(tmp_path, {"split": "valid", "step": 8, "rates": {"train_seconds": 1}}, of_training=True)
    write_evaluation(tmp_path, {"split": "valid", "step": 8, "rates": {"evaluate_seconds": 2}})
    assert read_evaluation(tmp_path)["rates"] == {"train_seconds": 1, "evaluate_seconds": 2}
    write_evaluation(tmp_path, {"split": "train", "step": 8, "rates": {}})
    assert json.loads((tmp_path / "evaluation-train.json").read_text())["split"] == "train"
    write_evaluation(tmp_path, {"split": "test", "step": 16, "rates": {}}, of_training=True)
    assert read_evaluation(tmp_path)["step"] == 16
    for damage in ("", "{", "[]", '{"step": 1}'):
        (tmp_path / "evaluation.json").write_text(damage)
        assert read_evaluation(tmp_path) is None
