"""What travels between ranks for the tables: less, with 16-bit vectors and distinct ids, and nothing is lost by it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import run_command, run_ranks
from torchrec.distributed.types import CommOp

from dist_rec.embeddings.sharders import wire_codecs
from dist_rec.embeddings.unique import jagged_unique_indices

LAYOUTS = [
    "row_wise",
    "column_wise+user_id=table_wise",
    "grid_shard+item_id=table_wise+tags=table_row_wise",
]


@pytest.fixture(scope="module")
def measured(small):
    done = run_ranks(3, ["tests/exchange_worker.py", small, ",".join(LAYOUTS)], 240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {one["layout"]: {(c["wire"], c["deduplicate"]): c for c in one["cases"]} for one in found}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wire_precision_halves_vectors_and_keeps_losses(measured, layout):
    cases = measured[layout]
    plain, once = cases["fp32", False], cases["fp32", True]
    assert plain["vector_bytes"] > 0
    assert cases["fp16", False]["vector_bytes"] * 2 == plain["vector_bytes"]
    assert cases["bf16", True]["vector_bytes"] * 2 == once["vector_bytes"]
    for way, most in ((("fp16", False), 1e-3), (("bf16", True), 1e-2)):
        assert 0 < cases[way]["largest_loss_difference"] < most
        assert abs(cases[way]["held_out_difference"]) < most


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deduplication_sends_less_and_changes_nothing(measured, layout):
    plain, once = measured[layout]["fp32", False], measured[layout]["fp32", True]
    assert once["vector_bytes"] < plain["vector_bytes"] and once["id_bytes"] < plain["id_bytes"]
    assert once["largest_loss_difference"] <= 2e-6 and abs(once["held_out_difference"]) <= 2e-6


def test_the_distinct_ids_of_every_table_travel_once():
    """Two features of a table of 10, one of a table of 5, two rows each."""
    ids, offsets = torch.tensor([3, 3, 7, 7, 9, 3, 1, 1, 4]), torch.tensor([0, 2, 3, 4, 6, 7, 9])
    lengths, travelling, unique, reverse = jagged_unique_indices(
        torch.tensor([0, 0, 10, 15]), torch.tensor([0, 2, 2, 3]), offsets, ids
    )
    assert unique.tolist() == [3, 7, 9, 1, 4]
    assert unique[reverse].tolist() == ids.tolist()
    assert lengths.tolist() == [1, 1, 1, 0, 1, 1] and travelling.tolist() == [0, 1, 2, 3, 3, 4, 5]


def test_distinct_ids_of_no_ids():
    nothing = torch.zeros(0, dtype=torch.int64)
    lengths, travelling, unique, reverse = jagged_unique_indices(
        torch.tensor([0, 10]), torch.tensor([0, 1]), torch.zeros(4, dtype=torch.int64), nothing
    )
    assert lengths.tolist() == [0, 0, 0] and travelling.tolist() == [0, 0, 0, 0]
    assert not len(unique) and not len(reverse)


@pytest.mark.parametrize("wire", ["bf16", "fp16"])
def test_small_gradients_survive_the_wire(wire):
    """What a mean over a large batch gives; fp16 would make zero of it."""
    gradient = torch.tensor([1e-9, -3e-12, 5e-3])
    for operation in (CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL, CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER):
        codec = wire_codecs(wire)[operation.name].backward
        assert codec.quantized_dtype == torch.bfloat16
        torch.testing.assert_close(codec.decode(codec.encode(gradient)), gradient, rtol=1e-2, atol=0)


def test_nothing_to_exchange_is_said(small, tmp_path):
    """The bench refuses one rank, and training says that a precision on the wire does nothing there."""
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"data": {"train": small, "batch_size": 32}, "run": {"root": str(tmp_path)}}))
    command = [sys.executable, "-m", "dist_rec"]
    done = run_command([*command, "bench", "exchange", "--config", str(config), "--nproc-per-node", "1"], 60)
    assert done.returncode == 2 and "one rank sends nothing" in done.stderr
    one_step = ["--tables.wire", "bf16", "--train.steps", "1"]
    done = run_command([*command, "train", str(config), *one_step], 120)
    assert done.returncode == 0 and "tables.wire bf16 does nothing" in done.stderr, done.stderr[-2000:]
