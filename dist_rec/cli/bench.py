"""`dist-rec bench ...`: the measurements that the documents quote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Json, Ranks, print_json

app = typer.Typer(help="The measurements that the documents quote.", no_args_is_help=True)


@app.command("experiment")
def bench_experiment(
    config: Annotated[Path, typer.Argument(help="An experiment of configs/experiments.")],
    results: Annotated[Path, typer.Option(help="JSON list of results; runs that it has are not repeated.")],
    only: Annotated[list[str] | None, typer.Option(help="Glob of SPLIT/NAME/SEED; repeatable; default all.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/experiments"),
    nproc_per_node: Ranks = 1,
    as_json: Json = False,
) -> None:
    """Repeat a published protocol: every variant, split and seed of an experiment file."""
    from ..bench.experiment import print_results, run_experiment

    done = run_experiment(config, results, nproc_per_node, only or [], runs)
    print_results(done)
    print_json(as_json, {"results": done})
