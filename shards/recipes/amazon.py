"""Amazon reviews as sequences of items with titles: seven domains from six public repositories.

    beauty, toys      2014, whole sequences; leave-one-out (last: test, second last: valid)
    games             whole sequences, cut at 50; leave-one-out
    scientific        2018, UniSRec's own train, valid and test rows
    cds, movies_tv    2018, the authors' split by time; training rows name no user
    office            2018, valid and test rows by time; the training file is not public

Where training rows name no user (cds, movies_tv) rows are chained: a row continues another if
its history is that one's history and item. Chains only decide which items a negative must not
be; `user` and `user_id` stay null in training, and `user_id` (a feature that training never
saw) everywhere. Two users with the same short past become one chain, which excludes too much
rather than too little.

Office's training rows are what the first row of every user carries as history, as far as it
lies before the validation period, so they come only from users who bought again later.

Order is the source's; only cds, movies_tv and office have times.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from common import clean_text, clean_texts, raw_folder, read_tsv, reading
from rows import Catalog, Owned, Targets, windows

from dist_rec.data.rows import Ragged
from dist_rec.errors import UserError

# Histories in these files are the user's last ten items.
CHAIN = 10
BY_TIME = {"cds": "amazon2018_cds_and_vinyl", "movies_tv": "amazon2018_movies_and_tv"}

Loaded = tuple[Catalog, Targets, Owned]


def leave_one_out(sequences: Ragged, names: pa.Array, targets_per_user: int | None, max_history: int) -> Targets:
    """Test is the last item of every sequence, valid the one before, train the last ones before that.

    Args:
        sequences: items of n users, oldest first; a user with one item gives no target.
        names: string `[n]`, the users.
        targets_per_user: training targets a user, None for every one that has a history.
        max_history: longest history.
    """
    length = sequences.lengths
    first = np.ones_like(length) if targets_per_user is None else np.maximum(length - 2 - targets_per_user, 1)
    count = np.maximum(length - first, 0)
    user = np.repeat(np.arange(len(length)), count)
    places = Ragged.from_lengths(np.zeros(0, np.int64), count)
    at = np.arange(places.offsets[-1]) - places.offsets[user] + first[user]
    start = sequences.offsets[user]
    return Targets(
        item=sequences.values[start + at],
        history=windows(sequences.values, start, start + at, max_history),
        split=np.maximum(at - length[user] + 3, 0),
        owner=user,
        user=names.take(pa.array(user)),
        user_id=names.take(pa.array(user)),
    )


def owned_by_sequence(sequences: Ragged) -> Owned:
    """Every item of a sequence belongs to it."""
    return Owned(np.repeat(np.arange(len(sequences)), sequences.lengths), sequences.values)


def owned_by_row(owner: np.ndarray, history: Ragged, item: np.ndarray) -> Owned:
    """A row's owner has its item and its history."""
    return Owned(np.concatenate([owner, np.repeat(owner, history.lengths)]), np.concatenate([item, history.values]))


def _checked(domain: str, items: np.ndarray, catalog: Catalog) -> None:
    if len(items) and (items.min() < 0 or items.max() >= len(catalog)):
        bad = items[(items < 0) | (items >= len(catalog))][0]
        raise UserError(f"{domain}: a sequence names item {bad}, the catalogue ends at {len(catalog) - 1}.")


def _numbers(lists: Sequence[str]) -> Ragged:
    """Lists of integers from strings of blank-separated ones."""
    split = [text.split() for text in lists]
    return Ragged.from_lengths(
        np.array([x for numbers in split for x in numbers], np.int64), np.array([len(x) for x in split], np.int64)
    )


def _numbered_titles(path: Path) -> Catalog:
    """A catalogue from `title<TAB>number` lines; the number is the item."""
    with reading(path):
        pairs = [line.rstrip("\n").rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line]
        titles = {int(number): title for title, number in pairs}
        ordered = [titles[number] for number in range(len(titles))]
    return Catalog(pa.array(map(str, range(len(ordered))), pa.string()), clean_texts(ordered))


# Whole sequences -----------------------------------------------------------------------------


def load_2014(domain: str, root: Path, targets_per_user: int | None, max_history: int) -> Loaded:
    """beauty or toys: `user item item ...` lines, titles and category paths."""
    folder = raw_folder(root, f"amazon2014_{domain}")
    with reading(folder / "item_text.jsonl.gz") as path, gzip.open(path, "rt", encoding="utf-8") as file:
        items = sorted((json.loads(line) for line in file if line.strip()), key=lambda item: item["item_id"])
        if [item["item_id"] for item in items] != list(range(len(items))):
            raise ValueError("item_id does not run from 0 without gaps")
        catalog = Catalog(
            pa.array([str(item["item_id"]) for item in items], pa.string()),
            clean_texts(item["title"] for item in items),
            pa.array([_categories(item["categories"]) for item in items], pa.list_(pa.string())),
        )
    with reading(folder / "sequential_data.txt.gz") as path, gzip.open(path, "rt") as file:
        users, lists = zip(*(line.split(" ", 1) for line in file if line.strip()), strict=True)
        sequences = _numbers(lists)
    _checked(domain, sequences.values, catalog)
    targets = leave_one_out(sequences, pa.array(users, pa.string()), targets_per_user, max_history)
    return catalog, targets, owned_by_sequence(sequences)


