"""Writing a store of text vectors: every rank its part, then all of them at once made the store.

Beside a store, or where one comes to be, lie until then, for rank r of w and generation g:

    vectors-<g>-<r>-<w>.bin  float16 or float32 [n, D]
    part-<g>-<r>-<w>.keys    int64 [n, 4]: text key, second hash of the text, how many rows of its batch come
                             after it, CRC-32 of these three and the vector
    part-<g>-<r>-<w>.json    recipe, what is extended, and, once the rank is done, the vectors' size and SHA-256

A job that was killed leaves them. The next one takes from them what is sound, whatever number of ranks it
has, so that no text is encoded twice. A lock on the keys tells whether the job is really gone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import UserError
from ..files import write_bytes
from ..strict import to_dict
from .store import FORMAT, STORE_NAME, STORED, Recipe, StoredFile, StoreInfo, VectorStore, check_finite, read_store_info

_COLUMNS = 4
_ENTRY_BYTES = 8 * _COLUMNS
# Rows that are checked, or taken over, at once.
_PIECE = 16384
_NOTE = re.compile(r"part-(\d+)-(\d+)-(\d+)\.json")
# Whatever a job may leave beside a store, of any version.
_LEFT = re.compile(r"part-\d+-\d+(-\d+)?\.(bin|json|keys)")


class Leftover:
    """What one rank of a job that did not end has written; read only.

    Attributes:
        entries: int64 `[n, 4]`, as in the file of keys.
        vectors: uint8 `[n, bytes of a vector]`.
    """

    def __init__(self, folder: Path, name: str, recipe: Recipe):
        self.file = open(folder / f"part-{name}.keys", "rb")  # noqa: SIM115 (closed by `close`)
        row_bytes = recipe.width * np.dtype(recipe.dtype).itemsize
        vectors = folder / f"vectors-{name}.bin"
        have = vectors.stat().st_size // row_bytes if vectors.is_file() else 0
        rows = min(os.fstat(self.file.fileno()).st_size // _ENTRY_BYTES, have)
        self.entries = np.zeros((0, _COLUMNS), np.int64)
        self.vectors = np.zeros((0, row_bytes), np.uint8)
        if rows:
            self.entries = np.memmap(self.file, "<i8", "r", shape=(rows, _COLUMNS)).view(np.ndarray)
            self.vectors = np.memmap(vectors, np.uint8, "r", shape=(rows, row_bytes)).view(np.ndarray)

    def sound(self, rows: np.ndarray) -> np.ndarray:
        """Whether each of `rows` (int64 `[m]`) is as it was written: bool `[m]`."""
        sums = _checksums(self.entries[rows, :3], self.vectors[rows])
        return sums == self.entries[rows, 3]

    def close(self) -> None:
        self.file.close()


class PartWriter:
    """Writes one rank's vectors of one generation, in any order of keys, after what it wrote before it was killed.

    Args:
        extends: SHA-256 of the index of the store that is extended, None where a new one is written.

    Attributes:
        keys, checks: int64 `[n]`, of the texts that stand there from before.
        taken_over: how many texts earlier jobs have encoded.
    """

    def __init__(
        self, folder: Path, generation: int, rank: int, world_size: int, recipe: Recipe, extends: str | None
    ) -> None:
        self.folder, self.generation, self.world_size, self.recipe = folder, generation, world_size, recipe
        self.name = f"{generation}-{rank}-{world_size}"
        self.taken_over = 0
        self._header = {"recipe": to_dict(recipe), "extends": extends}
        self._digest = hashlib.sha256()
        folder.mkdir(parents=True, exist_ok=True)
        self._journal = open(folder / f"part-{self.name}.keys", "ab")  # noqa: SIM115 (closed by `close` and `abandon`)
        self._file = open(folder / f"vectors-{self.name}.bin", "ab")  # noqa: SIM115
        try:
            _lock(self._journal, fcntl.LOCK_EX)
            self.keys, self.checks = self._resume()
        except BaseException:
            self.abandon()
            raise

    def _resume(self) -> tuple[np.ndarray, np.ndarray]:
        """Keep what is sound of an earlier attempt, up to the end of a batch."""
        entries = np.zeros((0, _COLUMNS), np.int64)
        found = self._journal.tell()
        if _header_of(self.folder, self.name) == self._header:
            left = Leftover(self.folder, self.name, self.recipe)
            entries = left.entries[: self._sound_rows(left)].copy()
            left.close()
        if lost := -(-found // _ENTRY_BYTES) - len(entries):
            print(
                f"dist-rec: {self.folder}/vectors-{self.name}.bin: dropped {lost} vectors of a job that did not end: "
                "damaged, or of another recipe.",
                file=sys.stderr,
            )
        self._journal.truncate(len(entries) * _ENTRY_BYTES)
        self._file.truncate(len(entries) * self.recipe.width * np.dtype(self.recipe.dtype).itemsize)
        self._note(None)
        self.rows = self.taken_over = len(entries)
        return entries[:, 0], entries[:, 1]

    def _sound_rows(self, left: Leftover) -> int:
        """Rows before the first damaged one, as far as their batches are whole; the digest goes along."""
        rows = 0
        for start in range(0, len(left.entries), _PIECE):
            piece = np.arange(start, min(start + _PIECE, len(left.entries)))
            sound = left.sound(piece)
            rows = start + (len(piece) if sound.all() else int(np.argmin(sound)))
            if not sound.all():
                break
        # Half a batch would be completed by another batch, whose vectors differ in the last bit.
        ends = np.flatnonzero(left.entries[:rows, 2] == 0)
        rows = int(ends[-1]) + 1 if len(ends) else 0
        for start in range(0, rows, _PIECE):
            self._digest.update(left.vectors[start : min(start + _PIECE, rows)].tobytes())
        return rows

    def leftovers(self) -> Iterator[Leftover]:
        """What jobs of other numbers of ranks left, of the same recipe and for the same store.

        Raises:
            UserError: one of them is still at work.
        """
        for path in sorted(self.folder.glob(f"part-{self.generation}-*.json")):
            named = _NOTE.fullmatch(path.name)
            if named is None or int(named[3]) == self.world_size:
                continue
            name = path.stem.removeprefix("part-")
            if _header_of(self.folder, name) != self._header:
                continue
            left = Leftover(self.folder, name, self.recipe)
            try:
                _lock(left.file, fcntl.LOCK_SH)
                yield left
            finally:
                left.close()

    def take_over(self, left: Leftover, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copy rows (int64 `[m]`) of a leftover, as far as they are sound; their keys and second hashes."""
        keys, checks = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        dtype = "<f2" if self.recipe.dtype == "float16" else "<f4"
        for start in range(0, len(rows), _PIECE):
            piece = rows[start : start + _PIECE]
            piece = piece[left.sound(piece)]
            if len(piece):
                keys.append(left.entries[piece, 0])
                checks.append(left.entries[piece, 1])
                self.write(keys[-1], checks[-1], left.vectors[piece].view(dtype))
        self.taken_over += sum(map(len, keys))
        return np.concatenate(keys), np.concatenate(checks)

    def write(self, keys: np.ndarray, checks: np.ndarray, vectors: np.ndarray) -> None:
        """Append a batch: int64 `[n]` keys and second hashes and `[n, D]` vectors of the recipe's dtype.

        Raises:
            UserError: a vector is not finite, from the model or by leaving float16's range.
        """
        check_finite(keys, vectors, self.recipe)
        payload = np.ascontiguousarray(vectors, "<f2" if self.recipe.dtype == "float16" else "<f4")
        entries = np.stack([keys, checks, np.arange(len(keys))[::-1], np.zeros(len(keys), np.int64)], axis=1)
        entries[:, 3] = _checksums(entries[:, :3], payload.view(np.uint8))
        self._digest.update(payload)
        # Keys after the vectors: a key that stands there has its vector.
        self._file.write(payload)
        self._file.flush()
        self._journal.write(entries.astype("<i8").tobytes())
        self._journal.flush()
        self.rows += len(keys)

    def close(self) -> None:
        """Finish the part, down to the disk."""
        for file in (self._file, self._journal):
            os.fsync(file.fileno())
        name = f"vectors-{self.name}.bin"
        self._note({"file": name, "rows": self.rows, "sha256": self._digest.hexdigest()})
        self.abandon()

    def abandon(self) -> None:
        """Stop writing; what is written waits for the next job. Harmless after `close`."""
        self._journal.close()
        self._file.close()

    def _note(self, part: dict[str, Any] | None) -> None:
        note = {**self._header, "part": part}
        write_bytes(self.folder / f"part-{self.name}.json", json.dumps(note).encode())


