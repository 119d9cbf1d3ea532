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
# # Neural collapse, and what class sizes do to it
#
# Train a classifier long after it makes no mistake, and its last layer becomes a crystal: all features of a class fall on one point,
# the points of the classes spread as far apart as they can, and the classifier's rows line up with them. This paper
# {cite:p}`neural-collapse` explains the crystal for deep linear layers on top of features that may be anything, and
# says what becomes of it when the classes have different sizes: the rows stay orthogonal, their lengths follow the sizes, and
# a class that is too small vanishes altogether. You derive the minimiser in closed form, meet a switch that the formula hides,
# and then put a real network on the curve.

# %% [markdown]
# ## Setup

# %% tags=["parameters"]
scale = "ci"
seed = 0

# %%
import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.stats import spearmanr
from torch import nn
from tqdm import tqdm

from lib.claims import Ledger, about
from lib.data import digits
from lib.geometry import nc_metrics, ufm_closed_form
from lib.models import UnconstrainedFeatures, fit_ufm

plt.style.use("lib.book")
torch.manual_seed(seed)
ledger = Ledger("neural-collapse", scale, seed)

# %% [markdown]
# ## The problem
#
# Ten digits, but not equally many of each: from 150 images of the first down to 10 of the last, in random order of the digits.
# A small network with a linear classifier, trained by squared error with weight decay on the classifier and the same decay on
# the features. Look at the classifier's rows afterwards: their lengths, and the angles between them.

# %%
class_sizes = (150, 120, 90, 70, 50, 40, 30, 20, 15, 10)
((all_images, all_labels),) = digits((1797,), seed=seed, flat=True)
digit_order = torch.randperm(10)


def subset(sizes):
    rows = [
        (all_labels == digit).nonzero()[:n, 0]
        for digit, n in zip(digit_order, sizes, strict=True)
    ]
    return all_images[torch.cat(rows)], torch.repeat_interleave(
        torch.arange(10), torch.tensor(sizes)
    )


def train_network(sizes, loss, steps, bias=False):
    """A network with linear features; returns features, labels, classifier and the metrics on the way."""
    x, y = subset(sizes)
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    head = nn.Linear(64, 10, bias=bias)
    decay = 2.0 / len(y)
    one_hot = F.one_hot(y, 10).float()
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    target = "etf" if bias else "gof"
    path = []
    marks = set(np.geomspace(1, steps, 25).astype(int) - 1)
    for step in range(steps):
        features = body(x)
        logits = head(features)
        if loss == "mse":
            value = (logits - one_hot).square().sum() / (2 * len(y))
        else:
            value = F.cross_entropy(logits, y)
        value = value + decay / 2 * (
            head.weight.square().sum() + features.square().sum()
        )
        if step in marks:
            rows = head.weight.detach()
            norms = rows.square().sum(1)
            path.append(
                (
                    step + 1,
                    nc_metrics(
                        features, y, rows, target=target, norms=None if bias else norms
                    ),
                )
            )
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return body(x), y, head.weight.detach(), path, decay


steps = {"ci": 800, "full": 20_000}[scale]
features, labels, rows, path, decay = train_network(class_sizes, "mse", steps)
directions = F.normalize(rows, dim=1)
cosines = directions @ directions.T
figure, axes = plt.subplots(1, 2, figsize=(9, 3.3))
axes[0].loglog(class_sizes, rows.norm(dim=1), "o", label="classifier row")
means = torch.stack([features[labels == k].mean(0) for k in range(10)])
axes[0].loglog(class_sizes, means.norm(dim=1), "s", label="class mean of the features")
axes[0].set(
    title="Long rows for large classes", xlabel="images of the class", ylabel="length"
)
axes[0].legend()
image = axes[1].imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
axes[1].set(title="Cosines between the rows", xlabel="class", ylabel="class")
axes[1].grid(False)
figure.colorbar(image, ax=axes[1], label="cosine")
plt.show()

# %% [markdown]
# The rows are orthogonal to each other, as if ten classes had divided the space among them, and their lengths are ordered by
# class size. The features do the opposite, except for the smallest class. You will be able to compute both lengths
# without training anything, that exception included.

