"""An experiment's comparisons row by row: the paired bootstrap by user, over all seeds, of runs that keep places.

A variant and its reference are two runs a seed; a user is drawn with what the runs of all seeds say of its rows, so
the interval is of the mean over seeds. What other seeds would say is `compare.py`'s to tell. Results stand beside those
of the runs, in paired_RESULTS, and stay there when run folders are gone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import UserError
from ..files import write_text
from ..report.table import short, shown_p, signed
from .experiment import Experiment, folder_of

Entry = dict[str, Any]


def path_of(results: Path) -> Path:
    return results.with_name(f"paired_{results.name}")


def paired_runs(experiment: Experiment, done: list[Entry], results: Path, runs: Path) -> list[Entry]:
    """Every comparison of the file on each split, of the seeds whose run folders have both runs' places.

    What is there is computed and written; what was written of more seeds than are there stays.

    Args:
        done: the runs (`experiment.read_results`).
        results: their file.
        runs: folder of their folders.

    Returns:
        Each with `title`, `split`, `variant`, `reference`, `seeds`, `by_seed` (of each metric the difference by seed),
        and those of `paired.compare`.

    Raises:
        UserError: what was written is not readable, or two runs cannot be compared.
    """
    path = path_of(results)
    held = _read(path)
    found: dict[tuple[str, str, str, str], Entry] = {}
    lines = {(e["split"], e["name"], e["seed"]): e for e in done if e["domain"] is None and "evaluated" in e}
    for title, one in experiment.comparisons.items():
        for split in experiment.splits:
            for name in one.variants:
                if name != one.reference:
                    key = (title, split, name, one.reference)
                    pairs = _pairs(lines, key, experiment.seeds, runs)
                    before = held.get(key)
                    if before is not None and not pairs.keys() >= set(before["seeds"]):
                        found[key] = before
                    elif pairs:
                        found[key] = dict(zip(("title", "split", "variant", "reference"), key, strict=True))
                        found[key] |= _compared(pairs)
    entries = list(found.values())
    if entries and entries != list(held.values()):
        write_text(path, "[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")
    return entries


def _read(path: Path) -> dict[tuple[str, str, str, str], Entry]:
    try:
        held = json.loads(path.read_text()) if path.is_file() else []
        return {(e["title"], e["split"], e["variant"], e["reference"]): e for e in held if e["seeds"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error!r}. Remove it, and it is written again.") from None


def _pairs(lines: dict[Any, Entry], key: tuple[str, str, str, str], seeds: list[int], runs: Path) -> dict[int, Any]:
    """By seed, the places of the two runs' rows side by side."""
    _, split, variant, reference = key
    found = {}
    for seed in seeds:
        both = [_places(lines.get((split, name, seed)), runs) for name in (variant, reference)]
        if None not in both:
            found[seed] = both
    if found:
        from ..training.paired import pair

        found = {seed: (pair(*both), both[0][1].at) for seed, both in found.items()}
    return found


def _places(line: Entry | None, runs: Path) -> Any:
    """What a run's folder keeps of every row; None where it keeps nothing, or not of what the line is of."""
    if line is None:
        return None
    from ..training.row_ranks import path_of as ranks_of
    from ..training.row_ranks import read_ranks

    folder = folder_of(runs, f"{line['split']}/{line['name']}/{line['seed']}")
    if line["evaluated"] is None or not ranks_of(folder, line["evaluated"]).is_file():
        return None
    ranks, about = read_ranks(folder, line["evaluated"])
    if about.overrides:
        asked = ", ".join(f"{key}: {json.dumps(value)}" for key, value in about.overrides.items())
        print(
            f"dist-rec: {folder} is not compared row by row: it was last evaluated with {asked}, unlike the others of "
            f"the experiment. `dist-rec evaluate {folder} --split {about.split}` writes its own places again.",
            file=sys.stderr,
        )
        return None
    return (ranks, about) if about.step == line["step"] else None


def _compared(pairs: dict[int, Any]) -> Entry:
    from ..training.paired import compare, together
    from ..training.ranking import rank_metrics

    at = next(iter(pairs.values()))[1]
    by_seed: dict[str, dict[str, float]] = {}
    for seed, (both, _) in pairs.items():
        ours, other = (rank_metrics(places, at) for places in (both.ours, both.other))
        for name in ours:
            by_seed.setdefault(name, {})[str(seed)] = float(ours[name].mean() - other[name].mean())
    whole = compare(together([both for both, _ in pairs.values()]), at)
    return {"seeds": list(pairs), "by_seed": by_seed, **whole}


def print_paired(entries: list[Entry]) -> None:
    """One table a comparison and split."""
    console = Console()
    for entry in entries:
        title = f"{entry['title']}: {entry['variant']} minus {entry['reference']}, {entry['split']}"
        table = Table(title=title, title_justify="left")
        for column in ("metric", "this", "other", "difference", "95 % interval", "p"):
            table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
        # Wraps where there is no room for all.
        table.add_column(f"seed {', '.join(map(str, entry['seeds']))}")
        for name, m in entry["overall"]["metrics"].items():
            interval = f"{signed(m['low'])} .. {signed(m['high'])}"
            values = [f"{m['ours']:.4f}", f"{m['other']:.4f}", signed(m["difference"]), interval, shown_p(m["p"])]
            by_seed = entry["by_seed"][name]
            table.add_row(short(name), *values, " ".join(signed(by_seed[str(seed)]) for seed in entry["seeds"]))
        console.print(table)
    if entries:
        whole = entries[0]
        console.print(
            f"paired bootstrap by user, each drawn with its rows of all seeds, {whole['resamples']:,} resamples, seed "
            f"{whole['seed']}; p is two-sided, says what other users would show with these models, not what other "
            "seeds would, and is not corrected for the number of metrics and comparisons",
            highlight=False,
            soft_wrap=True,
        )
