"""The table `source` → the table `encoded`: vocabularies applied, rows checked, splits assigned.

Everything is SQL over DuckDB tables, so inputs larger than memory work. Row numbers and table rows
depend on the input alone, never on threads: whatever could tie is ordered by input position. Knows
nothing of files' formats (see `sources`), of histories from events (`histories`) nor of tars.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

import duckdb

from ..errors import UserError
from ..schema import Feature, Schema, Vocabulary
from .casts import literal, no_id, quote, raw_id
from .extend import renumbered
from .index import SPLITS
from .sources import Source
from .split import Split, split_sql

TEXTS = "texts_seen"


def check_rows(source: Source, every_domain: bool) -> None:
    """Domains, labels and dense widths.

    Raises:
        UserError: an unknown or missing domain name, a domain without rows if `every_domain` needs
            some, a label outside its range, a dense list of another width; says which value in which row.
    """
    con, schema, names = source.con, source.schema, source.domains
    if "domains.column" in source.columns:
        # Past rows may be of any domain: nothing of them but events is written.
        column, written = source.columns["domains.column"], f"n >= {source.first}"
        counts = dict(con.execute(f"SELECT {column}, count(*) FROM source WHERE {written} GROUP BY 1").fetchall())
        raw = schema.domains.column
        if None in counts:
            n = con.execute(f"SELECT min(n) FROM source WHERE {column} IS NULL AND {written}").fetchone()[0]
            raise UserError(f"{counts[None]} rows have no domain in column {raw!r}; the first is {source.where(n)}.")
        strange = sorted(set(counts) - set(names))
        if strange:
            listed = ", ".join(f"{name!r} ({counts[name]} rows)" for name in strange[:20])
            raise UserError(
                f"column {raw!r} names domains that the schema does not: {listed}. Rows are of: {', '.join(names)}."
            )
        empty = [name for name in names if name not in counts]
        if empty and every_domain:
            raise UserError(f"empty domain: no row is of {', '.join(map(repr, empty))}. Remove it from domains.names.")
    for name, label in schema.labels.items():
        column = source.columns[f"labels.{name}"]
        bad = f"{column} < 0 OR {column} > {label.maximum!r}"
        if label.kind == "binary":
            bad = f"{column} NOT IN (0, 1)"
        first = con.execute(f"SELECT n, {column} FROM source WHERE {bad} ORDER BY n LIMIT 1").fetchone()
        if first:
            allowed = "0 or 1" if label.kind == "binary" else f"0 .. {label.maximum:g}"
            raise UserError(f"{source.where(first[0])}: label {name!r} is {first[1]:g}, allowed is {allowed}.")
    for name, feature in schema.select(kinds=("dense",)).items():
        column = source.columns[f"features.{name}"]
        bad = f"SELECT n, len({column}) FROM source WHERE len({column}) <> {feature.width} ORDER BY n LIMIT 1"
        first = con.execute(bad).fetchone()
        if first:
            raise UserError(
                f"{source.where(first[0])}: dense feature {name!r} has {first[1]} values, its width is {feature.width}."
            )


def _items(feature: Feature, column: str) -> str:
    """The list that is kept: nulls dropped (but in histories, which are aligned), the last ones."""
    if feature.role != "history":
        column = f"list_filter({column}, lambda x: x IS NOT NULL)"
    elif feature.kind == "texts":
        column = f"list_transform({column}, lambda x: coalesce(x, ''))"
    return f"({column})[-{feature.max_length}:]"


def _uses(source: Source, names: list[str]) -> str:
    """SQL with one row a use: `value`, `first` (orders uses by row, feature, position) and `n`.

    40 bits of row, 8 of feature and 16 of position make `first`; what is cut off at 255 features or
    65,535 positions only weakens the order within one row, and ties go by value.
    """
    parts = []
    for i, name in enumerate(names):
        feature, column = source.schema.features[name], source.columns[f"features.{name}"]
        base = f"(n << 24) | {min(i, 255) << 16}"
        if feature.kind in ("id", "text"):
            parts.append(f"SELECT {column} AS value, n, {base} AS first FROM source WHERE {column} IS NOT NULL")
        else:
            items = f"SELECT n, {_items(feature, column)} AS kept FROM source WHERE {column} IS NOT NULL"
            spread = f"SELECT n, unnest(kept) AS value, generate_subscripts(kept, 1) AS position FROM ({items})"
            parts.append(
                f"SELECT value, n, {base} | least(position, 65535) AS first FROM ({spread}) WHERE value IS NOT NULL"
            )
    return " UNION ALL ".join(parts)


def tables_of(schema: Schema) -> dict[str, list[str]]:
    """Embedding table → the features that bring values into it (not those built from events)."""
    tables: dict[str, list[str]] = {}
    for name, feature in schema.select(kinds=("id", "ids")).items():
        users = tables.setdefault(schema.table_of(name), [])
        if feature.events is None:
            users.append(name)
    return tables


def build_vocabularies(
    source: Source, reuse: str | None, grow: Collection[str], warn: Callable[[str], None]
) -> dict[str, Vocabulary]:
    """One table `vocabulary:<table>` (value, row) for every dictionary, and the vocabularies with their sizes.

    Past rows bring no values into them.

    Args:
        source: the input.
        reuse: folder of an earlier build's vocabulary; its rows stay as they are.
        grow: the tables that it has, if values that it does not know get rows after its own, and its sizes are
            inherited. Without any, such values become row 0.
        warn: told how many those are.

    Raises:
        UserError: an `integer` id outside its vocabulary, or a reused file that is missing or odd.
    """
    con, schema, found = source.con, source.schema, {}
    for table, names in tables_of(schema).items():
        vocabulary = schema.features[table].vocabulary
        if vocabulary.kind == "integer" and names:
            number = "TRY_CAST(value AS BIGINT)"
            bad = f"{number} IS NULL OR {number} < 0 OR {number} >= {vocabulary.size}"
            query = f"SELECT n, value FROM ({_uses(source, names)}) WHERE {bad} ORDER BY first LIMIT 1"
            first = con.execute(query).fetchone()
            if first:
                raise UserError(
                    f"{source.where(first[0])}: {table!r} is {first[1]!r}, but its integer vocabulary holds "
                    f"0 .. {vocabulary.size - 1}. Raise its size, or use kind: dictionary."
                )
        if vocabulary.kind != "dictionary":
            continue
        target = quote(f"vocabulary:{table}")
        if table in grow:
            found[table] = _grow(source, table, target, Path(reuse) / f"{table}.parquet", names)
        elif reuse is not None and not grow:
            size = _reuse(source, table, target, Path(reuse) / f"{table}.parquet")
            found[table] = replace(vocabulary, size=size)
            # Of a data set from before there were digests, which is appended to, the index has none.
            if vocabulary.digests or not vocabulary.size:
                found[table] = _digested(con, target, found[table])
            unknown = 0
            if names:
                strangers = f"({_uses(source, names)}) u ANTI JOIN {target} USING (value) WHERE n >= {source.first}"
                unknown, distinct, example = con.execute(
                    f"SELECT count(*), count(DISTINCT value), min(value) FROM {strangers}"
                ).fetchone()
            if unknown:
                warn(
                    f"vocabulary {table}: {unknown} ids ({distinct} distinct, such as {example!r}) are not in "
                    f"{reuse} and become row 0 (unknown)."
                )
        elif names:
            _number(con, target, f"SELECT * FROM ({_uses(source, names)}) WHERE n >= {source.first}")
            size = con.execute(f"SELECT count(*) + 1 FROM {target}").fetchone()[0]
            found[table] = _digested(con, target, replace(vocabulary, size=size))
        else:
            raise UserError(f"table {table!r}: no feature brings values into it, so its vocabulary would be empty.")
    return found


def _number(con, target: str, uses: str) -> None:
    con.execute(
        f"CREATE TABLE {target} AS SELECT value, row_number() OVER (ORDER BY first, value) AS row "
        f"FROM (SELECT value, min(first) AS first FROM ({uses}) GROUP BY value)"
    )


def _grow(source: Source, table: str, target: str, path: Path, names: list[str]) -> Vocabulary:
    """An earlier build's dictionary, and after it the values of the features `names` that it does not know."""
    con, vocabulary = source.con, source.schema.features[table].vocabulary
    size = _reuse(source, table, target, path)
    if size != vocabulary.size:
        raise _foreign(path, f"rows up to {size - 1}, and the index of its data set {vocabulary.size} rows")
    if names:
        strangers = f"({_uses(source, names)}) u ANTI JOIN {target} USING (value) WHERE n >= {source.first}"
        con.execute(
            f"INSERT INTO {target} SELECT value, {size - 1} + row_number() OVER (ORDER BY first, value) "
            f"FROM (SELECT value, min(first) AS first FROM {strangers} GROUP BY value)"
        )
    grown = con.execute(f"SELECT count(*) FROM {target} WHERE row >= {size}").fetchone()[0]
    inherited = [*vocabulary.inherited, size] if grown else vocabulary.inherited
    found = _digested(con, target, replace(vocabulary, size=size + grown, inherited=inherited, digests=[]))
    if renumbered(found, vocabulary):
        raise _foreign(path, "other values, or in another order, than the index of its data set says")
    return found


