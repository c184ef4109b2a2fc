"""The distinct texts of data sets, as a stream of token ids: what `embed` encodes.

Reads texts.parquet (columns key int64, text string, tokens list<int32>), which the builder writes
beside the splits of a data set. Only keys stay in memory. Knows no language model, except for the
tokenizer.json of one where a data set was built without token ids.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.blocks import TEXT, text_key
from ..data.index import INDEX_NAME, TokenizerInfo, join, read_index
from ..data.rows import Ragged
from ..errors import UserError
from ..scoring.texts import open_tokenizer, token_lists
from .paths import TOKENIZER_NAME
from .store import Recipe, VectorStore
from .words import drop_words

TEXTS_NAME = "texts.parquet"
READ_ROWS = 16384
CHUNK_TEXTS = 65536


@dataclass
class TextFile:
    """A texts.parquet and the tokenizer of the data sets beside it, None if they name none."""

    path: str
    tokenizer: TokenizerInfo | None


@dataclass
class Texts:
    """n texts: int64 `[n]` keys and second hashes, and their token ids."""

    keys: np.ndarray
    checks: np.ndarray
    tokens: Ragged


def find_text_files(texts: list[str]) -> list[TextFile]:
    """The texts.parquet of every data set, each once, with the tokenizer its indexes name.

    Raises:
        UserError: there is none, or splits that share one disagree about the tokenizer.
    """
    if not texts:
        raise UserError("no texts given: name data set folders or texts.parquet files.")
    found: dict[str, TextFile] = {}
    for given in texts:
        path = given if "://" in given else os.path.abspath(os.path.expanduser(given))
        parent = path.rstrip("/").rpartition("/")[0]
        names = [path] if path.endswith(".parquet") else [join(path, TEXTS_NAME), join(parent, TEXTS_NAME)]
        fs, _ = fsspec.core.url_to_fs(path)
        name = next((name for name in names if fs.isfile(name)), None)
        if name is None:
            raise UserError(
                f"no texts at {given}: {' and '.join(names)} missing. Give a data set that has text features, "
                "built with `dist-rec shards build`."
            )
        if name not in found:
            found[name] = TextFile(name, _tokenizer_beside(fs, name.rpartition("/")[0], given))
    return list(found.values())


def _tokenizer_beside(fs: Any, root: str, given: str) -> TokenizerInfo | None:
    """The one tokenizer that the index at `root`, or those one folder below, name."""
    below = [entry["name"] for entry in fs.ls(root, detail=True) if entry["type"] == "directory"]
    folders = [root] + sorted(join(root, name.rstrip("/").rpartition("/")[2]) for name in below)
    indexes = [read_index(folder) for folder in folders if fs.isfile(join(folder, INDEX_NAME))]
    if not indexes:
        raise UserError(
            f"{given}: no {INDEX_NAME} in {root} or in a folder below it, so nothing says whose token ids "
            f"{TEXTS_NAME} carries. Build the data set with `dist-rec shards build`."
        )
    known = {(i.tokenizer.fingerprint, i.tokenizer.max_length) if i.tokenizer else None for i in indexes}
    if len(known) > 1:
        raise UserError(f"{given}: the data sets in {root} are of different tokenizers. Build them again, together.")
    return indexes[0].tokenizer


class Ledger:
    """The distinct keys one rank owns: which the store lacks, which are done, and each text's second hash.

    Attributes:
        num_new: how many the store lacks, done or not.
        done: bool, of each key: whether an earlier job that did not end has encoded it.
    """

    def __init__(self, keys: np.ndarray, old: VectorStore | None):
        self.keys = keys
        self.checks = np.zeros(len(keys), np.int64)
        self.seen = np.zeros(len(keys), bool)
        if old is not None:
            at, self.seen = old.find(keys)
            self.checks[self.seen] = old.checks[at[self.seen]]
        self.num_new = int((~self.seen).sum())
        self.done = np.zeros(len(keys), bool)

    @property
    def num_left(self) -> int:
        """How many are still to be encoded."""
        return self.num_new - int(self.done.sum())

    @classmethod
    def of(cls, files: list[TextFile], rank: int, world_size: int, old: VectorStore | None) -> Ledger:
        owned, total = [np.zeros(0, np.int64)], 0
        for file in files:
            for batch in _read(file, ["key"]):
                keys = batch.column("key").to_numpy()
                total += len(keys)
                owned.append(keys[keys % world_size == rank])
        if not total:
            raise UserError(f"there is not a single text in {', '.join(f.path for f in files)}.")
        return cls(np.unique(np.concatenate(owned)), old)

    def take_over(self, keys: np.ndarray, checks: np.ndarray) -> None:
        """Note what an earlier job has encoded: int64 `[n]` keys, of which other ranks' are left aside, and hashes."""
        at, mine = self._find(keys)
        self.done[at[mine]] = True
        self.checks[at[mine]] = checks[mine]

    def wanted(self, keys: np.ndarray) -> np.ndarray:
        """Which of `keys` (int64 `[n]`) are this rank's, not in the store and not done: their positions, int64."""
        at, mine = self._find(keys)
        return np.flatnonzero(mine & ~self.seen[at] & ~self.done[at])

    def is_done(self, keys: np.ndarray) -> np.ndarray:
        """Whether each of this rank's keys (int64 `[n]`) is done: bool `[n]`."""
        return self.done[np.searchsorted(self.keys, keys)]

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.searchsorted(self.keys, keys)
        if not len(self.keys):
            return at, np.zeros(len(keys), bool)
        at[at == len(self.keys)] = 0
        return at, self.keys[at] == keys

    def enter(self, keys: np.ndarray, checks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Note n texts that were read.

        Args:
            keys, checks: int64 `[n]`, keys that this rank owns and second hashes.

        Returns:
            bool `[n]`: which are new; and which differ from an earlier text of the same key.
        """
        at = np.searchsorted(self.keys, keys)
        first = np.zeros(len(keys), bool)
        first[np.unique(at, return_index=True)[1]] = True
        new = first & ~self.seen[at]
        unknown = at[new & ~self.done[at]]
        self.checks[unknown] = checks[new & ~self.done[at]]
        self.seen[at] = True
        return new, checks != self.checks[at]


def _read(file: TextFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Record batches of a texts.parquet.

    Raises:
        UserError: the file has other columns, nulls, or is damaged.
    """
    try:
        with fsspec.open(file.path, "rb") as opened:
            parquet = pq.ParquetFile(opened)
            types = {field.name: field.type for field in parquet.schema_arrow}
            wrong = [name for name in columns if types.get(name) != TEXT.field(name).type]
            if wrong:
                raise UserError(
                    f"{file.path}: expected the columns {', '.join(f'{n} {TEXT.field(n).type}' for n in wrong)}. "
                    "Build the data set again."
                )
            for batch in parquet.iter_batches(READ_ROWS, columns=columns):
                if any(batch.column(c).null_count for c in columns):
                    raise UserError(f"{file.path}: a key, text or token list is null. Build the data set again.")
                yield batch
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {file.path}: {error}. Build the data set again.") from None


def text_of(data: str, key: int) -> str | None:
    """The text of a key in the texts.parquet of a data set; None where that is not there, or does not have it."""
    try:
        for file in find_text_files([data]):
            for batch in _read(file, ["key", "text"]):
                at = np.flatnonzero(batch.column("key").to_numpy() == key)
                if len(at):
                    return batch.column("text")[int(at[0])].as_py()
    except (UserError, OSError):
        pass
    return None


def new_texts(
    files: list[TextFile], ledger: Ledger, rank: int, world_size: int, model_folder: Path, recipe: Recipe
) -> Iterator[Texts]:
    """This rank's texts that the ledger has not seen, with token ids, in the order of the files.

    Texts that lose words are tokenised here, whatever their data sets have.
    """
    tokenizer, max_tokens = None, recipe.max_tokens
    for file in files:
        has_tokens = file.tokenizer is not None and not recipe.word_drop
        columns = ["key", "text"] + (["tokens"] if has_tokens else [])
        for batch in _read(file, columns):
            keys = batch.column("key").to_numpy()
            mine = np.flatnonzero(keys % world_size == rank)
            keys, batch = keys[mine], batch.take(pa.array(mine))
            texts = batch.column("text").to_pylist()
            named = np.fromiter((text_key(text) for text in texts), np.int64, len(texts))
            _refuse(file, keys, texts, named != keys, "is stored under another text's key. Build the data set again")
            checks = np.fromiter((_second_hash(text) for text in texts), np.int64, len(texts))
            new, clash = ledger.enter(keys, checks)
            _refuse(file, keys, texts, clash, "has the key of a different text: change one of the two texts")
            rows = np.flatnonzero(new)
            if has_tokens:
                column = batch.column("tokens").take(pa.array(rows))
                tokens = Ragged.from_lengths(column.flatten().to_numpy(), column.value_lengths().to_numpy())
            else:
                tokenizer = tokenizer or load_tokenizer(model_folder, max_tokens)
                chosen = [texts[row] for row in rows]
                if recipe.word_drop:
                    chosen = [
                        drop_words(text, key, recipe.word_drop, recipe.drop_seed)
                        for text, key in zip(chosen, keys[rows].tolist(), strict=True)
                    ]
                tokens = tokenize(tokenizer, chosen)
            if len(rows) and tokens.lengths.max() > max_tokens:
                raise UserError(f"{file.path}: a text has more than the {max_tokens} tokens its index promises.")
            yield Texts(keys[rows], checks[rows], tokens)


def _refuse(file: TextFile, keys: np.ndarray, texts: list[str], bad: np.ndarray, what: str) -> None:
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise UserError(f"{file.path}: the text {texts[at][:80]!r} (key {keys[at]}) {what}.")


def _second_hash(text: str) -> int:
    """64 bits that are independent of `text_key`: two texts that share both are one text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"check").digest()
    return int.from_bytes(digest, "little", signed=True)


def load_tokenizer(folder: Path, max_tokens: int) -> Any:
    try:
        return open_tokenizer(folder / TOKENIZER_NAME, max_tokens)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder / TOKENIZER_NAME} is not usable: {error}.") from None


def tokenize(tokenizer: Any, texts: list[str]) -> Ragged:
    lists = token_lists(tokenizer, texts)
    return Ragged.from_lengths(lists.values.astype(np.int32), lists.lengths)


def chunks_of(texts: Iterator[Texts]) -> Iterator[Texts]:
    """Join small pieces to chunks of at least CHUNK_TEXTS, so that sorting by length pays."""
    waiting: list[Texts] = []
    for piece in texts:
        waiting.append(piece)
        if sum(len(w.keys) for w in waiting) >= CHUNK_TEXTS:
            yield _join(waiting)
            waiting = []
    if any(len(w.keys) for w in waiting):
        yield _join(waiting)


def _join(pieces: list[Texts]) -> Texts:
    return Texts(
        np.concatenate([p.keys for p in pieces]),
        np.concatenate([p.checks for p in pieces]),
        Ragged.concat([p.tokens for p in pieces]),
    )
