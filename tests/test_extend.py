"""A new domain on top of a data set: old blocks stand as they are, old values keep their rows, new ones follow."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import reduce
from operator import xor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from shops import OLD, SEARCH, SHOP, extend, search_rows, shop_rows
from test_append import tokenizer_with_one_token
from toy_shards import digests, read, values, write

from dist_rec.cli.shards import shards_build
from dist_rec.data.append import append
from dist_rec.data.build import build, parse_split
from dist_rec.data.extend import as_extended, extension_faults
from dist_rec.data.index import Index, read_index
from dist_rec.data.inspect import inspect, print_inspection
from dist_rec.data.order import Order
from dist_rec.data.reader import ShardReader
from dist_rec.data.stream import Stream
from dist_rec.data.verify import verify
from dist_rec.errors import UserError
from dist_rec.schema import Schema
from dist_rec.strict import from_dict, to_dict


@pytest.fixture(scope="module")
def shop(old, tmp_path_factory) -> Path:
    return extend(old, tmp_path_factory.mktemp("shop"), "shop", SHOP, shop_rows())


@pytest.fixture(scope="module")
def search(shop, tmp_path_factory) -> Path:
    """Extends what extends."""
    return extend(shop, tmp_path_factory.mktemp("search"), "search", SEARCH, search_rows())


def everything(root: Path, index: Index, features: list[str]) -> dict:
    """Columns of all rows, in the index's order; texts as keys, with tokens."""
    reader, found = ShardReader(str(root), index, features, with_tokens=True), []
    for number in range(len(reader.places)):
        rows = reader.rows(number)
        known = [(int(key), tuple(rows.tokens.slice(i, i + 1).values)) for i, key in enumerate(rows.text_keys)]
        texts = {
            name: [[known[i] for i in ids.slice(r, r + 1).values] for r in range(len(rows))]
            for name, ids in rows.texts.items()
        }
        ids = {n: [c.slice(r, r + 1).values.tolist() for r in range(len(rows))] for n, c in rows.ids.items()}
        plain = {"domain": rows.domain, **rows.keys, **rows.dense, **{f"label:{n}": v for n, v in rows.labels.items()}}
        found.append(ids | texts | {n: np.nan_to_num(v, nan=-9).tolist() for n, v in plain.items()})
    return {name: [value for part in found for value in part[name]] for name in found[0]}


def test_the_schema_is_the_old_one_and_then_the_new_one(old, shop):
    before, index = read_index(str(old / "train")), read_index(str(shop))
    assert index.schema.domains.names == ["books", "films", "lamps"]
    assert list(index.schema.features) == [*before.schema.features, "colour", "seen"]
    assert list(index.schema.labels) == ["click", "grade", "kept"] and index.schema.name == "lamps"
    assert index.schema.keys == from_dict(Schema, to_dict(OLD) | {"keys": SHOP["keys"] | {"query": "query"}}, "x").keys
    assert index.schema.features["past"].max_length == 4 and index.schema.features["item"].aspect == "id"
    assert index.extension.domains == ["lamps"]
    absent = ["keys.query", "features.age", "features.query", "features.tags", "features.bucket", "features.any"]
    assert index.extension.missing == [*absent, "labels.grade"]
    assert index.tokenizer == before.tokenizer and index.tokenizer.max_length == 9
    assert extension_faults(index.schema, before.schema) == []
    assert verify(str(shop))["rows"] == 40 and {shard.domain for shard in index.shards} == {"lamps"}


def digests_of(values: list[str | None], sizes: list[int]) -> list[str]:
    """Of a dictionary's values, row 0 first."""
    md5 = [hashlib.md5(f"{row}:{value}".encode()).digest() for row, value in enumerate(values)]
    each = [int.from_bytes(one, "little") for one in md5[1:]]
    return [f"{reduce(xor, each[: size - 1], 0):032x}" for size in sizes]


