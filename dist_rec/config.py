"""The config: one tree of dataclasses, YAML in, strict, every fault at once.

What a key means is said here and, with its default, beside it in configs/*.yaml. The model's
maths, the data and the engines each read their own branch and nothing else.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator

from .errors import UserError, nearest
from .strict import from_dict, read_yaml, strict, to_dict

Width = Annotated[int, Field(ge=1)]


def _check_multiple(batch_size: int, streams: int) -> None:
    if batch_size % streams:
        near = max(batch_size // streams, 1) * streams
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of data.streams {streams}: take {near}, for instance"
        )


@strict
class RunConfig:
    """`root`/`name` is the run folder. `seed` drives order, initialisation and dropout."""

    name: str = "run"
    root: str = "runs"
    seed: int = Field(default=0, ge=0, lt=2**31)


@strict
class DataConfig:
    """What is read, and how its canonical order is made (docs: shards/README.md).

    * `train`, `valid`, `test`: data sets (folder or URL); `valid` is evaluated while training,
      `test` once at the end.
    * `batch_size`: rows of a *global* batch, over all ranks; a multiple of `streams`.
    * `streams`: logical streams S; at least the largest world size this run will ever have.
    * `shuffle_window`: rows, over all streams, within which rows are shuffled; 0 reads in order.
    * `domains`: the domains to train on; empty means all of the schema.
    * `weights`: share of each domain in an epoch; empty means natural, every row exactly once.
    * `drop_last`: drop the short last batch of an epoch instead of padding it.
    * `read_ahead`: batches prepared in the background.
    * `exclude_features`: features of the schema that this run leaves alone.
    """

    train: str
    valid: str | None = None
    test: str | None = None
    batch_size: int = Field(default=4096, ge=1)
    streams: int = Field(default=8, ge=1)
    shuffle_window: int = Field(default=262144, ge=0)
    domains: list[str] = field(default_factory=list)
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = field(default_factory=dict)
    drop_last: bool = False
    read_ahead: int = Field(default=4, ge=1)
    exclude_features: list[str] = field(default_factory=list)

    @model_validator(mode="after")
    def _batch_divides(self):
        _check_multiple(self.batch_size, self.streams)
        return self

    @field_validator("weights")
    @classmethod
    def _some_weight(cls, weights: dict[str, float]) -> dict[str, float]:
        if weights and not any(weights.values()):
            raise ValueError("not all weights may be 0")
        return weights


ShardingName = Literal["auto", "table_wise", "column_wise", "row_wise"]


@strict
class TableConfig:
    """What one table does differently. `None` takes the common value of `tables`."""

    dim: int | None = Field(default=None, ge=4, multiple_of=4)
    sharding: ShardingName | None = None


@strict
class TablesConfig:
    """Embedding tables, under TorchRec.

    * `dim`: width of every table, a multiple of 4, for fbgemm's kernels take nothing else.
    * `sharding`: how tables are cut over the ranks; `auto` lets the planner choose
      between table_wise and row_wise. A table too
      small to give every rank a row is placed table_wise where row_wise is asked for.
    * `optimizer`: runs inside backward, in the kernel. Row-wise Adagrad keeps one momentum a row.
    * `init_std`: rows start as N(0, init_std).
    * `pooling`: how several ids of one feature become one vector.
    * `overrides`: per table name.
    """

    dim: int = Field(default=16, ge=4, multiple_of=4)
    sharding: ShardingName = "auto"
    optimizer: Literal["sgd", "adagrad", "rowwise_adagrad"] = "rowwise_adagrad"
    learning_rate: float = Field(default=0.05, ge=0)
    eps: float = Field(default=1e-8, gt=0)
    init_std: float = Field(default=0.05, gt=0)
    pooling: Literal["mean", "sum"] = "mean"
    overrides: dict[str, TableConfig] = field(default_factory=dict)


@strict
class TextConfig:
    """Where text vectors come from.

    * `mode`: `none` leaves text out; `frozen` reads vectors that `dist-rec embed` wrote to
      `store`; `full` co-trains the language model inside the DeepSpeed engine.
    * `model`: folder of a Hugging Face model, or `package:<python package>/<folder>`.
    * `store`: folder of the vector store (frozen).
    * `learning_rate`: of the language model's parameters (full).
    """

    mode: Literal["none", "frozen", "full"] = "none"
    model: str | None = None
    store: str | None = None
    learning_rate: float = Field(default=2e-5, ge=0)

    @model_validator(mode="after")
    def _complete(self):
        if self.mode == "frozen" and not self.store:
            raise ValueError("mode: frozen needs store: the folder that `dist-rec embed` wrote")
        if self.mode == "full" and not self.model:
            raise ValueError("mode: full needs model: a Hugging Face folder or package:<package>/<folder>")
        return self


@strict
class HistoryConfig:
    """The behaviour history: a transformer over the embedded events, pooled to one vector.

    `use_text` adds the projected text of the history items, where the schema has them.
    """

    kind: Literal["none", "mean", "transformer"] = "transformer"
    layers: int = Field(default=1, ge=1)
    heads: int = Field(default=2, ge=1)
    feedforward: int = Field(default=64, ge=1)
    pooling: Literal["mean", "last"] = "mean"
    max_length: int = Field(default=50, ge=1)
    use_text: bool = False
    dropout: float = Field(default=0.1, ge=0, lt=1)


@strict
class AdaptationConfig:
    """Domain adaptation, x_hat = W_k (x + domain embedding) (CIKM'23). `width` 0 keeps that of x."""

    enabled: bool = True
    width: int = Field(default=0, ge=0)


@strict
class BodyConfig:
    """Shared bottom, MMoE or PLE over x_hat, then gates and towers per domain and task.

    * `experts`: shared experts; `specific_experts`: per group and level in PLE.
    * `specific_to`: whether PLE's specific experts belong to a `domain` or a `task`.
    * `levels`: of PLE.
    * `skip`: add a linear function of x_hat to each task's logit, past experts and towers (ours).
    """

    kind: Literal["shared_bottom", "mmoe", "ple"] = "mmoe"
    experts: int = Field(default=4, ge=1)
    specific_experts: int = Field(default=2, ge=1)
    specific_to: Literal["domain", "task"] = "domain"
    levels: int = Field(default=1, ge=1)
    expert_hidden: list[Width] = Field(default_factory=lambda: [64], min_length=1)
    tower_hidden: list[Width] = field(default_factory=lambda: [32])
    skip: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)


