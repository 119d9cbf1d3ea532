# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness and Adaptivity
#
# A label says which class is right. Sometimes it lies. {cite:t}`label-distribution-robust-loss` let an adversary put
# weight on *all* classes, make it pay for leaving the uniform weights, and train against the worst case. One price, $\lambda$,
# then leads from a support vector machine through cross-entropy to a linear loss that does not mind uniform label noise.
# In this chapter you derive this loss, LDR-KL, and see why its minimiser orders all classes and not only the best. You
# build ALDR-KL, which gives every training sample its own $\lambda$, and measure on noisy digits how much that helps. You also find
# that one detail of the released method, the scaling of the scores, undoes the theorem on the order.

# %% [markdown]
# ## Setup

# %% tags=["parameters"]
scale = "ci"
seed = 0

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn.metrics import hinge_loss, roc_auc_score

from lib.claims import Ledger, about, table
from lib.data import digits
from lib.losses import (
    ALDRKL,
    crammer_singer,
    generalized_cross_entropy,
    jensen_shannon,
    ldr_kl,
    mean_absolute_error,
    nce_agce,
    nce_rce,
    symmetric_cross_entropy,
    weston_watkins,
)
from lib.noise import class_dependent_flip, pair_transition, uniform_flip
from lib.train import progress

plt.style.use("lib.book")
torch.manual_seed(seed)
ledger = Ledger("label-distribution-robust-loss", scale, seed)


# %% [markdown]
# ## The problem
#
# Take one sample with ten classes. The model is sure of class 0: its score is $s$ above all others. The label says
# class 1. How hard does the loss push the
# favourite down? Plot the gradient on its score against $s$.

# %%
confidence = torch.linspace(0, 12, 61, dtype=torch.float64)
z = torch.zeros(61, 10, dtype=torch.float64)
z[:, 0] = confidence
z.requires_grad_()
claimed = torch.ones(61, dtype=torch.long)
figure, axis = plt.subplots(figsize=(6, 3.2))
for name, loss in {
    "cross-entropy": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "mean absolute error": lambda z, y: mean_absolute_error(z, y, reduction="sum"),
    "LDR-KL, λ = 10": lambda z, y: ldr_kl(z, y, 10.0, reduction="sum"),
}.items():
    (gradient,) = torch.autograd.grad(loss(z, claimed), z)
    axis.plot(confidence, gradient[:, 0], label=name)
axis.set(
    title="How hard a contradicting label pushes the favourite down",
    xlabel="lead of the favourite in score units",
    ylabel="gradient on the favourite",
    ylim=(-0.05, 1.05),
)
axis.legend(loc="center right")
plt.show()

# %% [markdown]
# Cross-entropy pushes with almost full strength as soon as the model has a clear opinion, so in the end it memorises wrong labels.
# The mean absolute error hardly pushes at all, right or wrong, which makes it robust and slow. LDR-KL with a large $\lambda$
# starts from a small push on every wrong class and lets it grow slowly. The knob between these behaviours is what you now derive.

# %% [markdown]
# ## Derivation
#
# ### An adversary with a budget
#
# Let $f \in \mathbb{R}^K$ be the scores, $y$ the label, $c \ge 0$ a margin, and
#
# $$ d_k = f_k - f_y + c\,\mathbb{1}[k \neq y], \qquad d_y = 0. \tag{1} $$
#
# $d_k$ says by how much class $k$ violates the label. An adversary chooses label weights $p$ in the simplex $\Delta_K$ to make the
# violation large, and pays $\lambda$ per nat for leaving the uniform weights:
#
# $$ L_\lambda(f, y) = \max_{p \in \Delta_K} \; \sum_k p_k d_k - \lambda\, \mathrm{KL}\bigl(p \,\|\, \tfrac1K\bigr), \qquad \lambda > 0. \tag{2} $$
#
# Other penalties give other losses; this one has a closed form. Let $p^\ast_k = e^{d_k/\lambda} / \sum_j e^{d_j/\lambda}$. Then
# $d_k = \lambda \log p_k^\ast + \lambda \log \sum_j e^{d_j/\lambda}$. Insert this:
#
# $$ \sum_k p_k d_k - \lambda\, \mathrm{KL}\bigl(p \| \tfrac1K\bigr)
#   = \lambda \log \Bigl(\tfrac1K \sum_j e^{d_j/\lambda}\Bigr) - \lambda\, \mathrm{KL}(p \,\|\, p^\ast). \tag{3} $$
#
# The last term is zero at $p = p^\ast$ and negative elsewhere, so
#
# $$ L_\lambda(f, y) = \lambda \log \Bigl( \frac1K \sum_k e^{d_k / \lambda} \Bigr), \qquad
#    p^\ast = \mathrm{softmax}\Bigl( \frac{f + c\, \mathbb{1}[\cdot \neq y]}{\lambda} \Bigr). \tag{4} $$
#
# Let an optimiser that knows nothing of this choose the weights. It finds the value of (4).

# %%
generator = torch.Generator().manual_seed(seed)
f = 2 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
y = torch.randint(5, (4,), generator=generator)
d = f - f.gather(1, y[:, None]) + 0.5 * (1 - F.one_hot(y, 5))
dual_errors = []
for lam in (0.5, 2.0, 10.0):
    values = ldr_kl(f, y, lam, margin=0.5, reduction="none")

    def negative_dual(free, row, lam=lam):
        """Minus (2) with p = softmax(free), and its gradient."""
        free = torch.tensor(free, requires_grad=True)
        p = free.softmax(0)
        value = (p * d[row]).sum() - lam * (p * (5 * p).log()).sum()
        (gradient,) = torch.autograd.grad(-value, free)
        return -value.item(), gradient.numpy()

    for row in range(4):
        found = minimize(
            negative_dual, [0.0] * 5, args=(row,), jac=True, options={"gtol": 1e-9}
        )
        dual_errors.append(abs(-found.fun - values[row].item()))
assert max(dual_errors) < 1e-8

