"""One data set of twelve public search and recommendation domains, for the foundation model.

    python shards/recipes/foundation.py --out shards/built/foundation
    python shards/recipes/foundation.py --out /tmp/small --domains homedepot,beauty --max-rows-per-domain 20000
    python shards/recipes/foundation.py --out /tmp/toys --domains toys --extends /tmp/small    # to finetune on

Reads the folder --raw, else DIST_REC_RAW, else ../shared/data beside the repository; its README
and the SOURCE.md of each set say where the raw files come from. Domains:

* homedepot, chorus, elastic_movies: query and item text with `relevance` 0 .. 3, split by query.
* online_retail, beauty, toys, cds, movies_tv, games, scientific, office: history, target and
  `ctr`: 1 for the target, 0 for sampled items that the user never had. Split by time or
  leave-one-out (`amazon.py`, `retail.py`).
* ml1m: the same of MovieLens-1M, where a rating above 3 counts as had; leave-one-out (`movielens.py`).

All rows have one format (`schemas/foundation.yaml`). The negatives are a sample, so AUC over
them ranks models; it is no click-through rate, and calibration means nothing here.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from amazon import LOADERS
from common import SCHEMAS, Part, arguments, build_parts, positive, raw_root, run, workspace, write_part
from movielens import liked_movies
from retail import online_retail
from rows import SAMPLING, Sampling, capped, recommendation_tables
from search import SOURCES, search_table

from dist_rec.errors import UserError, nearest
from dist_rec.schema import Schema, load_schema


def foundation_schema(domains: Sequence[str] | None = None) -> Schema:
    """The common schema, with only the named domains (in the schema's order).

    Raises:
        UserError: a name is unknown; says which are known.
    """
    schema = load_schema(SCHEMAS / "foundation.yaml")
    known = schema.domains.names
    if domains is None:
        return schema
    for name in domains:
        if name not in known:
            raise UserError(f"unknown domain {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")
    if not domains:
        raise UserError(f"--domains names none; known: {', '.join(known)}.")
    kept = dataclasses.replace(schema.domains, names=[name for name in known if name in domains])
    return dataclasses.replace(schema, domains=kept)


def write_domain(
    domain: str,
    root: Path,
    folder: Path,
    sampling: Sampling,
    *,
    targets_per_user: int | None = 3,
    max_rows: int | None = None,
    max_history: int = 50,
) -> Part:
    """Normalise one domain into `folder`.

    Args:
        root: folder of the raw sets.
        sampling: how negatives are drawn; its seed also keys splits and caps.
        targets_per_user: training targets a user, None for all.
        max_rows: upper bound; whole users or queries are left out, by hash.
        max_history: longest history.

    Raises:
        UserError: raw data are missing or malformed.
    """
    if domain in SOURCES:
        return write_part(search_table(domain, root, max_rows, sampling.seed), folder, domain)
    if domain == "online_retail":
        catalog, targets, owned = online_retail(root, targets_per_user, max_history)
    elif domain == "ml1m":
        catalog, targets, owned = liked_movies(root, targets_per_user, max_history)
    else:
        catalog, targets, owned = LOADERS[domain](domain, root, targets_per_user, max_history)
    targets = capped(domain, targets, max_rows, sampling)
    return write_part(recommendation_tables(domain, catalog, targets, owned, sampling), folder, domain)


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def main() -> None:
    from dist_rec.data.build import Split

    parser = arguments(__doc__)
    parser.add_argument("--domains", metavar="A,B", help="only these, comma-separated (default: all)")
    parser.add_argument("--max-rows-per-domain", type=positive, help="keep whole users or queries up to this")
    parser.add_argument(
        "--targets-per-user", type=_not_negative, default=3, help="training targets a user, 0 for all (default: 3)"
    )
    parser.add_argument("--negatives", type=_not_negative, default=1, help="sampled items a target (default: 1)")
    parser.add_argument("--negative-sampling", choices=SAMPLING, default=SAMPLING[0], help=f"(default: {SAMPLING[0]})")
    options = parser.parse_args()
    names = options.domains and [name.strip() for name in options.domains.split(",") if name.strip()]
    schema = foundation_schema(names)
    root = raw_root(options.raw)
    sampling = Sampling(options.negatives, options.negative_sampling, options.seed)
    max_history = schema.features["history"].max_length
    with workspace(options.out) as folder:
        parts = [
            write_domain(
                domain,
                root,
                folder,
                sampling,
                targets_per_user=options.targets_per_user or None,
                max_rows=options.max_rows_per_domain,
                max_history=max_history,
            )
            for domain in schema.domains.names
        ]
        build_parts(schema, parts, Split(kind="column", column="split"), options)


if __name__ == "__main__":
    run(main)
