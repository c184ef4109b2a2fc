"""What an experiment's results say: means and spreads by domain, and paired tests against a reference.

A variant is compared with the reference run by run: same seed, same domain. Two tests answer different questions:

* over *seeds*: one difference a seed, the mean over domains. Would the same data with other seeds say the same?
  Few seeds make a weak test: with n of them Wilcoxon's can give no p below 2 / 2^n.
* over *seeds and domains*: one difference a seed and domain. These are not independent (a seed's domains share
  one model, a domain's seeds its rows), so its p is too small; it tells whether the sign is the same nearly everywhere.

No correction for many variants is made. Knows no runs, only their figures.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..report.table import shown_p, signed
from .experiment import Experiment

# Figures are kept to five digits, so smaller differences are none.
ALIKE = 1e-9

Values = dict[tuple[int, str], float]


def values_of(results: list[dict[str, Any]], split: str, name: str, task: str, metric: str) -> Values:
    """A variant's figures by (seed, domain); the runs of a `per_domain` variant are put together."""
    found: Values = {}
    for entry in results:
        if (entry["split"], entry["name"]) == (split, name):
            for domain, tasks in entry["domains"].items():
                value = tasks.get(task, {}).get(metric)
                if value is not None:
                    found[entry["seed"], domain] = value
    return found


def by_seed(values: Values, domains: list[str]) -> dict[int, float]:
    """Mean over `domains`, of the seeds that have them all."""
    seeds = sorted({seed for seed, _ in values})
    return {
        seed: statistics.fmean(values[seed, d] for d in domains)
        for seed in seeds
        if domains and all((seed, d) in values for d in domains)
    }


def paired(reference: Values, other: Values) -> dict[str, Any]:
    """Tests of `other` against `reference`, on the (seed, domain) that both have.

    Returns:
        `pairs`, `mean` of the differences and `better`, how many are above 0; two-sided `t` and `wilcoxon` p over seeds
        and domains; `seeds` that have every common domain, their `seeds_mean` and `seeds_t`. A p is None where it is
        not defined: fewer than two differences, or all of them alike (t) or 0 (Wilcoxon).
    """
    common = sorted(reference.keys() & other.keys())
    differences = np.array([other[key] - reference[key] for key in common])
    domains = sorted({domain for _, domain in common})
    seeds, ours = by_seed(reference, domains), by_seed(other, domains)
    of_seeds = np.array([ours[seed] - seeds[seed] for seed in sorted(seeds.keys() & ours.keys())])
    return {
        "pairs": len(common),
        "mean": float(differences.mean()) if len(common) else None,
        "better": int((differences > 0).sum()),
        "t": _t(differences),
        "wilcoxon": _wilcoxon(differences),
        "seeds": len(of_seeds),
        "seeds_mean": float(of_seeds.mean()) if len(of_seeds) else None,
        "seeds_t": _t(of_seeds),
    }


def _t(differences: np.ndarray) -> float | None:
    from scipy.stats import ttest_1samp

    if len(differences) < 2 or np.ptp(differences) < ALIKE:
        return None
    return float(ttest_1samp(differences, 0.0).pvalue)


def _wilcoxon(differences: np.ndarray) -> float | None:
    from scipy.stats import wilcoxon

    if len(differences) < 2 or np.abs(differences).max() < ALIKE:
        return None
    return float(wilcoxon(differences).pvalue)


