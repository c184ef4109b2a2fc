"""The common row of the foundation data set, and how items and targets become such rows.

A source module (`search`, `amazon`, `retail`) only says which items there are (`Catalog`) and
which user met which item after which history (`Targets`); sampled negatives and Parquet columns
come from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from common import keep_groups, mix, split_names, stable_hash, uniform

from dist_rec.data.rows import Ragged
from dist_rec.errors import UserError

ROW = pa.schema(
    [
        ("domain", pa.string()),
        ("split", pa.string()),
        ("user", pa.string()),
        ("user_id", pa.string()),
        ("country", pa.string()),
        ("history", pa.list_(pa.string())),
        ("history_text", pa.list_(pa.string())),
        ("query_key", pa.string()),
        ("query_id", pa.string()),
        ("query_terms", pa.list_(pa.string())),
        ("query", pa.string()),
        ("item_id", pa.string()),
        ("category", pa.list_(pa.string())),
        ("title", pa.string()),
        ("time", pa.int64()),
        ("ctr", pa.int8()),
        ("relevance", pa.float32()),
    ]
)
SAMPLING = ("uniform", "popularity")
# Rows that become one row group: long histories as plain strings need room.
CHUNK = 65_536
# Draws before a negative is looked for in the whole catalogue.
DRAWS = 20


@dataclass
class Catalog:
    """Items of one domain, by position.

    Attributes:
        ids: string, the source's own; `domain:` is put before them in the rows.
        texts: string, null where no title is known.
        categories: list of strings or None.
    """

    ids: pa.Array
    texts: pa.Array
    categories: pa.Array | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Targets:
    """n observed (user, item) meetings of one domain, in the source's order.

    Attributes:
        item: int64 `[n]`, position in the catalogue.
        history: n lists of positions, oldest first, all before the target.
        split: int64 `[n]`, 0, 1, 2.
        owner: int64 `[n]`, who must not get own items as negatives; stable across options.
        user: string, groups rows for metrics; null where unknown.
        user_id: string, the feature; null where unknown.
        time: int64 in seconds, or None.
        country: string, or None.
    """

    item: np.ndarray
    history: Ragged
    split: np.ndarray
    owner: np.ndarray
    user: pa.Array
    user_id: pa.Array
    time: pa.Array | None = None
    country: pa.Array | None = None

    def __len__(self) -> int:
        return len(self.item)

    def take(self, rows: np.ndarray) -> Targets:
        """Targets `rows` (int64), in that order."""
        taken = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if isinstance(value, np.ndarray):
                taken[field.name] = value[rows]
            else:
                taken[field.name] = value.take(rows if isinstance(value, Ragged) else pa.array(rows))
        return Targets(**taken)


@dataclass
class Owned:
    """Which items an owner ever had, in any split, as a set of pairs.

    Attributes:
        owner, item: int64 `[m]`; repeats do no harm.
    """

    owner: np.ndarray
    item: np.ndarray


@dataclass
class Sampling:
    """How negatives are drawn: `count` a target, by `kind`, keyed by `seed`."""

    count: int = 1
    kind: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in SAMPLING:
            raise UserError(f"negatives are sampled by one of {', '.join(SAMPLING)}, not {self.kind!r}.")


def windows(values: np.ndarray, start: np.ndarray, stop: np.ndarray, longest: int) -> Ragged:
    """Lists `values[start:stop]`, at most their last `longest` entries; start, stop int64 `[n]`."""
    start = np.maximum(start, stop - longest)
    lengths = stop - start
    out = Ragged.from_lengths(values, lengths)
    within = np.arange(out.offsets[-1]) - np.repeat(out.offsets[:-1], lengths)
    out.values = values[np.repeat(start, lengths) + within]
    return out


def sample_negatives(domain: str, targets: Targets, owned: Owned, num_items: int, sampling: Sampling) -> np.ndarray:
    """Items that the target's owner never had, repeats within a target avoided.

    Uniform over the catalogue, or in proportion to the training targets of an item plus one. A
    draw is a hash of (seed, domain, owner, item, history length, number of draw): it does not
    move when other rows come or go.

    Returns:
        int64 `[n, count]`; -1 where the owner has had everything there is.
    """
    n = len(targets)
    cumulative = None
    if sampling.kind == "popularity":
        weight = np.bincount(targets.item[targets.split == 0], minlength=num_items) + 1.0
        cumulative = np.cumsum(weight) / weight.sum()
    stride = np.int64(num_items)
    had = np.unique(owned.owner * stride + owned.item)
    # A user who buys the same item twice after equally long histories gets the same negatives: harmless.
    key = mix(sampling.seed, stable_hash([domain])[0], targets.owner, targets.item, targets.history.lengths)
    out = np.full((n, sampling.count), -1, np.int64)
    for column in range(sampling.count):
        todo = np.arange(n)
        for draw in range(DRAWS):
            if not len(todo):
                break
            variate = uniform(key[todo], column, draw)
            if cumulative is None:
                drawn = (variate * num_items).astype(np.int64)
            else:
                drawn = np.searchsorted(cumulative, variate, side="right").clip(max=num_items - 1)
            bad = _contains(had, targets.owner[todo] * stride + drawn)
            bad |= (out[todo, :column] == drawn[:, None]).any(axis=1)
            out[todo[~bad], column] = drawn[~bad]
            todo = todo[bad]
        for row in todo.tolist():
            # Few owners have nearly the whole catalogue; for them the free items are listed.
            low, high = np.searchsorted(had, [targets.owner[row] * stride, (targets.owner[row] + 1) * stride])
            taken = np.concatenate([had[low:high] - targets.owner[row] * stride, out[row, :column]])
            free = np.setdiff1d(np.arange(num_items), taken)
            if len(free):
                out[row, column] = free[int(uniform(key[row : row + 1], column, DRAWS)[0] * len(free))]
    return out


def _contains(sorted_values: np.ndarray, values: np.ndarray) -> np.ndarray:
    if not len(sorted_values):
        return np.zeros(len(values), bool)
    at = np.searchsorted(sorted_values, values).clip(max=len(sorted_values) - 1)
    return sorted_values[at] == values


def capped(domain: str, targets: Targets, max_rows: int | None, sampling: Sampling) -> Targets:
    """Whole owners, in hashed order, so that targets and their negatives stay within `max_rows`."""
    if max_rows is None:
        return targets
    owners = mix(stable_hash([domain])[0], targets.owner)
    kept = keep_groups(owners, max(max_rows // (1 + sampling.count), 1), sampling.seed)
    return targets.take(np.flatnonzero(kept))


def recommendation_tables(
    domain: str, catalog: Catalog, targets: Targets, owned: Owned, sampling: Sampling
) -> Iterator[pa.Table]:
    """Every target as a row with ctr 1, followed by its negatives with ctr 0, as tables of `ROW`."""
    negatives = sample_negatives(domain, targets, owned, len(catalog), sampling)
    ids = pc.binary_join_element_wise(f"{domain}:", catalog.ids.cast(pa.string()), "")
    # A history is aligned with its texts and a list holds no null: an unknown title is "".
    texts = catalog.texts.fill_null("")
    step = max(CHUNK // (1 + sampling.count), 1)
    for start in range(0, len(targets), step):
        part = targets.take(np.arange(start, min(start + step, len(targets))))
        items = np.concatenate([part.item[:, None], negatives[start : start + step]], axis=1)
        rows, place = np.nonzero(items >= 0)
        items = pa.array(items[rows, place])
        part = part.take(rows)
        n = len(rows)
        offsets = pa.array(part.history.offsets.astype(np.int32))
        past = pa.array(part.history.values)
        columns = {
            "domain": pa.repeat(domain, n),
            "split": split_names(part.split),
            "user": prefixed(domain, part.user),
            "user_id": prefixed(domain, part.user_id),
            "country": part.country,
            "history": pa.ListArray.from_arrays(offsets, ids.take(past)),
            "history_text": pa.ListArray.from_arrays(offsets, texts.take(past)),
            "item_id": ids.take(items),
            "category": None if catalog.categories is None else catalog.categories.take(items),
            "title": catalog.texts.take(items),
            "time": part.time,
            "ctr": pa.array((place == 0).astype(np.int8)),
        }
        yield as_rows(columns, n)


def as_rows(columns: dict[str, pa.Array | None], n: int, row: pa.Schema = ROW) -> pa.Table:
    """A table of `row`; absent columns are null."""
    arrays = []
    for field in row:
        column = columns.get(field.name)
        arrays.append(pa.nulls(n, field.type) if column is None else column.cast(field.type))
    return pa.table(arrays, schema=row)


def prefixed(domain: str, names: pa.Array) -> pa.Array:
    """Names or ids that no other domain has."""
    return pc.binary_join_element_wise(f"{domain}:", names.cast(pa.string()), "")
