"""Public data with two objectives of one user, for `model.kind: mvke`.

    python shards/recipes/two_objectives.py --data movielens --out shards/built/ml1m_likes
    python shards/recipes/two_objectives.py --data movielens --tag genre --out shards/built/ml1m_genres
    python shards/recipes/two_objectives.py --data hillstrom --out shards/built/hillstrom

Both are proxies for clicks and conversions: nobody publishes those with profiles and tags.

`movielens`: ratings of MovieLens-1M. A user *likes* a film that he gives 4 or 5 stars, and *loves* one that he gives 5.
The tag is the film (`--tag title`), or a genre (`--tag genre`: a row for each genre of the rated film). Histories are
liked tags, of training rows strictly before. Whoever rates a film has chosen it: for models that are to find films,
`--negatives N` adds beside each rating N films that its user never rated, neither liked nor loved. Splits: time:8,1,1
(default; training has no row of half the users of the valid tenth, and of a sixth of those of the test tenth), or
random:8,1,1 by rating; the genres of one rating are in one part.

`hillstrom`: the MineThatData e-mail challenge, 64,000 customers of a shop with what they had bought before, one of
three e-mails sent at random (men's, women's, none), which is the tag, and whether they *visited* and *bought* within
two weeks. Splits: random:8,1,1.

`OUT/catalogue` has a row for each tag.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from common import (
    SCHEMAS,
    Part,
    arguments,
    build_parts,
    positive,
    raw_folder,
    raw_root,
    reading,
    run,
    split_groups,
    split_names,
    split_times,
    stable_hash,
    workspace,
    write_part,
)
from movielens import RAW_FOLDER, MovieLens, find_raw, load
from rows import Owned, Sampling, Targets, sample_negatives

from dist_rec.data.rows import Ragged
from dist_rec.errors import UserError
from dist_rec.schema import Schema, load_schema

CATALOGUE = "catalogue"
DEFAULT_SPLITS = {"movielens": "time:8,1,1", "hillstrom": "random:8,1,1"}
HILLSTROM = ("hillstrom_email", "hillstorm.csv.gz")
# What a customer is known by; the rest of the file is what happened.
PROFILE = ("recency", "history_segment", "mens", "womens", "zip_code", "newbie", "channel")
OUTCOMES = ("visit", "conversion")
# What a film has and a genre has not.
OF_FILMS = ("genres", "year")


def rating_tags(raw: MovieLens, tag: str) -> tuple[np.ndarray, pa.Table, pa.Table]:
    """What is rated.

    Args:
        tag: `title` or `genre`.

    Returns:
        int64 `[n]`, the rating of each row; the rows' item columns; and those of each tag once.
    """
    if tag == "title":
        items = raw.movies.select(["item_id", "title", "genres", "year"])
        return np.arange(len(raw.movie)), items.take(pa.array(raw.movie)), items
    genres = raw.movies["genres"].combine_chunks()
    counts = pc.list_value_length(genres).to_numpy()
    starts = np.cumsum(counts) - counts
    of_rating = counts[raw.movie]
    rating = np.repeat(np.arange(len(raw.movie)), of_rating)
    within = np.arange(len(rating)) - np.repeat(np.cumsum(of_rating) - of_rating, of_rating)
    names = genres.flatten().take(pa.array(starts[raw.movie][rating] + within))
    every = pa.array(sorted(set(genres.flatten().to_pylist())))
    return rating, pa.table({"item_id": names, "title": names}), pa.table({"item_id": every, "title": every})


def with_unseen(raw: MovieLens, split: np.ndarray, sampling: Sampling) -> tuple[MovieLens, np.ndarray]:
    """Ratings, and beside each films that its user never rated, of rating 0, the same moment and part.

    Args:
        split: int64 `[ratings]`.
    """
    none = Ragged.from_lengths(np.zeros(0, np.int64), np.zeros(len(raw.movie), np.int64))
    nobody = pa.nulls(len(raw.movie), pa.string())
    targets = Targets(raw.movie, none, split, raw.user, nobody, nobody)
    drawn = sample_negatives("movielens", targets, Owned(raw.user, raw.movie), len(raw.movies), sampling)
    rating, column = np.nonzero(drawn >= 0)
    beside = {"movie": drawn[rating, column], "rating": np.zeros(len(rating), raw.rating.dtype)}
    beside |= {"user": raw.user[rating], "time": raw.time[rating]}
    joined = {name: np.concatenate([getattr(raw, name), values]) for name, values in beside.items()}
    return replace(raw, **joined), np.concatenate([split, split[rating]])


def movielens_rows(raw: MovieLens, tag: str, split: np.ndarray) -> tuple[pa.Table, pa.Table]:
    """Ratings, and the catalogue, with the columns of the schema.

    Args:
        split: int64 `[ratings]`, 0, 1, 2.
    """
    rating, items, catalogue = rating_tags(raw, tag)
    users = raw.users.take(pa.array(raw.user[rating]))
    columns = {name: users[name] for name in ("user_id", "age", "gender", "occupation", "zip")}
    columns |= {name: items[name] for name in items.column_names}
    for label, least in (("like", 4), ("love", 5)):
        columns[label] = pa.array((raw.rating[rating] >= least).astype(np.int8))
    columns |= {"time": pa.array(raw.time[rating]), "split": split_names(split[rating])}
    return pa.table(columns), catalogue


def hillstrom_rows(root: Path, seed: int, weights: tuple[float, float, float]) -> tuple[pa.Table, pa.Table]:
    """Customers, and the three e-mails.

    Raises:
        UserError: the file is missing or is not that one.
    """
    folder, name = HILLSTROM
    with reading(raw_folder(root, folder) / name) as path, gzip.open(path, "rb") as file:
        lines = list(csv.DictReader(io.StringIO(file.read().decode())))
        missing = {*PROFILE, *OUTCOMES, "history", "segment"} - set(lines[0])
        if missing:
            raise UserError(f"raw file {path} has no column {', '.join(sorted(missing))}.")
        columns = {column: pa.array([line[column] for line in lines]) for column in PROFILE}
        columns["past_spend"] = pa.array([np.log1p(float(line["history"])) for line in lines], pa.float32())
        columns |= {label: pa.array([int(line[label]) for line in lines], pa.int8()) for label in OUTCOMES}
        emails = [line["segment"] for line in lines]
    columns |= {"email": pa.array(emails), "title": pa.array(emails)}
    dealt = split_groups(stable_hash(str(number) for number in range(len(lines))), seed, weights)
    columns["split"] = split_names(dealt)
    every = pa.array(sorted(set(emails)))
    return pa.table(columns), pa.table({"email": every, "title": every})


def write_both(rows: pa.Table, catalogue: pa.Table, schema: Schema, folder: Path) -> Part:
    """The catalogue first, so that tags are numbered in its order, then the rows; what tags lack is null."""
    domain = schema.domains.names[0]
    columns = {
        name: catalogue[name] if name in catalogue.column_names else pa.nulls(len(catalogue), rows[name].type)
        for name in rows.column_names
    }
    columns["split"] = pa.repeat(CATALOGUE, len(catalogue))
    tables = [pa.table(columns).cast(rows.schema), rows]
    named = [table.append_column("domain", pa.repeat(domain, len(table))) for table in tables]
    return write_part(named, folder, domain)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = arguments(__doc__)
    options.add_argument("--data", choices=sorted(DEFAULT_SPLITS), required=True)
    options.add_argument("--tag", choices=("title", "genre"), default="title", help="of movielens (default: title)")
    options.add_argument(
        "--negatives",
        type=positive,
        default=0,
        help="films never rated beside each rating, of movielens (default: none)",
    )
    options.add_argument("--split", help="random:8,1,1, or, of movielens, time:8,1,1 (default: see above)")
    return options


def main() -> None:
    from dist_rec.data.build import Split, parse_split

    options = parser().parse_args()
    data = options.data
    split = parse_split(options.split or DEFAULT_SPLITS[data])
    if split.kind == "column" or split.by or (split.kind == "time" and data == "hillstrom"):
        raise UserError(f"--split is random:8,1,1{' or time:8,1,1' * (data == 'movielens')} here, got {options.split}.")
    if data == "hillstrom" and options.tag != "title":
        raise UserError("--tag is of movielens: hillstrom's tags are its e-mails.")
    if options.negatives and (data == "hillstrom" or options.tag != "title"):
        raise UserError("--negatives are films of movielens: leave out --tag genre and --data hillstrom.")
    schema = load_schema(SCHEMAS / f"two_objectives_{data}.yaml")
    if data == "movielens":
        packed = raw_root(options.raw) / RAW_FOLDER
        raw = load(packed if packed.is_dir() else find_raw(options.raw))
        if split.kind == "time":
            dealt = split_times(raw.time, split.weights)
        else:
            dealt = split_groups(stable_hash(str(n) for n in range(len(raw.time))), options.seed, split.weights)
        if options.negatives:
            raw, dealt = with_unseen(raw, dealt, Sampling(options.negatives, seed=options.seed))
        rows, catalogue = movielens_rows(raw, options.tag, dealt)
        if options.tag == "genre":
            schema = replace(schema, features={n: f for n, f in schema.features.items() if n not in OF_FILMS})
    else:
        rows, catalogue = hillstrom_rows(raw_root(options.raw), options.seed, split.weights)
    with workspace(options.out) as folder:
        part = write_both(rows, catalogue, schema, folder)
        build_parts(schema, [part], Split(kind="column", column="split"), options)


if __name__ == "__main__":
    run(main)
