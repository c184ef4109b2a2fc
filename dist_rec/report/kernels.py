"""What an MVKE run's virtual kernels learned: which fields of a user each attends to, and which tags it serves.

Hooks see what the model's own modules give; sums travel over the ranks once, at the end. A tag is an item by its id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.inspect import raw_values
from ..data.vocabulary import tables_of, undivided
from ..models.mvke import MVKE
from ..training.evaluate import Trained
from ..training.exchange import Exchange
from ..training.kinds import item_of
from ..training.setup import build_stream
from . import figures

# Rows of a tag's table that sums are kept for, and tags that are shown: the most frequent, and the best of a kernel.
MOST_ROWS, SHOWN, BEST = 1 << 21, 24, 8
LONGEST_NAME = 44


class KernelWatch:
    """Sums of attention over rows, and of gates over the rows of each tag; masked rows are left out.

    Args:
        model: in evaluation mode, with virtual kernels.
        keys: of a batch's ids that tell tags apart, each with the number that its ids are counted from: one, or of a
            divided vocabulary one for each part; none where nothing tells them apart.
        tags: rows of the vocabulary.
    """

    def __init__(self, model: MVKE, keys: Mapping[str, int], tags: int) -> None:
        self.model, self.keys = model, keys
        kernels, fields = model.kernels.num_embeddings, len(model.user_fields.names)
        self.sums = {
            "rows": torch.zeros(1, dtype=torch.float64),
            "attention": torch.zeros(kernels, fields, dtype=torch.float64),
            "present": torch.zeros(fields, dtype=torch.float64),
        }
        if keys:
            self.sums["tags"] = torch.zeros(tags, dtype=torch.float64)
            for number, (start, stop) in enumerate(model.owned):
                count = model.config.kernels.shared + stop - start
                self.sums[f"gate {number}"] = torch.zeros(tags, count, dtype=torch.float64)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch the model, as long as this is entered."""
        model = self.model
        handles = [
            model.register_forward_pre_hook(self._begin),
            model.experts.register_forward_hook(self._attention),
            model.gate.register_forward_hook(self._gate),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, _: nn.Module, given: tuple[Any, Batch]) -> None:
        batch, self.task = given[1], 0
        self.valid = batch.valid.cpu()
        self.sums["rows"] += self.valid.sum()
        if not self.keys:
            return
        self.of_row = torch.full((len(batch),), -1, dtype=torch.int64)
        for key, first in self.keys.items():
            ids = batch.ids[key]
            # A feature of kind id: one a row at most.
            self.of_row.masked_scatter_(ids.lengths().cpu() > 0, first + ids.values().cpu())
        self.counted = self.valid & (self.of_row >= 0)
        self.sums["tags"].index_add_(0, self.of_row[self.counted], torch.ones(int(self.counted.sum())).double())

    def _attention(self, _: nn.Module, given: tuple[Any, Any], out: tuple[Tensor, Tensor]) -> None:
        self.sums["attention"] += out[1].cpu().double()[self.valid].sum(0)
        self.sums["present"] += given[1].present.cpu().double()[self.valid].sum(0)

    def _gate(self, _: nn.Module, given: tuple[Tensor, Tensor], weights: Tensor) -> None:
        """Called once a task, in their order."""
        if self.keys:
            counted = weights.cpu().double()[self.counted]
            self.sums[f"gate {self.task}"].index_add_(0, self.of_row[self.counted], counted)
        self.task += 1

    def totals(self) -> dict[str, np.ndarray]:
        """All ranks' sums. Collective."""
        exchange = Exchange()
        return {name: exchange.sum(self.sums[name].numpy()) for name in sorted(self.sums)}


