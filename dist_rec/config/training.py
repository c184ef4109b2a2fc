"""`run`, `dense`, `train`, `checkpoint` and `evaluate`: how it is trained."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from ..strict import strict


@strict
class RunConfig:
    """`root`/`name` is the run folder. `seed` drives order, initialisation and dropout."""

    name: str = "run"
    root: str = "runs"
    seed: int = Field(default=0, ge=0, lt=2**31)


Beta = Annotated[float, Field(ge=0, lt=1)]


@strict
class DenseConfig:
    """Everything that is not a table, under DeepSpeed.

    * `zero_stage`: 0 replicated, 1 optimizer state, 2 and gradients, 3 and parameters sharded.
    * `precision`: fp32 or bf16. fp16 is refused: its loss scaling reaches the tables'
      in-backward optimizer too late to be undone.
    * `matmul_precision`: of fp32 matrix products in training, as `torch.set_float32_matmul_precision` has it: `highest`
      is fp32; `high` allows TF32, and `medium` bf16 inside too, where a device has them. Evaluation takes `highest`.
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
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
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


# What an evaluation says beside how good a model is.
UNORDERED = ("rows", "unranked", "positives", "calibration", "mean_label", "mean_score")


@strict
class EarlyStoppingConfig:
    """End the run when evaluations of data.valid improve no more.

    * `metric`: `<task>.<metric>` of an evaluation's `overall`; None is off.
    * `patience`: how many evaluations in a row may be no improvement.
    * `min_delta`: only what is better by more than this is an improvement.
    """

    metric: str | None = None
    patience: int = Field(default=10, ge=1)
    min_delta: float = Field(default=0.0, ge=0)

    @field_validator("metric")
    @classmethod
    def _can_be_better(cls, metric: str | None) -> str | None:
        if metric is None:
            return None
        task, _, name = metric.rpartition(".")
        if not task or not name:
            raise ValueError(f"is <task>.<metric>, such as ctr.auc, got {metric!r}")
        if name in UNORDERED:
            raise ValueError(f"{name} is neither better nor worse: name a metric such as auc, ndcg@10 or logloss")
        return metric


@strict
class TrainConfig:
    """How long, and what is said meanwhile.

    * `epochs`: passes over the training data; `steps` > 0 stops earlier, and so may `early_stopping`.
    * `log_every`, `evaluate_every`: steps; `evaluate_every` may be `epoch`, and 0 evaluates at the end only.
    * `device`: `auto` takes CUDA where there is one.
    * `timeout_minutes`: how long a rank waits for the others before it gives up.
    * `resume`: `auto` goes on from the last good checkpoint of the run folder; `never` refuses a
      folder that holds a run.
    * `record_rows`: every rank writes the row numbers of every step below `rows/`.
    """

    epochs: int = Field(default=1, ge=1)
    steps: int = Field(default=0, ge=0)
    log_every: int = Field(default=20, ge=1)
    evaluate_every: int | str = 0
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_minutes: float = Field(default=10.0, gt=0)
    resume: Literal["auto", "never"] = "auto"
    record_rows: bool = False

    @field_validator("evaluate_every")
    @classmethod
    def _steps_or_epoch(cls, every: int | str) -> int | str:
        if every != "epoch" and (isinstance(every, str) or every < 0):
            raise ValueError(f"is a number of steps >= 0, or epoch, got {every!r}")
        return every

    @field_validator("early_stopping", mode="before")
    @classmethod
    def _off(cls, early_stopping: Any) -> Any:
        return {} if early_stopping is None else early_stopping

    @field_validator("early_stopping")
    @classmethod
    def _is_evaluated(cls, early_stopping: EarlyStoppingConfig, before: ValidationInfo) -> EarlyStoppingConfig:
        if early_stopping.metric is not None and before.data.get("evaluate_every") == 0:
            raise ValueError("needs train.evaluate_every: a number of steps, or epoch")
        return early_stopping


@strict
class CheckpointConfig:
    """When checkpoints are written, and how. One is always written at the end, and at SIGTERM.

    * `every_steps`, `every_minutes`: whichever comes first; 0 is never.
    * `keep`: how many of the newest stay; the best of a run that may stop early stays too.
    * `write`: `background` copies to host memory and writes while training goes on; `chunks` writes
      piece by piece while training waits; `auto` takes chunks where a copy would not fit.
    * `chunk_bytes`: size of a piece.
    """

    every_steps: int = Field(default=0, ge=0)
    every_minutes: float = Field(default=15.0, ge=0)
    keep: int = Field(default=3, ge=1)
    write: Literal["auto", "background", "chunks"] = "auto"
    chunk_bytes: int = Field(default=268435456, ge=1)


@strict
class EvaluateConfig:
    """How splits are evaluated.

    * `batch_size`: rows of a global batch; 0 takes data.batch_size.
    * `ndcg_at`: cut of NDCG by query.
    * `mask_history`: of sequence models: leave the items of a row's own history out of its ranking.
    * `at`: of sequence models: cuts of recall and NDCG.
    """

    batch_size: int = Field(default=0, ge=0)
    ndcg_at: int = Field(default=10, ge=1)
    mask_history: bool = False
    at: list[Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: [1, 5, 10, 50], min_length=1)