def _foreign(path: Path, fault: str) -> UserError:
    return UserError(
        f"{path} has {fault}, so it is not the vocabulary that the data set was built with: restore that one."
    )


def _digested(con: duckdb.DuckDBPyConnection, target: str, vocabulary: Vocabulary) -> Vocabulary:
    """The dictionary in the table `target`, with digests: the MD5 of each row and value, by exclusive or."""
    one = "bit_xor(md5_number(concat(row, ':', value)))"
    below = ", ".join(f"coalesce({one} FILTER (WHERE row < {size}), 0)" for size in vocabulary.steps)
    digests = con.execute(f"SELECT {below} FROM {target}").fetchone()
    return replace(vocabulary, digests=[f"{digest:032x}" for digest in digests])


def _reuse(source: Source, table: str, target: str, path: Path) -> int:
    con = source.con
    if not path.is_file():
        raise UserError(f"vocabulary of table {table!r} to reuse: no file {path}.")
    try:
        con.execute(
            f"CREATE TABLE {target} AS SELECT value::VARCHAR AS value, row::BIGINT AS row "
            f"FROM read_parquet({literal(str(path))})"
        )
    except duckdb.Error as error:
        raise UserError(f"{path} is no vocabulary (columns value, row): {str(error).splitlines()[0]}") from None
    rows, values, distinct, low, high = con.execute(
        f"SELECT count(*), count(DISTINCT value), count(DISTINCT row), coalesce(min(row), 1), coalesce(max(row), 0) "
        f"FROM {target}"
    ).fetchone()
    if values != rows or distinct != rows or low < 1:
        raise UserError(f"{path} is no vocabulary: values and rows must be distinct, rows from 1.")
    given = source.schema.features[table].vocabulary.size
    return max(high + 1, given)


