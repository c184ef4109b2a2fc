"""`dist-rec shards ...`: build, append, sample, inspect, verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .common import Json, print_json

if TYPE_CHECKING:
    from ..data.sources import Join

app = typer.Typer(help="Raw tables to shards; what is in them; every checksum and row.", no_args_is_help=True)


@app.command("build")
def shards_build(
    schema: Annotated[Path, typer.Option(help="The schema.yaml that says what a row is.")],
    sources: Annotated[list[str], typer.Option("--from", help="Glob of Parquet, CSV, TSV or JSON lines; repeatable.")],
    out: Annotated[str, typer.Option(help="Folder of the data set; new or empty.")],
    join: Annotated[
        list[str] | None, typer.Option(help="Side table FILE:KEY, joined on column KEY; repeatable.")
    ] = None,
    split: Annotated[str, typer.Option(help="random:8,1,1[:by=COLUMN], time:8,1,1 or column:COLUMN.")] = "",
    tokenizer: Annotated[str, typer.Option(help="Model folder or package:PACKAGE/FOLDER; texts get token ids.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest text in tokens; 0 is 32, or as in --extends.")] = 0,
    prefix: Annotated[
        list[str] | None, typer.Option(help="ROLE=TEXT before each text of a role, as item='passage: '; repeatable.")
    ] = None,
    vocabulary: Annotated[str, typer.Option(help="vocabulary folder of an earlier build to keep the rows of.")] = "",
    extends: Annotated[
        str, typer.Option(help="Data set to add domains to: its schema, vocabularies, tokenizer and prefixes are kept.")
    ] = "",
    history_from: Annotated[
        list[str] | None,
        typer.Option(help="With --extends: glob of earlier tables, whose rows only feed histories; repeatable."),
    ] = None,
    block_rows: Annotated[int, typer.Option(help="Rows of a block (a tar member).")] = 8192,
    shard_rows: Annotated[int, typer.Option(help="Rows of a shard (a tar).")] = 262144,
    workers: Annotated[int, typer.Option(help="Processes; 0 is all cores.")] = 0,
    memory_limit: Annotated[str, typer.Option(help="Of the SQL engine, such as 8GB; beyond it, disk is used.")] = "",
    seed: Annotated[int, typer.Option(help="Of a random split.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the data sets at --out.")] = False,
    as_json: Json = False,
) -> None:
    """Write shards of any data set from Parquet, CSV or JSON lines."""
    import logging

    from ..data.build import build, parse_split
    from ..schema import load_schema
    from ..strict import read_yaml

    # Values that a reused vocabulary does not know are a warning of the builder's.
    logging.basicConfig(level=logging.WARNING, format="dist-rec: %(message)s")
    indexes = build(
        read_yaml(schema) if extends else load_schema(schema),
        sources,
        out,
        joins=_joins(join),
        split=parse_split(split) if split else None,
        tokenizer=tokenizer or None,
        max_tokens=max_tokens or None,
        prefixes=_prefixes(prefix),
        vocabulary=vocabulary or None,
        extends=extends or None,
        history_from=history_from or [],
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
    print_json(as_json, {"out": out, "splits": built})


@app.command("append")
def shards_append(
    dataset: Annotated[str, typer.Argument(help="Local folder with index.json: a data set, or one split of it.")],
    sources: Annotated[list[str], typer.Option("--from", help="Glob of the new rows' tables; repeatable.")],
    join: Annotated[list[str] | None, typer.Option(help="Side table FILE:KEY; repeatable.")] = None,
    history_from: Annotated[
        list[str] | None,
        typer.Option(help="Glob of earlier tables, whose rows only feed the new rows' histories; repeatable."),
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="Folder of the data set's tokenizer, if it lies elsewhere now.")] = "",
    block_rows: Annotated[int, typer.Option(help="Rows of a block; 0 is as the data set was built.")] = 0,
    shard_rows: Annotated[int, typer.Option(help="Rows of a shard; 0 is as the data set was built.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes; 0 is all cores.")] = 0,
    memory_limit: Annotated[str, typer.Option(help="Of the SQL engine, such as 8GB; beyond it, disk is used.")] = "",
    as_json: Json = False,
) -> None:
    """Append rows to a data set, whose schema and vocabularies stay; readers are not disturbed."""
    import logging

    from ..data.append import append

    # Unknown values and empty histories are warnings of the builder's.
    logging.basicConfig(level=logging.WARNING, format="dist-rec: %(message)s")
    index = append(
        dataset,
        sources,
        joins=_joins(join),
        history_from=history_from or [],
        tokenizer=tokenizer or None,
        block_rows=block_rows or None,
        shard_rows=shard_rows or None,
        workers=workers or None,
        memory_limit=memory_limit or None,
    )
    new = index.between(index.generation - 1, index.generation)
    print(
        f"{dataset}: generation {index.generation} of {new.rows:,} rows in {len(new.shards)} shards; "
        f"{index.rows:,} rows in all"
    )
    appended = {"generation": index.generation, "appended": new.rows, "shards": len(new.shards), "rows": index.rows}
    print_json(as_json, {"dataset": dataset} | appended)


@app.command("sample")
def shards_sample(
    source: Annotated[str, typer.Argument(help="Folder or URL with index.json: a data set, or one split of it.")],
    rows: Annotated[int, typer.Option(help="How many.")],
    out: Annotated[str, typer.Option(help="Folder of the sample; new or empty.")],
    seed: Annotated[int, typer.Option(help="Of the draw; fewer rows of one seed are among its more.")] = 0,
    domain: Annotated[list[str] | None, typer.Option(help="Only rows of this domain; repeatable.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the data set at --out.")] = False,
    as_json: Json = False,
) -> None:
    """Draw rows of a data set, whose schema, vocabularies and tokenizer they keep."""
    from ..data.sample import sample

    index = sample(source, rows, seed, out, domains=domain or (), overwrite=overwrite)
    found = {name: index.rows_of(name) for name in index.schema.domains.names if index.rows_of(name)}
    print(f"{out}: {index.rows:,} rows: " + ", ".join(f"{name} {count:,}" for name, count in found.items()))
    print_json(as_json, {"out": out, "rows": index.rows, "domains": found})


def _prefixes(given: list[str] | None) -> dict[str, str] | None:
    """ROLE=TEXT as a dictionary; None where nothing is given."""
    prefixes: dict[str, str] = {}
    for text in given or []:
        role, equals, prefix = text.partition("=")
        if not equals:
            raise UserError(f"--prefix {text!r}: write ROLE=TEXT, such as query='query: '.")
        if role in prefixes:
            raise UserError(f"--prefix {role} is given twice.")
        prefixes[role] = prefix
    return prefixes or None


def _joins(given: list[str] | None) -> list[Join]:
    """FILE:KEY as side tables."""
    from ..data.sources import Join

    joins = []
    for text in given or []:
        path, _, key = text.rpartition(":")
        if not path or not key:
            raise UserError(f"--join {text!r}: write FILE:KEY, such as items.parquet:item_id.")
        joins.append(Join(path, key))
    return joins


@app.command("inspect")
def shards_inspect(
    root: str, top: Annotated[int, typer.Option(help="Most frequent ids shown.")] = 5, as_json: Json = False
) -> None:
    """Schema, domains, rows, label rates, null shares, text lengths, most frequent ids."""
    from ..data.inspect import inspect, print_inspection

    inspection = inspect(root, top)
    print_inspection(inspection)
    print_json(as_json, inspection)


@app.command("verify")
def shards_verify(root: str, as_json: Json = False) -> None:
    """Read every checksum and every row."""
    from ..data.verify import verify

    result = verify(root)
    print(f"{root}: every checksum and row is in order.")
    print_json(as_json, result)
