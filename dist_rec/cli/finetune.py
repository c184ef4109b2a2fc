"""The verb `finetune`: a new domain from a foundation's checkpoint, and how many rows it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .common import Json, Ranks, Restarts, is_main, launch_if_asked, overrides, print_json

PRESETS = ("none", "L0", "L0+L1", "adaptor", "lora", "head")


def finetune(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Run folder of the foundation; its best or newest checkpoint is taken.")],
    data: Annotated[str, typer.Option(help="The new domain's data set: the folder above its splits, or its train.")],
    name: Annotated[str | None, typer.Option(help="Of the new run; else RUN-DATA, beside RUN.")] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            help=f"What stays: {', '.join(PRESETS)}; else none, or adaptor of a sequence model. Repeat it with --curve."
        ),
    ] = None,
    domains: Annotated[
        str, typer.Option(help="What a new domain begins as: mean, nearest (by texts), or a domain's name.")
    ] = "mean",
    train: Annotated[
        list[str] | None, typer.Option(help="Glob of parameters that train whatever --freeze says; repeat it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would train and what would stay.")] = False,
    old: Annotated[
        bool, typer.Option("--old/--no-old", help="Evaluate the earlier runs' test rows before and after.")
    ] = True,
    curve: Annotated[
        str | None, typer.Option(help="Numbers of rows, as 0,64,256,all: train each, compare, and draw.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="With --curve: samples and starts for each number of rows.")] = 3,
    out: Annotated[Path | None, typer.Option(help="With --curve: its folder; else RUN-DATA-curve, beside RUN.")] = None,
    nproc_per_node: Ranks = 0,
    max_restarts: Restarts = 0,
    as_json: Json = False,
) -> None:
    """Start from a trained run and finetune it on a new domain's data, built with `shards build --extends`.

    Batch size, epochs and warm-up follow the number of rows; any key is overridden by --section.key value.
    """
    presets = freeze or []
    if unknown := [preset for preset in presets if preset not in PRESETS]:
        raise UserError(f"--freeze {unknown[0]} is not known: there is {', '.join(PRESETS)}.")
    if len(presets) > 1 and curve is None:
        raise UserError("--freeze is given several times: one run has one; with --curve each gets a line.")
    if dry_run and curve is not None:
        raise UserError("--dry-run is of one run: leave out --curve.")
    keys = overrides(context.args)
    if not dry_run:
        launch_if_asked(nproc_per_node, max_restarts)
    from ..finetune.derive import Wishes, derive
    from ..training.process import world_size

    ranks = max(world_size(), nproc_per_node)
    wishes = Wishes(
        name=name, freeze=presets[0] if presets else None, domains=domains, train_names=train or [], keys=keys
    )
    if curve is not None:
        from ..finetune.curve import draw_curve, parse_sizes

        found = draw_curve(run, data, wishes, presets, parse_sizes(curve), seeds, out, ranks)
        if is_main():
            print_json(as_json, found)
        return
    config, _, _ = derive(run, data, wishes, ranks)
    if dry_run:
        from ..finetune.describe import describe, print_description
        from ..training.prepare import prepare
        from ..training.resume import find_earlier

        # Where a run of this name is there already, what the command would say.
        find_earlier(config)
        told = describe(prepare(config, ranks))
        print_description(told)
        print_json(as_json, told)
        return
    from ..report.table import print_evaluation
    from ..training.run import train as train_run
    from ..training.start.old_domains import compared, print_old, read_old

    folder = train_run(config, look_back=old)
    if is_main():
        evaluation = json.loads((folder / "evaluation.json").read_text())
        print_evaluation(evaluation, folder)
        print_old(folder)
        print_json(as_json, {"run": str(folder), **evaluation, "old_domains": compared(read_old(folder))})