def comparisons(experiment: Experiment, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every comparison of the file, on each split, of each metric that has figures.

    Returns:
        Each with `title`, `split`, `task`, `metric`, `reference`, `domains`, and by variant `mean` and `spread` by
        domain (over seeds: mean, and standard deviation, None of one seed), `all` being the mean of the domains,
        `seeds`, and `test` (`paired`; None of the reference).
    """
    found = []
    for title, one in experiment.comparisons.items():
        for split in experiment.splits:
            for task, metrics in experiment.metrics.items():
                for metric in metrics:
                    names = list(dict.fromkeys([*one.variants, one.reference]))
                    values = {name: values_of(results, split, name, task, metric) for name in names}
                    values = {name: held for name, held in values.items() if held}
                    if values:
                        entry = {"title": title, "split": split, "task": task, "metric": metric}
                        found.append({**entry, "reference": one.reference, **_side_by_side(values, one.reference)})
    return found


def _side_by_side(values: dict[str, Values], reference: str) -> dict[str, Any]:
    domains = list(dict.fromkeys(domain for held in values.values() for _, domain in held))
    variants = {}
    for name, held in values.items():
        own = [domain for domain in domains if any(d == domain for _, d in held)]
        columns = {domain: [v for (_, d), v in held.items() if d == domain] for domain in own}
        columns["all"] = list(by_seed(held, domains).values())
        variants[name] = {
            "mean": {domain: statistics.fmean(c) for domain, c in columns.items() if c},
            "spread": {d: statistics.stdev(c) if len(c) > 1 else None for d, c in columns.items() if c},
            "seeds": len({seed for seed, _ in held}),
            "test": paired(values[reference], held) if name != reference and reference in values else None,
        }
    return {"domains": domains, "variants": variants}


def print_results(experiment: Experiment, results: list[dict[str, Any]]) -> None:
    """Mean and range over seeds, by split, name and task; then every comparison, by domain, with its tests."""
    # Files and pipes have no width: nothing is to be cut.
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    console.print(_summary(experiment, results))
    tests = False
    for entry in comparisons(experiment, results):
        console.print(_domains_table(entry))
        tested = _tests_table(entry)
        if tested is not None:
            console.print(tested)
            tests = True
    if tests:
        console.print(caution(len({entry["seed"] for entry in results})), highlight=False, soft_wrap=True)


def _summary(experiment: Experiment, results: list[dict[str, Any]]) -> Table:
    table = Table("split", "name", "task", "seeds", "metric", "all rows", "range", "mean of domains", "rows/s")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in results:
        groups.setdefault((entry["split"], entry["name"]), []).append(entry)
    # Of all variants: a mean over fewer domains than theirs would pass for one like theirs.
    everything: dict[tuple[str, str], set[str]] = {}
    for entry in results:
        for domain, tasks in entry["domains"].items():
            for task in tasks:
                everything.setdefault((entry["split"], task), set()).add(domain)
    for (split, name), entries in groups.items():
        rate = f"{statistics.median(e['train_rows_per_s'] for e in entries):,.0f}"
        for task, metrics in experiment.metrics.items():
            for metric in metrics:
                held = values_of(results, split, name, task, metric)
                if not held:
                    continue
                whole = [e["tasks"][task][metric] for e in entries if e["tasks"].get(task, {}).get(metric) is not None]
                means = by_seed(held, sorted(everything[split, task])).values()
                table.add_row(
                    split,
                    name,
                    task,
                    str(len({seed for seed, _ in held})),
                    metric,
                    f"{statistics.fmean(whole):.4f}" if whole else "-",
                    f"{min(whole):.4f} .. {max(whole):.4f}" if whole else "-",
                    f"{statistics.fmean(means):.4f}" if means else "-",
                    rate,
                )
    return table


def _domains_table(entry: dict[str, Any]) -> Table:
    title = (
        f"{entry['title']}: {entry['metric']} of {entry['task']}, split {entry['split']}, mean ± deviation over seeds"
    )
    table = Table("domain", title=title, title_justify="left")
    for name, variant in entry["variants"].items():
        table.add_column(f"{name} ({variant['seeds']})", justify="right")
    for domain in [*entry["domains"], "all"]:
        cells = []
        for variant in entry["variants"].values():
            mean, spread = variant["mean"].get(domain), variant["spread"].get(domain)
            said = "-" if mean is None else f"{mean:.4f}"
            cells.append(said + (f" ±{spread:.4f}" if spread is not None else ""))
        table.add_row(
            "mean of domains" if domain == "all" else domain, *cells, end_section=domain == entry["domains"][-1]
        )
    return table


def _tests_table(entry: dict[str, Any]) -> Table | None:
    tests = {name: variant["test"] for name, variant in entry["variants"].items() if variant["test"]}
    if not tests:
        return None
    table = Table(
        f"minus {entry['reference']}", "seeds", "mean", "p t", "pairs", "mean", "above 0", "p t", "p Wilcoxon"
    )
    for name, test in tests.items():
        table.add_row(
            name,
            str(test["seeds"]),
            signed(test["seeds_mean"]),
            shown_p(test["seeds_t"]),
            str(test["pairs"]),
            signed(test["mean"]),
            str(test["better"]),
            shown_p(test["t"]),
            shown_p(test["wilcoxon"]),
        )
    return table


def caution(seeds: int) -> str:
    """What so many seeds can show, in words."""
    return (
        f"{seeds} seed(s): over seeds, Wilcoxon's test could give no p below {2 / 2**seeds:.2g}, and the t-test has "
        f"{seeds - 1} degree(s) of freedom, so only differences several times their spread stand out. Pairs of seed "
        "and domain are not independent (a seed's domains share one model): their p is too small, and says how "
        "uniform the sign is, no more. Nothing is corrected for the number of variants."
    )
