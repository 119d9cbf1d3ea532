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
# # Similarity, distance, magnitude: a softmax that asks its neighbours
#
# A softmax looks at the size of the logits and at nothing else. A point far from all training data can have large
# logits, and gets a confidence to match. This paper {cite:p}`similarity-distance-magnitude` adds two questions. How many of the
# nearest training points in a row are of the predicted class, and were predicted rightly themselves? And how far is the
# nearest one, compared with what held-out points of each class know as normal? Both enter the softmax, one as its base, one as a
# factor. From the result a region is cut out in which predictions hold at a chosen rate. You build it, and put it in front
# of rotated digits, noise, strangers and photographs.

# %% [markdown]
# ## Setup

# %% tags=["parameters"]
scale = "ci"
seed = 0

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import ecdf
from sklearn.datasets import load_breast_cancer

from lib.calibration import TemperatureScaling, brier, ece
from lib.claims import Ledger, about
from lib.data import add_noise, blur, digits, photo_patches, rotate, strokes
from lib.models import CNN
from lib.train import fit
from lib.uncertainty import (
    SDM,
    CDFRescaler,
    ClassECDF,
    conformal_quantile,
    depth_match,
    high_reliability_region,
    sdm_activation,
)

plt.style.use("lib.book")
torch.manual_seed(seed)
generator = torch.Generator().manual_seed(seed)
ledger = Ledger("similarity-distance-magnitude", scale, seed)

# %% [markdown]
# ## The problem
#
# A small CNN learns the digits 0 to 7. Then it sees what it has not learned: the same digits rotated, noisy, or blurred, and
# things that are no digits of its world at all. How many does it answer with a confidence of at least 95 %, temperature scaled on
# held-out digits?

# %%
((images, labels),) = digits((1797,), seed=seed)
known = labels < 8
x_known, y_known = images[known], labels[known]
train_rows, cal_rows, test_rows = slice(0, 500), slice(500, 950), slice(950, None)
cnn = CNN(8)
fit(
    cnn, lambda model, x, y: F.cross_entropy(model(x), y), (x_known[train_rows], y_known[train_rows]),
    optimizer=torch.optim.Adam(cnn.parameters(), lr=3e-3), epochs=15, batch_size=50, seed=seed, progress=False,
)  # fmt: skip
cnn.requires_grad_(False)
x_test, y_test = x_known[test_rows], y_known[test_rows]
worlds = {
    "test": x_test,
    "rotated 25°": rotate(x_test, 25),
    "noise 0.3": add_noise(x_test, 0.3, generator=generator),
    "blurred": blur(x_test, 0.9),
    "digits 8, 9": images[~known],
    "photographs": photo_patches(300, seed=seed),
    "pen strokes": strokes(300, seed=seed),
}
strangers = ("digits 8, 9", "photographs", "pen strokes")
scaling = TemperatureScaling().fit(cnn(x_known[cal_rows]), y_known[cal_rows])
confidence = {name: scaling.transform(cnn(x)).exp() for name, x in worlds.items()}

figure, axes = plt.subplots(2, 7, figsize=(9, 3))
for column, (name, x) in enumerate(worlds.items()):
    for row in range(2):
        axes[row, column].imshow(x[row, 0], cmap="gray", vmin=0, vmax=1)
        p = confidence[name][row]
        axes[row, column].set_title(f"{int(p.argmax())}: {p.max():.2f}", fontsize=8)
        axes[row, column].set_axis_off()
    axes[0, column].text(
        0.5, 1.35, name, transform=axes[0, column].transAxes, ha="center", fontsize=9
    )
plt.show()
for name, p in confidence.items():
    sure = p.amax(1) >= 0.95
    line = f"{name:12} confident on {about(100 * sure.double().mean(), 2)} %"
    if name not in strangers:
        right = (p.argmax(1) == y_test)[sure].double().mean()
        line += f", of these right {about(100 * right, 3)} %"
    print(line)

# %% [markdown]
# Above each image stand the predicted class and its confidence. Calibration on familiar data does not help with the rest: a
# large part of the pen strokes is a digit beyond doubt, and of the confident answers on rotated digits too many are wrong.