def test_old_values_keep_their_rows_and_new_ones_follow(old, shop):
    before, index = read_index(str(old / "train")).schema, read_index(str(shop)).schema
    for table, new in (("user", ["v0", "v1", "v2", "v3"]), ("item", None), ("tags", []), ("colour", ["red", "blue"])):
        had = values(old, table) if table != "colour" else [None]
        have = values(shop, table)
        assert have[: len(had)] == had and len(set(have)) == len(have)
        if new is not None:
            assert sorted(map(str, have[len(had) :])) == sorted(new)
        vocabulary = index.features[table].vocabulary
        assert vocabulary.size == len(have)
        grown = table in before.features and len(have) > len(had)
        assert vocabulary.inherited == ([len(had)] if grown else [])
        assert vocabulary.digests == digests_of(have, vocabulary.steps)
        if table in before.features:
            assert vocabulary.digests[0] == before.features[table].vocabulary.digests[0]
    # In order of first appearance: row by row, and in a row the features in the schema's order.
    seen = dict.fromkeys(v for row in shop_rows() for v in (row["sku"], *row["seen"]))
    assert values(shop, "item") == [*values(old, "item"), *(v for v in seen if v not in values(old, "item"))]
    assert index.features["bucket"].vocabulary == before.features["bucket"].vocabulary
    assert index.features["any"].vocabulary.kind == "raw"


def test_new_rows_are_right_and_what_they_lack_is_null(shop):
    items, users, rows = values(shop, "item"), values(shop, "user"), shop_rows()
    order = sorted(range(len(rows)), key=lambda i: rows[i]["day"])
    found = read(shop)
    assert len(found) == len(rows)
    for i, got in zip(order, found, strict=True):
        row = rows[i]
        assert (items[got["item"]], users[got["user"]], got["title"]) == (row["sku"], row["customer"], row["title"])
        assert [items[n] for n in got["seen"]] == row["seen"] and got["label:kept"] == row["kept"]
        assert got["key:time"] == row["day"] and got["key:user"] is not None
        for name in ("age", "query", "tags", "bucket", "any", "label:grade", "key:query"):
            assert got[name] is None
        before = [r for r in rows if r["customer"] == row["customer"] and r["day"] < row["day"] and r["bought"]]
        before.sort(key=lambda r: r["day"])
        assert [items[n] for n in got["past"]] == [r["sku"] for r in before[-4:]]
        assert got["titles"] == [r["title"] for r in before[-4:]]
    assert any(got["past"] for got in found)
    statistics = read_index(str(shop)).statistics
    assert statistics["tags"].null_share == 1 and statistics["tags"].frequency.distinct == 0
    assert statistics["past"].null_share == 0 and statistics["item"].unknown == 0


def test_old_blocks_are_read_under_the_new_schema(old, shop, search):
    """Same ids, domains, keys and texts; what they lack is null, at one remove and at two."""
    names = list(OLD.features)
    for split in ("train", "valid"):
        index = read_index(str(old / split))
        before = everything(old / split, index, names)
        for newer in (shop, search):
            extended = as_extended(index, read_index(str(newer)).schema)
            assert extended.schema == read_index(str(newer)).schema and extended.rows == index.rows
            after = everything(old / split, extended, [*names, "colour", "seen"])
            assert {name: after[name] for name in before} == before
            assert set(map(str, after["colour"] + after["seen"])) == {"[]"}
            assert set(after["label:kept"]) == {-9}
            assert extended.statistics["colour"].null_share == 1
            assert extended.label_counts["kept"] == {"valid": 0, "positive": 0, "missing": index.rows}
            assert extended.statistics["item"] == index.statistics["item"]
            order = Order(extended, streams=4, batch_size=8, window=20, seed=0)
            stream = Stream(ShardReader(str(old / split), extended, [*names, "seen"], with_tokens=True), order)
            rows = [row for batch in stream.batches(0) for row in batch.row[batch.valid].tolist()]
            assert sorted(rows) == list(range(index.rows))
    # The middle one, under the last.
    index = read_index(str(shop))
    extended = as_extended(index, read_index(str(search)).schema)
    both = list(index.schema.features)
    assert everything(shop, extended, both) == everything(shop, index, both)
    assert as_extended(index, index.schema) is index


