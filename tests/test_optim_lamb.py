import copy

import pytest
import torch

from lib.optim import Lamb, Lookahead


def test_lamb_two_steps_by_the_formula():
    torch.manual_seed(0)
    w = torch.randn(4, 3).double().requires_grad_()
    gradients = [torch.randn(4, 3).double() for _ in range(2)]
    expected, m, v = w.detach().clone(), 0.0, 0.0
    optimizer = Lamb([w], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    for t, g in enumerate(gradients, 1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        u = m / (1 - 0.8**t) / ((v / (1 - 0.9**t)).sqrt() + 1e-3) + 0.2 * expected
        expected = expected - 0.1 * expected.norm() / u.norm() * u
        w.grad = g.clone()
        optimizer.step()
        assert torch.allclose(w, expected, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_step_is_lr_times_the_weights(scale):
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    bias = torch.zeros(2, requires_grad=True)
    large = torch.full((100,), 5.0, requires_grad=True)
    still = torch.ones(2, requires_grad=True)
    optimizer = Lamb([w, bias, large, still], lr=0.01)
    for p in (w, bias, large):
        p.grad = scale * torch.ones_like(p)
    optimizer.step()
    assert abs((w.detach() - torch.tensor([3.0, 4.0])).norm() - 0.05) < 1e-4
    assert torch.allclose(bias.detach(), torch.full((2,), -0.01), atol=1e-4)  # norm zero: Adam's step
    assert abs((large.detach() - 5).norm() - 0.1) < 1e-4  # the norm 50 counts as 10
    assert torch.equal(still.detach(), torch.ones(2))


def test_lookahead_against_a_loop():
    def run(synchronize):
        w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
        optimizer = Lookahead(torch.optim.SGD([w], lr=0.1), k=3, alpha=0.4, synchronize=synchronize)
        fast = slow = w.detach().clone()
        for step in range(1, 8):
            optimizer.zero_grad()
            w.square().sum().backward()
            optimizer.step()
            fast = fast - 0.2 * fast
            if step % 3 == 0:
                slow = slow + 0.4 * (fast - slow)
                fast = slow if synchronize else fast
            assert torch.allclose(w, fast)
        with optimizer.slow_weights():
            assert torch.allclose(w, slow)
        assert torch.allclose(w, fast) and not torch.allclose(fast, slow)

    run(True)
    run(False)


def test_lookahead_resumes_and_takes_a_schedule():
    def start():
        w = torch.tensor([1.0, -2.0], requires_grad=True)
        return w, Lookahead(Lamb([w], lr=0.1), k=2)

    def go(w, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            w.square().sum().backward()
            optimizer.step()

    w, optimizer = start()
    go(w, optimizer, 3)
    other, resumed = start()
    with torch.no_grad():
        other.copy_(w)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go(w, optimizer, 4)
    go(other, resumed, 4)
    assert torch.equal(w, other)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    go(w, optimizer, 1)
    schedule.step()
    assert optimizer.optimizer.param_groups[0]["lr"] < 0.1
    with pytest.raises(RuntimeError, match="stop"), optimizer.slow_weights():
        fast = w.detach().clone()
        raise RuntimeError("stop")
    assert fast is not None


def test_bad_input():
    w = torch.ones(2, requires_grad=True)
    for options in ({"lr": -1}, {"eps": 0}, {"betas": (1.0, 0.9)}, {"betas": (0.9,)}, {"max_norm": 0}):
        with pytest.raises(ValueError):
            Lamb([w], **options)
    with pytest.raises(TypeError):
        Lookahead([w])
    for options in ({"k": 0}, {"alpha": 0.0}, {"alpha": 1.5}):
        with pytest.raises(ValueError):
            Lookahead(torch.optim.SGD([w], lr=0.1), **options)
