"""Sequence recipes: published counts, the sources' own splits, the paper's raw files, and the whole way to shards.

Needs the raw folder for some tests (DIST_REC_RAW, else ../shared/data beside the repository).
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from raw_recipes import (
    RAW,
    RECIPES,
    ROOT,
    amazon2018,
    common,
    lists,
    needs_raw,
    recipe_rows,
    sequence_rows,
    sequence_sources,
    sequences,
)

from dist_rec.data.index import read_index
from dist_rec.errors import UserError


def source(domain: str) -> sequence_rows.Sequences:
    return sequences.SOURCES[domain](domain, RAW)


def prefixes(targets: recipe_rows.Targets, longest: int) -> Counter:
    """What prefix expansion makes of the training rows: (history, item) pairs."""
    rows = np.flatnonzero(targets.split == 0)
    found = Counter()
    for events in lists(sequence_rows.whole(targets, rows)):
        found.update((tuple(events[max(at - longest, 0) : at]), events[at]) for at in range(1, len(events)))
    return found


def lines(path: Path) -> list[list[str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n").split("\t") for line in file]


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


# Public sources ------------------------------------------------------------------------------


@needs_raw
def test_scientific_is_the_public_split_prefix_by_prefix():
    folder = RAW / "amazon2018_scientific_cowpirec"
    found = source("scientific")
    rows = {name: lines(folder / f"Scientific.{name}.inter.gz")[1:] for name in common.SPLITS}
    published = Counter((numbers(history), int(item)) for _, history, item in rows["train"])
    assert published.total() == 34_101
    assert prefixes(found.targets, 50) == published
    assert (found.targets.split == 0).sum() == 8_442
    for number, name in ((1, "valid"), (2, "test")):
        held = found.targets.take(np.flatnonzero(found.targets.split == number))
        ours = zip(held.user.to_pylist(), map(tuple, lists(held.history)), held.item.tolist(), strict=True)
        assert list(ours) == [(user, numbers(history), int(item)) for user, history, item in rows[name]]
    asins = {int(number): asin for asin, number in lines(folder / "Scientific.item2index.gz")}
    texts = dict(lines(folder / "Scientific.text.gz")[1:])
    assert found.catalog.ids.to_pylist() == [asins[number] for number in range(4_385)]
    assert found.catalog.texts.to_pylist() == [texts[asins[number]] for number in range(4_385)]
    users = {number: name for name, number in lines(folder / "Scientific.user2index.gz")}
    named = zip(found.targets.user.to_pylist(), found.targets.user_id.to_pylist(), strict=True)
    assert all(users[number] == name for number, name in named)


@needs_raw
@pytest.mark.parametrize(("domain", "rows"), [("cds", 49_251), ("movies_tv", 21_937)])
def test_rows_without_users_fold_to_sequences_that_expand_to_them(domain, rows):
    folder = RAW / sequence_sources.BY_TIME[domain]
    found = source(domain)
    published = Counter((numbers(history), int(item)) for history, item in lines(folder / "train.tsv.gz")[1:])
    assert published.total() == rows
    assert prefixes(found.targets, 10) == published
    # One sequence for each row of one event's history: it begins nowhere else.
    assert (found.targets.split == 0).sum() == sum(n for (past, _), n in published.items() if len(past) == 1)
    assert not found.left_out["training sequences that begin inside a history"]


@needs_raw
@pytest.mark.parametrize(
    ("domain", "users", "items", "interactions", "positions"),
    [
        ("scientific", 8_442, 4_385, 59_427, 34_101),
        ("online_retail", 16_520, 3_469, 519_906, 470_346),
        ("online_retail_shuffled", 16_520, 3_469, 519_906, 470_346),
        ("beauty", 22_363, 12_101, 198_502, 198_502 - 3 * 22_363),
        ("toys", 19_412, 11_924, 167_597, 167_597 - 3 * 19_412),
        ("games", 50_546, 16_859, 440_264, 440_264 - 3 * 50_546),
        ("ml1m", 6_040, 3_416, 999_611, 999_611 - 3 * 6_040),
    ],
)
def test_counts_are_the_published_ones(domain, users, items, interactions, positions):
    found = sequence_rows.framed(source(domain), 50)
    counts = sequence_rows.statistics(found)
    assert [counts[name] for name in ("users", "items", "interactions", "positions")] == [
        users,
        items,
        interactions,
        positions,
    ]
    assert counts["rows"]["valid"] == counts["rows"]["test"] == users
    lengths = found.targets.history.lengths
    # The source of games cuts whole sequences at 50.
    assert lengths.max() == (49 if domain == "games" else 50) and lengths.min() >= 1
    assert found.catalog.texts.null_count == 0


@needs_raw
def test_beauty_holds_out_the_last_two_of_every_line():
    found = source("beauty")
    with gzip.open(RAW / "amazon2014_beauty" / "sequential_data.txt.gz", "rt") as file:
        raw = {user: [int(item) for item in items] for user, *items in (line.split() for line in file)}
    events = lists(sequence_rows.whole(found.targets, np.arange(len(found.targets))))
    for user, split, one in zip(found.targets.user.to_pylist(), found.targets.split, events, strict=True):
        assert one == raw[user][: len(raw[user]) - 2 + split]


@needs_raw
def test_office_keeps_its_split_and_trains_before_it():
    found = source("office")
    targets, time = found.targets, found.targets.time.to_numpy()
    assert np.bincount(targets.split)[1:].tolist() == [4_866, 4_866] and len(found.catalog) == 3_459
    assert time[targets.split == 0].max() < time[targets.split == 1].min()
    assert found.asins.null_count < 200


# The paper's raw files -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "clean"),
    [
        ("Soap", "Soap."),
        ("Soap...", "Soap."),
        ('8" &amp;\nwide', "8 &wide."),
        (["Home &amp; Kitchen", "Bath"], "Home & Kitchen Bath."),
        ("", "."),
        ("x" * 1_998, "x" * 1_998 + "."),
        ("x" * 1_999, ""),
    ],
)
def test_fields_are_cleaned_as_in_the_paper(value, clean):
    assert amazon2018.cleaned(value) == clean


def raw_category(root: Path) -> None:
    """Six users with six items each, all at one moment for the first; one of the items has no metadata."""
    (root / "Ratings").mkdir(parents=True)
    (root / "Metadata").mkdir()
    rows = []
    for user in range(6):
        for at in range(7):
            time = 500 if user == 0 else 500 + (at * 3 + user) % 7
            rows.append(f"{'NOMETA' if at == 6 else f'A{at}'},U{user},5.0,{time}")
    rows += [rows[0], "A0,LONER,1.0,3"]
    (root / "Ratings" / "Prime_Pantry.csv").write_text("\n".join(rows) + "\n")
    items = [
        {"asin": f"A{at}", "title": f"Thing {at}", "category": ["Pantry", f"Shelf {at}"], "brand": "B"}
        for at in range(6)
    ]
    items[1] = {"asin": "A1"}
    items[2] = {"asin": "A2", "title": "", "brand": "Only"}
    items += [{"asin": "A0", "title": "A second line is not read"}, {"asin": "A9", "title": "never rated"}]
    with gzip.open(root / "Metadata" / "meta_Prime_Pantry.json.gz", "wt") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)


def test_a_raw_category_follows_the_papers_steps(tmp_path):
    raw_category(tmp_path)
    found = amazon2018.category("amazon_pantry", tmp_path)
    assert found.catalog.ids.to_pylist() == [f"A{at}" for at in range(6)]
    assert found.catalog.texts.to_pylist()[:4] == [
        "Thing 0. Pantry Shelf 0. B. ",
        ".",
        ". Only. ",
        "Thing 3. Pantry Shelf 3. B. ",
    ]
    assert found.left_out["ratings of items without metadata"] == 6
    assert found.left_out["repeated ratings"] == 1 and found.left_out["items without text"] == 1
    counts = sequence_rows.statistics(sequence_rows.framed(found, 50))
    assert (counts["users"], counts["interactions"], counts["positions"]) == (6, 36, 36 - 3 * 6)
    assert set(found.targets.user_id.to_pylist()) == {f"U{user}" for user in range(6)}
    test = found.targets.take(np.flatnonzero(found.targets.split == 2))
    events = dict(zip(test.user.to_pylist(), lists(sequence_rows.whole(test, np.arange(6))), strict=True))
    assert events["U0"] == [0, 1, 2, 3, 4, 5]
    assert events["U1"] == sorted(range(6), key=lambda at: (at * 3 + 1) % 7)


def test_the_shops_file_gives_invoices_as_users(tmp_path):
    rows = ["InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country"]
    for invoice in range(5):
        rows += [
            f"C{invoice},{code},{' TEA  CUP ' if not invoice else 'other'},-1,12/1/2010 8:26,1,,UK" for code in "vwxyz"
        ]
    rows += [
        "C0,v,repeated,-1,12/1/2010 8:26,1,,UK",
        "C0,q,,1,12/1/2010 8:26,1,,UK",
        "C1,\xa3,pound,1,12/1/2010 8:26,1,,UK",
    ]
    (tmp_path / "data.csv").write_text("\n".join(rows) + "\n", encoding="latin1")
    found = amazon2018.shop("kaggle_online_retail", tmp_path)
    assert found.catalog.ids.to_pylist() == list("vwxyz")
    assert set(found.catalog.texts.to_pylist()) == {"tea  cup."}
    assert sequence_rows.statistics(sequence_rows.framed(found, 50))["interactions"] == 25
    assert found.left_out["lines without description"] == 1


def test_an_invoice_is_shuffled_alike_each_time(monkeypatch):
    lines = pa.table(
        {
            "InvoiceNo": [str(at // 40) for at in range(240)],
            "StockCode": [f"{at % 40:05d}" for at in range(240)],
            "Description": ["cup"] * 240,
            "Quantity": [1] * 240,
            # One moment an invoice but for the fourth, of two: what is later stays later.
            "InvoiceDate": pa.array([60 * (at // 40) + (120 <= at < 140) * -1 for at in range(240)], pa.timestamp("s")),
        }
    )
    monkeypatch.setattr(sequence_sources, "read_lines", lambda root: lines)

    def orders(domain: str) -> dict[str, list[int]]:
        targets = sequence_sources.SOURCES[domain](domain, RAW).targets
        test = targets.take(np.flatnonzero(targets.split == 2))
        return dict(zip(test.user.to_pylist(), lists(sequence_rows.whole(test, np.arange(6))), strict=True))

    found = orders("online_retail_shuffled")
    assert found == orders("online_retail_shuffled")
    assert set(map(tuple, orders("online_retail").values())) == {tuple(range(40))}
    assert all(sorted(order) == list(range(40)) for order in found.values())
    assert len(set(map(tuple, found.values()))) == 6
    assert set(found["3"][:20]) == set(range(20)) and set(found["0"][:20]) != set(range(20))


# The whole way -------------------------------------------------------------------------------


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(RECIPES / "sequences.py"), "--workers", "1", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def stored(folder: Path) -> list[dict]:
    """Every row of a data set."""
    rows = []
    for shard in read_index(str(folder)).shards:
        for sample in webdataset.WebDataset(str(folder / shard.file), shardshuffle=False, empty_check=False):
            rows += pa.ipc.open_stream(sample["arrow"]).read_all().to_pylist()
    return rows


def test_the_recipe_builds_rows_and_a_catalogue_that_share_ids_and_texts(tmp_path):
    raw_category(tmp_path / "raw")
    out = tmp_path / "built"
    done = run("--out", out, "--raw", tmp_path / "raw", "--domains", "amazon_pantry", "--max-length", 3)
    assert done.returncode == 0, done.stderr
    assert "6 users, 6 items, 36 interactions" in done.stdout and not list(tmp_path.glob(".recipe-*"))
    catalogue, train = stored(out / "catalogue"), stored(out / "train")
    assert [row["item_id"] for row in catalogue] == [1, 2, 3, 4, 5, 6]
    assert all(row["label:next"] is None and row["history"] is None for row in catalogue)
    texts = {row["item_id"]: row["title"]["text"] for row in catalogue}
    assert texts[2] == "."
    for row in [*train, *stored(out / "valid"), *stored(out / "test")]:
        assert row["label:next"] == 1 and row["key:user"] is not None and row["key:time"] >= 500
        assert row["title"]["text"] == texts[row["item_id"]]
        assert [text["text"] for text in row["history_text"]] == [texts[item] for item in row["history"]]
        assert 1 <= len(row["history"]) <= 3
    assert sum(len(row["history"]) for row in train) == 18
    held = set(pq.read_table(out / "texts.parquet")["text"].to_pylist())
    assert set(texts.values()) <= held
    schema = read_index(str(out / "catalogue")).schema
    assert schema == read_index(str(out / "train")).schema and schema.features["item_id"].vocabulary.size == 7
    assert json.loads((out / "statistics.json").read_text())["amazon_pantry"]["positions"] == 18
    for name in ("kaggle_online_retail", "amazon_pantry"):
        (tmp_path / "raw" / "data.csv").write_text("")
        done = run("--out", tmp_path / "more", "--raw", tmp_path / "raw", "--domains", name, "--extends", out)
        assert done.returncode == 2 and "Traceback" not in done.stderr, name


@needs_raw
def test_a_target_extends_what_is_pretrained_on(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    options = ("--domains", "movies_tv", "--train-only", "--max-rows-per-domain", 500, "--without-overlap", "office")
    done = run("--out", old, *options)
    assert done.returncode == 0, done.stderr
    assert not (old / "test").exists() and "target office" in done.stdout
    found = json.loads((old / "overlap.json").read_text())
    assert found["targets"]["office"]["users_shared"] == 28 and found["pairs"][0]["removed"]
    done = run("--out", new, "--domains", "office", "--max-rows-per-domain", 500, "--extends", old)
    assert done.returncode == 0, done.stderr
    schema = read_index(str(new / "train")).schema
    assert schema.domains.names == ["movies_tv", "office"]
    assert schema.features["item_id"].vocabulary.inherited == [2_654]
    assert min(row["item_id"] for row in stored(new / "catalogue")) == 2_654


def test_wrong_command_lines_fail_in_words(tmp_path):
    for options, words in (
        (["--domains", "beuty"], "Did you mean 'beauty'"),
        (["--domains", ","], "names no domain"),
        (["--domains", "toys", "--overlap-with", "toy"], "Did you mean 'toys'"),
        (["--domains", "toys", "--without-overlap", "office"], "--train-only"),
        (["--domains", "toys", "--without-overlap", "toys", "--train-only"], "nothing of toys"),
        (["--domains", "toys", "--raw", str(tmp_path)], "DIST_REC_RAW"),
        (["--domains", "amazon_home", "--raw", str(tmp_path)], "Home_and_Kitchen.csv"),
        (["--domains", "kaggle_online_retail", "--raw", str(tmp_path)], "data.csv"),
    ):
        done = run("--out", tmp_path / "out", *options)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_the_schema_knows_every_source_and_no_other():
    assert sorted(sequences.sequence_schema(list(sequences.SOURCES)).domains.names) == sorted(sequences.SOURCES)
    history = sequences.sequence_schema(["toys"], 7).features["history_text"]
    assert history.max_length == 7
    with pytest.raises(UserError, match="unknown domain"):
        sequences.sequence_schema(["home"])
