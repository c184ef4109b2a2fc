"""The embedding tables of a schema as TorchRec collections, unsharded, and their exact start.

A table that a history reads must keep its vectors apart, so it lives with all its features in
one `EmbeddingCollection`; every other table lives in an `EmbeddingBagCollection`. Knows nothing
of ranks: `sharding.py` places what is made here.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from ..config import TablesConfig, check_names
from ..data.batch import Batch
from ..errors import UserError
from ..schema import Schema

INIT_CHUNK_ROWS = 16384
# TorchRec's `EmbeddingCollection` raises on the others.
SEQUENCE_SHARDING_TYPES = ("table_wise", "column_wise", "row_wise")


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


def table_specs(schema: Schema, config: TablesConfig, features: list[str]) -> list[TableSpec]:
    """The tables that the used `features` need.

    Raises:
        UserError: an override names no table, or tables of one `EmbeddingCollection` differ in width
            or want a sharding type that it does not have.
    """
    sizes = schema.table_sizes()
    faults = check_names(list(sizes), list(config.overrides), "tables.overrides")
    specs = []
    for name, rows in sizes.items():
        users = tuple(f for f in features if schema.features[f].kind in ("id", "ids") and schema.table_of(f) == name)
        if not users:
            continue
        override = config.overrides.get(name)
        specs.append(
            TableSpec(
                name=name,
                rows=rows,
                dim=(override and override.dim) or config.dim,
                features=users,
                sequence=any(schema.features[f].role == "history" for f in users),
                sharding=(override and override.sharding) or config.sharding,
            )
        )
    if not specs and not faults:
        faults.append("no id or ids feature is left, and a run without any table is not offered: keep one")
    widths = {spec.dim for spec in specs if spec.sequence}
    if len(widths) > 1:
        faults.append(
            f"tables that histories read must have one width, got {sorted(widths)}: "
            + ", ".join(f"{s.name}={s.dim}" for s in specs if s.sequence)
        )
    for spec in specs:
        if spec.sequence and spec.sharding not in ("auto", *SEQUENCE_SHARDING_TYPES):
            faults.append(
                f"{spec.name}: a history reads this table, so its vectors are not pooled, and TorchRec has no "
                f"{spec.sharding} for such tables: choose auto, {', '.join(SEQUENCE_SHARDING_TYPES)} in "
                f"tables.overrides.{spec.name}.sharding"
            )
    if faults:
        raise UserError("tables:\n" + "\n".join(f"  - {fault}" for fault in faults))
    return specs


def _pooled(jagged: JaggedTensor) -> Tensor:
    """Sum of each row's vectors, `[B, dim]`."""
    values, lengths = jagged.values(), jagged.lengths()
    row = torch.repeat_interleave(lengths, output_size=values.shape[0])
    return values.new_zeros(lengths.shape[0], values.shape[1]).index_add(0, row, values)


class EmbeddingTables(nn.Module):
    """All tables of a model: `vectors(tables(batch), batch)`.

    `forward` only looks up, in two calls that TorchRec's pipeline can trace and run ahead;
    `vectors` makes of the answer what models take.
    """

    def __init__(self, specs: list[TableSpec], schema: Schema, config: TablesConfig, device: torch.device) -> None:
        super().__init__()
        bags = [s for s in specs if not s.sequence]
        sequences = [s for s in specs if s.sequence]
        self.bags = self.sequences = None
        if bags:
            self.bags = EmbeddingBagCollection(
                tables=[
                    EmbeddingBagConfig(
                        name=s.name,
                        num_embeddings=s.rows,
                        embedding_dim=s.dim,
                        feature_names=list(s.features),
                        # TorchRec's own mean divides by other features' lengths when one collection
                        # has row-wise and table-wise tables: sum here, divide in `vectors`.
                        pooling=PoolingType.SUM,
                    )
                    for s in bags
                ],
                device=device,
            )
        if sequences:
            self.sequences = EmbeddingCollection(
                tables=[
                    EmbeddingConfig(
                        name=s.name, num_embeddings=s.rows, embedding_dim=s.dim, feature_names=list(s.features)
                    )
                    for s in sequences
                ],
                device=device,
            )
        used = [f for s in sequences for f in s.features]
        self.history_features = [f for f in used if schema.features[f].role == "history"]
        self.single_features = [f for f in used if schema.features[f].role != "history"]
        self.list_features = {f for s in specs for f in s.features if schema.features[f].kind == "ids"}
        self.list_features -= set(self.history_features)
        self.mean = config.pooling == "mean"

    def forward(self, batch: Batch) -> tuple[KeyedTensor | None, dict[str, JaggedTensor] | None]:
        bags = self.bags(batch.ids) if self.bags is not None else None
        sequences = self.sequences(batch.ids) if self.sequences is not None else None
        return bags, sequences

    def vectors(
        self, looked_up: tuple[KeyedTensor | None, dict[str, JaggedTensor] | None], batch: Batch
    ) -> dict[str, Tensor]:
        """Per feature `[B, dim]`, pooled over the row's ids and zero where it has none; per history
        feature `[N, dim]`, the vectors of all events, rows concatenated."""
        bags, sequences = looked_up
        found = dict(bags.to_dict()) if bags is not None else {}
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
