"""`dist-rec report`: one page that shows a run, with nothing outside itself, and the numbers behind it as JSON.

The page is readable in light and in dark, and whatever a run lacks is said in its place.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config
from ..errors import UserError
from ..files import write_text
from ..strict import to_dict
from ..training.evaluate import trained
from ..training.evaluation import FILE_NAME
from ..training.kinds import kind_of
from . import figures
from .curves import read_curves
from .kernels import kernels_part
from .measure import measure
from .table import columns_of, evaluation_lines, title_of

PAGE_NAME = "report.html"
LARGEST_PICTURE = 2 << 20
LN2 = float(np.log(2))
STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --soft: #6a7078; --line: #d9dce0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --paper: #16181c; --soft: #9aa1ab; --line: #33373d; }
}
body { color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.4rem; border-bottom: 1px solid var(--line); }
p, .soft { color: var(--soft); max-width: 60rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th, td { padding: .15rem .8rem .15rem 0; text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: normal; border-bottom: 1px solid var(--line); }
th.name, td.name { text-align: left; } tr.all td { border-top: 1px solid var(--line); }
td.baseline { color: var(--soft); padding-left: 1rem; } td.wide { white-space: normal; overflow-wrap: anywhere; }
figure { margin: .8rem 0; overflow-x: auto; } svg, img { max-width: 100%; height: auto; color: var(--ink); }
"""


def report(config: Config, run: Path, split: str, rows: int, out: Path) -> dict[str, Any]:
    """Measure a run's last good checkpoint and write the page `out` and, beside it, `out` ending in .json. Collective.

    Args:
        config: the run's.
        rows: of the split to look at, about, over all ranks; 0 looks at all.

    Returns:
        What the JSON holds: `run`, `split`, `step`, `evaluation`, `curves`, `tables`, `config`, and those of
        `measure`.

    Raises:
        UserError: as `trained`; the page cannot be written.
    """
    with trained(config, run, split) as loaded:
        found = {"run": str(run), "step": loaded.step, **measure(loaded, split, rows)}
        found["tables"] = _tables(loaded.prepared.specs, run, found["left_out"])
        if loaded.process.is_main:
            found = _with_files(found, config, run, split)
            try:
                write_text(out, page(found, run))
                write_text(out.with_suffix(".json"), json.dumps(found, indent=1))
            except OSError as error:
                raise UserError(f"the report cannot be written to {out}: {error.strerror}.") from None
    return found


def _with_files(found: dict[str, Any], config: Config, run: Path, split: str) -> dict[str, Any]:
    """Add what the run folder tells."""
    left_out = found["left_out"]
    evaluation = _evaluation(run, split)
    if evaluation is None:
        why = kind_of(config).not_evaluated(config)
        left_out["evaluation"] = why or f"not evaluated on {split} yet: dist-rec evaluate {run} --split {split}"
    elif evaluation["step"] != found["step"]:
        left_out["evaluation of this step"] = (
            f"the table is of step {evaluation['step']}, the figures of step {found['step']}: "
            f"dist-rec evaluate {run} --split {split}"
        )
    curves = read_curves(run / "metrics.jsonl")
    if not curves["losses"]:
        left_out["curves"] = "metrics.jsonl has no step"
    more = {name: held for name in ("old_domains", "curve") if (held := _json(run / f"{name}.json")) is not None}
    return {**found, "evaluation": evaluation, "curves": curves, "config": _digest(config), **more}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Remove it, or let the run write it again.") from None


def _evaluation(run: Path, split: str) -> dict[str, Any] | None:
    found = [_json(run / FILE_NAME), _json(run / f"evaluation-{split}.json")]
    return next((held for held in found if held is not None and held["split"] == split), None)


def _digest(config: Config) -> dict[str, Any]:
    """SHA-256 of the resolved config, and every key that is not its default."""
    whole = to_dict(config)
    default = _flat(to_dict(Config(data=type(config.data)(train=config.data.train))))
    return {
        "sha256": hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest(),
        "changed": {key: value for key, value in _flat(whole).items() if default.get(key, ...) != value}
        | {"data.train": config.data.train},
    }


def _flat(held: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in held.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, dict) and value and name not in ("tables.overrides", "data.weights")
        flat |= _flat(value, f"{name}.") if nested else {name: value}
    return flat


def _tables(specs: list[Any], run: Path, left_out: dict[str, str]) -> list[dict[str, Any]]:
    """Shape, bytes of weights, and where the run that trained had them."""
    plan = _json(run / "plan.json")
    if plan is None:
        plan, left_out["places of tables"] = {}, "the run folder has no plan.json"
    return [
        {
            "name": spec.name,
            "rows": spec.rows,
            "dim": spec.dim,
            "precision": spec.precision,
            "bytes": spec.rows * spec.dim * (4 if spec.precision == "fp32" else 2),
            "features": list(spec.features),
            "sharding_type": held.get("sharding_type"),
            "compute_kernel": held.get("compute_kernel"),
            "ranks": held.get("ranks"),
        }
        for spec in specs
        for held in [plan.get(spec.name, {})]
    ]