# %% [markdown]
# ## Derivation
#
# ### Features that may be anything
#
# Suppose the network before the last layers is so expressive that it can put each training image anywhere. Then the features
# themselves are the unknowns. $K$ classes, $n_k$ examples in class $k$, $N = \sum_k n_k$; $H \in \mathbb R^{d \times N}$ with
# columns $h_{k,i}$; linear layers $W_1, \dots, W_M$ of widths $\ge K$; one-hot labels $Y \in \mathbb R^{K \times N}$. Without biases,
#
# $$ \min_{H, W} \; \frac{1}{2N} \lVert W_M \cdots W_1 H - Y \rVert_F^2 + \sum_{j=1}^M \frac{\lambda_j}{2} \lVert W_j \rVert_F^2
# + \frac{\lambda_H}{2} \lVert H \rVert_F^2 . \tag{1} $$
#
# The decay of the features is a decay for *each* example. That, and the $\frac{1}{2N}$, decide every formula below.
#
# **Within-class collapse.** Fix the $W$. The problem in a single $h_{k,i}$ is strictly convex, and the same for all $i$ of one class. So all
# features of a class are equal: $h_{k,i} = h_k$.
#
# ### One layer
#
# Write $w_k$ for the rows of $W_1$ and suppose for now that they are orthogonal, with $h_k$ parallel to $w_k$; the section after the
# next proves that nothing else can be better. Then class $k$ stands alone, with output $s_k = w_k^\top h_k = \lVert w_k \rVert \lVert h_k \rVert$:
#
# $$ \frac{n_k}{2N} (s_k - 1)^2 + \frac{\lambda_W}{2} \lVert w_k \rVert^2 + \frac{\lambda_H n_k}{2} \lVert h_k \rVert^2
# \;\ge\; \frac{n_k}{2N} (s_k - 1)^2 + \sqrt{\lambda_W \lambda_H n_k}\; s_k , \tag{2} $$
#
# by the inequality of the arithmetic and geometric mean, with equality for
# $\lambda_W \lVert w_k \rVert^2 = \lambda_H n_k \lVert h_k \rVert^2$. The right side is a parabola in $s_k \ge 0$, with minimum
#
# $$ s_k = \max\Big( 0,\; 1 - N \sqrt{\tfrac{\lambda_W \lambda_H}{n_k}} \Big), \qquad
# \lVert w_k \rVert^2 = s_k \sqrt{\tfrac{n_k \lambda_H}{\lambda_W}}, \qquad
# \lVert h_k \rVert^2 = s_k \sqrt{\tfrac{\lambda_W}{n_k \lambda_H}} . \tag{3} $$
#
# Large classes have long rows. Features have two regimes: $\lVert h_k \rVert^2 = \sqrt{\lambda_W / (n_k \lambda_H)} - N \lambda_W / n_k$ falls with
# $n_k$ only from $n_k = 4 N^2 \lambda_W \lambda_H$ on; below, it falls towards small classes. And a class with
#
# $$ n_k \le N^2 \lambda_W \lambda_H \tag{4} $$
#
# is given up: its row and its features are zero. This is **minority collapse** {cite:p}`fang2021exploring`: not a class
# learned badly, but one that is not there.
#
# ### More layers
#
# With $M$ layers each class has one singular value $a_j$ in each, and a feature length $b$, with $s = a_1 \cdots a_M\, b$. At a stationary
# point the penalties balance,
#
# $$ \lambda_1 a_1^2 = \dots = \lambda_M a_M^2 = \lambda_H n_k\, b^2 = t, \qquad t = (c_k s^2)^{1/(M+1)}, \quad
# c_k = \lambda_H n_k \prod_j \lambda_j , \tag{5} $$
#
# (again the inequality of the means, for $M + 1$ factors; the last layer's row of the class has squared length $t / \lambda_M$), and the problem of one class is
#
# $$ g(s) = \frac{n_k}{2N} (s-1)^2 + \frac{M+1}{2}\, (c_k s^2)^{1/(M+1)} . \tag{6} $$
#
# For $M = 1$ the penalty is linear in $s$, and (3) comes back. For $M \ge 2$ it grows like $s^{2/(M+1)}$, with **infinite slope at
# zero**. So $s = 0$ is always a local minimum. The other candidate is the larger root of $g'(s) = 0$,
#
# $$ 1 - s = \frac{N}{n_k}\, c_k^{1/(M+1)}\, s^{(1-M)/(1+M)}, \tag{7} $$
#
# if there is one, and the lower of the two wins. Compare them: put (7) into $g(s) < g(0)$, and the penalty becomes
# $\frac{(M+1) n_k}{2N} s (1 - s)$, so that the condition is $(M + 1)(1 - s) < 2 - s$, that is $s > \frac{M-1}{M}$. With this value in (7)
# you get the size below which a class is given up, the general form of (4) ($0^0 = 1$ for $M = 1$):
#
# $$ s_k = 0 \iff n_k \le \frac{M^2}{(M-1)^{(M-1)/M}}\; N \Big( N \lambda_H \prod_j \lambda_j \Big)^{1/M}, \qquad
# \text{otherwise } s_k > \frac{M-1}{M} . \tag{8} $$
#
# As a class gets smaller its mode does not shrink to zero; it *jumps* there, from one half with two layers, from two thirds with three.
# And since each class has two valleys, $K$ classes have up to $2^K$ local minima, one for each set of classes that is given up. The
# cell holds (7) and (8) against a numeric minimiser, and (7) against the form that the authors' released code solves: for equal decays
# $\lambda$ of the layers, $x^M = \frac{s}{1-s}$ and $\frac{N}{n_k} (N \lambda_H \lambda^M)^{1/M} = \frac{x^{M-1}}{(x^M + 1)^2}$.

