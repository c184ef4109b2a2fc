"""Checkpoints: any plan to any plan to the bit; a save that fails or dies harms neither training nor what was saved."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import build_small, check_verdicts, kill_family, run_hosts, run_ranks, start, verdicts
from safetensors.torch import load_file

from dist_rec.cli import main
from dist_rec.training import checkpoint
from dist_rec.training.checkpoint.boxes import Box
from dist_rec.training.checkpoint.tables import Shard

SECONDS = 240
WORKER = "tests/checkpoint_worker.py"
# Sharding, tables' optimizer, ZeRO stage, precision, dense optimizer. A text encoder has parameters that do not train.
SAVED = {
    "rows": "row_wise/rowwise_adagrad/1/fp32/adamw",
    "columns": "column_wise/rowwise_adagrad/3/bf16/adamw",
    "tables": "table_wise/adagrad/2/bf16/adamw",
    "sgd": "table_row_wise/sgd/0/fp32/sgd",
    "text": "row_wise/rowwise_adagrad/3/fp32/adamw",
    "chunks": "table_column_wise/rowwise_adagrad/1/bf16/adamw",
    "untrained": "row_wise/adagrad/2/fp32/adamw",
    "copies": "data_parallel/rowwise_adagrad/1/fp32/adamw",
    "halves": "row_wise@fp16/rowwise_adagrad/2/fp32/adamw",
}
LOADED = {
    1: {
        "rows": "row_wise/rowwise_adagrad/3/bf16/adamw",
        "columns": "table_wise/rowwise_adagrad/0/fp32/adamw",
        "tables": "column_wise/adagrad/1/fp32/adamw",
        "text": "row_wise/rowwise_adagrad/0/fp32/adamw",
        "halves": "data_parallel/rowwise_adagrad/1/fp32/adamw",
    },
    2: {
        "rows": "column_wise/rowwise_adagrad/2/bf16/adamw",
        "columns": "row_wise/rowwise_adagrad/1/fp32/adamw",
        "tables": "grid_shard/adagrad/0/fp32/adamw",
        "sgd": "row_wise/sgd/3/bf16/sgd",
        "text": "table_wise/rowwise_adagrad/2/bf16/adamw",
        "copies": "column_wise@fp16/rowwise_adagrad/3/fp32/adamw",
        "untrained": "data_parallel/adagrad/2/fp32/adamw",
    },
    3: {
        "rows": "table_wise/rowwise_adagrad/3/fp32/adamw",
        "columns": "column_wise/rowwise_adagrad/3/bf16/adamw",
        "tables": "row_wise/adagrad/2/bf16/adamw",
        "sgd": "table_column_wise/sgd/1/fp32/sgd",
        "text": "column_wise/rowwise_adagrad/3/bf16/adamw",
        "chunks": "table_row_wise/rowwise_adagrad/0/fp32/adamw",
        "untrained": "table_wise/adagrad/3/fp32/adamw",
        "grid": "row_wise/rowwise_adagrad/0/fp32/adamw",
        "many": "column_wise/adagrad/1/bf16/adamw",
        "copies": "row_wise/rowwise_adagrad/2/fp32/adamw",
        "halves": "table_row_wise@fp16/rowwise_adagrad/1/fp32/adamw",
    },
}
FROM_ONE_HOST = {
    "columns": "grid_shard/rowwise_adagrad/3/bf16/adamw",
    "rows": "table_row_wise/rowwise_adagrad/2/fp32/adamw",
    "tables": "data_parallel/adagrad/1/fp32/adamw",
}
BY_HOSTS = {"grid": "grid_shard/rowwise_adagrad/2/bf16/adamw", "many": "table_row_wise/adagrad/3/fp32/adamw"}


def jobs(kind: str, layouts: dict[str, str], model: str) -> list[str]:
    """Command-line words of the worker."""
    found = []
    for name, layout in layouts.items():
        text, write = model if name == "text" else "", "chunks" if name == "chunks" else "background"
        found.append(f"{kind}:{name}:{layout}:{text}:{write}")
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_model) -> str:
    return build_small(tmp_path_factory.mktemp("data"), tokenizer=tiny_model)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory, data, tiny_model):
    """A checkpoint of each of `SAVED` by 2 ranks, every tensor whole beside it; and what 2 ranks make of them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    words = [*jobs("save", SAVED, tiny_model), *jobs("load", SAVED, tiny_model), *jobs("load", LOADED[2], tiny_model)]
    words.append(f"overflow:large:{SAVED['halves']}")
    return folder, run_ranks(2, [WORKER, data, str(folder), *words], SECONDS)


