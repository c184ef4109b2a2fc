"""Dropout with a mask of cheap bits is dropout: as many are dropped, in every place, and the gradient has the mask."""

from __future__ import annotations

import pytest
import torch

from dist_rec.layers.dropout import Dropout


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_every_place_is_dropped_as_often_and_the_mean_stays(p):
    torch.manual_seed(0)
    x = torch.ones(50_000, 8)  # two times the four elements of 64 bits
    found = Dropout(p)(x)
    kept = found != 0
    torch.testing.assert_close(kept.float().mean(0), torch.full((8,), 1 - p), atol=0.01, rtol=0)
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / (1 - p)), rtol=1e-4, atol=0)
    # Neighbours are dropped independently of each other.
    both = (kept[:, :-1] & kept[:, 1:]).float().mean(0)
    torch.testing.assert_close(both, torch.full((7,), (1 - p) ** 2), atol=0.01, rtol=0)


def test_the_gradient_is_dropped_and_scaled_as_the_value():
    torch.manual_seed(0)
    x = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    found = Dropout(0.3)(x)
    gradient = torch.randn_like(found)
    found.backward(gradient)
    torch.testing.assert_close(x.grad, gradient * (found / x).detach())
    torch.manual_seed(4)
    assert torch.autograd.gradcheck(lambda y: (torch.manual_seed(1), Dropout(0.3)(y))[1], x)


def test_a_seed_gives_its_mask_and_evaluation_is_the_identity():
    x = torch.randn(5, 3)
    layer = Dropout(0.5)
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(layer(x))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert layer.eval()(x) is x
    state = torch.get_rng_state()
    assert torch.equal(Dropout(0.0)(x), x) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(Dropout(1.0)(x), torch.zeros_like(x))
    assert Dropout(0.5)(torch.zeros(0, 4)).shape == (0, 4)
