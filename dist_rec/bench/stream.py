"""How fast `Stream` makes batches, against other formats and against merely reading its own blocks.

Every reader reads the same invented rows (see `invented`) from local files, shuffled, in one process, up to the
same ready-to-train `Batch`. Ours checks every checksum, every Arrow offset and every id on the way, and works in
the calling thread, without reading ahead.

A rate is rows a second of processor time, all threads of the process together: what one core does, whatever else
keeps the machine busy. `wall` is the rate by the clock, and `cores` the processor time a second. Readers take
turns, the fast ones next to each other, after a first turn that warms memory up; a ratio is the median of the
turns' ratios.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from ..data.batch import Batch
from ..data.blocks import read_columns
from ..data.index import TAR_UNIT, Index
from ..data.order import Order
from ..data.reader import ShardReader
from ..data.rows import Rows
from ..data.stream import Stream
from ..errors import UserError
from .invented import SCHEMA, invent, write_shards
from .peers import PEERS

STREAMS = 8
# Slow formats read the first so-manieth part of the rows, so that no reader takes most of the time.
PARTS = {"json": 32, "mds": 16, "parquet": 1}
TITLES = {
    "ours": "ours",
    "unvalidated": "ours, unvalidated",
    "json": "WebDataset, JSON",
    "mds": "MosaicML, MDS",
    "parquet": "Parquet",
    "raw": "our blocks, merely read",
}


class TrustingReader(ShardReader):
    """Believes what it reads: how much faster that is tells what validation costs."""

    def member(self, number: int) -> bytes:
        shard, block = self.places[number]
        return self.files.read(shard.file, block.offset, block.offset + block.bytes, lambda data: data)

    def decode(self, number: int, member: bytes) -> Rows:
        shard, _ = self.places[number]
        return read_columns(
            _mapped(member),
            self.index.schema,
            self.where(number),
            int(self.first_rows[number]),
            self.domain_of[shard.domain],
            self.features,
            self.with_tokens,
        )


def _mapped(member: bytes) -> pa.RecordBatch:
    """The batch of a tar member, zero-copy and unchecked."""
    with pa.ipc.open_stream(pa.py_buffer(member).slice(TAR_UNIT)) as reader:
        return reader.read_next_batch()


def open_stream(
    root: Path, index: Index, batch_size: int, window: int, seed: int, reader: type[ShardReader] = ShardReader
) -> Stream:
    """One rank's stream of the whole data set, shuffled in a window."""
    order = Order(index, streams=STREAMS, batch_size=batch_size, window=window, seed=seed)
    return Stream(reader(str(root), index, list(SCHEMA.features), with_tokens=True), order)


def read_raw(root: Path, index: Index) -> int:
    """Read every block and map its columns; returns the rows."""
    rows = 0
    for shard in index.shards:
        with open(root / shard.file, "rb", buffering=0) as file:
            for block in shard.blocks:
                file.seek(block.offset)
                rows += _mapped(file.read(block.bytes)).num_rows
    return rows


def _count(batches: Iterator[Batch]) -> int:
    return sum(int(batch.valid.sum()) for batch in batches)


def bench_stream(
    rows: int, repeats: int, batch_size: int, window: int, block_rows: int, folder: Path | None
) -> dict[str, Any]:
    """Write the rows in every format, read them in turns, and compare.

    Args:
        rows: how many; slow formats read a part of them (`PARTS`).
        repeats: turns.
        batch_size, window: of all readers.
        block_rows: of our shards.
        folder: where the temporary files go; None is the system's place for them.

    Returns:
        What `dist-rec bench stream --json` prints. Rates are medians of the turns.

    Raises:
        UserError: a number makes no sense, or a peer is not installed.
    """
    if (
        rows < STREAMS
        or repeats < 1
        or block_rows < 1
        or batch_size < STREAMS
        or batch_size % STREAMS
        or window < batch_size
    ):
        raise UserError(
            f"--rows and --batch-size must be at least {STREAMS}, --batch-size a multiple of it, --window at least "
            "--batch-size, --block-rows and --repeats at least 1."
        )
    console = Console(stderr=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="dist_rec-bench-", dir=folder) as temporary:
            readers = _prepare(Path(temporary), rows, batch_size, window, block_rows, console)
            console.print("a first turn that does not count")
            _turn(readers, repeats, console)
            turns = [_turn(readers, turn, console) for turn in range(repeats)]
    finally:
        torch.set_num_threads(threads)
    return _summary(turns, rows, batch_size, window, block_rows)


