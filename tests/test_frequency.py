"""The index says exactly how often ids of a build occur; an append leaves that as it was, and inspect counts anew."""

from __future__ import annotations

import io
import json
import random
from collections import Counter

import numpy as np
import pytest
from rich.console import Console
from toy_shards import SMALL, read, schema, small_rows, write

from dist_rec.data import frequency as frequency_module
from dist_rec.data.append import append
from dist_rec.data.build import build, parse_split
from dist_rec.data.frequency import frequency
from dist_rec.data.index import SHARES, Frequency, read_index
from dist_rec.data.inspect import inspect, print_inspection
from dist_rec.data.verify import verify
from dist_rec.errors import UserError

FEATURES = {
    "user": {"role": "user", "kind": "id", "vocabulary": {"kind": "raw"}},
    "item": {"role": "item", "kind": "id", "aspect": "id"},
    "shop": {"role": "item", "kind": "id", "vocabulary": {"kind": "hash", "size": 5}},
    "tags": {"role": "item", "kind": "ids"},
    "seen": {"role": "history", "kind": "ids", "shares": "item", "max_length": 4},
    "past": {"role": "history", "kind": "ids", "shares": "item", "max_length": 3, "events": {"of": "item"}},
    "liked": {"role": "history", "kind": "ids", "shares": "item", "events": {"of": "item", "label": "click"}},
    "tags_in_vain": {"role": "user", "kind": "ids", "vocabulary": {"kind": "integer", "size": 3}},
}


def invented(n: int, times: list[int | None]) -> list[dict]:
    draw = random.Random(4)

    def item() -> str | None:
        return draw.choice([None, *(f"i{int(40 * draw.random() ** 3)}" for _ in range(9))])

    return [
        {
            "user": draw.choice([None, *range(25)]),
            "item": item(),
            "shop": draw.choice([None, "a", "b", "c"]),
            "tags": draw.choice([None, [], ["x", "y"], ["x"], ["z", None]]),
            "seen": [item() for _ in range(draw.randrange(7))],
            "tags_in_vain": None,
            "time": draw.choice(times),
            "click": draw.choice([0, 1, None]),
        }
        for _ in range(n)
    ]


def counted(rows: list[dict], feature: str) -> Frequency:
    """By a loop over every id."""
    uses = Counter()
    for row in rows:
        ids = row[feature]
        uses.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    ranked = sorted(uses.values(), reverse=True)
    coverage = {}
    for name, share in SHARES.items():
        taken = 0
        while sum(ranked[:taken]) * 1000 < share * sum(ranked):
            taken += 1
        coverage[name] = taken
    return Frequency(rows=len(rows), occurrences=sum(ranked), distinct=len(ranked), coverage=coverage)


@pytest.mark.parametrize("split", [None, "time:2,1,1", "random:2,1,1"])
def test_the_index_counts_every_id_of_every_split(tmp_path, split, monkeypatch):
    # Of events, so that there are many batches of them.
    monkeypatch.setattr(frequency_module, "BATCH_ROWS", 50)
    times = [*range(60)] if split == "time:2,1,1" else [None, *range(60)]
    raw = write(tmp_path / "raw.parquet", invented(600, times))
    toy = schema(FEATURES, keys={"user": "user", "time": "time"})
    indexes = build(toy, [raw], str(tmp_path / "out"), split=split and parse_split(split), workers=1, block_rows=64)
    assert len(indexes) == (3 if split else 1)
    for index in indexes:
        root = tmp_path / "out" / index.split if split else tmp_path / "out"
        rows = read(root)
        assert read_index(str(root)) == index and len(rows) == index.rows
        for name in FEATURES:
            assert index.statistics[name].frequency == counted(rows, name), (index.split, name)
        assert verify(str(root))["rows"] == len(rows)
        # Tables are counted again, over all features that use them, when a data set is inspected.
        seen = [{"ids": [i for name in ("seen", "past", "liked") for i in row[name] or []]} for row in rows]
        for together, row in zip(seen, rows, strict=True):
            together["ids"] += [row["item"]] * (row["item"] is not None)
        found = inspect(str(root))["tables"]["item"]["frequency"]
        assert found["distinct"] == counted(seen, "ids").distinct and found["coverage"] == counted(seen, "ids").coverage
        assert len(rows) == found["rows"] and found["coverage"]["99.9"] > found["coverage"]["50"] > 1


