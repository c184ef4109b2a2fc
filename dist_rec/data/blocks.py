"""One block: the Arrow columns of a schema, encoded to bytes and decoded to `Rows`.

A block is an Arrow IPC stream with exactly one record batch, uncompressed. Column types:

    id      int32 or int64 (by vocabulary size), nullable
    ids     list of that, nullable
    dense   fixed-size list of float32, nullable
    text    dictionary of struct<key: int64, text: string, tokens: list<int32>>, nullable
    texts   list of that dictionary, nullable
    label   float32, nullable, in a column `label:<name>`
    key     int64, nullable, in a column `key:<user|query|time>`

`key` inside a text is the content hash by which texts are one and the same everywhere.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..schema import Feature, Schema
from .rows import Ragged, Rows

TEXT = pa.struct([("key", pa.int64()), ("text", pa.string()), ("tokens", pa.list_(pa.int32()))])
KEY_NAMES = ("user", "query", "time")


def text_key(text: str) -> int:
    """Signed 64-bit BLAKE2b of the UTF-8 text: the name of a text across blocks and runs."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def id_type(size: int) -> pa.DataType:
    """The integer type that holds table rows 0 .. size - 1."""
    return pa.int32() if size < 2**31 else pa.int64()


def arrow_schema(schema: Schema) -> pa.Schema:
    """The Arrow schema of every block of a resolved `schema`."""
    text = pa.dictionary(pa.int32(), TEXT)
    sizes = schema.table_sizes()
    fields = []
    for name, feature in schema.features.items():
        if feature.kind in ("id", "ids"):
            integer = id_type(sizes[schema.table_of(name)])
            kind = integer if feature.kind == "id" else pa.list_(integer)
        elif feature.kind == "dense":
            kind = pa.list_(pa.float32(), feature.width)
        else:
            kind = text if feature.kind == "text" else pa.list_(text)
        fields.append(pa.field(name, kind))
    fields += [pa.field(f"label:{name}", pa.float32()) for name in schema.labels]
    fields += [pa.field(f"key:{k}", pa.int64()) for k in KEY_NAMES if getattr(schema.keys, k)]
    return pa.schema(fields)


def encode_block(batch: pa.RecordBatch) -> bytes:
    """One record batch as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def text_array(texts: Sequence[str | None], tokens: dict[str, Sequence[int]] | None = None) -> pa.DictionaryArray:
    """Dictionary-encode texts, each distinct one once, with its key and token ids.

    Args:
        texts: n strings or None.
        tokens: token ids of every distinct text; None when the schema names no tokenizer.
    """
    encoded = pa.array(texts, pa.string()).dictionary_encode()
    distinct = encoded.dictionary.to_pylist()
    values = pa.StructArray.from_arrays(
        [
            pa.array([text_key(t) for t in distinct], pa.int64()),
            pa.array(distinct, pa.string()),
            pa.array([tokens[t] if tokens else [] for t in distinct], pa.list_(pa.int32())),
        ],
        fields=list(TEXT),
    )
    return pa.DictionaryArray.from_arrays(encoded.indices.cast(pa.int32()), values)


def decode_block(
    payload: bytes | memoryview,
    schema: Schema,
    where: str,
    first_row: int,
    domain: int,
    features: Iterable[str],
    with_tokens: bool,
) -> Rows:
    """Decode and check one block.

    Args:
        payload: the tar member's bytes.
        schema: resolved schema of the data set.
        where: "shard, block" for messages.
        first_row: number of the block's first row in the data set.
        domain: position of its domain in the schema.
        features: which features to decode; the others are left alone.
        with_tokens: decode token ids of texts too.

    Raises:
        UserError: the bytes are not such a block, a table row is outside its vocabulary, or a
            label is outside its range; names the block and the row.
    """
    try:
        _refuse_compression(payload)
        with pa.ipc.open_stream(pa.py_buffer(payload)) as reader:
            batch = reader.read_next_batch()
        batch.validate(full=True)
    except (pa.ArrowException, OSError, StopIteration, EOFError, struct.error) as error:
        raise UserError(f"{where} is damaged: {error}. Run `dist-rec shards verify` and build it again.") from None
    expected = arrow_schema(schema)
    if not batch.schema.equals(expected):
        raise UserError(f"{where}: its columns are not those of the index's schema.")
    n = batch.num_rows
    rows = Rows(domain=np.full(n, domain, np.int64), row=first_row + np.arange(n, dtype=np.int64))
    sizes = schema.table_sizes()
    dictionaries: list[tuple[str, Ragged, pa.StructArray]] = []
    for name in features:
        feature, column = schema.features[name], batch.column(name)
        if feature.kind in ("id", "ids"):
            rows.ids[name] = _checked_ids(_ragged(column, where), sizes[schema.table_of(name)], name, where)
        elif feature.kind == "dense":
            rows.dense[name] = _dense(column, feature)
        else:
            indices, dictionary = _text_indices(column, where)
            dictionaries.append((name, indices, dictionary))
    _merge_texts(rows, dictionaries, with_tokens, where)
    for name, label in schema.labels.items():
        values = batch.column(f"label:{name}").to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        bad = (values < 0) | (values > label.maximum)
        if label.kind == "binary":
            bad |= ~np.isnan(values) & (values != 0) & (values != 1)
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            allowed = "0 or 1" if label.kind == "binary" else f"0 .. {label.maximum:g}"
            raise UserError(f"{where}, row {at}: label {name!r} is {values[at]:g}, allowed is {allowed}.")
        rows.labels[name] = values
    for key in KEY_NAMES:
        if getattr(schema.keys, key):
            column = batch.column(f"key:{key}")
            rows.keys[key] = column.fill_null(-1).to_numpy(zero_copy_only=False)
        else:
            rows.keys[key] = np.full(n, -1, np.int64)
    return rows


def _refuse_compression(payload: bytes | memoryview) -> None:
    """A kilobyte of a compressed buffer may claim gigabytes, so none is ever expanded.

    pyarrow does not say whether a batch is compressed before it expands it; this reads it from
    the Flatbuffers metadata (Message.fbs: `RecordBatch.compression` is field 3).

    Raises:
        pa.ArrowInvalid: a batch or dictionary is compressed.
        struct.error: the metadata is no such table.
    """
    reader = pa.ipc.MessageReader.open_stream(pa.py_buffer(payload))
    for message in reader:
        if message.type not in ("record batch", "dictionary"):
            continue
        data = message.metadata.to_pybytes()
        (root,) = struct.unpack_from("<I", data, 0)
        batch = _subtable(data, root, 2)
        if message.type == "dictionary":
            batch = _subtable(data, batch, 1)
        if _field(data, batch, 3):
            raise pa.ArrowInvalid("its buffers are compressed, which no builder of ours writes")


def _field(data: bytes, table: int, number: int) -> int:
    """Position of a Flatbuffers table's field, or 0 where it is left out."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    (size,) = struct.unpack_from("<H", data, vtable)
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
    return table + offset if offset else 0