def publish(folder: Path, model: str, recipe: Recipe, generation: int, world_size: int, old: VectorStore | None) -> int:
    """Make the closed parts of `world_size` ranks, after those of `old`, the store at `folder`.

    Files that the new store does not name are removed afterwards; who has them open keeps them.

    Returns:
        How many texts were added.

    Raises:
        UserError: a rank's part cannot be seen from here.
    """
    parts = list(old.info.parts) if old else []
    keys, rows, checks = ([old.keys], [old.rows], [old.checks]) if old else ([], [], [])
    start = total = sum(part.rows for part in parts)
    for rank in range(world_size):
        name = f"{generation}-{rank}-{world_size}"
        try:
            note = json.loads((folder / f"part-{name}.json").read_bytes())
            part, entries = note["part"], np.fromfile(folder / f"part-{name}.keys", "<i8").reshape(-1, _COLUMNS)
        except FileNotFoundError:
            raise UserError(
                f"rank {rank}'s vectors are not in {folder}: it must be a folder that all machines of the job share, "
                "and no other job may write there."
            ) from None
        if note["recipe"] != to_dict(recipe) or part is None or part["rows"] != len(entries):
            raise UserError(
                f"rank {rank} wrote vectors of another recipe to {folder}, or another job writes there: the model must "
                "be the same on all machines, and the job the only one."
            )
        if not part["rows"]:
            continue
        parts.append(StoredFile(**part))
        keys.append(entries[:, 0])
        checks.append(entries[:, 1])
        rows.append(total + np.arange(part["rows"]))
        total += part["rows"]
    if total > start:
        all_keys = np.concatenate(keys)
        order = np.argsort(all_keys, kind="stable")
        index = np.stack([all_keys[order], np.concatenate(rows)[order], np.concatenate(checks)[order]]).astype("<i8")
        if (np.diff(index[0]) == 0).any():
            raise RuntimeError("two ranks wrote the same text: keys were not divided over the ranks")
        name = f"index-{generation}.bin"
        write_bytes(folder / name, payload := index.tobytes())
        stored = StoredFile(file=name, rows=total, sha256=hashlib.sha256(payload).hexdigest())
        info = StoreInfo(
            format=FORMAT, model=model, recipe=recipe, generation=generation, count=total, index=stored, parts=parts
        )
        write_bytes(folder / STORE_NAME, json.dumps(to_dict(info), indent=1).encode())
    _clean(folder)
    return total - start


