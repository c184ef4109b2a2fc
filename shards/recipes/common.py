"""What every recipe needs: raw folders, clean texts, stable hashes, Parquet parts, the command line.

A recipe normalises raw public data into Parquet parts and a schema, and leaves the rest
(vocabularies, histories from events, tokens, tars) to `dist_rec.data.build`. Nothing here
depends on `hash()`, on the clock or on the order of a set: the same raw files, options and seed
give the same parts, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from dist_rec.errors import UserError

RAW_VARIABLE = "DIST_REC_RAW"
DEFAULT_RAW = Path(__file__).resolve().parents[3] / "shared" / "data"
SCHEMAS = Path(__file__).resolve().parent / "schemas"
SPLITS = ("train", "valid", "test")
KNOWN_QUERIES = 0.5
DAMAGE = (OSError, EOFError, ValueError, KeyError, IndexError, SyntaxError)


# Raw files -----------------------------------------------------------------------------------


def raw_root(given: str | None) -> Path:
    """The folder of raw data sets: `--raw`, else DIST_REC_RAW, else `../shared/data` beside the repository."""
    return Path(given or os.environ.get(RAW_VARIABLE) or DEFAULT_RAW)


def raw_folder(root: Path, name: str) -> Path:
    """`root/name`.

    Raises:
        UserError: it does not exist; says which folder and how to name another root.
    """
    folder = root / name
    if not folder.is_dir():
        raise UserError(
            f"raw data folder {folder} does not exist. Give the folder that holds {name}/ with --raw "
            f"or in the environment variable {RAW_VARIABLE}."
        )
    return folder


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Turn a missing or malformed raw file into words that name it."""
    try:
        yield path
    except FileNotFoundError:
        raise UserError(f"raw file {path} is missing: see SOURCE.md beside it for what belongs there.") from None
    except DAMAGE as error:
        raise UserError(f"raw file {path} cannot be read: {type(error).__name__}: {error}.") from None


def read_tsv(path: Path, columns: Sequence[str], header: bool = True) -> pa.Table:
    """A tab-separated file, gzipped or not, every column a string; quotes are ordinary characters.

    Args:
        columns: their names, in the file's order.
        header: whether the first line is a header, to be skipped.
    """
    with reading(path), pa.input_stream(str(path), compression="detect") as stream:
        return pyarrow.csv.read_csv(
            stream,
            read_options=pyarrow.csv.ReadOptions(column_names=list(columns), skip_rows=int(header)),
            parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
            ),
        )


# Texts ---------------------------------------------------------------------------------------

_TAG = re.compile(r"</?[a-zA-Z][^>]*(?:>|$)")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def clean_text(text: str | None) -> str:
    """HTML entities resolved, tags and scraps of tags dropped, white space made single blanks."""
    if not text:
        return ""
    if "&" in text:
        # Catalogues that were scraped twice hold entities of entities.
        text = html.unescape(html.unescape(text))
    if "<" in text:
        text = _TAG.sub(" ", text)
    return " ".join(text.split())


def words_of(text: str) -> list[str]:
    """Lower-case words of a text; an apostrophe inside a word stays."""
    return _WORD.findall(text.lower())


def terms(texts: pa.Array) -> pa.Array:
    """The distinct words of every text, in order; each distinct text is worked on once."""
    encoded = texts.dictionary_encode()
    words = [list(dict.fromkeys(words_of(text))) for text in encoded.dictionary.to_pylist()]
    return pa.array(words, pa.list_(pa.string())).take(encoded.indices)


def clean_texts(texts: Iterable[str | None]) -> pa.Array:
    """`clean_text` of each; an empty result is null."""
    return pa.array([clean_text(text) or None for text in texts], pa.string())


# Stable hashes -------------------------------------------------------------------------------


