"""How DuckDB reads a raw file, by the file's ending, and what it says of one that it cannot, in words for whoever named
the file.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import NamedTuple

import duckdb

from ..errors import UserError
from .casts import COMPLAINT, FILE, literal

_SNIFFED = re.compile(r'Error when sniffing file "(.*)"')
_LINE = re.compile(r"CSV Error on Line: (\d+)\n(?:Original Line: ?(.*)\n)?")
_FIELDS = re.compile(r"Expected Number of Columns: (\d+) Found: (\d+)")
_FILE = re.compile(r"^\s*file = (.*)$", re.MULTILINE)
# Characters of a faulty line that are shown.
LONGEST_LINE = 80


class CsvForm(NamedTuple):
    delimiter: str
    quote: str

    @property
    def options(self) -> str:
        quote = literal(self.quote)
        return f"delim={literal(self.delimiter)}, quote={quote}, escape={quote}, comment='', skip=0"


# RecBole's atomic files never quote: a title may begin with a quotation mark.
CSV_FORMS = {".csv": CsvForm(",", '"'), ".tsv": CsvForm("\t", '"')} | dict.fromkeys(
    (".inter", ".item", ".user"), CsvForm("\t", "")
)


def _ending(file: str) -> str:
    return Path(re.sub(r"\.(gz|zst)$", "", file.lower())).suffix


def reader(file: str) -> str:
    """SQL that reads files of this one's kind, with `{files}` for their list.

    Raises:
        UserError: its ending tells no format.
    """
    ending, common = _ending(file), f"union_by_name=true, filename='{FILE}'"
    if ending in (".parquet", ".pq"):
        return f"read_parquet([{{files}}], binary_as_string=true, {common})"
    if ending in CSV_FORMS:
        return f"read_csv([{{files}}], {CSV_FORMS[ending].options}, header=true, all_varchar=true, {common})"
    if ending in (".jsonl", ".ndjson"):
        return f"read_json([{{files}}], format='newline_delimited', maximum_depth=1, {common})"
    raise UserError(
        f"{file}: cannot tell its format. Known endings: .parquet, .csv, .tsv, .jsonl (also .gz), "
        "and RecBole's .inter, .item, .user."
    )


def check_header(con: duckdb.DuckDBPyConnection, file: str) -> None:
    """Refuse a CSV file whose first line is empty: the header, further down, would be read as a row.

    Raises:
        UserError: it is.
        duckdb.Error: it cannot be read.
    """
    if _ending(file) in CSV_FORMS and Path(file).stat().st_size and not _first_line(con, file).strip():
        raise UserError(f"{file} begins with an empty line: its first line has to be the header.")


def read_error(error: duckdb.Error, pattern: str) -> UserError:
    """What DuckDB says of the files of a glob."""
    text = str(error)
    if ours := COMPLAINT.search(text):
        return UserError(ours.group(1))
    if isinstance(error, duckdb.OutOfMemoryException):
        return UserError(f"reading {pattern} needs more memory than memory_limit allows: raise it. {_first(text)}")
    where = pattern
    if line := _LINE.search(text):
        number, original = line.group(1), (line.group(2) or "")[:LONGEST_LINE]
        file = _FILE.search(text)
        where = f"{file.group(1) if file else pattern}, line {number}"
        if fields := _FIELDS.search(text):
            return UserError(
                f"{where} has not the header's {fields.group(1)} fields but {fields.group(2)}: {original!r}. A value "
                "with the separator in it stands between quotes."
            )
        if "unterminated quote" in text:
            return UserError(
                f"{where} has a quote that does not end with its value: {original!r}. A quote in a value is doubled."
            )
    return UserError(f"cannot read {where}: {_first(text)} The file is damaged or not what its ending says.")


def sniffing_error(con: duckdb.DuckDBPyConnection, error: duckdb.Error, pattern: str) -> UserError:
    """`read_error`, of the line that is not like the header where DuckDB's sniffer met one and does not say which."""
    if (sniffed := _SNIFFED.search(str(error))) and (form := CSV_FORMS.get(_ending(sniffed.group(1)))):
        try:
            _read_unsniffed(con, sniffed.group(1), form)
        except csv.Error:
            pass
        except duckdb.Error as found:
            error = found
    return read_error(error, pattern)


def _read_unsniffed(con: duckdb.DuckDBPyConnection, file: str, form: CsvForm) -> None:
    """Read a whole file with as many fields a line as its first has.

    Raises:
        duckdb.Error: a line has another number, which it tells.
        csv.Error: the first is none.
    """
    quoting = csv.QUOTE_MINIMAL if form.quote else csv.QUOTE_NONE
    (names,) = csv.reader([_first_line(con, file)], delimiter=form.delimiter, quoting=quoting)
    columns = ", ".join(f"'c{i}': 'VARCHAR'" for i in range(len(names)))
    parsed = f"read_csv({literal(file)}, {form.options}, header=true, auto_detect=false, columns={{{columns}}})"
    con.execute(f"SELECT count(COLUMNS(*)) FROM {parsed}").fetchall()


def _first_line(con: duckdb.DuckDBPyConnection, file: str) -> str:
    whole = f"{CsvForm(chr(1), '').options}, header=false, auto_detect=false, columns={{'line': 'VARCHAR'}}"
    found = con.sql(f"SELECT line FROM read_csv({literal(file)}, {whole}) LIMIT 1").fetchall()
    return (found[0][0] or "") if found else ""


def _first(text: str) -> str:
    """The part of a DuckDB message that concerns the data, not the SQL."""
    return " ".join(text.split("\n\nLINE ")[0].strip().splitlines()[:3])
