"""The sharded softmax and the ranks of targets, against dense matrices; augmented copies against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ranks import ThreadReduction, Wire, run_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from dist_rec.config import ContrastConfig
from dist_rec.layers import contrastive
from dist_rec.layers.augment import Draws, augment
from dist_rec.layers.causal import Sequences
from dist_rec.layers.contrastive import Candidates, Earlier, Term, distinct, softmax_losses, unit
from dist_rec.layers.reduction import Reduction, masked_means
from dist_rec.layers.target_ranks import Seen, target_ranks

pytestmark = pytest.mark.usefixtures("doubles")
TAU = 0.3


def units(n: int, width: int = 5) -> Tensor:
    return F.normalize(torch.randn(n, width), dim=1)


def loss_of(states: Tensor, identity: Tensor, term: Term, official: bool = False, sequence=None) -> Tensor:
    sequence = torch.arange(len(states)) if sequence is None else sequence
    return softmax_losses(states, identity, sequence, [term], TAU, Reduction(), official)[0]


def test_full_softmax_is_torchs_cross_entropy_on_the_dense_logits():
    states, vectors, identity = units(9).requires_grad_(), units(20).requires_grad_(), torch.randint(0, 20, (9,))
    catalogue = Candidates(vectors, torch.arange(20), torch.ones(20))
    found = loss_of(states, identity, Term(vectors[identity], catalogue, 0.0))
    expected = F.cross_entropy(states @ vectors.t() / TAU, identity, reduction="none")
    torch.testing.assert_close(found, expected)
    gradient = torch.autograd.grad(found.sum(), [states, vectors])
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), [states, vectors]))


def test_a_sample_of_all_items_with_weight_one_is_the_full_softmax_and_weights_are_logarithms_of_logits():
    states, vectors, identity = units(9), units(20), torch.randint(0, 20, (9,))
    positives = vectors[identity]
    full = loss_of(states, identity, Term(positives, Candidates(vectors, torch.arange(20), torch.ones(20)), 0.0))
    order = torch.randperm(20)
    sampled = loss_of(states, identity, Term(positives, Candidates(vectors[order], order, torch.ones(20)), 0.0))
    torch.testing.assert_close(sampled, full)
    chosen, weight = order[:7], torch.rand(7) + 0.5
    sampled = loss_of(states, identity, Term(positives, Candidates(vectors[chosen], chosen, weight), 0.0))
    for p in range(9):
        others = chosen != identity[p]
        logits = states[p] @ vectors[chosen[others]].t() / TAU + weight[others].log()
        right = states[p] @ positives[p] / TAU
        torch.testing.assert_close(sampled[p], torch.logsumexp(torch.cat([logits, right[None]]), 0) - right)


def test_distinct_targets_weigh_as_often_as_they_occur():
    vectors, identity = units(5), torch.tensor([7, 3, 7, 7, 1])
    vectors[2] = vectors[3] = vectors[0]
    found = distinct(vectors, identity)
    assert found.identity.tolist() == [1, 3, 7] and found.weight.tolist() == [1, 1, 3]
    torch.testing.assert_close(found.vectors, vectors[[4, 1, 0]])
    assert len(distinct(vectors[:0], identity[:0]).identity) == 0


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("by_sequence", [False, True])
def test_in_batch_is_the_sum_over_other_rows_that_are_negatives(by_sequence, official):
    """Row by row; officially every other row with the same target is exp(0), of the same sequence excepted."""
    states, positives = units(12), units(12)
    identity, sequence = torch.randint(0, 5, (12,)), torch.randint(0, 4, (12,))
    # One vector an item, unless candidates are states.
    positives = positives if by_sequence else positives[identity]
    if by_sequence:
        term = Term(positives, Candidates(positives, identity, torch.ones(12), sequence), 0.0)
    else:
        term = Term(positives, distinct(positives, identity), 1.0)
    found = loss_of(states, identity, term, official, sequence)
    for p in range(12):
        right = math.exp(float(states[p] @ positives[p]) / TAU)
        total = right
        for c in set(range(12)) - {p}:
            if by_sequence and sequence[c] == sequence[p]:
                continue
            if identity[c] != identity[p]:
                total += math.exp(float(states[p] @ positives[c]) / TAU)
            elif official:
                total += 1.0
        assert float(found[p]) == pytest.approx(-math.log(right / total), rel=1e-9)


def test_official_duplicates_by_hand():
    """Two rows with one target, both at cosine 1: exp(1 / tau) against itself and exp(0)."""
    vectors, identity = torch.eye(3)[:1].expand(2, 3), torch.tensor([4, 4])
    term = Term(vectors, distinct(vectors, identity), 1.0)
    e = math.exp(1 / TAU)
    torch.testing.assert_close(loss_of(vectors, identity, term, True), torch.full((2,), math.log((e + 1) / e)))
    assert loss_of(vectors, identity, term).abs().max() < 1e-12


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_chunks_change_nothing(monkeypatch, chunk):
    states, vectors, positives = units(30).requires_grad_(), units(23).requires_grad_(), units(30)
    identity, candidate, weight = torch.randint(0, 9, (30,)), torch.randint(0, 9, (23,)), torch.rand(23)
    sequence, origin = torch.randint(0, 4, (30,)), torch.randint(0, 4, (23,))
    found = []
    for size, kept in ((30 * 23, 10**6), (chunk, 10**6), (chunk, 0)):
        monkeypatch.setitem(contrastive.CHUNK, "cpu", size)
        monkeypatch.setitem(contrastive.KEPT, "cpu", kept)
        term = Term(positives, Candidates(vectors, candidate, weight, origin), 0.5)
        loss = loss_of(states, identity, term, True, sequence)
        catalogue = Candidates(vectors, torch.arange(23), weight)
        ranks = target_ranks(states, positives, identity, catalogue, Reduction())
        found.append([loss, *torch.autograd.grad(loss.square().sum(), [states, vectors]), ranks])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


@pytest.mark.parametrize("chunk", [1, 7, 50, 10**6])
@pytest.mark.parametrize("kept", [0, 10**6])
def test_what_came_before_is_raised_once_in_whichever_chunk(monkeypatch, chunk, kept):
    """An item twice before, the target itself, items that are no candidates, positions without anything before."""
    monkeypatch.setitem(contrastive.CHUNK, "cpu", chunk)
    monkeypatch.setitem(contrastive.KEPT, "cpu", kept)
    states, vectors, offset = units(30).requires_grad_(), units(23).requires_grad_(), torch.randn(30).requires_grad_()
    items, identity, before = torch.randperm(40)[:23], torch.randint(0, 23, (30,)), torch.randint(-1, 40, (30, 6))
    before[3] = -1
    before[4, :2], before[5, 2] = items[7], items[identity[5]]
    term = Term(vectors[identity], Candidates(vectors, items, torch.ones(23)), torch.inf, Earlier(before, offset))
    found = loss_of(states, items[identity], term)
    raised = (before[:, :, None] == items).any(1)
    logits = states @ vectors.t() / TAU + raised * offset[:, None]
    expected = F.cross_entropy(logits, identity, reduction="none")
    torch.testing.assert_close(found, expected)
    inputs = [states, vectors, offset]
    gradient = torch.autograd.grad(found.square().sum(), inputs)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), inputs))
    earlier = Earlier(before, offset.detach() * TAU)
    ranks = target_ranks(states, vectors[identity], items[identity], term.candidates, Reduction(), None, earlier)
    right = logits.gather(1, identity[:, None])
    assert ranks.tolist() == (1 + (logits > right).sum(1)).tolist()


@pytest.mark.parametrize("kept", [0, 100])
def test_gradients_of_chunks_are_right(monkeypatch, kept):
    monkeypatch.setitem(contrastive.KEPT, "cpu", kept)
    monkeypatch.setitem(contrastive.CHUNK, "cpu", 6)
    identity, candidate = torch.tensor([0, 1, 2, 1, 5]), torch.tensor([1, 4, 2, 7])
    sequence, origin = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([1, 2, 0, 0])

    def loss(states, positives, vectors, origin):
        term = Term(positives, Candidates(vectors, candidate, torch.tensor([1.0, 2.0, 0.5, 1.0]), origin), 0.0)
        return loss_of(states, identity, term, False, sequence)

    inputs = [units(5).requires_grad_(), units(5).requires_grad_(), units(4).requires_grad_()]
    assert torch.autograd.gradcheck(loss, (*inputs, None))
    assert torch.autograd.gradcheck(loss, (*inputs, origin))


def test_scores_are_never_all_there_at_once(monkeypatch):
    monkeypatch.setitem(contrastive.CHUNK, "cpu", 64)
    monkeypatch.setitem(contrastive.KEPT, "cpu", 1000)
    largest, plain = [], contrastive._Pairs.scores

    def watched(self, *args):
        found = plain(self, *args)
        largest.append(found.numel())
        return found

    monkeypatch.setattr(contrastive._Pairs, "scores", watched)
    states, vectors = units(40).requires_grad_(), units(100).requires_grad_()
    term = Term(units(40), Candidates(vectors, torch.arange(100), torch.ones(100)), 0.0)
    loss = loss_of(states, torch.randint(0, 100, (40,)), term)
    loss.sum().backward()
    # Forward, and again in backward.
    assert sum(largest) == 2 * 40 * 100 and max(largest) <= 64


def test_keys_beyond_what_single_precision_counts_stay_apart(monkeypatch):
    """Ids are any int64; neighbours beyond 2^24, and as many different ones, are different still."""
    states, vectors = units(40), units(60)
    identity, near = torch.randint(0, 60, (40,)), 2**62
    found = []
    for offset, whole in ((0, contrastive.WHOLE), (near, contrastive.WHOLE), (near, 8)):
        monkeypatch.setattr(contrastive, "WHOLE", whole)
        candidates = Candidates(vectors, torch.arange(60) + offset, vectors.new_ones(60))
        found.append(loss_of(states, identity + offset, Term(vectors[identity], candidates, torch.inf)))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_least_temperature_is_exact_in_single_precision():
    """The positive and all negatives as far away as can be."""
    states = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    vectors = F.normalize(torch.tensor([[-1.0, 0.0], [-1.0, 0.01], [-1.0, 0.03]]), dim=1)
    identity, tau = torch.tensor([0, 1]), contrastive.LEAST_TEMPERATURE
    expected = F.cross_entropy(states @ vectors.t() / tau, identity, reduction="none")
    assert expected.max() > 0.5
    s, v = states.float(), vectors.float()
    term = Term(v[identity], Candidates(v, torch.arange(3), s.new_ones(3)), 0.0)
    found = softmax_losses(s, identity, identity, [term], tau, Reduction())[0]
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [contrastive.KEPT["cpu"], 0], ids=["kept", "computed again"])
def test_products_in_half_precision_are_near_and_reduce_in_single(monkeypatch, kept):
    monkeypatch.setitem(contrastive.KEPT, "cpu", kept)
    states, vectors = units(50).float().requires_grad_(), units(80).float().requires_grad_()
    identity, found = torch.randint(0, 80, (50,)), []
    for products in (None, torch.bfloat16):
        term = Term(vectors[identity], Candidates(vectors, torch.arange(80), vectors.new_ones(80)), torch.inf)
        loss = softmax_losses(states, identity, identity, [term], TAU, Reduction(), products=products)[0]
        found.append((loss, *torch.autograd.grad(loss.sum(), (states, vectors))))
    for exact, near in zip(*found, strict=True):
        assert near.dtype == torch.float32 and not torch.equal(exact, near)
        assert (near - exact).norm() < 0.01 * exact.norm()


def test_nothing_to_compare_with_is_a_loss_of_nothing():
    s = units(3).float().requires_grad_()
    term = Term(units(3).float(), Candidates(s[:0], torch.arange(0), s[:0, 0]), 0.0)
    loss = softmax_losses(s, torch.arange(3), torch.arange(3), [term], TAU, Reduction())[0]
    loss.sum().backward()
    assert loss.max() < 1e-30 and s.grad.isfinite().all() and s.grad.abs().max() < 1e-30


class Sharded(nn.Module):
    """States and candidates of all ranks; a batch says which of them are this rank's."""

    def __init__(self) -> None:
        super().__init__()
        self.states, self.vectors = nn.Parameter(units(11)), nn.Parameter(units(17))
        self.identity, self.reduction = torch.randint(0, 17, (11,)), Reduction()
        self.model = self

    def forward(self, mine: tuple[Tensor, Tensor]) -> dict:
        rows, columns = mine
        identity = self.identity[rows]
        catalogue = Candidates(self.vectors[columns], columns, torch.ones(len(columns)))
        states, positives = self.states[rows], self.vectors[identity]
        terms = [Term(positives, catalogue, 0.0), Term(positives, distinct(positives, identity), 1.0)]
        losses = softmax_losses(states, identity, rows, terms, TAU, self.reduction, official=True)
        local, means = masked_means(torch.stack(losses, 1), torch.ones(len(rows), 2, dtype=torch.bool), self.reduction)
        return {"loss": local @ torch.tensor([1.0, 0.5]), "means": means}


