"""From looked-up embeddings, dense columns and distinct texts to one tensor a use.

Nothing here has parameters. Nulls: the embedding of a null id is zero by the tables' contract; a
null float is NaN and becomes 0 with a mask beside it; a row without a text reads a zero vector.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.batch import Batch


class Columns:
    """The features of one role that are concatenated: pooled embeddings, then dense columns.

    Args:
        ids: width of the embedding of each `id` and `ids` feature, by name.
        dense: width of each `dense` feature, by name.

    Attributes:
        width: C, of the concatenation: embedding widths, and twice the dense widths.
    """

    def __init__(self, ids: Mapping[str, int], dense: Mapping[str, int]) -> None:
        self.ids, self.dense = dict(ids), dict(dense)
        self.width = sum(self.ids.values()) + 2 * sum(self.dense.values())

    def read(self, embeddings: Mapping[str, Tensor], lengths: Mapping[str, Tensor], batch: Batch, dtype: torch.dtype):
        """Concatenate.

        Args:
            embeddings: pooled `[B, dim]` by feature.
            lengths: of `Batch.id_lengths`.
            batch: its `dense` columns, NaN where null.
            dtype: of the result.

        Returns:
            `(x, present)`: `[B, C]`, each dense column followed by its mask (1 where known), and
            bool `[B]`, whether the row has any of these features.
        """
        device, size = batch.domain.device, batch.domain.shape[0]
        parts = [torch.zeros(size, 0, device=device, dtype=dtype)]
        present = torch.zeros(size, device=device, dtype=torch.bool)
        for name in self.ids:
            parts.append(embeddings[name].to(dtype))
            present = present | (lengths[name] > 0)
        for name in self.dense:
            known = ~torch.isnan(batch.dense[name])
            parts += [torch.nan_to_num(batch.dense[name], nan=0.0).to(dtype), known.to(dtype)]
            present = present | known.any(1)
        return torch.cat(parts, 1), present


def row_texts(texts: Tensor, index: Tensor, length: Tensor) -> Tensor:
    """The text of each row, zeros where it has none.

    Args:
        texts: `[T, H]`, one a distinct text; T may be 0.
        index: int64 `[n]`, positions among the T texts of the rows that have one, in row order.
        length: int64 `[B]`, 0 or 1, adding up to n.

    Returns:
        `[B, H]`.
    """
    missing = length.new_full(length.shape, texts.shape[0])
    return event_texts(texts, missing.masked_scatter(length > 0, index))


def event_texts(texts: Tensor, index: Tensor) -> Tensor:
    """`texts[index]` with position T meaning no text.

    Unlike `index_select`, an embedding's backward is repeatable on CUDA.

    Args:
        texts: `[T, H]`.
        index: int64 `[n]`, 0 .. T.

    Returns:
        `[n, H]`.
    """
    return F.embedding(index, torch.cat([texts, texts.new_zeros(1, texts.shape[1])]), padding_idx=texts.shape[0])
