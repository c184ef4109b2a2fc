"""Blocks by number: a block's byte range, which is tar by itself, fetched and read by WebDataset."""

from __future__ import annotations

import io
import zlib
from collections import OrderedDict

import fsspec
import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from ..errors import UserError
from .blocks import decode_block
from .index import Index, join
from .rows import Rows


class ShardReader:
    """Random access to the blocks of a data set, counted over its whole index.

    Args:
        root: folder or fsspec URL.
        index: of that data set.
        features: which features to decode.
        with_tokens: whether token ids are wanted.
        keep: how many decoded blocks stay in memory; `Stream` sets what it needs.
    """

    def __init__(self, root: str, index: Index, features: list[str], with_tokens: bool = False, keep: int = 4) -> None:
        self.root, self.index, self.features, self.with_tokens = root, index, features, with_tokens
        self.fs, _ = fsspec.core.url_to_fs(root)
        self.places = [(shard, block) for shard in index.shards for block in shard.blocks]
        self.first_rows = np.cumsum([0] + [block.rows for _, block in self.places])
        self.domain_of = {name: i for i, name in enumerate(index.schema.domains.names)}
        self.keep = keep
        self._decoded: OrderedDict[int, Rows] = OrderedDict()

    def payload(self, number: int) -> bytes:
        """The bytes of a block, checked against the index.

        Raises:
            UserError: shard missing or short, member not readable, checksum wrong.
        """
        shard, block = self.places[number]
        where = f"{join(self.root, shard.file)}, block {block.name}"
        try:
            data = self.fs.cat_file(join(self.root, shard.file), start=block.offset, end=block.offset + block.bytes)
        except FileNotFoundError:
            raise UserError(f"{where}: the shard is missing. Restore it, or build the data set again.") from None
        except Exception as error:  # what a file system raises is its own affair, HTTP's are no OSErrors
            raise UserError(f"{where}: cannot be read: {error}.") from None
        if len(data) != block.bytes:
            raise UserError(
                f"{where} is damaged: {len(data)} bytes came where {block.bytes} were asked for; the shard is short, "
                "or its server ignores byte ranges. Run `dist-rec shards verify`."
            )
        members = tar_file_expander(iter([{"url": shard.file, "stream": io.BytesIO(data)}]))
        try:
            samples = list(group_by_keys(members))
        except Exception as error:
            raise UserError(f"{where} is damaged: {error}. Run `dist-rec shards verify`.") from None
        if len(samples) != 1 or "arrow" not in samples[0]:
            raise UserError(f"{where} is damaged: its byte range holds no Arrow member. Run `dist-rec shards verify`.")
        found = samples[0]["arrow"]
        if zlib.crc32(found) != block.crc32:
            first = int(self.first_rows[number])
            raise UserError(
                f"{where} (rows {first} .. {first + block.rows - 1}) is damaged: its checksum is not the index's. "
                "Restore the shard, or build the data set again."
            )
        return found

    def rows(self, number: int) -> Rows:
        """A block's decoded rows."""
        if number in self._decoded:
            self._decoded.move_to_end(number)
            return self._decoded[number]
        shard, block = self.places[number]
        where = f"{join(self.root, shard.file)}, block {block.name}"
        rows = decode_block(
            self.payload(number),
            self.index.schema,
            where,
            int(self.first_rows[number]),
            self.domain_of[shard.domain],
            self.features,
            self.with_tokens,
        )
        if len(rows) != block.rows:
            raise UserError(f"{where}: has {len(rows)} rows, the index says {block.rows}. Build the data set again.")
        self._decoded[number] = rows
        if len(self._decoded) > self.keep:
            self._decoded.popitem(last=False)
        return rows