def test_ids_outside_the_old_vocabulary_are_still_damage(old, shop):
    """A block is held to the vocabulary that it was written with."""
    index = read_index(str(old / "train"))
    extended = as_extended(index, read_index(str(shop)).schema)
    small = replace(index.schema.features["item"].vocabulary, size=3)
    feature = replace(index.schema.features["item"], vocabulary=small)
    extended.written = replace(index.schema, features=index.schema.features | {"item": feature})
    with pytest.raises(UserError, match="'item' has id [0-9]+, outside its vocabulary 0 .. 2"):
        everything(old / "train", extended, ["item"])


def test_a_chain_of_extensions_inherits_every_size(old, shop, search):
    one, two, three = (read_index(str(root)).schema for root in (old / "train", shop, search))
    items = three.features["item"].vocabulary
    assert items.inherited == [one.features["item"].vocabulary.size, two.features["item"].vocabulary.size]
    assert values(search, "item")[: len(values(shop, "item"))] == values(shop, "item")
    assert set(values(search, "item")[len(values(shop, "item")) :]) == {"d0", "d1", "d2", "d3", "d4"}
    assert three.features["user"].vocabulary.inherited == two.features["user"].vocabulary.inherited
    assert three.domains.names == ["books", "films", "lamps", "drills", "saws"]
    assert extension_faults(three, one) == extension_faults(three, two) == []
    for table in ("query", "item"):
        assert extension_faults(two, three), table


def test_a_search_domain_needs_no_users_times_or_histories(search):
    found = read(search)
    items, rows = values(search, "item"), search_rows()
    for domain in ("drills", "saws"):
        got = [row for row in found if row["domain"] == domain]
        want = [row for row in rows if row["shop"] == domain]
        assert [(items[g["item"]], g["query"], g["title"], g["label:grade"]) for g in got] == [
            (w["item"], w["words"], w["title"], w["grade"]) for w in want
        ]
    for name in ("user", "past", "titles", "seen", "colour", "label:click", "label:kept", "key:user", "key:time"):
        assert {row[name] for row in found} == {None}
    assert read_index(str(search)).schema.features["past"].events is not None
    assert verify(str(search))["rows"] == 20
    shown = inspect(str(search))
    assert shown["tables"]["item"]["inherited"] == read_index(str(search)).schema.features["item"].vocabulary.inherited
    print_inspection(shown)


def test_a_history_that_the_new_schema_does_not_name_stays_null(old, tmp_path):
    """Though its users, times and items are there to collect it from."""
    tree = deepcopy(SHOP)
    del tree["features"]["past"]
    out = extend(old, tmp_path, "out", tree, shop_rows())
    index, rows = read_index(str(out)), read(out)
    assert {row["past"] for row in rows} == {None} and any(row["titles"] for row in rows)
    assert "features.past" in index.extension.missing and index.statistics["past"].null_share == 1
    assert index.schema.features["past"].events == OLD.features["past"].events
    append(str(out), [write(tmp_path / "more.parquet", shop_rows())], workers=1)
    assert {row["past"] for row in read(out)} == {None} and verify(str(out))["rows"] == 80


def test_the_same_bytes_whatever_the_workers_and_the_way_the_old_set_is_named(old, tmp_path):
    one = extend(old, tmp_path, "one", SHOP, shop_rows())
    two = extend(old / "valid", tmp_path, "two", SHOP, shop_rows(), workers=2)
    assert digests(one) == digests(two) and len(digests(one)) > 5


def test_rows_are_appended_to_an_extended_set(shop, tmp_path, caplog):
    out = tmp_path / "shop"
    shutil.copytree(shop, out)
    new = [row | {"day": 500, "sku": "i3" if i else "never seen"} for i, row in enumerate(shop_rows()[:5])]
    before = read(out)
    with caplog.at_level(logging.WARNING):
        history = write(tmp_path / "shop.parquet", shop_rows())
        index = append(str(out), [write(tmp_path / "n.parquet", new)], history_from=[history], workers=1)
    assert "vocabulary item: 1 ids" in caplog.text and index.rows == 45
    assert index.extension == read_index(str(shop)).extension and index.schema == read_index(str(shop)).schema
    rows = read(out)
    assert rows[:40] == before and [row["domain"] for row in rows[40:]] == ["lamps"] * 5
    assert [row["item"] for row in rows[40:]] == [0, *[values(out, "item").index("i3")] * 4]
    assert all(row["past"] is not None and row["age"] is None for row in rows[40:]) and rows[40]["past"]
    assert verify(str(out))["rows"] == 45