def number_texts(source: Source, with_empty: bool) -> int:
    """Table `texts_seen` (value, row from 1 in order of appearance) over all text features.

    `with_empty` adds the empty text, which stands for an event's missing text in aligned histories.
    """
    schema = source.schema
    names = [name for name, f in schema.select(kinds=("text", "texts")).items() if f.events is None]
    if not names:
        return 0
    uses = _uses(source, names)
    if source.first:
        # Of past rows only what histories collect is ever written.
        collected = {f.events.of for f in schema.features.values() if f.events is not None}
        uses = f"SELECT * FROM ({uses}) WHERE n >= {source.first}"
        if past := [name for name in names if name in collected]:
            uses += f" UNION ALL SELECT * FROM ({_uses(source, past)}) WHERE n < {source.first}"
    if with_empty:
        uses += f" UNION ALL SELECT '' AS value, {source.rows} AS n, {source.rows << 24} AS first"
    _number(source.con, TEXTS, uses)
    return source.con.execute(f"SELECT count(*) FROM {TEXTS}").fetchone()[0]


def hashed(value: str) -> str:
    return f"CAST(md5_number_lower({value}) >> 1 AS BIGINT)"


def _vocabulary_sql(source: Source, table: str) -> Callable[[str], str] | None:
    """How a value becomes a row without a lookup; None for dictionaries."""
    vocabulary = source.schema.features[table].vocabulary
    if vocabulary.kind == "hash":
        return lambda v: f"CAST(md5_number_lower({v}) % {vocabulary.size} AS BIGINT)"
    if vocabulary.kind == "integer":
        return lambda v: f"CAST({v} AS BIGINT)"
    if vocabulary.kind == "raw":
        return raw_id
    return None


