"""What of a finetuned run trains and what stays, counted, before any rank starts: `dist-rec finetune --dry-run`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..training.finetuning import empty_model, of_managed
from ..training.prepared import Prepared
from ..training.start.foundation import with_starts
from ..training.start.freeze import LANGUAGE_MODEL, TABLES, frozen_names
from ..training.start.origin import MEAN

COUNTS = ("trained", "frozen", "new")


def describe(prepared: Prepared) -> dict[str, Any]:
    """Parameters by group of modules and by table: trained, frozen, and new (in neither table nor rows before).

    `new` are among the trained or the frozen ones: rows of further domains, tables of new ids, a language model that
    the foundation did not train. `domains` says what further domains begin as, `left_out` which features are not read,
    `managed` of which tables new ids are not trained.
    """
    config, foundation = prepared.config, prepared.foundation
    origin = prepared.origin
    if foundation is not None:
        origin = with_starts(origin, foundation, config, prepared.indexes["train"], prepared.store)
    names, model = prepared.names, empty_model(prepared, prepared.schema)
    frozen = frozen_names(config.finetune, names)
    saved = foundation.saved.manifest.dense if foundation else {}
    further = len(prepared.schema.domains.names) - len(origin.domains)
    groups: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        counts = groups.setdefault(group_of(name), dict.fromkeys(COUNTS, 0))
        stays = name in frozen or not parameter.requires_grad
        counts["frozen" if stays else "trained"] += parameter.numel()
        if foundation and name not in saved:
            counts["new"] += parameter.numel()
        elif name in names.own:
            counts["new"] += further * math.prod(parameter.shape[1:])
    tables = {}
    for spec in prepared.specs:
        size, stays = spec.rows * spec.dim, TABLES + spec.name in frozen
        is_new = spec.name not in origin.tables
        tables[spec.name] = {
            "rows": spec.rows,
            "dim": spec.dim,
            "trained": 0 if stays else size,
            "frozen": size if stays else 0,
            "new": size if is_new else 0,
        }
    every = [*groups.values(), *tables.values()]
    return {
        "run": str(config.run_folder),
        "foundation": {"run": origin.run, "step": origin.step, "domains": origin.domains},
        "freeze": config.finetune.freeze,
        "domains": origin.starts if names.own else {},
        "left_out": origin.left_out,
        "managed": of_managed(prepared),
        "rows": sum(prepared.indexes["train"].rows_of(d) for d in _read(prepared)),
        "batch_size": config.data.batch_size,
        "epochs": config.train.epochs,
        "warmup_steps": config.dense.warmup_steps,
        "modules": groups,
        "tables": tables,
        "total": {count: sum(entry[count] for entry in every) for count in COUNTS},
    }


def _read(prepared: Prepared) -> Iterable[str]:
    return prepared.config.data.domains or prepared.schema.domains.names


def group_of(name: str) -> str:
    """The group of modules that a dense parameter is counted with."""
    if name.startswith(LANGUAGE_MODEL):
        return LANGUAGE_MODEL.rstrip(".") + (" adapters" if ".lora_" in name else "")
    first, _, rest = name.partition(".")
    if first == "entities" and ".gate." in name:
        return f"entities.{rest.partition('.')[0]}.gate"
    if first == "body" and rest.startswith("levels."):
        return f"body.{rest.split('.')[2]}"
    return f"{first}.{rest.partition('.')[0]}" if first in ("body", "entities") else first


def print_description(told: dict[str, Any]) -> None:
    """The same as tables."""
    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say(f"{told['run']} starts from {told['foundation']['run']}, step {told['foundation']['step']}")
    for domain, start in told["domains"].items():
        known = told["foundation"]["domains"]
        say(f"domain {domain} begins as {'the mean of ' + ', '.join(known) if start == MEAN else start}")
    if told["left_out"]:
        say(f"left out, for the foundation did not read them: {', '.join(told['left_out'])}")
    for one in told["managed"]:
        say(one)
    say(
        f"{told['rows']:,} rows, batches of {told['batch_size']:,}, {told['epochs']} epochs, "
        f"{told['warmup_steps']} steps of warm-up"
    )
    table = Table(
        title=f"parameters, freeze: {told['freeze']}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("part")
    for column in COUNTS:
        table.add_column(column, justify="right")
    for name, counts in told["modules"].items():
        table.add_row(name, *(f"{counts[c]:,}" for c in COUNTS))
    table.add_section()
    for name, counts in told["tables"].items():
        table.add_row(f"tables.{name} {counts['rows']:,} x {counts['dim']}", *(f"{counts[c]:,}" for c in COUNTS))
    table.add_section()
    table.add_row("all", *(f"{told['total'][c]:,}" for c in COUNTS))
    console.print(table)
