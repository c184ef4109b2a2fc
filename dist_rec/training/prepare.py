"""`prepare`: everything of a config and its data that can be checked without other ranks, all faults at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..config import Config, TablesConfig, TextConfig, check_names
from ..data.index import CATALOGUE, SPLITS, Index, TokenizerInfo, read_index
from ..embeddings.ids import fault_of_rows
from ..embeddings.plan_file import check_plan
from ..embeddings.sharders import check_kernels
from ..errors import UserError
from ..layers.reduction import Reduction
from ..schema import Schema
from ..text.onthefly import OnTheFly
from ..text.paths import resolve_model_folder, tokenizer_fingerprint
from ..text.store import VectorStore
from .catalogue import unread_tables
from .finetuning import finetune_faults, specs_of, where_it_starts
from .kinds import kind_of
from .prepared import Prepared
from .process import choose_device, ranks_here, world_size
from .reading import retry_of
from .workload import USUAL_TEXT_WIDTH


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
    kind, view = kind_of(config), view or _whole
    roots = {split: getattr(data, split) for split in SPLITS}
    indexes = {
        split: attempt(lambda root=root: view(read_index(root, retry_of(data))))
        for split, root in roots.items()
        if root is not None
    }
    if kind.reads_catalogue and data.catalogue is not None:
        indexes[CATALOGUE] = attempt(read_index, data.catalogue, retry_of(data))
    store = attempt(VectorStore.open, config.text.store) if config.text.mode == "frozen" else None
    dropped = attempt(VectorStore.open, config.text.dropped_store) if kind.reads_dropped(config) else None
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
        features = kind.features(schema, config)
        if config.finetune.run is not None:
            origin, foundation = attempt(where_it_starts, config, schema, run or config.run_folder) or (None, None)
            features = [name for name in features if origin is None or name not in origin.left_out]
        faults += kind.faults(schema, config, features)
        unread = attempt(unread_tables, config, schema, features) or frozenset()
        specs = attempt(specs_of, schema, config, features, origin, unread)
        faults += kind.table_faults(config, specs or [])
        managed = [fault_of_rows(spec.name, spec.rows, ranks) for spec in specs or [] if spec.managed]
        faults += filter(None, managed)
        if specs is not None and config.tables.plan is not None:
            attempt(check_plan, config.tables.plan, specs, config.tables, ranks, ranks_here(ranks))
        if specs is not None and (device := attempt(choose_device, config)) is not None:
            attempt(check_kernels, specs, device.type)
        if store is not None:
            attempt(store.check_tokenizer, train.tokenizer)
            attempt(store.check_pooling, config.text.pooling)
            attempt(store.check_words, False)
            if config.text.missing == "encode":
                missing = attempt(_on_the_fly, config, store, train.tokenizer)
        if dropped is not None:
            attempt(dropped.check_words, True)
        if store is not None and dropped is not None:
            faults += _unlike(store, dropped)
        if config.text.trains:
            folder = attempt(resolve_model_folder, config.text.model)
            longest = attempt(_longest_text, config.text) if folder is not None else None
            attempt(_check_tokenizer, config.text.model, folder, data.train, train.tokenizer, longest)
        # Faulty overrides and stores hide no fault of the model, for which any widths will do.
        dims = dict.fromkeys(schema.table_sizes(), TablesConfig().dim) | {s.name: s.dim for s in specs or []}
        width = store.width if store else USUAL_TEXT_WIDTH if config.text.mode != "none" else 0
        is_model = attempt(_try_model, schema, config, dims, width, features)
        prepared = Prepared(
            config,
            schema,
            indexes,
            features,
            specs,
            store,
            view,
            origin,
            foundation,
            missing=missing,
            dropped=dropped,
            unread=unread,
        )
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


def _unlike(store: VectorStore, dropped: VectorStore) -> list[str]:
    """How the vectors of texts with words dropped were made in another way than those of the texts."""
    one, other = store.info.recipe, dropped.info.recipe
    differ = [
        f"{name} is {getattr(one, name)} there and {getattr(other, name)} here"
        for name in ("model_fingerprint", "tokenizer_fingerprint", "max_tokens", "pooling", "width")
        if getattr(one, name) != getattr(other, name)
    ]
    if not differ:
        return []
    return [
        f"text.dropped_store {dropped.folder} is not of the same language model as text.store {store.folder}: "
        f"{', '.join(differ)}. Embed the texts with --word-drop as those were"
    ]


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


def _try_model(schema: Schema, config: Config, dims: dict[str, int], width: int, features: list[str]) -> bool:
    """Build the model without memory, for the faults that only the model knows."""
    kind = kind_of(config)
    given, features = kind.given(schema, config, features)
    with torch.device("meta"):
        kind.model(given, config, dims, width, None, features, Reduction())
    return True