@pytest.fixture(scope="module")
def saved(by_two) -> Path:
    return by_two[0]


@pytest.fixture(scope="module")
def by_hosts(saved, data, tiny_model):
    """The same by two hosts of two ranks."""
    words = [*jobs("load", FROM_ONE_HOST, tiny_model), *jobs("save", BY_HOSTS, ""), *jobs("load", BY_HOSTS, "")]
    first, second = run_hosts([2, 2], [WORKER, data, str(saved), *words], SECONDS)
    return first if verdicts(first) else second


def test_the_same_layout_goes_on_bit_by_bit(by_two):
    """Weights, every optimizer state, and the losses of the next steps; other layouts of the same ranks, too. And what
    another precision cannot hold is refused."""
    check_verdicts(by_two[1], 2 * len(SAVED) + len(LOADED[2]) + 1)


@pytest.mark.parametrize("ranks", [1, 3])
def test_any_plan_to_any_plan(saved, by_hosts, data, tiny_model, ranks):
    """Other shardings, ZeRO stages, precisions and numbers of ranks; the next losses are close, too."""
    words = jobs("load", LOADED[ranks], tiny_model)
    check_verdicts(run_ranks(ranks, [WORKER, data, str(saved), *words], SECONDS), len(words))


def test_any_plan_to_any_plan_of_hosts(by_hosts):
    """Two hosts of two ranks, where grids cut columns, too: from one host, and among them."""
    check_verdicts(by_hosts, len(FROM_ONE_HOST) + 2 * len(BY_HOSTS))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("by", [1, 2, 3, 4])
def test_any_plan_to_any_plan_all_of_them(tmp_path, data, by, ranks):
    """Every pair of shardings (two of them in fp16, too) and of stages, for every pair of world sizes."""
    types = [
        "row_wise",
        "table_wise",
        "column_wise",
        "table_row_wise",
        "table_column_wise",
        "grid_shard",
        "data_parallel",
    ]
    types += ["row_wise@fp16", "grid_shard@fp16"]
    for optimizer in ("rowwise_adagrad", "adagrad"):
        before = {f"{t}-{optimizer}": f"{t}/{optimizer}/{i % 4}/fp32/adamw" for i, t in enumerate(types)}
        check_verdicts(run_ranks(by, [WORKER, data, str(tmp_path), *jobs("save", before, "")], 900), len(before))
        words = []
        for i, name in enumerate(before):
            for j, t in enumerate(types):
                words += jobs("load", {name: f"{t}/{optimizer}/{(i + j) % 4}/fp32/adamw"}, "")
        check_verdicts(run_ranks(ranks, [WORKER, data, str(tmp_path), *words], 900), len(words))


@pytest.fixture(scope="module")
def killed(tmp_path_factory, data) -> Path:
    """Step 1 is saved; every rank is killed when half of step 2 is on disk."""
    folder = tmp_path_factory.mktemp("killed")
    words = [WORKER, data, str(folder), f"hang:run:{SAVED['rows']}"]
    process = start([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words])
    try:
        deadline = time.monotonic() + SECONDS
        while not list((folder / "run").glob(".step-00000002.partial-*/rank-00001.json")):
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.05)
    finally:
        kill_family(process)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return folder / "run"


def test_dying_while_a_checkpoint_is_written_leaves_the_last_one(killed):
    assert [path.name for path in checkpoint.checkpoints(killed)] == ["step-00000001"]
    assert checkpoint.last_good(killed).step == 1 and checkpoint.find(killed).name == "step-00000001"


def test_a_failed_write_is_said_and_training_goes_on(killed, data):
    """A full disk on one rank, a folder that vanishes, one that cannot be made; and each time the next save works.

    Before that, the next start of what was killed clears away what lay half written.
    """
    words = [f"again:run:{SAVED['rows']}", f"faults:faults:{SAVED['rows']}"]
    done = run_ranks(2, [WORKER, data, str(killed.parent), *words], SECONDS)
    check_verdicts(done, 2)
    assert [path.name for path in killed.iterdir() if path.name.startswith(".")] == []
    said = [line for line in done.stderr.splitlines() if line.startswith("dist-rec: ")]
    for step, last, why in (
        (2, "the last good one is step 1", "rank 1: [Errno 27] File too large"),
        (4, "the last good one is step 3", "No such file"),
        (6, "there is none yet", "rank 0: [Errno 20] Not a directory"),
    ):
        lines = [line for line in said if f"the checkpoint of step {step} was not written: " in line]
        # Where the folder is gone, no rank can tell another.
        assert len(lines) == 1 or step == 4 and len(lines) == 2, said
        assert all(why in line and line.endswith(f"; training goes on; {last}.") for line in lines), lines
    assert len(said) <= 4