# %% [markdown]
# ## Derivation
#
# ### Similarity
#
# Freeze the features. A linear **adaptor** maps them to $h \in \mathbb R^m$, a linear **head** to logits $z \in \mathbb R^C$, with
# $\hat y = \arg\max z$. Keep the training points, with their labels and their own predictions, as **support**. Sort
# them by Euclidean distance to $h$. The similarity $q$ is the number of matches before the first mismatch,
#
# $$ q(x) = \sum_{j=1}^{n} \prod_{i=1}^{j} \mathbb 1\big[\, y_{(i)} = \hat y \;\wedge\; \hat y_{(i)} = \hat y \,\big], \tag{1} $$
#
# where $(i)$ is the $i$-th nearest. It is not the number of matches among $k$ neighbours: one near neighbour of another class ends it, and so
# does a neighbour that the model itself gets wrong. A training point must leave itself out, or $q$ is at least 1 everywhere.
#
# ### Distance
#
# Let $d_1$ be the distance to the nearest support point. What is far? Ask the held-out points: let $F_c$ be the empirical
# distribution function of $d_1$ over the calibration points of class $c$. Then
#
# $$ d(x) = \min_c \big( 1 - F_c(d_1) \big) \in [0, 1] \tag{2} $$
#
# is near 1 for a point that is closer than nearly all calibration points, and exactly 0 beyond the farthest of some
# class. The minimum takes the most sceptical class. For the training points the same is done among themselves.
#
# ### Magnitude, and the activation
#
# The third is the logit itself. All three together:
#
# $$ \mathrm{sdm}(z)_i = \frac{(2 + q)^{d\, z_i}}{\sum_c (2 + q)^{d\, z_c}} = \mathrm{softmax}\big( d \, \log(2 + q)\, z \big)_i . \tag{3} $$
#
# With $q = e - 2$ and $d = 1$ it is the softmax. With $d = 0$ it is uniform, and the prediction must still be read from $z$. A long
# run of matches sharpens it. The 2 keeps the base above 1 when there is no match at all. Read as a temperature, $1/T = d \log(2 + q)$: a
# temperature of its own for each point, computed from neighbours, not learned.
#
# ### The loss
#
# Train adaptor and head with the negative log likelihood, the logarithm taken **to the base $2 + q$**:
#
# $$ L = -\log_{2+q} \mathrm{sdm}_y = -\frac{\log \mathrm{sdm}_y}{\log(2 + q)}, \qquad
# \frac{\partial L}{\partial z} = d\, \big( \mathrm{sdm} - e_y \big) . \tag{4} $$
#
# The factor $\log(2+q)$ from the chain rule cancels against the base. With the natural logarithm, points with a large $q$, which
# have been learned, would have the largest gradients. The factor $d$ stays: isolated points teach less. $q$ and $d$ are found
# anew after each epoch and are constants for the gradient. The cell checks (3) and (4) by automatic differentiation.

# %%
z = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
q, d = (
    torch.tensor([0.0, 1, 5, 20, 300, 2]).double(),
    torch.rand(6, generator=generator).double(),
)
y = torch.tensor([0, 1, 2, 3, 0, 1])
plain = sdm_activation(z, torch.full((6,), math.e - 2).double(), torch.ones(6).double())
assert torch.allclose(plain, z.softmax(1))
flat = sdm_activation(z, q, torch.zeros(6).double())
assert torch.allclose(flat, torch.full((6, 4), 0.25).double())
loss = F.nll_loss(sdm_activation(z, q, d, log=True), y, reduction="sum")
(gradient,) = torch.autograd.grad(loss, z)
assert torch.allclose(
    gradient, d[:, None] * (sdm_activation(z, q, d) - F.one_hot(y, 4))
)
natural = F.nll_loss(
    sdm_activation(z, q, d, log=True, base_change=False), y, reduction="sum"
)
(other,) = torch.autograd.grad(natural, z)
ratio = (other / gradient).detach().mean(1)
assert torch.allclose(ratio, torch.log(2 + q))
print(
    "gradient with the natural logarithm, relative:",
    [round(r, 2) for r in ratio.tolist()],
)

