"""UniSRec's pretraining the usual way, for `bench sequences`: what the public code (on RecBole) does, row by row.

A training row is one prefix and its target, padded to `max_length`; the mixture of whitenings runs on every place of
every row, padding included, again for the augmented copy and again for the target (50 + 50 + 1 in all); attention is a
product, a mask, a softmax, dropout and a product; negatives are the batch's other rows. Where the public code is wrong
(papers.md §2.6: negatives of the same item count, item drop keeps the wrong items) this does what it means to do, and
as `models.unisrec` does, copies of a sequence's own other prefixes are no negatives: so that both give the same losses
on the same rows (tests/test_bench_sequences.py). It serves that comparison and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.unisrec import AdaptorConfig, ContrastConfig, SequenceEncoderConfig, UniSRecConfig
from ..data.batch import Batch
from ..errors import UserError
from ..models.unisrec import UniSRec


class Prefixes(NamedTuple):
    """P training rows, as a data loader of the usual way would give them.

    Attributes:
        items: int64 `[P, L]`, the text of each item of a prefix, oldest first, then 0.
        length: int64 `[P]`, at least 1.
        target: int64 `[P]`, the text of the next item.
        identity: int64 `[P]`, what tells targets apart.
        sequence: int64 `[P]`, the sequence that a prefix is of.
        event: int64 `[P, L]`, number of each item of a prefix among all inputs of all sequences, then 0.
    """

    items: Tensor
    length: Tensor
    target: Tensor
    identity: Tensor
    sequence: Tensor
    event: Tensor


def expand(model: UniSRec, batch: Batch) -> Prefixes:
    """Every prefix of every sequence of a batch, sequence after sequence, the shortest prefix first.

    Args:
        model: says which features are the sequence's, whose items are texts; of a longer sequence it reads the newest
            `max_length` + 1 events.

    Raises:
        UserError: an item has no text.
    """
    longest = model.config.encoder.max_length
    identities = _joined(batch.identity, batch.identity_lengths, model.history, model.item)
    texts = _joined(batch.text_index, batch.text_lengths, model.history_text, model.item_text)
    found: list[list[Tensor]] = []
    start = 0
    for row, (identity, text) in enumerate(zip(identities, texts, strict=True)):
        if len(identity) != len(text):
            raise UserError("an item has no text, for which the usual way has no place: measure on other data.")
        identity, text = identity[-longest - 1 :], text[-longest - 1 :]
        n = max(len(text) - 1, 0)
        inside = torch.arange(longest)[None] <= torch.arange(n)[:, None]
        padded = F.pad(text[:n], (0, longest - n)).expand(n, longest)
        events = F.pad(torch.arange(start, start + n), (0, longest - n)).expand(n, longest)
        columns = [padded * inside, torch.arange(1, n + 1), text[1:], identity[1:], torch.full((n,), row)]
        found.append([*columns, events * inside])
        start += n
    return Prefixes(*(torch.cat(columns) for columns in zip(*found, strict=True)))


def _joined(values: dict[str, Tensor], lengths: dict[str, Tensor], history: str, item: str) -> list[Tensor]:
    """Of each row its history's values and then its item's."""
    parts = (values[name].split(lengths[name].tolist()) for name in (history, item))
    return [torch.cat(pair) for pair in zip(*parts, strict=True)]


class Draws(NamedTuple):
    """Uniform numbers from 0 to 1: `row` `[P]`, which augmentation, and `event` `[P, L]`, what of it."""

    row: Tensor
    event: Tensor


class Whitening(nn.Module):
    """`W (dropout(x) - b)`."""

    def __init__(self, inputs: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.zeros(inputs))
        self.linear = nn.Linear(inputs, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(x) - self.bias)


class Adaptor(nn.Module):
    """Mixture of whitenings under a noisy gate, on `[..., D]`."""

    def __init__(self, inputs: int, width: int, config: AdaptorConfig) -> None:
        super().__init__()
        self.scale, self.noise = config.scale, config.noise
        self.experts = nn.ModuleList([Whitening(inputs, width, config.dropout) for _ in range(config.experts)])
        self.gate = nn.Parameter(torch.zeros(inputs, config.experts))
        self.gate_noise = nn.Parameter(torch.zeros(inputs, config.experts))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        logits = x @ self.gate
        if self.noise and self.training:
            logits = logits + torch.randn_like(logits) * (F.softplus(x @ self.gate_noise) + 0.01)
        gates = torch.softmax(logits, -1)
        outputs = torch.cat([expert(x).unsqueeze(-2) for expert in self.experts], dim=-2)
        return (gates.unsqueeze(-1) * outputs).sum(-2)


class Layer(nn.Module):
    """A post-norm transformer layer on `[P, L, H]`."""

    def __init__(self, config: SequenceEncoderConfig, width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.query, self.key, self.value, self.dense = (nn.Linear(width, width) for _ in range(4))
        self.attention_dropout, self.dropout = nn.Dropout(config.attention_dropout), nn.Dropout(config.dropout)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.expand, self.contract = nn.Linear(width, config.feedforward), nn.Linear(config.feedforward, width)
        self.feedforward_norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`mask`: `[P, 1, L, L]`, 0 where a place may be attended to, else -10,000."""
        split = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        query, key, value = (f(x).view(split).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / (split[-1] ** 0.5) + mask
        mixed = self.attention_dropout(torch.softmax(scores, -1)) @ value
        mixed = mixed.transpose(1, 2).reshape(x.shape)
        x = self.attention_norm(self.dropout(self.dense(mixed)) + x)
        return self.feedforward_norm(self.dropout(self.contract(F.gelu(self.expand(x)))) + x)


class UsualUniSRec(nn.Module):
    """The model of the same sizes, and its two losses.

    Args:
        config: `model`, with item: text and loss: in_batch.
        text_width: D.
    """

    def __init__(self, config: UniSRecConfig, text_width: int) -> None:
        super().__init__()
        self.config, self.text_width = config, text_width
        self.adaptor = Adaptor(text_width, config.width, config.adaptor)
        self.positions = nn.Embedding(config.encoder.max_length, config.width)
        self.input_norm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.encoder.dropout)
        self.layers = nn.ModuleList([Layer(config.encoder, config.width) for _ in range(config.encoder.layers)])

    def forward(self, rows: Prefixes, vectors: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Both losses, and `loss`, their weighted sum.

        Args:
            rows: P of them.
            vectors: `[T, D]` of the batch's texts, or `[T, 2 D]` with those of the word-dropped texts.
            draws: for the augmented copies.
        """
        contrast, tau = self.config.contrast, self.config.temperature
        texts = F.embedding(rows.items, vectors[:, : self.text_width])
        states = self._encode(texts, rows.length)
        targets = F.normalize(self.adaptor(vectors[rows.target, : self.text_width]), dim=1)
        same = rows.identity[:, None] == rows.identity[None]
        itself = torch.eye(len(same), dtype=torch.bool, device=same.device)
        answer = torch.arange(len(same), device=same.device)
        logits = (states @ targets.t() / tau).masked_fill(same & ~itself, -torch.inf)
        losses = {"sequence_item": F.cross_entropy(logits, answer)}
        if contrast.weight > 0:
            copies, lengths = _augmented(rows, texts, vectors[:, self.text_width :], draws, contrast)
            augmented = self._encode(copies, lengths)
            same = same | (rows.sequence[:, None] == rows.sequence[None])
            logits = (states @ augmented.t() / tau).masked_fill(same & ~itself, -torch.inf)
            losses["sequence_sequence"] = F.cross_entropy(logits, answer)
        losses["loss"] = losses["sequence_item"] + contrast.weight * losses.get("sequence_sequence", 0.0)
        return losses

    def _encode(self, texts: Tensor, length: Tensor) -> Tensor:
        """Unit states `[P, H]` at the last item of `[P, L, D]`."""
        places = torch.arange(texts.shape[1], device=texts.device)
        seen = (places[None, :] <= places[:, None]) & (places < length[:, None])[:, None]
        mask = torch.where(seen[:, None], 0.0, -10_000.0)
        x = self.dropout(self.input_norm(self.adaptor(texts) + self.positions(places)))
        for layer in self.layers:
            x = layer(x, mask)
        return F.normalize(x[torch.arange(len(x), device=x.device), length - 1], dim=1)


def _augmented(
    rows: Prefixes, texts: Tensor, dropped: Tensor, draws: Draws, config: ContrastConfig
) -> tuple[Tensor, Tensor]:
    """Copies `[P, L, D]` and their lengths: rows without some items, or with some texts' words dropped."""
    places = torch.arange(texts.shape[1], device=texts.device)
    there = places < rows.length[:, None]
    drops_items = (
        draws.row < config.item_drop_share if dropped.shape[1] else torch.ones_like(draws.row, dtype=torch.bool)
    )
    kept = there & ((draws.event >= config.item_drop) | (places == 0) | ~drops_items[:, None])
    if dropped.shape[1]:
        loses = there & (draws.event < config.word_drop) & ~drops_items[:, None]
        texts = torch.where(loses[..., None], F.embedding(rows.items, dropped), texts)
    # A stable sort brings what is kept to the front, in its order.
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
    return texts.gather(1, order[..., None].expand_as(texts)), kept.sum(1)


@torch.no_grad()
def take_weights(usual: UsualUniSRec, ours: UniSRec) -> None:
    """Give the usual model the weights of ours."""
    adaptor, encoder = ours.adaptor, ours.encoder
    for number, expert in enumerate(usual.adaptor.experts):
        expert.bias.copy_(adaptor.bias[number])
        expert.linear.weight.copy_(adaptor.weight[number].t())
    usual.adaptor.gate.copy_(adaptor.gate)
    if adaptor.gate_noise is not None:
        usual.adaptor.gate_noise.copy_(adaptor.gate_noise)
    usual.positions.weight.copy_(encoder.positions)
    usual.input_norm.load_state_dict(encoder.input_norm.state_dict())
    for layer, block in zip(usual.layers, encoder.blocks, strict=True):
        for part, weight, bias in zip(
            (layer.query, layer.key, layer.value), block.qkv.weight.chunk(3), block.qkv.bias.chunk(3), strict=True
        ):
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        layer.dense.load_state_dict(block.out.state_dict())
        for name in ("attention_norm", "expand", "contract", "feedforward_norm"):
            getattr(layer, name).load_state_dict(getattr(block, name).state_dict())
