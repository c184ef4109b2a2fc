"""`tables`, `text` and `model`: what is trained."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..strict import strict

Width = Annotated[int, Field(ge=1)]

ShardingName = Literal[
    "auto",
    "data_parallel",
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
]
KernelName = Literal["fused", "fused_uvm", "fused_uvm_caching"]
PrecisionName = Literal["fp32", "fp16"]
# What an override may say of a vocabulary, one at a time.
VOCABULARY_KEYS = ("size", "hash", "managed")


@strict
class TableConfig:
    """What one table does differently. `None` takes the common value of `tables`, or the schema's vocabulary.

    * `size`: N rows; an id of N or more ends the run in words.
    * `hash`: N rows; an id goes to row hash(id) modulo N.
    * `managed`: N rows under managed collision: every id gets a row of its own, cold ones are evicted.
    """

    dim: int | None = Field(default=None, ge=4, multiple_of=4)
    sharding: ShardingName | None = None
    precision: PrecisionName | None = None
    kernel: KernelName | None = None
    size: int | None = Field(default=None, ge=1)
    hash: int | None = Field(default=None, ge=1)
    managed: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _one_vocabulary(self):
        given = [key for key in VOCABULARY_KEYS if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are two kinds of vocabulary: give one of them")
        return self


@strict
class ManagedConfig:
    """Managed collision (TorchRec's MCH), for tables with `overrides.*.managed`.

    * `policy`: which ids lose their rows: the least frequent (lfu), the least recently seen (lru), or those of the
      smallest count divided by steps-since-seen ** `decay` (distance_lfu).
    * `interval`: steps between two looks at who gets a row and who loses it.
    * `decay`: exponent of lru's and distance_lfu's distance.
    """

    policy: Literal["lfu", "lru", "distance_lfu"] = "distance_lfu"
    interval: int = Field(default=10, ge=1)
    # Below, float32 cannot tell one distance from another.
    decay: float = Field(default=1.0, ge=1e-3, allow_inf_nan=False)


@strict
class TablesConfig:
    """Embedding tables, under TorchRec.

    * `dim`: width of every table, a multiple of 4, for fbgemm's kernels take nothing else.
    * `sharding`: how tables are cut over the ranks. `table_wise` puts a table on one rank; `row_wise`
      and `column_wise` cut it over all ranks, `table_row_wise` and `table_column_wise` over those of
      one host; `grid_shard` cuts columns over hosts and rows within each; `data_parallel` copies it
      to every rank. `auto` lets the planner choose what is fastest and gives the same results. A table
      too small to give every rank a row is placed table_wise where rows are to be cut. Tables that a
      history reads take auto, table_wise, row_wise or column_wise; fp16 tables are not copied.
    * `optimizer`: runs inside backward, in the kernel. Row-wise Adagrad keeps one momentum a row.
    * `init_std`: rows start as N(0, init_std).
    * `pooling`: how several ids of one feature become one vector.
    * `precision`: of weights in memory and in checkpoints; optimizer states are fp32.
    * `kernel`: where weights lie: `fused` in the device's memory, `fused_uvm` in the host's, `fused_uvm_caching` in the
      host's with a cache on the device. The last two are for CUDA.
    * `wire`: precision of vectors between ranks; with bf16 and fp16, gradients go back in bf16.
    * `deduplicate`: send every distinct id of a rank's batch once, for tables that a history reads.
    * `managed`: of tables with a managed vocabulary.
    * `plan`: file of `dist-rec plan --out`, used instead of planning anew.
    * `overrides`: per table name.
    """

    dim: int = Field(default=16, ge=4, multiple_of=4)
    sharding: ShardingName = "auto"
    optimizer: Literal["sgd", "adagrad", "rowwise_adagrad"] = "rowwise_adagrad"
    learning_rate: float = Field(default=0.05, ge=0)
    eps: float = Field(default=1e-8, gt=0)
    init_std: float = Field(default=0.05, gt=0)
    pooling: Literal["mean", "sum"] = "mean"
    precision: PrecisionName = "fp32"
    kernel: KernelName = "fused"
    wire: Literal["fp32", "bf16", "fp16"] = "fp32"
    deduplicate: bool = True
    managed: ManagedConfig = field(default_factory=ManagedConfig)
    plan: str | None = None
    overrides: dict[str, TableConfig] = field(default_factory=dict)


@strict
class LoraConfig:
    """Low-rank adapters of the language model (Hu et al., ICLR'22), by peft.

    * `rank`, `alpha`: r and alpha of W + (alpha / r) B A.
    * `dropout`: on the adapters' input.
    * `targets`: endings of the names of the linear layers that get one; empty takes all of them.
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] = field(default_factory=list)


@strict
class TextConfig:
    """Where text vectors come from.

    * `mode`: `none` leaves text out; `frozen` reads vectors that `dist-rec embed` wrote to
      `store`; `full` co-trains the language model inside the DeepSpeed engine, `lora` only adapters of it.
    * `model`: folder of a Hugging Face model, `package:<python package>/<folder>`, or `hub:<name>`.
    * `store`: folder of the vector store (frozen).
    * `dropped_store`: folder of a second one, of the same texts with words dropped (`dist-rec embed --word-drop`), for
      models that augment sequences with them (frozen).
    * `pooling`: how a text's token vectors become one; `auto` is what the model was made with, or, where it does not
      say, the last token of a decoder and the mean of an encoder.
    * `missing`: what becomes of a text that the store lacks (frozen): `refuse` ends the run, `encode` runs the model.
    * `learning_rate`: of the language model's parameters (full, lora).
    * `freeze_layers`: how many bottom layers stay as they are, with the token embeddings; 0 trains all (full, lora).
    * `checkpointing`: compute activations again in backward instead of keeping them (full, lora).
    * `batch_tokens`: tokens, padding included, that go through the model at once; 0 takes what suits the device.
    """

    mode: Literal["none", "frozen", "lora", "full"] = "none"
    model: str | None = None
    store: str | None = None
    dropped_store: str | None = None
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    missing: Literal["refuse", "encode"] = "refuse"
    learning_rate: float = Field(default=2e-5, ge=0)
    freeze_layers: int = Field(default=0, ge=0)
    checkpointing: bool = False
    batch_tokens: int = Field(default=0, ge=0)
    lora: LoraConfig = field(default_factory=LoraConfig)

    @model_validator(mode="after")
    def _complete(self):
        if self.mode == "frozen" and not self.store:
            raise ValueError("mode: frozen needs store: the folder that `dist-rec embed` wrote")
        if self.dropped_store and self.mode != "frozen":
            raise ValueError(f"dropped_store is of mode: frozen, and mode is {self.mode}: leave it out")
        if self.trains and not self.model:
            raise ValueError(f"mode: {self.mode} needs model: a Hugging Face folder or package:<package>/<folder>")
        return self

    @property
    def trains(self) -> bool:
        """Whether the language model is part of the DeepSpeed engine."""
        return self.mode in ("lora", "full")


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

    def width_fault(self, width: int) -> str | None:
        """Why events of this width cannot be attended to; None if they can, or need not be."""
        if self.kind == "transformer" and width % self.heads:
            return f"width {width} is not a multiple of history.heads {self.heads}"
        return None


@strict
class TextMatchConfig:
    """Cosines of text vectors: of the query and the item, and, with `history.use_text`, of each history (the mean of
    its texts) and the item. They enter x and, with a weight of their own for each domain and task, the logits (ours).

    * `slope`: by how much a logit rises with each cosine before anything is learned.
    * `speed`: how much faster than other parameters the slopes move: Adam moves each by about its learning rate a step.
    """

    enabled: bool = True
    slope: float = 5.0
    speed: float = Field(default=10.0, gt=0)


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
    * `embedding_l2`: adds this times the mean over rows of the squared norm of all pooled
      embeddings of a row. In the loss, because fbgemm's CPU kernels ignore weight decay.
    * `tasks`: heads by name (`ctr`, `relevance`, `cvr`); empty takes every label of the schema.
    """

    kind: Literal["foundation"] = "foundation"
    width: int = Field(default=64, ge=1)
    gating: Literal["mean", "cls", "domain"] = "domain"
    products: bool = True
    text_match: TextMatchConfig = field(default_factory=TextMatchConfig)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    history: HistoryConfig = field(default_factory=HistoryConfig)
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    body: BodyConfig = field(default_factory=BodyConfig)
    regulariser: RegulariserConfig = field(default_factory=RegulariserConfig)
    embedding_l2: float = Field(default=0.0, ge=0)
    tasks: dict[str, TaskConfig] = field(default_factory=dict)

    @model_validator(mode="after")
    def _heads_divide(self):
        if fault := self.history.width_fault(self.width):
            raise ValueError(fault)
        return self
