"""The run that another starts from: its config, its schema and its checkpoint, and whether that other fits it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...config import Config, load_config
from ...data.extend import extension_faults
from ...data.index import Index, read_index
from ...embeddings.tables import TableSpec
from ...errors import UserError
from ...schema import Schema
from ...strict import to_dict
from ...text.store import VectorStore
from ..checkpoint import Saved, best_first, read_manifest
from ..kinds import kind_of
from ..reading import retry_of
from ..resume import changes
from .domains import NEAREST, Texts, choose_starts, rule_faults, text_features
from .origin import MEAN, ORIGIN_NAME, OldTest, Origin, read_origin, read_schema
from .warm_start import Shapes, shape_faults

# What decides the shapes of parameters: told where they differ.
SHAPING = ("model.*", "tables.dim", "tables.overrides.*", "data.exclude_features", "text.*")


@dataclass(frozen=True)
class Foundation:
    """A run to start from. `saved` is its best or newest checkpoint, whose files are not verified yet.

    `features` are those that it read, of its own `schema`.
    """

    run: Path
    config: Config
    schema: Schema
    saved: Saved
    features: list[str]

    @property
    def domains(self) -> list[str]:
        return self.schema.domains.names

    def tasks(self) -> list[str]:
        return list(kind_of(self.config).heads(self.schema, self.config))

    def older(self) -> list[OldTest]:
        """Test rows of the runs that this one came from, where it was finetuned itself."""
        if self.config.finetune.run is None or not (self.run / ORIGIN_NAME).is_file():
            return []
        return list(read_origin(self.run).old_tests().values())

    def left_out(self, schema: Schema, config: Config) -> list[str]:
        """Features that a config would read of its data, and this run did not."""
        return [name for name in kind_of(config).features(schema, config) if name not in self.features]


def read_foundation(run: str) -> Foundation:
    """The run in a folder, everything small of it read.

    Raises:
        UserError: it is no run, has no checkpoint, or nothing says what its data looked like.
    """
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"finetune.run: {folder} is no run folder, for it has no config.yaml: name one of `train`.")
    config = load_config(folder / "config.yaml")
    saved, fault = None, "has no checkpoint yet: train it first"
    for path in best_first(folder / "checkpoints"):
        try:
            saved = read_manifest(path)
            break
        except UserError as error:
            fault = f"has no checkpoint that can be read: {error}"
    if saved is None:
        raise UserError(f"finetune.run: {folder} {fault}")
    schema = read_schema(folder)
    if schema is None:
        try:
            schema = read_index(config.data.train, retry_of(config.data)).schema
        except UserError as error:
            raise UserError(
                f"finetune.run: {folder} was written before run folders kept their schema, and its data cannot be "
                f"read: {error}"
            ) from None
    return Foundation(folder, config, schema, saved, kind_of(config).features(schema, config))


def foundation_faults(foundation: Foundation, config: Config, schema: Schema) -> list[str]:
    """What of a config and its data's schema does not go with the foundation, before any shape is known."""
    old = foundation.schema
    faults = [f"{config.data.train}: {fault}" for fault in extension_faults(schema, old)] if schema != old else []
    if faults:
        faults.append(
            f"the data set does not extend that of {foundation.run}: build it with `dist-rec shards build --extends "
            f"{foundation.config.data.train}`"
        )
        return faults
    new = schema.domains.names[len(foundation.domains) :]
    faults += rule_faults(config.finetune.domains, foundation.domains, new, [foundation.config, config])
    now = list(kind_of(config).heads(schema, config))
    if now != foundation.tasks():
        faults.append(
            f"the foundation has heads for {', '.join(foundation.tasks())}, this config for {', '.join(now)}: name the "
            "foundation's in model.tasks"
        )
    then, text = foundation.config.text, config.text
    if then.mode == text.mode == "lora" and then.lora.alpha != text.lora.alpha:
        # No shape tells, and every adapter would count for more or less than it was trained to.
        faults.append(
            f"the foundation's adapters were trained with text.lora.alpha {then.lora.alpha:g}, this config has "
            f"{text.lora.alpha:g}: set it to the foundation's"
        )
    if then.trains and text.trains and then.pooling != text.pooling:
        from ...text.encoder import empty_text_encoder

        # No shape tells of this either; auto may be what the other one names.
        trained, asked = (empty_text_encoder(text.model, one.pooling).pooling for one in (then, text))
        if trained != asked:
            faults.append(
                f"the foundation's language model was trained with text.pooling {then.pooling} ({trained}), this "
                f"config has {text.pooling} ({asked}): set it to the foundation's"
            )
    return faults


