"""Damaged shards and wrong inputs are refused in words, and leave what was there alone."""

from __future__ import annotations

import contextlib
import random
import re

import pyarrow as pa
import pytest
from toy_shards import SMALL, digests, schema, small_rows, write

from dist_rec.data.blocks import arrow_schema, decode_block, text_array
from dist_rec.data.build import Join, build, parse_split
from dist_rec.data.verify import verify
from dist_rec.errors import UserError


def test_verify_finds_every_damage(tmp_path):
    out = tmp_path / "out"
    (index,) = build(
        SMALL, [write(tmp_path / "rows.parquet", small_rows(500))], str(out), workers=1, block_rows=64, shard_rows=200
    )
    assert verify(str(out))["blocks"] == sum(len(s.blocks) for s in index.shards)
    shard = out / index.shards[0].file
    whole = shard.read_bytes()
    block = index.shards[0].blocks[1]
    damaged = bytearray(whole)
    damaged[block.offset + 512 + 700] ^= 1
    shard.write_bytes(damaged)
    first = index.shards[0].blocks[0].rows
    where = rf"{shard.name}, block {block.name} \(rows {first} .. {first + block.rows - 1}\)"
    with pytest.raises(UserError, match=f"{where} is damaged: its checksum is not the index's"):
        verify(str(out))
    after = index.shards[0].blocks[-1].offset + index.shards[0].blocks[-1].bytes
    for place, what in ((after, "holds something after its last block"), (16, "its SHA-256 is not the index's")):
        damaged = bytearray(whole)
        damaged[place : place + 1] = b"x"
        if place == 16:
            # A name in the header's field, behind its end: the header's own checksum made right.
            damaged[148:156] = b"%06o\0 " % (sum(damaged[:148]) + 8 * 32 + sum(damaged[156:512]))
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{shard.name}: {what}"):
            verify(str(out))
    shard.write_bytes(whole[: block.offset + 600])
    with pytest.raises(
        UserError, match=rf"{shard.name}: has {block.offset + 600} bytes(.*\n)*.*{where} is damaged: the file ends"
    ):
        verify(str(out))
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: the file is missing"):
        verify(str(out))
    shard.write_bytes(whole)
    text = (out / "index.json").read_text()
    (out / "index.json").write_text(re.sub(r'"positive": (\d+)', '"positive": 1', text))
    with pytest.raises(UserError, match="label 'click' is counted as"):
        verify(str(out))


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_compressed_blocks_are_never_expanded(codec):
    s = schema({"title": {"role": "item", "kind": "text"}})
    batch = pa.record_batch([text_array(["a" * 500] * 9), pa.array([0.0] * 9, pa.float32())], schema=arrow_schema(s))

    def encoded(**options):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
            writer.write_batch(batch)
        return sink.getvalue().to_pybytes()

    assert len(decode_block(encoded(), s, "here", 0, 0, s.features, True)) == 9
    with pytest.raises(UserError, match="here is damaged: its buffers are compressed"):
        decode_block(encoded(compression=codec), s, "here", 0, 0, s.features, True)
    noise = random.Random(0)
    for _ in range(200):
        data = bytearray(encoded())
        for _ in range(3):
            data[noise.randrange(600)] = noise.randrange(256)
        with contextlib.suppress(UserError):
            decode_block(bytes(data), s, "here", 0, 0, s.features, True)


