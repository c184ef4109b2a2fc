"""The same rows in other formats, each read as its users read it, into the same `Batch`.

* `parquet`: pyarrow, row groups in random order, rows shuffled in a window of them.
* `json`: WebDataset, one JSON sample a tar member, shuffled in a buffer, batched.
* `mds`: MosaicML Streaming, shuffled by its own algorithm, batched by a `DataLoader`.

They carry what a batch needs and nothing else (ours has every text as a string, too); texts come with their
key, by which a batch finds its distinct ones. One process, one thread each, as ours; nothing is verified
but what the libraries verify by themselves.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.batch import Batch, make_batch
from ..data.rows import Ragged, Rows
from ..errors import UserError
from .invented import FLOATS, SCHEMA, TOKENS, Impressions, lists

JSON_TAR_ROWS = 10_000
# More JSON samples than that in memory at once would be unusual: each is a few kilobytes of Python objects.
JSON_BUFFER = 10_000
ROW_GROUP = 32_768


@dataclass(frozen=True)
class Peer:
    """A format: how the rows are written, and how an epoch of batches is read.

    Attributes:
        write: (rows, folder).
        read: (folder, batch size, rows that are shuffled together, seed) -> batches, the last one short.
    """

    write: Callable[[Impressions, Path], None]
    read: Callable[[Path, int, int, int], Iterator[Batch]]


def to_batch(
    row: np.ndarray,
    domain: np.ndarray,
    user: np.ndarray,
    item: np.ndarray,
    history: Ragged,
    profile: np.ndarray,
    click: np.ndarray,
    rating: np.ndarray,
    title_key: np.ndarray,
    title: np.ndarray,
) -> Batch:
    """Columns (as `Impressions` has them; `title` int32 `[n, 24]`) -> a batch with each distinct title once."""
    n = len(row)
    keys, firsts, uses = np.unique(title_key, return_index=True, return_inverse=True)
    each = np.arange(n + 1)
    rows = Rows(
        domain=domain.astype(np.int64, copy=False),
        row=row,
        ids={"user": Ragged(user, each), "history": history, "item": Ragged(item, each)},
        dense={"profile": profile},
        texts={"title": Ragged(uses, each)},
        text_keys=keys,
        tokens=Ragged.from_lengths(title[firsts].reshape(-1), np.full(len(keys), TOKENS)),
        labels={"click": click, "rating": rating},
        keys={"user": user.astype(np.int64)},
    )
    return make_batch(rows, SCHEMA, n)


def _columns(rows: Impressions) -> dict[str, Any]:
    """Every column by the name that `to_batch` gives it."""
    return {
        "row": rows.row,
        "domain": rows.domain.astype(np.int32),
        "user": rows.user,
        "item": rows.item,
        "history": rows.history,
        "profile": rows.profile,
        "click": rows.click,
        "rating": rows.rating,
        "title_key": rows.title_keys[rows.item],
        "title": rows.title_tokens[rows.item],
    }


def _collate(samples: list[dict[str, Any]]) -> Batch:
    """Samples, one dict a row, -> a batch."""

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([sample[name] for sample in samples], dtype)

    histories = [sample["history"] for sample in samples]
    return to_batch(
        row=column("row", np.int64),
        domain=column("domain", np.int64),
        user=column("user", np.int32),
        item=column("item", np.int32),
        history=Ragged.from_lengths(
            np.concatenate(histories, dtype=np.int32, casting="unsafe"), np.array([len(h) for h in histories])
        ),
        profile=column("profile", np.float32),
        click=column("click", np.float32),
        rating=column("rating", np.float32),  # None becomes NaN
        title_key=column("title_key", np.int64),
        title=column("title", np.int32),
    )


def _write_json(rows: Impressions, folder: Path) -> None:
    from webdataset import ShardWriter

    columns = _columns(rows)
    history = columns.pop("history")
    with ShardWriter(str(folder / "%05d.tar"), maxcount=JSON_TAR_ROWS, verbose=0) as writer:
        for i in range(len(rows)):
            sample = {name: values[i].tolist() for name, values in columns.items()}
            sample["history"] = history.values[history.offsets[i] : history.offsets[i + 1]].tolist()
            sample["rating"] = None if np.isnan(sample["rating"]) else sample["rating"]
            writer.write({"__key__": f"{i:09d}", "json": json.dumps(sample)})


def _read_json(folder: Path, batch_size: int, window: int, seed: int) -> Iterator[Batch]:
    from webdataset import WebDataset

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    samples = WebDataset(urls, shardshuffle=len(urls), seed=seed).shuffle(min(window, JSON_BUFFER), seed=seed)
    decoded = samples.decode().map(lambda sample: sample["json"])
    return iter(decoded.batched(batch_size, collation_fn=_collate))


def _streaming() -> types.ModuleType:
    """MosaicML's package. Its image data sets alone want torchvision of the very build of torch: left out."""
    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
    try:
        import streaming
    except ImportError as error:
        raise UserError(
            f"mosaicml-streaming cannot be loaded ({error}); `bash launchers/env.sh` installs it."
        ) from None
    return streaming