def test_ranks_share_positions_and_candidates_unevenly():
    whole = Sharded()
    one = whole((torch.arange(11), torch.arange(17)))
    one["loss"].backward()
    parts = [(slice(0, 7), slice(0, 0)), (slice(7, 7), slice(0, 12)), (slice(7, 11), slice(12, 17))]
    mean, outputs = run_ranks(whole, [(torch.arange(11)[r], torch.arange(17)[c]) for r, c in parts])
    torch.testing.assert_close(mean, {n: p.grad for n, p in whole.named_parameters()})
    for output in outputs:
        torch.testing.assert_close(output["means"], one["means"])


def dense_ranks(states, targets, identity, vectors, candidate, seen) -> list[float]:
    found = []
    for b in range(len(states)):
        score, rank = float(states[b] @ targets[b]), 1.0
        for vector, c in zip(vectors, candidate.tolist(), strict=True):
            if c == int(identity[b]) or c in seen[b]:
                continue
            other = float(states[b] @ vector)
            rank += 0.5 if abs(other - score) < 1e-9 else float(other > score)
        found.append(rank)
    return found


@pytest.mark.parametrize("mask", [False, True])
def test_ranks_count_ties_half_and_leave_out_what_was_seen(mask):
    vectors, candidate = units(15), torch.randperm(40)[:15]
    vectors[3] = vectors[8] = vectors[11]
    # Some targets are of the catalogue, as the tied ones; some are not.
    chosen = torch.tensor([3, 8, 11, 0, 14, 2])
    targets, identity = vectors[chosen].clone(), candidate[chosen].clone()
    identity[4:] = torch.tensor([97, 98])
    states = units(6)
    lists = [candidate[:4].tolist(), [], [int(candidate[8]), 96], [95], candidate.tolist(), [int(identity[5])]]
    seen = Seen(torch.tensor(sum(lists, [])), torch.tensor([len(x) for x in lists])) if mask else None
    found = target_ranks(states, targets, identity, Candidates(vectors, candidate, torch.ones(15)), Reduction(), seen)
    expected = dense_ranks(states, targets, identity, vectors, candidate, lists if mask else [[]] * 6)
    assert found.tolist() == expected and found.dtype == torch.float64
    assert any(rank % 1 for rank in expected)