# %% [markdown]
# ### The region
#
# A probability is only a number. The paper cuts out a region in which the predictions hold at a rate $\alpha$, say 0.95. Combine
# similarity and output into a **rescaled similarity**
#
# $$ q'(x) = \min\big( q,\; (2 + q)^{\mathrm{sdm}_{\hat y}} \big), \tag{5} $$
#
# which is small when either the run is short or the output is unsure. For a threshold $b$ keep the calibration points with $q' \ge b$, and for
# each class $c$ let $\psi_c$ be the $(1-\alpha)$ quantile of $\mathrm{sdm}_c$ among the kept points whose *true* class is $c$. Raise $b$
# until
#
# $$ \psi_c \ge \alpha \quad \text{for all } c . \tag{6} $$
#
# A new point is in the high-reliability region if $q' \ge b$, $\lfloor q' \rfloor > 0$, and the set
# $\{c : \mathrm{sdm}_c \ge \psi_c\}$ is exactly $\{\hat y\}$. Why is it reliable? At least a share $\alpha$ of the kept points of class
# $c$ has $\mathrm{sdm}_c \ge \psi_c \ge \alpha > \frac12$, and whoever has more than half is the prediction. So each class is predicted
# right at a rate of at least $\alpha$, **on the calibration points that were kept**. That $b$ was chosen on the same
# points is a small optimism, and that new points resemble them is an assumption. If no $b$ satisfies (6), the region is empty, and the honest
# answer is to trust nothing. With random labels it must be so:

# %%
probabilities = torch.randn(400, 3, generator=generator).mul(2).softmax(1)
matched = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
rescaled = torch.rand(400, generator=generator) * 10
b, psi = high_reliability_region(
    rescaled, probabilities, matched[torch.randperm(400, generator=generator)], 0.95
)
assert math.isinf(b)
sure = torch.eye(3)[matched] * 0.98 + 0.01 * (1 - torch.eye(3)[matched])
b, psi = high_reliability_region(rescaled, sure, matched, 0.95)
assert b == rescaled.min() and torch.allclose(psi, torch.full((3,), 0.98))

# %% [markdown]
# ### How many points stand behind it
#
# The distance (2) rests on counts. Let $n_c(x)$ be the number of calibration points of class $c$ with a rescaled similarity below that of
# $x$. By the inequality of Dvoretzky, Kiefer and Wolfowitz with the sharp constant {cite:p}`massart1990tight`, an empirical
# distribution function of $n$ points is within
#
# $$ \varepsilon = \sqrt{ \frac{\log \frac{2}{1 - \alpha}}{2 \min_c n_c(x)} } \tag{7} $$
#
# of the true one everywhere, with probability $\alpha$. So $d$ gets a band, $[\,d - \varepsilon,\, d + \varepsilon\,]$, cut to $[0, 1]$, and the
# cautious decision uses $d_{\text{low}} = \max(0, d - \varepsilon)$. A point with a small $q'$ has few peers and a band as wide
# as the unit interval. (The $n_c$ points are selected by $q'$, so the inequality holds here as a rule of thumb, not as a theorem.)
#
# ### A learned transform
#
# The abstract mentions a further step: probabilities from a small learned transform of class-conditional distribution functions of the output. Its form
# is not spelled out there; here it is the multinomial logistic regression on the ranks $F_c(\mathrm{sdm}_c)$, taken among the calibration
# points of class $c$.

# %% [markdown]
# ## Reference implementation
#
# The activation (3), the similarity (1), and the region (6).

# %% tags=["reference"]
import torch


def sdm(z, q, d):
    """softmax to the base 2 + q of d z: (n, C), (n,), (n,) -> (n, C)."""
    return torch.softmax(d[:, None] * torch.log(2 + q)[:, None] * z, 1)


# %% tags=["reference"]
import torch


def similarity_and_distance(h, prediction, support, labels, predictions):
    """q and the nearest distance of one point h (m,), against a support (s, m) with labels and predictions (s,)."""
    gaps = (support - h).norm(dim=1)
    q = 0
    for j in gaps.argsort():
        if labels[j] != prediction or predictions[j] != prediction:
            break
        q += 1
    return q, gaps.min()


# %% tags=["reference"]
import torch


