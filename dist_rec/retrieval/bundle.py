"""`dist-rec export --bundle`: a trained run as a scoring bundle (`dist_rec.scoring`), which needs no training system.

A bundle's scores are measured before it is there, by the code that it carries, against the run's own forward on rows of
its own data.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import scoring
from ..config import Config
from ..data.rows import Ragged, Rows
from ..data.vocabulary import id_maps, tables_of, undivided
from ..embeddings.ids import FREE, ID
from ..embeddings.managed import managed_ids
from ..embeddings.tables import TableSpec
from ..errors import UserError
from ..files import write_text
from ..layers.reduction import Reduction
from ..models.towers import Side, TwoTowers
from ..scoring.bundle import (
    ENCODER,
    FORMAT,
    ITEM,
    MANAGED,
    MANIFEST_NAME,
    PROGRAMS,
    SCORE,
    TABLES,
    TEXTS,
    TOKENIZER_NAME,
    USER,
    VOCABULARY,
    Bundle,
)
from ..scoring.hashes import text_key
from ..scoring.raw import Columns, Lists
from ..strict import to_dict
from ..text.encoder import COMPUTE, TextEncoder, load_text_encoder
from ..text.paths import tokenizer_file
from ..text.store import VectorStore
from ..training import checkpoint
from ..training.checkpoint.manifest import WEIGHT
from ..training.checkpoint.tables import local_shards
from ..training.evaluate import Trained, trained
from ..training.prepared import Prepared
from ..training.process import world_size
from ..training.setup import build_model
from .export import TOLERANCE
from .manifest import check_place, sha256_of, sizes_of, take_place
from .names import read_vocabulary
from .programs import ModelProgram, Precision, TablesProgram, inputs_of, save_encoder, save_program, table_inputs
from .rows import Batches, RowSource, of_run, with_distinct_texts
from .vectors import batch_rows, open_data

CODE = "scoring"
# Text vectors that are copied at a time.
WRITTEN_ROWS = 65_536


@dataclass(frozen=True)
class BundleWishes:
    """What a bundle is asked for.

    Attributes:
        out: its folder.
        precision: of the tables.
        rows: that its scores are measured on, at most.
        vocabulary: folder of the dictionaries, where they do not lie beside the data.
    """

    out: Path
    precision: Precision = "int8"
    rows: int = 1000
    vocabulary: Path | None = None


def export_bundle(config: Config, run: Path, wishes: BundleWishes) -> dict[str, Any]:
    """Write the best or latest checkpoint of `run` as a scoring bundle; its manifest.

    The folder appears whole, and takes the place of an earlier bundle.

    Raises:
        UserError: the model cannot be one; its scores are not the run's; `out` is something else; there are ranks.
    """
    out = wishes.out
    check_place(out, MANIFEST_NAME, "--bundle", "bundle")
    partial = out.with_name(f".{out.name}.partial")
    with trained(config, run, "train") as loaded:
        if world_size() > 1:
            raise UserError("a bundle is written by one process: leave --nproc-per-node out.")
        if why := loaded.prepared.kind.not_bundled(config):
            raise UserError(f"{run} cannot be exported as a bundle: {why}.")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / PROGRAMS).mkdir(parents=True)
        try:
            manifest = _write(loaded, wishes, partial)
            saved = checkpoint.read_manifest(run / "checkpoints" / checkpoint.name_of(loaded.step))
            manifest |= {"run": str(run.absolute()), "checkpoint": saved.manifest.sha256, "step": loaded.step}
            _seal(partial, manifest)
            manifest["scores"] = _measure(loaded, Bundle(partial), wishes.rows)
            _refuse(manifest["scores"], wishes.precision)
        except UserError:
            shutil.rmtree(partial)
            raise
    _seal(partial, manifest)
    take_place(partial, out)
    return manifest


def _seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, with every file's size and checksum."""
    manifest["files"] = {
        name: {"bytes": size, "sha256": sha256_of(folder / name)} for name, size in sizes_of(folder).items()
    }
    write_text(folder / MANIFEST_NAME, json.dumps(manifest, indent=1))


