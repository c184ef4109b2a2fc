"""The search: an option for every table and ranks for its shards, so that the slowest rank is as fast as can be.

Knows numbers only: costs, bytes and kinds of placement. The same input gives the same answer in every process.

A plan's time is that of its slowest rank, and no option in it costs a rank more than that. So the search tries
ceilings: under each, every table takes the option that is least work for all ranks together, and the shards are packed,
the costliest first, each on the least busy ranks that have room. The best packings are improved by moving what lies on
their slowest rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..tables import DATA_PARALLEL
from .options import Option

# Ceilings tried, and what work on some ranks counts against work on all of them: 1 where ranks are equally busy, 0
# where most have nothing to do.
CEILINGS = 64
SHARES = (1.0, 0.5, 0.1, 0.0)
# What memory counts against time, raised while nothing fits.
MEMORY_PRICES = (0.0, 0.3, 3.0, 1e6)
# How many packings are improved, until one is this near to the lower bound. The best of them is then shaken, so many
# tables at once, and improved again, until so many placements have been tried in all, or so many since the last gain:
# the bound is loose where tables are few, and is then never reached.
IMPROVED = 8
NEAR = 1.0005
SHAKEN = 2
FEWEST_TRIALS, TRIALS_A_TABLE, MOST_TRIALS = 4_000, 300, 16_000
PATIENCE = 2_000
# Of a time: what is less is rounding.
ROUNDING = 1e-9

EVERYWHERE = ("row_wise", DATA_PARALLEL)
ANYWHERE = ("table_wise", "column_wise")


class Full(Exception):
    """`option`'s shards find no room beside what `ranks` have already; `table` is its number."""

    def __init__(self, table: int, option: Option, ranks: Ranks) -> None:
        super().__init__(option.table)
        self.table, self.option, self.ranks = table, option, ranks


class Item:
    """An option as numbers: milliseconds of a shard, bytes of device and host and share of both memories by shard."""

    def __init__(self, option: Option, capacity: tuple[int, int]) -> None:
        self.option = option
        self.kind = option.sharding_type
        self.ms = option.cost.total
        self.shards = option.num_shards
        self.bytes = np.stack([option.device_bytes, option.host_bytes])
        self.peak = self.bytes.max(axis=1, keepdims=True)
        self.filled = (self.bytes / np.maximum(capacity, 1)[:, None]).sum(axis=0)


class Ranks:
    """What lies on every rank: milliseconds and share of memory `[ranks]`; bytes of device and host `[2, ranks]`."""

    def __init__(self, hosts: int, ranks_per_host: int, capacity: tuple[int, int]) -> None:
        self.hosts, self.local = hosts, ranks_per_host
        self.capacity = np.array(capacity, dtype=np.int64)[:, None]
        self.ms = np.zeros(hosts * ranks_per_host)
        self.bytes = np.zeros((2, hosts * ranks_per_host), dtype=np.int64)
        self.filled = np.zeros(hosts * ranks_per_host)

    def add(self, item: Item, ranks: np.ndarray, sign: int = 1) -> None:
        if item.kind == "grid_shard":
            # Two columns of a grid may share a host.
            np.add.at(self.ms, ranks, sign * item.ms)
            np.add.at(self.bytes, (slice(None), ranks), sign * item.bytes)
            np.add.at(self.filled, ranks, sign * item.filled)
        else:
            self.ms[ranks] += sign * item.ms
            self.bytes[:, ranks] += sign * item.bytes
            self.filled[ranks] += sign * item.filled

    def room(self, item: Item) -> np.ndarray:
        """Of every rank, whether a shard fits, the largest that there is. Bool `[ranks]`."""
        return (self.bytes <= self.capacity - item.peak).all(axis=0)

    def place(self, item: Item, by_memory: bool = False) -> np.ndarray | None:
        """The least busy ranks, or the emptiest, for an option's shards in their order; None if they do not fit."""
        room = self.room(item)
        if item.kind in EVERYWHERE:
            return np.arange(len(self.ms)) if room.all() else None
        # Of equally busy ranks the emptier one.
        busy = self.filled if by_memory else self.ms + ROUNDING * self.filled
        busy = np.where(room, busy, np.inf)
        if item.kind in ANYWHERE:
            ranks = busy.argmin()[None] if item.shards == 1 else np.argsort(busy, kind="stable")[: item.shards]
            return ranks if np.isfinite(busy[ranks]).all() else None
        by_host = busy.reshape(self.hosts, self.local)
        if item.kind == "table_column_wise":
            order = np.argsort(by_host, axis=1, kind="stable")[:, : item.shards]
            last = np.take_along_axis(by_host, order, axis=1).max(axis=1)
            host = int(last.argmin())
            return host * self.local + order[host] if np.isfinite(last[host]) else None
        return self._whole_hosts(item, by_host.max(axis=1))

    def _whole_hosts(self, item: Item, busy: np.ndarray) -> np.ndarray | None:
        """A host for every column of shards, each another as long as there are any."""
        columns = item.shards // self.local
        hosts = np.resize(np.argsort(busy, kind="stable"), columns)
        ranks = (hosts[:, None] * self.local + np.arange(self.local)).ravel()
        if not np.isfinite(busy[hosts]).all():
            return None
        if columns > self.hosts:
            # More than one column on a host: `room` was asked for one.
            need = np.zeros_like(self.bytes)
            np.add.at(need, (slice(None), ranks), item.bytes)
            if not (self.bytes + need <= self.capacity).all():
                return None
        return ranks


