"""Damaged shards and values are named, and the background reader stops, passes faults on and begins anew."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
from conftest import rewrite_block, with_value
from test_stream import open_stream

from dist_rec.data.index import read_index
from dist_rec.data.reader import ShardReader
from dist_rec.data.rows import Rows
from dist_rec.errors import UserError


@pytest.fixture
def copied(small, tmp_path) -> str:
    """A copy of the small data set that a test may damage."""
    return str(shutil.copytree(small, tmp_path / "data"))


def reader(root: str) -> ShardReader:
    index = read_index(root)
    return ShardReader(root, index, list(index.schema.features), True, keep=4)


def test_missing_and_damaged_shards_are_named(copied):
    index = read_index(copied)
    shard = Path(copied) / index.shards[1].file
    block, number = index.shards[1].blocks[1], len(index.shards[0].blocks) + 1
    first = index.shards[0].rows + index.shards[1].blocks[0].rows
    whole = shard.read_bytes()
    where = f"{shard}, block {block.name}"

    def refused() -> str:
        with pytest.raises(UserError) as caught:
            reader(copied).rows(number)
        assert str(caught.value).startswith(where)
        return str(caught.value)

    for place, match in (
        (block.offset + block.bytes // 2, f" (rows {first} .. {first + block.rows - 1}) is damaged: its checksum"),
        (block.offset + 148, " is damaged"),  # the checksum of the tar header
        (block.offset + 257, " is damaged"),  # its magic
    ):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        shard.write_bytes(damaged)
        assert match in refused()
    assert len(reader(copied).rows(number - 1)) == index.shards[1].blocks[0].rows
    for end in (block.offset, block.offset + 100, block.offset + 512, block.offset + block.bytes // 2):
        shard.write_bytes(whole[:end])
        assert "is damaged" in refused()
    shard.unlink()
    assert "the shard is missing. Restore it" in refused()


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("item_id", 31, "'item_id' has id 31, outside its vocabulary 0 .. 30"),
        ("item_id", -1, "'item_id' has id -1, outside"),
        ("history", [1, 2, 31], "'history' has id 31, outside its vocabulary 0 .. 30"),
        ("label:ctr", 0.5, "label 'ctr' is 0.5, allowed is 0 or 1"),
        ("label:ctr", -1.0, "label 'ctr' is -1, allowed is 0 or 1"),
        ("label:relevance", 3.5, "label 'relevance' is 3.5, allowed is 0 .. 3"),
        ("label:relevance", float("inf"), "label 'relevance' is inf"),
    ],
)
def test_values_out_of_their_range_are_named(copied, column, value, complaint):
    where = rewrite_block(copied, 2, with_value(column, 7, value))
    with pytest.raises(UserError) as caught:
        reader(copied).rows(2)
    assert str(caught.value).startswith(f"{where}, row 7: {complaint}")


def test_a_block_of_other_rows_than_the_index_says_is_refused(copied):
    where = rewrite_block(copied, 2, lambda batch: batch.slice(1))
    with pytest.raises(UserError, match="has 31 rows, the index says 32") as caught:
        reader(copied).rows(2)
    assert str(caught.value).startswith(where)
    rewrite_block(copied, 2, lambda batch: batch.select(batch.schema.names[1:]))
    with pytest.raises(UserError, match="its columns are not those of the index's schema"):
        reader(copied).rows(2)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_the_background_reader_stops_with_its_consumer(small):
    stream = open_stream(small, batch_size=8, read_ahead=2)
    prepared, prepare = [], stream.batch
    stream.batch = lambda epoch, step: prepared.append(step) or prepare(epoch, step)
    batches = stream.batches(epoch=0, start_step=3)
    assert next(batches).row.equal(prepare(0, 3).row)
    time.sleep(0.3)
    assert readers() and prepared == [3, 4, 5, 6]  # one used, two ready, one waiting for its place
    batches.close()
    assert not readers()
    for _ in stream.batches(epoch=0):
        break
    assert not readers()
    assert len(list(stream.batches(0, 2, 7))) == 5 and not readers()
    assert len(list(stream.batches(0, 2, 10**6))) == stream.steps - 2


def test_the_background_reader_passes_faults_on_where_they_are(copied):
    index = read_index(copied)
    (Path(copied) / index.shards[-1].file).unlink()
    stream = open_stream(copied, batch_size=16, window=None, arrangement="index")
    clean = open_stream(copied, batch_size=16, window=None, arrangement="index")
    numbers, good = range(stream.steps), 0
    missing = sum(shard.rows for shard in index.shards[:-1])
    batches = stream.batches(epoch=0)
    with pytest.raises(UserError, match=f"{index.shards[-1].file}, block .*: the shard is missing"):
        for step, batch in zip(numbers, batches, strict=False):
            good += 1
            assert (batch.row < missing).all() and batch.row.equal(clean.batch(0, step).row)
    assert not readers()
    stream.batch = lambda epoch, step: 1 // 0
    with pytest.raises(ZeroDivisionError):
        next(stream.batches(epoch=0))
    assert not readers()


def test_an_epoch_begins_anew_after_a_read_that_failed(small):
    """The window before the one that could not be read is gone, too."""
    stream, clean = open_stream(small, batch_size=16), open_stream(small, batch_size=16)
    stream.batch(0, 0)
    read = stream.reader.rows

    def failing(number: int) -> Rows:
        raise UserError("no such block")

    stream.reader.rows, stream.streams[0].blocks.held = failing, {}
    with pytest.raises(UserError, match="no such block"):
        list(stream.batches(0))
    stream.reader.rows = read
    for found, wanted in zip(stream.batches(0), clean.batches(0), strict=True):
        assert found.row.equal(wanted.row)
