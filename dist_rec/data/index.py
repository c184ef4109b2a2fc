"""`index.json`: what a built data set holds, where each block lies, and how to check it.

A data set is a folder or an fsspec URL with `index.json` and tar files. Without an index there
is no data set: it is written last, and renamed into place. Knows files, not tensors.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from ..errors import UserError
from ..schema import Schema
from ..strict import from_dict, parse_json, strict
from .remote import DEFAULT_RETRY, Files, Retry, Unreadable
from .validate import check_index

FORMAT = "dist_rec/1"
INDEX_NAME = "index.json"
SPLITS = ("train", "valid", "test")
# Two billion rows in default blocks. It is parsed whole, which takes several times its size.
LARGEST_INDEX = 256 << 20
# Differences of two times must fit in 64 bits.
Time = Annotated[int, Field(gt=-(2**62), lt=2**62)]


@strict
class BlockInfo:
    """One tar member: an Arrow IPC stream with one record batch.

    `offset` and `bytes` cover the member's tar header, payload and padding, so the range
    `[offset, offset + bytes)` of the shard is itself readable as tar. `crc32` is the payload's.
    """

    name: str
    rows: int = Field(ge=1)
    offset: int = Field(ge=0)
    bytes: int = Field(ge=1)
    crc32: int = Field(ge=0)
    time: tuple[Time, Time] | None = None


@strict
class ShardInfo:
    """One tar file; all its rows are of one domain. `sha256` is the whole file's.

    `generation` counts the times that data was appended: 0 is what the data set was built with.
    """

    file: str
    domain: str
    bytes: int = Field(ge=1)
    sha256: str
    generation: int = Field(default=0, ge=0)
    blocks: list[BlockInfo] = Field(min_length=1)

    @property
    def rows(self) -> int:
        return sum(block.rows for block in self.blocks)


@strict
class TokenizerInfo:
    """Whose token ids the blocks carry. `fingerprint` is the SHA-256 of tokenizer.json."""

    name: str
    fingerprint: str
    max_length: int = Field(ge=1)


@strict
class FeatureStatistics:
    """Per feature over all rows of the data set.

    `mean_length` and `max_length` count ids of an `id` or `ids` feature, tokens of a `text`, texts
    of a `texts`, floats of a `dense`; a null counts as 0. The planner takes pooling factors from
    `mean_length`. `unknown` counts ids on row 0 of a dictionary vocabulary.
    """

    null_share: float
    mean_length: float
    max_length: int
    unknown: int = Field(default=0, ge=0)


@strict
class Index:
    """The whole index. `schema` has every vocabulary size filled in."""

    format: Literal["dist_rec/1"]
    name: str
    split: str
    schema: Schema
    tokenizer: TokenizerInfo | None = None
    statistics: dict[str, FeatureStatistics]
    label_counts: dict[str, dict[str, int]]
    shards: list[ShardInfo] = Field(min_length=1)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def rows_of(self, domain: str) -> int:
        return sum(shard.rows for shard in self.shards if shard.domain == domain)

    @property
    def generation(self) -> int:
        """The newest generation."""
        return max(shard.generation for shard in self.shards)

    def between(self, after: int, upto: int) -> Index:
        """The same index with only the shards of `after` < generation <= `upto`; -1 is before all.

        Rows and blocks are numbered within what is returned; `statistics` and `label_counts` stay
        those of the whole.

        Raises:
            UserError: there is no such shard.
        """
        shards = [shard for shard in self.shards if after < shard.generation <= upto]
        if not shards:
            upper = "" if upto >= self.generation else f" up to generation {upto}"
            raise UserError(
                f"data set {self.name} ({self.split}): nothing was appended since generation {after}{upper}; its "
                f"newest is {self.generation}. Append rows with `dist-rec shards append`."
            )
        return replace(self, shards=shards)


def join(root: str, name: str) -> str:
    """`root/name` for local folders and URLs alike."""
    return f"{root.rstrip('/')}/{name}"


def read_index(root: str, retry: Retry = DEFAULT_RETRY) -> Index:
    """Read and check the index of the data set at `root` (folder or fsspec URL).

    Raises:
        UserError: there is none, it cannot be read, it is not JSON, or it is not an index; every
            fault of its form is listed.
    """
    path = join(root, INDEX_NAME)
    try:
        text = Files(root, retry).read_whole(INDEX_NAME, LARGEST_INDEX)
    except Unreadable as error:
        if not error.missing:
            raise UserError(f"cannot read {path}: {error}.") from None
        splits = [join(root, split) for split in SPLITS if Path(root, split, INDEX_NAME).is_file()]
        advice = "Build one with `dist-rec shards build` or a recipe of shards/recipes."
        if splits:
            advice = f"Its splits are data sets: name {' or '.join(splits)}."
        raise UserError(f"no data set at {root}: {INDEX_NAME} is missing. {advice}") from None
    index = from_dict(Index, parse_json(text, path), path)
    check_index(index, path)
    return index


def write_index(root: str, index: Index) -> None:
    """Publish `index` at the local folder `root`: written beside, then renamed; on disk when this returns."""
    path = Path(root, INDEX_NAME)
    partial = path.with_name(INDEX_NAME + ".partial")
    partial.write_bytes(TypeAdapter(Index).dump_json(index, indent=1))
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Put on disk what a file holds, or which names a folder holds."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