def _clean(folder: Path) -> None:
    """Remove files of ours that store.json does not name."""
    keep = {STORE_NAME}
    if (folder / STORE_NAME).exists():
        info = read_store_info(folder)
        keep |= {info.index.file} | {part.file for part in info.parts}
    for path in folder.iterdir():
        # What writes a file whole leaves .NAME.partial where it is killed; earlier versions left NAME.partial.
        name = path.name.removeprefix(".").removesuffix(".partial")
        ours = STORED.fullmatch(name) or _LEFT.fullmatch(name) or name == STORE_NAME
        if path.name not in keep and ours:
            path.unlink()


def _header_of(folder: Path, name: str) -> dict[str, Any] | None:
    """Recipe and base of a part; None where its note is missing or damaged."""
    try:
        note = json.loads((folder / f"part-{name}.json").read_bytes())
        return {"recipe": note["recipe"], "extends": note["extends"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checksums(entries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """CRC-32 of int64 `[m, 3]` entries with uint8 `[m, bytes]` vectors: int64 `[m]`."""
    heads, bodies = np.ascontiguousarray(entries, "<i8"), np.ascontiguousarray(vectors)
    sums = (zlib.crc32(body, zlib.crc32(head)) for head, body in zip(heads, bodies, strict=True))
    return np.fromiter(sums, np.int64, len(heads))


def _lock(file: IO[bytes], kind: int) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another job is writing {file.name}: wait for it, or end it, with its ranks, and run this again."
        ) from None
    except OSError as error:
        print(f"dist-rec: {file.name} cannot be locked ({error}): see to it that one job runs.", file=sys.stderr)
