"""Gradient attacks against the exact optimum on linear models, and what they must leave alone."""

import pytest
import torch
import torch.nn.functional as F

from lib.attacks import bim, fgsm, pgd
from lib.models import mlp

ATTACKS = (fgsm, bim, pgd)


def linear(dtype=torch.float64, features=7):
    """Two classes, z_1 = x w / 2 = -z_0."""
    w = torch.randn(features, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return w, lambda x: torch.stack([-(x.flatten(1) @ w) / 2, x.flatten(1) @ w / 2], 1)


def batch(count=6, features=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, features, generator=generator, dtype=dtype), torch.arange(count) % 2


@pytest.mark.parametrize("attack", ATTACKS)
def test_linear_model_has_an_exact_answer(attack):
    w, model = linear()
    inputs, targets = batch()
    side = (1 - 2 * targets).to(inputs.dtype)[:, None]  # label 0 wants a larger margin, label 1 a smaller one
    # from a random point of an l2 ball, long steps: what lies across the gradient shrinks with every projection
    options = {"eps": 0.3, "bounds": None} | ({"step_size": 10.0} if attack is pgd else {})
    for norm, best in (("linf", w.sign()), ("l2", w / w.norm())):
        moved = attack(model, inputs, targets, norm=norm, **options)
        torch.testing.assert_close(moved - inputs, 0.3 * side * best, atol=1e-9, rtol=1e-9)
        back = attack(model, inputs, targets, norm=norm, targeted=True, **options)
        torch.testing.assert_close(back - inputs, -0.3 * side * best, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_stays_in_the_ball_and_the_bounds(attack, norm):
    torch.manual_seed(0)
    model = mlp((48, 16, 3))
    inputs, targets = torch.rand(5, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    inputs[0], inputs[1] = 0.0, 1.0
    moved = attack(model, inputs, targets, eps=0.4, norm=norm)
    change = (moved - inputs).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert (size <= 0.4 + 1e-6).all() and (size > 0.01).all()
    assert moved.min() >= 0 and moved.max() <= 1
    assert moved.shape == inputs.shape and moved.dtype == inputs.dtype and not moved.requires_grad
    with torch.no_grad():
        before, after = (F.cross_entropy(model(x), targets) for x in (inputs, moved))
    assert after > before
    torch.testing.assert_close(attack(model, inputs, targets, eps=0.0, norm=norm), inputs)


def test_more_steps_find_more():
    torch.manual_seed(0)
    model = mlp((10, 32, 3))
    inputs, targets = torch.rand(40, 10), torch.randint(3, (40,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    losses = [
        F.cross_entropy(model(attack(model, inputs, targets, eps=0.3)), targets) for attack in (fgsm, pgd)
    ]
    assert losses[1] > losses[0]


def test_random_start():
    _, model = linear()
    inputs, targets = batch()

    def run(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return pgd(
            model, inputs, targets, eps=0.3, steps=1, step_size=0.01, bounds=None, generator=generator, **options
        )  # fmt: skip

    torch.testing.assert_close(run(0), run(0), rtol=0, atol=0)
    assert not torch.equal(run(0), run(1))
    torch.testing.assert_close(run(0, random_start=False), run(1, random_start=False), rtol=0, atol=0)
    many, labels = torch.zeros(4000, 3, dtype=torch.float64), torch.zeros(4000, dtype=torch.int64)
    _, flat = linear(features=3)
    for norm, share in (("linf", 0.5), ("l2", 0.5**3)):  # uniform: the share of the half ball
        start = pgd(
            flat, many, labels, eps=1.0, steps=1, step_size=0.0, norm=norm, bounds=None,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        size = start[:, 0].abs() if norm == "linf" else start.norm(dim=1)
        assert (size <= 0.5).double().mean().item() == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("attack", ATTACKS)
def test_parameters_are_left_alone(attack):
    torch.manual_seed(0)
    model = mlp((7, 8, 2)).double()
    inputs, targets = batch()
    F.cross_entropy(model(inputs), targets).backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    inputs.requires_grad_()
    with torch.no_grad():  # evaluation code calls attacks under no_grad
        attack(model, inputs, targets, eps=0.1)
    assert inputs.grad is None
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient) and parameter.requires_grad
    frozen = mlp((7, 8, 2)).double().requires_grad_(False)
    assert not attack(frozen, inputs, targets, eps=0.1).requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_input_does_not_depend_on_its_batch(attack, norm):
    torch.manual_seed(0)
    model = mlp((7, 8, 2)).double()
    inputs, targets = batch()
    options = {} if attack is fgsm else {"steps": 4}
    if attack is pgd:
        options["random_start"] = False
    together = attack(model, inputs, targets, eps=0.2, norm=norm, **options)
    alone = torch.cat(
        [
            attack(model, inputs[i : i + 1], targets[i : i + 1], eps=0.2, norm=norm, **options)
            for i in range(6)
        ]
    )
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(
        together,
        attack(
            model, inputs, targets, eps=0.2, norm=norm, loss_fn=lambda z, y: F.cross_entropy(z, y), **options
        ),
    )


def test_a_confident_model_is_no_defence():
    """A gradient of 1e-26 is a direction too, although its square is zero in float32."""
    w, model = linear(torch.float32)
    inputs, targets = batch(dtype=torch.float32)
    side = (1 - 2 * targets).to(inputs.dtype)[:, None]

    def confident(x):  # right by a margin of about 60 at every input
        correct = torch.zeros(len(x), 2).scatter(1, targets[:, None], 60.0)
        return model(x) + correct

    for norm, best in (("linf", w.sign()), ("l2", w / w.norm())):
        moved = bim(confident, inputs, targets, eps=0.3, norm=norm, bounds=None)
        torch.testing.assert_close(moved - inputs, 0.3 * side * best, atol=1e-5, rtol=1e-4)


def test_own_loss_and_other_targets():
    w, model = linear()
    inputs, _ = batch()
    goal = torch.full((6, 1), 5.0, dtype=torch.float64)
    moved = fgsm(
        model, inputs, goal, eps=0.1, bounds=None, loss_fn=lambda z, t: (z[:, 1:] - t).square().sum(1)
    )
    sign = (inputs @ w / 2 - 5.0).sign()[:, None]
    torch.testing.assert_close(moved - inputs, 0.1 * sign * w.sign())


def test_no_inputs():
    _, model = linear()
    empty = torch.zeros(0, 7, dtype=torch.float64)
    for norm in ("linf", "l2"):
        for attack in ATTACKS:
            assert attack(model, empty, torch.zeros(0).long(), eps=0.1, norm=norm).shape == (0, 7)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"inputs": torch.zeros(6, 7).long()}, TypeError, "floating point"),
        ({"inputs": torch.zeros(6)}, ValueError, r"\(N, \.\.\.\)"),
        ({"targets": torch.zeros(5).long()}, ValueError, "5 targets"),
        ({"eps": -0.1}, ValueError, "eps"),
        ({"eps": float("nan")}, ValueError, "eps"),
        ({"norm": "l1"}, ValueError, "'l1'"),
        ({"bounds": (0.2, 0.8)}, ValueError, "bounds"),
    ],
)
@pytest.mark.parametrize("attack", ATTACKS)
def test_bad_input(attack, change, error, words):
    _, model = linear()
    inputs, targets = batch()
    arguments = {"model": model, "inputs": inputs, "targets": targets, "eps": 0.1} | change
    with pytest.raises(error, match=words):
        attack(**arguments)


def test_bad_steps():
    _, model = linear()
    for attack in (bim, pgd):
        with pytest.raises(ValueError, match="steps"):
            attack(model, *batch(), eps=0.1, steps=0)
    with pytest.raises(ValueError, match="step_size"):
        pgd(model, *batch(), eps=0.1, step_size=-1.0)
