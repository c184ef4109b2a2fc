"""Canonical order: which rows make which global batch depends on seed, epoch and index alone."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_shards import schema

from dist_rec.data.index import Index
from dist_rec.data.order import Order, quotas, temperature_weights
from dist_rec.data.rows import Rows
from dist_rec.data.stream import Stream
from dist_rec.errors import UserError
from dist_rec.strict import from_dict, to_dict


@dataclass(frozen=True)
class Case:
    """A data set, as the block lengths of each domain, and how it is read.

    `times` are the first and last time of each domain's blocks.
    """

    blocks: tuple[tuple[int, ...], ...]
    times: tuple[tuple[tuple[int, int], ...], ...] | None = None
    streams: int = 8
    per_stream: int = 3
    window: int | None = 50
    arrangement: str = "shuffled"
    seed: int = 0
    weights: tuple[float, ...] | None = None
    drop_last: bool = False

    def index(self) -> Index:
        names = [f"d{i}" for i in range(len(self.blocks))]
        toy = schema({"x": {"role": "user", "kind": "dense"}}, domains=names)
        shards = []
        for domain, (name, lengths) in enumerate(zip(names, self.blocks, strict=True)):
            # Two blocks a shard, as a real data set has several of each.
            for first in range(0, len(lengths), 2):
                infos = [
                    {"name": f"{first + i}", "rows": n, "offset": 0, "bytes": 1, "crc32": 0}
                    | ({"time": self.times[domain][first + i]} if self.times else {})
                    for i, n in enumerate(lengths[first : first + 2])
                ]
                shards.append(
                    {"file": f"{name}-{first}.tar", "domain": name, "bytes": 1, "sha256": "", "blocks": infos}
                )
        tree = {"format": "dist_rec/1", "name": "toy", "split": "train", "schema": to_dict(toy)}
        return from_dict(Index, tree | {"statistics": {}, "label_counts": {}, "shards": shards}, "toy")

    def order(self) -> Order:
        return Order(
            self.index(),
            streams=self.streams,
            batch_size=self.streams * self.per_stream,
            window=self.window,
            arrangement=self.arrangement,
            seed=self.seed,
            weights=None if self.weights is None else list(self.weights),
            drop_last=self.drop_last,
        )

    def rank(self, rank: int = 0, world_size: int = 1) -> Stream:
        """A rank's stream over numbered rows instead of files."""
        index = self.index()
        return Stream(_Numbered(index), self.order(), rank=rank, world_size=world_size)

    @property
    def rows(self) -> int:
        return sum(map(sum, self.blocks))


class _Numbered:
    """Blocks whose rows know nothing but their number in the data set."""

    def __init__(self, index: Index) -> None:
        self.index = index
        lengths = [block.rows for shard in index.shards for block in shard.blocks]
        names = index.schema.domains.names
        self.domains = [names.index(shard.domain) for shard in index.shards for _ in shard.blocks]
        self.edges = np.cumsum([0, *lengths])

    def prefetch(self, numbers: list[int]) -> None:
        pass

    def rows(self, number: int) -> Rows:
        row = np.arange(self.edges[number], self.edges[number + 1])
        unknown = np.full(len(row), -1, np.int64)
        return Rows(
            domain=np.full(len(row), self.domains[number]),
            row=row,
            dense={},
            labels={"click": np.zeros(len(row), np.float32)},
            keys={"user": unknown, "query": unknown, "time": unknown},
        )


def read(case: Case, world_size: int = 1, epoch: int = 0) -> list[list[int]]:
    """The rows of every global batch, ranks one after another; checks what all ranks must share."""
    ranks = [case.rank(r, world_size) for r in range(world_size)]
    assert len({rank.steps for rank in ranks}) == len({rank.batch_rows for rank in ranks}) == 1
    steps = []
    for step in range(ranks[0].steps):
        batches = [rank.batch(epoch, step) for rank in ranks]
        assert {len(batch) for batch in batches} == {ranks[0].batch_rows}
        assert all((batch.row >= 0).equal(batch.valid) for batch in batches)
        steps.append([int(row) for batch in batches for row in batch.row[batch.valid]])
    return steps


def flat(steps: list[list[int]]) -> list[int]:
    return [row for step in steps for row in step]


