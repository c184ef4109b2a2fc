"""What is in a data set: rows, labels, nulls, lengths and the most frequent ids, per domain.

Reads every block once and keeps counts only. Knows no model.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..strict import to_dict
from .frequency import IdCounter
from .index import SHARES, Index, join, read_index
from .reader import ShardReader
from .remote import DEFAULT_RETRY, Retry
from .rows import Ragged, Rows


class _Lengths:
    """Number, nulls, sum, maximum of list lengths."""

    def __init__(self) -> None:
        self.rows = self.empty = self.total = self.longest = 0

    def add(self, lengths: np.ndarray) -> None:
        self.rows += len(lengths)
        self.empty += int(np.count_nonzero(lengths == 0))
        self.total += int(lengths.sum())
        self.longest = max(self.longest, int(lengths.max(initial=0)))

    def summary(self) -> dict[str, Any]:
        rows = max(self.rows, 1)
        return {"empty_share": self.empty / rows, "mean": self.total / rows, "max": self.longest}


def inspect(root: str, top: int = 5, retry: Retry = DEFAULT_RETRY) -> dict[str, Any]:
    """Statistics of the data set at `root` (folder or fsspec URL), ready for JSON.

    Args:
        root: where `index.json` lies.
        top: how many of the most frequent ids of a table to name.
        retry: of every read.

    Returns:
        `name`, `split`, `rows`, `blocks`, `shards`, `bytes`, `time`, `tokenizer`, `prefixes` of
        texts by role; `extension`, what of the schema the rows carry where it extends another's (else None);
        `generations` with number, rows and shards, the first being the build and the others appended; `domains` with
        rows and per label valid, positive (at least half the maximum), missing, `rate` (positive /
        valid) and mean; `features` with role, kind, table, null share (from the index), lengths
        over all rows (empty and null are 0), `tokens` of its texts as used, and the index's `frequency`, which is
        of the rows that were built; `tables` with size (None where any id may come), `inherited` (the sizes that it had
        in the data sets that this one extends), distinct ids used, `frequency` over all rows and features, and the most
        frequent ids with their raw values if the vocabulary is there.

    Raises:
        UserError: no data set there, or a damaged block.
    """
    index = read_index(root, retry)
    schema = index.schema
    names = schema.domains.names
    lengths = {name: _Lengths() for name, f in schema.features.items() if f.kind != "dense"}
    tokens = {name: _Lengths() for name in schema.select(kinds=("text", "texts"))}
    dense = {name: {"count": 0, "sum": 0.0, "min": np.inf, "max": -np.inf} for name in schema.select(kinds=("dense",))}
    tables = {name: IdCounter() for name in schema.table_sizes()}
    labels = [{name: {"valid": 0, "positive": 0, "missing": 0, "sum": 0.0} for name in schema.labels} for _ in names]
    reader = ShardReader(root, index, list(schema.features), with_tokens=True, retry=retry)
    for number, (shard, _) in enumerate(reader.places):
        domain = reader.domain_of[shard.domain]
        rows = reader.decode(number, reader.member(number))
        _count_features(rows, schema, lengths, tokens, dense, tables)
        for name, values in rows.labels.items():
            present = values[~np.isnan(values)]
            counts = labels[domain][name]
            counts["valid"] += len(present)
            counts["positive"] += int(np.count_nonzero(present >= schema.labels[name].maximum / 2))
            counts["missing"] += len(values) - len(present)
            counts["sum"] += float(present.sum(dtype=np.float64))
    times = [t for shard in index.shards for block in shard.blocks if block.time for t in block.time]
    features = {}
    for name, feature in schema.features.items():
        features[name] = {
            "role": feature.role,
            "kind": feature.kind,
            "null_share": index.statistics[name].null_share,
            "unknown": index.statistics[name].unknown,
        }
        if name in lengths:
            features[name]["length"] = lengths[name].summary()
        if name in tokens:
            features[name]["tokens"] = tokens[name].summary()
        if name in dense:
            d = dense[name]
            known = d["count"] > 0
            features[name]["values"] = {
                "mean": d["sum"] / d["count"] if known else None,
                "min": d["min"] if known else None,
                "max": d["max"] if known else None,
            }
        if feature.kind in ("id", "ids"):
            features[name]["table"] = schema.table_of(name)
            known = index.statistics[name].frequency
            features[name]["frequency"] = None if known is None else to_dict(known)
    return {
        "name": index.name,
        "split": index.split,
        "rows": index.rows,
        "blocks": sum(len(shard.blocks) for shard in index.shards),
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "time": [min(times), max(times)] if times else None,
        "tokenizer": index.tokenizer.name if index.tokenizer else None,
        "prefixes": dict(index.tokenizer.prefixes) if index.tokenizer else {},
        "extension": to_dict(index.extension) if index.extension else None,
        "generations": _generations(index),
        "domains": {
            name: {"rows": index.rows_of(name), "labels": {k: _rates(v) for k, v in labels[i].items()}}
            for i, name in enumerate(names)
        },
        "features": features,
        "tables": {name: _table(root, index, name, counter, top) for name, counter in tables.items()},
    }


def _generations(index: Index) -> list[dict[str, int]]:
    found: dict[int, dict[str, int]] = {}
    for shard in index.shards:
        entry = found.setdefault(shard.generation, {"generation": shard.generation, "rows": 0, "shards": 0})
        entry["rows"] += shard.rows
        entry["shards"] += 1
    return [found[number] for number in sorted(found)]


def _count_features(rows: Rows, schema, lengths, tokens, dense, tables) -> None:
    for name, ids in rows.ids.items():
        lengths[name].add(ids.lengths)
        tables[schema.table_of(name)].add(ids.values)
    for name, texts in rows.texts.items():
        lengths[name].add(texts.lengths)
        tokens[name].add(_token_lengths(rows.tokens, texts))
    for name, values in rows.dense.items():
        known = values[~np.isnan(values)].astype(np.float64)
        if len(known):
            d = dense[name]
            d["count"] += len(known)
            d["sum"] += float(known.sum())
            d["min"], d["max"] = min(d["min"], float(known.min())), max(d["max"], float(known.max()))


def _token_lengths(tokens: Ragged, texts: Ragged) -> np.ndarray:
    return tokens.lengths[texts.values]


def _rates(counts: dict[str, float]) -> dict[str, Any]:
    valid = counts["valid"]
    return {
        "valid": valid,
        "positive": counts["positive"],
        "missing": counts["missing"],
        "rate": counts["positive"] / valid if valid else None,
        "mean": counts["sum"] / valid if valid else None,
    }


def _table(root: str, index: Index, table: str, counter: IdCounter, top: int) -> dict[str, Any]:
    frequent = counter.top(top)
    kind = index.schema.features[table].vocabulary.kind
    raw = raw_values(root, table, [row for row, _ in frequent]) if kind == "dictionary" else {}
    return {
        "vocabulary": kind,
        "size": index.schema.table_sizes()[table] if kind != "raw" else None,
        "inherited": index.schema.features[table].vocabulary.inherited,
        "used": len(counter.values),
        "frequency": to_dict(counter.frequency(index.rows)),
        "top": [{"row": row, "count": count, "value": raw.get(row)} for row, count in frequent],
    }


def raw_values(root: str, table: str, rows: list[int]) -> dict[int, str]:
    """Raw values of table rows from the vocabulary in the data set's folder or its parent's."""
    for folder in (root, root.rstrip("/").rpartition("/")[0]):
        if not folder and not root.startswith("/"):
            folder = "."
        path = join(folder, f"vocabulary/{table}.parquet")
        try:
            with fsspec.open(path, "rb") as file:
                found = pq.read_table(file, filters=[("row", "in", rows or [-1])])
            return dict(zip(found["row"].to_pylist(), found["value"].to_pylist(), strict=True))
        except (OSError, ValueError, KeyError):
            continue
    return {}


def print_inspection(inspection: dict[str, Any], console: Console | None = None) -> None:
    """Show what `inspect` returned as tables."""
    console = console or Console()
    span = inspection["time"]
    console.print(
        f"[bold]{escape(inspection['name'])}[/] ({inspection['split']}): {inspection['rows']:,} rows in "
        f"{inspection['blocks']:,} blocks, {inspection['shards']} shards, {inspection['bytes'] / 2**20:,.1f} MiB"
        + (f", time {span[0]} .. {span[1]}" if span else "")
        + (f", tokenizer {inspection['tokenizer']}" if inspection["tokenizer"] else "")
    )
    for role, prefix in inspection["prefixes"].items():
        console.print(f"texts of role {role} begin with {escape(repr(prefix))}")
    if (own := inspection["extension"]) is not None:
        nulls = escape(f"; null in every row: {', '.join(own['missing'])}" if own["missing"] else "")
        console.print(f"extends another data set by {escape(', '.join(own['domains']))}{nulls}")
    if len(inspection["generations"]) > 1:
        generations = Table("generation", "rows", "shards", title="Built (0) and appended")
        for entry in inspection["generations"]:
            generations.add_row(*(f"{entry[k]:,}" for k in ("generation", "rows", "shards")))
        console.print(generations)
    domains = Table("domain", "rows", "label", "valid", "missing", "positive", "rate", "mean", title="Domains")
    for name, domain in inspection["domains"].items():
        head = (escape(name), f"{domain['rows']:,}")
        for label, counts in domain["labels"].items():
            rates = (_number(counts["rate"]), _number(counts["mean"]))
            domains.add_row(*head, label, *(f"{counts[k]:,}" for k in ("valid", "missing", "positive")), *rates)
            head = ("", "")
    console.print(domains)
    features = Table("feature", "role", "kind", "null", "mean length", "max", "tokens mean", "max", title="Features")
    for name, feature in inspection["features"].items():
        length, tokens = feature.get("length", {}), feature.get("tokens", {})
        numbers = (length.get("mean"), length.get("max"), tokens.get("mean"), tokens.get("max"))
        features.add_row(name, feature["role"], feature["kind"], f"{feature['null_share']:.2%}", *map(_number, numbers))
    console.print(features)
    tables = Table("table", "vocabulary", "size", "used", "most frequent (times)", title="Embedding tables")
    for name, table in inspection["tables"].items():
        shown = [(f"#{t['row']}" if t["value"] is None else escape(t["value"]), t["count"]) for t in table["top"]]
        frequent = ", ".join(f"{value} ({count:,})" for value, count in shown)
        size = "any" if table["size"] is None else _grown([*table["inherited"], table["size"]])
        tables.add_row(name, table["vocabulary"], size, f"{table['used']:,}", frequent)
    console.print(tables)
    _print_frequencies(inspection, console)


def _print_frequencies(inspection: dict[str, Any], console: Console) -> None:
    """Tables as counted now, then features as the build counted them: the index knows no more after an append."""
    title = "The most frequent ids that make up so much of all uses"
    counted = Table("ids of", "rows", "uses", "distinct", *(f"{share}%" for share in SHARES), title=title)
    known = {f"table {name}": table["frequency"] for name, table in inspection["tables"].items()}
    known |= {f"{name}, as built": f["frequency"] for name, f in inspection["features"].items() if f.get("frequency")}
    for name, found in known.items():
        numbers = [found[key] for key in ("rows", "occurrences", "distinct")]
        counted.add_row(name, *(f"{number:,}" for number in [*numbers, *(found["coverage"][s] for s in SHARES)]))
    console.print(counted)


def _grown(sizes: list[int]) -> str:
    """A vocabulary's size as the sum of what every data set brought."""
    return " + ".join(f"{size - before:,}" for before, size in pairwise([0, *sizes]))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
