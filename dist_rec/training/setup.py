"""From a config to parts: everything checked at once before any process group, then built.

`prepare` reads indexes and reports every fault of config and data together; `build_*` make the
model and the sharded tables of a rank that has joined the others.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan

from ..config import Config, DataConfig, TablesConfig, TextConfig, check_names
from ..data.extend import as_extended
from ..data.index import Index, TokenizerInfo, read_index
from ..data.order import Order, temperature_weights
from ..data.reader import ShardReader
from ..data.stream import Stream
from ..data.vocabulary import id_maps
from ..embeddings.description import plan_from_description
from ..embeddings.ids import fault_of_rows
from ..embeddings.plan_file import check_plan, read_plan
from ..embeddings.sharders import check_kernels
from ..embeddings.sharding import attach_optimizer, ranks_per_host, shard
from ..embeddings.tables import EmbeddingTables, TableSpec
from ..errors import UserError
from ..finetune.foundation import Foundation
from ..finetune.freeze import freeze, frozen_names
from ..finetune.origin import OLD, Origin
from ..finetune.warm_start import fill_dense
from ..layers.reduction import Reduction
from ..models.foundation import FoundationModel
from ..schema import Schema
from ..text.onthefly import FrozenVectors, OnTheFly
from ..text.paths import resolve_model_folder, tokenizer_fingerprint
from ..text.store import VectorStore
from .checkpoint import Saved
from .collectives import DistributedReduction
from .engine import make_engine
from .finetuning import finetune_faults, names_of, specs_of, where_it_starts
from .passes import FROM_THE_START, fingerprint
from .planning import plan_here
from .process import Process, choose_device, ranks_here, world_size
from .reading import retry_of, used_features
from .workload import Workload, mean_lengths, mean_tokens, text_shares


@dataclass
class Prepared:
    """A checked config with what it names.

    `features` are those that this run reads; `indexes` has `train` and, as configured, `valid`
    and `test`, of which the run sees what `view` makes of them. Of a run that starts from another, `origin` is what it
    keeps of that one, and `foundation` that one itself, as long as the run has no checkpoint of its own; `indexes` may
    then have that one's test rows too (`OLD`), with their text vectors in `old_store`. `missing` makes the vectors that
    `store` lacks, where text.missing is encode.
    """

    config: Config
    schema: Schema
    indexes: dict[str, Index]
    features: list[str]
    specs: list[TableSpec]
    store: VectorStore | None
    view: Callable[[Index], Index]
    origin: Origin | None
    foundation: Foundation | None
    old_store: VectorStore | None = None
    missing: OnTheFly | None = None

    def root(self, split: str) -> str:
        return self.origin.test if split == OLD else getattr(self.config.data, split)

    def read(self, split: str) -> Index:
        """What the run sees of a split as it is now."""
        index = read_index(self.root(split), retry_of(self.config.data))
        return as_extended(index, self.schema) if split == OLD else self.view(index)

    def vectors(self, split: str) -> FrozenVectors | None:
        """Where the batches of a split get their texts' frozen vectors from."""
        store = self.old_store if split == OLD else self.store
        if store is None:
            return None
        missing = self.missing if store.info.recipe == self.store.info.recipe else None
        return FrozenVectors(store, self.root(split), missing and missing.load())

    @property
    def dims(self) -> dict[str, int]:
        """Width of every table."""
        return _dims(self.specs)

    def reopen_store(self) -> None:
        """See the text vectors that were added since."""
        if self.store is not None:
            self.store = VectorStore.open(self.config.text.store)