# The page --------------------------------------------------------------------------------------


def page(found: dict[str, Any], run: Path) -> str:
    """The whole HTML of what `report` found."""
    seen = sum(found["rows"].values())
    looked_at = (
        f" Figures of what its gates and experts do are of {seen:,} of the {found['rows_of_split']:,} rows of "
        f"{found['split']}, shuffled over the domains."
    )
    parts = [
        f"<h1>{escape(str(run))}</h1>",
        f"<p>Checkpoint of step {found['step']:,}.{looked_at if seen else ''}</p>",
        *_said(found["left_out"]),
        *_evaluation_part(found),
        *_curves_part(found["curves"]),
        *kernels_part(found.get("kernels")),
        *_aspects_part(found["aspects"]),
        *_experts_part(found["experts"]),
        *_distances_part(found["distances"]),
        *_old_part(found.get("old_domains")),
        *_curve_part(found.get("curve"), run),
        *_tables_part(found["tables"]),
        *_config_part(found["config"]),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(run.name)}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n' + "\n".join(
        [*parts, "</body></html>\n"]
    )


def _said(left_out: dict[str, str]) -> list[str]:
    if not left_out:
        return []
    lines = "".join(f"<li>{escape(what)}: {escape(why)}</li>" for what, why in left_out.items())
    return [f'<ul class="soft" id="left-out">{lines}</ul>']


def _figure(figure: Any, name: str, caption: str) -> str:
    drawn = figures.svg(figure, name)
    return f'<figure id="{name}">{drawn}<figcaption class="soft">{escape(caption)}</figcaption></figure>'


def _rows(head: list[str], rows: list[list[Any]], names: int, classes: list[str] | None = None) -> str:
    """A table whose first `names` columns are names and whose others are numbers."""

    def row(tag: str, cells: list[Any], style: str = "") -> str:
        shown = "".join(
            f"<{tag}{' class=name' if i < names else ''}>{escape(str(cell))}</{tag}>" for i, cell in enumerate(cells)
        )
        return f"<tr{f' class={style}' if style else ''}>{shown}</tr>"

    lines = [row("td", cells, style) for cells, style in zip(rows, classes or [""] * len(rows), strict=True)]
    return f"<figure><table>{row('th', head)}{''.join(lines)}</table></figure>"


def _evaluation_part(found: dict[str, Any]) -> list[str]:
    evaluation = found["evaluation"]
    if evaluation is None:
        return []
    lines, classes, before = [], [], None
    for line in evaluation_lines(evaluation):
        of_model = not line["baseline"]
        first = line["scope"] != before
        names = [line["scope"] if first else "", line["task"] if of_model else f"  {line['baseline']}"]
        lines.append([*names, *line["values"]])
        classes.append("all" if first and line["scope"] == "all" else "")
        before = line["scope"]
    notes = [
        f"<p>{escape(name)}: {escape(held.get('about') or 'left out: ' + held['left_out'])}</p>"
        for name, held in evaluation.get("baselines", {}).items()
    ]
    rates = ", ".join(f"{name.replace('_', ' ')} {value:,.1f}" for name, value in evaluation["rates"].items())
    title = f"<h2>Evaluation: {escape(title_of(evaluation))}</h2>"
    return [
        title,
        _rows(["domain", "task", *columns_of(evaluation)], lines, 2, classes),
        *notes,
        f"<p>{escape(rates)}</p>",
    ]


def _curves_part(curves: dict[str, Any]) -> list[str]:
    if not curves["losses"]:
        return []
    losses = {name: line for name, line in curves["losses"].items() if name not in ("regulariser", "embedding_l2")}
    panels = [("Training loss", "loss of the global batch", losses)]
    panels += [
        (name.replace("_", " "), "value", {name: curves["losses"][name]})
        for name in ("regulariser", "embedding_l2")
        if name in curves["losses"]
    ]
    panels.append(("Speed", "rows a second", {"rows/s": curves["rows_per_s"]}))
    panels += [(f"Evaluation: {metric}", metric, lines) for metric, lines in curves["evaluation"].items()]
    drawn = _figure(
        figures.line_panels(panels), "curves", "Of metrics.jsonl. Evaluations are overall, of data.valid; the last of "
        "them is of the split that the run ends with, unless it may stop early."
    )  # fmt: skip
    return ["<h2>Learning curves</h2>", drawn]


