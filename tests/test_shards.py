"""`shards build`: what goes in comes out, and the same bytes every time."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from toy_shards import HISTORY, SMALL, TOKENIZER, digests, history_rows, read, schema, small_rows, values, write

from dist_rec.data import encode
from dist_rec.data.blocks import text_key
from dist_rec.data.build import Join, Split, build, parse_split
from dist_rec.data.index import read_index
from dist_rec.data.inspect import inspect, print_inspection
from dist_rec.data.verify import verify
from dist_rec.errors import UserError

FULL = schema(
    {
        "user": {"role": "user", "kind": "id"},
        "bucket": {"role": "user", "kind": "id", "column": "user", "vocabulary": {"kind": "hash", "size": 97}},
        "hour": {"role": "user", "kind": "id", "vocabulary": {"kind": "integer", "size": 24}},
        "seen": {"role": "history", "kind": "ids", "shares": "item", "max_length": 2},
        "read": {"role": "history", "kind": "texts"},
        "query": {"role": "query", "kind": "text"},
        "item": {"role": "item", "kind": "id", "aspect": "id"},
        "tags": {"role": "item", "kind": "ids"},
        "title": {"role": "item", "kind": "text"},
        "price": {"role": "item", "kind": "dense"},
        "vector": {"role": "item", "kind": "dense", "width": 2},
    },
    {"click": {}, "grade": {"kind": "graded", "maximum": 4}},
    {"user": "user", "query": "query", "time": "time"},
    ("books", "films and more"),
)
ROWS = [
    {
        "domain": "films and more",
        "user": "u1",
        "hour": 3,
        "seen": ["b", "a", "z"],
        "read": ["one", "two"],
        "query": "red",
        "item": "a",
        "tags": ["x", "y"],
        "title": "A [b]",
        "price": 1.5,
        "vector": [1.0, 2.0],
        "click": 1,
        "grade": 2.5,
        "time": 50,
    },
    {
        "domain": "books",
        "user": "u2",
        "hour": 0,
        "seen": None,
        "read": None,
        "query": None,
        "item": "b",
        "tags": None,
        "title": None,
        "price": None,
        "vector": None,
        "click": None,
        "grade": 4,
        "time": 20,
    },
    {
        "domain": "books",
        "user": None,
        "hour": None,
        "seen": ["z"],
        "read": ["two"],
        "query": "red",
        "item": None,
        "tags": ["y"],
        "title": "B",
        "price": 2.0,
        "vector": [3.0, 4.0],
        "click": 0,
        "grade": None,
        "time": 10,
    },
]


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".csv.gz", ".tsv", ".jsonl"])
def test_every_format_gives_the_same_rows(tmp_path, ending):
    source = write(tmp_path / f"raw{ending}", ROWS)
    (index,) = build(FULL, [source], str(tmp_path / "out"), workers=1, tokenizer=TOKENIZER)
    out = tmp_path / "out"
    users, items, tags = values(out, "user"), values(out, "item"), values(out, "tags")
    assert users == [None, "u1", "u2"]
    # First appearance in the order of rows, then of features, then of list positions; `seen` keeps its last two.
    assert items == [None, "a", "z", "b"] and tags == [None, "x", "y"]
    rows = read(out)
    assert [row["key:time"] for row in rows] == [10, 20, 50]
    assert [row["domain"] for row in rows] == ["books", "books", "films and more"]
    last = rows[2]
    assert last["bucket"] == int.from_bytes(hashlib.md5(b"u1").digest()[8:], "little") % 97
    assert (last["user"], last["hour"], last["item"], last["seen"], last["tags"]) == (1, 3, 1, [1, 2], [1, 2])
    assert (last["read"], last["query"], last["title"]) == (["one", "two"], "red", "A [b]")
    assert (last["price"], last["vector"], last["label:click"], last["label:grade"]) == ([1.5], [1.0, 2.0], 1.0, 2.5)
    nulls = {name for name, value in rows[1].items() if value is None}
    assert nulls == {"seen", "read", "query", "tags", "title", "price", "vector", "label:click", "key:query"}
    assert rows[0]["user"] is None and rows[0]["key:user"] is None and rows[0]["bucket"] is None
    assert rows[0]["key:query"] == last["key:query"] >= 0
    assert index.label_counts == {
        "click": {"valid": 2, "positive": 1, "missing": 1},
        "grade": {"valid": 2, "positive": 2, "missing": 1},
    }
    assert index.statistics["tags"].mean_length == 1 and index.statistics["tags"].null_share == pytest.approx(1 / 3)
    assert sorted(shard.file for shard in index.shards) == ["books-00000.tar", "films_and_more-00000.tar"]
    texts = pq.read_table(out / "texts.parquet").to_pylist()
    assert {t["text"] for t in texts} == {"one", "two", "red", "A [b]", "B"}
    assert all(t["key"] == text_key(t["text"]) and t["tokens"][0] == 101 and t["tokens"][-1] == 102 for t in texts)
    assert verify(str(out))["rows"] == 3


def test_formats_mix_and_separators_split(tmp_path):
    s = schema({"item": {"role": "item", "kind": "id"}, "tags": {"role": "item", "kind": "ids", "separator": "|"}})
    write(tmp_path / "a.csv", [{"item": "7", "tags": "x| y", "click": 1}])
    write(tmp_path / "b.parquet", [{"item": 7.0, "tags": ["x"], "click": 0}, {"item": None, "tags": None, "click": 1}])
    write(tmp_path / "c.jsonl", [{"item": 7, "click": True}])
    build(s, [str(tmp_path / "*.*")], str(tmp_path / "out"), workers=1)
    assert values(tmp_path / "out", "item") == [None, "7"]
    assert [(r["item"], r["tags"]) for r in read(tmp_path / "out")] == [(1, [1, 2]), (1, [1]), (None, None), (1, None)]


def test_joins_look_up_side_tables(tmp_path):
    s = schema({"item": {"role": "item", "kind": "id"}, "title": {"role": "item", "kind": "text"}})
    main = write(tmp_path / "rows.csv", [{"item": i, "click": 0} for i in ("b", "a", "x", "")])
    side = write(tmp_path / "items.jsonl", [{"item": "a", "title": "A"}, {"item": "b", "title": "B"}])
    build(s, [main], str(tmp_path / "out"), joins=[Join(side, "item")], workers=1)
    assert [row["title"] for row in read(tmp_path / "out")] == ["B", "A", None, None]
    twice = write(tmp_path / "twice.jsonl", [{"item": "a", "title": "A"}, {"item": "a", "title": "B"}])
    with pytest.raises(UserError, match="item 'a' stands in 2 rows"):
        build(s, [main], str(tmp_path / "no"), joins=[Join(twice, "item")], workers=1)


def test_same_bytes_whatever_the_workers(tmp_path):
    source = write(tmp_path / "rows.parquet", small_rows(900))
    for workers in (1, 2):
        build(
            SMALL,
            [source],
            str(tmp_path / str(workers)),
            split=Split("random"),
            workers=workers,
            tokenizer=TOKENIZER,
            block_rows=50,
            shard_rows=120,
            seed=3,
        )
    one, two = digests(tmp_path / "1"), digests(tmp_path / "2")
    assert one == two and len([f for f in one if f.endswith(".tar")]) > 6
    build(SMALL, [source], str(tmp_path / "2"), split=Split("random"), workers=1, seed=4, overwrite=True)
    assert digests(tmp_path / "2") != one
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def polluted(column: pa.Array, byte: int) -> pa.Array:
    """The same values; `byte` stands under every null, and in the bits behind the last row's."""
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    behind = [(byte >> i) & 1 for i in range(-len(column) % 8)]
    bitmap = np.packbits([*valid, *behind], bitorder="little").tobytes()
    hidden = [byte] if pa.types.is_list(column.type) else byte
    filled = pa.array([hidden if value is None else value for value in column.to_pylist()], column.type)
    children = [filled.values] if pa.types.is_list(column.type) else None
    return pa.Array.from_buffers(
        column.type, len(column), [pa.py_buffer(bitmap), filled.buffers()[1]], children=children
    )