# %%
sizes = (100, 50, 10, 2)
for depth, strength in itertools.product((1, 2, 3), (1e-3, 5e-3, 1e-2, 2e-2)):
    solution = ufm_closed_form(sizes, [strength] * depth, 0.7 * strength)
    for n, mode in zip(sizes, solution.mode.tolist(), strict=True):
        c = 0.7 * strength * n * strength**depth

        def g(s, n=n, c=c, depth=depth):
            penalty = (depth + 1) / 2 * (c * s**2) ** (1 / (depth + 1))
            return n / (2 * sum(sizes)) * (s - 1) ** 2 + penalty

        grid = np.linspace(0, 1, 4001)
        start = grid[np.argmin(g(grid))]
        bracket = (max(start - 1e-3, 0), min(start + 1e-3, 1))
        best = minimize_scalar(
            g, bounds=bracket, method="bounded", options=dict(xatol=1e-10)
        )
        best = best.x if best.fun < g(0.0) - 1e-12 else 0.0
        assert abs(best - mode) < 1e-5, (depth, strength, n)
        unit = sum(sizes) * (sum(sizes) * c / n) ** (1 / depth)
        smallest = depth**2 / (depth - 1) ** ((depth - 1) / depth) * unit
        assert (n <= smallest) == (mode == 0) and (mode == 0 or mode > 1 - 1 / depth)
        if mode:
            x = (mode / (1 - mode)) ** (1 / depth)
            assert math.isclose(unit / n, x ** (depth - 1) / (x**depth + 1) ** 2)

# %% [markdown]
# The jump, drawn. The same classes, the same decay, one, two and three layers:

# %%
many = np.geomspace(1, 400, 150)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
s = np.linspace(0, 1, 400)
for depth, strength in ((1, 6e-4), (2, 6e-4), (3, 6e-4)):
    modes = [
        ufm_closed_form((n, 2000 - n), [strength] * depth, strength).mode[0]
        for n in many
    ]
    axes[0].semilogx(many, modes, label=f"{depth} layer{'s' * (depth > 1)}")
for n in (5, 8, 13):
    c = 6e-4 * n * 6e-4**3
    values = n / 4000 * (s - 1) ** 2 + 2 * (c * s**2) ** 0.25
    axes[1].plot(s, 1000 * (values - values[0]), label=f"class of {n}")
axes[1].axhline(0, color="0.6", lw=0.8)
axes[0].set(
    title="The mode against the size of the class",
    xlabel="$n_k$ of 2000",
    ylabel="$s_k$",
)
axes[1].set(
    title="Three layers: two minima", xlabel="$s$", ylabel="$1000\\,(g(s) - g(0))$"
)
for axis in axes:
    axis.legend()
plt.show()

# %% [markdown]
# Left: with one layer the mode slides to zero, with more it falls off a cliff (the sizes are treated as continuous). Right: why. The curve
# of the class decides between its two valleys by their depth; a training that starts near zero never sees the right one.
#
# ### Why the classes do not mix
#
# It remains to show that orthogonal rows are best. Let $Z = W_M \cdots W_1 H$, with singular values $\sigma_1 \ge \sigma_2 \ge \dots$ Two inequalities do
# it. First, the penalty can be bounded by $Z$ alone. Horn's inequality for the singular values of a product, and then the inequality of
# the means for $M + 1$ factors, in each mode $i$, with $W_0 = H$ and $\lambda_0 = \lambda_H$:
#
# $$ \sum_{j=0}^{M} \frac{\lambda_j}{2} \lVert W_j \rVert_F^2 \;\ge\; \frac{M+1}{2} \sum_i \prod_{j=0}^{M} \big( \lambda_j\, \sigma_i(W_j)^2 \big)^{\frac{1}{M+1}}
# \;\ge\; \frac{M+1}{2} \sum_i \Big( \prod_{j=0}^{M} \lambda_j\; \sigma_i(Z)^2 \Big)^{\frac{1}{M+1}} . \tag{9} $$
#
# Second, the error. The rows of $Y$ are orthogonal, of lengths $\sqrt{n_k}$, so these are its singular values. By Mirsky's inequality the
# distance of two matrices is at least that of their sorted singular values (take $n_1 \ge n_2 \ge \dots$):
#
# $$ \lVert Z - Y \rVert_F^2 \;\ge\; \sum_{k=1}^{K} \big( \sigma_k(Z) - \sqrt{n_k} \big)^2 . \tag{10} $$
#
# Write $\sigma_k = s_k \sqrt{n_k}$ and add: the loss is at least $\sum_k g_k(s_k)$, with the $g$ of (6) for each class. The least value of each $g_k$
# is a bound for every choice of layers and features, and it is attained: take $Z$ with the singular vectors of $Y$, which is orthogonal rows, and
# balance the factors by (5). Equality in (10) needs common singular vectors, and each $g_k$ has a single minimiser except at equality in (8);
# so every global minimiser has this form. That is the theorem for any depth, without any assumption on the arrangement.

