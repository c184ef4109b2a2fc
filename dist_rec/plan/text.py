"""Answers in the terminal: tables, ranks as bars, reasons, clusters side by side."""

from __future__ import annotations

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .answer import GIB, Answer, Refused
from .explain import explain, named
from .ways_out import failure_in_words

# Without a terminal nobody wraps lines; with one, its own width holds.
WIDTH = 118
# Tables, and rows of bars, that are shown unless all are asked for.
MOST_TABLES, MOST_BARS = 24, 16
BAR = 24


def console() -> Console:
    made = Console()
    return made if made.is_terminal else Console(width=WIDTH)


def print_answer(answer: Answer, every_table: bool = False) -> None:
    out = console()
    cluster = answer.cluster
    hosts = f"{cluster.hosts} host{'s' if cluster.hosts > 1 else ''} of {cluster.ranks_per_host}"
    out.print(
        f"[bold]{escape(cluster.name)}[/]: {cluster.ranks} rank{'s' if cluster.ranks > 1 else ''} ({hosts}), "
        f"{answer.capacity / GIB:.1f} GiB each for tables and dense model, {answer.rows:,} rows a rank and step",
        highlight=False,
    )
    if answer.planned is None:
        _print_failure(out, answer)
        _print_dense(out, answer)
        return
    _print_tables(out, answer, every_table)
    _print_why(out, answer, every_table)
    _print_ranks(out, answer)
    _print_dense(out, answer)
    _print_step(out, answer)


def _print_failure(out: Console, answer: Answer) -> None:
    say(out, f"[bold red]Does not fit.[/] {escape(failure_in_words(answer))}")
    if answer.ways:
        say(out, "Ways out, each planned and fitting by itself:")
    for way in answer.ways:
        say(out, f"  - {escape(str(way))}")
    if answer.tried:
        say(out, f"Tried, and does not make it fit: {escape('; '.join(answer.tried))}.")


def say(out: Console, text: str) -> None:
    out.print(text, highlight=False, soft_wrap=not out.is_terminal)


def table_of(title: str, *columns: str, left: int = 1) -> Table:
    heading = Text(title, style="italic", no_wrap=True)
    table = Table(title=heading, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", overflow="fold")
    return table


def _shown_tables(answer: Answer, every_table: bool) -> tuple[list[str], int]:
    """The tables that cost most, and how many are left out."""
    chosen = answer.planned.chosen
    names = sorted(chosen, key=lambda n: (-chosen[n].work, -answer.table_bytes(n), n))
    shown = names if every_table else names[:MOST_TABLES]
    return shown, len(names) - len(shown)


def _print_tables(out: Console, answer: Answer, every_table: bool) -> None:
    planned = answer.planned
    table = table_of(
        "tables: the time of a shard, and GiB of weights and optimizer state on all ranks",
        "table", "cut", "kernel", "ranks", "rows", "dim", "GiB", "ms look up", "exchange", "backward", "exchange",
        left=4,
    )  # fmt: skip
    specs = {s.name: s for s in answer.request.specs}
    shown, more = _shown_tables(answer, every_table)
    for name in shown:
        option, spec = planned.chosen[name], specs[name]
        cost = option.cost
        table.add_row(
            escape(name),
            named(option),
            option.kernel + (f" {spec.precision}" if spec.precision != "fp32" else ""),
            _ranks(planned.ranks[name], answer.cluster.ranks),
            f"{spec.rows:,}",
            str(spec.dim),
            f"{answer.table_bytes(name) / GIB:.3f}",
            _ms(cost.forward_compute + cost.prefetch),
            _ms(cost.forward_comms),
            _ms(cost.backward_compute),
            _ms(cost.backward_comms),
        )
    out.print(table)
    if more:
        say(out, f"and {more} tables that cost less (--all-tables shows them)\n")


def _print_why(out: Console, answer: Answer, every_table: bool) -> None:
    why = explain(answer)
    shown, _ = _shown_tables(answer, every_table)
    say(out, "why")
    # Tables of one reason stand together.
    together: dict[str, list[str]] = {}
    for name in shown:
        together.setdefault(why[name], []).append(name)
    for reason, names in together.items():
        say(out, f"  {escape(', '.join(names))}: {escape(reason)}")
    out.print()


def _ranks(ranks: tuple[int, ...], world: int) -> str:
    if len(ranks) == 1:
        return str(ranks[0])
    if len(set(ranks)) == world:
        return f"all {world}"
    if list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks)) if len(ranks) <= 4 else f"{len(set(ranks))} of {world}"


def _ms(value: float) -> str:
    return "0" if value == 0 else f"{value:.3f}" if value >= 0.01 else f"{value:.1e}"


def _bar(share: float) -> str:
    filled = round(max(0.0, min(share, 1.0)) * BAR)
    return "█" * filled + "·" * (BAR - filled)


