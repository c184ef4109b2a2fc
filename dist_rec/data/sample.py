"""A few rows of a data set as a data set of their own: what few-shot curves train on.

A row is drawn by its number alone: the N rows with the smallest hashes of (seed, number). So what is drawn depends on
neither blocks nor ranks, and the 64 rows of a seed are among its 256. Rows are copied as they stand, columns and all;
nothing is decoded, looked up or tokenised again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError, nearest
from ..schema import Schema
from .blocks import TEXT, arrow_schema
from .encode import finish, text_column
from .folder import check_target, published
from .frequency import IdCounter
from .index import Index, read_index, write_index
from .reader import ShardReader
from .remote import DEFAULT_RETRY, Retry
from .steps import DEFAULT_BLOCK_ROWS, DEFAULT_SHARD_ROWS, TEXTS_NAME
from .writer import DatasetWriter

# Rows whose hashes are held at once beside those that are drawn.
CHUNK_ROWS = 1 << 20


def sample(
    source: str,
    rows: int,
    seed: int,
    out: str,
    *,
    domains: Sequence[str] = (),
    overwrite: bool = False,
    retry: Retry = DEFAULT_RETRY,
) -> Index:
    """Write `rows` rows of the data set at `source`, drawn without replacement, as a data set at `out`.

    Domain by domain they stand in their old order. Schema, vocabularies and tokenizer are the source's, so its other
    splits go with them; statistics and label counts are those of the drawn rows. `out/texts.parquet` has their texts;
    the vocabularies' values stay with the source.

    Args:
        source: folder or fsspec URL with index.json.
        rows: how many.
        seed: of the draw. Fewer rows of a seed are among more of it.
        out: a new or empty local folder.
        domains: only rows of these; all if empty.
        overwrite: replace the data set at `out`.
        retry: of every read.

    Returns:
        The index of the sample, published.

    Raises:
        UserError: there are not as many rows, an unknown domain, or anything wrong with source or `out`.
    """
    index = read_index(source, retry)
    numbers = _drawn(index, source, rows, seed, domains)
    target = check_target(out, overwrite)
    reader = ShardReader(source, index, [], retry=retry)
    with published(target) as partial:
        writer = DatasetWriter(
            partial, index.split, index.schema, index.tokenizer, DEFAULT_SHARD_ROWS, extension=index.extension
        )
        counters = {name: IdCounter() for name in index.schema.select(kinds=("id", "ids"))}
        try:
            with _TextFile(partial / TEXTS_NAME, index.schema) as texts:
                for domain, batch in _blocks(reader, numbers):
                    for name, counter in counters.items():
                        column = batch.column(name)
                        values = column.flatten() if isinstance(column, pa.ListArray) else column
                        counter.add(values.drop_null().to_numpy(zero_copy_only=False))
                    texts.add(batch)
                    writer.add(domain, finish(batch, index.schema))
            drawn = writer.close({name: counter.frequency(rows) for name, counter in counters.items()})
        finally:
            writer.abandon()
        write_index(str(partial), drawn)
    return drawn


def _drawn(index: Index, source: str, rows: int, seed: int, domains: Sequence[str]) -> np.ndarray:
    """Numbers of the rows that are drawn, int64 `[rows]`, ascending."""
    known = index.schema.domains.names
    for name in domains:
        if name not in known:
            raise UserError(f"{source} has no domain {name!r}: it has {', '.join(known)}.{nearest(name, known)}")
    if rows < 1:
        raise UserError(f"{rows} rows cannot be drawn: ask for 1 at least.")
    edges = np.cumsum([0] + [shard.rows for shard in index.shards]).tolist()
    wanted = [
        (start, stop)
        for shard, start, stop in zip(index.shards, edges[:-1], edges[1:], strict=True)
        if not domains or shard.domain in domains
    ]
    there = sum(stop - start for start, stop in wanted)
    if rows > there:
        of = f" of {', '.join(domains)}" if domains else ""
        raise UserError(f"{source} has {there:,} rows{of}, so {rows:,} cannot be drawn from it: ask for fewer.")
    numbers = hashes = np.zeros(0, np.int64)
    for start, stop in wanted:
        for first in range(start, stop, CHUNK_ROWS):
            more = np.arange(first, min(first + CHUNK_ROWS, stop))
            numbers, hashes = np.concatenate([numbers, more]), np.concatenate([hashes, row_hash(more, seed)])
            if len(numbers) > rows:
                smallest = np.argpartition(hashes, rows - 1)[:rows]
                numbers, hashes = numbers[smallest], hashes[smallest]
    return np.sort(numbers)


def row_hash(numbers: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64 (Steele et al., OOPSLA 2014) at position `numbers`, int64 `[n]`, of the stream that `seed` starts.

    Returns:
        int64 `[n]`, no two alike.
    """
    (start,) = _mixed(np.array([seed % 2**64], np.uint64))
    return _mixed(start + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


def _mixed(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _blocks(reader: ShardReader, numbers: np.ndarray) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(domain, block) of the drawn rows, domain by domain in the schema's order, each source block read once.

    Rows of two generations share no block, so that within a block they stay in the order of time.
    """
    starts, schema = reader.first_rows, reader.index.schema
    bounds = np.searchsorted(numbers, starts)
    shards = [shard for shard, _ in reader.places]
    used = np.flatnonzero(np.diff(bounds)).tolist()
    used.sort(key=lambda number: (reader.domain_of[shards[number].domain], number))
    held: list[pa.RecordBatch] = []
    for i, number in enumerate(used):
        reader.prefetch(used[i:])
        rows = numbers[bounds[number] : bounds[number + 1]] - starts[number]
        # Joined alone, it lets go of the texts of the block's other rows.
        held.append(_joined([reader.batch(number).take(pa.array(rows))], schema))
        shard, following = shards[number], shards[used[i + 1]] if i + 1 < len(used) else None
        ends = following is None or (following.domain, following.generation) != (shard.domain, shard.generation)
        while held and (ends or sum(batch.num_rows for batch in held) >= DEFAULT_BLOCK_ROWS):
            whole = _joined(held, schema)
            size, held = min(whole.num_rows, DEFAULT_BLOCK_ROWS), []
            if size < whole.num_rows:
                held = [whole.take(pa.array(np.arange(size, whole.num_rows)))]
                whole = _joined([whole.take(pa.array(np.arange(size)))], schema)
            yield reader.domain_of[shard.domain], whole


def _joined(parts: list[pa.RecordBatch], schema: Schema) -> pa.RecordBatch:
    """The rows of `parts` as one block, each text of a column once, and none that no row uses."""
    kinds = arrow_schema(schema)
    columns = []
    for field in kinds:
        pieces = [part.column(field.name) for part in parts]
        is_text = field.name in schema.features and schema.features[field.name].kind in ("text", "texts")
        columns.append(_joined_texts(pieces, field.type) if is_text else pa.concat_arrays(pieces))
    return pa.record_batch(columns, schema=kinds)


def _joined_texts(pieces: list[pa.Array], kind: pa.DataType) -> pa.Array:
    """Columns of kind `text` or `texts` one after another."""
    listed = pa.types.is_list(kind)
    coded = [piece.values if listed else piece for piece in pieces]
    dictionary = pa.concat_arrays([values.dictionary for values in coded])
    # The first entry of every text stands for the others.
    _, first, same = np.unique(dictionary.field("key").to_numpy(), return_index=True, return_inverse=True)
    chosen, start, numbers = first[same], 0, []
    for piece, values in zip(pieces, coded, strict=True):
        valid = values.indices.is_valid().to_numpy(zero_copy_only=False)
        entries = np.zeros(len(values), np.int64)
        entries[valid] = chosen[start + values.indices.drop_null().to_numpy()]
        entries = pa.array(entries, mask=~valid)
        start += len(values.dictionary)
        numbers.append(pa.ListArray.from_arrays(piece.offsets, entries, mask=piece.is_null()) if listed else entries)
    return text_column(pa.concat_arrays(numbers), kind, lambda rows: dictionary.take(pa.array(rows)))


class _TextFile:
    """texts.parquet of the texts in blocks, each once; no file where the schema has no texts."""

    def __init__(self, path: Path, schema: Schema) -> None:
        self.names = list(schema.select(kinds=("text", "texts")))
        self.seen: set[int] = set()
        self.writer = pq.ParquetWriter(path, pa.schema(list(TEXT))) if self.names else None

    def __enter__(self) -> _TextFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()

    def add(self, batch: pa.RecordBatch) -> None:
        for name in self.names:
            column = batch.column(name)
            texts = (column.values if isinstance(column, pa.ListArray) else column).dictionary
            keys = texts.field("key").to_pylist()
            fresh = [i for i, key in enumerate(keys) if key not in self.seen]
            self.seen.update(keys)
            if fresh:
                parts = texts.take(pa.array(fresh)).flatten()
                self.writer.write_table(pa.Table.from_arrays(parts, schema=pa.schema(list(TEXT))))
