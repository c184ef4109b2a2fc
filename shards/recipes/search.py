"""Search relevance with human judgments: Home Depot, Chorus (Icecat products), Elastic movies.

Every source becomes rows (query, item text, relevance 0 .. 3) split by query: all rows of one
query text are in one part, so a test query was never seen (and has no query id). Scales are stretched to 0 .. 3:

* homedepot: mean of three or more people on 1 .. 3, as (mean - 1) * 1.5.
* chorus: final rating 0 .. 3 of three people, as it is.
* elastic_movies: 0 or 1, as 0 or 3.

The item's text is its title with what is short and telling beside it: the product type and
colour of an Icecat product; year, director and three actors of a movie, because people search
by them.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from common import (
    clean_text,
    clean_texts,
    keep_groups,
    mix,
    query_ids,
    raw_folder,
    read_tsv,
    reading,
    split_groups,
    split_names,
    stable_hash,
    terms,
)
from rows import Catalog, as_rows

CHORUS_ATTRIBUTES = ("attr_t_product_type", "attr_t_type", "attr_t_product_colour")


@dataclass
class Judged:
    """Judgments of one source.

    Attributes:
        catalog: the items.
        queries: string `[n]`, cleaned and lower-cased.
        item: int64 `[n]`, position in the catalogue.
        relevance: float32 `[n]`, 0 .. 3.
    """

    catalog: Catalog
    queries: pa.Array
    item: np.ndarray
    relevance: np.ndarray


def _queries(raw: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Cleaned, lower-cased queries; each distinct one is worked on once."""
    array = raw.combine_chunks() if isinstance(raw, pa.ChunkedArray) else raw
    encoded = array.dictionary_encode()
    distinct = clean_texts(text.lower() for text in encoded.dictionary.to_pylist())
    return distinct.take(encoded.indices)


def homedepot(root: Path) -> Judged:
    """Home Depot: query, product title, mean relevance."""
    path = raw_folder(root, "homedepot_search_relevance") / "train.csv.zip"
    with reading(path), zipfile.ZipFile(path) as archive, archive.open("train.csv") as file:
        table = pyarrow.csv.read_csv(
            io.BytesIO(file.read()),
            read_options=pyarrow.csv.ReadOptions(encoding="iso-8859-1"),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={"product_uid": pa.string(), "relevance": pa.float32()}, strings_can_be_null=False
            ),
        )
        products = table["product_uid"].combine_chunks().dictionary_encode()
        _, first = np.unique(products.indices.to_numpy(), return_index=True)
        titles = clean_texts(table["product_title"].take(pa.array(first)).to_pylist())
        return Judged(
            catalog=Catalog(products.dictionary, titles),
            queries=_queries(table["search_term"]),
            item=products.indices.to_numpy().astype(np.int64),
            relevance=((table["relevance"].to_numpy() - 1) * 1.5).astype(np.float32),
        )


def chorus(root: Path) -> Judged:
    """Chorus: the wider rated set, with the three people's final rating where there is one."""
    folder = raw_folder(root, "chorus_icecat_search")
    ratings: dict[tuple[str, str], float] = {}
    for name, column in (
        ("Broad_Query_Set_rated.csv", "rating"),
        ("Broad_Query_Set_individual_ratings.csv", "final_rating"),
    ):
        with reading(folder / name) as path, open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                ratings[row["query"], row["docid"]] = float(row[column])
    products = {}
    for number in range(1, 5):
        with reading(folder / f"products_{number}.json.zip") as path, zipfile.ZipFile(path) as archive:
            products |= {p["id"]: p for p in json.loads(archive.read(f"{number}.json"))}
    position = {name: at for at, name in enumerate(products)}
    pairs = [(query, position[doc], rating) for (query, doc), rating in ratings.items() if doc in position]
    return Judged(
        catalog=Catalog(
            pa.array(list(products), pa.string()),
            clean_texts(_product_text(p) for p in products.values()),
            pa.array([[s] if (s := clean_text(p.get("supplier"))) else None for p in products.values()]),
        ),
        queries=_queries(pa.array([query for query, _, _ in pairs], pa.string())),
        item=np.array([item for _, item, _ in pairs], np.int64),
        relevance=np.array([rating for _, _, rating in pairs], np.float32),
    )


def _product_text(product: dict) -> str:
    title = product.get("title") or product.get("name") or ""
    shown = title.lower()
    extra = [
        value for key in CHORUS_ATTRIBUTES if isinstance(value := product.get(key), str) and value.lower() not in shown
    ]
    return ", ".join([title, *dict.fromkeys(extra)])


def elastic_movies(root: Path) -> Judged:
    """Elastic's movies: binary judgments; the few documents outside the corpus are dropped."""
    folder = raw_folder(root, "elastic_movies_search")
    with reading(folder / "movies-corpus.jsonl.gz") as path, gzip.open(path, "rt", encoding="utf-8") as file:
        movies = [json.loads(line) for line in file if line.strip()]
        catalog = Catalog(
            pa.array([movie["id"] for movie in movies], pa.string()),
            clean_texts(_movie_text(movie) for movie in movies),
            pa.array([movie["genres"] or None for movie in movies], pa.list_(pa.string())),
        )
    table = read_tsv(folder / "movies-judgments.tsv.gz", ("query_id", "query", "doc_id", "grade"))
    at = pc.index_in(table["doc_id"], value_set=catalog.ids)
    known = pc.is_valid(at)
    table, at = table.filter(known), at.filter(known)
    return Judged(
        catalog=catalog,
        queries=_queries(table["query"]),
        item=at.to_numpy().astype(np.int64),
        relevance=3 * table["grade"].cast(pa.float32()).to_numpy(),
    )


def _movie_text(movie: dict) -> str:
    year = f" ({movie['year']})" if movie.get("year") else ""
    people = [movie.get("director") or "", *(movie.get("actors") or [])[:3]]
    return ", ".join([f"{movie['title']}{year}", *(name for name in people if name)])


SOURCES = {"homedepot": homedepot, "chorus": chorus, "elastic_movies": elastic_movies}


def search_table(domain: str, root: Path, max_rows: int | None, seed: int) -> pa.Table:
    """All judgments of a search domain as rows; with `max_rows`, whole queries by hash.

    Raises:
        UserError: the raw folder or a file in it is missing.
    """
    judged = SOURCES[domain](root)
    encoded = judged.queries.dictionary_encode()
    asked = encoded.indices.fill_null(-1).to_numpy().astype(np.int64)
    keys = mix(stable_hash([domain])[0], stable_hash(encoded.dictionary.to_pylist()))
    # A query that is empty after cleaning asks nothing.
    rows = np.flatnonzero(asked >= 0)
    rows = rows[keep_groups(keys[asked[rows]], max_rows, seed)]
    catalog, items = judged.catalog, pa.array(judged.item[rows])
    queries = judged.queries.take(pa.array(rows))
    prefix = f"{domain}:"
    names = pc.binary_join_element_wise(prefix, queries, "")
    columns = {
        "domain": pa.repeat(domain, len(rows)),
        "split": split_names(split_groups(keys[asked[rows]], seed)),
        "query_key": names,
        "query_id": query_ids(names, keys[asked[rows]], seed),
        "query_terms": terms(queries),
        "query": queries,
        "item_id": pc.binary_join_element_wise(prefix, catalog.ids.take(items), ""),
        "category": None if catalog.categories is None else catalog.categories.take(items),
        "title": catalog.texts.take(items),
        "relevance": pa.array(judged.relevance[rows]),
    }
    return as_rows(columns, len(rows))
