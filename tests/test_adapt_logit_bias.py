"""Few-shot methods against double loops, nearest centroids and the chapter's reference; training against the plain loop."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestCentroid
from torch import nn

from lib.adapt import (
    AMU,
    CLIPAdapter,
    CoOp,
    LogitBias,
    TipAdapter,
    class_means,
    fit_logit_biases,
    normalize_logits,
)
from lib.book import load_reference
from lib.train import fit
from lib.uncertainty import kurtosis_weight


def units(*shape, seed=0, dtype=torch.float32):
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1
    )


TEXT, IMAGES, AUX = units(5, 6), units(20, 6, seed=1), units(20, 9, seed=2)
LABELS = torch.arange(20) % 5


class Prompt(nn.Module):
    def __init__(self, text):
        super().__init__()
        self.context = nn.Parameter(torch.zeros(text.shape[1]))
        self.register_buffer("text", text)

    def forward(self):
        return self.text + self.context


def test_normalize_is_by_row():
    logits = torch.randn(7, 5, dtype=torch.float64)
    mine = normalize_logits(logits)
    for row, out in zip(logits, mine, strict=True):
        assert torch.allclose(out, (row - row.mean()) / row.std())
    assert torch.allclose(normalize_logits(3 * logits + 2), mine)
    assert torch.allclose(mine, load_reference("few-shot-logit-bias", "normalize")(logits))
    one_hot = normalize_logits(torch.eye(5, dtype=torch.float64))
    assert one_hot.amax().item() == pytest.approx(4 / math.sqrt(5))
    pair = normalize_logits(torch.tensor([[1.0, -1.0, 0.0, 0.0]]))
    assert (pair.amax() - pair.amin()).item() == pytest.approx(math.sqrt(6))
    assert torch.autograd.gradcheck(normalize_logits, logits.requires_grad_())
    flat = torch.full((2, 4), 3.0, requires_grad=True)
    normalize_logits(flat).square().sum().backward()
    assert torch.equal(flat.grad, torch.zeros(2, 4))
    for bad in (torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match="logits"):
            normalize_logits(bad)


def test_class_means_are_those_of_nearest_centroid():
    means = class_means(AUX, LABELS, 5)
    centroids = NearestCentroid().fit(AUX.numpy(), LABELS.numpy()).centroids_
    assert torch.allclose(means, torch.from_numpy(centroids).float(), atol=1e-6)
    with pytest.raises(ValueError, match=r"without an example: \[5\]"):
        class_means(AUX, LABELS, 6)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        class_means(AUX, LABELS, 4)
    with pytest.raises(ValueError, match="features and labels"):
        class_means(AUX, LABELS[:3], 5)


def test_zero_shot_and_alpha_zero():
    zero_shot = LogitBias(TEXT, 50.0).fit(IMAGES, LABELS)
    assert torch.equal(zero_shot.logits(IMAGES), 50.0 * IMAGES @ TEXT.T)
    model = AMU(TEXT, 9, 50.0, alpha=0.0).fit(IMAGES, LABELS, AUX, epochs=2)
    assert torch.equal(model.logits(IMAGES, AUX), zero_shot.logits(IMAGES))


def test_amu_is_the_reference_in_value_and_gradient():
    model = AMU(TEXT, 9, 20.0, alpha=0.7, lam=0.3, power=0.5).double()
    images, aux = units(20, 6, seed=1, dtype=torch.float64), units(20, 9, seed=2, dtype=torch.float64)
    model.prepare(images, LABELS, aux)
    reference_logits = load_reference("few-shot-logit-bias", "amu_logits")
    reference_loss = load_reference("few-shot-logit-bias", "amu_loss")
    weight = class_means(aux, LABELS, 5).requires_grad_()
    s0 = 20.0 * images @ model.text_features.T
    power, alpha, lam = (getattr(model, name).item() for name in ("power", "alpha", "lam"))
    fused, bias = reference_logits(s0, aux, weight, alpha=alpha, power=power)
    loss = reference_loss(fused, bias, LABELS, lam=lam)
    mine, my_loss = model(images, aux, LABELS)
    assert torch.allclose(mine, fused) and torch.allclose(my_loss, loss)
    (expected,) = torch.autograd.grad(loss, weight)
    my_loss.backward()
    assert torch.allclose(model.predictor.weight.grad, expected)
    # the bias does not see a common row or a common factor
    assert torch.allclose(expected.sum(0), torch.zeros(9).double(), atol=1e-12)
    assert abs((expected * weight).sum().item()) < 1e-12


def test_tip_adapter_is_a_double_loop():
    model = TipAdapter(TEXT, 10.0, alpha=0.8, sharpness=3.0).fit(IMAGES[:12], LABELS[:12])
    expected = 10.0 * IMAGES @ TEXT.T
    for i in range(20):
        for j in range(12):
            affinity = math.exp(-3.0 * (1 - float(IMAGES[i] @ IMAGES[j])))
            expected[i, LABELS[j]] += 0.8 * affinity
    assert torch.allclose(model.logits(IMAGES), expected, atol=1e-5)
    with pytest.raises(RuntimeError, match="call fit first"):
        TipAdapter(TEXT).logits(IMAGES)
    before = model.keys.clone()
    tuned = TipAdapter(TEXT, 10.0, finetune=True).fit(IMAGES[:12], LABELS[:12], epochs=5)
    assert not torch.allclose(tuned.keys, before) and torch.equal(model.keys, before)


def test_clip_adapter_and_coop_are_biases():
    adapter = CLIPAdapter(TEXT, 10.0, ratio=0.3, reduction=2).fit(IMAGES, LABELS, epochs=3)
    mixed = F.normalize(0.3 * adapter.adapter(IMAGES) + 0.7 * IMAGES, dim=1)
    assert torch.allclose(adapter.logits(IMAGES), 10.0 * mixed @ TEXT.T, atol=1e-5)
    assert torch.equal(
        CLIPAdapter(TEXT, 10.0, ratio=0.0).logits(IMAGES).argmax(1), (IMAGES @ TEXT.T).argmax(1)
    )
    coop = CoOp(TEXT, Prompt(TEXT), 10.0)
    assert torch.allclose(coop.logits(IMAGES), 10.0 * IMAGES @ TEXT.T, atol=1e-5)
    coop.fit(IMAGES, LABELS, epochs=3, lr=0.1)
    learned = F.normalize(TEXT + coop.prompt.context, dim=1)
    assert coop.prompt.context.abs().max() > 0.01
    assert torch.allclose(coop.logits(IMAGES), 10.0 * IMAGES @ learned.T, atol=1e-5)


def test_training_is_the_plain_loop():
    options = dict(alpha=1.0, lam=0.4)
    together = [AMU(TEXT, 9, 10.0, **options), AMU(TEXT, 9, 10.0, alpha=2.0, lam=1.0, power=0.0)]
    losses = fit_logit_biases(
        together,
        IMAGES.expand(2, -1, -1),
        LABELS.expand(2, -1),
        AUX.expand(2, -1, -1),
        seeds=[3, 4],
        epochs=4,
    )
    assert losses.shape == (12, 2)
    alone = AMU(TEXT, 9, 10.0, **options)
    alone.prepare(IMAGES, LABELS, AUX)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-3, weight_decay=0.01, eps=1e-4)
    fit(
        alone,
        lambda model, image, aux, targets: model(image, aux, targets)[1],
        (IMAGES, AUX, LABELS),
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12),
        epochs=4,
        batch_size=8,
        seed=3,
    )
    assert torch.allclose(together[0].predictor.weight, alone.predictor.weight, atol=1e-6)
    single = AMU(TEXT, 9, 10.0, **options).fit(IMAGES, LABELS, AUX, epochs=4, seed=3)
    assert torch.allclose(single.predictor.weight, alone.predictor.weight, atol=1e-6)
    # a weight without kurtosis is alpha
    assert torch.equal(together[1].bias(IMAGES, AUX)[1], torch.full((20, 1), 2.0))
    weight = together[0].bias(IMAGES, AUX)[1]
    assert torch.allclose(weight, kurtosis_weight(together[0].zero_shot(IMAGES)))


def test_random_init_keeps_its_start():
    model = AMU(TEXT, 9, init="random")
    before = model.predictor.weight.clone()
    model.prepare(IMAGES, LABELS, AUX)
    assert torch.equal(model.predictor.weight, before)


def test_bad_input():
    with pytest.raises(ValueError, match="unit rows"):
        LogitBias(2 * TEXT)
    with pytest.raises(ValueError, match="scale"):
        LogitBias(TEXT, 0.0)
    with pytest.raises(ValueError, match="image_features"):
        LogitBias(TEXT).logits(AUX)
    for options in (
        dict(alpha=-1.0),
        dict(lam=1.5),
        dict(power=-0.1),
        dict(init="zero"),
        dict(kurtosis_ref=0.0),
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            AMU(TEXT, 9, **options)
    with pytest.raises(ValueError, match="aux_features"):
        AMU(TEXT, 9).logits(IMAGES)
    with pytest.raises(ValueError, match="unit rows"):
        AMU(TEXT, 9).fit(IMAGES, LABELS, 2 * AUX)
    with pytest.raises(ValueError, match="ratio"):
        CLIPAdapter(TEXT, ratio=1.2)
    with pytest.raises(ValueError, match="reduction"):
        CLIPAdapter(TEXT, reduction=7)
    with pytest.raises(ValueError, match="sharpness"):
        TipAdapter(TEXT, sharpness=0.0)
    shots = IMAGES.unsqueeze(0), LABELS.unsqueeze(0)
    with pytest.raises(ValueError, match="one class"):
        fit_logit_biases([], *shots, seeds=[])
    with pytest.raises(ValueError, match="labels must be"):
        fit_logit_biases([AMU(TEXT, 9)] * 2, *shots, seeds=[0, 1])
