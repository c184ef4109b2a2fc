"""A few-shot curve as a picture: AUC, or NDCG, against the number of rows, one panel a domain and task."""

from __future__ import annotations

import math
from pathlib import Path

from ..errors import UserError
from .curve_results import SCRATCH, SINGLE, Entry, line_of, lines, panels, shown, spread

PANEL_INCHES = (6.0, 4.2)
ABREAST = 2
BLACK = {line_of(SCRATCH, None): ("black", "--"), line_of(SINGLE, None): ("dimgray", ":")}
MARKS = "osD^vP"


def places(sizes: list[int]) -> dict[int, float]:
    """Where each number of rows stands: at its logarithm, and 0 as far left of the rest as the first two lie apart."""
    some = sorted(n for n in sizes if n > 0)
    found = {n: math.log(n) for n in some}
    if 0 in sizes:
        step = found[some[1]] - found[some[0]] if len(some) > 1 else math.log(4)
        found[0] = (found[some[0]] if some else 0.0) - step
    return found


def draw(entries: list[Entry], path: Path, whole: int) -> None:
    """Write the picture; the file's ending says which kind.

    Args:
        whole: rows of the whole training set, labelled `all`.

    Raises:
        UserError: it cannot be written there.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = panels(entries)
    across = min(ABREAST, len(drawn))
    down = -(-len(drawn) // across)
    size = (PANEL_INCHES[0] * across, PANEL_INCHES[1] * down)
    figure, grid = pyplot.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    coloured = [line for line in lines(entries) if line not in BLACK]
    colours = {line: pyplot.get_cmap("tab10")(i % 10) for i, line in enumerate(coloured)}
    at = places(sorted({entry.n for entry in entries}))
    for axes, (domain, task) in zip(grid.flat, drawn, strict=False):
        mine = [e for e in entries if (e.domain, e.task) == (domain, task) and e.value is not None]
        for i, line in enumerate(lines(mine)):
            colour, style = BLACK.get(line, (colours.get(line), "-"))
            sizes = sorted({e.n for e in mine if e.line == line})
            measured = [spread([e.value for e in mine if (e.line, e.n) == (line, n)]) for n in sizes]
            means, around = zip(*measured, strict=True)
            x = [at[n] for n in sizes]
            axes.plot(x, means, style, color=colour, marker=MARKS[i % len(MARKS)], markersize=5, label=line)
            low, high = ([m + sign * s for m, s in zip(means, around, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        _label(axes, at, whole, shown(mine[0].metric))
        axes.set_title(f"{domain}, {task}", loc="left")
    for axes in list(grid.flat)[len(drawn) :]:
        axes.set_visible(False)
    grid.flat[0].legend(fontsize=8)
    seeds = len({entry.seed for entry in entries})
    figure.supxlabel(f"rows of the new domain to train on; band: standard deviation over {seeds} seeds", fontsize=9)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f"the picture cannot be written to {path}: {error}") from None
    finally:
        pyplot.close(figure)


def _label(axes, at: dict[int, float], whole: int, metric: str) -> None:
    ticks = sorted(at)
    # On a line of its own: it may stand right beside the one before.
    axes.set_xticks([at[n] for n in ticks], [f"\nall ({n:,})" if n == whole else f"{n:,}" for n in ticks])
    axes.minorticks_off()
    if len(ticks) > 1 and ticks[0] == 0:
        # Left of it the axis is no logarithm.
        axes.axvline((at[0] + at[ticks[1]]) / 2, color="lightgray", linewidth=1)
    axes.set_ylabel(metric)
    axes.grid(axis="y", color="whitesmoke")
    axes.spines[["top", "right"]].set_visible(False)
