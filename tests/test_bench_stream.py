"""`bench stream` compares like with like: every reader gives the same rows, and its JSON says what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import run_command

from dist_rec.bench.invented import NUM_ITEMS, TOKENS, invent, write_shards
from dist_rec.bench.peers import PEERS
from dist_rec.bench.stream import TrustingReader, open_stream, read_raw
from dist_rec.data.batch import Batch

ROWS, BATCH, WINDOW = 1500, 64, 512


@pytest.fixture(scope="module")
def rows():
    return invent(ROWS)


def lists(values: np.ndarray, lengths: np.ndarray) -> list[list]:
    return [part.tolist() for part in np.split(values, np.cumsum(lengths)[:-1])]


def contents(batches: Iterator[Batch]) -> dict[int, tuple]:
    """Every row by its number; no row twice. Each batch has each of its texts once."""
    found: dict[int, tuple] = {}
    for batch in batches:
        ids = batch.ids.to_dict()
        columns = [
            lists(ids[name].values().numpy(), ids[name].lengths().numpy()) for name in ("user", "history", "item")
        ]
        texts = [tuple(t[m].tolist()) for t, m in zip(batch.text_tokens, batch.text_mask, strict=True)]
        assert len(set(texts)) == len(texts) and set(batch.text_index["title"].tolist()) == set(range(len(texts)))
        columns.append(
            [
                [texts[i] for i in uses]
                for uses in lists(batch.text_index["title"].numpy(), batch.text_lengths["title"].numpy())
            ]
        )
        for values in (batch.dense, batch.labels, batch.label_valid):
            columns += [values[name].tolist() for name in sorted(values)]
        columns += [batch.domain.tolist(), batch.user.tolist(), batch.query.tolist()]
        assert batch.ids.keys() == ["user", "history", "item"]
        for number, valid, *row in zip(batch.row.tolist(), batch.valid.tolist(), *columns, strict=True):
            assert valid == (number >= 0) and number not in found
            if valid:
                found[number] = tuple(map(str, row))
    return found


def kinds(batch: Batch) -> dict[str, object]:
    """The dtype of every tensor of a batch."""
    parts = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    parts["ids"] = {"values": batch.ids.values(), "lengths": batch.ids.lengths()}
    return {
        name: {key: tensor.dtype for key, tensor in part.items()} if isinstance(part, dict) else part.dtype
        for name, part in parts.items()
    }


def test_every_reader_gives_the_same_rows(rows, tmp_path):
    ours = tmp_path / "ours"
    index = write_shards(rows, ours, block_rows=128)
    assert len({shard.domain for shard in index.shards}) == 3 and read_raw(ours, index) == ROWS
    expected = {
        int(rows.row[i]): (
            [int(rows.user[i])],
            rows.history.values[rows.history.offsets[i] : rows.history.offsets[i + 1]].tolist(),
            [int(rows.item[i])],
            [tuple(rows.title_tokens[rows.item[i]].tolist())],
            rows.profile[i].tolist(),
            float(rows.click[i]),
            float(np.nan_to_num(rows.rating[i])),
            True,
            bool(~np.isnan(rows.rating[i])),
            int(rows.domain[i]),
            int(rows.user[i]),
            -1,
        )
        for i in range(ROWS)
    }
    expected = {number: tuple(map(str, row)) for number, row in expected.items()}
    stream = open_stream(ours, index, BATCH, WINDOW, seed=1)
    wanted = kinds(stream.batch(0, 0))
    assert contents(stream.batches(0)) == expected
    believed = open_stream(ours, index, BATCH, WINDOW, seed=1, reader=TrustingReader)
    assert contents(believed.batches(0)) == expected
    for name, peer in PEERS.items():
        (tmp_path / name).mkdir()
        peer.write(rows, tmp_path / name)
        batches = list(peer.read(tmp_path / name, BATCH, WINDOW, 1))
        assert [len(batch) for batch in batches[:-1]] == [BATCH] * (ROWS // BATCH), name
        assert contents(iter(batches)) == expected, name
        assert kinds(batches[0]) == wanted, name
        again = list(peer.read(tmp_path / name, BATCH, WINDOW, 2))
        assert not again[0].row.equal(batches[0].row), f"{name} does not shuffle"


def test_a_part_of_the_rows_is_their_beginning(rows):
    part = rows.first(7)
    assert len(part) == len(part.history) == 7 and part.history.values.tolist() == [
        *rows.history.values[: rows.history.offsets[7]]
    ]
    assert (invent(ROWS).history.values == rows.history.values).all()
    assert rows.title_tokens.shape == (NUM_ITEMS, TOKENS)


def test_the_verb_prints_what_was_measured(tmp_path):
    options = ["--rows", "4000", "--repeats", "2", "--batch-size", "128", "--window", "1024", "--folder", str(tmp_path)]
    done = run_command([sys.executable, "-m", "dist_rec", "bench", "stream", *options, "--json"], 120, Path.cwd())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ratios = {"ratio_vs_webdataset_json", "ratio_vs_mds", "ratio_vs_parquet", "share_of_raw_read", "validated_share"}
    assert found.keys() == ratios | {
        "rows",
        "repeats",
        "batch_size",
        "window",
        "block_rows",
        "threads",
        "rows_per_s",
        "readers",
    }
    assert all(found[name] > 0 for name in ratios)
    assert (found["rows"], found["repeats"], found["batch_size"], found["window"]) == (4000, 2, 128, 1024)
    read = {"ours": 4000, "unvalidated": 4000, "json": 125, "mds": 250, "parquet": 4000, "raw": 4000}
    assert {name: reader["rows"] for name, reader in found["readers"].items()} == read
    for reader in found["readers"].values():
        assert 0 < reader["min"] <= reader["rows_per_s"] <= reader["max"] and reader["wall"] > 0
    assert not list(tmp_path.iterdir())


def test_numbers_that_make_no_sense_are_refused():
    command = [sys.executable, "-m", "dist_rec", "bench", "stream", "--batch-size", "100"]
    done = run_command(command, 60)
    assert done.returncode == 2 and "--batch-size a multiple of it" in done.stderr.replace("\n", " ")