def region(rescaled, probabilities, labels, alpha=0.95):
    """The first threshold b with psi_c >= alpha for all classes, and psi; None if there is none."""
    for b in rescaled.unique():
        kept = rescaled >= b
        psi = []
        for c in range(probabilities.shape[1]):
            own = probabilities[kept & (labels == c), c].sort().values
            if len(own) == 0:
                return None
            psi.append(own[int((len(own) - 1) * (1 - alpha))])
        if min(psi) >= alpha:
            return b, torch.stack(psi)
    return None


# %% [markdown]
# By hand. Logits $(1, 0)$ with $q = 2$, $d = \frac12$: the base is 4, so $4^{1/2} : 1 = 2 : 1$. A point at 0 on a line, predicted A,
# with support at 1 (A, predicted A), 2 (A, predicted B) and 3 (A, predicted A): the run stops at the wrong prediction, $q = 1$, and
# the nearest is 1 away.

# %%
by_hand = sdm(torch.tensor([[1.0, 0.0]]), torch.tensor([2.0]), torch.tensor([0.5]))
assert torch.allclose(by_hand, torch.tensor([[2 / 3, 1 / 3]]))
line = torch.tensor([[1.0], [2.0], [3.0]])
q, nearest = similarity_and_distance(
    torch.zeros(1), 0, line, torch.tensor([0, 0, 0]), torch.tensor([0, 1, 0])
)
assert (q, nearest.item()) == (1, 1.0)

# %% [markdown]
# ## The library
#
# `lib.uncertainty.SDM` is the whole method as an estimator: `fit` on training and calibration features, `predict` returns class,
# similarity, distance, probabilities, region, effective size and band of each point. Its parts stand alone:
# `lib.uncertainty.sdm_activation`, `lib.uncertainty.depth_match` (in blocks, exact), `lib.uncertainty.ClassECDF`,
# `lib.uncertainty.high_reliability_region`.

# %%
features = cnn.features
model = SDM(8, seed=seed).fit(
    features(x_known[train_rows]), y_known[train_rows], features(x_known[cal_rows]), y_known[cal_rows]
)  # fmt: skip
found = model.predict(features(x_test))
hidden = model.adaptor_((features(x_test) - model.mean_) / model.scale_).detach()
for row in range(25):
    q, nearest = similarity_and_distance(
        hidden[row], found.prediction[row], model.support_, model.support_labels_, model.support_predictions_,
    )  # fmt: skip
    assert q == found.similarity[row]
z = model.head_(hidden).detach()
assert torch.allclose(
    sdm(z, found.similarity, found.distance), found.probabilities, atol=1e-6
)
values, classes = torch.rand(40), torch.arange(40) % 2
mine = ClassECDF(values, classes, 2)(values)
scipys = np.stack(
    [ecdf(values[classes == c]).cdf.evaluate(values) for c in range(2)], 1
)
assert np.allclose(mine, scipys)
with_self = depth_match(
    model.support_, model.support_predictions_, model.support_, model.support_labels_, model.support_predictions_,
)[0]  # fmt: skip
without = depth_match(
    model.support_, model.support_predictions_, model.support_, model.support_labels_, model.support_predictions_,
    skip_self=True,
)[0]  # fmt: skip
right = model.support_labels_ == model.support_predictions_
assert torch.equal(with_self[right], without[right] + 1)
print("a point that finds itself counts one match too many")

# %% [markdown]
# ## Experiment
#
# ### Who is admitted?
#
# Five rules decide which answers to trust: the region of SDM, with $d$ and with the cautious $d_{\text{low}}$; a confidence of 0.95 after
# temperature scaling; the conformal prediction set of level 0.95, trusted when it holds one class; and a control. The region is
# strict, and strictness alone keeps strangers out. So the **control** takes the temperature-scaled confidence with the threshold
# that admits as many calibration points as the region with $d$ does.