def _list_table(source: Source, name: str, dictionary: str, shift: int) -> str:
    """A table (n, v) with the feature's lists looked up in a dictionary; its name."""
    feature, column, target = source.schema.features[name], source.columns[f"features.{name}"], quote(f"list:{name}")
    kept = f"SELECT n, {_items(feature, column)} AS kept FROM source WHERE len({column}) > 0"
    spread = f"SELECT n, unnest(kept) AS value, generate_subscripts(kept, 1) AS position FROM ({kept})"
    source.con.execute(
        f"CREATE TABLE {target} AS SELECT u.n, list(coalesce(d.row, {shift}) - {shift} ORDER BY u.position) AS v "
        f"FROM ({spread}) u LEFT JOIN {dictionary} d ON d.value = u.value GROUP BY u.n"
    )
    return target


def encode(source: Source, split: Split | None, seed: int) -> None:
    """Create `encoded`: n, split, domain, and per feature, label and key a column ready to write.

    Past rows are of split -1.
    Columns are `f:<feature>` (table rows, row numbers of texts from 0, or floats; none for
    histories from events), `label:<name>` and `key:<name>`.
    """
    con, schema, columns = source.con, source.schema, source.columns
    dealt = f"CASE WHEN s.n < {source.first} THEN -1 ELSE {split_sql(source, split, seed)} END"
    selected = ["s.n", f"CAST({dealt} AS TINYINT) AS split"]
    domain, numbers = columns.get("domains.column"), schema.domains.names
    position = str(numbers.index(source.domains[0]))
    if domain:
        position = f"list_position([{', '.join(map(literal, numbers))}], s.{domain}) - 1"
    selected.append(f"CAST({position} AS INTEGER) AS domain")
    joins = ""
    for i, (name, feature) in enumerate(schema.features.items()):
        if feature.events is not None:
            continue
        raw = f"s.{columns[f'features.{name}']}"
        text = feature.kind in ("text", "texts")
        direct = None if text or feature.kind == "dense" else _vocabulary_sql(source, schema.table_of(name))
        dictionary = TEXTS if text else quote(f"vocabulary:{schema.table_of(name)}") if feature.kind != "dense" else ""
        shift = 1 if text else 0
        if feature.kind == "dense":
            value = raw
        elif feature.kind in ("id", "text"):
            if direct:
                value = direct(raw)
            else:
                joins += f" LEFT JOIN {dictionary} d{i} ON d{i}.value = {raw}"
                value = f"CASE WHEN {raw} IS NOT NULL THEN coalesce(d{i}.row, {shift}) - {shift} END"
        elif direct:
            value = f"list_transform({_items(feature, raw)}, lambda x: coalesce({direct('x')}, {no_id(schema, name)}))"
        else:
            joins += f" LEFT JOIN {_list_table(source, name, dictionary, shift)} l{i} ON l{i}.n = s.n"
            value = f"CASE WHEN {raw} IS NOT NULL THEN coalesce(l{i}.v, []) END"
        selected.append(f"{value} AS {quote(f'f:{name}')}")
    selected += [f"s.{columns[f'labels.{name}']} AS {quote(f'label:{name}')}" for name in schema.labels]
    for key in ("user", "query", "time"):
        if getattr(schema.keys, key):
            raw = f"s.{columns[f'keys.{key}']}"
            selected.append(f"{raw if key == 'time' else hashed(raw)} AS {quote(f'key:{key}')}")
    con.execute(f"CREATE TABLE encoded AS SELECT {', '.join(selected)} FROM source s{joins}")


def counts(source: Source, split: Split | None) -> Iterator[tuple[int, int, int]]:
    """(split, domain, rows) in the order in which they are written.

    Raises:
        UserError: a split that was asked for got no row.
    """
    found = source.con.execute(
        "SELECT split, domain, count(*) FROM encoded WHERE split >= 0 GROUP BY 1, 2 ORDER BY 1, 2"
    ).fetchall()
    asked = [i for i, weight in enumerate(split.weights) if weight > 0] if split and split.kind != "column" else [0]
    empty = [SPLITS[i] for i in asked if i not in {s for s, _, _ in found}]
    if split and empty:
        raise UserError(
            f"the split leaves {', '.join(empty)} without rows ({source.rows - source.first} rows in all): "
            "give it more weight, or 0 to leave it out."
        )
    yield from found
