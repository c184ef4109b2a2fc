"""A damaged block is named, and stops the stream or leaves holes at its places: nothing is lost in silence."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import rewrite_block, with_value
from http_server import serve

from dist_rec.data.index import read_index
from dist_rec.data.order import Order
from dist_rec.data.reader import ShardReader
from dist_rec.data.remote import Retry
from dist_rec.data.stream import Stream
from dist_rec.errors import UserError

QUICK = Retry(retries=1, wait_seconds=0.01, timeout_seconds=0.3)
NUMBER = 3


@pytest.fixture
def copied(small, tmp_path) -> str:
    """A copy of the small data set that a test may damage."""
    return str(shutil.copytree(small, tmp_path / "data"))


def open_reader(root: str, **options) -> ShardReader:
    index = read_index(root)
    return ShardReader(root, index, list(index.schema.features), retry=QUICK, **options)


def open_stream(reader: ShardReader, rank: int = 0, world_size: int = 1) -> Stream:
    order = Order(reader.index, streams=8, batch_size=48, window=64, seed=1)
    return Stream(reader, order, rank=rank, world_size=world_size)


def place(root: str, number: int = NUMBER):
    index = read_index(root)
    shard, block = [(shard, block) for shard in index.shards for block in shard.blocks][number]
    return Path(root) / shard.file, block


def flip(root: str) -> None:
    path, block = place(root)
    data = bytearray(path.read_bytes())
    data[block.offset + 700] ^= 1
    path.write_bytes(data)


def truncate(root: str) -> None:
    path, block = place(root)
    path.write_bytes(path.read_bytes()[: block.offset + 100])


DAMAGE = {
    "missing": (lambda root: place(root)[0].unlink(), "the shard is missing"),
    "truncated": (truncate, "is damaged: the file ends too early"),
    "flipped": (flip, "is damaged: its checksum is not the index's"),
    "id": (lambda root: rewrite_block(root, NUMBER, with_value("item_id", 5, 31)), "row 5: 'item_id' has id 31"),
    "label": (lambda root: rewrite_block(root, NUMBER, with_value("label:ctr", 5, 7.0)), "label 'ctr' is 7"),
    "rows": (lambda root: rewrite_block(root, NUMBER, lambda batch: batch.slice(1)), "has 31 rows, the index says 32"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_quarantined_block_leaves_holes_and_moves_nothing(small, copied, capfd, damage, world_size):
    make, reason = DAMAGE[damage]
    make(copied)
    seen, holes, lost = [], 0, set()
    for rank in range(world_size):
        reader = open_reader(copied, damaged="quarantine", max_damaged_share=0.3)
        clean, stream = open_stream(open_reader(small), rank, world_size), open_stream(reader, rank, world_size)
        gone = [n for n, (s, _) in enumerate(reader.places) if s.file == reader.places[NUMBER][0].file]
        if damage == "truncated":
            gone = [n for n in gone if n >= NUMBER]
        elif damage != "missing":
            gone = [NUMBER]
        edges = reader.first_rows
        void = {row for n in gone for row in range(edges[n], edges[n + 1])}
        assert stream.steps == clean.steps
        for got, expected in zip(stream.batches(epoch=2), clean.batches(epoch=2), strict=True):
            rows = expected.row.numpy()
            hole = np.isin(rows, list(void))
            assert np.array_equal(got.row.numpy(), np.where(hole, -1, rows))
            assert np.array_equal(got.valid.numpy(), (rows >= 0) & ~hole)
            for name in got.labels:
                assert not got.label_valid[name].numpy()[hole].any()
                assert np.array_equal(got.labels[name].numpy()[~hole], expected.labels[name].numpy()[~hole])
            for key, theirs in expected.ids.to_dict().items():
                ours = got.ids[key]
                assert np.array_equal(ours.lengths().numpy(), np.where(hole, 0, theirs.lengths().numpy()))
                kept = np.repeat(~hole, theirs.lengths().numpy())
                assert np.array_equal(ours.values().numpy(), theirs.values().numpy()[kept])
            seen += got.row[got.valid].tolist()
            holes += int(hole.sum())
        assert all(reason in why for why in reader.lost.values()) and set(reader.lost) <= set(gone)
        # Each once a reader, however often its rows are asked for.
        said = capfd.readouterr().err
        assert said.count("dist-rec: left out") == len(reader.lost)
        assert all(said.count(why) == 1 for why in reader.lost.values())
        for entry in reader.lost_summary():
            number = gone[[reader.places[n][1].name for n in gone].index(entry["block"])]
            assert entry == {
                "shard": reader.places[number][0].file,
                "block": reader.places[number][1].name,
                "rows": [edges[number], edges[number + 1] - 1],
                "reason": reader.lost[number],
            }
        lost |= set(reader.lost)
    assert lost == set(gone) and holes == len(void)
    assert sorted(seen) == sorted(set(range(reader.index.rows)) - void)


def test_no_more_than_the_stated_share_is_given_up(copied, capfd):
    flip(copied)
    place(copied, -1)[0].unlink()
    index = read_index(copied)
    share = (32 + 7) / index.rows
    numbers = range(len(open_reader(copied).places))
    reader = open_reader(copied, damaged="quarantine", max_damaged_share=share)
    assert sum(len(reader.rows(n)) for n in numbers) == index.rows and len(reader.lost) == 2
    reader = open_reader(copied, damaged="quarantine", max_damaged_share=share - 1e-6)
    assert sum(len(reader.rows(n)) for n in numbers[:-1]) == index.rows - 7
    with pytest.raises(UserError) as caught:
        reader.rows(numbers[-1])
    first, *lost = str(caught.value).splitlines()
    assert first == f"39 rows of {copied} are lost, 12.42% of it; data.max_damaged_share is 12.42%:"
    assert len(lost) == 2 and "its checksum" in lost[0] and "the shard is missing" in lost[1]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_stops_unless_quarantine_is_asked_for(copied, damage):
    make, reason = DAMAGE[damage]
    make(copied)
    reader = open_reader(copied)
    with pytest.raises(UserError, match=reason) as caught:
        list(open_stream(reader).batches(epoch=0))
    path, block = place(copied)
    assert str(caught.value).startswith(f"{path}, block ") and not reader.lost
    assert "(rows " in str(caught.value)


def test_the_wrong_data_is_no_damage(copied):
    rewrite_block(copied, NUMBER, lambda batch: batch.select(batch.schema.names[1:]))
    reader = open_reader(copied, damaged="quarantine", max_damaged_share=1.0)
    with pytest.raises(UserError, match="its columns are not those of the index's schema"):
        reader.rows(NUMBER)
    assert not reader.lost


@pytest.mark.parametrize("fault", [500, "hang", "corrupt", 403])
def test_what_a_server_does_not_give_is_quarantined_after_its_retries(small, copied, fault):
    with serve(copied) as server:
        reader = open_reader(server.url, damaged="quarantine", max_damaged_share=0.5)
        server.faults.extend([fault] * 2 if fault != 403 else [fault])
        reader.prefetch([NUMBER])
        rows = reader.rows(NUMBER)
        assert list(reader.lost) == [NUMBER] and not server.faults
        assert len(rows) == 32 and (rows.row == -1).all()
        # Given up for good: the same batch at the same place, whenever it is asked for.
        assert (reader.rows(NUMBER).row == -1).all() and len(reader.lost) == 1
        assert (reader.rows(NUMBER + 1).row >= 0).all()
