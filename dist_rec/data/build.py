"""Raw tables → data sets: the order of the steps, and what makes a build atomic and repeatable.

    sources   files → table `source`, cast and joined
    ingest    checks, vocabularies, split → table `encoded`
    histories events → ranges
    encode    texts → token ids; rows → blocks (worker processes)
    writer    blocks → tars and index.json

Everything is written into a folder beside `out` that is renamed at the very end, so a failure
leaves nothing. Output is the same bytes for the same input, options and seed, whatever the number
of workers. Knows no command line and no model.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import UserError
from ..schema import Schema
from ..strict import from_dict, to_dict
from ..text.paths import tokenizer_file
from . import encode, histories, ingest
from .blocks import KEY_NAMES, TEXT
from .encode import Job, Pool, TextStore
from .index import INDEX_NAME, Index, TokenizerInfo
from .ingest import SPLITS, Split, parse_split
from .sources import Join, Source, literal, load, quote, stream
from .writer import DatasetWriter

__all__ = ["Join", "Split", "build", "parse_split"]

log = logging.getLogger(__name__)
TEXT_BATCH = 4_096
TEXT_ROW_GROUP = 65_536


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
    block_rows: int = 2_048,
    shard_rows: int = 262_144,
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
    if block_rows < 1 or shard_rows < block_rows:
        raise UserError(f"block_rows {block_rows} and shard_rows {shard_rows}: need 1 <= block_rows <= shard_rows.")
    if max_tokens < 1 or (workers is not None and workers < 1):
        raise UserError(f"max_tokens {max_tokens} and workers {workers} must be at least 1.")
    workers = workers or os.cpu_count() or 1
    token_file = tokenizer_file(tokenizer) if tokenizer is not None else None
    token_info = _tokenizer_info(tokenizer, token_file, max_tokens)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        work = partial / "work"
        work.mkdir()
        with _engine(work, workers, memory_limit) as con, _progress() as progress:
            try:
                schema = _prepare(con, schema, sources, tuple(joins), split, vocabulary, seed, work, progress)
                plan = list(ingest.counts(Source(con, schema, rows=_rows(con)), split))
                pool = Pool(Job(schema, work, token_file, max_tokens), workers)
                try:
                    _write_texts(con, schema, pool, work, partial, progress)
                    for table, feature in schema.select(kinds=("id", "ids")).items():
                        if feature.shares is None and feature.vocabulary.kind == "dictionary":
                            _write_vocabulary(con, table, partial / "vocabulary")
                    indexes = _write_shards(
                        con, schema, plan, pool, partial, split, token_info, block_rows, shard_rows, progress
                    )
                finally:
                    pool.close()
            except duckdb.OutOfMemoryException as error:
                raise UserError(
                    f"memory_limit {memory_limit or '(80% of memory)'} is too small for this input: raise it, "
                    f"or use fewer workers. {str(error).splitlines()[0]}"
                ) from None
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


def _tokenizer_info(spec: str | None, path: Path | None, max_tokens: int) -> TokenizerInfo | None:
    if path is None:
        return None
    from tokenizers import Tokenizer

    data = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(data)
        special = tokenizer.num_special_tokens_to_add(False)
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"tokenizer {spec!r}: {path} is no tokenizer: {error}.") from None
    if special >= max_tokens:
        raise UserError(f"max_tokens {max_tokens} leaves no room beside the tokenizer's {special} special tokens.")
    return TokenizerInfo(name=spec, fingerprint=hashlib.sha256(data).hexdigest(), max_length=max_tokens)


@contextmanager
def _engine(work: Path, threads: int, memory_limit: str | None) -> Iterator[duckdb.DuckDBPyConnection]:
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
    finally:
        con.close()


@contextmanager
def _progress() -> Iterator[Progress]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


def _rows(con: duckdb.DuckDBPyConnection) -> int:
    return con.execute("SELECT count(*) FROM encoded").fetchone()[0]


def _prepare(con, schema, sources, joins, split, vocabulary, seed, work, progress) -> Schema:
    """Everything up to the tables `encoded` and `ranges`; returns the schema with its sizes."""
    step = progress.add_task("reading", total=None)
    source = load(con, schema, sources, joins, ingest.split_columns(split, schema))
    ingest.check_rows(source)
    progress.update(step, description="vocabularies")
    sizes = ingest.build_vocabularies(source, vocabulary, log.warning)
    aligned = any(len(group.features) > 1 for group in histories.groups_of(schema))
    num_texts = ingest.number_texts(source, with_empty=aligned)
    progress.update(step, description="rows")
    ingest.encode(source, split, seed)
    tree = to_dict(schema)
    for table, size in sizes.items():
        tree["features"][table]["vocabulary"]["size"] = size
    progress.update(step, description="histories")
    empty = con.execute(f"SELECT row - 1 FROM {ingest.TEXTS} WHERE value = ''").fetchone() if num_texts else None
    train_only = split is not None and split.kind != "time"
    histories.collect(con, schema, work, train_only, empty[0] if empty else 0)
    progress.remove_task(step)
    # Frees the disk of what is not needed any more before shards are written.
    for kind, name in con.execute(
        "SELECT table_type, table_name FROM information_schema.tables WHERE table_name IN ('source', 'main_rows') "
        "OR table_name LIKE 'list:%' OR table_name LIKE 'side%' ORDER BY table_type DESC"
    ).fetchall():
        con.execute(f"DROP {'VIEW' if kind == 'VIEW' else 'TABLE'} {quote(name)}")
    return from_dict(Schema, tree, "schema")


def _write_vocabulary(con, table: str, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / f"{table}.parquet"
    con.execute(
        f"COPY (SELECT value, row FROM {quote(f'vocabulary:{table}')} ORDER BY row) "
        f"TO {literal(str(path))} (FORMAT parquet)"
    )


def _write_texts(con, schema: Schema, pool: Pool, work: Path, out: Path, progress: Progress) -> None:
    """Tokenise every distinct text once: into the workers' store and into texts.parquet."""
    if not schema.select(kinds=("text", "texts")):
        return
    total = con.execute(f"SELECT count(*) FROM {ingest.TEXTS}").fetchone()[0]
    bar = progress.add_task("texts", total=total)
    reader = stream(con, f"SELECT value FROM {ingest.TEXTS} ORDER BY row", TEXT_BATCH)
    store = TextStore.Writer(work)
    path = out / "texts.parquet"
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


