"""A sample's rows are the source's, drawn by seed and row number alone, and it is a data set like any other."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import build_small, run_command, run_ranks
from http_server import serve
from shops import OLD, SHOP, extend, old_rows, shop_rows
from toy_shards import TOKENIZER, digests, read, write

from dist_rec.data.append import append
from dist_rec.data.build import build
from dist_rec.data.index import read_index
from dist_rec.data.reader import ShardReader
from dist_rec.data.sample import row_hash, sample
from dist_rec.data.verify import verify
from dist_rec.errors import UserError


def wide_rows(n: int, offset: int = 0) -> list[dict]:
    return [row | {"time": row["time"] + offset, "query": f"q {i} {offset}"} for i, row in enumerate(old_rows(n))]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Every kind of feature, two domains, 300 rows, of which 60 were appended."""
    folder = tmp_path_factory.mktemp("source")
    rows = write(folder / "rows.parquet", wide_rows(240))
    options = {"workers": 1, "block_rows": 32, "shard_rows": 64, "tokenizer": TOKENIZER}
    build(OLD, [rows], str(folder / "out"), **options)
    new = write(folder / "new.parquet", wide_rows(60, -50))
    append(str(folder / "out"), [new], history_from=[rows], workers=1)
    return folder / "out"


def as_text(rows: list[dict]) -> list[str]:
    return [json.dumps(row, sort_keys=True) for row in rows]


def test_a_sample_is_a_function_of_seed_and_row_number(source, tmp_path):
    """The rows whose hash is smallest, found here by plain arithmetic over the rows as they stand."""

    def mixed(state: int) -> int:
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    whole, taken = as_text(read(source)), {}
    for seed in (0, 1):
        start = mixed(seed)
        hashes = [mixed((start + (n + 1) * 0x9E3779B97F4A7C15) % 2**64) for n in range(300)]
        signed = [h - 2**64 if h >= 2**63 else h for h in hashes]
        assert row_hash(np.arange(300), seed).tolist() == signed
        order = sorted(range(300), key=signed.__getitem__)
        for n in (1, 64, 256):
            index = sample(str(source), n, seed, str(tmp_path / f"{seed}-{n}"))
            drawn = as_text(read(tmp_path / f"{seed}-{n}"))
            assert index.rows == n and Counter(drawn) == Counter(whole[i] for i in order[:n])
            taken[seed, n] = set(drawn)
            assert verify(str(tmp_path / f"{seed}-{n}"))["rows"] == n
        assert taken[seed, 1] < taken[seed, 64] < taken[seed, 256]
    assert taken[0, 64] != taken[1, 64]


def test_rows_keep_their_order_and_all_they_carry(source, tmp_path):
    index = sample(str(source), 300, 5, str(tmp_path / "all"))
    before = read_index(str(source))
    found, whole = read(tmp_path / "all"), read(source)
    for domain in ("books", "films"):
        of = [[row for row in rows if row["domain"] == domain] for rows in (found, whole)]
        assert of[0] == of[1]
    assert index.label_counts == before.label_counts and index.schema == before.schema
    assert (index.name, index.split, index.tokenizer) == (before.name, before.split, before.tokenizer)
    for name, statistics in before.statistics.items():
        mine = index.statistics[name]
        assert (mine.null_share, mine.mean_length, mine.max_length, mine.unknown) == (
            statistics.null_share,
            statistics.mean_length,
            statistics.max_length,
            statistics.unknown,
        )
    texts = {text["key"]: text for text in pq.read_table(tmp_path / "all" / "texts.parquet").to_pylist()}
    stored = pq.read_table(source / "texts.parquet").to_pylist()
    # A build adds the empty text where aligned histories may need it, though here no row does.
    assert texts == {text["key"]: text for text in stored if text["text"]}
    # Tokens as well, which `read` does not show.
    few = sample(str(source), 30, 5, str(tmp_path / "few"))
    reader = ShardReader(str(tmp_path / "few"), few, list(few.schema.features), with_tokens=True)
    for number in range(len(reader.places)):
        rows = reader.rows(number)
        assert len(set(rows.text_keys.tolist())) <= 30 * 5
        for i, key in enumerate(rows.text_keys.tolist()):
            assert rows.tokens.slice(i, i + 1).values.tolist() == texts[key]["tokens"]
    stored = pq.read_table(tmp_path / "few" / "texts.parquet")["key"].to_pylist()
    assert len(stored) == len(set(stored)) < len(texts)


def test_all_rows_of_one_generation_are_the_same_bytes(tmp_path):
    """Blocks as large as those that were built come out as they were, nulls and texts and all."""
    build(OLD, [write(tmp_path / "rows.parquet", wide_rows(90))], str(tmp_path / "o"), workers=1, tokenizer=TOKENIZER)
    index = sample(str(tmp_path / "o"), 90, 3, str(tmp_path / "s"))
    before, after = digests(tmp_path / "o"), digests(tmp_path / "s")
    tars = [name for name in before if name.endswith(".tar")]
    assert len(tars) == 2 and {name: before[name] for name in tars} == {name: after[name] for name in tars}
    assert index == read_index(str(tmp_path / "o"))