def measure_kernels(trained: Trained, split: str, rows: int) -> dict[str, Any]:
    """As `measure`, of an MVKE: `kernels` instead of aspects, experts and distances. Collective.

    Returns:
        `kernels`, absent where the user tower has none: `names`; `fields` with `present`, the share of rows that have
        each; `attention` `[K, F]`, means over rows, of a row with any field adding up to 1; and `tasks`, by name with
        `kernels` (numbers of its own), `tags` (the most frequent: `tag`, `rows`, mean `weights` of the kernels) and
        `best`, for each of its kernels those tags, among the frequent ones, that give it most.
    """
    prepared, process, model = trained.prepared, trained.process, trained.model
    found: dict[str, Any] = {
        "split": split,
        "rows": {},
        "rows_of_split": prepared.indexes[split].rows,
        "aspects": {},
        "experts": [],
        "distances": None,
        "left_out": {},
    }
    if model.config.user.kind != "mvke":
        found["left_out"]["kernels"] = f"user.kind {model.config.user.kind} has no virtual kernels"
        return found
    stream = build_stream(prepared, split, process.rank, process.world_size, shuffled=True)
    steps = -(-rows // (stream.order.per_stream * stream.order.streams)) if rows else stream.steps
    tag, keys, size = _tag_of(trained, found["left_out"])
    watch, seen = KernelWatch(model, keys, size), np.zeros(len(prepared.schema.domains.names), np.int64)
    with watch.hooks():
        for batch, _ in trained.predict(stream.batches(0, 0, min(steps, stream.steps))):
            seen += np.bincount(batch.domain[batch.valid].cpu().numpy(), minlength=len(seen))
    found["rows"] = dict(zip(prepared.schema.domains.names, Exchange().sum(seen).tolist(), strict=True))
    sums = watch.totals()
    if process.is_main:
        found["kernels"] = _told(trained, split, sums, tag)
    return found


def _tag_of(trained: Trained, left_out: dict[str, str]) -> tuple[str | None, dict[str, int], int]:
    """The feature that tells tags apart, and `keys` and `tags` of `KernelWatch`; without one, None, none and 0."""
    prepared = trained.prepared
    tag = item_of(prepared.schema, prepared.features)
    if tag is None:
        left_out["tags"] = "no feature that is the item's id (aspect: id) is read"
        return None, {}, 0
    whole, tables = prepared.schema.table_of(tag), tables_of(prepared.schema, prepared.config.tables.overrides)
    specs = [spec for spec in prepared.specs if undivided(spec.name) == whole]
    size = max(tables[spec.name].start + spec.rows for spec in specs)
    if specs[0].managed or size > MOST_ROWS:
        why = "are managed, and change their meaning" if specs[0].managed else f"are more than {MOST_ROWS:,}"
        left_out["tags"] = f"the {size:,} rows of table {whole} {why}"
        return None, {}, 0
    return tag, {tag + spec.name.removeprefix(whole): tables[spec.name].start for spec in specs}, size


def _told(trained: Trained, split: str, sums: dict[str, np.ndarray], tag: str | None) -> dict[str, Any]:
    model, rows = trained.model, max(float(sums["rows"][0]), 1.0)
    shared = model.config.kernels.shared
    names = [f"shared {k + 1}" for k in range(shared)]
    for task, (start, stop) in zip(model.tasks, model.owned, strict=True):
        names += [f"{task} {k + 1}" for k in range(stop - start)]
    tasks = {}
    if tag is not None:
        counts = sums["tags"]
        frequent = np.argsort(-counts, kind="stable")
        frequent = frequent[counts[frequent] > 0]
        # What is rare is left out of the best ones, which would be its noise.
        common = frequent[: max(len(frequent) // 2, SHOWN)]
        raw = _names(trained, split, tag, common.tolist())
        for number, (task, (start, stop)) in enumerate(zip(model.tasks, model.owned, strict=True)):
            weights = sums[f"gate {number}"][common] / counts[common, None]

            def entry(at: int, weights: np.ndarray = weights) -> dict[str, Any]:
                row = int(common[at])
                return {"tag": raw[row], "rows": int(counts[row]), "weights": weights[at].tolist()}

            tasks[task] = {
                "kernels": [*range(shared), *range(start, stop)],
                "tags": [entry(at) for at in range(min(SHOWN, len(common)))],
                "best": [
                    [entry(at) for at in np.argsort(-weights[:, k], kind="stable")[:BEST].tolist()]
                    for k in range(weights.shape[1])
                ],
            }
    return {
        "names": names,
        "fields": model.user_fields.names,
        "present": (sums["present"] / rows).tolist(),
        "attention": (sums["attention"] / rows).tolist(),
        "tasks": tasks,
    }


def _names(trained: Trained, split: str, tag: str, rows: list[int]) -> dict[int, str]:
    """Raw values of the tag's ids where the table has a row for each; else the row's number."""
    prepared = trained.prepared
    table = prepared.schema.table_of(tag)
    override = prepared.config.tables.overrides.get(table)
    plain = prepared.schema.features[table].vocabulary.kind == "dictionary" and not (override and override.hash)
    found = raw_values(prepared.root(split), table, rows) if plain else {}
    return {row: found.get(row) or f"#{row}" for row in rows}


def kernels_part(kernels: dict[str, Any] | None) -> list[str]:
    """The page's section: attention as a heat map, and for each task the tags' gates and every kernel's best tags."""
    if kernels is None:
        return []
    names, parts = kernels["names"], ["<h2>What the kernels learned</h2>"]
    attention, present = np.array(kernels["attention"]), np.array(kernels["present"])[None]
    drawn = figures.heat_maps(
        [("mean attention", np.vstack([attention, present]), kernels["fields"])],
        [*names, "share of rows"],
        label="field of the user",
        largest=1.0,
    )
    caption = (
        "What each kernel gives each field of the user, mean over rows (adds up to 1 in a row that has any); below, "
        "the share of the rows that have the field."
    )
    parts.append(_figure(drawn, "kernels-attention", caption))
    for number, (task, held) in enumerate(kernels["tasks"].items()):
        own = [names[k] for k in held["kernels"]]
        weights = np.array([tag["weights"] for tag in held["tags"]]).reshape(len(held["tags"]), len(own))
        drawn = figures.heat_maps(
            [(f"gates of {task}", weights, own)],
            [_short(tag["tag"]) for tag in held["tags"]],
            label="kernel",
            largest=max(0.5, float(weights.max(initial=0))),
        )
        parts.append(
            _figure(drawn, f"kernels-gates-{number}", f"{task}: mean weight that the most frequent tags give.")
        )
        lines = "".join(
            f"<tr><td class=name>{escape(name)}</td><td class='name wide'>{_listed(tags, k)}</td></tr>"
            for k, (name, tags) in enumerate(zip(own, held["best"], strict=True))
        )
        head = f"<tr><th class=name>kernel of {escape(task)}</th><th class=name>tags that give it most</th></tr>"
        parts.append(f"<figure><table>{head}{lines}</table></figure>")
    return parts


def _listed(tags: list[dict[str, Any]], kernel: int) -> str:
    return "; ".join(f"{escape(_short(tag['tag']))} {tag['weights'][kernel]:.2f}" for tag in tags)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _figure(figure: Any, name: str, caption: str) -> str:
    drawn = figures.svg(figure, name)
    return f'<figure id="{name}">{drawn}<figcaption class="soft">{escape(caption)}</figcaption></figure>'
