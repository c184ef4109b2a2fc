"""UCI Online Retail: a shop's invoices as implicit feedback with country and time.

A user is a CustomerID. Cancellations (invoices that start with C), lines without a customer and
lines without a positive quantity go; 397,924 lines are left. So do codes that are no products
(postage, fees, manual corrections: anything that does not start with five digits). An item that
stands on one invoice several times counts once.

The history of a line holds what the user bought on *earlier* invoices, never what else stands
on the same one. The split is by time, at the 80 % and 90 % quantiles of all lines.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from common import clean_text, raw_folder, reading, split_times
from rows import Catalog, Owned, Targets, windows

COLUMNS = ("InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "CustomerID", "Country")


def read_lines(root: Path) -> pa.Table:
    """Every line of every invoice: by day, then in the file's order.

    Returns:
        columns `COLUMNS`, null where empty; InvoiceDate as timestamp.
    """
    path = raw_folder(root, "uci_online_retail") / "by-day.tar.gz"
    options = pyarrow.csv.ConvertOptions(
        include_columns=list(COLUMNS),
        column_types=dict.fromkeys(COLUMNS, pa.string()) | {"Quantity": pa.int64(), "InvoiceDate": pa.timestamp("s")},
        strings_can_be_null=True,
        null_values=[""],
    )
    days = {}
    with reading(path), tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".csv"):
                days[member.name] = pyarrow.csv.read_csv(
                    io.BytesIO(archive.extractfile(member).read()), convert_options=options
                )
        return pa.concat_tables(days[name] for name in sorted(days))


def read_invoices(root: Path) -> pa.Table:
    """Lines with a customer that are no cancellations, sorted by customer, then time, then file order.

    Returns:
        columns `COLUMNS`; InvoiceDate as int64 seconds, CustomerID without its ".0".
    """
    lines = read_lines(root)
    real = pc.and_(
        pc.is_valid(lines["CustomerID"]),
        pc.and_(pc.invert(pc.starts_with(lines["InvoiceNo"], "C")), pc.greater(lines["Quantity"], 0)),
    )
    lines = lines.filter(real)
    customers = pc.replace_substring_regex(lines["CustomerID"], r"\.0$", "")
    lines = lines.set_column(lines.schema.get_field_index("CustomerID"), "CustomerID", customers)
    seconds = lines["InvoiceDate"].cast(pa.int64())
    lines = lines.set_column(lines.schema.get_field_index("InvoiceDate"), "InvoiceDate", seconds)
    order = np.lexsort(
        (np.arange(len(lines)), lines["InvoiceDate"].to_numpy(), lines["CustomerID"].to_numpy(zero_copy_only=False))
    )
    return lines.take(pa.array(order))


def _descriptions(items: pa.DictionaryArray, texts: pa.ChunkedArray) -> pa.Array:
    """The most frequent description of each item, cleaned and lower-cased; ties by alphabet."""
    pairs = pa.table({"item": items.indices, "text": texts}).filter(pc.is_valid(texts))
    counts = pairs.group_by(["item", "text"]).aggregate([([], "count_all")])
    counts = counts.sort_by([("item", "ascending"), ("count_all", "descending"), ("text", "ascending")])
    best: list[str | None] = [None] * len(items.dictionary)
    for item, text in zip(counts["item"].to_pylist(), counts["text"].to_pylist(), strict=True):
        if best[item] is None:
            best[item] = clean_text(text).lower() or None
    return pa.array(best, pa.string())


def online_retail(root: Path, targets_per_user: int | None, max_history: int) -> tuple[Catalog, Targets, Owned]:
    """Catalogue, targets and owned pairs.

    Args:
        targets_per_user: keep a user's last so many targets in each part of the split; None keeps all.
        max_history: longest history.

    Raises:
        UserError: the raw folder or file is missing or malformed.
    """
    lines = read_invoices(root)
    lines = lines.filter(pc.match_substring_regex(lines["StockCode"], r"^[0-9]{5}"))
    codes = pc.utf8_upper(lines["StockCode"]).combine_chunks().dictionary_encode()
    catalog = Catalog(codes.dictionary, _descriptions(codes, lines["Description"]))
    users = lines["CustomerID"].combine_chunks().dictionary_encode()
    item, user = codes.indices.to_numpy().astype(np.int64), users.indices.to_numpy().astype(np.int64)
    time = lines["InvoiceDate"].to_numpy()

    once = _first_of_each(user, time, item, len(catalog))
    item, user, time = item[once], user[once], time[once]
    country = lines["Country"].combine_chunks().take(pa.array(once))
    n = len(item)
    new_user = np.r_[True, user[1:] != user[:-1]]
    new_invoice = new_user | np.r_[True, time[1:] != time[:-1]]
    user_start = np.maximum.accumulate(np.where(new_user, np.arange(n), 0))
    invoice_start = np.maximum.accumulate(np.where(new_invoice, np.arange(n), 0))
    split = split_times(time)

    rows = np.arange(n)
    if targets_per_user is not None:
        # Rows are in time order within a user, so a part of the split is one run of rows.
        run_end = np.r_[np.flatnonzero((user[1:] != user[:-1]) | (split[1:] != split[:-1])), n - 1]
        last = run_end[np.searchsorted(run_end, rows)]
        rows = rows[last - rows < targets_per_user]
    names = users.dictionary.take(pa.array(user[rows]))
    targets = Targets(
        item=item[rows],
        history=windows(item, user_start[rows], invoice_start[rows], max_history),
        split=split[rows],
        # The customer's number, so that negatives do not depend on who else is in the file.
        owner=names.cast(pa.int64()).to_numpy(),
        user=names,
        user_id=names,
        time=pa.array(time[rows]),
        country=country.take(pa.array(rows)),
    )
    owners = users.dictionary.take(pa.array(user)).cast(pa.int64()).to_numpy()
    return catalog, targets, Owned(owners, item)


def _first_of_each(user: np.ndarray, time: np.ndarray, item: np.ndarray, num_items: int) -> np.ndarray:
    """Rows (sorted) that are the first of their (user, moment, item)."""
    moment = np.cumsum(np.r_[True, (user[1:] != user[:-1]) | (time[1:] != time[:-1])])
    _, first = np.unique(moment * np.int64(num_items) + item, return_index=True)
    return np.sort(first)