def test_a_score_that_is_no_number_ranks_last():
    vectors = units(5)
    candidates = Candidates(vectors, torch.arange(5), torch.ones(5))
    states = torch.full((2, 5), torch.nan)
    assert target_ranks(states, vectors[:2], torch.arange(2), candidates, Reduction()).tolist() == [5, 5]
    vectors[3] = torch.nan
    assert float(target_ranks(vectors[:1], vectors[:1], torch.arange(1), candidates, Reduction())[0]) == 2


def test_unit_vectors_have_finite_gradients_at_zero():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    unit(x).sum().backward()
    torch.testing.assert_close(unit(x), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert x.grad.isfinite().all() and not x.grad[1].any()
    assert torch.autograd.gradcheck(unit, torch.randn(4, 3, requires_grad=True))


def sequences(*lengths: int) -> Sequences:
    length = torch.tensor(lengths)
    row = torch.repeat_interleave(torch.arange(len(lengths)), length)
    return Sequences(length, row, torch.cat([torch.arange(n) for n in lengths]))


def test_item_drop_keeps_the_first_and_pairs_with_the_last_kept():
    config = ContrastConfig(item_drop=0.5, item_drop_share=1.0)
    some = sequences(5, 0, 3)
    events = torch.tensor([0.1, 0.9, 0.2, 0.3, 0.8, 0.0, 0.1, 0.6])
    copy = augment(some, Draws(torch.zeros(3), events), config, True, False)
    assert copy.kept.tolist() == [True, True, False, False, True, True, False, True]
    assert copy.partner.tolist() == [0, 1, 1, 1, 2, 3, 3, 4] and copy.paired.all() and not copy.words.any()
    kept = some.keep(copy.kept)
    assert kept.length.tolist() == [3, 0, 2] and kept.row.tolist() == [0, 0, 0, 2, 2]
    assert kept.position.tolist() == [0, 1, 2, 0, 1]


def test_each_sequence_draws_its_own_kind_and_words_keep_all_items():
    config = ContrastConfig(item_drop=0.5, word_drop=0.4, item_drop_share=0.7)
    events = torch.tensor([0.1, 0.1, 0.6, 0.1, 0.1, 0.6])
    copy = augment(sequences(3, 3), Draws(torch.tensor([0.6, 0.8]), events), config, True, False)
    assert copy.kept.tolist() == [True, False, True, True, True, True]
    assert copy.words.tolist() == [False, False, False, True, True, False]
    # The public code lets the first draw decide for all.
    copy = augment(sequences(3, 3), Draws(torch.tensor([0.8, 0.6]), events), config, True, True)
    assert copy.kept.all() and copy.words.tolist() == [True, True, False] * 2


def public_item_drop(items: Tensor, mask: Tensor) -> list[int]:
    """What the public code makes of one padded sequence: `scatter`, on the CPU, where the last write stays."""
    mask = mask.clone()
    mask[0] = True
    index = torch.cumsum(mask, 0) - 1
    copy = np.zeros(len(items), np.int64)
    for i, item in zip(index.tolist(), items.tolist(), strict=True):
        copy[i] = item
    return copy[: int(index[-1]) + 1].tolist()


def test_official_item_drop_overwrites_as_the_public_code_does():
    items, mask = torch.arange(11, 16), torch.tensor([True, False, True, False, True])
    assert public_item_drop(items, mask) == [12, 14, 15]
    config = ContrastConfig(item_drop=0.5, item_drop_share=1.0)
    for n in (1, 2, 5, 9):
        events = torch.rand(n)
        copy = augment(sequences(n), Draws(torch.zeros(1), events), config, True, True)
        assert torch.arange(n)[copy.kept].tolist() == public_item_drop(torch.arange(n), events >= 0.5)
    copy = augment(
        sequences(5, 2), Draws(torch.zeros(2), torch.tensor([0.9, 0.1, 0.9, 0.1, 0.9, 0.9, 0.1])), config, True, True
    )
    assert copy.kept.tolist() == [False, True, False, True, True, False, True]
    assert copy.paired.tolist() == [False, True, True, True, True, False, True]
    assert copy.partner[copy.paired].tolist() == [0, 0, 1, 2, 3]


def test_shares_are_what_the_config_says():
    config, some = ContrastConfig(), sequences(*[20] * 2000)
    copy = augment(some, Draws(torch.rand(2000), torch.rand(40_000)), config, True, False)
    dropping = (~copy.kept).view(2000, 20)
    assert float(dropping[:, 1:].double().mean()) == pytest.approx(0.9 * 0.2, abs=0.01)
    words = copy.words.view(2000, 20).any(1)
    assert not (words & dropping.any(1)).any()
    assert float(copy.words.double().mean()) == pytest.approx(0.1 * 0.2, abs=0.005)


def test_ranks_of_targets_over_threads_that_stand_for_ranks():
    import threading

    states, vectors, identity = units(7), units(9), torch.tensor([0, 3, 8, 2, 5, 5, 1])
    targets, ones = vectors[identity], torch.ones(9)
    lists = [[1, 2], [4], [], [0, 8], [3], [], [7, 6, 5]]
    wire, found = Wire(2), [None, None]
    parts = [(slice(0, 5), slice(0, 2)), (slice(5, 7), slice(2, 9))]

    def work(rank: int) -> None:
        rows, columns = parts[rank]
        mine = lists[rows]
        seen = Seen(torch.tensor(sum(mine, [])), torch.tensor([len(x) for x in mine]))
        candidates = Candidates(vectors[columns], torch.arange(9)[columns], ones[columns])
        reduction = ThreadReduction(wire, rank)
        found[rank] = target_ranks(states[rows], targets[rows], identity[rows], candidates, reduction, seen)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = dense_ranks(states, targets, identity, vectors, torch.arange(9), lists)
    assert torch.cat(found).tolist() == expected
