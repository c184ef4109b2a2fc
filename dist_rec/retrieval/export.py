"""`dist-rec export`: the two towers of a trained run as vectors, an index of the items, and how exact both are.

The vectors are a torchrun job (`vectors`); the indexes are built and measured by rank 0 when the others are done.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch.distributed as dist
from scipy.stats import spearmanr

from ..config import Config, save_config
from ..errors import UserError
from ..files import write_text
from ..models.towers import TwoTowers
from ..training import checkpoint
from ..training.evaluate import trained
from ..training.passes import fingerprint
from ..training.process import world_size
from .compact import SUFFIX, Gated, SubIndexes, build_compact, write_compact
from .index import IndexConfig, build_index, measure, write_index
from .judge import Seen, judge, read_seen
from .manifest import (
    CONFIG_NAME,
    FORMAT,
    INDEX,
    ITEMS,
    MANIFEST_NAME,
    USERS,
    Manifest,
    Task,
    Told,
    check_place,
    manifest_text,
    sha256_of,
    sizes_of,
    take_place,
)
from .parts import Parts
from .rows import DataSet
from .vectors import Members, VectorJob, items_of, open_data, users_of

# Of scores that are called exact, over scale * |u| * |i|.
TOLERANCE = 1e-5
NOBODY = "none"
# Keys the draw of pairs apart from those of a run.
_PAIRS = 0x9A1


@dataclass(frozen=True)
class Wishes:
    """What an export is asked for.

    Attributes:
        out: its folder.
        items: data set of the items; None is data.catalogue.
        users: of the users; None is the test rows, or else the valid or train rows; NOBODY leaves them out.
        index: of the items.
        compact: store items as E_T and the weights of their kernels.
        approximate: take tasks whose vectors do not make the model's score.
        pairs: of user and item, whose score is compared with the model's own.
        queries: users that the index is measured with, and `k`, at how many answers.
        judge: data set of held-out rows; users are then those of the training rows, if none are named.
        vocabulary: folder of the dictionaries, where they do not lie beside the data.
    """

    out: Path
    items: str | None = None
    users: str | None = None
    index: IndexConfig = field(default_factory=IndexConfig)
    approximate: bool = False
    pairs: int = 1000
    queries: int = 1000
    k: int = 50
    vocabulary: Path | None = None
    compact: bool = False
    judge: str | None = None


def export(config: Config, run: Path, wishes: Wishes) -> Manifest | None:
    """Export the best or latest checkpoint of `run`; the manifest on rank 0, None on others. Collective.

    The folder appears whole, and takes the place of an earlier export.

    Raises:
        UserError: the model has no two towers, or not exactly and that was not asked for; a data set is not of the
            run's; there are no items; `out` is something else; the index cannot be of these vectors.
    """
    items_root = wishes.items or config.data.catalogue
    if items_root is None:
        raise UserError("the config names no data.catalogue: name a data set with the items in --items.")
    usual = config.data.train if wishes.judge else config.data.test or config.data.valid or config.data.train
    users_root = wishes.users or usual
    partial = wishes.out.with_name(f".{wishes.out.name}.partial")
    check_place(wishes.out, MANIFEST_NAME, "--out", "export")
    with trained(config, run, "train") as loaded:
        prepared = loaded.prepared
        towers = prepared.kind.towers(prepared.schema, config, prepared.features)
        _refuse_inexact(towers, wishes.approximate)
        if wishes.compact and not towers.kernels:
            raise UserError("--compact is of virtual kernels, which an item weighs: this model has none. Leave it out.")
        item, items = items_of(items_root, prepared, towers, wishes.vocabulary)
        users = None
        if users_root != NOBODY:
            users = users_of(users_root, prepared, towers, wishes.vocabulary)
        if loaded.process.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        job = VectorJob(loaded, towers, item, wishes.compact)
        if wishes.judge is not None and (users is None or users.key != "user"):
            raise UserError("--judge compares what users are answered with what they had: the export has no users.")
        judged = None if wishes.judge is None else open_data(wishes.judge, prepared, "--judge")
        told = {ITEMS: _told(items, items_root, job.write(items, partial / ITEMS))}
        own, pairs = None, None
        if users is not None:
            told[USERS] = _told(users, users_root, job.write(users, partial / USERS))
            draw = np.random.default_rng([config.run.seed, _PAIRS])
            counts = np.array([[len(users.found)], [len(items.found)]])
            pairs = (draw.random((2, wishes.pairs)) * counts).astype(np.int64)
            own = job.own_scores(users, items, pairs)
        rank, step, ranks = loaded.process.rank, loaded.step, world_size()
    # From here on rank 0 is alone: the others need not wait for an index, however long it takes.
    if rank:
        return None
    try:
        held = None
        if judged is not None:
            train = DataSet(config.data.train, prepared.indexes["train"])
            labels = prepared.kind.heads(prepared.schema, config)
            of_tasks = {task: labels.get(task) for task in towers.tasks}
            held = [
                read_seen(d.reader(prepared, [item]), d.index.schema, item, users.found.key, items.found.key, of_tasks)
                for d in (train, judged)
            ]
        for name, one in told.items():
            _check_count(partial / name, one)
        tasks = _tasks(partial, towers, wishes, pairs, own, held)
    except UserError:
        shutil.rmtree(partial)
        raise
    saved = checkpoint.read_manifest(run / "checkpoints" / checkpoint.name_of(step))
    found = Manifest(
        format=FORMAT,
        run=str(run.absolute()),
        checkpoint=saved.manifest.sha256,
        step=step,
        model=config.model.kind,
        approximate=wishes.approximate,
        item=item,
        ranks=ranks,
        items=told[ITEMS],
        users=told.get(USERS),
        judged=wishes.judge,
        index=wishes.index,
        tasks=tasks,
    )
    save_config(config, partial / CONFIG_NAME)
    found = replace(found, files=sizes_of(partial))
    write_text(partial / MANIFEST_NAME, manifest_text(found))
    take_place(partial, wishes.out)
    return found


def _refuse_inexact(towers: TwoTowers, approximate: bool) -> None:
    inexact = [task for task in towers.tasks if not towers.exact[task]]
    if inexact and not approximate:
        reasons = "\n".join(f"  - {task}: {towers.why[task]}" for task in inexact)
        raise UserError(
            f"an index of inner products does not give this model's scores:\n{reasons}\nWith --approximate it is "
            "exported all the same, labelled so, and its error is measured."
        )


def _told(members: Members, root: str, seconds: float) -> Told:
    found = members.found
    return Told(
        data=str(root) if "://" in root else str(Path(root).absolute()),
        fingerprint=fingerprint(members.data.index),
        count=len(found),
        rows=found.rows,
        nameless=found.nameless,
        seconds=round(seconds, 3),
        vectors_per_s=round(len(found) / seconds, 1),
        key=members.key,
    )


def _tasks(
    folder: Path,
    towers: TwoTowers,
    wishes: Wishes,
    pairs: np.ndarray | None,
    own: dict[str, np.ndarray] | None,
    held: Sequence[Seen] | None = None,
) -> dict[str, Task]:
    items = Parts(folder / ITEMS)
    users = Parts(folder / USERS) if pairs is not None else None
    (folder / INDEX).mkdir()
    scores = {task: _scores(towers, task, users, items, pairs, own) for task in towers.tasks}
    _check_scores(towers, scores, wishes.approximate)
    found = {}
    for number, task in enumerate(towers.tasks):
        width = items.width(task)

        def vectors(task: str = task) -> Iterator[np.ndarray]:
            return items.vectors(task)

        started = time.monotonic()
        if wishes.compact:
            index = build_compact(wishes.index, items, task, towers.one_kernel)
        else:
            index = build_index(wishes.index, width, len(items), vectors)
        seconds = time.monotonic() - started
        asked = users or items
        some = np.linspace(0, len(asked) - 1, min(wishes.queries, len(asked))).astype(np.int64)
        chosen, answers = measure(index, wishes.index, asked.vectors_at(some, task), wishes.k, vectors)
        _say_recall(task, wishes, answers[f"recall_at_{wishes.k}"])
        path = folder / INDEX / f"{number}{SUFFIX if wishes.compact else '.faiss'}"
        (write_compact if wishes.compact else write_index)(index, path)
        found[task] = Task(
            exact=towers.exact[task] and not _is_off(scores[task]),
            why=_why(towers, task, scores[task]),
            scale=towers.scale[task],
            bias=towers.bias[task],
            width=width,
            scores=scores[task],
            index=_sizes(index, wishes.index, len(items), width) | chosen,
            file=f"{INDEX}/{path.name}",
            bytes=path.stat().st_size,
            sha256=sha256_of(path),
            seconds=round(seconds, 3),
            answers={"queries_of": USERS if users else ITEMS, **answers},
            quality=judge(index, wishes.index, users, items, task, *held, wishes.k) if held else None,
            compact=_compact(index, towers.kernels[task]) if wishes.compact else None,
        )
    return found


def _say_recall(task: str, wishes: Wishes, recall: float) -> None:
    if wishes.index.kind in ("ivf", "hnsw") and recall < wishes.index.recall:
        how = "--index.probes" if wishes.index.kind == "ivf" else "--index.search_width, links or build_width"
        print(
            f"dist-rec: {task}: recall@{wishes.k} of the index is {recall:.3f}, below --index.recall "
            f"{wishes.index.recall:g}: raise {how}, or take another --index.",
            file=sys.stderr,
        )


def _check_count(folder: Path, told: Told) -> None:
    if (there := len(Parts(folder))) != told.count:
        raise UserError(
            f"{folder} has {there:,} vectors of {told.count:,}: the other ranks wrote theirs elsewhere. Name an --out "
            "on a file system that all hosts share."
        )


def _sizes(
    index: faiss.Index | Gated | SubIndexes, config: IndexConfig, count: int, width: int
) -> dict[str, int | str]:
    # Those of sub-indexes follow from the number of each one's items.
    return {"kind": config.kind} if isinstance(index, Gated | SubIndexes) else config.resolved(count, width)


def _compact(index: Gated | SubIndexes, kernels: int) -> dict[str, Any]:
    found = {"kernels": kernels, "width": index.d // kernels, "concatenated_bytes": index.ntotal * index.d * 4}
    return found | ({"items": [len(p) for p in index.positions]} if isinstance(index, SubIndexes) else {})


def _scores(
    towers: TwoTowers,
    task: str,
    users: Parts | None,
    items: Parts,
    pairs: np.ndarray | None,
    own: dict[str, np.ndarray] | None,
) -> dict[str, Any]:
    """What the stored vectors of random pairs make of the model's own scores."""
    if users is None:
        return {"pairs": 0}
    user, item = (p.vectors_at(at, task).astype(np.float64) for p, at in zip((users, items), pairs, strict=True))
    served = towers.scale[task] * (user * item).sum(1) + towers.bias[task]
    found: dict[str, Any] = {"pairs": pairs.shape[1], "max_score_error": None, "max_relative_error": None}
    if task in own:
        error = np.abs(served - own[task])
        size = abs(towers.scale[task]) * np.linalg.norm(user, axis=1) * np.linalg.norm(item, axis=1)
        found["max_score_error"] = float(error.max())
        # Of a vector of zeros rounding is all there is.
        found["max_relative_error"] = float((error / np.maximum(size, TOLERANCE * size.max())).max())
    if not towers.exact[task]:
        found["rank_correlation"] = {head: _correlation(served, logits) for head, logits in own.items()}
    return found


