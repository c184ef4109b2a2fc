"""Input that was made to do damage is refused in words, in bounded time and memory, and nothing in it is executed."""

from __future__ import annotations

import gzip
import json
import os
import sys
import tarfile
import zlib
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import run_command
from http_server import serve
from toy_shards import schema

from dist_rec.config import apply_overrides, load_config
from dist_rec.data.blocks import TEXT, arrow_schema, decode_block, encode_block, text_array
from dist_rec.data.index import BlockInfo, read_index
from dist_rec.data.validate import check_member, member_payload
from dist_rec.errors import UserError
from dist_rec.schema import load_schema

SCHEMA = schema(
    {
        "title": {"role": "item", "kind": "text"},
        "tags": {"role": "item", "kind": "ids", "vocabulary": {"kind": "hash", "size": 9}},
    }
)
PAYLOAD = b"p" * 700


def member(**fields) -> tuple[bytes, BlockInfo]:
    """A tar member with these fields in its header, whose checksums are right."""
    made = tarfile.TarInfo("000000.arrow")
    made.size = len(PAYLOAD)
    for name, value in fields.items():
        setattr(made, name, value)
    data = made.tobuf(tarfile.GNU_FORMAT) + PAYLOAD.ljust(1024, b"\0")
    return data, BlockInfo(name="000000.arrow", rows=1, offset=0, bytes=len(data), crc32=zlib.crc32(PAYLOAD))


def test_a_plain_member_is_taken():
    data, block = member()
    assert check_member(data, block, "here") == data and bytes(member_payload(data, block, "here")) == PAYLOAD


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "/etc/passwd"},
        {"name": "../../000000.arrow"},
        {"name": "./000000.arrow"},
        {"name": "n" * 150},
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.LNKTYPE, "linkname": "../x"},
        {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
        {"type": tarfile.BLKTYPE},
        {"type": tarfile.FIFOTYPE},
        {"type": tarfile.DIRTYPE},
        {"type": tarfile.CONTTYPE},
        {"type": tarfile.GNUTYPE_SPARSE},
        {"type": tarfile.GNUTYPE_LONGNAME},
        {"type": tarfile.XHDTYPE},
        {"type": tarfile.XGLTYPE},
        {"type": tarfile.AREGTYPE},
        {"size": 2**60},
        {"size": -(2**60)},
        {"size": 0},
        {"size": 1025},
    ],
    ids=str,
)
def test_no_other_tar_member_is(fields):
    data, block = member(**fields)
    block.crc32 = zlib.crc32(data[512:])
    with pytest.raises(UserError, match="here is damaged: its tar header is that of"):
        check_member(data, block, "here")


def test_compressed_tars_are_not_expanded():
    data, block = member()
    for packed in (gzip.compress(data), gzip.compress(data).ljust(2048, b"\0"), b"\x28\xb5\x2f\xfd" + data):
        block.bytes, block.crc32 = len(packed), zlib.crc32(packed[512:])
        with pytest.raises(UserError, match="here is damaged: no tar header"):
            check_member(packed, block, "here")


def batch(titles: list[str | None], **changes) -> pa.RecordBatch:
    columns = {
        "title": text_array(titles),
        "tags": pa.array([[1, 2]] * len(titles), pa.list_(pa.int32())),
        "label:click": pa.array([1.0] * len(titles), pa.float32()),
    }
    return pa.record_batch(list((columns | changes).values()), schema=arrow_schema(SCHEMA))


def stream(batches: list[pa.RecordBatch], **options) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for one in batches:
            writer.write_batch(one)
    return sink.getvalue().to_pybytes()


def decoded(payload: bytes):
    return decode_block(payload, SCHEMA, "here", 0, 0, SCHEMA.features, True)


def offsets_changed(payload: bytes, old: list[int], new: list[int]) -> bytes:
    """A block whose one buffer of int32 `old` is `new`."""
    before, after = (b"".join(n.to_bytes(4, "little", signed=True) for n in numbers) for numbers in (old, new))
    assert payload.count(before) == 1
    return payload.replace(before, after)


def without_keys() -> pa.DictionaryArray:
    texts = text_array(["a", "b", "c"])
    keys = pa.array([1, None, 3], pa.int64())
    parts = [keys, texts.dictionary.field("text"), texts.dictionary.field("tokens")]
    return pa.DictionaryArray.from_arrays(texts.indices, pa.StructArray.from_arrays(parts, fields=list(TEXT)))


