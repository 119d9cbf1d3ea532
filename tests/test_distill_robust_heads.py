import math

import pytest
import torch
from torch import nn

from lib.distill import RobustHeads, certainty_weights, head_divergence, route_heads
from lib.models import NameHead, TwoTower, ViT, name_head, vit_stages
from lib.train import wise_ft
from lib.uncertainty import committee_entropy


def small(dropout=0.1, seed=0):
    torch.manual_seed(seed)
    stages = [
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)),
        nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
        nn.Linear(8, 5),
    ]
    return RobustHeads(stages, nn.Linear(5, 4), tune_last=2, dropout=dropout), stages


def batch(n=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = [torch.randn(n, 6, generator=g) for _ in range(2)]
    logits = [2 * torch.randn(n, 4, generator=g) for _ in range(2)]
    return *draw, torch.randint(0, 4, (n,), generator=g), *logits


def test_training_leaves_the_frozen_part_and_the_original_bitwise_alone():
    model, stages = small()
    before = [{k: v.clone() for k, v in stage.state_dict().items()} for stage in stages]
    x, ax, y, teacher, original = batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model.train()
        hidden = model.encode_prefix(x)
        assert torch.allclose(hidden, model.encode_prefix(x, batch_size=5), atol=1e-5), "dropout is active"
        optimizer.zero_grad()
        sum(model.training_losses(hidden, model.encode_prefix(ax), y, teacher, original)).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.suffix.parameters())
        optimizer.step()
    for stage, kept in zip(stages, before, strict=True):
        assert all(torch.equal(kept[name], value) for name, value in stage.state_dict().items())
    assert all(not p.requires_grad and p.grad is None for p in model.prefix.parameters())
    assert not torch.equal(model.suffix[0][0].weight, stages[1][0].weight)