def prepare(
    config: Config, ranks: int | None = None, run: Path | None = None, view: Callable[[Index], Index] | None = None
) -> Prepared:
    """Check everything that can be checked without other ranks.

    Args:
        ranks: of the run, where it is not this process's.
        run: its folder, where it is not that of the config.
        view: what the run sees of an index, where that is not all.

    Raises:
        UserError: every fault found, one a line.
    """
    faults: list[str] = []

    def attempt(make, *arguments):
        try:
            return make(*arguments)
        except UserError as error:
            faults.append(str(error))
            return None

    data, ranks = config.data, ranks or world_size()
    roots = {split: getattr(data, split) for split in ("train", "valid", "test")}
    view = view or _whole
    indexes = {
        split: attempt(lambda root=root: view(read_index(root, retry_of(data))))
        for split, root in roots.items()
        if root is not None
    }
    store = attempt(VectorStore.open, config.text.store) if config.text.mode == "frozen" else None
    if data.streams < ranks:
        faults.append(
            f"data.streams is {data.streams}, but there are {ranks} ranks: raise it, and data.batch_size to a "
            "multiple of it"
        )
    train = indexes.get("train")
    specs, features, origin, foundation, missing = None, [], None, None, None
    if train is not None:
        schema = train.schema
        faults += _data_faults(config, indexes)
        features = used_features(schema, config)
        if config.finetune.run is not None:
            origin, foundation = attempt(where_it_starts, config, schema, run or config.run_folder) or (None, None)
            features = [name for name in features if origin is None or name not in origin.left_out]
        specs = attempt(specs_of, schema, config, features, origin)
        managed = [fault_of_rows(spec.name, spec.rows, ranks) for spec in specs or [] if spec.managed]
        faults += filter(None, managed)
        if specs is not None and config.tables.plan is not None:
            attempt(check_plan, config.tables.plan, specs, config.tables, ranks, ranks_here(ranks))
        if specs is not None and (device := attempt(choose_device, config)) is not None:
            attempt(check_kernels, specs, device.type)
        if store is not None:
            attempt(store.check_tokenizer, train.tokenizer)
            attempt(store.check_pooling, config.text.pooling)
            if config.text.missing == "encode":
                missing = attempt(_on_the_fly, config, store, train.tokenizer)
        if config.text.trains:
            folder = attempt(resolve_model_folder, config.text.model)
            longest = attempt(_longest_text, config.text) if folder is not None else None
            attempt(_check_tokenizer, config.text.model, folder, data.train, train.tokenizer, longest)
        # Faulty overrides hide no fault of the model, for which any widths will do.
        dims = _dims(specs) if specs is not None else dict.fromkeys(schema.table_sizes(), TablesConfig().dim)
        is_model = attempt(_try_model, schema, config, dims, features)
        prepared = Prepared(config, schema, indexes, features, specs, store, view, origin, foundation, missing=missing)
        has_texts = store is not None or config.text.mode != "frozen"
        if origin is not None and specs is not None and is_model and has_texts:
            faults += attempt(finetune_faults, prepared) or []
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise UserError(f"this run cannot start:\n{lines}")
    return prepared


def _on_the_fly(config: Config, store: VectorStore, tokenizer: TokenizerInfo | None) -> OnTheFly:
    text = config.text
    model = text.model or store.info.model
    return OnTheFly(store.info.recipe, model, tokenizer, choose_device(config), text.batch_tokens, config.data.train)


def _whole(index: Index) -> Index:
    return index


def _data_faults(config: Config, indexes: dict[str, Index | None]) -> list[str]:
    data, train = config.data, indexes["train"]
    names = train.schema.domains.names
    faults = check_names(names, list(data.weights), "data.weights") + check_names(names, data.domains, "data.domains")
    faults += check_names(list(train.schema.features), data.exclude_features, "data.exclude_features")
    weights = data.weights or dict.fromkeys(names, 1.0)
    read = [d for d in data.domains or names if d in names and weights.get(d, 0.0) > 0]
    if not read and not faults:
        faults.append("data.weights gives no weight to any domain of data.domains")
    for domain in read:
        if train.rows_of(domain) == 0:
            faults.append(f"domain {domain!r} has no rows in {data.train}: name those to train on in data.domains")
    for split, index in indexes.items():
        if index is not None and index.schema != train.schema:
            faults.append(f"data.{split}: its schema or vocabularies are not those of data.train; build them together")
        elif index is not None and index.tokenizer != train.tokenizer:
            faults.append(f"data.{split}: its tokenizer is not that of data.train; build them together")
    return faults


def _longest_text(text: TextConfig) -> int | None:
    """Tokens that the co-trained language model takes; None where any number. Finds what is wrong with `text`."""
    from ..text.cotrain import cotrained_encoder

    return cotrained_encoder(text, Reduction(), empty=True).max_tokens