# %%
for trial in range(50):
    depth = 1 + trial % 3
    h = torch.randn(5, sum(sizes), dtype=torch.float64) * 0.5 ** (trial % 5)
    layers = [torch.randn(5, 5).double() for _ in range(depth - 1)]
    layers.append(torch.randn(4, 5).double())
    decays = torch.rand(depth + 1, dtype=torch.float64) * 0.02 + 1e-3
    z = h
    for layer in layers:
        z = layer @ z
    target = torch.repeat_interleave(torch.eye(4), torch.tensor(sizes), 1).double()
    penalty = sum(
        decay / 2 * matrix.square().sum()
        for decay, matrix in zip(decays, [h, *layers], strict=True)
    )
    sigma, root = torch.linalg.svdvals(z), torch.tensor(sizes).double().sqrt()
    modes_cost = (depth + 1) / 2 * (decays.prod() * sigma**2) ** (1 / (depth + 1))
    assert penalty >= modes_cost.sum()
    assert (z - target).square().sum() >= (sigma - root).square().sum()

# %% [markdown]
# ### Balanced classes, biases, and cross-entropy
#
# With $n_k = n$ all lengths in (3) are equal: the rows form an orthogonal frame. An unpenalised bias takes over the common part of all
# outputs; what is left to the rows sums to zero, and $K$ equal vectors with sum zero and equal angles have the cosine
# $-\frac{1}{K-1}$: the **simplex equiangular tight frame**, the classical picture of collapse {cite:p}`papyan2020prevalence`. With
# cross-entropy the common part of the logits is free as well. Suppose the minimiser is symmetric, with logits
# $a\,(I - \frac1K \mathbf 1 \mathbf 1^\top)$ (per class). It has $K - 1$ singular values $a \sqrt n$,
# so by (9) one number remains:
#
# $$ \min_{a \ge 0} \; \log\big( 1 + (K-1) e^{-a} \big) + (K-1)\, \frac{M+1}{2}\, (c\, a^2)^{1/(M+1)}, \qquad
# c = \lambda_H n \prod_j \lambda_j . \tag{11} $$
#
# For the squared error each class needs its own mode. Cross-entropy only needs margins, and $K$ classes can have margins in a plane. With
# $M = 1$ the penalty is the sum of the singular values, which is convex, and symmetry wins. With more layers it is the sum of their powers
# $2/(M+1) < 1$, which prefers few large ones to many equal ones. Whether the simplex survives that is a question for the experiment.
#
# ### Three numbers
#
# With $S_W$ the covariance within the classes and $S_B$ that of the class means, and $T$ the target's Gram matrix,
#
# $$ \mathrm{NC1} = \tfrac1K \operatorname{tr}(S_W S_B^+), \qquad
# \mathrm{NC2} = \Big\lVert \tfrac{W W^\top}{\lVert W W^\top \rVert} - \tfrac{T}{\lVert T \rVert} \Big\rVert, \qquad
# \mathrm{NC3} = \Big\lVert \tfrac{W \bar H}{\lVert W \bar H \rVert} - \tfrac{T'}{\lVert T' \rVert} \Big\rVert , \tag{12} $$
#
# say how far the features are from points, the rows from the frame, and rows and means from each other. All go to zero.

# %% [markdown]
# ## Reference implementation
#
# The closed form for one layer, the scalar problem for more, and NC1.

# %% tags=["reference"]
import torch


def one_layer(n, lam_w, lam_h):
    """Mode, squared row norm and squared feature norm of each class; n is a float tensor (K,)."""
    mode = (1 - n.sum() * torch.sqrt(lam_w * lam_h / n)).clamp_min(0)
    return (
        mode,
        mode * torch.sqrt(n * lam_h / lam_w),
        mode * torch.sqrt(lam_w / (n * lam_h)),
    )


# %% tags=["reference"]
import numpy as np


def deep_mode(n_k, total, lam_layers, lam_h):
    """The global minimiser of g over a fine grid; 0 means that the class is given up."""
    depth, c = len(lam_layers), lam_h * n_k * np.prod(lam_layers)
    s = np.linspace(0, 1, 200_001)
    g = n_k / (2 * total) * (s - 1) ** 2 + (depth + 1) / 2 * (c * s**2) ** (
        1 / (depth + 1)
    )
    return s[np.argmin(g)]


# %% tags=["reference"]
import torch


def variability(features, labels, num_classes):
    """NC1: tr(S_W S_B^+) / C of features (n, d)."""
    means = torch.stack([features[labels == k].mean(0) for k in range(num_classes)])
    within = features - means[labels]
    between = means - means.mean(0)
    s_w = within.T @ within / len(features)
    s_b = between.T @ between / num_classes
    return (torch.trace(s_w @ torch.linalg.pinv(s_b)) / num_classes).item()


# %% [markdown]
# By hand: two classes of 16 and 9, $N = 25$, both decays $0.04$. Then $N \sqrt{\lambda_W \lambda_H} = 1$, so $s = 1 - \frac14$ and
# $1 - \frac13$; the row norms squared are $\frac34 \cdot 4 = 3$ and $\frac23 \cdot 3 = 2$. For NC1 two classes on a line, at
# $-1 \pm 0.1$ and $1 \pm 0.1$: $S_W = 0.01$, $S_B = 1$, so $0.005$.

