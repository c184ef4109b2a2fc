"""Figures of a report as SVG that stands in the page itself and takes its text colour from there.

Every function draws plain data; nothing here knows models or runs.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

# matplotlib writes this colour wherever text and lines are to have the page's.
INK = "#0a0b0c"
LINES = ("#1f77b4", "#e8710a", "#2ca02c", "#d6409f", "#8c6bd1", "#9a6a4f", "#17a2b8", "#b8a11f")
# Cells beyond these are drawn without numbers, and as one picture instead of one path each.
MOST_NUMBERS, MOST_PATHS = 1200, 4000
MOST_POINTS = 400
CELL = (0.52, 0.3)
LARGEST = 14.0
RULES = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any):
    """A figure of this size in inches and its axes `[rows, columns]`. The report's style is the process's from then on:
    matplotlib looks some of it up only when it draws."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(RULES)
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options)


def svg(figure: Any, name: str) -> str:
    """The figure as an `<svg>` element, and no more of it in memory."""
    from matplotlib import pyplot

    out = io.StringIO()
    with pyplot.rc_context({**RULES, "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # Two figures of one page must not share names; black text is what matplotlib does not colour.
    for prefix in ("figure_", "axes_", "text_", "patch_", "line2d_", "matplotlib.axis_", "legend_"):
        text = text.replace(f'id="{prefix}', f'id="{name}-{prefix}')
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def heat_maps(
    panels: Sequence[tuple[str, np.ndarray, Sequence[str]]],
    rows: Sequence[str],
    *,
    label: str,
    largest: float,
    digits: int = 2,
):
    """Tables of numbers as coloured cells, side by side, with the same rows.

    Args:
        panels: title, values `[R, C]` (NaN: nothing is drawn) and names of the C columns, of each.
        rows: names of the R rows.
        label: what the columns are.
        largest: the value of the deepest colour; 0 is the palest.
        digits: after the point.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    columns = [values.shape[1] for _, values, _ in panels]
    cells = len(rows) * sum(columns)
    margin = 0.075 * max((len(name) for name in rows), default=0) + 0.3
    longest = max((len(name) for _, _, names in panels for name in names), default=0)
    upright = longest * 0.075 < CELL[0]
    width = min(margin + CELL[0] * sum(columns) + 0.35 * len(panels) + 0.3, LARGEST)
    height = min(0.95 + CELL[1] * len(rows) + (0.1 if upright else 0.055 * longest), LARGEST)
    # A title is not to be wider than its panel.
    wanted = [max(n * CELL[0], 0.085 * len(title)) for n, (title, _, _) in zip(columns, panels, strict=True)]
    width = min(max(width, margin + sum(wanted) + 0.35 * len(panels)), LARGEST)
    figure, axes = new_figure(width, height, 1, len(panels), width_ratios=wanted)
    palette, scale = colormaps["YlGnBu"], Normalize(0, largest or 1)
    for number, (axis, (title, values, names)) in enumerate(zip(axes[0], panels, strict=True)):
        shown = np.ma.masked_invalid(np.asarray(values, float))
        axis.pcolormesh(shown, cmap=palette, norm=scale, rasterized=shown.size > MOST_PATHS, linewidth=0)
        axis.invert_yaxis()
        axis.grid(False)
        axis.set_title(title, loc="left", fontsize=9)
        crowded = len(names) * CELL[0] > LARGEST
        axis.set_xticks([] if crowded else np.arange(len(names)) + 0.5)
        if not crowded:
            turned = {} if upright else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
            axis.set_xticklabels(names, **turned)
        few = len(rows) * CELL[1] <= LARGEST
        axis.set_yticks(np.arange(len(rows)) + 0.5 if few else [])
        axis.set_yticklabels(rows if few and number == 0 else [""] * (len(rows) if few else 0))
        axis.set_xlabel(label)
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
        if cells <= MOST_NUMBERS:
            for (r, c), value in np.ndenumerate(np.asarray(values, float)):
                if not math.isnan(value):
                    red, green, blue, _ = palette(scale(value))
                    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                    said = f"{value:.{digits}f}".replace("0.", ".", 1) if value < 1 else f"{value:.{digits}f}"
                    axis.text(
                        c + 0.5,
                        r + 0.5,
                        said,
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="#ffffff" if dark else "#101010",
                    )
    return figure


def line_panels(panels: Sequence[tuple[str, str, dict[str, tuple[list[float], list[float]]]]], columns: int = 2):
    """Curves: title, label of the y axis, and (x, y) by name, of each panel; x is the step."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(10, 2.7 * rows, rows, columns)
    last = max((x[-1] for _, _, lines in panels for x, _ in lines.values() if x), default=1)
    for axis, (title, label, lines) in zip(axes.flat, panels, strict=False):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylabel(label)
        axis.set_xlabel("step")
        for number, (name, (x, y)) in enumerate(lines.items()):
            x, y = thinned(x, y)
            marker = "o" if len(x) < 30 else None
            axis.plot(x, y, color=LINES[number % len(LINES)], label=name, linewidth=1.4, marker=marker, markersize=3)
        if len(lines) > 1:
            axis.legend(fontsize=8, loc="best")
        axis.set_xlim(0, last * 1.02)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    return figure


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS points: means of neighbours, where there are more."""
    if len(x) <= MOST_POINTS:
        return list(x), list(y)
    pieces = zip(
        np.array_split(np.asarray(x, float), MOST_POINTS),
        np.array_split(np.asarray(y, float), MOST_POINTS),
        strict=True,
    )
    means = [(float(a.mean()), float(b.mean())) for a, b in pieces]
    return [a for a, _ in means], [b for _, b in means]
