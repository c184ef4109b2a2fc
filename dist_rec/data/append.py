"""Rows that keep arriving → more shards of a data set that is there: what makes an append atomic.

The rows go through the steps of a build, with the schema, vocabularies and tokenizer of the data set. The
new tars get names of their own, and the last step renames an index into place that names the old
shards and the new. So whoever reads by the old index is not disturbed, and a crash leaves the data
set as it was, with files that the next append removes. One append at a time: a lock of the
operating system, which ends with its process. Knows no command line and no model.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from ..files import sync
from ..schema import Schema
from . import steps
from .blocks import TEXT
from .casts import literal
from .extend import carried
from .home import home_of, token_file_of
from .index import INDEX_NAME, Index, read_index, write_index
from .sources import Join
from .steps import DEFAULT_BLOCK_ROWS, DEFAULT_SHARD_ROWS, TEXTS_NAME, VOCABULARY_NAME, Input
from .writer import DatasetWriter

log = logging.getLogger(__name__)
LOCK_NAME = ".append.lock"
STAGING_NAME = ".append"


def append(
    root: str,
    sources: list[str],
    *,
    joins: list[Join] | tuple[Join, ...] = (),
    history_from: list[str] | tuple[str, ...] = (),
    tokenizer: str | None = None,
    block_rows: int | None = None,
    shard_rows: int | None = None,
    workers: int | None = None,
    memory_limit: str | None = None,
) -> Index:
    """Append rows to the data set at `root` as its next generation.

    Values that the vocabularies do not know become row 0; a warning and the index's statistics count
    them. texts.parquet gains the new texts.

    Args:
        root: local folder with index.json: a data set, or one split of it.
        sources: globs of the new rows' tables, as for `build`.
        joins: side tables.
        history_from: globs of earlier tables: their rows are events of the new rows' histories, but
            are not written. Without it, histories from events see the new rows alone.
        tokenizer: folder of the tokenizer the data set was built with, if it lies elsewhere now.
        block_rows, shard_rows: None is as the data set was built.
        workers, memory_limit: see `build`.

    Returns:
        The new index, published.

    Raises:
        UserError: anything wrong with the input, or another append is running; nothing is appended then.
    """
    if "://" in root:
        raise UserError(f"{root}: rows are appended to a local folder; append to the original, then copy what is new.")
    folder = Path(root).absolute()
    schema = read_index(str(folder)).schema
    home = home_of(folder, schema)
    with _lock(home):
        # Read again: an append that was running meanwhile has changed it.
        index = read_index(str(folder))
        published = (folder / INDEX_NAME).read_bytes()
        default_block_rows, default_shard_rows = _sizes(index)
        block_rows = block_rows or default_block_rows
        shard_rows = shard_rows or max(default_shard_rows, block_rows)
        workers = steps.check_sizes(block_rows, shard_rows, workers)
        own = carried(schema, index.extension)
        steps.check_past(own, sources, history_from)
        if (events := [n for n, f in own.features.items() if f.events is not None]) and not history_from:
            log.warning(
                f"histories of the appended rows ({', '.join(events)}) begin empty: they see the appended rows alone. "
                "Name the earlier tables with --history-from."
            )
        token_file = token_file_of(index.tokenizer, tokenizer, root)
        staging = folder / STAGING_NAME
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            (work := staging / "work").mkdir()
            (new,) = steps.run(
                Input(
                    schema,
                    sources,
                    tuple(joins),
                    vocabulary=str(home / VOCABULARY_NAME),
                    past=tuple(history_from),
                    every_domain=False,
                    count_ids=False,
                    own=index.extension,
                    prefixes=index.tokenizer.prefixes if index.tokenizer else {},
                ),
                work=work,
                texts=staging / TEXTS_NAME,
                token_file=token_file,
                max_tokens=index.tokenizer.max_length if index.tokenizer else 1,
                block_rows=block_rows,
                shard_rows=shard_rows,
                workers=workers,
                memory_limit=memory_limit,
                prepared=lambda _, resolved: _check_schema(resolved, schema, home),
                open_writer=lambda _, number: DatasetWriter(
                    staging, index.split, schema, index.tokenizer, shard_rows, index
                ),
            )
            (work := staging / "merge").mkdir()
            with steps.engine(work, workers, memory_limit) as con:
                texts = _all_texts(con, home / TEXTS_NAME, staging / TEXTS_NAME, staging / f"all-{TEXTS_NAME}")
            if (folder / INDEX_NAME).read_bytes() != published:
                raise UserError(f"{root} was changed by something else meanwhile: nothing was appended. Append again.")
            _publish(folder, home, staging, new, texts)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return new


@contextmanager
def _lock(home: Path) -> Iterator[None]:
    """Keep other appends away from the data sets in `home`, which share their texts."""
    with open(home / LOCK_NAME, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"another append to {home} is running (process {file.read().strip() or 'unknown'}): nothing was "
                "appended. Wait for it, then append again."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _sizes(index: Index) -> tuple[int, int]:
    """Rows of a block and of a shard that the data set was built with, as far as it shows them."""
    blocks = [block.rows for shard in index.shards if len(shard.blocks) > 1 for block in shard.blocks]
    first = [shard for shard in index.shards if shard.generation == 0]
    domains = [shard.domain for shard in first]
    shards = [shard.rows for shard in first if domains.count(shard.domain) > 1]
    block_rows = max(blocks) if blocks else DEFAULT_BLOCK_ROWS
    return block_rows, max(shards) if shards else DEFAULT_SHARD_ROWS


def _check_schema(resolved: Schema, schema: Schema, home: Path) -> None:
    if resolved != schema:
        raise UserError(
            f"{home / VOCABULARY_NAME} has rows that the data set's index does not know, or in another order, so it is "
            "not the vocabulary that the data set was built with: restore that one."
        )


def _all_texts(con: duckdb.DuckDBPyConnection, old: Path, new: Path, out: Path) -> Path | None:
    """Write the texts of both files to `out`, old ones first; None where there is nothing to publish."""
    if not new.is_file():
        return None
    if not old.is_file():
        log.warning(f"{old} is missing, so `dist-rec embed` will not find the texts of the appended rows.")
        return None
    tables = f"read_parquet({literal(str(new))}) n {{}} JOIN read_parquet({literal(str(old))}) o USING (key)"
    twins = con.execute(f"SELECT n.text, o.text FROM {tables.format('')} WHERE n.text <> o.text LIMIT 1").fetchone()
    if twins:
        raise UserError(
            f"two texts have the same 64-bit key, which names texts everywhere: {list(twins)!r}. Change the new one."
        )
    added = con.execute(f"SELECT key FROM {tables.format('ANTI')}").fetchnumpy()["key"]
    if not len(added):
        return None
    with (
        pq.ParquetWriter(out, pa.schema(list(TEXT))) as writer,
        pq.ParquetFile(old) as before,
        pq.ParquetFile(new) as now,
    ):
        for group in range(before.num_row_groups):
            writer.write_table(before.read_row_group(group))
        for group in range(now.num_row_groups):
            table = now.read_row_group(group)
            if (wanted := np.isin(table["key"].to_numpy(), added)).any():
                writer.write_table(table.filter(pa.array(wanted)))
    sync(out)
    return out


def _publish(folder: Path, home: Path, staging: Path, new: Index, texts: Path | None) -> None:
    """Move the tars and texts into place, and then, at once, the index that needs them."""
    for tar in staging.glob("*.tar"):
        tar.rename(folder / tar.name)
    # Of an append that was killed here: names of this generation that no index lists.
    for stray in set(folder.glob(f"*.g{new.generation}.tar")) - {folder / shard.file for shard in new.shards}:
        stray.unlink()
    if texts is not None:
        texts.rename(home / TEXTS_NAME)
        sync(home)
    sync(folder)
    write_index(str(folder), new)
