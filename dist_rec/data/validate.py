"""What must hold before bytes from elsewhere are decoded: tar members and Arrow streams.

A data set may be damaged or made to do damage. So no size that the input claims decides an
allocation before it was compared with the bytes that are there, and nothing is expanded,
unpickled or followed elsewhere. Knows neither rows nor how bytes arrive.
"""

from __future__ import annotations

import struct
import tarfile

import numpy as np
import pyarrow as pa
from isal.isal_zlib import crc32  # zlib's checksum, ten times as fast

from ..errors import UserError
from .index import TAR_UNIT, BlockInfo


class WrongSchema(UserError):
    """A sound block of another schema than the index's: not damage, but the wrong data."""


def member_payload(member: bytes, block: BlockInfo, where: str) -> memoryview:
    """The payload of the tar member that fills `member`, without a copy.

    Only a plain USTAR file with the index's name, exactly as long as its range, is one: links,
    devices, sparse files, extended headers, compressed tars and other names are not.

    Args:
        where: shard and block, for messages.

    Raises:
        UserError: it is not that member.
    """
    try:
        header = tarfile.TarInfo.frombuf(member[:TAR_UNIT], tarfile.ENCODING, "surrogateescape")
    except (tarfile.TarError, ValueError) as error:
        raise UserError(f"{where} is damaged: no tar header at offset {block.offset} ({error}).") from None
    whole = TAR_UNIT + -(-header.size // TAR_UNIT) * TAR_UNIT
    if header.type != tarfile.REGTYPE or header.name != block.name or header.size < 0 or whole != len(member):
        raise UserError(
            f"{where} is damaged: its tar header is that of {header.name!r}, type {header.type!r}, "
            f"{header.size} bytes. Restore the shard, or build the data set again."
        )
    return memoryview(member)[TAR_UNIT : TAR_UNIT + header.size]


def check_member(member: bytes, block: BlockInfo, where: str) -> bytes:
    """`member` itself, if it is the block's tar member with the index's checksum.

    Raises:
        UserError: as `member_payload`, or another checksum.
    """
    if crc32(member_payload(member, block, where)) != block.crc32:
        raise UserError(
            f"{where} is damaged: its checksum is not the index's. Restore the shard, or build the data set again."
        )
    return member


def open_batch(payload: bytes | memoryview, expected: pa.Schema, where: str) -> pa.RecordBatch:
    """The record batch of a block, with every length, offset, index and string checked.

    Args:
        payload: an Arrow IPC stream.
        expected: the columns it must have.
        where: shard and block, for messages.

    Raises:
        WrongSchema: other columns.
        UserError: it is no such stream.
    """
    try:
        _check_messages(payload)
        with pa.ipc.open_stream(pa.py_buffer(payload)) as reader:
            # Before the batch is read: what the columns are decides what reading it may allocate.
            if not reader.schema.equals(expected):
                raise WrongSchema(f"{where}: its columns are not those of the index's schema.")
            batch = reader.read_next_batch()
        batch.validate(full=True)
        for column in batch.columns:
            _check_texts(column)
    except MemoryError:
        raise  # Arrow's too: a fault of this machine, not of the block
    except (pa.ArrowException, OSError, StopIteration, EOFError, struct.error, UnicodeDecodeError) as error:
        fault = str(error).rstrip(".")
        raise UserError(f"{where} is damaged: {fault}. Run `dist-rec shards verify` and build it again.") from None
    return batch


def _check_texts(column: pa.Array) -> None:
    """Texts have no nulls below the dictionary; Arrow would let them."""
    values = column.values if isinstance(column, pa.ListArray) else column
    if not isinstance(values, pa.DictionaryArray):
        return
    texts = values.dictionary
    tokens = texts.field("tokens")
    for part in (texts, texts.field("key"), texts.field("text"), tokens, tokens.values):
        if part.null_count:
            raise pa.ArrowInvalid("a text lacks its key, its string or a token")


def _check_messages(payload: bytes | memoryview) -> None:
    """Check what pyarrow acts on before anything can be validated, from the Flatbuffers metadata.

    One schema, then dictionaries, each once and whole, then one batch; none compressed, for a
    kilobyte may claim gigabytes; no array longer than its bytes could hold; every buffer inside
    its message, and none twice.

    Raises:
        pa.ArrowInvalid: it is otherwise.
        struct.error: the metadata is no such table.
    """
    kinds: list[str] = []
    dictionaries: list[int] = []
    for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(payload)):
        kinds.append(message.type)
        data = message.metadata.to_pybytes()
        (root,) = struct.unpack_from("<I", data, 0)
        header = _subtable(data, root, 2)
        if message.type == "schema":
            if _scalar(data, header, 0, "<h"):
                raise pa.ArrowInvalid("it is written for big-endian machines")
            continue
        if message.type == "dictionary":
            dictionaries.append(_scalar(data, header, 0, "<q"))
            if _scalar(data, header, 2, "<B"):
                raise pa.ArrowInvalid("a dictionary comes in several parts")
            header = _subtable(data, header, 1)
        elif message.type != "record batch":
            raise pa.ArrowInvalid(f"it holds a {message.type}")
        _check_batch(data, header, message.body.size if message.body else 0)
    order = ["schema", *["dictionary"] * len(dictionaries), "record batch"]
    if kinds != order or len(set(dictionaries)) != len(dictionaries):
        raise pa.ArrowInvalid(f"it is no schema, dictionaries and one batch, but {', '.join(kinds[:9]) or 'nothing'}")