def test_what_memory_held_under_nulls_is_not_in_the_bytes(tmp_path, monkeypatch):
    unpack, types = encode.unpack, set()

    def unpack_polluted(data: bytes) -> pa.RecordBatch:
        batch = unpack(data)
        types.update(str(column.type) for column in batch.columns if column.null_count)
        columns = [polluted(column, byte) if column.null_count else column for column in batch.columns]
        return pa.record_batch(columns, schema=batch.schema)

    source = write(tmp_path / "raw.jsonl", ROWS)
    events = write(tmp_path / "rows.parquet", history_rows(200))
    for byte in (0, 0x55, 0xAA):
        monkeypatch.setattr(encode, "unpack", unpack_polluted if byte else unpack)
        build(FULL, [source], str(tmp_path / str(byte) / "full"), workers=1)
        build(HISTORY, [events], str(tmp_path / str(byte) / "events"), workers=1, block_rows=30, shard_rows=60)
    assert {"int64", "double", "list<l: int64>", "list<l: float>"} <= types
    assert digests(tmp_path / "0") == digests(tmp_path / "85") == digests(tmp_path / "170")


def test_splits_deal_rows_as_told(tmp_path):
    rows = small_rows(2000)
    source = write(tmp_path / "rows.parquet", rows)
    sizes = [i.rows for i in build(SMALL, [source], str(tmp_path / "r"), split=parse_split("random:8,1,1"), workers=1)]
    assert sum(sizes) == 2000 and abs(sizes[0] - 1600) < 60 and abs(sizes[1] - 200) < 50
    build(SMALL, [source], str(tmp_path / "q"), split=parse_split("random:1,1,0:by=query"), workers=1)
    assert not (tmp_path / "q" / "test").exists()
    queries = [{r["key:query"] for r in read(tmp_path / "q" / s)} for s in ("train", "valid")]
    assert queries[0] and queries[1] and not queries[0] & queries[1]
    build(SMALL, [source], str(tmp_path / "t"), split=parse_split("time:8,1,1"), workers=1)
    times = [[r["key:time"] for r in read(tmp_path / "t" / s)] for s in ("train", "valid", "test")]
    assert max(times[0]) < min(times[1]) and max(times[1]) < min(times[2]) and abs(len(times[0]) - 1600) < 50
    for wrong in (
        "random:1,2",
        "random:0,1,1",
        "random:a,b,c",
        "daily",
        "time:8,1,1:by=q",
        "column:",
        "random:1,1,1:by=",
    ):
        with pytest.raises(UserError):
            parse_split(wrong)


