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
import tempfile
from pathlib import Path

import duckdb

from ..errors import UserError
from ..schema import Schema
from ..text.paths import tokenizer_file
from . import steps
from .casts import literal, quote
from .index import INDEX_NAME, SPLITS, Index, write_index
from .sources import Join
from .split import Split, parse_split
from .steps import DEFAULT_BLOCK_ROWS, DEFAULT_SHARD_ROWS, TEXTS_NAME, VOCABULARY_NAME, Input
from .writer import DatasetWriter

__all__ = ["Join", "Split", "build", "parse_split"]


def build(
    schema: Schema,
    sources: list[str],
    out: str,
    *,
    joins: list[Join] | tuple[Join, ...] = (),
    split: Split | None = None,
    tokenizer: str | None = None,
    max_tokens: int = 32,
    vocabulary: str | None = None,
    block_rows: int = DEFAULT_BLOCK_ROWS,
    shard_rows: int = DEFAULT_SHARD_ROWS,
    workers: int | None = None,
    memory_limit: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> list[Index]:
    """Build the data sets of `schema` from raw tables.

    Without `split`, `out` is the data set; with it, `out/train`, `out/valid` and `out/test` are.
    `out/vocabulary/<table>.parquet` (value, row) holds every dictionary and `out/texts.parquet`
    (key, text, tokens) every distinct text, over all splits.

    Args:
        schema: what a row is.
        sources: globs of Parquet, CSV, TSV or JSON-lines files (.gz too); united by column name.
        out: a new or empty local folder.
        joins: side tables.
        split: how rows are dealt to train, valid and test. Histories from events then see only
            train events, except in a split by time, where they see all earlier ones.
        tokenizer: model folder with tokenizer.json, see `text.paths.resolve_model_folder`;
            without it blocks carry texts and no token ids.
        max_tokens: longest token list, special tokens included.
        vocabulary: `vocabulary` folder of an earlier build to keep the rows of; values it lacks
            become row 0 and are counted in a warning and in the index's statistics.
        block_rows: rows of an Arrow block.
        shard_rows: rows after which a tar is closed.
        workers: processes, and threads of the SQL engine; all cores if None.
        memory_limit: of the SQL engine, such as "8GB"; beyond it, it works on disk beside `out`.
        seed: of a random split.
        overwrite: replace the data sets at `out`.

    Returns:
        The index of every data set written, in the order train, valid, test.

    Raises:
        UserError: anything wrong with the input, said with file, row and value where known.
    """
    target = _check_target(out, overwrite)
    if max_tokens < 1:
        raise UserError(f"max_tokens {max_tokens} must be at least 1.")
    workers = steps.check_sizes(block_rows, shard_rows, workers)
    token_file = tokenizer_file(tokenizer) if tokenizer is not None else None
    token_info = steps.tokenizer_info(tokenizer, token_file, max_tokens)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))

    def folder_of(name: str) -> Path:
        return partial / name if split else partial

    def open_writer(resolved: Schema, number: int) -> DatasetWriter:
        name = SPLITS[number] if split else "all"
        return DatasetWriter(folder_of(name), name, resolved, token_info, shard_rows)

    try:
        work = partial / "work"
        work.mkdir()
        indexes = steps.run(
            Input(schema, sources, tuple(joins), split, vocabulary, seed),
            work=work,
            texts=partial / TEXTS_NAME,
            token_file=token_file,
            max_tokens=max_tokens,
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
        _publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return indexes


def _check_target(out: str, overwrite: bool) -> Path:
    if "://" in out:
        raise UserError(f"{out}: data sets are built in a local folder; build it here, then copy it.")
    target = Path(out).absolute()
    if target.exists() and not target.is_dir():
        raise UserError(f"{out} is a file: name a folder.")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise UserError(f"{out} is not empty: name another folder, or pass overwrite to replace it.")
        if not any((target / name / INDEX_NAME).is_file() for name in (".", *SPLITS)):
            raise UserError(f"{out} is not empty and holds no data set, so it is not overwritten: name another folder.")
    return target


def _publish(partial: Path, target: Path) -> None:
    """Rename the finished folder into place; the old one is only removed once the new one stands."""
    partial.chmod(0o755)
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        target.rename(old / "data")
        try:
            partial.rename(target)
        except OSError:
            (old / "data").rename(target)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(target)


def _write_vocabularies(con: duckdb.DuckDBPyConnection, schema: Schema, folder: Path) -> None:
    for table, feature in schema.select(kinds=("id", "ids")).items():
        if feature.shares is None and feature.vocabulary.kind == "dictionary":
            folder.mkdir(exist_ok=True)
            con.execute(
                f"COPY (SELECT value, row FROM {quote(f'vocabulary:{table}')} ORDER BY row) "
                f"TO {literal(str(folder / f'{table}.parquet'))} (FORMAT parquet)"
            )
