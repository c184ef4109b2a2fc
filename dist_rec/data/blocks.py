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

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..schema import Feature, Schema
from ..scoring.hashes import text_key
from .rows import KEY_NAMES, Ragged, Rows, id_dtype
from .validate import open_batch

TEXT = pa.struct([("key", pa.int64()), ("text", pa.string()), ("tokens", pa.list_(pa.int32()))])


def arrow_schema(schema: Schema) -> pa.Schema:
    """The Arrow schema of every block of a resolved `schema`."""
    text = pa.dictionary(pa.int32(), TEXT)
    sizes = schema.table_sizes()
    fields = []
    for name, feature in schema.features.items():
        if feature.kind in ("id", "ids"):
            integer = pa.from_numpy_dtype(id_dtype(sizes[schema.table_of(name)]))
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
    written: Schema | None = None,
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
        written: the schema that the block was written under, which `schema` extends; None is the same. What it lacks
            is null.

    Raises:
        WrongSchema: its columns are others.
        UserError: the bytes are not such a block, a table row is outside its vocabulary, or a
            label is outside its range; names the block and the row.
    """
    written = written or schema
    batch = open_batch(payload, arrow_schema(written), where)
    for column in arrow_schema(schema) if written is not schema else ():
        if column.name not in batch.schema.names:
            batch = batch.append_column(column, pa.nulls(batch.num_rows, column.type))
    rows = read_columns(batch, schema, where, first_row, domain, features, with_tokens)
    _check_values(rows, written, where)
    return rows


def read_columns(
    batch: pa.RecordBatch,
    schema: Schema,
    where: str,
    first_row: int,
    domain: int,
    features: Iterable[str],
    with_tokens: bool,
) -> Rows:
    """`decode_block` of a batch that was checked; columns without nulls are views of it."""
    n = batch.num_rows
    rows = Rows(domain=np.full(n, domain, np.int64), row=np.arange(first_row, first_row + n))
    dictionaries: list[tuple[str, Ragged, pa.StructArray]] = []
    for name in features:
        feature, column = schema.features[name], batch.column(name)
        if feature.kind in ("id", "ids"):
            rows.ids[name] = _ragged(column, where)
        elif feature.kind == "dense":
            rows.dense[name] = _dense(column, feature)
        else:
            indices, dictionary = _text_indices(column, where)
            dictionaries.append((name, indices, dictionary))
    _stack_texts(rows, dictionaries, with_tokens, where)
    for name in schema.labels:
        rows.labels[name] = batch.column(f"label:{name}").to_numpy(zero_copy_only=False)
    for key in KEY_NAMES:
        if getattr(schema.keys, key):
            column = batch.column(f"key:{key}")
            rows.keys[key] = (column.fill_null(-1) if column.null_count else column).to_numpy()
        else:
            rows.keys[key] = np.full(n, -1, np.int64)
    return rows


def _check_values(rows: Rows, schema: Schema, where: str) -> None:
    sizes = schema.table_sizes()
    for name, ids in rows.ids.items():
        if name not in schema.features:
            continue  # of a schema that extends this one: all null
        size = sizes[schema.table_of(name)]
        # As unsigned numbers, negative ones are the largest.
        unsigned = ids.values.view(f"u{ids.values.itemsize}")
        if len(unsigned) and unsigned.max() >= size:
            at = int(np.flatnonzero((ids.values < 0) | (ids.values >= size))[0])
            row = int(np.searchsorted(ids.offsets, at, side="right")) - 1
            raise UserError(
                f"{where}, row {row}: {name!r} has id {ids.values[at]}, outside its vocabulary 0 .. {size - 1}."
            )
    for name, label in schema.labels.items():
        values = rows.labels[name]
        bad = (values < 0) | (values > label.maximum)
        if label.kind == "binary":
            bad |= (values > 0) & (values < 1)
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            allowed = "0 or 1" if label.kind == "binary" else f"0 .. {label.maximum:g}"
            raise UserError(f"{where}, row {at}: label {name!r} is {values[at]:g}, allowed is {allowed}.")


def _ragged(column: pa.Array, where: str) -> Ragged:
    """A scalar or list column as lists; nulls are empty."""
    if isinstance(column, pa.ListArray):
        # flatten() drops what hides under null lists, which raw offsets would not.
        values = column.flatten()
        if values.null_count:
            raise UserError(f"{where} is damaged: a list holds a null entry. Build the data set again.")
        return _lists(column, values.to_numpy())
    if not column.null_count:
        return Ragged(column.to_numpy(), np.arange(len(column) + 1))
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    return Ragged.from_lengths(column.drop_null().to_numpy(), valid)


def _lists(column: pa.ListArray, values: np.ndarray) -> Ragged:
    """The lists of a column whose flattened values are `values`."""
    if column.null_count:
        return Ragged.from_lengths(values, column.value_lengths().fill_null(0).to_numpy())
    offsets = column.offsets.to_numpy().astype(np.int64)
    return Ragged(values, offsets - offsets[0])


def _dense(column: pa.FixedSizeListArray, feature: Feature) -> np.ndarray:
    values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, feature.width)
    if not column.null_count:
        return values
    out = np.full((len(column), feature.width), np.nan, np.float32)
    out[column.is_valid().to_numpy(zero_copy_only=False)] = values
    return out


def _text_indices(column: pa.Array, where: str) -> tuple[Ragged, pa.StructArray]:
    if isinstance(column, pa.ListArray):
        # Arrow cannot flatten dictionaries under null lists: flatten the indices alone.
        values = column.values
        indices = pa.ListArray.from_arrays(column.offsets, values.indices, mask=column.is_null()).flatten()
        if indices.null_count:
            raise UserError(f"{where} is damaged: a list holds a null text. Build the data set again.")
        return _lists(column, indices.to_numpy()), values.dictionary
    return _ragged(column.indices, where), column.dictionary


def _stack_texts(rows: Rows, columns: list[tuple[str, Ragged, pa.StructArray]], with_tokens: bool, where: str) -> None:
    """One text table of the dictionaries of the block's text columns, one after another."""
    rows.tokens = Ragged(np.zeros(0, np.int32), np.zeros(1, np.int64)) if with_tokens else None
    if not columns:
        return
    start = 0
    for name, indices, dictionary in columns:
        rows.texts[name] = Ragged(indices.values + start, indices.offsets)
        start += len(dictionary)
    rows.text_keys = np.concatenate([d.field("key").to_numpy() for _, _, d in columns])
    if with_tokens:
        rows.tokens = Ragged.concat([_ragged(d.field("tokens"), where) for _, _, d in columns])
