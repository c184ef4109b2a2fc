"""Raw CSV files that are not what they should be: the line is told, and no line is left out in silence."""

from __future__ import annotations

import gzip
from pathlib import Path

import duckdb
import pytest

from dist_rec.data.raw_files import read_error
from dist_rec.data.sources import relations
from dist_rec.errors import UserError

# Past what DuckDB's sniffer looks at.
MANY = 30_000


def read(path: Path) -> list[tuple]:
    """Rows, without the name of their file."""
    with duckdb.connect() as con:
        (relation,) = relations(con, str(path))
        try:
            return [row[:-1] for row in con.sql(f"SELECT * FROM {relation.sql}").fetchall()]
        except duckdb.Error as error:
            raise read_error(error, str(path)) from None


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        (
            "a.csv",
            "item,title\n1,Cafe, au lait\n2,x\n",
            "a.csv, line 2 has not the header's 2 fields but 3: '1,Cafe",
        ),
        ("a.csv.gz", "item,title\n1,x\n2\n3,z\n", "a.csv.gz, line 3 has not the header's 2 fields but 1: '2'"),
        ("a.csv", "item,title\n" + "1,x\n" * MANY + "2,y,z\n", f"a.csv, line {MANY + 2} has not the header's 2"),
        # DuckDB's sniffer, left to itself, takes the last line of these for the header.
        ("a.tsv", "item\ttitle\n1\tx\n2\ty\tz\n", "a.tsv, line 3 has not the header's 2 fields but 3"),
        ("a.inter", 'item\ttitle\n1\t"x\n2\ty\tz\n', "a.inter, line 3 has not the header's 2 fields but 3"),
        ("a.csv", "item\n1,2\n2,3\n", "a.csv, line 2 has not the header's 1 fields but 2"),
        ("a.csv", 'item,title\n1,"x\n2,y\n', "a.csv, line 2 has a quote that does not end with its value: '1,\"x'"),
        ("a.csv", "\n\nitem,title\n1,x\n", "a.csv begins with an empty line: its first line has to be the header"),
        ("a.csv", "item,title\n1,caf\xe9\n", "cannot read .*a.csv, line .*not utf-8"),
    ],
)
def test_a_line_that_cannot_be_read_is_told(tmp_path, name, text, fault):
    write = gzip.compress if name.endswith("gz") else bytes
    (tmp_path / name).write_bytes(write(text.encode("latin-1")))
    with pytest.raises(UserError, match=fault):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("a.csv", 'item,title\r\n007,"Cafe, ""au"" lait"\r\n', [("007", 'Cafe, "au" lait')]),
        ("a.csv", "\ufeffitem,title\n1,x\n", [("1", "x")]),
        ("a.tsv", "item\ttitle\n# 1\tx\n", [("# 1", "x")]),
        ("a.item", 'item\ttitle\n1\t"x\n', [("1", '"x')]),
        ("a.csv", "item,title\n", []),
    ],
)
def test_lines_that_can_be_read_are_all_there(tmp_path, name, text, rows):
    (tmp_path / name).write_bytes(text.encode())
    assert read(tmp_path / name) == rows
