"""Texts a second of a language model: each text once and batched by length, against every row for itself.

The unit is a *row-text*: a text that a row of the data set uses. A text that is encoded once and used by five rows
counts five, for either way.

* naive: every row encodes each of its texts, padded to the longest text of the data set.
* batch padded: the same, padded only to the longest of that feature (query, title) in the batch: as hard as naive gets
  without looking at lengths or repeats.
* ours: `frozen` encodes each distinct text of the whole data set once, as `embed` does; `lora` and `full` encode each
  distinct text of a training batch once and run backward, as the engine does, in batches of about one length.

Naive runs in parts of as many tokens as ours, which is kind to it on a CPU, and backward follows each part, which
spares it memory. The three take turns; a ratio is the median of the turns' ratios, a rate the median of the rates.
No optimizer steps: it costs all the same. One process.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..config import DataConfig, TextConfig
from ..data.batch import Batch
from ..data.index import Index, read_index
from ..data.order import Order
from ..data.reader import ShardReader
from ..data.rows import Ragged
from ..data.stream import Stream
from ..errors import UserError
from ..layers.reduction import Reduction
from ..text.batching import DEFAULT_BATCH_TOKENS, length_batches, pad
from ..text.cotrain import CotrainedEncoder, cotrained_encoder
from ..text.encoder import TextEncoder, load_text_encoder
from ..text.paths import resolve_model_folder, tokenizer_fingerprint

MODES = ("frozen", "lora", "full")
NAIVE, PADDED, OURS = "naive", "batch_padded", "ours"
RECIPE = Path(__file__).parents[2] / "shards" / "recipes" / "foundation.py"
# Longer than any of Home Depot's, so that its own longest text is what naive pads to.
MAX_TOKENS = 256


@dataclass
class Pool:
    """The texts of a data set, all its splits together.

    Attributes:
        tokens: of the distinct texts.
        uses: by text feature, int64 `[U]`, which of them its rows use, in order.
    """

    rows: int
    tokens: Ragged
    uses: dict[str, np.ndarray]

    @property
    def longest(self) -> int:
        return int(self.tokens.lengths.max())

    @property
    def num_uses(self) -> int:
        return sum(map(len, self.uses.values()))


def bench_text(
    data: Path | None,
    model: str,
    rows: int,
    repeats: int,
    batch_size: int,
    modes: list[str],
    folder: Path | None = None,
) -> dict[str, Any]:
    """Measure on a sample of `data`.

    Args:
        data: a data set, or the folder above its splits, with token ids of the model's tokenizer; None builds Home
            Depot's judged pairs from the raw files (DIST_REC_RAW) by `shards/recipes/foundation.py`.
        model: see `resolve_model_folder`.
        rows: of a turn: so many rows' texts for frozen, and as many distinct texts for ours; whole batches for lora
            and full.
        repeats: turns.
        batch_size: rows of a batch.
        modes: of `MODES`.
        folder: where temporary files go; None is the system's place for them.

    Returns:
        What `dist-rec bench text --json` prints.

    Raises:
        UserError: a number makes no sense, no such data or model, or data of another tokenizer.
    """
    streams = DataConfig(train="").streams
    if rows < 1 or repeats < 1 or batch_size < streams or batch_size % streams:
        raise UserError(f"--rows and --repeats must be at least 1, --batch-size a multiple of {streams}.")
    resolve_model_folder(model)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="dist_rec-bench-", dir=folder) as temporary:
        root = data or _home_depot(Path(temporary) / "homedepot", model, console)
        splits = _splits(root, model)
        pool = _pool(splits)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        console.print(f"{pool.rows:,} rows, {len(pool.tokens):,} distinct texts, the longest of {pool.longest} tokens")
        turns = {}
        for mode in modes:
            if mode == "frozen":
                cases = _frozen(model, pool, rows, batch_size, device)
            else:
                cases = _training(model, mode, splits[0], pool.longest, -(-rows // batch_size), batch_size, device)
            turns[mode] = [_turn(mode, number, cases, console) for number in range(repeats)]
    return _summary(turns, pool, model, data.name if data else "homedepot", rows, batch_size, device)


def _home_depot(out: Path, model: str, console: Console) -> Path:
    """Build the data set from raw files, as the README does it."""
    if not RECIPE.is_file():
        raise UserError(f"{RECIPE} is missing, which makes Home Depot's data set: name another data set with --data.")
    console.print("building Home Depot's pairs")
    options = ["--domains", "homedepot", "--tokenizer", model, "--max-tokens", str(MAX_TOKENS)]
    done = subprocess.run([sys.executable, str(RECIPE), "--out", str(out), *options], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"Home Depot's data set could not be built:\n{done.stderr.strip()[-2000:]}")
    return out


def _splits(root: Path, model: str) -> list[tuple[str, Index]]:
    """The data sets at `root`, the one to train on first."""
    if (root / "index.json").is_file():
        found = [(str(root), read_index(str(root)))]
    else:
        roots = [root / name for name in ("train", "valid", "test") if (root / name / "index.json").is_file()]
        found = [(str(one), read_index(str(one))) for one in roots]
    if not found:
        raise UserError(f"--data {root}: no data set there, nor in train, valid or test below it.")
    tokenizer = found[0][1].tokenizer
    if tokenizer is None or tokenizer.fingerprint != tokenizer_fingerprint(resolve_model_folder(model)):
        raise UserError(f"--data {root} has no token ids of {model}: build it with --tokenizer {model}.")
    if not _text_features(found[0][1]):
        raise UserError(f"--data {root} has no features of kind text.")
    return found


def _text_features(index: Index) -> list[str]:
    return [name for name, feature in index.schema.features.items() if feature.kind == "text"]


def _pool(splits: list[tuple[str, Index]]) -> Pool:
    features = _text_features(splits[0][1])
    keys, tokens, uses, rows = [], [], {name: [] for name in features}, 0
    for root, index in splits:
        reader = ShardReader(root, index, features, with_tokens=True)
        for number in range(len(reader.places)):
            block = reader.rows(number)
            rows += len(block)
            keys.append(block.text_keys)
            tokens.append(block.tokens)
            for name in features:
                uses[name].append(block.text_keys[block.texts[name].values])
    every, texts = np.concatenate(keys), Ragged.concat(tokens)
    used = {name: np.concatenate(found) for name, found in uses.items()}
    distinct = np.unique(np.concatenate(list(used.values())))
    order = np.argsort(every, kind="stable")
    places = order[np.searchsorted(every[order], distinct)]
    return Pool(rows, texts.take(places), {name: np.searchsorted(distinct, found) for name, found in used.items()})


Case = Callable[[int], tuple[float, float]]
"""Takes the number of the turn; returns row-texts and seconds."""


def _frozen(model: str, pool: Pool, rows: int, batch_size: int, device: torch.device) -> dict[str, Case]:
    encoder = load_text_encoder(model).to(device)
    budget = DEFAULT_BATCH_TOKENS[device.type]
    per_text = pool.num_uses / len(pool.tokens)

    @torch.inference_mode()
    def encode(batches: Iterator[tuple[np.ndarray, int]]) -> float:
        """Seconds for batches of texts, each with the least width to pad to."""
        with _Clock(device) as clock:
            for texts, width in batches:
                ids, mask = pad(pool.tokens.take(texts))
                spare = max(width - ids.shape[1], 0)
                ids, mask = (torch.nn.functional.pad(t, (0, spare)) for t in (ids, mask))
                encoder(ids.to(device), mask.to(device)).cpu()
        return clock.seconds

    def ours(turn: int) -> tuple[float, float]:
        count = min(rows * len(pool.uses), len(pool.tokens))
        texts = np.random.default_rng(turn).choice(len(pool.tokens), count, replace=False)
        lengths = pool.tokens.take(texts).lengths
        return count * per_text, encode((texts[which], 0) for which in length_batches(lengths, budget))

    def naive(turn: int, whole: bool) -> tuple[float, float]:
        count, parts = 0, []
        for uses in pool.uses.values():
            texts = np.random.default_rng(turn).choice(uses, min(rows, len(uses)), replace=False)
            count += len(texts)
            for at in range(0, len(texts), batch_size):
                batch = texts[at : at + batch_size]
                width = pool.longest if whole else int(pool.tokens.take(batch).lengths.max())
                size = max(budget // width, 1)
                parts += [(batch[i : i + size], width) for i in range(0, len(batch), size)]
        return count, encode(iter(parts))

    return {NAIVE: lambda turn: naive(turn, True), PADDED: lambda turn: naive(turn, False), OURS: ours}


def _training(
    model: str, mode: str, split: tuple[str, Index], longest: int, batches: int, batch_size: int, device: torch.device
) -> dict[str, Case]:
    encoder = cotrained_encoder(TextConfig(mode=mode, model=model), Reduction()).to(device).train()
    root, index = split
    config = DataConfig(train=root)
    order = Order(index, streams=config.streams, batch_size=batch_size, seed=0, window=config.shuffle_window)
    stream = Stream(ShardReader(root, index, _text_features(index), with_tokens=True), order)
    held: dict[int, Batch] = {}

    def batches_of(turn: int) -> list[Batch]:
        steps = [(turn * batches + i) % stream.steps for i in range(batches)]
        for step in steps:
            if step not in held:
                held[step] = stream.batch(0, step).to(device)
        return [held[step] for step in steps]

    def run(turn: int, step: Callable[[Batch], None]) -> tuple[float, float]:
        count, seconds = 0, 0.0
        for batch in batches_of(turn):
            encoder.zero_grad()
            with _Clock(device) as clock:
                step(batch)
            seconds += clock.seconds
            count += sum(len(found) for found in batch.text_index.values())
        return count, seconds

    def ours(batch: Batch) -> None:
        vectors = encoder(batch.text_tokens, batch.text_mask)
        _loss(vectors.index_select(0, torch.cat(list(batch.text_index.values())))).backward()

    def naive(batch: Batch, whole: bool) -> None:
        for found in batch.text_index.values():
            tokens, mask = batch.text_tokens[found], batch.text_mask[found]
            width = longest if whole else int(mask.sum(1).max())
            _encode_apart(encoder, tokens, mask, width)

    return {
        NAIVE: lambda turn: run(turn, lambda batch: naive(batch, True)),
        PADDED: lambda turn: run(turn, lambda batch: naive(batch, False)),
        OURS: lambda turn: run(turn, ours),
    }


def _encode_apart(encoder: CotrainedEncoder, tokens: Tensor, mask: Tensor, width: int) -> None:
    """Forward and backward of every text, padded to `width` tokens."""
    spare = width - tokens.shape[1]
    tokens, mask = (torch.nn.functional.pad(t, (0, spare)) for t in (tokens, mask))  # cuts where negative
    size = max(DEFAULT_BATCH_TOKENS[tokens.device.type] // width, 1)
    for at in range(0, len(tokens), size):
        _loss(TextEncoder.forward(encoder, tokens[at : at + size], mask[at : at + size])).backward()


def _loss(vectors: Tensor) -> Tensor:
    return vectors.square().sum()


class _Clock:
    """Seconds of what is done within."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __enter__(self) -> _Clock:
        self.seconds = -self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += self._now()


