"""The embedding tables of a schema as TorchRec collections, unsharded, and their exact start.

A table that a history reads must keep its vectors apart, so it lives with all its features in
the `EmbeddingCollection` of its width; every other table lives in an `EmbeddingBagCollection`. Knows nothing
of ranks: `sharding.py` places what is made here.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from ..config import TableConfig, TablesConfig, check_names
from ..data.batch import Batch
from ..data.vocabulary import vocabulary_faults
from ..errors import UserError
from ..schema import Schema
from .managed import manage

INIT_CHUNK_ROWS = 16384
# TorchRec's `EmbeddingCollection` raises on those within hosts, and pools what it replicates.
SEQUENCE_SHARDING_TYPES = ("table_wise", "column_wise", "row_wise")
# Every rank holds the whole table; gradients are averaged over ranks.
DATA_PARALLEL = "data_parallel"
# TorchRec's managed collision maps ids to rows of their own rank.
MANAGED_SHARDING_TYPE = "row_wise"
DATA_TYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}


@dataclass(frozen=True)
class TableSpec:
    """One table.

    Attributes:
        name: of the feature that owns its vocabulary.
        rows, dim: its shape.
        features: who looks up in it, in schema order.
        sequence: whether a history does, so that vectors are not pooled.
        sharding: the sharding type that the config asks for, `auto` if the planner may choose.
        precision: of weights, `fp32` or `fp16`.
        kernel: `fused`, `fused_uvm` or `fused_uvm_caching`.
        managed: whether ids get their rows by managed collision.
    """

    name: str
    rows: int
    dim: int
    features: tuple[str, ...]
    sequence: bool
    sharding: str
    precision: str = "fp32"
    kernel: str = "fused"
    managed: bool = False

    @property
    def replicable(self) -> bool:
        """Whether it may be data-parallel: `_faults_of` says why not."""
        return not (self.sequence or self.managed) and self.precision == "fp32" and self.kernel == "fused"


def table_specs(schema: Schema, config: TablesConfig, features: list[str]) -> list[TableSpec]:
    """The tables that the used `features` need.

    Raises:
        UserError: an override names no table, or a table asks for what the engines cannot do; all faults, one a line.
    """
    sizes = schema.table_sizes()
    faults = check_names(list(sizes), list(config.overrides), "tables.overrides")
    faults += vocabulary_faults(schema, config.overrides, features)
    specs = []
    for name, vocabulary_rows in sizes.items():
        users = tuple(f for f in features if schema.features[f].kind in ("id", "ids") and schema.table_of(f) == name)
        if not users:
            continue
        override = config.overrides.get(name, TableConfig())
        specs.append(
            TableSpec(
                name=name,
                rows=override.size or override.hash or override.managed or vocabulary_rows,
                dim=override.dim or config.dim,
                features=users,
                sequence=any(schema.features[f].role == "history" for f in users),
                sharding=override.sharding or config.sharding,
                precision=override.precision or config.precision,
                kernel=override.kernel or config.kernel,
                managed=override.managed is not None,
            )
        )
    if not specs and not faults:
        faults.append("no id or ids feature is left, and a run without any table is not offered: keep one")
    faults += [f"{spec.name}: {fault}" for spec in specs for fault in _faults_of(spec)]
    if faults:
        raise UserError("tables:\n" + "\n".join(f"  - {fault}" for fault in faults))
    return specs


def _faults_of(spec: TableSpec) -> list[str]:
    """What this table asks for and the engines cannot do, whatever the device."""
    key, faults = f"tables.overrides.{spec.name}", []
    if spec.sequence and spec.sharding not in ("auto", *SEQUENCE_SHARDING_TYPES):
        why = f"TorchRec has no {spec.sharding} for such tables"
        if spec.sharding == DATA_PARALLEL:
            why = "TorchRec's lookup of a copied table (data_parallel) would pool them"
        faults.append(
            f"a history reads this table, so its vectors are not pooled, and {why}: choose auto, "
            f"{', '.join(SEQUENCE_SHARDING_TYPES)} in {key}.sharding"
        )
    if spec.managed and spec.sharding not in ("auto", MANAGED_SHARDING_TYPE):
        faults.append(
            "its ids are managed, and TorchRec gives them rows only in a table that is cut into rows over all ranks, "
            f"not {spec.sharding}: choose auto or {MANAGED_SHARDING_TYPE} in {key}.sharding"
        )
    if spec.managed and spec.kernel == "fused_uvm_caching":
        faults.append(
            f"its ids are managed, and a row that gets another id begins anew in memory, behind the back of "
            f"{spec.kernel}'s cache: choose fused or fused_uvm in {key}.kernel"
        )
    if spec.sharding == DATA_PARALLEL and spec.precision != "fp32":
        faults.append(
            f"the gradients of a copied table (data_parallel) have its own precision, and would be summed over ranks "
            f"in {spec.precision}: choose another {key}.sharding, or fp32 in {key}.precision"
        )
    if spec.sharding == DATA_PARALLEL and spec.kernel != "fused":
        faults.append(
            f"a copied table (data_parallel) lies in every device's own memory, {spec.kernel} in the host's: choose "
            f"another {key}.sharding, or fused in {key}.kernel"
        )
    return faults


def _pooled(jagged: JaggedTensor) -> Tensor:
    """Sum of each row's vectors, `[B, dim]`."""
    values, lengths = jagged.values(), jagged.lengths()
    row = torch.repeat_interleave(lengths, output_size=values.shape[0])
    return values.new_zeros(lengths.shape[0], values.shape[1]).index_add(0, row, values)


