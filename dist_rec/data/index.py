"""`index.json`: what a built data set holds, where each block lies, and how to check it.

A data set is a folder or an fsspec URL with `index.json` and tar files. Without an index there
is no data set: it is written last, and renamed into place. Knows files, not tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import fsspec
from pydantic import Field

from ..errors import UserError
from ..schema import Schema
from ..strict import from_dict, strict, to_dict

FORMAT = "dist_rec/1"
INDEX_NAME = "index.json"
SPLITS = ("train", "valid", "test")


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
    time: tuple[int, int] | None = None


@strict
class ShardInfo:
    """One tar file; all its rows are of one domain. `sha256` is the whole file's."""

    file: str
    domain: str
    bytes: int = Field(ge=1)
    sha256: str
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


def join(root: str, name: str) -> str:
    """`root/name` for local folders and URLs alike."""
    return f"{root.rstrip('/')}/{name}"


def read_index(root: str) -> Index:
    """Read and check the index of the data set at `root` (folder or fsspec URL).

    Raises:
        UserError: there is none, it is not JSON, or it is not an index; every fault is listed.
    """
    path = join(root, INDEX_NAME)
    try:
        with fsspec.open(path, "rb") as file:
            text = file.read()
    except FileNotFoundError:
        splits = [join(root, split) for split in SPLITS if Path(root, split, INDEX_NAME).is_file()]
        advice = "Build one with `dist-rec shards build` or a recipe of shards/recipes."
        if splits:
            advice = f"Its splits are data sets: name {' or '.join(splits)}."
        raise UserError(f"no data set at {root}: {INDEX_NAME} is missing. {advice}") from None
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is damaged: not JSON ({error}). Build the data set again.") from None
    index = from_dict(Index, data, path)
    for shard in index.shards:
        if shard.domain not in index.schema.domains.names:
            raise UserError(
                f"{path}: shard {shard.file} is of domain {shard.domain!r}, which the schema does not name."
            )
        if "/" in shard.file or "\\" in shard.file or shard.file in ("", ".", ".."):
            raise UserError(f"{path}: shard name {shard.file!r} is not a plain file name.")
    return index


def write_index(root: str, index: Index) -> None:
    """Publish `index` at the local folder `root`: written beside, then renamed."""
    fs, path = fsspec.core.url_to_fs(join(root, INDEX_NAME))
    partial = path + ".partial"
    with fs.open(partial, "wb") as file:
        file.write(json.dumps(to_dict(index), indent=1).encode())
    fs.mv(partial, path)
