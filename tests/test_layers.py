"""Each layer against a loop over rows, and the promises of masks, absences and global statistics."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from dist_rec.config import BodyConfig, HistoryConfig
from dist_rec.layers.adaptation import DomainAdaptation
from dist_rec.layers.divergence import js_divergence, mmd
from dist_rec.layers.experts import ExpertBody
from dist_rec.layers.features import row_texts
from dist_rec.layers.gating import AspectGate
from dist_rec.layers.moves import place, take
from dist_rec.layers.per_domain import PerDomainLinear, per_domain_linear, sort_by_domain
from dist_rec.layers.reduction import Reduction, masked_means
from dist_rec.layers.sequence import HistoryEncoder

pytestmark = pytest.mark.usefixtures("doubles")
K = 3


def _sorted_rows(sizes: list[int], width: int):
    domain = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return torch.randn(len(domain), width), domain, torch.tensor(sizes)


def test_take_and_place_are_exact_gradients():
    x, index = torch.randn(7, 3, requires_grad=True), torch.tensor([4, 0, 6])
    assert torch.equal(take(x, index), x[index])
    assert torch.equal(place(take(x, index), index, 7)[[1, 2]], torch.zeros(2, 3))
    assert torch.autograd.gradcheck(lambda x: place(take(x, index).exp(), index + 1, 9), x)


def test_sort_by_domain_is_stable_and_counts_absent_domains():
    order, sizes = sort_by_domain(torch.tensor([2, 0, 2, 0]), K)
    assert order.tolist() == [1, 3, 0, 2] and sizes.tolist() == [2, 0, 2]


@pytest.mark.parametrize("sizes", [[3, 0, 2], [0, 0, 0]])
def test_per_domain_linear_equals_a_loop_over_rows(sizes):
    _, domain, counts = _sorted_rows(sizes, 1)
    x = torch.randn(len(domain), 2, 4, requires_grad=True)
    layer = PerDomainLinear(K, 4, 5, stack=2)
    y = layer(x, counts)
    for b, k in enumerate(domain.tolist()):
        for s in range(2):
            torch.testing.assert_close(y[b, s], x[b, s] @ layer.weight[k, s] + layer.bias[k, s])
    assert torch.autograd.gradcheck(lambda *a: per_domain_linear(*a, counts), (x, layer.weight, layer.bias))
    with pytest.raises(ValueError, match="rows"):
        layer(x, counts + 1)


def test_absent_domain_has_zero_gradient():
    x, _, counts = _sorted_rows([3, 0, 2], 4)
    layer = PerDomainLinear(K, 4, 5)
    layer(x[:, None], counts).sum().backward()
    assert layer.weight.grad[1].abs().max() == 0 and layer.bias.grad[1].abs().max() == 0
    assert layer.weight.grad[0].abs().max() > 0


@pytest.mark.parametrize("outputs", [0, 7])
def test_adaptation_is_the_domains_own_map_of_x_and_domain_embedding(outputs):
    x, domain, counts = _sorted_rows([3, 1, 2], 6)
    embedding = torch.randn(K, 4)
    layer = DomainAdaptation(K, 6, 4, outputs)
    y = layer(x, embedding, counts)
    for b, k in enumerate(domain.tolist()):
        whole = torch.cat([layer.weight[k, 0], layer.domain_weight[k]])
        torch.testing.assert_close(y[b], torch.cat([x[b], embedding[k]]) @ whole + layer.bias[k])
    spread = (layer.weight - layer.weight.mean(0)).norm() / layer.weight.norm()
    assert spread < 0.3, "adaptation starts near one map for all domains"


@pytest.mark.parametrize("kind", ["mean", "cls", "domain"])
def test_gate_weighs_present_aspects_only(kind):
    B, A, H = 6, 3, 4
    aspects, domain, keys = torch.randn(B, A, H), torch.arange(B) % K, torch.randn(K, H)
    present = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]]).bool()
    gate = AspectGate(kind, H, K)
    out, weights = gate(aspects, present, F.one_hot(domain, K).to(aspects), keys[domain])
    for b in range(B):
        there = present[b].nonzero()[:, 0]
        if not len(there):
            torch.testing.assert_close(out[b], gate.null[domain[b]])
            assert (weights[b] == 0).all()
            continue
        key = {"mean": torch.zeros(H), "domain": keys[domain[b]]}.get(kind)
        key = gate.cls if key is None else key
        w = torch.softmax(aspects[b, there] @ key, 0)
        torch.testing.assert_close(out[b], w @ aspects[b, there])
        torch.testing.assert_close(weights[b, there], w)
        assert (weights[b, ~present[b]] == 0).all()


@pytest.mark.parametrize("kind", ["mean", "cls", "domain"])
def test_gate_without_any_aspect_is_the_null_vector_and_has_gradients(kind):
    gate = AspectGate(kind, 4, K)
    domain = F.one_hot(torch.tensor([1, 1]), K).double()
    out, _ = gate(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool), domain, torch.randn(2, 4))
    torch.testing.assert_close(out, gate.null[[1, 1]])
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gate.parameters())


def _loop_mlp(mlp, x, k, s, g=0):
    """Row x through perceptron s (of input group g) of domain k."""
    copies = mlp.stack // mlp.layers[0].weight.shape[1]
    for i, layer in enumerate(mlp.layers):
        w, b = (layer.weight[k, s], layer.bias[k, s]) if i else (layer.weight[k, g], layer.bias[k, g])
        if i == 0:
            w, b = w.chunk(copies, -1)[s - g * copies], b.chunk(copies, -1)[s - g * copies]
        x = x @ w + b
        if mlp.activate_last or i + 1 < len(mlp.layers):
            x = F.relu(x)
    return x


def _loop_level(level, common, own, k):
    """PLE or MMoE level on one row: `common` [in], `own` [G, in]."""
    shared = [_loop_mlp(level.shared, common, 0, e) for e in range(level.num_shared)]
    P, G = level.num_specific, level.groups
    owner = 0 if level.by_task else k
    specific = [
        [_loop_mlp(level.specific, own[g], owner, g * P + p, g) for p in range(P)] if P else [] for g in range(G)
    ]
    seen, mixtures = P + level.num_shared, []
    for m in range(level.mixtures):
        g, i = divmod(m, level.mixtures // G)
        scores = own[g] @ level.gate.weight[k, g] + level.gate.bias[k, g]
        w = torch.softmax(scores[i * seen : (i + 1) * seen], 0)
        mixtures.append(sum(a * y for a, y in zip(w, specific[g] + shared, strict=True)))
    if not level.last:
        scores = common @ level.shared_gate.weight[k, 0] + level.shared_gate.bias[k, 0]
        everyone = [y for group in specific for y in group] + shared
        common = sum(a * y for a, y in zip(torch.softmax(scores, 0), everyone, strict=True))
    return common, torch.stack(mixtures)


BODIES = {
    "shared_bottom": BodyConfig(kind="shared_bottom", expert_hidden=[8, 5], tower_hidden=[4]),
    "mmoe": BodyConfig(kind="mmoe", experts=3, expert_hidden=[8, 5], tower_hidden=[4, 3]),
    "ple-domain": BodyConfig(kind="ple", experts=2, specific_experts=3, levels=2, expert_hidden=[8, 5]),
    "ple-task": BodyConfig(
        kind="ple", experts=2, specific_experts=3, specific_to="task", levels=3, expert_hidden=[5], tower_hidden=[]
    ),
}


@pytest.mark.parametrize("name", list(BODIES))
def test_body_equals_a_loop_over_rows_and_absent_domains_have_gradients(name):
    x, domain, counts = _sorted_rows([3, 0, 2], 6)
    body = ExpertBody(BODIES[name], 6, K, num_tasks=2)
    logits = body(x, counts)
    for b, k in enumerate(domain.tolist()):
        common, own = x[b], x[b][None].expand(body.groups, -1)
        for level in body.levels:
            if name == "shared_bottom":
                own = _loop_mlp(level.bottom, common, 0, 0)[None].expand(2, -1)
            else:
                common, own = _loop_level(level, common, own, k)
        for t in range(2):
            torch.testing.assert_close(logits[b, t], _loop_mlp(body.towers, own[t], k, t, t)[0])
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in body.parameters())


# --- history ---------------------------------------------------------------------------------


def _reference_history(encoder, events):
    """One row: `events` [n, H] projected, oldest first."""
    n = len(events)
    if n == 0:
        return encoder.empty
    if encoder.transforms:
        x = encoder.input_norm(events + encoder.positions[torch.arange(n).flip(0)])
        for block in encoder.blocks:
            q, k, v = block.qkv(block.attention_norm(x)).chunk(3, 1)
            heads = []
            for qh, kh, vh in zip(*(t.chunk(block.heads, 1) for t in (q, k, v)), strict=True):
                heads.append(torch.softmax(qh @ kh.T / math.sqrt(qh.shape[1]), 1) @ vh)
            x = x + block.out(torch.cat(heads, 1))
            x = x + block.contract(F.gelu(block.expand(block.feedforward_norm(x))))
        events = encoder.output_norm(x)
    return events[-1] if encoder.pooling == "last" else events.mean(0)


@pytest.mark.parametrize("kind", ["mean", "transformer"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("cap", [3, 9])
def test_history_equals_a_loop_over_rows(kind, pooling, cap):
    H = 8
    config = HistoryConfig(kind=kind, pooling=pooling, layers=2, heads=2, max_length=cap, dropout=0.0)
    encoder = HistoryEncoder(config, H, dims=[4], has_text=False)
    lengths = torch.tensor([2, 0, 5, 1, 0])
    values = torch.randn(8, 4)
    out = encoder([values], [lengths])
    for b, rows in enumerate(values.split(lengths.tolist())):
        torch.testing.assert_close(out[b], _reference_history(encoder, encoder.projections[0](rows[-cap:])))


def test_several_history_features_are_aligned_at_the_newest_event():
    H = 8
    config = HistoryConfig(heads=2, max_length=4, dropout=0.0)
    encoder = HistoryEncoder(config, H, dims=[4, 3], has_text=True)
    lengths = [torch.tensor(n) for n in ([5, 2, 0], [3, 2, 0], [5, 0, 1])]
    values = [torch.randn(int(n.sum()), d) for n, d in zip(lengths, (4, 3, H), strict=True)]
    out = encoder(values, lengths)
    for b in range(3):
        n = min(max(int(x[b]) for x in lengths), 4)
        events = torch.zeros(n, H)
        for f in range(3):
            rows = values[f].split(lengths[f].tolist())[b][-4:]
            added = rows if f == 2 else encoder.projections[f](rows)
            events[n - len(rows) :] += added
        torch.testing.assert_close(out[b], _reference_history(encoder, events))


@pytest.mark.parametrize("kind", ["mean", "transformer"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_events_at_all_gives_zero_gradients(kind, pooling, rows):
    config = HistoryConfig(kind=kind, pooling=pooling, heads=2)
    encoder = HistoryEncoder(config, 8, dims=[4, 3], has_text=True)
    values = [torch.zeros(0, d, requires_grad=True) for d in (4, 3, 8)]
    out = encoder(values, [torch.zeros(rows, dtype=torch.int64)] * 3)
    out.sum().backward()
    torch.testing.assert_close(out, encoder.empty.expand(rows, -1))
    for name, p in encoder.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert name == "empty" or p.grad.abs().max() == 0, name


def test_row_texts_reads_zeros_where_there_is_no_text():
    texts = torch.randn(2, 4, requires_grad=True)
    out = row_texts(texts, torch.tensor([1, 0, 1]), torch.tensor([1, 0, 1, 1]))
    torch.testing.assert_close(out, torch.stack([texts[1], torch.zeros(4), texts[0], texts[1]]))
    out.sum().backward()
    assert texts.grad.tolist() == [[1.0] * 4, [2.0] * 4]
    empty = torch.zeros(0, 4, requires_grad=True)
    row_texts(empty, torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)).sum().backward()
    assert empty.grad.shape == (0, 4)


# --- losses and divergences ------------------------------------------------------------------


def test_masked_means_ignore_whatever_masked_rows_hold():
    terms = torch.tensor([[1.0, 5.0], [3.0, torch.nan], [torch.inf, 7.0]], requires_grad=True)
    valid = torch.tensor([[True, False], [True, False], [False, False]])
    local, value = masked_means(terms, valid, Reduction())
    assert local.tolist() == [2.0, 0.0] and value.tolist() == [2.0, 0.0]
    local.sum().backward()
    assert terms.grad.tolist() == [[0.5, 0.0], [0.5, 0.0], [0.0, 0.0]]


def _loop_js(x, domain, valid, num_domains):
    p = {k: torch.softmax(x[(domain == k) & valid], 1).mean(0) for k in range(num_domains)}
    p = {k: v for k, v in p.items() if not v.isnan().any()}
    entropy = lambda q: -(q * q.log()).sum()  # noqa: E731
    pairs = [(p[i], p[j]) for i in p for j in p if i < j]
    return sum(entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2 for a, b in pairs) / len(pairs)


def _loop_mmd(x, domain, valid, num_domains, kernels):
    groups = [x[(domain == k) & valid] for k in range(num_domains)]
    groups = [g for g in groups if len(g) >= 2]
    pool = torch.cat(groups)
    median = torch.pdist(pool.detach()).square().median()

    def k(a, b):
        d = (a - b).square().sum()
        return sum(torch.exp(-d / (median * 2 ** (m - (kernels - 1) / 2))) for m in range(kernels)) / kernels

    def within(g):
        n = len(g)
        return sum(k(g[i], g[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    def across(g, h):
        return sum(k(a, b) for a in g for b in h) / (len(g) * len(h))

    pairs = [(g, h) for i, g in enumerate(groups) for h in groups[i + 1 :]]
    return sum(within(g) + within(h) - 2 * across(g, h) for g, h in pairs) / len(pairs)


def _divergence(kind, x, domain, valid, row, samples=64):
    if kind == "js":
        return js_divergence(x, domain, valid, 4, Reduction())
    return mmd(x, domain, valid, row, 4, samples, 3, Reduction())


@pytest.fixture
def points():
    domain = torch.tensor([0, 1, 0, 3, 1, 0, 3, 1, 3, 0, 1, 3, 2])
    valid = torch.ones(13, dtype=torch.bool)
    valid[[5, 12]] = False  # domain 2 has masked rows only
    x = torch.randn(13, 4) + domain[:, None]
    x[5] = torch.inf
    return x, domain, valid, torch.randperm(1000)[:13]


@pytest.mark.parametrize("kind", ["js", "mmd"])
def test_divergence_equals_a_loop_over_pairs(kind, points):
    x, domain, valid, row = points
    x.requires_grad_()
    value = _divergence(kind, x, domain, valid, row)
    expected = _loop_js(x, domain, valid, 4) if kind == "js" else _loop_mmd(x, domain, valid, 4, 3)
    torch.testing.assert_close(value, expected)
    grads = [torch.autograd.grad(v, x, retain_graph=True)[0] for v in (value, expected)]
    torch.testing.assert_close(grads[0][valid], grads[1][valid])
    assert (grads[0][~valid] == 0).all()


def test_mmd_counts_a_repeated_row_as_often_as_it_occurs(points):
    twice = [torch.cat([t, t[:4]]) for t in points]
    torch.testing.assert_close(_divergence("mmd", *twice), _loop_mmd(*twice[:3], 4, 3))


@pytest.mark.parametrize("kind", ["js", "mmd"])
@pytest.mark.parametrize("rows", [slice(0, 0), slice(0, 1), slice(12, 13)])
def test_divergence_without_a_pair_is_zero_with_zero_gradient(kind, rows, points):
    x, domain, valid, row = (t[rows].clone() for t in points)
    x.requires_grad_()
    value = _divergence(kind, x, domain, valid, row)
    value.backward()
    assert value == 0 and (x.grad == 0).all()


@pytest.mark.parametrize("kind", ["js", "mmd"])
def test_divergence_does_not_depend_on_the_order_of_rows(kind):
    x, domain, valid, row = torch.randn(200, 4), torch.arange(200) % 4, torch.rand(200) > 0.1, torch.arange(200) * 7
    order = torch.randperm(200)
    one = _divergence(kind, x, domain, valid, row, samples=8)
    two = _divergence(kind, x[order], domain[order], valid[order], row[order], samples=8)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_divergence_falls_as_domains_meet():
    domain, valid, row = torch.arange(200) % 2, torch.ones(200, dtype=torch.bool), torch.arange(200)
    for kind in ("js", "mmd"):
        far, near = (
            _divergence(kind, torch.randn(200, 4).add(s * domain[:, None] * torch.arange(4)), domain, valid, row)
            for s in (2.0, 0.0)
        )
        assert far > 10 * near.abs() and far > 0.05, kind
