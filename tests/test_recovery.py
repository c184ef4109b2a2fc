"""A run can end at any moment and go on: the same rows in the same steps, to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import build_small, family, kill_family, run_command, small_table, start
from http_server import serve

from dist_rec.bench.crash import crash
from dist_rec.config import load_config
from dist_rec.data.append import append
from dist_rec.data.index import read_index
from dist_rec.errors import UserError
from dist_rec.training import checkpoint
from dist_rec.training.resume import changes, differences, find_earlier
from dist_rec.training.row_record import history

SECONDS = 240
ROWS = {"big": 211, "middle": 96, "tiny": 7}
BATCH = 40
EPOCH = -(-sum(ROWS.values()) // BATCH)


def write_config(folder: Path, root: str, **sections) -> Path:
    base = {
        "run": {"root": str(folder / "runs"), "name": "run"},
        "data": {"train": root, "batch_size": BATCH, "streams": 8, "shuffle_window": 128},
        "tables": {"dim": 8},
        "model": {"width": 16, "history": {"feedforward": 16, "dropout": 0.0}, "regulariser": {"kind": "js"}},
        "train": {"epochs": 3, "log_every": 1, "record_rows": True},
    }
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(base))
    return path


def command(config: Path, *arguments: object, ranks: int = 1) -> list[str]:
    many = ["--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, "-m", "dist_rec", "train", str(config), *map(str, arguments), *many]


def train(config: Path, *arguments: object, ranks: int = 1, code: int = 0) -> subprocess.CompletedProcess:
    done = run_command(command(config, *arguments, ranks=ranks), SECONDS)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def losses(run: Path) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["losses"] for line in lines if "losses" in line}


def test_world_sizes_2_3_1_in_one_history_see_every_row_once_in_the_same_steps(small, tmp_path):
    config = write_config(tmp_path, small)
    run, whole = tmp_path / "runs" / "run", tmp_path / "runs" / "whole"
    train(config, "--run.name", "whole")
    train(config, "--train.steps", 5, ranks=2)
    said = train(config, "--train.steps", EPOCH + 3, ranks=3).stderr
    assert said.startswith(
        "dist-rec: going on from step-00000005 not bit for bit, for these differ:\n  - world size: 2"
    )
    assert "world size: 3 -> 1" in train(config).stderr
    seen, wanted = history(run / "rows"), history(whole / "rows")
    assert sorted(seen) == list(range(1, 3 * EPOCH + 1)) == sorted(wanted)
    for step, (epoch, rows) in wanted.items():
        assert seen[step][0] == epoch == (step - 1) // EPOCH and sorted(seen[step][1]) == sorted(rows), step
    for epoch in range(3):
        rows = [row for e, rows in seen.values() if e == epoch for row in rows]
        assert sorted(rows) == list(range(sum(ROWS.values())))
    found, expected = losses(run), losses(whole)
    assert found.keys() == expected.keys()
    for step in expected:
        assert found[step] == pytest.approx(expected[step], abs=1e-5), step
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 3 * EPOCH and summary["attempts"] == 3 and len(summary["epochs"]) == 3
    assert summary["lost"] == {"rows": 0, "blocks": []}


@pytest.mark.timeout(900)
def test_struck_in_every_way_a_job_ends_as_in_peace():
    result = crash(6, kinds=["rank", "all", "saving", "sigterm", "disk full", "shard gone"])
    wanted = {"kills": 6, "completed": True, "rows_seen_exactly_once": True, "bitwise_equal": True}
    assert {name: result[name] for name in wanted} == wanted, result


def test_appended_rows_wait_for_the_next_epoch_or_are_all_that_is_read(tmp_path):
    data = build_small(tmp_path, ROWS)
    old = sum(ROWS.values())
    config = write_config(tmp_path, data, train={"epochs": 2, "log_every": 1, "record_rows": True})
    run = tmp_path / "runs" / "run"
    train(config, "--train.steps", 3)

    def more(seed: int) -> int:
        rows = {"big": 60, "middle": 20, "tiny": 3}
        pq.write_table(small_table(rows, seed), tmp_path / f"{seed}.parquet")
        append(data, [str(tmp_path / f"{seed}.parquet")])
        return sum(rows.values())

    new = old + more(1)
    train(config)
    assert [rows_of(run, epoch) for epoch in (0, 1)] == [list(range(old)), list(range(new))]
    finished = train(config, code=2).stderr
    assert "holds a finished run" in finished
    assert "too little to train on was appended" in train(config, "--data.from_watermark", code=2).stderr
    newer = new + more(2)
    train(config, "--data.from_watermark")
    assert rows_of(run, 2) == list(range(new, newer)) and read_index(data).generation == 2
    epochs = json.loads((run / "summary.json").read_text())["epochs"]
    assert [(e["after_generation"], e["upto_generation"]) for e in epochs] == [(-1, 0), (-1, 1), (1, 2)]
    fresh = train(config, "--data.from_watermark", "--run.name", "fresh", code=2).stderr
    assert "data.from_watermark trains on what was appended since a checkpoint" in fresh


def rows_of(run: Path, epoch: int) -> list[int]:
    return sorted(row for e, rows in history(run / "rows").values() if e == epoch for row in rows)


def test_a_quarantined_block_is_left_out_and_told(tmp_path):
    data = build_small(tmp_path, ROWS)
    index = read_index(data)
    shard = index.shards[1]
    block = shard.blocks[1]
    path = Path(data) / shard.file
    damaged = bytearray(path.read_bytes())
    damaged[block.offset + 700] ^= 1
    path.write_bytes(damaged)
    first = index.shards[0].rows + shard.blocks[0].rows
    config = write_config(
        tmp_path,
        data,
        data={"damaged": "quarantine", "max_damaged_share": 0.5},
    )
    run = tmp_path / "runs" / "run"
    train(config, "--train.epochs", 2, ranks=2)
    lost = set(range(first, first + block.rows))
    for epoch in range(2):
        assert rows_of(run, epoch) == [row for row in range(sum(ROWS.values())) if row not in lost]
    told = json.loads((run / "summary.json").read_text())["lost"]
    assert told["rows"] == 2 * block.rows and len(told["blocks"]) == 1
    assert told["blocks"][0]["rows"] == [first, first + block.rows - 1]
    assert told["blocks"][0]["shard"] == shard.file and "checksum" in told["blocks"][0]["reason"]
    few = train(config, "--run.name", "few", "--data.max_damaged_share", 0.01, ranks=2, code=2).stderr
    assert "data.max_damaged_share" in few


def test_a_run_from_a_misbehaving_server_is_the_run_from_disk(small, tmp_path):
    config = write_config(tmp_path, small, data={"retry_seconds": 0.01})
    train(config, "--train.epochs", 1, ranks=2)
    with serve(small) as server:
        server.faults.extend([500, "drop", "short", 503, "corrupt"])
        train(config, "--train.epochs", 1, "--run.name", "far", "--data.train", server.url, ranks=2)
        assert not server.faults and server.tars() > 10
    assert losses(tmp_path / "runs" / "far") == losses(tmp_path / "runs" / "run")


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of a few megabytes below `folder`."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=20)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here, which needs root: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)


def test_on_a_full_disk_training_goes_on_and_nothing_is_lost(small, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        every = {"every_steps": 5}
        config = write_config(
            disk, small, train={"epochs": 10**6, "log_every": 1, "record_rows": True}, checkpoint=every
        )
        run, filler, said = disk / "runs" / "run", disk / "filler", tmp_path / "said"
        with said.open("w") as errors:
            job = start(command(config, "--train.epochs", 10**6), stderr=errors)
        deadline = time.monotonic() + SECONDS

        def wait(reached) -> None:
            while not reached():
                assert job.poll() is None and time.monotonic() < deadline, said.read_text()
                time.sleep(0.02)

        def saved() -> int:
            return int(checkpoint.find(run).name.removeprefix("step-"))

        def missed() -> bool:
            # Again each time: a save that fails gives room back, which the rows' record would live on.
            with suppress(OSError):
                while True:
                    file.write(bytes(1 << 12))
            err = said.read_text()
            return "was not written" in err and "its lines wait" in err

        try:
            wait((run / "checkpoints" / "latest").exists)
            with filler.open("wb", buffering=0) as file:
                missed()
                full_at = saved()
                wait(missed)
            # The save that was under way may still have found room.
            assert saved() - full_at <= 5
            filler.unlink()
            wait(lambda: saved() > full_at + 20)
            job.send_signal(signal.SIGTERM)
            job.communicate(timeout=60)
        finally:
            kill_family(job)
        assert job.returncode == 143, said.read_text()
        seen = history(run / "rows")
        done = saved()
        assert sorted(seen) == list(range(1, done + 1))
        for epoch in range(done // EPOCH):
            assert rows_of(run, epoch) == list(range(sum(ROWS.values())))


def test_sigterm_to_one_rank_s_job_saves_and_ends(small, tmp_path):
    config = write_config(tmp_path, small, data={"valid": small})
    run = tmp_path / "runs" / "run"
    job = start(command(config, "--train.epochs", 10**6, "--train.evaluate_every", 1))
    try:
        deadline = time.monotonic() + SECONDS
        while not (run / "metrics.jsonl").exists() or len(losses(run)) < 3:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        _, err = job.communicate(timeout=60)
    finally:
        kill_family(job)
    assert job.returncode == 143 and err.startswith("dist-rec: stopped by SIGTERM after step "), err
    done = max(losses(run))
    assert checkpoint.find(run).name == f"step-{done:08d}"
    train(config, "--train.epochs", 10**6, "--train.evaluate_every", 1, "--train.steps", done + 2)
    lines = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    assert [line["step"] for line in lines if "evaluation" in line] == list(range(1, done + 3))
    epochs = [line["epoch"] for line in lines if "epoch" in line]
    assert epochs == list(range((done + 1) // EPOCH + 1))


@pytest.mark.parametrize("told", ["agent and ranks", "ranks, by the agent's death"])
def test_ranks_that_are_told_to_end_save_first(small, tmp_path, told):
    config = write_config(tmp_path, small)
    run = tmp_path / "runs" / "run"
    job = start(command(config, "--train.epochs", 10**6, ranks=2))
    try:
        deadline = time.monotonic() + SECONDS
        while not (run / "metrics.jsonl").exists() or len(losses(run)) < 3:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        if told == "agent and ranks":
            for pid in family(job):
                os.kill(pid, signal.SIGTERM)
        else:
            job.kill()
        job.wait(60)
        while family(job):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        kill_family(job)
    assert checkpoint.find(run).name == f"step-{max(losses(run)):08d}"


TOLD_LATE = """
import os, signal, sys
from dist_rec.cli import main
from dist_rec.training.trainer import Trainer

