"""`dist-rec plan --verify`: run the plan and others on this machine, and set estimated beside measured.

Memory must agree to the byte. Of time, what matters is that the faster plan is the one that was said to be:
alternatives, which force one sharding type on all tables that can have it, are ranked by estimate and by measurement.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from ..config import save_config
from ..embeddings.description import describe_plan
from ..embeddings.planner import DoesNotFit
from ..embeddings.tables import SEQUENCE_SHARDING_TYPES, table_specs
from ..errors import UserError
from ..training.catalogue import unread_tables
from ..training.kinds import kind_of
from ..training.planning import plan_tables
from ..training.prepare import prepare
from ..training.workload import mean_lengths
from .answer import Answer, latency_ms
from .measure import FAULT
from .text import console, say, table_of

ALTERNATIVES = ("table_wise", "row_wise", "column_wise", "data_parallel")
PLANNED = "as planned"
# Steps of each alternative in a round, and rounds, in which they take turns.
STEPS, ROUNDS = 8, 3
# Start of the ranks, then each alternative's building and steps.
LONGEST_SECONDS = 900


def verify(answer: Answer) -> dict[str, Any]:
    """Run the alternatives and compare.

    Returns:
        `ranks`; `alternatives`: a list of `name`, `estimated_ms`, `measured_ms` of the tables' part of a step,
        `estimated_bytes` and `measured_bytes` of tables and optimizer state by rank; `memory_exact`; `rank_order`,
        Spearman's correlation of the times, null of less than three; `time_ratio`, measured over estimated of the plan;
        `step_ms` estimated and measured of whole steps under the plan.

    Raises:
        UserError: a run of this config could not start, the ranks failed, or the request is of tables or lists that
            the data set has not.
    """
    if answer.request.rows is None or _is_what_if(answer):
        raise UserError("--verify trains on the data set: leave --set tables.TABLE.rows and mean_length out.")
    config = answer.request.config
    prepare(replace(config, tables=replace(config.tables, plan=None)), answer.cluster.ranks)
    plans = {PLANNED: answer.planned}
    for sharding in ALTERNATIVES:
        planned = _forced(answer, sharding)
        if planned is not None and describe_plan(planned.plan) not in [describe_plan(p.plan) for p in plans.values()]:
            plans[sharding] = planned
    measured = _measure(answer, {name: describe_plan(p.plan) for name, p in plans.items()})
    alternatives = [
        {
            "name": name,
            "estimated_ms": planned.rated_ms + latency_ms(planned),
            "measured_ms": measured["plans"][name]["tables_ms"],
            "estimated_bytes": _bytes_by_rank(planned),
            "measured_bytes": measured["plans"][name]["bytes"],
        }
        for name, planned in plans.items()
    ]
    estimated, found = ([a[key] for a in alternatives] for key in ("estimated_ms", "measured_ms"))
    return {
        "ranks": answer.cluster.ranks,
        "alternatives": alternatives,
        "memory_exact": all(a["estimated_bytes"] == a["measured_bytes"] for a in alternatives),
        "rank_order": spearman(estimated, found) if len(found) > 2 else None,
        "time_ratio": found[0] / estimated[0],
        "step_ms": {"estimated": answer.step_ms, "measured": measured["step_ms"]},
    }


def _is_what_if(answer: Answer) -> bool:
    """Whether the request differs from what training would build."""
    request = answer.request
    frozen = {spec.name for spec in request.specs if spec.frozen}
    looked_up = kind_of(request.config).looked_up(request.schema, request.config, request.features)
    unread = unread_tables(request.config, request.schema, request.features)
    return request.specs != table_specs(
        request.schema, request.config.tables, looked_up, frozen, unread
    ) or request.lengths != mean_lengths(request.schema, request.features, request.statistics)


def _forced(answer: Answer, sharding: str):
    """The plan where every table that can is cut so; None if no table can."""
    request = answer.request

    def can(spec) -> bool:
        if spec.managed:
            return False
        return sharding in SEQUENCE_SHARDING_TYPES or (not spec.sequence and spec.precision == "fp32")

    specs = [replace(s, sharding=sharding if can(s) else "auto") for s in request.specs]
    if not any(map(can, request.specs)):
        return None
    try:
        return plan_tables(replace(request, specs=specs), answer.cluster, answer.dense)
    except DoesNotFit:
        return None


def _bytes_by_rank(planned) -> list[int]:
    taken = [0] * planned.cluster.ranks
    for name, option in planned.chosen.items():
        for rank, weights, state in zip(planned.ranks[name], option.weight_bytes, option.state_bytes, strict=True):
            taken[rank] += int(weights + state)
    return taken


def _measure(answer: Answer, plans: dict[str, Any]) -> dict[str, Any]:
    """Start the ranks, wait, and end them whatever happens."""
    with tempfile.TemporaryDirectory(prefix="dist-rec-verify-") as name:
        folder = Path(name)
        config = answer.request.config
        config = replace(config, tables=replace(config.tables, plan=None), run=replace(config.run, root=name))
        save_config(config, folder / "config.yaml")
        (folder / "plans.json").write_text(json.dumps({"plans": plans, "steps": STEPS, "rounds": ROUNDS}))
        ranks = ["--standalone", "--nproc-per-node", str(answer.cluster.ranks)]
        worker = ["-m", "dist_rec.plan.measure", str(folder)]
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *ranks, *worker],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
        try:
            _, errors = process.communicate(timeout=LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            raise UserError(f"--verify: the ranks were not done after {LONGEST_SECONDS} s.") from None
        finally:
            if process.poll() is None:
                # torchrun ends its ranks on SIGTERM; it is given the time to.
                process.send_signal(signal.SIGTERM)
                process.wait(60)
        result = folder / "measured.json"
        if not result.exists():
            raise UserError(f"--verify: the ranks failed: {fault_of(errors)}")
        return json.loads(result.read_text())


def fault_of(errors: str) -> str:
    """Of what the ranks said, the first fault in words, without the way there."""
    lines = [line.strip() for line in errors.splitlines()]
    marked = [line.partition(FAULT)[2] for line in lines if FAULT in line]
    return marked[0] if marked else "they ended without a word, as when memory runs out and the system ends them."


def spearman(one: list[float], other: list[float]) -> float:
    """Correlation of ranks, ties sharing their mean rank."""
    import numpy as np

    def ranks(values: list[float]) -> np.ndarray:
        array = np.array(values)
        return np.array([(array < v).sum() + ((array == v).sum() - 1) / 2 for v in array])

    first, second = ranks(one), ranks(other)
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def print_verified(verified: dict[str, Any]) -> None:
    out = console()
    title = f"estimated beside measured, {verified['ranks']} rank(s) on this machine: the tables' part of a step"
    table = table_of(title, "all tables", "ms estimated", "ms measured", "bytes of ranks estimated", "measured")
    for one in sorted(verified["alternatives"], key=lambda a: a["measured_ms"]):
        sizes = [", ".join(f"{b:,}" for b in one[key]) for key in ("estimated_bytes", "measured_bytes")]
        table.add_row(escape(one["name"]), f"{one['estimated_ms']:.3g}", f"{one['measured_ms']:.3g}", *sizes)
    out.print(table)
    exact = "memory: exact to the byte" if verified["memory_exact"] else "memory: DIFFERS, see above"
    order = verified["rank_order"]
    order = "too few alternatives for a rank order" if order is None else f"rank order of times (Spearman): {order:.2f}"
    step = verified["step_ms"]
    say(
        out,
        f"{exact}; {order}; the plan's tables took {verified['time_ratio']:.2f} times the estimate; a whole step "
        f"{step['measured']:.3g} ms, {step['estimated']:.3g} by estimate.",
    )
