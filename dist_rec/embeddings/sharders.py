"""What TorchRec may do with our collections on any device: sharding types, kernels, and the sharders."""

from __future__ import annotations

from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import ModuleSharder

from .tables import SEQUENCE_SHARDING_TYPES

# These cut a table over the ranks of a host.
WITHIN_HOSTS = ("table_row_wise", "table_column_wise", "grid_shard")
SHARDING_TYPES = (*SEQUENCE_SHARDING_TYPES, *WITHIN_HOSTS)
COMPUTE_KERNEL = EmbeddingComputeKernel.FUSED.value
# Of the width of a column shard: fbgemm's kernels take nothing else.
COLUMN_STEP = 4


class _BagSharder(EmbeddingBagCollectionSharder):
    """Offers every cut of rows on CPU, which train there though TorchRec's sharder keeps them for CUDA.

    Data-parallel is left out of both: no optimizer would own such a table.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SHARDING_TYPES)


class _SequenceSharder(EmbeddingCollectionSharder):
    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SEQUENCE_SHARDING_TYPES)


def sharders() -> list[ModuleSharder[nn.Module]]:
    """The sharders that plan and shard our collections."""
    return [_BagSharder(), _SequenceSharder()]
