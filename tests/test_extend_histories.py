"""Histories of a data set that extends another: they may begin in earlier tables, of which nothing else is written."""

from __future__ import annotations

import json
import logging

import pytest
from shops import SHOP, extend, shop_rows
from toy_shards import read, values, write

from dist_rec.cli.shards import shards_build
from dist_rec.data.build import build, parse_split
from dist_rec.data.index import read_index
from dist_rec.data.verify import verify
from dist_rec.errors import UserError

# In the columns of the shop's tables, but for what it does not need; bought before its first day, by its customers.
EARLIER = [
    {"customer": "u1", "sku": "i3", "title": "thing 3", "bought": 1, "day": 10},
    {"customer": "u1", "sku": "nobody's", "title": "gone", "bought": 1, "day": 11},
    {"customer": "u1", "sku": "i4", "title": "thing 4", "bought": 0, "day": 12},
    {"customer": "v0", "sku": "i5", "title": "thing 5", "bought": 1, "day": 13},
]


def pasts(root, rows: list[dict]) -> dict[tuple, list[str]]:
    """What a row's histories must be, by customer and day."""
    found = {}
    for row in rows:
        before = [r for r in (*EARLIER, *rows) if r["customer"] == row["customer"] and r["day"] < row["day"]]
        bought = sorted((r for r in before if r["bought"]), key=lambda r: r["day"])[-4:]
        known = values(root, "item")
        found[row["customer"], row["day"]] = [
            ([known.index(r["sku"]) if r["sku"] in known else 0 for r in bought], [r["title"] for r in bought])
        ]
    return found


def test_histories_see_earlier_tables_of_which_nothing_else_is_written(old, tmp_path):
    rows = shop_rows()
    earlier = write(tmp_path / "earlier.parquet", EARLIER)
    plain = extend(old, tmp_path, "plain", SHOP, rows)
    out = extend(old, tmp_path, "seeing", SHOP, rows, history_from=[earlier])
    users, found = values(out, "user"), read(out)
    wanted = pasts(out, rows)
    for got in found:
        assert [(got["past"], got["titles"])] == wanted[users[got["user"]], got["key:time"]]
    assert any("gone" in got["titles"] and 0 in got["past"] for got in found)
    histories = ("past", "titles")
    for one, other in zip(found, read(plain), strict=True):
        assert {n: v for n, v in one.items() if n not in histories} == {
            n: v for n, v in other.items() if n not in histories
        }
    assert read_index(str(out)).schema == read_index(str(plain)).schema
    assert verify(str(out))["rows"] == len(rows)


@pytest.mark.parametrize("split", ["random:2,1,1", "time:2,1,1", "random:1,1,1:by=user"])
def test_earlier_tables_change_no_split(old, tmp_path, split):
    rows, options = shop_rows(), {"split": parse_split(split), "seed": 3}
    earlier = write(tmp_path / "earlier.parquet", EARLIER)
    plain = extend(old, tmp_path, "plain", SHOP, rows, **options)
    out = extend(old, tmp_path, "seeing", SHOP, rows, history_from=[earlier], **options)
    began = 0
    for name in ("train", "valid", "test"):
        one, other = read(out / name), read(plain / name)
        assert [row["item"] for row in one] == [row["item"] for row in other]
        began += sum(len(a["past"]) > len(b["past"]) for a, b in zip(one, other, strict=True))
    assert began


def test_several_new_domains_take_earlier_rows_of_any(old, tmp_path):
    tree = SHOP | {"domains": {"names": ["lamps", "chairs"], "column": "shop"}}
    rows = [row | {"shop": ["lamps", "chairs"][i % 2]} for i, row in enumerate(shop_rows())]
    earlier = write(tmp_path / "earlier.parquet", [EARLIER[0] | {"shop": "books"}, EARLIER[3]])
    out = extend(old, tmp_path, "both", tree, rows, history_from=[earlier])
    index = read_index(str(out))
    assert index.rows_of("lamps") == index.rows_of("chairs") == 20 and not index.rows_of("books")
    assert any("thing 3" in row["titles"] for row in read(out))


def test_earlier_tables_that_do_nothing_or_count_twice_are_said(old, tmp_path, caplog):
    source = write(tmp_path / "rows.parquet", shop_rows())
    with pytest.raises(UserError, match="given both as new rows and as history"):
        build(SHOP, [source], str(tmp_path / "a"), extends=str(old), history_from=[source], workers=1)
    with pytest.raises(UserError, match="--history-from is for rows that come later, with --extends"):
        build(SHOP, [source], str(tmp_path / "a"), history_from=[source], workers=1)
    plain = {name: f for name, f in SHOP["features"].items() if name not in ("past", "titles")}
    earlier = write(tmp_path / "earlier.parquet", EARLIER)
    with caplog.at_level(logging.WARNING):
        extend(old, tmp_path, "b", SHOP | {"features": plain}, shop_rows(), history_from=[earlier])
    assert "--history-from does nothing" in caplog.text


def test_the_command_takes_earlier_tables(old, tmp_path):
    (tmp_path / "new.yaml").write_text(json.dumps(SHOP))
    source, earlier = write(tmp_path / "rows.parquet", shop_rows()), write(tmp_path / "earlier.parquet", EARLIER)
    out = tmp_path / "out"
    shards_build(tmp_path / "new.yaml", [source], str(out), extends=str(old), history_from=[earlier], workers=1)
    assert any("thing 3" in row["titles"] for row in read(out))