@pytest.fixture
def verb(monkeypatch, capsys):
    """`dist-rec checkpoint ...` in this process: exit code, stdout, stderr."""

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dist-rec", "checkpoint", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return run


def test_export_full_is_one_plain_file(saved, tmp_path, verb):
    """What `safetensors` reads equals what the engines assembled."""
    wanted, folder = load_file(saved / "columns.whole.safetensors"), saved / "columns"
    out, bare = tmp_path / "all.safetensors", tmp_path / "model.safetensors"
    for words in ((out, "--with-optimizer"), (bare,)):
        code, _, err = verb("export-full", folder, "--out", *words)
        assert code == 0, err
    found = load_file(out)
    model = {name: value for name, value in wanted.items() if "|" not in name and "momentum" not in name}
    del model["dense.steps"]
    assert load_file(bare).keys() == model.keys()
    for name, value in model.items():
        assert torch.equal(found[name], value), name
    for name in wanted.keys() - model.keys() - {"dense.steps"}:
        value = found.pop(f"optimizer.{name.replace('|', '.')}")
        if name.startswith("tables."):
            assert torch.allclose(wanted[name].mean(1), value, rtol=1e-6), name
        else:
            assert torch.equal(wanted[name], value), name
    assert found.keys() == model.keys()
    code, _, err = verb("export-full", folder, "--out", out)
    assert code == 2 and f"{out} exists" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.safetensors", "model.safetensors"]


def test_what_all_ranks_hold_is_written_once(saved):
    """Each rank its part of the rows, none where there are too few."""
    manifest = checkpoint.last_good(saved / "copies").manifest
    user = [(Path(piece.file).stem, piece.offset, piece.size) for piece in manifest.tables["user_id"].pieces]
    assert user == [("rank-00000", [0, 0], [20, 24]), ("rank-00001", [20, 0], [21, 24])]
    assert manifest.plan["user_id"]["shards"] == [] and manifest.plan["user_id"]["ranks"] == [0, 1]
    momenta = torch.arange(2.0)
    whole = Shard("t", (2, 4), Box.whole((2, 4)), {"weight": torch.zeros(2, 4), "momentum1": momenta}, replicated=True)
    parts = [whole.share(rank, 3) for rank in range(3)]
    assert parts[0] is None and [part.box.offset for part in parts[1:]] == [(0, 0), (1, 0)]
    assert [part.tensors["momentum1"].tolist() for part in parts[1:]] == [[0.0], [1.0]]


def test_half_precision_weights_lie_in_half_the_bytes(saved):
    kinds = checkpoint.last_good(saved / "halves").manifest.tables["item_id"].kinds
    assert {kind: about.dtype for kind, about in kinds.items()} == {"weight": "F16", "momentum1": "F32"}


def test_inspect_and_verify_tell_what_is_there(saved, verb):
    code, told, _ = verb("inspect", saved / "columns", "--json")
    told = json.loads(told.splitlines()[-1])
    assert code == 0 and told["step"] == 3 and told["state"] == {"name": "columns"}
    assert told["tables"]["user_id"] == {
        "shape": [41, 24],
        "dtype": "F32",
        "sharding_type": "column_wise",
        "shards": 2,
        "optimizer": {"momentum1": "row"},
        "managed": False,
        "frozen": False,
    }
    assert told["dense_optimizer"] == ["exp_avg", "exp_avg_sq"] and told["environment"]["world size"] == 2
    code, verified, _ = verb("verify", saved / "columns", "--json")
    files = list((saved / "columns").rglob("*.safetensors"))
    assert code == 0 and json.loads(verified.splitlines()[-1])["files"] == len(files) == 4
    assert json.loads(verified.splitlines()[-1])["bytes"] == told["bytes"] == sum(f.stat().st_size for f in files)
