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
# # The Z-loss: training that does not see the number of classes
#
# A language model with 800,000 words computes 800,000 outputs for every word it reads, and changes 800,000 rows of its
# last layer, only to learn that one of them should have been larger. The Z-loss {cite:p}`spherical-z-loss` asks for less: how many
# standard deviations the target's output lies above the mean of all outputs. Mean and deviation of $Wh$ can be known
# without computing $Wh$. You derive the loss and its gradient, then a training step that is exact and costs the same for a
# thousand classes and for a hundred thousand. You watch it lose its precision and repair it, and you measure on text
# what the loss is worth next to log-softmax. It shares nothing but its name with the penalty $(\log Z)^2$
# that large language models add to cross-entropy {cite:p}`chowdhery2022palm`.

# %% [markdown]
# ## Setup

# %% tags=["parameters"]
scale = "ci"
seed = 0

# %%
import collections
import math
import re
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from lib.claims import Ledger, about
from lib.data import data_path, english_text
from lib.losses import (
    linear_cross_entropy,
    spherical_softmax_nll,
    taylor_softmax_nll,
    z_loss,
)
from lib.models import SphericalOutput
from lib.train import PeakTensor

plt.style.use("lib.book")
torch.manual_seed(seed)
device = "cuda" if scale == "full" and torch.cuda.is_available() else "cpu"
ledger = Ledger("spherical-z-loss", scale, seed)

# %% [markdown]
# ## The problem
#
# Here is one step of gradient descent on an output layer with log-softmax, for 16 hidden vectors of 64 numbers and
# a growing number $D$ of classes. Beside it, a forward and backward pass of the hidden layer that made these vectors,
# from a context of five words.


# %%
def seconds(function, repeats):
    """The fastest of several calls after two to warm up: the one least disturbed by other programs."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[2:])


def step_of(module, loss, hidden):
    """A closure: one SGD step of `module`, with the gradient on `hidden` as well."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss(module, hidden.detach().requires_grad_()).backward()
        optimizer.step()

    return step


d, batch = {"ci": (64, 16), "full": (512, 128)}[scale]
sizes = {"ci": (1_000, 10_000, 100_000), "full": (10_000, 100_000, 800_000)}[scale]
hidden = torch.randn(batch, d, device=device)
context = torch.randn(batch, 5 * d, device=device)
times = {"hidden layer": [], "log-softmax": []}
for D in sizes:
    y = torch.randint(D, (batch,), device=device)
    below = nn.Sequential(nn.Linear(5 * d, d), nn.Tanh()).to(device)
    step = step_of(below, lambda module, x: module(x).square().mean(), context)
    times["hidden layer"].append(seconds(step, 9))
    output = nn.Linear(d, D, bias=False, device=device)
    step = step_of(output, lambda m, x, y=y: F.cross_entropy(m(x), y), hidden)
    times["log-softmax"].append(seconds(step, 9 if D < 50_000 else 4))
    above, under = (1e3 * times[name][-1] for name in ("log-softmax", "hidden layer"))
    print(f"D = {D:7,d}: output {about(above, 2)} ms, hidden {about(under, 2)} ms")

# %% [markdown]
# At a large $D$ nearly all the work is in the last layer. And is what it computes what you want? If you are judged by
# ranks, such as top-10 accuracy, then multiplying all outputs by three changes nothing. Log-softmax disagrees.

# %%
outputs = torch.tensor([[2.0, 1.5, 0.5, 0.0, -1.0, -3.0]], dtype=torch.float64)
target = torch.tensor([1])
for factor in (0.3, 1.0, 3.0):
    scaled = factor * outputs
    rank = (scaled > scaled[0, 1]).sum().item() + 1
    both = F.cross_entropy(scaled, target), z_loss(scaled, target, a=1.0, b=1.0)
    soft, z = (about(loss.item(), 3) for loss in both)
    print(f"outputs times {factor}: rank {rank}, log-softmax {soft}, Z-loss {z}")

# %% [markdown]
# Same ranking, three values of log-softmax; the Z-loss stays where it is.
#
# ## Derivation
#
# ### The spherical family
#
# Let $h \in \mathbb R^d$ be the hidden vector, $W \in \mathbb R^{D \times d}$ the output weight, $o = Wh$ the outputs and $c$
# the target class. A loss belongs to the **spherical family** {cite:p}`vincent2015exact` if it sees the outputs through three numbers only:
#
# $$ L = F(s, q, o_c), \qquad s = \sum_{k=1}^{D} o_k, \qquad q = \sum_{k=1}^{D} o_k^2 . \tag{1} $$
#
# Squared error to a one-hot target is a member: $\tfrac12\lVert o - e_c \rVert^2 = \tfrac12(q - 2 o_c + 1)$. Log-softmax is not,
# because $\sum_k e^{o_k}$ cannot be had from $s$ and $q$. The earlier members imitate it
# {cite:p}`debrebisson2015exploration`: the Taylor softmax cuts $e^{o}$ after its second-order term, and the spherical softmax takes squares,
#
# $$ L_{\text{Taylor}} = \log \sum_k t(o_k) - \log t(o_c), \quad t(o) = 1 + o + \tfrac12 o^2; \qquad L_{\text{sph}} = \log \sum_k (o_k^2 + \epsilon) - \log(o_c^2 + \epsilon). \tag{2} $$
#
# Both sums are functions of $s$ and $q$: the first is $D + s + q/2$, the second $q + D\epsilon$.
#
# ### The Z-loss
#
# The Z-loss does not imitate. With the mean $m$, the standard deviation $\sigma$ and the scores $z$ of the $D$ outputs,
#
# $$ m = \frac sD, \qquad \sigma = \sqrt{\frac qD - m^2}, \qquad z_k = \frac{o_k - m}{\sigma}, \tag{3} $$
#
# and two numbers $a > 0$ and $b$ of your choice, it is
#
# $$ L = \frac1a \log\!\big(1 + e^{a (b - z_c)}\big) . \tag{4} $$
#
# A soft hinge: it presses on the target's score until $z_c$ exceeds $b$, and $a$ says how sharp the bend is. For any
# $k > 0$ and any $e$, the outputs $k\,o + e$ have the same scores, so the same loss.
#
# How large can $z_c$ be? The scores have mean 0 and mean square 1. The $D-1$ others sum to $-z_c$, so by Cauchy and Schwarz their
# squares sum to at least $z_c^2/(D-1)$. Hence $D \ge z_c^2 + z_c^2/(D-1) = z_c^2 D/(D-1)$, and
#
# $$ |z_c| \le \sqrt{D-1}, \qquad L \ge \frac1a \log\!\big(1 + e^{a(b - \sqrt{D-1})}\big), \tag{5} $$
#
# reached when all other outputs tie. Two classes make a degenerate case: $z_c = \pm 1$ always, and there is nothing to learn from.