# %% [markdown]
# ### One formula, many losses
#
# Four values of $\lambda$ and $c$ deserve a name:
#
# $$ L_\lambda \big|_{c = 0} = \lambda \bigl[ \mathrm{CE}(f/\lambda, y) - \log K \bigr], \qquad
#    L_1 \big|_{c = 0} = \mathrm{CE}(f, y) - \log K, \tag{5} $$
#
# $$ \lim_{\lambda \to 0} L_\lambda = \max_k d_k = \max\bigl(0, \max_{k \ne y} (c + f_k - f_y)\bigr), \qquad
#    \lim_{\lambda \to \infty} L_\lambda = \frac1K \sum_k d_k. \tag{6} $$
#
# The first of (6) is the hinge loss of {cite:t}`crammer2001algorithmic`: a free adversary puts all weight on the worst class. The second is linear: an adversary who cannot afford
# anything stays uniform. Both follow from the bounds $\max_k d_k - \lambda \log K \le L_\lambda \le \max_k d_k$ and from the expansion
# $L_\lambda = \bar d + \mathrm{Var}(d)/(2\lambda) + O(\lambda^{-2})$, with mean and variance over the classes.
#
# The constants matter. Forget the $1/K$ in (4) and the right limit diverges as $\lambda \log K$. Forget the outer $\lambda$, as in plain
# temperature-scaled cross-entropy, and every gradient shrinks by $1/\lambda$. By the envelope theorem the derivative of (2) is that of the objective at
# fixed $p^\ast$, since $p^\ast$ is optimal:
#
# $$ \frac{\partial L_\lambda}{\partial f} = p^\ast - e_y. \tag{7} $$

# %%
f.requires_grad_()
for lam in (0.1, 1.0, 10.0):
    (found,) = torch.autograd.grad(ldr_kl(f, y, lam, margin=0.5, reduction="sum"), f)
    wrong = 1 - F.one_hot(y, 5)
    expected = ((f.detach() + 0.5 * wrong) / lam).softmax(1) - F.one_hot(y, 5)
    torch.testing.assert_close(found, expected)
    without_outer = F.cross_entropy(f / lam, y, reduction="sum")  # the trap
    (scaled,) = torch.autograd.grad(without_outer, f)
    (right,) = torch.autograd.grad(ldr_kl(f, y, lam, reduction="sum"), f)
    torch.testing.assert_close(scaled, right / lam)
f = f.detach()

# %% [markdown]
# ### Why a large price is robust
#
# Sum the linear limit over all labels. The scores cancel:
#
# $$ \sum_{y=1}^K \frac1K \sum_k d_k = \sum_{y} \Bigl( \bar f - f_y + c\,\tfrac{K - 1}{K} \Bigr) = c\,(K - 1). \tag{8} $$
#
# A loss with constant sum $\sum_y L(f, y) = s$ is *symmetric* {cite:p}`ghosh2017robust`. Let uniform noise of rate $\eta$ replace the label by one of the others. The
# expected loss is then
#
# $$ (1 - \eta) L(f, y) + \frac{\eta}{K - 1} \bigl(s - L(f, y)\bigr)
#    = \Bigl(1 - \frac{\eta K}{K - 1}\Bigr) L(f, y) + \frac{\eta\, s}{K - 1}, \tag{9} $$
#
# an increasing function of the clean loss for $\eta < (K-1)/K$. Noise changes nothing but the step size. But a linear loss has no minimum: scores
# must be kept finite by other means. That is why the released code divides them by their mean absolute value.
#
# ### Why a finite price keeps the order of all classes
#
# Let $q$ be the true label distribution at an input, all $q_k > 0$, and take $c = 0$. By (7) the expected gradient is
# $\sum_y q_y (p^\ast - e_y) = p^\ast - q$. The expected loss is convex in $f$, so its minimisers are the zeros of this:
#
# $$ \mathrm{softmax}(f / \lambda) = q \iff f_k = \lambda \log q_k + \text{const}. \tag{10} $$
#
# That is strictly increasing in $q_k$. The $k$ largest scores belong to the $k$ most probable classes, for every $k$: the loss is
# *top-k consistent* for all $k$ at once. This argument is complete for free scores.
#
# A symmetric loss cannot do it, the paper shows, if it is consistent for the top class. See it at the mean absolute error, $2(1 - p_y)$:
#
# $$ \sum_y q_y \cdot 2 (1 - p_y) = 2 - 2 \sum_y q_y p_y, \qquad \text{least at } p = e_{\arg\max q}. \tag{11} $$
#
# All classes but the first end at probability zero, and nothing orders them.
#
# Now bring in the scaling. Let $\hat f = f / \operatorname{mean}_k |f_k|$, so $\sum_k |\hat f_k| = K$. For large $\lambda$ the expected loss is, up to $1/\lambda$,
#
# $$ \sum_k \Bigl(\frac1K - q_k\Bigr) \hat f_k \quad \text{on} \quad \sum_k |\hat f_k| = K. \tag{12} $$
#
# A linear function on an $\ell_1$ sphere is least at a corner: one score takes everything and the others are zero, tied. The term of order $1/\lambda$
# rounds the corner off a little. So with scaled scores a large $\lambda$ can lose the order that (10) promises. The theorem is about (4), not about the scaled loss.
#
# ### A price for every sample
#
# Which $\lambda$? Large for doubtful labels, small for trusted ones. Let the maximisation choose it too, held near a prior $\lambda_0$ with strength $\alpha$:
#
# $$ \max_{p \in \Delta_K} \max_{\lambda} \; \sum_k p_k d_k - \lambda\, \mathrm{KL}\bigl(p \| \tfrac1K\bigr)
#    - \frac{\alpha \log K}{2 \lambda_0} (\lambda - \lambda_0)^2. \tag{13} $$
#
# For fixed $p$ this is a concave parabola in $\lambda$. Its derivative vanishes at
#
# $$ \lambda = \lambda_0 \Bigl( 1 - \frac{\mathrm{KL}(p \| 1/K)}{\alpha \log K} \Bigr)
#    \in \Bigl[ \lambda_0 \bigl(1 - \tfrac1\alpha\bigr),\, \lambda_0 \Bigr], \tag{14} $$
#
# since $0 \le \mathrm{KL} \le \log K$. So $\alpha > 1$ keeps it positive. A flat $p$ leaves $\lambda$ at $\lambda_0$; a certain one lowers it. ALDR-KL alternates:
# $p$ from the stored $\lambda_i$ of sample $i$, then $\lambda_i$ by (14), then one gradient step on (4) at this $\lambda_i$. By the envelope theorem the gradient needs $\lambda_i$ as a constant
# only. In the released form $p$ is computed without the margin, $\lambda_0 = 10$, $\alpha = 2$, $c = 0.1$. Note what (14) sees: how sure the *model* is. The label does not enter.
#
# Check (14) against a grid.

