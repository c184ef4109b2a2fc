"""UniSRec (Hou et al., KDD'22): universal sequence representations; SASRec with `item: id`.

    v_i    = mixture of whitenings of i's text vector             item: text      (inductive)
             the same + e_i, of i's embedding                     item: text+id   (transductive)
             e_i                                                  item: id        (SASRec)
    s_j    = causal transformer over v_1 .. v_j, at j
    score  = cos(s_j, v_i) / tau
    L      = L_SI + weight * L_SS                                 `layers.contrastive` has both

With `repeats`, which the paper does not have, the logits of items that the sequence has had already are higher by
w s_j + c, of the state before it is made one of length 1; w and c start as 0. Of itself a cosine cannot say that the
nearest item of all, the one that was just bought, is not what comes next.

A row is one sequence, its history and then its item. In training every event but the first is the target of what
precedes it, all in one pass. Prefix by prefix that is the paper's training on the same rows, with three differences: a
batch has all prefixes of a sequence or none; the adaptor runs once on each distinct text of a rank's batch, so that all
its occurrences, and copies, share one draw of dropout and of the gate's noise; and a sequence has one augmented copy
(`layers.augment`), not one for each prefix. That copy's states are no negatives of its own sequence's positions: where
an event is dropped, neighbouring positions share their partner, which cannot be both right and wrong.

In evaluation the row's item alone is a target; losses are without augmentation, so L_SS then pairs states with
themselves. A pass's first batch lists the catalogue, whose vectors are kept for the batches after it, which list none,
until the model trains. An item without text, or with an empty one, is a vector of zeros before positions and embeddings
are added: its cosine is 0 with everything, since nothing is known of it. A row without history has no state and no
loss; it ranks all items alike. Sequences longer than `max_length` inputs keep their newest events. Identity 0 of a
dictionary vocabulary stands for all items that it does not know, which are one item here.

`official` does what the authors' public code does where that differs from what it means to do: other positions with the
same target stay in the denominators as exp(0) = 1; dropped items overwrite kept ones, and item drop or word drop is
drawn once for each rank's batch. It does not reproduce that the code's several processes train apart, each with its own
negatives and without synchronised gradients: W ranks equal one process on the global batch here as always. Nor, in
fine-tuning, that the padding item is one of the catalogue.

It takes looked-up embeddings and a `Batch` and knows neither tables, engines nor process groups: what must be summed
over ranks goes through the `Reduction` it is given. Every submodule is called in every step, whatever the batch lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.unisrec import UniSRecConfig
from ..data.batch import CANDIDATES, CANDIDATES_TEXT, Batch
from ..errors import UserError
from ..layers.augment import Copy, Draws, augment, draw
from ..layers.causal import CausalEncoder, Sequences
from ..layers.contrastive import (
    LEAST_TEMPERATURE,
    Candidates,
    Earlier,
    Term,
    distinct,
    softmax_losses,
    unit,
)
from ..layers.features import event_texts
from ..layers.flat_events import FlatEvents, events_of
from ..layers.moves import place, take
from ..layers.reduction import Reduction, full_precision, masked_means
from ..layers.target_ranks import Seen, target_ranks
from ..layers.whitening import WhiteningMixture
from ..schema import Kind, Role, Schema
from .towers import Side, TwoTowers

SEQUENCE_ITEM, SEQUENCE_SEQUENCE, TOTAL, RANK = "sequence_item", "sequence_sequence", "loss", "rank"
# The only task.
NEXT = "next"


class _Texts(NamedTuple):
    """Vectors of distinct texts and who uses which; position R is no text.

    Attributes:
        vectors: `[R, H]`: of the batch's T texts, then of those texts that the copies read with words dropped.
        events: int64 `[S]`.
        copies: int64 `[K]`, of the events that copies keep.
        candidates: int64 `[M]`.
    """

    vectors: Tensor
    events: Tensor
    copies: Tensor
    candidates: Tensor


class UniSRec(nn.Module):
    """Adaptor, sequence encoder and losses.

    Submodules, by which presets freeze: `adaptor` (with text); `encoder` with `positions`, `input_norm` and `blocks`;
    `repeats`; `text_encoder`.

    Args:
        schema: the data set's.
        config: `model` of the config.
        table_dims: embedding width by *table* name; that of the items is `config.width`.
        text_width: D, width of a text vector.
        text_encoder: `(tokens [T, L], mask [T, L]) -> [T, D]`, co-trained; None reads `batch.text_vectors`.
        features: names of the features to use; they decide where the schema has several of a kind.
        reduction: sums over ranks.
        mask_history: leave the items of a row's history out of its ranking.

    Raises:
        UserError: the schema has not one list of items and one item; widths do not fit; the temperature is too low.
    """

    def __init__(
        self,
        schema: Schema,
        config: UniSRecConfig,
        table_dims: dict[str, int],
        text_width: int,
        text_encoder: nn.Module | None,
        features: Sequence[str],
        reduction: Reduction,
        mask_history: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.reduction, self.mask_history = config, reduction, mask_history
        self.history = _only(schema, "history", "ids", features)
        self.item = _only(schema, "item", "id", features)
        if config.with_text:
            if not text_width:
                raise UserError(f"model.item: {config.item} needs texts: set text.mode, or take item: id.")
            self.history_text = _only(schema, "history", "texts", features)
            self.item_text = _only(schema, "item", "text", features)
            adaptor = config.adaptor
            sizes = (text_width, config.width, adaptor.experts)
            self.adaptor = WhiteningMixture(*sizes, adaptor.dropout, adaptor.noise, adaptor.scale)
        if config.with_ids and (dim := table_dims[schema.table_of(self.item)]) != config.width:
            raise UserError(
                f"table {schema.table_of(self.item)!r} is {dim} wide and model.width is {config.width}: an item's "
                f"embedding is added to its vector, so set tables.overrides.{schema.table_of(self.item)}.dim: "
                f"{config.width}, or model.width: {dim}."
            )
        if config.temperature < LEAST_TEMPERATURE:
            raise UserError(f"model.temperature {config.temperature:g}: float32 needs at least {LEAST_TEMPERATURE:g}.")
        self.text_width = text_width
        self.text_encoder = text_encoder if config.with_text else None
        self.encoder = CausalEncoder(config.encoder, config.width)
        self.repeats = None
        if config.repeats:
            self.repeats = nn.Linear(config.width, 1)
            nn.init.zeros_(self.repeats.weight)
            nn.init.zeros_(self.repeats.bias)
        self.kept: Candidates | None = None

    def train(self, mode: bool = True) -> UniSRec:
        """As of any module; what was kept of a catalogue is forgotten before parameters move."""
        if mode:
            self.kept = None
        return super().train(mode)

    def forward(
        self, embeddings: dict[str, Tensor], batch: Batch, side: Side | None = None
    ) -> dict[str, Tensor | dict[str, Tensor]]:
        """One step's losses, and in evaluation ranks; or, asked for a side of the two-tower reading, its vectors.

        Args:
            embeddings: where items have ids: `[N, H]`, all events in row order, of the history; `[B, H]` of the item,
                zeros where null; `[M, H]` of the candidates, if the batch has any.
            batch: B rows, masked ones included.
            side: `user`, s after the whole history, or `item`, v_i; of length 1, or 0 where nothing is known.

        Returns:
            `loss`: scalar with the gradient; its mean over ranks is the global batch's loss.
            `losses`: detached scalars of the global batch, equal on all ranks: `sequence_item`, `sequence_sequence`
            unless its weight is 0, and `loss`, their weighted sum.
            `rank`: in evaluation, where any rank has candidates, listed or kept: float64 `[B]`, the rank of the row's
            item among those of all ranks, NaN on masked rows and on rows without an item.
            `logits`: in evaluation: `[B]` by task, cos(s, v_i) / tau of the row's item, and what `repeats` adds; 0
            where a row has none.
            `vectors`: of a side, and nothing else: `[B, H]` by task.
        """
        if side is not None:
            return {"vectors": {NEXT: self._side(embeddings, batch, side)}}
        events = events_of(batch, self.history, self.item, self.config.encoder.max_length)
        # An event's number is its place among all S; inputs are all but a row's newest.
        inputs = (events.age > 0).nonzero()[:, 0]
        length, row = (events.length - 1).clamp_min(0), events.row[inputs]
        sequences = Sequences(length, row, length[row] - events.age[inputs])
        contrasts = self.config.contrast.weight > 0
        copy = self._copy(batch, sequences) if contrasts and self.training else None
        texts = self._texts(batch, events, inputs, copy) if self.config.with_text else None
        embedded = self._embedded(embeddings, batch, events) if self.config.with_ids else None
        items = _items(texts and (texts.vectors, texts.events), embedded)
        x = take(items, inputs)
        if copy is not None:
            of_copies = None if embedded is None else take(embedded, inputs[copy.kept])
            x = torch.cat([x, _items(texts and (texts.vectors, texts.copies), of_copies)])
            sequences = sequences.followed_by(sequences.keep(copy.kept))
        states = self.encoder(x, sequences)

        if self.training:
            positions = torch.arange(len(inputs), device=inputs.device)
        else:
            positions = ((events.age[inputs] == 1) & events.has_item[row]).nonzero()[:, 0]
        target = inputs[positions] + 1
        state, positives = take(states, positions), _units(take(items, target))
        identities, rows = self._identity(batch, events), events.row[target]
        identity, earlier = identities[target], None
        if self.repeats is not None:
            before = events.before(target, identities, self.config.encoder.max_length)
            earlier = Earlier(before, full_precision(self.repeats(state))[:, 0])
        state = _units(state)
        candidates = self._candidates(texts, embeddings, batch)
        if not self.training:
            candidates = self._of_this_pass(candidates)
        in_batch = self.config.loss == "in_batch"
        if not in_batch and candidates is None:
            raise ValueError(f"loss: {self.config.loss} on a batch without {CANDIDATES!r}")
        others = distinct(positives, identity) if in_batch else candidates
        # Of a catalogue, or a sample of it, no candidate is another occurrence of the target.
        own = 1.0 if in_batch else torch.inf
        terms, valid = [Term(positives, others, own, earlier)], [torch.ones_like(rows, dtype=torch.bool)]
        if contrasts:
            partners, paired = state, valid[0]
            if copy is not None:
                partners, paired = _units(F.embedding(copy.partner, states[len(inputs) :])), copy.paired
            copies = Candidates(partners, identity, paired.to(state.dtype), batch.row[rows])
            terms.append(Term(partners, copies, 0.0))
            valid.append(paired)
        settings = (self.config.temperature, self.reduction, self.config.official, states.dtype)
        losses = softmax_losses(state, identity, batch.row[rows], terms, *settings)
        output = self._total(torch.stack(losses, 1), torch.stack(valid, 1))
        if not self.training:
            states, targets = (place(x, rows, len(batch)) for x in (state, positives))
            logits = (states * targets).sum(1) / self.config.temperature
            if earlier is not None:
                logits = logits + place(earlier.of(identity)[:, None], rows, len(batch))[:, 0]
                # Of a row without a position no candidate is raised by anything but 0.
                before, offset = (place(x, rows, len(batch)) for x in (earlier.identity, earlier.offset[:, None]))
                earlier = Earlier(before, offset[:, 0] * self.config.temperature)
            output["logits"] = {NEXT: logits}
            if candidates is not None:
                output[RANK] = self._ranks(states, targets, candidates, batch, events, earlier)
        return output

    def _side(self, embeddings: dict[str, Tensor], batch: Batch, side: Side) -> Tensor:
        """s after the whole history, or v_i of the row's item: `[B, H]`."""
        # With an item of its own, a row's newest event would be no input.
        events = events_of(batch, self.history, self.item, self.config.encoder.max_length, with_item=side == "item")
        every = torch.arange(len(events.row), device=events.row.device)
        texts = self._texts(batch, events, every, None) if self.config.with_text else None
        embedded = self._embedded(embeddings, batch, events) if self.config.with_ids else None
        vectors = _items(texts and (texts.vectors, texts.events), embedded)
        newest = (events.age == 0) & (events.has_item[events.row] | (side == "user"))
        if side == "user":
            index = events.length[events.row] - 1 - events.age
            vectors = self.encoder(vectors, Sequences(events.length, events.row, index))
        chosen = newest.nonzero()[:, 0]
        return place(_units(take(vectors, chosen)), events.row[chosen], len(batch))

    def _copy(self, batch: Batch, sequences: Sequences) -> Copy:
        draws = self._draws(batch, sequences)
        return augment(sequences, draws, self.config.contrast, self._has_dropped_words(batch), self.config.official)

    def _draws(self, batch: Batch, sequences: Sequences) -> Draws:
        return draw(sequences)

    def _identity(self, batch: Batch, events: FlatEvents) -> Tensor:
        """int64 `[S]`."""
        unknown = batch.row.new_full((1,), -1)
        items = _of_rows(unknown, events.has_item, batch.identity[self.item])
        return events.read(batch.identity[self.history], batch.identity_lengths[self.history], items, unknown)

    def _texts(self, batch: Batch, events: FlatEvents, inputs: Tensor, copy: Copy | None) -> _Texts:
        """Every distinct text through the adaptor, once."""
        known = self._text_vectors(batch)
        missing = batch.row.new_full((1,), len(known))
        has_text = batch.text_lengths[self.item_text] > 0
        items = _of_rows(missing, has_text, batch.text_index[self.item_text])
        history, lengths = batch.text_index[self.history_text], batch.text_lengths[self.history_text]
        of_events, of_candidates = (
            torch.where(used < len(known), used, -1)
            for used in (
                events.read(history, lengths, items, missing),
                batch.text_index.get(CANDIDATES_TEXT, missing[:0]),
            )
        )
        of_copies = of_events[:0]
        if copy is not None:
            of_copies = of_events[inputs][copy.kept]
            if self._has_dropped_words(batch):
                loses_words = copy.words[copy.kept] & (of_copies >= 0)
                dropped = torch.unique(of_copies[loses_words])
                of_copies = torch.where(loses_words, len(known) + torch.searchsorted(dropped, of_copies), of_copies)
                known = torch.cat([known, batch.text_vectors[dropped, self.text_width :]])
        vectors = self.adaptor(known.to(self.adaptor.weight.dtype))
        uses = (torch.where(used < 0, len(vectors), used) for used in (of_events, of_copies, of_candidates))
        return _Texts(vectors, *uses)

    def _text_vectors(self, batch: Batch) -> Tensor:
        """Of the T distinct texts, `[T, D]`: stored ones, or the language model's."""
        if self.text_encoder is None:
            return batch.text_vectors[:, : self.text_width]
        return self.text_encoder(batch.text_tokens, batch.text_mask)

    def _has_dropped_words(self, batch: Batch) -> bool:
        return self.config.with_text and self.text_encoder is None and batch.text_vectors.shape[1] > self.text_width

    def _embedded(self, embeddings: dict[str, Tensor], batch: Batch, events: FlatEvents) -> Tensor:
        """e_i of all events, `[S, H]`."""
        dtype = self.encoder.positions.dtype
        history, items = embeddings[self.history].to(dtype), embeddings[self.item].to(dtype)
        return events.read(history, batch.id_lengths()[self.history], items, items.new_zeros(1, items.shape[1]))

    def _candidates(self, texts: _Texts | None, embeddings: dict[str, Tensor], batch: Batch) -> Candidates | None:
        """This rank's, where the batch lists any for somebody."""
        if CANDIDATES not in batch.identity:
            return None
        dtype = self.encoder.positions.dtype
        embedded = embeddings[CANDIDATES].to(dtype) if self.config.with_ids else None
        vectors = _units(_items(texts and (texts.vectors, texts.candidates), embedded))
        return Candidates(vectors, batch.identity[CANDIDATES], batch.candidate_weight.to(vectors.dtype))

    def _of_this_pass(self, listed: Candidates | None) -> Candidates | None:
        """Of an evaluation's batch: those that it lists for any rank, else those of the batch before."""
        if listed is not None and self.reduction.largest(len(listed.identity), listed.identity.device) > 0:
            self.kept = listed._replace(vectors=listed.vectors.detach())
            return listed
        return self.kept

    def _ranks(
        self,
        states: Tensor,
        targets: Tensor,
        candidates: Candidates,
        batch: Batch,
        events: FlatEvents,
        earlier: Earlier | None,
    ) -> Tensor:
        identity, seen = _of_rows(batch.row.new_full((1,), -1), events.has_item, batch.identity[self.item]), None
        if self.mask_history:
            seen = Seen(batch.identity[self.history], batch.identity_lengths[self.history])
        ranks = target_ranks(states, targets, identity, candidates, self.reduction, seen, earlier)
        return torch.where(batch.valid & events.has_item, ranks, torch.nan)

    def _total(self, terms: Tensor, valid: Tensor) -> dict[str, Tensor | dict[str, Tensor]]:
        """`terms` and bool `valid` `[P, C]` -> `loss` and `losses`."""
        local, means = masked_means(terms, valid, self.reduction)
        names, weights = [SEQUENCE_ITEM, SEQUENCE_SEQUENCE], [1.0, self.config.contrast.weight]
        losses = dict(zip(names, means.unbind(0), strict=False))
        total = sum(weight * mean for weight, mean in zip(weights, means.unbind(0), strict=False))
        loss = sum(weight * mean for weight, mean in zip(weights, local.unbind(0), strict=False))
        return {"loss": loss, "losses": {**losses, TOTAL: total}}


