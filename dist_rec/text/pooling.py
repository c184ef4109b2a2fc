"""How the vectors of a text's tokens become one, and which way a language model was made for.

Texts are padded on the right: a decoder's token sees only those before it, so what stands behind the
last real one reaches no vector.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Pooling = Literal["mean", "cls", "last"]

MODULES_NAME = "modules.json"
POOLING_NAME = "1_Pooling/config.json"
# The modes of sentence-transformers that are ours, and the switches that older versions write in their place.
_MODES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens, accumulated in float32.

    Args:
        hidden: float `[T, L, D]`; what stands on padding does not matter, NaN included.
        mask: bool `[T, L]`, True on real tokens.

    Returns:
        float32 `[T, D]`; a text without tokens is 0.
    """
    total = hidden.float().masked_fill(~mask.unsqueeze(-1), 0.0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)


def first_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """The vector of the first real token, BERT's [CLS]; arguments and result as of `masked_mean`."""
    return _token(hidden, mask, mask.int().argmax(dim=1))


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """The vector of the last real token; arguments and result as of `masked_mean`."""
    return _token(hidden, mask, mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1))


def _token(hidden: Tensor, mask: Tensor, at: Tensor) -> Tensor:
    vectors = hidden[torch.arange(len(hidden), device=hidden.device), at].float()
    return vectors.masked_fill(~mask.any(dim=1, keepdim=True), 0.0)


POOLINGS: dict[Pooling, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": masked_mean,
    "cls": first_token,
    "last": last_token,
}


def choose_pooling(asked: str, folder: Path, config: PretrainedConfig) -> Pooling:
    """The pooling that `asked` means for a language model.

    `auto` is what the model's folder says as sentence-transformers writes it, or else the last token of a
    decoder and the mean of an encoder. Whatever that library does to a vector afterwards (normalise, project) is
    left to the model that uses it.

    Args:
        asked: auto, mean, cls or last.
        folder: the model's.
        config: of its transformer.

    Raises:
        UserError: another `asked`; what the folder says is damaged or no pooling that we have.
    """
    if asked != "auto":
        if asked not in POOLINGS:
            raise UserError(f"pooling is {asked!r}: it must be auto, {', '.join(POOLINGS)}.")
        return asked
    path = _pooling_file(folder)
    if path is None:
        return "last" if is_causal(config) else "mean"
    said = _read(path)
    if not isinstance(said, dict):
        raise UserError(f"{path} is damaged: it is no list of settings. Copy the model's folder again.")
    modes = said.get("pooling_mode") or [mode for switch, mode in _SWITCHES.items() if said.get(switch)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in _MODES:
        raise UserError(
            f"{path}: this model was made for pooling {' + '.join(map(str, modes))}, which is not among those here: "
            f"name one of {', '.join(POOLINGS)} (`--pooling`, or text.pooling)."
        )
    return _MODES[modes[0]]


def is_causal(config: PretrainedConfig) -> bool:
    """Whether a token sees only those before it.

    transformers keeps no such flag for all models, but has a head for masked words of every bidirectional
    one, and of the others with a head for next words only those that are decoders.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    said = getattr(config, "is_causal", None)
    if said is not None:
        return bool(said)
    if getattr(config, "use_bidirectional_attention", None):
        return False
    if getattr(config, "is_decoder", False):
        return True
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING


def _pooling_file(folder: Path) -> Path | None:
    """Where the folder says how to pool, if it does."""
    path = folder / MODULES_NAME
    if not path.is_file():
        return folder / POOLING_NAME if (folder / POOLING_NAME).is_file() else None
    modules = _read(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise UserError(f"{path} is damaged: it is no list of modules. Copy the model's folder again.")
    named = [str(module.get("path")) for module in modules if str(module.get("type")).rpartition(".")[2] == "Pooling"]
    if not named:
        return None
    found = folder / Path(named[0]).name / "config.json"
    if not found.is_file():
        raise UserError(f"{path} names {found.parent.name}, but {found} is missing. Copy the model's folder again.")
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable: {error}. Copy the model's folder again.") from None
