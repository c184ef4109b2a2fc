"""Managed tables: every id finds a row of its own as it comes, and loses it when it has gone cold.

TorchRec's managed collision collections. Rows of such a table are cut over all ranks, and the ids, 0 .. RAW_IDS - 1,
into as many equal ranges: a rank finds rows among its own for the ids of its range. Its last row is read by all that
have none. At every `tables.managed.interval`-th step, before it looks up, a rank looks at the ids that have come since:
the policy gives rows to new ones, free rows first, then those of ids that are worth less. Evaluation only reads.

Such a row begins anew, with `first_vectors` and momenta of 0. TorchRec's own kernel for that does not exist on CPU, and
leaves full Adagrad's momenta to the next id on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.mc_embedding import (
    ManagedCollisionEmbeddingCollectionSharder,
    ShardedManagedCollisionEmbeddingCollection,
)
from torchrec.distributed.mc_embeddingbag import (
    ManagedCollisionEmbeddingBagCollectionSharder,
    ShardedManagedCollisionEmbeddingBagCollection,
)
from torchrec.distributed.types import ModuleSharder, ParameterSharding, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mc_embedding_modules import (
    BaseManagedCollisionEmbeddingCollection,
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from torchrec.modules.mc_modules import ManagedCollisionCollection

from ..config import TablesConfig
from ..config.model import ManagedConfig
from ..schema import RAW_IDS
from .ids import IdCounts, ManagedIds, policy_of


def manage(
    collection: EmbeddingBagCollection | EmbeddingCollection, config: ManagedConfig, device: torch.device
) -> ManagedCollisionEmbeddingBagCollection | ManagedCollisionEmbeddingCollection:
    """A collection all of whose tables have managed ids."""
    bags = isinstance(collection, EmbeddingBagCollection)
    configs = collection.embedding_bag_configs() if bags else collection.embedding_configs()
    modules = {
        one.name: ManagedIds(
            name=one.name,
            zch_size=one.num_embeddings,
            device=device,
            eviction_policy=policy_of(config),
            eviction_interval=config.interval,
            input_hash_size=RAW_IDS,
        )
        for one in configs
    }
    # Ids come mixed: nothing is left to hash.
    managed = ManagedCollisionCollection(modules, configs, need_preprocess=False)
    kind = ManagedCollisionEmbeddingBagCollection if bags else ManagedCollisionEmbeddingCollection
    return kind(collection, managed)


class _Restarting:
    """Of the sharded collections: a row that got an id begins anew."""

    def _evict(self, evictions_per_table: dict[str, Tensor | None]) -> None:
        for table, rows in evictions_per_table.items():
            if rows is None or not len(rows):
                continue
            kernel, index = self._table_to_tbe_and_index[table]
            ids = self._managed_collision_collection._managed_collision_modules[table]
            with torch.no_grad():
                weights = kernel.split_embedding_weights()[int(index)]
                weights[rows] = ids.first_vectors_of(rows, weights.shape[1]).to(weights)
                # By table; SGD has none at all.
                states = kernel.split_optimizer_states()
                for state in states[int(index)] if states else []:
                    state[rows] = 0


class _ManagedBags(_Restarting, ShardedManagedCollisionEmbeddingBagCollection):
    pass


class _ManagedSequences(_Restarting, ShardedManagedCollisionEmbeddingCollection):
    pass


class _ManagedBagSharder(ManagedCollisionEmbeddingBagCollectionSharder):
    def shard(
        self,
        module: ManagedCollisionEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> _ManagedBags:
        return _ManagedBags(module, params, self._e_sharder, self._mc_sharder, env, device)


class _ManagedSequenceSharder(ManagedCollisionEmbeddingCollectionSharder):
    def shard(
        self,
        module: ManagedCollisionEmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> _ManagedSequences:
        return _ManagedSequences(module, params, self._e_sharder, self._mc_sharder, env, device)


def managed_sharders(
    bags: EmbeddingBagCollectionSharder, sequences: EmbeddingCollectionSharder
) -> list[ModuleSharder[nn.Module]]:
    """Sharders of what `manage` makes.

    Args:
        bags, sequences: shard the tables themselves. `sequences` must not deduplicate: that needs the ranges of all
            tables' ids beside each other in 63 bits, which a single one fills, and would count an id once a batch.
    """
    return [_ManagedBagSharder(bags), _ManagedSequenceSharder(sequences)]


def collections_of(tables: nn.Module) -> Iterator[tuple[str, EmbeddingBagCollection | EmbeddingCollection, bool]]:
    """Path, collection and whether its ids are managed, of all collections of unsharded tables.

    The path is what a sharding plan knows them by, which for a managed one is that of what `manage` made.
    """
    inner = set()
    for path, module in tables.named_modules():
        if isinstance(module, BaseManagedCollisionEmbeddingCollection):
            inner.add(module._embedding_module)
            yield path, module._embedding_module, True
        elif isinstance(module, EmbeddingBagCollection | EmbeddingCollection) and module not in inner:
            yield path, module, False


def managed_ids(tables: nn.Module) -> dict[str, ManagedIds]:
    """The managed ids of every table that has them, by table name, in one order on all ranks."""
    return {m.name: m for m in sorted((m for m in tables.modules() if isinstance(m, ManagedIds)), key=lambda m: m.name)}


def start_managed(sharded: nn.Module, config: TablesConfig, seed: int) -> None:
    """Tell the managed tables what their vectors begin with."""
    for name, ids in managed_ids(sharded).items():
        ids.start = (config.init_std, seed, name)


def id_counts(sharded: nn.Module, device: torch.device, evaluated: bool = False) -> dict[str, IdCounts]:
    """What happened to managed ids since this process began, by table. Collective where there is such a table.

    Args:
        evaluated: in the last evaluation instead; every rank then has counted its part of the ids.
    """
    found = managed_ids(sharded)
    if not found:
        return {}
    counts = torch.stack([ids.counts(evaluated) for ids in found.values()]).to(device)
    dist.all_reduce(counts)
    names = [field.name for field in fields(IdCounts)]
    return {
        table: IdCounts(**dict(zip(names, row, strict=True))) for table, row in zip(found, counts.tolist(), strict=True)
    }