LAYOUTS = {
    "more blocks than ranks": Case(((20, 20, 20, 7), (20, 3), (2,))),
    "fewer blocks than ranks": Case(((41,),), streams=5),
    "fewer rows than streams": Case(((1,), (2, 1)), streams=16, per_stream=1),
    "ragged blocks": Case(((1, 30, 2, 2, 9), (17,), (1,), (5, 5, 5)), streams=7, per_stream=4, window=21),
    "by time": Case(
        ((20, 20, 9), (3, 13), (1,)),
        times=(((0, 50), (50, 60), (90, 99)), ((0, 0), (20, 95)), ((60, 60),)),
        streams=7,
        arrangement="time",
    ),
    "small domain, uneven ranks": Case(((300, 300, 120), (200,)), streams=5, per_stream=10, window=200),
    "in order": Case(((20, 20, 9), (13,), (1,)), streams=6, window=None, arrangement="index"),
}


@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS)
def test_any_number_of_ranks_reads_every_row_once_and_the_same_global_batches(case):
    alone = read(case)
    assert Counter(flat(alone)) == Counter(range(case.rows))
    for world_size in (2, 3, 5):
        assert [sorted(step) for step in read(case, world_size)] == [sorted(step) for step in alone]


blocks = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5).map(tuple), min_size=1, max_size=4).map(tuple)


def drawn(data, arrangement: str, weighted: bool) -> Case:
    """Any layout, read in any way; times as a builder leaves them, or overlapping."""
    layout = data.draw(blocks)
    weight = st.sampled_from([0.0, 0.5, 1.0, 3.0])
    weights = st.tuples(*[weight] * len(layout)).filter(any)
    least = 1 if arrangement == "shuffled" else None
    return Case(
        layout,
        times=tuple(data.draw(spans(len(lengths))) for lengths in layout) if arrangement == "time" else None,
        streams=data.draw(st.integers(1, 9)),
        per_stream=data.draw(st.integers(1, 6)),
        window=data.draw(st.sampled_from([least, 1, 30, 1000])),
        arrangement=arrangement,
        seed=data.draw(st.integers(0, 3)),
        weights=data.draw(st.none() | weights) if weighted else None,
    )


@st.composite
def spans(draw, num: int) -> tuple[tuple[int, int], ...]:
    """First and last times of blocks."""
    if draw(st.booleans()):
        edges = sorted(draw(st.lists(st.integers(0, 60), min_size=2 * num, max_size=2 * num)))
        return tuple((edges[2 * i], edges[2 * i + 1]) for i in range(num))
    pairs = draw(st.lists(st.tuples(st.integers(-9, 60), st.integers(-9, 60)), min_size=num, max_size=num))
    return tuple((min(pair), max(pair)) for pair in pairs)


@pytest.mark.parametrize("arrangement", ["shuffled", "index", "time"])
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_every_layout_meets_its_quotas(arrangement, data):
    case = drawn(data, arrangement, weighted=arrangement != "time")
    layout = case.blocks
    order = case.order()
    seen = Counter(flat(read(case, data.draw(st.integers(1, case.streams)))))
    first = 0
    for lengths, quota, numbers in zip(layout, order.quotas, order.summary().values(), strict=True):
        rows = sum(lengths)
        times = [seen.pop(row, 0) for row in range(first, first + rows)]
        # As even as can be: no row is seen twice before all are seen once.
        assert sum(times) == quota and max(times) - min(times) <= 1
        assert numbers == {
            "rows": rows,
            "quota": quota,
            "repeated": max(quota - rows, 0),
            "left_out": max(rows - quota, 0),
        }
        first += rows
    assert not seen


def test_quotas_are_the_weights_shares():
    assert quotas([70, 20, 10], None) == [70, 20, 10]
    assert quotas([70, 20, 10], [1, 1, 1]) == [34, 33, 33]
    assert quotas([70, 20, 10], [0, 3, 1]) == [0, 23, 7]
    assert sum(quotas([10**9, 7, 3], [0.1, 0.7, 0.2])) == 10**9 + 10


@pytest.mark.parametrize("lengths", [(150,), (50, 50, 50)])
def test_a_domain_that_gives_some_of_its_rows_gives_others_in_the_next_epoch(lengths):
    """Also where it is one block, which no shuffle of blocks moves."""
    case = Case((lengths, (90,)), weights=(1.0, 3.0))
    assert case.order().quotas[0] < 150
    epochs = [{row for row in flat(read(case, 2, epoch)) if row < 150} for epoch in range(12)]
    assert epochs[0] != epochs[1]
    assert len(set.union(*epochs)) > 140


