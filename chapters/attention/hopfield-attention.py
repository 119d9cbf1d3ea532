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
# # Hopfield Networks is All You Need
#
# An associative memory gives back a whole pattern when you show it a part. The classical one, Hopfield's network, holds
# a handful of patterns. This chapter rebuilds it with an energy whose wells are so sharp that the number of patterns
# grows exponentially with the dimension, and finds that the rule by which it recalls is softmax attention, letter by
# letter {cite:p}`hopfield-attention`. That gives meaning to things you have used without asking: the scores are
# overlaps with memories, the temperature decides how many memories are mixed, and one attention step is one step of
# recall. You will derive the energy, the error of one step and the capacity in full, see memories melt into each other
# at a critical temperature, and leave with a retrieval function, three layers, and the online softmax on which every
# fused attention kernel rests.

# %% [markdown]
# ## Setup

# %% tags=["parameters"]
scale = "ci"
seed = 0

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize
import scipy.special
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_iris, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from lib.claims import Ledger, about
from lib.data import data_path, digits, english_text, mnist_idx, random_windows
from lib.models import GPT, mlp
from lib.models.zoo import char_gpt
from lib.train import PeakTensor, fit, fit_ensemble, progress

plt.style.use("lib.book")
torch.manual_seed(seed)
generator = torch.Generator().manual_seed(seed)
ledger = Ledger("hopfield-attention", scale, seed)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


# %% [markdown]
# ## The problem
#
# Store the rows of a matrix $X$, each a picture of 64 pixels with values $\pm1$. A classical Hopfield network
# {cite:p}`hopfield1982neural` writes all of them into one matrix of weights, $W = \frac1d\sum_i x_i x_i^\top$ without its
# diagonal, and recalls by setting one pixel after the other to the sign of what the others say,
# $\xi_a \leftarrow \operatorname{sign}(W\xi)_a$. Show it the upper half of a stored digit.


# %%
def classical_recall(state, stored, sweeps=10):
    """Asynchronous updates of all rows of `state`, until nothing changes or `sweeps` are over."""
    d = stored.shape[1]
    weights = stored.T @ stored / d
    weights.fill_diagonal_(0.0)
    state = state.clone()
    for _ in range(sweeps):
        before = state.clone()
        for unit in torch.randperm(d, generator=generator).tolist():
            state[:, unit] = torch.where(state @ weights[unit] >= 0, 1.0, -1.0)
        if torch.equal(before, state):
            break
    return state


def modern_recall(state, stored, beta):
    return torch.softmax(beta * state @ stored.T, dim=-1) @ stored


(images, labels), _ = digits((1200, 597), seed=seed, flat=True)
binary = torch.where(images > 0.5, 1.0, -1.0).double()  # (1200, 64)
half = binary.clone()
half[:, 32:] = 0.0  # the lower half is unknown
shown = 5
columns = {
    "what it sees": half[:shown],
    "classical,\n3 stored": classical_recall(half[:3], binary[:3]),
    "classical,\n30 stored": classical_recall(half[:shown], binary[:30]),
    "one modern step,\n1200 stored": modern_recall(half[:shown], binary, beta=2.0),
    "what was stored": binary[:shown],
}
figure, grid = plt.subplots(shown, len(columns), figsize=(6.4, 4.8))
for column, (name, pictures) in enumerate(columns.items()):
    for row in range(shown):
        axes = grid[row, column]
        axes.axis("off")
        if row < len(pictures):
            axes.imshow(pictures[row].view(8, 8), cmap="gray", vmin=-1, vmax=1)
        if row == 0:
            axes.set_title(name, loc="center", fontsize=9)
figure.suptitle("Recalling a digit from its upper half", fontweight="bold", fontsize=11)
plt.show()
for count in (3, 30, 1200):
    kept = (
        (classical_recall(binary[:count], binary[:count]) == binary[:count])
        .all(1)
        .sum()
        .item()
    )
    print(
        f"classical, {count:4} digits stored: {kept} of them come back from the complete picture"
    )
alone = (half @ half.T == 32).sum(1) == 1  # no other digit has the same upper half
for name, query, chosen in (
    ("from the complete picture", binary, slice(None)),
    ("from the half", half, slice(None)),
    ("from the half, if no other digit shares it", half, alone),
):
    same = (modern_recall(query, binary, beta=2.0).sign() == binary).all(1)[chosen]
    print(f"modern, 1200 stored: {about(same.double().mean().item())} come back {name}")
# %% [markdown]
# Look at the second and third columns. Digits resemble each other, and already three of them melt into one answer for every half. Thirty
# cannot even be kept: shown the complete picture, the network walks away from it. For random patterns the limit is about $0.138\,d$
# {cite:p}`amit1985storing`. The fourth column holds all 1200 digits and
# needs one line: weigh the stored pictures by a softmax of their overlaps with the query, and average. It fails only where other digits
# have the same upper half. Then it answers with their average, as in the first row.
#
# You know that line. It is attention. The chapter asks what follows from reading it as a memory: how many patterns, how
# fast, how exact, and what happens when it is not exact.

# %% [markdown]
# ## Derivation
#
# ### An energy with sharp wells
#
# The stored patterns are $x_1,\dots,x_N\in\mathbb{R}^d$, the columns of $X\in\mathbb{R}^{d\times N}$, with $M=\max_i\|x_i\|$. The state,
# or query, is $\xi\in\mathbb{R}^d$, and $\beta>0$ is the inverse temperature. The *log-sum-exp* of the overlaps,
#
# $$ \operatorname{lse}(\beta, z) = \frac1\beta \log\sum_{i=1}^N e^{\beta z_i}, \qquad
#    \nabla_z \operatorname{lse}(\beta, z) = \operatorname{softmax}(\beta z), \tag{1} $$
#
# is a soft maximum: $\max_i z_i \le \operatorname{lse}(\beta, z) \le \max_i z_i + \beta^{-1}\log N$. It is convex in $z$. The
# classical energy is minus a sum of *squares* of overlaps, so that many weak overlaps outvote a strong one. Modern networks
# use steeper functions {cite:p}`krotov2016dense`, in the end exponentials {cite:p}`demircigil2017model`, and the paper makes
# the state continuous by adding a quadratic that holds it together:
#
# $$ E(\xi) = -\operatorname{lse}(\beta, X^\top\xi) + \tfrac12\,\xi^\top\xi + \beta^{-1}\log N + \tfrac12 M^2 . \tag{2} $$
#
# The two constants put the energy on a scale: for all $\xi$ on the left, for $\|\xi\|\le M$ on the right,
#
# $$ 0 \;\le\; \tfrac12 \min_i \|\xi - x_i\|^2 \;\le\; E(\xi) \;\le\; 2M^2 . \tag{3} $$
#
# *Left.* Insert the upper bound on lse, attained by some $i$: $E \ge -x_i^\top\xi + \frac12\|\xi\|^2 + \frac12 M^2 =
# \frac12\|\xi-x_i\|^2 + \frac12(M^2-\|x_i\|^2)$. *Right.* The logarithm of a mean is at least the mean of the logarithms, so
# $\operatorname{lse} \ge \beta^{-1}\log N + \frac1N\sum_i x_i^\top\xi \ge \beta^{-1}\log N - M^2$. Without $\beta^{-1}\log N$ and
# $\frac12M^2$ neither bound holds.


# %%
def energy(state, stored, beta):  # (S, d), (N, d) -> (S,)
    lse = torch.logsumexp(beta * state @ stored.T, -1) / beta
    M2 = stored.square().sum(-1).max()
    return -lse + state.square().sum(-1) / 2 + math.log(len(stored)) / beta + M2 / 2


X = randn(64, 32)
M = X.norm(dim=1).max()
xi = (
    F.normalize(randn(200, 32), dim=1)
    * M
    * torch.rand(200, 1, dtype=torch.float64, generator=generator)
)
for beta in (0.01, 0.1, 1.0, 10.0):
    E = energy(xi, X, beta)
    assert (E >= torch.cdist(xi, X).min(1).values ** 2 / 2 - 1e-9).all() and (
        E <= 2 * M**2
    ).all()
E_bare = energy(xi, X, 0.1) - math.log(64) / 0.1 - M**2 / 2
print(
    f"(3) holds for 200 states at four temperatures; without the constants {int((E_bare < 0).sum())} of 200 are negative"
)

# %% [markdown]
# ### The update
#
# (2) is a difference of two convex functions, $\frac12\xi^\top\xi$ and lse. The *concave-convex procedure*
# {cite:p}`yuille2003concave` replaces the concave part $-\operatorname{lse}$ by its tangent at the current state and minimises
# what results. The gradient of $\frac12\xi^\top\xi$ is $\xi$ itself, so that the minimum is explicit:
#
# $$ \xi^{\text{new}} = f(\xi) = X\operatorname{softmax}(\beta X^\top\xi) = X p . \tag{4} $$
#
# How much is gained? Convexity says $\operatorname{lse}(\xi^{\text{new}}) \ge \operatorname{lse}(\xi) +
# f(\xi)^\top(\xi^{\text{new}}-\xi)$. Put this into (2), with $f(\xi)=\xi^{\text{new}}$:
#
# $$ E(\xi^{\text{new}}) - E(\xi) \;\le\; -\,{\xi^{\text{new}}}^\top(\xi^{\text{new}}-\xi)
#    + \tfrac12\|\xi^{\text{new}}\|^2 - \tfrac12\|\xi\|^2 \;=\; -\tfrac12\,\|\xi^{\text{new}}-\xi\|^2 . \tag{5} $$
#
# Every step pays for its length. Sum over the steps and use (3): $\sum_t\|\xi^{t+1}-\xi^t\|^2 \le 2E(\xi^0)\le 4M^2$. So the
# steps go to zero, the energy converges, and every limit point is a fixed point of (4), since $f$ is continuous. No
# step size, no line search. And a loop that stops when a step is shorter than $\varepsilon$ *must* stop, within
#
# $$ T \le 4M^2/\varepsilon^2 \quad\text{steps.} \tag{6} $$
#
# Fixed points are the stationary points of $E$, for $\nabla E(\xi) = \xi - f(\xi)$. So one update is a gradient step of
# length one.

# %%
state = xi.clone().requires_grad_()
for beta in (0.03, 0.1, 1.0):
    (gradient,) = torch.autograd.grad(energy(state, X, beta).sum(), state)
    new = modern_recall(xi, X, beta)
    assert torch.allclose(gradient, xi - new, atol=1e-10)
    drop = energy(xi, X, beta) - energy(new, X, beta)
    assert (drop >= (new - xi).square().sum(1) / 2 - 1e-9).all()
