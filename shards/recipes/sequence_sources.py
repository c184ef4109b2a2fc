"""Public sequences by domain, as the recipes' loaders read them, made whole: one row a user.

    scientific      UniSRec's own rows; training prefixes folded, texts as they are
    beauty, toys    2014, 5-core, leave-one-out
    games           leave-one-out; the source cuts sequences at 50
    cds, movies_tv  2018, the authors' split by time; training rows chained to sequences
    office          2018, valid and test rows by time; training out of their histories
    ml1m            every rating, whatever its stars, 5-core, leave-one-out
    online_retail   an invoice is a "user", as in UniSRec; 5-core, leave-one-out
    online_retail_shuffled  the same in the order that UniSRec's preparation leaves: none

Order of equal timestamps: ml1m and online_retail keep the order of the raw files. The others name no
time, or come ordered. The authors of UniSRec pass interactions through a set, so that the lines of an invoice,
which are of one minute, are in no order; in the file's own the next line is far easier to tell.

A text is title, categories, brand: what there is of them (`sequence_rows.described`).
"""

from __future__ import annotations

import ast
import csv
import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from amazon import BY_TIME, CHAIN, LOADERS
from common import raw_folder, read_tsv, reading
from movielens import RAW_FOLDER, load
from retail import read_lines
from rows import Catalog
from sequence_rows import WHOLE, Sequences, core, described, fold, held_out, with_texts, without_target

from dist_rec.data.rows import Ragged

# Where UniSRec's files cut histories.
PREFIX = 50


def _whole_users(domain: str, root: Path) -> Sequences:
    """What a loader of `amazon` gives, one training row a user, titles and categories as texts."""
    catalog, targets, _ = LOADERS[domain](domain, root, 1, WHOLE)
    # These user names are the copy's own numbers.
    targets.user_id = pa.nulls(len(targets), pa.string())
    return _titled(Sequences(domain, catalog, targets))


def _titled(sequences: Sequences) -> Sequences:
    catalog = sequences.catalog
    categories = [None] * len(catalog) if catalog.categories is None else catalog.categories.to_pylist()
    texts = [
        described([title, " ".join(names or ())])
        for title, names in zip(catalog.texts.to_pylist(), categories, strict=True)
    ]
    return with_texts(replace(sequences, titles=catalog.texts), pa.array(texts, pa.string()))


def scientific(domain: str, root: Path) -> Sequences:
    """UniSRec's Scientific: the same targets, texts and, prefix by prefix, training rows as in its files."""
    catalog, targets, _ = LOADERS[domain](domain, root, None, WHOLE)
    folder = raw_folder(root, "amazon2018_scientific_cowpirec")
    texts = dict(zip(*read_tsv(folder / "Scientific.text.gz", ("asin", "text")).to_pydict().values(), strict=True))
    names = read_tsv(folder / "Scientific.user2index.gz", ("id", "user"), header=False)
    targets.user_id = names["id"].combine_chunks().take(pc.index_in(targets.user, names["user"].combine_chunks()))
    sequences = _folded(Sequences(domain, catalog, targets, asins=catalog.ids), PREFIX)
    found = (texts.get(asin, "") for asin in catalog.ids.to_pylist())
    return with_texts(sequences, pa.array([text if text.strip() else None for text in found], pa.string()))