def _print_ranks(out: Console, answer: Answer) -> None:
    """Memory against what a rank has, time against the slowest; many ranks in groups, each by its highest."""
    planned, used = answer.planned, answer.used()
    ms = planned.per_rank.ms
    group = -(-len(ms) // MOST_BARS)
    what = f"groups of {group} ranks, the highest of each" if group > 1 else "ranks"
    table = table_of(f"{what}: memory with dense, time of tables", "rank", "memory", "GiB", "time", "ms")
    for start in range(0, len(ms), group):
        stop = min(start + group, len(ms))
        ranks = str(start) if stop - start == 1 else f"{start}-{stop - 1}"
        high, slow = int(used[start:stop].max()), float(ms[start:stop].max())
        mark = " *" if start <= planned.bottleneck < stop else ""
        bars = _bar(high / answer.capacity), _bar(slow / max(ms.max(), 1e-12))
        table.add_row(ranks + mark, bars[0], f"{high / GIB:.3f}", bars[1], _ms(slow))
    for column in (1, 3):
        table.columns[column].justify = "left"
    out.print(table)
    fullest = int(np.argmax(used))
    say(
        out,
        f"* bottleneck: rank {planned.bottleneck}, {_ms(float(ms.max()))} ms; imbalance {planned.imbalance:.2f} "
        f"(slowest over mean). Fullest: rank {fullest}, {used[fullest] / GIB:.3f} of {answer.capacity / GIB:.1f} GiB. "
        f"Planned in {planned.seconds:.2f} s.\n",
    )


def _print_dense(out: Console, answer: Answer) -> None:
    told = answer.dense.describe(answer.cluster, answer.rows)
    parameters = told["parameters"]
    names = f"{parameters['towers']:,} parameters in towers"
    if parameters["language_model"]:
        names += f", {parameters['language_model']:,} in the language model"
    parts = ["towers", "language_model"] if parameters["language_model"] else ["towers"]
    columns = [*parts, "buffers", "activations", "total"]
    heads = ["ZeRO", *(c.replace("_", " ") for c in columns), "exchange ms"]
    say(out, f"dense: {names}, {told['precision']}")
    table = table_of("MiB of a rank under each ZeRO stage", *heads)
    for stage, taken in told["bytes_by_stage"].items():
        mark = " (config)" if int(stage) == told["stage"] else ""
        values = [f"{taken[c] / 2**20:,.1f}" for c in columns]
        table.add_row(stage + mark, *values, _ms(taken["comms_ms"]))
    out.print(table)


def _print_step(out: Console, answer: Answer) -> None:
    parts = ", ".join(f"{name.replace('_', ' ')} {_ms(ms)}" for name, ms in answer.step.items())
    say(
        out,
        f"[bold]step: {answer.step_ms:.3g} ms, {answer.rows_per_s:,.0f} rows/s[/] by estimate ({parts} ms)\nassuming",
    )
    for assumption in answer.assumptions():
        say(out, f"  - {escape(assumption)}")


def print_side_by_side(several: list[Answer | Refused]) -> None:
    """Several clusters, a row each; then, of those where it does not fit, why and what to do."""
    out = console()
    answers = [one for one in several if isinstance(one, Answer)]
    table = table_of(
        "the same tables on several clusters",
        "cluster", "ranks", "rows a rank", "fits", "fullest GiB", "of", "slowest rank", "imbalance", "tables ms",
        "step ms", "rows/s",
    )  # fmt: skip
    for answer in several:
        if isinstance(answer, Refused):
            table.add_row(escape(answer.name), "-", "-", "[red]cannot[/]", *["-"] * 7)
            continue
        name, ranks = escape(answer.cluster.name), str(answer.cluster.ranks)
        of = f"{answer.capacity / GIB:.1f}"
        if answer.planned is None:
            table.add_row(name, ranks, f"{answer.rows:,}", "[red]no[/]", "-", of, "-", "-", "-", "-", "-")
            continue
        planned = answer.planned
        table.add_row(
            name, ranks, f"{answer.rows:,}", "yes", f"{answer.used().max() / GIB:.3f}", of, str(planned.bottleneck),
            f"{planned.imbalance:.2f}", _ms(planned.rated_ms), f"{answer.step_ms:.3g}", f"{answer.rows_per_s:,.0f}",
        )  # fmt: skip
    out.print(table)
    cuts = table_of("how the tables that cost most are cut", "table", *[a.cluster.name for a in answers])
    fitting = [a for a in answers if a.planned is not None]
    for name in _shown_tables(fitting[0], False)[0] if fitting else []:
        cuts.add_row(escape(name), *(named(a.planned.chosen[name]) if a.planned is not None else "-" for a in answers))
    if fitting:
        out.print(cuts)
    for answer in several:
        if isinstance(answer, Refused):
            say(out, f"[bold]{escape(answer.name)}[/] cannot: {escape(answer.why)}")
        elif answer.planned is None:
            out.print(f"[bold]{escape(answer.cluster.name)}[/]", highlight=False)
            _print_failure(out, answer)
    said = list(dict.fromkeys(a for answer in answers for a in answer.assumptions()))
    say(out, "assuming")
    for assumption in said:
        say(out, f"  - {escape(assumption)}")