# %%
def rules(model, cnn, scaling, cal):
    """Functions from images to (prediction, trusted), both (n,)."""
    p_cal = scaling.transform(cnn(cal[0])).exp()
    wrong = 1 - p_cal.gather(1, cal[1][:, None])[:, 0]
    level = conformal_quantile(wrong, 0.95)
    share = (
        model.predict(cnn.features(cal[0]), use_lower=False)
        .reliable.double()
        .mean()
        .item()
    )
    strict = p_cal.amax(1).quantile(1 - share).item()

    def region_rule(use_lower):
        def rule(x):
            verified = model.predict(cnn.features(x), use_lower=use_lower)
            return verified.prediction, verified.reliable

        return rule

    def softmax_rule(trusts):
        def rule(x):
            p = scaling.transform(cnn(x)).exp()
            return p.argmax(1), trusts(p)

        return rule

    return {
        "region": region_rule(False),
        "region, cautious": region_rule(True),
        "confidence 0.95": softmax_rule(lambda p: p.amax(1) >= 0.95),
        "conformal, one class": softmax_rule(lambda p: ((1 - p) <= level).sum(1) == 1),
        "confidence, as strict": softmax_rule(lambda p: p.amax(1) >= strict),
    }


calibration = x_known[cal_rows], y_known[cal_rows]
table = {}
for name, rule in rules(model, cnn, scaling, calibration).items():
    for world, x in worlds.items():
        prediction, trusted = rule(x)
        hits = (prediction == y_test)[trusted] if world not in strangers else None
        table[name, world] = (
            trusted.double().mean().item(), None if hits is None else hits.double().mean().item(), int(trusted.sum()),
        )  # fmt: skip
names = list(dict.fromkeys(name for name, _ in table))
print("admitted in %, and in brackets the share of these that is right")
print(" " * 22 + "".join(f"{world:>21}" for world in list(worlds)[:4]))
for name in names:
    cells = []
    for world in list(worlds)[:4]:
        share, hits, count = table[name, world]
        cells.append(
            f"{about(100 * share, 2)} ({about(100 * hits, 3) if count else 'none'})"
        )
    print(f"{name:22}" + "".join(f"{cell:>21}" for cell in cells))
print(" " * 22 + "".join(f"{world:>21}" for world in strangers))
for name in names:
    cells = (about(100 * table[name, world][0], 2) for world in strangers)
    print(f"{name:22}" + "".join(f"{cell:>21}" for cell in cells))

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
groups = {
    "test, right": (worlds["test"], True, "C0"),
    "test and rotated, wrong": (
        torch.cat([worlds["test"], worlds["rotated 25°"]]),
        False,
        "C1",
    ),
    "strangers": (torch.cat([worlds[world] for world in strangers]), None, "0.6"),
}
targets = {len(x_test): y_test, 2 * len(x_test): torch.cat([y_test, y_test])}
for name, (x, wanted, color) in reversed(groups.items()):
    verified = model.predict(features(x))
    shown = torch.ones(len(x), dtype=torch.bool)
    if wanted is not None:
        shown = (verified.prediction == targets[len(x)]) == wanted
    jitter = torch.rand(int(shown.sum()), generator=generator) * 0.15
    axes[0].scatter(
        torch.log(2 + verified.similarity[shown]) + jitter,
        verified.distance[shown],
        s=7,
        color=color,
        label=name,
    )
axes[0].axvline(
    math.log(2 + model.threshold_), color="k", ls="--", label="threshold $b$ on $q$"
)
axes[0].set(
    title="Similarity and distance",
    xlabel=r"$\log(2 + q)$ (spread a little)",
    ylabel=r"$d$ (1: amid the data, 0: beyond)",
)
axes[0].legend(fontsize=7)
width = 0.2
for i, name in enumerate(
    ("region", "region, cautious", "confidence, as strict", "confidence 0.95")
):
    axes[1].bar(
        np.arange(7) + (i - 1.5) * width,
        [100 * table[name, world][0] for world in worlds],
        width,
        label=name,
    )
axes[1].set_xticks(range(7), worlds, rotation=35, ha="right")
axes[1].set(title="Who is admitted", ylabel="admitted (%)", ylim=(0, 118))
axes[1].legend(fontsize=7, ncols=2)
plt.show()

