"""`manifest.json` of an export: what was computed from which checkpoint, how exact it is, and what it was measured at.

EXPORT/  manifest.json
         config.yaml              of the run, as it was exported
         items/part-*.parquet     id, title, domain, row, vector:<task>: what position a number of the index means
         users/part-*.parquet     id, key, domain, row, vector:<task>
         index/<number>.faiss     of each task; of compact form index/<number>.npz, and items/ with tag:<task> and
                                  weights:<task> in the place of vectors
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..errors import UserError
from ..strict import from_dict, parse_json, strict, to_dict
from .index import IndexConfig

FORMAT = "dist_rec-export/1"
MANIFEST_NAME, CONFIG_NAME, ITEMS, USERS, INDEX = "manifest.json", "config.yaml", "items", "users", "index"
# What an export of a run is called, in its folder.
EXPORT = "export"
READ_BYTES = 1 << 22


@strict
class Told:
    """The items, or the users, of an export.

    Attributes:
        data, fingerprint: the data set that they are of.
        count: of them.
        rows, nameless: of the data set, and those that are of nobody.
        seconds, vectors_per_s: that their vectors took, all tasks' of one being one.
        key: of users: `user` or `query`.
    """

    data: str
    fingerprint: str
    count: int = Field(ge=1)
    rows: int
    nameless: int
    seconds: float
    vectors_per_s: float
    key: Literal["user", "query"] | None = None


@strict
class Task:
    """One task's vectors and index.

    The model's score of a user and an item is `scale` * <u, i> + `bias`: to rounding where `exact`, and elsewhere not,
    for `why` says why.

    Attributes:
        width: of its vectors.
        scores: what was found on random pairs: `pairs`, `max_score_error`, the largest difference from the model's own
            logit (null where it has none of this name), `max_relative_error`, the same over scale * |u| * |i|, and
            `rank_correlation`, Spearman's, with each of the model's logits.
        index: its kind and sizes.
        file, bytes, sha256, seconds: of the index, and what building it took.
        compact: None, where items are stored as vectors. Else `kernels` K, `width` d of E_T, `concatenated_bytes` that
            the vectors alone would take, and, of an arg-max gate, `items`, how many each kernel's index has.
        quality: what `judge.judge` found against held-out rows; None where there were none.
        answers: what it was measured at (`index.measure`), with `queries_of`: users, or items where there are none.
    """

    exact: bool
    why: str | None
    scale: float
    bias: float
    width: int
    scores: dict[str, Any]
    index: dict[str, int | str]
    file: str
    bytes: int
    sha256: str
    seconds: float
    answers: dict[str, Any]
    compact: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None


@strict
class Manifest:
    """The whole of manifest.json.

    Attributes:
        run: folder of the run.
        checkpoint, step: which of its checkpoints, by the checksum of its checkpoint.json.
        model: kind.
        judged: the data set of held-out rows that quality was judged by.
        approximate: whether inexact tasks were asked for.
        item: the feature that tells items apart.
    """

    format: Literal["dist_rec-export/1"]
    run: str
    checkpoint: str
    step: int
    model: str
    approximate: bool
    item: str
    ranks: int
    items: Told
    index: IndexConfig
    tasks: dict[str, Task]
    users: Told | None = None
    judged: str | None = None
    files: dict[str, int] = field(default_factory=dict)


def manifest_text(manifest: Manifest) -> str:
    return json.dumps(to_dict(manifest), indent=1)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an export, its files checked to be there.

    Raises:
        UserError: there is none, or a file is missing or of another size.
    """
    path = folder / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except OSError:
        raise UserError(
            f"no export at {folder}: {MANIFEST_NAME} is missing. Make one with `dist-rec export RUN --out {folder}`."
        ) from None
    manifest = from_dict(Manifest, parse_json(text, str(path)), str(path))
    for name, size in manifest.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{file} is missing, or of another size than {MANIFEST_NAME} says: export again.")
    return manifest


def sizes_of(folder: Path) -> dict[str, int]:
    """Bytes of every file of a folder, by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def sha256_of(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            found.update(piece)
    return found.hexdigest()


def print_manifest(manifest: Manifest, folder: Path) -> None:
    """An export in a few lines."""
    items, users = manifest.items, manifest.users
    people = f" and of {users.count:,} {'queries' if users.key == 'query' else 'users'}" if users else ""
    rate = f"{items.vectors_per_s:,.0f} items/s" + (f", {users.vectors_per_s:,.0f} users/s" if users else "")
    print(f"{folder}: vectors of {items.count:,} items{people} of step {manifest.step} ({rate})")
    for name, task in manifest.tasks.items():
        sizes = " ".join(f"{key} {value}" for key, value in task.index.items() if key != "kind")
        error = task.scores.get("max_relative_error")
        exact = "exact" if task.exact else f"approximate ({task.why})"
        measured = f", scores differ by at most {error:.1e} of scale * |u| * |i|" if error is not None else ""
        related = task.scores.get("rank_correlation", {})
        told = "".join(f", rank correlation with {head} {value}" for head, value in related.items())
        print(f"  {name}: {exact}{measured}{told}")
        form = "compact " if task.compact else ""
        recall = ", ".join(f"{key} {value:.4f}" for key, value in task.answers.items() if key.startswith("recall_at"))
        print(
            f"    {form}{task.index['kind']} index {sizes}: width {task.width}, {task.bytes:,} bytes, built in "
            f"{task.seconds:.1f} s; {recall}, {task.answers['query_ms']:.2f} ms a query, "
            f"{task.answers['queries_per_s']:,.0f} queries/s"
        )
        for by in ("index", "exact", "popularity") if task.quality else ():
            if by in task.quality:
                figures = ", ".join(f"{key} {value:.4f}" for key, value in task.quality[by].items())
                print(f"    {by}: {figures}, of {task.quality['users']:,} users' held-out items")
        if task.compact:
            told = task.compact
            print(f"    {told['kernels']} weights and a vector of {told['width']} an item: ", end="")
            print(
                f"{task.bytes / told['concatenated_bytes']:.2f} of the concatenation's {told['concatenated_bytes']:,}"
            )


def check_place(out: Path, manifest: str, option: str, what: str) -> None:
    """Whether a folder can be written there: nothing is, or an earlier one, known by its manifest.

    Raises:
        UserError: something else is.
    """
    if out.exists() and not (out / manifest).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{option} {out} is there already and is no {what}: name another place, or remove it.")


def take_place(partial: Path, out: Path) -> None:
    """Let a folder that is whole take the place of an earlier one."""
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