# %%
mode, row, feature = one_layer(torch.tensor([16.0, 9.0]), 0.04, 0.04)
assert torch.allclose(mode, torch.tensor([3 / 4, 2 / 3]))
assert torch.allclose(row, torch.tensor([3.0, 2.0]))
assert torch.allclose(feature, torch.tensor([3 / 16, 2 / 9]))
on_a_line = torch.tensor([[-1.1], [-0.9], [0.9], [1.1]])
assert abs(variability(on_a_line, torch.tensor([0, 0, 1, 1]), 2) - 0.005) < 1e-6

# %% [markdown]
# ## The library
#
# `lib.geometry.ufm_closed_form` finds the root of (7) by bisection, for any depth and any decays, and returns modes, norms and
# which classes are given up. `lib.geometry.nc_metrics` measures all three numbers against any of three frames.
# `lib.models.UnconstrainedFeatures` is the model of (1), and `lib.models.fit_ufm` takes it to a minimum with L-BFGS.

# %%
n = torch.tensor([100.0, 50.0, 10.0, 2.0])
ours = ufm_closed_form(n, [0.01], 0.012)
theirs = one_layer(n.double(), 0.01, 0.012)
for mine, other in zip(ours[:3], theirs, strict=True):
    assert torch.allclose(mine, other)
for depth in (2, 3):
    deep = ufm_closed_form(n, [4e-3] * depth, 4e-3).mode
    naive = [deep_mode(k, 162.0, [4e-3] * depth, 4e-3) for k in n.tolist()]
    assert np.allclose(deep, naive, atol=1e-5)
random_features, random_labels = torch.randn(60, 4).double(), torch.arange(60) % 3
ours = nc_metrics(random_features, random_labels, torch.randn(3, 4).double())["nc1"]
assert math.isclose(ours, variability(random_features, random_labels, 3), rel_tol=1e-6)
try:
    ufm_closed_form(sizes, [0.01, -0.01], 0.01)
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# ## Experiment
#
# ### Imbalanced: the minimiser against the formula
#
# Four classes of 50, 25, 8 and 2, one, two and three layers, decays chosen so that exactly the smallest class should collapse. By
# the derivation there are many local minima when $M \ge 2$, so start ten times, from small to large initial values, and keep
# the lowest. Then look at which minima the starts found.

# %%
imbalanced = (50, 25, 8, 2)
strengths = {1: 0.018, 2: 0.008, 3: 0.007}
restarts = {"ci": 10, "full": 50}[scale]


def measured_norms(model):
    row_norms = model.weights[-1].detach().square().sum(1)
    classes = range(len(row_norms))
    feature_norms = [
        model.features.detach()[model.labels == k].square().sum(1).mean()
        for k in classes
    ]
    return row_norms, torch.stack(feature_norms)


found = {}
for depth, strength in tqdm(strengths.items(), desc="depths"):
    runs = []
    for restart in range(restarts):
        torch.manual_seed(1000 * seed + restart)
        std = 10 ** (-1.3 + 1.5 * restart / (restarts - 1))
        model = UnconstrainedFeatures(imbalanced, 8, depth, std=std).double()
        value = fit_ufm(
            model, [strength] * depth, strength, max_iterations=600, tolerance=1e-8
        )
        kept = tuple((measured_norms(model)[0] > 1e-2).tolist())
        runs.append((value, kept, std, model))
    found[depth] = sorted(runs, key=lambda run: run[0])
frame = {}
for depth, runs in found.items():
    solution = ufm_closed_form(imbalanced, [strengths[depth]] * depth, strengths[depth])
    row_norms, feature_norms = measured_norms(runs[0][3])
    alive = ~solution.collapsed
    errors = [
        ((measured - exact).abs() / exact)[alive].max().item()
        for measured, exact in (
            (row_norms, solution.weight_norm2),
            (feature_norms, solution.feature_norm2),
        )
    ]
    directions = F.normalize(runs[0][3].weights[-1].detach()[alive], dim=1)
    off = (directions @ directions.T - torch.eye(int(alive.sum()))).abs().max().item()
    dead = max([0, *row_norms[~alive].tolist(), *feature_norms[~alive].tolist()])
    frame[depth] = dict(
        errors=max(errors), cosine=off, dead=dead, collapsed=solution.collapsed.tolist()
    )
    minima = len({kept for _, kept, *_ in runs})
    print(
        f"{depth} layer(s): {about(minima)} different minima from {restarts} starts; classes kept in the best:",
        end=" ",
    )
    print([k for k, on in enumerate(runs[0][1]) if on], end="; ")
    print(
        f"largest error of a norm {about(100 * max(errors), 1)} %, largest cosine {about(off, 1)}"
    )

# %% [markdown]
# The formula is met to many digits. With one layer every start ends in the same place. With more layers small starts give up
# classes that the global minimum keeps, and large ones may keep a class that it gives up.
#
# ### Balanced: three frames
#
# Four classes of 20, with the squared error without and with a bias, and cross-entropy with a bias, at depths one and three; the best of six
# starts each. Look at the means of the features before and after *every* layer. For cross-entropy compare the objective with that of the simplex,
# the minimum of (11).

