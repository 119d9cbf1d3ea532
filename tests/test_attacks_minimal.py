"""Minimal attacks on linear models, where the nearest adversarial example is known, and on a network."""

import pytest
import torch

from lib.attacks import cw_l2, deepfool
from lib.models import CNN

WEIGHTS = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [-1.0, -1.0]])


def linear(x):
    return x @ WEIGHTS.T


def nearest_distance(inputs):
    """Distance to the nearest boundary of the linear model."""
    logits, own = linear(inputs), linear(inputs).argmax(1)
    gap = logits.gather(1, own[:, None]) - logits
    norms = (WEIGHTS[own][:, None] - WEIGHTS).norm(dim=2)
    return (gap / norms).nan_to_num(torch.inf).amin(1), own


@pytest.fixture
def points():
    return torch.randn(40, 2, generator=torch.Generator().manual_seed(0))


def test_deepfool_is_exact_on_a_linear_model(points):
    distance, own = nearest_distance(points)
    moved = deepfool(linear, points, bounds=None, overshoot=0.02)
    assert (linear(moved).argmax(1) != own).all()
    length = (moved - points).norm(dim=1)
    torch.testing.assert_close(length, 1.02 * (distance + 1e-4 / 1.5), atol=2e-4, rtol=1e-3)
    assert torch.equal(deepfool(linear, points, bounds=None), deepfool(linear, points, bounds=None))


def test_cw_finds_nearly_the_nearest_point_of_a_linear_model(points):
    inputs = torch.sigmoid(points)

    def model(x):
        return linear(4 * (x - 0.5))

    distance, own = nearest_distance(4 * (inputs - 0.5))
    moved = cw_l2(model, inputs, own, steps=150, step_size=0.02, search_steps=7)
    changed = model(moved).argmax(1) != own
    reachable = distance / 4 < 0.3
    assert changed[reachable].all() and (moved >= 0).all() and (moved <= 1).all()
    length = (moved - inputs).norm(dim=1)
    # the box may cut the shortest way off, so nearly all are close and none is shorter
    assert (length[changed] >= distance[changed] / 4 - 1e-4).all()
    assert ((length < 1.15 * distance / 4 + 0.02)[changed]).float().mean() > 0.8
    assert torch.equal(moved[~changed], inputs[~changed])


def test_confidence_is_the_lead_of_the_wrong_logit(points):
    inputs = torch.sigmoid(points)

    def model(x):
        return 6 * linear(x - 0.5)

    targets = model(inputs).argmax(1)
    lengths = []
    for confidence in (0.0, 1.0):
        moved = cw_l2(model, inputs, targets, confidence=confidence, steps=80, step_size=0.05)
        logits = model(moved)
        lead = (
            logits.scatter(1, targets[:, None], -torch.inf).amax(1) - logits.gather(1, targets[:, None])[:, 0]
        )
        changed = (moved != inputs).flatten(1).any(1)
        assert changed.float().mean() > 0.7 and (lead[changed] >= confidence - 1e-4).all()
        lengths.append((moved - inputs).norm(dim=1)[changed].mean())
    assert lengths[1] > lengths[0]


def test_on_a_network_deepfool_is_the_shorter_way_than_a_sign_step():
    torch.manual_seed(0)
    model = CNN(4).requires_grad_(False)
    inputs = torch.rand(12, 1, 8, 8)
    own = model(inputs).argmax(1)
    moved = deepfool(model, inputs)
    assert moved.shape == inputs.shape and not moved.requires_grad
    assert (model(moved).argmax(1) != own).float().mean() > 0.9
    assert (moved >= 0).all() and (moved <= 1).all()
    each = torch.cat([deepfool(model, one[None]) for one in inputs[:3]])
    torch.testing.assert_close(each, moved[:3], rtol=1e-4, atol=1e-5)
    assert len(deepfool(model, inputs[:0])) == len(cw_l2(model, inputs[:0], own[:0])) == 0
    alone = cw_l2(model, inputs[:1], own[:1], steps=20)
    torch.testing.assert_close(alone, cw_l2(model, inputs[:2], own[:2], steps=20)[:1], rtol=1e-4, atol=1e-4)


def test_already_wrong_inputs_stay(points):
    inputs = torch.sigmoid(points)
    wrong = (linear(inputs).argmax(1) + 1) % 3
    moved = cw_l2(linear, inputs, wrong, steps=3)
    torch.testing.assert_close(moved, inputs, atol=1e-5, rtol=0)


def test_bad_input(points):
    targets = torch.zeros(40, dtype=torch.int64)
    with pytest.raises(TypeError, match="floating"):
        deepfool(linear, points.long())
    with pytest.raises(ValueError, match="bounds"):
        deepfool(linear, points)
    with pytest.raises(ValueError, match="overshoot"):
        deepfool(linear, points, bounds=None, overshoot=-1)
    with pytest.raises(ValueError, match="steps"):
        deepfool(linear, points, bounds=None, steps=0)
    with pytest.raises(ValueError, match="target"):
        cw_l2(linear, torch.sigmoid(points), targets[:3])
    with pytest.raises(ValueError, match="bounds"):
        cw_l2(linear, points, targets, bounds=None)
    for options in ({"search_steps": 0}, {"confidence": -1.0}, {"initial_constant": 0.0}, {"step_size": 0.0}):
        with pytest.raises(ValueError):
            cw_l2(linear, torch.sigmoid(points), targets, **options)
