"""A batch's sequences as one flat list of events: a history and then the row's item."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batch import Batch
from .moves import take


class FlatEvents(NamedTuple):
    """S events of B rows: a row's history and then its item, oldest first, the newest that the encoder can use.

    Attributes:
        length: int64 `[B]`.
        row, age: int64 `[S]`; age 0 is a row's newest event.
        has_item: bool `[B]`, whether that is the row's item.
    """

    length: Tensor
    row: Tensor
    age: Tensor
    has_item: Tensor

    def read(self, history: Tensor, lengths: Tensor, items: Tensor, missing: Tensor) -> Tensor:
        """What events have of one feature.

        Args:
            history: `[n, ...]`, rows concatenated, oldest first; a shorter list than others lacks the oldest.
            lengths: int64 `[B]`, adding up to n.
            items: `[B, ...]`.
            missing: `[1, ...]`, for events that a list lacks.

        Returns:
            `[S, ...]`.
        """
        back = self.age - self.has_item[self.row].long()
        source = (lengths.cumsum(0) - 1)[self.row] - back
        source = torch.where(back < lengths[self.row], source, len(history) + len(items))
        return take(torch.cat([history, items, missing]), torch.where(back < 0, len(history) + self.row, source))

    def before(self, event: Tensor, identity: Tensor, most: int) -> Tensor:
        """What came before some events in their sequences, the newest first.

        Args:
            event: int64 `[P]`, numbers among all S.
            identity: int64 `[S]`.
            most: of what came before.

        Returns:
            int64 `[P, most]`, -1 where there is nothing.
        """
        start = (self.length.cumsum(0) - self.length)[self.row[event]]
        at = event[:, None] - 1 - torch.arange(most, device=event.device)
        return torch.where(at >= start[:, None], identity[at.clamp_min(0)], -1)


def events_of(batch: Batch, history: str, item: str, max_length: int, with_item: bool = True) -> FlatEvents:
    """Events of a batch's valid rows.

    Args:
        history, item: features whose identities say how many events there are.
        max_length: most inputs of the encoder; longer histories keep their newest events.
        with_item: else events are those of histories, all of them inputs.
    """
    has_item = (batch.identity_lengths[item] > 0) & with_item
    length = (batch.identity_lengths[history] + has_item) * batch.valid
    length = length.clamp_max(max_length + with_item)
    total = int(length.sum())
    row = torch.repeat_interleave(torch.arange(len(length), device=length.device), length, output_size=total)
    age = length.cumsum(0)[row] - 1 - torch.arange(total, device=length.device)
    return FlatEvents(length, row, age, has_item)
