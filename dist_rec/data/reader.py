"""Blocks by number: a block's byte range fetched, checked and decoded; and what happens where one is damaged."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from webdataset.tariterators import tar_file_iterator

from ..errors import UserError
from .blocks import arrow_schema, decode_block
from .index import TAR_UNIT, Index, join
from .prefetch import Prefetch
from .remote import DEFAULT_RETRY, Files, Retry, Unreadable
from .rows import Rows
from .validate import WrongSchema, check_member, member_payload, open_batch

# How many lost blocks the last message names; `lost_summary` has them all.
MOST_NAMED = 10


class _Pieces:
    """A file whose every `read` gives a piece, of whatever length: `tarfile` joins what it reads and asks for 10 kB
    at a time, which would copy a payload in hundreds of pieces, and more than once."""

    def __init__(self, *pieces: bytes | memoryview) -> None:
        self._left = iter(pieces)

    def read(self, _: int) -> bytes | memoryview:
        return next(self._left, b"")


def _read_tar(member: bytes, payload: memoryview) -> bytes:
    """What WebDataset reads from a tar member, whose header says that `payload` is in it."""
    (sample,) = tar_file_iterator(_Pieces(member[:TAR_UNIT], payload, member[TAR_UNIT + len(payload) :]))
    return sample["data"]


class ShardReader:
    """Random access to the blocks of a data set, counted over its whole index.

    Args:
        root: folder or fsspec URL.
        index: of that data set.
        features: which features to decode.
        with_tokens: whether token ids are wanted.
        keep: how many decoded blocks stay in memory; `Stream` sets what it needs.
        damaged: `stop` at a block that cannot be had, or `quarantine` it: void rows
            (`Rows.void`) hold its places, and `lost` says why.
        max_damaged_share: share of the index's rows that may be lost so; more ends the reading.
        retry: of every read.

    Attributes:
        lost: block number -> why it was given up.
    """

    def __init__(
        self,
        root: str,
        index: Index,
        features: list[str],
        with_tokens: bool = False,
        keep: int = 4,
        *,
        damaged: Literal["stop", "quarantine"] = "stop",
        max_damaged_share: float = 0.0,
        retry: Retry = DEFAULT_RETRY,
    ) -> None:
        self.root, self.index, self.features, self.with_tokens = root, index, features, with_tokens
        self.damaged, self.max_damaged_share = damaged, max_damaged_share
        self.files = Files(root, retry)
        self.places = [(shard, block) for shard in index.shards for block in shard.blocks]
        self.first_rows = np.cumsum([0] + [block.rows for _, block in self.places])
        self.domain_of = {name: i for i, name in enumerate(index.schema.domains.names)}
        self.keep = keep
        self.lost: dict[int, str] = {}
        self._decoded: OrderedDict[int, Rows] = OrderedDict()
        self._ahead = Prefetch(self.member, lambda number: self.places[number][1].bytes)

    @property
    def cancelled(self) -> threading.Event:
        """Set it, and every read and wait of this reader ends at once with `remote.Cancelled`."""
        return self.files.cancelled

    @cancelled.setter
    def cancelled(self, event: threading.Event) -> None:
        self.files.cancelled = event

    def where(self, number: int) -> str:
        """Shard, block and rows, as messages name them."""
        shard, block = self.places[number]
        first = int(self.first_rows[number])
        return f"{join(self.root, shard.file)}, block {block.name} (rows {first} .. {first + block.rows - 1})"

    def member(self, number: int) -> bytes:
        """The tar member of a block: header, payload and padding, with the index's checksum.

        Raises:
            UserError: it cannot be read, or is not what the index says.
        """
        shard, block = self.places[number]
        where = self.where(number)
        stop = block.offset + block.bytes
        try:
            return self.files.read(shard.file, block.offset, stop, lambda data: check_member(data, block, where))
        except Unreadable as error:
            if error.missing:
                raise UserError(f"{where}: the shard is missing. Restore it, or build the data set again.") from None
            if error.short:
                raise UserError(f"{where} is damaged: {error}. Restore the shard.") from None
            raise UserError(
                f"{where}: cannot be read: {error}. Run `dist-rec shards verify`; restore the shard, or mend the way "
                "to it, and run again."
            ) from None

    def batch(self, number: int) -> pa.RecordBatch:
        """A block's columns as they were written (`blocks.arrow_schema` of `Index.stored`), of any feature.

        Raises:
            UserError: it is damaged, of another schema than the index's, or has other rows than that says.
        """
        _, block = self.places[number]
        where, member = self.where(number), self._ahead.take(number)
        member = self.member(number) if member is None else member
        payload = _read_tar(member, member_payload(member, block, where))
        batch = open_batch(payload, arrow_schema(self.index.stored), where)
        if batch.num_rows != block.rows:
            raise UserError(f"{where}: has {batch.num_rows} rows, the index says {block.rows}. Build it again.")
        return batch

    def decode(self, number: int, member: bytes) -> Rows:
        """The rows in the tar member of a block.

        Raises:
            UserError: no block of the index's schema, row count and vocabularies.
        """
        shard, block = self.places[number]
        where = self.where(number)
        rows = decode_block(
            _read_tar(member, member_payload(member, block, where)),
            self.index.schema,
            where,
            int(self.first_rows[number]),
            self.domain_of[shard.domain],
            self.features,
            self.with_tokens,
            self.index.stored,
        )
        if len(rows) != block.rows:
            raise UserError(f"{where}: has {len(rows)} rows, the index says {block.rows}. Build the data set again.")
        return rows

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Say which blocks `rows` will be asked for next, soonest first, in place of what was said before.

        They are fetched by a few threads within a budget of bytes. Local files are not: the
        system reads those ahead itself.
        """
        if not self.files.local:
            self._ahead.want(n for n in numbers if n not in self._decoded and n not in self.lost)

    def rows(self, number: int) -> Rows:
        """A block's decoded rows; void ones where it is quarantined.

        Raises:
            UserError: it is damaged, and `damaged` is `stop`; too much is lost; it is sound, but of
                another schema than the index's.
        """
        if number in self._decoded:
            self._decoded.move_to_end(number)
            return self._decoded[number]
        if number in self.lost:
            return self._void(number)
        try:
            member = self._ahead.take(number)
            rows = self.decode(number, self.member(number) if member is None else member)
        except WrongSchema:
            raise
        except UserError as error:
            if self.damaged == "stop":
                raise
            self._lose(number, str(error))
            return self._void(number)
        self._decoded[number] = rows
        if len(self._decoded) > self.keep:
            self._decoded.popitem(last=False)
        return rows

    def lost_summary(self) -> list[dict[str, Any]]:
        """What was lost so far, in the index's order: `shard`, `block`, `rows` [first, last], `reason`."""
        return [
            {
                "shard": self.places[number][0].file,
                "block": self.places[number][1].name,
                "rows": [int(self.first_rows[number]), int(self.first_rows[number + 1]) - 1],
                "reason": self.lost[number],
            }
            for number in sorted(self.lost)
        ]

    def _lose(self, number: int, reason: str) -> None:
        self.lost[number] = reason
        rows = sum(self.places[n][1].rows for n in self.lost)
        share = rows / int(self.first_rows[-1])
        if share > self.max_damaged_share:
            named = [f"  - {self.lost[n]}" for n in sorted(self.lost)[:MOST_NAMED]]
            more = f"\n  - and {len(self.lost) - MOST_NAMED} more" if len(self.lost) > MOST_NAMED else ""
            raise UserError(
                f"{rows:,} rows of {self.root} are lost, {share:.2%} of it; data.max_damaged_share is "
                f"{self.max_damaged_share:.2%}:\n" + "\n".join(named) + more
            )
        count = self.places[number][1].rows
        print(f"dist-rec: left out {count} rows, {rows:,} ({share:.2%}) by now: {reason}", file=sys.stderr, flush=True)

    def _void(self, number: int) -> Rows:
        shard, block = self.places[number]
        domain = self.domain_of[shard.domain]
        return Rows.void(self.index.schema, self.features, self.with_tokens, domain, block.rows)
