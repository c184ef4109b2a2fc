"""The frozen text vectors of batches: those of the store, and of texts that it lacks the model's, or a refusal.

A vector that is made here is what `embed` would have written, but for the last bit, which depends on the
texts beside it. Called in the background, by every stream of a process.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
import torch

from ..data.index import TokenizerInfo
from ..data.rows import Ragged
from ..errors import UserError
from .batching import DEFAULT_BATCH_TOKENS, length_batches, pad
from .encoder import COMPUTE, TextEncoder, load_text_encoder
from .paths import model_fingerprint, resolve_model_folder
from .store import Recipe, VectorStore, check_finite, embed_command
from .texts import text_of

# float32 vectors that are kept, the least recently used dropped: 170,000 of width 384.
CACHE_BYTES = 256 << 20


class FrozenVectors:
    """What `make_batch` asks for the vectors of a batch's texts.

    Args:
        store: of the vectors.
        data: the data set's root, for messages.
        missing: makes the vectors that the store lacks; None refuses such texts.
    """

    def __init__(self, store: VectorStore, data: str, missing: OnTheFly | None = None):
        self.store, self.data, self.missing = store, data, missing

    def __call__(self, keys: np.ndarray, tokens: Ragged | None) -> np.ndarray:
        """Vectors of texts.

        Args:
            keys: int64 `[T]` text keys.
            tokens: their token ids; needed where `missing` is.

        Returns:
            float32 `[T, D]`.

        Raises:
            UserError: the store lacks some of the texts, and no model makes them.
        """
        _, found = self.store.find(keys)
        if found.all():
            return self.store.lookup(keys)
        lacking = np.flatnonzero(~found)
        if self.missing is None:
            raise self._refusal(keys, lacking)
        vectors = np.empty((len(keys), self.store.width), np.float32)
        vectors[found] = self.store.lookup(keys[found])
        vectors[lacking] = self.missing(keys[lacking], tokens.take(lacking))
        return vectors

    def _refusal(self, keys: np.ndarray, lacking: np.ndarray) -> UserError:
        info, first = self.store.info, int(keys[lacking[0]])
        otherwise = "." if info.recipe.word_drop else ", or set text.missing: encode."
        text = text_of(self.data, first)
        named = f"key {first}" if text is None else f"{text[:80]!r}, key {first}"
        return UserError(
            f"{len(np.unique(keys[lacking]))} of {len(np.unique(keys))} texts of a batch of {self.data} have no vector "
            f"in {self.store.folder} (the first is {named}). Add them with "
            f"`{embed_command(info.model, self.store.folder, self.data, info.recipe)}`{otherwise}"
        )


class SideBySide:
    """Vectors of texts, and of the same texts with words dropped.

    Args:
        whole, dropped: where they are from.
    """

    def __init__(self, whole: FrozenVectors, dropped: FrozenVectors) -> None:
        self.whole, self.dropped = whole, dropped

    @property
    def missing(self) -> OnTheFly | None:
        return self.whole.missing

    def __call__(self, keys: np.ndarray, tokens: Ragged | None) -> np.ndarray:
        """As `FrozenVectors`, float32 `[T, 2D]`."""
        return np.concatenate([self.whole(keys, tokens), self.dropped(keys, tokens)], axis=1)


class OnTheFly:
    """The vectors of texts that a store lacks, by the model that made the others.

    Args:
        recipe: of the store.
        model: see `resolve_model_folder`.
        tokenizer: of the data set's token ids.
        device: where the model runs.
        batch_tokens: tokens, padding included, at once; 0 takes what suits the device.
        data: the data set's root, for messages.

    Raises:
        UserError: the model, or the data set's token ids, are not what the store's vectors were made of.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: str,
        tokenizer: TokenizerInfo | None,
        device: torch.device,
        batch_tokens: int,
        data: str,
    ) -> None:
        if tokenizer is None:
            raise UserError(
                f"text.missing is encode, but {data} was built without token ids: build it with --tokenizer {model}, "
                "or embed its texts and set text.missing: refuse."
            )
        if tokenizer.max_length != recipe.max_tokens:
            raise UserError(
                f"text.missing is encode, but {data} cuts texts at {tokenizer.max_length} tokens and the texts of "
                f"text.store were cut at {recipe.max_tokens}: build it with --max-tokens {recipe.max_tokens}."
            )
        if device.type == "cpu" and recipe.compute == "fp16":
            raise UserError(
                "text.missing is encode, but the vectors of text.store were computed in fp16, which needs CUDA: embed "
                "all texts before, or embed them in fp32 or bf16."
            )
        if model_fingerprint(resolve_model_folder(model)) != recipe.model_fingerprint:
            raise UserError(
                f"text.missing is encode, but {model} is not the language model of text.store: its config.json or "
                "weights are others. Name that one in text.model, or embed the texts anew."
            )
        self.recipe, self.model, self.device = recipe, model, device
        self.batch_tokens = batch_tokens or DEFAULT_BATCH_TOKENS[device.type]
        self.num_encoded = 0
        self._encoder: TextEncoder | None = None
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def load(self) -> OnTheFly:
        """Load the model, once; this object. Training's random numbers stay what they are without it."""
        with self._lock:
            if self._encoder is None:
                with torch.random.fork_rng():
                    encoder = load_text_encoder(self.model, COMPUTE[self.recipe.compute], self.recipe.pooling)
                self._encoder = encoder.to(self.device)
        return self

    def __call__(self, keys: np.ndarray, tokens: Ragged) -> np.ndarray:
        """Vectors of T texts, kept ones or new ones: float32 `[T, D]`, as the store would give them."""
        with self._lock:
            new = np.array([i for i, key in enumerate(keys.tolist()) if key not in self._kept], np.int64)
            made = dict(zip(keys[new].tolist(), self._encode(keys[new], tokens.take(new)), strict=True))
            vectors = np.empty((len(keys), self.recipe.width), np.float32)
            for i, key in enumerate(keys.tolist()):
                vectors[i] = made[key] if key in made else self._kept[key]
                self._kept[key] = vectors[i].copy()
                self._kept.move_to_end(key)
            while len(self._kept) * self.recipe.width * 4 > CACHE_BYTES:
                self._kept.popitem(last=False)
        return vectors

    @torch.inference_mode()
    def _encode(self, keys: np.ndarray, tokens: Ragged) -> np.ndarray:
        vectors = np.empty((len(keys), self.recipe.width), np.float32)
        stored = getattr(torch, self.recipe.dtype)
        for rows in length_batches(tokens.lengths, self.batch_tokens) if len(keys) else []:
            ids, mask = (t.to(self.device, non_blocking=True) for t in pad(tokens.take(rows)))
            vectors[rows] = self._encoder(ids, mask).to(stored).float().cpu().numpy()
        check_finite(keys, vectors, self.recipe)
        self.num_encoded += len(keys)
        return vectors