@strict
class RegulariserConfig:
    """Pulls the domains' distributions of x_hat together, over the global batch.

    * `js`: Jensen-Shannon divergence of the domains' mean softmax.
    * `mmd`: multi-kernel RBF maximum mean discrepancy on at most `samples` rows a domain.
    """

    kind: Literal["none", "js", "mmd"] = "none"
    weight: float = Field(default=0.1, ge=0)
    samples: int = Field(default=256, ge=2)
    kernels: int = Field(default=5, ge=1)


@strict
class TaskConfig:
    """One head: which label it predicts and its weight in the loss."""

    label: str
    weight: float = Field(default=1.0, ge=0)


@strict
class ModelConfig:
    """The foundation model (CIKM'23).

    * `width`: H, of every aspect and of E(U), E(Q), E(I).
    * `gating`: how the aspects (id, text, sparse) of a query or item are weighed.
    * `products`: add E(U)*E(I) and E(Q)*E(I) to x (ours, not the paper's).
    * `text_match`: add the cosine of the query's and the item's text vectors to x, 0 where either is
      missing (ours). What a projection to H keeps of a text is not enough to match words.
    * `embedding_l2`: adds this times the mean over rows of the squared norm of all pooled
      embeddings of a row. In the loss, because fbgemm's CPU kernels ignore weight decay.
    * `tasks`: heads by name (`ctr`, `relevance`, `cvr`); empty takes every label of the schema.
    """

    kind: Literal["foundation"] = "foundation"
    width: int = Field(default=64, ge=1)
    gating: Literal["mean", "cls", "domain"] = "domain"
    products: bool = True
    text_match: bool = True
    dropout: float = Field(default=0.0, ge=0, lt=1)
    history: HistoryConfig = field(default_factory=HistoryConfig)
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    body: BodyConfig = field(default_factory=BodyConfig)
    regulariser: RegulariserConfig = field(default_factory=RegulariserConfig)
    embedding_l2: float = Field(default=0.0, ge=0)
    tasks: dict[str, TaskConfig] = field(default_factory=dict)

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.history.kind == "transformer" and self.width % self.history.heads:
            raise ValueError(f"width {self.width} is not a multiple of history.heads {self.history.heads}")
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