def _check_tokenizer(
    model: str, folder: Path | None, root: str, tokenizer: TokenizerInfo | None, longest: int | None
) -> None:
    """Refuse a language model that would read another tokenizer's ids, or longer texts than it can.

    Args:
        folder: the model's, None where that is a fault already.
        longest: tokens that the model takes; None where any number, or where that is a fault already.
    """
    if tokenizer is None:
        raise UserError(
            f"text.mode trains {model}, but {root} was built without a tokenizer: build it with --tokenizer {model}"
        )
    if folder is None:
        return
    if tokenizer.fingerprint != tokenizer_fingerprint(folder):
        raise UserError(
            f"{root} has token ids of {tokenizer.name}, whose tokenizer is not that of text.model {model}: build it "
            f"with --tokenizer {model}"
        )
    if longest is not None and tokenizer.max_length > longest:
        raise UserError(
            f"{root} has texts of up to {tokenizer.max_length} tokens, text.model {model} takes {longest}: build it "
            f"with --max-tokens {longest}"
        )


def _try_model(schema: Schema, config: Config, dims: dict[str, int], features: list[str]) -> bool:
    """Build the model without memory, for the faults that only the model knows."""
    with torch.device("meta"):
        FoundationModel(schema, config.model, dims, 0, None, features, Reduction())
    return True


def _dims(specs: list[TableSpec]) -> dict[str, int]:
    return {spec.name: spec.dim for spec in specs}


def agree_on_index(prepared: Prepared, split: str, look_again: bool = False) -> None:
    """Make a split's index the same on all ranks, whose looks may fall before and after an append. Collective.

    Args:
        look_again: read it anew, to see what was appended since.

    Raises:
        UserError: a rank does not see what rank 0 sees.
    """
    root = prepared.root(split)
    if look_again and dist.get_rank() == 0:
        prepared.indexes[split] = prepared.read(split)
    index = prepared.indexes[split]
    shared = [(index.generation, index.statistics, fingerprint(index))]
    dist.broadcast_object_list(shared)
    generation, statistics, expected = shared[0]
    if index.generation < generation:
        index = prepared.read(split)
    if index.generation >= generation:
        # The statistics are of all that one has seen, and decide the sharding plan.
        index = replace(index.between(FROM_THE_START, generation), statistics=statistics)
    device = choose_device(prepared.config)
    differ = torch.tensor(int(fingerprint(index) != expected), device=device)
    dist.all_reduce(differ)
    if differ:
        raise UserError(
            f"{differ} rank(s) see another {root} than rank 0 does: it must be the same data set, and as new, on every "
            "host."
        )
    prepared.indexes[split] = index


def build_stream(prepared: Prepared, split: str, rank: int, world: int, shuffled: bool = False) -> Stream:
    """Every row of a split once, in the index's order, or `shuffled`, so that the first rows stand for all."""
    config, index = prepared.config, prepared.indexes[split]
    order = Order(
        index,
        streams=config.data.streams,
        batch_size=config.evaluate.batch_size or config.data.batch_size,
        seed=config.run.seed,
        window=config.data.shuffle_window if shuffled else None,
        arrangement="shuffled" if shuffled else "index",
    )
    return _stream(prepared, split, order, index, rank, world)


def build_training_stream(
    prepared: Prepared, rank: int, world: int, index: Index | None = None, every_row: bool = False
) -> Stream:
    """The training data, mixed and shuffled as configured.

    Args:
        index: what to read of it; all that was there when the run was prepared if None.
        every_row: every row of the chosen domains once, whatever the weights.
    """
    data, index = prepared.config.data, index or prepared.indexes["train"]
    order = Order(
        index,
        streams=data.streams,
        batch_size=data.batch_size,
        seed=prepared.config.run.seed,
        window=data.shuffle_window,
        arrangement=data.order,
        weights=_weights(data, index, every_row),
        drop_last=data.drop_last,
    )
    return _stream(prepared, "train", order, index, rank, world)


