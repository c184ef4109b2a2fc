"""A query's text as a vector of the user side, by the run's model, as if it stood in a row of the run's data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..config import load_config
from ..data.blocks import text_key
from ..data.index import TokenizerInfo
from ..data.rows import Ragged, Rows
from ..errors import UserError
from ..text.onthefly import FrozenVectors, OnTheFly
from ..text.paths import resolve_model_folder, tokenizer_fingerprint
from ..text.texts import load_tokenizer, tokenize
from ..training.evaluate import trained
from ..training.prepared import Prepared
from ..training.process import choose_device
from .manifest import CONFIG_NAME
from .rows import Batches, only, with_distinct_texts

if TYPE_CHECKING:
    from .search import Export


def query_vectors(export: Export, query: str) -> dict[str, np.ndarray]:
    """The vector of a query by task, float32 `[1, D]`.

    Raises:
        UserError: the run is gone, its model reads no query, or no language model makes a vector of the text.
    """
    run = export.run
    if not (run / CONFIG_NAME).is_file():
        raise UserError(f"--query needs the model of {run}, which is not there: restore the run, or ask with --user.")
    config = load_config(export.folder / CONFIG_NAME)
    with trained(config, run, "train") as loaded:
        prepared = loaded.prepared
        schema = prepared.schema
        towers = prepared.kind.towers(schema, config, prepared.features)
        name = next((n for n in towers.user_features if schema.features[n].role == "query"), None)
        if name is None or schema.features[name].kind != "text":
            raise UserError(
                f"the user side of this model reads {', '.join(towers.user_features)}, and no query: ask with --user."
            )
        index = prepared.indexes["train"]
        text = (index.tokenizer.prefixes.get("query", "") if index.tokenizer else "") + query
        batches = Batches(prepared, str(run))
        tokens = None
        if config.text.trains:
            tokens = _tokens(config.text.model, text, index.tokenizer.max_length)
        elif not prepared.store.find(np.array([text_key(text)]))[1].all():
            batches.vectors, tokens = _encoder(prepared, text)
        rows = Rows.void(schema, prepared.features, tokens is not None, 0, 1)
        rows.row = np.zeros(1, np.int64)
        rows.text_keys, rows.tokens = np.array([text_key(text)]), tokens
        rows.texts[name] = Ragged(np.zeros(1, np.int64), np.array([0, 1]))
        batch = batches(with_distinct_texts(only(rows, towers.user_features)), 1).to(loaded.process.device)
        with torch.no_grad():
            embeddings = loaded.tables.vectors(loaded.sharded(batch), batch)
            found = loaded.model(embeddings, batch, side="user")["vectors"]
    return {task: vectors.float().cpu().numpy() for task, vectors in found.items()}


def _tokens(model: str, text: str, longest: int) -> Ragged:
    return tokenize(load_tokenizer(resolve_model_folder(model), longest), [text])


def _encoder(prepared: Prepared, text: str) -> tuple[FrozenVectors, Ragged]:
    """The language model of the store, for a text that it lacks, and the text's tokens."""
    store = prepared.store
    recipe, model = store.info.recipe, prepared.config.text.model or store.info.model
    folder = resolve_model_folder(model)
    about = TokenizerInfo(name=model, fingerprint=tokenizer_fingerprint(folder), max_length=recipe.max_tokens)
    encoder = OnTheFly(recipe, model, about, choose_device(prepared.config), 0, "--query")
    return FrozenVectors(store, "--query", encoder.load()), _tokens(model, text, recipe.max_tokens)