def _folded(sequences: Sequences, longest: int) -> Sequences:
    """Training rows, which are prefixes, joined to one row a sequence; the sequence has the user id that it leads to.

    Args:
        longest: where the source cuts histories.
    """
    targets, split = sequences.targets, sequences.targets.split
    past, item = targets.history.values.tolist(), targets.item.tolist()
    bounds = targets.history.offsets.tolist()
    histories = [tuple(past[start:stop]) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    known = targets.user_id.to_pylist()
    chains = fold(histories, item, known, longest)
    owners: dict[str | int, int] = {}
    owner, user_id = np.zeros(len(item), np.int64), list(known)
    ends, events, begun = [], [], 0
    for chain in chains:
        user = next((known[row] for row in chain if known[row] is not None), None)
        owner[chain] = owners.setdefault(chain[0] if user is None else user, chain[0])
        if not (rows := [row for row in chain if split[row] == 0]):
            continue
        user_id[rows[-1]] = user
        begun += len(histories[rows[0]]) > 1
        ends.append(rows[-1])
        events.append([*histories[rows[0]], *(item[row] for row in rows[:-1])])
    held = np.flatnonzero(split > 0)
    taken = np.concatenate([np.array(ends, np.int64), held])
    out = targets.take(taken)
    out.owner = owner[taken]
    out.user_id = pa.array([user_id[row] for row in taken.tolist()], pa.string())
    lengths = np.array([len(one) for one in events], np.int64)
    longer = Ragged.from_lengths(np.array([event for one in events for event in one], np.int64), lengths)
    out.history = Ragged.concat([longer, targets.history.take(held)])
    counted = {"training sequences that begin inside a history": begun}
    return replace(sequences, targets=out, left_out=sequences.left_out | counted)


def by_time(domain: str, root: Path) -> Sequences:
    """cds or movies_tv. Training rows name no user, so they are joined by what continues what (`fold`)."""
    catalog, targets, _ = LOADERS[domain](domain, root, None, WHOLE)
    targets.user_id = targets.user
    asins = _asins(raw_folder(root, BY_TIME[domain]), len(catalog))
    sequences = _folded(_titled(Sequences(domain, catalog, targets, asins=asins)), CHAIN)
    sequences.targets.user = sequences.targets.user_id
    return sequences


def office(domain: str, root: Path) -> Sequences:
    """The copy with raw ids and times (engram4rec); its titles are the texts."""
    catalog, targets, _ = LOADERS[domain](domain, root, 1, WHOLE)
    asins = _asins(raw_folder(root, "amazon2018_office_products_engram4rec"), len(catalog))
    return _titled(Sequences(domain, catalog, targets, asins=asins))


def _asins(folder: Path, num_items: int) -> pa.Array:
    """Raw ids of the items that valid and test rows name; null for the others."""
    asins: list[str | None] = [None] * num_items
    for name in ("valid", "test"):
        with reading(folder / f"{name}.csv.gz") as path, gzip.open(path, "rt", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                items = [*json.loads(row["history_item_id"]), int(row["item_id"])]
                ids = [*ast.literal_eval(row["item_asins"]), row["item_asin"]]
                for item, asin in zip(items, ids, strict=True):
                    asins[item] = asin
    return pa.array(asins, pa.string())


def ml1m(domain: str, root: Path) -> Sequences:
    """MovieLens-1M: all ratings are events, as is usual; users and movies with fewer than five go."""
    raw = load(raw_folder(root, RAW_FOLDER))
    kept = core(raw.user, raw.movie)
    movies, names = raw.movies, raw.users["user_id"].combine_chunks()
    catalog = Catalog(*(movies[name].combine_chunks() for name in ("item_id", "title", "genres")))
    return _titled(from_interactions(domain, catalog, raw.user[kept], raw.movie[kept], raw.time[kept], names))


def from_interactions(
    domain: str, catalog: Catalog, user: np.ndarray, item: np.ndarray, time: np.ndarray, names: pa.Array
) -> Sequences:
    """Leave-one-out sequences of interactions; items that occur in none leave the catalogue.

    Args:
        user, item, time: int64 `[n]`: positions in `names` and in the catalogue, and seconds.
        names: string, the users.
    """
    used, item = np.unique(item, return_inverse=True)
    items = pa.array(used)
    categories = None if catalog.categories is None else catalog.categories.take(items)
    catalog = Catalog(catalog.ids.take(items), catalog.texts.take(items), categories)
    targets, history_time = held_out(user, item, time, names)
    targets.user_id = pa.nulls(len(targets), pa.string())
    return Sequences(domain, catalog, targets, history_time, left_out=without_target(user))


def online_retail(domain: str, root: Path) -> Sequences:
    """The shop's invoices from the daily files."""
    return invoices(domain, read_lines(root))


def online_retail_shuffled(domain: str, root: Path) -> Sequences:
    """The same, comparable with what is published."""
    return invoices(domain, read_lines(root), shuffled=True)


def invoices(domain: str, lines: pa.Table, *, shuffled: bool = False) -> Sequences:
    """UniSRec's Online Retail: an invoice is a "user", a stock code an item, its first description the text.

    Lines without a description go; cancellations and lines without a customer stay. The same code, quantity and
    moment on one invoice count once. All lines of an invoice have about one time, so order within is the file's, or
    chance's.

    Args:
        lines: InvoiceNo, StockCode, Description, Quantity, InvoiceDate (timestamp), in the file's order.
        shuffled: lines of one moment are in an order drawn by a fixed seed.
    """
    described_lines = lines.filter(pc.is_valid(lines["Description"])).combine_chunks()
    without_text = len(lines) - len(described_lines)
    lines = described_lines
    invoice, code = (lines[name].combine_chunks().dictionary_encode() for name in ("InvoiceNo", "StockCode"))
    user, item = (of.indices.to_numpy().astype(np.int64) for of in (invoice, code))
    time = lines["InvoiceDate"].cast(pa.int64()).to_numpy()
    once = distinct(user, item, lines["Quantity"].cast(pa.float64()).to_numpy(), time)
    user, item, time = user[once], item[once], time[once]
    kept = core(user, item)
    if shuffled:
        kept = np.random.default_rng(0).permutation(kept)
    first = np.unique(code.indices.to_numpy(), return_index=True)[1]
    titles = pc.utf8_lower(pc.utf8_trim_whitespace(lines["Description"].combine_chunks().take(pa.array(first))))
    catalog = Catalog(code.dictionary, titles)
    sequences = from_interactions(domain, catalog, user[kept], item[kept], time[kept], invoice.dictionary)
    texts = pc.binary_join_element_wise(sequences.catalog.texts, ".", "")
    lost = sequences.left_out | {"lines without description": without_text}
    return with_texts(replace(sequences, titles=sequences.catalog.texts, left_out=lost), texts)


def distinct(*columns: np.ndarray) -> np.ndarray:
    """Rows (sorted) that are the first of their values in all `columns` (`[n]` each)."""
    order = np.lexsort((np.arange(len(columns[0])), *columns))
    new = np.zeros(len(order), bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[order][1:] != column[order][:-1]
    return np.sort(order[new])


SOURCES: dict[str, Callable[[str, Path], Sequences]] = {
    "scientific": scientific,
    "beauty": _whole_users,
    "toys": _whole_users,
    "games": _whole_users,
    "cds": by_time,
    "movies_tv": by_time,
    "office": office,
    "ml1m": ml1m,
    "online_retail": online_retail,
    "online_retail_shuffled": online_retail_shuffled,
}
