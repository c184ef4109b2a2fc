"""Fields: one vector of width d for each feature of a user or an item, and which of them a row lacks.

    id, ids   W_f e_f of the pooled embedding; e_f itself where its table has width d
    dense     W_f (x_f (+) known_f)
    text      E_lm, projected by the model
    history   one field a sequence of events, encoded (`sequence.HistoryEncoder`), or its events one by one

A field that a row lacks is a vector of zeros, and is marked: who attends to fields gives it no weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import HistoryConfig
from ..data.batch import Batch
from .features import event_texts, row_texts
from .moves import place
from .sequence import HistoryEncoder, align_events


class Fields(NamedTuple):
    """F fields of B rows.

    Attributes:
        values: `[B, F, d]`, zeros where missing.
        present: bool `[B, F]`.
    """

    values: Tensor
    present: Tensor

    def followed_by(self, other: Fields) -> Fields:
        """These fields and then the others."""
        return Fields(torch.cat([self.values, other.values], 1), torch.cat([self.present, other.present], 1))

    def mean(self) -> Tensor:
        """Of the fields that are there, `[B, d]`; zeros of a row without any."""
        count = self.present.sum(1, keepdim=True).clamp_min(1)
        return self.values.sum(1) / count.to(self.values.dtype)


class History(NamedTuple):
    """A sequence of events: the features of ids that list them, and that of their texts, if there is one."""

    ids: list[str]
    text: str | None

    @property
    def name(self) -> str:
        return self.ids[0] if self.ids else self.text


class EventFields(nn.Module):
    """The events of a history as fields, each `sum_f W_f e_fj (+ E_lm,j) + P[age_j]`.

    Args:
        max_length: events that are kept, the newest.
        width: d.
        dims: width of each id feature.
    """

    def __init__(self, max_length: int, width: int, dims: Sequence[int]) -> None:
        super().__init__()
        self.max_length = max_length
        self.projections = nn.ModuleList([nn.Linear(dim, width, bias=False) for dim in dims])
        self.positions = nn.Parameter(torch.empty(max_length, width))
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, values: list[Tensor], lengths: list[Tensor]) -> Fields:
        """`values` `[N_f, dim_f]` of each id feature and `[N_f, d]` of the texts, `lengths` int64 `[B]` of each: fields
        of as many events as the longest history of the batch has, the newest first."""
        events = align_events(values, lengths, self.max_length)
        parts = [project(v) for project, v in zip(self.projections, events.values, strict=False)]
        parts += events.values[len(self.projections) :]
        x = torch.stack(parts).sum(0) + F.embedding(events.age, self.positions)
        rows, longest = events.length.shape[0], self.max_length
        if not torch.compiler.is_exporting():
            longest = int(events.length.max()) if rows else 0
        padded = place(x, events.row * longest + events.age, rows * longest).view(rows, longest, x.shape[1])
        ages = torch.arange(longest, device=padded.device)
        return Fields(padded, ages < events.length[:, None])


class FieldEncoder(nn.Module):
    """The fields of one side.

    Args:
        ids: width of the embedding of each `id` and `ids` feature, by name.
        dense: width of each `dense` feature, by name.
        texts: names of the `text` features.
        histories: each sequence of events.
        history_dims: width of the embedding of each feature of their ids, by name.
        config: `model.history`.
        width: d.
        by_event: leave a history's events apart (`events`) instead of encoding it to a field.

    Attributes:
        names: of the fields, in their order.
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        dense: Mapping[str, int],
        texts: Sequence[str],
        histories: Sequence[History],
        history_dims: Mapping[str, int],
        config: HistoryConfig,
        width: int,
        by_event: bool = False,
    ) -> None:
        super().__init__()
        self.ids, self.dense, self.texts, self.histories = list(ids), list(dense), list(texts), list(histories)
        self.by_event, self.width = by_event, width
        self.names = [*self.ids, *self.dense, *self.texts]
        self.id_maps = nn.ModuleList(
            [nn.Identity() if dim == width else nn.Linear(dim, width, bias=False) for dim in ids.values()]
        )
        self.dense_maps = nn.ModuleList([nn.Linear(2 * wide, width) for wide in dense.values()])
        dims = [[history_dims[name] for name in history.ids] for history in histories]
        if by_event:
            self.encoders = nn.ModuleList([EventFields(config.max_length, width, own) for own in dims])
        else:
            self.names += [history.name for history in histories]
            self.encoders = nn.ModuleList(
                [
                    HistoryEncoder(config, width, own, history.text is not None)
                    for own, history in zip(dims, histories, strict=True)
                ]
            )

    def forward(
        self,
        embeddings: Mapping[str, Tensor],
        lengths: Mapping[str, Tensor],
        batch: Batch,
        texts: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Fields, list[Fields]]:
        """Read a batch.

        Args:
            embeddings: pooled `[B, dim]` by feature; `[N, dim]`, all events in row order, of histories.
            lengths: of `Batch.id_lengths`.
            batch: B rows.
            texts: `[T, d]`, projected vectors of the distinct texts; None where no feature is a text.
            dtype: of the result.

        Returns:
            The fields, and the events of each history where they are left apart.
        """
        values, present = [], []
        for name, project in zip(self.ids, self.id_maps, strict=True):
            values.append(project(embeddings[name].to(dtype)))
            present.append(lengths[name] > 0)
        for name, project in zip(self.dense, self.dense_maps, strict=True):
            known = ~torch.isnan(batch.dense[name])
            columns = [torch.nan_to_num(batch.dense[name], nan=0.0).to(dtype), known.to(dtype)]
            values.append(project(torch.cat(columns, 1)))
            present.append(known.any(1))
        for name in self.texts:
            values.append(row_texts(texts, batch.text_index[name], batch.text_lengths[name]))
            present.append(batch.text_lengths[name] > 0)
        events = []
        for history, encoder in zip(self.histories, self.encoders, strict=True):
            given, counts = [embeddings[n].to(dtype) for n in history.ids], [lengths[n] for n in history.ids]
            if history.text:
                given.append(event_texts(texts, batch.text_index[history.text]))
                counts.append(batch.text_lengths[history.text])
            encoded = encoder(given, counts)
            if self.by_event:
                events.append(encoded)
            else:
                values.append(encoded)
                present.append(torch.stack(counts).amax(0) > 0)
        return self._stacked(values, present, batch, dtype), events

    def _stacked(self, values: list[Tensor], present: list[Tensor], batch: Batch, dtype: torch.dtype) -> Fields:
        if not values:
            nothing = torch.zeros(*batch.domain.shape, 0, self.width, dtype=dtype, device=batch.domain.device)
            return Fields(nothing, nothing[:, :, 0] > 0)
        there = torch.stack(present, 1)
        # What is missing is zero, not the bias of a map or what an empty history begins as.
        return Fields(torch.stack(values, 1) * there[:, :, None].to(dtype), there)