def _turn(mode: str, number: int, cases: dict[str, Case], console: Console) -> dict[str, float]:
    """Row-texts a second of every way."""
    rates = {}
    for name, case in cases.items():
        count, seconds = case(number)
        rates[name] = count / seconds
        console.print(f"turn {number + 1}: {rates[name]:>10,.1f} row-texts/s  {mode}, {name.replace('_', ' ')}")
    return rates


def _summary(
    turns: dict[str, list[dict[str, float]]],
    pool: Pool,
    model: str,
    data: str,
    rows: int,
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mode, rates in turns.items():
        for name, key in ((NAIVE, f"{mode}_ratio"), (PADDED, f"{mode}_ratio_batch_padded")):
            found[key] = round(statistics.median(rate[OURS] / rate[name] for rate in rates), 2)
    return {
        **found,
        "texts_per_s": {
            mode: {name: round(statistics.median(rate[name] for rate in rates), 1) for name in (OURS, NAIVE, PADDED)}
            for mode, rates in turns.items()
        },
        "unit": "texts of rows a second",
        "data": data,
        "model": model,
        "rows": pool.rows,
        "texts": pool.num_uses,
        "distinct_texts": len(pool.tokens),
        "distinct_by_feature": {name: len(np.unique(uses)) for name, uses in pool.uses.items()},
        "longest_text": pool.longest,
        "mean_tokens": round(float(pool.tokens.lengths[np.concatenate(list(pool.uses.values()))].mean()), 2),
        "sampled_rows": rows,
        "batch_size": batch_size,
        "repeats": len(next(iter(turns.values()))),
        "device": device.type,
        "threads": torch.get_num_threads(),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """The modes as a table."""
    table = Table(title=f"texts of rows a second, {summary['data']}")
    for heading in ("mode", "ours", "naive", "batch padded", "ours / naive", "ours / batch padded"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for mode, rates in summary["texts_per_s"].items():
        ratios = (summary[f"{mode}_ratio"], summary[f"{mode}_ratio_batch_padded"])
        table.add_row(mode, *(f"{rates[name]:,.1f}" for name in (OURS, NAIVE, PADDED)), *map(str, ratios))
    Console().print(table)