def test_shards_are_tars_readable_by_range(tmp_path):
    build(
        SMALL,
        [write(tmp_path / "rows.parquet", small_rows(500))],
        str(tmp_path / "out"),
        workers=1,
        block_rows=64,
        shard_rows=200,
    )
    index = read_index(str(tmp_path / "out"))
    assert [s.file for s in index.shards] == ["a-00000.tar", "a-00001.tar", "b-00000.tar", "b-00001.tar"]
    for shard in index.shards:
        data = (tmp_path / "out" / shard.file).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard.sha256 and len(data) == shard.bytes
        assert sum(b.rows for b in shard.blocks) <= 200
        for block in shard.blocks:
            with tarfile.open(fileobj=io.BytesIO(data[block.offset : block.offset + block.bytes])) as tar:
                (member,) = tar.getmembers()
                batch = pa.ipc.open_stream(tar.extractfile(member).read()).read_all()
            assert member.name == block.name and batch.num_rows == block.rows
            times = batch["key:time"].to_pylist()
            assert times == sorted(times) and block.time == (times[0], times[-1])
            # Each distinct text once in a block.
            texts = batch["title"].chunk(0).dictionary.field("text").to_pylist()
            assert len(texts) == len(set(texts)) <= 40


def test_inspect_tells_what_is_inside(tmp_path):
    build(FULL, [write(tmp_path / "raw.jsonl", ROWS)], str(tmp_path / "out"), workers=1, tokenizer=TOKENIZER)
    found = json.loads(json.dumps(inspect(str(tmp_path / "out"))))
    assert found["rows"] == 3 and found["time"] == [10, 50]
    assert found["domains"]["books"]["rows"] == 2
    assert found["domains"]["books"]["labels"]["click"] == {
        "valid": 1,
        "positive": 0,
        "missing": 1,
        "rate": 0.0,
        "mean": 0.0,
    }
    assert found["features"]["read"]["length"] == {"empty_share": pytest.approx(1 / 3), "mean": 1.0, "max": 2}
    assert found["features"]["title"]["tokens"]["mean"] == pytest.approx(4.0, abs=1)
    assert found["tables"]["tags"]["top"][0] == {"row": 2, "count": 2, "value": "y"}
    console = Console(record=True, width=200, file=io.StringIO())
    print_inspection(found, console)
    assert "films and more" in console.export_text()


