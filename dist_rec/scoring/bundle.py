"""A scoring bundle: a trained model as graphs, its tables, vocabularies and texts, asked with raw rows.

    from scoring.bundle import Bundle                  # with the bundle's folder on sys.path

    bundle = Bundle("FOLDER")
    bundle.score([{"user_id": "7", "age": 31, ...}])   # {task: float32 [n]}, the model's logits
    bundle.users(rows), bundle.items(rows)             # {task: float32 [n, D]}, one side's vectors

BUNDLE/  manifest.json
         scoring/                  this code
         programs/tables.pt2       ids -> vectors; the tables are in it
         programs/{score,user,item}.pt2
         vocabulary/TABLE-{keys,ids}.npy      of dictionaries
         managed/TABLE-{ids,rows}.npy         which row an id of a managed table has
         texts/{keys,vectors}.npy             of the run's store
         programs/encoder.pt2, texts/tokenizer.json     where other texts are encoded

The programs are what `torch.export` saved, which may hold pickles: load bundles of those whom you trust.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import fbgemm_gpu  # noqa: F401  the tables' program calls its operators
import numpy as np
import torch
from torch import Tensor

from .hashes import mix
from .raw import Columns, Lists, RawRows, RowError, Vocabulary
from .texts import open_tokenizer, padded, token_lists

FORMAT = "dist_rec-bundle/1"
MANIFEST_NAME, PROGRAMS, VOCABULARY, MANAGED, TEXTS = "manifest.json", "programs", "vocabulary", "managed", "texts"
TABLES, SCORE, USER, ITEM, ENCODER = "tables", "score", "user", "item", "encoder"
TOKENIZER_NAME = "tokenizer.json"
# Rows behind those that are asked for, with one id, event and text each: a graph holds for no size of 0 or 1, and so no
# size ever is.
SPARE = 2
# Through the language model; of about one length, so that there is little padding.
TEXTS_AT_ONCE = 32
READ_BYTES = 1 << 22


class BundleError(Exception):
    """A bundle is damaged, or lacks what it is asked for."""


class Bundle:
    """A bundle, ready to score. Programs are read when they are first asked for.

    Args:
        folder: of the bundle.

    Raises:
        BundleError: it is none, or a file is not what its manifest says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / MANIFEST_NAME).read_text())
        except (OSError, ValueError) as error:
            raise BundleError(f"{self.folder} is no bundle: {MANIFEST_NAME} cannot be read ({error}).") from None
        if self.manifest.get("format") != FORMAT:
            raise BundleError(
                f"{self.folder}: its format is {self.manifest.get('format')!r}, this code reads {FORMAT}."
            )
        for name, about in self.manifest["files"].items():
            if _sha256(self.folder / name) != about["sha256"]:
                raise BundleError(f"{self.folder / name} is not the file that {MANIFEST_NAME} describes.")
        features = self.manifest["schema"]["features"]
        self.features = {name: features[name] for name in self.manifest["features"]}
        vocabularies = {table: self._vocabulary(table, features[table]) for table in self.manifest["tables"]}
        self.raw = RawRows(self.manifest["schema"], self.manifest["prefixes"], vocabularies)
        self.managed = {
            table: tuple(np.load(self.folder / MANAGED / f"{table}-{what}.npy") for what in ("ids", "rows"))
            for table, about in self.manifest["tables"].items()
            if about["ids"] == "managed"
        }
        self.text_keys = self.text_vectors = np.zeros(0, np.int64)
        if (self.folder / TEXTS / "keys.npy").is_file():
            self.text_keys = np.load(self.folder / TEXTS / "keys.npy")
            self.text_vectors = np.load(self.folder / TEXTS / "vectors.npy", mmap_mode="r")
        self._tokenizer: Any = None
        self._programs: dict[str, torch.nn.Module] = {}

    def _vocabulary(self, table: str, feature: Mapping[str, Any]) -> Vocabulary:
        about = feature["vocabulary"]
        if about["kind"] != "dictionary":
            return Vocabulary(about["kind"], about["size"])
        keys, ids = (
            np.load(self.folder / VOCABULARY / f"{table}-{what}.npy", mmap_mode="r") for what in ("keys", "ids")
        )
        return Vocabulary("dictionary", about["size"], keys, ids)

    def score(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """The model's logits of raw rows, by task: float32 `[n]`. A task's probability is their sigmoid.

        Raises:
            RowError: a row is not as the schema says.
            BundleError: a text has no vector in the bundle.
        """
        return self.run(SCORE, self.raw(rows, self.features))

    def users(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """The users' vectors, by task: float32 `[n, D]`; rows need nothing but the columns of users."""
        return self.run(USER, self.raw(rows, self._side(USER)))

    def items(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """The items' vectors, by task, as `users`."""
        return self.run(ITEM, self.raw(rows, self._side(ITEM)))

    def _side(self, name: str) -> list[str]:
        return self._about(name)["features"]

    def _about(self, name: str) -> Mapping[str, Any]:
        if name not in self.manifest["programs"]:
            raise BundleError(f"{self.folder} has no program {name!r}: its model has no two towers.")
        return self.manifest["programs"][name]

    @torch.no_grad()
    def run(self, name: str, columns: Columns) -> dict[str, np.ndarray]:
        """What a program makes of `columns`, which have its features."""
        features = self._about(name)["features"]
        inputs = self.inputs(columns, features)
        if self.manifest["tables"]:
            inputs |= self._program(TABLES)({key: inputs[key] for key in self._about(TABLES)["inputs"]})
        found = self._program(name)({key: inputs[key] for key in self._about(name)["inputs"]})
        return {task: of[: len(columns)].float().numpy() for task, of in found.items()}

    def inputs(self, columns: Columns, features: Collection[str]) -> dict[str, Tensor]:
        """The programs' inputs but the tables' vectors, of `SPARE` rows more than there are; of no other features than
        these are there any ids.

        Raises:
            BundleError: a text has no vector in the bundle.
        """
        texts = len(columns.text_keys)
        found = {"domain": _more(columns.domain, np.zeros(SPARE, np.int64))}
        ones, zeros = np.ones(SPARE, np.int64), np.zeros(SPARE, np.int64)
        none = Lists(np.zeros(0, np.int64), np.zeros(len(columns), np.int64))
        for name, about in self.features.items():
            if about["kind"] in ("id", "ids"):
                lists = columns.ids[name] if name in features else none
                found[f"ids:{name}"] = _more(self._rows(about["shares"] or name, name, lists), zeros)
                found[f"lengths:{name}"] = _more(lists.lengths, ones)
            elif name in features and about["kind"] == "dense":
                found[f"dense:{name}"] = _more(columns.dense[name], np.zeros((SPARE, about["width"]), np.float32))
            elif name in features:
                found[f"texts:{name}"] = _more(columns.texts[name].values, zeros + texts)
                found[f"text_lengths:{name}"] = _more(columns.texts[name].lengths, ones)
        if self.manifest["texts"] is not None:
            spare = np.zeros((SPARE, self.manifest["texts"]["width"]), np.float32)
            found["text_vectors"] = _more(self._text_vectors(columns), spare)
        return found

    def _rows(self, table: str, feature: str, lists: Lists) -> np.ndarray:
        """Ids of the vocabulary -> rows of the table, int64."""
        about, ids = self.manifest["tables"][table], lists.values.astype(np.int64)
        if about["ids"] == "rows":
            if len(ids) and ids.max() >= about["rows"]:
                raise RowError(f"{feature!r} has id {ids.max()}, and its table has rows for ids below {about['rows']}")
            return ids
        mixed = mix(ids)
        if about["ids"] == "hash":
            return mixed % about["rows"]
        # Ids without a row share the last one.
        sorted_ids, rows = self.managed[table]
        at = np.searchsorted(sorted_ids, mixed)
        return np.where(sorted_ids[at] == mixed, rows[at], about["rows"] - 1)

    def _text_vectors(self, columns: Columns) -> np.ndarray:
        """Of the distinct texts, float32 `[T, D]`: those that are stored, and the language model's of others."""
        keys, about = columns.text_keys, self.manifest["texts"]
        found = np.zeros((len(keys), about["width"]), np.float32)
        known = np.zeros(len(keys), bool)
        if len(self.text_keys):
            at = np.searchsorted(self.text_keys, keys).clip(max=len(self.text_keys) - 1)
            known = self.text_keys[at] == keys
            found[known] = self.text_vectors[at[known]]
        lacking = np.flatnonzero(~known)
        if not len(lacking):
            return found
        if not about["encoder"]:
            first = columns.said.get(int(keys[lacking[0]]), f"of key {keys[lacking[0]]}")
            raise BundleError(
                f"{len(lacking)} of {len(keys)} texts have no vector in {self.folder} (the first is {first!r}): add "
                "them to the store of the run (dist-rec embed) and export the bundle again, or export it with its "
                "language model (--text.missing encode)."
            )
        tokens = columns.tokens and columns.tokens.take(lacking)
        found[lacking] = self._encoded(tokens or self._tokens([columns.said[key] for key in keys[lacking].tolist()]))
        return found

    def _tokens(self, texts: list[str]) -> Lists:
        if self._tokenizer is None:
            path = self.folder / TEXTS / TOKENIZER_NAME
            self._tokenizer = open_tokenizer(path, self.manifest["texts"]["max_tokens"])
        return token_lists(self._tokenizer, texts)

    def _encoded(self, tokens: Lists) -> np.ndarray:
        """The language model's vectors of texts, float32 `[T, D]`, rounded as stored ones are."""
        about, order = self.manifest["texts"], np.argsort(tokens.lengths, kind="stable")
        found = np.zeros((len(order), about["width"]), np.float32)
        for start in range(0, len(order), TEXTS_AT_ONCE):
            some = order[start : start + TEXTS_AT_ONCE]
            ids, mask = padded(tokens.take(some), SPARE)
            spare = np.zeros((SPARE, ids.shape[1]))
            vectors = self._program(ENCODER)({"tokens": _more(ids, spare), "mask": _more(mask, spare == 0)})["vectors"]
            found[some] = vectors[: len(some)].float().numpy().astype(about["dtype"])
        return found

    def _program(self, name: str) -> torch.nn.Module:
        if name not in self._programs:
            # It warns of sizes that a graph no longer has.
            logging.getLogger("torch._export.serde.serialize").setLevel(logging.ERROR)
            self._programs[name] = torch.export.load(self.folder / PROGRAMS / f"{name}.pt2").module()
        return self._programs[name]


def _more(values: np.ndarray, spare: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([values, spare.astype(values.dtype)]))


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(READ_BYTES):
                found.update(piece)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}.") from None
    return found.hexdigest()
