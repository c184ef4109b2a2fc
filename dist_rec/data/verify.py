"""Is a data set what its index says? Reads every byte and decodes every row.

All damage is reported together, so that a copy can be repaired at once. Knows no model.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import numpy as np

from ..errors import UserError
from .index import BlockInfo, Index, ShardInfo, join, read_index
from .reader import ShardReader
from .remote import DEFAULT_RETRY, Retry, Unreadable
from .rows import Rows

CHUNK = 1 << 22
MOST_FAULTS = 100


def verify(root: str, workers: int | None = None, retry: Retry = DEFAULT_RETRY) -> dict[str, Any]:
    """Check every shard of the data set at `root` (folder or fsspec URL), each byte read once.

    Per block: the tar range is readable by itself, CRC-32, rows decode, ids and labels are within
    their bounds, the time range. Per shard: length and SHA-256 of the file; the blocks of the
    index are all that it holds. Over all: label counts; a plain `webdataset.WebDataset` iterates
    local tars and meets each block once.

    Args:
        root: where `index.json` lies.
        workers: threads; all cores if None.
        retry: of every read.

    Returns:
        `root`, `rows`, `blocks`, `shards`, `bytes` that were checked.

    Raises:
        UserError: naming every damaged shard and block.
    """
    index = read_index(root, retry)
    reader = ShardReader(root, index, list(index.schema.features), with_tokens=True, retry=retry)
    starts = [0, *accumulate(len(shard.blocks) for shard in index.shards)]
    jobs = zip(index.shards, starts[:-1], strict=True)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        try:
            results = list(pool.map(lambda job: _verify_shard(reader, *job), jobs))
        except BaseException:
            reader.cancelled.set()  # whoever interrupts it waits for no retries
            raise
    faults = [fault for shard_faults, _ in results for fault in shard_faults]
    if not faults:
        counted = {
            name: {what: sum(labels[name][what] for _, labels in results) for what in ("valid", "positive", "missing")}
            for name in index.schema.labels
        }
        for name, counts in counted.items():
            if index.label_counts.get(name) != counts:
                faults.append(
                    f"index.json: label {name!r} is counted as {index.label_counts.get(name)}, the rows have {counts}"
                )
    if faults:
        more = f"\n  - and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        raise UserError(
            f"data set {root} is damaged:\n"
            + "\n".join(f"  - {f}" for f in faults[:MOST_FAULTS])
            + more
            + "\nCopy the named shards again, or build the data set again."
        )
    return {
        "root": root,
        "rows": index.rows,
        "blocks": sum(len(shard.blocks) for shard in index.shards),
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
    }


def _verify_shard(reader: ShardReader, shard: ShardInfo, first: int) -> tuple[list[str], dict[str, dict[str, int]]]:
    """Faults of the shard whose first block is number `first`, and the label counts of its readable rows."""
    labels = {name: {"valid": 0, "positive": 0, "missing": 0} for name in reader.index.schema.labels}
    faults: list[str] = []
    try:
        size = reader.files.size(shard.file)
    except Unreadable as error:
        return [f"{shard.file}: {'the file is missing' if error.missing else f'cannot be read: {error}'}"], labels
    if size != shard.bytes:
        faults.append(f"{shard.file}: has {size} bytes, the index says {shard.bytes}")
    digest, at = hashlib.sha256(), 0
    for number, block in enumerate(shard.blocks, first):
        try:
            start, at = at, block.offset + block.bytes
            foreign = _hash_between(reader, shard, digest, start, block.offset)
            member = reader.member(number)
            digest.update(member)
            if foreign:
                faults.append(f"{shard.file}: holds something before block {block.name} that the index does not name")
            _check_rows(reader.decode(number, member), reader.index, shard, block, labels, faults)
        except UserError as error:
            faults.append(str(error))
        except Unreadable as error:
            faults.append(f"{shard.file}, before block {block.name}: cannot be read: {error}")
    if not faults:
        try:
            if _hash_between(reader, shard, digest, at, size):
                faults.append(f"{shard.file}: holds something after its last block that the index does not name")
            elif digest.hexdigest() != shard.sha256:
                faults.append(f"{shard.file}: its SHA-256 is not the index's")
        except Unreadable as error:
            faults.append(f"{shard.file}, after its last block: cannot be read: {error}")
    if not faults and reader.files.local:
        faults += _iterate(join(reader.root, shard.file), shard)
    return faults, labels


def _hash_between(reader: ShardReader, shard: ShardInfo, digest, start: int, stop: int) -> bool:
    """Hash what lies between blocks; True if it is more than the zeros that end a tar."""
    foreign = False
    for at in range(start, stop, CHUNK):
        data = reader.files.read(shard.file, at, min(at + CHUNK, stop))
        digest.update(data)
        foreign |= any(data)
    return foreign


def _check_rows(rows: Rows, index: Index, shard: ShardInfo, block: BlockInfo, labels, faults: list[str]) -> None:
    for name, values in rows.labels.items():
        present = values[~np.isnan(values)]
        labels[name]["valid"] += len(present)
        labels[name]["positive"] += int(np.count_nonzero(present >= index.schema.labels[name].maximum / 2))
        labels[name]["missing"] += len(values) - len(present)
    times = rows.keys["time"][rows.keys["time"] != -1]
    span = (int(times.min()), int(times.max())) if len(times) else None
    # -1 is a missing key when decoded, but also the last second of 1969.
    if span != block.time and not (block.time and -1 in block.time):
        faults.append(f"{shard.file}, block {block.name}: its times are {span}, the index says {block.time}")


def _iterate(path: str, shard: ShardInfo) -> list[str]:
    """What a plain WebDataset sees of a tar."""
    import webdataset

    seen = sum(1 for _ in webdataset.WebDataset([path], shardshuffle=False, nodesplitter=None, empty_check=False))
    return (
        [] if seen == len(shard.blocks) else [f"{shard.file}: webdataset meets {seen} samples of {len(shard.blocks)}"]
    )