def test_a_reused_vocabulary_keeps_its_rows(tmp_path, caplog):
    s = schema({"item": {"role": "item", "kind": "id"}})
    first = write(tmp_path / "a.jsonl", [{"item": i, "click": 0} for i in "abc"])
    second = write(tmp_path / "b.jsonl", [{"item": i, "click": 0} for i in "cxax"])
    build(s, [first], str(tmp_path / "a"), workers=1)
    with caplog.at_level(logging.WARNING):
        (index,) = build(s, [second], str(tmp_path / "b"), vocabulary=str(tmp_path / "a" / "vocabulary"), workers=1)
    assert [row["item"] for row in read(tmp_path / "b")] == [3, 0, 1, 0]
    assert "2 ids (1 distinct, such as 'x')" in caplog.text and index.statistics["item"].unknown == 2
    assert values(tmp_path / "b", "item") == [None, "a", "b", "c"]
    with pytest.raises(UserError, match="no file .*item.parquet"):
        build(s, [second], str(tmp_path / "c"), vocabulary=str(tmp_path), workers=1)


def test_dates_become_seconds(tmp_path):
    s = schema({"item": {"role": "item", "kind": "id"}}, keys={"time": "t"})
    rows = [
        {"item": 1, "click": 0, "t": t} for t in ("1970-01-02", "1970-01-01 00:00:05", "7", "1970-01-01T01:00:00+01:00")
    ]
    build(s, [write(tmp_path / "a.csv", rows)], str(tmp_path / "out"), workers=1)
    assert [row["key:time"] for row in read(tmp_path / "out")] == [0, 5, 7, 86400]


def test_input_larger_than_memory_limit(tmp_path):
    n = 400_000
    title = [f"{hashlib.md5(str(i % 150_000).encode()).hexdigest()} " * 4 for i in range(n)]
    table = {
        "item": list(range(n)),
        "title": title,
        "user": [i % 999 for i in range(n)],
        "time": list(range(n)),
        "click": [0.0] * n,
    }
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    raw = sum(map(len, title)) + 32 * n
    assert raw > 60e6
    s = schema(
        {"item": {"role": "item", "kind": "id"}, "title": {"role": "item", "kind": "text"}},
        keys={"user": "user", "time": "time"},
    )
    (index,) = build(s, [str(tmp_path / "rows.parquet")], str(tmp_path / "out"), workers=1, memory_limit="40MB")
    assert index.rows == n and index.schema.table_sizes() == {"item": n + 1}
