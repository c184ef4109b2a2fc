"""`index.json`: what a built data set holds, where each block lies, and how to check it.

A data set is a folder or an fsspec URL with `index.json` and tar files. Without an index there
is no data set: it is written last, and renamed into place. Knows files, not tensors.
"""

from __future__ import annotations

import re
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, model_validator

from ..errors import UserError
from ..files import write_bytes
from ..schema import Schema
from ..strict import from_dict, parse_json, strict, to_dict
from .remote import DEFAULT_RETRY, Files, Retry, Unreadable

FORMAT = "dist_rec/1"
INDEX_NAME = "index.json"
SPLITS = ("train", "valid", "test")
# One row an item: what a split by column may name besides.
CATALOGUE = "catalogue"
# Ten billion rows in default blocks. It is parsed whole, which takes several times its size.
LARGEST_INDEX = 256 << 20
TAR_UNIT = 512
LARGEST_BLOCK = 256 << 20
LARGEST_TABLE = 2**63 - 1
# What a builder writes: no path, no URL, no hidden file.
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,250}")
SHA256 = re.compile(r"[0-9a-f]{64}")
# Percentages of all uses that `Frequency.coverage` tells of, in per mille.
SHARES = {"50": 500, "90": 900, "95": 950, "99": 990, "99.9": 999}
# Whose texts may have a prefix.
PrefixRole = Literal["user", "query", "item"]
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
    """Whose token ids the blocks carry. `fingerprint` is the SHA-256 of tokenizer.json.

    `prefixes` stand before the texts of a role (`query`, `item`, `user`; a history's texts are items'), as texts and as
    tokens: they are part of the texts.
    """

    name: str
    fingerprint: str
    max_length: int = Field(ge=1)
    prefixes: dict[PrefixRole, str] = field(default_factory=dict)


@strict
class Extension:
    """What of its schema a data set's own raw tables carry, where the schema extends that of another data set.

    * `domains`: those that rows may be of.
    * `missing`: places of the schema, such as `features.age`, `labels.click` or `keys.user`, for which there is no raw
      column: null in every row.
    """

    domains: list[str] = Field(min_length=1)
    missing: list[str] = field(default_factory=list)


@strict
class Frequency:
    """How unevenly the ids of an `id` or `ids` feature occur: what sizes a table that need not hold them all.

    Counted exactly by the build, over the `rows` that it wrote to this data set, as blocks hold them: row 0 of a
    dictionary and the 0 of a history's missing entry are ids too. Rows that were appended since are not counted.

    Attributes:
        rows: that were counted.
        occurrences: ids in them, every one.
        distinct: different ids.
        coverage: per percentage of `occurrences` (`SHARES`), how many of the most frequent ids it takes to make it up.
    """

    rows: int = Field(ge=1)
    occurrences: int = Field(ge=0)
    distinct: int = Field(ge=0)
    coverage: dict[str, Annotated[int, Field(ge=0)]]

    @model_validator(mode="after")
    def _all_shares(self):
        if self.coverage.keys() != SHARES.keys():
            raise ValueError(f"coverage is of {', '.join(SHARES)} percent, each")
        return self


@strict
class FeatureStatistics:
    """Per feature over all rows of the data set.

    `mean_length` and `max_length` count ids of an `id` or `ids` feature, tokens of a `text`, texts
    of a `texts`, floats of a `dense`; a null counts as 0. The planner takes pooling factors from
    `mean_length`. `unknown` counts ids on row 0 of a dictionary vocabulary. `frequency` is of `id` and `ids` features,
    and missing in data sets that were built before it was there.
    """

    null_share: float
    mean_length: float
    max_length: int
    unknown: int = Field(default=0, ge=0)
    frequency: Frequency | None = None


@strict
class Index:
    """The whole index. `schema` has every vocabulary size filled in."""

    format: Literal["dist_rec/1"]
    name: str
    split: str
    schema: Schema
    tokenizer: TokenizerInfo | None = None
    extension: Extension | None = None
    statistics: dict[str, FeatureStatistics]
    label_counts: dict[str, dict[str, int]]
    shards: list[ShardInfo] = Field(min_length=1)

    @property
    def stored(self) -> Schema:
        """The schema that the blocks were written under."""
        return self.schema

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
    _check(index, path)
    return index


