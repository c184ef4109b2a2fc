"""What the processes of a build do: tokenise texts, and turn rows into the bytes of a block.

Runs in worker processes, so it imports little: numpy, pyarrow, and the tokenizer only where one is
asked for. Results depend on the arguments alone, never on which worker ran them.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
from isal.isal_zlib import crc32

from ..schema import Schema
from .blocks import KEY_NAMES, TEXT, arrow_schema, encode_block, text_key
from .histories import EventGroup, groups_of, values_path
from .rows import Ragged


@dataclass(frozen=True)
class Job:
    """What every worker knows.

    Attributes:
        schema: resolved.
        folder: work folder with the text store and the event files.
        tokenizer: tokenizer.json, or None.
        max_tokens: longest token list, special tokens included.
    """

    schema: Schema
    folder: Path
    tokenizer: Path | None
    max_tokens: int


@dataclass
class FeatureCounts:
    """Sums over rows, from which the index's statistics are made."""

    nulls: int = 0
    total: int = 0
    longest: int = 0
    unknown: int = 0

    def add(self, other: FeatureCounts) -> None:
        self.nulls += other.nulls
        self.total += other.total
        self.longest = max(self.longest, other.longest)
        self.unknown += other.unknown


@dataclass
class EncodedBlock:
    """A block ready to be written, and what the index says about it."""

    payload: bytes
    rows: int
    crc32: int
    time: tuple[int, int] | None
    features: dict[str, FeatureCounts] = field(default_factory=dict)
    labels: dict[str, dict[str, int]] = field(default_factory=dict)


class Pool:
    """Runs functions of this module over jobs: in order, with at most a few jobs waiting.

    One worker means this process, so that small builds start no processes.
    """

    def __init__(self, job: Job, workers: int) -> None:
        self.workers = workers
        self.pool = None
        if workers > 1:
            # fork would copy DuckDB's and Arrow's threads' locks.
            self.pool = ProcessPoolExecutor(
                workers, mp_context=get_context("spawn"), initializer=_start, initargs=(job,)
            )
        else:
            _start(job)

    def map(self, function: Callable[[bytes], object], jobs: Iterable[bytes]) -> Iterator:
        """Results in the order of `jobs`, which are only drawn as results are taken."""
        if self.pool is None:
            yield from map(function, jobs)
            return
        waiting: deque = deque()
        for job in jobs:
            waiting.append(self.pool.submit(function, job))
            if len(waiting) > 2 * self.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def close(self) -> None:
        global _STATE
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
        _STATE = None


class TextStore:
    """Distinct texts on disk, by row number from 0: read by memory map, written in order.

    Four flat files: keys, and for text bytes and token ids the ends and the values.
    """

    PARTS = {
        "keys": np.int64,
        "text_ends": np.int64,
        "text_bytes": np.uint8,
        "token_ends": np.int64,
        "token_ids": np.int32,
    }

    def __init__(self, folder: Path) -> None:
        self.arrays = {name: map_array(folder / f"texts-{name}.bin", kind) for name, kind in self.PARTS.items()}

    def take(self, rows: np.ndarray) -> pa.StructArray:
        """The texts of int64 rows `[m]` as an array of `blocks.TEXT`."""
        texts = self._gather("text_ends", "text_bytes", rows)
        tokens = self._gather("token_ends", "token_ids", rows)
        strings = pa.StringArray.from_buffers(
            len(rows), pa.py_buffer(texts.offsets.astype(np.int32)), pa.py_buffer(np.ascontiguousarray(texts.values))
        )
        lists = pa.ListArray.from_arrays(pa.array(tokens.offsets.astype(np.int32)), pa.array(tokens.values, pa.int32()))
        return pa.StructArray.from_arrays([pa.array(self.arrays["keys"][rows]), strings, lists], fields=list(TEXT))

    def _gather(self, ends: str, values: str, rows: np.ndarray) -> Ragged:
        stops = self.arrays[ends][rows]
        starts = np.where(rows > 0, self.arrays[ends][rows - 1], 0)
        return gather(self.arrays[values], starts, stops)

    class Writer:
        """Appends arrays of `blocks.TEXT`."""

        def __init__(self, folder: Path) -> None:
            self.files = {name: open(folder / f"texts-{name}.bin", "wb") for name in TextStore.PARTS}  # noqa: SIM115
            self.bytes = self.tokens = 0

        def append(self, texts: pa.StructArray) -> None:
            strings, lists = texts.field("text").cast(pa.large_binary()), texts.field("tokens")
            text_ends = np.cumsum(pa.compute.binary_length(strings).to_numpy(zero_copy_only=False)) + self.bytes
            token_ends = np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)) + self.tokens
            texts.field("key").to_numpy(zero_copy_only=False).astype(np.int64).tofile(self.files["keys"])
            text_ends.astype(np.int64).tofile(self.files["text_ends"])
            token_ends.tofile(self.files["token_ends"])
            self.files["text_bytes"].write(b"".join(strings.to_pylist()))
            lists.flatten().to_numpy(zero_copy_only=False).astype(np.int32).tofile(self.files["token_ids"])
            if len(texts):
                self.bytes, self.tokens = int(text_ends[-1]), int(token_ends[-1])

        def close(self) -> None:
            for file in self.files.values():
                file.close()