# %%
wide = torch.randn(400, 30, dtype=torch.float64)
labels = torch.randint(30, (400,))
each = z_loss(wide, labels, a=0.5, b=2.0, reduction="none")
moved = z_loss(3 * wide - 7, labels, a=0.5, b=2.0, reduction="none")
invariance = (moved - each).abs().max().item()
softmax = [F.cross_entropy(factor * wide, labels).item() for factor in (1, 3)]
softmax_moves = softmax[1] - softmax[0]
one_hot = F.one_hot(labels, 30).double()
floor = F.softplus(torch.tensor(0.5 * (2.0 - math.sqrt(29)))).item() / 0.5
at_the_floor = z_loss(one_hot, labels, a=0.5, b=2.0).item()
assert invariance < 1e-6 and each.min() > floor and abs(at_the_floor - floor) < 1e-6

# %% [markdown]
# ### The gradient
#
# Differentiate (3). The mean gives $\partial m / \partial o_k = 1/D$; the deviation gives
# $\partial \sigma/\partial o_k = (2 o_k/D - 2m/D)/(2\sigma) = z_k/D$. So
#
# $$ \frac{\partial z_c}{\partial o_k} = \frac1\sigma\Big(\mathbb 1[k = c] - \frac1D - \frac{z_c z_k}{D}\Big), \tag{6} $$
#
# and with $g = 1/(1 + e^{-a(b - z_c)})$, the slope of the soft hinge,
#
# $$ \frac{\partial L}{\partial o_k} = \frac g\sigma \Big(\frac1D + \frac{z_c z_k}{D} - \mathbb 1[k = c]\Big). \tag{7} $$
#
# The two invariances are visible in it. The gradient sums to zero, since $\sum_k z_k = 0$; and $\sum_k o_k\, \partial L/\partial o_k = 0$,
# since $\sum_k z_k^2 = D$. (With the deviation over $D - 1$, the default of `torch.std`, (5) and (7) are both slightly off.) The cell checks (7) and both identities. It then treats $\sigma$ as a constant, a slip that is
# easily made, and the second identity is gone.

# %%
leaf = wide.clone().requires_grad_()
total = z_loss(leaf, labels, a=0.5, b=2.0, reduction="sum")
(automatic,) = torch.autograd.grad(total, leaf)
sd = wide.std(1, keepdim=True, correction=0)
scores = (wide - wide.mean(1, keepdim=True)) / sd
own = scores.gather(1, labels[:, None])
slope = torch.sigmoid(0.5 * (2.0 - own))
by_formula = slope / sd * (1 / 30 + own * scores / 30 - one_hot)
frozen_sd = slope / sd * (1 / 30 - one_hot)
gradient_error = (automatic - by_formula).abs().max().item()
sums = automatic.sum(1).abs().max().item()
radial = (automatic * wide).sum(1).abs().max().item()
assert max(gradient_error, sums, radial) < 1e-12
print(f"radial part with a frozen deviation: {about((frozen_sd * wide).sum(1).abs().mean().item(), 2)}")  # fmt: skip

# %% [markdown]
# Now the point on which everything rests. Read (7) as a function of $k$: it is a constant, plus a multiple of $o_k$, plus
# something at the target alone. This is so for the whole family, by the chain rule through (1):
#
# $$ \frac{\partial L}{\partial o} = L_s \mathbf 1 + 2 L_q\, o + L_c\, e_c , \tag{8} $$
#
# with $L_s, L_q, L_c$ the derivatives of $F$. For the Z-loss, comparing with (7),
#
# $$ L_c = -\frac g\sigma, \qquad L_q = \frac{g\, z_c}{2 D \sigma^2}, \qquad L_s = \frac{g}{D\sigma}\Big(1 - \frac{z_c\, m}{\sigma}\Big). \tag{9} $$

# %%
by_c, by_q = -slope / sd, slope * own / (2 * 30 * sd**2)
by_s = slope / (30 * sd) * (1 - own * wide.mean(1, keepdim=True) / sd)
assert torch.allclose(by_s + 2 * by_q * wide + by_c * one_hot, automatic, atol=1e-12)

# %% [markdown]
# ### What the invariances do to the weight
#
# A gradient step changes $W$ by $-r\, \frac{\partial L}{\partial o} h^\top$ with learning rate $r$. From $\sum_k \partial L/\partial o_k = 0$,
# the sum of the rows of $W$ never moves. From $\sum_k o_k\, \partial L/\partial o_k = 0$, the change is orthogonal to $W$ itself, so by Pythagoras
#
# $$ \lVert W' \rVert^2 = \lVert W \rVert^2 + r^2 \Big\lVert \frac{\partial L}{\partial o} h^\top \Big\rVert^2 : \tag{10} $$
#
# the weight only ever grows, and as (7) carries a factor $1/\sigma$, the steps shrink with it. A layer under the Z-loss
# anneals its own learning rate; do not be surprised that it takes learning rates well above one.

# %%
weight = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
h = torch.randn(1, 6, dtype=torch.float64)
(pull,) = torch.autograd.grad(z_loss(h @ weight.T, torch.tensor([4])), weight)
after = (weight - 3.0 * pull).detach()
assert torch.allclose(after.sum(0), weight.sum(0))
assert torch.isclose(after.norm() ** 2, weight.norm() ** 2 + (3.0 * pull).norm() ** 2)

