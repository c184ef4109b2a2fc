"""`model` with `kind: mvke`: virtual kernels between a user and the tags or items (Xu et al., KDD'22)."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from pydantic import Field, model_validator

from ..strict import strict
from .model import HistoryConfig, Width

ActivationName = Literal["none", "sigmoid", "tanh", "relu", "gelu"]

# By preset, what the keys say that the paper and its authors' public code disagree about, as far as both are known. The
# paper's sigma and the start of its kernels and maps are not: tanh, 1 / sqrt(width) and `nn.Linear`'s are ours.
PRESETS: dict[str, dict[tuple[str, str], Any]] = {
    "paper": {
        ("kernels", "activation"): "tanh",
        ("kernels", "combine"): "concat",
        ("kernels", "init_std"): None,
        ("kernels", "maps_std"): None,
        ("gate", "project"): True,
        ("gate", "scaled"): True,
        ("item", "shared"): True,
        ("score", "kind"): "cosine",
    },
    "official": {
        ("kernels", "activation"): "none",
        ("kernels", "combine"): "residual_norm",
        ("kernels", "init_std"): 0.01,
        ("kernels", "maps_std"): 0.01,
        ("gate", "project"): False,
        ("gate", "scaled"): False,
        ("item", "shared"): False,
        ("score", "kind"): "dot",
    },
}


@strict
class UserTowerConfig:
    """From a user's fields to one or several vectors for each task.

    * `kind`: `mvke` virtual kernels; and, to compare with, `single_task` an expert for each task, `shared_bottom` one
      for all (hard sharing), `mmoe`, `cgc` and `ple` experts that gates of the user's fields mix, `multi_interest`
      several interests of a user, which the item weighs (ComiRec's self-attention, MIND's label-aware attention); it
      attends to a history's events one by one, whatever `history.kind`, unless that is none.
    * `hidden`: widths of an expert's hidden layers.
    * `tower_hidden`: of the tasks' towers behind shared_bottom, mmoe, cgc and ple.
    * `experts`: shared ones of mmoe, cgc and ple; `specific_experts`: of each task and level, of cgc and ple.
    * `levels`: of ple.
    * `interests`: of multi_interest; `sharpness`: how decidedly the item chooses among them.
    * `dropout`: after each hidden layer of experts and towers.
    """

    kind: Literal["mvke", "single_task", "shared_bottom", "mmoe", "cgc", "ple", "multi_interest"] = "mvke"
    hidden: list[Width] = Field(default_factory=lambda: [64], min_length=1)
    tower_hidden: list[Width] = field(default_factory=list)
    experts: int = Field(default=4, ge=1)
    specific_experts: int = Field(default=2, ge=1)
    levels: int = Field(default=2, ge=1)
    interests: int = Field(default=4, ge=1)
    sharpness: float = Field(default=1.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)


@strict
class KernelsConfig:
    """The virtual kernels of users, and their attention over the user's fields. `None` is what the preset says.

    * `shared`: kernels of all tasks; `specific`: of each task alone.
    * `activation`: of query, key and value.
    * `combine`: what an expert reads of the weighted fields: their `concat`, their `sum`, or the concatenation of each
      field with its weighted value added, layer-normalised (`residual_norm`).
    * `scaled`: divide attention's scores by the root of the width.
    * `init_std`: kernels start as N(0, init_std); 1 / sqrt(model.width) in the paper's preset.
    * `maps_std`: attention's maps of query, key and value start as N(0, maps_std), without bias; as `nn.Linear` does in
      the paper's preset.
    * `crossed`: move the kernels of a row by what its user's and its item's fields have in common.
    """

    shared: int = Field(default=2, ge=0)
    specific: int = Field(default=1, ge=0)
    activation: ActivationName | None = None
    combine: Literal["concat", "sum", "residual_norm"] | None = None
    scaled: bool = True
    init_std: float | None = Field(default=None, gt=0)
    maps_std: float | None = Field(default=None, gt=0)
    crossed: bool = False


@strict
class GateConfig:
    """How an item weighs the kernels' experts. `None` is what the preset says.

    * `kind`: `softmax`, or `argmax`: the best kernel alone, with softmax's gradient.
    * `project`: attention with maps of query, key and value, with the kernels' activation; else the item's vector times
      the kernel.
    * `scaled`: divide the scores by the root of the width.
    """

    kind: Literal["softmax", "argmax"] = "softmax"
    project: bool | None = None
    scaled: bool | None = None


@strict
class ItemTowerConfig:
    """From an item's (a tag's) fields to its vector. `None` is what the preset says.

    * `hidden`: widths of the tower's hidden layers.
    * `shared`: one vector for all tasks, or one for each.
    * `kind`: `mlp`, or virtual kernels on this side too: `vke` with the mean of their experts, `vke_vkg` with experts
      that the user weighs.
    * `kernels`: of vke and vke_vkg, for each vector.
    * `dropout`: after each hidden layer.
    """

    hidden: list[Width] = field(default_factory=list)
    shared: bool | None = None
    kind: Literal["mlp", "vke", "vke_vkg"] = "mlp"
    kernels: int = Field(default=2, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)


@strict
class ScoreConfig:
    """The logit of a user's vectors and an item's. `None` is what the preset says.

    * `kind`: `dot`; `cosine` of the whole vectors; `parts`, the dot with every expert's vector and the item's brought
      to length 1, which an index serves exactly as it does `dot`.
    * `scale`: times which.
    """

    kind: Literal["dot", "cosine", "parts"] | None = None
    scale: float = Field(default=1.0, gt=0)


@strict
class ObjectiveConfig:
    """One task: which label it predicts, its weight in the loss, kernels of its own, and what it presupposes.

    * `kernels`: instead of `kernels.specific`.
    * `given`: a task without which this one cannot happen (a conversion's click): the score is then the product of the
      two probabilities, and all rows with that task's label are learned from and measured (Ma et al., SIGIR'18, ESMM).
    """

    label: str
    weight: float = Field(default=1.0, ge=0)
    kernels: int | None = Field(default=None, ge=0)
    given: str | None = None


@strict
class MVKEConfig:
    """Mixture of virtual-kernel experts (KDD'22) and its baselines.

    * `preset`: whose word is taken where the paper and its public code differ and nothing else is said. The config that
      a run leaves says everything, so that over it another preset is but a name.
    * `kernels`, `gate`: of `user.kind: mvke` alone.
    * `width`: d, of fields, kernels and vectors.
    * `tasks`: by name; empty takes every label of the schema.
    * `embedding_l2`: as the foundation's.
    """

    kind: Literal["mvke"] = "mvke"
    preset: Literal["paper", "official"] = "official"
    width: int = Field(default=32, ge=1)
    history: HistoryConfig = field(default_factory=HistoryConfig)
    user: UserTowerConfig = field(default_factory=UserTowerConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    item: ItemTowerConfig = field(default_factory=ItemTowerConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    embedding_l2: float = Field(default=0.0, ge=0)
    tasks: dict[str, ObjectiveConfig] = field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self):
        for (section, key), value in PRESETS[self.preset].items():
            if getattr(getattr(self, section), key) is None:
                setattr(getattr(self, section), key, value)
        if self.kernels.init_std is None:
            self.kernels.init_std = self.width**-0.5
        if faults := self._faults():
            raise ValueError("; ".join(faults))
        return self

    def _faults(self) -> list[str]:
        faults = []
        if fault := self.history.width_fault(self.width):
            faults.append(fault)
        for name, task in self.tasks.items():
            if task.given is None:
                continue
            if task.given not in self.tasks or task.given == name:
                others = ", ".join(other for other in self.tasks if other != name) or "no other"
                faults.append(f"tasks.{name}.given: {task.given!r} is no other task: there is {others}")
            elif self.tasks[task.given].given is not None:
                faults.append(f"tasks.{name}.given: {task.given} is given itself: a task presupposes one at most")
        if self.user.kind == "mvke":
            own_of = {f"tasks.{name}.kernels": task.kernels for name, task in self.tasks.items()}
            if not own_of or None in own_of.values():
                own_of["kernels.specific"] = self.kernels.specific
            for name, own in own_of.items():
                if own == self.kernels.shared == 0:
                    faults.append(f"{name} 0 beside kernels.shared 0 leaves a task without any kernel")
        elif self.kernels.crossed:
            faults.append(f"kernels.crossed is of user.kind mvke, and user.kind is {self.user.kind}")
        return faults

    def own_kernels(self, task: str) -> int:
        """Kernels of a task alone."""
        own = self.tasks[task].kernels if task in self.tasks else None
        return self.kernels.specific if own is None else own
