"""Raw ids are carried whole, and every vocabulary of the config sends each id where it says, or says why it cannot."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import SMALL_SCHEMA, rewrite_block, run_command, small_table, with_value
from toy_shards import read, schema, write

from dist_rec.config import Config, TableConfig, load_config
from dist_rec.data.append import append
from dist_rec.data.build import build
from dist_rec.data.index import read_index
from dist_rec.data.order import Order
from dist_rec.data.reader import ShardReader
from dist_rec.data.rows import Ragged
from dist_rec.data.stream import Stream
from dist_rec.data.verify import verify
from dist_rec.data.vocabulary import IdMap, id_maps, vocabulary_faults
from dist_rec.errors import UserError
from dist_rec.schema import RAW_IDS, Schema
from dist_rec.scoring import hashes
from dist_rec.scoring.hashes import mix, unmix
from dist_rec.strict import from_dict
from dist_rec.training.prepare import prepare
from dist_rec.training.resume import find_earlier

SECONDS = 120
RAW = {"kind": "raw"}


def test_mixing_is_undone_and_spreads_any_ids_evenly():
    draw = np.random.default_rng(0)
    for ids in (
        np.arange(70_000, dtype=np.int32),
        np.arange(70_000) << 40,
        RAW_IDS - 1 - np.arange(70_000),
        draw.integers(0, RAW_IDS, 70_000),
    ):
        mixed = mix(ids)
        assert mixed.dtype == np.int64 and mixed.min() >= 0 and mixed.max() < RAW_IDS
        assert (unmix(mixed) == ids).all() and len(np.unique(mixed)) == len(ids)
        for counts in (np.bincount(mixed // (RAW_IDS // 7 + 1)), np.bincount(mixed % 7)):
            # Ten thousand in each of seven; 400 is four standard deviations.
            assert len(counts) == 7 and abs(counts - 10_000).max() < 400
    # The one id that would be sent to RAW_IDS, which is no id, and the one that would come from there.
    edges = hashes._mixed(np.array([RAW_IDS], np.uint64), hashes._UNTIMES).view(np.int64)
    assert mix(edges) < RAW_IDS and (unmix(mix(edges)) == edges).all()
    assert len(mix(np.zeros(0, np.int64))) == 0


def test_mixing_stays_what_it_was():
    """Rows of trained tables were found by it."""
    assert mix(np.array([0, 1, 2, 123_456_789, RAW_IDS - 1])).tolist() == [
        0,
        2239566909222623291,
        4654908330476816519,
        7728970361762476148,
        1997280860660433862,
    ]


def hashed(value: str) -> int:
    return int.from_bytes(hashlib.md5(value.encode()).digest()[8:], "little") % RAW_IDS


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_raw_ids_are_themselves_and_other_values_their_hash(tmp_path, ending):
    values = ["0", "7", "007", "-7", "+7", "x", " 7", str(RAW_IDS - 1), str(RAW_IDS), str(2**64 + 1), "7.5", None]
    rows = [{"user": v, "past": [v or "q", None, "9"], "click": 1} for v in values]
    features = {
        "user": {"role": "user", "kind": "id", "vocabulary": RAW},
        "past": {"role": "history", "kind": "ids", "shares": "user"},
    }
    (index,) = build(schema(features), [write(tmp_path / f"raw.{ending}", rows)], str(tmp_path / "out"), workers=1)
    assert index.schema.features["user"].vocabulary.size == 0 and index.schema.table_sizes() == {"user": RAW_IDS}
    assert not (tmp_path / "out" / "vocabulary").exists() and verify(str(tmp_path / "out"))["rows"] == len(rows)
    plain = {"0": 0, "7": 7, str(RAW_IDS - 1): RAW_IDS - 1, None: None}
    wanted = [plain[v] if v in plain else hashed(v) for v in values]
    found = read(tmp_path / "out")
    assert [row["user"] for row in found] == wanted
    # A missing entry of a history, which is aligned with others, is no value's id, and not that of "0".
    assert [row["past"] for row in found] == [[hashed("q") if w is None else w, hashed(""), 9] for w in wanted]


def test_integers_of_any_type_are_the_same_raw_id(tmp_path):
    numbers = [0, 5, 2**31, 2**52]
    for kind in (pa.int64(), pa.uint64(), pa.float64(), pa.string()):
        column = pa.array(numbers).cast(kind)
        pq.write_table(pa.table({"user": column, "click": [1] * 4}), tmp_path / "raw.parquet")
        toy = schema({"user": {"role": "user", "kind": "id", "vocabulary": RAW}})
        build(toy, [str(tmp_path / "raw.parquet")], str(tmp_path / "out"), workers=1, overwrite=True)
        assert [row["user"] for row in read(tmp_path / "out")] == numbers, kind


def test_appended_rows_never_meet_an_unknown_raw_id(tmp_path, caplog):
    toy = schema({"user": {"role": "user", "kind": "id", "vocabulary": RAW}})
    build(toy, [write(tmp_path / "old.parquet", [{"user": 1, "click": 0}])], str(tmp_path / "out"), workers=1)
    rows = [{"user": n, "click": 1} for n in (2**62, 3, 1)]
    index = append(str(tmp_path / "out"), [write(tmp_path / "new.parquet", rows)], workers=1)
    assert [row["user"] for row in read(tmp_path / "out")] == [1, 2**62, 3, 1]
    assert index.statistics["user"].unknown == 0 and not caplog.text


def test_a_schema_says_what_a_vocabulary_needs():
    for given, match in (
        ({"kind": "raw", "size": 9}, "a vocabulary of kind 'raw' has no size"),
        ({"kind": "hash"}, "a vocabulary of kind 'hash' needs size"),
        ({"kind": "integer"}, "a vocabulary of kind 'integer' needs size"),
        ({"kind": "rwa"}, "'dictionary', 'hash', 'integer' or 'raw'"),
    ):
        with pytest.raises(UserError, match=match):
            schema({"user": {"role": "user", "kind": "id", "vocabulary": given}})


SCHEMA = from_dict(
    Schema,
    SMALL_SCHEMA
    | {
        "features": {
            **SMALL_SCHEMA["features"],
            "user_id": {"role": "user", "kind": "id", "vocabulary": RAW},
            "tags": {"role": "item", "kind": "ids", "vocabulary": {"kind": "hash", "size": 50}},
        }
    },
    "small",
)


@pytest.fixture(scope="module")
def raw_set(tmp_path_factory) -> str:
    """`small_table` with raw users, of which one is `BIG`, a dictionary of items and hashed tags."""
    folder = tmp_path_factory.mktemp("raw")
    table = small_table({"big": 300, "middle": 80, "tiny": 40})
    users = [None if u is None else int(u[1:]) for u in table["user_id"].to_pylist()]
    pq.write_table(table.set_column(1, "user_id", pa.array(users)), folder / "raw.parquet")
    build(SCHEMA, [str(folder / "raw.parquet")], str(folder / "shards"), block_rows=32, workers=1)
    return str(folder / "shards")


def lists_of(root: str, overrides: dict[str, TableConfig]) -> dict[str, dict[int, list[int]]]:
    """Per feature and row number, the ids that batches of an epoch hold."""
    index = read_index(root)
    features = list(index.schema.features)
    order = Order(index, streams=4, batch_size=32, window=64, seed=1)
    maps = id_maps(index.schema, overrides, features)
    found = {}
    for batch in Stream(ShardReader(root, index, features), order, id_maps=maps).batches(0):
        assert batch.ids.values().dtype.is_signed and not batch.ids.values().dtype.is_floating_point
        for name, ids in batch.ids.to_dict().items():
            rows = np.split(ids.values().numpy(), np.cumsum(ids.lengths().numpy())[:-1])
            found.setdefault(name, {}).update(
                (n, r.tolist()) for n, r in zip(batch.row.tolist(), rows, strict=True) if n >= 0
            )
    return found


def test_batches_hold_what_each_vocabulary_makes_of_the_stored_ids(raw_set):
    stored = lists_of(raw_set, {})
    assert sum(map(len, stored["history"].values())) > 500 and len(stored["user_id"]) == 420
    for key, rows, table, becomes in (
        ("size", 40, "user_id", lambda ids: ids),
        ("size", 99, "item_id", lambda ids: ids),
        ("hash", 13, "user_id", lambda ids: mix(ids) % 13),
        ("hash", 13, "item_id", lambda ids: mix(ids) % 13),
        ("hash", 13, "tags", lambda ids: mix(ids) % 13),
        ("managed", 13, "user_id", mix),
        ("managed", 13, "item_id", mix),
    ):
        mapped = lists_of(raw_set, {table: TableConfig(**{key: rows})})
        changed = ("item_id", "history") if table == "item_id" else (table,)
        for name, of_rows in stored.items():
            for number, ids in of_rows.items():
                wanted = becomes(np.array(ids, np.int64)).tolist() if name in changed else ids
                assert mapped[name][number] == wanted, (key, name, number)


def test_nothing_is_mapped_where_stored_ids_are_rows_already(raw_set):
    index = read_index(raw_set)
    names = list(index.schema.features)
    own = {"item_id": TableConfig(size=99, dim=8), "tags": TableConfig(size=50), "user_id": TableConfig(dim=8)}
    assert id_maps(index.schema, own, names) == {} == id_maps(index.schema, {}, names)
    shared = id_maps(index.schema, {"item_id": TableConfig(hash=7)}, names)
    assert shared == dict.fromkeys(("history", "item_id"), IdMap("hash", 7, "item_id"))
    assert id_maps(index.schema, {"item_id": TableConfig(hash=7)}, ["history"]).keys() == {"history"}


def test_an_id_beyond_a_size_is_named_with_its_row(raw_set):
    with pytest.raises(UserError) as error:
        lists_of(raw_set, {"user_id": TableConfig(size=20)})
    found = lists_of(raw_set, {})["user_id"]
    number, name = int(str(error.value).split()[1]), found[int(str(error.value).split()[1])][0]
    assert name >= 20
    assert str(error.value) == (
        f"row {number} of the data set: 'user_id' has id {name}, but tables.overrides.user_id.size is 20, for ids "
        "below it. Raise it, or give the table hash or managed instead, which take any id."
    )
    lists = Ragged.from_lengths(np.array([1, 2, 9, 3]), np.array([0, 2, 0, 2, 0]))
    with pytest.raises(UserError, match="row 13 of the data set: 'f' has id 9"):
        IdMap("size", 9, "t")("f", lists, np.arange(10, 15))
    assert IdMap("size", 10, "t")("f", lists, np.arange(10, 15)).tolist() == [1, 2, 9, 3]


def test_a_stored_raw_id_out_of_range_is_damage(raw_set, tmp_path):
    root = str(shutil.copytree(raw_set, tmp_path / "copy"))
    for value in (-1, RAW_IDS):
        where = rewrite_block(root, 0, with_value("user_id", 3, value))
        with pytest.raises(UserError) as error:
            verify(root)
        assert f"{where}, row 3: 'user_id' has id {value}, outside its vocabulary 0 .. {RAW_IDS - 1}" in str(
            error.value
        )


def config_of(root: str, **tables) -> Config:
    tree = {
        "run": {"root": "runs"},
        "data": {"train": root, "batch_size": 32, "streams": 4},
        "tables": {"dim": 8, **tables},
    }
    return from_dict(Config, tree | {"model": {"width": 16, "tasks": {"ctr": {"label": "ctr"}}}}, "config")


def test_vocabularies_that_cannot_be_are_refused_before_the_start_all_at_once(raw_set):
    with pytest.raises(UserError) as error:
        prepare(config_of(raw_set, overrides={"item_id": {"size": 5}, "tags": {"size": 49}, "ueser_id": {"hash": 5}}))
    said = str(error.value)
    assert "user_id: its vocabulary is raw" in said and "give tables.overrides.user_id managed: N" in said
    assert "tables.overrides.item_id.size is 5, but the data's vocabulary has 31 ids" in said
    assert "tables.overrides.tags.size is 49, but the data's vocabulary has 50 ids" in said
    assert "Did you mean 'user_id'" in said
    names = [name for name in SCHEMA.features if name != "user_id"]
    fewer = {"item_id": TableConfig(hash=2), "tags": TableConfig(managed=2)}
    assert vocabulary_faults(read_index(raw_set).schema, fewer, names) == []
    prepared = prepare(config_of(raw_set, overrides={"user_id": {"hash": 11}, "item_id": {"size": 64}}))
    assert {spec.name: spec.rows for spec in prepared.specs} == {"user_id": 11, "item_id": 64, "tags": 50}


def test_another_vocabulary_is_another_run(tmp_path, raw_set):
    def written(overrides: dict) -> Config:
        path = tmp_path / "c.yaml"
        tree = {"run": {"root": str(tmp_path), "name": "run"}, "data": {"train": raw_set}}
        path.write_text(yaml.safe_dump(tree | {"tables": {"overrides": overrides}}))
        return load_config(path)

    before = written({"user_id": {"hash": 11}})
    (tmp_path / "run" / "checkpoints" / "step-00000004").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text((tmp_path / "c.yaml").read_text())
    assert find_earlier(before) == tmp_path / "run"
    assert find_earlier(written({"user_id": {"hash": 11, "sharding": "row_wise"}})) == tmp_path / "run"
    for overrides, change in (
        ({"user_id": {"hash": 12}}, r"overrides\.user_id\.hash: 11 -> 12"),
        ({"user_id": {"managed": 11}}, r"overrides\.user_id\.managed: not set -> 11"),
        ({"user_id": {"hash": 11}, "tags": {"size": 60}}, r"overrides\.tags\.size: not set -> 60"),
    ):
        with pytest.raises(UserError, match=change):
            find_earlier(written(overrides))


def test_a_run_with_raw_ids_trains_and_one_with_too_small_a_size_stops_in_words(tmp_path, raw_set):
    tree = {
        "run": {"root": str(tmp_path / "runs"), "name": "run"},
        "data": {"train": raw_set, "batch_size": 32, "streams": 4},
        "tables": {"dim": 8, "overrides": {"user_id": {"hash": 16}, "item_id": {"hash": 8}}},
        "model": {"width": 16, "tasks": {"ctr": {"label": "ctr"}}},
        "train": {"steps": 4, "log_every": 2},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "dist_rec", "train", str(tmp_path / "c.yaml")]
    done = run_command(command, SECONDS)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [line["losses"]["loss"] for line in lines if "losses" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    small = {"user_id": {"size": 9}, "item_id": {"hash": 8}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree | {"tables": {"dim": 8, "overrides": small}}))
    done = run_command([*command, "--run.name", "small", "--nproc-per-node", "2"], SECONDS)
    assert done.returncode == 2 and "but tables.overrides.user_id.size is 9" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