# %% [markdown]
# ### A forward and backward pass without outputs
#
# Keep two things beside $W$: the matrix $Q = W^\top W \in \mathbb R^{d \times d}$ and the vector $\bar w = W^\top \mathbf 1 \in \mathbb R^d$. Then
#
# $$ s = \bar w^\top h, \qquad q = h^\top Q h, \qquad o_c = W_c h, \tag{11} $$
#
# with $W_c$ the target's row; and multiplying (8) by $W^\top$, the gradient for the layers below is
#
# $$ \frac{\partial L}{\partial h} = L_s \bar w + 2 L_q\, Q h + L_c W_c . \tag{12} $$
#
# Neither has a $D$ in its cost: $O(d^2)$ for the two products with $Q$. What is left is the change of $W$,
#
# $$ W' = W A - r L_s \mathbf 1 h^\top - r L_c\, e_c h^\top, \qquad A = I - 2 r L_q\, h h^\top , \tag{13} $$
#
# which touches every one of the $D d$ numbers. It must not be carried out.
#
# ### The factored weight
#
# Look at (13): the first term multiplies from the right by a small matrix, the second adds the same vector to every row, and only
# the third picks a row. So store
#
# $$ W = V U + \mathbf 1 w^\top, \qquad V \in \mathbb R^{D \times d}, \quad U \in \mathbb R^{d \times d}, \quad w \in \mathbb R^d, \tag{14} $$
#
# beginning with $U = I$, $w = 0$. Insert it in (13): $W' = V (UA) + \mathbf 1 (A w - r L_s h)^\top - r L_c\, e_c h^\top$. The first two terms are
#
# $$ U' = U A = U - 2 r L_q\, (U h)\, h^\top, \qquad w' = A w - r L_s h . \tag{15} $$
#
# The third goes into one row of $V$. That row is going to be multiplied by $U'$, so divide by it first:
#
# $$ V_c' = V_c - r L_c\, h^\top U'^{-1} . \tag{16} $$
#
# The inverse must not cost $O(d^3)$ per example. $U'^{-1} = A^{-1} U^{-1}$, and $A$ is the identity plus rank one, so Sherman and
# Morrison's formula {cite:p}`sherman1950adjustment` gives
#
# $$ U'^{-1} = U^{-1} + \frac{2 r L_q}{1 - 2 r L_q \lVert h \rVert^2}\; h\, (h^\top U^{-1}) . \tag{17} $$
#
# It needs $2 r L_q \lVert h \rVert^2 \ne 1$. At equality the step projects $W$ along $h$: a perfectly good step, but $U'$ has no
# inverse any more, and you have to start anew with $V \leftarrow VU'$, $U \leftarrow I$.
#
# Last, $Q$ and $\bar w$ have to follow. Write $u = L_s \mathbf 1 + L_c e_c$, so that $W' = WA - r\, u h^\top$, and $p = W^\top u = L_s \bar w + L_c W_c$ (with
# the old weight, and again no $D$). As $\mathbf 1^\top \mathbf 1 = D$,
#
# $$ \bar w' = A \bar w - r (D L_s + L_c)\, h, \tag{18} $$
#
# $$ Q' = A Q A - r\,(A p\, h^\top + h\, p^\top A) + r^2 (D L_s^2 + 2 L_s L_c + L_c^2)\, h h^\top . \tag{19} $$
#
# The last bracket is $u^\top u$. In $AQA$ multiply out: two rank-one corrections, $O(d^2)$. This is the whole algorithm. It does
# not approximate anything.
#
# ### A batch at once
#
# For $B$ examples with rows $h_i$ of $H$, the sum of (13) over the batch has $A = I - H^\top S H$ with $S = \mathrm{diag}(2 r L_{q,i})$, and Woodbury's identity
# takes the place of (17):
#
# $$ A^{-1} = I + H^\top S\, (I - H H^\top S)^{-1} H . \tag{20} $$
#
# The system is $B \times B$. With two examples of one class, both rows of (16) fall on the same $V_c$ and must be added; in (19) they give
# the cross terms $h_i h_j^\top$ wherever $c_i = c_j$. The cost is $O(B d^2 + B^2 d + B^3)$, still without $D$.
#
# ## Reference implementation
#
# First the loss, (3) and (4).


# %% tags=["reference"]
import torch


def z_loss(outputs, targets, a, b):
    """Mean Z-loss of outputs (batch, D): how far the target stands above the mean, in standard deviations."""
    mean = outputs.mean(1, keepdim=True)
    deviation = outputs.std(1, keepdim=True, correction=0)
    z = ((outputs - mean) / deviation).gather(1, targets[:, None])
    return (torch.log1p(torch.exp(a * (b - z))) / a).mean()


# %% [markdown]
# Then one step for one example, (9), (11), (12) and (15) to (19). `state` holds $V, U, U^{-1}, w, Q, \bar w$ and is changed in place.


# %% tags=["reference"]
import torch


def factored_step(state, h, c, lr, a, b):
    """One exact gradient step of W = V U + 1 w^T on the Z-loss of one example; returns the loss and dL/dh.

    h: (d,). c: the target class. state: V (D, d); U, U_inverse and Q (d, d); w and wbar (d,).
    """
    V, U, U_inverse, w, Q, wbar = (
        state[key] for key in ("V", "U", "U_inverse", "w", "Q", "wbar")
    )
    D = len(V)
    W_c, Qh = V[c] @ U + w, Q @ h
    s, q, o_c = wbar @ h, h @ Qh, W_c @ h
    mean = s / D
    sd = (q / D - mean**2).sqrt()
    z = (o_c - mean) / sd
    g = torch.sigmoid(a * (b - z))
    L_s, L_q, L_c = g / (D * sd) * (1 - z * mean / sd), g * z / (2 * D * sd**2), -g / sd
    loss = torch.log1p(torch.exp(a * (b - z))) / a
    gradient = L_s * wbar + 2 * L_q * Qh + L_c * W_c

    t = 2 * lr * L_q  # A = I - t h h^T
    p = L_s * wbar + L_c * W_c
    Ap = p - t * h * (h @ p)
    QA = Q - t * torch.outer(Qh, h)
    AQA = QA - t * torch.outer(h, h @ QA)
    cross = torch.outer(Ap, h)
    square = D * L_s**2 + 2 * L_s * L_c + L_c**2
    state["Q"] = AQA - lr * (cross + cross.T) + lr**2 * square * torch.outer(h, h)
    state["wbar"] = wbar - t * h * (h @ wbar) - lr * (D * L_s + L_c) * h
    state["w"] = w - t * h * (h @ w) - lr * L_s * h
    state["U"] = U - t * torch.outer(U @ h, h)
    state["U_inverse"] = U_inverse + t / (1 - t * h @ h) * torch.outer(h, h @ U_inverse)
    V[c] -= lr * L_c * (h @ state["U_inverse"])
    return loss, gradient