# %%
balanced, decay_here = (20, 20, 20, 20), 3e-3


def all_layer_cosines(model, centre):
    """Cosines between the class means before and after every layer, (layers + 1, 12)."""
    hidden = torch.stack(
        [model.features.detach()[model.labels == k].mean(0) for k in range(4)]
    )
    cosines = []
    for weight in [None, *model.weights]:
        hidden = hidden if weight is None else hidden @ weight.detach().T
        unit = F.normalize(hidden - hidden.mean(0) if centre else hidden, dim=1)
        cosines.append((unit @ unit.T)[~torch.eye(4, dtype=torch.bool)])
    return torch.stack(cosines)


frames, objectives, ranks = {}, {}, {}
for (loss, bias), depth in itertools.product(
    (("mse", False), ("mse", True), ("ce", True)), (1, 3)
):
    runs = []
    for start in range(6):
        torch.manual_seed(100 * seed + start)
        model = UnconstrainedFeatures(
            balanced, 8, depth, bias=bias, std=0.3 * 1.4**start
        ).double()
        value = fit_ufm(
            model,
            [decay_here] * depth,
            decay_here,
            loss=loss,
            max_iterations=1000,
            tolerance=1e-8,
        )
        runs.append((value, start, model))
    value, _, model = min(runs)
    case = loss, bias, depth
    frames[case], objectives[case] = all_layer_cosines(model, centre=bias), value
    ranks[case] = int((torch.linalg.svdvals(model.product().detach()) > 1e-3).sum())
    line = f"{loss:3}, bias {bias!s:5}, {depth} layer(s): rank {ranks[case]}, cosines over all layers "
    print(
        line
        + f"{about(frames[case].min().item(), 3)} to {about(frames[case].max().item(), 3)}"
    )
simplex_objective = {}
for depth in (1, 3):
    c = decay_here * 20 * decay_here**depth

    def objective(a, c=c, depth=depth):
        return math.log1p(3 * math.exp(-a)) + 3 * (depth + 1) / 2 * (c * a**2) ** (
            1 / (depth + 1)
        )

    simplex_objective[depth] = minimize_scalar(
        objective, bounds=(1, 30), method="bounded"
    ).fun
    line = f"cross-entropy, {depth} layer(s): objective found {about(objectives['ce', True, depth], 4)}, "
    print(line + f"of the simplex {about(simplex_objective[depth], 4)}")

# %% [markdown]
# For the squared error: zero without a bias, minus a third with one, at every layer and both depths. For cross-entropy with one
# layer, the simplex, and the objective of (11) to the last digit. With **three layers the optimiser finds something better than the simplex**: rank two
# in place of three, the four classes as a square in a plane, and a lower objective. So the simplex is not the global minimiser there, whatever
# the abstract says; {cite:t}`garrod2025persistence` prove that deep collapse is in general not optimal for cross-entropy, for the
# reason given below (11), and discuss why training finds it nevertheless.
#
# ### A real network
#
# Back to the digits of the first figure. The theory's assumption of features that may be anything is now a hope about a network with one
# hidden layer. Put its norms on the curve of (3), and follow the metrics. A second network is trained with cross-entropy and a
# bias on 40 images of each digit.

# %%
exact = ufm_closed_form(class_sizes, [decay], decay)
row_norms = rows.square().sum(1)
mean_norms = means.square().sum(1)
*_, ce_rows, ce_path, _ = train_network((40,) * 10, "ce", steps, bias=True)

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
fine = np.geomspace(8, 160, 100)
total = sum(class_sizes)
curve = np.maximum(0, 1 - total * decay / np.sqrt(fine))
axes[0].plot(fine, curve * np.sqrt(fine), "C0", label=r"$\|w_k\|^2$, equation (3)")
axes[0].plot(class_sizes, row_norms, "C0o", label="measured")
axes[0].plot(
    fine, 50 * curve / np.sqrt(fine), "C1", label=r"$50\,\|h_k\|^2$, equation (3)"
)
axes[0].plot(class_sizes, 50 * mean_norms, "C1s", label="measured")
axes[0].axvline((total * decay) ** 2, color="0.4", ls=":", label="collapse (4)")
axes[0].set(
    title="A digits network on the theory's curve",
    xlabel="images of the class",
    ylabel="squared length",
    xscale="log",
)
axes[0].legend(fontsize=7)
for style, track in (
    ("-", path),
    ("--", ce_path),
):
    for i, metric in enumerate(("nc1", "nc2", "nc3")):
        axes[1].loglog(
            [step for step, _ in track],
            [values[metric] for _, values in track],
            style,
            color=f"C{i}",
            label=metric.upper() if style == "-" else None,
        )
axes[1].set(
    title="Collapse (dashed: cross-entropy)",
    xlabel="step",
    ylabel="distance from collapse",
)
axes[1].legend()
plt.show()
real_error = (
    ((row_norms - exact.weight_norm2).abs() / exact.weight_norm2.max()).max().item()
)
rank = spearmanr(row_norms, class_sizes)[0]
mean_off = (cosines - torch.eye(10)).abs().sum().item() / 90
print(
    f"largest error of a squared row norm {about(100 * real_error, 2)} % of the longest; ",
    end="",
)
print(f"mean |cosine| {about(mean_off, 1)}; rank correlation {about(rank, 3)}")