def _check(index: Index, path: str) -> None:
    """Check what the types of an index do not say: names, places, and that its rows fit its bytes.

    Args:
        path: of the index, for messages.

    Raises:
        UserError: the first fault.
    """
    schema = index.schema
    for what, held, needed in (
        ("statistics", index.statistics, schema.features),
        ("label_counts", index.label_counts, schema.labels),
    ):
        if held.keys() != needed.keys():
            wrong = ", ".join(sorted(held.keys() ^ needed.keys())[:9])
            raise UserError(f"{path}: {what} and the schema do not name the same: {wrong}.")
    for table, size in schema.table_sizes().items():
        if size > LARGEST_TABLE:
            raise UserError(f"{path}: the vocabulary of {table!r} has more rows than ids can count.")
    if index.extension is not None:
        sections = {"features": schema.features, "labels": schema.labels, "keys": to_dict(schema.keys)}
        places = {f"{section}.{name}" for section, names in sections.items() for name in names}
        wrong = set(index.extension.domains).difference(schema.domains.names) | set(index.extension.missing) - places
        if wrong:
            raise UserError(f"{path}: extension names what the schema does not: {', '.join(sorted(wrong))[:99]}.")
    row_bytes = _least_row_bytes(index)
    domains, files = set(schema.domains.names), set()
    for shard in index.shards:
        place = f"{path}: shard {shard.file[:99]!r}"
        if not FILE_NAME.fullmatch(shard.file):
            raise UserError(f"{place} is not a plain file name.")
        if shard.file in files:
            raise UserError(f"{place} is listed twice.")
        files.add(shard.file)
        if shard.domain not in domains:
            raise UserError(f"{place} is of domain {shard.domain[:99]!r}, which the schema does not name.")
        if not SHA256.fullmatch(shard.sha256):
            raise UserError(f"{place}: its sha256 is no SHA-256.")
        _check_blocks(shard, place, row_bytes)


def _check_blocks(shard: ShardInfo, place: str, row_bytes: int) -> None:
    end, names = 0, set()
    for block in shard.blocks:
        where = f"{place}, block {block.name[:99]!r}"
        if not FILE_NAME.fullmatch(block.name) or block.name in names:
            raise UserError(f"{where} is not a plain file name, or there twice.")
        names.add(block.name)
        if block.offset < end or block.offset % TAR_UNIT or block.bytes % TAR_UNIT:
            raise UserError(f"{where} overlaps the one before, or is not in units of {TAR_UNIT} bytes as tars are.")
        end = block.offset + block.bytes
        if end > shard.bytes:
            raise UserError(f"{where} ends beyond the shard's {shard.bytes} bytes.")
        if block.bytes > LARGEST_BLOCK:
            raise UserError(
                f"{where} has {block.bytes:,} bytes; blocks are read whole, so at most {LARGEST_BLOCK:,} are "
                "taken: build the data set with fewer --block-rows."
            )
        if block.rows * row_bytes > block.bytes:
            raise UserError(f"{where} claims {block.rows} rows, more than its {block.bytes} bytes can hold.")
        if block.crc32 >= 2**32:
            raise UserError(f"{where}: its crc32 is no CRC-32.")
        if block.time and block.time[0] > block.time[1]:
            raise UserError(f"{where}: its times end before they begin.")


def _least_row_bytes(index: Index) -> int:
    """Bytes that any row takes in a block: its scalars and list offsets, null or not."""
    schema = index.schema
    keys = [schema.keys.user, schema.keys.query, schema.keys.time]
    per_feature = (4 * f.width if f.kind == "dense" else 4 for f in schema.features.values())
    return sum(per_feature) + 4 * len(schema.labels) + 8 * sum(key is not None for key in keys)


def write_index(root: str, index: Index) -> None:
    """Publish `index` at the local folder `root`: written beside, then renamed; on disk when this returns."""
    path = Path(root, INDEX_NAME)
    write_bytes(path, TypeAdapter(Index).dump_json(index, indent=1))