@dataclass
class Packing:
    """An option number and ranks of every table."""

    chosen: list[int]
    ranks: list[np.ndarray]
    load: Ranks

    @property
    def ms(self) -> float:
        return float(self.load.ms.max())


class Search:
    """Tables with their options, and ranks of equal capacity.

    Args:
        options: of every table; there may be none.
        capacity: bytes of device and of host that one rank has for tables.
    """

    def __init__(self, options: list[list[Option]], hosts: int, ranks_per_host: int, capacity: tuple[int, int]) -> None:
        self.hosts, self.local, self.capacity = hosts, ranks_per_host, capacity
        self.items = [[Item(option, capacity) for option in several] for several in options]
        shape = len(options), max(map(len, options), default=1)
        world = hosts * ranks_per_host
        room = np.maximum(np.array(capacity, dtype=float), 1)
        # Of every table's options; the cost is infinite where there is none or where a shard is larger than a rank.
        self.cost = np.full(shape, np.inf)
        self.work, self.memory, self.peak = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.everywhere = np.zeros(shape, dtype=bool)
        for t, several in enumerate(self.items):
            for o, item in enumerate(several):
                if (item.peak[:, 0] <= capacity).all():
                    self.cost[t, o] = item.ms
                    self.work[t, o] = item.ms * item.shards / world
                    self.memory[t, o] = (item.bytes.sum(axis=1) / room).max() / world
                    self.peak[t, o] = (item.peak[:, 0] / room).max()
                    self.everywhere[t, o] = item.kind in EVERYWHERE

    @cached_property
    def ceilings(self) -> np.ndarray:
        """What the costliest shard of a plan may cost, of those that are not everywhere; ascending."""
        placed = np.where(self.everywhere, np.inf, self.cost)
        ceilings = np.unique(np.append(placed[np.isfinite(placed)], 0.0))
        # Under a lower one some table would have no option left.
        lowest = np.where(self.everywhere, np.minimum(self.cost, 0.0), placed).min(axis=1)
        return ceilings[ceilings >= lowest.max(initial=0.0)]

    @cached_property
    def bound(self) -> float:
        """Milliseconds that no plan can beat.

        Let the costliest shard cost c, of those that are not everywhere. Then what must be everywhere adds to c, and
        no rank does less than an even share of the least work that there is under c.
        """
        least = np.inf
        always = np.where(self.everywhere, self.cost, np.inf).min(axis=1)
        for ceiling in self.ceilings:
            under = self.everywhere | (self.cost <= ceiling)
            even = np.where(under & np.isfinite(self.cost), self.work, np.inf).min(axis=1).sum()
            forced = always[~(under & ~self.everywhere).any(axis=1)].sum()
            least = min(least, max(even, ceiling + forced))
        return float(least)

    def run(self) -> Packing:
        """The best plan found.

        Raises:
            Full: none fits.
        """
        for table, row in enumerate(np.isfinite(self.cost)):
            if not row.any():
                smallest = min(self.items[table], key=lambda item: int(item.peak.sum()))
                raise Full(table, smallest.option, Ranks(self.hosts, self.local, self.capacity))
        for price in MEMORY_PRICES:
            packings = self._packings(price)
            if packings:
                break
        else:
            packings = [self._thrifty()]
        packings.sort(key=lambda packing: packing.ms)
        self._trials = min(max(TRIALS_A_TABLE * len(self.items), FEWEST_TRIALS), MOST_TRIALS)
        best = packings[0]
        for packing in packings[:IMPROVED]:
            self._improve(packing)
            best = min(best, packing, key=lambda packing: packing.ms)
            if self._done(best):
                break
        random = np.random.default_rng(0)
        gained = self._trials
        while not self._done(best) and gained - self._trials < PATIENCE:
            other = self._shaken(best, random)
            self._improve(other)
            if other.ms < best.ms * (1 - ROUNDING):
                best, gained = other, self._trials
        return self._loaded(best)

    def _done(self, packing: Packing) -> bool:
        return self._trials <= 0 or packing.ms <= NEAR * self.bound

    def _shaken(self, packing: Packing, random: np.random.Generator) -> Packing:
        """The same with some tables cut and placed in another way, where that fits."""
        again = self._loaded(packing)
        for table in random.choice(len(self.items), min(SHAKEN, len(self.items)), replace=False):
            number = random.choice(np.flatnonzero(np.isfinite(self.cost[table])))
            self._change(again, table, number, None)
        # A table that cannot be placed otherwise is a trial, too.
        self._trials -= SHAKEN
        return again

    def _change(self, packing: Packing, table: int, number: int, ranks: np.ndarray | None) -> None:
        """Give a table another option on these ranks, or where it is placed best if it fits at all."""
        old = self.items[table][packing.chosen[table]]
        packing.load.add(old, packing.ranks[table], -1)
        ranks = packing.load.place(self.items[table][number]) if ranks is None else ranks
        if ranks is None:
            packing.load.add(old, packing.ranks[table])
            return
        packing.load.add(self.items[table][number], ranks)
        packing.chosen[table], packing.ranks[table] = int(number), ranks

    def _loaded(self, packing: Packing) -> Packing:
        """The same with loads summed up afresh, without what moves left of rounding."""
        load = Ranks(self.hosts, self.local, self.capacity)
        for several, number, ranks in zip(self.items, packing.chosen, packing.ranks, strict=True):
            load.add(several[number], ranks)
        return Packing(list(packing.chosen), list(packing.ranks), load)

    def _packings(self, price: float) -> list[Packing]:
        """The choices packed, the most promising first, until the others cannot become better."""
        choices = {chosen.tobytes(): chosen for chosen in self._choices(price)}
        packings: list[Packing] = []
        best = np.inf
        for least, chosen in sorted(((self._least(c), c) for c in choices.values()), key=lambda pair: pair[0]):
            if least > best or best <= NEAR * self.bound:
                break
            try:
                packings.append(self._pack(chosen))
            except Full:
                continue
            best = min(best, packings[-1].ms)
        return packings

    def _least(self, chosen: np.ndarray) -> float:
        """Milliseconds that no packing of these options can beat."""
        tables = np.arange(len(chosen))
        cost, everywhere = self.cost[tables, chosen], self.everywhere[tables, chosen]
        return max(self.work[tables, chosen].sum(), cost[everywhere].sum() + cost[~everywhere].max(initial=0.0))

    def _choices(self, price: float) -> Iterator[np.ndarray]:
        """Option numbers of all tables, under every ceiling and share of work."""
        picked = np.unique(np.linspace(0, len(self.ceilings) - 1, CEILINGS).round().astype(int))
        # Memory is a share; in these milliseconds a full cluster counts as much as a step.
        memory = price * self.bound * self.memory
        for share in SHARES:
            score = np.where(self.everywhere, self.work, share * self.work) + memory
            for ceiling in self.ceilings[picked]:
                placed = ~self.everywhere & (self.cost <= ceiling)
                for everywhere in (self.everywhere, self.everywhere & (self.cost <= ceiling)):
                    under = np.where((placed | everywhere) & np.isfinite(self.cost), score, np.inf)
                    if np.isfinite(under).any(axis=1).all():
                        yield under.argmin(axis=1)

    def _pack(self, chosen: np.ndarray, by_memory: bool = False) -> Packing:
        """Pack these options, what is everywhere first, then the largest.

        Raises:
            Full: a table finds no room.
        """
        tables = np.arange(len(chosen))
        size = self.peak[tables, chosen] if by_memory else self.cost[tables, chosen]
        order = np.lexsort((tables, -size, ~self.everywhere[tables, chosen]))
        load = Ranks(self.hosts, self.local, self.capacity)
        ranks: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(chosen)
        for table in order.tolist():
            item = self.items[table][chosen[table]]
            placed = load.place(item, by_memory)
            if placed is None:
                raise Full(table, item.option, load)
            load.add(item, placed)
            ranks[table] = placed
        return Packing(chosen.tolist(), ranks, load)

    def _thrifty(self) -> Packing:
        """What takes the least memory, whatever its time.

        Raises:
            Full: not even this fits.
        """
        least, evenest = (np.where(np.isfinite(self.cost), m, np.inf).argmin(axis=1) for m in (self.memory, self.peak))
        try:
            return self._pack(least, by_memory=True)
        except Full:
            return self._pack(evenest, by_memory=True)

    def _improve(self, packing: Packing) -> None:
        """Move and exchange what lies on the slowest rank while that helps."""
        while not self._done(packing):
            slowest = int(packing.load.ms.argmax())
            here = [t for t, ranks in enumerate(packing.ranks) if slowest in ranks]
            best, move = _height(packing.load), None
            for table in here:
                old = self.items[table][packing.chosen[table]]
                packing.load.add(old, packing.ranks[table], -1)
                for number, item in enumerate(self.items[table]):
                    if not np.isfinite(self.cost[table, number]):
                        continue
                    self._trials -= 1
                    placed = packing.load.place(item)
                    if placed is not None:
                        packing.load.add(item, placed)
                        height = _height(packing.load)
                        packing.load.add(item, placed, -1)
                        if _lower(height, best):
                            best, move = height, (table, number, placed)
                packing.load.add(old, packing.ranks[table])
            if move is not None:
                self._change(packing, *move)
            elif not self._exchange(packing, slowest, here):
                break

    def _exchange(self, packing: Packing, slowest: int, here: list[int]) -> bool:
        """Exchange a shard of the slowest rank for a cheaper one of another rank; whether that helped."""
        load, found, best = packing.load, None, packing.ms * (1 - ROUNDING)
        movable = [
            (t, i, int(rank))
            for t, ranks in enumerate(packing.ranks)
            if self.items[t][packing.chosen[t]].kind in ANYWHERE
            for i, rank in enumerate(ranks)
        ]
        for table in here:
            mine = self.items[table][packing.chosen[table]]
            if mine.kind not in ANYWHERE:
                continue
            for other, shard, rank in movable:
                theirs = self.items[other][packing.chosen[other]]
                gain = mine.ms - theirs.ms
                if rank == slowest or gain <= 0 or max(load.ms[slowest] - gain, load.ms[rank] + gain) >= best:
                    continue
                if rank in packing.ranks[table] or slowest in packing.ranks[other]:
                    continue
                more = mine.peak[:, 0] - theirs.peak[:, 0]
                fits = (load.bytes[:, rank] + more <= self.capacity).all()
                if fits and (load.bytes[:, slowest] - more <= self.capacity).all():
                    best = max(load.ms[slowest] - gain, load.ms[rank] + gain)
                    found = table, other, shard, rank
        if found is None:
            return False
        table, other, shard, rank = found
        for t, index, to in (
            (table, int(np.flatnonzero(packing.ranks[table] == slowest)[0]), rank),
            (other, shard, slowest),
        ):
            item = self.items[t][packing.chosen[t]]
            load.add(item, packing.ranks[t], -1)
            packing.ranks[t] = packing.ranks[t].copy()
            packing.ranks[t][index] = to
            load.add(item, packing.ranks[t])
        return True


def _height(load: Ranks) -> tuple[float, int]:
    """Milliseconds of the slowest rank, and how many are as slow."""
    top = float(load.ms.max())
    return top, int((load.ms >= top * (1 - ROUNDING)).sum())


def _lower(one: tuple[float, int], other: tuple[float, int]) -> bool:
    if one[0] < other[0] * (1 - ROUNDING):
        return True
    return one[0] <= other[0] * (1 + ROUNDING) and one[1] < other[1]