# %% [markdown]
# Left: the trained network lies on a curve that knows nothing about digits. Only the smallest class, near its collapse, is not quite
# there. Right: all three numbers fall by orders of magnitude, for both losses.
#
# One caution. The decay of the features is part of the theory and not of everyday training. Replace it by the usual weight decay on all
# layers, with a rectifier before the classifier, and the picture blurs:


# %%
def everyday(sizes, steps=800):
    x, y = subset(sizes)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10, bias=False),
    )
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    one_hot = F.one_hot(y, 10).float()
    for _ in range(steps):
        loss = (model(x) - one_hot).square().sum() / (2 * len(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model[-1].weight.detach()


everyday_rows = everyday(class_sizes)
unit = F.normalize(everyday_rows, dim=1)
mean_cosine = (unit @ unit.T)[~torch.eye(10, dtype=torch.bool)].mean().item()
everyday_rank = spearmanr(everyday_rows.norm(dim=1), class_sizes)[0]
print(
    f"everyday training: mean cosine {about(mean_cosine, 2)}, rank correlation of lengths {about(everyday_rank, 2)}"
)

# %% [markdown]
# The mean cosine is near $-\frac19$, the value of the simplex, though there is no bias in the classifier: features that are
# never negative share a direction, and the network uses it as a bias. It pays nothing for that, since nobody decays its
# features. The lengths have lost their order, too: their rank correlation with the class sizes is far from one.

# %% [markdown]
# ## Claims

# %%
ledger.claim(
    "Global minimisers on unconstrained features collapse at every linear layer, for squared error and cross-entropy",
    paper="theorem",
    measured=f"squared error: cosines within {about(max(frames['mse', False, m].abs().max().item() for m in (1, 3)), 1)} of 0, with "
    f"a bias within {about(max((frames['mse', True, m] + 1 / 3).abs().max().item() for m in (1, 3)), 1)} of -1/3; cross-entropy, three "
    f"layers: rank {ranks['ce', True, 3]}, objective {about(objectives['ce', True, 3] / simplex_objective[3], 3)} of the simplex's",
    checks={
        "squared error without bias: |cosines| <= 0.02 at every layer, depths 1 and 3": max(
            frames["mse", False, m].abs().max().item() for m in (1, 3)
        )
        <= 0.02,
        "squared error with bias: cosines within 0.02 of -1/3 at every layer, depths 1 and 3": max(
            (frames["mse", True, m] + 1 / 3).abs().max().item() for m in (1, 3)
        )
        <= 0.02,
        "cross-entropy, one layer: cosines within 0.02 of -1/3, objective within 1e-4 of (11)": (
            frames["ce", True, 1] + 1 / 3
        )
        .abs()
        .max()
        .item()
        <= 0.02
        and abs(objectives["ce", True, 1] / simplex_objective[1] - 1) < 1e-4,
        "cross-entropy, three layers: no minimum below the simplex": objectives[
            "ce", True, 3
        ]
        >= simplex_objective[3] * (1 - 1e-4),
    },
    fails={
        "cross-entropy, three layers: no minimum below the simplex": "The penalty of several layers prefers few large singular "
        "values; four classes in a plane have a lower objective.",
    },
)

# %%
ledger.claim(
    "Imbalanced classes: a general orthogonal frame, with lengths set by the class sizes, and minority collapse",
    paper="theorem (bias-free squared error)",
    measured=", ".join(
        f"{m} layer(s): norms within {about(100 * f['errors'], 1)} %, cosines {about(f['cosine'], 1)}"
        for m, f in frame.items()
    ),
    checks={
        "norms of rows and features within 2 % of the closed form, depths 1 to 3": max(
            f["errors"] for f in frame.values()
        )
        <= 0.02,
        "pairwise |cosine| <= 0.02": max(f["cosine"] for f in frame.values()) <= 0.02,
        "exactly the smallest class is predicted to collapse, and does (norms <= 1e-2)": all(
            f["collapsed"] == [False, False, False, True] and f["dead"] <= 1e-2
            for f in frame.values()
        ),
    },
)

# %%
ledger.claim(
    "Training from any start finds that minimum",
    paper="not claimed: the theorems are about global minima",
    measured=", ".join(
        f"{m} layer(s): {about(len({run[1] for run in runs}))} different minima from {restarts} starts"
        for m, runs in found.items()
    ),
    checks={
        "one layer: every start finds the global minimum": len(
            {run[1] for run in found[1]}
        )
        == 1,
        "two and three layers: every start finds the global minimum": all(
            len({run[1] for run in found[m]}) == 1 for m in (2, 3)
        ),
    },
    fails={
        "two and three layers: every start finds the global minimum": "With two or more layers zero is a local minimum for "
        "each class; small starts give up classes that the global minimum keeps.",
    },
)

# %%
fall = {
    name: track[0][1]["nc1"] / track[-1][1]["nc1"]
    for name, track in (("mse", path), ("ce", ce_path))
}
ledger.claim(
    "The geometry shows on practical networks, balanced and imbalanced",
    paper="observed on MLP, ResNet and VGG",
    measured=f"NC1 falls by {about(fall['mse'], 1)} (squared error) and {about(fall['ce'], 1)} (cross-entropy); rank correlation of "
    f"length and size {about(rank, 3)}; squared norms within {about(100 * real_error, 2)} % of the longest",
    checks={
        "NC1 falls at least tenfold, both losses": min(fall.values()) >= 10,
        "rank correlation of row length and class size >= 0.8": rank >= 0.8,
        "squared row norms within 10 % of the longest, by the closed form": real_error
        <= 0.1,
        "rows orthogonal: mean |cosine| <= 0.05": mean_off <= 0.05,
        "cross-entropy, balanced: NC2 <= 0.1": ce_path[-1][1]["nc2"] <= 0.1,
        "with everyday weight decay and a rectifier the rows are orthogonal (mean cosine above -0.05)": mean_cosine
        > -0.05,
    },
    fails={
        "with everyday weight decay and a rectifier the rows are orthogonal (mean cosine above -0.05)": "Features that are "
        "never negative share a direction which serves as a bias, and nothing decays the features.",
    },
)

# %%
ledger.untested(
    "Collapse by layer with three and more linear layers on top of ResNet-18 and VGG, on CIFAR-10",
    paper="1, 3, 6 and 9 linear layers in the released code, balanced and imbalanced",
    reason="hundreds of epochs on a graphics card; the digits network has one linear layer",
)

# %%
ledger

# %% [markdown]
# ## What is different from the paper
#
# The proof by (9) and (10) is this chapter's own and covers the squared error without a bias; for the squared error with a bias and for
# cross-entropy the symmetric form is assumed and held against the optimiser from random starts. The practical networks
# are small perceptrons on digits in place of convolutional networks on CIFAR-10, and their features decay explicitly, as in the theory; the everyday
# setting is shown as a contrast. `scale="full"` takes fifty starts and 20 000 steps.

# %% [markdown]
# ## Exercises
#
# **1.** With one layer and equal decays $\lambda$, how small may a class of a set of $N$ examples be before it is given up? Write
# `smallest_class(total, decay)`, the largest integer size that still collapses.


# %% tags=["exercise"]
def check_1(answer):
    for total, strength in ((85, 0.018), (600, 2 / 600), (1000, 0.004)):
        size = answer(total, strength)
        assert ufm_closed_form((size, total - size), [strength], strength).collapsed[0]
        assert not ufm_closed_form(
            (size + 1, total - size - 1), [strength], strength
        ).collapsed[0]


# %% tags=["solution", "hide-cell"]
def smallest_class(total, decay):
    return math.floor((total * decay) ** 2)


check_1(smallest_class)

# %% [markdown]
# **2.** Somebody decays the class *means*, $\frac{\lambda_H}{2} \sum_k \lVert h_k \rVert^2$, instead of every example's feature. Which power of $n_k$ does
# $\lVert w_k \rVert^2$ follow now, for classes far from collapse? Return the exponent.


# %% tags=["exercise"]
def check_2(answer):
    # lambda_W |w|^2 = lambda_H |h|^2 now, and s is near 1: |w|^2 does not depend on n_k
    assert answer == 0


# %% tags=["solution", "hide-cell"]
solution_2 = 0
check_2(solution_2)

# %% [markdown]
# **3.** Build a simplex equiangular tight frame: `simplex(k)` returns $(k, k)$ unit rows with all cosines $-1/(k-1)$.


# %% tags=["exercise"]
def check_3(answer):
    for k in (2, 3, 7):
        vectors = answer(k).double()
        wanted = torch.full((k, k), -1 / (k - 1)).double().fill_diagonal_(1)
        assert torch.allclose(vectors @ vectors.T, wanted)


# %% tags=["solution", "hide-cell"]
def simplex(k):
    centred = torch.eye(k).double() - 1 / k
    return centred / centred.norm(dim=1, keepdim=True)


check_3(simplex)

# %% [markdown]
# ## Summary
#
# - On free features the regularised problem falls apart into one scalar problem for each class. Within-class collapse is convexity; the frame is
#   the inequality of the means.
# - With one layer squared row lengths grow like $\sqrt{n_k}$, feature lengths shrink from four times the size of collapse on, and a class of
#   at most $N^2 \lambda_W \lambda_H$ examples disappears.
# - With more than one layer the disappearance is a jump, and zero is a local minimum for every class: small starts can lose classes.
# - A bias turns the orthogonal frame into a simplex, and so does cross-entropy with one layer. With three layers and four classes
#   cross-entropy prefers a frame of lower rank. A rectifier with everyday weight decay makes a rough simplex.
#
# **Further reading.** {cite:t}`papyan2020prevalence` found the crystal; {cite:t}`fang2021exploring` found what imbalance does to it. What a
# distribution-free loss promises is in [comp-sum losses](../losses/comp-sum-losses.ipynb).
