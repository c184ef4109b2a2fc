"""Sequence data sets for UniSRec: one row a user, a catalogue, and mixtures to pretrain on.

    python shards/recipes/sequences.py --out shards/built/seq_scientific --domains scientific
    python shards/recipes/sequences.py --out shards/built/seq_pretrain --train-only \\
        --domains cds,movies_tv,games,beauty,toys,ml1m --overlap-with scientific
    python shards/recipes/sequences.py --out shards/built/seq_scientific_after --domains scientific \\
        --extends shards/built/seq_pretrain

Writes OUT/train (a sequence a row, every position a target), OUT/valid and OUT/test (the item is held out),
OUT/catalogue (an item a row) and OUT/statistics.json. Sequences longer than --max-length + 1 are cut into
windows that overlap by one event. With a target named (--overlap-with, --without-overlap) OUT/overlap.json says
how many users and items it shares with every domain, counted from both sides.

A data set to finetune a pretrained run on --extends what that was trained on.

Which public domains there are: `sequence_sources.py`. The paper's own domains (amazon_food and so on), for
whoever has the raw files: `amazon2018.py`. Unlike the others these look for their files in --raw itself. A domain of
your own, of any other name, comes from --interactions and --items: `own_sequences.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from amazon2018 import RAW_SOURCES
from common import SCHEMAS, arguments, build_parts, positive, raw_root, run, workspace, write_part
from overlap import Overlap
from own_sequences import COLUMNS, OF_ITEMS, TEXTS, Own
from sequence_rows import Sequences, capped, framed, sequence_tables, statistics, training_only, without
from sequence_sources import SOURCES as PUBLIC_SOURCES

from dist_rec.errors import UserError, nearest
from dist_rec.schema import Schema, load_schema

Source = Callable[[str, Path], Sequences]
SOURCES: dict[str, Source] = PUBLIC_SOURCES | RAW_SOURCES
STATISTICS_NAME = "statistics.json"
OVERLAP_NAME = "overlap.json"


def sequence_schema(domains: Sequence[str], max_length: int = 50, sources: Mapping[str, Source] = SOURCES) -> Schema:
    """The common schema, with only the named domains (in the schema's order, then one's own).

    Raises:
        UserError: a name is unknown, or there is none; says which are known.
    """
    schema = load_schema(SCHEMAS / "sequences.yaml")
    _check_names(domains, "--domains", sources)
    features = {
        name: dataclasses.replace(feature, max_length=max_length) if feature.role == "history" else feature
        for name, feature in schema.features.items()
    }
    names = [*schema.domains.names, *(name for name in domains if name not in schema.domains.names)]
    kept = dataclasses.replace(schema.domains, names=[name for name in names if name in domains])
    return dataclasses.replace(schema, domains=kept, features=features)


def _check_names(names: Sequence[str], option: str, sources: Mapping[str, Source]) -> None:
    known = ", ".join(sources)
    if not names:
        raise UserError(f"{option} names no domain; known: {known}.")
    for name in names:
        if name not in sources:
            raise UserError(
                f"{option}: unknown domain {name!r}.{nearest(name, sources)} Known: {known}. One of your own needs "
                "--interactions and --items."
            )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def own_sources(options: argparse.Namespace) -> dict[str, Source]:
    """The domain that --interactions and --items are of, if they are given.

    Raises:
        UserError: they are half given, or not for one new name; a column is renamed that there is not.
    """
    if options.interactions is None and options.items is None:
        if given := [f"--{name}" for name in ("columns", "text", "core") if getattr(options, name) is not None]:
            raise UserError(f"{' and '.join(given)}: of a domain of your own, which needs --interactions and --items.")
        return {}
    if options.interactions is None or options.items is None:
        raise UserError("a domain of your own needs both --interactions and --items.")
    named = dict.fromkeys([*options.domains, *options.without_overlap, *options.overlap_with])
    new = [name for name in named if name not in SOURCES]
    if len(new) != 1 or not re.fullmatch(r"\w+", new[0]):
        raise UserError(
            "--interactions and --items are of one domain of your own: --domains (or --overlap-with) has to name it, "
            f"in letters, digits and _, and names {', '.join(new) or 'none'} beside the known ones."
        )
    columns = dict(COLUMNS)
    for pair in options.columns or ():
        ours, _, name = pair.partition("=")
        if ours not in (*COLUMNS, OF_ITEMS) or not name:
            raise UserError(f"--columns {pair}: is {' or '.join(f'{one}=NAME' for one in (*COLUMNS, OF_ITEMS))}.")
        columns[ours] = name
    texts = None if options.text is None else tuple(options.text)
    own = Own(options.interactions, options.items, columns, texts, options.core or 1)
    return {new[0]: lambda domain, _: own.sequences(domain)}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = arguments(__doc__)
    listed = {"metavar": "A,B", "action": "extend", "type": _names}
    options.add_argument("--domains", **listed, required=True, help="comma-separated")
    options.add_argument("--max-length", type=positive, default=50, help="longest history (default: 50)")
    options.add_argument("--train-only", action="store_true", help="no valid and test: to pretrain on")
    options.add_argument("--max-rows-per-domain", type=positive, help="keep whole users up to this")
    options.add_argument("--overlap-with", **listed, default=[], help="targets to compare with")
    left_out = "targets whose users and items are left out (needs --train-only)"
    options.add_argument("--without-overlap", **listed, default=[], help=left_out)
    own = options.add_argument_group("a domain of your own, which --domains names")
    own.add_argument("--interactions", metavar="FILES", help="who had what when: Parquet, CSV, TSV, JSON lines")
    own.add_argument("--items", metavar="FILES", help="an item a row, with its texts")
    pairs = listed | {"metavar": "user=A,item=B,time=C"}
    own.add_argument(
        "--columns", **pairs, help=f"theirs, where not user, item, time; {OF_ITEMS}=D where --items calls it otherwise"
    )
    own.add_argument("--text", **listed, help=f"texts of items (default: {', '.join(TEXTS)}, if there)")
    own.add_argument("--core", metavar="N", type=positive, help="least events of users and items (default: 1)")
    return options


def report(out: Path, counts: dict[str, dict], overlap: Overlap) -> None:
    """Write and print what was counted."""
    (out / STATISTICS_NAME).write_text(json.dumps(counts, indent=2) + "\n")
    for domain, count in counts.items():
        rows = ", ".join(f"{number:,} {split}" for split, number in count["rows"].items() if number)
        print(
            f"{domain}: {count['users']:,} users, {count['items']:,} items, {count['interactions']:,} interactions; "
            f"rows {rows}; {count['positions']:,} training positions"
            + (f"; targets from {' to '.join(count['dates'])}" if count["dates"] else "")
        )
        for reason, number in count["left_out"].items():
            if number:
                print(f"    {number:,} {reason}")
    if overlap.targets:
        found = {"targets": overlap.totals(), "pairs": overlap.pairs}
        (out / OVERLAP_NAME).write_text(json.dumps(found, indent=2) + "\n")
        print("\n".join(overlap.in_words()))


def main() -> None:
    from dist_rec.data.build import Split

    options = parser().parse_args()
    sources = SOURCES | own_sources(options)
    schema = sequence_schema(options.domains, options.max_length, sources)
    named = list(dict.fromkeys([*options.without_overlap, *options.overlap_with]))
    if named:
        _check_names(named, "--overlap-with and --without-overlap", sources)
    if options.without_overlap and not options.train_only:
        raise UserError("--without-overlap leaves items out that valid and test rows are about: add --train-only.")
    if both := [name for name in options.domains if name in options.without_overlap]:
        raise UserError(f"--without-overlap would leave nothing of {', '.join(both)}: take it out of --domains.")
    root = raw_root(options.raw)
    overlap = Overlap([sources[name](name, root) for name in named], options.without_overlap)
    counts, parts = {}, []
    with workspace(options.out) as folder:
        for domain in schema.domains.names:
            sequences = sources[domain](domain, root)
            if options.train_only:
                sequences = training_only(sequences)
            users, items = overlap.add(sequences)
            if options.without_overlap:
                sequences = without(sequences, users, items)
            sequences = capped(framed(sequences, options.max_length), options.max_rows_per_domain, options.seed)
            if not len(sequences.targets):
                raise UserError(f"domain {domain!r} has no sequence of two events or more: take it out of --domains.")
            counts[domain] = statistics(sequences)
            parts.append(write_part(sequence_tables(sequences), folder, domain))
        if not any(count["rows"]["train"] for count in counts.values()):
            raise UserError(
                f"{', '.join(counts)}: no user has a training row, which takes four events: the newest is held out for "
                "test, the one before for valid, and of two that are left the second is what is learnt."
            )
        build_parts(schema, parts, Split(kind="column", column="split"), options)
    report(Path(options.out), counts, overlap)


if __name__ == "__main__":
    run(main)
