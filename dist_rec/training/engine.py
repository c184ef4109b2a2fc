"""The dense part under DeepSpeed: a generated config without hidden defaults, and its engine."""

from __future__ import annotations

import logging
import os
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import nn

from ..config import DenseConfig, TextConfig

LANGUAGE_MODEL = "text_encoder."


def engine_config(dense: DenseConfig, batch_rows: int, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config of a run, every key that matters written out.

    Args:
        batch_rows: rows of one rank's batch; DeepSpeed only counts with it.
    """
    if dense.optimizer == "adamw":
        optimizer = {
            "type": "AdamW",
            "params": {
                "lr": dense.learning_rate,
                "betas": list(dense.betas),
                "eps": dense.eps,
                "weight_decay": dense.weight_decay,
                "torch_adam": True,
            },
        }
    else:
        optimizer = {
            "type": "SGD",
            "params": {"lr": dense.learning_rate, "weight_decay": dense.weight_decay},
        }
    return {
        "train_batch_size": batch_rows * world_size,
        "train_micro_batch_size_per_gpu": batch_rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": dense.gradient_clipping,
        "optimizer": optimizer,
        "bf16": {"enabled": dense.precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": dense.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_scatter": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def parameter_groups(model: nn.Module, dense: DenseConfig, text: TextConfig) -> list[dict[str, Any]]:
    """Optimizer groups: language model or not, decayed or not (biases, norms and gains are not)."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and not name.endswith("bias")
            groups.setdefault((name.startswith(LANGUAGE_MODEL), decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": text.learning_rate if is_language_model else dense.learning_rate,
            "weight_decay": dense.weight_decay if decayed else 0.0,
        }
        for (is_language_model, decayed), parameters in sorted(groups.items())
    ]


def make_engine(
    model: nn.Module, dense: DenseConfig, text: TextConfig, batch_rows: int, world_size: int, device: torch.device
):
    """A `deepspeed.DeepSpeedEngine` around `model`. Needs the process group."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with redirect_stdout(StringIO()):  # DeepSpeed prints which op it built
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
        engine, _, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, dense, text),
            config=engine_config(dense, batch_rows, world_size),
        )
    return engine