def stable_hash(values: Iterable[str]) -> np.ndarray:
    """uint64 `[n]`: BLAKE2b of the UTF-8 strings."""
    digests = (hashlib.blake2b(v.encode(), digest_size=8).digest() for v in values)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def mix(*parts: np.ndarray | int) -> np.ndarray:
    """uint64: one hash of several integers (broadcast), by SplitMix64 over each in turn."""
    state = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for part in parts:
            word = np.uint64(part & (2**64 - 1)) if isinstance(part, int) else part.astype(np.uint64)
            state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def uniform(*parts: np.ndarray | int) -> np.ndarray:
    """float64 in [0, 1): `mix(*parts)` as a uniform variate."""
    return (mix(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def place_groups(keys: np.ndarray, seed: int) -> np.ndarray:
    """float64 `[n]` in [0, 1): where the groups `keys` (uint64) stand when they are dealt to splits."""
    return uniform(seed, stable_hash(["split"])[0], keys)


def split_groups(keys: np.ndarray, seed: int, weights: Sequence[float] = (8, 1, 1)) -> np.ndarray:
    """int64 `[n]` in 0, 1, 2 (train, valid, test): equal keys (uint64) always fall together."""
    return np.searchsorted(np.cumsum(weights)[:-1] / np.sum(weights), place_groups(keys, seed), side="right")


def query_ids(queries: pa.Array, keys: np.ndarray, seed: int, weights: Sequence[float] = (8, 1, 1)) -> pa.Array:
    """The queries that count as known, as their own ids; null for the others.

    A query that is only in valid or test has no trained id, so it gets none. If all training
    queries had one, nothing would learn to do without; so every second has none either.
    """
    known = place_groups(keys, seed) < KNOWN_QUERIES * weights[0] / np.sum(weights)
    return pc.if_else(pa.array(known), queries, pa.scalar(None, pa.string()))


def split_times(times: np.ndarray, weights: Sequence[float] = (8, 1, 1)) -> np.ndarray:
    """int64 `[n]` in 0, 1, 2: cut at quantiles of time; rows of one moment never straddle a cut."""
    bounds = np.quantile(times, np.cumsum(weights)[:-1] / np.sum(weights), method="inverted_cdf")
    return np.searchsorted(bounds, times, side="left")


def split_names(split: np.ndarray) -> pa.Array:
    """0, 1, 2 as train, valid, test."""
    return pc.take(pa.array(SPLITS), pa.array(split))


def keep_groups(groups: np.ndarray, max_rows: int | None, seed: int) -> np.ndarray:
    """bool `[n]`: whole groups (uint64 keys), in hashed order, while they fit into `max_rows`.

    The first group is kept even if it alone is larger, so a cap never empties a domain.
    """
    if max_rows is None or len(groups) <= max_rows:
        return np.ones(len(groups), bool)
    keys, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(mix(seed, stable_hash(["cap"])[0], keys), kind="stable")
    fits = np.cumsum(sizes[order]) <= max_rows
    fits[0] = True
    kept = np.zeros(len(keys), bool)
    kept[order[fits]] = True
    return kept[inverse]


# Parts ---------------------------------------------------------------------------------------


@dataclass
class Part:
    """A written Parquet part of one domain."""

    domain: str
    path: str
    rows: int


def write_part(tables: pa.Table | Iterable[pa.Table], folder: Path, domain: str) -> Part:
    """Write one domain's rows as `<folder>/<domain>.parquet`, one row group a table.

    Raises:
        UserError: the domain has no rows.
    """
    path, rows, writer = folder / f"{domain}.parquet", 0, None
    for table in [tables] if isinstance(tables, pa.Table) else tables:
        if writer is None:
            # Titles repeat in many histories: the default 1 MiB dictionary would overflow into plain pages.
            writer = pq.ParquetWriter(path, table.schema, compression="zstd", dictionary_pagesize_limit=1 << 26)
        writer.write_table(table)
        rows += table.num_rows
    if writer is not None:
        writer.close()
    if not rows:
        raise UserError(f"domain {domain!r} came out empty: its raw folder holds no usable rows.")
    return Part(domain, str(path), rows)


# Command line --------------------------------------------------------------------------------


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def arguments(description: str, split: str | None = None) -> argparse.ArgumentParser:
    """A parser with the options that every recipe has; `split` is the default of `--split`, if there is one."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the data set is written")
    parser.add_argument("--raw", metavar="FOLDER", help="where the raw data are")
    parser.add_argument("--seed", type=int, default=0, help="of splits, samples and shuffles (default: 0)")
    parser.add_argument("--workers", type=positive, help="processes that build (default: as the builder chooses)")
    parser.add_argument("--tokenizer", help="tokenizer.json or Hugging Face folder; texts stay untokenised without")
    parser.add_argument("--max-tokens", type=positive, default=32, help="tokens kept of a text (default: 32)")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is already there")
    if split is not None:
        parser.add_argument("--split", default=split, help=f"kind:train,valid,test (default: {split})")
    return parser


def build_parts(schema, parts: Sequence[Part], split, options: argparse.Namespace) -> None:
    """Hand the parts to the shared builder and print what every domain got.

    Where `options.extends` names a data set, texts are cut as its are.
    """
    from dist_rec.data.build import build

    extra = {} if options.workers is None else {"workers": options.workers}
    extends = getattr(options, "extends", None)
    build(
        schema,
        [part.path for part in parts],
        options.out,
        split=split,
        tokenizer=options.tokenizer,
        max_tokens=None if extends else options.max_tokens,
        extends=extends,
        seed=options.seed,
        overwrite=options.overwrite,
        **extra,
    )
    for part in parts:
        print(f"{part.domain:>16} {part.rows:>10,} rows")
    print(f"wrote {options.out}")


@contextmanager
def workspace(out: str) -> Iterator[Path]:
    """A temporary folder beside `out` (parts can be larger than /tmp), removed at the end.

    Raises:
        UserError: the folder cannot be made there.
    """
    parent = Path(out).absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".recipe-", dir=parent)
    except OSError as error:
        raise UserError(f"cannot write beside {out}: {error.strerror}.") from None
    with folder as path:
        yield Path(path)


def run(main: Callable[[], None]) -> None:
    """Call a recipe's `main`; a UserError becomes words on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
