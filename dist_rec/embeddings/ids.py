"""The ids of one managed table: which rows they have, who gets one next, and what their vectors begin with.

TorchRec's managed collision module (MCH): the sorted map from ids to rows, and the policies, are its. What is not:

* The history of ids since the last look has no bounds, and can be saved. TorchRec's has room for what the first batch
  makes likely, and forgets the rest.
* An id's first vector is a function of (seed, table, id).
* `IdCounts` tells what happens.

A look sorts the table's rows of this rank twice, however few ids came: `interval` spreads that over steps. Knows its
rows, neither the vectors in them nor other ranks.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    MCHEvictionPolicy,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import JaggedTensor

from ..config.model import ManagedConfig
from ..schema import RAW_IDS
from ..strict import strict

# Stands where a row has no id, and for each rank's last row, which never gets one.
FREE = torch.iinfo(torch.int64).max
# Numbers of a row that has an id, and of an id that waits for the next look: the id, how often it came, and the step
# when it last did.
ID, COUNT, LAST_SEEN = "id", "count", "last_seen"
# TorchRec's names of what its policies keep of a row.
TORCHREC_NAMES = {"counts": COUNT, "last_access_iter": LAST_SEEN}
# A rank's share of a table: one row for an id, and the shared one.
LEAST_ROWS = 2
# Of TorchRec's list of row ranges.
MOST_RANKS = 1024
# Bytes of a row beside its vector: its id, the row's number, and at most two numbers of the policy's.
ROW_BYTES = 4 * torch.int64.itemsize
# Vectors drawn at once.
DRAWN_NUMBERS = 1 << 20


def owner_of(ids: Tensor, ranks: int) -> Tensor:
    """The rank whose range each id is in, as TorchRec's exchange has it."""
    return ids // range_size(ranks)


