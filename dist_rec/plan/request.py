"""What is to be planned: a config with its schema, statistics and what-ifs. Reads no rows and no weights."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..config import Config, TableConfig, TablesConfig, check_names, load_config
from ..config.model import VOCABULARY_KEYS
from ..data.index import FeatureStatistics, read_index
from ..data.vocabulary import tables_of
from ..embeddings.quantities import number
from ..embeddings.tables import TableSpec
from ..errors import UserError
from ..schema import Schema, load_schema
from ..training.catalogue import unread_tables
from ..training.finetuning import specs_of, where_it_starts
from ..training.kinds import kind_of
from ..training.reading import retry_of
from ..training.workload import USUAL_TEXT_WIDTH, Workload, mean_lengths, mean_tokens, stored_width, text_shares

LARGEST_TABLE = 2**62
# Of all tables: sixteen times as much, states and gradients of copies included, must hold in 64 bits, signed.
BYTES_POWER = 58
# The planner lists all widths below a table's; a row's length times a batch's rows must hold too.
MOST_COLUMNS, LONGEST_MEAN = 2**20, 10**6
ROWS, MEAN_LENGTH = "rows", "mean_length"
PRECISION_BYTES = {"fp32": 4, "fp16": 2}
# Of one row's optimizer state, which is fp32.
STATE_BYTES = {"sgd": lambda dim: 0, "adagrad": lambda dim: 4 * dim, "rowwise_adagrad": lambda dim: 4}


def row_bytes(spec: TableSpec, optimizer: str) -> int:
    """Weights and optimizer state of one row; a frozen table has none."""
    state = 0 if spec.frozen else STATE_BYTES[optimizer](spec.dim)
    return spec.dim * PRECISION_BYTES[spec.precision] + state


@dataclass(frozen=True)
class Source:
    """What a request was read from: the arguments of `read_request`."""

    path: str | Path
    overrides: dict[str, str]
    schema_file: str | Path | None

    def given(self, key: str) -> str | None:
        """The override, `KEY=VALUE`, that sets what `key` sets."""
        same = [f"{old}={value}" for old, value in self.overrides.items() if canonical(old) == canonical(key)]
        return same[-1] if same else None


@dataclass(frozen=True, kw_only=True)
class Request(Workload):
    """A workload that is only asked about.

    Attributes:
        statistics: of the index; None where there is none.
        rows: of the training data; None likewise.
        notes: what was assumed for want of data, a sentence each.
        source: what it was read from.
    """

    statistics: dict[str, FeatureStatistics] | None
    rows: int | None
    notes: list[str]
    source: Source

    def with_settings(self, settings: dict[str, str]) -> Request:
        """Read again with these `--set` in place of those of the same keys, as the user would.

        Raises:
            UserError: they cannot be.
        """
        new = {canonical(key) for key in settings}
        kept = {key: value for key, value in self.source.overrides.items() if canonical(key) not in new}
        return read_request(self.source.path, kept | settings, self.source.schema_file)


@dataclass
class _Settings:
    """`--set` sorted by what it sets."""

    config: dict[str, str]
    rows: dict[str, int]
    lengths: dict[str, float]


def parse_settings(settings: list[str]) -> dict[str, str]:
    """`["tables.item.rows=2e9"]` as `{"tables.item.rows": "2e9"}`.

    Raises:
        UserError: one has no `=` or no dot, or two set the same key.
    """
    parsed: dict[str, str] = {}
    seen: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or "." not in key:
            raise UserError(
                f"--set {setting!r}: write KEY=VALUE, as tables.item_id.rows=2e9, tables.item_id.sharding=row_wise, "
                "features.history.mean_length=30 or data.batch_size=65536."
            )
        key = key.strip()
        before = seen.setdefault(canonical(key), setting)
        if before is not setting or key in parsed:
            raise UserError(f"--set {canonical(key)} is given twice, as {before} and as {setting}: keep one of them.")
        parsed[key] = value.strip()
    return parsed


def canonical(key: str) -> str:
    """`tables.overrides.TABLE.KEY` as `tables.TABLE.KEY`, any other key as it is."""
    parts = key.split(".")
    return ".".join(["tables", *parts[2:]]) if parts[:2] == ["tables", "overrides"] and len(parts) == 4 else key


def read_request(path: str | Path, overrides: dict[str, str], schema_file: str | Path | None = None) -> Request:
    """Read a config and what it names.

    Args:
        overrides: config keys, and beside them `tables.TABLE.KEY` (a key of `tables.overrides.TABLE`, or rows) and
            `features.FEATURE.mean_length`.
        schema_file: a schema.yaml to plan for before any data is built, instead of the index of data.train.

    Raises:
        UserError: config, schema or a setting is at fault.
    """
    settings = _sort(overrides)
    config = load_config(path, settings.config)
    notes: list[str] = []
    if schema_file is not None:
        schema, statistics, rows, tokens = load_schema(schema_file), None, None, None
        notes.append(f"{schema_file} has no statistics: lists count as full (max_length), and every id as known.")
    else:
        try:
            index = read_index(config.data.train, retry_of(config.data))
        except UserError as error:
            raise UserError(
                f"{error}\nTo plan before the data set is built, name its schema: --schema schema.yaml."
            ) from None
        schema, statistics, rows, tokens = index.schema, index.statistics, index.rows, index.tokenizer
    known = [name for name, f in schema.features.items() if f.kind in ("id", "ids") and f.shares is None]
    if schema_file is None:
        known = list(tables_of(schema, config.tables.overrides))
    faults = check_names(known, list(settings.rows), "--set tables.TABLE.rows")
    faults += check_names(known, list(config.tables.overrides), "tables.overrides")
    faults += check_names(list(schema.features), list(settings.lengths), "--set features.FEATURE.mean_length")
    faults += check_names(list(schema.features), config.data.exclude_features, "data.exclude_features")
    if faults:
        raise UserError("\n".join(faults))
    if schema_file is not None:
        _give_sizes(schema, config, settings.rows)
    kind, origin = kind_of(config), None
    features = kind.features(schema, config)
    if config.finetune.run is not None and schema_file is None:
        origin, _ = where_it_starts(config, schema, config.run_folder)
        features = [name for name in features if name not in origin.left_out]
    own, unread = _own_rows(config, settings, notes), frozenset()
    if schema_file is None:
        unread = unread_tables(config, schema, features)
    specs = [
        replace(s, rows=s.rows if s.name in own else settings.rows.get(s.name, s.rows))
        for s in specs_of(schema, config, features, origin, unread)
    ]
    unused = set(settings.rows) - {s.name for s in specs}
    if unused:
        raise UserError(f"--set tables.{min(unused)}.rows: this config's model does not read that table.")
    _check_sizes(specs, config, schema, settings.lengths)
    schema, features = kind.given(schema, config, features)
    lengths = mean_lengths(schema, features, statistics) | settings.lengths
    texts = text_shares(schema, features, statistics)
    return Request(
        config=config,
        schema=schema,
        features=features,
        specs=specs,
        lengths=lengths,
        statistics=statistics,
        rows=rows,
        text_width=_text_width(config, notes),
        texts=texts,
        tokens=mean_tokens(texts, lengths, tokens.max_length if tokens else None),
        notes=notes,
        source=Source(path, dict(overrides), schema_file),
    )


def _own_rows(config: Config, settings: _Settings, notes: list[str]) -> set[str]:
    """Tables whose rows the config gives.

    A what-if of rows is of the vocabulary. Beside a `hash` or `managed` that is asked for with it, it says of how many
    ids there are, and the table has the rows of those.

    Raises:
        UserError: the config has its own already, so that the what-if would change nothing.
    """
    own = {}
    for name, override in config.tables.overrides.items():
        for key in VOCABULARY_KEYS:
            if getattr(override, key) is not None:
                own[name] = key
    asked = {canonical(key) for key in settings.config}
    for name in settings.rows.keys() & own.keys():
        key = own[name]
        if key == "size" or f"tables.{name}.{key}" not in asked:
            rows = settings.rows[name]
            raise UserError(
                f"--set tables.{name}.{ROWS}={rows}: the config gives this table rows of its own by {key}, whatever "
                f"its vocabulary has: --set tables.{name}.{key}={rows} instead."
            )
        notes.append(f"{name}: its vocabulary has {settings.rows[name]:,} ids, and the table the rows of {key}.")
    return set(own)


def _check_sizes(specs: list[TableSpec], config: Config, schema: Schema, lengths: dict[str, float]) -> None:
    """Refuse what no machine has and 64 bits do not count, and lists longer than they can be."""
    wide = [spec for spec in specs if spec.dim > MOST_COLUMNS]
    if wide:
        raise UserError(
            f"{wide[0].name}: {wide[0].dim:,} columns are more than {MOST_COLUMNS:,}: give it a smaller dim."
        )
    sizes = {spec.name: spec.rows * row_bytes(spec, config.tables.optimizer) for spec in specs}
    if sum(sizes.values()) >= 2**BYTES_POWER:
        name = max(sizes, key=sizes.__getitem__)
        raise UserError(
            f"the tables take {sum(sizes.values()):.3g} bytes, {name} the most ({sizes[name]:.3g}), and what can be "
            f"planned is below 2**{BYTES_POWER}: give it fewer rows or a smaller dim."
        )
    for name, mean in lengths.items():
        feature = schema.features[name]
        most = {"id": 1, "ids": feature.max_length, "texts": feature.max_length}.get(feature.kind) or LONGEST_MEAN
        if mean > most:
            why = f"its lists have at most {most:,} (max_length)" if feature.kind in ("ids", "texts") else ""
            why = why or ("a row has one at most" if feature.kind == "id" else f"{LONGEST_MEAN:,} is the most")
            raise UserError(f"--set features.{name}.{MEAN_LENGTH}={mean:g}: {why}.")


def _sort(overrides: dict[str, str]) -> _Settings:
    """Tell config keys from what-ifs; numbers such as 2e9 become integers, which YAML would not make of them."""
    sections = {f.name for f in fields(TablesConfig)}
    of_a_table = [f.name for f in fields(TableConfig)]
    sorted_ = _Settings({}, {}, {})
    for key, text in overrides.items():
        value, parts = number(text), key.split(".")
        if parts[0] == "tables" and (len(parts) == 3 and parts[1] not in ("overrides", "managed")):
            if parts[1] in sections:
                raise UserError(f"--set {key}: tables.{parts[1]} is a value, not a table.")
            if parts[2] == ROWS:
                sorted_.rows[parts[1]] = _positive(key, value, int)
                continue
            faults = check_names([ROWS, *of_a_table], [parts[2]], f"--set {key}")
            if faults:
                raise UserError(faults[0])
            key = f"tables.overrides.{parts[1]}.{parts[2]}"
        elif parts[0] == "features":
            if len(parts) != 3 or parts[2] != MEAN_LENGTH:
                raise UserError(f"--set {key}: of a feature only features.FEATURE.{MEAN_LENGTH} can be set.")
            sorted_.lengths[parts[1]] = _positive(key, value, float)
            continue
        sorted_.config[key] = str(value)
    return sorted_


def has_rows(override: TableConfig) -> bool:
    """Whether the config gives the table rows, whatever its vocabulary."""
    return any(getattr(override, key) is not None for key in VOCABULARY_KEYS)


def _positive(key: str, value: Any, kind: type) -> Any:
    if isinstance(value, str) or not 0 < value <= LARGEST_TABLE or (kind is int and value != int(value)):
        whole = "whole number" if kind is int else "number"
        raise UserError(f"--set {key}={value}: must be a {whole} above 0, up to 2**62.")
    return kind(value)


def _give_sizes(schema: Schema, config: Config, rows: dict[str, int]) -> None:
    """Fill in the sizes of dictionaries that are not built, from the what-ifs."""
    lacking = []
    for name, feature in schema.select(kinds=("id", "ids")).items():
        if feature.shares is not None or feature.vocabulary.size or feature.vocabulary.kind == "raw":
            continue
        override = config.tables.overrides.get(name, TableConfig())
        size = rows.get(name, 0)
        if not size and not has_rows(override):
            lacking.append(name)
        feature.vocabulary.size = size or 1
    if lacking:
        raise UserError(
            f"the vocabularies of {', '.join(lacking)} are built from data, and this schema has none: say how many "
            f"rows they will have, as --set tables.{lacking[0]}.rows=1e6."
        )


def _text_width(config: Config, notes: list[str]) -> int:
    width = stored_width(config)
    if width is None:
        notes.append(
            f"There is no vector store at {config.text.store} yet: text vectors are taken to be {USUAL_TEXT_WIDTH} "
            "wide."
        )
    return USUAL_TEXT_WIDTH if width is None else width