# %% [markdown]
# By hand: four outputs $(0, 0, 0, 4)$ with the last as target have mean 1, mean square 4, so $\sigma = \sqrt 3$ and $z_c = \sqrt 3$, the
# most that four classes allow. Its gradient (7) is zero, since all others tie. So take the first as target: $z_c = -1/\sqrt 3$.
# With $a = 1$ and $b = -1/\sqrt 3$ the loss is $\log 2$ and $g = \tfrac12$; the gradient on the last output is
# $\tfrac{1}{2\sqrt 3}(\tfrac14 - \tfrac{1}{\sqrt 3}\cdot\tfrac{\sqrt 3}{4}) = 0$, on the second $\tfrac{1}{2\sqrt 3}(\tfrac14 + \tfrac1{12}) = \tfrac{1}{6\sqrt 3}$. With $d = 1$ and $h = 1$
# the weight is the column of outputs, and a factored step must do the same.

# %%
column = torch.tensor([[0.0], [0.0], [0.0], [4.0]], dtype=torch.float64)
b_hand = -1 / math.sqrt(3)
assert (
    abs(z_loss(column.T, torch.tensor([0]), 1.0, b_hand).item() - math.log(2)) < 1e-12
)
eye = torch.eye(1, dtype=torch.float64)
state = {"V": column.clone(), "U": eye, "U_inverse": eye, "w": torch.zeros(1).double()}
state |= {"Q": column.T @ column, "wbar": column.sum(0)}
loss, _ = factored_step(state, torch.ones(1).double(), 0, 1.0, 1.0, b_hand)
moved = state["V"] @ state["U"] + state["w"]
push = 1 / (6 * math.sqrt(3))
expected = torch.tensor([2 * push, -push, -push, 4.0], dtype=torch.float64)
assert abs(loss.item() - math.log(2)) < 1e-12 and torch.allclose(moved[:, 0], expected)

# %% [markdown]
# ## The library
#
# `lib.losses.z_loss`, `lib.losses.taylor_softmax_nll` and `lib.losses.spherical_softmax_nll` take the outputs like any other loss, with class weights,
# ignored targets and reductions. The Z-loss of equal outputs has no deviation to divide by; the library gives it a finite gradient.
# `lib.models.SphericalOutput` is the layer that has no outputs. Its `step` takes a batch of hidden vectors, trains the weight, and returns the loss
# and the gradient to send below.

# %%
from lib.losses import z_loss

layer = SphericalOutput(6, 40, a=0.5, b=2.0, dtype=torch.float64)
eye = torch.eye(6, dtype=torch.float64)
state = {"V": layer.V.clone(), "U": eye, "U_inverse": eye, "w": torch.zeros(6).double()}
state |= {"Q": layer.Q.clone(), "wbar": layer.wbar.clone()}
for c in (3, 9, 3):
    h = torch.randn(6, dtype=torch.float64)
    loss, gradient = factored_step(state, h, c, 2.0, 0.5, 2.0)
    ours, ours_gradient = layer.step(h[None], torch.tensor([c]), 2.0)
    assert torch.allclose(ours, loss) and torch.allclose(ours_gradient[0], gradient)
assert all(torch.allclose(getattr(layer, name), value) for name, value in state.items())
equal = torch.zeros(1, 5, requires_grad=True)
z_loss(equal, torch.tensor([2])).backward()
assert equal.grad.isfinite().all()

# %% [markdown]
# ### Precision
#
# Squared error has $L_q = \tfrac12$, so every step shrinks $U$ along $h$. Where the hidden vectors vary more in some directions than in
# others, $U$ becomes ever more lopsided, while $V$ grows by its inverse. The product is right, the factors are hopeless. The
# cell trains such a layer in float32, without repair and with it, and follows the kept inverse and the distance from a dense layer.

