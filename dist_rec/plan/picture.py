"""A plan as a picture: memory and time of every rank, stacked by table."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import UserError
from .answer import GIB, Answer

# Tables that get a colour of their own, half of them for their time and half for their memory; the others are one.
COLOURS = 10
# Ranks within this share of the slowest are as slow.
ALIKE = 1e-6
REST = "#bbbbbb"
DENSE = "#555555"
INCHES = (12, 8)
# More ranks than these are drawn as areas: gaps between bars would be thinner than a pixel, and so many bars are slow.
MOST_BARS = 64


def draw(answer: Answer, path: Path) -> None:
    """Write the picture; the file's ending says which kind.

    Raises:
        UserError: it cannot be written there.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    planned = answer.planned
    device = answer.memory == "device"

    def memory_of(name: str) -> np.ndarray:
        load = planned.per_table[name]
        return (load.device_bytes if device else load.host_bytes) / GIB

    times = {name: float(planned.per_table[name].ms.sum()) for name in planned.chosen}
    own = coloured(times, {name: float(memory_of(name).sum()) for name in planned.chosen})
    rest = [name for name in planned.chosen if name not in own]
    stacks = [(name, memory_of(name), planned.per_table[name].ms) for name in own]
    colours = [pyplot.get_cmap("tab10")(i) for i in range(len(own))]
    if rest:
        stacks.append(
            (
                f"{len(rest)} other tables",
                sum(memory_of(name) for name in rest),
                sum(planned.per_table[name].ms for name in rest),
            )
        )
        colours.append(REST)
    figure, (above, below) = pyplot.subplots(2, 1, figsize=INCHES, sharex=True, layout="constrained")
    ranks = np.arange(answer.cluster.ranks)
    dense = np.full(len(ranks), answer.dense_bytes / GIB)
    _stack(above, dense, 0 * dense, DENSE, "dense model")
    floors = [dense, np.zeros(len(ranks))]
    for (name, memory, ms), colour in zip(stacks, colours, strict=True):
        _stack(above, memory, floors[0], colour, name)
        _stack(below, ms, floors[1], colour, name)
        floors = [floors[0] + memory, floors[1] + ms]
    capacity = answer.capacity / GIB
    if floors[0].max() > capacity / 4:
        above.axhline(capacity, color="red", linestyle="--", linewidth=1, label="what a rank has")
    else:
        above.set_title(f"a rank has {capacity:,.1f} GiB", loc="right", fontsize=9)
    above.set_ylabel(f"GiB of {answer.memory} memory")
    below.set_ylabel("ms of a step, tables")
    below.set_xlabel("rank")
    slowest = planned.per_rank.ms.max()
    alike = int((planned.per_rank.ms >= slowest * (1 - ALIKE)).sum())
    below.axhline(slowest, color="red", linestyle=":", linewidth=1)
    who = f"slowest rank {planned.bottleneck}" if alike == 1 else f"{alike} ranks equally slow"
    above.set_title(
        f"{answer.cluster.name}: step {answer.step_ms:.3g} ms, {who}, imbalance {planned.imbalance:.2f}",
        loc="left",
    )
    above.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"the picture cannot be written to {path}: {error}") from None
    finally:
        pyplot.close(figure)


def coloured(times: dict[str, float], memory: dict[str, float]) -> list[str]:
    """The tables that get a colour: those that take most time and most memory in turn, by time."""
    by_time, by_memory = (sorted(found, key=lambda name: -found[name]) for found in (times, memory))
    in_turn = dict.fromkeys(name for pair in zip(by_time, by_memory, strict=True) for name in pair)
    return sorted(list(in_turn)[:COLOURS], key=lambda name: -times[name])


def _stack(axes, heights: np.ndarray, floors: np.ndarray, colour, name: str) -> None:
    """One layer over all ranks."""
    ranks = np.arange(len(heights))
    if len(ranks) <= MOST_BARS:
        axes.bar(ranks, heights, 0.8, bottom=floors, color=colour, label=name)
        return
    # Each rank's value holds from half a rank before it to half a rank after.
    edges = np.append(ranks - 0.5, len(ranks) - 0.5)
    low, high = np.append(floors, floors[-1]), np.append(floors + heights, floors[-1] + heights[-1])
    axes.fill_between(edges, low, high, step="post", color=colour, label=name, linewidth=0)
