"""The flagship promise: any number of ranks, sharding and ZeRO stage equal one unsharded process."""

from __future__ import annotations

import pytest
from conftest import build_small, run_ranks

from dist_rec.text.embed import embed


def check_parity(ranks: int, data: str, shardings: str, stages: str, *overrides: str, seconds: float = 240) -> None:
    done = run_ranks(ranks, ["tests/parity_worker.py", data, shardings, stages, *overrides], seconds)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok", "FAIL"))]
    expected = 3 * len(shardings.split(",")) * len(stages.split(","))
    assert done.returncode == 0 and len(lines) == expected, "\n".join(lines) + done.stderr[-3000:]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_hybrid_parity(small, ranks):
    """Nulls in labels, the tiny domain on one rank at most, eight streams that 3 does not divide."""
    check_parity(ranks, small, "row_wise,table_wise,column_wise", "1,2,3")


def test_hybrid_parity_of_every_body(small):
    """PLE with MMD and the cls gate, over streams that neither rank count nor batch divides evenly."""
    check_parity(
        2,
        small,
        "row_wise",
        "0,3",
        "data.streams=5",
        "model.body.kind=ple",
        "model.body.levels=2",
        "model.gating=cls",
        "model.regulariser.kind=mmd",
    )


def test_hybrid_parity_when_sharding_types_mix(small):
    """One collection with row-wise, column-wise and table-wise tables, with mean pooling over nulls."""
    check_parity(
        3, small, "row_wise", "1", "tables.overrides={tags: {sharding: table_wise}, user_id: {sharding: column_wise}}"
    )


def test_hybrid_parity_of_texts(tmp_path, tiny_model):
    """A co-trained language model in the engine, and frozen vectors; the last batches leave ranks without texts."""
    data = build_small(tmp_path, tokenizer=tiny_model)
    few_at_the_end = ("data.batch_size=104", "model.history.use_text=true")
    full = ("text.mode=full", f"text.model={tiny_model}")
    check_parity(2, data, "row_wise", "1,3", *full, *few_at_the_end)
    check_parity(3, data, "column_wise", "1,3", *full, *few_at_the_end)
    embed([data], tiny_model, str(tmp_path / "store"))
    check_parity(3, data, "row_wise", "1", "text.mode=frozen", f"text.store={tmp_path / 'store'}", *few_at_the_end)
