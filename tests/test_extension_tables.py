"""Tables of extended vocabularies: which there are, how ids are dealt to them, and that models see one table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL_SCHEMA, build_small, check_verdicts, run_ranks
from extended import extend
from machines import cpus

from dist_rec.config import Config, TableConfig, TablesConfig
from dist_rec.data.batch import make_batch
from dist_rec.data.index import read_index
from dist_rec.data.order import Order
from dist_rec.data.reader import ShardReader
from dist_rec.data.rows import Ragged
from dist_rec.data.stream import Stream
from dist_rec.data.vocabulary import IdParts, id_maps, tables_of, undivided
from dist_rec.embeddings.tables import EmbeddingTables, table_specs
from dist_rec.errors import UserError
from dist_rec.plan.request import read_request
from dist_rec.plan.suggest import suggest
from dist_rec.schema import Schema
from dist_rec.strict import from_dict, to_dict
from dist_rec.training.planning import plan_tables
from dist_rec.training.prepare import prepare

SECONDS = 240
WORKER = "tests/extension_worker.py"
FEATURES = ["user_id", "history", "item_id", "tags"]
INHERITED = {"user_id": [7], "item_id": [9, 20], "tags": [2]}
# By number of ranks.
PARITY = {
    1: ["rowwise_adagrad/table_wise", "adagrad/row_wise", "sgd/table_wise"],
    2: [
        "rowwise_adagrad/row_wise+user_id=data_parallel+user_id@1=table_wise",
        "adagrad/column_wise+tags=data_parallel",
        "sgd/table_wise+item_id=row_wise+item_id@2=column_wise",
    ],
}
SAVED = {"rows": "rowwise_adagrad/row_wise+user_id=data_parallel", "tables": "adagrad/table_wise+tags=data_parallel"}
LOADED = {
    1: {"rows": "rowwise_adagrad/table_wise", "tables": "adagrad/row_wise"},
    2: {"rows": "rowwise_adagrad/table_wise+tags=data_parallel", "tables": "adagrad/column_wise+user_id=row_wise"},
}


def schema_of(sizes: dict[str, tuple[int, list[int]]]) -> Schema:
    tree = to_dict(from_dict(Schema, SMALL_SCHEMA, "test"))
    for name, (size, inherited) in sizes.items():
        tree["features"][name]["vocabulary"] |= {"size": size, "inherited": inherited}
    return from_dict(Schema, tree, "test")


SCHEMA = schema_of({"user_id": (41, [7]), "item_id": (31, [9, 20]), "tags": (4, [])})


def tables_config(**overrides: dict) -> TablesConfig:
    return TablesConfig(dim=8, overrides={name.replace("__", "@"): TableConfig(**o) for name, o in overrides.items()})


def shapes(schema: Schema, **overrides: dict) -> dict[str, tuple]:
    specs = table_specs(schema, tables_config(**overrides), FEATURES)
    return {s.name: (s.rows, s.dim, s.features) for s in specs}


def refused(**overrides: dict) -> str:
    with pytest.raises(UserError) as error:
        table_specs(SCHEMA, tables_config(**overrides), FEATURES)
    return str(error.value)


def test_every_extension_has_a_table_of_its_own():
    assert shapes(SCHEMA) == {
        "user_id": (7, 8, ("user_id",)),
        "user_id@1": (34, 8, ("user_id@1",)),
        "item_id": (9, 8, ("history", "item_id")),
        "item_id@1": (11, 8, ("history@1", "item_id@1")),
        "item_id@2": (11, 8, ("history@2", "item_id@2")),
        "tags": (4, 8, ("tags",)),
    }
    assert tables_of(SCHEMA, {})["item_id@1"] == range(9, 20)
    # The base is the table of the data set that was extended.
    old = shapes(schema_of({"user_id": (7, []), "item_id": (9, []), "tags": (4, [])}))
    assert old.items() <= shapes(SCHEMA).items()


def test_a_size_without_room_for_new_ids_is_said_with_what_a_foundation_needs():
    """Whatever it is raised to, a foundation's table has its own rows."""
    said = refused(item_id={"size": 9})
    assert "tables.overrides.item_id.size is 9, but the data's vocabulary has 31 ids" in said
    assert "9 of them were there before" in said and "without this key, which gives them a table of their own" in said
    roomy = shapes(SCHEMA, item_id={"size": 40})
    assert roomy["item_id"] == (40, 8, ("history", "item_id")) and "item_id@1" not in roomy


def test_an_extension_that_added_nothing_has_no_table():
    same = schema_of({"user_id": (7, [7]), "item_id": (20, [9, 20]), "tags": (4, [])})
    assert list(shapes(same)) == ["user_id", "item_id", "item_id@1", "tags"]
    assert id_maps(same, {}, FEATURES).keys() == {"item_id", "history"}
    assert id_maps(same, {}, ["user_id", "tags"]) == {}