# %%
uneven = torch.logspace(0, -1.5, 16)
repairs = {
    "never folded": {"fold_every": None, "tolerance": math.inf},
    "folded on demand": {"fold_every": None},
    "folded every 50 steps": {"fold_every": 50},
}
drift = {}
for name, options in repairs.items():
    generator = torch.Generator().manual_seed(seed)
    layer = SphericalOutput(16, 500, loss="mse", **options)
    dense = layer.materialize()
    curve = []
    for step in range(400):
        h = torch.randn(8, 16, generator=generator) * uneven
        y = torch.randint(50, (8,), generator=generator)
        dense -= 0.1 / 8 * (h @ dense.T - F.one_hot(y, 500)).T @ h
        layer.step(h, y, 0.1)
        if step % 20 == 19:
            distance = (layer.materialize() - dense).norm() / dense.norm()
            curve.append((step + 1, layer.inverse_error(), distance.item()))
    drift[name] = np.array(curve)
    print(f"{name:22} folds {about(layer.folds, 2)}, distance {about(curve[-1][2], 2)}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.3), sharex=True)
for name, curve in drift.items():
    axes[0].semilogy(curve[:, 0], np.maximum(curve[:, 1], 1e-8), label=name)
    axes[1].semilogy(curve[:, 0], curve[:, 2], label=name)
axes[0].set(title="The kept inverse drifts", ylabel="largest entry of $UU^{-1} - I$")
axes[1].set(title="The weight drifts with it", ylabel="distance from the dense layer")
for axis in axes:
    axis.set(xlabel="step")
axes[0].legend()
plt.show()

# %% [markdown]
# Without repair both curves climb by many orders of magnitude. The library probes its inverse on the batch at hand, at $O(B d^2)$, and folds
# $U$ into $V$ when it is off; besides, it folds every few hundred steps, which also recomputes $Q$ and $\bar w$. A fold costs $O(D d^2)$, spread
# over the steps between two. On the left values below $10^{-8}$ are drawn at $10^{-8}$; on the right the distance is relative to the norm of the dense weight.
#
# ## Experiment
#
# ### Data
#
# The text is Python's own reference manual, cut into words; the 2,000 most frequent are the classes, the rest is one `<unk>`.
# Five words predict the sixth. The text is divided into blocks of 500 words, of which six in ten train, two in ten choose
# and two in ten test; no window crosses the border of a block.

# %%
V, text_batch, steps = {"ci": (2_000, 64, 400), "full": (800_000, 512, 20_000)}[scale]


def corpus():
    """Words: the manual, or at full scale WikiText-103 where it is, else pairs from a Zipf law."""
    if scale == "full":
        try:
            text = data_path("wikitext-103", "wiki.train.tokens").read_text("utf-8")
            return text.lower().split()
        except FileNotFoundError:
            first = (V ** np.random.default_rng(seed).random(5_000_000)).astype(int)
            return np.stack([first, first * 7919 % V], 1).ravel().tolist()
    return re.findall(r"[a-z_]+", english_text().lower())


words = corpus()
frequent = collections.Counter(words).most_common(V - 1)
number = {word: index + 1 for index, (word, _) in enumerate(frequent)}
stream = torch.tensor([number.get(word, 0) for word in words])
blocks = stream[: len(stream) // 500 * 500].view(-1, 500)
order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
cuts = (int(0.6 * len(blocks)), int(0.8 * len(blocks)))
train_part, choose_part, test_part = (
    blocks[part].unfold(1, 6, 1).reshape(-1, 6)
    for part in (order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :])
)
print(f"{len(train_part):,d} windows train, {len(choose_part):,d} choose, {len(test_part):,d} test")  # fmt: skip


def body(width):
    """Five words to a hidden vector."""
    first = nn.Sequential(nn.Embedding(V, width), nn.Flatten())
    return nn.Sequential(first, nn.Linear(5 * width, width), nn.Tanh())


def batches(count, size):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        chosen = torch.randint(len(train_part), (size,), generator=generator)
        windows = train_part[chosen].to(device)
        yield windows[:, :5], windows[:, 5]


# %% [markdown]
# ### Is it exact?
#
# A network of width 32 is trained with a dense output layer and plain gradient descent. `SphericalOutput` starts from the same weight and gets the same
# hidden vectors. After each step its gradient on $h$ is compared, after all steps its weight.


# %%
def squared_error(outputs, targets):
    """Half the squared distance to the one-hot target, without a one-hot matrix."""
    own = outputs.gather(1, targets[:, None]).squeeze(1)
    return 0.5 * (outputs.square().sum(1) - 2 * own + 1).mean()


dense_losses = {
    "z": lambda o, y: z_loss(o, y, a=1.0, b=5.0),
    "taylor": taylor_softmax_nll,
    "spherical": spherical_softmax_nll,
    "mse": squared_error,
}
sgd_rates = {"z": 5.0, "taylor": 0.5, "spherical": 0.5, "mse": 0.02}


def compare(loss, dtype, count):
    """Errors of the factored layer: of W, of dL/dh (worst step), of the inverse; and how far W has moved."""
    torch.manual_seed(seed)
    below = body(32).to(device, dtype)
    options = {"fold_every": 150, "dtype": dtype, "device": device}
    factored = SphericalOutput(32, V, loss=loss, a=1.0, b=5.0, **options)
    weight = factored.materialize().requires_grad_()
    start, rows = weight.detach().clone(), factored.wbar.clone()
    groups = [{"params": below.parameters(), "lr": 0.5}, {"params": [weight]}]
    optimizer = torch.optim.SGD(groups, lr=sgd_rates[loss])
    worst = 0.0
    for context, y in batches(count, 16):
        h = below(context)
        h.retain_grad()
        optimizer.zero_grad()
        dense_losses[loss](h @ weight.T, y).backward()
        _, gradient = factored.step(h, y, sgd_rates[loss])
        worst = np.maximum(worst, ((gradient - h.grad).norm() / h.grad.norm()).item())
        optimizer.step()
    weight = weight.detach()
    inverse = factored.U.inverse()
    return {
        "weight": ((factored.materialize() - weight).norm() / weight.norm()).item(),
        "gradient": worst,
        "inverse": ((factored.U_inverse - inverse).norm() / inverse.norm()).item(),
        "folds": factored.folds,
        "moved": ((weight - start).norm() / start.norm()).item(),
        "row sum": ((weight.sum(0) - rows).norm() / rows.norm()).item(),
    }


exact = {("z", "float32"): compare("z", torch.float32, 200)}
for loss in dense_losses:
    exact[loss, "float64"] = compare(loss, torch.float64, 200 if loss == "z" else 60)
for (loss, dtype), errors in exact.items():
    w, h, moved = (about(errors[key], 2) for key in ("weight", "gradient", "moved"))
    print(f"{loss:9} {dtype}: error of W {w}, of dL/dh {h}; W has moved by {moved}")

# %% [markdown]
# Rounding, and nothing else. No output was computed on one of the two sides.
#
# ### What does a step cost?
#
# The times from the beginning, with three more: the factored step, the same loss by automatic differentiation on a dense layer, and PyTorch's adaptive softmax {cite:p}`grave2017efficient`, a hierarchy of classes
# by frequency with two tails, in place of the paper's hierarchical softmax. As the hierarchy is made for it, all targets here follow Zipf's law.
# The factored time includes its share of a fold every 500 steps, which does grow with $D$.

# %%
bare = []  # the factored step without its share of the folds
made = {"factored": [], "dense": []}  # bytes that one step allocates
for D in tqdm(sizes, desc="timing"):
    y = (D ** torch.rand(batch, device=device)).long().clamp(max=D - 1)
    dense = nn.Linear(d, D, bias=False, device=device)
    adaptive = nn.AdaptiveLogSoftmaxWithLoss(d, D, [D // 50, D // 5]).to(device)
    factored = SphericalOutput(d, D, fold_every=None, device=device)
    single = {
        "adaptive softmax": step_of(adaptive, lambda m, x, y=y: m(x, y).loss, hidden),
        "dense Z-loss": step_of(dense, lambda m, x, y=y: z_loss(m(x), y), hidden),
    }
    if scale == "full":  # a dense baseline that never stores its logits
        fused = lambda m, x, y=y: linear_cross_entropy(x, m.weight, y)  # noqa: E731
        single["linear cross-entropy"] = step_of(dense, fused, hidden)
    for name, step in single.items():
        times.setdefault(name, []).append(seconds(step, 9 if D < 50_000 else 4))
    bare.append(seconds(lambda m=factored, y=y: m.step(hidden, y, 0.1), 40))
    fold = seconds(factored.fold, 3)
    for kind, once in (
        ("factored", lambda m=factored, y=y: m.step(hidden, y, 0.1)),
        ("dense", single["dense Z-loss"]),
    ):
        with PeakTensor() as memory:
            once()
        made[kind].append(memory.made_bytes)
    times.setdefault("factored Z-loss", []).append(bare[-1] + fold / 500)
    step_ms, fold_ms = about(1e3 * bare[-1], 2), about(1e3 * fold, 2)
    print(f"D = {D:7,d}: factored step {step_ms} ms, one fold {fold_ms} ms")

figure, axes = plt.subplots(figsize=(6.5, 3.8))
for marker, (name, values) in zip("os^vDx", times.items(), strict=False):
    axes.loglog(sizes, [1e3 * value for value in values], marker=marker, label=name)
axes.set(xlabel="classes $D$", ylabel="time of one step (ms)")
axes.set_title("The factored step does not see the number of classes")
axes.legend(fontsize=8, loc="upper left")
plt.show()
growth = {name: t[-1] / t[0] for name, t in {**times, "step": bare}.items()}

# %% [markdown]
# The step is the same at every $D$; the factored line rises at its end only by the share of the folds, and a rarer fold would make that smaller. At a thousand classes log-softmax is still faster: a few dozen small operations cost more than one small
# matrix. The dense Z-loss is slower than log-softmax at every size. Being a member of the spherical family buys
# nothing until you use the factors.
#
# ### What is the loss worth?
#
# Speed is no use if the loss does not rank well. Now a network of width 64 is trained with Adam, whose steps the factored layer
# cannot take, so all losses are dense here. Every loss gets the same network, initial weights, batches and number of steps, and
# chooses on the validation blocks, for each $k$. Log-softmax and the Taylor softmax choose between the two learning rates that were
# their best in a trial, the Z-loss between four pairs of $a$ and $b$ at one rate. Squared error and the spherical softmax are far behind at any rate; they get one.

# %%
cutoffs = (1, 5, 10, 50)
rates = {"ci": (5e-3, 1e-2, 2e-2), "full": (1e-3, 3e-3, 1e-2)}[scale]
grid = [(a, b) for a in (0.1, 1.0) for b in (5.0, 20.0)]
arms = [("log-softmax", F.cross_entropy, rate) for rate in rates[:2]]
arms += [
    (f"Z-loss a={a:g} b={b:g}", lambda o, y, a=a, b=b: z_loss(o, y, a=a, b=b), rates[1])
    for a, b in grid
]
arms += [("Taylor softmax", taylor_softmax_nll, rate) for rate in rates[1:]]
arms += [("spherical softmax", spherical_softmax_nll, rates[0])]
arms += [("squared error", squared_error, rates[0])]
families = list(dict.fromkeys(name.split(" a=")[0] for name, _, _ in arms))


def ranks(model, windows, name):
    """The place of the target among the outputs; ties count against it."""
    places = []
    for part in windows.to(device).split(256):
        outputs = model(part[:, :5])
        if name == "spherical softmax":  # it cannot tell the sign
            outputs = outputs.abs()
        places.append((outputs >= outputs.gather(1, part[:, 5:])).sum(1).cpu())
    return torch.cat(places)


def train(name, loss, rate):
    torch.manual_seed(seed)
    width = d if scale == "full" else 64
    model = nn.Sequential(body(width), nn.Linear(width, V, bias=False)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)
    for context, y in batches(steps, text_batch):
        optimizer.zero_grad()
        loss(model(context), y).backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        return [ranks(model, windows, name) for windows in (choose_part, test_part)]


def accuracy(places, k):
    return 100 * (places <= k).double().mean().item()


trained = {arm[::2]: train(*arm) for arm in tqdm(arms, desc="training")}


def best(family, k):
    """The test ranks of the arm that is best at k on the validation blocks."""
    mine = [pair for (name, _), pair in trained.items() if name.startswith(family)]
    return max(mine, key=lambda pair: accuracy(pair[0], k))[1]


top = {name: {k: accuracy(best(name, k), k) for k in cutoffs} for name in families}
print("test accuracy in %")
for name, row in top.items():
    print(f"{name:18}" + "  ".join(f"top-{k} {about(row[k])}" for k in cutoffs))

# %%
axis_k = np.unique(np.geomspace(1, 200, 40).astype(int))
figure, axes = plt.subplots(1, 2, figsize=(9, 3.7))
for name in families:
    places = best(name, 10)
    axes[0].semilogx(axis_k, [accuracy(places, k) for k in axis_k], label=name)
baseline = np.array([accuracy(best("log-softmax", k), k) for k in axis_k])
for style, (a, b) in zip(("-", "--", "-.", ":"), grid, strict=True):
    places = trained[f"Z-loss a={a:g} b={b:g}", rates[1]][1]
    gap = np.array([accuracy(places, k) for k in axis_k]) - baseline
    axes[1].semilogx(axis_k, gap, style, label=f"a = {a:g}, b = {b:g}")
axes[1].axhline(0, color="grey", lw=0.8)
axes[0].set(title="How often the word is among the first k", ylabel="test accuracy (%)")
axes[1].set(title="The Z-loss against log-softmax", ylabel="difference (points)")
for axis in axes:
    axis.set(xlabel="k")
    axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# Left, from the top: log-softmax and the Z-loss together, then the Taylor softmax, then the two losses with squares alone.
# Right, each pair $a, b$ against log-softmax. They
# differ in how fast the slope $g$ of (7) falls while the target rises. With $a = 1$, $b = 20$ it hardly falls: such a loss never lets go
# of a target, and does best at the head of the ranking. With $a = 1$, $b = 5$ it is content once the target stands five deviations above the mean, and
# spends its effort on the targets that do not; it gives away the first places and gains further down. At the head the pairs with $a = 0.1$ lie between. That is the sense in which $a$ and $b$
# tune the loss to a $k$.
#
# ## Claims

# %%
z32, z64 = exact["z", "float32"], exact["z", "float64"]
doubles = [errors for (_, dtype), errors in exact.items() if dtype == "float64"]
largest = {key: np.max([errors[key] for errors in doubles]) for key in doubles[0]}
ledger.claim(
    "The loss sees only the sum, the sum of squares and the target's output, so exact training costs O(d²)",
    paper="proved; the update is exact",
    measured=f"after 200 steps W differs by {about(z32['weight'], 2)} in float32, {about(z64['weight'], 2)} in float64",
    checks={
        "W is the dense one to 1e-4 in float32 after 200 steps": z32["weight"] <= 1e-4,
        "and to 1e-9 in float64, for Taylor, spherical and squared error too": largest["weight"] <= 1e-9,
        "so are the gradients on the hidden vectors, at every step, in float32": z32["gradient"] <= 1e-4,
        "and in float64": largest["gradient"] <= 1e-9,
        "the kept inverse is the inverse to 1e-6 in float64": largest["inverse"] <= 1e-6,
        "no fold beyond the one that is due every 150 steps": [e["folds"] for e in exact.values()] == [1, 1, 0, 0, 0],
        "W has moved by at least 1 % of its norm, for every loss": np.min([e["moved"] for e in doubles]) >= 0.01,
    },
)  # fmt: skip

# %%
ledger.claim(
    "The Z-loss is invariant to shifting and scaling the outputs",
    paper="by construction",
    measured=f"loss under 3o − 7 changes by at most {about(invariance, 2)}; log-softmax by {about(softmax_moves, 2)}",
    checks={
        "the loss of 3o - 7 is that of o to 1e-6, for 400 rows": invariance <= 1e-6,
        "tripling the outputs changes log-softmax by at least 1 nat": softmax_moves >= 1,
        "the gradient is formula (7) to 1e-10": gradient_error <= 1e-10,
        "it is orthogonal to ones and to the outputs to 1e-10": max(sums, radial) <= 1e-10,
        "no row is below the bound of (5)": each.min().item() >= floor,
        "the bound is attained where all other outputs tie": abs(at_the_floor - floor) <= 1e-6,
        "in training the sum of the rows of W stays put to 1e-9": z64["row sum"] <= 1e-9,
    },
)  # fmt: skip

# %%
ledger.claim(
    "A training step of the Z-loss does not depend on the number of classes",
    paper="complexity O(d²) instead of O(dD)",
    measured=f"from {sizes[0]:,d} to {sizes[-1]:,d} classes: factored {about(growth['step'], 2)} times slower "
    f"({about(growth['factored Z-loss'], 2)} with the folds), log-softmax {about(growth['log-softmax'], 2)} times; "
    f"one step allocates {made['factored'][-1] / 1e3:.0f} kB at any number of classes, a dense one up to {about(made['dense'][-1] / 1e6, 3)} MB",
    checks={
        "the factored step allocates the same number of bytes for every number of classes": len(set(made["factored"])) == 1,
        "the dense one allocates at least 20 times more for the most than for the fewest": made["dense"][-1] >= 20 * made["dense"][0],
        "from the fewest to the most classes the factored step gets less than 5 times slower": growth["step"] < 5,
        "log-softmax gets more than 20 times slower": growth["log-softmax"] > 20,
        "and the Z-loss through automatic differentiation as well": growth["dense Z-loss"] > 20,
    },
)  # fmt: skip

# %%
speedup = {name: times[name][-1] / times["factored Z-loss"][-1] for name in times}
ledger.claim(
    "At a large vocabulary the output layer trains many times faster than with log-softmax or a hierarchical softmax",
    paper="40 times log-softmax, more than 4 times hierarchical softmax (793,471 words, whole training, GPU)",
    measured=f"one step with its share of the folds, {sizes[-1]:,d} classes: log-softmax {about(speedup['log-softmax'], 2)} times slower, "
    f"adaptive softmax {about(speedup['adaptive softmax'], 2)} times",
    checks={
        "10 times faster than log-softmax, folds included": speedup["log-softmax"] >= 10,
        "1.5 times faster than the adaptive softmax, folds included": speedup["adaptive softmax"] >= 1.5,
    },
)  # fmt: skip
ledger.untested(
    "On the One Billion Word data the whole training is 40 times faster, at a comparable quality",
    paper="40 and more than 4 times faster than log-softmax and hierarchical softmax",
    reason="The data and weeks of training do not fit here; single steps are timed instead.",
)

# %%
others = ("Taylor softmax", "spherical softmax", "squared error")
lead = {name: top["Z-loss"][10] - top[name][10] for name in others}
ledger.claim(
    "The Z-loss is better than the other losses of the spherical family",
    paper="significantly outperforms them (Penn Treebank, One Billion Word)",
    measured="top-10: " + ", ".join(f"{about(lead[name], 2)} points over {name}" for name in others),
    checks={f"top-10 at least 1 point above {name}": lead[name] >= 1 for name in others},
)  # fmt: skip

# %%
against = {k: top["Z-loss"][k] - top["log-softmax"][k] for k in cutoffs}
ledger.claim(
    "With a and b tuned for k, the Z-loss outperforms log-softmax on certain top-k scores",
    paper="better at certain ranking scores, such as top-k",
    measured="against log-softmax: "
    + ", ".join(f"top-{k} {about(gap, 2)} points" for k, gap in against.items()),
    checks={
        "top-50 above log-softmax": against[50] > 0,
        "top-10 at most 1 point below it": against[10] >= -1,
        "the difference is better at top-50 than at top-1": against[50] > against[1],
    },
)  # fmt: skip

# %%
ends = {name: curve[-1] for name, curve in drift.items()}
ledger.claim(
    "The factored weight needs repair: its inverse drifts without bound, and folding removes that",
    paper="the factorisation is due to Vincent et al. 2015, who stabilise it numerically",
    measured="distance from the dense layer in float32: "
    + ", ".join(f"{name} {about(end[2], 2)}" for name, end in ends.items()),
    checks={
        "never folded, the weight is wrong by more than its own norm": not ends["never folded"][2] <= 1,
        "folded on demand, it is right to 1e-4": ends["folded on demand"][2] <= 1e-4,
        "folded every 50 steps, it is right to 1e-4": ends["folded every 50 steps"][2] <= 1e-4,
    },
)  # fmt: skip

# %%
ledger

# %% [markdown]
# ## What is different from the paper
#
# - **Scale.** Two thousand classes and a few ten thousand words of training text instead of Penn Treebank and One Billion Word. `scale="full"` uses WikiText-103 where you
#   have it (else synthetic pairs from a Zipf law) with 800,000 classes, $d = 512$, and adds a cross-entropy that never stores its logits to the timing.
# - **Length.** The text model sees less than one pass over its text. In longer trials the lead of the Z-loss at top-50 shrank and its lag at top-1 grew.
# - **Optimizer.** The comparison of the losses uses Adam, to give each its chance in few steps. The exact algorithm is plain gradient descent on $W$; momentum and
#   adaptive rates need a memory for every entry of $W$ and bring $D$ back.
# - **Hierarchical softmax.** The paper's is a tree of its own; here PyTorch's adaptive softmax stands for it.
# - **Processor.** One core instead of a GPU. The factored step is made of small operations; on a GPU their launch is what it costs.
# - **Inference.** All outputs are needed to rank. `SphericalOutput.topk` costs $O(Dd)$ per query, as with any loss.
# - **Probabilities.** There are none. Softmax of the scores is a distribution that nothing has calibrated, so no perplexity is reported.
#
# ## Exercises
#
# **1.** The pseudo-Huber form $L = \sqrt{1 + (q - 2 o_c + 1)}$ of the squared error is spherical too. Write `answer(s, q, o_c)` that returns its three derivatives
# $(L_s, L_q, L_c)$, which is all that a factored layer needs to know of a loss.


# %% tags=["exercise"]
def check_1(answer):
    torch.manual_seed(1)
    o = torch.randn(7, dtype=torch.float64, requires_grad=True)
    distance = o.square().sum() - 2 * o[3] + 1
    (gradient,) = torch.autograd.grad((1 + distance).sqrt(), o)
    o = o.detach()
    result = answer(o.sum(), o.square().sum(), o[3])
    assert result is not None and len(result) == 3, "return (L_s, L_q, L_c)"
    L_s, L_q, L_c = result
    built = L_s + 2 * L_q * o + L_c * F.one_hot(torch.tensor(3), 7)
    assert torch.allclose(built, gradient), "the gradient (8) is not that of the loss"


# %% tags=["solution", "hide-cell"]
def solution_1(s, q, o_c):
    L = torch.sqrt(2 + q - 2 * o_c)
    return torch.zeros_like(q), 0.5 / L, -1 / L


check_1(solution_1)

# %% [markdown]
# **2.** You want to add weight decay, $W \leftarrow (1 - r\lambda) W$, to the factored layer at $O(d^2)$. Write `answer(state, shrink)` that multiplies the weight of a reference
# `state` by the number `shrink`, keeps all six pieces consistent, and leaves $V$ alone.


# %% tags=["exercise"]
def check_2(answer):
    torch.manual_seed(1)
    W = torch.randn(9, 4, dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    state = {"V": W.clone(), "U": eye, "U_inverse": eye, "w": torch.zeros(4).double()}
    state |= {"Q": W.T @ W, "wbar": W.sum(0)}
    factored_step(state, torch.randn(4).double(), 2, 1.0, 1.0, 1.0)
    V, before = state["V"].clone(), state["V"] @ state["U"] + state["w"]
    answer(state, 0.9)
    after = state["V"] @ state["U"] + state["w"]
    assert torch.allclose(after, 0.9 * before), "the weight is not 0.9 times itself"
    assert torch.equal(state["V"], V), "V has changed, at a cost of O(D d)"
    assert torch.allclose(state["U"] @ state["U_inverse"], eye), "the inverse is stale"
    assert torch.allclose(state["Q"], after.T @ after), "Q is stale"
    assert torch.allclose(state["wbar"], after.sum(0)), "wbar is stale"


# %% tags=["solution", "hide-cell"]
def solution_2(state, shrink):
    for name, power in {"U": 1, "w": 1, "wbar": 1, "Q": 2, "U_inverse": -1}.items():
        state[name] = state[name] * shrink**power


check_2(solution_2)

# %% [markdown]
# ## Summary
#
# - A loss that sees the outputs only through their sum, their sum of squares and the target's output has a gradient affine in the outputs.
#   Forward pass, backward pass and the change of $W$ then cost $O(d^2)$, exactly.
# - The trick is to write $W = VU + \mathbf 1 w^\top$: every row changes through $U$ and $w$, one row through $V$. The inverse follows by Sherman and Morrison, and has to be watched.
# - The Z-loss is the member that scores a ranking: it ignores shift and scale of the outputs, its weight can only grow, and $b$ says how far above the mean is enough.
# - On this text it is ahead of the other spherical losses, and at top-50 a little ahead of log-softmax; at top-1 it is level or behind.
# - Without the factors a spherical loss is no faster than log-softmax; with few classes the factors do not pay.
#
# **Further reading.** The algorithm with all updates: {cite:t}`vincent2015exact`. Other ways to a cheap large output layer: a hierarchy by frequency {cite:p}`grave2017efficient`, and
# [cut cross-entropy](../logits/cut-cross-entropy.ipynb), which keeps the $O(Dd)$ arithmetic of log-softmax and saves its memory.
