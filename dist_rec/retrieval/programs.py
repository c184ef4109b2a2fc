"""The parts of a scoring bundle as graphs of plain tensors: the quantised tables, and what a model makes of vectors.

TorchRec's inference modules end in operators of fbgemm, and its jagged tensors are taken apart before a graph begins
and ends: what `torch.export` saves of them is read where TorchRec is not. The tables are a graph of their own, because
every other graph would hold them once more.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchrec.inference.modules import quantize_embeddings
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ..config import TablesConfig
from ..data.batch import Batch
from ..embeddings.tables import EmbeddingTables, TableSpec
from ..models.towers import Side
from ..schema import Schema
from ..text.encoder import TextEncoder

Precision = Literal["int8", "fp16", "fp32"]
DTYPES: dict[Precision, torch.dtype] = {"int8": torch.qint8, "fp16": torch.float16, "fp32": torch.float32}
EMBEDDINGS = "embeddings:"
# Sizes that a graph is traced with: none of them 0 or 1, which would be fixed, and no two the same.
ROWS, ENTRIES = 5, 11


@dataclass
class _Given(Batch):
    """A batch whose ids were looked up elsewhere."""

    lengths: dict[str, Tensor] = field(default_factory=dict)

    def id_lengths(self) -> dict[str, Tensor]:
        return self.lengths


def _part(inputs: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in inputs.items() if name.startswith(prefix)}


def _batch(inputs: Mapping[str, Tensor], schema: Schema, ids: KeyedJaggedTensor | None = None) -> Batch:
    """A batch of these inputs, whose labels nobody knows."""
    domain = inputs["domain"]
    rows, device = domain.shape[0], domain.device
    nothing = torch.zeros(0, 0, device=device)
    return _Given(
        ids=ids,
        event_places={},
        dense=_part(inputs, "dense:"),
        text_index=_part(inputs, "texts:"),
        text_lengths=_part(inputs, "text_lengths:"),
        text_tokens=nothing.long(),
        text_mask=nothing.bool(),
        text_vectors=inputs.get("text_vectors", nothing),
        labels={name: torch.zeros(rows, device=device) for name in schema.labels},
        label_valid={name: torch.zeros(rows, dtype=torch.bool, device=device) for name in schema.labels},
        domain=domain,
        valid=torch.ones(rows, dtype=torch.bool, device=device),
        row=torch.zeros_like(domain),
        user=torch.zeros_like(domain),
        query=torch.zeros_like(domain),
        lengths=_part(inputs, "lengths:"),
    )


class TablesProgram(nn.Module):
    """Ids of every feature -> the vectors that a model reads: `EmbeddingTables` of tables that are whole and quantised.

    Args:
        specs: of the tables, none divided or managed.
        weights: float32 `[rows, dim]` by table.
        schema: with their features.
        config: `tables`, for its pooling.
        precision: of the weights.
    """

    def __init__(
        self,
        specs: list[TableSpec],
        weights: Mapping[str, Tensor],
        schema: Schema,
        config: TablesConfig,
        precision: Precision,
    ) -> None:
        super().__init__()
        self.schema = schema
        self.names = [name for spec in specs for name in spec.features]
        tables = EmbeddingTables(specs, schema, config, torch.device("cpu"))
        places = {name.split(".")[-2]: parameter for name, parameter in tables.named_parameters()}
        with torch.no_grad():
            for name, parameter in places.items():
                parameter.copy_(weights[name])
        self.tables = quantize_embeddings(
            tables.eval(),
            dtype=DTYPES[precision],
            inplace=True,
            # Else it leaves those that are not pooled as they are.
            additional_qconfig_spec_keys=[EmbeddingCollection],
            additional_mapping={EmbeddingCollection: QuantEmbeddingCollection},
        )
        for module in self.tables.modules():
            # What the operators read is held apart from these, which a program would have besides.
            if type(module) is nn.Module and "weight" in module._buffers:
                del module.weight

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """`ids:F` `[n]` and `lengths:F` `[B]` -> `embeddings:F`, `[B, dim]` or, of a history, `[n, dim]`."""
        lengths = torch.cat([inputs[f"lengths:{name}"] for name in self.names])
        values = torch.cat([inputs[f"ids:{name}"] for name in self.names])
        batch = _batch(inputs, self.schema, KeyedJaggedTensor(self.names, values, lengths=lengths))
        found = self.tables.vectors(self.tables(batch), batch)
        return {EMBEDDINGS + name: vectors for name, vectors in found.items()}


class ModelProgram(nn.Module):
    """Vectors of the tables and the rest of a row -> the model's logits, or one side's vectors, by task."""

    def __init__(self, model: nn.Module, schema: Schema, side: Side | None) -> None:
        super().__init__()
        self.model, self.schema, self.side = model, schema, side

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = self.model(_part(inputs, EMBEDDINGS), _batch(inputs, self.schema), side=self.side)
        return found["logits" if self.side is None else "vectors"]


class EncoderProgram(nn.Module):
    """Token ids `[T, L]` and their mask -> `vectors`, `[T, D]`."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"vectors": self.encoder(inputs["tokens"], inputs["mask"])}