def test_what_is_said_of_a_vocabulary_holds_for_its_parts():
    assert shapes(SCHEMA, item_id={"hash": 50})["item_id"] == (50, 8, ("history", "item_id"))
    assert "item_id@1" not in shapes(SCHEMA, item_id={"managed": 50}) and "item_id@1" in shapes(SCHEMA)
    config = tables_config(
        item_id={"dim": 12, "sharding": "row_wise", "precision": "fp16"},
        item_id__2={"sharding": "table_wise", "precision": "fp32"},
    )
    found = {s.name: (s.dim, s.sharding, s.precision) for s in table_specs(SCHEMA, config, FEATURES)}
    assert found["item_id"] == found["item_id@1"] == (12, "row_wise", "fp16")
    assert found["item_id@2"] == (12, "table_wise", "fp32")


def test_a_part_cannot_have_what_its_vocabulary_must_have_as_a_whole():
    assert "tables.overrides.item_id@1: dim, hash can be said of item_id as a whole" in refused(
        item_id__1={"dim": 4, "hash": 9}
    )
    assert "'item_id@3' is not known" in refused(item_id__3={"sharding": "row_wise"})
    assert "'item_id@1' is not known" in refused(item_id={"hash": 9}, item_id__1={"sharding": "row_wise"})
    assert "'tags@1' is not known" in refused(tags__1={"sharding": "row_wise"})
    with pytest.raises(UserError, match=r"frozen tables: 'item_id@7' is not known"):
        table_specs(SCHEMA, TablesConfig(), FEATURES, {"item_id@7"})


def test_ids_are_dealt_to_parts_and_found_again():
    ids = Ragged.from_lengths(np.array([3, 25, 9, 0, 19, 20, 8], np.int32), np.array([2, 0, 4, 1]))
    parts, place = IdParts((0, 9, 20))(ids)
    assert [p.values.tolist() for p in parts] == [[3, 0, 8], [0, 10], [5, 0]]
    assert [p.lengths.tolist() for p in parts] == [[1, 0, 1, 1], [0, 0, 2, 0], [1, 0, 1, 0]]
    whole = np.concatenate([p.values + first for p, first in zip(parts, (0, 9, 20), strict=True)])
    assert whole[place].tolist() == ids.values.tolist()


def test_a_part_that_is_not_read_has_one_row():
    ids = Ragged.from_lengths(np.array([3, 25, 9, 0, 19, 20, 8], np.int32), np.array([2, 0, 4, 1]))
    maps = id_maps(SCHEMA, {}, FEATURES, {"item_id", "item_id@2"})
    (firsts,) = {maps[name].firsts for name in ("item_id", "history")}
    assert maps["item_id"].unread == {0, 2}
    parts, _ = maps["item_id"](ids)
    whole, _ = IdParts(firsts)(ids)
    assert [p.lengths.tolist() for p in parts] == [p.lengths.tolist() for p in whole]
    assert parts[1].values.tolist() == whole[1].values.tolist() and not any(parts[n].values.any() for n in (0, 2))
    config = tables_config(item_id={"sharding": "row_wise"})
    specs = {s.name: (s.rows, s.sharding) for s in table_specs(SCHEMA, config, FEATURES, unread={"item_id"})}
    assert specs["item_id"] == (1, "auto") and specs["item_id@1"][0] > 1 and specs["item_id@1"][1] == "row_wise"


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    data = build_small(folder)
    return data, extend(data, folder / "extended", INHERITED)


def batches(root: str):
    index = read_index(root)
    order = Order(index, streams=4, batch_size=32, window=64, seed=1)
    maps = id_maps(index.schema, {}, FEATURES)
    yield from Stream(ShardReader(root, index, list(index.schema.features)), order, id_maps=maps).batches(0)


def test_a_batch_holds_the_same_ids_in_parts(sets):
    firsts = {name: [0, *INHERITED[undivided(name)]] for name in INHERITED} | {"history": [0, *INHERITED["item_id"]]}
    seen = {name: set() for name in firsts}
    for one, other in zip(*map(batches, sets), strict=True):
        assert {n: v.tolist() for n, v in one.id_lengths().items()} == {
            n: v.tolist() for n, v in other.id_lengths().items()
        }
        assert one.event_places == {} and list(other.event_places) == ["history"]
        for name, starts in firsts.items():
            parts = [other.ids[f"{name}@{k}" if k else name] for k in range(len(starts))]
            values = [p.values() + first for p, first in zip(parts, starts, strict=True)]
            assert sorted(torch.cat(values).tolist()) == sorted(one.ids[name].values().tolist())
            seen[name] |= {k for k, p in enumerate(parts) if len(p.values())}
        events = torch.cat(
            [other.ids[f"history@{k}" if k else "history"].values() + s for k, s in enumerate(firsts["history"])]
        )
        assert events[other.event_places["history"]].equal(one.ids["history"].values())
    assert seen == {name: set(range(len(starts))) for name, starts in firsts.items()}


