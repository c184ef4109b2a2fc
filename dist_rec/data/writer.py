"""Encoded blocks → tar shards of one data set, with offsets and checksums.

One tar holds one domain. Tars are plain USTAR with fixed metadata, so equal blocks give equal
bytes. Knows nothing of how blocks are made.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from ..files import sync
from ..schema import Schema
from .encode import EncodedBlock, FeatureCounts
from .index import BlockInfo, Extension, FeatureStatistics, Frequency, Index, ShardInfo, TokenizerInfo


def file_stems(domains: list[str]) -> list[str]:
    """A file-safe, distinct stem for every domain: what is not `[A-Za-z0-9_-]` becomes `_`."""
    stems: list[str] = []
    for position, name in enumerate(domains):
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:100] or "domain"
        # Some file systems do not tell case apart.
        if stem.lower() in {s.lower() for s in stems}:
            stem = f"{stem}.{position}"
        stems.append(stem)
    return stems


def shard_name(stem: str, number: int, generation: int) -> str:
    """Name of a tar; those of one generation are never those of another."""
    return f"{stem}-{number:05d}.g{generation}.tar" if generation else f"{stem}-{number:05d}.tar"


class _HashedFile:
    """A file that knows the SHA-256 of what was written to it."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "wb")  # noqa: SIM115
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def close(self) -> None:
        self.file.close()


class DatasetWriter:
    """Writes the tars of one data set: `add` blocks domain by domain, then `close`, which gives the index.

    Args:
        folder: where the tars go; made here.
        split: `train`, `valid`, `test` or `all`.
        schema: resolved schema.
        tokenizer: whose token ids the blocks carry.
        shard_rows: a tar is closed once it holds this many rows.
        previous: index of the data set that the tars are appended to, if any.
        extension: what of the schema the rows carry, where that is not all; `previous` knows it.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        schema: Schema,
        tokenizer: TokenizerInfo | None,
        shard_rows: int,
        previous: Index | None = None,
        extension: Extension | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.split, self.schema, self.tokenizer = folder, split, schema, tokenizer
        self.shard_rows, self.previous = shard_rows, previous
        self.extension = previous.extension if previous else extension
        self.generation = previous.generation + 1 if previous else 0
        self.stems = file_stems(schema.domains.names)
        self.shards: list[ShardInfo] = []
        self.features = {name: FeatureCounts() for name in schema.features}
        self.labels = {name: {"valid": 0, "positive": 0, "missing": 0} for name in schema.labels}
        self.rows = self.number = 0
        self.domain: int | None = None
        self.tar = self.file = None
        self.blocks: list[BlockInfo] = []

    def add(self, domain: int, block: EncodedBlock) -> None:
        """Append a block; blocks of a domain come together."""
        if self.tar is not None and (domain != self.domain or sum(b.rows for b in self.blocks) >= self.shard_rows):
            self._finish_shard()
        if self.tar is None:
            self._start_shard(domain)
        name = f"{len(self.blocks):06d}"
        offset = self.tar.tarstream.offset
        self.tar.write({"__key__": name, "arrow": block.payload})
        self.blocks.append(
            BlockInfo(
                name=f"{name}.arrow",
                rows=block.rows,
                offset=offset,
                bytes=self.tar.tarstream.offset - offset,
                crc32=block.crc32,
                time=block.time,
            )
        )
        self.rows += block.rows
        for name, counts in block.features.items():
            self.features[name].add(counts)
        for name, counts in block.labels.items():
            for what, count in counts.items():
                self.labels[name][what] += count

    def _start_shard(self, domain: int) -> None:
        # webdataset imports torch, which worker processes must not pay for.
        from webdataset.writer import TarWriter

        self.number = self.number + 1 if domain == self.domain else 0
        self.domain = domain
        self.name = shard_name(self.stems[domain], self.number, self.generation)
        self.file = _HashedFile(self.folder / self.name)
        self.tar = TarWriter(self.file, encoder=False, compress=False, mtime=0)
        self.blocks = []

    def _finish_shard(self) -> None:
        self.tar.close()
        self.file.close()
        sync(self.folder / self.name)
        self.shards.append(
            ShardInfo(
                file=self.name,
                domain=self.schema.domains.names[self.domain],
                bytes=self.file.size,
                sha256=self.file.digest.hexdigest(),
                generation=self.generation,
                blocks=self.blocks,
            )
        )
        self.tar = self.file = None

    def abandon(self) -> None:
        """Close files after a failure; no index is written."""
        if self.file is not None:
            self.file.close()

    def close(self, frequencies: dict[str, Frequency] | None = None) -> Index:
        """Finish the last tar; the index of all rows, the previous ones included, which is not written yet.

        Args:
            frequencies: of id and ids features, over the rows of a build. Those of previous rows stay as they are:
                whoever counts the ids of new rows does not know which of the old ones they are.
        """
        self._finish_shard()
        rows, shards, frequencies = self.rows, self.shards, frequencies or {}
        if self.previous is not None:
            rows, shards = rows + self.previous.rows, self.previous.shards + shards
            frequencies = {name: known.frequency for name, known in self.previous.statistics.items()}
            for name, counts in self.features.items():
                counts.add(_counts(self.previous.statistics[name], self.previous.rows))
            for name, counts in self.labels.items():
                for what, count in self.previous.label_counts[name].items():
                    counts[what] += count
        return Index(
            format="dist_rec/1",
            name=self.schema.name,
            split=self.split,
            schema=self.schema,
            tokenizer=self.tokenizer,
            extension=self.extension,
            statistics={
                name: FeatureStatistics(
                    null_share=counts.nulls / rows,
                    mean_length=counts.total / rows,
                    max_length=counts.longest,
                    unknown=counts.unknown,
                    frequency=frequencies.get(name),
                )
                for name, counts in self.features.items()
            },
            label_counts=self.labels,
            shards=shards,
        )


def _counts(statistics: FeatureStatistics, rows: int) -> FeatureCounts:
    """The sums behind statistics over `rows`; rounding gives them back exactly below 2**52."""
    return FeatureCounts(
        nulls=round(statistics.null_share * rows),
        total=round(statistics.mean_length * rows),
        longest=statistics.max_length,
        unknown=statistics.unknown,
    )
