"""Reads damaged inputs of one kind until the first that is neither read rightly nor refused in words.

    python tests/fuzz_worker.py blocks --seed 0 --count 10000          many
    python tests/fuzz_worker.py blocks --seed 0 --first 4711 --count 1 one of them again

`test_fuzz.py` runs it as a process of its own, since the fault to be found may end the process.
Prints the number of each input before it is read; the last line is JSON with what came of them all.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import io
import json
import os
import random
import resource
import struct
import tarfile
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from mutations import WORDS, YAML_WORDS, damage, damage_text

from dist_rec.config import Config, load_config
from dist_rec.data.blocks import arrow_schema, decode_block, encode_block, text_array
from dist_rec.data.index import Index, read_index
from dist_rec.data.reader import ShardReader
from dist_rec.data.rows import Ragged, Rows
from dist_rec.data.validate import _subtable
from dist_rec.data.verify import _verify_shard
from dist_rec.errors import UserError
from dist_rec.schema import Schema
from dist_rec.strict import from_dict, to_dict

# Of the processor; a machine may be busy with others. SECONDS_STUCK are those of a clock.
SECONDS_EACH = 2.0
SECONDS_STUCK = 60.0
# The inputs have some kilobytes; what reading one takes beyond what reading the sound one does.
MEGABYTES = 64
ROWS = 9

SCHEMA = from_dict(
    Schema,
    {
        "name": "fuzzed",
        "domains": {"names": ["a", "b"]},
        "features": {
            "user": {"role": "user", "kind": "id"} | {"vocabulary": {"size": 50}},
            "big": {"role": "user", "kind": "id", "vocabulary": {"kind": "hash", "size": 2**40}},
            "age": {"role": "user", "kind": "dense", "width": 2},
            "past": {"role": "history", "kind": "ids", "shares": "user"},
            "said": {"role": "history", "kind": "texts"},
            "title": {"role": "item", "kind": "text"},
        },
        "labels": {"click": {}, "grade": {"kind": "graded", "maximum": 3}},
        "keys": {"user": "user", "time": "t"},
    },
    "fuzz",
)


def payload_of(draw: random.Random) -> bytes:
    """A sound block of ROWS rows."""

    def some(make: Callable) -> list:
        return [None if draw.random() < 0.2 else make() for _ in range(ROWS)]

    def word() -> str:
        return draw.choice(("red", "blau", "très", "", "x" * 40))

    texts = [word() for _ in range(20)]
    tokens = {t: list(range(len(t) % 5)) for t in texts}
    heard = text_array(texts, tokens)
    ends = sorted(draw.randrange(21) for _ in range(ROWS))
    said = pa.ListArray.from_arrays(pa.array([0, *ends], pa.int32()), heard)
    titles = [t if draw.random() < 0.8 else None for t in texts[:ROWS]]
    columns = [
        pa.array(some(lambda: draw.randrange(50)), pa.int32()),
        pa.array(some(lambda: draw.randrange(2**40)), pa.int64()),
        pa.array(some(lambda: [draw.random(), 1.0]), pa.list_(pa.float32(), 2)),
        pa.array(some(lambda: [draw.randrange(50) for _ in range(draw.randrange(4))]), pa.list_(pa.int32())),
        said,
        text_array(titles, tokens),
        pa.array(some(lambda: draw.randrange(2)), pa.float32()),
        pa.array(some(lambda: draw.randrange(4)), pa.float32()),
        pa.array(some(lambda: draw.randrange(9)), pa.int64()),
        pa.array(some(lambda: draw.randrange(9)), pa.int64()),
    ]
    return encode_block(pa.record_batch(columns, schema=arrow_schema(SCHEMA)))


def write_tar(path: Path, payloads: list[bytes]) -> list[dict]:
    """A shard of blocks, and the blocks' entries of the index."""
    blocks, out = [], io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, payload in enumerate(payloads):
            member = tarfile.TarInfo(f"{number:06d}.arrow")
            member.size, start = len(payload), out.tell()
            tar.addfile(member, io.BytesIO(payload))
            blocks.append(
                {"name": member.name, "rows": ROWS, "offset": start, "bytes": out.tell() - start}
                | {"crc32": zlib.crc32(payload), "time": None}
            )
    path.write_bytes(out.getvalue())
    return blocks