# %% [markdown]
# Left: right answers (blue) lie to the right and above; errors and strangers at the bottom, where $d$ is near zero, or at the left, where
# the run of matches breaks off. Right: the region admits few strangers. The control shows how much of this is mere strictness: at
# the same share of familiar points, the softmax refuses the digits 8 and 9 and the photographs about as well as the region does. It
# is the pen strokes, confident strangers, that it lets in and the region does not.
#
# The price is on the left of the bar chart. The region refuses a good part of the familiar test points, nearly all of which would have been
# right, and the cautious form most of them. The caution is not idle: without it a tenth of the few admitted rotated digits can be
# wrong on some seeds.
#
# ### Fewer calibration points
#
# Forty calibration points in place of 450. The region should know that it knows less.

# %%
few = x_known[cal_rows][:40], y_known[cal_rows][:40]
train_set = features(x_known[train_rows]), y_known[train_rows]
small = SDM(8, seed=seed).fit(*train_set, features(few[0]), few[1])
small_found = small.predict(features(x_test))
print(f"{'':20}{'450 points':>14}{'40 points':>14}")
for name, values in {
    "median band": (found.band.median(), small_found.band.median()),
    "admitted, cautious": (
        found.reliable.double().mean(),
        small_found.reliable.double().mean(),
    ),
}.items():
    print(f"{name:20}" + "".join(f"{about(value.item(), 2):>14}" for value in values))

# %% [markdown]
# ### Splits
#
# The paper repeats the fit over random splits into training and calibration points and reports the spread. Four splits:

# %%
pool_x, pool_y = features(x_known[:950]), y_known[:950]
spread = []
for split in range(4):
    order = torch.randperm(950, generator=generator)
    again = SDM(8, seed=split).fit(
        pool_x[order[:500]],
        pool_y[order[:500]],
        pool_x[order[500:]],
        pool_y[order[500:]],
    )
    verified = again.predict(features(x_test), use_lower=False)
    stranger = again.predict(
        torch.cat([features(worlds[world]) for world in strangers]), use_lower=False
    )
    # an empty region has no accuracy: NaN
    hits = (verified.prediction == y_test)[verified.reliable].double().mean()
    spread.append(
        [verified.reliable.double().mean(), hits, stranger.reliable.double().mean()]
    )
spread = 100 * torch.tensor(spread)
for name, column in zip(
    ("admitted", "right of these", "strangers"), spread.T, strict=True
):
    column = column[~column.isnan()]
    print(f"{name:15} {about(column.min(), 3)} to {about(column.max(), 3)} %")

# %% [markdown]
# The accuracy hardly moves; the share of admitted points does. It can even be zero: if one class has a few badly placed calibration points, no
# threshold satisfies (6), and the region of *all* classes is empty. You want several splits for that reason alone.
#
# ### The learned transform, and a table
#
# Does the transform of the ranks give better probabilities than the activation itself? And the method on two classes
# of real measurements, the breast cancer table, without any network: the standardised columns are the features.

# %%
cal_found = model.predict(features(x_known[cal_rows]))
rescaler = CDFRescaler().fit(cal_found.probabilities, y_known[cal_rows])
outputs = {
    "activation": found.probabilities,
    "learned transform": rescaler.transform(found.probabilities).exp(),
    "temperature": confidence["test"],
}
calibration_error = {name: ece(p, y_test) for name, p in outputs.items()}
brier_score = {name: brier(p, y_test) for name, p in outputs.items()}
for name in outputs:
    print(
        f"{name:18} ECE {about(calibration_error[name], 2)}, Brier score {about(brier_score[name], 2)}"
    )
data = load_breast_cancer()
order = torch.randperm(569, generator=generator)
x = torch.tensor(data.data).float()[order]
x, y = (x - x.mean(0)) / x.std(0), torch.tensor(data.target)[order]
cancer = SDM(2, 8, seed=seed).fit(x[:200], y[:200], x[200:380], y[200:380])
verified = cancer.predict(x[380:], use_lower=False)
cancer_right = (verified.prediction == y[380:]).double()
cancer_share = verified.reliable.double().mean().item()
print(
    f"breast cancer: accuracy {about(100 * cancer_right.mean().item(), 3)} %, region admits ",
    end="",
)
print(
    f"{about(100 * cancer_share, 2)} %, of these right {about(100 * cancer_right[verified.reliable].mean().item(), 3)} %"
)

