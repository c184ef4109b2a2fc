"""What TorchRec may do with our collections on any device: sharding types, kernels, and the sharders."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.types import ModuleSharder, QuantizedCommCodecs

from ..errors import UserError
from . import unique  # noqa: F401  registers what deduplication needs
from .managed import managed_sharders
from .tables import DATA_PARALLEL, SEQUENCE_SHARDING_TYPES, TableSpec

# These cut a table over the ranks of a host.
WITHIN_HOSTS = ("table_row_wise", "table_column_wise", "grid_shard")
SHARDING_TYPES = (*SEQUENCE_SHARDING_TYPES, *WITHIN_HOSTS, DATA_PARALLEL)
COMPUTE_KERNEL = EmbeddingComputeKernel.FUSED.value
# Of a data-parallel table: its backward gives a gradient instead of a step.
REPLICATED_KERNEL = EmbeddingComputeKernel.DENSE.value
HOST_KERNELS = (EmbeddingComputeKernel.FUSED_UVM.value, EmbeddingComputeKernel.FUSED_UVM_CACHING.value)
# Of the width of a column shard: fbgemm's kernels take nothing else.
COLUMN_STEP = 4


def kernels_of(sharding_type: str, device_type: str) -> tuple[str, ...]:
    """Compute kernels that a table of this sharding type may have on `cpu` or `cuda`."""
    if sharding_type == DATA_PARALLEL:
        return (REPLICATED_KERNEL,)
    return (COMPUTE_KERNEL, *HOST_KERNELS) if device_type == "cuda" else (COMPUTE_KERNEL,)


def check_kernels(specs: list[TableSpec], device_type: str) -> None:
    """Refuse kernels that this kind of device does not have.

    Raises:
        UserError: names every such table.
    """
    wrong = [f"{s.name}: {s.kernel}" for s in specs if device_type != "cuda" and s.kernel in HOST_KERNELS]
    if wrong:
        raise UserError(
            f"tables.kernel: weights in the host's memory beside a device are for CUDA, and this run is on "
            f"{device_type}, whose memory is the host's: set {COMPUTE_KERNEL} for {', '.join(wrong)}"
        )


class _BagSharder(EmbeddingBagCollectionSharder):
    """Offers every cut of rows on CPU, which train there though TorchRec's sharder keeps them for CUDA."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SHARDING_TYPES)


class _SequenceSharder(EmbeddingCollectionSharder):
    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SEQUENCE_SHARDING_TYPES)


def sharders(wire: str = "fp32", deduplicate: bool = False) -> list[ModuleSharder[nn.Module]]:
    """The sharders that plan and shard our collections.

    Args:
        wire, deduplicate: as in `TablesConfig`.
    """
    codecs = wire_codecs(wire)
    bags = _BagSharder(qcomm_codecs_registry=codecs)
    return [
        bags,
        _SequenceSharder(qcomm_codecs_registry=codecs, use_index_dedup=deduplicate),
        *managed_sharders(bags, _SequenceSharder(qcomm_codecs_registry=codecs, use_index_dedup=False)),
    ]


def wire_codecs(wire: str) -> dict[str, QuantizedCommCodecs] | None:
    """What every exchange of vectors does to them on the way; None sends them as they are.

    Gradients go in bf16 even where vectors go in fp16: those of a mean over a batch are often below what fp16 can
    tell from zero.
    """
    if wire == "fp32":
        return None
    config = QCommsConfig(forward_precision=CommType(wire), backward_precision=CommType.BF16)
    # For a CPU, TorchRec would take fp16 instead of bf16, of which it believes that gloo cannot send it.
    return get_qcomm_codecs_registry(config, device=torch.device("cuda"))