def index_tree(folder: Path, draw: random.Random) -> dict:
    """A sound data set of two shards; its index as plain data."""
    shards = []
    for number, domain in enumerate("ab"):
        path = folder / f"{domain}-00000.tar"
        blocks = write_tar(path, [payload_of(draw) for _ in range(2 + number)])
        shards.append({"file": path.name, "domain": domain, "bytes": path.stat().st_size, "sha256": "0" * 64})
        shards[-1]["blocks"] = blocks
    statistics = {"null_share": 0.5, "mean_length": 1.5, "max_length": 3}
    return {
        "format": "dist_rec/1",
        "name": "fuzzed",
        "split": "train",
        "schema": to_dict(SCHEMA),
        "tokenizer": None,
        "statistics": dict.fromkeys(SCHEMA.features, statistics),
        "label_counts": {name: {"valid": 1, "positive": 1, "missing": 0} for name in SCHEMA.labels},
        "shards": shards,
    }


def check_rows(rows: Rows) -> None:
    """Rows that anything may be done with."""
    n = len(rows)
    sizes = SCHEMA.table_sizes()

    def lists(ragged: Ragged, values: int) -> None:
        assert len(ragged) == n and ragged.offsets[0] == 0 and (np.diff(ragged.offsets) >= 0).all()
        assert ragged.offsets[-1] == len(ragged.values)
        assert not len(ragged.values) or ragged.values.min() >= 0 and ragged.values.max() < values

    assert n and (rows.domain == 1).all() and (rows.row == np.arange(5, 5 + n)).all()
    for name, ids in rows.ids.items():
        lists(ids, sizes[SCHEMA.table_of(name)])
    for texts in rows.texts.values():
        lists(texts, len(rows.text_keys))
    assert len(rows.tokens) == len(rows.text_keys) and rows.tokens.offsets[-1] == len(rows.tokens.values)
    assert rows.dense["age"].shape == (n, 2)
    for name, label in SCHEMA.labels.items():
        values = rows.labels[name]
        assert values.shape == (n,) and not ((values < 0) | (values > label.maximum)).any()
    assert all(values.shape == (n,) for values in rows.keys.values())
    twice = Rows.concat([rows, rows.slice(n // 2, n)]).take(np.arange(n)[::-1])
    assert (twice.row == rows.row[::-1]).all() and (
        twice.texts["title"].lengths == rows.texts["title"].lengths[::-1]
    ).all()


class Blocks:
    """Payloads whose checksum is right, so that the decoder sees them."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.sound = [payload_of(draw) for _ in range(4)]

    def read(self, draw: random.Random | None) -> None:
        data = self.sound[0]
        if draw is not None:
            data = draw.choice(self.sound)
            data = damage(data, draw, self.sound, draw.choice((*spans_of(data), None)))
        check_rows(decode_block(data, SCHEMA, "here", 5, 1, SCHEMA.features, True))


def spans_of(payload: bytes) -> list[tuple[int, int]]:
    """Of a sound stream: each message's metadata, with its prefix; lengths of arrays; buffers; and body."""
    spans, at = [], 0
    for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(payload)):
        data = message.metadata.to_pybytes()
        begin, at = at, at + len(data) + 8
        spans.append((begin, at))
        if message.type == "schema":
            continue
        (root,) = struct.unpack_from("<I", data)
        batch = _subtable(data, root, 2)
        batch = _subtable(data, batch, 1) if message.type == "dictionary" else batch
        for vector in (_subtable(data, batch, number) for number in (1, 2)):
            (length,) = struct.unpack_from("<I", data, vector)
            spans.append((begin + 8 + vector, begin + 8 + vector + 4))
            spans.append((begin + 8 + vector + 4, begin + 8 + vector + 4 + 16 * length))
        spans.append((at, at + message.body.size))
        at += message.body.size
    return spans


class Tars:
    """Shards with damaged headers, whose own checksum is mostly right, and whatever else happens to a file."""

    FIELDS = ((0, 100), (100, 108), (124, 136), (136, 148), (156, 157), (157, 257), (257, 265), (329, 345), (345, 500))

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder = folder
        index = from_dict(Index, index_tree(folder, draw), "fuzz")
        self.reader = ShardReader(str(folder), index, list(SCHEMA.features), True)
        self.shard = index.shards[1]
        self.path = folder / self.shard.file
        self.sound = self.path.read_bytes()
        self.crcs = [block.crc32 for block in self.shard.blocks]

    def read(self, draw: random.Random | None) -> None:
        data, number = bytearray(self.sound), 0
        if draw is not None:
            number = draw.randrange(len(self.shard.blocks))
            block = self.shard.blocks[number]
            if draw.random() < 0.7:
                self.change_header(data, block.offset, draw)
            if draw.random() < 0.5:
                data = bytearray(damage(bytes(data), draw, [self.sound]))
            # The index's checksum is that of what a reader of the damaged header would take.
            header = bytes(data[block.offset : block.offset + 512])
            try:
                size = max(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size, 0)
            except tarfile.TarError:
                size = block.bytes - 512
            block.crc32 = zlib.crc32(data[block.offset + 512 : block.offset + 512 + min(size, len(data))])
        self.path.write_bytes(data)
        try:
            first = len(self.reader.index.shards[0].blocks)
            if draw is None or draw.random() < 0.8:
                rows = self.reader.decode(first + number, self.reader.member(first + number))
                assert len(rows) == ROWS
            else:
                _verify_shard(self.reader, self.shard, first)
        finally:
            for block, crc in zip(self.shard.blocks, self.crcs, strict=True):
                block.crc32 = crc

    def change_header(self, data: bytearray, at: int, draw: random.Random) -> None:
        low, high = draw.choice(self.FIELDS)
        length = high - low
        octal = b"%0*o\0" % (length - 1, draw.choice((0, 1, 511, 512, 2**33 - 1, 2**20)))
        wide = draw.choice((b"\x80", b"\xff")) + draw.choice((2**62, 2**80, 1, -1)).to_bytes(20, "big", signed=True)
        named = draw.choice(
            (b"/etc/passwd", b"../../x", b"a\0b", b"\xff\xfe", b"000000.arrow", b"ustar\x0000", b"ustar  ")
        )
        kind = bytes([draw.choice(b"01234567xgLKSVDNX\0")])
        value = draw.choice((octal, wide[-length:], wide[:1] + wide[-length + 1 :], named, kind))
        data[at + low : at + high] = value[:length].ljust(length, b"\0")
        if draw.random() < 0.9:
            header = data[at : at + 512]
            data[at + 148 : at + 156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))


class Indexes:
    """index.json with numbers, names and structure changed."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder, self.tree = folder, index_tree(folder, draw)
        self.sound = [json.dumps(self.tree, indent=1).encode(), json.dumps(self.tree).encode()]

    def read(self, draw: random.Random | None) -> None:
        text = self.sound[0]
        if draw is not None and draw.random() < 0.5:
            text = damage_text(draw.choice(self.sound), draw, self.sound, WORDS)
        elif draw is not None:
            text = self.change_tree(draw)
        (self.folder / "index.json").write_bytes(text)
        index = read_index(str(self.folder))
        assert isinstance(index, Index) and index.rows == sum(b.rows for s in index.shards for b in s.blocks)
        assert 0 < index.rows <= sum(shard.bytes for shard in index.shards)
        for shard in index.shards:
            assert "/" not in shard.file and all(b.offset + b.bytes <= shard.bytes for b in shard.blocks)
        arrow_schema(index.schema)
        ShardReader(str(self.folder), index, list(index.schema.features))

    def change_tree(self, draw: random.Random) -> bytes:
        """One value somewhere in the tree replaced, removed or repeated; still JSON."""
        tree = copy.deepcopy(self.tree)
        for _ in range(draw.choice((1, 1, 2))):
            place, steps = tree, draw.randrange(1, 7)
            while True:
                keys = list(place) if isinstance(place, dict) else range(len(place))
                if not keys:
                    break
                key = draw.choice(list(keys))
                steps -= 1
                if steps and isinstance(place[key], dict | list) and place[key]:
                    place = place[key]
                    continue
                kind = draw.randrange(5)
                if kind == 0:
                    del place[key]
                elif kind == 1 and isinstance(place, list):
                    place.insert(draw.randrange(len(place) + 1), copy.deepcopy(place[key]))
                elif kind == 2 and isinstance(place[key], int):
                    place[key] += draw.choice((1, -1, 512, -512, 2**31, 2**62))
                else:
                    place[key] = copy.deepcopy(draw.choice((*EDGE_VALUES, place[key], self.tree["shards"])))
                break
        return json.dumps(tree).encode()


EDGE_VALUES = [
    0,
    -1,
    512,
    2**31,
    2**63 - 1,
    2**64,
    10**400,
    0.5,
    1e308,
    "",
    "x",
    "../x.tar",
    "a\0b",
    "a::b",
    "http://x",
]
EDGE_VALUES += ["\ud800", "é", None, True, [], {}, [[]], {"x": 1}, [-1, 2**70], "inf", "nan", "9" * 5000]


class Configs:
    """YAML of a config with values, structure and tags changed."""

    SOUND = [
        b"data: {train: a, valid: b, batch_size: 64, streams: 8, weights: {a: 1, b: 0.5}}\n"
        b"tables:\n  dim: 16\n  overrides: {item: {dim: 8}}\n"
        b"text: {mode: none}\n"
        b"model:\n  width: 32\n  tasks:\n    ctr: {label: click}\n    relevance: {label: grade}\n"
        b"train: {epochs: 1, steps: 10}\nevaluate: {batch_size: 64}\n",
        b"data: &d\n  train: a\n  batch_size: 64\n  domains: [a, b]\n"
        b"model:\n  tasks:\n    ctr: {label: click}\nrun:\n  name: x\n  seed: 3\n",
    ]

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.path = folder / "config.yaml"

    def read(self, draw: random.Random | None) -> None:
        text = self.SOUND[0]
        if draw is not None:
            text = damage_text(draw.choice(self.SOUND), draw, self.SOUND, [*WORDS, *YAML_WORDS, *YAML_WORDS])
        self.path.write_bytes(text)
        config = load_config(self.path)
        assert isinstance(config, Config) and from_dict(Config, to_dict(config), "again") == config


KINDS = {"blocks": Blocks, "tars": Tars, "indexes": Indexes, "configs": Configs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    options = parser.parse_args()
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        inputs = KINDS[options.kind](Path(folder), random.Random(options.seed))
        inputs.read(None)
        # What is asked for in one piece fails at once; what grows is found by the peak.
        with open("/proc/self/statm") as status:
            size = int(status.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (4 * MEGABYTES << 20),) * 2)
        refused, slowest = 0, 0.0
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(options.first, options.first + options.count):
            os.write(1, b"%d\n" % number)
            faulthandler.dump_traceback_later(SECONDS_STUCK, exit=True)
            began = time.process_time()
            try:
                inputs.read(random.Random(f"{options.seed} {options.kind} {number}"))
            except UserError as error:
                refused += 1
                assert str(error).strip()
                str(error).encode(errors="backslashreplace")
            except BaseException:
                traceback.print_exc()
                raise SystemExit(1) from None
            slowest = max(slowest, time.process_time() - began)
            if slowest > SECONDS_EACH:
                raise SystemExit(f"took {slowest:.1f} s")
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            if grown > MEGABYTES:
                raise SystemExit(f"memory grew by {grown:.0f} MB")
        faulthandler.cancel_dump_traceback_later()
    summary = {"kind": options.kind, "read": options.count - refused, "refused": refused}
    print(json.dumps(summary | {"slowest": round(slowest, 3), "megabytes": round(grown, 1)}))


if __name__ == "__main__":
    main()
