"""Raw tables → data sets: where they lie, and what makes a build atomic and repeatable.

    sources   files → table `source`, cast and joined
    ingest    checks, vocabularies, split → table `encoded`
    histories events → ranges
    encode    texts → token ids; rows → blocks (worker processes)
    writer    blocks → tars and what the index says of them
    steps     all of these, one after another

Everything is written into a folder beside `out` that is renamed at the very end, so a failure
leaves nothing. Output is the same bytes for the same input, options and seed, whatever the number
of workers. Knows no command line and no model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import duckdb

from ..errors import UserError, nearest
from ..schema import Schema
from ..text.paths import tokenizer_file
from . import steps
from .casts import literal, quote
from .extend import carried, merge
from .folder import check_target, published
from .home import dictionaries, parent_of, token_file_of
from .index import Index, PrefixRole, TokenizerInfo, write_index
from .sources import Join
from .split import PARTS, Split, parse_split
from .steps import DEFAULT_BLOCK_ROWS, DEFAULT_SHARD_ROWS, TEXTS_NAME, VOCABULARY_NAME, Input
from .writer import DatasetWriter

DEFAULT_MAX_TOKENS = 32
__all__ = ["Join", "Split", "build", "parse_split"]


def build(
    schema: Schema | Mapping[str, Any],
    sources: list[str],
    out: str,
    *,
    joins: list[Join] | tuple[Join, ...] = (),
    split: Split | None = None,
    tokenizer: str | None = None,
    max_tokens: int | None = None,
    prefixes: Mapping[str, str] | None = None,
    vocabulary: str | None = None,
    extends: str | None = None,
    history_from: list[str] | tuple[str, ...] = (),
    block_rows: int = DEFAULT_BLOCK_ROWS,
    shard_rows: int = DEFAULT_SHARD_ROWS,
    workers: int | None = None,
    memory_limit: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> list[Index]:
    """Build the data sets of `schema` from raw tables.

    Without `split`, `out` is the data set; with it, `out/train`, `out/valid` and `out/test` are (and, where a column
    deals rows to it, `out/catalogue`).
    `out/vocabulary/<table>.parquet` (value, row) holds every dictionary and `out/texts.parquet`
    (key, text, tokens) every distinct text, over all splits.

    Args:
        schema: what a row is; with `extends` also what a schema.yaml holds (`strict.read_yaml`), since what it leaves
            unsaid is as there, while a `Schema` says all.
        sources: globs of Parquet, CSV, TSV or JSON-lines files (.gz too); united by column name.
        out: a new or empty local folder.
        joins: side tables.
        split: how rows are dealt to train, valid and test. Histories from events then see only
            train events, except in a split by time, where they see all earlier ones.
        tokenizer: model folder with tokenizer.json, see `text.paths.resolve_model_folder`;
            without it blocks carry texts and no token ids.
        max_tokens: longest token list, special tokens included; 32 if None.
        prefixes: role (`user`, `query`, `item`) → what stands before each of its texts, before they get keys and
            token ids; texts of histories are items'. Needs a tokenizer.
        vocabulary: `vocabulary` folder of an earlier build to keep the rows of; values it lacks
            become row 0 and are counted in a warning and in the index's statistics.
        extends: a data set (or the folder above its splits) whose schema, vocabularies, tokenizer and prefixes this
            one extends by domains (`extend.merge`). What the schema has and `schema` does not name is null in every
            row; dictionaries keep their rows, and new values are numbered after them.
        history_from: with `extends`, globs of earlier tables of any domain, in the columns of the new ones: their
            rows are events of the new rows' histories, but are not written, and bring no values into dictionaries.
        block_rows: rows of an Arrow block.
        shard_rows: rows after which a tar is closed.
        workers: processes, and threads of the SQL engine; all cores if None.
        memory_limit: of the SQL engine, such as "8GB"; beyond it, it works on disk beside `out`.
        seed: of a random split.
        overwrite: replace the data sets at `out`.

    Returns:
        The index of every data set written, in the order train, valid, test, catalogue.

    Raises:
        UserError: anything wrong with the input, said with file, row and value where known.
    """
    target = check_target(out, overwrite)
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens {max_tokens} must be at least 1.")
    workers = steps.check_sizes(block_rows, shard_rows, workers)
    own, grow = None, frozenset()
    if extends is None:
        if history_from:
            raise UserError("--history-from is for rows that come later, with --extends: build all rows from --from.")
        token_file, token_info = _tokenizer(schema, tokenizer, max_tokens or DEFAULT_MAX_TOKENS, prefixes or {})
    else:
        parent = parent_of(extends)
        if target in (Path(extends).absolute(), *Path(extends).absolute().parents):
            raise UserError(f"{out} is or holds {extends}, which is to stay: name another folder.")
        parent.check_options(vocabulary, max_tokens, prefixes)
        merged = merge(schema, parent.index.schema, extends)
        schema, own, grow = merged.schema, merged.own, frozenset(dictionaries(parent.index.schema))
        vocabulary = str(parent.vocabulary) if grow else None
        token_info = parent.index.tokenizer
        token_file = token_file_of(token_info, tokenizer, extends)
        steps.check_past(carried(schema, own), sources, history_from)

    with published(target) as partial:

        def folder_of(name: str) -> Path:
            return partial / name if split else partial

        def open_writer(resolved: Schema, number: int) -> DatasetWriter:
            name = PARTS[number] if split else "all"
            return DatasetWriter(folder_of(name), name, resolved, token_info, shard_rows, extension=own)

        work = partial / "work"
        work.mkdir()
        indexes = steps.run(
            Input(
                schema,
                sources,
                tuple(joins),
                split,
                vocabulary,
                seed,
                tuple(history_from),
                own=own,
                grow=grow,
                prefixes=token_info.prefixes if token_info else {},
            ),
            work=work,
            texts=partial / TEXTS_NAME,
            token_file=token_file,
            max_tokens=token_info.max_length if token_info else 1,
            block_rows=block_rows,
            shard_rows=shard_rows,
            workers=workers,
            memory_limit=memory_limit,
            prepared=lambda con, resolved: _write_vocabularies(con, resolved, partial / VOCABULARY_NAME),
            open_writer=open_writer,
        )
        for index in indexes:
            write_index(str(folder_of(index.split)), index)
        shutil.rmtree(work)
    return indexes


def _tokenizer(
    schema: Schema, spec: str | None, max_tokens: int, prefixes: Mapping[str, str]
) -> tuple[Path | None, TokenizerInfo | None]:
    """tokenizer.json and what the index says of it; both None without a tokenizer.

    Raises:
        UserError: it is no tokenizer, or a prefix is not of a role, does nothing, or has no index entry to stand in.
    """
    faults = []
    for role, prefix in prefixes.items():
        roles = get_args(PrefixRole)
        if role not in roles:
            faults.append(f"{role!r} is no role: use {', '.join(roles)}.{nearest(role, roles)}")
        elif not prefix:
            faults.append(f"that of {role} is empty: leave it out")
        elif not schema.select(role, ("text",)) and not (role == "item" and schema.select("history", ("texts",))):
            faults.append(f"the schema has no text of role {role}: leave that prefix out")
    if prefixes and spec is None:
        faults.append("they are a language model's: name its --tokenizer, with which the index records them")
    if faults:
        raise UserError("prefixes of texts:\n" + "\n".join(f"  - {fault}" for fault in faults))
    if spec is None:
        return None, None
    path = tokenizer_file(spec)
    return path, steps.tokenizer_info(spec, path, max_tokens, prefixes)


def _write_vocabularies(con: duckdb.DuckDBPyConnection, schema: Schema, folder: Path) -> None:
    for table, feature in schema.select(kinds=("id", "ids")).items():
        if feature.shares is None and feature.vocabulary.kind == "dictionary":
            folder.mkdir(exist_ok=True)
            con.execute(
                f"COPY (SELECT value, row FROM {quote(f'vocabulary:{table}')} ORDER BY row) "
                f"TO {literal(str(folder / f'{table}.parquet'))} (FORMAT parquet)"
            )
