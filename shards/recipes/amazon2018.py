"""The paper's own raw files: ten categories of Amazon 2018 and Online Retail, prepared as UniSRec prepares them.

A category needs two files of the release of 2018, plain or gzipped, in the folder --raw itself or below it as
UniSRec has them:

    Ratings/Prime_Pantry.csv              item,user,rating,timestamp ("ratings only", small subsets)
    Metadata/meta_Prime_Pantry.json.gz    a JSON object a line: asin, title, category, brand

and kaggle_online_retail needs data.csv of carrie1/ecommerce-data (or data-utf8.csv). Then

    ratings of items without metadata go; of equal (user, item, rating, timestamp) one stays
    5-core of users and items, to a fixed point
    a user's ratings by timestamp, those of one moment in the order of the file (the original's order is
    that of a Python set, so its ties differ from run to run); the lines of an invoice, of one moment all,
    in an order drawn by a fixed seed
    text: title, categories, brand, each cleaned (`cleaned`), of the first metadata line of an item
    last item test, the one before valid
"""

from __future__ import annotations

import gzip
import html
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from common import RAW_VARIABLE, reading
from retail import COLUMNS
from rows import Catalog
from sequence_rows import Sequences, core, with_texts
from sequence_sources import distinct, from_interactions, invoices

from dist_rec.errors import UserError

CATEGORIES = {
    "amazon_food": "Grocery_and_Gourmet_Food",
    "amazon_home": "Home_and_Kitchen",
    "amazon_cds": "CDs_and_Vinyl",
    "amazon_kindle": "Kindle_Store",
    "amazon_movies": "Movies_and_TV",
    "amazon_pantry": "Prime_Pantry",
    "amazon_instruments": "Musical_Instruments",
    "amazon_arts": "Arts_Crafts_and_Sewing",
    "amazon_office": "Office_Products",
    "amazon_scientific": "Industrial_and_Scientific",
}
SHOP = "kaggle_online_retail"
TEXT_FIELDS = ("title", "category", "brand")
# Longer fields are scraped pages.
LONGEST_FIELD = 2_000
_DROPPED = re.compile(r'["\n\r]')
_FULL_STOPS = re.compile(r"\.*$")


def cleaned(value: str | list | dict) -> str:
    """A metadata field as UniSRec cleans it: entities resolved, quotes and line ends dropped, one full stop at the end.

    A list is joined by blanks. A result of 2,000 characters or more is empty.
    """
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = _FULL_STOPS.sub("", _DROPPED.sub("", html.unescape(text))) + "."
    return "" if len(text) >= LONGEST_FIELD else text


def _find(root: Path, below: str, name: str) -> Path:
    """The file `name`, plain or gzipped, in `root` or in its folder `below`.

    Raises:
        UserError: it is nowhere; names the places.
    """
    places = [folder / f"{name}{end}" for folder in (root / below, root) for end in ("", ".gz")]
    for place in places:
        if place.is_file():
            return place
    raise UserError(
        f"raw file {name} is not in {root}, nor in {root / below} (plain or .gz). Name the folder that holds it with "
        f"--raw or in the environment variable {RAW_VARIABLE}."
    )


def _metadata(path: Path) -> Iterator[dict]:
    with reading(path), (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _ratings(path: Path) -> pa.Table:
    columns = {"item": pa.string(), "user": pa.string(), "rating": pa.float64(), "time": pa.int64()}
    with reading(path):
        return pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(column_names=list(columns)),
            convert_options=pyarrow.csv.ConvertOptions(column_types=columns),
        )


def category(domain: str, root: Path) -> Sequences:
    """One category of Amazon 2018.

    Raises:
        UserError: a file is missing or malformed, or nothing is left of it.
    """
    name = CATEGORIES[domain]
    ratings_path = _find(root, "Ratings", f"{name}.csv")
    metadata_path = _find(root, "Metadata", f"meta_{name}.json")
    table = _ratings(ratings_path)
    with_metadata = pa.array({item["asin"] for item in _metadata(metadata_path)}, pa.string())
    kept = table.filter(pc.is_in(table["item"], with_metadata))
    left_out = {"ratings of items without metadata": len(table) - len(kept)}
    users, items = (kept[name].combine_chunks().dictionary_encode() for name in ("user", "item"))
    user, item = (of.indices.to_numpy().astype(np.int64) for of in (users, items))
    rating, time = kept["rating"].to_numpy(), kept["time"].to_numpy()
    once = distinct(user, item, rating, time)
    left_out["repeated ratings"] = len(user) - len(once)
    rows = once[core(user[once], item[once])]
    if not len(rows):
        raise UserError(
            f"{ratings_path}: no users and items with five ratings each are left, so there is nothing to build."
        )
    catalog = Catalog(items.dictionary, pa.nulls(len(items.dictionary), pa.string()))
    sequences = from_interactions(domain, catalog, user[rows], item[rows], time[rows], users.dictionary)
    sequences.targets.user_id = sequences.targets.user
    wanted = {asin: number for number, asin in enumerate(sequences.catalog.ids.to_pylist())}
    titles: list[str | None] = [None] * len(wanted)
    texts: list[str | None] = [None] * len(wanted)
    for entry in _metadata(metadata_path):
        number = wanted.pop(entry["asin"], None)
        if number is not None:
            fields = {key: cleaned(entry[key]) for key in TEXT_FIELDS if entry.get(key) is not None}
            titles[number] = fields.get("title") or None
            # Each followed by a blank, as in the original's files.
            text = "".join(f"{field} " for field in fields.values())
            texts[number] = text if text.strip() else None
    sequences = replace(
        sequences,
        asins=sequences.catalog.ids,
        titles=pa.array(titles, pa.string()),
        left_out=sequences.left_out | left_out,
    )
    return with_texts(sequences, pa.array(texts, pa.string()))


def shop(domain: str, root: Path) -> Sequences:
    """Online Retail from the one file of Kaggle, the lines of an invoice in no order."""
    utf8 = root / "data-utf8.csv"
    path = utf8 if utf8.is_file() else _find(root, "Ratings", "data.csv")
    with reading(path):
        lines = pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(encoding="utf8" if path == utf8 else "latin1"),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=list(COLUMNS),
                column_types=dict.fromkeys(COLUMNS, pa.string()) | {"InvoiceDate": pa.timestamp("s")},
                timestamp_parsers=["%m/%d/%Y %H:%M"],
                strings_can_be_null=True,
                null_values=[""],
            ),
        )
    return invoices(domain, lines, shuffled=True)


RAW_SOURCES: dict[str, Callable[[str, Path], Sequences]] = dict.fromkeys(CATEGORIES, category) | {SHOP: shop}