@pytest.mark.parametrize(
    ("payload", "complaint"),
    [
        (stream([batch(["a"]), batch(["a"])]), "it is no schema, dictionaries and one batch, but"),
        (stream([batch(["a"]), batch(["a", "b"])], emit_dictionary_deltas=True), "a dictionary comes in several parts"),
        (stream([batch(["a"]), batch(["b"])]), "but schema, dictionary, record batch, dictionary, record batch"),
        (stream([batch(["a"])])[:-8] + b"\xff\xff\xff\xff\xff\xff\xff\x7f", "to read 2147483647 metadata bytes"),
        (b"\xff\xff\xff\xff\x00\xff\xff\x3f" + b"x" * 99, "Expected to read 1073741568 metadata bytes"),
        (b"", "here is damaged"),
        (encode_block(batch(["a", "b", "c"], title=without_keys())), "a text lacks its key"),
        (offsets_changed(encode_block(batch(["a"] * 3)), [0, 2, 4, 6], [0, 2, -4, 6]), "non-monotonic offset"),
        (offsets_changed(encode_block(batch(["a"] * 3)), [0, 2, 4, 6], [0, 2, 4, 2**30]), "out of bounds"),
        (offsets_changed(encode_block(batch(["ab", "c", "d"])), [0, 1, 2], [0, 1, 9]), "out of bounds"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_arrow_streams_are_checked_in_full(payload, complaint):
    assert len(decoded(encode_block(batch(["a", None, "b"])))) == 3
    with pytest.raises(UserError, match=complaint):
        decoded(payload)


def test_another_schema_is_met_before_its_data():
    text = pa.dictionary(pa.int32(), TEXT)
    nested = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), text_array(["a"]))
    pickled = b"cos\nsystem\n(S'touch owned'\ntR."
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickled}
    for field, values in (
        (pa.field("title", pa.dictionary(pa.int32(), text)), nested),
        (pa.field("title", pa.int64(), metadata=extension), pa.array([1])),
        (pa.field("title", pa.run_end_encoded(pa.int32(), pa.int64())), pa.array([1]).cast(pa.int64())),
    ):
        if pa.types.is_run_end_encoded(field.type):
            values = pa.compute.run_end_encode(values)
        with pytest.raises(UserError, match="its columns are not those|here is damaged"):
            decoded(encode_block(pa.record_batch([values], schema=pa.schema([field]))))
    wide = pa.record_batch([pa.array([1])] * 20_000, names=[f"c{i}" for i in range(20_000)])
    with pytest.raises(UserError, match="its columns are not those"):
        decoded(encode_block(wide))


def changed(tree: dict, *path, value) -> dict:
    tree = json.loads(json.dumps(tree))
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return tree


