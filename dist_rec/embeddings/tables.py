"""The embedding tables of a schema as TorchRec collections, unsharded, and their exact start.

A table that a history reads must keep its vectors apart, so it lives with all its features in
the `EmbeddingCollection` of its width; every other table lives in an `EmbeddingBagCollection`. Tables that stay
as they are, *frozen* ones, live in collections of their own, which are read outside of autograd: there is no gradient
to compute or to send. Knows nothing of ranks: `sharding.py` places what is made here.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from ..config import TableConfig, TablesConfig, check_names
from ..data.batch import Batch
from ..data.vocabulary import tables_of, undivided, vocabulary_faults
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
        name: of the feature that owns its vocabulary; NAME@1 and so on of the parts that extensions added to it.
        rows, dim: its shape.
        features: the keys of a batch's ids that are looked up in it, in schema order: features, or f@1 and so on.
        sequence: whether a history does, so that vectors are not pooled.
        sharding: the sharding type that the config asks for, `auto` if the planner may choose.
        precision: of weights, `fp32` or `fp16`.
        kernel: `fused`, `fused_uvm` or `fused_uvm_caching`.
        managed: whether ids get their rows by managed collision.
        frozen: whether it stays as it is.
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
    frozen: bool = False

    @property
    def vocabulary(self) -> str:
        """The feature that owns its vocabulary."""
        return undivided(self.name)

    @property
    def replicable(self) -> bool:
        """Whether it may be data-parallel: `_faults_of` says why not."""
        return not (self.sequence or self.managed) and self.precision == "fp32" and self.kernel == "fused"


def table_specs(
    schema: Schema,
    config: TablesConfig,
    features: list[str],
    frozen: Collection[str] = (),
    unread: Collection[str] = (),
) -> list[TableSpec]:
    """The tables that the used `features` need; there may be none.

    Args:
        frozen: names of those that stay as they are.
        unread: names of parts of divided vocabularies that have one row for all their ids.

    Raises:
        UserError: an override names no table, a table asks for what the engines cannot do, or `frozen` is not of
            these; all faults, one a line.
    """
    tables = tables_of(schema, config.overrides)
    faults = check_names(list(tables), list(config.overrides), "tables.overrides")
    faults += vocabulary_faults(schema, config.overrides, features)
    specs = []
    for name, ids in tables.items():
        whole = undivided(name)
        users = [f for f in features if schema.features[f].kind in ("id", "ids") and schema.table_of(f) == whole]
        if not users:
            continue
        # What is said of the vocabulary holds for every part of it that nothing else is said of.
        override, part = config.overrides.get(whole, TableConfig()), config.overrides.get(name, TableConfig())
        specs.append(
            TableSpec(
                name=name,
                rows=1 if name in unread else override.size or override.hash or override.managed or len(ids),
                dim=override.dim or config.dim,
                features=tuple(user + name.removeprefix(whole) for user in users),
                sequence=any(schema.features[user].role == "history" for user in users),
                # A row cannot be cut over ranks.
                sharding="auto" if name in unread else part.sharding or override.sharding or config.sharding,
                precision=part.precision or override.precision or config.precision,
                kernel=part.kernel or override.kernel or config.kernel,
                managed=override.managed is not None,
                frozen=name in frozen,
            )
        )
    faults += check_names([spec.name for spec in specs], sorted(frozen), "frozen tables")
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


class _Collections(nn.Module):
    """Tables in as few collections as there can be."""

    def __init__(self, specs: list[TableSpec], config: TablesConfig, device: torch.device) -> None:
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

    def forward(self, ids: KeyedJaggedTensor) -> LookedUp:
        bags = [self.bags(ids)] if self.bags is not None else []
        # Managed collections answer with vectors and, if asked, with the rows they found.
        bags += [self.managed_bags(ids)[0]] if self.managed_bags is not None else []
        sequences = [sequences(ids) for sequences in self.sequences.values()]
        return bags, sequences + [sequences(ids)[0] for sequences in self.managed_sequences.values()]


def _by_key(looked_up: LookedUp) -> tuple[dict[str, Tensor], dict[str, JaggedTensor]]:
    """Waits for the vectors of every key, pooled and not."""
    bags, by_width = looked_up
    return (
        {key: vectors for one in bags for key, vectors in one.to_dict().items()},
        {key: jagged for one in by_width for key, jagged in one.items()},
    )


class EmbeddingTables(nn.Module):
    """All tables of a model: `vectors(tables(batch), batch)`.

    `forward` only looks up, in one call a collection that TorchRec's pipeline can trace and run
    ahead; `vectors` makes of the answer what models take.
    """

    def __init__(self, specs: list[TableSpec], schema: Schema, config: TablesConfig, device: torch.device) -> None:
        super().__init__()
        self.trained = _Collections([s for s in specs if not s.frozen], config, device)
        self.frozen = _Collections([s for s in specs if s.frozen], config, device)
        self.single_keys = [
            key for s in specs if s.sequence for key in s.features if schema.features[undivided(key)].role != "history"
        ]
        # By feature, the keys of its parts.
        self.pooled: dict[str, list[str]] = {}
        self.histories: dict[str, list[str]] = {}
        for key in (key for s in specs for key in s.features):
            of_role = self.histories if schema.features[undivided(key)].role == "history" else self.pooled
            of_role.setdefault(undivided(key), []).append(key)
        self.list_features = {f for f in self.pooled if schema.features[f].kind == "ids"}
        self.mean = config.pooling == "mean"

    def train(self, mode: bool = True) -> Self:
        """Frozen tables stay as in evaluation, in which managed ids get no rows and lose none."""
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, batch: Batch) -> tuple[LookedUp, LookedUp]:
        """What the trained tables found, and the frozen ones."""
        trained = self.trained(batch.ids)
        with torch.no_grad():
            return trained, self.frozen(batch.ids)

    def vectors(self, looked_up: tuple[LookedUp, LookedUp], batch: Batch) -> dict[str, Tensor]:
        """Per feature `[B, dim]`, pooled over the row's ids and zero where it has none; per history
        feature `[N, dim]`, the vectors of all events, rows concatenated."""
        (pooled, sequences), (still_pooled, still_sequences) = map(_by_key, looked_up)
        pooled, sequences = pooled | still_pooled, sequences | still_sequences
        pooled |= {key: _pooled(sequences[key]) for key in self.single_keys}
        found = {name: reduce(add, (pooled[key] for key in keys)) for name, keys in self.pooled.items()}
        if self.mean:
            for name, lengths in batch.id_lengths().items():
                if name in self.list_features:
                    found[name] = found[name] / lengths[:, None].clamp(min=1)
        for name, keys in self.histories.items():
            parts = [sequences[key].values() for key in keys]
            found[name] = parts[0] if len(keys) == 1 else torch.cat(parts).index_select(0, batch.event_places[name])
        return found


def initial_rows(spec: TableSpec, config: TablesConfig, seed: int, start: int, stop: int) -> Tensor:
    """Rows start .. stop of a fresh table, float32 `[stop - start, dim]`, N(0, init_std).

    A function of (seed, table name, row) alone, so that every sharding starts from one table.
    """
    parts = []
    for chunk in range(start // INIT_CHUNK_ROWS, -(-stop // INIT_CHUNK_ROWS)):
        first = chunk * INIT_CHUNK_ROWS
        # torch's CPU generator reads the low 32 bits of a seed only.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{spec.name}/{chunk}".encode()))
        rows = torch.randn(min(INIT_CHUNK_ROWS, spec.rows - first), spec.dim, generator=generator)
        parts.append(rows[max(start - first, 0) : stop - first])
    return torch.cat(parts) * config.init_std