GOOD = {"item": "a", "title": "t", "time": 1, "click": 1, "domain": "a", "n": 1, "v": 1.0, "split": "train"}
GOOD_B = GOOD | {"domain": "b"}
STRICT = schema(
    {
        "item": {"role": "item", "kind": "id"},
        "title": {"role": "item", "kind": "text"},
        "n": {"role": "item", "kind": "id", "vocabulary": {"kind": "integer", "size": 5}},
        "v": {"role": "item", "kind": "dense"},
    },
    keys={"time": "time"},
    domains="ab",
)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ({"click": 2}, r"rows\.jsonl, row 3: label 'click' is 2, allowed is 0 or 1"),
        ({"click": "yes?"}, r"column click: 'yes\?' in .*rows\.jsonl is no number"),
        ({"domain": "c"}, r"domains that the schema does not: 'c' \(1 rows\)"),
        ({"domain": None}, r"1 rows have no domain in column 'domain'; the first is .*row 3"),
        ({"n": 5}, r"row 3: 'n' is '5', but its integer vocabulary holds 0 .. 4"),
        ({"n": "q"}, r"row 3: 'n' is 'q'"),
        ({"v": [1.0, 2.0]}, r"row 3: dense feature 'v' has 2 values, its width is 1"),
        ({"v": "abc"}, r"column v: 'abc' .* neither a number nor a list"),
        ({"time": "yesterday"}, r"column time: 'yesterday' .* neither seconds nor a date"),
    ],
)
def test_bad_values_are_named(tmp_path, fault, match):
    source = write(tmp_path / "rows.jsonl", [GOOD, GOOD_B, GOOD | fault])
    with pytest.raises(UserError, match=match):
        build(STRICT, [source], str(tmp_path / "out"), workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_bad_inputs_are_refused(tmp_path):
    good = write(tmp_path / "rows.jsonl", [GOOD, GOOD_B])

    def refuse(match, sources=(good,), s=STRICT, out="out", **options):
        with pytest.raises(UserError, match=match):
            build(s, list(sources), str(tmp_path / out), workers=1, **options)
        assert not (tmp_path / "out").exists()

    refuse("no file matches", [str(tmp_path / "nothing*.csv")])
    refuse("no sources", [])
    renamed = write(
        tmp_path / "renamed.jsonl", [{"itme": 1, "titel": "x", "click": 1, "domain": "a", "n": 1, "v": 1.0, "time": 1}]
    )
    refuse(r"(?s)features.item: no column 'item'. Did you mean 'itme'.*features.title.*Did you mean 'titel'", [renamed])
    refuse("empty domain: no row is of 'b'", [write(tmp_path / "one.jsonl", [GOOD])])
    (tmp_path / "empty.csv").write_text(",".join(GOOD) + "\n")
    refuse("has no rows", [str(tmp_path / "empty.csv")])
    for name, data in {
        "bad.parquet": b"PAR1 no PAR1",
        "bad.csv.gz": b"\x1f\x8b\x08no",
        "bad.jsonl": b'{"item":\n',
        "bad.csv": b"item,title\n1,2\n3,4,5,6\n1,2\n",
    }.items():
        (tmp_path / name).write_bytes(data)
        refuse(rf"{re.escape(name)}", [str(tmp_path / name)])
    (tmp_path / "rows.xls").write_text("x")
    refuse("cannot tell its format", [str(tmp_path / "rows.xls")])
    refuse(
        "'out of this'.*a split is one of",
        [write(tmp_path / "s.jsonl", [GOOD, GOOD_B, GOOD | {"split": "out of this"}])],
        split=parse_split("column:split"),
    )
    refuse("leaves valid, test without rows", split=parse_split("time:8,1,1"))
    refuse("no column 'spilt'. Did you mean 'split'", split=parse_split("column:spilt"))
    refuse("lacks column 'key'", joins=[Join(good, "key")])
    refuse("is in several inputs", joins=[Join(write(tmp_path / "side.jsonl", [{"item": "a", "title": "b"}]), "item")])
    refuse("memory_limit 'lots'", memory_limit="lots")
    refuse("no such folder", tokenizer=str(tmp_path / "nowhere"))
    refuse("no_such_package.? is not installed", tokenizer="package:no_such_package/model")
    refuse("tokenizer.json is missing", tokenizer=str(tmp_path))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    refuse("is not empty", out="full")
    refuse("holds no data set", out="full", overwrite=True)
    assert (tmp_path / "full" / "precious.txt").read_text() == "mine"


def test_a_failed_build_keeps_what_was_there(tmp_path, monkeypatch):
    source, out = write(tmp_path / "rows.parquet", small_rows(300)), tmp_path / "out"
    build(SMALL, [source], str(out), workers=1)
    before = digests(out)
    monkeypatch.setattr("dist_rec.data.build.write_index", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        build(SMALL, [source], str(out), workers=1, overwrite=True)
    assert digests(out) == before and sorted(p.name for p in tmp_path.iterdir()) == ["out", "rows.parquet"]


def test_the_folder_above_the_splits_is_told_from_no_data_set(tmp_path):
    with pytest.raises(UserError, match="no data set at .*: index.json is missing. Build one with"):
        verify(str(tmp_path))
    build(
        SMALL,
        [write(tmp_path / "rows.parquet", small_rows(500))],
        str(tmp_path / "out"),
        split=parse_split("random:8,1,1"),
        workers=1,
    )
    with pytest.raises(UserError, match="Its splits are data sets: name .*/train or .*/valid or .*/test"):
        verify(str(tmp_path / "out"))