def range_size(ranks: int) -> int:
    """How many ids the range of every rank has, the last one's perhaps fewer."""
    return -(-RAW_IDS // ranks)


def fault_of_rows(table: str, rows: int, ranks: int) -> str | None:
    """Why a managed table of so many rows cannot be cut over so many ranks; None if it can."""
    key = f"tables.overrides.{table}.managed"
    if ranks > MOST_RANKS:
        return f"{key}: TorchRec manages ids on at most {MOST_RANKS} ranks, not {ranks}: choose hash instead"
    share = -(-rows // ranks)
    if rows - share * (ranks - 1) >= LEAST_ROWS:
        return None
    # The cut is in equal shares, and the last one gets what is left.
    return (
        f"{key}: {rows} rows cut over {ranks} ranks leave the last one fewer than {LEAST_ROWS}: start fewer ranks, "
        f"or, for a run that has not begun, give a multiple of {ranks} that is {ranks * LEAST_ROWS} or more"
    )


def worth(policy: str, decay: float, clock: int, count: Tensor | None, last_seen: Tensor | None) -> Tensor:
    """What the policy scores ids by: of two, it keeps the one of the higher score. As in TorchRec's policies."""
    if policy == "lfu":
        return count
    distance = torch.pow(clock - last_seen + 1, decay)
    return -distance if policy == "lru" else count / distance


def first_vectors(ids: np.ndarray, dim: int, std: float, seed: int, table: str) -> np.ndarray:
    """The vectors that ids begin with, float32 `[n, dim]`, N(0, std): a function of (seed, table, id) alone.

    Args:
        ids: int64 `[n]`.
    """
    half, key = -(-dim // 2), np.uint64((seed << 32 ^ zlib.crc32(table.encode())) % 2**64)
    counters = np.arange(1, 2 * half + 1, dtype=np.uint64)
    found = np.empty((len(ids), dim), np.float32)
    step = max(DRAWN_NUMBERS // dim, 1)
    for start in range(0, len(ids), step):
        begun = _scrambled(ids[start : start + step].astype(np.uint64) ^ key)
        # 53 bits are what a float64 holds of a number in [0, 1).
        uniform = (_scrambled(begun[:, None] + counters * _GOLDEN) >> np.uint64(11)) * 2.0**-53
        radius, angle = np.sqrt(-2 * np.log1p(-uniform[:, :half])), 2 * np.pi * uniform[:, half:]
        pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        found[start : start + step] = std * pairs[:, :dim]
    return found


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _scrambled(x: np.ndarray) -> np.ndarray:
    """SplitMix64's mixer."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@strict
class IdCounts:
    """What happened to a managed table's ids, over all ranks.

    Attributes:
        rows: that ids can have, all but the shared ones.
        occupied: rows that have one.
        lookups: ids looked up.
        collisions: those of them that read a shared row.
        admitted: ids that got a row.
        evicted: ids that lost theirs to another.
    """

    rows: int = Field(default=0, ge=0)
    occupied: int = Field(default=0, ge=0)
    lookups: int = Field(default=0, ge=0)
    collisions: int = Field(default=0, ge=0)
    admitted: int = Field(default=0, ge=0)
    evicted: int = Field(default=0, ge=0)

    def since(self, before: IdCounts) -> IdCounts:
        """What happened after `before`, as it is now."""
        return replace(self, **{name: getattr(self, name) - getattr(before, name) for name in FLOWS})

    def after(self, before: IdCounts) -> IdCounts:
        """What happened in both, as it is now."""
        return replace(self, **{name: getattr(self, name) + getattr(before, name) for name in FLOWS})

    def shares(self) -> dict[str, float | int]:
        """For people: `occupancy` and `collisions` as shares, and the ids that were `admitted` and `evicted`."""
        return {
            "occupancy": round(self.occupied / max(self.rows, 1), 4),
            "collisions": round(self.collisions / max(self.lookups, 1), 4),
            "admitted": self.admitted,
            "evicted": self.evicted,
        }


FLOWS = ("lookups", "collisions", "admitted", "evicted")


class ManagedIds(MCHManagedCollisionModule):
    """The ids of one table, or of this rank's rows of it.

    Attributes:
        clock: steps that it has seen.
        start: what `first_vectors` takes after the width; set by `start_managed`.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.clock = 0
        self.start: tuple[float, int, str] | None = None
        self._pending: list[dict[str, Tensor]] = []
        self._trained = torch.zeros(len(FLOWS), dtype=torch.int64, device=self.device)
        self._evaluated = torch.zeros_like(self._trained)

    @property
    def name(self) -> str:
        return self._name

    @property
    def first_row(self) -> int:
        return self._output_global_offset

    @property
    def occupied(self) -> int:
        return int(torch.searchsorted(self._mch_sorted_raw_ids, FREE))

    @property
    def kinds(self) -> list[str]:
        """What is kept of a row."""
        return [ID, *(TORCHREC_NAMES[name] for name in self._mch_metadata)]

    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Take note of a step's ids; at every `interval`-th give out rows."""
        if not self.training:
            return features
        self.clock += 1
        for feature in features.values():
            ids, counts = feature.values().unique(return_counts=True)
            self._pending.append({ID: ids, COUNT: counts, LAST_SEEN: torch.full_like(ids, self.clock)})
        if self.clock % self._eviction_interval == 0:
            self._look()
        return features

    def pending(self) -> dict[str, Tensor]:
        """The ids that wait for the next look, int64 `[n]` each of ID, COUNT and LAST_SEEN, by id."""
        if not self._pending:
            return {kind: torch.empty(0, dtype=torch.int64, device=self.device) for kind in (ID, COUNT, LAST_SEEN)}
        every = {kind: torch.cat([some[kind] for some in self._pending]) for kind in (ID, COUNT, LAST_SEEN)}
        ids, place = every[ID].unique(return_inverse=True)
        return {
            ID: ids,
            COUNT: torch.zeros_like(ids).index_add_(0, place, every[COUNT]),
            LAST_SEEN: torch.zeros_like(ids).scatter_reduce_(0, place, every[LAST_SEEN], reduce="amax"),
        }

    @torch.no_grad()
    def _look(self) -> None:
        arrived, self._pending = self.pending(), []
        if not len(arrived[ID]):
            return
        before = self.occupied
        # TorchRec's policies read the clock here.
        self._current_iter = self.clock
        self._update_and_evict(arrived[ID], arrived[COUNT], {"last_access_iter": arrived[LAST_SEEN]})
        admitted = len(self._evicted_emb_indices)
        self._trained[FLOWS.index("admitted")] += admitted
        self._trained[FLOWS.index("evicted")] += admitted - (self.occupied - before)

    def remap(
        self, features: dict[str, JaggedTensor], mutate_miss_lengths: bool = True, write_weights: Tensor | None = None
    ) -> dict[str, JaggedTensor]:
        """Rows of ids, and the count of those without one."""
        found, shared = super().remap(features), self.first_row + self._zch_size - 1
        counts = self._trained if self.training else self._evaluated
        for feature in found.values():
            counts[FLOWS.index("lookups")] += feature.values().numel()
            counts[FLOWS.index("collisions")] += (feature.values() == shared).sum()
        return found

    def first_vectors_of(self, rows: Tensor, dim: int) -> Tensor:
        """What the ids of these rows begin with, float32 `[n, dim]`, on the host.

        Args:
            rows: int64 `[n]`, counted from `first_row`.
        """
        ids = self.by_row()[ID][rows].cpu().numpy()
        return torch.from_numpy(first_vectors(ids, dim, *self.start))

    def by_row(self) -> dict[str, Tensor]:
        """What is kept of this rank's rows in their order, int64 `[rows]` for each of `kinds`; FREE is no id."""
        place = self._mch_remapped_ids_mapping - self.first_row
        sources = {ID: self._mch_sorted_raw_ids}
        sources |= {TORCHREC_NAMES[name]: tensor for name, tensor in self._mch_metadata.items()}
        return {kind: torch.empty_like(tensor).index_copy_(0, place, tensor) for kind, tensor in sources.items()}

    @torch.no_grad()
    def restore(self, by_row: dict[str, Tensor], pending: dict[str, Tensor], clock: int) -> None:
        """Become what was saved.

        Args:
            by_row: as `by_row` gave it; the last row is FREE.
            pending: as `pending` gave it.
            clock: steps that it had seen.
        """
        order = torch.argsort(by_row[ID], stable=True)
        self._mch_sorted_raw_ids.copy_(by_row[ID][order])
        self._mch_remapped_ids_mapping.copy_(order + self.first_row)
        for name, tensor in self._mch_metadata.items():
            tensor.copy_(by_row[TORCHREC_NAMES[name]][order])
        self._pending = [{kind: tensor.to(self.device) for kind, tensor in pending.items()}] if len(pending[ID]) else []
        self.clock, self._evicted = clock, False

    def worth(self, kept: dict[str, Tensor], clock: int) -> Tensor:
        """The policy's score of ids with these numbers; it keeps the higher ones."""
        policy = next(name for name, kind in POLICIES.items() if isinstance(self._eviction_policy, kind))
        decay = getattr(self._eviction_policy, "_decay_exponent", 1.0)
        return worth(policy, decay, clock, kept.get(COUNT), kept.get(LAST_SEEN))

    def counts(self, evaluated: bool) -> Tensor:
        """This rank's `IdCounts` in the order of its fields, of training or of evaluation."""
        flows = self._evaluated if evaluated else self._trained
        return torch.cat([torch.tensor([self._zch_size - 1, self.occupied], device=flows.device), flows])

    def forget_evaluation(self) -> None:
        self._evaluated.zero_()


POLICIES = {
    "lfu": LFU_EvictionPolicy,
    "lru": LRU_EvictionPolicy,
    "distance_lfu": DistanceLFU_EvictionPolicy,
}


def policy_of(config: ManagedConfig) -> MCHEvictionPolicy:
    kind = POLICIES[config.policy]
    return kind() if config.policy == "lfu" else kind(decay_exponent=config.decay)