def _write_shards(con, schema, plan, pool, out, split, token_info, block_rows, shard_rows, progress) -> list[Index]:
    """Sort, cut into blocks, encode in the pool, write."""
    bar = progress.add_task("shards", total=sum(rows for _, _, rows in plan))
    groups = histories.groups_of(schema)
    columns = [quote(f"f:{name}") for name, f in schema.features.items() if f.events is None]
    columns += [quote(f"label:{name}") for name in schema.labels]
    columns += [quote(f"key:{key}") for key in KEY_NAMES if getattr(schema.keys, key)]
    columns += [quote(f"h{g.number}:{end}") for g in groups for end in ("user", "end")]
    order = "split, domain, " + ('"key:time" NULLS FIRST, ' if schema.keys.time else "") + "n"
    joined = "encoded LEFT JOIN ranges USING (n)" if groups else "encoded"
    reader = stream(con, f"SELECT {', '.join(columns)} FROM {joined} ORDER BY {order}", block_rows)
    pieces = _pieces(plan, block_rows, shard_rows)
    blocks = pool.map(encode.make_block, (encode.pack(batch) for batch in _cut(reader, [rows for *_, rows in pieces])))
    writer, indexes = None, []
    try:
        for (number, domain, _), block in zip(pieces, blocks, strict=True):
            name = SPLITS[number] if split else "all"
            if writer is None or writer.split != name:
                if writer is not None:
                    indexes.append(writer.close())
                writer = DatasetWriter(out / name if split else out, name, schema, token_info, shard_rows)
            writer.add(domain, block)
            progress.advance(bar, block.rows)
        indexes.append(writer.close())
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
