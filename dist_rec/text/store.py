"""The store of text vectors: what `dist-rec embed` writes and frozen training, finetuning and export read.

A store is a local folder:

    store.json              what the vectors are, and every file with its size and SHA-256
    index-<g>.bin           int64 [3, N]: sorted text keys, the row of each, a second hash of each text
    vectors-<g>-<r>-<w>.bin float16 or float32 [n, D], of rank r of w; rows are numbered through the parts in order

Plain little-endian arrays, mapped into memory, so that a store may be larger than it. Files never
change: generation g + 1 adds parts and a new index, and becomes the store when store.json is
renamed into place. `parts` writes them. Knows neither language models nor process groups.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from ..data.index import TokenizerInfo
from ..errors import UserError
from ..strict import from_dict, strict
from .pooling import Pooling

STORE_NAME = "store.json"
FORMAT = "dist_rec-vectors/1"
IN_MEMORY_BYTES = 512 << 20
# Of the files that a store.json may name.
STORED = re.compile(r"(index-\d+|vectors-\d+-\d+(-\d+)?)\.bin")


@strict
class StoredFile:
    """One array file: its rows and the SHA-256 of its bytes."""

    file: str
    rows: int = Field(ge=1)
    sha256: str


@strict
class Recipe:
    """What decides a vector besides the text. Vectors of different recipes never share a store.

    `tokenizer` and `model` fingerprints are `text.paths`'; `max_tokens` is where texts were cut;
    `compute` is the precision of the model, `pooling` how the vectors of its tokens became one. `word_drop` is the
    share of words that texts lost before (`text.words`), by draws of `drop_seed`; keys are those of the whole texts.
    """

    model_fingerprint: str
    tokenizer_fingerprint: str
    max_tokens: int = Field(ge=1)
    pooling: Pooling
    compute: Literal["fp32", "fp16", "bf16"]
    dtype: Literal["float16", "float32"]
    width: int = Field(ge=1)
    word_drop: float = Field(default=0.0, ge=0, lt=1)
    drop_seed: int = Field(default=0, ge=0)


@strict
class StoreInfo:
    """The whole store.json. `model` is the name by which `embed` was given the model."""

    format: Literal["dist_rec-vectors/1"]
    model: str
    recipe: Recipe
    generation: int = Field(ge=1)
    count: int = Field(ge=1)
    index: StoredFile
    parts: list[StoredFile] = Field(min_length=1)


def embed_command(model: str, out: str | Path, data: str = "<data set>", recipe: Recipe | None = None) -> str:
    """The command that would add the texts of `data` to the store at `out`, if it has this recipe."""
    command = f"dist-rec embed {data} --model {model} --out {out}"
    if recipe is not None:
        command += f" --pooling {recipe.pooling} --dtype {recipe.compute} --store-dtype {recipe.dtype}"
        command += f" --word-drop {recipe.word_drop:g} --drop-seed {recipe.drop_seed}" if recipe.word_drop else ""
    return command


def check_finite(keys: np.ndarray, vectors: np.ndarray, recipe: Recipe) -> None:
    """Refuse what a model made of texts if it is no number.

    Args:
        keys: int64 `[n]`.
        vectors: float `[n, D]`, rounded as the recipe's dtype rounds.

    Raises:
        UserError: a vector is not finite, from the model or by leaving float16's range.
    """
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise UserError(
            f"the vector of the text with key {keys[np.flatnonzero(~finite)[0]]} is not finite "
            f"(computed in {recipe.compute}, stored as {recipe.dtype}). "
            "Use --store-dtype float32 and --dtype fp32; if it stays, the model's weights are damaged."
        )


def read_store_info(folder: str | Path) -> StoreInfo:
    """Read and check store.json.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(folder) / STORE_NAME
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"no store of text vectors at {folder}: {STORE_NAME} is missing. "
            f"Write one with `{embed_command('<model>', folder)}`."
        ) from None
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{STORE_NAME}: {error}") from None
    info = from_dict(StoreInfo, data, str(path))
    for stored in (info.index, *info.parts):
        if not STORED.fullmatch(stored.file):
            raise _damaged(folder, f"{STORE_NAME} names the file {stored.file!r}")
    if info.index.rows != info.count or sum(part.rows for part in info.parts) != info.count:
        raise _damaged(folder, f"{STORE_NAME} counts {info.count} texts, its files another number")
    return info