def test_places_move_with_their_batch(sets):
    batch = next(iter(batches(sets[1])))
    moved = batch.to(torch.device("meta"))
    assert moved.event_places["history"].device.type == "meta" and moved.ids.values().device.type == "meta"
    assert moved.event_places["history"].shape == batch.event_places["history"].shape


def test_a_data_set_that_extends_nothing_is_as_before(sets):
    """The keys, values and places of a batch are those of no maps at all."""
    index = read_index(sets[0])
    reader = ShardReader(sets[0], index, list(index.schema.features))
    rows = reader.rows(0)
    plain, mapped = (
        make_batch(rows, index.schema, 40, id_maps=maps) for maps in (None, id_maps(index.schema, {}, FEATURES))
    )
    assert plain.ids.keys() == mapped.ids.keys() == FEATURES
    assert plain.ids.values().equal(mapped.ids.values()) and mapped.event_places == {}


def config_of(root: str) -> dict:
    return {
        "data": {"train": root, "batch_size": 40, "streams": 8, "shuffle_window": 64},
        "tables": {"dim": 8},
        "model": {"width": 16, "history": {"feedforward": 16}},
    }


def written(root: str, tmp_path) -> str:
    import yaml

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_of(root)))
    return str(tmp_path / "c.yaml")


def test_the_planner_counts_the_parts_of_a_feature_as_one(sets, tmp_path):
    """Lengths add up to the feature's, bytes to the whole table's, and a what-if is of one table."""
    one, other = (read_request(written(root, tmp_path), {}) for root in sets)
    assert one.key_lengths == {name: one.lengths[name] for name in FEATURES}
    for name in FEATURES:
        parts = [length for key, length in other.key_lengths.items() if undivided(key) == name]
        assert len(parts) > 1 and sum(parts) == pytest.approx(one.lengths[name])
    planned = [plan_tables(request, cpus(2, 2), None) for request in (one, other)]
    weights = [sum(int(o.weight_bytes.sum() + o.state_bytes.sum()) for o in p.chosen.values()) for p in planned]
    assert weights[0] == weights[1] and "item_id@2" in planned[1].chosen and "item_id@2" not in planned[0].chosen
    asked = read_request(
        written(sets[1], tmp_path), {"tables.item_id@2.rows": "1e6", "tables.tags@1.sharding": "row_wise"}
    )
    found = {s.name: (s.rows, s.sharding) for s in asked.specs}
    assert found["item_id@2"][0] == 10**6 and found["item_id"][0] == 9 and found["tags@1"] == (2, "row_wise")
    assert found["tags"][1] == "auto"


def test_suggestions_are_for_a_vocabulary_as_a_whole(sets, tmp_path):
    one, other = (suggest(read_request(written(root, tmp_path), {})) for root in sets)
    assert [vars(s) for s in one] == [vars(s) for s in other]


def test_vectors_without_ranks_are_those_of_one_table(sets):
    """Sums, means and events of every feature, on the plain modules."""
    for pooling in ("mean", "sum"):
        both = []
        for root in sets:
            prepared = prepare(from_dict(Config, config_of(root), "test"))
            config = replace(prepared.config.tables, pooling=pooling)
            both.append(EmbeddingTables(prepared.specs, prepared.schema, config, torch.device("cpu")))
        whole = {path.split(".")[-2]: p for path, p in both[0].named_parameters()}
        parts = {path.split(".")[-2]: p for path, p in both[1].named_parameters()}
        rows = tables_of(read_index(sets[1]).schema, {})
        with torch.no_grad():
            for weight in whole.values():
                weight.normal_()
            for name, weight in parts.items():
                weight.copy_(whole[undivided(name)][rows[name].start : rows[name].stop])
        for one, other in zip(*map(batches, sets), strict=True):
            wanted, found = (t.vectors(t(b), b) for t, b in zip(both, (one, other), strict=True))
            assert wanted.keys() == found.keys() == set(FEATURES)
            assert wanted["history"].equal(found["history"]) and wanted["item_id"].equal(found["item_id"])
            for name in FEATURES:
                torch.testing.assert_close(found[name], wanted[name])


def words(kind: str, layouts: dict[str, str]) -> list[str]:
    return [f"{kind}:{name}:{layout}" for name, layout in layouts.items()]


def test_a_divided_run_is_that_of_one_table_on_any_plan(sets, tmp_path):
    """Vectors, losses and rows; and saved by two ranks, it goes on under other plans, on two ranks and on one."""
    for ranks, first in ((2, words("save", SAVED)), (1, [])):
        parity = [f"parity:{i}:{layout}" for i, layout in enumerate(PARITY[ranks])]
        jobs = [*first, *parity, *words("load", LOADED[ranks])]
        check_verdicts(run_ranks(ranks, [WORKER, *sets, str(tmp_path), *jobs], SECONDS), len(jobs))