def _correlation(served: np.ndarray, logits: np.ndarray) -> float | None:
    """Spearman's; None where either is constant."""
    found = float(spearmanr(served, logits).statistic) if np.ptp(served) and np.ptp(logits) else math.nan
    return None if math.isnan(found) else round(found, 4)


def _is_off(scores: dict[str, Any]) -> bool:
    error = scores.get("max_relative_error")
    # What is no number is off, too.
    return error is not None and not error <= TOLERANCE


def _check_scores(towers: TwoTowers, scores: dict[str, dict[str, Any]], approximate: bool) -> None:
    off = {t: s["max_relative_error"] for t, s in scores.items() if towers.exact[t] and _is_off(s)}
    if not off:
        return
    lines = "\n".join(f"  - {task}: by up to {error:.1e} of scale * |u| * |i|" for task, error in off.items())
    said = f"the vectors' scores differ from the model's own, by more than {TOLERANCE:.0e}:\n{lines}"
    if not approximate:
        raise UserError(f"{said}\nWith --approximate they are exported all the same, labelled so.")
    print(f"dist-rec: {said}", file=sys.stderr)


def _why(towers: TwoTowers, task: str, scores: dict[str, Any]) -> str | None:
    if not towers.exact[task]:
        return towers.why[task]
    return "measured scores differ from the model's own" if _is_off(scores) else None