# %%
p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
divergence = (p * (3 * p).log()).sum()
lam0, alpha = 2.0, 2.0
grid = torch.linspace(0.5, 2.5, 20001, dtype=torch.float64)
value = -grid * divergence - alpha * math.log(3) / (2 * lam0) * (grid - lam0) ** 2
best = lam0 * (1 - divergence / (alpha * math.log(3)))
assert abs(grid[value.argmax()] - best) < 2e-4

# %% [markdown]
# ## Reference implementation

# %% tags=["reference"]
import math

import torch
import torch.nn.functional as F


def ldr_kl_reference(logits, targets, lam, margin):
    """LDR-KL, mean over the rows: logits (N, K), targets (N,)."""
    wrong = 1 - F.one_hot(targets, logits.shape[1]).to(logits.dtype)
    d = logits - logits.gather(1, targets[:, None]) + margin * wrong
    return (lam * ((d / lam).logsumexp(1) - math.log(logits.shape[1]))).mean()


# %% tags=["reference"]
import math

import torch
import torch.nn.functional as F


def aldr_kl_reference(logits, targets, indices, lambdas, lam0, alpha, margin):
    """ALDR-KL, mean over the rows. `lambdas` (n_samples,) is updated in place; `indices` (N,) are sample ids."""
    num_classes = logits.shape[1]
    with torch.no_grad():  # lam is a constant for the gradient
        p = (logits / lambdas[indices, None]).softmax(1)
        divergence = torch.special.xlogy(p, num_classes * p).sum(1)
        lam = lam0 * (1 - divergence / (alpha * math.log(num_classes)))
        lambdas[indices] = lam.to(lambdas.dtype)
        lam = lambdas[indices]
    wrong = 1 - F.one_hot(targets, num_classes).to(logits.dtype)
    d = logits - logits.gather(1, targets[:, None]) + margin * wrong
    losses = lam * ((d / lam[:, None]).logsumexp(1) - math.log(num_classes))
    penalty = alpha * math.log(num_classes) / (2 * lam0) * (lam - lam0) ** 2
    return (losses - penalty).mean()


# %% [markdown]
# By hand: two classes, scores $(\log 3, 0)$, label 1, $\lambda = 1$, no margin. Then $d = (\log 3, 0)$ and the loss is $\log \frac{3 + 1}{2} = \log 2$. With label 0
# it is $\log\frac{1/3 + 1}{2} = \log \frac23$, negative: better than uniform. For ALDR-KL, equal scores leave $\lambda$ at $\lambda_0$ and the loss at 0; a hopelessly certain
# model halves it at $\alpha = 2$.

# %%
scores = torch.tensor([[math.log(3), 0.0]])
for label, expected in ((1, math.log(2)), (0, math.log(2 / 3))):
    found = ldr_kl_reference(scores, torch.tensor([label]), 1.0, 0.0)
    assert abs(found.item() - expected) < 1e-6
stored = torch.full((3,), 4.0)
scores = torch.tensor([[0.0, 0.0], [900.0, 0.0]])
found = aldr_kl_reference(
    scores[:1], torch.tensor([0]), torch.tensor([2]), stored, 4.0, 2.0, 0.0
)
aldr_kl_reference(
    scores[1:], torch.tensor([0]), torch.tensor([0]), stored, 4.0, 2.0, 0.0
)
assert abs(found.item()) < 1e-6
torch.testing.assert_close(stored, torch.tensor([2.0, 4.0, 4.0]))

# %% [markdown]
# ## The library
#
# `lib.losses.ldr_kl` and `lib.losses.ALDRKL` are the same losses with checks, class weights and ignored targets where they make sense, and the scaling of the scores.
# The difference of logarithms in (4) loses digits when $\lambda$ is large, so the library takes it in float64. The module refuses a
# sample that comes twice in a batch, a sign that positions were passed instead of ids, and stores its $\lambda_i$ in its `state_dict`. For one $\lambda$ the loss is a function of the
# cross-entropy of the scaled scores alone, and `lib.losses.linear_ldr_kl` has it from hidden vectors, without the matrix of scores.

# %%
z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
y = torch.randint(4, (6,))
pair = ldr_kl_reference(z, y, 3.0, 0.2), ldr_kl(z, y, 3.0, margin=0.2)
torch.testing.assert_close(*pair)
torch.testing.assert_close(*(torch.autograd.grad(value, z)[0] for value in pair))
stored, ids = torch.full((20,), 2.0), torch.tensor([3, 1, 19, 0, 7, 8])
module = ALDRKL(20, 2.0, margin=0.2, normalize=False)
for _ in range(2):
    pair = (
        aldr_kl_reference(z, y, ids, stored, 2.0, 2.0, 0.2),
        module(z, y, ids),
    )
    torch.testing.assert_close(*pair, check_dtype=False)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, z)[0] for value in pair), check_dtype=False
    )
    torch.testing.assert_close(module.lambdas, stored)