def inputs_of(
    schema: Schema, features: Collection[str], dims: Mapping[str, int], text_width: int
) -> tuple[dict[str, Tensor], dict[str, bool]]:
    """Inputs to trace a model's program with, and of each whether its first size is the number of rows.

    Args:
        features: that it reads.
        dims: width of each table.
        text_width: D, 0 where it reads no texts.
    """
    found, by_row = {"domain": torch.zeros(ROWS, dtype=torch.int64)}, {"domain": True}

    def add(name: str, rows: int | None, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        found[name] = torch.zeros(rows or ENTRIES + len(found), *shape, dtype=dtype)
        by_row[name] = rows is not None

    for name in features:
        feature = schema.features[name]
        if feature.kind in ("id", "ids"):
            rows = None if feature.role == "history" else ROWS
            add(EMBEDDINGS + name, rows, dims[schema.table_of(name)])
            add(f"lengths:{name}", ROWS, dtype=torch.int64)
        elif feature.kind == "dense":
            add(f"dense:{name}", ROWS, feature.width)
        else:
            add(f"texts:{name}", None, dtype=torch.int64)
            add(f"text_lengths:{name}", ROWS, dtype=torch.int64)
    if text_width:
        add("text_vectors", None, text_width)
    return found, by_row


def table_inputs(names: Collection[str]) -> tuple[dict[str, Tensor], dict[str, bool]]:
    """As `inputs_of`, of a `TablesProgram`."""
    found, by_row = {"domain": torch.zeros(ROWS, dtype=torch.int64)}, {"domain": True}
    for name in names:
        found[f"lengths:{name}"], by_row[f"lengths:{name}"] = torch.zeros(ROWS, dtype=torch.int64), True
        found[f"ids:{name}"], by_row[f"ids:{name}"] = torch.zeros(ENTRIES + len(found), dtype=torch.int64), False
    return found, by_row


@torch.no_grad()
def save_program(program: nn.Module, inputs: dict[str, Tensor], by_row: Mapping[str, bool], path: Path) -> None:
    """Trace a program and write it; its numbers of rows, ids, events and texts may be any from 2 on."""
    rows = torch.export.Dim("rows", min=2)
    _save(
        program,
        inputs,
        {
            name: {0: rows if by_row[name] else torch.export.Dim(f"entries_{number}", min=2)}
            for number, name in enumerate(inputs)
        },
        path,
    )


@torch.no_grad()
def save_encoder(encoder: TextEncoder, max_tokens: int, path: Path) -> None:
    """Trace a language model and write it; for 2 texts and 2 tokens or more."""
    tokens = torch.zeros(ROWS, 3, dtype=torch.int64)
    inputs = {"tokens": tokens, "mask": tokens == 0}
    shape = {0: torch.export.Dim("texts", min=2), 1: torch.export.Dim("tokens", min=2, max=max(max_tokens, 3))}
    _save(EncoderProgram(encoder), inputs, dict.fromkeys(inputs, shape), path)


def _save(program: nn.Module, inputs: dict[str, Tensor], sizes: dict[str, Any], path: Path) -> None:
    with warnings.catch_warnings():
        # Of weights that share one memory, which all lie on the CPU.
        warnings.filterwarnings("ignore", "No complete tensor found in the group")
        exported = torch.export.export(program.eval(), (inputs,), dynamic_shapes=(sizes,))
        for node in exported.graph.nodes:
            # Lines of code, with the folders of this machine.
            node.meta.pop("stack_trace", None)
        torch.export.save(exported, path)
