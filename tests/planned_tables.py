"""Tables on the meta device, and plans for them."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from dist_rec.embeddings.planner import make_plan
from dist_rec.embeddings.planner.options import topology_of
from dist_rec.embeddings.sharders import sharders
from dist_rec.embeddings.sharding import OPTIMIZERS
from dist_rec.embeddings.tables import TableSpec

PRECISIONS = {"fp32": DataType.FP32, "fp16": DataType.FP16}


def table(name: str, rows: int, dim: int = 16, *, sharding: str = "auto", sequence: bool = False, **more) -> TableSpec:
    return TableSpec(name, rows, dim, (f"f_{name}",), sequence, sharding, **more)


def collections(specs: list[TableSpec], optimizer: str = "sgd") -> nn.Module:
    """The tables unsharded, on the meta device."""
    meta = torch.device("meta")
    tables = nn.ModuleDict()
    for path, kind, one, sequence in (
        ("bags", EmbeddingBagCollection, EmbeddingBagConfig, False),
        ("sequences", EmbeddingCollection, EmbeddingConfig, True),
    ):
        configs = [
            one(
                name=s.name,
                num_embeddings=s.rows,
                embedding_dim=s.dim,
                feature_names=list(s.features),
                data_type=PRECISIONS[s.precision],
            )
            for s in specs
            if s.sequence == sequence
        ]
        if configs:
            tables[path] = kind(tables=configs, device=meta)
    apply_optimizer_in_backward(OPTIMIZERS[optimizer], tables.parameters(), {"lr": 0.1})
    return tables


def planned(specs, cluster, optimizer="sgd", lengths=None, **more):
    lengths = lengths or {}
    return make_plan(collections(specs, optimizer), specs, cluster, batch_size=512, pooling_factors=lengths, **more)


def stock_options(tables, cluster, batch_size, **constraints):
    """TorchRec's own list of options with its estimates."""
    topology = topology_of(cluster)
    wanted = {name: ParameterConstraints(**given) for name, given in constraints.items()}
    return EmbeddingEnumerator(topology, batch_size, wanted).enumerate(tables, sharders())
