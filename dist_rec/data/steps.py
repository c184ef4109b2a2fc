"""The steps that building a data set and appending to one have in common, in the order of their use.

    prepare       raw tables → the tables `encoded` and `ranges`
    write_texts   distinct texts → token ids, for the blocks and as texts.parquet
    write_shards  rows → blocks (worker processes) → tars

Knows not where data sets lie, nor what becomes of what is there already.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import UserError
from ..schema import Schema
from . import encode, frequency, histories, ingest
from .blocks import KEY_NAMES, TEXT
from .casts import literal, quote
from .encode import Job, Pool, TextStore
from .extend import carried
from .index import Extension, Frequency, Index, TokenizerInfo
from .sources import Join, files_of, load, stream
from .split import Split, split_columns
from .writer import DatasetWriter

log = logging.getLogger(__name__)
TEXTS_NAME = "texts.parquet"
VOCABULARY_NAME = "vocabulary"
DEFAULT_BLOCK_ROWS = 8_192
DEFAULT_SHARD_ROWS = 262_144
TEXT_BATCH = 4_096
TEXT_ROW_GROUP = 65_536


@dataclass(frozen=True)
class Input:
    """What is read.

    Attributes:
        schema: what a row is.
        sources: globs of the rows to write.
        joins: side tables.
        split: how rows are dealt; None is one data set.
        vocabulary: folder of dictionaries whose rows are kept.
        seed: of a random split.
        past: globs of rows that are events of histories only.
        every_domain: whether each domain must have a row.
        count_ids: whether the index says how often ids occur.
        own: what of the schema the rows carry; None is all.
        grow: tables whose values that `vocabulary` does not know are numbered after its own; it knows no others.
        prefixes: by role, what stands before its texts.
    """

    schema: Schema
    sources: list[str]
    joins: tuple[Join, ...]
    split: Split | None = None
    vocabulary: str | None = None
    seed: int = 0
    past: tuple[str, ...] = ()
    every_domain: bool = True
    count_ids: bool = True
    own: Extension | None = None
    grow: frozenset[str] = frozenset()
    prefixes: Mapping[str, str] = field(default_factory=dict)


def check_sizes(block_rows: int, shard_rows: int, workers: int | None) -> int:
    """Refuse impossible sizes; the number of workers."""
    if block_rows < 1 or shard_rows < block_rows:
        raise UserError(f"block_rows {block_rows} and shard_rows {shard_rows}: need 1 <= block_rows <= shard_rows.")
    if workers is not None and workers < 1:
        raise UserError(f"workers {workers} must be at least 1.")
    return workers or os.cpu_count() or 1


def check_past(schema: Schema, sources: Sequence[str], past: Sequence[str]) -> None:
    """Warn of earlier tables that do nothing.

    Args:
        schema: of what the rows carry.
        sources, past: globs, as of `Input`.

    Raises:
        UserError: a file is both new and earlier.
    """
    if past and not histories.groups_of(schema):
        log.warning("--history-from does nothing: the schema has no histories from events.")
    new = {os.path.realpath(file) for pattern in sources for file in files_of(pattern)}
    both = [file for pattern in past for file in files_of(pattern) if os.path.realpath(file) in new]
    if both:
        raise UserError(f"{both[0]} is given both as new rows and as history: its events would count twice.")


def tokenizer_info(spec: str, path: Path, max_tokens: int, prefixes: Mapping[str, str]) -> TokenizerInfo:
    """What an index says of the tokenizer at `path`.

    Raises:
        UserError: it is none, or its special tokens leave no room for others.
    """
    from tokenizers import Tokenizer

    data = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(data)
        special = tokenizer.num_special_tokens_to_add(False)
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"tokenizer {spec!r}: {path} is no tokenizer: {error}.") from None
    if special >= max_tokens:
        raise UserError(f"max_tokens {max_tokens} leaves no room beside the tokenizer's {special} special tokens.")
    fingerprint = hashlib.sha256(data).hexdigest()
    return TokenizerInfo(name=spec, fingerprint=fingerprint, max_length=max_tokens, prefixes=dict(prefixes))


@contextmanager
def engine(work: Path, threads: int, memory_limit: str | None) -> Iterator[duckdb.DuckDBPyConnection]:
    """The SQL engine, whose tables lie in the folder `work`."""
    con = duckdb.connect(str(work / "rows.duckdb"))
    try:
        # Extensions would be fetched from the internet; what a build needs is built in.
        con.execute("SET autoinstall_known_extensions = false")
        con.execute("SET enable_progress_bar = false")
        con.execute("SET TimeZone = 'UTC'")
        con.execute(f"SET threads = {threads}")
        con.execute(f"SET temp_directory = {literal(str(work / 'spill'))}")
        if memory_limit is not None:
            try:
                con.execute(f"SET memory_limit = {literal(memory_limit)}")
            except duckdb.Error as error:
                raise UserError(f"memory_limit {memory_limit!r}: {error}. Write for example 8GB.") from None
        yield con
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"memory_limit {memory_limit or '(80% of memory)'} is too small for this input: raise it, "
            f"or use fewer workers. {str(error).splitlines()[0]}"
        ) from None
    finally:
        con.close()


@contextmanager
def _progress() -> Iterator[Progress]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


def run(
    given: Input,
    *,
    work: Path,
    texts: Path,
    token_file: Path | None,
    max_tokens: int,
    block_rows: int,
    shard_rows: int,
    workers: int,
    memory_limit: str | None,
    prepared: Callable[[duckdb.DuckDBPyConnection, Schema], None],
    open_writer: Callable[[Schema, int], DatasetWriter],
) -> list[Index]:
    """All steps.

    Args:
        given: what is read.
        work: folder for what is only needed meanwhile.
        texts: where the distinct texts are written, if the schema has any.
        token_file: tokenizer.json, or None.
        max_tokens: longest token list.
        block_rows, shard_rows, workers, memory_limit: see `build`.
        prepared: told the connection and the resolved schema before anything is written.
        open_writer: the writer of a split, by its position in `split.PARTS`.

    Returns:
        The index of every split that has rows, in order; none is written yet.
    """
    with engine(work, workers, memory_limit) as con, _progress() as progress:
        schema, plan, frequencies = _prepare(con, given, work, progress)
        events = {name: feature.events for name, feature in given.schema.features.items()}
        whole = replace(schema, features={n: replace(f, events=events[n]) for n, f in schema.features.items()})
        prepared(con, whole)
        pool = Pool(Job(schema, work, token_file, max_tokens), workers)
        try:
            _write_texts(con, schema, pool, work, texts, progress)
            opened = partial(open_writer, whole)
            return _write_shards(con, schema, plan, frequencies, pool, opened, block_rows, shard_rows, progress)
        finally:
            pool.close()


def _prepare(
    con, given: Input, work: Path, progress: Progress
) -> tuple[Schema, list[tuple[int, int, int]], dict[int, dict[str, Frequency]]]:
    """Up to the tables `encoded` and `ranges`: the schema with its sizes, rows by split and domain, ids by split.

    The schema is that of what the rows carry (`extend.carried`).
    """
    schema, split = carried(given.schema, given.own), given.split
    step = progress.add_task("reading", total=None)
    columns = split_columns(split, schema)
    source = load(con, schema, given.sources, given.joins, columns, given.past, given.own, given.prefixes)
    ingest.check_rows(source, given.every_domain)
    progress.update(step, description="vocabularies")
    vocabularies = ingest.build_vocabularies(source, given.vocabulary, given.grow, log.warning)
    aligned = any(len(group.features) > 1 for group in histories.groups_of(schema))
    num_texts = ingest.number_texts(source, with_empty=aligned)
    progress.update(step, description="rows")
    ingest.encode(source, split, given.seed)
    plan = list(ingest.counts(source, split))
    resolved = {name: replace(schema.features[name], vocabulary=known) for name, known in vocabularies.items()}
    schema = replace(schema, features=schema.features | resolved)
    progress.update(step, description="histories")
    empty = con.execute(f"SELECT row - 1 FROM {ingest.TEXTS} WHERE value = ''").fetchone() if num_texts else None
    train_only = split is not None and split.kind != "time"
    histories.collect(con, schema, work, train_only, empty[0] if empty else 0)
    progress.update(step, description="frequencies")
    frequencies = frequency.count_ids(con, schema, work) if given.count_ids else {}
    progress.remove_task(step)
    # Frees the disk of what is not needed any more before shards are written.
    for kind, name in con.execute(
        "SELECT table_type, table_name FROM information_schema.tables WHERE table_name IN ('source', 'main_rows') "
        "OR table_name LIKE 'list:%' OR table_name LIKE 'side%' ORDER BY table_type DESC"
    ).fetchall():
        con.execute(f"DROP {'VIEW' if kind == 'VIEW' else 'TABLE'} {quote(name)}")
    return schema, plan, frequencies


def _write_texts(con, schema: Schema, pool: Pool, work: Path, path: Path, progress: Progress) -> None:
    """Tokenise every distinct text once: into the workers' store and into the file `path`."""
    if not schema.select(kinds=("text", "texts")):
        return
    total = con.execute(f"SELECT count(*) FROM {ingest.TEXTS}").fetchone()[0]
    bar = progress.add_task("texts", total=total)
    reader = stream(con, f"SELECT value FROM {ingest.TEXTS} ORDER BY row", TEXT_BATCH)
    store = TextStore.Writer(work)
    pending: list[pa.RecordBatch] = []
    try:
        with pq.ParquetWriter(path, pa.schema(list(TEXT))) as parquet:
            for data in pool.map(encode.tokenise, (encode.pack(batch) for batch in reader)):
                batch = encode.unpack(data)
                store.append(batch.to_struct_array())
                pending.append(batch)
                if sum(b.num_rows for b in pending) >= TEXT_ROW_GROUP:
                    parquet.write_table(pa.Table.from_batches(pending))
                    pending = []
                progress.advance(bar, batch.num_rows)
            if pending:
                parquet.write_table(pa.Table.from_batches(pending))
    finally:
        store.close()
    progress.remove_task(bar)
    twins = con.execute(
        f"SELECT list(text) FROM read_parquet({literal(str(path))}) GROUP BY key HAVING count(*) > 1 LIMIT 1"
    ).fetchone()
    if twins:
        raise UserError(
            f"two texts have the same 64-bit key, which names texts everywhere: {twins[0]!r}. Change one of them."
        )


