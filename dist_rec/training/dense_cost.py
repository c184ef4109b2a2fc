"""What the language model and the dense towers take under each ZeRO stage, and how long they compute and talk.

Counted on a model without memory (the meta device): parameters exactly, matrix products by their shapes and by how
often a row uses them. Knows no tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import DenseConfig
from ..data.candidates import CANDIDATES, CANDIDATES_TEXT
from ..embeddings.clusters import Cluster
from ..embeddings.planner import Reserved
from ..layers.reduction import Reduction
from .engine import LANGUAGE_MODEL, engine_config
from .kinds import kind_of
from .workload import Workload

STAGES = (0, 1, 2, 3)
BYTES = {"fp32": 4, "bf16": 2}
# Backward computes gradients of inputs and of weights, each as dear as forward.
PASSES = 3
# Kernels of a forward and backward pass, a parameter tensor (counted: 743 and 613 for 51 in the models of
# configs/foundation.yaml and configs/demo.yaml), and the host's time to launch one on CUDA, beside computing.
KERNELS_OF_A_PARAMETER = 14
LAUNCH_SECONDS = {"cuda": 5e-6, "cpu": 0.0}
# Numbers that AdamW keeps of a parameter; SGD without momentum keeps none.
STATES = {"adamw": 2, "sgd": 0}
# Bytes that an optimizer step reads and writes of a parameter with its gradient, and of each state, in fp32.
STEP_TRAFFIC, STATE_TRAFFIC = 12, 8
# Bytes that one layer of a transformer keeps of a token for backward, a unit of width, at 2 bytes a number and with
# fused attention (Korthikanti et al. 2022, arXiv:2205.05198, without the attention matrices).
KEPT_OF_A_TOKEN = 34
# Rough: what a layer of the towers keeps besides its input and output (norms, activations, masks).
KEPT_FACTOR = 2


@dataclass(frozen=True)
class Part:
    """The language model, or everything else that is dense.

    * `tensors`: parameters; `parameters`, `trained`: numbers in them.
    * `flops`: of one row, forward and backward.
    * `kept`: numbers that one row keeps for backward.
    """

    tensors: int
    parameters: int
    trained: int
    flops: float
    kept: float


@dataclass(frozen=True)
class Dense:
    """Both parts with the config they train under."""

    towers: Part
    language_model: Part | None
    precision: str
    optimizer: str
    stage: int

    @property
    def parts(self) -> list[Part]:
        return [self.towers] + ([self.language_model] if self.language_model else [])

    @property
    def trained(self) -> int:
        return sum(part.trained for part in self.parts)

    @property
    def stages(self) -> tuple[int, ...]:
        """ZeRO stages that the config takes beside this precision."""
        return STAGES if self.precision == "fp32" else STAGES[1:]

    def state_bytes(self, part: Part, stage: int, ranks: int) -> int:
        """Parameters, gradients and optimizer state of a part on one rank, as DeepSpeed lays them out.

        ZeRO keeps an fp32 copy of the parameters that it steps, in fp32 too; stage 0 steps the parameters themselves.
        """
        own, size = part.trained, BYTES[self.precision]
        frozen = (part.parameters - own) * size
        cut = -(-own // ranks)
        whole_parameters, whole_gradients = own if stage < 3 else cut, own if stage < 2 else cut
        states = STATES[self.optimizer] * 4 * (cut if stage else own)
        copy = 4 * cut if stage else 0
        return frozen // (ranks if stage == 3 else 1) + (whole_parameters + whole_gradients) * size + states + copy

    def buffer_bytes(self, stage: int) -> int:
        """What gradients pass through on their way to other ranks."""
        bucket = engine_config(DenseConfig(), 1, 1)["zero_optimization"]["reduce_bucket_size"]
        return min(self.trained, bucket) * BYTES[self.precision] if stage else 0

    def activation_bytes(self, rows: int) -> int:
        return int(sum(part.kept for part in self.parts) * rows * BYTES[self.precision])

    def rank_bytes(self, stage: int, ranks: int, rows: int) -> int:
        """All that one rank needs beside its tables."""
        states = sum(self.state_bytes(part, stage, ranks) for part in self.parts)
        return states + self.buffer_bytes(stage) + self.activation_bytes(rows)

    def reserved(self, cluster: Cluster, rows: int) -> Reserved:
        """For the planner: what is left to tables is without this."""
        needed = self.rank_bytes(self.stage, cluster.ranks, rows)
        return Reserved(device=needed) if cluster.device == "cuda" else Reserved(host=needed)

    def compute_ms(self, cluster: Cluster, rows: int) -> float:
        """Forward and backward: products, or launching what is too small to fill a GPU."""
        flops = rows * sum(part.flops for part in self.parts)
        launches = KERNELS_OF_A_PARAMETER * sum(part.tensors for part in self.parts)
        return 1e3 * max(flops / cluster.flops[self.precision], launches * LAUNCH_SECONDS[cluster.device])

    def comms_ms(self, cluster: Cluster, stage: int) -> float:
        """Ring all-reduce of the gradients, or what each stage has in its place: stage 3 gathers parameters twice."""
        ranks, size = cluster.ranks, self.trained * BYTES[self.precision]
        if ranks == 1:
            return 0.0
        slowest = cluster.intra_host_bandwidth
        if cluster.hosts > 1:
            # Each rank of a host has its own ring through its own card.
            slowest = min(slowest, cluster.inter_host_bandwidth * cluster.ranks_per_host)
        rounds = 3 if stage == 3 else 2
        return 1e3 * rounds * size * (ranks - 1) / ranks / slowest

    def optimizer_ms(self, cluster: Cluster, stage: int) -> float:
        own = -(-self.trained // cluster.ranks) if stage else self.trained
        bandwidth = cluster.device_bandwidth or cluster.host_bandwidth / cluster.ranks_per_host
        return 1e3 * own * (STEP_TRAFFIC + STATE_TRAFFIC * STATES[self.optimizer]) / bandwidth

    def describe(self, cluster: Cluster, rows: int) -> dict[str, Any]:
        """Parameters, and bytes of one rank under each stage, ready for JSON."""
        stages = {}
        for stage in self.stages:
            states = {"towers": self.state_bytes(self.towers, stage, cluster.ranks)}
            if self.language_model:
                states["language_model"] = self.state_bytes(self.language_model, stage, cluster.ranks)
            stages[str(stage)] = {
                **states,
                "buffers": self.buffer_bytes(stage),
                "activations": self.activation_bytes(rows),
                "total": self.rank_bytes(stage, cluster.ranks, rows),
                "comms_ms": self.comms_ms(cluster, stage),
            }
        return {
            "parameters": {
                "towers": self.towers.parameters,
                "language_model": self.language_model.parameters if self.language_model else 0,
            },
            "stage": self.stage,
            "precision": self.precision,
            "bytes_by_stage": stages,
        }


def count_dense(workload: Workload) -> Dense:
    """Build the model without memory and count.

    Raises:
        UserError: the model or its language model cannot be.
    """
    config = workload.config
    encoder, width = None, workload.text_width
    if config.text.trains:
        from ..text.cotrain import cotrained_encoder

        encoder = cotrained_encoder(config.text, Reduction(), empty=True)
        width = encoder.width
    with torch.device("meta"):
        model = kind_of(config).model(
            workload.schema,
            config,
            {spec.name: spec.dim for spec in workload.specs},
            width,
            encoder,
            workload.features,
            Reduction(),
        )
    towers = _towers(model, workload)
    language_model = _tokens_of(model.text_encoder, workload) if model.text_encoder is not None else None
    return Dense(towers, language_model, config.dense.precision, config.dense.optimizer, config.dense.zero_stage)


def texts_of_a_row(workload: Workload) -> float:
    """Texts of one row, every one counted as different from those of other rows."""
    most, found = kind_of(workload.config).most_events(workload.config), 0.0
    for name in workload.features:
        if workload.schema.features[name].kind == "texts":
            length = workload.lengths.get(name, 0.0)
            found += length if name == CANDIDATES_TEXT else min(length, most)
    return sum(workload.texts.values()) + found


def _events(workload: Workload) -> float:
    """Events of a row's history."""
    lengths = [
        workload.lengths.get(name, 0.0)
        for name in workload.features
        if workload.schema.features[name].role == "history"
        and workload.schema.features[name].kind == "ids"
        and name != CANDIDATES
    ]
    return min(max(lengths, default=0.0), kind_of(workload.config).most_events(workload.config))