exact = ldr_kl(z.detach(), y, 1e5).item()
errors = [
    abs(function(z.detach().float(), y, 1e5).item() - exact)
    for function in (lambda z, y, lam: ldr_kl_reference(z, y, lam, 0.0), ldr_kl)
]
assert errors[1] < 1e-6
table(
    ("error in float32 at λ = 1e5", "reference", "library"),
    ("", about(errors[0], 1), "below 1e-6"),
)

# %% [markdown]
# ## Experiment
#
# ### Limits
#
# Random scores, and the distance of LDR-KL from its two limits (6), with scikit-learn's multi-class hinge loss as the judge of the left one.

# %%
f = torch.randn(200, 6, generator=generator, dtype=torch.float64)
y = torch.randint(6, (200,), generator=generator)
mean_d = (f - f.gather(1, y[:, None]) + 1 - F.one_hot(y, 6)).mean(1)
hinge = hinge_loss(y.numpy(), f.numpy(), labels=range(6))
lams = torch.logspace(-3, 5, 17).tolist()
to_hinge = [abs(ldr_kl(f, y, lam, margin=1.0).item() - hinge) for lam in lams]
to_linear = [
    (ldr_kl(f, y, lam, margin=1.0, reduction="none") - mean_d).abs().mean().item()
    for lam in lams
]
figure, axis = plt.subplots(figsize=(6, 3.2))
axis.loglog(lams, to_hinge, label="to Crammer-Singer")
axis.loglog(lams, to_linear, label="to the mean violation")
axis.set(
    title="LDR-KL between its two limits",
    xlabel="λ",
    ylabel="distance of the loss",
)
axis.legend(loc="lower center")
plt.show()

# %% [markdown]
# Both distances fall in proportion: to $\lambda$ on the left (with $\lambda \log K$, so the hinge loss takes a really small $\lambda$), to $1/\lambda$ on the right, as (6) and the expansion after it say. In between, at $\lambda = 1$, is cross-entropy (with a margin).
#
# ### Is the whole order recovered?
#
# One input, six classes with known probabilities, free scores. Minimise the expected loss of each kind by Adam from four random starts. Then
# look at two numbers: does the order of the scores match that of the probabilities, and how large is the smallest step between neighbours,
# relative to the range of the scores? A tie shows as a step near zero.

# %%
q = torch.tensor([0.35, 0.25, 0.18, 0.12, 0.07, 0.03], dtype=torch.float64)
starts = 4


def adaptive(**options):
    """ALDR-KL for 24 rows: every start with each of the six labels."""
    module, ids = ALDRKL(24, reduction="none", **options), torch.arange(24)
    return lambda z, y: module(z, y, ids)


