"""What people call the items and users of a data set: raw values instead of rows of a vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.home import home_of
from ..data.ingest import hashed
from ..data.steps import VOCABULARY_NAME
from ..errors import UserError
from ..schema import Schema


class RawIds:
    """Raw values of a feature's ids.

    Of a dictionary they are those that the data set was built with. An `integer` id is itself; so is a `raw` one, and
    a `hash` one is all that is left of its value.

    Args:
        root: of the data set.
        schema: its own.
        feature: of kind id.
        vocabulary: folder of its dictionaries, where they do not lie beside it.

    Raises:
        UserError: the dictionary is missing, or cannot be read.
    """

    def __init__(self, root: str, schema: Schema, feature: str, vocabulary: Path | None = None) -> None:
        table = schema.table_of(feature)
        self.values: pa.Array | None = None
        if schema.features[table].vocabulary.kind != "dictionary":
            return
        values, rows = read_vocabulary(root, schema, table, vocabulary)
        self.place = np.full(schema.features[table].vocabulary.size, len(rows), np.int64)
        self.place[rows] = np.arange(len(rows))
        # One more, for ids that the dictionary lacks.
        self.values = pa.concat_arrays([*values.chunks, pa.nulls(1, pa.string())])

    def __call__(self, ids: np.ndarray) -> pa.Array:
        """Of ids, int64 `[n]`, -1 for none: strings, null where there is no value."""
        there = ids >= 0
        if self.values is None:
            return pa.array(
                [str(i) if known else None for i, known in zip(ids.tolist(), there.tolist(), strict=True)], pa.string()
            )
        return self.values.take(pa.array(np.where(there, self.place[np.where(there, ids, 0)], len(self.values) - 1)))


def read_vocabulary(
    root: str, schema: Schema, table: str, vocabulary: Path | None = None
) -> tuple[pa.ChunkedArray, np.ndarray]:
    """The values of a table's dictionary, strings, and their rows, int64 `[V]`; arguments as of `RawIds`.

    Raises:
        UserError: it is missing, cannot be read, or is another.
    """
    if vocabulary is None:
        if "://" in root:
            raise UserError(
                f"{root}: the raw ids of a remote data set are read from a local copy of its vocabulary: name that "
                "folder with --vocabulary."
            )
        vocabulary = home_of(Path(root).absolute(), schema) / VOCABULARY_NAME
    path = vocabulary / f"{table}.parquet"
    try:
        found = pq.read_table(path, columns=["value", "row"])
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UserError(f"{path} is no vocabulary (columns value, row): {error}.") from None
    rows = found.column("row").to_numpy()
    if len(rows) and rows.max() >= schema.features[table].vocabulary.size:
        raise UserError(
            f"{path} has more ids than the index of {root}: it is not the vocabulary that it was built with."
        )
    return found.column("value").cast(pa.string()), rows


def user_feature(schema: Schema) -> str | None:
    """The feature that has the same raw column as keys.user; None where users have no id but that key."""
    return next(
        (
            n
            for n, f in schema.select("user", ("id",)).items()
            if schema.keys.user is not None and (f.column or n) == schema.keys.user
        ),
        None,
    )


def key_of(value: str) -> int:
    """The key that rows have where their raw key column is `value` (`ingest.encode`)."""
    import duckdb

    return duckdb.execute(f"SELECT {hashed('?')}", [value]).fetchone()[0]
