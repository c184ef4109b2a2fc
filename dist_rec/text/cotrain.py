"""The language model inside the DeepSpeed engine: trained whole (`full`) or by low-rank adapters of it (`lora`).

The distinct texts of a rank's batch go through the model by length, so that hardly any padding is computed, and every
text once: the rows that use it send their gradients to its one vector, whose backward is that of every row encoding it
by itself. What lies below the lowest trained layer is computed without a graph and has no backward.

In training mode the model is what its config.json says, its own dropout included, as everywhere it is finetuned; a
text has one dropout mask a step, however many rows use it. In evaluation there is none.

Knows no process groups: what ranks must agree on goes through the reduction it is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import LoraConfig, TextConfig
from ..errors import UserError
from .batching import DEFAULT_BATCH_TOKENS, length_batches
from .encoder import TextEncoder, empty_text_encoder, load_text_encoder


class Ranks(Protocol):
    """What this file needs of `layers.reduction.Reduction`."""

    def largest(self, number: int, device: torch.device) -> int: ...


class CotrainedEncoder(TextEncoder):
    """A `TextEncoder` that takes its texts in batches by length, equally many on every rank.

    Args:
        encoder: to train; its model is taken over.
        batch_tokens: tokens, padding included, that go through the model at once; 0 takes what suits the device. A
            longer text goes alone.
        ranks: for agreeing on the number of batches: ZeRO 3 gathers parameters in every call of a module, so all
            ranks must call it equally often. The others need no agreement, but wait for the slowest rank in any case.
    """

    def __init__(self, encoder: TextEncoder, batch_tokens: int, ranks: Ranks) -> None:
        super().__init__(encoder.model, encoder.pooling)
        self.batch_tokens, self.ranks = batch_tokens, ranks

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Encode T texts, none included. Collective.

        Args:
            tokens: int64 `[T, L]` token ids, right-padded with any valid id.
            mask: bool `[T, L]`, True on real tokens.

        Returns:
            float32 `[T, D]`, in the order of the input.
        """
        device = tokens.device
        budget = self.batch_tokens or DEFAULT_BATCH_TOKENS[device.type]
        lengths = mask.sum(1).cpu().numpy()
        most = self.ranks.largest(len(length_batches(lengths, budget)), device)
        vectors, place, done = [], np.zeros(len(lengths), np.int64), 0
        for rows in length_batches(lengths, budget, at_least=max(most, 1)):
            vectors.append(self._batch(tokens, mask, lengths, rows))
            place[rows] = done + np.arange(len(rows))
            done += len(vectors[-1])
        return torch.cat(vectors).index_select(0, torch.from_numpy(place).to(device))

    def _batch(self, tokens: Tensor, mask: Tensor, lengths: np.ndarray, rows: np.ndarray) -> Tensor:
        """Vectors of some texts; of a text that nobody uses, so with a gradient of zero, where there are none."""
        if not len(rows):
            return super().forward(tokens.new_zeros(1, 1), mask.new_ones(1, 1))
        index = torch.from_numpy(rows).to(tokens.device)
        width = max(int(lengths[rows].max()), 1)
        return super().forward(tokens[:, :width].index_select(0, index), mask[:, :width].index_select(0, index))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        """Move as every module does, but keep the precision of buffers that are no part of the state.

        They are what positions are computed from (the frequencies of rotary embeddings), and their bf16 would turn
        far tokens by a tenth of a radian.
        """
        kept = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        saved = self.state_dict(keep_vars=True).keys()
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if name not in saved:
                owner, _, attribute = name.rpartition(".")
                module = self.get_submodule(owner)
                setattr(module, attribute, buffer.to(getattr(module, attribute).device))
        return self