def minimiser(loss, steps=1200):
    """Scores (starts, 6) that minimise the expected loss under q."""
    f = 0.1 * torch.randn(starts, 6, generator=generator, dtype=torch.float64)
    f.requires_grad_()
    optimizer = torch.optim.Adam([f], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    labels = torch.arange(6).repeat(starts)
    for _ in range(steps):
        every = f[:, None].expand(starts, 6, 6).reshape(-1, 6)
        optimizer.zero_grad()
        (loss(every, labels).view(starts, 6) * q).sum().backward()
        optimizer.step()
        schedule.step()
    return f.detach()


kinds = {
    "CE": lambda z, y: ldr_kl(z, y, reduction="none"),
    "LDR-KL, λ = 3": lambda z, y: ldr_kl(z, y, 3.0, reduction="none"),
    "ALDR-KL, λ₀ = 1": adaptive(lam0=1.0, margin=0.1, normalize=False),
    "ALDR-KL, λ₀ = 0.3, scaled": adaptive(lam0=0.3),
    "ALDR-KL, λ₀ = 10, scaled": adaptive(lam0=10.0),
    "MAE": lambda z, y: mean_absolute_error(z, y, reduction="none"),
    "Crammer-Singer": lambda z, y: crammer_singer(z, y, reduction="none"),
}
minimisers = {name: minimiser(loss) for name, loss in progress(kinds.items())}
top, ordered, step, spread = {}, {}, {}, {}
for name, found in minimisers.items():
    falls = found[:, :-1] - found[:, 1:]  # from each class to the next less probable
    top[name] = bool((found.argmax(1) == 0).all())
    ordered[name] = bool((falls > 0).all())
    spread[name] = (found.amax(1) - found.amin(1)).max().item()
    step[name] = (falls.amin(1) / (found.amax(1) - found.amin(1))).max().item()
table(
    ("loss", "smallest step / range, best of four starts"),
    *(
        (name, about(step[name], 2) if spread[name] > 0.05 else "all scores equal")
        for name in kinds
    ),
)

# %%
figure, axis = plt.subplots(figsize=(6.5, 3.4))
for name, marker in zip(list(kinds)[:6], "os^vDx", strict=True):
    found = minimisers[name][0]
    found = (found - found.amin()) / (found.amax() - found.amin())
    axis.plot(range(1, 7), found, marker=marker, label=name)
axis.set(
    title="Scores at the minimum, rescaled to [0, 1]",
    xlabel="class, from most to least probable",
    ylabel="score",
)
axis.legend(loc="upper right", fontsize=8)
plt.show()

# %% [markdown]
# Cross-entropy, LDR-KL and ALDR-KL on raw scores fall from class to class. So does ALDR-KL on scaled scores with a small $\lambda_0$. The absolute error raises the first
# class and leaves the others where they started. Crammer and Singer's loss, with no class above one half, prefers all scores equal. And look
# at $\lambda_0 = 10$ on scaled scores, the released setting: the middle classes lie on one line. That is (12) at work: the best score and the worst are
# separated, everything between is tied. You can have scaled scores with a large $\lambda$, or the theorem.
#
# ### Wrong labels
#
# Digits, a network with one hidden layer, 900 training samples. Labels are clean, or 60 % uniform noise, or 40 % confusions between 4 and 9, 3 and 8, 1 and 7.
# The noise is drawn once and stays, in the training and in the validation part. Test labels are clean and choose nothing: the learning rate of every loss
# is chosen on the *noisy* validation part. Several draws of split, noise and initial weights are trained at once as one
# batch of matrices. The adaptive loss sees one long list of samples, with an index for each sample of each draw.

# %%
draws, epochs, batch = (4, 15, 60) if scale == "ci" else (10, 40, 60)
rates = (5e-3, 2e-2) if scale == "ci" else (2e-3, 5e-3, 2e-2)
swaps = [(4, 9), (3, 8), (1, 7)]


def noisy(labels, setting, noise):
    kind, rate = setting
    if kind == "uniform":
        return uniform_flip(labels, rate, 10, generator=noise)
    return class_dependent_flip(
        labels, pair_transition(swaps, rate, 10), generator=noise
    )


def make_data(settings):
    """Stacked over settings and draws: inputs, noisy and clean labels, noisy validation part, clean test part."""
    members = []
    for setting in settings:
        for draw in range(100 * seed, 100 * seed + draws):
            (x, y), (val_x, val_y), (test_x, test_y) = digits(
                (900, 300, 597), seed=draw, flat=True
            )
            noise = torch.Generator().manual_seed(draw)
            members.append(
                (
                    x,
                    noisy(y, setting, noise),
                    y,
                    val_x,
                    noisy(val_y, setting, noise),
                    test_x,
                    test_y,
                )
            )
    return [torch.stack(part) for part in zip(*members, strict=True)]


def forward(weights, x):
    """Networks 64-64-10, one per member: x (members, n, 64) -> logits (members, n, 10)."""
    hidden = torch.baddbmm(weights[1], x, weights[0]).relu()
    return torch.baddbmm(weights[3], hidden, weights[2])


def train(data, make_loss, rates):
    """Validation and test accuracy (rates, members), and the loss with what it stored."""
    x, y, _, val_x, val_y, test_x, test_y = data
    members, n = y.shape
    x, y, val_x, test_x = (
        part.repeat(len(rates), *[1] * (part.dim() - 1))
        for part in (x, y, val_x, test_x)
    )
    groups, shapes = [], (((64, 64), 64), ((1, 64), 64), ((64, 10), 64), ((1, 10), 64))
    for _ in rates:  # every learning rate has the same initial weights
        start = torch.Generator().manual_seed(seed)
        groups.append(
            [
                (
                    (2 * torch.rand(members, *shape, generator=start) - 1) / fan_in**0.5
                ).requires_grad_()
                for shape, fan_in in shapes
            ]
        )
    optimizer = torch.optim.Adam(
        [
            {"params": group, "lr": rate}
            for group, rate in zip(groups, rates, strict=True)
        ]
    )
    loss = make_loss(len(y) * n)
    shuffle = torch.Generator().manual_seed(seed)
    first = n * torch.arange(len(y))[:, None]
    for _ in range(epochs):
        for index in torch.randperm(n, generator=shuffle).split(batch):
            weights = [torch.cat(part) for part in zip(*groups, strict=True)]
            logits = forward(weights, x[:, index]).flatten(0, 1)
            ids = (first + index).flatten()  # of the sample, not of its place
            optimizer.zero_grad()
            (loss(logits, y[:, index].flatten(), ids) / len(index)).backward()
            optimizer.step()
    with torch.no_grad():
        weights = [torch.cat(part) for part in zip(*groups, strict=True)]
        validation, test = (
            (forward(weights, inputs).argmax(2).view(len(rates), members, -1) == labels)
            .float()
            .mean(2)
            for inputs, labels in ((val_x, val_y), (test_x, test_y))
        )
    return validation, test, loss


def plain(function, **options):
    """A loss without memory, as a factory like `adaptive_loss`."""
    return lambda n: lambda z, y, ids: function(z, y, reduction="sum", **options)


def adaptive_loss(lam0, alpha=2.0):
    return lambda n: ALDRKL(n, lam0, alpha=alpha, reduction="sum")


def scaled_ldr(lam):
    return plain(ldr_kl, lam=lam, margin=0.1, normalize=True)


names = {"clean": ("uniform", 0.0), "60 % uniform": ("uniform", 0.6)}
names["40 % confused"] = ("confused", 0.4)
arms = {  # each with the settings that it may choose from
    "CE": [plain(ldr_kl, lam=1.0)],
    "GCE": [plain(generalized_cross_entropy)],
    "Crammer-Singer": [plain(crammer_singer)],
    "LDR-KL": [scaled_ldr(10.0)],
    "ALDR-KL": [adaptive_loss(10.0)],
}
if scale == "full":
    names |= {"30 % uniform": ("uniform", 0.3)}
    names |= {f"{r} % confused": ("confused", r / 100) for r in (10, 30, 50)}
    arms |= {
        "MAE": [plain(mean_absolute_error)],
        "SCE": [plain(symmetric_cross_entropy)],
        "NCE+RCE": [plain(nce_rce)],
        "NCE+AGCE": [plain(nce_agce)],
        "JSC": [plain(jensen_shannon, pi=pi) for pi in (0.1, 0.5, 0.9)],
        "Weston-Watkins": [plain(weston_watkins)],
        "LDR-KL": [scaled_ldr(lam) for lam in (0.3, 1.0, 3.0, 10.0, 30.0)],
        "ALDR-KL": [adaptive_loss(lam) for lam in (0.3, 1.0, 3.0, 10.0, 30.0)],
    }

data = make_data(names.values())
chosen = {}  # test accuracy in percent (settings, draws)
for name, options in progress(arms.items(), desc="losses"):
    runs = [train(data, make_loss, rates)[:2] for make_loss in options]
    validation, test = (
        torch.cat(part).view(-1, len(names), draws) for part in zip(*runs, strict=True)
    )
    best = validation.mean(2).argmax(0)  # one choice per setting
    chosen[name] = 100 * test[best, torch.arange(len(names))]
means = torch.stack([chosen[name].mean(1) for name in arms])
places = (means[None] > means[:, None]).sum(1).float() + 1  # (losses, settings)
ranks = dict(zip(arms, places.mean(1).tolist(), strict=True))
table(
    ("test accuracy in %", *names, "mean rank"),
    *(
        (name, *(about(value) for value in chosen[name].mean(1)), about(ranks[name]))
        for name in arms
    ),
)

# %%
figure, axis = plt.subplots(figsize=(7, 3.4))
for place, name in enumerate(arms):
    positions = torch.arange(len(names)) + 0.15 * (place - (len(arms) - 1) / 2)
    axis.errorbar(
        positions, chosen[name].mean(1), chosen[name].std(1), fmt="o", label=name
    )
axis.set_xticks(range(len(names)), list(names))
axis.set(
    title="Test accuracy by kind of label noise",
    ylabel="accuracy in %",
    ylim=(30, 100),
)
axis.legend(loc="lower right", fontsize=8)
plt.show()

# %% [markdown]
# Points are means over the draws, bars their standard deviation. Under clean labels the losses lie close together. Under
# uniform noise cross-entropy loses most of all but the hinge loss, whose one worst class is nearly always a wrong one. GCE, LDR-KL and ALDR-KL are
# close to one another and clearly above cross-entropy. The adaptive loss does not stand out from the loss with one fixed $\lambda$. Why not?
#
# ### What the prices learn
#
# Train ALDR-KL under 60 % uniform noise with different $\lambda_0$ and $\alpha$ at one learning rate. Then ask of the stored $\lambda_i$: how far did they move, and do they tell flipped
# labels from right ones? The latter is the area under the ROC curve of $\lambda_i$ as a detector: one half is chance.

# %%
sweep = [(0.3, 2.0), (1.0, 2.0), (3.0, 2.0), (10.0, 2.0), (30.0, 2.0)]
sweep += [(1.0, 1.1), (10.0, 1.1)]
uniform = make_data([("uniform", 0.6)])
flipped = (uniform[1] != uniform[2]).flatten()
stored, found_rows, auroc, moved, sweep_accuracy = {}, [], {}, {}, {}
for setting in progress(sweep, desc="sweep"):
    _, test, loss = train(uniform, adaptive_loss(*setting), rates[:1])
    relative = loss.lambdas / setting[0]
    stored[setting] = relative
    auroc[setting] = roc_auc_score(flipped, relative)
    moved[setting] = (1 - relative).mean().item()
    sweep_accuracy[setting] = 100 * test.mean().item()
    found_rows.append(
        (
            f"λ₀ = {setting[0]:g}, α = {setting[1]:g}",
            about(sweep_accuracy[setting]),
            about(100 * moved[setting], 2),
            about(auroc[setting], 2),
        )
    )
fixed = {
    name: 100 * train(uniform, make_loss, rates[:1])[1].mean().item()
    for name, make_loss in (("CE", arms["CE"][0]), ("LDR-KL", scaled_ldr(10.0)))
}
table(
    (
        "60 % uniform noise",
        "accuracy in %",
        "mean fall of λᵢ in %",
        "AUROC flipped / right",
    ),
    *found_rows,
    *((name, about(value), "", "") for name, value in fixed.items()),
)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
for axis, setting in zip(axes, ((1.0, 2.0), (10.0, 2.0)), strict=True):
    both = [stored[setting][~flipped], stored[setting][flipped]]
    axis.hist(both, bins=30, density=True, label=["right label", "flipped label"])
    axis.set(title=f"λ₀ = {setting[0]:g}", xlabel="λᵢ / λ₀", ylabel="density")
axes[0].legend(loc="upper left")
figure.suptitle("The price of each sample after training, 60 % uniform noise")
plt.show()

# %% [markdown]
# Look at the horizontal axes. At $\lambda_0 = 1$ the prices spread widely, and flipped labels tend to keep a high one. At
# $\lambda_0 = 10$ they carry some of the same information, but within a percent or so of $\lambda_0$: scaled scores divided by ten make a nearly flat softmax, its
# divergence from uniform is small, and (14) hardly moves. So the setting that is accurate is one in which adaptivity does almost nothing, and the setting that adapts is one that
# fits the noise. What helps against noise here is the large $\lambda$ with scaled scores.

# %% [markdown]
# ## Claims

# %%
at_1e5 = abs(ldr_kl(f, y, 1e-5, margin=1.0).item() - hinge)
own_way = ldr_kl(f, y, 1.0).item() + math.log(6) - F.cross_entropy(f, y).item()
ledger.claim(
    "One worst case over label weights contains cross-entropy, the multi-class hinge loss and temperature-scaled cross-entropy",
    paper="shown in closed form",
    measured=f"dual against closed form {about(max(dual_errors), 1)}; distance to the hinge {about(to_hinge[0], 2)} at "
    f"λ = 1e-3, to the linear loss {about(to_linear[14], 2)} at 1e4",
    checks={
        "maximum over the weights = closed form within 1e-10, three prices": max(
            dual_errors
        )
        <= 1e-10,
        "λ = 1, c = 0: cross-entropy minus log K within 1e-12": abs(own_way) <= 1e-12,
        "λ = 1e-3: scikit-learn's hinge loss within λ log K": to_hinge[0]
        <= 1e-3 * math.log(6) + 1e-12,
        "λ = 1e-5: scikit-learn's hinge loss within 1e-4": at_1e5 <= 1e-4,
        "λ = 1e4: the mean violation within 1e-4": to_linear[14] <= 1e-4,
    },
)

# %%
raw = ("CE", "LDR-KL, λ = 3", "ALDR-KL, λ₀ = 1")
released = "ALDR-KL, λ₀ = 10, scaled"
to_formula = minimisers["LDR-KL, λ = 3"] - 3 * q.log()
ledger.claim(
    "LDR-KL is top-k consistent for every k; a symmetric loss that is right for the top class is not",
    paper="theorems",
    measured="smallest step between classes / range: "
    + ", ".join(f"{name} {about(step[name], 2)}" for name in (*raw, released, "MAE")),
    checks={
        "CE, LDR-KL and ALDR-KL on raw scores recover the whole order, steps >= 5 % of the range": all(
            ordered[name] and step[name] >= 0.05 for name in raw
        ),
        "LDR-KL: the scores are λ log q plus a constant within 1e-3": bool(
            (to_formula.amax(1) - to_formula.amin(1) < 1e-3).all()
        ),
        "MAE finds the best class and not the order of the others (smallest step <= 3 %)": top[
            "MAE"
        ]
        and step["MAE"] <= 0.03,
        "Crammer-Singer without a class above one half: all scores equal within 0.05": spread[
            "Crammer-Singer"
        ]
        < 0.05,
        "ALDR-KL with scaled scores, λ₀ = 0.3, recovers the order, steps >= 5 %": ordered[
            "ALDR-KL, λ₀ = 0.3, scaled"
        ]
        and step["ALDR-KL, λ₀ = 0.3, scaled"] >= 0.05,
        "ALDR-KL with scaled scores, λ₀ = 10, recovers the order, steps >= 1 %": ordered[
            released
        ]
        and step[released] >= 0.01,
    },
    fails={
        "ALDR-KL with scaled scores, λ₀ = 10, recovers the order, steps >= 1 %": "The theorem is about raw scores. Divided by their mean "
        "absolute value they live on an l1 sphere, where a nearly linear loss is least close to a corner: the middle classes tie."
    },
)

# %%
gains = {
    name: chosen[name][1] - chosen["CE"][1] for name in ("LDR-KL", "ALDR-KL")
}  # per draw, 60 % uniform
mean_gains = {name: gain.mean().item() for name, gain in gains.items()}
apart = (chosen["ALDR-KL"].mean(1) - chosen["LDR-KL"].mean(1)).abs().max().item()
ledger.claim(
    "LDR-KL and ALDR-KL resist wrong labels, and ALDR-KL competes with the best",
    paper="competitive with 13 losses on seven data sets in six noisy settings and one clean",
    measured="points above cross-entropy at 60 % uniform noise: "
    + ", ".join(f"{name} {about(gain, 2)}" for name, gain in mean_gains.items())
    + "; mean rank of five: "
    + ", ".join(f"{name} {about(rank, 2)}" for name, rank in ranks.items()),
    checks={
        "60 % uniform, one learning rate: both >= 1 point above CE": min(
            fixed["LDR-KL"], sweep_accuracy[10.0, 2.0]
        )
        >= fixed["CE"] + 1,
        "60 % uniform, chosen learning rates: mean gain of the two >= 0.5 points": sum(
            mean_gains.values()
        )
        >= 1,
        "40 % confused: both >= 1 point above CE": min(
            chosen[name][2].mean() - chosen["CE"][2].mean() for name in gains
        )
        >= 1,
        "mean rank of ALDR-KL better than that of CE": ranks["ALDR-KL"] < ranks["CE"],
        "60 % uniform: both >= 3 points above CE, in every draw with chosen rates and in the mean with one rate": all(
            bool((gain >= 3).all()) for gain in gains.values()
        )
        and min(fixed["LDR-KL"], sweep_accuracy[10.0, 2.0]) >= fixed["CE"] + 3,
        "mean rank of ALDR-KL <= 2": ranks["ALDR-KL"] <= 2,
    },
    fails={
        "60 % uniform: both >= 3 points above CE, in every draw with chosen rates and in the mean with one rate": "A small learning rate, chosen on the noisy validation part, keeps "
        "cross-entropy from memorising too. The mean gain is positive, but draws and rates move it across this margin.",
        "mean rank of ALDR-KL <= 2": "Generalized cross-entropy is at least as good here, and under clean labels a large price costs some accuracy.",
    },
)

# %%
ledger.claim(
    "ALDR-KL adapts its price to the noise of each label",
    paper="a temperature per sample, λ₀ = 10 recommended",
    measured=f"AUROC of the prices {about(auroc[10.0, 2.0], 2)} at λ₀ = 10, {about(auroc[1.0, 2.0], 2)} at 1; mean fall "
    f"{about(100 * moved[10.0, 2.0], 2)} % and {about(100 * moved[1.0, 2.0], 2)} %; ALDR-KL and LDR-KL differ by at most {about(apart, 2)} points",
    checks={
        "AUROC of flipped against right >= 0.55 at λ₀ = 10": auroc[10.0, 2.0] >= 0.55,
        "AUROC of flipped against right >= 0.60 at λ₀ = 1": auroc[1.0, 2.0] >= 0.60,
        "every price between λ₀ (1 - 1/α) and λ₀": all(
            bool(((values >= 1 - 1 / alpha - 1e-6) & (values <= 1 + 1e-6)).all())
            for (_, alpha), values in stored.items()
        ),
        "λ₀ = 1: prices fall by >= 5 % in the mean": moved[1.0, 2.0] >= 0.05,
        "λ₀ = 10: prices fall by >= 5 % in the mean": moved[10.0, 2.0] >= 0.05,
        "λ₀ = 1, where prices move: accuracy at least that of CE": sweep_accuracy[
            1.0, 2.0
        ]
        >= fixed["CE"],
        "AUROC of flipped against right >= 0.75 at λ₀ = 1": auroc[1.0, 2.0] >= 0.75,
    },
    fails={
        "λ₀ = 10: prices fall by >= 5 % in the mean": "Scaled scores divided by ten give a nearly uniform softmax, whose divergence moves no price.",
        "λ₀ = 1, where prices move: accuracy at least that of CE": "A price near one on scaled scores is a sharp loss: it fits the wrong labels.",
        "AUROC of flipped against right >= 0.75 at λ₀ = 1": "The price sees how sure the model is, not the label; a right label in a hard place looks the same.",
    },
)

# %%
if scale == "ci":
    ledger.untested(
        "ALDR-KL against 13 losses on ALOI, News20, Letter, Vowel, Kuzushiji-49, CIFAR-100 and Tiny-ImageNet",
        paper="stable and competitive; best or near it in many cells",
        reason="It takes days of GPU time and data that are not at hand. The digits with five losses stand in, and with eleven at full scale.",
    )
    ledger.untested(
        "No symmetric, top-1 consistent loss is top-k consistent for all k >= 2",
        paper="theorem",
        reason="A statement about all symmetric losses; the chapter shows it for the mean absolute error only.",
    )

# %%
ledger

# %% [markdown]
# ## What is different from the paper
#
# - **Scale.** The paper trains on seven data sets from Vowel to Tiny-ImageNet with 13 rival losses and five-fold cross-validation. Here it is the 8 × 8 digits, three kinds of
#   labels and five losses; settings are chosen on one noisy validation part. `scale="full"` runs the digits with eleven losses (ten besides ALDR-KL), seven kinds of labels, more draws and a choice of $\lambda$.
# - **Rivals.** The rank-based loss of the paper's list is left out.
# - **Scaling.** Both LDR-KL and ALDR-KL divide the scores by their mean absolute value. The released LDR-KL applies a softplus first; this
#   chapter does not, so that the two differ in the adaptivity alone.
# - **Proofs.** Top-k consistency is proved for free scores and $c = 0$. The impossibility for symmetric losses is shown for one of them. The effect of the
#   scaling on the order, (12), is this chapter's observation.
#
# ## Exercises
#
# **1. The adversary's weights.** Write `answer(logits, targets, lam, margin)` that returns the maximising label weights of (2), shape (N, K).


# %% tags=["exercise"]
def check_1(answer):
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 4, generator=draw, dtype=torch.float64)
    targets = torch.randint(4, (5,), generator=draw)
    d = logits - logits.gather(1, targets[:, None]) + 0.3 * (1 - F.one_hot(targets, 4))
    for lam in (0.5, 2.0):
        p = answer(logits, targets, lam, 0.3)
        assert isinstance(p, torch.Tensor) and p.shape == (5, 4), "return (N, K)"
        torch.testing.assert_close(p.sum(1), torch.ones(5, dtype=torch.float64))
        value = (p * d).sum(1) - lam * (p * (4 * p).log()).sum(1)
        best = ldr_kl(logits, targets, lam, margin=0.3, reduction="none")
        torch.testing.assert_close(value, best)


