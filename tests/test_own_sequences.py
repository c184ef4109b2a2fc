"""A domain of one's own as sequences: from logs and items to a data set that a mixture's run can be finetuned on."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_rec.data.index import read_index

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "shards" / "recipes"))

import overlap  # noqa: E402
import own_sequences  # noqa: E402
import sequence_rows  # noqa: E402
import sequences  # noqa: E402

from dist_rec.errors import UserError  # noqa: E402

# Ann's tea and cup are of one moment, in the file's order; Bob has one event; nobody had the pot.
EVENTS = """visitor,sku,seen_at
ann,tea,2024-01-02
ann,cup,2024-01-02
bob,tea,2024-01-01
ann,jug,2024-01-01
ann,tea,2024-01-05
ann,gone,2024-01-06
cat,cup,2024-02-01
cat,jug,2024-02-02
"""
ITEMS = [
    {"sku": "tea", "name": "Green tea.", "tags": ["leaf", "hot"]},
    {"sku": "cup", "name": "Cup", "tags": None},
    {"sku": "jug", "name": None, "tags": []},
    {"sku": "pot", "name": "Pot", "tags": ["clay"]},
]
COLUMNS = {"user": "visitor", "item": "sku", "time": "seen_at"}
FIRST = "first events of users of two or three, who have no training row"


@pytest.fixture
def files(tmp_path) -> Path:
    (tmp_path / "logs.csv").write_text(EVENTS)
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return tmp_path


def own(folder: Path, **changes) -> own_sequences.Own:
    given = {"columns": COLUMNS, "texts": ("name", "tags")} | changes
    return own_sequences.Own(str(folder / "logs.csv"), str(folder / "items.jsonl"), **given)


def test_sequences_are_by_time_then_by_the_file_over_the_whole_catalogue(files):
    found = own(files).sequences("kiosk")
    assert found.catalog.ids.to_pylist() == ["tea", "cup", "jug", "pot"]
    assert found.catalog.texts.to_pylist() == ["Green tea. leaf hot.", "Cup.", sequence_rows.NO_TEXT, "Pot. clay."]
    targets, names = found.targets, found.catalog.ids.to_pylist()
    rows = {
        (targets.user[i].as_py(), int(targets.split[i])): (
            [names[j] for j in targets.history.values[targets.history.offsets[i] : targets.history.offsets[i + 1]]],
            names[targets.item[i]],
        )
        for i in range(len(targets))
    }
    assert rows["ann", 2] == (["jug", "tea", "cup"], "tea")
    assert rows["ann", 1] == (["jug", "tea"], "cup")
    assert rows["ann", 0] == (["jug"], "tea")
    assert found.left_out == {
        "events of items that the items lack": 1,
        "events of users or items with fewer than 1": 0,
        "users of one event": 1,
        FIRST: 1,
        "items without text": 1,
    }
    counts = sequence_rows.statistics(sequence_rows.framed(found, 50))
    lost = sum(counts["left_out"][reason] for reason in (*list(found.left_out)[:3], FIRST))
    assert counts["interactions"] + lost == len(EVENTS.splitlines()) - 1
    assert counts["dates"] == ["2024-01-02", "2024-02-02"]


def test_items_may_call_an_item_otherwise(files):
    expected = own(files).sequences("kiosk")
    path = files / "items.jsonl"
    path.write_text(path.read_text().replace('"sku"', '"id"'))
    with pytest.raises(UserError, match="items.jsonl has no column 'sku' for catalogue_item.*catalogue_item=NAME"):
        own(files).sequences("kiosk")
    found = own(files, columns=COLUMNS | {"catalogue_item": "id"}).sequences("kiosk")
    assert found.catalog.ids.equals(expected.catalog.ids) and found.catalog.texts.equals(expected.catalog.texts)
    assert found.targets.item.tolist() == expected.targets.item.tolist()


def test_few_events_can_be_asked_to_go(files):
    with pytest.raises(UserError, match="nothing is left of 7 events of known items; users and items need 3 each"):
        own(files, least=3).sequences("kiosk")
    found = own(files, least=2).sequences("kiosk")
    assert set(found.targets.user.to_pylist()) == {"ann", "cat"}
    assert found.left_out["events of users or items with fewer than 2"] == 1


@pytest.mark.parametrize(
    ("name", "old", "new", "fault"),
    [
        (
            "logs.csv",
            "seen_at",
            "saen_at",
            r".*no column 'seen_at' for time. Did you mean 'saen_at'\?.*--columns time=NAME",
        ),
        ("logs.csv", "ann,jug,2024-01-01", "ann,jug,", r".*logs.csv has a row without seen_at"),
        ("logs.csv", "2024-02-01", "yesterday", "column seen_at: 'yesterday' in .* is neither seconds nor a date"),
        ("logs.csv", "2024-02-01", "1706745600000", ".*1706745600000 seconds, which looks like milliseconds"),
        ("logs.csv", "2024-02-01", "1706745600000000000", ".*1706745600000000000 seconds, which looks .* or finer"),
        ("logs.csv", "2024-02-01", "-inf", "column seen_at: '-inf' in .* is neither seconds nor a date"),
        ("logs.csv", EVENTS.split("\n", 1)[1], "", ".*logs.csv has no rows"),
        (
            "logs.csv",
            EVENTS,
            re.sub(",(tea|cup|jug)", r",0\1", EVENTS),
            ".*none of 8 events is of an item of .*'0tea', and.* is 'tea'",
        ),
        ("items.jsonl", '"cup"', '"tea"', ".*item 'tea' more than once: keep one row an item"),
        ("items.jsonl", '"cup"', "null", ".*items.jsonl has a row without sku"),
        ("items.jsonl", '"cup"', '["cup"]', None),
    ],
)
def test_wrong_files_are_refused_in_words(files, name, old, new, fault):
    path = files / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    if fault is None:  # an id is what it is written as, and this one is of no event
        assert own(files).sequences("kiosk").left_out["events of items that the items lack"] == 3
        return
    with pytest.raises(UserError) as refused:
        own(files).sequences("kiosk")
    assert re.match(fault, str(refused.value)), refused.value


@pytest.mark.parametrize(
    ("times", "fault"),
    [
        ([2.0, float("nan")], "logs.parquet has a row without seen_at"),
        ([2.0, float("inf")], "column seen_at: 'inf' in .*logs.parquet is neither seconds nor a date"),
        ([2.0, 1e30], "column seen_at: '1e[+]?30' in .*logs.parquet is neither seconds nor a date"),
    ],
)
def test_numbers_that_are_no_times_are_refused_in_words(files, times, fault):
    pq.write_table(pa.table({"visitor": ["a"] * 2, "sku": ["tea", "cup"], "seen_at": times}), files / "logs.parquet")
    with pytest.raises(UserError, match=fault):
        own_sequences.Own(str(files / "logs.parquet"), str(files / "items.jsonl"), COLUMNS, ("name",)).sequences("x")


@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_times_are_of_any_unit_with_a_zone_or_without(files, unit, zone):
    times = pa.array([1_700_000_003, 1_700_000_002, 1_700_000_001]).cast(pa.timestamp("s")).cast(pa.timestamp(unit))
    times = times.cast(pa.timestamp(unit, zone)) if zone else times
    table = pa.table({"visitor": ["a"] * 3, "sku": ["tea", "cup", "jug"], "seen_at": times})
    pq.write_table(table, files / "logs.parquet")
    found = own_sequences.Own(str(files / "logs.parquet"), str(files / "items.jsonl"), COLUMNS, ("name",))
    targets = found.sequences("x").targets
    assert targets.time.to_pylist() == [1_700_000_002, 1_700_000_003] and targets.item.tolist() == [1, 0]


@pytest.mark.parametrize("name", ["logs.csv", "items.jsonl"])
def test_an_empty_file_is_said_to_be_empty(files, name):
    (files / name).write_text("")
    with pytest.raises(UserError, match=f"{name}: the file is empty"):
        own(files).sequences("kiosk")


def test_baskets_are_no_events(files):
    pq.write_table(pa.table({"visitor": ["a"], "sku": [["tea", "cup"]], "seen_at": [1]}), files / "logs.parquet")
    with pytest.raises(UserError, match=r"column 'sku' holds VARCHAR\[\], and one item a row is needed"):
        own_sequences.Own(str(files / "logs.parquet"), str(files / "items.jsonl"), COLUMNS, ("name",)).sequences("x")


def test_texts_have_to_be_there(files):
    with pytest.raises(UserError, match="no text titel. It has name, sku, tags: name its texts with --text"):
        own(files, texts=("name", "titel")).sequences("kiosk")
    with pytest.raises(UserError, match="no text title or categories or brand"):
        own(files, texts=None).sequences("kiosk")


def test_files_of_items_may_have_other_texts_and_lists_in_any_form(files):
    (files / "items.jsonl").unlink()
    (files / "items.0.csv").write_text('sku,name\ntea,Tea\ncup,"[""small"",""cup""]"\n')
    pq.write_table(pa.table({"sku": ["jug"], "name": ["Jug"], "tags": [["clay", "old"]]}), files / "items.1.parquet")
    given = own_sequences.Own(str(files / "logs.csv"), str(files / "items.*"), COLUMNS, ("name", "tags"))
    assert given.sequences("kiosk").catalog.texts.to_pylist() == ["Tea.", "small cup.", "Jug. clay old."]


def test_lists_in_lists_are_one_sentence_in_any_form(files):
    tags = [["Kitchen", "", "Pots"], [None, 'Say "clay"'], []]
    (files / "items.jsonl").unlink()
    pq.write_table(pa.table({"sku": ["tea"], "tags": [tags]}), files / "items.0.parquet")
    with (files / "items.1.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("sku", "tags"), ("cup", json.dumps(tags)), ("pan", "[loose")])
    lines = [{"sku": "jug", "tags": tags}, {"sku": "lid", "tags": [[]]}, {"sku": "pot", "tags": "loose]"}]
    (files / "items.2.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = own_sequences.Own(str(files / "logs.csv"), str(files / "items.*"), COLUMNS, ("tags",))
    catalog = given.sequences("kiosk").catalog
    texts = dict(zip(catalog.ids.to_pylist(), catalog.texts.to_pylist(), strict=True))
    assert {texts.pop(sku) for sku in ("tea", "cup", "jug")} == {'Kitchen Pots Say "clay".'}
    assert texts == {"pan": "[loose.", "lid": ".", "pot": "loose]."}


@pytest.fixture
def zones(monkeypatch):
    """Sets this process's time zone by name."""

    def take(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield take
    monkeypatch.undo()
    time.tzset()


def test_order_is_to_the_microsecond_and_the_same_in_every_time_zone(files, zones):
    moments = ("2024-11-03 01:30:00.000003", "2024-11-03 01:30:00.000002", "2024-11-03 01:30:00.000001")
    events = "".join(f"ann,{item},{at}\n" for item, at in zip(("tea", "cup", "jug"), moments, strict=True))
    (files / "logs.csv").write_text("visitor,sku,seen_at\n" + events)
    found = []
    for zone in ("UTC", "America/New_York"):
        zones(zone)
        targets = own(files).sequences("kiosk").targets
        newest = targets.split.tolist().index(2)
        assert targets.history.values[targets.history.offsets[newest] :][:2].tolist() == [2, 1]
        found.append(targets.time.to_pylist())
    assert found[0] == found[1] == [1730597400] * len(found[0])


def test_what_it_shares_with_a_target_is_told_by_titles(files):
    mine, others = own(files).sequences("kiosk"), own(files, texts=("name",)).sequences("stall")
    _, shared = overlap.shared_items(overlap.Identities(mine), overlap.Identities(others))
    assert shared.tolist() == [True, True, False, True]
    found = overlap.Overlap([others])
    found.add(mine)
    assert found.in_words()[-3:] == [
        "target stall: 0 of 2 users and 3 of 4 items are known to occur in pretraining. Raw ids are known of 0 of 2 "
        "users and 0 of 4 items of pretraining, and of 0 of 2 users and 0 of 4 items of the target.",
        "    one side has no raw ids of users, so users are told by nothing",
        "    one side has no raw ids of items, so items are told by title alone",
    ]


def recipe(*words: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "shards" / "recipes" / "sequences.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_from_the_command_line_to_a_data_set_and_one_that_extends_it(files):
    given = ["--interactions", files / "logs.csv", "--items", files / "items.jsonl", "--text", "name,tags"]
    given += ["--columns", "user=visitor,item=sku", "--columns", "time=seen_at"]
    built = recipe("--out", files / "kiosk", "--domains", "kiosk", *given)
    assert built.returncode == 0, built.stderr
    assert (
        "kiosk: 2 users, 4 items, 5 interactions; rows 1 train, 1 valid, 2 test; 1 training positions; targets "
        "from 2024-01-02 to 2024-02-02\n" in built.stdout
    )
    later = recipe("--out", files / "later", "--domains", "stall", "--extends", files / "kiosk", *given)
    assert later.returncode == 0, later.stderr
    assert read_index(str(files / "kiosk" / "catalogue")).rows == 4
    assert "stall" in read_index(str(files / "later" / "train")).schema.domains.names
    (files / "logs.csv").write_text(EVENTS.replace("ann,tea,2024-01-05\n", ""))
    few = recipe("--out", files / "few", "--domains", "kiosk", *given)
    assert few.returncode == 2 and "kiosk: no user has a training row, which takes four events" in few.stderr


@pytest.mark.parametrize("option", ["--domains", "--overlap-with", "--without-overlap"])
def test_it_may_be_the_target_that_a_mixture_is_to_have_nothing_of(files, option):
    words = ["--out", "x", "--domains", "toys,shop" if option == "--domains" else "toys"]
    words += [] if option == "--domains" else [option, "shop"]
    given = ["--interactions", str(files / "logs.csv"), "--items", str(files / "items.jsonl"), "--text", "name"]
    given += ["--columns", "user=visitor,item=sku,time=seen_at"]
    (found,) = sequences.own_sources(sequences.parser().parse_args(words + given)).items()
    assert found[0] == "shop" and found[1]("shop", files).catalog.ids.to_pylist() == ["tea", "cup", "jug", "pot"]


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--domains", "kiosk", "--interactions", "x.csv"], "needs both --interactions and --items"),
        (["--domains", "toys", "--interactions", "x.csv", "--items", "y.csv"], "and names none beside the known ones"),
        (
            ["--domains", "toys", "--core", "5", "--text", "name"],
            "--text and --core: of a domain of your own, which needs",
        ),
        (["--domains", "kiosk"], "unknown domain 'kiosk'.* One of your own needs --interactions and --items"),
        (
            ["--domains", "kiosk", "--interactions", "x.csv", "--items", "y.csv", "--columns", "who=visitor"],
            "--columns who=visitor: is user=NAME or item=NAME or time=NAME or catalogue_item=NAME",
        ),
        (["--domains", "kiosk", "--interactions", "x.csv", "--items", "y.csv"], "no file matches y.csv"),
    ],
)
def test_half_a_domain_is_refused(tmp_path, words, fault):
    found = recipe("--out", tmp_path / "out", *words)
    assert found.returncode == 2

    assert re.search(fault, found.stderr), found.stderr
