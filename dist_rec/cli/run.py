"""The verbs of a run: embed, train, evaluate, report, and doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .common import Json, Ranks, Restarts, is_main, launch_if_asked, overrides, print_json


def embed(
    data: Annotated[list[str], typer.Argument(help="Data sets, or folders above their splits.")],
    model: Annotated[str, typer.Option(help="Hugging Face folder, package:PACKAGE/FOLDER or hub:NAME.")],
    out: Annotated[str, typer.Option(help="Folder of the vector store; an existing one is extended.")],
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens, padding included, at once; 0 is 512 on CPU, 32768 on CUDA.")
    ] = 0,
    dtype: Annotated[str, typer.Option(help="Precision of the model: fp32, bf16 or fp16.")] = "fp32",
    store_dtype: Annotated[str, typer.Option(help="Precision of the store: float16 or float32.")] = "float16",
    pooling: Annotated[str, typer.Option(help="How tokens become a text: auto, mean, cls or last.")] = "auto",
    max_tokens: Annotated[
        int, typer.Option(help="Where texts without token ids are cut; 0 is as the store has them, or 128.")
    ] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overwrite: Annotated[bool, typer.Option(help="Start the store anew.")] = False,
    word_drop: Annotated[
        float, typer.Option(help="Drop each word with this probability first, for text.dropped_store.")
    ] = 0.0,
    drop_seed: Annotated[int, typer.Option(help="Of what is dropped.")] = 0,
    nproc_per_node: Ranks = 0,
    as_json: Json = False,
) -> None:
    """Vectors of the distinct texts by a frozen language model (a torchrun job).

    Killed, it goes on where it was when the same command is given again.
    """
    launch_if_asked(nproc_per_node)
    from ..text.embed import embed as run

    result = run(
        data,
        model,
        out,
        batch_tokens=batch_tokens or None,
        dtype=dtype,
        store_dtype=store_dtype,
        pooling=pooling,
        device=device,
        max_tokens=max_tokens or None,
        overwrite=overwrite,
        word_drop=word_drop,
        drop_seed=drop_seed,
    )
    if is_main():
        taken_over = f" ({result.taken_over:,} taken over)" if result.taken_over else ""
        new = f"{result.added:,} new{taken_over}"
        print(f"{out}: {result.count:,} texts, {new}, {result.texts_per_second:,.0f} texts/s")
        print_json(as_json, vars(result))


def train(
    context: typer.Context,
    config: Path,
    plan: Annotated[Path | None, typer.Option(help="Plan file of dist-rec plan --out; sets tables.plan.")] = None,
    nproc_per_node: Ranks = 0,
    max_restarts: Restarts = 0,
    as_json: Json = False,
) -> None:
    """Train a config (under torchrun, or alone), from its last good checkpoint if there is one.

    Any key is overridden by --section.key value.
    """
    from ..config import load_config

    if str(config).startswith("--"):
        raise UserError(f"the config file comes first: dist-rec train CONFIG {config} ...")
    keys = overrides(context.args)
    if plan is not None:
        keys["tables.plan"] = json.dumps(str(plan))
    loaded = load_config(config, keys)
    launch_if_asked(nproc_per_node, max_restarts)
    from ..report.table import print_evaluation
    from ..training.run import train as run

    folder = run(loaded)
    if is_main():
        evaluation = json.loads((folder / "evaluation.json").read_text())
        print_evaluation(evaluation, folder)
        print_json(as_json, {"run": str(folder), **evaluation})


def evaluate(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Run folder; its best or latest checkpoint is evaluated.")],
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    baselines: Annotated[bool, typer.Option("--baselines", help="BM25 and the cosine of frozen vectors too.")] = False,
    against: Annotated[
        Path | None, typer.Option(help="Another run of ranked items, evaluated on the same rows: paired bootstrap.")
    ] = None,
    nproc_per_node: Ranks = 0,
    as_json: Json = False,
) -> None:
    """Metrics of a trained run, per domain and per task; --section.key value overrides its config."""
    from ..config import load_config

    loaded = load_config(run / "config.yaml", overrides(context.args))
    launch_if_asked(nproc_per_node)
    from ..report.table import print_against, print_evaluation
    from ..training.evaluate import evaluate_run

    evaluation = evaluate_run(loaded, run, split, baselines, against)
    if is_main():
        print_evaluation(evaluation, run)
        if against is not None:
            print_against(evaluation["against"], evaluation["step"], run)
        print_json(as_json, {"run": str(run), **evaluation})


def report(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Run folder; its best or latest checkpoint is looked at.")],
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    rows: Annotated[int, typer.Option(help="About how many rows of the split to look at; 0 is all.", min=0)] = 100_000,
    out: Annotated[Path | None, typer.Option(help="The page; default RUN/report.html. JSON goes beside it.")] = None,
    nproc_per_node: Ranks = 0,
    as_json: Json = False,
) -> None:
    """One HTML page of a run: metrics, curves, gates, experts, distances of domains; and its numbers as JSON."""
    from ..config import load_config

    loaded = load_config(run / "config.yaml", overrides(context.args))
    launch_if_asked(nproc_per_node)
    from ..report.page import PAGE_NAME
    from ..report.page import report as make

    out = out or run / PAGE_NAME
    found = make(loaded, run, split, rows, out)
    if is_main():
        for what, why in found["left_out"].items():
            print(f"{what}: {why}")
        print(f"wrote {out} and {out.with_suffix('.json')}")
        print_json(as_json, found)


def doctor(as_json: Json = False) -> None:
    """What is installed, what fits together, what to do."""
    from ..doctor import diagnose, print_report

    diagnosis = diagnose()
    print_report(diagnosis)
    print_json(as_json, diagnosis)
    if not diagnosis["ok"]:
        raise typer.Exit(2)
