"""Softmax over candidates of all ranks: one loss for in-batch, full and sampled negatives.

Position p has a unit state s_p, a positive of unit vector v_p and an identity y_p; candidate c, on whichever rank, a
unit vector v_c, an identity and a weight w_c:

    l_p = -log( exp(s_p v_p / tau) / ( exp(s_p v_p / tau) + Z_p ) ),   Z_p = sum_{c: id_c != y_p} w_c exp(s_p v_c / tau)

* in-batch: a rank's candidates are its distinct targets, w the number of their occurrences: the sum over the global
  batch's other rows, those of the same item left out.
* full: the catalogue with w = 1: softmax cross-entropy over all items.
* sampled: w = 1 / (expected count in the sample), which makes Z an unbiased estimate of the full one (`SampledSoftmax`
  subtracts the logarithm of the same number from the logit).

Over a catalogue or a sample, items that p's sequence has had before may have a logit that is b_p higher (`Earlier`),
p's target too if it is one of them.

Positions are gathered over ranks, each rank adds up its own candidates, and the sums are reduced: no rank sees
another's candidates. Cosines bound the logits by 1 / tau, which is subtracted; no maximum is needed. Scores exist in
chunks of `CHUNK` and, where there are more than `KEPT`, are computed again in backward: memory does not grow with
positions times candidates. A model in bf16 takes the products of chunks in bf16, their exponentials and sums in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .reduction import Reduction

# Scores that exist at a time: what suits the caches of one, and hides the launches of the other.
CHUNK = {"cpu": 2**20, "cuda": 2**24}
# Up to how many scores in all, of 4 bytes, are kept for backward; without them a CPU takes 1.4 times as long.
KEPT = {"cpu": 2**27, "cuda": 2**25}
# Up to it single precision has all whole numbers.
WHOLE = 2**24
# Below it, exp(-2 / tau) is no normal number of single precision.
LEAST_TEMPERATURE = 0.024


class Candidates(NamedTuple):
    """M candidates of this rank.

    Attributes:
        vectors: `[M, H]`, of length 1 (or 0).
        identity: int64 `[M]`.
        weight: `[M]`.
        sequence: int64 `[M]`, number of the sequence that a candidate comes from; None where it comes from none. A
            candidate is no negative of its own sequence's positions.
    """

    vectors: Tensor
    identity: Tensor
    weight: Tensor
    sequence: Tensor | None = None


class Earlier(NamedTuple):
    """What the sequences of P positions had before them.

    Attributes:
        identity: int64 `[P, L]`, -1 where there is nothing; L is the same on all ranks.
        offset: `[P]`, b_p.
    """

    identity: Tensor
    offset: Tensor

    def of_all_ranks(self, most: int, reduction: Reduction) -> Earlier:
        """Those of all ranks' positions; see `of_all_ranks`."""
        return Earlier(of_all_ranks(self.identity, most, reduction, -1), of_all_ranks(self.offset, most, reduction))

    def of(self, identity: Tensor) -> Tensor:
        """What is added to the logits of items int64 `[P]`, one for each position: `[P]`."""
        return torch.where((self.identity == identity[:, None]).any(1), self.offset, 0)


class Term(NamedTuple):
    """One loss over common positions.

    Attributes:
        positives: `[P, H]`, v_p.
        candidates: this rank's.
        own: how much of the weight of candidates with p's identity is p's positive itself; read by `official` only.
        earlier: if those count differently; a rank's candidates are then of different identities.
    """

    positives: Tensor
    candidates: Candidates
    own: float
    earlier: Earlier | None = None