def _check_batch(data: bytes, batch: int, body: int) -> None:
    if _field(data, batch, 3):
        raise pa.ArrowInvalid("its buffers are compressed, which no builder of ours writes")
    # An array without buffers, such as a struct, could claim any length.
    most = 8 * (body + 1)
    lengths, nulls = _pairs(data, batch, 1).T
    rows = _scalar(data, batch, 0, "<q")
    if not 0 <= rows <= most or (nulls < 0).any() or (nulls > lengths).any() or (lengths > most).any():
        raise pa.ArrowInvalid("an array claims a length that its bytes cannot hold")
    starts, sizes = _pairs(data, batch, 2).T
    # Checked one by one first, so that the sums cannot overflow.
    if ((starts < 0) | (sizes < 0) | (starts > body) | (sizes > body)).any() or (starts + sizes > body).any():
        raise pa.ArrowInvalid("a buffer lies outside its message")
    if (starts[1:] < (starts + sizes)[:-1]).any():
        raise pa.ArrowInvalid("its buffers overlap")


def _field(data: bytes, table: int, number: int) -> int:
    """Position of a Flatbuffers table's field, or 0 where it is left out."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0:
        raise pa.ArrowInvalid("its metadata points outside itself")
    (size,) = struct.unpack_from("<H", data, vtable)
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
    return table + offset if offset else 0


def _scalar(data: bytes, table: int, number: int, code: str) -> int:
    """A number of a table; left out, it is 0."""
    position = _field(data, table, number)
    return struct.unpack_from(code, data, position)[0] if position else 0


def _subtable(data: bytes, table: int, number: int) -> int:
    position = _field(data, table, number)
    if not position:
        raise pa.ArrowInvalid("a message lacks its header")
    return position + struct.unpack_from("<I", data, position)[0]


def _pairs(data: bytes, table: int, number: int) -> np.ndarray:
    """A vector of structs of two int64, `[n, 2]`."""
    if not _field(data, table, number):
        return np.zeros((0, 2), np.int64)
    start = _subtable(data, table, number)
    (n,) = struct.unpack_from("<I", data, start)
    if start + 4 + 16 * n > len(data):
        raise pa.ArrowInvalid("its metadata points outside itself")
    return np.frombuffer(data, "<i8", 2 * n, start + 4).reshape(n, 2)