def _write(loaded: Trained, wishes: BundleWishes, folder: Path) -> dict[str, Any]:
    """Everything but the manifest, which is returned."""
    prepared = loaded.prepared
    schema, features, index = prepared.schema, prepared.features, prepared.indexes["train"]
    looked_up = prepared.kind.looked_up(schema, prepared.config, features)
    towers = _towers(prepared)
    weights, tables = _tables(loaded, looked_up, folder)
    # The run's own sums its losses over ranks, which no service has.
    model = build_model(prepared, Reduction()).eval()
    model.load_state_dict(loaded.model.state_dict())
    encoder, width = _encoder(prepared, model), prepared.store.width if prepared.store else 0
    if encoder is not None and prepared.store is None:
        # What the model then reads is what that made.
        width, model.text_encoder = encoder.width, None
    programs = _programs(prepared, model, width, towers, weights, wishes.precision, looked_up, folder / PROGRAMS)
    for table in tables:
        if schema.features[table].vocabulary.kind == "dictionary":
            _write_vocabulary(prepared, table, wishes.vocabulary, folder / VOCABULARY)
    texts = _write_texts(prepared, width, encoder, folder) if width else None
    (folder / CODE).mkdir()
    for file in sorted(Path(scoring.__file__).parent.glob("*.py")):
        shutil.copy(file, folder / CODE)
    return {
        "format": FORMAT,
        "model": prepared.config.model.kind,
        "precision": wishes.precision,
        "versions": {name: version(name) for name in ("torch", "torchrec")},
        "schema": to_dict(schema),
        "prefixes": dict(index.tokenizer.prefixes) if index.tokenizer else {},
        "features": features,
        "tables": tables,
        "texts": texts,
        "towers": {
            task: {"exact": towers.exact[task], "scale": towers.scale[task], "bias": towers.bias[task]}
            | ({"why": towers.why[task]} if task in towers.why else {})
            for task in (towers.tasks if towers else ())
        },
        "programs": programs,
    }


def _towers(prepared: Prepared) -> TwoTowers | None:
    """None where the model has no two towers, and so only scores."""
    try:
        return prepared.kind.towers(prepared.schema, prepared.config, prepared.features)
    except UserError:
        return None