def cotrained_encoder(config: TextConfig, ranks: Ranks, empty: bool = False) -> CotrainedEncoder:
    """The language model of `config` (mode full or lora), ready for the engine.

    Adapters are drawn from torch's generator: seed it alike on all ranks.

    Args:
        ranks: the reduction of the model that uses it.
        empty: without memory (on the meta device), to count what it costs.

    Raises:
        UserError: no such model; more layers to freeze than it has; targets of adapters that it lacks.
    """
    if empty:
        encoder = empty_text_encoder(config.model, config.pooling)
    else:
        encoder = load_text_encoder(config.model, pooling=config.pooling)
    blocks = transformer_blocks(encoder.model)
    if not blocks and (config.mode == "lora" or config.freeze_layers or config.checkpointing):
        raise UserError(
            f"language model {config.model} uses one layer again and again: it can be trained by text.mode: full "
            "alone, without text.freeze_layers and text.checkpointing."
        )
    if config.freeze_layers >= max(len(blocks), 1):
        raise UserError(
            f"text.freeze_layers is {config.freeze_layers}, but language model {config.model} has {len(blocks)} "
            "layers: freeze fewer, for one at least must train, or take text.mode: frozen."
        )
    if config.mode == "lora":
        encoder.requires_grad_(False)
        _add_adapters(encoder.model, blocks, config, empty)
    elif config.freeze_layers:
        _freeze(encoder.model, blocks, config.freeze_layers)
    if config.checkpointing:
        # Those below have nothing to compute again.
        for block in list(blocks.values())[config.freeze_layers :]:
            _recompute(block)
    return CotrainedEncoder(encoder, config.batch_tokens, ranks)


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a transformers model by name, bottom first; empty where it shares one among all."""
    wanted = getattr(model.config, "num_hidden_layers", 0)
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == wanted}
    if not lists:
        return {}
    size = {name: sum(p.numel() for p in module.parameters()) for name, module in lists.items()}
    name = max(size, key=size.get)
    return {f"{name}.{i}": block for i, block in enumerate(lists[name])}


def _freeze(model: nn.Module, blocks: dict[str, nn.Module], layers: int) -> None:
    """Freeze the bottom layers and what lies below them or feeds all of them: embeddings of tokens and positions."""
    names = list(blocks)
    for block in names[:layers]:
        blocks[block].requires_grad_(False)
    above = False
    for name, module in model.named_modules():
        above = above or name == names[0]
        inside = any(name == block or name.startswith(f"{block}.") for block in names)
        if not inside and (not above or isinstance(module, nn.Embedding)):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _add_adapters(model: nn.Module, blocks: dict[str, nn.Module], config: TextConfig, empty: bool) -> None:
    """Give the linear layers that `config` asks for an adapter each.

    Raises:
        UserError: there are none, or a target names none.
    """
    lora: LoraConfig = config.lora
    linear = [f"{block}.{n}" for block in blocks for n, m in blocks[block].named_modules() if _is_linear(m)]

    def ends(name: str, target: str) -> bool:
        return name == target or name.endswith(f".{target}")

    unknown = [target for target in lora.targets if not any(ends(name, target) for name in linear)]
    if unknown:
        block = next(iter(blocks))
        there = sorted({name.removeprefix(f"{block}.") for name in linear if name.startswith(f"{block}.")})
        raise UserError(
            f"text.lora.targets {', '.join(unknown)}: no linear layer of language model {config.model} has a name that "
            f"ends so. Its layers have {', '.join(there)}."
        )
    trained = [
        name for name in linear if not any(name.startswith(f"{b}.") for b in list(blocks)[: config.freeze_layers])
    ]
    wanted = [name for name in trained if not lora.targets or any(ends(name, target) for target in lora.targets)]
    if not wanted:
        raise UserError(
            f"text.lora.targets name only layers below text.freeze_layers {config.freeze_layers} of language model "
            f"{config.model}: freeze fewer, or name others."
        )
    from peft import LoraConfig as Adapters
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        # Of GPT-2's transposed weights, which peft sees by itself.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        inject_adapter_in_model(
            Adapters(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=wanted),
            model,
            low_cpu_mem_usage=empty,
        )


class _First(torch.autograd.Function):
    """The identity, whose backward needs what the checkpoint around it has to compute again."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return gradient


def _recompute(block: nn.Module) -> None:
    """Keep of a layer's forward its input alone.

    transformers' own switch is not for every architecture (MPNet), and makes the embeddings' output require a
    gradient, which would run backward through frozen layers.

    ZeRO 3 drops a parameter when its module's forward is through, the second one too, and gathers it when the
    module's backward begins. So the second forward has to be over before backward enters the last module, and to be
    done to its end.
    """
    forward = block.forward

    def to_the_end(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        if isinstance(output, Tensor):
            return _First.apply(output)
        return (_First.apply(output[0]), *output[1:])

    @wraps(forward)
    def recomputing(*arguments: Any, **named: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*arguments, **named)
        return checkpoint(to_the_end, *arguments, use_reentrant=False, early_stop=False, **named)

    block.forward = recomputing
