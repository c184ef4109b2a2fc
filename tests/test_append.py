"""Data that keeps arriving: appended rows are seen once, by the old numbering, and nothing breaks on the way."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run_command
from toy_shards import SMALL, TOKENIZER, digests, read, schema, small_rows, values, write

from dist_rec.data import append as append_module
from dist_rec.data.append import LOCK_NAME, append
from dist_rec.data.build import Join, build, parse_split
from dist_rec.data.index import read_index
from dist_rec.data.inspect import inspect
from dist_rec.data.order import Order
from dist_rec.data.reader import ShardReader
from dist_rec.data.stream import Stream
from dist_rec.data.verify import verify
from dist_rec.errors import UserError
from dist_rec.text.texts import find_text_files

OLD, NEW = small_rows(500)[:300], small_rows(500)[300:]


def parts(folder: Path) -> tuple[str, str]:
    """Raw rows that were there, and that arrive: some items, tags and titles only among the latter."""
    new = [
        row | {"item": 99, "tags": ["t1", "new"], "title": "new title"} if i % 9 == 0 else row
        for i, row in enumerate(NEW)
    ]
    return write(folder / "old.parquet", OLD), write(folder / "new.parquet", new)


@pytest.fixture
def small_set(tmp_path) -> Path:
    old, _ = parts(tmp_path)
    build(SMALL, [old], str(tmp_path / "out"), workers=1, block_rows=32, shard_rows=96, tokenizer=TOKENIZER)
    return tmp_path / "out"


def rows_of_epoch(root: Path, index, world_size: int, **order) -> list[int]:
    """Row numbers, within `index`, of one epoch over all ranks."""
    seen = []
    for rank in range(world_size):
        reader = ShardReader(str(root), index, list(index.schema.features))
        order_of_rank = Order(index, streams=6, batch_size=24, window=100, seed=0, **order)
        for batch in Stream(reader, order_of_rank, rank=rank, world_size=world_size).batches(0):
            seen += batch.row[batch.valid].tolist()
    return seen


def test_old_and_new_rows_are_read_once_an_epoch_and_the_new_ones_alone(small_set, tmp_path):
    before, shards = read(small_set), digests(small_set)
    old_index = read_index(str(small_set))
    index = append(str(small_set), [str(tmp_path / "new.parquet")], workers=1)
    assert read_index(str(small_set)) == index and index.rows == 500 and index.generation == 1
    assert index.shards[: len(old_index.shards)] == old_index.shards and index.schema == old_index.schema
    names = [shard.file for shard in index.shards if shard.generation == 1]
    assert names == ["a-00000.g1.tar", "b-00000.g1.tar", "b-00001.g1.tar"]
    # As built: blocks of 32 rows, shards of 96.
    assert max(block.rows for shard in index.shards for block in shard.blocks) == 32
    assert max(shard.rows for shard in index.shards if shard.generation) == 96
    for arrangement in ("shuffled", "time"):
        for world_size in (1, 2, 3):
            assert Counter(rows_of_epoch(small_set, index, world_size, arrangement=arrangement)) == Counter(range(500))
    fresh = index.between(0, index.generation)
    assert {shard.file for shard in fresh.shards} == set(names)
    assert Counter(rows_of_epoch(small_set, fresh, 2)) == Counter(range(200))
    assert index.between(-1, 0).shards == old_index.shards
    # The old index still holds, byte for byte and row for row.
    assert Counter(rows_of_epoch(small_set, old_index, 2)) == Counter(range(300))
    assert all(digests(small_set)[name] == digest for name, digest in shards.items() if name.endswith(".tar"))
    assert read(small_set)[:300] == before
    assert verify(str(small_set))["rows"] == 500
    assert [entry["rows"] for entry in inspect(str(small_set))["generations"]] == [300, 200]
    with pytest.raises(UserError, match="nothing was appended since generation 1; its newest is 1"):
        index.between(1, index.generation)
    twice = append(str(small_set), [str(tmp_path / "old.parquet")], workers=1)
    assert twice.generation == 2 and twice.between(1, 2).rows == 300 and twice.between(0, 1).rows == 200
    assert verify(str(small_set))["rows"] == 800


def without_frequency(index) -> dict:
    return {name: replace(found, frequency=None) for name, found in index.statistics.items()}


def test_appended_rows_are_numbered_as_the_first_build_numbered_them(small_set, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        index = append(str(small_set), [str(tmp_path / "new.parquet")], workers=1)
    assert "vocabulary item: 23 ids (1 distinct, such as '99')" in caplog.text
    items, tags = values(small_set, "item"), values(small_set, "tags")
    raw = pq.read_table(tmp_path / "new.parquet").to_pylist()
    assert "99" not in items
    number = {value: i for i, value in enumerate(items)}
    found = Counter((row["domain"], row["item"], row["title"], row["key:time"]) for row in read(small_set)[300:])
    assert found == Counter((row["domain"], number.get(str(row["item"]), 0), row["title"], row["time"]) for row in raw)
    assert index.statistics["item"].unknown == 23 and index.statistics["tags"].unknown == 23
    assert tags.count("new") == 0
    # As if all rows had been built at once with that vocabulary.
    vocabulary = str(small_set / "vocabulary")
    sources = [str(tmp_path / "old.parquet"), str(tmp_path / "new.parquet")]
    (whole,) = build(SMALL, sources, str(tmp_path / "whole"), workers=1, vocabulary=vocabulary, tokenizer=TOKENIZER)
    assert without_frequency(index) == without_frequency(whole) and index.label_counts == whole.label_counts
    texts = {text["key"]: text for text in pq.read_table(small_set / "texts.parquet").to_pylist()}
    assert texts == {text["key"]: text for text in pq.read_table(tmp_path / "whole" / "texts.parquet").to_pylist()}
    assert len(texts) == pq.read_metadata(small_set / "texts.parquet").num_rows
    assert find_text_files([str(small_set)])[0].path == str(small_set / "texts.parquet")


def test_a_split_is_appended_to_and_shares_its_texts(tmp_path):
    old, new = parts(tmp_path)
    build(SMALL, [old], str(tmp_path / "out"), split=parse_split("random:8,1,1"), workers=1)
    sizes = {name: read_index(str(tmp_path / "out" / name)).rows for name in ("train", "valid")}
    index = append(str(tmp_path / "out" / "train"), [new], workers=1)
    assert index.split == "train" and index.rows == sizes["train"] + 200
    assert "new title" in pq.read_table(tmp_path / "out" / "texts.parquet")["text"].to_pylist()
    assert read_index(str(tmp_path / "out" / "valid")).rows == sizes["valid"]
    verify(str(tmp_path / "out" / "train"))


EVENTS = schema(
    {
        "user": {"role": "user", "kind": "id"},
        "item": {"role": "item", "kind": "id"},
        "query": {"role": "query", "kind": "text"},
        "title": {"role": "item", "kind": "text"},
        "past": {
            "role": "history",
            "kind": "ids",
            "shares": "item",
            "max_length": 3,
            "events": {"of": "item", "label": "click"},
        },
        "titles": {"role": "history", "kind": "texts", "max_length": 2, "events": {"of": "title", "label": "click"}},
    },
    keys={"user": "user", "time": "time"},
)


def event(time: int, item: str, query: str, user: str = "u", click: int = 1) -> dict:
    return {"user": user, "item": item, "query": query, "title": f"title {item}", "click": click, "time": time}


def test_histories_see_old_events_only_if_they_are_named(tmp_path, caplog):
    old = [event(1, "a", "q"), event(2, "b", "q"), event(3, "c", "only old", click=0), event(9, "b", "q")]
    new = [event(4, "c", "q"), event(6, "a", "new query"), event(5, "x", "q", user="v")]
    side = write(tmp_path / "side.csv", [{"item": i, "title": f"title {i}"} for i in "abcx"])
    drop = [{k: v for k, v in row.items() if k != "title"} for row in old + new]
    old, new = write(tmp_path / "old.jsonl", drop[:4]), write(tmp_path / "new.jsonl", drop[4:])
    joins = [Join(side, "item")]
    out = tmp_path / "out"
    build(EVENTS, [old], str(out), joins=joins, workers=1)
    items = values(out, "item")

    def appended() -> list[tuple]:
        return [(row["key:time"], [items[i] for i in row["past"]], row["titles"]) for row in read(out)[-3:]]

    append(str(out), [new], joins=joins, history_from=[old], workers=1)
    assert appended() == [
        (4, ["a", "b"], ["title a", "title b"]),
        (5, [], []),
        (6, ["a", "b", "c"], ["title b", "title c"]),
    ]
    assert not caplog.text.count("begin empty")
    texts = Counter(pq.read_table(out / "texts.parquet")["text"].to_pylist())
    # "only old" is there from the build; nothing twice.
    assert set(texts.values()) == {1} and {"new query", "title x", "only old"} <= set(texts)
    with caplog.at_level(logging.WARNING):
        append(str(out), [new], joins=joins, workers=1)
    assert "histories of the appended rows (past, titles) begin empty" in caplog.text
    assert appended() == [(4, [], []), (5, [], []), (6, ["c"], ["title c"])]
    assert verify(str(out))["rows"] == 10
    with pytest.raises(UserError, match="old.jsonl is given both as new rows and as history"):
        append(str(out), [str(tmp_path / "*.jsonl")], joins=joins, history_from=[old], workers=1)


def test_what_cannot_be_appended_is_refused_and_changes_nothing(small_set, tmp_path):
    new, before = str(tmp_path / "new.parquet"), digests(small_set)

    def refuse(match: str, root: str = str(small_set), sources: tuple[str, ...] = (new,), **options) -> None:
        with pytest.raises(UserError, match=match):
            append(root, list(sources), workers=1, **options)
        assert {k: v for k, v in digests(small_set).items() if k != LOCK_NAME} == before

    refuse("rows are appended to a local folder", root="http://there/set")
    refuse("no data set at", root=str(tmp_path))
    refuse("no file matches", sources=("nothing*.csv",))
    refuse("domains that the schema does not: 'c'", sources=(write(tmp_path / "c.jsonl", [NEW[0] | {"domain": "c"}]),))
    refuse("no column 'title'", sources=(write(tmp_path / "t.csv", [{"domain": "a", "item": 1}]),))
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text(tokenizer_with_one_token())
    refuse("is not the file that was used", tokenizer=str(tmp_path / "tok"))
    refuse("need 1 <= block_rows <= shard_rows", block_rows=50, shard_rows=20)
    (small_set / "vocabulary").rename(tmp_path / "away")
    before = {name: digest for name, digest in before.items() if not name.startswith("vocabulary")}
    refuse("its vocabularies are missing")


def test_digests_tell_another_vocabulary_and_sets_from_before_them_go_without(small_set, tmp_path):
    new, path = str(tmp_path / "new.parquet"), small_set / "index.json"
    held = pq.read_table(small_set / "vocabulary" / "tags.parquet").to_pylist()
    before = read_index(str(small_set)).schema.features["tags"].vocabulary
    held[0]["value"], held[1]["value"] = held[1]["value"], held[0]["value"]
    write(small_set / "vocabulary" / "tags.parquet", held)
    with pytest.raises(UserError, match="is not the vocabulary that the data set was built with"):
        append(str(small_set), [new], workers=1)
    tree = json.loads(path.read_text())
    for feature in tree["schema"]["features"].values():
        del feature["vocabulary"]["digests"]
    path.write_text(json.dumps(tree))
    append(str(small_set), [new], workers=1)
    after = read_index(str(small_set)).schema.features["tags"].vocabulary
    assert before.digests and after == replace(before, digests=[])


def tokenizer_with_one_token() -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]")).to_str()


@pytest.mark.parametrize("step", ["blocks", "texts", "tars", "index"])
def test_a_crash_leaves_the_data_set_valid_and_the_next_append_clean(small_set, tmp_path, step):
    """Killed outright, at four places; the process that follows is not in the way of what was left."""
    place = {
        "blocks": "dist_rec.data.writer.DatasetWriter.add",
        "texts": "dist_rec.data.append._all_texts",
        "tars": "dist_rec.data.append.sync",
        "index": "dist_rec.data.append.write_index",
    }[step]
    module, name = place.rpartition(".")[::2]
    script = (
        f"import os, signal\nfrom dist_rec.data import append, writer\n"
        f"place = {module.removeprefix('dist_rec.data.')}\n"
        f"place.{name} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"append.append({str(small_set)!r}, [{str(tmp_path / 'new.parquet')!r}], workers=1)\n"
    )
    old_index, old_rows = read_index(str(small_set)), read(small_set)
    killed = run_command([sys.executable, "-c", script], 60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert read_index(str(small_set)) == old_index and read(small_set) == old_rows
    assert verify(str(small_set))["rows"] == 300
    assert (small_set / ".append").exists()
    # Fewer rows than the killed one: nothing of it may stay.
    few = write(tmp_path / "few.parquet", pq.read_table(tmp_path / "new.parquet").to_pylist()[:20])
    index = append(str(small_set), [few], workers=1)
    assert index.rows == 320 and verify(str(small_set))["rows"] == 320
    listed = {shard.file for shard in index.shards}
    assert {path.name for path in small_set.iterdir()} == listed | {
        "index.json",
        "vocabulary",
        "texts.parquet",
        LOCK_NAME,
    }


def test_a_failure_before_the_index_leaves_the_old_one(small_set, tmp_path, monkeypatch):
    old_index = read_index(str(small_set))
    monkeypatch.setattr(append_module, "write_index", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        append(str(small_set), [str(tmp_path / "new.parquet")], workers=1)
    assert read_index(str(small_set)) == old_index and verify(str(small_set))["rows"] == 300
    monkeypatch.undo()
    assert append(str(small_set), [str(tmp_path / "new.parquet")], workers=1).generation == 1
    assert verify(str(small_set))["rows"] == 500


def test_of_two_appends_at_a_time_the_second_fails(small_set, tmp_path, monkeypatch):
    new, publish, faults = str(tmp_path / "new.parquet"), append_module._publish, []

    def publish_after_another(*arguments) -> None:
        monkeypatch.undo()
        with pytest.raises(UserError) as caught:
            append(str(small_set), [new], workers=1)
        faults.append(str(caught.value))
        publish(*arguments)

    monkeypatch.setattr(append_module, "_publish", publish_after_another)
    index = append(str(small_set), [new], workers=1)
    assert faults and f"another append to {small_set} is running (process {os.getpid()})" in faults[0]
    assert index.rows == 500 and verify(str(small_set))["rows"] == 500


def test_an_index_that_changed_meanwhile_is_not_overwritten(small_set, tmp_path, monkeypatch):
    texts = append_module._all_texts

    def rebuilt(*arguments):
        index = json.loads((small_set / "index.json").read_text())
        (small_set / "index.json").write_text(json.dumps(index))
        return texts(*arguments)

    monkeypatch.setattr(append_module, "_all_texts", rebuilt)
    with pytest.raises(UserError, match="was changed by something else meanwhile: nothing was appended"):
        append(str(small_set), [str(tmp_path / "new.parquet")], workers=1)
    assert verify(str(small_set))["rows"] == 300


def test_the_command_appends_and_inspect_shows_generations(small_set, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "dist_rec", "shards", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = run("append", str(small_set), "--from", str(tmp_path / "new.parquet"), "--json", "--workers", "1")
    assert json.loads(out.splitlines()[-1])["appended"] == 200
    assert "generation 1 of 200 rows in 3 shards; 500 rows in all" in out
    assert "Built (0) and appended" in run("inspect", str(small_set))


def test_appending_keeps_exact_totals(small_set, tmp_path):
    """Statistics are shares and means, but the sums behind them do not drift."""
    for _ in range(5):
        index = append(str(small_set), [str(tmp_path / "new.parquet")], workers=1)
    counted = read(small_set)
    assert len(counted) == 1300
    lengths = [len(row["tags"]) for row in counted if row["tags"] is not None]
    assert index.statistics["tags"].mean_length == sum(lengths) / 1300
    assert index.statistics["item"].unknown == 5 * 23
    assert np.isclose(index.statistics["item"].null_share, 0)