def _towers(model: nn.Module, workload: Workload) -> Part:
    """A row uses a matrix once; in histories once an event, of texts once a text; of stacks its own domain's part."""
    events, texts, kind = _events(workload), texts_of_a_row(workload), kind_of(workload.config)
    flops = kept = 0.0
    tensors = parameters = trained = 0
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if name.startswith(LANGUAGE_MODEL):
            continue
        tensors += 1
        parameters += parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
        uses = {"event": events, "text": texts, "row": 1.0}[kind.used_by(name)]
        if isinstance(modules[name.rpartition(".")[0]], nn.Linear) and parameter.ndim == 2:
            product, numbers = parameter.numel(), sum(parameter.shape)
        elif parameter.ndim >= 4 or parameter.ndim == 3 and kind.used_by(name) == "text":
            # [domains, stack, in, out], or [stack, in, out]
            product = parameter[0].numel() if parameter.ndim > 3 else parameter.numel()
            numbers = product // parameter.shape[-2] + parameter.shape[-2]
        else:
            continue
        flops += 2 * product * uses
        kept += KEPT_FACTOR * numbers * uses
    # Every event attends to every event of its row, twice: scores and mixture.
    flops += kind.attention_layers(workload.config, model) * 4 * events * events * workload.config.model.width
    return Part(tensors, parameters, trained, PASSES * flops, kept)