print(
    "the gradient of E is xi - f(xi), and 600 steps lower E by at least half their squared length"
)

start = X[0] + 0.5 * randn(32)
found = scipy.optimize.minimize(
    lambda v: energy(torch.tensor(v)[None], X, 1.0).item(),
    start.numpy(),
    method="BFGS",
    tol=1e-9,
)
fixed = start[None]
for _ in range(50):
    fixed = modern_recall(fixed, X, 1.0)
assert np.abs(found.x - fixed[0].numpy()).max() < 1e-4
print(
    f"BFGS on E needs {about(found.nfev, 2)} evaluations (finite differences included) to reach the fixed point of (4)"
)

# %% [markdown]
# ### It is attention
#
# Put $S$ raw states in the rows of $R$ and $N$ raw patterns in the rows of $Y$, and let both be mapped into the
# associative space: $Q = RW_Q$, $K = YW_K$. The transpose of (4) for all states at once is $Q^{\text{new}} =
# \operatorname{softmax}(\beta QK^\top)K$. Multiply the result by a matrix $W_V$:
#
# $$ Z = \operatorname{softmax}\bigl(\beta\, Q K^\top\bigr)\, \underbrace{K W_V}_{V}, \qquad K W_V = Y W_K W_V . \tag{7} $$
#
# With $\beta = 1/\sqrt{d_k}$ this *is* the attention of transformers {cite:p}`vaswani2017attention`. Note what the values are: the
# memory gives back stored patterns, so the paper's values are projected *keys*. Transformers have a free matrix $YW_V'$ instead.
# Every product $W_KW_V$ is such a matrix, so (7) is a special case, and the whole family if $W_K$ has full row
# rank, that is if a head is as wide as the raw pattern. Usually it is narrower. More than one update
# moves $Q$ alone, and only the last one reads $V$.
#
# ### The Jacobian
#
# How far does one step bring you? Differentiate (4). The derivative of $p=\operatorname{softmax}(\beta z)$ is $\beta(\operatorname{diag}(p)-pp^\top)$, so
#
# $$ J(\xi) = \frac{\partial f}{\partial \xi} = \beta\, X\bigl(\operatorname{diag}(p) - pp^\top\bigr)X^\top
#    = \beta \operatorname{Cov}_p(x) . \tag{8} $$
#
# It is $\beta$ times the covariance of the patterns when they are drawn with the probabilities $p$: symmetric, positive
# semidefinite, and zero when one pattern has all the weight. The paper bounds its norm through that of the
# middle matrix. Variance bounds are just as short. Variance is no larger than the mean square around *any* point, here $x_i$:
#
# $$ \|J\|_2 \;\le\; 2\beta\,\|X\|_2^2\, \max_i p_i(1-p_i), \qquad\quad
#    \|J\|_2 = \beta \max_{\|u\|=1} \operatorname{Var}_p(u^\top x) \;\le\; \beta\sum_{j\ne i} p_j\|x_j-x_i\|^2
#    \;\le\; 4\beta M^2 (1-p_i) . \tag{9} $$
#
# In the left bound, the paper's, $\|X\|_2^2$ is the squared *spectral norm*, which can be as large as $NM^2$. It is
# tempting to write $M^2$, but this is false: take half of the patterns equal and the other half their negatives. The right
# bound holds for each $i$ and does not grow with $N$.

# %%
worst = 0.0
for beta in (0.03, 0.1, 0.3, 1.0):
    for state in xi[:10]:
        J = torch.autograd.functional.jacobian(
            lambda v, b=beta: modern_recall(v[None], X, b)[0], state
        )
        p = torch.softmax(beta * X @ state, 0)
        assert torch.allclose(
            J, beta * X.T @ (torch.diag(p) - torch.outer(p, p)) @ X, atol=1e-9
        )
        norm = torch.linalg.matrix_norm(J, 2)
        assert (
            norm
            <= 2 * beta * torch.linalg.matrix_norm(X, 2) ** 2 * (p * (1 - p)).max()
            + 1e-9
        )
        assert norm <= 4 * beta * M**2 * (1 - p.max()) + 1e-9
twins = torch.cat(
    [torch.ones(8, 1), -torch.ones(8, 1)]
).double()  # M = 1, N = 16, xi = 0: p is uniform
norm = torch.autograd.functional.jacobian(
    lambda v: modern_recall(v[None], twins, 1.0)[0], torch.zeros(1).double()
)
print(
    f"(8) and both bounds of (9) hold; with M^2 for the spectral norm: {norm.item():.3f} <= {2 * 15 / 256:.3f} is false"
)

# %% [markdown]
# ### One step is enough
#
# Say how far $x_i$ stands apart from the others by its *separation*
#
# $$ \Delta_i = x_i^\top x_i - \max_{j\ne i} x_i^\top x_j . \tag{10} $$
#
# Let a query start at distance $r=\|\xi-x_i\|$. For $j\neq i$ the weight of $x_j$ is at most its ratio to that of $x_i$,
# and $\xi^\top(x_i-x_j) = x_i^\top(x_i-x_j) + (\xi-x_i)^\top(x_i-x_j) \ge \Delta_i - 2Mr$, so
#
# $$ p_j \le \frac{p_j}{p_i} = e^{-\beta\xi^\top(x_i-x_j)} \le e^{-\beta(\Delta_i-2Mr)}, \qquad
#    1-p_i = \sum_{j\ne i}p_j \le (N-1)\,e^{-\beta(\Delta_i-2Mr)} . \tag{11} $$
#
# The new state misses $x_i$ by $f(\xi)-x_i=\sum_{j\neq i}p_j(x_j-x_i)$, whose terms are no longer than $2Mp_j$:
#
# $$ \|f(\xi)-x_i\| \;\le\; 2M(1-p_i) \;\le\; 2(N-1)\,M\, e^{-\beta(\Delta_i-2M\|\xi-x_i\|)} . \tag{12} $$
#
# This is the paper's statement that one update retrieves, with an error that falls exponentially with the separation. (Its
# version has the larger of $\|\xi-x_i\|$ and $\|x_i^*-x_i\|$ in the exponent, where $x_i^*$ is the fixed point; the proof above needs only the
# first, and no assumption at all.)
#
# Is there a fixed point near $x_i$? Take the ball $\mathcal{S}_i$ of radius $1/(\beta NM)$ around $x_i$, and assume
#
# $$ \Delta_i \;\ge\; \frac{2}{\beta N} + \frac1\beta\log\bigl(2(N-1)N\beta M^2\bigr) . \tag{13} $$
#
# In the ball $2Mr\le 2/(\beta N)$, so by (11) $1-p_i\le (N-1)e^{-\beta\Delta_i+2/N} \le 1/(2N\beta M^2)$. Hence by (12) $f$ maps the ball
# into itself, and by (9) $\|J\|\le 2/N$ there. For $N\ge3$ that is a contraction, and Banach's theorem gives *exactly one*
# fixed point $x_i^*$ in the ball, which all its points reach. (For $N=2$ the covariance in (8) is $p_1p_2(x_1-x_2)(x_1-x_2)^\top$, which
# gives $\|J\|\le p_1<1$.) The paper calls $x_i$ *stored* when it has such a ball and the balls do not meet. For that
# you also need $N\beta M^2>1$: then both $p_i$ and $p_j$ would exceed one half at a common point. Do not drop this. For tiny
# $\beta$ the right side of (13) is negative and everything satisfies it, with balls so large that all of them contain the mean.
#
# Test (12) where it is neither trivial nor below the resolution of floats: does the logarithm of the error fall with slope
# $-\beta$ in $\Delta_i$?

# %%
separations, errors, bounds = [], [], []
for radius in np.linspace(2.0, 5.5, 15):
    patterns = F.normalize(randn(200, 20), dim=1) * radius
    overlap = patterns @ patterns.T
    overlap.fill_diagonal_(-math.inf)
    gap = radius**2 - overlap.max(1).values
    query = patterns + 0.02 * radius * F.normalize(randn(200, 20), dim=1)
    separations.append(gap)
    errors.append((modern_recall(query, patterns, 1.0) - patterns).norm(dim=1))
    bounds.append(2 * 199 * radius * torch.exp(-(gap - 2 * radius * 0.02 * radius)))
separations, errors, bounds = (
    torch.cat(each) for each in (separations, errors, bounds)
)
assert (errors <= bounds).all()
apart = separations > 6
slope = np.polyfit(separations[apart], errors[apart].log(), 1)[0]
figure, axes = plt.subplots()
axes.scatter(separations, errors, s=4, alpha=0.5, label="error of one step")
order = separations.argsort()
axes.scatter(separations, bounds, s=2, color="C1", alpha=0.4, label="bound (12)")
axes.set(
    title="One step misses by an exponentially small distance",
    xlabel=r"separation $\Delta_i$ (with $\beta = 1$)",
    ylabel=r"$\|f(\xi) - x_i\|$",
    yscale="log",
)
axes.legend(markerscale=4)
plt.show()
print(f"slope of log(error) for separations above 6: {about(slope)}, the bound has -1")