# %% tags=["solution", "hide-cell"]
def solution_1(logits, targets, lam, margin):
    wrong = 1 - F.one_hot(targets, logits.shape[1])
    return ((logits + margin * wrong) / lam).softmax(1)  # f_y cancels: (4)


check_1(solution_1)

# %% [markdown]
# **2. Only cross-entropy at hand.** Write `answer(logits, targets, lam)` that computes the mean LDR-KL without margin with `F.cross_entropy` alone. Both constants of (5) must be there.


# %% tags=["exercise"]
def check_2(answer):
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 5, generator=draw, dtype=torch.float64)
    targets = torch.randint(5, (6,), generator=draw)
    for lam in (0.2, 1.0, 7.0):
        found = answer(logits, targets, lam)
        assert isinstance(found, torch.Tensor), "return a scalar tensor"
        torch.testing.assert_close(found, ldr_kl(logits, targets, lam))


# %% tags=["solution", "hide-cell"]
def solution_2(logits, targets, lam):
    return lam * (F.cross_entropy(logits / lam, targets) - math.log(logits.shape[1]))


check_2(solution_2)

# %% [markdown]
# **3. How far can a price fall?** Scores are scaled to mean absolute value 1. Which scores of $K$ classes make $\mathrm{softmax}(\hat f / \lambda_0)$ furthest from
# uniform? Assume that one score takes everything, $\hat f = (K, 0, \dots, 0)$, and write `answer(lam0, alpha, K)` for the $\lambda / \lambda_0$ of (14) after the first update. What does it
# say about $\lambda_0 = 10$, $K = 10$?