def unit(x: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays one, with a zero gradient. `[n, H]` -> `[n, H]`."""
    squares = x.square().sum(1, keepdim=True)
    some = squares > 0
    return torch.where(some, x * torch.where(some, squares, 1).rsqrt(), 0)


def distinct(vectors: Tensor, identity: Tensor) -> Candidates:
    """The distinct of this rank's targets, weighed by their number; an item's vector is its first occurrence's.

    Args:
        vectors: `[P, H]`.
        identity: int64 `[P]`.
    """
    ordered, order = identity.sort(stable=True)
    found, counts = torch.unique_consecutive(ordered, return_counts=True)
    first = order[counts.cumsum(0) - counts]
    return Candidates(vectors[first], found, counts.to(vectors.dtype))


def of_all_ranks(x: Tensor, most: int, reduction: Reduction, missing: int = 0) -> Tensor:
    """`x` `[n, ...]` of all ranks, rank after rank: `[W * most, ...]`, each with `missing` behind up to `most` rows."""
    padding = (0, 0) * (x.dim() - 1) + (0, most - len(x))
    return reduction.gather(F.pad(x, padding, value=missing)).flatten(0, 1)


def softmax_losses(
    states: Tensor,
    identity: Tensor,
    sequence: Tensor,
    terms: list[Term],
    temperature: float,
    reduction: Reduction,
    official: bool = False,
    products: torch.dtype | None = None,
) -> list[Tensor]:
    """l_p of this rank's positions for every term.

    Args:
        states: `[P, H]`, s_p, at least float32; P differs between ranks and may be 0.
        identity: int64 `[P]`, y_p, not negative.
        sequence: int64 `[P]`, not negative, the number of p's sequence over all ranks.
        terms: as many on every rank.
        temperature: tau, at least `LEAST_TEMPERATURE`.
        reduction: gathers positions and sums over ranks.
        official: keep every other occurrence of y_p in the denominator as exp(0) = 1, as the public code does, which
            sets those logits to 0 where it means to remove them.
        products: of the products of states and candidates, here and in backward; None takes them as they are.

    Returns:
        `[P]` for each term.
    """
    most = reduction.largest(len(states), states.device)
    gathered = of_all_ranks(states, most, reduction)
    identities, sequences = of_all_ranks(torch.stack([identity, sequence], 1), most, reduction, -1).unbind(1)
    sums, same = [], []
    for term in terms:
        candidates, offset, repeats = term.candidates, None, None
        if term.earlier is not None:
            before, offset = term.earlier.of_all_ranks(most, reduction)
            repeats = _repeats(before, candidates.identity)
        of_identity, numbers = _numbered(identities, candidates.identity)
        candidates, of_sequence = candidates._replace(identity=numbers), None
        if candidates.sequence is not None:
            of_sequence, numbers = _numbered(sequences, candidates.sequence)
            candidates = candidates._replace(sequence=numbers)
        pairs = _Pairs(gathered, of_identity, of_sequence, *candidates)
        total, of_same = _Partition.apply(temperature, official, products or states.dtype, repeats, offset, *pairs)
        sums.append(total)
        same.append(of_same)
    totals = reduction.sum(torch.stack(sums))
    weights = reduction.sum(torch.stack(same)) if official else None
    mine = slice(reduction.rank * most, reduction.rank * most + len(states))
    found = []
    for i, term in enumerate(terms):
        positive = ((states * term.positives).sum(1) - 1) / temperature
        if term.earlier is not None:
            positive = positive + term.earlier.of(identity)
        others = totals[i, mine]
        if official:
            others = others + (weights[i, mine] - term.own).clamp_min(0) * math.exp(-1 / temperature)
        # Where there are none the loss is 0, and so is its gradient.
        others = others.clamp_min(torch.finfo(others.dtype).tiny)
        found.append(-F.logsigmoid(positive - others.log()))
    return found


class _Pairs(NamedTuple):
    """Positions and candidates; names as in `Candidates`, `of_` those of positions, keys as `_numbered` has them."""

    states: Tensor
    of_identity: Tensor
    of_sequence: Tensor | None
    vectors: Tensor
    identity: Tensor
    weight: Tensor
    sequence: Tensor | None

    def scores(self, states: Tensor, vectors: Tensor, rows: slice, columns: slice, temperature: float) -> Tensor:
        """exp((s v - 1) / tau) of a chunk, 0 where a candidate is no negative. `states` are s / tau."""
        scores = (states[rows] @ vectors[columns].t()).to(self.states.dtype)
        scores.sub_(1 / temperature).exp_()
        scores.mul_(_differ(self.of_identity[rows], self.identity[columns], scores))
        if self.sequence is not None:
            scores.mul_(_differ(self.of_sequence[rows], self.sequence[columns], scores))
        return scores

    def same(self, rows: slice, columns: slice, weight: Tensor) -> Tensor:
        """Sums of `weight` over a chunk's candidates of the same item from elsewhere."""
        same = 1 - _differ(self.of_identity[rows], self.identity[columns], weight)
        if self.sequence is not None:
            same.mul_(_differ(self.of_sequence[rows], self.sequence[columns], weight))
        return same @ weight[columns]


def _repeats(before: Tensor, identity: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each of `_chunks`, where in it a candidate is one of those before: rows and columns, every pair once.

    Args:
        before: int64 `[P, L]`.
        identity: int64 `[M]`, all different.
    """
    size, number = len(before), len(identity)
    if not size or not number:
        return []
    row, column = matches(before, *identity.sort())
    # An item may have been there twice.
    pair = torch.unique(row * number + column)
    row, column = pair // number, pair % number
    high, wide = _shape(size, number, before.device)
    across = -(-number // wide)
    chunk, order = (row // high * across + column // wide).sort()
    counts = torch.bincount(chunk, minlength=-(-size // high) * across).tolist()
    return list(zip((row[order] % high).split(counts), (column[order] % wide).split(counts), strict=True))


def matches(before: Tensor, ordered: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `before` int64 `[P, L]` and where identities, of which `sort` made `ordered` and `order` `[M]`, have what
    is there; a pair as often as it is there."""
    at = torch.searchsorted(ordered, before).clamp_max(len(ordered) - 1)
    row, event = (ordered[at] == before).nonzero(as_tuple=True)
    return row, order[at[row, event]]


def _differ(of: Tensor, among: Tensor, like: Tensor) -> Tensor:
    """1 where `of[i] != among[j]`, else 0, `[n, m]` of the dtype of `like`, at the speed of floats."""
    return torch.ne(of[:, None], among[None, :], out=like.new_empty(len(of), len(among)))


def _numbered(*keys: Tensor) -> list[Tensor]:
    """int64 keys as floats, equal where they are: CPUs compare floats into floats eight times as fast as integers."""
    found, numbers = torch.unique(torch.cat(keys), return_inverse=True)
    exact = torch.float32 if len(found) <= WHOLE else torch.float64
    return list(numbers.to(exact).split([len(key) for key in keys]))


class _Partition(torch.autograd.Function):
    """Of `_Pairs` `(sum_c w_c exp((s_p v_c - 1) / tau), sum_c w_c)`, both `[P]`: the first over p's negatives, the
    second, 0 if not asked for, over candidates of its item from elsewhere. Matrix products are in `products`. Where
    `repeats` says so, `offset` `[P]` is added to the exponent."""

    @staticmethod
    def forward(ctx, temperature, count_same, products, repeats, offset, *pairs):
        ctx.temperature, ctx.products, ctx.repeats = temperature, products, repeats
        of = _Pairs(*pairs)
        states, vectors = (of.states / temperature).to(products), of.vectors.to(products)
        weight, size = of.weight.to(of.states.dtype), len(of.states)
        total, of_same = (of.states.new_zeros(size) for _ in range(2))
        kept = []
        for i, (rows, columns) in enumerate(_chunks(of.states, of.vectors)):
            scores = of.scores(states, vectors, rows, columns, temperature)
            if offset is not None:
                _raise(scores, repeats[i], offset[rows])
            total[rows] += scores @ weight[columns]
            if count_same:
                of_same[rows] += of.same(rows, columns, weight)
            if size * len(weight) <= KEPT[weight.device.type]:
                kept.append(scores)
        ctx.save_for_backward(offset, *pairs, *kept)
        ctx.mark_non_differentiable(of_same)
        return total, of_same

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):
        offset, *saved = ctx.saved_tensors
        fields = len(_Pairs._fields)
        pairs, kept = _Pairs(*saved[:fields]), saved[fields:]
        of_states, of_vectors = torch.zeros_like(pairs.states), torch.zeros_like(pairs.vectors)
        of_offset = None if offset is None else torch.zeros_like(offset)
        weight = pairs.weight.to(pairs.states.dtype) / ctx.temperature
        states, vectors = pairs.states.to(ctx.products), pairs.vectors.to(ctx.products)
        divided = None if kept else (pairs.states / ctx.temperature).to(ctx.products)
        for i, (rows, columns) in enumerate(_chunks(states, vectors)):
            if kept:
                scores = kept[i]
            else:
                scores = pairs.scores(divided, vectors, rows, columns, ctx.temperature)
                if offset is not None:
                    _raise(scores, ctx.repeats[i], offset[rows])
            scores = (scores * weight[columns]).mul_(gradient[rows, None])
            if offset is not None:
                row, column = ctx.repeats[i]
                of_offset[rows].index_add_(0, row, scores[row, column], alpha=ctx.temperature)
            scores = scores.to(ctx.products)
            of_states[rows] += scores @ vectors[columns]
            of_vectors[columns] += scores.t() @ states[rows]
        return None, None, None, None, of_offset, of_states, None, None, of_vectors, None, None, None


def _raise(scores: Tensor, at: tuple[Tensor, Tensor], offset: Tensor) -> None:
    """Multiply a chunk's scores at rows and columns, each pair there once, by exp(offset of the row)."""
    row, column = at
    scores[row, column] = scores[row, column] * offset[row].exp()


def _chunks(states: Tensor, vectors: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of states and vectors with at most `CHUNK` scores each."""
    high, wide = _shape(len(states), len(vectors), states.device)
    for row in range(0, len(states), high):
        for column in range(0, len(vectors), wide):
            yield slice(row, row + high), slice(column, column + wide)


def _shape(states: int, vectors: int, device: torch.device) -> tuple[int, int]:
    most = CHUNK[device.type]
    wide = max(min(vectors, math.isqrt(most)), 1)
    return max(most // wide, 1), wide