CASE = Case(((30, 30, 30, 11), (30, 9), (4,)), seed=3)


@pytest.mark.parametrize("case", [CASE, Case(((144,),))], ids=["many blocks", "one block"])
def test_epochs_and_seeds_differ_and_runs_do_not(case):
    first = read(case)
    assert read(case) == first
    for other in (read(case, epoch=1), read(replace(case, seed=4))):
        assert other != first and sorted(flat(other)) == sorted(flat(first))
        assert sum(a == b for a, b in zip(flat(first), flat(other), strict=True)) < case.rows / 4


def test_a_repeated_pass_has_an_order_of_its_own():
    order = Case(((1,) * 50, (1,) * 150), weights=(1.0, 1.0)).order()
    blocks = [piece.block for piece in order._axis_pieces(0, 0, 0, 100)]
    assert sorted(blocks[:50]) == sorted(blocks[50:]) == list(range(50)) and blocks[:50] != blocks[50:]
    assert sum(after - before == 1 for before, after in pairwise(blocks)) < 20


def test_shuffling_reaches_over_blocks_and_domains_keep_their_share():
    whole = flat(read(replace(CASE, window=10**6)))
    assert sum(abs(a - b) == 1 for a, b in zip(whole, whole[1:], strict=False)) < len(whole) / 5
    # 101, 39 and 4 rows: a batch of 24 holds about 16.8, 6.5 and 0.7 of them when windows are small.
    for step in read(replace(CASE, window=1))[:-1]:
        big, middle = sum(row < 101 for row in step), sum(101 <= row < 140 for row in step)
        assert 10 <= big <= 22 and 2 <= middle <= 13


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_in_time_order_a_batch_holds_the_next_earliest_rows(data):
    """Whatever the streams, the ranks and the window: against every row's interpolated time, sorted."""
    case = drawn(data, "time", weighted=False)
    wanted, row = [], 0
    for domain, (lengths, times) in enumerate(zip(case.blocks, case.times, strict=True)):
        for length, (first, last) in zip(lengths, times, strict=True):
            for i in range(length):
                moment = first + Fraction((last - first) * i, max(length - 1, 1))
                wanted.append((-(-moment.numerator // moment.denominator), domain, row))
                row += 1
    rank_of = {row: moment[:2] for row, moment in enumerate(wanted)}
    wanted.sort()
    batch = case.streams * case.per_stream
    steps = read(case, data.draw(st.integers(1, case.streams)))
    assert [len(step) for step in steps] == [len(wanted[i : i + batch]) for i in range(0, len(wanted), batch)]
    for step, first in zip(steps, range(0, len(wanted), batch), strict=True):
        # Rows of one second and domain go block by block, which this simple list does not know.
        assert sorted(rank_of[row] for row in step) == [moment[:2] for moment in wanted[first : first + batch]]
    other = replace(case, streams=1, per_stream=batch, window=7)
    assert [sorted(step) for step in read(other)] == [sorted(step) for step in steps]


def test_time_order_is_exact_within_a_domain_and_merges_late_blocks():
    # What was appended late (the last block) lies between rows of the first two.
    case = Case(((10, 10, 4),), times=(((0, 90), (100, 190), (85, 115)),), streams=1, per_stream=4, arrangement="time")
    assert [sorted(step) for step in read(case)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 20, 21],
        [10, 11, 22, 23],
        [12, 13, 14, 15],
        [16, 17, 18, 19],
    ]


def test_time_order_refuses_what_it_cannot_do():
    case = Case(((10, 10), (5,)), times=(((0, 9), None), ((3, 4),)), arrangement="time")
    with pytest.raises(UserError, match=r"d0-0.tar, block 1 has none: name the column in keys.time"):
        case.order()
    timed = replace(case, times=(((0, 9), (9, 20)), ((3, 4),)))
    with pytest.raises(UserError, match="data.weights or data.temperature ask for 8 of the 20 rows of domain 'd0'"):
        replace(timed, weights=(1.0, 2.0)).order()
    # Domains may be left out, and those need no times.
    chosen = replace(case, times=((None, None), ((3, 4),)), weights=(0.0, 5.0))
    assert sorted(flat(read(chosen))) == [20, 21, 22, 23, 24]


def test_a_billion_rows_open_and_seek_in_seconds():
    """500,000 blocks: every arrangement finds a window at 90 % of the epoch at once."""
    num, rng = 500_000, np.random.default_rng(0)
    case = Case(((1,), (1,)), times=(((0, 0),), ((0, 0),)))
    index = case.index()
    blocks, shards = [index.shards[0].blocks[0], index.shards[1].blocks[0]], []
    edges = np.sort(rng.integers(0, 10**8, num + 1)).tolist()
    infos = [replace(blocks[i % 2], rows=2_000, time=span) for i, span in enumerate(pairwise(edges))]
    for domain, shard in enumerate(index.shards):
        shards.append(replace(shard, blocks=infos[domain::2]))
    index = replace(index, shards=shards)
    for arrangement in ("shuffled", "index", "time"):
        start = time.perf_counter()
        order = Order(index, streams=8, batch_size=4_096, window=262_144, seed=0, arrangement=arrangement)
        before = order.windows(0, 5)
        at = int(np.searchsorted(before.sum(axis=1), order.steps * 9 // 10 * order.per_stream))
        pieces = order.window_pieces(0, 5, before[at], before[at + 1])
        place = order.arrangement(0, 5, at, before[at + 1] - before[at])
        assert sum(piece.stop - piece.start for piece in pieces) == len(place) == len(set(place.tolist()))
        assert order.steps == -(-num * 2_000 // 4_096) and time.perf_counter() - start < 20


def test_temperature_evens_domains_out():
    assert temperature_weights([100, 25, 0], 1.0) == [1.0, 0.25, 0.0]
    assert quotas([100, 25, 0], temperature_weights([100, 25, 0], 1.0)) == [100, 25, 0]
    assert temperature_weights([100, 25, 0], 2.0) == [1.0, 0.5, 0.0]
    assert quotas([100, 25, 0], temperature_weights([100, 25, 0], 1e9)) == [63, 62, 0]
    billion = [10**9, 10**9 - 1, 7]
    assert quotas(billion, temperature_weights(billion, 1.0)) == billion


@pytest.mark.parametrize("weights", [None, (1.0, 1.0, 1.0)])
def test_in_index_order_domains_are_read_as_they_stand(weights):
    case = replace(CASE, window=None, arrangement="index", weights=weights)
    # Stream after stream: each reads its own interval of every domain.
    rows, domains = [], []
    for number in range(case.streams):
        rank = case.rank(number, case.streams)
        for step in range(rank.steps):
            batch = rank.batch(0, step)
            rows += batch.row[batch.valid].tolist()
            domains += batch.domain[batch.valid].tolist()
    for domain, (start, length) in enumerate(((0, 101), (101, 39), (140, 4))):
        found = [row - start for row, d in zip(rows, domains, strict=True) if d == domain]
        assert found == [i % length for i in range(case.order().quotas[domain])]


def test_the_short_last_batch_is_dropped_or_masked():
    steps, dropped = read(CASE, 3), read(replace(CASE, drop_last=True), 3)
    assert [len(step) for step in dropped] == [24] * 6
    assert dropped == steps[:6] and len(steps) == 6
    ragged = replace(CASE, per_stream=4)
    steps, dropped = read(ragged, 3), read(replace(ragged, drop_last=True), 3)
    assert [len(step) for step in steps] == [32] * 4 + [16]
    assert dropped == steps[:4]
    # Streams of 6 and of 7 rows: nobody has a full batch of 7 unless all have.
    assert read(Case(((51,),), per_stream=7, drop_last=True), 2) == []


TIMED = replace(CASE, times=(((0, 9), (9, 9), (10, 40), (40, 41)), ((-5, 30), (30, 30)), ((7, 50),)))


@pytest.mark.parametrize("arrangement", ["shuffled", "index", "time"])
@pytest.mark.parametrize("window", [1, 5, 60, 1000])
def test_skipping_to_a_step_equals_reading_up_to_it(window, arrangement):
    case = replace(TIMED, window=window, arrangement=arrangement)
    for rank, world_size in ((0, 1), (2, 3)):
        read_on = case.rank(rank, world_size)
        for epoch in (0, 1):
            for step in range(read_on.steps):
                there = case.rank(rank, world_size).batch(epoch, step)
                assert read_on.batch(epoch, step).row.equal(there.row)


def test_more_ranks_than_streams_are_refused():
    with pytest.raises(UserError, match=r"9 ranks need at least as many logical streams, data.streams is 8"):
        CASE.rank(0, 9)