def model_faults(
    foundation: Foundation,
    config: Config,
    specs: Sequence[TableSpec],
    wanted: Shapes,
    own: Collection[str],
    unread: Collection[str] = (),
    later: tuple[str, ...] = (),
) -> list[str]:
    """Which tables and dense parameters of a config the foundation cannot fill, and which keys differ.

    Args:
        specs: without `unread` ones, of which it fills none.
        later: see `warm_start.shape_faults`.
    """
    tables = {name: table for name, table in foundation.saved.manifest.tables.items() if name not in unread}
    found = [
        f"table {spec.name!r} is {' x '.join(map(str, tables[spec.name].shape))} in the foundation's checkpoint, this "
        f"config wants {spec.rows} x {spec.dim}"
        for spec in specs
        if spec.name in tables and tables[spec.name].shape != [spec.rows, spec.dim]
    ]
    found += [
        f"table {spec.name!r} is not in the foundation's checkpoint"
        for spec in specs
        # Of a table that it has, the rows of new ids; without any, it knew items by their texts alone.
        if tables and spec.name not in tables and spec.name.partition("@")[0] not in tables
    ]
    found += [
        f"table {name!r} is in the foundation's checkpoint, this config has no use for it"
        for name in sorted(tables.keys() - {spec.name for spec in specs})
    ]
    found += shape_faults(wanted, own, foundation.saved, len(foundation.domains), later)
    if found:
        differ = changes(to_dict(foundation.config), to_dict(config))
        found += [f"{change} (the foundation's first)" for change in differ if change.among(SHAPING)]
    return [f"{foundation.run}: {fault}" for fault in found]


def origin_of(foundation: Foundation, config: Config, schema: Schema) -> Origin:
    """What a new run keeps of its foundation. How further domains start is said already, but for `nearest`."""
    rule, new = config.finetune.domains, schema.domains.names[len(foundation.domains) :]
    return Origin(
        run=str(foundation.run),
        step=foundation.saved.step,
        domains=foundation.domains,
        starts={} if rule == NEAREST else dict.fromkeys(new, rule if rule in foundation.domains else MEAN),
        tables=sorted(foundation.saved.manifest.tables),
        left_out=foundation.left_out(schema, config),
        test=foundation.config.data.test,
        store=foundation.config.text.store,
        older=foundation.older(),
    )


def with_starts(origin: Origin, foundation: Foundation, config: Config, index: Index, store) -> Origin:
    """The same where `nearest` has been looked up, which reads some rows of both data sets.

    Args:
        index: of the config's training data.
        store: its open text store, None to open it.

    Raises:
        UserError: there is nothing to compare by, or it cannot be read.
    """
    schema = index.schema
    new = schema.domains.names[len(foundation.domains) :]
    if config.finetune.domains != NEAREST or not new:
        return origin
    old = foundation.config
    store = store or VectorStore.open(config.text.store)
    old_store = store if _same(old.text.store, config.text.store) else VectorStore.open(old.text.store)
    try:
        old_index = read_index(old.data.train, retry_of(old.data))
    except UserError as error:
        raise UserError(
            f"finetune.domains: nearest reads the foundation's data: {error} Or set finetune.domains to mean, or to "
            f"one of {', '.join(foundation.domains)}."
        ) from None
    starts = choose_starts(
        NEAREST,
        foundation.domains,
        new,
        Texts(old.data.train, old_index, old_store, retry_of(old.data)),
        Texts(config.data.train, index, store, retry_of(config.data)),
        text_features(foundation.schema, foundation.features),
    )
    return replace(origin, starts=starts)


def _same(a: str, b: str) -> bool:
    return Path(a).resolve() == Path(b).resolve()