def _tokens_of(encoder: nn.Module, workload: Workload) -> Part:
    """The language model: every text of the batch is read once, and every one is taken to be different.

    Backward goes down to the lowest layer that trains, and takes the gradients of weights only where they train.
    """
    from ..text.cotrain import transformer_blocks

    text, hidden = workload.config.text, encoder.width
    layers = getattr(encoder.model.config, "num_hidden_layers", 1)
    above = layers - text.freeze_layers
    tokens = workload.tokens * texts_of_a_row(workload)
    lookups = {id(m.weight) for m in encoder.modules() if isinstance(m, nn.Embedding)}
    below = list(transformer_blocks(encoder.model).values())[: text.freeze_layers]
    passed = {id(p) for block in below for p in block.parameters()}
    products = 0
    for parameter in encoder.parameters():
        if parameter.ndim >= 2 and id(parameter) not in lookups:
            # Forward, the gradient of what comes in, and its own.
            passes = 1 if id(parameter) in passed else 2 + parameter.requires_grad + text.checkpointing
            products += passes * parameter.numel()
    attention = 4 * workload.tokens * hidden * (text.freeze_layers + (PASSES + text.checkpointing) * above)
    kept = KEPT_OF_A_TOKEN / 2 * above
    if text.checkpointing:
        # What goes into every layer, and all of the one that is computed again.
        kept = above + KEPT_OF_A_TOKEN / 2
    return Part(
        tensors=len(list(encoder.parameters())),
        parameters=sum(p.numel() for p in encoder.parameters()),
        trained=sum(p.numel() for p in encoder.parameters() if p.requires_grad),
        flops=tokens * (2 * products + attention),
        kept=tokens * hidden * kept,
    )