# %% [markdown]
# The dots fall along a straight line of slope close to $-\beta$ over six orders of magnitude. On the left, where the separation is
# below about three, the step does not retrieve: the error is as long as the pattern. The bound lies above by a factor of a few
# hundred, because it gives each of the $N-1$ rivals the weight of the strongest one.
#
# ### How many patterns fit
#
# Draw $N$ patterns uniformly from the sphere of radius $M=K\sqrt{d-1}$. When do all of them satisfy (13)? Let
# $\alpha$ be the smallest angle between two of them, so that $\min_i\Delta_i = M^2(1-\cos\alpha)$. Two facts suffice. First, the cap
# of angle $\theta$ around a point holds a share of the sphere
#
# $$ \frac{\int_0^\theta \sin^{d-2}t\,dt}{\int_0^\pi \sin^{d-2}t\,dt} \le \kappa\,\theta^{d-1}, \qquad
#    \kappa = \frac{\Gamma(d/2)}{(d-1)\sqrt\pi\,\Gamma((d-1)/2)} < 1 , \tag{14} $$
#
# so by the union bound over fewer than $N^2/2$ pairs $\alpha<\theta$ has a probability below $\frac12\kappa N^2\theta^{d-1}$. Choose
# $\theta=p^{1/(d-1)}N^{-2/(d-1)}$, and it is below $p$. Second, $1-\cos\alpha\ge\alpha^2/5$ on $[0,\pi]$. Now *name* the number
#
# $$ N = \sqrt p\; c^{\frac{d-1}{4}} , \qquad\text{then}\quad \theta = c^{-1/2}, \qquad
#    \min_i\Delta_i \ge \frac{K^2(d-1)}{5c}\quad\text{with probability } 1-p . \tag{15} $$
#
# Condition (13) holds if $\beta K^2(d-1)/(5c)\ge 1+\log(2N^2\beta M^2)$, as long as $N\ge2$. Insert $N^2=p\,c^{(d-1)/2}$ and multiply by $2/(d-1)$:
#
# $$ \frac bc \;\ge\; a+\log c, \qquad a=\frac{2}{d-1}\bigl(1+\log(2\beta K^2p\,(d-1))\bigr), \qquad b=\frac{2K^2\beta}{5} . \tag{16} $$
#
# The largest $c$ makes it an equation. With $w=b/c$ it reads $w+\log w=a+\log b$, whose solution is the Lambert function:
#
# $$ c = \frac{b}{W_0(e^{a+\log b})} , \qquad W_0(e^y)=\omega(y)\ \text{ solves }\ \omega+\log\omega=y . \tag{17} $$
#
# $c$ tends to a number above 1 as $d$ grows, so the count (15) is exponential in $d$. ($N\ge 2$ is the theorem's
# condition $c\ge(2/\sqrt p)^{4/(d-1)}$.) The right-hand form of (17), Wright's $\omega$, takes the
# logarithm itself, so that no argument can overflow.

# %%
angles = np.linspace(0, math.pi, 10001)
assert (1 - np.cos(angles) - angles**2 / 5 >= -1e-12).all()


def capacity_base(d, K, beta, p):
    a = 2 / (d - 1) * (1 + math.log(2 * beta * K**2 * p * (d - 1)))
    b = 2 * K**2 * beta / 5
    return b / scipy.special.lambertw(math.exp(a + math.log(b))).real


examples = {(20, 3): 3.1546, (75, 1): 1.3718}
for (d, K), printed in examples.items():
    c = capacity_base(d, K, 1.0, 0.001)
    print(
        f"d = {d}, K = {K}: c = {c:.4f} (paper: {printed}), promises {math.sqrt(0.001) * c ** ((d - 1) / 4):.2f} patterns"
    )

# %% [markdown]
# Both examples of the paper come out (it rounds down, since it states lower bounds). The last figures put them in perspective: in twenty dimensions, at a radius of thirteen, the
# theorem promises *seven* patterns. It is a statement about growth. The experiment asks how many really fit.
#
# ### Three kinds of fixed point
#
# What if patterns are *not* separated? Take $N$ orthonormal patterns with mean $\bar x$. All overlaps with $\bar x$ are $1/N$, so $p$ is uniform and
# $f(\bar x)=\bar x$ at every temperature. By (8)
#
# $$ J(\bar x)=\frac\beta N\Bigl(XX^\top - N\bar x\bar x^\top\Bigr), \tag{18} $$
#
# which is $\beta/N$ times the projection on the $N-1$ dimensions spanned by the differences of patterns. So the mean attracts for
# $\beta<N$ and repels for $\beta>N$: a phase transition at $\beta_c=N$. Well below it the memory answers every question with the average.
#
# What takes over? Look for fixed points with weight $x$ on one pattern and $(1-x)/(N-1)$ on each other. The
# ratio of the two weights must be $e^{\beta(\text{difference of the overlaps})}$, and the overlaps *are* the weights:
#
# $$ \beta(x) = \frac{(N-1)\,\log\frac{(N-1)x}{1-x}}{Nx-1} , \qquad
#    \|\xi^*-\bar x\| = \Bigl(x-\tfrac1N\Bigr)\sqrt{\tfrac{N}{N-1}} . \tag{19} $$
#
# For $N=2$ this curve leaves the mean at $\beta=2$ continuously, a pitchfork. For $N\ge3$ it starts at $\beta=N$
# *backwards* and turns round at some $\beta_s<N$. Between $\beta_s$ and $N$ both kinds of fixed point are stable, and the
# start decides. (The sentence that the mean "splits into" single patterns at $\beta=N$ is right for $N=2$ only.) Finally, if the patterns
# come in clusters, the same happens in stages: first the mean of all gives way to means of clusters, the *metastable* states, and
# then these to single patterns. To tell the kinds apart, the paper counts: with $p_{(1)}\ge p_{(2)}\ge\dots$ the sorted weights,
#
# $$ k=\min\Bigl\{m:\ \textstyle\sum_{i\le m}p_{(i)}\ge 0.9\Bigr\} . \tag{20} $$
#
# Here $k=1$ is called single, $k>N/2$ global, and what lies between metastable.

# %%
orthonormal = torch.linalg.qr(randn(8, 8)).Q
mean = orthonormal.mean(0)
for beta in (4.0, 8.0, 12.0):
    J = torch.autograd.functional.jacobian(
        lambda v, b=beta: modern_recall(v[None], orthonormal, b)[0], mean
    )
    eigenvalues = torch.linalg.eigvalsh(J)
    assert torch.allclose(
        eigenvalues, torch.tensor([0.0] + 7 * [beta / 8]).double(), atol=1e-12
    )
x = 0.9
beta = 7 * math.log(7 * x / (1 - x)) / (8 * x - 1)
weights = torch.tensor([x] + 7 * [(1 - x) / 7]).double()
assert torch.allclose(
    modern_recall((weights @ orthonormal)[None], orthonormal, beta)[0],
    weights @ orthonormal,
)
print(
    f"eigenvalues of (18) are beta/N and 0; (19) is a fixed point (N = 8, x = {x}: beta = {beta:.4f} < 8)"
)

# %% [markdown]
# ### Online softmax: one pass over the memory
#
# $S$ states and $N$ patterns cost $O(SNd)$ operations a step. Written with matrices, (7) also takes $O(SN)$ memory for the weights, which for
# a large memory is what you do not have. You need only the weighted sum, not the weights. Walk over the patterns in blocks with scores $s$ and values $v$,
# and keep three things for each state: the largest score so far $m$, the sum $l=\sum e^{s-m}$, and the vector $a=\sum e^{s-m}v$. A block
# with its own $m_b,l_b,a_b$ is joined by moving both to the common maximum:
#
# $$ m'=\max(m,m_b), \qquad l'=l\,e^{m-m'}+l_b\,e^{m_b-m'}, \qquad a'=a\,e^{m-m'}+a_b\,e^{m_b-m'} . \tag{21} $$
#
# Whatever the order of the blocks, $l'=\sum e^{s-m'}$ and $a'=\sum e^{s-m'}v$ over everything seen, by induction. So after the last block
# $a/l$ is exactly the read-out (7) and $m+\log l$ is the log-sum-exp in (2). No exponent is ever positive. This is the *online softmax*
# {cite:p}`milakov2018online`, and with it the memory is $O((S+N)d)$; fused kernels such as FlashAttention
# {cite:p}`dao2022flashattention` are built around it. For the rounding of such sums see [Two-pass softmax](../logits/two-pass-softmax.ipynb).
#
# The backward pass needs no stored weights either. From $L=m+\log l$, kept for each state, they are recomputed block by block as
# $p=e^{s-L}$. With the incoming gradient $g$ of the output $o$ and the value $v_n$ of pattern $n$,
#
# $$ \frac{\partial\mathcal L}{\partial s_n} = p_n\bigl(g^\top v_n - g^\top o\bigr), \qquad
#    \frac{\partial\mathcal L}{\partial v_n} = p_n\, g , \tag{22} $$
#
# where $g^\top o=\sum_n p_n\,g^\top v_n$ is one number for each state, known before the pass begins.
#
# ### Traps
#
# Each of these is one line away from working code.

# %%
trap = torch.Generator().manual_seed(1)
scores, values = torch.randn(6, generator=trap), torch.randn(6, 2, generator=trap)
mask = torch.tensor([True, True, True, True, False, False])  # the last two are padding
right = scores.masked_fill(~mask, -torch.inf).softmax(0) @ values
wrong = (scores.softmax(0) * mask) @ values
print(
    "mask multiplied after the softmax: the weights sum to",
    about(float((scores.softmax(0) * mask).sum()), 2),
)
assert not torch.allclose(right, wrong, atol=0.05)

betas = torch.tensor([0.1, 1.0])
print("a beta for each of two heads, three features wide:")
print(
    "  repeat           ",
    [f"{b:g}" for b in betas.repeat(3).tolist()],
    "gives features of one head both temperatures",
)
print("  repeat_interleave", [f"{b:g}" for b in betas.repeat_interleave(3).tolist()])

try:
    math.exp(1e3)
except OverflowError:
    print(
        "exp(a + log b) at a + log b = 1000 overflows; omega(1000) =",
        f"{scipy.special.wrightomega(1e3):.4f}",
    )

radius = 3 * math.sqrt(19)
print(
    f"unit vectors instead of K sqrt(d-1): every separation shrinks by the factor {radius**2:.0f}, and exp(-beta Delta) with it"
)

# %% [markdown]
# The second is not hypothetical: the authors' code tiles a tensor of temperatures over the joined features with `repeat`, while its heads
# are consecutive blocks of features. With a single number, its default, this makes no difference. One more, which the library
# section shows: stop *each head* when its own states rest. A loop that watches the mean over a batch reports that all is well while one head still travels.
#
# ## Reference implementation
#
# Update (4), iterated; energy (2); retrieval with one step *is* attention.

# %% tags=["reference"]
import torch


def retrieve(state, stored, beta, steps=1, tol=1e-4, values=None):
    """state (..., S, d), stored (..., N, d) -> (..., S, d or that of values); steps=None iterates to convergence."""
    while steps is None or steps > 1:
        new = torch.softmax(beta * state @ stored.mT, dim=-1) @ stored
        moved = (new - state).norm(dim=-1).max()
        state = new
        if steps is None and moved < tol:
            break
        steps = steps and steps - 1
    return torch.softmax(beta * state @ stored.mT, dim=-1) @ (
        stored if values is None else values
    )


def energy(state, stored, beta):
    """(..., S): never negative, at most 2 M^2 for states no longer than the longest pattern, M."""
    number, largest = (
        torch.tensor(stored.shape[-2]),
        stored.norm(dim=-1).amax(-1, keepdim=True),
    )
    lse = torch.logsumexp(beta * state @ stored.mT, dim=-1) / beta
    return -lse + state.square().sum(-1) / 2 + torch.log(number) / beta + largest**2 / 2