def _tables(
    loaded: Trained, looked_up: Collection[str], folder: Path
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Every vocabulary's table as one of float32, and what the manifest says of it; ids of managed ones are written."""
    prepared, whole = loaded.prepared, {}
    schema, config = prepared.schema, prepared.config
    for shard in local_shards(loaded.sharded):
        table = whole.setdefault(shard.table, torch.empty(shard.shape))
        (row, column), (rows, columns) = shard.box.offset, shard.box.size
        table[row : row + rows, column : column + columns] = shard.tensors[WEIGHT].float().cpu()
    # Parts of a divided vocabulary follow one another; of one that nobody reads all ids have one row.
    for name, ids in tables_of(schema, config.tables.overrides).items():
        if name in prepared.unread and name in whole:
            whole[name] = whole[name].expand(len(ids), -1)
    weights: dict[str, list[Tensor]] = {}
    for name in tables_of(schema, config.tables.overrides):
        if name in whole:
            weights.setdefault(undivided(name), []).append(whole[name])
    found = {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in weights.items()}
    maps = id_maps(schema, config.tables.overrides, looked_up)
    kinds = {map_.table: map_.kind for map_ in maps.values() if hasattr(map_, "table")}
    for name, ids in managed_ids(loaded.sharded).items():
        by_row = ids.by_row()[ID].cpu().numpy()
        order = np.argsort(by_row, kind="stable")
        # And a row without an id, beyond which no id is.
        order = order[: np.searchsorted(by_row, FREE, sorter=order) + 1]
        _save(folder / MANAGED, name, ids=by_row[order], rows=order)
    return found, {
        name: {
            "rows": weight.shape[0],
            "dim": weight.shape[1],
            "ids": kinds[name] if kinds.get(name) in ("hash", "managed") else "rows",
        }
        for name, weight in found.items()
    }


def _save(folder: Path, name: str, **arrays: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    for what, array in arrays.items():
        np.save(folder / f"{name}-{what}.npy", array)


def _programs(
    prepared: Prepared,
    model: torch.nn.Module,
    text_width: int,
    towers: TwoTowers | None,
    weights: Mapping[str, Tensor],
    precision: Precision,
    looked_up: Collection[str],
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """Write the programs; what the manifest says of each."""
    schema, features, config = prepared.schema, prepared.features, prepared.config
    users = {name: [f for f in looked_up if schema.table_of(f) == name] for name in weights}
    specs = [
        TableSpec(
            name=name,
            rows=weight.shape[0],
            dim=weight.shape[1],
            features=tuple(users[name]),
            sequence=any(schema.features[user].role == "history" for user in users[name]),
            sharding="auto",
        )
        for name, weight in weights.items()
    ]
    found = {}
    if specs:
        given, by_row = table_inputs(looked_up)
        program = TablesProgram(specs, weights, schema, config.tables, precision)
        save_program(program, given, by_row, folder / f"{TABLES}.pt2")
        found[TABLES] = {"inputs": list(given)}
    dims = {name: weight.shape[1] for name, weight in weights.items()}
    wanted: list[tuple[str, Side | None, Collection[str]]] = [(SCORE, None, features)]
    if towers is not None:
        wanted += [(USER, "user", towers.user_features), (ITEM, "item", towers.item_features)]
    for name, side, read in wanted:
        given, by_row = inputs_of(schema, read, dims, text_width)
        save_program(ModelProgram(model, schema, side), given, by_row, folder / f"{name}.pt2")
        found[name] = {"inputs": list(given), "features": list(read)}
    return found


def _write_vocabulary(prepared: Prepared, table: str, vocabulary: Path | None, folder: Path) -> None:
    values, rows = read_vocabulary(prepared.root("train"), prepared.schema, table, vocabulary)
    keys = np.array([text_key(value) for value in values.to_pylist()], np.int64)
    order = np.argsort(keys)
    if len(keys) != len(np.unique(keys)):
        raise UserError(f"two values of vocabulary {table} have one 64-bit hash, so a bundle cannot tell them apart.")
    _save(folder, table, keys=keys[order], ids=rows[order])


def _encoder(prepared: Prepared, model: torch.nn.Module) -> TextEncoder | None:
    """The language model of texts that no store has a vector of: the run's own, or that of its store, if it encodes."""
    if getattr(model, "text_encoder", None) is not None:
        return TextEncoder(model.text_encoder.model, model.text_encoder.pooling).eval()
    if prepared.missing is None:
        return None
    recipe = prepared.missing.recipe
    return load_text_encoder(prepared.missing.model, dtype=COMPUTE[recipe.compute], pooling=recipe.pooling)


def _write_texts(prepared: Prepared, width: int, encoder: TextEncoder | None, folder: Path) -> dict[str, Any]:
    """Every text vector of the run's store, and the language model; what the manifest says of them."""
    dtype = prepared.store.info.recipe.dtype if prepared.store else "float32"
    told = {"width": width, "dtype": dtype, "encoder": encoder is not None}
    (folder / TEXTS).mkdir()
    if encoder is not None:
        index = prepared.indexes["train"]
        told |= {"max_tokens": index.tokenizer.max_length}
        save_encoder(encoder, index.tokenizer.max_length, folder / PROGRAMS / f"{ENCODER}.pt2")
        spec = prepared.config.text.model or prepared.store.info.model
        shutil.copy(tokenizer_file(spec), folder / TEXTS / TOKENIZER_NAME)
    return told | (_write_store(prepared.store, folder / TEXTS) if prepared.store else {})


def _write_store(store: VectorStore, folder: Path) -> dict[str, Any]:
    keys, dtype = np.array(store.keys), np.dtype(store.info.recipe.dtype)
    np.save(folder / "keys.npy", keys)
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", dtype, (len(keys), store.width))
    for start in range(0, len(keys), WRITTEN_ROWS):
        vectors[start : start + WRITTEN_ROWS] = store.lookup(keys[start : start + WRITTEN_ROWS])
    vectors.flush()
    return {"count": len(keys), "model": store.info.model}


def _measure(loaded: Trained, bundle: Bundle, count: int) -> dict[str, Any]:
    """How far the bundle's scores are from the model's own on rows of the run's data."""
    prepared = loaded.prepared
    split = next(name for name in ("test", "valid", "train") if getattr(prepared.config.data, name) is not None)
    data = open_data(prepared.root(split), prepared, f"data.{split}")
    rows = data.index.rows
    source = RowSource(data.reader(prepared, prepared.features))
    chosen = np.linspace(0, rows - 1, min(count, rows)).astype(np.int64)
    batches, size = Batches(prepared, data.root), batch_rows(prepared, 1)
    own, found = {}, {}
    for start in range(0, len(chosen), size):
        some = with_distinct_texts(of_run(source.take(chosen[start : start + size])[0], prepared.features))
        batch = batches(some, size).to(loaded.process.device)
        with torch.no_grad():
            embeddings = loaded.tables.vectors(loaded.sharded(batch), batch)
            logits = loaded.model(embeddings, batch)["logits"]
        for task, scores in bundle.run(SCORE, columns_of(some)).items():
            found.setdefault(task, []).append(scores)
            own.setdefault(task, []).append(logits[task][: len(some)].float().cpu().numpy())
    told: dict[str, Any] = {"data": f"data.{split}", "rows": len(chosen), "tasks": {}}
    for task in found:
        mine, theirs = np.concatenate(own[task]), np.concatenate(found[task])
        error = float(np.abs(mine - theirs).max())
        largest = float(np.abs(mine).max())
        told["tasks"][task] = {"max_score_error": error, "max_relative_error": error / largest if largest else 0.0}
    return told


def columns_of(rows: Rows) -> Columns:
    """Decoded rows, with distinct texts, as what a bundle reads raw rows to."""

    def lists(of: Ragged) -> Lists:
        return Lists(of.values.astype(np.int64), of.lengths)

    return Columns(
        domain=rows.domain,
        ids={name: lists(ids) for name, ids in rows.ids.items()},
        dense=dict(rows.dense),
        texts={name: lists(used) for name, used in rows.texts.items()},
        text_keys=rows.text_keys,
        tokens=None if rows.tokens is None else lists(rows.tokens),
    )


def _refuse(scores: dict[str, Any], precision: Precision) -> None:
    off = {task: told["max_relative_error"] for task, told in scores["tasks"].items()}
    if precision == "fp32" and max(off.values()) > TOLERANCE:
        raise UserError(
            f"the bundle's scores differ from the run's by up to {max(off.values()):.1e} of the largest, although its "
            "tables are of the same precision: nothing is written."
        )


def print_bundle(manifest: dict[str, Any], folder: Path) -> None:
    """A bundle in a few lines."""
    size, scores = sum(file["bytes"] for file in manifest["files"].values()), manifest["scores"]
    rows = sum(table["rows"] for table in manifest["tables"].values())
    print(
        f"{folder}: {manifest['model']} of step {manifest['step']}, {len(manifest['tables'])} tables of {rows:,} rows "
        f"in {manifest['precision']}, {size:,} bytes"
    )
    for task, told in scores["tasks"].items():
        print(
            f"  {task}: scores differ from the run's by at most {told['max_score_error']:.1e} "
            f"({told['max_relative_error']:.1e} of the largest) on {scores['rows']:,} rows of {scores['data']}"
        )
