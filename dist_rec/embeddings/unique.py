"""`fbgemm::jagged_unique_indices` for CPU, which fbgemm has for CUDA alone: what `tables.deduplicate` runs there."""

from __future__ import annotations

import torch
from torch import Tensor

_OPERATOR = "jagged_unique_indices"
# Registrations last as long as this lives.
_LIBRARY = torch.library.Library("fbgemm", "IMPL")


def jagged_unique_indices(
    hash_size_cumsum: Tensor, hash_size_offsets: Tensor, offsets: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The distinct ids of each table, F features of B rows reading from it.

    Args:
        hash_size_cumsum: int64 `[F + 1]`; features of one table have the same entry, and the next table's is larger by
            the rows of this one.
        hash_size_offsets: int64 `[F + 1]`; at the first feature of a table, numbers of its first feature and of the
            next table's; at its others, twice the same.
        offsets: int64 `[F * B + 1]` of the ids of every feature and row.
        indices: int64 `[N]` ids.

    Returns:
        `lengths` `[F * B]` and `offsets` `[F * B + 1]` under which the distinct ids travel, spread evenly over all rows
        of their table; the `[U]` distinct ids, table by table and sorted; `[N]`, where each id stands among them.
    """
    features = len(hash_size_cumsum) - 1
    rows = (len(offsets) - 1) // features
    counts = offsets[rows::rows] - offsets[:-1:rows]
    linear = indices + torch.repeat_interleave(hash_size_cumsum[:-1], counts, output_size=len(indices))
    unique, reverse = torch.unique(linear, return_inverse=True)
    lengths = torch.zeros(features * rows, dtype=offsets.dtype)
    firsts = hash_size_cumsum.tolist()
    bounds = torch.searchsorted(unique, hash_size_cumsum).tolist()
    groups = hash_size_offsets.tolist()
    for begin, end in zip(groups[:-1], groups[1:], strict=True):
        if begin == end:
            continue
        here = slice(bounds[begin], bounds[end])
        unique[here] -= firsts[begin]
        share, rest = divmod(here.stop - here.start, (end - begin) * rows)
        lengths[begin * rows : end * rows] = share
        lengths[begin * rows : begin * rows + rest] += 1
    travelling = torch.zeros(features * rows + 1, dtype=offsets.dtype)
    torch.cumsum(lengths, 0, out=travelling[1:])
    return lengths, travelling, unique, reverse


if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fbgemm::{_OPERATOR}", "CPU"):
    _LIBRARY.impl(_OPERATOR, jagged_unique_indices, "CPU")
