"""Whatever goes wrong ends every rank within seconds, says it once, and exits with 2 where the user is at fault."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import build_small, family, kill_family, rewrite_block, run_command, run_ranks, start, with_value

from dist_rec import cli
from dist_rec.data.index import read_index, write_index
from dist_rec.data.order import Order
from dist_rec.training import checkpoint
from dist_rec.training.checkpoint.manifest import FileInfo, Manifest, manifest_text

# Two ranks start in 8 s, and in many times that on a busy machine; a hang takes train.timeout_minutes, ten minutes.
SECONDS = 240


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> str:
    return build_small(tmp_path_factory.mktemp("faults"), {"big": 300, "middle": 120, "tiny": 40})


@pytest.fixture
def data(intact, tmp_path) -> str:
    """A copy that a test may damage."""
    return str(shutil.copytree(intact, tmp_path / "data"))


def write_config(folder: Path, root: str, **sections) -> Path:
    """A config that trains the data set at `root`."""
    base = {
        "run": {"root": str(folder / "runs"), "name": "run"},
        "data": {"train": root, "batch_size": 16, "streams": 2, "shuffle_window": 16, "read_ahead": 1},
        "tables": {"dim": 4},
        "model": {"width": 8, "history": {"kind": "mean"}},
        "train": {"log_every": 1},
    }
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(base))
    return path


def dist_rec(*arguments, ranks: int = 2) -> subprocess.CompletedProcess:
    """`python -m dist_rec ... --nproc-per-node`."""
    command = [sys.executable, "-m", "dist_rec", *map(str, arguments), "--nproc-per-node", str(ranks)]
    return run_command(command, SECONDS)


def refusal(done: subprocess.CompletedProcess) -> str:
    """The one message of a refused job: words on stderr, exit code 2, and nothing else."""
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr, done
    assert done.stderr.count("dist-rec:") == 1 and done.stderr.startswith("dist-rec: "), done.stderr
    return done.stderr.removeprefix("dist-rec: ")


def test_all_faults_of_config_and_data_are_said_before_the_ranks_meet(data, tmp_path):
    index = read_index(data)
    index.shards = [shard for shard in index.shards if shard.domain != "tiny"]
    write_index(data, index)
    config = write_config(
        tmp_path,
        data,
        data={"valid": "/no/such/data", "exclude_features": ["user_idd"], "streams": 1},
        tables={"overrides": {"item_idd": {"dim": 8}}},
        text={"mode": "full", "model": "/no/such/model"},
        model={"tasks": {"ctr": {"label": "crt"}}},
    )
    title, *faults = refusal(dist_rec("train", config)).splitlines()
    assert title == "this run cannot start:"
    for fault in (
        "no data set at /no/such/data: index.json is missing",
        "model '/no/such/model': no such folder",
        "data.streams is 1, but there are 2 ranks: raise it",
        "data.exclude_features: 'user_idd' is not known. Did you mean 'user_id'?",
        "domain 'tiny' has no rows in",
        "'item_idd'",
        "'crt'",
        "was built without a tokenizer",
    ):
        assert sum(fault in line for line in faults) == 1, (fault, faults)
    assert not (tmp_path / "runs").exists()


def latest_block(data: str) -> int:
    """The block whose first row is read as late as can be in the first epoch of `write_config`."""
    order = Order(read_index(data), streams=2, batch_size=16, seed=0, window=16, arrangement="shuffled")
    first: dict[int, int] = {}
    for stream in range(2):
        edges = order.windows(0, stream)
        for window in range(len(edges) - 1):
            for piece in order.window_pieces(0, stream, edges[window], edges[window + 1]):
                first[piece.block] = min(first.get(piece.block, window), window)
    return max(first, key=first.get)


def test_a_damaged_shard_ends_a_run_that_is_under_way(data, tmp_path):
    places = [(shard, block) for shard in read_index(data).shards for block in shard.blocks]
    shard, block = places[latest_block(data)]
    path = Path(data) / shard.file
    damaged = bytearray(path.read_bytes())
    damaged[block.offset + 700] ^= 1
    path.write_bytes(damaged)
    message = refusal(dist_rec("train", write_config(tmp_path, data)))
    assert re.match(rf"rank [01]: {path}, block {block.name} \(rows ", message), message
    assert "is damaged: its checksum is not the index's. Restore the shard" in message
    assert len((tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()) > 3


def test_an_id_out_of_its_vocabulary_ends_every_rank(data, tmp_path):
    where = rewrite_block(
        data, len([b for s in read_index(data).shards for b in s.blocks]) - 1, with_value("item_id", 3, 31)
    )
    message = refusal(dist_rec("train", write_config(tmp_path, data)))
    assert message == f"rank 1: {where}, row 3: 'item_id' has id 31, outside its vocabulary 0 .. 30.\n"


def test_plain_torchrun_says_it_once_too(data, tmp_path):
    where = rewrite_block(data, 0, with_value("label:ctr", 5, 7.0))
    config = write_config(tmp_path, data)
    for arguments, message in (
        ([], f"dist-rec: rank RANK: {where}, row 5: label 'ctr' is 7, allowed is 0 or 1."),
        # Both ranks meet this one.
        (["--train.stpes", "3"], "  - train.stpes: unknown key. Did you mean 'steps'?"),
    ):
        done = run_ranks(2, ["-m", "dist_rec", "train", str(config), *arguments], SECONDS)
        assert done.returncode == 1 and done.stderr.count("dist-rec:") == 1
        # One traceback, and it is torchrun's own.
        said = [re.sub("rank [01]", "rank RANK", line) for line in done.stderr.splitlines()]
        assert message in said and done.stderr.count("Traceback") == 1, done.stderr
        assert "ChildFailedError" in done.stderr.partition("Traceback")[2]


def test_a_damaged_checkpoint_is_refused(intact, tmp_path):
    run, name = tmp_path / "runs" / "run", "dense/rank-00000.safetensors"
    folder = run / "checkpoints" / "step-00000001"
    (folder / "dense").mkdir(parents=True)
    shutil.copy(write_config(tmp_path, intact), run / "config.yaml")
    (run / "checkpoints" / "latest").write_text(folder.name)
    (folder / name).write_bytes(b"not what was saved")
    nothing = {key: {} for key in ("state", "config", "plan", "environment", "tables", "dense")}
    files = {name: FileInfo(bytes=len(b"not what was saved"), sha256="0" * 64)}
    manifest = Manifest(format=checkpoint.FORMAT, step=1, dense_steps=1, files=files, **nothing)
    (folder / checkpoint.STATE_NAME).write_text(manifest_text(manifest))
    message = refusal(dist_rec("evaluate", run, "--split", "train")).partition(": ")[2]
    assert message == f"checkpoint {folder} is damaged: {name} does not match its checksum.\n"


@pytest.mark.parametrize("launcher", ["dist-rec", "torchrun"])
def test_when_one_rank_dies_all_end(intact, tmp_path, launcher):
    config = write_config(tmp_path, intact, train={"epochs": 10**6, "log_every": 1})
    python = [sys.executable, "-m"]
    ours = ["dist_rec", "train", str(config)]
    if launcher == "dist-rec":
        process = start([*python, *ours, "--nproc-per-node", "2"])
    else:
        process = start([*python, "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *ours])
    try:
        lines, deadline = tmp_path / "runs" / "run" / "metrics.jsonl", time.monotonic() + SECONDS
        while not (lines.exists() and len(lines.read_text().splitlines()) > 5):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=9)
            time.sleep(0.1)
        ranks = {environment["RANK"]: pid for pid, environment in family(process).items() if "RANK" in environment}
        assert ranks.keys() == {"0", "1"}
        killed = time.monotonic()
        os.kill(ranks["1"], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - killed < 20 and process.returncode == 1
        assert not family(process)
        if launcher == "dist-rec":
            assert err == "dist-rec: rank 1 ended with signal 9; the other ranks were stopped.\n"
    finally:
        kill_family(process)


def test_a_rank_that_loses_another_host_says_so_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(cli, "ECHO_SECONDS", 0)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    gone = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:552] Connection closed by peer [10.0.0.1]\n"
    )
    assert cli._end_of(gone) == 1
    assert capsys.readouterr().err.startswith("dist-rec: rank 3: lost another rank: [/pytorch")
    # The cause was told: nothing more to say.
    monkeypatch.setattr(cli, "anyone_said", lambda: True)
    assert cli._end_of(gone) == 1 and capsys.readouterr().err == ""
    assert cli._end_of(RuntimeError("ours")) == 1
    assert capsys.readouterr().err == "RuntimeError: ours\n"
