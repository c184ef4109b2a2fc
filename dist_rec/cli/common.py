"""What the verbs share: common options, config overrides, starting ranks, JSON output."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer

from ..errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Ranks = Annotated[int, typer.Option(help="Start this many ranks here, as torchrun would; leave out under torchrun.")]
Restarts = Annotated[int, typer.Option(help="Start all ranks again this often after one has failed.")]
WITH_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


def overrides(arguments: list[str]) -> dict[str, str]:
    """`--train.steps 100` and `--train.steps=100` as `{"train.steps": "100"}`; a key without value is true."""
    overrides, rest = {}, list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--") or "." not in key.split("=")[0]:
            raise UserError(f"unknown argument {key!r}: config keys are written --section.key value. See --help.")
        key, equals, value = key.removeprefix("--").partition("=")
        if not equals:
            last = not rest or rest[0].startswith("--") and "." in rest[0]
            value = "true" if last else rest.pop(0)
        overrides[key] = value
    return overrides


def launch_if_asked(nproc_per_node: int, max_restarts: int = 0) -> None:
    """Become the parent of `nproc_per_node` ranks that run this same command line."""
    from ..launch import launch, under_torchrun

    if nproc_per_node and not under_torchrun():
        sys.exit(launch(nproc_per_node, sys.argv[1:], max_restarts))


def is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def print_json(asked: bool, value: dict[str, Any]) -> None:
    if asked:
        print(json.dumps(value))
