"""What a trained model does with the rows of a split: what its gates weigh, and how far its domains lie apart.

Hooks see what the model's own modules take and give, so the model is the one that was trained; sums by domain travel
over the ranks once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batch import Batch
from ..layers.divergence import js_divergence
from ..layers.experts import ExpertLevel
from ..layers.per_domain import sort_by_domain
from ..layers.reduction import Reduction, full_precision
from ..models.foundation import FoundationModel
from ..models.mvke import MVKE
from ..training.evaluate import Trained
from ..training.exchange import Exchange
from ..training.setup import build_stream
from .kernels import measure_kernels


class Watch:
    """Sums by domain, of what hooks on a model see while it predicts; masked rows are left out.

    Args:
        model: in evaluation mode.
        tasks: label of each task; a task's gates count the rows that have its label.
    """

    def __init__(self, model: FoundationModel, tasks: dict[str, str]) -> None:
        self.model, self.tasks = model, tasks
        self.num_domains = model.num_domains
        self.sums: dict[str, Tensor] = {}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch the model, as long as this is entered."""
        model = self.model
        handles = [model.register_forward_pre_hook(self._begin)]
        handles += [entity.gate.register_forward_hook(self._gate(role)) for role, entity in model.entities.items()]
        handles.append(model.body.register_forward_pre_hook(self._adapted))
        for number, level in enumerate(model.body.levels):
            if isinstance(level, ExpertLevel):
                handles.append(level.register_forward_hook(self._level(number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, _: nn.Module, given: tuple[dict[str, Tensor], Batch]) -> None:
        batch = given[1]
        order, _ = sort_by_domain(batch.domain, self.num_domains)
        self.domain = F.one_hot(batch.domain, self.num_domains).double() * batch.valid[:, None]
        self.sorted = self.domain[order]
        labelled = [batch.label_valid[label] for label in self.tasks.values()]
        self.labelled = torch.stack(labelled, 1)[order].double()
        self._add("rows", self.sorted.sum(0))
        self._add("labelled", self.sorted.t() @ self.labelled)

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _gate(self, role: str):
        def hook(_: nn.Module, given: tuple[Tensor, ...], out: tuple[Tensor, Tensor]) -> None:
            present = given[1].double()
            if not present.shape[1]:
                return
            self._add(f"{role} weights", self.domain.t() @ out[1].double())
            self._add(f"{role} present", self.domain.t() @ present)
            self._add(f"{role} any", self.domain.t() @ present.amax(1, keepdim=True))

        return hook

    def _adapted(self, _: nn.Module, given: tuple[Tensor, Tensor]) -> None:
        p = torch.softmax(full_precision(given[0]), 1).double()
        # A masked row may hold anything, and 0 * nan is not 0.
        p = torch.where(self.sorted.any(1, keepdim=True), p, 0.0)
        self._add("p", self.sorted.t() @ p)

    def _level(self, number: int):
        def hook(level: ExpertLevel, given: tuple[Tensor, Tensor, Tensor], _: Any) -> None:
            common, own, sizes = given
            gates = {"own": level.weights(own, sizes)}
            if not level.last:
                gates["shared"] = level.shared_weights(common, sizes)
            for name, weights in gates.items():
                by_task = name == "own" and _of_tasks(level)
                for mixture, given_to in enumerate(weights.double().unbind(1)):
                    rows = self.sorted * self.labelled[:, mixture, None] if by_task else self.sorted
                    given_to = torch.where(rows.any(1, keepdim=True), given_to, 0.0)
                    self._add(f"level {number} {name} {mixture}", rows.t() @ given_to)

        return hook

    def totals(self) -> dict[str, np.ndarray]:
        """All ranks' sums. Collective: every rank has seen as many batches of one model."""
        exchange = Exchange()
        return {name: exchange.sum(self.sums[name].cpu().numpy()) for name in sorted(self.sums)}


def measure(trained: Trained, split: str, rows: int) -> dict[str, Any]:
    """Pass over about `rows` rows of a split, shuffled over its domains (0: all), and say what was seen. Collective.

    Returns:
        `rows` of each domain that was seen; `aspects`, `experts` and `distances` as below, or, of an MVKE, what
        `measure_kernels` has; `left_out`, by section why it is not there. Of other models nothing is looked at, for
        they have none of these.
    """
    prepared, process, model = trained.prepared, trained.process, trained.model
    if isinstance(model, MVKE):
        return measure_kernels(trained, split, rows)
    whole = {"split": split, "rows_of_split": prepared.indexes[split].rows}
    if not isinstance(model, FoundationModel):
        why = f"model.kind {prepared.config.model.kind} has none; they are of foundation models"
        nothing = {"rows": {}, "aspects": {}, "experts": [], "distances": None}
        return {**whole, **nothing, "left_out": {"aspects' gates, experts and distances of domains": why}}
    tasks = prepared.kind.heads(prepared.schema, prepared.config)
    stream = build_stream(prepared, split, process.rank, process.world_size, shuffled=True)
    steps = -(-rows // (stream.order.per_stream * stream.order.streams)) if rows else stream.steps
    watch = Watch(model, tasks)
    with watch.hooks():
        for _ in trained.predict(stream.batches(0, 0, min(steps, stream.steps))):
            pass
    sums, domains = watch.totals(), prepared.schema.domains.names
    seen = dict(zip(domains, sums["rows"].astype(int).tolist(), strict=True))
    left_out: dict[str, str] = {}
    return {
        **whole,
        "rows": seen,
        "aspects": _aspects(model, sums, domains, left_out),
        "experts": _experts(model, sums, domains, left_out),
        "distances": _distances(sums, domains, left_out),
        "left_out": left_out,
    }


def _aspects(
    model: FoundationModel, sums: dict[str, np.ndarray], domains: list[str], left_out: dict[str, str]
) -> dict[str, Any]:
    """By role, domain with such rows, and aspect: `weight`, the mean over rows with any, and `present`, the share
    of the domain's rows that have it. Weights of a domain add up to 1."""
    found: dict[str, Any] = {}
    for role, entity in model.entities.items():
        if not entity.aspects:
            left_out[f"aspects of the {role}"] = f"this run reads no feature of the {role}"
            continue
        weights, present, some = (sums[f"{role} {kind}"] for kind in ("weights", "present", "any"))
        found[role] = {
            domain: {
                aspect: {"weight": weights[k, a] / some[k, 0], "present": present[k, a] / sums["rows"][k]}
                for a, aspect in enumerate(entity.aspects)
            }
            for k, domain in enumerate(domains)
            if some[k, 0] > 0
        }
    return found


def _of_tasks(level: ExpertLevel) -> bool:
    """Whether a level's mixtures are the tasks'; else there is one, the row's domain's."""
    return level.last or level.by_task


def _experts(
    model: FoundationModel, sums: dict[str, np.ndarray], domains: list[str], left_out: dict[str, str]
) -> list[dict[str, Any]]:
    """By level and kind of gate: names of `experts`, and `lines` with `domain`, `task` (null where the gate belongs to
    none), `rows` and the mean `weights` of the experts, which add up to 1."""
    found, tasks = [], list(model.tasks)
    for number, level in enumerate(model.body.levels):
        if not isinstance(level, ExpertLevel):
            left_out["experts"] = "a shared bottom has one expert and no gates"
            continue
        shared = [f"shared {e + 1}" for e in range(level.num_shared)]
        own = [f"own {e + 1}" for e in range(level.num_specific)]
        kinds: list[tuple[str, list[str], list[Any]]] = [("own", own + shared, tasks if _of_tasks(level) else [None])]
        if not level.last:
            names = [f"{task} {e + 1}" for task in tasks for e in range(level.num_specific)] if level.by_task else own
            kinds.append(("shared", names + shared, [None]))
        for kind, experts, mixtures in kinds:
            lines = []
            for mixture, task in enumerate(mixtures):
                counts = sums["rows"] if task is None else sums["labelled"][:, tasks.index(task)]
                weights = sums[f"level {number} {kind} {mixture}"]
                for k, domain in enumerate(domains):
                    if counts[k]:
                        line = {"domain": domain, "task": task, "rows": int(counts[k])}
                        lines.append({**line, "weights": (weights[k] / counts[k]).tolist()})
            lines.sort(key=lambda line: (domains.index(line["domain"]), line["task"] or ""))
            owner = "task" if level.by_task else "domain"
            entry = {"level": number + 1, "gate": kind, "own_to": owner if own else None}
            found.append({**entry, "experts": experts, "lines": lines})
    return found


def _distances(sums: dict[str, np.ndarray], domains: list[str], left_out: dict[str, str]) -> dict[str, Any] | None:
    """JS between the mean softmax(x_hat) of each two domains that were seen (`layers.divergence`), in 0 .. ln 2."""
    seen = [k for k in range(len(domains)) if sums["rows"][k] > 0]
    if len(seen) < 2:
        left_out["distances"] = "distances need rows of two domains"
        return None
    p = torch.from_numpy(sums["p"][seen] / sums["rows"][seen, None])
    # softmax(log p) = p: the regulariser's own code gives the distance of the two rows that are valid.
    rows, number = p.clamp_min(torch.finfo(p.dtype).tiny).log(), torch.arange(len(seen))
    js = np.zeros((len(seen), len(seen)))
    for i in range(len(seen)):
        for j in range(i):
            js[i, j] = js[j, i] = js_divergence(rows, number, (number == i) | (number == j), len(seen), Reduction())
    return {"domains": [domains[k] for k in seen], "js": js.tolist()}