def test_a_split_of_the_new_domain(old, tmp_path):
    out = extend(old, tmp_path, "split", SHOP, shop_rows(), split=parse_split("random:2,1,1"))
    indexes = [read_index(str(out / split)) for split in ("train", "valid", "test")]
    assert sum(index.rows for index in indexes) == 40
    assert indexes[0].schema == indexes[1].schema == indexes[2].schema
    texts = set(pq.read_table(out / "texts.parquet")["text"].to_pylist())
    assert texts >= {row["title"] for row in shop_rows()}


def test_the_command_takes_the_old_set_and_a_schema_of_what_is_new(old, tmp_path):
    (tmp_path / "new.yaml").write_text(json.dumps(SHOP))
    source = write(tmp_path / "rows.parquet", shop_rows())
    shards_build(tmp_path / "new.yaml", [source], str(tmp_path / "out"), extends=str(old), workers=1)
    (index,) = build(SHOP, [source], str(tmp_path / "again"), extends=str(old), workers=1)
    assert read_index(str(tmp_path / "out")) == index


@pytest.mark.parametrize(
    "change, match",
    [
        ({"domains": {"names": ["films"]}}, "'films' is a domain of .* already, to which `dist-rec shards append`"),
        ({"domains": {}}, "domains.names: is required: the names of the new domains"),
        ({"features": {"item": {"kind": "ids"}}}, "features.item.kind is 'ids', it was 'id'"),
        ({"features": {"item": {"role": "user"}}}, "features.item.role is 'user', it was 'item'"),
        ({"features": {"item": {"aspect": "sparse"}}}, "features.item.aspect is 'sparse', it was 'id'"),
        ({"features": {"tags": {"max_length": 50}}}, "features.tags.max_length is 50, it was 3"),
        ({"features": {"age": {"width": 3}}}, "features.age.width is 3, it was 2"),
        ({"features": {"past": {"shares": "user"}}}, "features.past.shares is 'user', it was 'item'"),
        ({"features": {"bucket": {"vocabulary": {"size": 9}}}}, "features.bucket.vocabulary.size is 9, it was 50"),
        ({"features": {"item": {"vocabulary": {"kind": "raw"}}}}, "item.vocabulary.kind is 'raw', it was 'dict"),
        ({"labels": {"grade": {"maximum": 5}}}, "labels.grade.maximum is 5, it was 3.0"),
        ({"labels": {}}, "labels is empty"),
        ({"features": {"item": {"kinds": 3}}}, "features.item.kinds: unknown key. Did you mean 'kind'"),
        ({"features": {"name": {"role": "item", "kind": "text"}}}, r"several features with kind: text \(title, name\)"),
        ({"features": {"Item": {"role": "item", "kind": "id"}}}, "differ in nothing but upper and lower case"),
        ({"keys": {"query": "title"}}, "features.past.events: needs keys.user, keys.time, which the schema does not"),
        ({"features": {"past": {"events": {"of": "item"}}}}, "features.past.events: needs features.item, which"),
        ({"features": {"item": {"column": "absent"}}}, "features.item: no column 'absent'"),
        ({"features": 3}, "features: "),
    ],
)
def test_contradictions_are_refused_and_nothing_is_written(old, tmp_path, change, match):
    tree = deepcopy(SHOP) | deepcopy(change)
    with pytest.raises(UserError, match=match):
        extend(old, tmp_path, "out", tree, shop_rows())
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_what_one_model_could_not_read_is_refused(old, tmp_path):
    def refuse(match: str, parent: Path = old, **options) -> None:
        with pytest.raises(UserError, match=match):
            extend(parent, tmp_path, "out", SHOP, shop_rows(), **options)
        assert not (tmp_path / "out").exists()

    refuse("--vocabulary is 'x': the dictionaries are those of", vocabulary="x")
    refuse("--max-tokens is 32, the texts of .* have at most 9 tokens", max_tokens=32)
    refuse("--prefix differs from that of .*, which has none", prefixes={"item": "x"})
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text(tokenizer_with_one_token())
    refuse("is not the file that was used", tokenizer=str(tmp_path / "tok"))
    refuse("no data set at", parent=tmp_path)
    refuse("a data set is extended from a local folder", parent="s3://there/set")
    bare = tmp_path / "bare"
    shutil.copytree(old, bare)
    shutil.rmtree(bare / "vocabulary")
    refuse("its vocabularies are missing, so the values of new rows", parent=bare)
    refuse("its vocabularies are missing, so new rows cannot be numbered", parent=bare / "train")
    shutil.copytree(old / "vocabulary", bare / "vocabulary")
    pq.write_table(pq.read_table(old / "vocabulary" / "item.parquet")[:5], bare / "vocabulary" / "item.parquet")
    table = pq.read_table(old / "vocabulary" / "item.parquet").to_pylist()
    write(bare / "vocabulary" / "item.parquet", [*table, {"value": "more", "row": len(table) + 1}])
    refuse("item.parquet has rows up to .* so it is not the vocabulary", parent=bare)
    table[0]["value"], table[1]["value"] = table[1]["value"], table[0]["value"]
    write(bare / "vocabulary" / "item.parquet", table)
    refuse("item.parquet has other values, or in another order, .* so it is not the vocabulary", parent=bare)
    with pytest.raises(UserError, match="is or holds .*, which is to stay"):
        build(SHOP, ["x"], str(bare), extends=str(bare / "train"), overwrite=True, workers=1)
    foreign = [row | {"domain": "books"} for row in shop_rows()]
    with pytest.raises(UserError, match="names domains that the schema does not: 'books' .* Rows are of: lamps"):
        extend(old, tmp_path, "out", SHOP, foreign)


