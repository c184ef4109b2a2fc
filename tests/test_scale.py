"""Tables as large as memory: filled, saved and loaded piece by piece, without a second copy of a shard."""

from __future__ import annotations

import json
import sys
from unittest import mock

import psutil
import pytest
import torch
import yaml
from conftest import run_command, run_ranks
from safetensors.torch import save_file

from dist_rec.bench import tables as bench
from dist_rec.config import TablesConfig
from dist_rec.embeddings import sharding
from dist_rec.embeddings.tables import INIT_CHUNK_ROWS, TableSpec, initial_rows
from dist_rec.errors import UserError
from dist_rec.training.checkpoint import reader
from dist_rec.training.checkpoint.manifest import KindInfo, PieceInfo, TensorInfo, key_of

# Several times what reading and writing take in passing.
ROWS = 16_000_000


def test_a_shard_starts_as_its_part_of_the_table_piece_by_piece():
    spec = TableSpec("t", 3 * INIT_CHUNK_ROWS + 5, 8, ("t",), False, "auto")
    config = TablesConfig()
    whole = initial_rows(spec, config, 7, 0, spec.rows)
    for row, rows, column, columns in ((0, spec.rows, 0, 8), (INIT_CHUNK_ROWS - 3, INIT_CHUNK_ROWS + 9, 4, 4)):
        shard = torch.empty(rows, columns)
        with mock.patch.object(sharding, "initial_rows", side_effect=initial_rows) as drawn:
            sharding._fill(shard, spec, config, 7, row, column)
        assert torch.equal(shard, whole[row : row + rows, column : column + columns])
        assert max(call.args[4] - call.args[3] for call in drawn.call_args_list) <= INIT_CHUNK_ROWS


def test_a_file_that_is_read_does_not_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "READ_BYTES", 1 << 20)
    table = torch.randn(1 << 18, 16)
    info = TensorInfo(
        shape=list(table.shape),
        flat=False,
        kinds={"weight": KindInfo(dtype="F32")},
        pieces=[PieceInfo(file="tables/rank-00000.safetensors", offset=[0, 0], size=list(table.shape))],
    )
    box = info.pieces[0].box
    file = tmp_path / info.pieces[0].file
    file.parent.mkdir()
    save_file({key_of("t", "weight", box): table}, file)
    saved, found = reader.Saved(tmp_path, manifest=None), torch.empty_like(table)
    saved.fill("t", info, "weight", box, found)
    assert torch.equal(found, table)
    mapped = [m for m in psutil.Process().memory_maps() if m.path == str(file)]
    assert sum(m.rss for m in mapped) < table.nbytes // 4


def test_what_is_read_in_pieces_is_what_was_saved(tmp_path):
    """Weights and row-wise states, of a table that two ranks do not share evenly."""
    bench._invent(tmp_path, 2 * (bench.WARM_UP_STEPS + 1) * bench.RANK_ROWS)
    case = tmp_path / "case"
    case.mkdir()
    (case / "config.yaml").write_text(yaml.safe_dump(bench.case_config(tmp_path, 60_001, 2)))
    done = run_ranks(2, ["tests/scale_worker.py", str(case), "1"], 150)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((case / "result.json").read_text())["bitwise_equal"]


def test_filling_saving_and_loading_take_no_second_copy(tmp_path):
    """Measured from outside: a second copy of the tables would add `gib` to what training takes."""
    command = [sys.executable, "-m", "dist_rec", "bench", "tables", "--rows", str(ROWS), "--steps", "2"]
    done = run_command([*command, "--folder", str(tmp_path), "--json"], 240)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    (case,) = summary["cases"]
    assert case["rows"] == ROWS and case["gib"] == round(ROWS * (4 * bench.DIM + 4) / 2**30, 3)
    assert case["bitwise_equal"] and case["rows_per_s"] > 0 and case["rows_per_s_zipf"] > 0
    peaks = case["peak_gib"]
    assert peaks["train"] > case["gib"], peaks
    for phase in ("init", "save", "load"):
        assert peaks[phase] < peaks["train"] + 0.5 * case["gib"], peaks


def test_what_does_not_fit_is_refused_at_once():
    with pytest.raises(UserError, match="GiB of memory.*are free.*--rows"):
        bench.bench_tables([10**12], 1, 2, None)
    with pytest.raises(UserError, match="at least"):
        bench.bench_tables([1], 1, 2, None)