def test_losses_are_the_formulas():
    model, _ = small(dropout=0.0)
    x, ax, y, teacher, original = batch()
    x, ax = model.encode_prefix(x), model.encode_prefix(ax)
    with torch.no_grad():  # three different heads
        for head in model.heads.values():
            head.weight.add_(torch.randn(4, 5))
    losses = model.training_losses(x, ax, y, teacher, original)

    def kl(p, q):
        return (p * (p / q).log()).sum(1)

    c, r, u = (
        lambda z, h=h: model.heads[h](model.suffix(z)).softmax(1) for h in ("clean", "robust", "unified")
    )
    rows = torch.arange(len(y))
    clean = (-c(x)[rows, y].log() + kl(original.softmax(1), c(x))).mean()
    t = teacher.softmax(1)
    w = 1 + (t * t.log()).sum(1) / math.log(4)
    robust = (-r(ax)[rows, y].log() + w * kl(t, r(ax))).mean()
    unified = sum((-u(z)[rows, y].log() + kl((c(z) + r(z)) / 2, u(z))).mean() / 2 for z in (x, ax))
    for ours, theirs in zip(losses, (clean, robust, unified), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_each_loss_reaches_its_head_only():
    model, _ = small()
    x, ax, y, teacher, original = batch()
    losses = model.training_losses(model.encode_prefix(x), model.encode_prefix(ax), y, teacher, original)
    for name, loss in losses._asdict().items():
        grads = torch.autograd.grad(
            loss, [model.heads[h].weight for h in losses._fields], retain_graph=True, allow_unused=True
        )
        for other, grad in zip(losses._fields, grads, strict=True):
            reached = grad is not None and bool(grad.abs().sum() > 0)
            assert reached == (other == name)


def test_routing_limits():
    model, _ = small()
    hidden = model.encode_prefix(batch(200)[0])
    with torch.no_grad():
        model.heads["clean"].weight.mul_(3)
        model.heads["robust"].weight.mul_(-1)
    unified = model.predict(hidden, math.inf, generator=torch.Generator().manual_seed(1))
    assert (unified.chosen == 2).all() and torch.equal(unified.probabilities, unified.by_head[2])
    split = model.predict(hidden, 0.0, generator=torch.Generator().manual_seed(1))
    surer = split.uncertainty[0] <= split.uncertainty[1]
    assert surer.any() and not surer.all()
    assert torch.equal(split.chosen, (~surer).long())
    assert torch.equal(split.probabilities[surer], split.by_head[0][surer])
    assert torch.equal(split.probabilities[~surer], split.by_head[1][~surer])
    kappa = model.calibrate(hidden, 0.9, generator=torch.Generator().manual_seed(1))
    again = model.predict(hidden, kappa, generator=torch.Generator().manual_seed(1))
    assert (again.chosen == 2).float().mean() == pytest.approx(0.9, abs=0.01)
    assert torch.allclose(again.divergence, head_divergence(again.by_head[0], again.by_head[1]))


def test_route_heads_by_hand():
    divergence = torch.tensor([0.1, 0.3, 0.3, 0.3])
    uncertainty = torch.tensor([[9.0, 1.0, 2.0, 1.0], [0.0, 2.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
    assert route_heads(divergence, uncertainty, 0.2).tolist() == [2, 0, 1, 0]
    with pytest.raises(ValueError, match="kappa"):
        route_heads(divergence, uncertainty, -1)
    with pytest.raises(ValueError, match="divergence"):
        route_heads(divergence[:3], uncertainty, 1)


def test_equal_heads_share_their_dropout_masks():
    model, _ = small(dropout=0.4)
    hidden = model.encode_prefix(batch()[0])
    model.train()
    predicted = model.predict(hidden, 0.5)
    assert predicted.divergence.max() < 1e-6 and model.training and not model.prefix.training
    plain, _ = model.committee(hidden, mc=0)
    model.eval()
    assert torch.allclose(plain, model(hidden).softmax(-1))


def test_certainty_and_divergence_on_closed_forms():
    logits = torch.tensor([[0.0, 0, 0], [100.0, 0, 0], [0.0, 0, -100]])
    assert torch.allclose(
        certainty_weights(logits), torch.tensor([0.0, 1.0, 1 - math.log(2) / math.log(3)]), atol=1e-6
    )
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.5, 0.25]])
    assert head_divergence(p, q).item() == pytest.approx(0.5 * math.log(2))
    assert head_divergence(p, p).item() == 0
    with pytest.raises(ValueError):
        certainty_weights(logits[:, :1])


def test_committee_entropy_on_hand_made_distributions():
    sure = torch.eye(4)[:, None]  # four members that disagree: all uncertainty is disagreement
    mean, entropy, information = committee_entropy(sure)
    assert torch.allclose(mean, torch.full((1, 4), 0.25))
    assert entropy.item() == pytest.approx(math.log(4)) and information.item() == pytest.approx(math.log(4))
    unsure = torch.full((3, 2, 4), 0.25)  # three that agree on the uniform: none of it is
    _, entropy, information = committee_entropy(unsure)
    assert torch.allclose(entropy, torch.full((2,), math.log(4))) and information.abs().max() < 1e-6
    with pytest.raises(ValueError):
        committee_entropy(2 * unsure)
    with pytest.raises(ValueError):
        committee_entropy(unsure[0, 0])


def test_stages_and_name_head_are_the_model():
    torch.manual_seed(0)
    model = TwoTower(5, 3, dim=8)
    model.image_tower = ViT(8, dim=16, depth=3)
    model.requires_grad_(False).eval()
    images, tokens = torch.rand(6, 1, 8, 8), torch.randint(0, 5, (4, 3))
    stages = vit_stages(model.image_tower)
    assert len(stages) == 5
    features = nn.Sequential(*stages)(images)
    assert torch.allclose(features, model.image_tower.features(images), atol=1e-6)
    head = name_head(model, model.image_tower.head, tokens)
    assert torch.allclose(head(features), model(images, tokens), atol=1e-4)
    robust = RobustHeads(stages, head, tune_last=3)
    logits = robust.eval()(robust.encode_prefix(images))
    assert torch.allclose(logits, model(images, tokens).expand(3, -1, -1), atol=1e-4)
    other = robust.map_heads(lambda each: each.with_names(each.names[:2]))
    assert other(robust.encode_prefix(images)).shape == (3, 6, 2) and robust(
        robust.encode_prefix(images)
    ).shape == (3, 6, 4)
    assert isinstance(other.heads["clean"], NameHead)
    assert other.heads["clean"].projection is robust.heads["clean"].projection


def test_wise_ft_is_a_line_between_two_models():
    ends = []
    for seed in range(2):
        torch.manual_seed(seed)
        ends.append(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict())
    for alpha, end in ((0, ends[0]), (1, ends[1])):
        mixed = wise_ft(*ends, alpha)
        assert all(torch.equal(mixed[name], end[name]) for name in end)
    middle = wise_ft(*ends, 0.25)["0.weight"]
    assert torch.allclose(middle, 0.75 * ends[0]["0.weight"] + 0.25 * ends[1]["0.weight"])
    with pytest.raises(ValueError, match="alpha"):
        wise_ft(*ends, 1.5)
    with pytest.raises(ValueError, match="names"):
        wise_ft(ends[0], {"0.weight": middle}, 0.5)
    with pytest.raises(ValueError, match="shape"):
        wise_ft({"w": torch.zeros(2)}, {"w": torch.zeros(3)}, 0.5)


def test_bad_arguments():
    model, stages = small()
    for options in ({"tune_last": 0}, {"tune_last": 4}, {"dropout": 1.0}):
        with pytest.raises(ValueError):
            RobustHeads(stages, nn.Linear(5, 4), **options)
    x, ax, y, teacher, original = batch()
    with pytest.raises(ValueError, match="length"):
        model.training_losses(model.encode_prefix(x), model.encode_prefix(ax), y[:3], teacher, original)
    with pytest.raises(ValueError, match="mc"):
        model.committee(model.encode_prefix(x), -1)
    with pytest.raises(ValueError, match="quantile"):
        model.calibrate(model.encode_prefix(x), 2)


def test_teacher_and_original_get_no_gradient():
    model, _ = small()
    x, ax, y, teacher, original = batch()
    teacher.requires_grad_(), original.requires_grad_()
    sum(
        model.training_losses(model.encode_prefix(x), model.encode_prefix(ax), y, teacher, original)
    ).backward()
    assert teacher.grad is None and original.grad is None