def _prepare(
    folder: Path, rows: int, batch_size: int, window: int, block_rows: int, console: Console
) -> dict[str, Callable[[int], int]]:
    """Write every format; a reader takes a seed and returns how many rows it read."""
    console.print(f"inventing {rows:,} rows")
    invented = invent(rows)
    ours = folder / "ours"
    index = write_shards(invented, ours, block_rows)

    def stream(reader: type[ShardReader]) -> Callable[[int], int]:
        def read(seed: int) -> int:
            opened = open_stream(ours, index, batch_size, window, seed, reader)
            return _count(opened.batch(0, step) for step in range(opened.steps))

        return read

    readers = {"ours": stream(ShardReader), "unvalidated": stream(TrustingReader)}
    for name, peer in PEERS.items():
        console.print(f"writing {TITLES[name]}")
        (folder / name).mkdir()
        peer.write(invented.first(-(-rows // PARTS[name])), folder / name)
        readers[name] = lambda seed, peer=peer, name=name: _count(peer.read(folder / name, batch_size, window, seed))
    return readers | {"raw": lambda seed: read_raw(ours, index)}


def _turn(readers: dict[str, Callable[[int], int]], seed: int, console: Console) -> dict[str, dict[str, float]]:
    """One epoch of every reader: its rows, seconds and seconds of processor time."""
    found = {}
    for name, read in readers.items():
        wall, cpu = time.perf_counter(), time.process_time()
        rows = read(seed)
        found[name] = {"rows": rows, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        console.print(f"turn {seed + 1}: {rows / found[name]['cpu']:>12,.0f} rows/s  {TITLES[name]}")
    return found


def _summary(
    turns: list[dict[str, dict[str, float]]], rows: int, batch_size: int, window: int, block_rows: int
) -> dict[str, Any]:
    rates = {name: [turn[name]["rows"] / turn[name]["cpu"] for turn in turns] for name in turns[0]}
    walls = {name: [turn[name]["rows"] / turn[name]["wall"] for turn in turns] for name in turns[0]}

    def ratio(of: str, to: str) -> float:
        return round(statistics.median(np.divide(rates[of], rates[to]).tolist()), 3)

    readers = {
        name: {
            "rows": turns[0][name]["rows"],
            "rows_per_s": round(statistics.median(values)),
            "min": round(min(values)),
            "max": round(max(values)),
            "wall": round(statistics.median(walls[name])),
            "cores": round(sum(t[name]["cpu"] for t in turns) / sum(t[name]["wall"] for t in turns), 2),
        }
        for name, values in rates.items()
    }
    return {
        "rows": rows,
        "repeats": len(turns),
        "batch_size": batch_size,
        "window": window,
        "block_rows": block_rows,
        "threads": 1,
        "rows_per_s": readers["ours"]["rows_per_s"],
        "ratio_vs_webdataset_json": ratio("ours", "json"),
        "ratio_vs_mds": ratio("ours", "mds"),
        "ratio_vs_parquet": ratio("ours", "parquet"),
        "share_of_raw_read": ratio("ours", "raw"),
        "validated_share": ratio("ours", "unvalidated"),
        "readers": readers,
    }


def print_summary(summary: dict[str, Any]) -> None:
    """The readers as a table."""
    table = Table(title=f"rows a second, batches of {summary['batch_size']:,}")
    table.add_column("reader")
    for heading in ("of a core", "least", "most", "by the clock", "cores"):
        table.add_column(heading, justify="right")
    for name, reader in summary["readers"].items():
        numbers = (f"{reader[key]:,}" for key in ("rows_per_s", "min", "max", "wall", "cores"))
        table.add_row(TITLES[name], *numbers)
    Console().print(table)
