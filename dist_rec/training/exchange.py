"""Collectives on numpy arrays: sum them, gather them, send every row to the rank it belongs to.

What metrics need of `torch.distributed`, and nothing more. Without a process group, or with one
rank, every operation is the identity, so callers have one code path. Under NCCL the arrays
travel over the rank's GPU, one column at a time. It knows nothing of metrics.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

SAMPLES = 4096
"""Sorted values that each rank shows the others so that `split_points` can balance the ranks."""


class Exchange:
    """The ranks of a process group. Every method but `hashed` is collective: all ranks call it.

    Args:
        group: a process group; None is the default group, or this process alone where
            `torch.distributed` is not initialised.

    Raises:
        ValueError: this process does not belong to `group`.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.rank, self.world_size, self.device = 0, 1, torch.device("cpu")
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise ValueError("this process is no member of the group whose metrics it was asked for")
            devices = [pair.partition(":")[0] for pair in str(dist.get_backend_config(group)).split(",")]
            if "cpu" not in devices:
                self.device = torch.device("cuda", torch.cuda.current_device())

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Elementwise sum over the ranks. Integers are exact; use them where the result must not depend on order."""
        if self.world_size == 1:
            return array
        tensor = self._tensor(array).clone()
        dist.all_reduce(tensor, group=self.group)
        return tensor.cpu().numpy()

    def gather(self, array: np.ndarray) -> np.ndarray:
        """`[world_size, *shape]`: the array of every rank, all of one shape and dtype."""
        if self.world_size == 1:
            return array[None]
        mine = self._tensor(array)
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine, group=self.group)
        return torch.stack(parts).cpu().numpy()

    def hashed(self, keys: np.ndarray) -> np.ndarray:
        """Rank of every int64 key, the same on all ranks, by the splitmix64 finaliser (keys may be consecutive)."""
        bits = keys.astype(np.uint64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
        return ((bits ^ (bits >> np.uint64(31))) % np.uint64(self.world_size)).astype(np.int64)

    def split_points(self, values: np.ndarray) -> np.ndarray:
        """`world_size - 1` ascending values that cut all ranks' values into about equal parts.

        `np.searchsorted(points, values, side="right")` is then the rank of each value: equal
        values meet on one rank, and lower values lie on lower ranks.

        Args:
            values: float64 `[n]`, finite, `n` may be 0 and differ between ranks.
        """
        if self.world_size == 1:
            return np.empty(0)
        samples = np.zeros(SAMPLES)
        if len(values):
            middles = (np.arange(SAMPLES) + 0.5) * (len(values) / SAMPLES)
            samples = np.sort(values)[middles.astype(np.int64)]
        all_samples = self.gather(samples)
        weights = np.repeat(self.gather(np.array([len(values)])), SAMPLES).astype(np.float64)
        order = np.argsort(all_samples.reshape(-1), kind="stable")
        reached = np.cumsum(weights[order])
        wanted = reached[-1] * np.arange(1, self.world_size) / self.world_size
        return all_samples.reshape(-1)[order][np.searchsorted(reached, wanted)]

    def route(self, ranks: np.ndarray, columns: list[np.ndarray]) -> list[np.ndarray]:
        """Send row i of every column to rank `ranks[i]`; return the rows that were sent here.

        Args:
            ranks: int64 `[n]`.
            columns: arrays `[n]`; dtypes are the same on all ranks.

        Returns:
            The columns of the received rows, senders in rank order.
        """
        if self.world_size == 1:
            return columns
        order = np.argsort(ranks, kind="stable")
        outgoing = np.bincount(ranks, minlength=self.world_size)
        incoming = self.gather(outgoing)[:, self.rank]
        received = []
        for column in columns:
            sent = self._tensor(column[order])
            arrived = torch.empty(int(incoming.sum()), dtype=sent.dtype, device=self.device)
            dist.all_to_all_single(arrived, sent, incoming.tolist(), outgoing.tolist(), group=self.group)
            received.append(arrived.cpu().numpy())
        return received

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
