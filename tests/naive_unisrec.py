"""UniSRec the usual way, prefix by prefix, and the cases in which both are compared."""

from __future__ import annotations

import math

import numpy as np
import torch
from sequence_batches import NUM_ITEMS, NUM_TEXTS, TEXT_OF, TEXT_WIDTH, WIDTH, Row, Whole, text_vectors
from torch import Tensor
from torch.nn import functional as F

EVERY_ITEM = list(range(NUM_ITEMS))
ITEMS = ["text", "id", "text+id"]
LOSSES = ["in_batch", "full", "sampled", "full, repeats", "sampled, repeats"]
CONTRAST = {"weight": 0.7, "item_drop": 0.3, "word_drop": 0.4, "item_drop_share": 0.5}


class Naive:
    """The usual way, from a model's parameters: one padded sequence for each prefix, the adaptor at each occurrence."""

    def __init__(self, whole: Whole) -> None:
        self.whole, self.model, self.config = whole, whole.model, whole.model.config

    def item(self, item: int, dropped: bool = False) -> Tensor:
        found = torch.zeros(WIDTH, dtype=torch.float64)
        if self.config.with_text and TEXT_OF[item] < NUM_TEXTS:
            adaptor, words = self.model.adaptor, slice(TEXT_WIDTH, None) if dropped else slice(0, TEXT_WIDTH)
            x = torch.from_numpy(text_vectors()[TEXT_OF[item], words]).double()
            gate = torch.softmax(x @ adaptor.gate, 0)
            for k in range(len(gate)):
                found = found + gate[k] * ((x - adaptor.bias[k]) @ adaptor.weight[k])
        if self.config.with_ids:
            found = found + self.whole.table.weight[item]
        return found

    def state(self, vectors: list[Tensor]) -> Tensor:
        return F.normalize(self.last(vectors), dim=0)

    def last(self, vectors: list[Tensor]) -> Tensor:
        """The last state of a sequence of item vectors, padded on the right to the longest."""
        encoder, n = self.model.encoder, len(vectors)
        longest = len(encoder.positions)
        x = torch.stack(vectors + [torch.zeros(WIDTH, dtype=torch.float64)] * (longest - n)) + encoder.positions
        x = F.layer_norm(x, (WIDTH,), encoder.input_norm.weight, encoder.input_norm.bias, 1e-12)
        hidden = torch.ones(longest, longest, dtype=torch.bool).triu(1) | (torch.arange(longest) >= n)
        for block in encoder.blocks:
            heads, mixed = block.heads, []
            for h, (q, k, v) in enumerate(
                zip(*(part.chunk(heads, 1) for part in block.qkv(x).chunk(3, 1)), strict=True)
            ):
                scores = (q @ k.t()) / math.sqrt(WIDTH / heads)
                mixed.append(torch.softmax(scores.masked_fill(hidden, -torch.inf), 1) @ v)
                assert h < heads
            x = block.attention_norm(x + block.out(torch.cat(mixed, 1)))
            x = block.feedforward_norm(x + block.contract(F.gelu(block.expand(x))))
        return x[n - 1]

    def logits(self, before: list[int], items: list[int]) -> Tensor:
        """Of items after what came before."""
        last = self.last([self.item(i) for i in before])
        raised = self.model.repeats(last)[0] if self.config.repeats else torch.zeros(()).double()
        state = F.normalize(last, dim=0)
        return torch.stack(
            [state @ self.direction(i) / self.config.temperature + raised * (i in before) for i in items]
        )

    def prefixes(self, rows: list[Row]) -> list[tuple[int, list[int], int]]:
        """Number of the row, what comes before, and the target, of every position."""
        longest = len(self.model.encoder.positions)
        found = []
        for row in rows:
            items = row.items[-longest - 1 :]
            found += [(row.number, items[:j], items[j]) for j in range(1, len(items))]
        return found

    def direction(self, item: int) -> Tensor:
        vector = self.item(item)
        return vector if not vector.any() else F.normalize(vector, dim=0)

    def sequence_item(self, rows: list[Row], candidates: list[int] | None, weight: list[float] | None) -> Tensor:
        prefixes, losses = self.prefixes(rows), []
        for _, before, target in prefixes:
            of = [t for _, _, t in prefixes] if candidates is None else candidates
            right, *scores = torch.exp(self.logits(before, [target, *of]))
            others = right
            for i, item in enumerate(of):
                if item != target:
                    others = others + (1.0 if weight is None else weight[i]) * scores[i]
            losses.append(-torch.log(right / others))
        return torch.stack(losses).mean()

    def sequence_sequence(self, rows: list[Row], draws: dict[int, tuple[float, list[float]]]) -> Tensor:
        """One copy of every sequence, cut at each prefix."""
        prefixes, contrast, copies = self.prefixes(rows), self.config.contrast, []
        for number, before, _ in prefixes:
            kind, drops = draws[number]
            if kind < contrast.item_drop_share:
                kept = [self.item(i) for j, i in enumerate(before) if j == 0 or drops[j] >= contrast.item_drop]
            else:
                kept = [self.item(i, dropped=drops[j] < contrast.word_drop) for j, i in enumerate(before)]
            copies.append(self.state(kept))
        losses = []
        for p, (number, before, target) in enumerate(prefixes):
            state = self.state([self.item(i) for i in before])
            right = torch.exp(state @ copies[p] / self.config.temperature)
            others = right
            for c, (other, _, of_other) in enumerate(prefixes):
                if other != number and of_other != target:
                    others = others + torch.exp(state @ copies[c] / self.config.temperature)
            losses.append(-torch.log(right / others))
        return torch.stack(losses).mean()


def same_draws(rows: list[Row], longest: int = 5) -> dict[int, tuple[float, list[float]]]:
    """What `draws_of_rows` draws."""
    found = {}
    for row in rows:
        generator = np.random.default_rng(row.number)
        kind = float(generator.random(1)[0])
        found[row.number] = kind, generator.random(min(len(row.items) - 1, longest)).tolist()
    return found


def compared(loss: str, share: slice = slice(None)) -> dict:
    """What a rank compares with: of the catalogue, or of five items with weights, some part."""
    if loss == "in_batch":
        return {}
    if loss.startswith("full"):
        return {"candidates": EVERY_ITEM[share]}
    return {"candidates": [3, 8, 21, 6, 0][share], "weight": [2.5, 1.0, 4.0, 0.5, 3.0][share]}


def loss_keys(loss: str) -> dict:
    """Keys of the config."""
    return {"loss": loss.partition(",")[0], "repeats": "repeats" in loss}