def _categories(paths: list[list[str]]) -> list[str] | None:
    """Distinct names of all paths below the root, in order; the root is the domain itself."""
    names = [name for path in paths for part in path[1:] if (name := clean_text(part))]
    return list(dict.fromkeys(names)) or None


def load_games(domain: str, root: Path, targets_per_user: int | None, max_history: int) -> Loaded:
    """games: the test file holds whole sequences."""
    folder = raw_folder(root, "amazon2018_games_llmrank")
    items = read_tsv(folder / "Games.item.gz", ("item_id", "title"))
    rows = read_tsv(folder / "Games-6k.test.inter.gz", ("user", "history", "item"))
    with reading(folder / "Games.item.gz"):
        order = np.argsort(items["item_id"].cast(pa.int64()).to_numpy())
        catalog = Catalog(
            items["item_id"].combine_chunks().take(pa.array(order)),
            clean_texts(items["title"].take(pa.array(order)).to_pylist()),
        )
        if catalog.ids.to_pylist() != [str(number) for number in range(len(catalog))]:
            raise ValueError("item_id does not run from 0 without gaps")
    with reading(folder / "Games-6k.test.inter.gz"):
        pairs = zip(rows["history"].to_pylist(), rows["item"].to_pylist(), strict=True)
        sequences = _numbers([f"{history} {item}" for history, item in pairs])
    _checked(domain, sequences.values, catalog)
    targets = leave_one_out(sequences, rows["user"].combine_chunks(), targets_per_user, max_history)
    return catalog, targets, owned_by_sequence(sequences)


# Given rows ----------------------------------------------------------------------------------


def load_scientific(domain: str, root: Path, targets_per_user: int | None, max_history: int) -> Loaded:
    """scientific: UniSRec's files as they are; training rows of a user are the longest prefixes."""
    folder = raw_folder(root, "amazon2018_scientific_cowpirec")
    index = read_tsv(folder / "Scientific.item2index.gz", ("asin", "item"), header=False)
    texts = dict(zip(*read_tsv(folder / "Scientific.text.gz", ("asin", "text")).to_pydict().values(), strict=True))
    with reading(folder / "Scientific.item2index.gz"):
        asins = index["asin"].take(pa.array(np.argsort(index["item"].cast(pa.int64()).to_numpy()))).combine_chunks()
    catalog = Catalog(asins, clean_texts(texts.get(asin) for asin in asins.to_pylist()))
    files = [
        read_tsv(folder / f"Scientific.{name}.inter.gz", ("user", "history", "item"))
        for name in ("train", "valid", "test")
    ]
    table = pa.concat_tables(files)
    split = np.repeat(np.arange(3), [len(file) for file in files])
    with reading(folder):
        history = _numbers(table["history"].to_pylist())
        item = table["item"].cast(pa.int64()).to_numpy()
    _checked(domain, np.concatenate([history.values, item]), catalog)
    users = table["user"].combine_chunks()
    owner = users.dictionary_encode().indices.to_numpy().astype(np.int64)
    rows = np.arange(len(item))
    if targets_per_user is not None:
        order = np.lexsort((-history.lengths, split, owner))
        new = np.r_[True, (owner[order][1:] != owner[order][:-1]) | (split[order][1:] != split[order][:-1])]
        rank = rows - np.maximum.accumulate(np.where(new, rows, 0))
        rows = np.sort(order[(rank < targets_per_user) | (split[order] > 0)])
    stop = history.offsets[1:][rows]
    targets = Targets(
        item=item[rows],
        history=windows(history.values, history.offsets[rows], stop, max_history),
        split=split[rows],
        owner=owner[rows],
        user=users.take(pa.array(rows)),
        user_id=users.take(pa.array(rows)),
    )
    return catalog, targets, owned_by_row(owner, history, item)


