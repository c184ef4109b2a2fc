"""Histories that a data set's rows make are point in time."""

from __future__ import annotations

import pytest
from toy_shards import HISTORY, history_rows, read, values, write

from dist_rec.data.build import build, parse_split
from dist_rec.schema import Schema
from dist_rec.strict import from_dict


@pytest.mark.parametrize("split", [None, "time:2,1,1", "column:split", "random:2,1,1"])
def test_histories_are_point_in_time(tmp_path, split, monkeypatch):
    """Against a plain double loop: ties see nothing of each other, and train events only, unless split by time."""
    monkeypatch.setattr("dist_rec.data.histories.BATCH_ROWS", 7)
    rows = history_rows(200)
    if split == "time:2,1,1":
        rows = [r for r in rows if r["time"] is not None]
    source = write(tmp_path / "rows.parquet", rows)
    s = from_dict(Schema, _tree_with_id(), "test")
    build(
        s,
        [source],
        str(tmp_path / "out"),
        split=parse_split(split) if split else None,
        workers=1,
        block_rows=32,
        shard_rows=64,
    )
    found = {}
    for name in ("train", "valid", "test") if split else (".",):
        found |= {row["id"]: row | {"split": name} for row in read(tmp_path / "out" / name)}
    items, genres = values(tmp_path / "out", "item"), values(tmp_path / "out", "genre")
    assert sorted(found) == [r["id"] for r in rows]
    leaky = 0
    for row in rows:
        if row["user"] is None or row["time"] is None:
            assert found[row["id"]]["past"] is None
            continue
        before = [r for r in rows if r["user"] == row["user"] and r["time"] is not None and r["time"] < row["time"]]
        before.sort(key=lambda r: (r["time"], r["id"]))
        if split and not split.startswith("time"):
            leaky += len(before)
            before = [r for r in before if found[r["id"]]["split"] == "train"]
            leaky -= len(before)
        liked = [r for r in before if r["grade"] is not None and r["grade"] >= 2][-4:]
        got = found[row["id"]]
        assert [items[i] for i in got["past"]] == [r["item"] for r in liked]
        assert [genres[i] for i in got["past_genres"]] == [r["genre"] for r in liked]
        assert got["past_titles"] == [r["title"] for r in before if r["title"] is not None][-3:]
    assert (leaky > 0) == (split in ("column:split", "random:2,1,1"))


def _tree_with_id() -> dict:
    from dist_rec.strict import to_dict

    tree = to_dict(HISTORY)
    tree["features"]["id"] = {"role": "user", "kind": "id", "vocabulary": {"kind": "integer", "size": 1000}}
    return tree