def _write_mds(rows: Impressions, folder: Path) -> None:
    columns = _columns(rows)
    history = columns.pop("history")
    kinds = {
        "row": "int64",
        "domain": "int32",
        "user": "int32",
        "item": "int32",
        "history": "ndarray:int32",
        "profile": f"ndarray:float32:{FLOATS}",
        "click": "float32",
        "rating": "float32",
        "title_key": "int64",
        "title": f"ndarray:int32:{TOKENS}",
    }
    with _streaming().MDSWriter(out=str(folder), columns=kinds) as writer:
        for i in range(len(rows)):
            sample = {name: values[i] for name, values in columns.items()}
            sample["history"] = history.values[history.offsets[i] : history.offsets[i + 1]]
            writer.write(sample)


def _read_mds(folder: Path, batch_size: int, window: int, seed: int) -> Iterator[Batch]:
    from torch.utils.data import DataLoader

    streaming = _streaming()
    streaming.base.util.clean_stale_shared_memory()
    data = streaming.StreamingDataset(
        local=str(folder), shuffle=True, shuffle_seed=seed, batch_size=batch_size, shuffle_block_size=window
    )
    return iter(DataLoader(data, batch_size=batch_size, collate_fn=_collate))


def _write_parquet(rows: Impressions, folder: Path) -> None:
    columns = _columns(rows)
    columns["history"] = lists(columns["history"])
    columns["rating"] = pa.array(columns["rating"], from_pandas=True)
    for name in ("profile", "title"):
        values = columns[name]
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=ROW_GROUP)


def _read_parquet(folder: Path, batch_size: int, window: int, seed: int) -> Iterator[Batch]:
    draw = np.random.default_rng(seed)
    with pq.ParquetFile(folder / "rows.parquet", memory_map=True) as file:
        groups = draw.permutation(file.num_row_groups).tolist()
        together = max(window // ROW_GROUP, 1)
        left = None
        for first in range(0, len(groups), together):
            held = file.read_row_groups(groups[first : first + together], use_threads=False).combine_chunks()
            held = held.take(draw.permutation(held.num_rows))
            if left is not None:
                held = pa.concat_tables([left, held]).combine_chunks()
            whole = held.num_rows // batch_size * batch_size
            for start in range(0, whole, batch_size):
                yield _from_table(held.slice(start, batch_size))
            left = held.slice(whole)
        if left.num_rows:
            yield _from_table(left)


def _from_table(table: pa.Table) -> Batch:
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    history = columns.pop("history")
    values = {name: column.to_numpy(zero_copy_only=False) for name, column in columns.items() if name not in _WIDE}
    for name, width in _WIDE.items():
        values[name] = columns[name].flatten().to_numpy().reshape(-1, width)
    lengths = history.value_lengths().to_numpy()
    return to_batch(history=Ragged.from_lengths(history.flatten().to_numpy(), lengths), **values)


_WIDE = {"profile": FLOATS, "title": TOKENS}

PEERS = {
    "parquet": Peer(_write_parquet, _read_parquet),
    "json": Peer(_write_json, _read_json),
    "mds": Peer(_write_mds, _read_mds),
}