def _write_shards(con, schema, plan, frequencies, pool, open_writer, block_rows, shard_rows, progress) -> list[Index]:
    """Sort, cut into blocks, encode in the pool, write."""
    bar = progress.add_task("shards", total=sum(rows for _, _, rows in plan))
    groups = histories.groups_of(schema)
    columns = [quote(f"f:{name}") for name, f in schema.features.items() if f.events is None]
    columns += [quote(f"label:{name}") for name in schema.labels]
    columns += [quote(f"key:{key}") for key in KEY_NAMES if getattr(schema.keys, key)]
    columns += [quote(f"h{g.number}:{end}") for g in groups for end in ("user", "end")]
    order = "split, domain, " + ('"key:time" NULLS FIRST, ' if schema.keys.time else "") + "n"
    joined = "encoded LEFT JOIN ranges USING (n)" if groups else "encoded"
    query = f"SELECT {', '.join(columns)} FROM {joined} WHERE split >= 0 ORDER BY {order}"
    reader = stream(con, query, block_rows)
    pieces = _pieces(plan, block_rows, shard_rows)
    blocks = pool.map(encode.make_block, (encode.pack(batch) for batch in _cut(reader, [rows for *_, rows in pieces])))
    writer, written, indexes = None, None, []
    try:
        for (number, domain, _), block in zip(pieces, blocks, strict=True):
            if number != written:
                if writer is not None:
                    indexes.append(writer.close(frequencies.get(written)))
                writer, written = open_writer(number), number
            writer.add(domain, block)
            progress.advance(bar, block.rows)
        indexes.append(writer.close(frequencies.get(written)))
    finally:
        if writer is not None:
            writer.abandon()
    return indexes


def _pieces(plan: list[tuple[int, int, int]], block_rows: int, shard_rows: int) -> list[tuple[int, int, int]]:
    """(split, domain, rows) of every block: no block spans two domains, or two tars."""
    pieces = []
    for split, domain, rows in plan:
        while rows:
            in_shard = min(rows, shard_rows)
            rows -= in_shard
            while in_shard:
                pieces.append((split, domain, min(in_shard, block_rows)))
                in_shard -= pieces[-1][2]
    return pieces


def _cut(reader: Iterator[pa.RecordBatch], sizes: list[int]) -> Iterator[pa.RecordBatch]:
    """The rows read, in batches of exactly these sizes."""
    held: list[pa.RecordBatch] = []
    for size in sizes:
        while sum(batch.num_rows for batch in held) < size:
            held.append(next(reader))
        table = pa.Table.from_batches(held)
        yield table.slice(0, size).combine_chunks().to_batches()[0]
        held = table.slice(size).to_batches()
