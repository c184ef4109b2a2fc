"""Prefixes of roles: part of the texts, wherever texts are."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from toy_shards import TOKENIZER, read, schema, write

from dist_rec.cli.shards import _prefixes
from dist_rec.data.append import append
from dist_rec.data.blocks import text_key
from dist_rec.data.build import build
from dist_rec.data.index import read_index
from dist_rec.data.inspect import inspect, print_inspection
from dist_rec.errors import UserError

PREFIXES = {"query": "query: ", "item": "it's: "}
SCHEMA = schema(
    {
        "who": {"role": "user", "kind": "text"},
        "query": {"role": "query", "kind": "text"},
        "title": {"role": "item", "kind": "text"},
        "item": {"role": "item", "kind": "id", "column": "title"},
        "read": {"role": "history", "kind": "texts", "max_length": 3},
        "liked": {"role": "history", "kind": "texts", "max_length": 3, "events": {"of": "title"}},
        "ids": {"role": "history", "kind": "ids", "shares": "item", "max_length": 3, "events": {"of": "item"}},
        "asked": {"role": "history", "kind": "texts", "max_length": 3, "events": {"of": "query"}},
    },
    keys={"user": "user", "query": "query", "time": "time"},
)
ROWS = [
    {"user": "u", "who": "a", "query": "red", "title": "shoe", "read": ["shoe", None], "click": 1, "time": 1},
    {"user": "u", "who": "", "query": None, "title": "", "read": None, "click": 0, "time": 2},
    {"user": "u", "who": "a", "query": "red", "title": "red", "read": [], "click": 0, "time": 3},
]
NAMES = ("who", "query", "title", "read", "liked", "asked")


def texts(root) -> list[list]:
    return [[row[name] for name in NAMES] for row in read(root)]


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_every_text_but_an_empty_one_begins_with_the_prefix_of_its_role(tmp_path, ending):
    source = write(tmp_path / f"raw{ending}", ROWS)
    out, plain = tmp_path / "out", tmp_path / "plain"
    (index,) = build(SCHEMA, [source], str(out), prefixes=PREFIXES, tokenizer=TOKENIZER, workers=1)
    build(SCHEMA, [source], str(plain), tokenizer=TOKENIZER, workers=1)
    assert texts(out) == [
        ["a", "query: red", "it's: shoe", ["it's: shoe", ""], [], []],
        [None, None, None, None, ["it's: shoe"], ["query: red"]],
        ["a", "query: red", "it's: red", [], ["it's: shoe"], ["query: red"]],
    ]
    # Ids and keys are of the raw values.
    for name in ("item", "ids", "key:query", "key:user"):
        assert [row[name] for row in read(out)] == [row[name] for row in read(plain)]
    found = {text["text"]: text for text in pq.read_table(out / "texts.parquet").to_pylist()}
    assert set(found) == {"a", "query: red", "it's: shoe", "it's: red", ""}
    assert all(text["key"] == text_key(value) for value, text in found.items())
    short = {text["text"]: text["tokens"] for text in pq.read_table(plain / "texts.parquet").to_pylist()}
    assert len(found["query: red"]["tokens"]) == len(short["red"]) + 2
    assert index.tokenizer.prefixes == PREFIXES == read_index(str(out)).tokenizer.prefixes
    assert read_index(str(plain)).tokenizer.prefixes == {}


def test_append_extends_and_inspect_know_the_prefixes(tmp_path):
    source, out = write(tmp_path / "raw.jsonl", ROWS), tmp_path / "out"
    build(SCHEMA, [source], str(out), prefixes=PREFIXES, tokenizer=TOKENIZER, workers=1)
    again = write(tmp_path / "again.jsonl", [row | {"title": "lamp"} for row in ROWS])
    tree = {"domains": {"names": ["new"]}, "features": {"title": {}, "query": {}, "read": {}}, "labels": {"click": {}}}
    new = tmp_path / "new"
    build(tree, [again], str(new), extends=str(out), workers=1)
    append(str(out), [again], workers=1)
    for found in (texts(out)[3:], texts(new)):
        assert [row[1:4] for row in found] == [
            ["query: red", "it's: lamp", ["it's: shoe", ""]],
            [None, "it's: lamp", None],
            ["query: red", "it's: lamp", []],
        ]
    assert read_index(str(new)).tokenizer == read_index(str(out)).tokenizer
    build(tree, [again], str(tmp_path / "same"), extends=str(out), prefixes=PREFIXES, workers=1)
    with pytest.raises(UserError, match="--prefix differs from that of .*, query='query: ', item=\"it's: \": leave it"):
        build(tree, [again], str(tmp_path / "x"), extends=str(out), prefixes={"query": "query: "}, workers=1)
    shown = inspect(str(out))
    assert shown["prefixes"] == PREFIXES
    console = Console(record=True, width=120)
    print_inspection(shown, console)
    assert "texts of role query begin with 'query: '" in console.export_text()


def test_a_prefix_that_would_do_nothing_or_not_be_known_is_refused(tmp_path):
    source = write(tmp_path / "raw.jsonl", ROWS)

    def refuse(match: str, prefixes: dict, which=SCHEMA, tokenizer: str | None = TOKENIZER) -> None:
        with pytest.raises(UserError, match=match):
            build(which, [source], str(tmp_path / "out"), prefixes=prefixes, tokenizer=tokenizer, workers=1)
        assert not (tmp_path / "out").exists()

    refuse("'querry' is no role: use user, query, item. Did you mean 'query'", {"querry": "query: "})
    refuse("'history' is no role", {"history": "x"})
    refuse("that of item is empty: leave it out", {"item": ""})
    refuse("name its --tokenizer, with which the index records them", PREFIXES, tokenizer=None)
    no_query = schema({"title": {"role": "item", "kind": "text"}})
    refuse("has no text of role query: leave that prefix out", PREFIXES, no_query)
    assert _prefixes(["query=query: ", "item=a=b"]) == {"query": "query: ", "item": "a=b"} and _prefixes([]) is None
    for wrong, match in ((["query: "], "write ROLE=TEXT"), (["item=a", "item=b"], "given twice")):
        with pytest.raises(UserError, match=match):
            _prefixes(wrong)
