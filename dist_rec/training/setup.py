"""From a prepared run to its parts, on a rank that has joined the others: streams, dense model and engine, tables."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan

from ..config import DataConfig
from ..data.index import Index
from ..data.order import Order, temperature_weights
from ..data.reader import ShardReader
from ..data.stream import Stream
from ..data.vocabulary import id_maps
from ..embeddings.description import plan_from_description
from ..embeddings.plan_file import read_plan
from ..embeddings.sharding import attach_optimizer, ranks_per_host, shard
from ..embeddings.tables import EmbeddingTables
from ..errors import UserError
from ..layers.reduction import Reduction
from .catalogue import candidates_of
from .checkpoint import Saved
from .collectives import DistributedReduction
from .engine import make_engine
from .passes import FROM_THE_START, fingerprint
from .planning import plan_here
from .prepared import Prepared
from .process import Process, choose_device
from .reading import retry_of
from .start.freeze import freeze, frozen_names
from .start.warm_start import fill_dense
from .workload import Workload, mean_lengths, mean_tokens, text_shares


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
    return _stream(prepared, split, order, index, rank, world, training=False)


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
    return _stream(prepared, "train", order, index, rank, world, training=True)


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


def _stream(
    prepared: Prepared, split: str, order: Order, index: Index, rank: int, world: int, training: bool
) -> Stream:
    config, kind, vectors = prepared.config, prepared.kind, prepared.vectors(split, training)
    schema, features = prepared.given
    looked_up = kind.looked_up(schema, config, features)
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
        id_maps=id_maps(schema, config.tables.overrides, looked_up, prepared.unread),
        identify=kind.identified(schema, config, features),
        look_up=bool(looked_up),
        candidates=candidates_of(prepared, rank, world, training) if kind.reads_catalogue else None,
        schema=schema,
        read_ahead=config.data.read_ahead,
    )


def build_model(prepared: Prepared, reduction: Reduction) -> nn.Module:
    """The dense model, initialised by run.seed alone: equal on every rank."""
    config = prepared.config
    encoder, width = None, prepared.store.width if prepared.store else 0
    if config.text.trains:
        from ..text.cotrain import cotrained_encoder

        torch.manual_seed(config.run.seed)  # for the adapters
        encoder = cotrained_encoder(config.text, reduction)
        width = encoder.width
    torch.manual_seed(config.run.seed)
    schema, features = prepared.given
    return prepared.kind.model(schema, config, prepared.dims, width, encoder, features, reduction)


def build_engine(prepared: Prepared, process: Process, batch_rows: int, start: Saved | None = None):
    """The dense model in its DeepSpeed engine, for `batch_rows` rows of a rank. Collective.

    Args:
        start: the foundation's checkpoint, verified, where the model starts from it.
    """
    config, model = prepared.config, build_model(prepared, DistributedReduction())
    if start is not None:
        names, origin = prepared.names, prepared.origin
        fill_dense(start, model, names.own, len(origin.domains), origin.start_rows(), names.levels.later)
    if prepared.origin is not None:
        freeze(model, frozen_names(config.finetune, prepared.names))
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
    tables = EmbeddingTables(prepared.specs, prepared.given[0], config.tables, torch.device("meta"))
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
    config, index, (schema, features) = prepared.config, prepared.indexes["train"], prepared.given
    lengths = mean_lengths(schema, features, index.statistics) | prepared.kind.carried(config, prepared.num_items)
    texts = text_shares(schema, features, index.statistics)
    return Workload(
        config=config,
        schema=schema,
        features=features,
        specs=prepared.specs,
        lengths=lengths,
        text_width=prepared.store.width if prepared.store else 0,
        texts=texts,
        tokens=mean_tokens(texts, lengths, index.tokenizer.max_length if index.tokenizer else None),
    )