def map_array(path: Path, kind: type) -> np.ndarray:
    """A flat file as a read-only array, not read until touched; empty files are allowed."""
    if os.path.getsize(path) == 0:
        return np.zeros(0, kind)
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), kind)


def gather(values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Ragged:
    """Lists `values[starts[i]:stops[i]]`, copied."""
    lengths = stops - starts
    taken = Ragged.from_lengths(values, lengths)
    within = np.arange(taken.offsets[-1]) - np.repeat(taken.offsets[:-1], lengths)
    taken.values = values[np.repeat(starts, lengths) + within]
    return taken


class _State:
    """A worker's open files; the tokenizer and the text store appear in different phases."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.arrow_schema = arrow_schema(job.schema)
        self.groups: dict[str, EventGroup] = {f: g for g in groups_of(job.schema) for f in g.features}
        self._store: TextStore | None = None
        self._events: dict[str, np.ndarray] = {}
        self._tokenizer = None

    @property
    def store(self) -> TextStore:
        if self._store is None:
            self._store = TextStore(self.job.folder)
        return self._store

    def events(self, feature: str) -> np.ndarray:
        if feature not in self._events:
            self._events[feature] = map_array(values_path(self.job.folder, feature), np.int64)
        return self._events[feature]

    @property
    def tokenizer(self):
        if self._tokenizer is None:
            # The build has its own processes; the tokenizer's threads would only fight them.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(self.job.tokenizer))
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(self.job.max_tokens)
        return self._tokenizer


_STATE: _State | None = None


def _start(job: Job) -> None:
    global _STATE
    _STATE = _State(job)


def pack(batch: pa.RecordBatch) -> bytes:
    """A record batch for another process: only the rows it shows, not the buffers it is cut from."""
    return encode_block(batch)


def unpack(data: bytes) -> pa.RecordBatch:
    with pa.ipc.open_stream(data) as reader:
        return reader.read_next_batch()


def tokenise(data: bytes) -> bytes:
    """Texts (a batch with a column `value`) → a packed batch with the columns of `blocks.TEXT`."""
    texts = unpack(data).column("value").to_pylist()
    if _STATE.job.tokenizer is None:
        tokens = [[]] * len(texts)
    else:
        tokens = [encoding.ids for encoding in _STATE.tokenizer.encode_batch_fast(texts)]
    columns = [
        pa.array([text_key(text) for text in texts], pa.int64()),
        pa.array(texts, pa.string()),
        pa.array(tokens, pa.list_(pa.int32())),
    ]
    return pack(pa.record_batch(columns, schema=pa.schema(list(TEXT))))


def make_block(data: bytes) -> EncodedBlock:
    """Rows of `encoded` (packed, with the ranges of histories) → a block and its statistics."""
    batch, schema = unpack(data), _STATE.job.schema
    columns: list[pa.Array] = []
    for name, feature in schema.features.items():
        kind = _STATE.arrow_schema.field(name).type
        raw = _history(batch, name, feature.max_length) if feature.events is not None else batch.column(f"f:{name}")
        if feature.kind == "dense":
            columns.append(_fixed(raw, feature.width))
        elif feature.kind in ("id", "ids"):
            columns.append(_defined(raw).cast(kind))
        else:
            columns.append(text_column(raw, kind, _STATE.store.take))
    columns += [_defined(batch.column(f"label:{name}")).cast(pa.float32()) for name in schema.labels]
    columns += [_defined(batch.column(f"key:{k}")).cast(pa.int64()) for k in KEY_NAMES if getattr(schema.keys, k)]
    return finish(pa.record_batch(columns, schema=_STATE.arrow_schema), schema)


def finish(batch: pa.RecordBatch, schema: Schema) -> EncodedBlock:
    """A block's columns (`blocks.arrow_schema`) → the block, and what the index says of it."""
    n, features, labels = batch.num_rows, {}, {}
    for name, feature in schema.features.items():
        column = batch.column(name)
        counts = features[name] = FeatureCounts(nulls=column.null_count)
        if feature.kind == "dense":
            counts.total, counts.longest = feature.width * (n - column.null_count), feature.width
        elif feature.kind == "text":
            used = column.indices.drop_null().to_numpy(zero_copy_only=False)
            lengths = column.dictionary.field("tokens").value_lengths().to_numpy(zero_copy_only=False)[used]
            counts.total, counts.longest = int(lengths.sum()), int(lengths.max(initial=0))
        else:
            _count_lengths(counts, column)
        if feature.kind in ("id", "ids") and schema.features[schema.table_of(name)].vocabulary.kind == "dictionary":
            values = column.flatten() if feature.kind == "ids" else column
            counts.unknown = int(np.count_nonzero(values.drop_null().to_numpy(zero_copy_only=False) == 0))
    for name, label in schema.labels.items():
        values = batch.column(f"label:{name}").drop_null().to_numpy(zero_copy_only=False)
        positive = int(np.count_nonzero(values >= label.maximum / 2))
        labels[name] = {"valid": len(values), "positive": positive, "missing": n - len(values)}
    times = batch.column("key:time").drop_null().to_numpy(zero_copy_only=False) if schema.keys.time else ()
    span = (int(times.min()), int(times.max())) if len(times) else None
    payload = encode_block(batch)
    return EncodedBlock(payload, n, crc32(payload), span, features, labels)


def _defined(column: pa.Array) -> pa.Array:
    """The same numbers, or lists of numbers, with zeros under nulls and nothing under null lists.

    The SQL engine leaves there what its memory held, and bitmaps end with bits of rows that were
    cut off; both would stand in the block's bytes and make equal builds differ. For 64-bit values
    only, before any cast to 32: the IPC writer pads to 8 bytes with whatever follows a slice.
    """
    if not column.null_count:
        return column
    null = column.is_null().to_numpy(zero_copy_only=False)
    if isinstance(column, pa.ListArray):
        lengths = column.value_lengths().fill_null(0).to_numpy()
        values = column.flatten()
        return pa.ListArray.from_arrays(_offsets(lengths), values, mask=pa.array(null))
    return pa.array(column.fill_null(0).to_numpy(), column.type, mask=null)


def _offsets(lengths: np.ndarray) -> pa.Array:
    """Arrow's offsets of lists with these lengths."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.array(offsets)


def _history(batch: pa.RecordBatch, name: str, max_length: int) -> pa.ListArray:
    """Cut a history out of the event file; null where the row has no user or no time."""
    group = _STATE.groups[name]
    first, end = batch.column(f"h{group.number}:user"), batch.column(f"h{group.number}:end")
    null = first.is_null().to_numpy(zero_copy_only=False)
    stops = end.fill_null(0).to_numpy(zero_copy_only=False)
    starts = np.maximum(first.fill_null(0).to_numpy(zero_copy_only=False), stops - max_length)
    lists = gather(_STATE.events(name), np.where(null, stops, starts), stops)
    return pa.ListArray.from_arrays(
        pa.array(lists.offsets.astype(np.int32)), pa.array(lists.values, pa.int64()), mask=pa.array(null)
    )


def _fixed(raw: pa.ListArray, width: int) -> pa.FixedSizeListArray:
    valid = raw.is_valid().to_numpy(zero_copy_only=False)
    values = np.zeros((len(raw), width), np.float32)
    values[valid] = raw.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width, mask=pa.array(~valid))


def text_column(raw: pa.Array, kind: pa.DataType, take: Callable[[np.ndarray], pa.StructArray]) -> pa.Array:
    """Numbers of texts → the dictionary of the block's distinct texts, and indices or lists of them.

    Args:
        raw: int64 `[n]`, or lists of int64; nulls are nulls.
        kind: of the column in a block.
        take: gives the texts of distinct numbers, int64 `[m]`, as an array of `blocks.TEXT`.
    """
    values = raw.flatten() if isinstance(raw, pa.ListArray) else raw
    present = values.drop_null().to_numpy(zero_copy_only=False).astype(np.int64)
    distinct, inverse = np.unique(present, return_inverse=True)
    valid = values.is_valid().to_numpy(zero_copy_only=False)
    indices = np.zeros(len(values), np.int32)
    indices[valid] = inverse
    coded = pa.DictionaryArray.from_arrays(pa.array(indices, mask=~valid), take(distinct))
    if not isinstance(raw, pa.ListArray):
        return coded
    lengths = raw.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    null = raw.is_null().to_numpy(zero_copy_only=False)
    return pa.ListArray.from_arrays(_offsets(lengths), coded, mask=pa.array(null)).cast(kind)


def _count_lengths(counts: FeatureCounts, raw: pa.Array) -> None:
    if isinstance(raw, pa.ListArray):
        lengths = raw.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        counts.total, counts.longest = int(lengths.sum()), int(lengths.max(initial=0))
    else:
        counts.total, counts.longest = len(raw) - raw.null_count, int(raw.null_count < len(raw))