def _weights(data: DataConfig, index: Index, every_row: bool) -> list[float] | None:
    """Weight of every domain of the schema; None takes every row once."""
    domains = index.schema.domains.names
    temperature = 1.0 if every_row else data.temperature
    if not data.domains and temperature == 1 and (every_row or not data.weights):
        return None
    rows = {d: index.rows_of(d) for d in data.domains or domains}
    if data.weights and not every_row:
        return [data.weights.get(d, 0.0) if d in rows else 0.0 for d in domains]
    return temperature_weights([rows.get(d, 0) for d in domains], temperature)


def _stream(prepared: Prepared, split: str, order: Order, index: Index, rank: int, world: int) -> Stream:
    config, vectors = prepared.config, prepared.vectors(split)
    return Stream(
        ShardReader(
            prepared.root(split),
            index,
            prepared.features,
            config.text.trains or vectors is not None and vectors.missing is not None,
            damaged=config.data.damaged,
            max_damaged_share=config.data.max_damaged_share,
            retry=retry_of(config.data),
        ),
        order,
        rank=rank,
        world_size=world,
        vectors=vectors,
        id_maps=id_maps(prepared.schema, config.tables.overrides, prepared.features),
        read_ahead=config.data.read_ahead,
    )


def build_model(prepared: Prepared, reduction: Reduction) -> FoundationModel:
    """The dense model, initialised by run.seed alone: equal on every rank."""
    config = prepared.config
    encoder, width = None, prepared.store.width if prepared.store else 0
    if config.text.trains:
        from ..text.cotrain import cotrained_encoder

        torch.manual_seed(config.run.seed)  # for the adapters
        encoder = cotrained_encoder(config.text, reduction)
        width = encoder.width
    torch.manual_seed(config.run.seed)
    return FoundationModel(
        prepared.schema, config.model, _dims(prepared.specs), width, encoder, prepared.features, reduction
    )


def build_engine(prepared: Prepared, process: Process, batch_rows: int, start: Saved | None = None):
    """The dense model in its DeepSpeed engine, for `batch_rows` rows of a rank. Collective.

    Args:
        start: the foundation's checkpoint, verified, where the model starts from it.
    """
    config, model = prepared.config, build_model(prepared, DistributedReduction())
    if start is not None:
        fill_dense(start, model, names_of(prepared).own, len(prepared.origin.domains), prepared.origin.start_rows())
    if prepared.origin is not None:
        freeze(model, frozen_names(config.finetune, names_of(prepared)))
    return make_engine(model, config.dense, config.text, batch_rows, process.world_size, process.device)


def build_tables(
    prepared: Prepared, process: Process, planned: dict[str, Any] | None = None
) -> tuple[EmbeddingTables, DistributedModelParallel, ShardingPlan]:
    """Plan and place the tables. Collective.

    Args:
        planned: a plan as `describe_plan` told it, used again if it fits these ranks; `tables.plan` goes before.

    Raises:
        UserError: no plan fits, or `tables.plan` is none for these tables and ranks.
    """
    config = prepared.config
    tables = EmbeddingTables(prepared.specs, prepared.schema, config.tables, torch.device("meta"))
    attach_optimizer(tables, config.tables)
    local_world_size = ranks_per_host(process.local_world_size, prepared.specs, process.device)
    ranks = {"world_size": process.world_size, "local_world_size": local_world_size, "device": process.device}
    plan = None
    if config.tables.plan is not None:
        plan = plan_from_description(read_plan(config.tables.plan).plan, tables, **ranks)
    elif planned is not None:
        # The same number of ranks on other hosts may need another plan.
        with suppress(UserError):
            plan = plan_from_description(planned, tables, **ranks)
    if plan is None:
        plan = plan_here(_workload(prepared), process, local_world_size).plan
    return tables, shard(tables, prepared.specs, plan, config.tables, process.device, config.run.seed), plan


def _workload(prepared: Prepared) -> Workload:
    config, index, features = prepared.config, prepared.indexes["train"], prepared.features
    lengths = mean_lengths(prepared.schema, features, index.statistics)
    texts = text_shares(prepared.schema, features, index.statistics)
    return Workload(
        config=config,
        schema=prepared.schema,
        features=features,
        specs=prepared.specs,
        lengths=lengths,
        text_width=prepared.store.width if prepared.store else 0,
        texts=texts,
        tokens=mean_tokens(texts, lengths, index.tokenizer.max_length if index.tokenizer else None),
    )
