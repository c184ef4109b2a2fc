"""Is a data set what its index says? Reads every byte and decodes every row.

All damage is reported together, so that a copy can be repaired at once. Knows no model.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import fsspec
import numpy as np

from ..errors import UserError
from .blocks import decode_block
from .index import Index, ShardInfo, join, read_index
from .inspect import payload_of

CHUNK = 1 << 22
MOST_FAULTS = 30


def verify(root: str, workers: int | None = None) -> dict[str, Any]:
    """Check every shard of the data set at `root` (folder or fsspec URL).

    Per shard: length and SHA-256 of the file; the tar members are exactly the blocks of the index.
    Per block: the tar range is readable by itself, CRC-32, rows decode, ids and labels are within
    their bounds, the time range. Over all: label counts; a plain `webdataset.WebDataset` iterates
    local tars and meets each block once.

    Args:
        root: where `index.json` lies.
        workers: threads; all cores if None.

    Returns:
        `root`, `rows`, `blocks`, `shards`, `bytes` that were checked.

    Raises:
        UserError: naming every damaged shard and block.
    """
    index = read_index(root)
    starts = [0, *accumulate(shard.rows for shard in index.shards)]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        results = list(
            pool.map(lambda job: _verify_shard(root, index, *job), zip(index.shards, starts[:-1], strict=True))
        )
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
        files = [shard.file for shard in index.shards]
        faults += [
            f"index.json: shard {file} is listed twice" for file in sorted({f for f in files if files.count(f) > 1})
        ]
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


def _verify_shard(root: str, index: Index, shard: ShardInfo, first: int) -> tuple[list[str], dict[str, dict[str, int]]]:
    """Faults of one shard, and the label counts of its readable rows."""
    labels = {name: {"valid": 0, "positive": 0, "missing": 0} for name in index.schema.labels}
    faults: list[str] = []
    path = join(root, shard.file)
    try:
        with fsspec.open(path, "rb") as file:
            _check_file(file, shard, faults)
            for block in shard.blocks:
                where = f"{shard.file}, block {block.name}"
                try:
                    file.seek(block.offset)
                    payload = payload_of(file.read(block.bytes), block, where)
                    if zlib.crc32(payload) != block.crc32:
                        faults.append(f"{where}: its CRC-32 is not the index's")
                    else:
                        _check_rows(payload, index, shard, block, where, first, labels, faults)
                except UserError as error:
                    faults.append(str(error))
                first += block.rows
    except FileNotFoundError:
        return [f"{shard.file}: the file is missing"], labels
    except OSError as error:
        return [f"{shard.file}: cannot be read ({error})"], labels
    if not faults and "://" not in root:
        faults += _iterate(path, shard)
    return faults, labels


def _check_file(file, shard: ShardInfo, faults: list[str]) -> None:
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(CHUNK):
        digest.update(chunk)
        size += len(chunk)
    if size != shard.bytes:
        faults.append(f"{shard.file}: has {size} bytes, the index says {shard.bytes}")
    elif digest.hexdigest() != shard.sha256:
        faults.append(f"{shard.file}: its SHA-256 is not the index's")
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            names = [member.name for member in tar]
    except tarfile.TarError as error:
        faults.append(f"{shard.file}: is no tar file ({error})")
        return
    if names != [block.name for block in shard.blocks]:
        faults.append(
            f"{shard.file}: holds {len(names)} members, which are not the {len(shard.blocks)} blocks of the index"
        )


def _check_rows(payload, index: Index, shard, block, where: str, first: int, labels, faults: list[str]) -> None:
    schema = index.schema
    domain = schema.domains.names.index(shard.domain)
    rows = decode_block(payload, schema, where, first, domain, schema.features, True)
    if len(rows) != block.rows:
        faults.append(f"{where}: has {len(rows)} rows, the index says {block.rows}")
    for name, values in rows.labels.items():
        present = values[~np.isnan(values)]
        labels[name]["valid"] += len(present)
        labels[name]["positive"] += int(np.count_nonzero(present >= schema.labels[name].maximum / 2))
        labels[name]["missing"] += len(values) - len(present)
    times = rows.keys["time"][rows.keys["time"] != -1]
    span = (int(times.min()), int(times.max())) if len(times) else None
    # -1 is a missing key when decoded, but also the last second of 1969.
    if span != block.time and not (block.time and -1 in block.time):
        faults.append(f"{where}: its times are {span}, the index says {block.time}")


def _iterate(path: str, shard: ShardInfo) -> list[str]:
    """What a plain WebDataset sees of a tar."""
    import webdataset

    seen = sum(1 for _ in webdataset.WebDataset([path], shardshuffle=False, nodesplitter=None, empty_check=False))
    return (
        [] if seen == len(shard.blocks) else [f"{shard.file}: webdataset meets {seen} samples of {len(shard.blocks)}"]
    )