def _subtable(data: bytes, table: int, number: int) -> int:
    position = _field(data, table, number)
    if not position:
        raise pa.ArrowInvalid("a message lacks its batch")
    return position + struct.unpack_from("<I", data, position)[0]


def _ragged(column: pa.Array, where: str) -> Ragged:
    """A scalar or list column as lists; nulls are empty."""
    if isinstance(column, pa.ListArray):
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        # flatten() drops what hides under null lists, which raw offsets would not.
        values = column.flatten()
        if values.null_count:
            raise UserError(f"{where} is damaged: a list holds a null entry. Build the data set again.")
        return Ragged.from_lengths(values.to_numpy(zero_copy_only=False), lengths)
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    return Ragged.from_lengths(column.drop_null().to_numpy(zero_copy_only=False), valid)


def _checked_ids(ids: Ragged, size: int, name: str, where: str) -> Ragged:
    values = ids.values
    if len(values) and (values.min() < 0 or values.max() >= size):
        at = int(np.flatnonzero((values < 0) | (values >= size))[0])
        row = int(np.searchsorted(ids.offsets, at, side="right")) - 1
        raise UserError(f"{where}, row {row}: {name!r} has id {values[at]}, outside its vocabulary 0 .. {size - 1}.")
    return ids


def _dense(column: pa.FixedSizeListArray, feature: Feature) -> np.ndarray:
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    out = np.full((len(column), feature.width), np.nan, np.float32)
    out[valid] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, feature.width)
    return out


def _text_indices(column: pa.Array, where: str) -> tuple[Ragged, pa.StructArray]:
    if isinstance(column, pa.ListArray):
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        # Arrow cannot flatten dictionaries under null lists: flatten the indices alone.
        values = column.values
        indices = pa.ListArray.from_arrays(column.offsets, values.indices, mask=column.is_null()).flatten()
        if indices.null_count:
            raise UserError(f"{where} is damaged: a list holds a null text. Build the data set again.")
        return Ragged.from_lengths(indices.to_numpy(zero_copy_only=False), lengths), values.dictionary
    return _ragged(column.indices, where), column.dictionary


def _merge_texts(rows: Rows, columns: list[tuple[str, Ragged, pa.StructArray]], with_tokens: bool, where: str) -> None:
    """One table of distinct texts over all text columns of the block."""
    if not columns:
        rows.tokens = Ragged(np.zeros(0, np.int32), np.zeros(1, np.int64)) if with_tokens else None
        return
    starts = np.cumsum([0] + [len(dictionary) for _, _, dictionary in columns])
    keys = np.concatenate([d.field("key").to_numpy() for _, _, d in columns])
    rows.text_keys, firsts, inverse = np.unique(keys, return_index=True, return_inverse=True)
    for i, (name, indices, _) in enumerate(columns):
        rows.texts[name] = Ragged(inverse[starts[i] + indices.values], indices.offsets)
    if with_tokens:
        tokens = Ragged.concat([_ragged(d.field("tokens"), where) for _, _, d in columns])
        rows.tokens = tokens.take(firsts)