# %% [markdown]
# The online softmax (21), without masks. (The library's version also takes rows that are masked altogether.)

# %% tags=["reference"]
import torch


def online_attention(q, k, v, beta, block=128):
    """softmax(beta q k^T) v for q (..., S, d), k (..., N, d), v (..., N, dim), one block of k and v at a time."""
    m = torch.full(q.shape[:-1], -torch.inf)
    l, a = torch.zeros(q.shape[:-1]), torch.zeros(*q.shape[:-1], v.shape[-1])
    for i in range(0, k.shape[-2], block):
        s = beta * q @ k[..., i : i + block, :].mT
        larger = torch.maximum(m, s.amax(-1))
        old, p = torch.exp(m - larger), torch.exp(s - larger[..., None])
        l, a = l * old + p.sum(-1), a * old[..., None] + p @ v[..., i : i + block, :]
        m = larger
    return a / l[..., None]


# %% [markdown]
# The layer (7), with the values of the paper, and the capacity (17) with the logarithm kept outside the exponential.

# %% tags=["reference"]
import math

import torch
from scipy.special import wrightomega
from torch import nn


class HopfieldAttention(nn.Module):
    """One head: raw states (batch, S, dim) look up raw patterns (batch, N, dim)."""

    def __init__(self, dim, hidden, steps=1):
        super().__init__()
        self.query, self.key = (
            nn.Linear(dim, hidden, bias=False),
            nn.Linear(dim, hidden, bias=False),
        )
        self.value = nn.Linear(
            hidden, dim, bias=False
        )  # W_V acts on keys, not on raw patterns
        self.log_beta = nn.Parameter(torch.tensor(-0.5 * math.log(hidden)))
        self.steps = steps

    def forward(self, state, stored):
        q, k, beta = self.query(state), self.key(stored), self.log_beta.exp()
        for _ in range(self.steps - 1):
            q = torch.softmax(beta * q @ k.mT, dim=-1) @ k
        return torch.softmax(beta * q @ k.mT, dim=-1) @ self.value(k)


def capacity(d, K, beta, p):
    """Base c and the number of patterns on the sphere of radius K sqrt(d-1) that are stored with probability 1 - p."""
    a = 2 / (d - 1) * (1 + math.log(2 * beta * K**2 * p * (d - 1)))
    b = 2 * K**2 * beta / 5
    c = b / wrightomega(a + math.log(b))
    return c, math.sqrt(p) * c ** ((d - 1) / 4)


# %% [markdown]
# By hand: two patterns $1$ and $-1$ on a line. Then $f(\xi)=\tanh(\beta\xi)$, the magnetisation of a mean-field magnet, and
# $E(\xi) = -\beta^{-1}\log\cosh(\beta\xi) + \frac12\xi^2+\frac12$.

# %%
pair, point = torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.3]])
assert torch.allclose(retrieve(point, pair, 2.0), torch.tanh(2 * point))
assert torch.allclose(
    retrieve(point, pair, 2.0, steps=2), torch.tanh(2 * torch.tanh(2 * point))
)
resting = retrieve(point, pair, 2.0, steps=None, tol=1e-6)
assert (
    torch.allclose(resting, torch.tanh(2 * resting), atol=1e-6)
    and abs(resting.item() - 0.9575) < 1e-4
)
assert torch.allclose(
    energy(point, pair, 2.0), -torch.log(torch.cosh(2 * point[0])) / 2 + 0.045 + 0.5
)

q, k, v = torch.randn(2, 5, 8), torch.randn(2, 300, 8), torch.randn(2, 300, 3)
expected = F.scaled_dot_product_attention(q, k, v)
assert torch.allclose(retrieve(q, k, 8**-0.5, values=v), expected, atol=1e-6)
for block in (1, 7, 128, 300):
    assert torch.allclose(
        online_attention(q, k, v, 8**-0.5, block), expected, atol=1e-6
    )
assert abs(capacity(20, 3, 1.0, 0.001)[0] - 3.1546) < 1e-4

# %% [markdown]
# ## The library
#
# `lib.attention.hopfield_retrieve` is what you would import: any leading dimensions, a temperature and a stopping time for each head, masks, and
# half precision computed in float32. `impl="streaming"` walks over the stored patterns in blocks by (21), and backward by (22). The
# layers are `lib.attention.Hopfield`, where states and patterns are given; `lib.attention.HopfieldPooling`, whose query is
# learned and pools a set; and `lib.attention.HopfieldLayer`, whose patterns are learned, a lookup table. Theory comes as
# `lib.attention.hopfield_energy`, `lib.attention.hopfield_capacity` and `lib.attention.fixed_point_kind`, and the recurrence (21)
# as `lib.attention.online_softmax_update`.

# %%
from lib.attention import (
    Hopfield,
    HopfieldLayer,
    HopfieldPooling,
    fixed_point_kind,
    hopfield_capacity,
    hopfield_energy,
    hopfield_retrieve,
)

states, memories, readout = randn(2, 4, 6, 8), randn(2, 4, 50, 8), randn(2, 4, 50, 3)
leaves = [tensor.requires_grad_() for tensor in (states, memories, readout)]
worst_sdpa = 0.0
for impl in ("torch", "streaming"):
    for steps in (1, 4):
        ours, _ = hopfield_retrieve(
            states, memories, values=readout, steps=steps, impl=impl, block_size=16
        )
        theirs = retrieve(states, memories, 8**-0.5, steps=steps, values=readout)
        seed_gradient = torch.randn_like(ours)
        pairs = zip(
            torch.autograd.grad(ours, leaves, seed_gradient),
            torch.autograd.grad(theirs, leaves, seed_gradient),
            strict=True,
        )
        assert torch.allclose(ours, theirs) and all(
            torch.allclose(a, b) for a, b in pairs
        )
    one, _ = hopfield_retrieve(
        states, memories, values=readout, impl=impl, block_size=16
    )
    sdpa = F.scaled_dot_product_attention(states, memories, readout)
    gradients = [torch.autograd.grad(each.sin().sum(), leaves) for each in (one, sdpa)]
    differences = [(a - b).abs().max() for a, b in zip(*gradients, strict=True)]
    worst_sdpa = max(
        worst_sdpa, *(d.item() for d in differences), (one - sdpa).abs().max().item()
    )
assert torch.allclose(
    hopfield_energy(states, memories, 0.5), energy(states, memories, 0.5)
)
print(
    "values and gradients of both paths agree with the reference, for one step and for four"
)
print(
    f"one step against torch's attention, values and gradients: largest difference {about(worst_sdpa, 2)}"
)

# %% [markdown]
# What does streaming save? Count the bytes of one step forward and backward, without the gradients that you want anyway.

# %%
for count in (1_000, 10_000):
    peaks = {}
    for impl in ("torch", "streaming"):
        q, k = (
            torch.randn(64, 32, requires_grad=True),
            torch.randn(count, 32, requires_grad=True),
        )
        with PeakTensor(ignore=(q.shape, k.shape)) as memory:
            hopfield_retrieve(q, k, impl=impl)[0].sum().backward()
        peaks[impl] = memory.peak_bytes / 2**20
    print(
        f"{count:6} patterns, 64 states: "
        + ", ".join(f"{impl} {about(mb)} MB" for impl, mb in peaks.items())
    )

# %% [markdown]
# One path grows with the memory, the other stays at the size of one block of 1024 patterns. Now the stopping time. Four heads share the patterns and differ in their
# temperature; the third is close to the critical one, where (18) shrinks a state little in each step.

# %%
heads = torch.tensor([1.0, 6.0, 7.5, 30.0], dtype=torch.float64)  # critical is beta = 8
start = (mean + 1e-2 * (orthonormal[:3] - mean)).expand(
    4, 3, 8
)  # (heads, states, d), beside the mean
resting, info = hopfield_retrieve(start, orthonormal, beta=heads, steps=None, tol=1e-8)
_, kinds = fixed_point_kind(resting, orthonormal, beta=heads)
table = zip(
    heads.tolist(), info["steps"].tolist(), info["change"].tolist(), kinds, strict=True
)
for beta, steps, change, kind in table:
    print(
        f"beta {beta:4}: {about(steps)} steps, last move {about(change, 2)}, {kind[0]}"
    )
assert len(set(info["steps"].tolist())) == 4

# %% [markdown]
# Each head counts for itself, and a loop with one condition for all would have done the longest count four times. And the layers: the same call with a padding mask; the values of the paper (`values="connected"`, the default)
# against free ones; gradients reach every parameter, the temperatures included.

# %%
torch.manual_seed(seed)
bag = torch.randn(2, 7, 16)
allowed = torch.arange(7) < torch.tensor([[7], [4]])  # the second bag has four members
for values in ("connected", "free"):
    layers = {
        "Hopfield": Hopfield(16, num_heads=4, learn_beta=True, steps=2, values=values),
        "HopfieldPooling": HopfieldPooling(
            16, quantity=3, num_heads=4, learn_beta=True, values=values
        ),
        "HopfieldLayer": HopfieldLayer(
            16, 10, num_heads=4, learn_beta=True, values=values
        ),
    }
    for name, layer in layers.items():
        masked = {} if name == "HopfieldLayer" else {"mask": allowed}
        result = layer(bag, **masked)
        result.square().sum().backward()
        assert all(
            p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters()
        ), name
        count = sum(p.numel() for p in layer.parameters())
        print(
            f"{values:9} {name:15} {tuple(bag.shape)} -> {tuple(result.shape)}, {count} parameters"
        )
pooling = layers["HopfieldPooling"]
alone = pooling(bag[1:, :4])
assert torch.allclose(
    pooling(bag, mask=allowed)[1:], alone, atol=1e-5
)  # padding makes no difference

# %% [markdown]
# ## Experiment
#
# ### Energy and convergence
#
# 64 random patterns in 32 dimensions, 200 random starts in the ball of radius $M$, four temperatures: does the energy ever rise, and
# how many steps until a state moves by less than $10^{-4}$?