# %% [markdown]
# As a probability the activation is underconfident: its factor $d$ is a rank, spread over all of $[0, 1]$ even for familiar points, so it
# flattens right answers too. The transform repairs most of that. The activation is a filter first, and a probability second.

# %% [markdown]
# ## Claims

# %%
shifted = list(worlds)[:4]
inside = {w: table["region", w] for w in shifted}
counts = [count for _, _, count in list(inside.values())[1:]]
hits = sum(right * count for _, right, count in list(inside.values())[1:] if count)
pooled = hits / sum(counts)
admitted_strangers = {
    name: sum(table[name, w][0] for w in strangers) / 3 for name in names
}
ledger.claim(
    "Similarity, distance and magnitude together survive distribution shift, where softmax does not",
    paper="remarkably robust to shifts and out-of-distribution inputs",
    measured=f"strangers admitted: region {about(100 * admitted_strangers['region'], 2)} %, confidence 0.95 "
    f"{about(100 * admitted_strangers['confidence 0.95'], 2)} %, as strict "
    f"{about(100 * admitted_strangers['confidence, as strict'], 2)} %",
    checks={
        "accuracy in the region >= 93 % over the three shifts together": pooled >= 0.93,
        "accuracy in the cautious region >= 93 % on test and on every shift with 20 admitted": all(
            table["region, cautious", w][1] >= 0.93
            for w in shifted
            if table["region, cautious", w][2] >= 20
        ),
        "strangers: the region admits at most a third of confidence 0.95": admitted_strangers[
            "region"
        ]
        <= admitted_strangers["confidence 0.95"] / 3,
        "strangers: the region admits fewer than a confidence as strict on familiar points": admitted_strangers[
            "region"
        ]
        < admitted_strangers["confidence, as strict"],
        "rotated digits: a confidence of 0.95 is right less often than 96 %": table[
            "confidence 0.95", "rotated 25°"
        ][1]
        < 0.96,
    },
)

# %%
ledger.claim(
    "Partitioning by class-conditional distribution functions selects a region with accuracy of at least alpha = 0.95",
    paper="class- and prediction-conditional accuracy of at least alpha",
    measured=f"test: admitted {about(100 * inside['test'][0], 2)} %, of these right {about(100 * inside['test'][1], 3)} %; "
    f"over four splits {about(spread[:, 0].min(), 2)} to {about(spread[:, 0].max(), 2)} %; breast cancer "
    f"{about(100 * cancer_share, 2)} %, right {about(100 * cancer_right[verified.reliable].mean().item(), 3)} %",
    checks={
        "accuracy in the region >= 95 % on the test set": inside["test"][1] >= 0.95,
        "and in every further split whose region is not empty": bool(
            (spread[~spread[:, 1].isnan(), 1] >= 95).all()
        ),
        "and on the breast cancer table": cancer_right[verified.reliable].mean().item()
        >= 0.95,
        "the region admits at least 30 % of the test set": inside["test"][0] >= 0.3,
        "with random labels the region is empty": math.isinf(
            high_reliability_region(
                cal_found.rescaled,
                cal_found.probabilities,
                y_known[cal_rows][torch.randperm(450, generator=generator)],
                0.95,
            )[0]
        ),
        "the cautious region admits at least 60 % of the test set": table[
            "region, cautious", "test"
        ][0]
        >= 0.6,
    },
    fails={
        "the cautious region admits at least 60 % of the test set": "Eight classes share 450 calibration points; the band "
        "(7) of a typical point is wider than its distance.",
    },
)

# %%
ledger.claim(
    "The estimate states its own effective sample size, and shrinks with it",
    paper="aware of the effective sample size and of data splitting",
    measured=f"median band {about(found.band.median().item(), 2)} with 450 calibration points, "
    f"{about(small_found.band.median().item(), 2)} with 40; admitted {about(100 * found.reliable.double().mean().item(), 2)} % "
    f"and {about(100 * small_found.reliable.double().mean().item(), 2)} %",
    checks={
        "40 points: the median band is at least 1.5 times as wide": (
            small_found.band.median() >= 1.5 * found.band.median()
        ).item(),
        "40 points: the cautious region admits at most a third as many": (
            small_found.reliable.sum() <= found.reliable.sum() / 3
        ).item(),
    },
)