# %% tags=["exercise"]
def check_3(answer):
    for lam0, alpha, classes in ((10.0, 2.0, 10), (1.0, 1.1, 10), (3.0, 2.0, 4)):
        module = ALDRKL(1, lam0, alpha=alpha).double()
        scores = torch.zeros(1, classes, dtype=torch.float64)
        scores[0, 0] = 1.0
        module(scores, torch.tensor([0]), torch.tensor([0]))
        found = answer(lam0, alpha, classes)
        assert isinstance(found, float), "return a number"
        assert abs(found - module.lambdas.item() / lam0) < 1e-6


# %% tags=["solution", "hide-cell"]
def solution_3(lam0, alpha, K):
    scores = torch.zeros(K, dtype=torch.float64)
    scores[0] = K
    p = (scores / lam0).softmax(0)
    divergence = (p * (K * p).log()).sum().item()
    # at lam0 = 10 and K = 10 even this falls by a few percent only
    return 1 - divergence / (alpha * math.log(K))


check_3(solution_3)

# %% [markdown]
# ## Summary
#
# - LDR-KL is a worst case over label weights with a KL price, and at the same time $\lambda$ times cross-entropy with temperature $\lambda$, less a constant. Its gradient is $p^\ast - e_y$ for every $\lambda$.
# - $\lambda \to 0$ is Crammer and Singer's hinge loss; $\lambda \to \infty$ is linear and symmetric, hence indifferent to uniform noise.
# - For raw scores the minimiser orders all classes. Scaling the scores, as released, ties the middle ones at a large $\lambda$.
# - ALDR-KL lowers the price of samples of which the model is sure. At the recommended $\lambda_0 = 10$ on scaled scores it hardly moves and acts like LDR-KL.
# - Against uniform noise a large $\lambda$ helps over cross-entropy, about as much as generalized cross-entropy does or less.
#
# **Further reading.** {cite:t}`ghosh2017robust` for symmetric losses; {cite:t}`zhang2018generalized` for generalized cross-entropy;
# {cite:t}`ma2020normalized` for losses made symmetric by normalisation; the chapter on [comp-sum losses](comp-sum-losses.ipynb) for what an excess loss says about errors.
