"""`dist-rec search` and `profile`: what an export's indexes answer, with ids, titles and the model's scores.

An export answers for its users by itself; only a query's text needs the run, whose model makes a vector of it.
"""

from __future__ import annotations

import shutil
import textwrap
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import torch.distributed as dist

from ..config import load_config
from ..data.candidates import share_of
from ..errors import UserError
from ..training import checkpoint
from ..training.process import choose_device, process_group, quieten
from .answer import best_items
from .compact import Gated, SubIndexes, read_compact
from .index import read_index_file
from .manifest import CONFIG_NAME, EXPORT, ITEMS, MANIFEST_NAME, USERS, read_manifest, sha256_of
from .names import key_of
from .parts import Parts, PartWriter, as_matrix, vector_column

# Users of an example that a message gives.
EXAMPLES = 3
# Characters of a title that are printed.
TITLE = 70


class Export:
    """An export, ready to answer.

    Args:
        path: its folder, or that of the run that it is of and in.

    Raises:
        UserError: there is none, a file of it is missing, or the run has a newer checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path if (path / MANIFEST_NAME).is_file() or not (path / EXPORT).is_dir() else path / EXPORT
        self.manifest = read_manifest(self.folder)
        # A run that was moved with its export is beside it.
        self.run = path if self.folder != path else Path(self.manifest.run)
        if (self.run / CONFIG_NAME).is_file():
            self._check_checkpoint()
        self.items = Parts(self.folder / ITEMS)
        self.users = Parts(self.folder / USERS) if self.manifest.users else None
        self._indexes: dict[str, faiss.Index | Gated | SubIndexes] = {}

    def _check_checkpoint(self) -> None:
        saved = checkpoint.read_manifest(checkpoint.find(self.run))
        if saved.manifest.sha256 != self.manifest.checkpoint:
            raise UserError(
                f"{self.folder} does not belong to the checkpoint of {self.run}: it was made of step "
                f"{self.manifest.step} (checksum {self.manifest.checkpoint[:12]}), and the run now stands at step "
                f"{saved.step} (checksum {saved.manifest.sha256[:12]}). Export again: dist-rec export {self.run}."
            )

    def task(self, name: str | None) -> str:
        """A task by name; the only one, or the first, if None.

        Raises:
            UserError: there is none of this name.
        """
        if name is not None and name not in self.manifest.tasks:
            raise UserError(f"--task {name} is not known: {self.folder} has {', '.join(self.manifest.tasks)}.")
        return name or next(iter(self.manifest.tasks))

    def index(self, task: str) -> faiss.Index | Gated | SubIndexes:
        """A task's index.

        Raises:
            UserError: it is another file than was written, or not of these items.
        """
        if task not in self._indexes:
            about = self.manifest.tasks[task]
            path = self.folder / about.file
            if sha256_of(path) != about.sha256:
                raise UserError(
                    f"{path} is not the index that {MANIFEST_NAME} describes: it does not belong to this export, or is "
                    "damaged. Export again."
                )
            index = read_compact(path) if about.compact else read_index_file(path)
            if (index.ntotal, index.d) != (len(self.items), about.width):
                raise UserError(
                    f"{path} is of {index.ntotal} vectors, and there are {len(self.items)} items: export again."
                )
            self._indexes[task] = index
        return self._indexes[task]

    def user(self, name: str) -> int:
        """Position of a user, by the raw value of its key.

        Raises:
            UserError: there are no users, or not this one.
        """
        told = self.manifest.users
        if told is None:
            raise UserError(f"{self.folder} has no users: export with --users DATA.")
        wanted = key_of(name)
        for first, table in self.users.tables(["key"]):
            at = np.flatnonzero(table.column("key").to_numpy() == wanted)
            if len(at):
                return first + int(at[0])
        some = [
            one for one in self.users.take(np.arange(min(EXAMPLES, len(self.users))), ["id"])["id"].to_pylist() if one
        ]
        example = f", such as {', '.join(map(repr, some))}" if some else ", as they were in the raw data"
        raise UserError(f"no {told.key} {name!r} among the {told.count:,} of {told.data}{example}.")

    def answer(self, task: str, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best items of some users.

        Args:
            vectors: float32 `[Q, D]`.
            k: how many; fewer where there are not so many items.

        Returns:
            Positions int64 and scores of the model float64 `[Q, k]`, best first; position -1 and score nan where an
            index finds fewer.
        """
        about = self.manifest.tasks[task]
        positions, products = best_items(self.index(task), self.manifest.index, self.items, task, vectors, k)
        scores = about.scale * products.astype(np.float64) + about.bias
        return positions, np.where(positions < 0, np.nan, scores)

    def told(self, positions: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
        """One user's answers: rank, id, title, domain, score."""
        there = positions >= 0
        items = self.items.take(positions[there], ["id", "title", "domain"]).to_pylist()
        return [
            {"rank": rank, **item, "score": round(float(score), 6)}
            for rank, (item, score) in enumerate(zip(items, scores[there], strict=True), start=1)
        ]

    def ask(self, task: str, vector: np.ndarray, k: int) -> dict[str, Any]:
        """One user's answers, what they are, and how long the index took."""
        self.index(task)
        started = time.perf_counter()
        positions, scores = self.answer(task, vector, k)
        seconds = time.perf_counter() - started
        about = self.manifest.tasks[task]
        exactness = {"exact": about.exact} | ({"why": about.why} if about.why else {})
        return {
            "task": task,
            **exactness,
            "milliseconds": round(1e3 * seconds, 3),
            "items": self.told(positions[0], scores[0]),
        }


def search(path: Path, user: str | None, query: str | None, k: int, task: str | None) -> dict[str, Any]:
    """The best `k` items of a user of an export, or of a query's text.

    Raises:
        UserError: there is no such export, user, or task; the model reads no query.
    """
    export = Export(path)
    task = export.task(task)
    if query is not None:
        from .query import query_vectors

        vector = query_vectors(export, query)[task]
        return {"export": str(export.folder), "query": query, **export.ask(task, vector, k)}
    at = np.array([export.user(user)])
    vector = export.users.vectors_at(at, task)
    return {"export": str(export.folder), "user": user, **export.ask(task, vector, k)}


def profile(path: Path, user: str, k: int) -> dict[str, Any]:
    """The best `k` items of a user for every task.

    Raises:
        UserError: as `search`.
    """
    export = Export(path)
    at = np.array([export.user(user)])
    answers = {t: export.ask(t, export.users.vectors_at(at, t), k) for t in export.manifest.tasks}
    for found in answers.values():
        found.pop("task")
    return {"export": str(export.folder), "user": user, "tasks": answers}


def profile_all(path: Path, out: Path, k: int) -> dict[str, Any]:
    """Every user's best `k` items for every task, as Parquet below `out`, a part a rank. Collective.

    Columns: `id`, `key`, `domain`; of each task `items:<task>`, lists of ids, and `scores:<task>`, best first.

    Returns:
        `out`, `users`, `seconds`.

    Raises:
        UserError: there is no such export, it has no users, or `out` is there already.
    """
    quieten()
    export = Export(path)
    if export.users is None:
        raise UserError(f"{export.folder} has no users: export with --users DATA.")
    if out.exists():
        raise UserError(f"--out {out} is there already: name another place, or remove it.")
    config = load_config(export.folder / CONFIG_NAME)
    partial = out.with_name(f".{out.name}.partial")
    with process_group(config, choose_device(config)) as process:
        if process.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        started = time.monotonic()
        mine = share_of(len(export.users.groups), process.rank, process.world_size)
        if mine.start < mine.stop:
            writer = PartWriter(partial, process.rank)
            tasks = list(export.manifest.tasks)
            columns = ["id", "key", "domain", *map(vector_column, tasks)]
            names = pa.chunked_array(
                [c for _, t in export.items.tables(["id"]) for c in t["id"].chunks]
            ).combine_chunks()
            for _, table in export.users.tables(columns, range(mine.start, mine.stop)):
                found = {name: table[name].combine_chunks() for name in columns[:3]}
                for task in tasks:
                    found |= _lists(export, task, as_matrix(table[vector_column(task)]), k, names)
                writer.write(pa.RecordBatch.from_pydict(found))
            writer.close()
        dist.barrier()
        if process.is_main:
            partial.rename(out)
    return {"out": str(out), "users": len(export.users), "seconds": round(time.monotonic() - started, 2)}


def _lists(export: Export, task: str, vectors: np.ndarray, k: int, names: pa.Array) -> dict[str, pa.Array]:
    positions, scores = export.answer(task, vectors, k)
    there = positions >= 0
    offsets = pa.array(np.concatenate([[0], there.sum(1).cumsum()]).astype(np.int32))
    items = names.take(pa.array(positions[there]))
    return {
        f"items:{task}": pa.ListArray.from_arrays(offsets, items),
        f"scores:{task}": pa.ListArray.from_arrays(offsets, pa.array(scores[there], pa.float32())),
    }


def print_answers(found: dict[str, Any]) -> None:
    """One task's answers, a line each."""
    if not found["exact"]:
        print(f"approximate: {found['why']}")
    wide = max((len(str(item["id"])) for item in found["items"]), default=0)
    for item in found["items"]:
        title = textwrap.shorten(item["title"] or "", TITLE, placeholder=" ...")
        print(f"{item['rank']:>4}  {item['score']:>10.4f}  {item['id']:<{wide}}  {title}".rstrip())