BLOCK = ("shards", 0, "blocks", 1)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("shards", 0, "file"), "../x.tar", "is not a plain file name"),
        (("shards", 0, "file"), "/etc/passwd", "is not a plain file name"),
        (("shards", 0, "file"), "http://x/y.tar", "is not a plain file name"),
        (("shards", 0, "file"), "a::b.tar", "is not a plain file name"),
        (("shards", 0, "file"), "%2e%2e%2fx", "is not a plain file name"),
        (("shards", 0, "file"), "..", "is not a plain file name"),
        (("shards", 0, "file"), "a\0b", "is not a plain file name"),
        (("shards", 1, "file"), "big-00000.tar", "is listed twice"),
        (("shards", 0, "domain"), "nowhere", "which the schema does not name"),
        (("shards", 0, "sha256"), "x", "is no SHA-256"),
        ((*BLOCK, "rows"), 10**9, "claims 1000000000 rows, more than its [0-9]+ bytes can hold"),
        ((*BLOCK, "rows"), 0, "rows: Input should be greater than or equal to 1"),
        ((*BLOCK, "offset"), -512, "offset: Input should be greater than or equal to 0"),
        ((*BLOCK, "offset"), 512, "overlaps the one before"),
        ((*BLOCK, "offset"), 5121, "in units of 512"),
        ((*BLOCK, "bytes"), 2**40, "ends beyond the shard's"),
        ((*BLOCK, "crc32"), 2**32, "is no CRC-32"),
        ((*BLOCK, "name"), "../x", "is not a plain file name"),
        ((*BLOCK, "name"), "000000.arrow", "is not a plain file name, or there twice"),
        ((*BLOCK, "time"), [5, 4], "end before they begin"),
        (("shards",), [], "shards: List should have at least 1 item"),
        (("statistics",), {}, "statistics and the schema do not name the same: age, "),
        (("label_counts", "other"), {}, "label_counts and the schema do not name the same: other"),
        (("statistics", "age", "null_share"), "inf", "null_share: Input should be a finite number"),
        (("statistics", "age", "null_share"), float("nan"), "NaN is no number"),
        (("schema", "features", "age", "width"), 10**12, "more than its [0-9]+ bytes can hold"),
        (("schema", "features", "user_id", "vocabulary", "size"), 10**300, "more rows than ids can count"),
    ],
    ids=str,
)
def test_an_index_that_cannot_be_is_refused(small, tmp_path, path, value, complaint):
    tree = json.loads((Path(small) / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(changed(tree, *path, value=value)))
    with pytest.raises(UserError, match=complaint):
        read_index(str(tmp_path))


def test_a_block_too_large_to_be_read_whole_is_refused(small, tmp_path):
    tree = json.loads((Path(small) / "index.json").read_text())
    shard = tree["shards"][-1]
    shard["bytes"], shard["blocks"][-1]["bytes"] = 2**60, 2**50
    (tmp_path / "index.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="at most 268,435,456 are taken: build the data set with fewer --block-rows"):
        read_index(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"format":' * 5000 + "1" + "}" * 5000, "nested too deeply"),
        ('{"format": ' + "9" * 10_000_000 + "}", "not JSON"),
        ('{"format": 1e999}', "1e999 is no number"),
        ('{"format": -Infinity}', "-Infinity is no number"),
        ('{"x%s": 1}' % ("y" * 100_000), "unknown key"),
        ("{" + ", ".join(f'"k{i}": 1' for i in range(20_000)) + "}", "and [0-9]+ more"),
    ],
    ids=["deep lists", "deep objects", "long integer", "overflow", "infinity", "long name", "many names"],
)  # fmt: skip
def test_json_that_was_made_to_choke_on_is_refused(tmp_path, text, complaint):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match=complaint) as caught:
        read_index(str(tmp_path))
    assert len(str(caught.value)) < 50_000


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (LAUGHS, "with its aliases written out it has more than 100,000 values"),
        (MERGES, "with its aliases written out it has more than 100,000 values"),
        ("data: &a\n  train: *a\n", "nested more than 50 deep"),
        ("data: " + "[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("data: " + "[" * 100_000, "nested more than 50 deep"),
        ("data: " + "{a: " * 5000, "nested more than 50 deep"),
        ("data: !!python/object/apply:os.system ['touch owned']", "could not determine a constructor for the tag"),
        ("data: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("data: !!timestamp yesterday", "not YAML"),
        ("data: !!bool perhaps", "not YAML"),
        ("data: 2001-99-99", "not YAML: month must be in"),
        ("data: " + "9" * 5000, "not YAML"),
        ("text: {mode: 0x" + "f" * 5000 + "}", "text.mode: .* a number of thousands of digits"),
        ("run: {seed: .inf}", "run.seed"),
        ("train: {learning_rate: .nan}", "learning_rate"),
        ("#" * 2_000_000, "more than 1,048,576 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_yaml_that_was_made_to_do_damage_is_refused(tmp_path, monkeypatch, text, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    for load in (load_config, load_schema):
        with pytest.raises(UserError) as caught:
            load("config.yaml")
        assert len(str(caught.value)) < 50_000
        if load is load_config:
            caught.match(complaint)
    assert os.listdir() == ["config.yaml"]


def test_overrides_are_the_same_yaml():
    with pytest.raises(UserError, match="--data.train: .* is not a YAML value; quote it"):
        apply_overrides({}, {"data.train": "!!python/name:os.system"})


BOUNDED = """
import resource, sys
import numpy, pyarrow
from dist_rec.data.index import read_index
from dist_rec.data.reader import ShardReader
from dist_rec.data.remote import Retry
from dist_rec.errors import UserError
import aiohttp, fsspec.implementations.http

sound, hostile, mode = sys.argv[1:]
retry = Retry(retries=0, timeout_seconds=20)
index = read_index(sound)
features = list(index.schema.features)
ShardReader(sound, index, features).rows(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    if mode == "index":
        read_index(hostile, retry)
    elif mode == "shard":
        ShardReader(hostile, index, features, retry=retry).rows(0)
    sys.exit("nothing was refused")
except UserError as error:
    print(error)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
if grown > 32:
    sys.exit(f"memory grew by {grown} MB")
"""


@pytest.mark.parametrize("mode", ["index", "shard"])
@pytest.mark.parametrize("place", ["local", "http"])
def test_absurd_files_are_refused_in_little_memory(small, tmp_path, mode, place):
    """A terabyte of zeros, which takes no room on a disk but all memory if it is read."""
    index = read_index(small)
    with open(tmp_path / ("index.json" if mode == "index" else index.shards[0].file), "wb") as file:
        file.truncate(2**40)
    command = [sys.executable, "-c", BOUNDED, small]
    if place == "local":
        done = run_command([*command, str(tmp_path), mode], seconds=60)
    else:
        with serve(str(tmp_path)) as server:
            done = run_command([*command, server.url, mode], seconds=60)
    assert done.returncode == 0, done.stderr
    assert ("longer than 268,435,456 bytes" if mode == "index" else "is damaged: no tar header") in done.stdout
