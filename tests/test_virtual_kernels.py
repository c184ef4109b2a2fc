"""Virtual kernels, gates and interests against loops that write the equations out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_rec.config import ItemTowerConfig, KernelsConfig, UserTowerConfig
from dist_rec.layers.fields import EventFields, Fields
from dist_rec.layers.item_tower import ItemTower
from dist_rec.layers.multi_interest import MultiInterest, label_aware_weights
from dist_rec.layers.task_towers import TaskTowers
from dist_rec.layers.virtual_kernels import CrossedKernels, KernelExperts, KernelGate

ROWS, FIELDS, WIDTH, KERNELS = 7, 4, 6, 3
ACTIVATIONS = {"none": lambda x: x, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu}

pytestmark = pytest.mark.usefixtures("doubles")


def some_fields() -> Fields:
    """Row 0 lacks every field, row 1 has one, the others lack some."""
    present = torch.rand(ROWS, FIELDS) < 0.7
    present[0], present[1] = False, torch.arange(FIELDS) == 2
    return Fields(torch.randn(ROWS, FIELDS, WIDTH) * present[:, :, None], present)


def perceptron(net: nn.Module, group: int, x: Tensor) -> Tensor:
    """One of the stacked perceptrons: linear, ReLU, and so on; none behind the last."""
    for number, layer in enumerate(net.layers):
        x = x @ layer.weight[0, group] + layer.bias[0, group]
        x = F.relu(x) if number + 1 < len(net.layers) else x
    return x


@pytest.mark.parametrize("combine", ["concat", "sum", "residual_norm"])
@pytest.mark.parametrize(("activation", "scaled"), [(name, name != "relu") for name in ACTIVATIONS])
def test_experts_read_what_their_kernel_attends_to(combine, activation, scaled):
    module = KernelExperts(KERNELS, FIELDS, WIDTH, activation, combine, scaled, None, [5], 0.0)
    if module.norm is not None:
        nn.init.normal_(module.norm.bias)
    kernels, (values, present) = torch.randn(KERNELS, WIDTH), some_fields()
    experts, attention = module(kernels, Fields(values, present))
    act = ACTIVATIONS[activation]
    for b in range(ROWS):
        there = present[b].nonzero()[:, 0].tolist()
        for k in range(KERNELS):
            query = act(module.query(kernels[k]))
            scores = torch.stack([query @ act(module.key(values[b, f])) for f in there]) if there else torch.zeros(0)
            weights = torch.softmax(scores / (math.sqrt(WIDTH) if scaled else 1), 0)
            wanted, parts = torch.zeros(FIELDS), [torch.zeros(WIDTH)] * FIELDS
            for weight, f in zip(weights, there, strict=True):
                wanted[f] = weight
                parts[f] = weight * act(module.value(values[b, f]))
                if combine == "residual_norm":
                    norm = module.norm
                    parts[f] = F.layer_norm(values[b, f] + parts[f], (WIDTH,), norm.weight, norm.bias, norm.eps)
            torch.testing.assert_close(attention[b, k], wanted)
            read = sum(parts) if combine == "sum" else torch.cat(parts)
            torch.testing.assert_close(experts[b, k], perceptron(module.experts, k, read))


def test_a_field_that_is_missing_says_nothing():
    module = KernelExperts(KERNELS, FIELDS, WIDTH, "tanh", "residual_norm", True, None, [5], 0.0)
    kernels, fields = torch.randn(KERNELS, WIDTH), some_fields()
    other = Fields(torch.where(fields.present[:, :, None], fields.values, 3.0), fields.present)
    torch.testing.assert_close(module(kernels, other), module(kernels, fields))


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_tag_weighs_kernels(project, scaled):
    gate = KernelGate(WIDTH, project, "tanh", scaled, "softmax")
    tags, kernels = torch.randn(ROWS, WIDTH), torch.randn(KERNELS, WIDTH)
    for b in range(ROWS):
        query = torch.tanh(gate.query[0](tags[b])) if project else tags[b]
        keys = [torch.tanh(gate.key[0](kernel)) if project else kernel for kernel in kernels]
        scores = torch.stack([query @ key for key in keys]) / (math.sqrt(WIDTH) if scaled else 1)
        torch.testing.assert_close(gate(tags, kernels)[b], torch.softmax(scores, 0))
    by_row = gate(tags, kernels.expand(ROWS, -1, -1))
    torch.testing.assert_close(by_row, gate(tags, kernels))


def test_argmax_is_one_kernel_with_the_gradient_of_softmax():
    tags, kernels, upstream = torch.randn(ROWS, WIDTH), torch.randn(KERNELS, WIDTH), torch.randn(ROWS, KERNELS)
    found = {}
    for kind in ("softmax", "argmax"):
        gate = KernelGate(WIDTH, False, "none", True, kind)
        leaf = kernels.clone().requires_grad_()
        weights = gate(tags, leaf)
        weights.backward(upstream)
        found[kind] = weights.detach(), leaf.grad
    soft, hard = found["softmax"], found["argmax"]
    assert torch.equal(hard[0], F.one_hot(soft[0].argmax(1), KERNELS).to(hard[0].dtype))
    torch.testing.assert_close(hard[1], soft[1])


def test_crossed_kernels_begin_as_kernels():
    crossed, kernels = CrossedKernels(KERNELS, WIDTH), torch.randn(KERNELS, WIDTH)
    user, item = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    assert torch.equal(crossed(kernels, user, item), kernels.expand(ROWS, -1, -1))
    nn.init.normal_(crossed.move.weight)
    moves = (user * item) @ crossed.move.weight.t()
    torch.testing.assert_close(crossed(kernels, user, item)[2, 1], kernels[1] + moves[2, WIDTH : 2 * WIDTH])


def test_interests_attend_to_events_and_fields():
    module, profile = MultiInterest(2, FIELDS, WIDTH, [5], 0.0), some_fields()
    events = Fields(torch.randn(ROWS, 3, WIDTH), torch.arange(3) < torch.randint(0, 4, (ROWS, 1)))
    found = module(profile, [events])
    for b in range(ROWS):
        seen = torch.cat([profile.values[b][profile.present[b]], events.values[b][events.present[b]]])
        attention = torch.softmax(torch.tanh(seen @ module.inner.weight.t()) @ module.outer.weight.t(), 0)
        for k in range(2):
            interest = attention[:, k] @ seen if len(seen) else torch.zeros(WIDTH)
            read = torch.cat([interest, profile.values[b].flatten()])
            torch.testing.assert_close(found[b, k], perceptron(module.combine, 0, read))
    item = torch.randn(ROWS, WIDTH)
    weights = label_aware_weights(found, item, 3.0)
    torch.testing.assert_close(weights[4], torch.softmax(3 * found[4] @ item[4], 0))


def test_events_become_fields_newest_first():
    module = EventFields(3, WIDTH, [5])
    values, lengths = torch.randn(6, 5), torch.tensor([2, 0, 4])
    text = torch.randn(6, WIDTH)
    fields = module([values, text], [lengths, lengths])
    assert fields.present.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert torch.equal(fields.values[1], torch.zeros(3, WIDTH)) and not fields.values[0, 2].any()
    alone = module([values], [lengths])
    torch.testing.assert_close(fields.values[2, 1], alone.values[2, 1] + text[4])
    torch.testing.assert_close(alone.values[0, 1], values[0] @ module.projections[0].weight.t() + module.positions[1])
    torch.testing.assert_close(alone.values[2, 0], values[5] @ module.projections[0].weight.t() + module.positions[0])
    # A history of four keeps its newest three.
    torch.testing.assert_close(alone.values[2, 2], values[3] @ module.projections[0].weight.t() + module.positions[2])


@pytest.mark.parametrize("kind", ["single_task", "shared_bottom", "mmoe", "cgc", "ple"])
def test_towers_share_what_their_kind_shares(kind):
    """Which parameters the second task's vector depends on, and which are the first one's alone."""
    tasks = 2
    config = UserTowerConfig(kind=kind, hidden=[5], tower_hidden=[4], experts=2, specific_experts=1, levels=2)
    module = TaskTowers(config, FIELDS, WIDTH, tasks)
    out = module(some_fields())
    assert out.shape == (ROWS, tasks, WIDTH)
    out[:, 0].sum().backward()
    untouched = {name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()}
    # Of stacks by task the first one's slice moves, so none is untouched as a whole.
    assert not untouched
    if kind == "single_task":
        first = module.single.layers[-1].weight.grad
        assert first[0, 0].any() and not first[0, 1].any()
        halves = module.single.layers[0].weight.grad.view(FIELDS * WIDTH, tasks, 5)
        assert halves[:, 0].any() and not halves[:, 1].any()
        return
    last = module.towers.layers[-1].weight.grad
    assert last[0, 0].any() and not last[0, 1].any()
    if kind == "cgc":
        own = module.levels[0].specific.layers[0].weight.grad
        assert len(module.levels) == 1 and own[0, 0].any() and not own[0, 1].any()
    if kind == "ple":
        # Levels mix the tasks' experts through the shared ones.
        assert len(module.levels) == 2 and module.levels[0].specific.layers[0].weight.grad[0, 1].any()


@pytest.mark.parametrize("kind", ["mlp", "vke", "vke_vkg"])
@pytest.mark.parametrize("vectors", [1, 3])
def test_an_item_has_a_vector_for_each_task_or_one(kind, vectors):
    config = ItemTowerConfig(kind=kind, kernels=2, hidden=[5])
    kernels = KernelsConfig(activation="none", combine="concat", init_std=0.3)
    tower, fields = ItemTower(config, kernels, FIELDS, WIDTH, vectors), some_fields()
    experts, own = tower(fields)
    count = 1 if kind == "mlp" else 2
    assert experts.shape == (ROWS, vectors, count, WIDTH) and own.shape == (vectors, count * (kind != "mlp"), WIDTH)
    if kind == "mlp":
        net, flat = tower.tower, fields.values.flatten(1)
        hidden = F.relu(flat @ net.layers[0].weight[0, 0] + net.layers[0].bias[0, 0])[:, -5:]
        wanted = hidden @ net.layers[1].weight[0, -1] + net.layers[1].bias[0, -1]
        torch.testing.assert_close(experts[:, -1, 0], wanted)
    else:
        wanted, _ = tower.tower(own.flatten(0, 1), fields)
        torch.testing.assert_close(experts.flatten(1, 2), wanted)