# %%
ledger.claim(
    "A small learned transform of the distribution functions gives prediction-conditional probabilities",
    paper="parsimonious learned transform (its form is a reconstruction here)",
    measured=", ".join(
        f"{name} ECE {about(value, 2)}" for name, value in calibration_error.items()
    ),
    checks={
        "the transform lowers the calibration error of the activation": calibration_error[
            "learned transform"
        ]
        < calibration_error["activation"],
        "and its Brier score": brier_score["learned transform"]
        < brier_score["activation"],
    },
)
ledger.untested(
    "SDM networks: language models with verification as an intrinsic property",
    paper="fine-tuned language models, routing and selective generation",
    reason="Needs a pretrained language model and fine-tuning data that do not ship with the book.",
)

# %%
ledger

# %% [markdown]
# ## What is different from the paper
#
# The paper works on text, with features of large language models; here a small CNN reads digits, and a table needs no network. The
# adaptor is linear, as the paper's one-layer convolution over the full width is. Training keeps the last epoch, where the
# released code picks one by its calibration loss. The transform of the ranks is a reconstruction. The control of equal strictness
# is ours. `scale="full"` runs the same code; frozen features of a language model can be put in place of the CNN's.

# %% [markdown]
# ## Exercises
#
# **1.** Which temperature does the softmax have that equals the SDM activation at $q$ and $d$? Write `temperature(q, d)`.


# %% tags=["exercise"]
def check_1(answer):
    z = torch.tensor([[2.0, -1.0, 0.3]])
    for q, d in ((0.0, 1.0), (8.0, 0.5), (100.0, 0.05)):
        wanted = sdm(z, torch.tensor([q]), torch.tensor([d]))
        assert torch.allclose((z / answer(q, d)).softmax(1), wanted, atol=1e-6)


# %% tags=["solution", "hide-cell"]
def temperature(q, d):
    return 1 / (d * math.log(2 + q))


check_1(temperature)

# %% [markdown]
# **2.** How many calibration points per class must lie below a point for a band of at most `eps` at rate `alpha`? Write
# `points_needed(eps, alpha)`.


# %% tags=["exercise"]
def check_2(answer):
    assert answer(0.1, 0.95) == 185 and answer(0.05, 0.95) == 738, (
        "solve (7) for n, round up"
    )


# %% tags=["solution", "hide-cell"]
def points_needed(eps, alpha):
    return math.ceil(math.log(2 / (1 - alpha)) / (2 * eps**2))


check_2(points_needed)

# %% [markdown]
# **3.** Why consecutive? Write `majority(prediction, labels_by_distance, k)`, the number of matches among the `k` nearest, find a
# list of eight labels in which it is 7 of 8 while the run (1) is 0 for prediction 0, and return it from `broken_run()`.


# %% tags=["exercise"]
def check_3(answer):
    labels = answer()
    assert len(labels) == 8 and sum(label == 0 for label in labels) == 7
    run = next(i for i, label in enumerate([*labels, 1]) if label != 0)
    assert run == 0, "the nearest neighbour must disagree"


# %% tags=["solution", "hide-cell"]
def broken_run():
    return [1, 0, 0, 0, 0, 0, 0, 0]


check_3(broken_run)

# %% [markdown]
# ## Summary
#
# - Similarity is a run of nearest training points that share the prediction and were predicted rightly; distance is a rank among
#   held-out points; the logit is the third. Together they are a temperature for each point.
# - With the logarithm to the base $2 + q$ the gradient is $d(\mathrm{sdm} - e_y)$.
# - The region of high reliability keeps its accuracy under shift and admits few strangers, fewer than strictness alone
#   explains. It pays with refusals, and more so with few calibration points, which it knows.
# - As a probability the activation is underconfident until it is transformed.
#
# **Further reading.** {cite:t}`papernot2018deep` let nearest neighbours in every layer vote. [Mahalanobis
# detection](mahalanobis-detection.ipynb) measures distance by one Gaussian for each class;
# [correctness-aware calibration](correctness-aware-calibration.ipynb) learns the temperature of a point instead of counting it.