def test_all_that_would_make_old_blocks_wrong_is_a_fault(old, shop):
    before, after = read_index(str(old / "train")).schema, to_dict(read_index(str(shop)).schema)
    sizes = after["features"]["item"]["vocabulary"]

    def faults(change) -> str:
        tree = deepcopy(after)
        change(tree)
        return "; ".join(extension_faults(from_dict(Schema, tree, "x"), before))

    def set_in(*place, to):
        def change(tree):
            *sections, last = place
            for section in sections:
                tree = tree[section]
            tree[last] = to

        return change

    assert faults(lambda tree: None) == ""
    # How raw tables carry a feature is nothing to blocks.
    assert faults(set_in("features", "past", "events", to=None)) == ""
    assert faults(set_in("features", "tags", "separator", to="|")) == ""
    assert "domains would change their numbers" in faults(set_in("domains", "names", to=["films", "books", "lamps"]))
    assert "domains would change" in faults(set_in("domains", "names", to=["books"]))
    for name, key, value in (
        ("age", "width", 3),
        ("item", "aspect", "sparse"),
        ("user", "role", "query"),
        ("tags", "max_length", 9),
        ("tags", "shares", "item"),
        ("tags", "kind", "id"),
    ):
        assert f"features.{name}.{key} is {value!r}, it was" in faults(set_in("features", name, key, to=value))
    for vocabulary, said in (
        ({"kind": "hash", "size": 9}, "vocabulary.kind is 'hash', it was 'dictionary'"),
        ({"size": sizes["size"]}, "has grown by the sizes"),
        ({"size": sizes["size"], "inherited": [3]}, "has grown by the sizes 3,"),
        ({"size": 2**31, "inherited": sizes["inherited"]}, "ids in its blocks take 64 bits"),
        (sizes | {"digests": sizes["digests"][::-1]}, "item.vocabulary has other values in its first"),
    ):
        assert said in faults(set_in("features", "item", "vocabulary", to=vocabulary))
    assert "bucket.vocabulary.size is 51" in faults(set_in("features", "bucket", "vocabulary", "size", to=51))
    assert "labels.grade.maximum is 4.0, it was 3.0" in faults(set_in("labels", "grade", "maximum", to=4))
    assert faults(lambda tree: tree["features"].pop("age")) == "features.age is missing"
    assert faults(lambda tree: tree["labels"].pop("grade")) == "labels.grade is missing"
    assert faults(set_in("keys", "query", to=None)) == "keys.query is missing, which old rows have"
    with pytest.raises(UserError, match="under schema 'toy', which does not extend its own:\n  - .*lamps"):
        as_extended(read_index(str(shop)), before)