def _left_alone(weight: Tensor) -> None:
    """Instead of TorchRec's start, which would fill every table once more than needed."""


def _common(spec: TableSpec) -> dict[str, Any]:
    """What a table's config says in either kind of collection."""
    return {
        "name": spec.name,
        "num_embeddings": spec.rows,
        "embedding_dim": spec.dim,
        "feature_names": list(spec.features),
        "data_type": DATA_TYPES[spec.precision],
        "init_fn": _left_alone,
    }


def _bag_collection(specs: list[TableSpec], device: torch.device) -> EmbeddingBagCollection:
    # TorchRec's own mean divides by other features' lengths when one collection has row-wise and
    # table-wise tables: sum here, divide in `EmbeddingTables.vectors`.
    configs = [EmbeddingBagConfig(**_common(s), pooling=PoolingType.SUM) for s in specs]
    return EmbeddingBagCollection(tables=configs, device=device)


def _sequence_collection(specs: list[TableSpec], device: torch.device) -> EmbeddingCollection:
    return EmbeddingCollection(tables=[EmbeddingConfig(**_common(s)) for s in specs], device=device)


def _by_width(specs: list[TableSpec], device: torch.device) -> dict[str, EmbeddingCollection]:
    """The collections of tables that are not pooled: one has one width."""
    widths = sorted({s.dim for s in specs})
    return {f"width_{dim}": _sequence_collection([s for s in specs if s.dim == dim], device) for dim in widths}


# What the pooled tables found, and what the tables of each width of the others did; managed ones after the rest.
LookedUp = tuple[list[KeyedTensor], list[dict[str, JaggedTensor]]]


class EmbeddingTables(nn.Module):
    """All tables of a model: `vectors(tables(batch), batch)`.

    `forward` only looks up, in one call a collection that TorchRec's pipeline can trace and run
    ahead; `vectors` makes of the answer what models take.
    """

    def __init__(self, specs: list[TableSpec], schema: Schema, config: TablesConfig, device: torch.device) -> None:
        super().__init__()
        bags = [s for s in specs if not s.sequence and not s.managed]
        managed_bags = [s for s in specs if not s.sequence and s.managed]
        sequences = [s for s in specs if s.sequence]
        self.bags = _bag_collection(bags, device) if bags else None
        self.managed_bags = None
        if managed_bags:
            self.managed_bags = manage(_bag_collection(managed_bags, device), config.managed, device)
        self.sequences = nn.ModuleDict(_by_width([s for s in sequences if not s.managed], device))
        managed = _by_width([s for s in sequences if s.managed], device)
        self.managed_sequences = nn.ModuleDict({n: manage(one, config.managed, device) for n, one in managed.items()})
        used = [f for s in sequences for f in s.features]
        self.history_features = [f for f in used if schema.features[f].role == "history"]
        self.single_features = [f for f in used if schema.features[f].role != "history"]
        self.list_features = {f for s in specs for f in s.features if schema.features[f].kind == "ids"}
        self.list_features -= set(self.history_features)
        self.mean = config.pooling == "mean"

    def forward(self, batch: Batch) -> LookedUp:
        bags = [self.bags(batch.ids)] if self.bags is not None else []
        # Managed collections answer with vectors and, if asked, with the rows they found.
        bags += [self.managed_bags(batch.ids)[0]] if self.managed_bags is not None else []
        sequences = [sequences(batch.ids) for sequences in self.sequences.values()]
        return bags, sequences + [sequences(batch.ids)[0] for sequences in self.managed_sequences.values()]

    def vectors(self, looked_up: LookedUp, batch: Batch) -> dict[str, Tensor]:
        """Per feature `[B, dim]`, pooled over the row's ids and zero where it has none; per history
        feature `[N, dim]`, the vectors of all events, rows concatenated."""
        bags, by_width = looked_up
        found = {name: vectors for one in bags for name, vectors in one.to_dict().items()}
        sequences = {name: jagged for one in by_width for name, jagged in one.items()}
        found |= {name: _pooled(sequences[name]) for name in self.single_features}
        if self.mean:
            lengths = batch.ids.lengths().view(len(batch.ids.keys()), len(batch), 1)
            for i, name in enumerate(batch.ids.keys()):
                if name in self.list_features:
                    found[name] = found[name] / lengths[i].clamp(min=1)
        found |= {name: sequences[name].values() for name in self.history_features}
        return found


def initial_rows(spec: TableSpec, config: TablesConfig, seed: int, start: int, stop: int) -> Tensor:
    """Rows start .. stop of a fresh table, float32 `[stop - start, dim]`, N(0, init_std).

    A function of (seed, table name, row) alone, so that every sharding starts from one table.
    """
    parts = []
    for chunk in range(start // INIT_CHUNK_ROWS, -(-stop // INIT_CHUNK_ROWS)):
        first = chunk * INIT_CHUNK_ROWS
        generator = torch.Generator().manual_seed((seed << 32) ^ zlib.crc32(f"{spec.name}/{chunk}".encode()))
        rows = torch.randn(min(INIT_CHUNK_ROWS, spec.rows - first), spec.dim, generator=generator)
        parts.append(rows[max(start - first, 0) : stop - first])
    return torch.cat(parts) * config.init_std