class VectorStore:
    """An open store; `lookup` may be called from several threads at once.

    A store whose vectors need at most `in_memory` bytes as float32 is read into memory; any other
    stays on disk and is mapped.

    Example::

        store = VectorStore.open("runs/vectors")
        store.check_tokenizer(index.tokenizer)
        vectors = store.lookup(rows.text_keys)
    """

    def __init__(self, folder: Path, info: StoreInfo, in_memory: int = IN_MEMORY_BYTES):
        self.folder, self.info = folder, info
        self.keys, self.rows, self.checks = self._map(info.index, np.dtype("<i8"), 3, leading=True)
        dtype = np.dtype("<f2" if info.recipe.dtype == "float16" else "<f4")
        self._parts = [self._map(part, dtype, info.recipe.width) for part in info.parts]
        self._starts = np.cumsum([0] + [part.rows for part in info.parts])
        # In key order: neighbours in a batch's sorted keys are then neighbours in memory.
        small = info.count * info.recipe.width * 4 <= in_memory
        self._in_memory = self._gather(np.asarray(self.rows)) if small else None

    @classmethod
    def open(cls, folder: str | Path, in_memory: int = IN_MEMORY_BYTES) -> VectorStore:
        """Open the store at `folder`.

        File sizes and the index's checksum are checked; `verify` checks the vectors too.

        Args:
            folder: what `dist-rec embed` wrote.
            in_memory: float32 bytes up to which the vectors are read into memory.

        Raises:
            UserError: there is no store, or it is damaged.
        """
        folder = Path(folder)
        info = read_store_info(folder)
        _check_sum(folder, info.index)
        return cls(folder, info, in_memory)

    @property
    def width(self) -> int:
        """D, the width of a vector."""
        return self.info.recipe.width

    def __len__(self) -> int:
        return self.info.count

    def lookup(self, keys: np.ndarray) -> np.ndarray:
        """The vectors of texts.

        Args:
            keys: int64 `[T]` text keys in any order, repeated or not.

        Returns:
            float32 `[T, D]`, in the order of `keys`.

        Raises:
            UserError: the store lacks some of the texts.
        """
        at, found = self.find(keys)
        if not found.all():
            missing = np.unique(keys[~found])
            raise UserError(
                f"{len(missing)} of {len(np.unique(keys))} texts have no vector in {self.folder} "
                f"(the first has key {missing[0]}). Add them with "
                f"`{embed_command(self.info.model, self.folder, recipe=self.info.recipe)}`."
            )
        return self._gather(self.rows[at]) if self._in_memory is None else self._in_memory.take(at, axis=0)

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of `keys` (int64 `[T]`) in the sorted index, and whether each is there (bool `[T]`)."""
        at = np.searchsorted(self.keys, keys)
        at[at == len(self.keys)] = 0
        return at, self.keys[at] == keys

    def check_tokenizer(self, tokenizer: TokenizerInfo | None) -> None:
        """Refuse a data set whose texts were tokenised for another language model.

        Args:
            tokenizer: `Index.tokenizer` of the data set; None (no token ids) fits every store.

        Raises:
            UserError: its fingerprint is not that of the store's model.
        """
        if tokenizer is not None and tokenizer.fingerprint != self.info.recipe.tokenizer_fingerprint:
            raise UserError(
                f"the data set's token ids are of tokenizer {tokenizer.name!r} "
                f"({tokenizer.fingerprint[:12]}), the vectors in {self.folder} of model {self.info.model!r} "
                f"({self.info.recipe.tokenizer_fingerprint[:12]}). Embed the data set's texts with the model of "
                f"its tokenizer, or build the data set again with tokenizer {self.info.model!r}."
            )

    def check_pooling(self, pooling: str) -> None:
        """Refuse a store whose vectors were pooled in another way than `text.pooling` asks for; `auto` asks for none.

        Raises:
            UserError: they were.
        """
        if pooling not in ("auto", self.info.recipe.pooling):
            raise UserError(
                f"text.pooling is {pooling}, the vectors in {self.folder} are of pooling {self.info.recipe.pooling}: "
                "leave text.pooling at auto, or write another store with `dist-rec embed --pooling "
                f"{pooling}`."
            )

    def check_words(self, dropped: bool) -> None:
        """Refuse a store of texts with words dropped as one of whole texts, and the other way round.

        Args:
            dropped: whether they are to be dropped.

        Raises:
            UserError: it is the other.
        """
        share = self.info.recipe.word_drop
        if dropped and not share:
            raise UserError(
                f"text.dropped_store {self.folder} holds vectors of texts with no words dropped: write another with "
                f"`{embed_command(self.info.model, '<folder>')} --word-drop 0.15`."
            )
        if share and not dropped:
            raise UserError(
                f"text.store {self.folder} holds vectors of texts of which a share of {share:g} has words dropped: it "
                "is for text.dropped_store, and whole texts are embedded without --word-drop."
            )

    def verify(self) -> None:
        """Read every byte and compare checksums.

        Raises:
            UserError: naming the damaged file.
        """
        for stored in (self.info.index, *self.info.parts):
            _check_sum(self.folder, stored)

    def _map(self, stored: StoredFile, dtype: np.dtype, width: int, leading: bool = False) -> np.ndarray:
        path = self.folder / stored.file
        expected = stored.rows * width * dtype.itemsize
        try:
            size = path.stat().st_size
            if size != expected:
                raise _damaged(self.folder, f"{stored.file} has {size} bytes instead of {expected}")
            shape = (width, stored.rows) if leading else (stored.rows, width)
            # As a plain array: np.memmap pays for its subclass on every gather.
            return np.memmap(path, dtype, "r", shape=shape).view(np.ndarray)
        except OSError as error:
            raise _damaged(self.folder, f"{stored.file}: {error.strerror}") from None

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        """Rows, numbered through the parts, as float32."""
        if len(self._parts) == 1:
            return _float32(self._parts[0].take(rows, axis=0))
        out = np.empty((len(rows), self.width), np.float32)
        part_of = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(part_of, kind="stable")
        ends = np.searchsorted(part_of[order], np.arange(len(self._parts) + 1))
        for part in np.unique(part_of):
            mine = order[ends[part] : ends[part + 1]]
            out[mine] = _float32(self._parts[part].take(rows[mine] - self._starts[part], axis=0))
        return out


def _float32(values: np.ndarray) -> np.ndarray:
    # torch's conversion from float16 is vectorised, numpy's is not.
    return values if values.dtype == np.float32 else torch.from_numpy(values).float().numpy()


def _check_sum(folder: Path, stored: StoredFile) -> None:
    try:
        with open(folder / stored.file, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _damaged(folder, f"{stored.file}: {error.strerror}") from None
    if found != stored.sha256:
        raise _damaged(folder, f"the checksum of {stored.file} is not that of {STORE_NAME}")


def _damaged(folder: str | Path, what: str) -> UserError:
    return UserError(
        f"the store of text vectors at {folder} is damaged: {what}. "
        f"Write it again with `{embed_command('<model>', folder)} --overwrite`."
    )
