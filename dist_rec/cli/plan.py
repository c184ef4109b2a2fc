"""`dist-rec plan`: will these tables fit that cluster, how, how fast, and if not, what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .common import Json, overrides, print_json


def plan(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="The training config; any key is overridden by --section.key value.")],
    cluster: Annotated[
        str | None,
        typer.Option(help="What to plan for: 64xh100, a machine of configs/clusters, or a machine file; default here."),
    ] = None,
    clusters: Annotated[str | None, typer.Option(help="Several of them, by commas, side by side.")] = None,
    world: Annotated[str | None, typer.Option(help="Ranks instead of the cluster's; several by commas.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="What if; repeatable: tables.TABLE.rows=2e9 (or dim, sharding, precision, kernel, size, hash, "
            "managed), features.FEATURE.mean_length=30, or any key of the config.",
        ),
    ] = None,
    schema: Annotated[Path | None, typer.Option(help="Plan for this schema.yaml before any data is built.")] = None,
    out: Annotated[Path | None, typer.Option(help="Plan file to write, for train --plan.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write: memory and time of ranks by table.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run the plan and others here for some steps: estimated beside measured.")
    ] = False,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Sizes for tables from how often ids occur in the data set.")
    ] = False,
    all_tables: Annotated[bool, typer.Option("--all-tables", help="Print every table of hundreds.")] = False,
    as_json: Json = False,
) -> None:
    """Will these tables fit that cluster, how, how fast, and if not, what to change.

    Needs no process group, no GPU, and no memory for weights.
    """
    if str(config).startswith("--"):
        raise UserError(f"the config file comes first: dist-rec plan CONFIG {config} ...")
    keys = overrides(context.args)
    from ..plan.command import Wishes, run

    wishes = Wishes(
        cluster=cluster,
        clusters=clusters,
        world=world,
        out=out,
        plot=plot,
        verify=verify,
        suggest=suggest,
        all_tables=all_tables,
    )
    code, told = run(config, keys, set_ or [], schema, wishes)
    print_json(as_json, told)
    if code:
        raise typer.Exit(code)
