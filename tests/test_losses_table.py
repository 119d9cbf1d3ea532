"""The table of all losses: each has its entry, and its gradient is the closed form that the entry states."""

import inspect
import math
import sys

import pytest
import torch
import torch.nn.functional as F

import lib.calibration
import lib.distill
import lib.losses
from lib.book import ROOT

sys.path.append(str(ROOT / "site"))
from book_pages import GLANCE, at_a_glance, public_losses  # noqa: E402

CLASSES = 5


def onehot(y):
    return F.one_hot(y, CLASSES).double()


def nontarget(z, y):
    """Softmax over the classes that are not the target; 0 there."""
    return z.masked_fill(onehot(y).bool(), -torch.inf).softmax(1)


def kd_like(function, **options):
    teacher = torch.randn(7, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return teacher, lambda z, y: function(z, teacher, y, reduction="sum", **options)


def distillation(function, closed_form, **options):
    teacher, loss = kd_like(function, **options)
    return loss, lambda z, y: closed_form(z, teacher, y)


def kd_gradient(z, t, y):
    return 3.0 * ((z / 3).softmax(1) - (t / 3).softmax(1))


def nkd_gradient(z, t, y):
    share = t.softmax(1).gather(1, y[:, None])
    return share * (z.softmax(1) - onehot(y)) + 1.5 * 3.0 * (nontarget(z / 3, y) - nontarget(t / 3, y))


def dkd_gradient(z, t, y):
    s_y, t_y = ((x / 3).softmax(1).gather(1, y[:, None]) for x in (z, t))
    rest, other = nontarget(z / 3, y), nontarget(t / 3, y)
    return 3.0 * (2.0 * (s_y - t_y) * (onehot(y) - rest) + 0.5 * (rest - other))


def binary_kl_gradient(z, t, y):
    return 3.0 * (torch.sigmoid(z / 3) - torch.sigmoid(t / 3))


def binary_kl_norm_gradient(z, t, y):
    return 1.5 * torch.tanh((z - t) / 6)


def sides(y):
    """1 for the target, -1 for every other class."""
    return 2 * onehot(y) - 1


def correctness_gradient(z, y):
    p = (z / 2).softmax(1)
    m, best = p.max(1, keepdim=True)
    correct = (best == y[:, None]).double()
    return 2 * (m - correct) * m * (onehot(best[:, 0]) - p) / 2


def own(z, y):
    """The probability of the target, as a column."""
    return z.softmax(1).gather(1, y[:, None])


def gaps(z, y):
    """z_k - z_y + 1 for the wrong classes, 0 for the target."""
    return z - z.gather(1, y[:, None]) + 1 - onehot(y)


def nce_gradient(z, y):
    losses = -z.log_softmax(1)
    total = losses.sum(1, keepdim=True)
    return (z.softmax(1) - onehot(y)) / total - losses.gather(1, y[:, None]) * (
        CLASSES * z.softmax(1) - 1
    ) / total**2


def sphere_gradient(z, y):
    length = z.norm(dim=1, keepdim=True)
    pull = 3 * ((3 * z / length).softmax(1) - onehot(y))
    return (pull - z / length * (pull * z / length).sum(1, keepdim=True)) / length


def one_weight(y):
    """Features whose variances are 0 for class 0 and 1 for the others."""
    size = (y != 0).double()[:, None] * 0.5**0.5
    return torch.cat([size, -size], 1)


def focal_gradient(z, y):
    p = own(z, y)
    return (1 - p) * (1 - p - 2 * p * p.log()) * (z.softmax(1) - onehot(y))


def hinge_gradient(z, y):
    inside = (gaps(z, y) > 0).double()
    return inside - inside.sum(1, keepdim=True) * onehot(y)


def z_gradient(z, y):
    deviation = z.std(1, keepdim=True, correction=0)
    scores = (z - z.mean(1, keepdim=True)) / deviation
    own_score = scores.gather(1, y[:, None])
    slope = torch.sigmoid(2 * (1.5 - own_score))
    return slope * ((1 + own_score * scores) / CLASSES - onehot(y)) / deviation


def share_gradient(derivative, value):
    """Of log sum_k t(z_k) - log t(z_y), from t and its derivative."""
    return lambda z, y: derivative(z) / value(z).sum(1, keepdim=True) - onehot(y) * derivative(z) / value(z)


PEER = 3 * torch.randn(7, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
HEADS = torch.linspace(-0.5, 0.5, CLASSES, dtype=torch.float64)[None]
WHOLE = torch.tensor([[[0, 7]]])


def bottleneck_gradient(z, y):
    """Of the conditional term in the predictions z, for inputs and targets made from PEER; loops over pairs."""
    x, v, truth = PEER / 3, z, sides(y)
    K = (-torch.cdist(x, x).square() / 2).exp()
    weight = 1 / K.sum(1, keepdim=True) ** 2
    P = weight * K * (-torch.cdist(v, v).square() / 2).exp()
    C = weight * K * (-torch.cdist(v, truth).square() / 2).exp()
    P, C = P / P.sum(), C / C.sum()
    rows = []
    for j in range(len(z)):
        pull = ((P[:, j] + P[j])[:, None] * (v - v[j])).sum(0)
        rows.append(pull - 2 * (C[j][:, None] * (truth - v[j])).sum(0))
    return torch.stack(rows)


def dice_gradient(z, y):
    p, g = z.softmax(1), onehot(y)
    overlap, size = 2 * (p * g).sum() + 1e-5, (p * p).sum() + g.sum() + 1e-5
    by_p = -2 * g / size + 2 * p * overlap / size**2
    return p * (by_p - (p * by_p).sum(1, keepdim=True))


def confident_gradient(z, y):
    p, q = z.softmax(1), PEER.softmax(1)
    best, label = q.max(1, keepdim=True)
    sure = (best >= 0.65).double()
    total = sure * best * (p - onehot(label[:, 0])) / sure.sum()
    out = (q < 0.1).double() * (1 - onehot(label[:, 0]))
    pulls = out * q.min(1, keepdim=True).values * p / (1 - p)  # of each excluded class
    return total + (pulls - p * pulls.sum(1, keepdim=True)) / out.sum()


def agreement_gradient(z, y):
    p, q = z.softmax(1), PEER.softmax(1)
    entropy = -(p * p.log()).sum(1, keepdim=True)
    return (p - q + 0.1 * p * (p.log() + entropy) / 2) / len(z)


def values(y):
    """A number for each target, between and beyond the places of a head on [-1, 1]."""
    return y.double() * 0.61 - 1.1


def value_head(head, *more):
    """A head's loss, and p - p*."""
    return (
        lambda z, y: head.loss(z, values(y), *more, reduction="sum"),
        lambda z, y: z.softmax(1) - head.to_probs(values(y), *more),
    )


def soft_count_gradient(z, y):
    """Bigrams matched anywhere in one sequence of seven tokens, q fixed: p c - r, triple loops."""
    log_p, size = z.log_softmax(1), len(z) - 1
    g = torch.stack(
        [torch.stack([log_p[t, y[i]] + log_p[t + 1, y[i + 1]] for i in range(size)]) for t in range(size)]
    )
    q, counts = (g / 2).softmax(0), torch.zeros_like(z)
    for t in range(size):
        for i in range(size):
            for j in range(2):
                counts[t + j, y[i + j]] += q[t, i] / (2 * size)
    return z.softmax(1) * counts.sum(1, keepdim=True) - counts


# name -> (loss of logits and targets, closed form of its gradient per row)
GRADIENTS = {
    "lib.losses.cs_ib": (  # the representation does not depend on the predictions here
        lambda z, y: lib.losses.cs_ib(PEER / 3, PEER, sides(y), z),
        bottleneck_gradient,
    ),
    "lib.losses.linear_cross_entropy": (
        lambda z, y: lib.losses.linear_cross_entropy(
            z, torch.eye(CLASSES, dtype=z.dtype), y, reduction="sum"
        ),
        lambda z, y: z.softmax(1) - onehot(y),
    ),
    "lib.losses.linear_comp_sum": (
        lambda z, y: lib.losses.linear_comp_sum(z, torch.eye(CLASSES).double(), y, 1.5, reduction="sum"),
        lambda z, y: z.softmax(1).gather(1, y[:, None]) ** 0.5 * (z.softmax(1) - onehot(y)),
    ),
    "lib.losses.linear_ldr_kl": (
        lambda z, y: lib.losses.linear_ldr_kl(
            z, torch.eye(CLASSES).double(), y, 3.0, margin=0.5, reduction="sum"
        ),
        lambda z, y: ((z + 0.5 * (1 - onehot(y))) / 3).softmax(1) - onehot(y),
    ),
    "lib.losses.comp_sum": (
        lambda z, y: lib.losses.comp_sum(z, y, 1.5, reduction="sum"),
        lambda z, y: z.softmax(1).gather(1, y[:, None]) ** 0.5 * (z.softmax(1) - onehot(y)),
    ),
    "lib.losses.generalized_cross_entropy": (
        lambda z, y: lib.losses.generalized_cross_entropy(z, y, 0.7, reduction="sum"),
        lambda z, y: z.softmax(1).gather(1, y[:, None]) ** 0.7 * (z.softmax(1) - onehot(y)),
    ),
    "lib.losses.mean_absolute_error": (
        lambda z, y: lib.losses.mean_absolute_error(z, y, reduction="sum"),
        lambda z, y: 2 * z.softmax(1).gather(1, y[:, None]) * (z.softmax(1) - onehot(y)),
    ),
    "lib.losses.smooth_adversarial_comp_sum": (  # without an adversary; the model returns its input
        lambda z, y: lib.losses.smooth_adversarial_comp_sum(
            lambda x: x, z, y, eps=0.0, tau=1.5, rho=2.0, bounds=None, reduction="sum"
        ),
        lambda z, y: (z / 2).softmax(1).gather(1, y[:, None]) ** 0.5 * ((z / 2).softmax(1) - onehot(y)) / 2,
    ),
    "lib.losses.normalized_softmax": (  # with the unit vectors as prototypes the features are the logits
        lambda z, y: lib.losses.normalized_softmax(
            z, torch.eye(CLASSES, dtype=z.dtype), y, scale=3.0, reduction="sum"
        ),
        sphere_gradient,
    ),
    "lib.losses.ldr_kl": (
        lambda z, y: lib.losses.ldr_kl(z, y, 3.0, margin=0.5, reduction="sum"),
        lambda z, y: ((z + 0.5 * (1 - onehot(y))) / 3).softmax(1) - onehot(y),
    ),
    "lib.losses.crammer_singer": (
        lambda z, y: lib.losses.crammer_singer(z, y, reduction="sum"),
        lambda z, y: onehot(gaps(z, y).argmax(1)) - onehot(y),
    ),
    "lib.losses.weston_watkins": (
        lambda z, y: lib.losses.weston_watkins(z, y, reduction="sum"),
        hinge_gradient,
    ),
    "lib.losses.symmetric_cross_entropy": (
        lambda z, y: lib.losses.symmetric_cross_entropy(z, y, 0.3, 0.7, reduction="sum"),
        lambda z, y: (0.3 + 0.7 * 4 * own(z, y)) * (z.softmax(1) - onehot(y)),
    ),
    "lib.losses.nce_rce": (
        lambda z, y: lib.losses.nce_rce(z, y, 2.0, 0.7, reduction="sum"),
        lambda z, y: 2 * nce_gradient(z, y) + 0.7 * 4 * own(z, y) * (z.softmax(1) - onehot(y)),
    ),
    "lib.losses.nce_agce": (
        lambda z, y: lib.losses.nce_agce(z, y, 2.0, 0.7, a=0.6, q=1.5, reduction="sum"),
        lambda z, y: (
            2 * nce_gradient(z, y) + 0.7 * (0.6 + own(z, y)) ** 0.5 * own(z, y) * (z.softmax(1) - onehot(y))
        ),
    ),
    "lib.losses.jensen_shannon": (
        lambda z, y: lib.losses.jensen_shannon(z, y, 0.3, reduction="sum"),
        lambda z, y: (
            (((0.3 + 0.7 * own(z, y)) / own(z, y)).log() - math.log(0.7))
            / -math.log(0.7)
            * own(z, y)
            * (z.softmax(1) - onehot(y))
        ),
    ),
    "lib.losses.bias_loss": (
        lambda z, y: lib.losses.bias_loss(one_weight(y), z, y, s=0.3, z0=0.7, reduction="sum")[0],
        lambda z, y: (
            torch.where(y == 0, 0.7, math.exp(0.3) - 0.3)[:, None].double() * (z.softmax(1) - onehot(y))
        ),
    ),
    "lib.losses.focal": (
        lambda z, y: lib.losses.focal(z, y, 2.0, reduction="sum"),
        focal_gradient,
    ),
    "lib.losses.l2_svm": (
        lambda z, y: lib.losses.l2_svm(z, y, C=0.7, reduction="sum"),
        lambda z, y: -2 * 0.7 * sides(y) * (1 - sides(y) * z).clamp_min(0),
    ),
    "lib.losses.l1_svm": (
        lambda z, y: lib.losses.l1_svm(z, y, C=0.7, reduction="sum"),
        lambda z, y: -0.7 * sides(y) * (sides(y) * z < 1),
    ),
    "lib.losses.z_loss": (
        lambda z, y: lib.losses.z_loss(z, y, a=2.0, b=1.5, reduction="sum"),
        z_gradient,
    ),
    "lib.losses.taylor_softmax_nll": (
        lambda z, y: lib.losses.taylor_softmax_nll(z, y, reduction="sum"),
        share_gradient(lambda z: 1 + z, lambda z: 1 + z + z**2 / 2),
    ),
    "lib.losses.spherical_softmax_nll": (
        lambda z, y: lib.losses.spherical_softmax_nll(z, y, eps=0.1, reduction="sum"),
        share_gradient(lambda z: 2 * z, lambda z: z**2 + 0.1),
    ),
    "lib.losses.dice_loss": (lambda z, y: lib.losses.dice_loss(z.softmax(1), onehot(y)), dice_gradient),
    "lib.losses.confident_bce": (lambda z, y: lib.losses.confident_bce(z, PEER), confident_gradient),
    "lib.losses.translation_consistency": (
        lambda z, y: lib.losses.translation_consistency(z.T[None], PEER.T[None], WHOLE, WHOLE),
        agreement_gradient,
    ),
    "lib.losses.entropy_regulariser": (  # a row of logits as the entropies of five heads at one position
        lambda z, y: lib.losses.entropy_regulariser([z[:, :, None]], HEADS, e_max=2.0, gamma=0.3),
        lambda z, y: 2 * (z - 2 * HEADS) * ((z - 2 * HEADS).abs() > 0.6) / z.numel(),
    ),
    "lib.losses.HLGauss": value_head(lib.losses.HLGauss(-1, 1, CLASSES)),
    "lib.losses.TwoHot": value_head(lib.losses.TwoHot(-1, 1, CLASSES)),
    "lib.losses.C51Projection": value_head(
        lib.losses.C51Projection(-1, 1, CLASSES),
        torch.linspace(0, 1, 7, dtype=torch.float64),
        torch.full((7, CLASSES), 1 / CLASSES, dtype=torch.float64),
    ),
    "lib.losses.eisl": (
        lambda z, y: lib.losses.eisl(
            z.log_softmax(1)[None], y[None], ngrams=(2,), gumbel=False, detach_q=True
        ),
        soft_count_gradient,
    ),
    "lib.calibration.correctness_aware_loss": (
        lambda z, y: lib.calibration.correctness_aware_loss(z, y, 2.0, reduction="sum"),
        correctness_gradient,
    ),
    "lib.distill.kd_loss": distillation(
        lambda z, t, y, **options: lib.distill.kd_loss(z, t, **options), kd_gradient, temperature=3.0
    ),
    "lib.distill.linear_distillation": distillation(
        lambda z, t, y, **options: lib.distill.linear_distillation(
            z, torch.eye(CLASSES).double(), t, torch.eye(CLASSES).double(), y, loss="nkd", **options
        ),
        nkd_gradient,
        temperature=3.0,
    ),
    "lib.distill.nkd_loss": distillation(lib.distill.nkd_loss, nkd_gradient, temperature=3.0),
    "lib.distill.binary_kl": distillation(
        lambda z, t, y, **options: lib.distill.binary_kl(z, t, **options), binary_kl_gradient, temperature=3.0
    ),
    "lib.distill.binary_kl_norm": distillation(
        lambda z, t, y, **options: lib.distill.binary_kl_norm(z, t, **options),
        binary_kl_norm_gradient,
        temperature=3.0,
    ),
    "lib.distill.dkd_loss": distillation(
        lib.distill.dkd_loss, dkd_gradient, temperature=3.0, alpha=2.0, beta=0.5
    ),
}


def test_every_loss_is_in_the_table():
    """What takes a `reduction` is a loss, and every loss has its four entries and its gradient checked here."""
    listed = dict(public_losses())
    for package in (lib.losses, lib.distill):
        for name in package.__all__:
            value = getattr(package, name)
            if inspect.isfunction(value) and "reduction" in inspect.signature(value).parameters:
                if name != "kd_decomposition":  # the terms of a loss, not one
                    assert f"{package.__name__}.{name}" in listed, f"{name} has no section 'At a glance'"
    for name, loss in listed.items():
        assert tuple(at_a_glance(loss)) == GLANCE, name
    assert set(GRADIENTS) == set(listed)


@pytest.mark.parametrize("name", sorted(GRADIENTS))
def test_gradient_is_the_closed_form(name):
    loss, closed_form = GRADIENTS[name]
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(7, CLASSES, dtype=torch.float64, generator=generator, requires_grad=True)
    y = torch.randint(CLASSES, (7,), generator=generator)
    (gradient,) = torch.autograd.grad(loss(z, y), z)
    torch.testing.assert_close(gradient, closed_form(z.detach(), y))