def test_long_samples_are_cut_into_blocks_and_shards(source, tmp_path, monkeypatch):
    monkeypatch.setattr("dist_rec.data.sample.DEFAULT_BLOCK_ROWS", 20)
    monkeypatch.setattr("dist_rec.data.sample.DEFAULT_SHARD_ROWS", 40)
    monkeypatch.setattr("dist_rec.data.sample.CHUNK_ROWS", 7)
    index = sample(str(source), 200, 1, str(tmp_path / "cut"))
    monkeypatch.undo()
    sample(str(source), 200, 1, str(tmp_path / "whole"))
    assert {block.rows for shard in index.shards for block in shard.blocks} > {20}
    assert max(block.rows for shard in index.shards for block in shard.blocks) == 20 and len(index.shards) > 4
    assert read(tmp_path / "cut") == read(tmp_path / "whole")
    for shard in index.shards:
        for block in shard.blocks:
            assert block.time is not None
    assert verify(str(tmp_path / "cut"))["rows"] == 200


def test_each_block_with_drawn_rows_is_read_once_and_no_other(source, tmp_path, monkeypatch):
    reads, member = Counter(), ShardReader.member

    def counting(self, number: int) -> bytes:
        reads[number] += 1
        return member(self, number)

    monkeypatch.setattr(ShardReader, "member", counting)
    sample(str(source), 3, 0, str(tmp_path / "three"))
    assert 1 <= len(reads) <= 3 and set(reads.values()) == {1}


def test_only_rows_of_the_domains_named(source, tmp_path):
    index = sample(str(source), 40, 0, str(tmp_path / "films"), domains=["films"])
    assert index.rows_of("films") == index.rows == 40
    more = sample(str(source), 90, 0, str(tmp_path / "more"), domains=["films"])
    assert set(as_text(read(tmp_path / "films"))) < set(as_text(read(tmp_path / "more"))) and more.rows == 90


def test_a_sample_is_drawn_from_a_url(source, tmp_path):
    with serve(str(source)) as server:
        server.faults.extend([503, "drop"])
        sample(server.url, 64, 0, str(tmp_path / "far"))
    sample(str(source), 64, 0, str(tmp_path / "near"))
    assert digests(tmp_path / "far") == digests(tmp_path / "near")


def test_what_cannot_be_drawn_is_refused_and_leaves_nothing(source, tmp_path, monkeypatch):
    def refuse(match: str, rows: int = 5, out: str = "out", root: Path = source, **options) -> None:
        with pytest.raises(UserError, match=match):
            sample(str(root), rows, 0, out if "://" in out else str(tmp_path / out), **options)
        assert not (tmp_path / "out").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]

    refuse("has 300 rows, so 301 cannot be drawn from it: ask for fewer", 301)
    refuse("has 150 rows of films, so 151 cannot be drawn", 151, domains=["films"])
    refuse("0 rows cannot be drawn", 0)
    refuse("has no domain 'film': it has books, films. Did you mean 'films'", domains=["film"])
    refuse("data sets are built in a local folder", out="s3://there")
    refuse("no data set at", root=source.parent)
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    shard = broken / read_index(str(broken)).shards[0].file
    data = bytearray(shard.read_bytes())
    data[1500] ^= 1
    shard.write_bytes(data)
    refuse("is damaged: its checksum is not the index's", 300, root=broken)
    sample(str(source), 5, 0, str(tmp_path / "there"))
    before = digests(tmp_path / "there")
    refuse("is not empty: name another folder, or pass overwrite", out="there")
    assert digests(tmp_path / "there") == before
    sample(str(source), 6, 0, str(tmp_path / "there"), overwrite=True)
    assert read_index(str(tmp_path / "there")).rows == 6


def test_a_sample_of_an_extended_set_is_extended_too(old, tmp_path):  # noqa: F811
    shop = extend(old, tmp_path, "shop", SHOP, shop_rows())
    index = sample(str(shop), 10, 0, str(tmp_path / "few"))
    assert index.extension == read_index(str(shop)).extension and index.schema == read_index(str(shop)).schema
    assert verify(str(tmp_path / "few"))["rows"] == 10


@pytest.mark.parametrize("batch_size", [8, 64])
def test_64_rows_of_three_domains_train_on_two_ranks(tmp_path, batch_size):
    root = build_small(tmp_path / "small", {"big": 400, "middle": 150, "tiny": 9}, split="random:8,1,1")
    command = [sys.executable, "-m", "dist_rec", "shards", "sample", f"{root}/train", "--rows", "64", "--seed", "1"]
    done = run_command([*command, "--out", str(tmp_path / "few"), "--json"], 60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == 64
    config = {
        "data": {
            "train": str(tmp_path / "few"),
            "valid": f"{root}/valid",
            "test": f"{root}/test",
            "batch_size": batch_size,
            "streams": 8,
        },
        "model": {"width": 8, "tasks": {"ctr": {"label": "ctr"}, "relevance": {"label": "relevance"}}},
        "train": {"epochs": 2},
        "run": {"root": str(tmp_path / "runs"), "name": "few"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = run_ranks(2, ["-m", "dist_rec", "train", str(tmp_path / "config.yaml")], 240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "runs" / "few" / "evaluation.json").is_file()
