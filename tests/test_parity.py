"""The flagship promise: any number of ranks, sharding and ZeRO stage equal one unsharded process."""

from __future__ import annotations

import copy
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import SMALL_SCHEMA, build_small, run_hosts, run_ranks, small_table
from sequence_sets import build_sequences, config_of

from dist_rec.data.build import build
from dist_rec.schema import Schema
from dist_rec.strict import from_dict
from dist_rec.text.embed import embed


def check_parity(ranks: int, data: str, layouts: str, stages: str, *overrides: str, seconds: float = 240) -> None:
    done = run_ranks(ranks, ["tests/parity_worker.py", data, layouts, stages, *overrides], seconds)
    check_lines(done, layouts, stages, models=len(data.split(",")))


def check_lines(done: subprocess.CompletedProcess, layouts: str, stages: str, models: int = 1) -> None:
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok", "FAIL"))]
    expected = 3 * len(layouts.split(",")) * len(stages.split(",")) * models
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
    """Several types in one collection, with mean pooling over nulls; tags, 4 rows, are too few to cut over 3 ranks."""
    layouts = [
        "row_wise+tags=table_wise+user_id=column_wise",
        "table_row_wise+tags=table_column_wise+item_id=row_wise",
        "grid_shard+tags=table_row_wise+item_id=column_wise",
        "row_wise+tags=data_parallel",
    ]
    check_parity(3, small, ",".join(layouts), "1")


def test_hybrid_parity_of_copied_tables(small):
    """Data-parallel tables beside a cut one, and where no table is cut."""
    check_parity(2, small, "data_parallel+item_id=column_wise", "0,3")
    check_parity(3, small, "data_parallel", "2", "data.exclude_features=[history]")


def test_hybrid_parity_of_histories_of_two_widths(tmp_path):
    """Tables of two widths that histories read, one of them shared with a feature that is pooled."""
    schema = copy.deepcopy(SMALL_SCHEMA)
    schema["features"]["tags"] |= {"max_length": 6}
    schema["features"]["past_users"] = {"role": "history", "kind": "ids", "shares": "user_id", "max_length": 6}
    table = small_table({"big": 211, "middle": 96, "tiny": 7})
    users = [None if events is None else [f"u{item[1:]}" for item in events] for events in table["history"].to_pylist()]
    raw = tmp_path / "raw.parquet"
    pq.write_table(table.append_column("past_users", pa.array(users, pa.list_(pa.string()))), raw)
    data = str(tmp_path / "shards")
    build(from_dict(Schema, schema, "two"), [str(raw)], data, block_rows=32, shard_rows=64, workers=1)
    check_parity(2, data, "column_wise+item_id=row_wise", "1", "tables.overrides.user_id.dim=8")


def test_every_table_trains(small):
    """Every sharding type of both kinds of tables, precisions and optimizers: see the worker."""
    done = run_ranks(2, ["tests/tables_worker.py", small], 240)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok", "FAIL"))]
    assert done.returncode == 0 and len(lines) == 21, "\n".join(lines) + done.stderr[-3000:]


def test_hybrid_parity_within_a_host(small):
    """The types that know hosts, where there is one."""
    layouts = [f"{kind}+item_id=row_wise" for kind in ("table_row_wise", "table_column_wise", "grid_shard")]
    check_parity(2, small, ",".join(layouts), "3")


def test_hybrid_parity_of_hosts(small):
    """Two hosts of two ranks: tables within one, and over both; alone, and mixed with a table over all ranks."""
    layouts = ",".join(
        [
            "table_row_wise+item_id=row_wise",
            "table_column_wise+tags=table_row_wise+item_id=table_wise",
            "grid_shard+tags=row_wise+item_id=column_wise",
            "data_parallel+tags=table_row_wise+item_id=row_wise",
        ]
    )
    first, second = run_hosts([2, 2], ["tests/parity_worker.py", small, layouts, "1"], 240)
    main, other = (first, second) if first.stdout else (second, first)
    check_lines(main, layouts, "1")
    assert other.returncode == 0, other.stderr[-3000:]


def test_hybrid_parity_of_texts(tmp_path, tiny_model):
    """A co-trained language model in the engine, and frozen vectors; the last batches leave ranks without texts."""
    data = build_small(tmp_path, tokenizer=tiny_model)
    few_at_the_end = ("data.batch_size=104", "model.history.use_text=true")
    # Slope and speed multiply gradients, and with them what rounding changes.
    gentle = ("model.text_match.slope=1.0", "model.text_match.speed=1.0")
    full = ("text.mode=full", f"text.model={tiny_model}", *gentle)
    check_parity(2, data, "row_wise", "1,3", *full, *few_at_the_end)
    check_parity(3, data, "column_wise", "1,3", *full, *few_at_the_end)
    embed([data], tiny_model, str(tmp_path / "store"))
    check_parity(3, data, "row_wise", "1", "text.mode=frozen", f"text.store={tmp_path / 'store'}", *few_at_the_end)


@pytest.fixture(scope="module")
def sequence_models(tmp_path_factory, tiny_model) -> str:
    """Configs of every loss of a sequence model, with texts, and with ids beside them."""
    folder = tmp_path_factory.mktemp("sequences")
    data, stores = build_sequences(folder), [str(folder / name) for name in ("store", "dropped")]
    for store, share in zip(stores, (0.0, 0.4), strict=True):
        embed([f"{data}/train"], tiny_model, store, max_tokens=32, store_dtype="float32", word_drop=share)
    models = {
        "in_batch": {"contrast": {"weight": 0.5, "item_drop": 0.3, "word_drop": 0.4, "item_drop_share": 0.5}},
        "full": {"item": "text+id", "loss": "full"},
        "sampled": {"item": "text+id", "loss": "sampled", "samples": 13, "sampling": "popularity"},
    }
    paths = []
    for name, model in models.items():
        # A low temperature multiplies gradients, and with them what rounding changes.
        tree = config_of(data, stores[0], temperature=0.5, **model)
        tree["run"]["name"] = name
        tree["text"]["dropped_store"] = stores[1] if name == "in_batch" else None
        tree["tables"]["init_std"] = 0.3
        (path := folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        paths.append(str(path))
    return ",".join(paths)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_hybrid_parity_of_sequences(sequence_models, ranks):
    """Negatives, copies and shares of the catalogue of all ranks, whose number need not divide the streams."""
    check_parity(ranks, sequence_models, "row_wise", "1")
