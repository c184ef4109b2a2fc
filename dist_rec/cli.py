"""The console command `dist-rec`: a verb is a function with a typed signature.

The only place that parses arguments, prints errors and chooses exit codes: 0 done, 2 the user's
input is wrong, anything else a fault of ours. Heavy imports happen in the verb that needs them.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UserError

app = typer.Typer(
    name="dist-rec",
    help="Distributed training of search-and-recommendation foundation models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
shards = typer.Typer(help="Raw tables to shards; what is in them; every checksum and row.", no_args_is_help=True)
app.add_typer(shards, name="shards")

bench = typer.Typer(help="The measurements that the documents quote.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Ranks = Annotated[int, typer.Option(help="Start this many ranks here, as torchrun would; leave out under torchrun.")]
ECHO_SECONDS = 10
WITH_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


@shards.command("build")
def shards_build(
    schema: Annotated[Path, typer.Option(help="The schema.yaml that says what a row is.")],
    sources: Annotated[list[str], typer.Option("--from", help="Glob of Parquet, CSV, TSV or JSON lines; repeatable.")],
    out: Annotated[str, typer.Option(help="Folder of the data set; new or empty.")],
    join: Annotated[
        list[str] | None, typer.Option(help="Side table FILE:KEY, joined on column KEY; repeatable.")
    ] = None,
    split: Annotated[str, typer.Option(help="random:8,1,1[:by=COLUMN], time:8,1,1 or column:COLUMN.")] = "",
    tokenizer: Annotated[str, typer.Option(help="Model folder or package:PACKAGE/FOLDER; texts get token ids.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest text in tokens.")] = 32,
    vocabulary: Annotated[str, typer.Option(help="vocabulary folder of an earlier build to keep the rows of.")] = "",
    block_rows: Annotated[int, typer.Option(help="Rows of a block (a tar member).")] = 2048,
    shard_rows: Annotated[int, typer.Option(help="Rows of a shard (a tar).")] = 262144,
    workers: Annotated[int, typer.Option(help="Processes; 0 is all cores.")] = 0,
    memory_limit: Annotated[str, typer.Option(help="Of the SQL engine, such as 8GB; beyond it, disk is used.")] = "",
    seed: Annotated[int, typer.Option(help="Of a random split.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the data sets at --out.")] = False,
    as_json: Json = False,
) -> None:
    """Write shards of any data set from Parquet, CSV or JSON lines."""
    import logging

    from .data.build import Join, build, parse_split
    from .schema import load_schema

    # Values that a reused vocabulary does not know are a warning of the builder's.
    logging.basicConfig(level=logging.WARNING, format="dist-rec: %(message)s")
    joins = []
    for text in join or []:
        path, _, key = text.rpartition(":")
        if not path or not key:
            raise UserError(f"--join {text!r}: write FILE:KEY, such as items.parquet:item_id.")
        joins.append(Join(path, key))
    indexes = build(
        load_schema(schema),
        sources,
        out,
        joins=joins,
        split=parse_split(split) if split else None,
        tokenizer=tokenizer or None,
        max_tokens=max_tokens,
        vocabulary=vocabulary or None,
        block_rows=block_rows,
        shard_rows=shard_rows,
        workers=workers or None,
        memory_limit=memory_limit or None,
        seed=seed,
        overwrite=overwrite,
    )
    built = {index.split: {"rows": index.rows, "shards": len(index.shards)} for index in indexes}
    for name, entry in built.items():
        print(f"{name}: {entry['rows']:,} rows in {entry['shards']} shards")
    _print_json(as_json, {"out": out, "splits": built})


@shards.command("inspect")
def shards_inspect(
    root: str, top: Annotated[int, typer.Option(help="Most frequent ids shown.")] = 5, as_json: Json = False
) -> None:
    """Schema, domains, rows, label rates, null shares, text lengths, most frequent ids."""
    from .data.inspect import inspect, print_inspection

    inspection = inspect(root, top)
    print_inspection(inspection)
    _print_json(as_json, inspection)


@shards.command("verify")
def shards_verify(root: str, as_json: Json = False) -> None:
    """Read every checksum and every row."""
    from .data.verify import verify

    result = verify(root)
    print(f"{root}: every checksum and row is in order.")
    _print_json(as_json, result)


@app.command()
def embed(
    data: Annotated[list[str], typer.Argument(help="Data sets, or folders above their splits.")],
    model: Annotated[str, typer.Option(help="Hugging Face folder or package:PACKAGE/FOLDER.")],
    out: Annotated[str, typer.Option(help="Folder of the vector store; an existing one is extended.")],
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens, padding included, at once; 0 is 512 on CPU, 32768 on CUDA.")
    ] = 0,
    dtype: Annotated[str, typer.Option(help="Precision of the model: fp32, bf16 or fp16.")] = "fp32",
    store_dtype: Annotated[str, typer.Option(help="Precision of the store: float16 or float32.")] = "float16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overwrite: Annotated[bool, typer.Option(help="Start the store anew.")] = False,
    nproc_per_node: Ranks = 0,
    as_json: Json = False,
) -> None:
    """Vectors of the distinct texts by a frozen language model (a torchrun job)."""
    _launch_if_asked(nproc_per_node)
    from .text.embed import embed as run

    result = run(
        data,
        model,
        out,
        batch_tokens=batch_tokens or None,
        dtype=dtype,
        store_dtype=store_dtype,
        device=device,
        overwrite=overwrite,
    )
    if _is_main():
        print(f"{out}: {result.count:,} texts, {result.added:,} new, {result.texts_per_second:,.0f} texts/s")
        _print_json(as_json, vars(result))


@app.command(context_settings=WITH_OVERRIDES)
def train(context: typer.Context, config: Path, nproc_per_node: Ranks = 0, as_json: Json = False) -> None:
    """Train a config (under torchrun, or alone); any key is overridden by --section.key value."""
    from .config import load_config

    if str(config).startswith("--"):
        raise UserError(f"the config file comes first: dist-rec train CONFIG {config} ...")
    loaded = load_config(config, _overrides(context.args))
    _launch_if_asked(nproc_per_node)
    from .report import print_evaluation
    from .training.trainer import train as run

    folder = run(loaded)
    if _is_main():
        evaluation = json.loads((folder / "evaluation.json").read_text())
        print_evaluation(evaluation, folder)
        _print_json(as_json, {"run": str(folder), **evaluation})


@app.command(context_settings=WITH_OVERRIDES)
def evaluate(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Run folder; its latest checkpoint is evaluated.")],
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    nproc_per_node: Ranks = 0,
    as_json: Json = False,
) -> None:
    """Metrics of a trained run, per domain and per task; --section.key value overrides its config."""
    from .config import load_config

    loaded = load_config(run / "config.yaml", _overrides(context.args))
    _launch_if_asked(nproc_per_node)
    from .report import print_evaluation
    from .training.evaluate import evaluate_run

    evaluation = evaluate_run(loaded, run, split)
    if _is_main():
        print_evaluation(evaluation, run)
        _print_json(as_json, {"run": str(run), **evaluation})


@bench.command("experiment")
def bench_experiment(
    config: Annotated[Path, typer.Argument(help="An experiment of configs/experiments.")],
    results: Annotated[Path, typer.Option(help="JSON list of results; runs that it has are not repeated.")],
    only: Annotated[list[str] | None, typer.Option(help="Glob of SPLIT/NAME/SEED; repeatable; default all.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/experiments"),
    nproc_per_node: Ranks = 1,
    as_json: Json = False,
) -> None:
    """Repeat a published protocol: every variant, split and seed of an experiment file."""
    from .bench.experiment import print_results, run_experiment

    done = run_experiment(config, results, nproc_per_node, only or [], runs)
    print_results(done)
    _print_json(as_json, {"results": done})


@app.command()
def doctor(as_json: Json = False) -> None:
    """What is installed, what fits together, what to do."""
    from .doctor import diagnose, print_report

    diagnosis = diagnose()
    print_report(diagnosis)
    _print_json(as_json, diagnosis)
    if not diagnosis["ok"]:
        raise typer.Exit(2)


def _overrides(arguments: list[str]) -> dict[str, str]:
    """`--train.steps 100` and `--train.steps=100` as `{"train.steps": "100"}`."""
    overrides, rest = {}, list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--") or "." not in key.split("=")[0]:
            raise UserError(f"unknown argument {key!r}: config keys are written --section.key value. See --help.")
        key, equals, value = key.removeprefix("--").partition("=")
        if not equals:
            if not rest:
                raise UserError(f"--{key} has no value.")
            value = rest.pop(0)
        overrides[key] = value
    return overrides


def _launch_if_asked(nproc_per_node: int) -> None:
    """Become the parent of `nproc_per_node` ranks that run this same command line."""
    from .launch import launch, under_torchrun

    if nproc_per_node and not under_torchrun():
        sys.exit(launch(nproc_per_node, sys.argv[1:]))


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _print_json(asked: bool, value: dict[str, Any]) -> None:
    if asked:
        print(json.dumps(value))


def main() -> None:
    """Run a verb and end with its exit code.

    A rank ends without Python's own clean-up, which could wait for ranks and threads that may be gone.
    """
    code = 0
    try:
        app(standalone_mode=False)
    except UserError as error:
        _complain(str(error))
        code = 2
    except typer.Exit as stop:
        code = stop.exit_code
    except typer.Abort:
        code = 130
    except Exception as error:
        code = _end_of(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(code)
    sys.exit(code)


def _complain(message: str) -> None:
    """Say the user's fault on stderr, once for all ranks that meet it."""
    from .launch import first_to_say

    if first_to_say(message):
        # Before the ranks have met, a fault belongs to none of them.
        met = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
        rank = f"rank {os.environ['RANK']}: " if met and int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"dist-rec: {rank}{message}", file=sys.stderr)


def _end_of(error: Exception) -> int:
    """Exit code of an exception that is no UserError, after saying what there is to say."""
    from .launch import first_to_say, is_echo

    if hasattr(error, "exit_code") and hasattr(error, "show"):
        if first_to_say(str(error)):
            error.show()
        return error.exit_code
    if is_echo(error):
        # If the lost rank was of this host, its agent ends this one meanwhile: the cause is told there.
        time.sleep(ECHO_SECONDS)
        print(f"dist-rec: rank {os.environ['RANK']}: lost another rank: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    if first_to_say(repr(error)):
        traceback.print_exception(error)
    return 1