def _aspects_part(aspects: dict[str, Any]) -> list[str]:
    parts = []
    for role, by_domain in aspects.items():
        if not by_domain:
            continue
        domains, names = list(by_domain), list(next(iter(by_domain.values())))
        weight, present = (
            np.array([[by_domain[d][a][kind] for a in names] for d in domains]) for kind in ("weight", "present")
        )
        panels = [
            ("mean weight", np.where(present > 0, weight, np.nan), names),
            ("share of rows", present, names),
        ]
        caption = (
            f"{role}: what the gate gives each aspect, mean over the rows that have any (adds up to 1 in a row), "
            "beside the share of the domain's rows that have the aspect. Empty: no row has it."
        )
        parts.append(
            _figure(figures.heat_maps(panels, domains, label="aspect", largest=1.0), f"aspects-{role}", caption)
        )
    return ["<h2>What the model leans on</h2>", *parts] if parts else []


def _experts_part(experts: list[dict[str, Any]]) -> list[str]:
    parts = []
    for entry in experts:
        lines = entry["lines"]
        names = [f"{line['domain']} · {line['task']}" if line["task"] else line["domain"] for line in lines]
        values = np.array([line["weights"] for line in lines])
        title = f"level {entry['level']}" + (", shared gate" if entry["gate"] == "shared" else "")
        figure = figures.heat_maps(
            [(title, values, entry["experts"])], names, label="expert", largest=max(0.5, float(values.max()))
        )
        own = f" Own experts belong to the {entry['own_to']} of the row." if entry["own_to"] else ""
        caption = f"Mean weight of each expert, adding up to 1 in a row.{own}"
        parts.append(_figure(figure, f"experts-{entry['level']}-{entry['gate']}", caption))
    return ["<h2>Experts</h2>", *parts] if parts else []


def _distances_part(distances: dict[str, Any] | None) -> list[str]:
    if distances is None:
        return []
    values = np.array(distances["js"])
    np.fill_diagonal(values, np.nan)
    names = distances["domains"]
    figure = figures.heat_maps(
        [("JS divergence", values, names)], names, label="domain", largest=float(np.nanmax(values)), digits=3
    )
    caption = (
        f"Jensen-Shannon divergence between the domains' mean softmax of the vector before the experts; 0 is the same, "
        f"ln 2 = {LN2:.3f} the farthest."
    )
    return ["<h2>Distances between domains</h2>", _figure(figure, "distances", caption)]


def _old_part(old: Any) -> list[str]:
    if not old:
        return []
    from ..training.start.old_domains import compared, unseen

    lines = [
        [row["domain"], row["task"], row["metric"], *(f"{row[k]:.4f}" for k in ("before", "after"))]
        + [f"{row['difference']:+.4f}"]
        for row in compared(old)
    ]
    title = "<h2>The foundation's domains, before and after</h2>"
    skipped = [f"<p>Not looked at: {escape(str(old['skipped']))}</p>"] if "skipped" in old else []
    if not lines:
        return [title, *(skipped or ["<p>Not looked at: old_domains.json says nothing.</p>"])]
    missing = [f"<p>The test rows have none of {escape(', '.join(unseen(old)))}.</p>"] if unseen(old) else []
    return [title, _rows(["domain", "task", "metric", "before", "after", "difference"], lines, 3), *missing, *skipped]


def _curve_part(curve: Any, run: Path) -> list[str]:
    picture = run / "curve.png"
    if not picture.is_file() or picture.stat().st_size > LARGEST_PICTURE:
        return (
            []
            if curve is None
            else ["<h2>How much data it takes</h2>", f"<pre>{escape(json.dumps(curve, indent=1))}</pre>"]
        )
    data = base64.b64encode(picture.read_bytes()).decode()
    return ["<h2>How much data it takes</h2>", f'<figure><img alt="curve" src="data:image/png;base64,{data}"></figure>']


def _tables_part(tables: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            table["name"],
            ", ".join(table["features"]),
            f"{table['rows']:,}",
            table["dim"],
            table["precision"],
            f"{table['bytes'] / 2**20:,.1f}",
            table["sharding_type"] or "-",
            table["compute_kernel"] or "-",
            "-" if table["ranks"] is None else _some(table["ranks"]),
        ]
        for table in tables
    ]
    head = ["table", "features", "rows", "width", "precision", "MiB of weights", "cut", "kernel", "ranks"]
    return ["<h2>Tables</h2>", _rows(head, rows, 2)]


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{len(ranks)} ranks, {min(ranks)} .. {max(ranks)}"


def _config_part(config: dict[str, Any]) -> list[str]:
    rows = "".join(
        f'<tr><td class=name>{escape(key)}</td><td class="name wide">{escape(json.dumps(value))}</td></tr>'
        for key, value in config["changed"].items()
    )
    note = f"<p>Keys that are not their default; sha256 of the whole {config['sha256']}.</p>"
    return ["<h2>Config</h2>", note, f"<figure><table>{rows}</table></figure>"]