def test_text_and_dense_features_have_no_frequency(tmp_path):
    raw = write(tmp_path / "raw.parquet", small_rows(50))
    (index,) = build(SMALL, [raw], str(tmp_path / "out"), workers=1)
    assert {n for n, s in index.statistics.items() if s.frequency is not None} == {"item", "tags"}


def test_coverage_of_a_thousand_even_ids_and_of_one_that_is_half():
    even = frequency(np.array([7]), np.array([1000]), 10)
    assert even.coverage == {"50": 500, "90": 900, "95": 950, "99": 990, "99.9": 999} and even.occurrences == 7000
    uneven = frequency(np.array([1000, 1]), np.array([1, 1000]), 10)
    assert uneven.coverage == {"50": 1, "90": 801, "95": 901, "99": 981, "99.9": 999} and uneven.distinct == 1001
    none = frequency(np.zeros(0, np.int64), np.zeros(0, np.int64), 10)
    assert set(none.coverage.values()) == {0} and none.distinct == none.occurrences == 0


def test_an_append_keeps_what_the_build_counted_and_inspect_shows_what_is_there(tmp_path):
    old, new = small_rows(300), [row | {"item": 1000 + i} for i, row in enumerate(small_rows(200))]
    feature = {"role": "item", "kind": "id", "vocabulary": {"kind": "raw"}}
    toy = schema({"item": feature}, keys={"time": "time"}, domains="ab")
    (built,) = build(toy, [write(tmp_path / "old.parquet", old)], str(tmp_path / "out"), workers=1)
    appended = append(str(tmp_path / "out"), [write(tmp_path / "new.parquet", new)], workers=1)
    known = appended.statistics["item"].frequency
    assert known == built.statistics["item"].frequency and known.rows == 300 and appended.rows == 500
    inspection = inspect(str(tmp_path / "out"))
    assert inspection["tables"]["item"]["frequency"]["distinct"] == known.distinct + 200
    assert inspection["features"]["item"]["frequency"]["distinct"] == known.distinct
    text = io.StringIO()
    print_inspection(inspection, Console(file=text, width=200))
    shown = text.getvalue()
    assert "table item" in shown and "item, as built" in shown and str(known.distinct + 200) in shown


def test_an_index_from_before_frequencies_is_read_and_appended_to(tmp_path):
    root = tmp_path / "out"
    build(SMALL, [write(tmp_path / "old.parquet", small_rows(60))], str(root), workers=1)
    tree = json.loads((root / "index.json").read_text())
    for entry in tree["statistics"].values():
        del entry["frequency"]
    (root / "index.json").write_text(json.dumps(tree))
    assert read_index(str(root)).statistics["item"].frequency is None
    index = append(str(root), [write(tmp_path / "new.parquet", small_rows(30))], workers=1)
    assert index.rows == 90 and index.statistics["item"].frequency is None
    tree["statistics"]["item"]["frequency"] = {"rows": 9, "occurrences": 9, "distinct": 3, "coverage": {"50": 1}}
    (tmp_path / "index.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"coverage is of 50, 90, 95, 99, 99\.9 percent, each"):
        read_index(str(tmp_path))
    inspection = inspect(str(root))
    assert inspection["features"]["item"]["frequency"] is None and inspection["tables"]["item"]["frequency"]["distinct"]
    shown = io.StringIO()
    print_inspection(inspection, Console(file=shown, width=200))
    assert "table item" in shown.getvalue() and "as built" not in shown.getvalue()
