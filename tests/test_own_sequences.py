"""A domain of one's own as sequences: from logs and items to a data set that a mixture's run can be finetuned on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dist_rec.data.index import read_index

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "shards" / "recipes"))

import own_sequences  # noqa: E402
import sequence_rows  # noqa: E402

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
        "users of one event": 1,
        "items without text": 1,
    }


def test_few_events_can_be_asked_to_go(files):
    with pytest.raises(UserError, match="nothing is left of 7 events of known items; users and items need 3 each"):
        own(files, least=3).sequences("kiosk")
    assert set(own(files, least=2).sequences("kiosk").targets.user.to_pylist()) == {"ann", "cat"}


@pytest.mark.parametrize(
    ("name", "old", "new", "fault"),
    [
        (
            "logs.csv",
            "seen_at",
            "saen_at",
            r"no column 'seen_at' for time. Did you mean 'saen_at'\?.*--columns time=NAME",
        ),
        ("logs.csv", "ann,jug,2024-01-01", "ann,jug,", "row 4 has no seen_at"),
        ("logs.csv", "2024-02-01", "yesterday", "column seen_at: 'yesterday' in .* is neither seconds nor a date"),
        ("items.jsonl", '"cup"', '"tea"', "item 'tea' more than once: keep one row an item"),
        ("items.jsonl", '"cup"', "null", "has a row without an item"),
    ],
)
def test_wrong_files_are_refused_in_words(files, name, old, new, fault):
    path = files / name
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=fault):
        own(files).sequences("kiosk")


def test_texts_have_to_be_there(files):
    with pytest.raises(UserError, match="none of the texts title: it has name, sku, tags. Name them with --text"):
        own(files, texts=("title",)).sequences("kiosk")


def recipe(*words: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "shards" / "recipes" / "sequences.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_from_the_command_line_to_a_data_set_and_one_that_extends_it(files):
    given = ["--interactions", files / "logs.csv", "--items", files / "items.jsonl", "--text", "name,tags"]
    given += ["--columns", "user=visitor,item=sku,time=seen_at"]
    built = recipe("--out", files / "kiosk", "--domains", "kiosk", *given)
    assert built.returncode == 0, built.stderr
    assert (
        "kiosk: 2 users, 4 items, 5 interactions; rows 1 train, 1 valid, 2 test; 1 training positions" in built.stdout
    )
    later = recipe("--out", files / "later", "--domains", "stall", "--extends", files / "kiosk", *given)
    assert later.returncode == 0, later.stderr
    assert read_index(str(files / "kiosk" / "catalogue")).rows == 4
    assert "stall" in read_index(str(files / "later" / "train")).schema.domains.names


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--domains", "kiosk", "--interactions", "x.csv"], "needs both --interactions and --items"),
        (["--domains", "toys", "--interactions", "x.csv", "--items", "y.csv"], "and names none beside the known ones"),
        (["--domains", "kiosk"], "unknown domain 'kiosk'.* One of your own needs --interactions and --items"),
        (
            ["--domains", "kiosk", "--interactions", "x.csv", "--items", "y.csv", "--columns", "who=visitor"],
            "--columns who=visitor: is user=NAME or item=NAME or time=NAME",
        ),
        (["--domains", "kiosk", "--interactions", "x.csv", "--items", "y.csv"], "no file matches y.csv"),
    ],
)
def test_half_a_domain_is_refused(tmp_path, words, fault):
    found = recipe("--out", tmp_path / "out", *words)
    assert found.returncode == 2

    assert re.search(fault, found.stderr), found.stderr
