"""What to change where nothing fits: every way is read, planned as the user would, and told only if it does fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from ..config.model import VOCABULARY_KEYS
from ..embeddings.clusters import MOST_RANKS, THIS_MACHINE, Cluster, find_cluster, this_machine
from ..embeddings.planner import DoesNotFit
from ..embeddings.sharders import COLUMN_STEP, check_kernels
from ..embeddings.tables import DATA_PARALLEL, TableSpec
from ..errors import UserError
from ..training.dense_cost import STAGES, Dense, count_dense
from ..training.planning import plan_tables
from .answer import GIB, Answer, TooDense, WayOut
from .request import Request, row_bytes
from .room import could_fit

# Below this many ways, two things are changed at once.
ENOUGH = 3
# Of the largest size that the bytes alone allow, what is tried, one after the other.
SHARES = (1.0, 15 / 16, 7 / 8, 3 / 4, *(2.0**-power for power in range(1, 11)))
# Of a batch.
HALVES = tuple(2.0**-power for power in range(1, 64))
# Numbers of ranks that are planned, of those that the bytes alone allow.
MOST_PLANNED = 4
# Digits of a number of rows that is proposed.
DIGITS = 3
WHERE = {
    "fused": "in the device's memory",
    "fused_uvm_caching": "in the host's memory, cached on the device",
    "fused_uvm": "in the host's memory",
}
# To which kernels a table may be moved from its own, by the memory that is short.
MOVES = {
    ("device", "fused"): ("fused_uvm_caching", "fused_uvm"),
    ("device", "fused_uvm_caching"): ("fused_uvm",),
    ("host", "fused_uvm"): ("fused",),
    ("host", "fused_uvm_caching"): ("fused",),
}

# Names what is tried, and tries it.
Try = tuple[str, Callable[[], WayOut | None]]


def ways_out(answer: Answer) -> tuple[list[WayOut], list[str]]:
    """Changes under which the request fits, with what it then takes; and what was tried in vain.

    Each is of one thing; where that gives less than three, of two.
    """
    search = _Search(answer)
    dense = isinstance(answer.failure, TooDense)
    ways, tried = [], []
    singles, pairs = search.of_tables(), search.pairs_of_tables()
    if dense:
        singles, pairs = search.of_dense(), search.pairs_of_dense()
    for number, tries in enumerate((singles, pairs)):
        for what, attempt in tries:
            if number and len(ways) >= ENOUGH:
                break
            way = attempt()
            if way is None:
                tried.append(what)
            elif not any(_contains(way, other) for other in ways):
                ways.append(way)
    return ways, tried


class _Search:
    """Ways out of one answer."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.request, self.cluster = answer.request, answer.cluster
        self.config = self.request.config
        self.short = answer.memory if isinstance(answer.failure, TooDense) else answer.failure.memory
        self._counted: dict[str, Dense] = {}

    # One change, as the user would make it

    def way(self, change: str, settings: dict[str, str], cluster: Cluster | None = None) -> WayOut | None:
        """The change if it can be made and then fits."""
        moved = cluster is not None
        cluster = cluster or self.cluster
        try:
            request = self.request.with_settings(settings) if settings else self.request
            if not could_fit(request, cluster):
                return None
            check_kernels(request.specs, cluster.device)
            dense = self._dense(request)
            rows = request.batch_rows(cluster.ranks)
            needed = dense.rank_bytes(dense.stage, cluster.ranks, rows)
            if needed >= cluster.memory_of_a_rank():
                return None
            planned = plan_tables(request, cluster, dense)
        except UserError:
            return None
        of_device = self.short == "device"
        load = planned.per_rank.device_bytes if of_device else planned.per_rank.host_bytes
        reserved = dense.reserved(cluster, rows)
        beside = reserved.device if of_device else reserved.host
        options = [f"--set {key}={value}" for key, value in settings.items()]
        # More hosts like this one are no option of the command: it plans for this one alone.
        setting = None if moved and self.here else " ".join(options + ([f"--world {cluster.ranks}"] if moved else []))
        if setting is None and options:
            change = f"{change} ({' '.join(options)})"
        replaced = [given for key in settings if (given := self.request.source.given(key)) is not None]
        capacity = planned.capacity[0 if of_device else 1] + beside
        return WayOut(change, setting, replaced, self.short, int(load.max()) + beside, capacity, planned.rated_ms)

    @property
    def here(self) -> bool:
        return self.answer.spec.rpartition("x")[2] == THIS_MACHINE

    def _dense(self, request: Request) -> Dense:
        """Counted once for all requests whose dense model is one."""
        config = request.config
        widths = [(spec.name, spec.dim) for spec in request.specs]
        key = repr((config.model, config.text, config.dense, widths))
        if key not in self._counted:
            self._counted[key] = count_dense(request)
        return self._counted[key]

    # Ranks

    def more_ranks(self, change: str = "", settings: dict[str, str] | None = None) -> WayOut | None:
        """The fewest of some larger numbers of ranks that fit, with `settings` too if given."""
        try:
            request = self.request.with_settings(settings) if settings else self.request
        except UserError:
            return None
        planned = 0
        for cluster in self._larger():
            if not could_fit(request, cluster):
                continue
            if self.here:
                what = f"start it on {cluster.hosts} such hosts, {cluster.ranks} ranks instead of {self.cluster.ranks}"
            else:
                what = f"{cluster.ranks} ranks instead of {self.cluster.ranks}"
            found = self.way(f"{change} and {what}" if change else what, settings or {}, cluster)
            planned += 1
            if found is not None or planned == MOST_PLANNED:
                return found
        return None

    def _larger(self) -> Iterator[Cluster]:
        """Twice as many ranks, and so on, by the route of `--world`; hosts like this one where it is this."""
        now = self.cluster.ranks
        if self.here:
            while (now := now * 2) <= MOST_RANKS:
                yield this_machine(now, self.cluster.device, self.cluster.ranks_per_host)
            return
        try:
            host = find_cluster(re.sub(r"^\d+\s*[x×]\s*", "", self.answer.spec)).ranks_per_host
        except UserError:  # a name that `--cluster` does not take
            return
        doubled = {start << power for start in (now, host) for power in range(MOST_RANKS.bit_length())}
        for ranks in sorted(doubled):
            if now < ranks <= MOST_RANKS:
                try:
                    yield find_cluster(self.answer.spec, ranks)
                except UserError:  # they do not fill their hosts
                    continue

    # Tables

    def of_tables(self) -> Iterator[Try]:
        names = self._tables()
        yield "more ranks", self.more_ranks
        cut = [s for s in names if s.sharding not in ("auto", "row_wise")]
        if cut:
            yield (
                f"row_wise for {_list(cut)}",
                lambda: _first(
                    self.way(
                        f"{s.name} cut row_wise instead of {s.sharding}", {f"tables.{s.name}.sharding": "row_wise"}
                    )
                    for s in cut
                ),
            )
        yield f"a smaller dim of {_list(names)}", lambda: _first(self.smaller(s, "dim") for s in names)
        half = [s for s in names if s.precision == "fp32" and s.sharding != DATA_PARALLEL]
        if half:
            yield (
                f"fp16 for {_list(half)} or all",
                lambda: _first(self.way(*change) for change in (*(_half(s) for s in half), self._all_half())),
            )
        moved = [s for s in names if self._kernels(s)]
        if moved:
            yield (
                f"another memory for {_list(moved)}",
                lambda: _first(
                    self.way(f"{s.name} {WHERE[kernel]}", {f"tables.{s.name}.kernel": kernel})
                    for s in moved
                    for kernel in self._kernels(s)
                ),
            )
        counted = [s for s in names if self._rows_key(s)]
        if counted:
            yield f"fewer rows of {_list(counted)}", lambda: _first(self.smaller(s, "rows") for s in counted)

    def pairs_of_tables(self) -> Iterator[Try]:
        names = self._tables()
        for s in (s for s in names if s.sharding not in ("auto", "row_wise")):
            change, settings = f"{s.name} cut row_wise", {f"tables.{s.name}.sharding": "row_wise"}
            yield f"{change} and more ranks", lambda c=change, v=settings: self.more_ranks(c, v)
            yield f"{change} and a smaller dim", lambda s=s, c=change, v=settings: self.smaller(s, "dim", c, v)
            if self._rows_key(s):
                yield f"{change} and fewer rows", lambda s=s, c=change, v=settings: self.smaller(s, "rows", c, v)
        for s in names:
            for dim in dict.fromkeys(_multiple(s.dim // part, COLUMN_STEP) for part in (2, 4, 8)):
                if COLUMN_STEP <= dim < s.dim:
                    change, settings = (
                        f"{s.name} of {dim} instead of {s.dim} columns",
                        {f"tables.{s.vocabulary}.dim": f"{dim}"},
                    )
                    yield f"{change} and more ranks", lambda c=change, v=settings: self.more_ranks(c, v)
        for s in (s for s in names if s.precision == "fp32" and s.sharding != DATA_PARALLEL):
            change, settings = _half(s)
            yield f"{change} and more ranks", lambda c=change, v=settings: self.more_ranks(c, v)
            yield f"{change} and a smaller dim", lambda s=s, c=change, v=settings: self.smaller(s, "dim", c, v)
            if self._rows_key(s):
                yield f"{change} and fewer rows", lambda s=s, c=change, v=settings: self.smaller(s, "rows", c, v)
        for s in names:
            for kernel in self._kernels(s)[-1:]:
                change, settings = f"{s.name} {WHERE[kernel]}", {f"tables.{s.name}.kernel": kernel}
                yield f"{change} and more ranks", lambda c=change, v=settings: self.more_ranks(c, v)
        yield "smaller batches", self.smaller_batch

    def _tables(self) -> list[TableSpec]:
        """The table that found no room, and the largest."""
        failure: DoesNotFit = self.answer.failure
        optimizer = self.config.tables.optimizer
        blamed = next(s for s in self.request.specs if s.name == failure.table)
        largest = max(self.request.specs, key=lambda s: s.rows * row_bytes(s, optimizer))
        return [blamed] if largest.name == blamed.name else [blamed, largest]

    def _kernels(self, spec: TableSpec) -> tuple[str, ...]:
        """Those that leave the memory that is short."""
        if self.cluster.device != "cuda" or spec.sharding == DATA_PARALLEL:
            return ()
        return MOVES.get((self.short, spec.kernel), ())

    def _rows_key(self, spec: TableSpec) -> str | None:
        """What a table's rows are set by; None where fewer are not to be had, for ids are known to need them."""
        if any(s.vocabulary == spec.vocabulary and s is not spec for s in self.request.specs):
            return None
        override = self.config.tables.overrides.get(spec.name)
        own = [key for key in VOCABULARY_KEYS if override is not None and getattr(override, key) is not None]
        return {"size": None}.get(own[0], own[0]) if own else "hash"

    def _all_half(self) -> tuple[str, dict[str, str]]:
        overrides = self.config.tables.overrides
        settings = {"tables.precision": "fp16"}
        for spec in self.request.specs:
            own = overrides[spec.name].precision if spec.name in overrides else None
            if spec.sharding == DATA_PARALLEL:
                settings |= {f"tables.{spec.name}.precision": "fp32"} if own is None else {}
            elif own == "fp32":
                settings[f"tables.{spec.name}.precision"] = "fp16"
        return "all tables in fp16" + (" but copied ones" if "fp32" in settings.values() else ""), settings

    def smaller(self, spec: TableSpec, field: str, change: str = "", settings: dict[str, str] | None = None):
        """A smaller size of the table that fits, near the largest that the bytes alone allow."""
        key = self._rows_key(spec) if field == "rows" else field
        step = COLUMN_STEP if field == "dim" else 1
        size = getattr(spec, field)
        try:
            request = self.request.with_settings(settings) if settings else self.request
        except UserError:
            return None
        low, high = 0, size // step
        while low + 1 < high:
            middle = (low + high) // 2
            # A vocabulary's parts have one dim, and none of them another number of rows.
            parts = [s.name for s in request.specs if s.vocabulary == spec.vocabulary]
            fits = could_fit(request.with_tables({name: {field: middle * step} for name in parts}), self.cluster)
            low, high = (middle, high) if fits else (low, middle)
        values = [_multiple(int(low * step * share), step) for share in SHARES]
        if field == "rows":
            values = [_rounded(value) for value in values]
        for value in dict.fromkeys(values):
            if 0 < value < size:
                what = f"{spec.name} of {value:,} instead of {size:,} {'columns' if field == 'dim' else 'rows'}"
                what = f"{change} and {what}" if change else what
                found = self.way(what, (settings or {}) | {f"tables.{spec.vocabulary}.{key}": str(value)})
                if found is not None:
                    return found
        return None

    def smaller_batch(self, change: str = "", settings: dict[str, str] | None = None) -> WayOut | None:
        size, streams = self.config.data.batch_size, self.config.data.streams
        for batch in dict.fromkeys(_multiple(int(size * share), streams) for share in HALVES):
            if 0 < batch < size:
                what = f"batches of {batch:,} instead of {size:,} rows"
                what = f"{change} and {what}" if change else what
                found = self.way(what, (settings or {}) | {"data.batch_size": str(batch)})
                if found is not None:
                    return found
        return None

    # The dense model

    def of_dense(self) -> Iterator[Try]:
        dense = self.config.dense
        for stage in STAGES[dense.zero_stage + 1 :]:
            yield f"ZeRO {stage}", lambda stage=stage: self.way(f"ZeRO {stage}", {"dense.zero_stage": str(stage)})
        if dense.precision == "fp32" and dense.zero_stage > 0:
            half = {"dense.precision": "bf16"}
            yield "bf16 for the dense model", lambda: self.way("the dense model in bf16", half)
        yield "more ranks", self.more_ranks
        yield "smaller batches", self.smaller_batch
        yield "smaller dims of tables", self._smaller_dims
        yield "a narrower model", self._narrower

    def pairs_of_dense(self) -> Iterator[Try]:
        full = {"dense.zero_stage": str(STAGES[-1])}
        if self.config.dense.zero_stage == STAGES[-1]:
            full = {"dense.precision": "bf16"}
        change = "ZeRO 3" if "dense.zero_stage" in full else "the dense model in bf16"
        yield f"{change} and more ranks", lambda: self.more_ranks(change, full)
        yield f"{change} and smaller batches", lambda: self.smaller_batch(change, full)
        size, streams = self.config.data.batch_size, self.config.data.streams
        for batch in (_multiple(size // part, streams) for part in (4, 64, 1024)):
            if batch:
                less, settings = f"batches of {batch:,} instead of {size:,} rows", {"data.batch_size": str(batch)}
                yield f"{less} and more ranks", lambda c=less, v=settings: self.more_ranks(c, v)

    def _smaller_dims(self) -> WayOut | None:
        """The widest that all tables may be: the towers' first matrices have a row a column of theirs."""
        tables = self.config.tables
        widest = max(spec.dim for spec in self.request.specs)
        for share in SHARES[1:]:
            dim = _multiple(int(widest * share), COLUMN_STEP)
            if dim < COLUMN_STEP:
                return None
            settings = {"tables.dim": str(dim)} if tables.dim > dim else {}
            own = {name: override.dim for name, override in tables.overrides.items() if override.dim is not None}
            settings |= {f"tables.{name}.dim": str(dim) for name, old in own.items() if old > dim}
            found = (
                self.way(f"no table wider than {dim:,} instead of {widest:,} columns", settings) if settings else None
            )
            if found is not None:
                return found
        return None

    def _narrower(self) -> WayOut | None:
        width = self.config.model.width
        for narrower in (width >> power for power in range(1, width.bit_length())):
            found = self.way(f"a model of width {narrower:,} instead of {width:,}", {"model.width": str(narrower)})
            if found is not None:
                return found
        return None


def _contains(way: WayOut, other: WayOut) -> bool:
    """Whether a way does all that another does, which is then enough."""
    return None not in (way.setting, other.setting) and _parts(other.setting) <= _parts(way.setting)


def _parts(setting: str) -> set[str]:
    return {part.strip() for part in setting.split("--")}


def _half(spec: TableSpec) -> tuple[str, dict[str, str]]:
    return f"{spec.name} in fp16", {f"tables.{spec.name}.precision": "fp16"}


def _first(ways: Iterator[WayOut | None]) -> WayOut | None:
    return next((way for way in ways if way is not None), None)


def _list(specs: list[TableSpec]) -> str:
    return " or ".join(spec.name for spec in specs)


def _multiple(value: int, step: int) -> int:
    return value // step * step


def _rounded(rows: int) -> int:
    """Down to a few digits."""
    unit = 10 ** max(len(str(rows)) - DIGITS, 0)
    return _multiple(rows, unit)


def failure_in_words(answer: Answer) -> str:
    """Which table, how many GiB too many, on which rank."""
    failure = answer.failure
    if isinstance(failure, TooDense):
        return f"{failure}."
    spec = next(s for s in answer.request.specs if s.name == failure.table)
    everywhere = " (as on every rank)" if failure.option.num_shards >= answer.cluster.ranks > 1 else ""
    return (
        f"{spec.name} ({spec.rows:,} x {spec.dim}, {spec.precision}) does not fit: cut {failure.option.sharding_type}, "
        f"a shard of it needs {failure.needed / GIB:.2f} GiB of {failure.memory} memory with optimizer state and "
        f"buffers; rank {failure.rank}{everywhere} has {max(failure.available, 0) / GIB:.2f} GiB left, so "
        f"{failure.excess / GIB:.2f} GiB are too many."
    )