# %%
starts = (
    F.normalize(randn(200, 32), dim=1)
    * M
    * torch.rand(200, 1, dtype=torch.float64, generator=generator)
)
temperatures = (0.05, 0.2, 0.3, 1.0)
rises, lowest, highest, drop_violation = -math.inf, math.inf, -math.inf, -math.inf
figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4))
for beta in temperatures:
    state, trajectory = starts, [hopfield_energy(starts, X, beta)]
    steps_needed = torch.zeros(200)
    for step in range(1, 2001):
        new, _ = hopfield_retrieve(state, X, beta=beta)
        moved = (new - state).norm(dim=1)
        trajectory.append(hopfield_energy(new, X, beta))
        drop_violation = max(
            drop_violation,
            (moved**2 / 2 - trajectory[-2] + trajectory[-1]).max().item(),
        )
        steps_needed[(moved < 1e-4) & (steps_needed == 0)] = step
        state = new
        if (steps_needed > 0).all():
            break
    trajectory = torch.stack(trajectory)
    rises = max(rises, trajectory.diff(dim=0).max().item())
    lowest = min(lowest, (trajectory.min() / M**2).item())
    highest = max(highest, (trajectory.max() / M**2).item())
    kinds = fixed_point_kind(state, X, beta=beta)[1]
    counted = {kind: kinds.count(kind) for kind in ("global", "metastable", "single")}
    left.plot(
        (trajectory.median(1).values / M**2)[:25],
        marker=".",
        label=f"$\\beta$ = {beta}",
    )
    right.hist(
        steps_needed.numpy(),
        bins=np.geomspace(2, 600, 32),
        histtype="step",
        lw=1.8,
        label=f"$\\beta$ = {beta}",
    )
    print(
        f"beta {beta:4}: median {about(steps_needed.median().item())} steps, longest {about(steps_needed.max().item())}; "
        + ", ".join(f"{kind} {about(count)}" for kind, count in counted.items())
    )
left.set(
    title="The energy falls at once",
    xlabel="step",
    ylabel="median of $E/M^2$",
    ylim=(0, None),
)
right.set(title="Steps until at rest", xlabel="steps", ylabel="starts", xscale="log")
right.legend()
plt.show()

# %% [markdown]
# On the left, the first step or two do most of the descent, at every temperature. On the right you see the price of indecision. When one pattern
# dominates (large $\beta$), or none does (small $\beta$), the Jacobian (8) is small and a few steps suffice. Near $\beta=0.3$ the
# two regimes meet, and states creep along the ridge between the global average and the single patterns. The bound (6) allows some
# $10^{10}$ steps; a hundred or a few are enough.
#
# ### The phase transition
#
# For $N$ orthonormal patterns, push a state $10^{-3}$ away from the mean and iterate; it returns or it does not. Search the $\beta$ where this
# changes. Then draw where the states end, from beside the mean and from beside a pattern. Every $\beta$ is a head of
# one call.


# %%
def transition(patterns, levels=3):
    """The beta at which the mean of orthonormal patterns stops attracting."""
    count = len(patterns)
    mean = patterns.mean(0)
    push = randn(count)
    push -= (
        (push @ mean) * mean / (mean @ mean)
    )  # orthogonal to the mean, so that it can grow
    start = mean + 1e-3 * push / push.norm()
    low, high = 0.4 * count, 1.7 * count
    for _ in range(levels):
        betas = torch.linspace(low, high, 21, dtype=torch.float64)
        end, _ = hopfield_retrieve(
            start.expand(21, 1, count), patterns, beta=betas, steps=150
        )
        repels = (end - mean).norm(dim=-1).squeeze(1) >= 1e-3
        first = int(repels.long().argmax())
        low, high = betas[first - 1].item(), betas[first].item()
    return (low + high) / 2


critical, turning = {}, {}
figure, grid = plt.subplots(1, 4, figsize=(9.6, 3.0), sharey=True)
for axes, count in zip(grid, (2, 4, 8, 16), strict=True):
    patterns = torch.linalg.qr(randn(count, count)).Q
    critical[count] = transition(patterns)
    mean = patterns.mean(0)
    betas = torch.linspace(0.2, 1.6, 43, dtype=torch.float64) * count
    for name, start, style in (
        (
            "from a pattern",
            patterns[0],
            {"marker": "o", "color": "C0", "mfc": "none", "ms": 6},
        ),
        (
            "from the mean",
            mean + 1e-3 * (patterns[0] - mean),
            {"marker": ".", "color": "C1"},
        ),
    ):
        end, _ = hopfield_retrieve(
            start.expand(43, 1, count), patterns, beta=betas, steps=300
        )
        axes.plot(
            betas / count,
            (end - mean).norm(dim=-1).flatten(),
            ls="none",
            label=name,
            **style,
        )
    share = np.linspace(1 / count + 1e-6, 1 - 1e-6, 4001)
    theory = (
        (count - 1) * np.log((count - 1) * share / (1 - share)) / (count * share - 1)
    )
    turning[count] = theory.min() / count
    axes.plot(
        theory / count,
        (share - 1 / count) * math.sqrt(count / (count - 1)),
        color="0.6",
        lw=1,
        zorder=0,
        label="(19)",
    )
    axes.set(title=f"N = {count}", xlabel=r"$\beta / N$", xlim=(0.15, 1.65))
grid[0].set_ylabel(r"$\|\xi^* - \bar x\|$")
grid[3].legend(loc="center right")
figure.suptitle(
    "The mean loses its hold at β = N, suddenly for N > 2",
    fontweight="bold",
    fontsize=11,
)
plt.show()
for count in critical:
    print(
        f"N = {count:2}: the mean repels from beta/N = {about(critical[count] / count, 4)}; "
        f"single patterns hold down to beta/N = {turning[count]:.4f} by (19)"
    )

# %% [markdown]
# For $N=2$ the two starts agree everywhere and the distance grows from zero: a continuous transition. For $N\ge4$ the orange points jump
# at $\beta=N$, while the blue circles, which started from a pattern, hold on far below it, until the grey curve (19) turns round. Inside
# that window the memory has *hysteresis*: what it answers depends on where the query starts. With sixteen patterns the window begins at a
# third of the critical value.
#
# Now clusters: three groups of four patterns in sixteen dimensions, with a common direction in each group. Start at the
# patterns, iterate to rest, and count $k$ by (20).

# %%
basis = torch.linalg.qr(randn(16, 16)).Q
clustered = torch.cat(
    [
        math.sqrt(0.8) * basis[i] + math.sqrt(0.2) * basis[3 + 4 * i : 7 + 4 * i]
        for i in range(3)
    ]
)
sweep = torch.tensor(np.geomspace(1.2, 60, 60))
end, info = hopfield_retrieve(
    clustered.expand(60, 12, 16),
    clustered,
    beta=sweep,
    steps=None,
    tol=1e-7,
    max_steps=5000,
)
counts, kinds = fixed_point_kind(end, clustered, beta=sweep)
figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 4.4), sharex=True)
top.step(sweep, counts.double().mean(1), where="mid")
top.set(
    title="Memories melt in two stages", ylabel="k at rest", ylim=(0, 12), xscale="log"
)
bottom.plot(sweep, info["steps"], color="C1")
bottom.set(
    xlabel=r"$\beta$",
    ylabel="steps to rest",
    yscale="log",
    xticks=[2, 5, 10, 20, 50],
    xticklabels=["2", "5", "10", "20", "50"],
)
bottom.minorticks_off()
plt.show()
average = counts.double().mean(1)
global_until, single_from = (
    sweep[average > 6].max().item(),
    sweep[average <= 1].min().item(),
)
print(
    f"global below beta {about(global_until, 2)}, single patterns above beta {about(single_from, 2)}"
)
cluster_means = clustered.view(3, 4, 16).mean(1).repeat_interleave(4, 0)
stage = {}
for name, beta, target in (
    ("global", 1.5, clustered.mean(0).expand(12, 16)),
    ("metastable", 8.0, cluster_means),
    ("single", 60.0, clustered),
):
    end, _ = hopfield_retrieve(clustered, clustered, beta=beta, steps=None, tol=1e-9)
    counts, kinds = fixed_point_kind(end, clustered, beta=beta)
    distance = (end - target).norm(dim=1).max().item()
    stage[name] = (set(kinds) == {name}, distance)
    print(
        f"beta {beta:4}: k = {sorted(set(counts.tolist()))}, {sorted(set(kinds))}, {about(distance, 2)} from what it should hold"
    )

# %% [markdown]
# From right to left, as the temperature rises: single patterns, then the mean of four, then the mean of
# all twelve (of which eleven make 90 %). The steps shoot up where one kind gives way to another, as $\|J\|$
# comes close to one.
#
# ### Capacity
#
# First the setting of the paper's example: $d=20$, $K=3$, $\beta=1$. Queries are patterns plus noise of length $0.05\,M$. A pattern counts as
# retrieved when one step lands within $0.01\,M$ of it. The classical network stores random $\pm1$ patterns, and begins
# *at* the pattern, without any noise. The modern update is also run on those same binary patterns.


# %%
def on_sphere(count, d, radius):
    return F.normalize(randn(count, d), dim=1) * radius


def one_step_errors(patterns, noise, beta=1.0, most=1024):
    """One-step errors of up to `most` noisy patterns, their separations, the bound (12) and whether (13) holds."""
    radius = patterns.norm(dim=1).max().item()
    count, chosen = len(patterns), patterns[:most]
    query = chosen + noise * radius * F.normalize(torch.randn_like(chosen), dim=1)
    found, _ = hopfield_retrieve(query, patterns, beta=beta)
    error = (found - chosen).norm(dim=1)
    overlap = chosen @ patterns.T
    overlap.fill_diagonal_(-math.inf)
    gap = chosen.square().sum(1) - overlap.amax(1)
    bound = (
        2
        * (count - 1)
        * radius
        * torch.exp(-beta * (gap - 2 * radius * noise * radius))
    )
    needed = (
        2 / (beta * count) + math.log(2 * (count - 1) * count * beta * radius**2) / beta
    )
    return error, bound, gap >= needed


most_stored = 2**16 if scale == "full" else 4096
sizes = [2**i for i in range(3, int(math.log2(most_stored)) + 1)]
radius = 3 * math.sqrt(19)
rate, separated, violations, checked, worst_error = {}, {}, 0, 0, {}
for count in sizes:
    error, bound, hypothesis = one_step_errors(on_sphere(count, 20, radius), 0.05)
    rate[count] = (error <= 0.01 * radius).double().mean().item()
    separated[count] = hypothesis.double().mean().item()
    worst_error[count] = error.max().item() / radius
    # rounding leaves an error of some 1e-15 M where the bound is smaller still
    violations += int((error > bound + 1e-12 * radius)[hypothesis].sum())
    checked += int(hypothesis.sum())

