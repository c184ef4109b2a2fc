"""`launchers/torchrun_multinode.sh` between hosts: network namespaces, each with its own torchrun agent."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, build_small, kill_family, start

from dist_rec.training.row_record import history

SECONDS = 280
PORT = 29400


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


def why_not() -> str | None:
    """Why this machine cannot have network namespaces, None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the command ip (iproute2)"
    done = subprocess.run(["ip", "netns", "add", "dist-rec-probe"], capture_output=True, text=True, timeout=20)
    if done.returncode:
        return f"network namespaces are refused here: {done.stderr.strip()}"
    ip("netns", "del", "dist-rec-probe")
    return None


@contextmanager
def hosts(count: int) -> Iterator[list[str]]:
    """Namespaces joined by a bridge, as hosts by a switch; host i has the address 10.77.0.(i + 1)."""
    mark = f"dr{os.getpid() % 100_000}"
    names = [f"{mark}n{i}" for i in range(count)]
    with ExitStack() as undo:
        ip("link", "add", mark, "type", "bridge")
        undo.callback(ip, "link", "del", mark)
        ip("link", "set", mark, "up")
        for i, name in enumerate(names):
            ip("netns", "add", name)
            undo.callback(ip, "netns", "del", name)
            ip("link", "add", f"{mark}v{i}", "type", "veth", "peer", "name", "eth7", "netns", name)
            ip("link", "set", f"{mark}v{i}", "master", mark, "up")
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth7")
            ip("-n", name, "link", "set", "eth7", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names


def join(host: str, nodes: int, config: Path) -> subprocess.Popen:
    arguments = ["--nodes", str(nodes), "--rendezvous", f"10.77.0.1:{PORT}", "--", "train", str(config)]
    script = str(ROOT / "launchers" / "torchrun_multinode.sh")
    return start(["ip", "netns", "exec", host, "bash", script, *arguments])


@pytest.mark.timeout(SECONDS + 20)
def test_a_lost_host_comes_back_and_training_completes(tmp_path):
    if reason := why_not():
        pytest.skip(reason)
    data = build_small(tmp_path, {"big": 400, "middle": 160, "tiny": 40})
    run = tmp_path / "runs" / "hosts"
    config = {
        "run": {"root": str(tmp_path / "runs"), "name": "hosts"},
        "data": {"train": data, "batch_size": 24, "streams": 8, "shuffle_window": 128},
        "tables": {"dim": 8, "sharding": "row_wise"},
        "model": {"width": 16, "history": {"kind": "mean"}},
        "train": {"epochs": 4, "log_every": 1, "record_rows": True},
        "checkpoint": {"every_steps": 10},
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    deadline = time.monotonic() + SECONDS
    with hosts(2) as names:
        agents = [join(name, 2, path) for name in names]
        try:
            while not (run / "checkpoints" / "latest").exists():
                assert time.monotonic() < deadline and agents[0].poll() is None, agents[0].communicate(timeout=9)
                time.sleep(0.1)
            kill_family(agents[1])
            assert not (run / "evaluation.json").exists()
            agents[1].communicate(timeout=20)
            agents[1] = join(names[1], 2, path)
            for agent in agents:
                out, err = agent.communicate(timeout=max(deadline - time.monotonic(), 1))
                assert agent.returncode == 0, out + err
        finally:
            for agent in agents:
                kill_family(agent)
    assert (run / "evaluation.json").exists()
    seen = history(run / "rows")
    assert sorted(seen) == list(range(1, 101))
    for epoch in range(4):
        assert sorted(row for e, rows in seen.values() if e == epoch for row in rows) == list(range(600))