@strict
class DenseConfig:
    """Everything that is not a table, under DeepSpeed.

    * `zero_stage`: 0 replicated, 1 optimizer state, 2 and gradients, 3 and parameters sharded.
    * `precision`: fp32 or bf16. fp16 is refused: its loss scaling reaches the tables'
      in-backward optimizer too late to be undone.
    * `gradient_accumulation`: must be 1: tables step on every micro-batch, dense parameters
      would not.
    * `gradient_clipping`: norm; 0 is off. It sees dense parameters only.
    * `warmup_steps`, `schedule`: of both the dense and the tables' learning rate.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=1e-3, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: str = "fp32"
    gradient_accumulation: int = 1
    gradient_clipping: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"

    @field_validator("precision")
    @classmethod
    def _no_fp16(cls, precision: str, before: ValidationInfo) -> str:
        if precision == "fp16":
            raise ValueError(
                "fp16 is refused, because loss scaling reaches the tables' in-backward optimizer too late to be "
                "undone: use bf16"
            )
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"must be fp32 or bf16, got {precision!r}")
        if precision == "bf16" and before.data.get("zero_stage") == 0:
            raise ValueError("bf16 with zero_stage: 0 is not trusted: use zero_stage 1, 2 or 3")
        return precision

    @field_validator("gradient_accumulation")
    @classmethod
    def _no_accumulation(cls, micro_batches: int) -> int:
        if micro_batches != 1:
            raise ValueError("must be 1, because tables step on every micro-batch: raise data.batch_size instead")
        return micro_batches


@strict
class TrainConfig:
    """How long, and what is said meanwhile.

    * `epochs`: passes over the training data; `steps` > 0 stops earlier.
    * `log_every`, `evaluate_every`: steps; `evaluate_every` 0 evaluates at the end only.
    * `device`: `auto` takes CUDA where there is one.
    * `timeout_minutes`: how long a rank waits for the others before it gives up.
    """

    epochs: int = Field(default=1, ge=1)
    steps: int = Field(default=0, ge=0)
    log_every: int = Field(default=20, ge=1)
    evaluate_every: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_minutes: float = Field(default=10.0, gt=0)


@strict
class EvaluateConfig:
    """`batch_size` 0 takes data.batch_size. `ndcg_at`: cut of NDCG by query."""

    batch_size: int = Field(default=0, ge=0)
    ndcg_at: int = Field(default=10, ge=1)


@strict
class Config:
    """Everything a run needs; the resolved tree is saved as config.yaml in the run folder."""

    data: DataConfig
    run: RunConfig = field(default_factory=RunConfig)
    tables: TablesConfig = field(default_factory=TablesConfig)
    text: TextConfig = field(default_factory=TextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    dense: DenseConfig = field(default_factory=DenseConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @field_validator("evaluate")
    @classmethod
    def _evaluated_batch_divides(cls, evaluate: EvaluateConfig, before: ValidationInfo) -> EvaluateConfig:
        if "data" in before.data:
            _check_multiple(evaluate.batch_size, before.data["data"].streams)
        return evaluate

    @property
    def run_folder(self) -> Path:
        return Path(self.run.root) / self.run.name


def apply_overrides(data: dict[str, Any], overrides: dict[str, str]) -> None:
    """Set dotted keys in place: `{"train.steps": "100"}`; values are read as YAML.

    Raises:
        UserError: a path runs through something that is no section.
    """
    for path, text in overrides.items():
        *sections, last = path.split(".")
        place = data
        for section in sections:
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise UserError(f"--{path}: {section!r} is a value, not a section.")
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--{path}: {text!r} is not a YAML value; quote it.") from None


def load_config(path: str | Path, overrides: dict[str, str] | None = None) -> Config:
    """Read a config file and apply `--section.key value` overrides.

    Raises:
        UserError: missing file, unknown key, wrong value; every fault is listed.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config is a mapping with sections data, tables, model and so on.")
    apply_overrides(data, overrides or {})
    return from_dict(Config, data, str(path))


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def check_names(known: list[str], used: list[str], place: str) -> list[str]:
    """Faults for names in `used` that `known` lacks, each with the nearest known name, or with all."""
    there = f" There is {', '.join(known)}." if known else ""
    return [f"{place}: {name!r} is not known.{nearest(name, known) or there}" for name in used if name not in known]