classical, binary_modern = {}, {}
for count in (2, 3, 4, 6, 8, 12, 16, 24, 40, 80):
    trials = [
        torch.where(randn(count, 20) > 0, 1.0, -1.0).double()
        for _ in range(max(1, 80 // count))
    ]
    classical[count] = np.mean(
        [(classical_recall(t, t) == t).all(1).double().mean() for t in trials]
    )
    binary_modern[count] = np.mean(
        [
            (hopfield_retrieve(t, t, beta=1.0)[0].sign() == t).all(1).double().mean()
            for t in trials
        ]
    )

promise = hopfield_capacity(20, 3.0, 1.0, 0.001)
figure, axes = plt.subplots()
axes.plot(list(rate), list(rate.values()), marker="o", label="modern, noise 0.05 M")
axes.plot(
    list(binary_modern),
    list(binary_modern.values()),
    marker="x",
    ls=":",
    color="C2",
    label="modern, binary patterns",
)
axes.plot(
    list(classical),
    list(classical.values()),
    marker="s",
    color="C1",
    label="classical, no noise",
)
axes.axvline(promise["n_patterns"], color="0.5", ls="--", lw=1)
axes.text(
    promise["n_patterns"] * 1.08,
    0.42,
    "promised by\nthe theorem",
    color="0.35",
    fontsize=9,
)
axes.set(
    title="Twenty dimensions: what one step of each memory retrieves",
    xlabel="stored patterns N",
    ylabel="share retrieved",
    xscale="log",
    ylim=(-0.04, 1.06),
)
axes.legend(loc="center right")
plt.show()
print(
    f"largest error of one step at N = 1024: {about(worst_error[1024], 2)} M, at N = 4096: {about(worst_error[4096], 2)} M"
)
print(f"{about(checked, 5)} patterns satisfy (13), {violations} of them break (12)")
print(
    f"classical at N = 4d = 80: {about(classical[80], 2)}, modern on the same patterns: {about(binary_modern[80])}"
)
print(
    f"the theorem promises {promise['n_patterns']:.1f} patterns, with c = {promise['c']:.4f}"
)

# %% [markdown]
# The classical network fails before it holds one pattern for every two of its units. The modern one retrieves everything, at every size tried, also the
# binary patterns. This tells you that at $K=3$ the experiment is far from any limit, and the theorem even farther. So take $K=1$,
# where patterns do collide, and search for the largest $N$ at which one step brings at least nine in ten noisy patterns to within $0.1\,M$.


# %%
def largest_memory(d, limit):
    """The largest N on a grid of powers of sqrt(2) that keeps the rate at 0.9 or more."""
    best = 1
    for half_power in range(2, 2 * int(math.log2(limit)) + 1):
        count, good = round(2 ** (half_power / 2)), []
        for _ in range(max(1, 400 // count)):
            error, _, _ = one_step_errors(
                on_sphere(count, d, math.sqrt(d - 1)), 0.05, most=400
            )
            good.append(error <= 0.1 * math.sqrt(d - 1))
        if torch.cat(good).double().mean() < 0.9:
            break
        best = count
    return best


dimensions = tuple(range(6, 25, 2)) if scale == "full" else (6, 8, 10, 12, 14, 16)
held = {
    d: largest_memory(d, 2**17) for d in progress(dimensions, "searching the capacity")
}
growth = np.polyfit(list(held), np.log(list(held.values())), 1)[0]
promised = {
    d: hopfield_capacity(d, 1.0, 1.0, 0.001)["n_patterns"] for d in range(6, 81)
}
figure, axes = plt.subplots()
axes.plot(list(held), list(held.values()), marker="o", label="measured, K = 1")
axes.plot(
    list(promised),
    list(promised.values()),
    color="C0",
    ls="--",
    label="theorem, K = 1, p = 0.001",
)
axes.plot(
    list(promised),
    [0.138 * d for d in promised],
    color="C1",
    label="classical, 0.138 d",
)
axes.scatter([75], [promised[75]], color="C0", zorder=3)
axes.annotate(
    "the paper's example",
    (75, promised[75]),
    (45, 60),
    arrowprops={"arrowstyle": "-", "color": "0.5"},
)
axes.set(
    title="Capacity grows exponentially with the dimension",
    xlabel="dimension d",
    ylabel="patterns",
    yscale="log",
    ylim=(0.3, None),
)
axes.legend()
plt.show()
print("patterns held:", {d: about(count) for d, count in held.items()})
print(
    f"growth: a factor of {about(math.exp(growth))} for each dimension; theorem at d = 75: {about(promised[76] / promised[75])}"
)

# %% [markdown]
# The measured points climb along a straight line on a logarithmic axis, and pass a thousand patterns in sixteen dimensions. The proof's rate,
# the dashed line, is real but much slower, and below $N=2$ it says nothing at all. The union bound and the constant 5 in (15)
# cost most of it. Note that $K=1$ is not a fixed memory with more dimensions: the radius $\sqrt{d-1}$ grows too.
#
# ### Multiple-instance learning
#
# A bag is a set with one label. Here it holds 20 digits; it is positive if there is a 9 among them. You see the label of the bag
# only, never which image caused it. The harder half of such problems has few witnesses, so each positive bag gets exactly *one* 9. Train and test
# bags share no images. The instances go through a perceptron with layers 64–64–32; then they are pooled by their mean, by
# their maximum, or by `HopfieldPooling` with one learned query, and a linear map gives the logit. All three train
# for the same twenty epochs with AdamW and a one-cycle schedule, each with its own peak learning rate: the best of 0.003, 0.01 and
# 0.03 on six *other* splits of the data. Mean pooling learns slowly, so it gets a second try with six times the epochs.


# %%
def make_bags(images, labels, count, sizes, target=9):
    """Padded bags (count, longest, pixels), labels, masks of members and of witnesses. Every second bag has one witness."""
    sizes = torch.as_tensor(sizes).expand(count)
    witness, others = (
        (labels == target).nonzero().squeeze(1),
        (labels != target).nonzero().squeeze(1),
    )
    longest = int(sizes.max())
    index = others[torch.randint(len(others), (count, longest), generator=generator)]
    positive = torch.arange(count) % 2 == 1
    place = (torch.rand(count, generator=generator) * sizes).long()
    chosen = witness[torch.randint(len(witness), (count,), generator=generator)]
    index[positive, place[positive]] = chosen[positive]
    members = torch.arange(longest) < sizes[:, None]
    return images[index], positive.float(), members, (labels[index] == target) & members


class BagClassifier(nn.Module):
    def __init__(self, pooling, pixels=64):
        super().__init__()
        self.pooling = pooling
        self.embed = nn.Sequential(mlp((pixels, 64, 32)), nn.ReLU())
        self.pool = (
            HopfieldPooling(32, learn_beta=True) if pooling == "hopfield" else None
        )
        self.head = nn.Linear(32, 1)

    def instances(self, bags):  # (batch, members, pixels) -> (batch, members, 32)
        return self.embed(bags.flatten(0, -2)).unflatten(0, bags.shape[:-1])

    def forward(self, bags, members):
        hidden, keep = self.instances(bags), members.unsqueeze(-1)
        if self.pooling == "mean":
            pooled = (hidden * keep).sum(-2) / keep.sum(-2)
        elif self.pooling == "max":
            pooled = hidden.masked_fill(~keep, -torch.inf).amax(-2)
        else:
            pooled = self.pool(hidden, mask=members).squeeze(-2)
        return self.head(pooled).squeeze(-1)


def bag_loss(model, bags, targets, members):
    return F.binary_cross_entropy_with_logits(model(bags, members), targets)


def train_classifiers(pooling, train_sets, epochs, peak):
    """One classifier for each training set, trained side by side."""
    models = []
    for run in range(len(train_sets)):
        torch.manual_seed(1000 * run + seed)
        models.append(BagClassifier(pooling, train_sets[0][0].shape[-1]))
    data = tuple(torch.stack([each[i] for each in train_sets]) for i in range(3))
    steps = epochs * math.ceil(data[0].shape[1] / 30)
    fit_ensemble(
        models,
        bag_loss,
        data,
        optimizer=lambda parameters: torch.optim.AdamW(
            parameters, lr=peak, weight_decay=1e-2
        ),
        schedule=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=peak, total_steps=steps
        ),
        epochs=epochs,
        seeds=[seed + run for run in range(len(train_sets))],
        batch_size=30,
        desc=f"training with {pooling} pooling",
    )
    return models


def bag_auc(model, test_set):
    bags, targets, members, _ = test_set
    with torch.no_grad():
        scores = torch.cat(
            [
                model(b, m)
                for b, m in zip(bags.split(200), members.split(200), strict=True)
            ]
        )
    return roc_auc_score(targets, scores)


train_sets, test_sets = [], []
for run in range(2):
    (train_images, train_labels), (test_images, test_labels) = digits(
        (1200, 597), seed=1000 * run + seed, flat=True
    )
    train_sets.append(make_bags(train_images, train_labels, 300, 20))
    test_sets.append(make_bags(test_images, test_labels, 500, 20))
plan = {
    "mean": ("mean", 20, 1e-2),
    "mean, six times as long": ("mean", 120, 1e-2),
    "max": ("max", 20, 1e-2),
    "hopfield": ("hopfield", 20, 3e-3),
}
trained, auc = {}, {}
for name, (pooling, epochs, peak) in plan.items():
    trained[name] = train_classifiers(pooling, train_sets, epochs, peak)
    auc[name] = [
        bag_auc(model, test)
        for model, test in zip(trained[name], test_sets, strict=True)
    ]
    print(
        f"{name:26} AUC of two runs: " + ", ".join(about(value) for value in auc[name])
    )

# %%
model, (bags, targets, members, witness) = trained["hopfield"][0], test_sets[0]
with torch.no_grad():
    weights = model.pool.association(model.instances(bags), mask=members)[
        :, 0, 0
    ]  # (bags, members)
    on_witness = weights[witness]
    runner_up = weights.masked_fill(witness, 0.0)[targets == 1].amax(1)
    in_negative = weights[targets == 0].amax(1)
figure, axes = plt.subplots(figsize=(7, 3.2))
parts = {
    "the 9 of a\npositive bag": on_witness,
    "largest other in\na positive bag": runner_up,
    "largest in a\nnegative bag": in_negative,
}
axes.boxplot(
    list(parts.values()),
    orientation="horizontal",
    widths=0.55,
    tick_labels=list(parts),
    flierprops={"markersize": 3},
)
axes.axvline(1 / 20, color="0.5", ls="--", lw=1)
axes.text(0.06, 0.66, "mean pooling: 1/20", color="0.35", fontsize=9)
axes.set(
    title="The learned query finds the witness",
    xlabel="weight in the pooling",
    ylim=(0.5, 3.75),
)
axes.invert_yaxis()
plt.show()
print(
    f"median weight of the witness: {about(on_witness.median().item())}; learned beta {about(model.pool.hopfield.beta.item())}"
)

# %% [markdown]
# The query has learned what a 9 looks like, from labels of bags: the witness takes most of the weight. After twenty epochs mean pooling has
# barely begun, since one image in twenty moves its pooled vector little and the gradient that reaches the embedding is diluted as much. But it
# gets there: with six times the epochs it stays behind by a hundredth or so. And max pooling solves the task as fast as the Hopfield layer does,
# for "is there a 9" *is* a maximum. So read the comparison as evidence that a learned query finds needles quickly, and not that
# nothing else can.
#
# ### A lookup table
#
# `HopfieldLayer` stores learned patterns. The paper uses it on small tabular sets from the UCI repository. Three such sets come with scikit-learn;
# 32 stored patterns with a learned value each, against logistic regression and nearest neighbours, on one split, seven tenths for training.

# %%
tables = {"iris": load_iris, "wine": load_wine, "breast cancer": load_breast_cancer}
print(f"{'test accuracy':14} {'lookup':>8} {'logistic':>9} {'5 nearest':>10}")
for name, load in tables.items():
    features, classes = load(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        features, classes, train_size=0.7, random_state=seed, stratify=classes
    )
    center, spread = x_train.mean(0), x_train.std(0)
    x_train, x_test = ((each - center) / spread for each in (x_train, x_test))
    torch.manual_seed(seed)
    table = HopfieldLayer(
        features.shape[1],
        32,
        values="free",
        output_size=classes.max() + 1,
        hidden_size=16,
        learn_beta=True,
        normalize_state=False,
    )
    rows = torch.tensor(x_train, dtype=torch.float32)
    fit(
        table,
        lambda model, rows, classes: F.cross_entropy(
            model(rows[:, None]).squeeze(1), classes
        ),
        (rows, torch.tensor(y_train)),
        optimizer=torch.optim.AdamW(table.parameters(), lr=1e-2, weight_decay=1e-2),
        steps=60,
        seed=seed,
        desc=f"filling the table for {name}",
    )
    with torch.no_grad():
        guess = (
            table(torch.tensor(x_test, dtype=torch.float32)[:, None])
            .squeeze(1)
            .argmax(1)
            .numpy()
        )
    rivals = [LogisticRegression(max_iter=1000), KNeighborsClassifier(5)]
    scores = [(guess == y_test).mean()] + [
        rival.fit(x_train, y_train).score(x_test, y_test) for rival in rivals
    ]
    print(f"{name:14} " + " ".join(f"{about(score, 3):>9}" for score in scores))

# %% [markdown]
# A lookup table learns all three, and beats no one. With test sets of fifty to two hundred rows, differences of two points mean nothing.
#
# ### What the heads of a language model do
#
# The paper classes the heads of BERT by $k$ in (20), and finds averages over very many tokens in the first layers and over fewer
# in the later ones. Take this book's small character model, with two layers of four heads. Its head sees $n$ tokens at position $n$,
# so look at $k/n$, for positions in the second half of the context.


# %%
def head_classes(model, tokens):
    """k / n of every head, (layers, heads, samples)."""
    seen, projections = [], []
    for block in model.blocks:
        attention = block.attention
        projections.append(
            attention.qkv.register_forward_hook(
                lambda _, __, out, a=attention: seen.append(a.split(out))
            )
        )
    with torch.no_grad():
        model(tokens)
    for projection in projections:
        projection.remove()
    length = tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    n = torch.arange(1, length + 1, device=tokens.device)
    shares = [
        (fixed_point_kind(q, k, mask=causal)[0] / n)[..., length // 2 :]
        for q, k, _ in seen
    ]
    return torch.stack([share.transpose(0, 1).flatten(1) for share in shares]).cpu()


if scale == "full":  # twelve layers
    text = english_text()
    reader = char_gpt().tokenizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = reader.encode(text)
    language_model = GPT(len(reader), 256, dim=256, depth=12, num_heads=8).to(device)
    optimizer = torch.optim.AdamW(
        language_model.parameters(), lr=1e-3, weight_decay=0.1
    )
    fit(
        language_model,
        lambda model, tokens, targets: model(tokens.to(device), targets.to(device))[1],
        (
            random_windows(tokens[: len(tokens) * 9 // 10], 256, 64, generator)
            for _ in range(3000)
        ),
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=1e-3, total_steps=3000
        ),
        steps=3000,
        clip_norm=1.0,
        desc="training a GPT of twelve layers",
    )
else:
    language_model, device = char_gpt(), "cpu"
    tokens = language_model.tokenizer.encode(english_text())
held_out = tokens[len(tokens) * 9 // 10 :]
windows, _ = random_windows(held_out, language_model.context, 64, generator)
shares = head_classes(language_model, windows.to(device))
figure, axes = plt.subplots(figsize=(7, 3.2))
positions = [
    layer * (shares.shape[1] + 1) + head
    for layer in range(len(shares))
    for head in range(shares.shape[1])
]
names = [
    f"{layer + 1}.{head + 1}"
    for layer in range(len(shares))
    for head in range(shares.shape[1])
]
boxes = axes.boxplot(
    shares.flatten(0, 1).T.numpy(),
    positions=positions,
    widths=0.6,
    tick_labels=names,
    showfliers=False,
    patch_artist=True,
)
for i, box in enumerate(boxes["boxes"]):
    box.set(facecolor=f"C{i // shares.shape[1] % 7}", alpha=0.4)
axes.tick_params(axis="x", labelrotation=90 if len(shares) > 4 else 0)
axes.axhline(0.5, color="0.5", ls="--", lw=1)
axes.text(shares.shape[1], 0.52, "global above", color="0.35", fontsize=9, ha="center")
axes.set(
    title="How much of what it sees a head averages over",
    xlabel="layer.head",
    ylabel="k / n",
    ylim=(0, 1),
)
plt.show()
for layer, share in enumerate(shares, 1):
    print(
        f"layer {layer}: median k/n of its heads "
        + ", ".join(about(v, 2) for v in share.median(1).values.tolist())
    )

# %% [markdown]
# In this model the order is the other way round: the first layer looks at few characters, mostly the last ones, and the second averages
# over many. A model of characters must assemble words before it can average over them, and two layers are no hierarchy, so this
# refutes nothing about BERT. It does show that "first average, then select" is not a law of the mechanism. Neither do these heads
# iterate; $k$ tells you how they mix, not that they are near a fixed point.

# %% [markdown]
# ### At full scale
#
# Two more measurements run at `scale="full"`: multiple-instance learning on MNIST bags, for which the folder in `LOGIT_BOOK_DATA`, by default `data`, must hold the four
# files of MNIST in `mnist/`, and one step against PyTorch's fused attention with up to a million patterns on a GPU.

# %%
mnist_auc = {}
if scale == "full":

    def mnist_split(prefix):
        images, labels = (
            mnist_idx(data_path("mnist", f"{prefix}-{kind}-ubyte"))
            for kind in ("images-idx3", "labels-idx1")
        )
        return images.flatten(1).float() / 255, labels.long()

    def sizes_of(count):  # about ten, as in the authors' example
        return (
            (10 + 2 * torch.randn(count, generator=generator))
            .round()
            .long()
            .clamp(min=2)
        )

    train_bags = make_bags(*mnist_split("train"), 200, sizes_of(200))
    test_bags = make_bags(*mnist_split("t10k"), 1000, sizes_of(1000))
    for name, (pooling, epochs, peak) in plan.items():
        (classifier,) = train_classifiers(pooling, [train_bags], epochs, peak)
        mnist_auc[name] = bag_auc(classifier, test_bags)
        print(f"MNIST bags, {name:26} AUC {about(mnist_auc[name])}")
    if torch.cuda.is_available():
        from triton.testing import do_bench

        for exponent in range(10, 21, 2):
            q = torch.randn(1, 1, 1024, 64, device="cuda")
            k = torch.randn(1, 1, 2**exponent, 64, device="cuda")
            ours = do_bench(
                lambda q=q, k=k: hopfield_retrieve(
                    q, k, impl="streaming", block_size=8192
                )[0]
            )
            fused = do_bench(lambda q=q, k=k: F.scaled_dot_product_attention(q, k, k))
            print(
                f"N = 2^{exponent}: streaming {about(ours, unit='ms')}, fused attention {about(fused, unit='ms')}"
            )
else:
    print("needs scale='full'")

# %% [markdown]
# ## Claims

# %%
several, _ = hopfield_retrieve(states, memories, values=readout, steps=4)
ledger.claim(
    "The update of the continuous modern Hopfield network is transformer attention",
    paper="one step with beta = 1/sqrt(d_k) equals softmax attention",
    measured=f"largest difference to torch's attention, values and gradients {about(worst_sdpa, 2)}",
    checks={
        "values and gradients within 1e-12 in float64, both implementations": worst_sdpa
        <= 1e-12,
        "four steps give something else": not torch.allclose(several, sdpa, atol=1e-3),
    },
)

# %%
ledger.claim(
    "The update lowers a bounded energy and converges globally",
    paper="0 <= E <= 2 M^2 on the ball of radius M; E falls unless the state is a fixed point",
    measured=f"largest rise {about(rises, 2)}; E between {about(lowest)} and {about(highest)} M^2 on 800 trajectories",
    checks={
        "E never rises by more than 1e-6": rises <= 1e-6,
        "each step lowers E by half its squared length, within 1e-9": drop_violation
        <= 1e-9,
        "E lies within [0, 2 M^2]": lowest >= 0 and highest <= 2,
    },
)

# %%
ledger.claim(
    "One update retrieves a well separated pattern with an error exponentially small in the separation",
    paper="error <= 2 (N-1) M exp(-beta (Delta - 2 M r))",
    measured=f"{violations} violations; slope of log(error) over separation {about(slope)} at beta = 1",
    checks={
        "the bound holds for every pattern that satisfies (13)": violations == 0,
        "more than 1000 patterns satisfy it": checked > 1000,
        "the logarithm of the error falls with a slope within 15 % of -beta": abs(
            slope + 1
        )
        <= 0.15,
    },
)

# %%
computed = {
    key: hopfield_capacity(key[0], float(key[1]), 1.0, 0.001)["c"] for key in examples
}
ledger.claim(
    "The storage capacity is exponential in the dimension",
    paper="c >= 3.1546 (beta = 1, K = 3, d = 20, p = 0.001), c >= 1.3718 (beta = 1, K = 1, d = 75, p = 0.001)",
    measured=f"c = {computed[20, 3]:.4f} and {computed[75, 1]:.4f}; capacity times {about(math.exp(growth))} for each dimension; "
    f"classical rate at N = 4d {about(classical[80], 2)}",
    checks={
        "both printed values of c, to four decimals": all(
            abs(computed[k] - v) < 1e-4 for k, v in examples.items()
        ),
        "one-step rate >= 0.99 for all N <= 1024 (d = 20, K = 3)": all(
            v >= 0.99 for n, v in rate.items() if n <= 1024
        ),
        "measured capacity at K = 1 grows at least 1.25-fold for each dimension": growth
        >= math.log(1.25),
        "and at least doubles over every four dimensions of the grid": all(
            held[d + 4] >= 2 * held[d] for d in dimensions[:-2]
        ),
        "a classical network keeps less than half of N = 4d patterns": classical[80]
        < 0.5,
    },
)

# %%
ledger.claim(
    "There are three kinds of fixed point: the global average, averages over subsets, single patterns",
    paper="global fixed point, metastable states, fixed points near single patterns",
    measured="mean repels from beta/N = "
    + ", ".join(f"{about(critical[n] / n, 4)} (N = {n})" for n in critical),
    checks={
        "for orthonormal patterns the mean loses stability at beta = N, within 2 %": all(
            abs(critical[n] - n) / n <= 0.02 for n in critical
        ),
        "clustered patterns: global, metastable and single in turn, as beta rises": all(
            ok for ok, _ in stage.values()
        ),
        "the metastable states are the means of the clusters, within 0.05": stage[
            "metastable"
        ][1]
        <= 0.05,
    },
)

# %%
gain_mean, gain_long = (
    np.mean(auc["hopfield"]) - np.mean(auc[name])
    for name in ("mean", "mean, six times as long")
)
ledger.claim(
    "Pooling with a learned query finds the one witness in a bag better than mean pooling",
    paper="multiple-instance learning with HopfieldPooling (its benchmark figures: see below)",
    measured="AUC, mean of two runs: "
    + ", ".join(f"{name} {about(np.mean(values))}" for name, values in auc.items()),
    checks={
        "AUC >= 0.90 on both runs after 20 epochs": min(auc["hopfield"]) >= 0.90,
        "0.02 above mean pooling after 20 epochs": gain_mean >= 0.02,
        "0.02 above mean pooling after 20 against 120 epochs": gain_long >= 0.02,
        "the witness has more than half of the weight in the median positive bag": on_witness.median().item()
        > 0.5,
    },
    fails={
        "0.02 above mean pooling after 20 against 120 epochs": "One witness in twenty is a share that a well "
        "trained mean still sees. The advantage is the speed of learning, not the end.",
    },
)

# %%
ledger.untested(
    "Hopfield layers set the state of the art on multiple-instance learning, UCI tables and drug design",
    paper="3 of 4 multiple-instance benchmarks; best average rank on small UCI data sets; two drug-design sets",
    reason="The benchmarks (Tiger, Fox, Elephant, UCSB breast cancer; 75 UCI sets; SIDER and BACE) and the search over "
    "hyperparameters behind the figures do not fit here. Bags of digits and three small tables show that the layers "
    "train, not that they are best; on the bags max pooling, and mean pooling after more epochs, do about as well.",
)
ledger.untested(
    "Heads of transformers average globally in the first layers and over fewer tokens in later ones",
    paper="BERT: most heads of the first layers have k > N/2",
    reason="Two layers over characters are no such hierarchy. In the model shown above the first layer averages over "
    "fewer tokens than the second; scale='full' trains twelve layers.",
)

# %%
ledger

# %% [markdown]
# ## What is different from the paper
#
# - **Proofs.** (9), right, and the contraction factor $2/N$ in the existence proof are simpler and sharper than the paper's and need no
#   $x_i^*$ in (12). The condition $N\beta M^2>1$ for separate balls, and the window of hysteresis, are additions.
# - **Stopping.** The authors' code stops a head when its *weights* change by less than a tolerance; here its *states* have to rest, which
#   is what (6) is about. Both count each head for itself.
# - **Values.** `lib.attention.Hopfield` takes connected values $YW_KW_V$ as in (7), with one $W_V$ for each head; the authors' code has free
#   values by default and, when connected, one $W_V$ that mixes heads.
# - **Scale.** Sets of digits stand in for the medical and immunological data. `scale="full"` runs MNIST bags, larger memories, a
#   language model of twelve layers and timings on a GPU.
#
# ## Exercises
#
# **1.** A head of attention was trained with $\beta=1/\sqrt{d}$, and you want to know whether it retrieves or averages. Write
# `answer(keys, beta)` that returns, for stored patterns `keys` $(N, d)$, a boolean tensor $(N,)$: which patterns satisfy (13), with
# their balls disjoint ($N\beta M^2>1$)?


# %% tags=["exercise"]
def check_1(answer):
    torch.manual_seed(0)
    keys = F.normalize(torch.randn(40, 16, dtype=torch.float64), dim=1) * 4
    keys[1] = keys[0] + 0.1 * torch.randn(
        16, dtype=torch.float64
    )  # two patterns that are nearly one
    result = answer(keys, 1.5)
    assert (
        isinstance(result, torch.Tensor)
        and result.dtype == torch.bool
        and result.shape == (40,)
    )
    assert not result[:2].any(), "patterns 0 and 1 are not separated"
    limit = (
        2 / 60 + math.log(2 * 39 * 40 * 1.5 * float(keys.norm(dim=1).max()) ** 2) / 1.5
    )
    for i in range(40):
        gap = keys[i] @ keys[i] - max(
            float(keys[i] @ keys[j]) for j in range(40) if j != i
        )
        assert bool(result[i]) == bool(gap >= limit), f"pattern {i}"
    assert not answer(keys, 1e-6).any(), "at tiny beta the balls are not disjoint"


# %% tags=["solution", "hide-cell"]
def solution_1(keys, beta):
    count, largest = len(keys), keys.square().sum(1).max()
    overlap = keys @ keys.T
    own = overlap.diagonal().clone()
    overlap.fill_diagonal_(-math.inf)
    needed = (
        2 / (beta * count) + torch.log(2 * (count - 1) * count * beta * largest) / beta
    )
    return (own - overlap.amax(1) >= needed) & (count * beta * largest > 1)


check_1(solution_1)

# %% [markdown]
# **2.** Two machines hold half of a memory each. Every one computes $(m, l, a)$ of (21) over its own half. Write `answer(first, second)` that
# joins two such triples into one; `m`, `l` have the shape $(S,)$, `a` has $(S, d)$. A half may be empty for some states: $m=-\infty$, $l=0$, $a=0$.


# %% tags=["exercise"]
def check_2(answer):
    torch.manual_seed(0)
    scores, values = torch.randn(4, 10) * 30, torch.randn(10, 3)

    def summary(part):
        m = (
            scores[:, part].amax(1)
            if part.stop > part.start
            else torch.full((4,), -math.inf)
        )
        p = torch.exp(scores[:, part] - m[:, None])
        return m, p.sum(1), p @ values[part]

    expected = scores.softmax(1) @ values
    for cut in (0, 3, 10):
        result = answer(summary(slice(0, cut)), summary(slice(cut, 10)))
        assert result is not None and torch.allclose(
            result[2] / result[1][:, None], expected, atol=1e-5
        ), f"cut at {cut}"
        assert torch.allclose(
            result[0] + result[1].log(), scores.logsumexp(1), atol=1e-4
        )
    empty = summary(slice(0, 0))
    assert answer(empty, empty)[1].tolist() == [0.0] * 4, (
        "two empty halves make an empty whole, not nan"
    )


# %% tags=["solution", "hide-cell"]
def solution_2(first, second):
    m = torch.maximum(first[0], second[0])
    shift = m.masked_fill(m == -math.inf, 0.0)
    factors = [torch.exp(part[0] - shift) for part in (first, second)]
    l = sum(
        part[1] * factor for part, factor in zip((first, second), factors, strict=True)
    )
    a = sum(
        part[2] * factor[:, None]
        for part, factor in zip((first, second), factors, strict=True)
    )
    return m, l, a


check_2(solution_2)

# %% [markdown]
# **3.** Find the edge of the hysteresis window. Write `answer(n)` that returns $\beta_s$, the smallest $\beta$ at which single patterns are
# stable fixed points of $n\ge3$ orthonormal patterns, to a relative accuracy of $10^{-4}$. Use (19).


# %% tags=["exercise"]
def check_3(answer):
    for n in (3, 12):
        edge = answer(n)
        assert edge is not None and 0 < edge < n
        patterns = torch.eye(n, dtype=torch.float64)
        for factor, stays in ((1.005, True), (0.995, False)):
            end, _ = hopfield_retrieve(
                patterns[:1], patterns, beta=float(edge) * factor, steps=800
            )
            assert bool(end[0, 0] - end[0, 1] > 0.05) == stays, (
                f"n = {n}: at {factor} of your beta"
            )


# %% tags=["solution", "hide-cell"]
def solution_3(n):
    def beta(x):
        return (n - 1) * math.log((n - 1) * x / (1 - x)) / (n * x - 1)

    return scipy.optimize.minimize_scalar(
        beta, bounds=(1.01 / n, 1 - 1e-9), method="bounded", options={"xatol": 1e-9}
    ).fun


check_3(solution_3)

# %% [markdown]
# ## Summary
#
# - Softmax attention is one update of an associative memory: keys are memories, the query is the state, scores are overlaps, and $\beta$ is an inverse
#   temperature.
# - The update lowers $E$ by at least half its squared length, needs no step size, and comes to rest from everywhere.
# - One step misses a pattern by at most $2(N-1)Me^{-\beta(\Delta-2Mr)}$, so exponentially many patterns fit, far more than is proven.
# - Where patterns are not separated, the memory answers with averages: of everything for $\beta<\beta_c$, of clusters in between. The
#   transition has hysteresis for three patterns or more.
# - The online softmax reads the memory in one pass with three numbers for each state and value, and never holds the weights.
#
# **Further reading.** {cite:t}`krotov2016dense` and {cite:t}`demircigil2017model` for the steep energies that came before,
# {cite:t}`yuille2003concave` for the concave-convex procedure, {cite:t}`milakov2018online` and {cite:t}`dao2022flashattention` for
# attention in one pass.