def _evaluation_rows(path: Path) -> Iterator[tuple[str, list[int], int, int, list[int]]]:
    """(user, history, item, time, times of the history) of a valid or test CSV."""
    with reading(path), gzip.open(path, "rt", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield (
                row["user_id"],
                json.loads(row["history_item_id"]),
                int(row["item_id"]),
                int(row["timestamp"]),
                json.loads(row["history_timestamp"]),
            )


def load_by_time(domain: str, root: Path, targets_per_user: int | None, max_history: int) -> Loaded:
    """cds or movies_tv: all given rows; `targets_per_user` has no users to count in training."""
    folder = raw_folder(root, BY_TIME[domain])
    catalog = _numbered_titles(folder / "item_titles.txt")
    train = read_tsv(folder / "train.tsv.gz", ("history", "item"))
    with reading(folder / "train.tsv.gz"):
        lists = train["history"].to_pylist()
        histories = [[int(x) for x in text.split()] for text in lists]
        items = [int(x) for x in train["item"].to_pylist()]
    users: list[str | None] = [None] * len(items)
    times: list[int | None] = [None] * len(items)
    split = [0] * len(items)
    for number, name in ((1, "valid"), (2, "test")):
        for user, history, item, time, _ in _evaluation_rows(folder / f"{name}.csv.gz"):
            users.append(user)
            histories.append(history)
            items.append(item)
            times.append(time)
            split.append(number)
    item = np.array(items, np.int64)
    history = Ragged.from_lengths(
        np.array([x for past in histories for x in past], np.int64), np.array([len(x) for x in histories], np.int64)
    )
    _checked(domain, np.concatenate([history.values, item]), catalog)
    owner = chain_rows(histories, items, users)
    targets = Targets(
        item=item,
        history=windows(history.values, history.offsets[:-1], history.offsets[1:], max_history),
        split=np.array(split),
        owner=owner,
        user=pa.array(users, pa.string()),
        user_id=pa.nulls(len(items), pa.string()),
        time=pa.array(times, pa.int64()),
    )
    return catalog, targets, owned_by_row(owner, history, item)


def chain_rows(histories: Sequence[list[int]], items: Sequence[int], users: Sequence[str | None]) -> np.ndarray:
    """int64 `[n]`: one number for rows that may be one user's (the chain's first row).

    Rows are joined if one continues the other, or if both name the same user.
    """
    parent = list(range(len(items)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    def join(left: int, right: int) -> None:
        left, right = sorted((root(left), root(right)))
        parent[right] = left

    after: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, (history, item) in enumerate(zip(histories, items, strict=True)):
        after[tuple([*history, item][-CHAIN:])].append(row)
    of_user: dict[str, int] = {}
    for row, (history, user) in enumerate(zip(histories, users, strict=True)):
        for earlier in after.get(tuple(history[-CHAIN:]), ()):
            join(earlier, row)
        if user is not None:
            join(of_user.setdefault(user, row), row)
    return np.array([root(row) for row in range(len(items))], np.int64)


def load_office(domain: str, root: Path, targets_per_user: int | None, max_history: int) -> Loaded:
    """office: given valid and test rows, and training rows out of the users' first histories."""
    folder = raw_folder(root, "amazon2018_office_products_engram4rec")
    catalog = _numbered_titles(folder / "info.txt")
    given = [
        (number, *row)
        for number, name in ((1, "valid"), (2, "test"))
        for row in _evaluation_rows(folder / f"{name}.csv.gz")
    ]
    valid_starts = min(time for number, _, _, _, time, _ in given if number == 1)
    rows: list[tuple[int, str, list[int], int, int]] = []
    seen: dict[str, int] = {}
    for _, user, past, _, _, times in given:
        if user in seen:
            continue
        seen[user] = len(seen)
        places = [at for at in range(1, len(past)) if times[at] < valid_starts]
        for at in places[-targets_per_user:] if targets_per_user else places:
            rows.append((0, user, past[:at], past[at], times[at]))
    rows += [(number, user, past, item, time) for number, user, past, item, time, _ in given]
    item = np.array([row[3] for row in rows], np.int64)
    history = Ragged.from_lengths(
        np.array([x for row in rows for x in row[2]], np.int64), np.array([len(row[2]) for row in rows], np.int64)
    )
    _checked(domain, np.concatenate([history.values, item]), catalog)
    owner = np.array([seen[row[1]] for row in rows], np.int64)
    users = pa.array([row[1] for row in rows], pa.string())
    targets = Targets(
        item=item,
        history=windows(history.values, history.offsets[:-1], history.offsets[1:], max_history),
        split=np.array([row[0] for row in rows], np.int64),
        owner=owner,
        user=users,
        user_id=users,
        time=pa.array([row[4] for row in rows], pa.int64()),
    )
    return catalog, targets, owned_by_row(owner, history, item)


LOADERS = {
    "beauty": load_2014,
    "toys": load_2014,
    "cds": load_by_time,
    "movies_tv": load_by_time,
    "games": load_games,
    "scientific": load_scientific,
    "office": load_office,
}