save = Trainer.save

def told_while_saving(self):
    os.kill(os.getpid(), signal.SIGTERM)
    save(self)

Trainer.save = told_while_saving
sys.argv[0] = "dist-rec"
sys.exit(main())
"""


def test_told_after_the_last_step_a_run_ends_and_its_evaluation_waits(small, tmp_path):
    config, run = write_config(tmp_path, small), tmp_path / "runs" / "run"
    told = run_command([sys.executable, "-c", TOLD_LATE, "train", str(config), "--train.steps", "3"], SECONDS)
    assert told.returncode == 143 and "after step 3 of 3, which is saved" in told.stderr, told.stdout + told.stderr
    assert not (run / "evaluation.json").exists()
    train(config, "--train.steps", 3)
    assert (run / "evaluation.json").exists() and sorted(losses(run)) == [1, 2, 3]


def test_a_fault_of_the_user_s_is_said_once_however_many_restarts_are_left(small, tmp_path):
    config = write_config(tmp_path, small, dense={"learning_rate": 1e38, "optimizer": "sgd"})
    began = time.monotonic()
    done = train(config, "--max-restarts", 3, ranks=2, code=2)
    assert done.stderr.count("the loss is not a number") == 1, done.stderr
    assert time.monotonic() - began < SECONDS / 2


def test_a_config_that_makes_it_another_run_is_refused_with_every_key(small, tmp_path):
    config = write_config(tmp_path, small)
    run = tmp_path / "runs" / "run"
    assert find_earlier(load_config(config)) is None
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(config.read_text())
    # What failed before its first checkpoint is in nobody's way.
    assert find_earlier(load_config(config, {"run.seed": "3", "train.resume": "never"})) is None
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert find_earlier(load_config(config)) == run
    allowed = {"train.epochs": "9", "tables.sharding": "row_wise", "dense.zero_stage": "2", "data.train": "moved"}
    assert find_earlier(load_config(config, allowed)) == run
    other = {"data.batch_size": "80", "model.body.kind": "ple", "run.seed": "3", "data.weights": "{big: 2}"}
    with pytest.raises(UserError) as caught:
        find_earlier(load_config(config, other | allowed))
    told = str(caught.value)
    for line in ("data.batch_size: 40 -> 80", 'model.body.kind: "mmoe" -> "ple"', "run.seed: 0 -> 3", "data.weights"):
        assert line in told
    assert not any(key in told for key in allowed)
    with pytest.raises(UserError, match="holds a run already"):
        find_earlier(load_config(config, {"train.resume": "never"}))


def test_what_may_change_the_bits_is_said():
    changed = changes(
        {"dense": {"lr": 1, "same": 0}, "train": {"epochs": 1}}, {"dense": {"lr": 2}, "train": {"epochs": 2}}
    )
    assert [str(change) for change in changed] == [
        "dense.lr: 1 -> 2",
        "dense.same: 0 -> not set",
        "train.epochs: 1 -> 2",
    ]
    told = differences({"world size": 2, "torch": "a"}, {"world size": 2, "torch": "b"}, changed, "constant")
    assert told == ["torch: a -> b", "dense.lr: 1 -> 2", "dense.same: 0 -> not set"]
    assert "train.epochs: 1 -> 2" in differences({}, {}, changed, "cosine")