def _items(texts: tuple[Tensor, Tensor] | None, embedded: Tensor | None) -> Tensor:
    """v_i of items given their texts, vectors `[R, H]` and uses int64 `[n]`, and e_i `[n, H]`, or one of them."""
    if texts is None:
        return embedded
    vectors = event_texts(*texts)
    return vectors if embedded is None else vectors + embedded


def _of_rows(otherwise: Tensor, there: Tensor, values: Tensor) -> Tensor:
    """`values` of the rows that are `there`, bool `[B]`; `otherwise` `[1]` of the others. `[B]`."""
    return otherwise.expand(len(there)).masked_scatter(there, values)


def _units(x: Tensor) -> Tensor:
    return unit(full_precision(x))


def _only(schema: Schema, role: Role, kind: Kind, features: Sequence[str]) -> str:
    """The feature of a role and a kind."""
    found = {
        name: feature
        for name, feature in schema.select(role, (kind,)).items()
        if name not in (CANDIDATES, CANDIDATES_TEXT) and (kind != "id" or feature.aspect == "id")
    }
    chosen = [name for name in found if name in features] or list(found)
    if len(chosen) != 1:
        what = f"one {role} feature of kind {kind}" + (" and aspect id" if kind == "id" else "")
        has = f"{len(chosen)} ({', '.join(chosen)})" if chosen else "none"
        raise UserError(f"model.kind unisrec reads {what}, and schema {schema.name!r} has {has}: see shards/README.md.")
    return chosen[0]


def towers_of(schema: Schema, config: UniSRecConfig, features: Sequence[str]) -> TwoTowers:
    """A user is a history, an item its id and text; the score is a cosine over tau, and what `repeats` adds to it."""
    history, item = _only(schema, "history", "ids", features), _only(schema, "item", "id", features)
    users, items = [history], [item]
    if config.with_text:
        users.append(_only(schema, "history", "texts", features))
        items.append(_only(schema, "item", "text", features))
    return TwoTowers(
        tasks=(NEXT,),
        user_features=tuple(users),
        item_features=tuple(items),
        exact={NEXT: not config.repeats},
        why={NEXT: "model.repeats adds to the scores of items that the history has"} if config.repeats else {},
        scale={NEXT: 1 / config.temperature},
        bias={NEXT: 0.0},
    )
