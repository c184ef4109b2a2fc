"""Why every table is cut as it is, in a sentence."""

from __future__ import annotations

import math

from ..embeddings.planner import Option
from ..embeddings.tables import TableSpec
from .answer import GIB, Answer, shard_bytes

# Times this near to each other are said to be equal.
EQUAL = 0.005


def explain(answer: Answer) -> dict[str, str]:
    """A sentence for every table: what was chosen, and what the next best type would cost."""
    return {spec.name: _why(answer, spec) for spec in answer.request.specs}


def named(option: Option) -> str:
    if option.sharding_type == "column_wise" and option.num_shards > 1:
        return f"column_wise in {option.num_shards} parts"
    return option.sharding_type


def _why(answer: Answer, spec: TableSpec) -> str:
    planned = answer.planned
    options, instead = planned.options[spec.name], planned.instead[spec.name]
    chosen = options[0]
    both = zip(options, instead, strict=True)
    other, ms = next(((o, ms) for o, ms in both if o.sharding_type != chosen.sharding_type), (None, math.inf))
    if other is None:
        return _only(spec, chosen, answer.cluster.ranks)
    if math.isinf(ms):
        memory = answer.memory if other.kernel in ("fused", "dense") else "host"
        room = planned.capacity[0 if memory == "device" else 1] / GIB
        return (
            f"{named(chosen)}, because {named(other)} does not fit: it puts {shard_bytes(other, memory) / GIB:.2f} GiB "
            f"on one rank, which has {room:.2f} GiB for tables, partly taken by others."
        )
    now = float(planned.per_rank.ms.max())
    if ms > now * (1 + EQUAL):
        return (
            f"{named(chosen)}, because with {named(other)} the slowest rank would need {ms:.3g} ms instead of "
            f"{now:.3g}."
        )
    if chosen.work < other.work * (1 - EQUAL):
        return (
            f"{named(chosen)}: the slowest rank would be no faster with {named(other)}, and all ranks together would "
            f"work {other.work:.3g} ms on it instead of {chosen.work:.3g}."
        )
    return f"{named(chosen)}; with {named(other)} the step's tables would take {ms:.3g} ms, and take {now:.3g}."


def _only(spec: TableSpec, chosen: Option, ranks: int) -> str:
    if spec.managed:
        return "row_wise, for ids that are managed find rows only in a table that is cut so."
    if spec.sharding == chosen.sharding_type:
        return f"{named(chosen)}, because the config asks for it."
    if ranks == 1:
        return f"{named(chosen)}, for there is one rank."
    return f"{named(chosen)}, the only type for {spec.rows:,} rows on {ranks} ranks."
