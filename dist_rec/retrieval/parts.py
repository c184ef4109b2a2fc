"""Vectors with their ids as Parquet: a folder of parts, one of each rank, whose rows follow one another.

    part-00000.parquet   id, domain, row and what else there is of an item or user; `vector:<task>`, float32 lists; or,
                         of items in compact form, `tag:<task>` and `weights:<task>`, of which that is made

A position is a row's number through all parts: what an index of the vectors answers with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError

VECTOR, TAG, WEIGHTS = "vector:", "tag:", "weights:"
# Rows that are read and written at a time.
GROUP_ROWS = 8192


def vector_column(task: str) -> str:
    return VECTOR + task


def as_lists(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """float32 `[n, D]` as a column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), vectors.shape[1])


def as_matrix(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A column as float32 `[n, D]`."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


class PartWriter:
    """Writes the part of a rank, in groups of rows, as they come."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"part-{rank:05d}.parquet"
        self.rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.RecordBatch] = []

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows; all batches have one schema, and there is at least one."""
        self._waiting.append(batch)
        self.rows += batch.num_rows
        if sum(one.num_rows for one in self._waiting) >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        table = pa.Table.from_batches(self._waiting)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, table.schema, use_dictionary=["domain"])
        self._writer.write_table(table, row_group_size=GROUP_ROWS)
        self._waiting = []

    def close(self) -> None:
        if self._waiting:
            self._flush()
        self._writer.close()


class Parts:
    """The rows of all parts of a folder.

    Raises:
        UserError: there are none, or one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = sorted(folder.glob("part-*.parquet"))
        if not paths:
            raise UserError(f"{folder} has no parts of vectors: export again.")
        try:
            self.files = [pq.ParquetFile(path) for path in paths]
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{folder} cannot be read: {error}. Export again.") from None
        # Of every group of rows: its file, its number there, and its rows.
        self.groups = [(file, i) for file in self.files for i in range(file.num_row_groups)]
        rows = [file.metadata.row_group(i).num_rows for file, i in self.groups]
        self.firsts = np.cumsum([0, *rows])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    @property
    def columns(self) -> list[str]:
        return self.files[0].schema_arrow.names

    def _columns_of(self, task: str) -> list[str]:
        vector = vector_column(task)
        return [vector] if vector in self.columns else [TAG + task, WEIGHTS + task]

    def width(self, task: str) -> int:
        """D of a task's vectors."""
        return math.prod(self.files[0].schema_arrow.field(name).type.list_size for name in self._columns_of(task))

    def _matrix(self, table: pa.Table) -> np.ndarray:
        """Of a table of a task's columns."""
        found = [as_matrix(column) for column in table.columns]
        if len(found) == 1:
            return found[0]
        tags, weights = found
        return (weights[:, :, None] * tags[:, None]).reshape(len(tags), -1)

    def tables(self, columns: Sequence[str], groups: range | None = None) -> Iterator[tuple[int, pa.Table]]:
        """The columns group by group, of all groups or of some, each with the position of its first row."""
        for number in range(len(self.groups)) if groups is None else groups:
            file, i = self.groups[number]
            yield int(self.firsts[number]), file.read_row_group(i, columns=list(columns))

    def vectors(self, task: str) -> Iterator[np.ndarray]:
        """A task's vectors, float32 `[n, D]` each, in order."""
        for _, table in self.tables(self._columns_of(task)):
            yield self._matrix(table)

    def gated(self, task: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of items in compact form E_T, float32 `[n, d]`, and the weights `[n, K]`, in order."""
        for _, table in self.tables([TAG + task, WEIGHTS + task]):
            yield as_matrix(table.column(0)), as_matrix(table.column(1))

    def take(self, positions: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """The rows at positions int64 `[n]`, in that order; reads no more than their groups."""
        distinct, back = np.unique(positions, return_inverse=True)
        group = np.searchsorted(self.firsts, distinct, side="right") - 1
        found = [self.files[0].schema_arrow.empty_table().select(list(columns))]
        for number in np.unique(group).tolist():
            first, table = next(self.tables(columns, range(number, number + 1)))
            found.append(table.take(pa.array(distinct[group == number] - first)))
        return pa.concat_tables(found).take(pa.array(back))

    def vectors_at(self, positions: np.ndarray, task: str) -> np.ndarray:
        """A task's vectors at positions int64 `[n]`: float32 `[n, D]`."""
        return self._matrix(self.take(positions, self._columns_of(task)))
