"""Shards are read from anywhere: trouble is retried and then named, and nothing hangs."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from conftest import run_command
from fsspec.implementations.memory import MemoryFileSystem
from http_server import serve

from dist_rec.data import remote
from dist_rec.data.index import read_index
from dist_rec.data.inspect import inspect
from dist_rec.data.order import Order
from dist_rec.data.reader import ShardReader
from dist_rec.data.remote import Retry
from dist_rec.data.stream import Stream
from dist_rec.data.verify import verify
from dist_rec.errors import UserError

QUICK = Retry(retries=3, wait_seconds=0.01, timeout_seconds=0.5)


@pytest.fixture
def server(small):
    with serve(small) as running:
        yield running


def open_reader(root: str, retry: Retry = QUICK, **options) -> ShardReader:
    index = read_index(root, retry)
    return ShardReader(root, index, list(index.schema.features), retry=retry, **options)


def same(one, other) -> bool:
    return np.array_equal(one.row, other.row) and all(
        np.array_equal(one.ids[n].values, other.ids[n].values) for n in one.ids
    )


class Elsewhere(MemoryFileSystem):
    """A file system that is neither local nor asynchronous, and has trouble in its own words."""

    protocol = "elsewhere"
    faults: list = []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("elsewhere://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        if path.endswith(".tar") and self.faults:
            fault = self.faults.pop(0)
            if isinstance(fault, Exception):
                raise fault
            return fault(super().cat_file(path, start, end))
        return super().cat_file(path, start, end)


fsspec.register_implementation("elsewhere", Elsewhere, clobber=True)


@pytest.fixture(params=["memory", "elsewhere"])
def in_memory(small, request):
    """The small data set on a file system of fsspec."""
    fs = fsspec.filesystem(request.param)
    for path in Path(small).iterdir():
        if path.is_file():
            fs.pipe_file(f"/data/{path.name}", path.read_bytes())
    yield f"{request.param}://data"
    fs.rm("/data", recursive=True)


def test_every_kind_of_place_gives_the_same_rows(small, server, in_memory):
    local = open_reader(small)
    for root in (f"file://{small}", server.url, in_memory):
        reader = open_reader(root)
        assert all(same(reader.rows(n), local.rows(n)) for n in range(len(local.places)))
        assert verify(root)["rows"] == local.index.rows == inspect(root)["rows"]


@pytest.mark.parametrize("fault", [500, 503, 429, "drop", "short", "corrupt", "elsewhere", "hang", "drip"])
def test_passing_trouble_is_retried(small, server, fault):
    expected = open_reader(small).rows(3)
    reader = open_reader(server.url)
    # The damage of a transfer is put right by one more; more often it is the shard's.
    times = 1 if fault == "corrupt" else QUICK.retries
    server.faults.extend([fault] * times)
    assert same(reader.rows(3), expected) and server.tars() == times + 1


@pytest.mark.parametrize(
    ("fault", "requests", "complaint"),
    [
        (500, 4, "cannot be read: OSError: the server answers 500 Internal Server Error (4 attempts). Run"),
        ("drop", 4, "(4 attempts). Run `dist-rec shards verify`"),
        ("short", 4, "(4 attempts)"),
        ("hang", 4, "cannot be read: not done within 0.5 s (4 attempts)"),
        ("drip", 4, "cannot be read: not done within 0.5 s (4 attempts)"),
        (
            "corrupt",
            2,
            " is damaged: its checksum is not the index's. Restore the shard, or build the data set again. ",
        ),
        (404, 1, "the shard is missing. Restore it"),
        (410, 1, "the shard is missing"),
        (403, 1, "cannot be read: the server answers 403 Forbidden. Run"),
        (401, 1, "cannot be read: the server answers 401 Unauthorized. Run"),
        ("whole", 1, "the server ignores byte ranges and sends the whole file: serve the folder with one that"),
        ("gzip", 1, "the server sends it compressed (gzip), unasked"),
    ],
)
def test_lasting_trouble_is_named_with_its_rows_and_attempts(server, fault, requests, complaint):
    reader = open_reader(server.url)
    server.always = fault
    shard, block = reader.places[3]
    first = int(reader.first_rows[3])
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        reader.rows(3)
    message = str(caught.value)
    assert (fault == "corrupt") == message.endswith(" It came twice like that.")
    assert message.startswith(f"{server.url}/{shard.file}, block {block.name} (rows {first} .. {first + 31})")
    assert complaint in message and server.tars() == requests
    assert time.monotonic() - began < 4 * 0.5 + 3 * 0.04 + 1


def test_a_body_without_end_is_not_taken_in(server):
    reader = open_reader(server.url)
    server.always = "long"
    began = time.monotonic()
    assert len(reader.rows(3)) == 32, "only as much as was asked for is read"
    assert time.monotonic() - began < QUICK.timeout_seconds


def test_a_shard_that_ends_too_early_is_not_asked_for_again(small, server, tmp_path):
    reader = open_reader(server.url)
    server.folder = tmp_path
    shard, block = reader.places[3]
    whole = (Path(small) / shard.file).read_bytes()
    for end in (block.offset - 1, block.offset + 100):
        (tmp_path / shard.file).write_bytes(whole[:end])
        before = server.tars()
        with pytest.raises(UserError, match="is damaged: the file ends too early"):
            reader.rows(3)
        assert server.tars() == before + 1


def test_the_wait_doubles_up_to_a_limit():
    assert [Retry(wait_seconds=0.5).wait(n) for n in range(9)] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("in_memory", ["elsewhere"], indirect=True)
def test_other_file_systems_have_the_same_patience(small, in_memory):
    reader, expected = open_reader(in_memory), open_reader(small).rows(3)
    Elsewhere.faults[:] = [OSError("reset"), RuntimeError("throttled"), lambda data: data[:-1]]
    assert same(reader.rows(3), expected) and not Elsewhere.faults
    release = threading.Event()
    Elsewhere.faults[:] = [lambda data: release.wait() and data]
    began = time.monotonic()
    assert len(reader.rows(4)) and 0.5 <= time.monotonic() - began < 2
    release.set()
    Elsewhere.faults[:] = [PermissionError(errno.EACCES, "not yours")]
    with pytest.raises(UserError, match="cannot be read: not yours. Run"):
        reader.rows(5)
    Elsewhere.faults[:] = [AttributeError("a bug")]
    with pytest.raises(AttributeError, match="a bug"):
        reader.rows(5)
    assert not Elsewhere.faults


def test_a_blip_of_a_local_file_system_is_retried(small, monkeypatch):
    reader, expected = open_reader(small), open_reader(small).rows(3)
    faults = [errno.EIO, errno.ESTALE]
    pread = os.pread

    def blip(*arguments):
        if faults:
            raise OSError(faults.pop(), "blip")
        return pread(*arguments)

    monkeypatch.setattr(remote.os, "pread", blip)
    assert same(reader.rows(3), expected) and not faults
    faults[:] = [errno.EIO] * 4
    with pytest.raises(UserError, match=r"cannot be read: OSError: .*blip \(4 attempts\)"):
        reader.rows(4)
    monkeypatch.setattr(remote.os, "open", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "denied")))
    with pytest.raises(UserError, match="cannot be read: denied. Run"):
        reader.rows(4)


def test_what_is_no_regular_file_is_not_waited_for(small, tmp_path):
    reader = open_reader(small)
    reader.files.base = str(tmp_path)
    os.mkfifo(tmp_path / reader.places[0][0].file)
    (tmp_path / reader.places[-1][0].file).symlink_to("/dev/zero")
    for number in (0, -1):
        with pytest.raises(UserError, match="cannot be read: it is no regular file"):
            reader.rows(number)


def test_the_index_is_read_with_the_same_patience(server, tmp_path, monkeypatch):
    server.folder = tmp_path
    with pytest.raises(UserError, match=f"no data set at {server.url}: index.json is missing"):
        read_index(server.url, QUICK)
    (tmp_path / "index.json").write_text("[" * 1000)
    monkeypatch.setattr("dist_rec.data.index.LARGEST_INDEX", 500)
    for root in (server.url, str(tmp_path)):
        with pytest.raises(UserError, match="cannot read .*/index.json: it is longer than 500 bytes"):
            read_index(root, QUICK)
    with pytest.raises(UserError, match=r"cannot read http://127.0.0.1:1/index.json: .* \(4 attempts\)"):
        read_index("http://127.0.0.1:1", QUICK)
    with pytest.raises(UserError, match="cannot read nosuch://data: "):
        read_index("nosuch://data", QUICK)


def test_verify_names_all_that_a_server_has_lost(small, server, tmp_path):
    index = read_index(small)
    for path in Path(small).iterdir():
        if path.is_file() and path.name != index.shards[0].file:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = tmp_path / index.shards[2].file
    data = bytearray(damaged.read_bytes())
    data[1000] ^= 1
    damaged.write_bytes(data)
    server.folder = tmp_path
    server.faults.extend([500, 500, "drop"])
    with pytest.raises(UserError) as caught:
        verify(server.url, retry=QUICK)
    _, *faults, advice = str(caught.value).splitlines()
    assert len(faults) == 2 and f"{index.shards[0].file}: the file is missing" in faults[0]
    assert f"{index.shards[2].file}, block 000000.arrow (rows " in faults[1]


def test_blocks_are_fetched_ahead_in_order_and_within_a_budget(small, server, monkeypatch):
    local, reader = open_reader(small), open_reader(server.url)
    server.latency = 0.1
    numbers = range(len(reader.places))
    began = time.monotonic()
    reader.prefetch(numbers)
    assert all(same(reader.rows(n), local.rows(n)) for n in numbers)
    assert time.monotonic() - began < 0.1 * len(numbers) / 2 and 2 <= server.busiest <= 8
    assert server.tars() == len(numbers) and reader._ahead.bytes == 0
    # What is wanted no more is dropped; what was never wanted is read all the same.
    reader = open_reader(server.url, keep=1)
    reader.prefetch([1, 2, 3])
    reader.prefetch([3, 4])
    assert set(reader._ahead.started) <= {3, 4}
    assert all(same(reader.rows(n), local.rows(n)) for n in (0, 3, 4, 2))
    # A budget smaller than one block still fetches one at a time.
    monkeypatch.setattr("dist_rec.data.prefetch.BUDGET", 1)
    reader, server.busiest = open_reader(server.url, keep=1), 0
    reader.prefetch(numbers)
    assert all(same(reader.rows(n), local.rows(n)) for n in numbers) and server.busiest <= 2
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_a_fault_of_a_block_fetched_ahead_is_raised_where_it_is_used(server):
    reader = open_reader(server.url)
    server.faults.extend([404])
    reader.prefetch([3])
    time.sleep(0.2)
    assert len(reader.rows(2)) == 32
    with pytest.raises(UserError, match="the shard is missing"):
        reader.rows(3)


def eventually(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("fault", ["hang", 500])
def test_a_consumer_that_leaves_ends_a_read_under_way(server, fault):
    index = read_index(server.url)
    retry = Retry(retries=5, wait_seconds=30, timeout_seconds=60)
    reader = ShardReader(server.url, index, list(index.schema.features), retry=retry)
    stream = Stream(reader, Order(index, streams=8, batch_size=8, seed=1, window=8), read_ahead=1)
    batches = stream.batches(epoch=0)
    next(batches)
    before = server.tars()
    server.always = fault
    reader._decoded.clear()
    # The next batch would wait for a read that has begun: look for one long enough before asking for it.
    while not eventually(lambda: server.tars() > before, seconds=2):
        next(batches)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 2 and not [t for t in threading.enumerate() if t.name == "read-ahead"]
    server.always = None
    assert len(list(stream.batches(epoch=0))) == stream.steps


LEAVING = """
import sys, threading
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from dist_rec.data.index import read_index
from dist_rec.data.reader import ShardReader
from dist_rec.data.remote import Retry

class Stuck(MemoryFileSystem):
    protocol = "stuck"
    def cat_file(self, path, start=None, end=None, **kwargs):
        threading.Event().wait()

fsspec.register_implementation("stuck", Stuck)
index_root, root = sys.argv[1:]
index = read_index(index_root)
reader = ShardReader(root, index, list(index.schema.features), retry=Retry(5, 30, 60))
reader.prefetch(range(8))
threading.Thread(target=reader.rows, args=(9,), daemon=True).start()
threading.Event().wait(0.5)
print("leaving")
"""


@pytest.mark.parametrize("fault", ["hang", "drip", 500, "stuck"])
def test_the_interpreter_ends_while_a_server_hangs(small, server, fault):
    """Threads and event loops that wait for a server must not keep a job alive."""
    server.always = fault
    root = "stuck://data" if fault == "stuck" else server.url
    began = time.monotonic()
    done = run_command([sys.executable, "-c", LEAVING, small, root], seconds=30)
    assert done.returncode == 0 and done.stdout == "leaving\n", done.stderr
    assert time.monotonic() - began < 20
