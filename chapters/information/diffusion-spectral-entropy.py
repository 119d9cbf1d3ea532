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
# # Diffusion Spectral Entropy
#
# How much does a hidden layer know? You would like to say it in bits, for five hundred points in a space of two
# thousand dimensions, and every histogram gives up. {cite:t}`diffusion-spectral-entropy` ask a different question: let
# a random walker hop between the points, near ones first, and count the separate places where it can linger. The
# eigenvalues of the walk do the counting, and their entropy, measured in bits, is the *diffusion spectral entropy*
# (DSE). Comparing the whole cloud with its classes gives a *diffusion spectral mutual information* (DSMI). At the end
# of this chapter you can compute both in ten lines, attach them to a training run, and name the one number, the
# bandwidth, that decides what the curves will say.

# %% [markdown]
# ## Setup

# %% tags=["parameters"]
scale = "ci"
seed = 0

# %%
import itertools
import math
import time
from fractions import Fraction

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from scipy.special import digamma, gammaln
from scipy.stats import spearmanr

from lib.claims import Ledger, about
from lib.data import cifar10_binary, data_path, digits, mnist_idx
from lib.information import (
    diffusion_operator,
    dse,
    dsmi,
    shannon_binned,
    sigma_rule,
    spectrum,
    t_rule,
)
from lib.models import CNN, mlp
from lib.train import DSECallback, accuracy, fit, fit_ensemble, progress

plt.style.use("lib.book")
torch.manual_seed(seed)
generator = torch.Generator().manual_seed(seed)
ledger = Ledger("diffusion-spectral-entropy", scale, seed)


def normal(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# %% [markdown]
# ## The problem
#
# The classic estimate cuts each dimension into bins, counts the points in every cell, and takes the entropy of the
# counts. Information-bottleneck studies of networks did exactly that {cite:p}`shwartz2017opening`. Take 300 points,
# two bins a dimension, and three clouds that could hardly differ more: one blob, four tight clusters, and a curve.

# %%
count = 300
dimensions = [1, 2, 3, 5, 8, 12, 20, 35, 60, 100, 200]


def clouds(d):
    angle = torch.linspace(0, 6, count, dtype=torch.float64)[:, None]
    return {
        "one blob": normal(count, d),
        "four tight clusters": 3 * normal(4, d).repeat(count // 4, 1)
        + 0.3 * normal(count, d),
        "a noisy curve": torch.sin(angle * torch.arange(1, d + 1) / 2)
        + 0.1 * normal(count, d),
    }


binned = {
    name: [shannon_binned(clouds(d)[name]) for d in dimensions] for name in clouds(1)
}
figure, axes = plt.subplots()
for (name, values), marker in zip(binned.items(), "os^", strict=True):
    axes.semilogx(dimensions, values, marker=marker, label=name)
axes.axhline(math.log2(count), color="0.4", ls=":", label=r"$\log_2 N$")
axes.set(
    title="Give it dimensions enough, and any cloud has the same binned entropy",
    xlabel="dimensions",
    ylabel="entropy with two bins a dimension (bits)",
)
axes.set_xticks([1, 10, 100], ["1", "10", "100"])
axes.legend(loc="lower right")
plt.show()
print(
    {name: about(values[-1]) for name, values in binned.items()},
    "log2 N:",
    about(math.log2(count)),
)

# %% [markdown]
# Two bins in two hundred dimensions make $2^{200}$ cells for 300 points. As soon as the coordinates carry a little
# independent noise, each point sits in a cell of its own, and the estimate is $\log_2 N$, the logarithm of the number
# of points you happened to take. The clusters resist longest, because the points of one cluster share most of their bins,
# and in the end they drift up as well. The hidden layers of real networks start where this figure stops.
#
# The points are not spread over those dimensions at random. They lie near something of low dimension, with clusters
# and branches. So do not look at the cells of the space. Look at the points' distances.

# %% [markdown]
# ## Derivation
#
# ### A random walk between points
#
# Let $x_1, \dots, x_N \in \mathbb{R}^d$ be the representations of $N$ inputs. Give every pair an affinity
#
# $$ G_{ij} = \exp\!\left(-\frac{\lVert x_i - x_j\rVert^2}{2\sigma^2}\right) , \tag{1} $$
#
# where the bandwidth $\sigma$ says which distances count as near. Where the data are dense, row sums of $G$ are large,
# for no other reason than that many points were sampled there. Diffusion maps {cite:p}`coifman2006diffusion` divide
# part of that density out. With $D_G = \operatorname{diag}(G\mathbf{1})$ and exponent $\alpha = \frac12$,
#
# $$ K = D_G^{-1/2}\, G\, D_G^{-1/2} . \tag{2} $$
#
# (At $\alpha = 0$ the density stays; at $\alpha = 1$ it is gone in the limit of many points.) Divide each row by its
# sum, and the row becomes the law of the walker's next place:
#
# $$ P = D_K^{-1} K, \qquad D_K = \operatorname{diag}(K\mathbf{1}) . \tag{3} $$
#
# A constant factor in front of (1), such as $1/(\sigma\sqrt{2\pi})$, cancels in (2) already. $P$ is not symmetric, but
#
# $$ A = D_K^{-1/2} K D_K^{-1/2} = D_K^{1/2}\, P\, D_K^{-1/2} \tag{4} $$
#
# is, and by its second form $A$ has the eigenvalues of $P$. Three facts about them follow.
#
# * They are real, since $A$ is symmetric.
# * They are not negative. The Gaussian is the Fourier transform of a positive function, so $G$ is positive
#   semidefinite (Bochner's theorem), and (2) and (4) multiply from both sides by the same invertible diagonal matrix.
# * The largest is exactly 1: rows sum to 1, so $P\mathbf{1} = \mathbf{1}$, and no eigenvalue of a stochastic matrix
#   is larger in absolute value.

# %%
x = normal(60, 5)
gram = torch.exp(-(torch.cdist(x, x) ** 2) / (2 * 1.5**2))
K = gram / gram.sum(1).outer(gram.sum(1)).sqrt()
P = K / K.sum(1, keepdim=True)
A = K / K.sum(1).outer(K.sum(1)).sqrt()
general = np.sort(np.linalg.eigvals(P.numpy()).real)[::-1]
symmetric = torch.linalg.eigvalsh(A).flip(0).numpy()
assert np.abs(general - symmetric).max() < 1e-12
assert abs(symmetric[0] - 1) < 1e-12 and symmetric[-1] > -1e-12
print(
    "eigvals of P and eigvalsh of A agree on 60 points; all in [0, 1], the largest is 1"
)

# %% [markdown]
# ### A shortcut that is not one
#
# The authors' package returns $K$ and says that it has the eigenvalues of $P$. Compare (2) with (4): what $K$ is
# similar to is
#
# $$ K = D_G^{1/2} \left( D_G^{-1} G \right) D_G^{-1/2} , \tag{5} $$
#
# the random walk on the *raw* affinities. So the released numbers come from a walk without the density
# normalisation, $\alpha = 0$ in the terms above. Both walks are legitimate and $K$ has largest eigenvalue 1 as well.
# But they are two walks. Three points on a line, at 0, 1 and 3, with $\sigma$ chosen so that $G_{ij} = 2^{-(x_i-x_j)^2}$,
# settle it. The traces are enough, and the first is a rational number.

# %%
places = (0, 1, 3)
exact = [[Fraction(1, 2 ** ((a - b) ** 2)) for b in places] for a in places]
row_sums = [sum(row) for row in exact]
trace_K = sum(
    1 / total for total in row_sums
)  # K_ii = 1 / D_i, and so has the walk D_G^-1 G
K3 = np.array([[float(g) / math.sqrt(a * b) for g, b in zip(row, row_sums, strict=True)]
               for row, a in zip(exact, row_sums, strict=True)])  # fmt: skip
P3 = K3 / K3.sum(1, keepdims=True)
raw_walk = np.array(
    [[float(g / a) for g in row] for row, a in zip(exact, row_sums, strict=True)]
)
print("trace of K, exactly:", trace_K)
for name, matrix in {"K": K3, "D_G^-1 G": raw_walk, "P": P3}.items():
    values = np.sort(np.linalg.eigvals(matrix).real)[::-1]
    print(
        f"{name:9} eigenvalues {[about(v, 6) for v in values]}  trace {about(values.sum(), 6)}"
    )
assert abs(np.trace(K3) - float(trace_K)) < 1e-12
assert abs(np.trace(P3) - float(trace_K)) > 0.004

# %% [markdown]
# The first two rows agree, the third differs. This book takes $P$ as the paper defines it. The other choice is
# `normalisation="released"`, for comparing with published numbers.
#
# ### Entropy of the spectrum
#
# Let the walker make $t$ steps: the matrix is $P^t$, its eigenvalues $\lambda_i^t$. Read them as a distribution:
#
# $$ S_t(X) = -\sum_{i=1}^{N} a_i \log_2 a_i , \qquad a_i = \frac{|\lambda_i|^t}{\sum_j |\lambda_j|^t} . \tag{6} $$
#
# The absolute value is there for rounding, which leaves eigenvalues such as $-10^{-17}$, and $0\log 0 = 0$. An entropy of
# $N$ shares lies in $[0, \log_2 N]$. Three limits show what it measures.
#
# * $\sigma \to 0$: $G = I$, the walker never moves, all eigenvalues are 1, and $S_t = \log_2 N$.
# * $\sigma \to \infty$: every entry of $P$ is $1/N$, one eigenvalue is 1 and the rest are 0, so $S_t = 0$.
# * $k$ groups so far apart that no affinity passes between them: $P$ falls into $k$ stochastic blocks. Each block has the
#   eigenvalue 1 once, as its points are connected, and
#
# $$ \lim_{t \to \infty} S_t(X) = \log_2 k , \tag{7} $$
#
# because everything below 1 dies. So $2^{S_t}$ is an effective *number of pieces*, seen at resolution $\sigma$ after
# $t$ steps. This is why the authors expect DSE to grow in training: they bound its expectation from above, and the
# bound rises when one Gaussian blob splits into $k$.
#
# Equation (7) hides a warning. The multiplicity of the eigenvalue 1 does not depend on how many points each group has.
# Shannon's entropy *weighs* groups; DSE *counts* them.

# %%
x = normal(50, 4)
assert abs(dse(x, sigma=1e-3) - math.log2(50)) < 1e-9 and dse(x, sigma=1e4) < 1e-4
sizes = {"equal": (30, 30, 30, 30), "lopsided": (111, 3, 3, 3)}
for name, members in sizes.items():
    group = torch.repeat_interleave(torch.arange(4), torch.tensor(members))
    points = 100 * torch.eye(4, dtype=torch.float64)[group] + 0.5 * normal(120, 4)
    shares = np.array(members) / 120
    print(
        f"{name:9} groups {members!s:18} Shannon entropy of the sizes {about(-(shares * np.log2(shares)).sum())} bits, "
        f"DSE at t = 50 {about(dse(points, sigma=4, t=50))} bits"
    )
    assert abs(dse(points, sigma=4, t=50) - 2) < 0.01

# %% [markdown]
# ### What noise does to the walk
#
# Replace $x_i$ by $x_i + s\,\varepsilon_i$, where $\varepsilon_i$ is standard normal in all $d$ dimensions. The
# squared distance gains $s^2 \lVert\varepsilon_i - \varepsilon_j\rVert^2$, which has mean $2 s^2 d$ and, for large
# $d$, a comparatively small spread, and a cross term of mean zero. Drop the fluctuations. Every affinity between
# *different* points shrinks by the same factor, while a point stays at distance 0 from itself
# {cite:p}`elkaroui2010information`:
#
# $$ \tilde G \approx \rho\, G + (1 - \rho)\, I , \qquad \rho = e^{-s^2 d/\sigma^2} . \tag{8} $$
#
# So noise gives each point a self-loop. For the raw walk, with $D_i$ the row sums of $G$,
#
# $$ \tilde D^{-1}\tilde G = (1 - \delta_i)\, D^{-1} G + \delta_i\, I , \qquad
#    \delta_i = \frac{1-\rho}{1 - \rho + \rho D_i} , \tag{9} $$
#
# a *lazy* walk, which stays put with probability $\delta_i$. If all points had the same $\delta$, each eigenvalue
# would move to $\delta + (1-\delta)\lambda$. The slow modes near 1, which carry the shape of the data, stay. The many
# small ones rise from almost 0 to a floor $\delta$. Two things follow. More points make $D_i$ larger and the floor
# lower. And with $t$ steps the floor becomes $\delta^t$.
#
# How much can the floor matter? Split the spectrum at some $\epsilon$. Let $q$ be the total share $a_i$ of the
# eigenvalues $\lambda_i \le \epsilon$. Entropy obeys the grouping rule, $S = h(q) + (1-q) S_{\text{head}} + q
# S_{\text{tail}}$, with $h$ the entropy of a coin. Both parts lie between 0 and $\log_2 N$. For $q$ use
# $\sum_j\lambda_j^t \ge 1$:
#
# $$ \left| S_t - S_{t,\text{head}} \right| \le h(q) + q \log_2 N , \qquad
#    q \le \sum_{\lambda_i \le \epsilon} \lambda_i^t \le \epsilon^{\,t-1} \operatorname{tr} P . \tag{10} $$
#
# Everything below $\epsilon$ loses its vote exponentially fast in $t$. This is the sense in which the measure resists
# noise, and the bound also says what it does not promise: at a given $t$, a floor high enough is counted.

# %%
frame = torch.linalg.qr(normal(50, 50))[0]
clean = normal(count, 3) @ frame[:, :3].T  # a 3-dimensional cloud in 50 dimensions
shake = normal(count, 50)
sigma, noise_levels = 1.5, (0.0, 0.1, 0.2, 0.3)


def self_loops(s):
    """Spectrum that (8) predicts: the clean kernel with self-loops, then (2) to (4)."""
    rho = math.exp(-(s**2) * 50 / sigma**2)
    kernel = rho * torch.exp(-(torch.cdist(clean, clean) ** 2) / (2 * sigma**2))
    kernel.diagonal().fill_(1)
    for _ in range(2):
        kernel = kernel / kernel.sum(1).outer(kernel.sum(1)).sqrt()
    return torch.linalg.eigvalsh(kernel).flip(0)


spectra = {s: spectrum(clean + s * shake, sigma=sigma) for s in noise_levels}
predicted = {s: self_loops(s) for s in noise_levels}
rho = math.exp(-(0.3**2) * 50 / sigma**2)
for size in (75, count):
    kernel = torch.exp(-(torch.cdist(clean[:size], clean[:size]) ** 2) / (2 * sigma**2))
    looped = rho * kernel + (1 - rho) * torch.eye(size, dtype=torch.float64)
    delta = (1 - rho) / (1 - rho + rho * kernel.sum(1, keepdim=True))
    lazy = (1 - delta) * kernel / kernel.sum(1, keepdim=True) + torch.diag(delta[:, 0])
    assert torch.allclose(looped / looped.sum(1, keepdim=True), lazy)  # (9)
    print(f"noise 0.3, {size:3} points: mean delta {about(float(delta.mean()))}")

print(" noise     rho   DSE at t = 2, measured   predicted by (8)")
for s in noise_levels:
    values = dse(spectrum=spectra[s], t=2), dse(spectrum=predicted[s], t=2)
    print(
        f"{s:6} {math.exp(-(s**2) * 50 / sigma**2):7.3f}   {about(values[0])}   {about(values[1])}"
    )

for t, epsilon in itertools.product((1, 2, 4, 8), (0.1, 0.3)):
    for values in spectra.values():
        share = values.abs() ** t / (values.abs() ** t).sum()
        tail = values <= epsilon
        q, head = float(share[tail].sum()), dse(spectrum=values[~tail], t=t)
        coin = -sum(p * math.log2(p) for p in (q, 1 - q) if p > 0)
        assert (
            abs(dse(spectrum=values, t=t) - head) <= coin + q * math.log2(count) + 1e-9
        )
        assert q <= epsilon ** (t - 1) * float(values.sum()) + 1e-9
print("bound (10) holds for four noise levels, four t and two cuts")

figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.4))
for s, colour in zip(noise_levels, ("C6", "C0", "C2", "C1"), strict=True):
    left.semilogy(
        range(1, 121),
        spectra[s][:120].clamp(min=1e-6),
        color=colour,
        label=f"noise {s}",
    )
    if s:
        left.semilogy(range(1, 121), predicted[s][:120], ":", color=colour)
left.set(
    title="Noise lifts the tail",
    xlabel="rank of the eigenvalue",
    ylabel="eigenvalue of $P$",
    ylim=(1e-5, 1.5),
)
left.legend(loc="lower left")
for t, marker in zip((1, 2, 4, 8), "os^v", strict=True):
    right.plot(
        noise_levels,
        [dse(spectrum=spectra[s], t=t) for s in noise_levels],
        marker=marker,
        label=f"t = {t}",
    )
right.axhline(math.log2(count), color="0.4", ls=":")
right.set(
    title="More steps: less noise, less detail",
    xlabel="noise $s$ per dimension",
    ylabel="DSE (bits)",
    ylim=(0, 10.9),
)
right.legend(ncols=2, loc="upper center")
plt.show()

# %% [markdown]
# On the left, the dotted lines are what (8) predicts from the clean points and one number, $\rho$. They lie close to the
# measured spectra: noise of 0.3, small beside a cloud of radius 1, leaves $\rho = 0.135$ and lifts the tail by orders
# of magnitude, because it acts in fifty dimensions at once. On the right you see (10) at work. With one step the
# floor wins and DSE climbs towards the dotted $\log_2 N$. With more steps the curves flatten, and sink: the modes
# that separate near points from nearer ones are voted out together with the noise, and in the end one piece is left.
#
# ### Choosing $\sigma$ and $t$
#
# The authors' code gives a rule of thumb for $t$: after powering, about one percent of the eigenvalues should remain
# above 0.01. With $\lambda_{(m+1)}$ the first eigenvalue that has to go, $m = \lfloor N/100 \rfloor$, the rule is
#
# $$ t = \left\lceil \frac{\log 0.01}{\log \lambda_{(m+1)}} \right\rceil , \tag{11} $$
#
# which is `lib.information.t_rule`. In their experiments they mostly use $t = 1$ and $\sigma = 10$, the defaults of the
# package. For $\sigma$ a common choice is the median distance, `lib.information.sigma_rule`. Take it once, on a reference
# set. If each set gets its own, the scale cancels; you will see below what that does to a comparison.

# %%
print("t by rule (11), noise 0 to 0.3:", [t_rule(spectra[s]) for s in noise_levels])

# %% [markdown]
# ### Mutual information
#
# Write $A$ for the points and $B$ for a second variable with finitely many values: labels; a scalar cut into ten bins; or
# inputs grouped into ten clusters by spectral clustering over nearest neighbours, once. Shannon's $I(A;B) = H(A) -
# H(A \mid B)$ suggests $S_t(A) - \sum_b p(b)\, S_t(A \mid B{=}b)$. But $\{B{=}b\}$ has fewer points than $A$, and DSE
# grows with the number of points. The paper compares sets of equal size instead:
#
# $$ \operatorname{DSMI}_t(A; B) = \sum_b p(b) \Big( \mathbb{E}\, S_t(A^*_b) - S_t(A \mid B{=}b) \Big) , \tag{12} $$
#
# where $A^*_b$ is a random subset of $A$ with as many points as $\{B{=}b\}$; the mean is over five draws. This
# repairs the bias *exactly* in the case that matters. If the labels are independent of the points, $\{B{=}b\}$ **is**
# a uniformly random subset of its size, both terms of (12) have the same expectation, and
#
# $$ A \perp B \quad\Longrightarrow\quad \mathbb{E}\, \operatorname{DSMI}_t(A; B) = 0 . \tag{13} $$
#
# Note what (13) does to one popular check. If you scramble the labels of the *held-out points*, DSMI is zero for any
# network whatsoever. That says nothing about the network. The informative experiment scrambles the *training* labels
# and keeps the true ones for measuring.

# %%
blob, labels = normal(160, 6), torch.arange(160) % 8
naive, fair = [], []
for _ in range(10):
    shuffled = labels[torch.randperm(160, generator=generator)]
    conditional = sum(dse(blob[shuffled == b], sigma=2) for b in range(8)) / 8
    naive.append(dse(blob, sigma=2) - conditional)
    fair.append(dsmi(blob, shuffled, sigma=2, generator=generator)[0])
print(
    f"labels without meaning: difference of unequal sets {about(np.mean(naive))} bits"
)
print(
    f"                        equal sets, (12): within 0.05 bit of zero: {abs(np.mean(fair)) < 0.05}"
)
assert np.mean(naive) > 0.3 and abs(np.mean(fair)) < 0.05

# %% [markdown]
# Without the repair, meaningless labels earn a sizeable score from the size of the sets alone.
#
# DSMI is not Shannon's information. It is not symmetric, and it counts rather than weighs, as (7) said: once each of
# the $k$ blobs gives a few points to a class, the class has as many pieces as the whole, and the difference in (12)
# vanishes for large $t$. Keep that in mind for the experiment with damaged labels.

# %% [markdown]
# ## Reference implementation
#
# Equations (1) to (4) and (6), line by line. It is differentiable, so it can serve as a loss.

# %% tags=["reference"]
import math

import torch


def diffusion_spectral_entropy(x, sigma, t=1):
    """Bits of the points x, (N, d), seen at bandwidth sigma after t steps: a scalar between 0 and log2 N."""
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    kernel = torch.exp(-(distance**2) / (2 * sigma**2))  # (1)
    kernel = kernel / kernel.sum(1).outer(kernel.sum(1)).sqrt()  # (2)
    walk = (
        kernel / kernel.sum(1).outer(kernel.sum(1)).sqrt()
    )  # (4), the eigenvalues of (3)
    weight = torch.linalg.eigvalsh(walk).abs() ** t
    return torch.special.entr(weight / weight.sum()).sum() / math.log(2)  # (6)


# %% [markdown]
# Equation (12), for any entropy of point sets.

# %% tags=["reference"]
import torch


def information_of_equal_sets(points, labels, entropy, repeats=5):
    """Entropy of random subsets minus entropy of classes of the same size, averaged over the classes."""
    total = 0.0
    for label in labels.unique():
        members = points[labels == label]
        subsets = [
            points[torch.randperm(len(points))[: len(members)]] for _ in range(repeats)
        ]
        whole = sum(float(entropy(subset)) for subset in subsets) / repeats
        total += len(members) / len(points) * (whole - float(entropy(members)))
    return total


# %% [markdown]
# By hand: two points with affinity $g$. All row sums are $1+g$, so $P$ has the eigenvalues $1$ and $(1-g)/(1+g)$. For
# $g = \frac13$ the second is $\frac12$; the shares are $(\frac23, \frac13)$ at $t = 1$ and $(\frac45, \frac15)$ at $t
# = 2$.
#
# For the information take two pairs of coinciding points, far apart, with the pair as label. A class is one place: 0
# bits. A random pair out of four points has its partners in different places with probability $\frac23$, and then 1
# bit. So (12) has the mean $\frac23$ bit, although the label has one bit of entropy: equal sets make small classes
# look poor.

# %%
pair = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
sigma_pair = math.sqrt(1 / (2 * math.log(3)))  # so that g = 1/3
for t, shares in ((1, (2 / 3, 1 / 3)), (2, (4 / 5, 1 / 5))):
    by_hand = -sum(p * math.log2(p) for p in shares)
    assert abs(float(diffusion_spectral_entropy(pair, sigma_pair, t)) - by_hand) < 1e-12

four = torch.tensor([[0.0], [0.0], [100.0], [100.0]], dtype=torch.float64)
value = information_of_equal_sets(
    four,
    torch.tensor([0, 0, 1, 1]),
    lambda z: diffusion_spectral_entropy(z, 1.0),
    repeats=2000,
)
assert abs(value - 2 / 3) < 0.05
points = normal(7, 3).requires_grad_()
assert torch.autograd.gradcheck(lambda z: diffusion_spectral_entropy(z, 1.0, 2), points)
print("two points, four points and the gradient: as computed by hand")

# %% [markdown]
# ## The library
#
# `lib.information.dse` and `lib.information.dsmi` do the same with checked input and in float64 on the device of the
# tensor. They centre the points before multiplying them out, which costs less memory than the differences. A spectrum
# can be computed once and read at several $t$. `lib.information.dsmi` makes the labels itself when $B$ is a scalar or
# a vector and returns them, so that the clustering is done once.

# %%
x = normal(200, 30)
for sigma_test, t in itertools.product((2.0, 6.0), (1, 4)):
    assert (
        abs(
            dse(x, sigma=sigma_test, t=t)
            - float(diffusion_spectral_entropy(x, sigma_test, t))
        )
        < 1e-9
    )
    released = np.linalg.eigvalsh(
        diffusion_operator(x, sigma_test, normalisation="released").numpy()
    )
    assert (
        abs(
            dse(spectrum=released, t=t)
            - dse(x, sigma=sigma_test, t=t, normalisation="released")
        )
        < 1e-9
    )
labels = torch.arange(200) % 4
mine = np.mean([dsmi(x, labels, sigma=6, generator=generator)[0] for _ in range(5)])
theirs = np.mean(
    [
        information_of_equal_sets(
            x, labels, lambda z: diffusion_spectral_entropy(z, 6.0)
        )
        for _ in range(5)
    ]
)
assert abs(mine - theirs) < 0.05

moved = abs(dse(x + 1e6, sigma=6.0) - dse(x, sigma=6.0))
assert moved < 1e-6
print("points moved by a million: DSE shifts by less than 1e-6 bits")
started = time.perf_counter()
np.linalg.eigvals(diffusion_operator(x, 6.0, symmetric=False).numpy())
middle = time.perf_counter()
spectrum(x, sigma=6.0)
ended = time.perf_counter()
print(
    f"200 points: eigvals of P {about(middle - started, 1, 's')}, symmetric form {about(ended - middle, 1, 's')}"
)
_, clusters = dsmi(x, x[:, :2], sigma=6.0)
print("vector B: labels", clusters.unique().tolist(), "to be passed on as clusters=")

# %% [markdown]
# One detail in passing. Packages often add a small $\epsilon$ to the shares to avoid $\log 0$. That adds about
# $-N \epsilon \log_2 \epsilon$ bits. With the $\epsilon$ of float64 it does no harm; with a hand-picked one it does.
# `xlogy` needs none.

# %%
share = spectra[0.0].abs() ** 4 / (spectra[0.0].abs() ** 4).sum()
for epsilon in (np.finfo(float).eps, 1e-5):
    shifted = float(-((share + epsilon) * torch.log2(share + epsilon)).sum()) - dse(
        spectrum=spectra[0.0], t=4
    )
    print(f"epsilon {epsilon:.0e}: shift {about(shifted, 2)} bits")

# %% [markdown]
# ## Experiment
#
# ### Intrinsic dimension
#
# A $k$-dimensional normal cloud, $k = 1, \dots, 8$, is rotated into fifty dimensions and shaken by noise of four
# sizes. One bandwidth serves all, $\sigma = 1.5$, and $t = 2$. Beside DSE stand four rivals: the binned entropy; the
# entropy of the eigenvalues of $G/N$, with no walk at all (*adjacency spectral entropy*); the nearest-neighbour
# estimate of differential entropy {cite:p}`kozachenko1987sample`, whose true value is known here; and DSE with the
# median rule applied to each set anew.


# %%
def neighbour_entropy(x, k=3):
    """Kozachenko and Leonenko's estimate of the differential entropy in bits, (N, d) -> float."""
    n, d = x.shape
    radius = cKDTree(x).query(x, k + 1)[0][:, -1]
    ball = d / 2 * math.log(math.pi) - gammaln(d / 2 + 1)
    return (digamma(n) - digamma(k) + ball + d * np.log(radius).mean()) / math.log(2)


def adjacency_entropy(x, sigma):
    kernel = torch.exp(-(torch.cdist(x, x) ** 2) / (2 * sigma**2))
    return dse(spectrum=torch.linalg.eigvalsh(kernel), t=1)


def rank_correlation(a, b):
    """Spearman's; 0 where one side is constant up to rounding."""
    return 0.0 if min(np.ptp(a), np.ptp(b)) < 1e-9 else float(spearmanr(a, b)[0])


draws, dims = 3, np.arange(1, 9)
methods = ("DSE", "binned", "adjacency", "neighbours", "DSE, own sigma")
tables = {method: np.zeros((4, 8, draws)) for method in methods}
for j, k in enumerate(progress(dims, "intrinsic dimension")):
    for r in range(draws):
        rotation = torch.linalg.qr(normal(50, 50))[0][:, :k]
        cloud, shake = normal(count, k) @ rotation.T, normal(count, 50)
        for i, s in enumerate(noise_levels):
            x = cloud + s * shake
            tables["DSE"][i, j, r] = dse(x, sigma=1.5, t=2)
            tables["binned"][i, j, r] = shannon_binned(x)
            tables["adjacency"][i, j, r] = (
                adjacency_entropy(x, 1.5) if r == 0 else np.nan
            )
            tables["neighbours"][i, j, r] = (
                neighbour_entropy(x.numpy()) if s else np.nan
            )
            tables["DSE, own sigma"][i, j, r] = (
                dse(x, sigma=sigma_rule(x), t=2) if r == 0 else np.nan
            )
means = {method: np.nanmean(table, axis=2) if method != "neighbours" else table.mean(2)
         for method, table in tables.items()}  # fmt: skip
variance = np.array(noise_levels[1:])[:, None] ** 2
true_entropy = 0.5 * (
    dims * np.log2(2 * np.pi * np.e * (1 + variance))
    + (50 - dims) * np.log2(2 * np.pi * np.e * variance)
)
entropy_error = means["neighbours"][1:] - true_entropy

figure, panels = plt.subplots(2, 2, figsize=(7.6, 5.6), sharex=True)
shown = [
    ("DSE", "DSE, one bandwidth", "bits"),
    ("binned", "Binned entropy", "bits"),
    ("DSE, own sigma", "DSE, median rule on every set", "bits"),
    ("neighbours", "Nearest neighbours: too high by", "bits"),
]
for axes, (method, title, unit) in zip(panels.flat, shown, strict=True):
    for i, (s, colour) in enumerate(
        zip(noise_levels, ("C6", "C0", "C2", "C1"), strict=True)
    ):
        if method == "neighbours":
            values = entropy_error[i - 1] if i else None
        else:
            values = means[method][i]
        if values is not None:
            axes.plot(dims, values, marker="o", color=colour, label=f"noise {s}")
    axes.set(title=title, ylabel=unit)
for axes in panels[0]:
    axes.axhline(math.log2(count), color="0.4", ls=":")
    axes.set_ylim(0, 8.8)
for axes in panels[1]:
    axes.set_xlabel("intrinsic dimension $k$")
panels[1, 1].set_ylim(0, None)
panels[1, 0].legend(loc="upper right")
plt.show()

for i, s in enumerate(noise_levels):
    ranks = {
        method: rank_correlation(dims, means[method][i])
        for method in methods
        if s or method != "neighbours"
    }
    print(
        f"noise {s}: rank correlation with k",
        {m: about(r, 2) for m, r in ranks.items()},
    )
shift = means["DSE"] - means["DSE"][0]
print(
    "largest shift of DSE by noise 0.1, 0.2, 0.3:",
    [about(row.max(), 2, "bits") for row in shift[1:]],
)

# %% [markdown]
# Top left: at every noise level DSE rises with the dimension. Top right: the binned entropy lies on the dotted
# $\log_2 N$ as soon as there is noise, whatever $k$ is. Two more things belong in the picture. First, the order
# survives the noise, the *level* does not: at noise 0.3 the curve for one dimension starts where about five
# dimensions were without it. That is (8), with $\rho = 0.135$. So you can compare sets with the same noise, and not
# sets with different noise. Second, the bottom left panel is the same measure with the bandwidth taken from each set
# by the median rule: with little noise the order turns around, since in more dimensions all distances are close to
# their median and the cloud looks like one blob.
#
# The nearest-neighbour estimate (bottom right) is too high by more than ten bits everywhere. As a *ranking* it is not
# bad at all, and neither is the entropy of the kernel without any walk: see the printed correlations. A failure to
# estimate bits is not a failure to order.
#
# ### Blobs, and labels that lie
#
# First the limit (7): $k$ blobs far apart, radius about 2, gaps of 28, and $\sigma = 3$ in between. Then eight blobs with
# their own labels and with shuffled ones.

# %%
blob_error = []
for k in range(2, 11):
    centre = 20 * torch.eye(10, dtype=torch.float64)[:k].repeat_interleave(30, 0)
    blob_error.append(
        dse(centre + 0.5 * normal(30 * k, 10), sigma=3, t=8) - math.log2(k)
    )
centre = 20 * torch.eye(10, dtype=torch.float64)[:8].repeat_interleave(50, 0)
eight, blob_label = (
    centre + 0.5 * normal(400, 10),
    torch.arange(8).repeat_interleave(50),
)
own = dsmi(eight, blob_label, sigma=3, t=2, generator=generator)[0]
shuffles = [blob_label[torch.randperm(400, generator=generator)] for _ in range(8)]
scrambled = float(
    np.mean([dsmi(eight, y, sigma=3, t=2, generator=generator)[0] for y in shuffles])
)
print("k blobs: |DSE - log2 k| at most", about(np.abs(blob_error).max(), 1), "bits")
print(
    f"8 blobs: DSMI {about(own)} bits with their labels; within 0.05 of zero when shuffled: {abs(scrambled) < 0.05}"
)

# %% [markdown]
# Now make the labels lie: each is replaced, with probability $c$, by a random one. For five well separated blobs the
# blob can be read from the points, so the true information is that of the label channel, and it is known for every
# $c$. Four estimators see 400 points in 20 and in 200 dimensions:
#
# * DSMI with $\sigma = \sqrt d$, as in the authors' script for this task, at $t = 1$ and $t = 2$;
# * (12) with the binned entropy in place of DSE;
# * the nearest-neighbour estimate *for discrete labels* of {cite:t}`ross2014mutual` (the authors' script passes the
#   labels as real numbers to an estimator for two continuous variables);
# * MINE {cite:p}`belghazi2018mutual`: a network $T$ maximises the Donsker–Varadhan bound
#   $\mathbb{E}_{p(a,b)} T - \log \mathbb{E}_{p(a)p(b)} e^T$. It trains on 300 points and is scored on the other 100,
#   at the best of its epochs, which favours it.


# %%
def neighbour_information(x, y, k=3):
    """Ross's estimate of I(points; labels) in bits."""
    n, radius, peers = len(x), np.empty(len(x)), np.empty(len(x))
    for label in np.unique(y):
        own = y == label
        radius[own], peers[own] = (
            cKDTree(x[own]).query(x[own], k + 1)[0][:, -1],
            own.sum(),
        )
    inside = cKDTree(x).query_ball_point(x, np.nextafter(radius, 0), return_length=True)
    nats = digamma(n) + digamma(k) - digamma(peers).mean() - digamma(inside).mean()
    return max(0.0, nats / math.log(2))


def mine_bits(x, all_labels, classes, epochs=25, train=300):
    """MINE for several labellings of the same points at once; best held-out value of each, in bits."""
    x = ((x - x.mean(0)) / x.std(0)).float()
    onehot = F.one_hot(all_labels, classes).float()  # (labellings, N, classes)
    models = [mlp((x.shape[1] + classes, 32, 1)) for _ in all_labels]

    def bound(model, points, label):
        joint = model(torch.cat([points, label], -1)).squeeze(-1)
        pairs = [
            model(torch.cat([points, label.roll(shift, 0)], -1)).squeeze(-1)
            for shift in (1, 2, 3)
        ]
        product = torch.stack(pairs).flatten()
        return joint.mean() - torch.logsumexp(product, 0) + math.log(len(product))

    seen, order = [], torch.randperm(len(x) - train, generator=generator)

    def score(members, _):
        seen.append(
            [
                bound(m, x[train:][order], y[train:][order]).item()
                for m, y in zip(members, onehot, strict=True)
            ]
        )

    fit_ensemble(
        models, lambda model, *batch: -bound(model, *batch),
        (x[:train].expand(len(models), -1, -1), onehot[:, :train]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
        epochs=epochs, seeds=range(len(models)), batch_size=100, callback=score, progress=False,
    )  # fmt: skip
    return np.array(seen).max(0) / math.log(2)


classes, corruption = 5, np.linspace(0, 1, 6)
channel = np.array(
    [
        np.full((classes, classes), c / classes**2)
        + (1 - c) / classes * np.eye(classes)
        for c in corruption
    ]
)
true_bits = (
    (channel * np.log2(np.where(channel > 0, channel, 1) * classes**2))
    .sum((1, 2))
    .clip(0)
)

estimates = {}
for d in (20, 200):
    blob = torch.arange(400) % classes
    x = (torch.rand(classes, d, generator=generator, dtype=torch.float64) * 20 - 10)[
        blob
    ] + normal(400, d)
    lies = (
        torch.rand(len(corruption), 400, generator=generator)
        < torch.from_numpy(corruption)[:, None]
    )
    any_label = torch.randint(0, classes, lies.shape, generator=generator)
    all_labels = torch.where(lies, any_label, blob)

    def same_draws():
        return torch.Generator().manual_seed(seed)

    def binned_information(y, x=x):
        torch.manual_seed(seed)
        return information_of_equal_sets(x, y, shannon_binned)

    estimates[d] = {
        "DSMI, t = 1": [
            dsmi(x, y, sigma=d**0.5, generator=same_draws())[0] for y in all_labels
        ],
        "DSMI, t = 2": [
            dsmi(x, y, sigma=d**0.5, t=2, generator=same_draws())[0] for y in all_labels
        ],
        "binned": [binned_information(y) for y in all_labels],
        "neighbours": [neighbour_information(x.numpy(), y.numpy()) for y in all_labels],
        "MINE": mine_bits(x, all_labels, classes),
    }

figure, panels = plt.subplots(1, 2, figsize=(7.6, 3.6), sharey=True)
for axes, (d, rows) in zip(panels, estimates.items(), strict=True):
    axes.plot(corruption, true_bits, color="C6", lw=3, alpha=0.35, label="truth")
    for (name, values), marker in zip(rows.items(), "osv^D", strict=True):
        axes.plot(corruption, values, marker=marker, label=name)
    axes.set(
        title=f"{d} dimensions", xlabel="share of labels replaced $c$", ylim=(-3, 3.2)
    )
panels[0].set_ylabel("information (bits)")
panels[1].legend(loc="lower right", ncols=2)
plt.show()
orders = {
    d: {name: rank_correlation(true_bits, values) for name, values in rows.items()}
    for d, rows in estimates.items()
}
for d, rows in estimates.items():
    for name, values in rows.items():
        error = np.abs(np.array(values) - true_bits).max()
        print(f"d = {d:3}  {name:12} largest error {about(error, 2)} bits")

# %% [markdown]
# The binned estimate is worthless in both panels. In 20 dimensions it is negative for honest labels: min-max scaling
# stretches a single blob over all cells, while in the whole cloud a blob fills few of them. In 200 every point has
# its own cell and the estimate is 0. DSMI at $t = 1$ falls with the damage, but in other units than the truth, and in
# 200 dimensions it rewards the first fifth of the lies: a pure class has one eigenvalue 1 and a long tail of small
# ones that carries most of the weight, and the eigenvalues 1 that strays bring with them take weight from that tail.
# At $t = 2$ you see the counting effect of (7): clean labels score more than the truth, and a fifth of lies wipes out
# the rest, since a class with a few strays has all five pieces. The nearest-neighbour estimate follows the truth in
# both panels. It is built for classes that are separated, and so are these. MINE follows in 20 dimensions and falls
# short in 200.
#
# ### A network in training
#
# The paper's main use: watch the penultimate layer. The network is a 64-64-32-10 perceptron on 400 digits of 8 by 8
# pixels. It trains twice: with true labels, and with the labels permuted until it has learned most of them by heart,
# as in {cite:t}`zhang2017understanding`. The measurements use 400 held-out digits with their *true* labels, as in the
# authors' code. `lib.train.DSECallback` takes them, with three rules for the bandwidth:
#
# * **fixed at 10**, the package's default;
# * **fixed at the median distance after the first epoch** of the run with true labels;
# * **re-estimated**, the median distance at every measurement.


# %%
def full_scale_data():
    """MNIST and CIFAR-10 from the folder named by LOGIT_BOOK_DATA: training set, 10,000 test images, image shape."""
    parts = {}
    for part in ("train", "t10k"):
        images, labels = (
            mnist_idx(data_path("mnist", f"{part}-{kind}-ubyte"))
            for kind in ("images-idx3", "labels-idx1")
        )
        parts[part] = (images[:, None].float() / 255, labels.long())
    yield "MNIST", parts["train"], parts["t10k"], {"in_channels": 1, "image_size": 28}
    folder = "cifar-10-batches-bin"
    batches = [
        cifar10_binary(data_path(folder, f"data_batch_{i}.bin")) for i in range(1, 6)
    ]
    train = tuple(torch.cat(part) for part in zip(*batches, strict=True))
    test = cifar10_binary(data_path(folder, "test_batch.bin"))
    (xs, ys), (xt, yt) = train, test
    yield (
        "CIFAR-10",
        (xs.float() / 255, ys),
        (xt.float() / 255, yt),
        {"in_channels": 3, "image_size": 32},
    )


rules = {"fixed at 10": 10.0, "fixed, first epoch": None, "re-estimated": sigma_rule}


def watch(
    model, train, held_out, layer, first_sigma, *, epochs, batch_size, rounds, run_seed
):
    """Train with a callback for each rule. Returns the callbacks and accuracies (train, held-out) at their rounds."""
    watchers = {
        name: DSECallback(
            held_out, [layer], sigma=first_sigma if rule is None and first_sigma else rule,
            rounds=[r for r in rounds if r > 0 or rule is not None], repeats=3, n_clusters=10 if rule == 10 else 0,
        )
        for name, rule in rules.items()
    }  # fmt: skip
    scores = []

    def score(model, history=None):
        if score.calls in rounds:
            scores.append((accuracy(model, *train), accuracy(model, *held_out)))
        score.calls += 1

    score.calls = 0
    for callback in (*watchers.values(), score):
        callback(model)  # round 0: before training
    fit(
        model, lambda model, inputs, labels: F.cross_entropy(model(inputs), labels), train,
        optimizer=torch.optim.Adam(model.parameters(), lr=3e-3), epochs=epochs, batch_size=batch_size, seed=run_seed,
        callbacks=[*watchers.values(), score], progress=False,
    )  # fmt: skip
    return watchers, np.array(scores)


rounds = [0, 1, 2, 3, 5, 8, 12, 20, 30, 45, 60, 90]

runs = {}
for run_seed in progress((seed, seed + 100), "training"):
    train, held_out = digits((400, 400, 997), seed=run_seed, flat=True)[:2]
    permuted = train[1][
        torch.randperm(400, generator=torch.Generator().manual_seed(run_seed))
    ]
    first_sigma = None
    for kind, target in (("true labels", train[1]), ("random labels", permuted)):
        torch.manual_seed(run_seed)
        model = mlp((64, 64, 32, 10))
        layer = [name for name, _ in model.named_children()][
            -2
        ]  # the last ReLU: the penultimate features
        watchers, scores = watch(
            model, (train[0], target), held_out, layer, first_sigma,
            epochs=rounds[-1], batch_size=32, rounds=rounds, run_seed=run_seed,
        )  # fmt: skip
        first_sigma = (
            first_sigma or watchers["fixed, first epoch"].records[layer]["sigma"][0]
        )
        on_train = dsmi(
            model[:-1](train[0]), target, sigma=sigma_rule(model[:-1](train[0]))
        )[0]
        records = {name: watcher.records[layer] for name, watcher in watchers.items()}
        runs[run_seed, kind] = {"records": records, "scores": scores, "on_train": on_train,
                                "measured": {n: w.measured for n, w in watchers.items()}}  # fmt: skip


def change(run_seed, kind, rule, what="dsmi_y"):
    values = runs[run_seed, kind]["records"][rule][what]
    return values[-1] - values[0]


figure, panels = plt.subplots(3, 3, figsize=(7.8, 7.0), sharex=True)
for column, rule in enumerate(rules):
    for (run_seed, kind), run in runs.items():
        style = {
            "color": "C0" if kind == "true labels" else "C1",
            "ls": "-" if run_seed == seed else "--",
        }
        for axes, what in zip(panels[:2, column], ("dsmi_y", "dse"), strict=True):
            axes.plot(
                run["measured"][rule], run["records"][rule][what], marker=".", **style
            )
        panels[2, 0].plot(rounds, run["scores"][:, 0], marker=".", **style)
        panels[2, 1].plot(rounds, run["scores"][:, 1], marker=".", **style)
        panels[2, 2].plot(
            rounds, run["records"]["re-estimated"]["sigma"], marker=".", **style
        )
    panels[0, column].set(title=rule, ylim=(-0.1, 2.2))
    panels[1, column].set(ylim=(-0.3, 9.2))
panels[0, 0].set_ylabel("DSMI(Z; Y) (bits)")
panels[1, 0].set_ylabel("DSE(Z) (bits)")
panels[2, 0].set(title="accuracy, training", ylabel="share right", ylim=(0, 1.05))
panels[2, 1].set(title="accuracy, held out", ylim=(0, 1.05))
panels[2, 2].set(title="median distance", ylim=(0, None))
for axes in panels[2]:
    axes.set_xlabel("epoch")
panels[0, 0].set_xscale("symlog", linthresh=1)
panels[0, 0].set_xticks([0, 1, 3, 10, 30, 90], ["0", "1", "3", "10", "30", "90"])
panels[0, 0].set_xlim(-0.05, 100)
panels[0, 0].plot([], [], color="C0", label="true labels")
panels[0, 0].plot([], [], color="C1", label="random labels")
panels[0, 0].legend(loc="upper left")
plt.show()
for rule in rules:
    for kind in ("true labels", "random labels"):
        values = [about(change(s, kind, rule), 2) for s in (seed, seed + 100)]
        entropies = [about(change(s, kind, rule, "dse"), 2) for s in (seed, seed + 100)]
        print(f"{rule:19} {kind:14} change of DSMI(Z; Y) {values}  of DSE {entropies}")

# %% [markdown]
# One network, three stories (solid and dashed: two seeds). Read the columns.
#
# * **Fixed at 10**: information and entropy both rise with true labels, far more than with random ones. This is the
#   paper's picture.
# * **Fixed at the first epoch's median**: information rises and then falls to nothing, for both kinds of labels,
#   while the held-out accuracy of the first is excellent and that of the second is that of guessing. The
#   representation grows more than tenfold (bottom right), so a bandwidth that was a median distance becomes tiny,
#   every point is an island, and (6) goes to its limit, the logarithm of the number of points, for a class and for a
#   random set alike.
# * **Re-estimated**: the scale is divided out and only the shape is left. Information rises with true labels. With
#   random ones it comes and goes, and ends about where it began, or below. And DSE *falls* with true labels: in shape
#   the cloud becomes simpler, ten clumps instead of a spread.
#
# So "the entropy rises during training" is mostly a statement about the norm of the features in units of $\sigma$.
# The history of the paper shows the same sensitivity: its earlier workshop version {cite:p}`liao2023assessing`
# reported that DSE *decreases* over epochs. A fixed bandwidth shows growth and shape together; a re-estimated one
# shows shape alone. State which, and use one for everything you compare.
#
# With the same callback, the information about the input: the 400 images are clustered once, and only $Z$ moves.

# %%
for run_seed in (seed, seed + 100):
    values = runs[run_seed, "true labels"]["records"]["fixed at 10"]["dsmi_x"]
    print(
        "DSMI(Z; X), sigma 10, true labels:",
        about(values[0], 2),
        "before,",
        about(values[-1], 2),
        "after",
    )
for kind in ("true labels", "random labels"):
    values = [runs[s, kind]["on_train"] for s in (seed, seed + 100)]
    print(
        f"{kind:14} DSMI with the training labels on the training points",
        [about(v, 2) for v in values],
    )

# %% [markdown]
# The last line is the trap of measuring on training points: there a network that has learned random labels by heart shows
# information about them, and none of it holds for a new digit.
#
# ### Choosing among networks, and among starts
#
# Two uses that the paper proposes. *Selection*: 24 networks of several widths, depths, training lengths and weight
# decays; does DSMI on held-out points predict the accuracy on test points? As a control there is the plain median
# distance between features, no spectrum at all. *Starting points*: the same network with its initial weights
# multiplied by a factor, from too small to far too large; the paper finds that starts with DSE near 0 train better
# than starts near $\log_2 N$.

# %%
train, held_out, test = digits((800, 400, 597), seed=seed, flat=True)


def train_small(model, epochs, weight_decay=0.0, run_seed=seed):
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, weight_decay=weight_decay
    )
    fit(
        model, lambda model, inputs, labels: F.cross_entropy(model(inputs), labels), train,
        optimizer=optimizer, epochs=epochs, batch_size=32, seed=run_seed, progress=False,
    )  # fmt: skip
    return accuracy(model, *test)


grid = list(itertools.product((8, 32), (1, 2, 3), (1, 6), (0.0, 0.3)))
selection = []
for i, (width, depth, epochs, decay) in enumerate(progress(grid, "24 networks")):
    torch.manual_seed(100 * seed + i)
    model = mlp((64, *[width] * depth, 10))
    score = train_small(model, epochs, decay, 100 * seed + i)
    features = model[:-1](held_out[0])
    own_sigma = sigma_rule(features)
    information = [
        dsmi(
            features,
            held_out[1],
            sigma=s,
            generator=torch.Generator().manual_seed(seed),
        )[0]
        for s in (10, own_sigma)
    ]
    selection.append((score, *information, dse(features, sigma=10), own_sigma))
selection = np.array(selection)
columns = ("DSMI, sigma 10", "DSMI, own sigma", "DSE, sigma 10", "median distance")
ranks = {
    name: spearmanr(selection[:, 0], selection[:, j + 1])[0]
    for j, name in enumerate(columns)
}
print(
    "rank correlation with test accuracy over 24 networks:",
    {name: about(r, 2) for name, r in ranks.items()},
)

factors, starts = (0.3, 1, 3, 6, 10, 20), []
for factor in factors:
    torch.manual_seed(seed)
    model = mlp((64, 64, 32, 10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    starts.append((dse(model[:-1](held_out[0]), sigma=10), train_small(model, 15)))
starts = np.array(starts)
for factor, (entropy, score) in zip(factors, starts, strict=True):
    print(
        f"weights times {factor:4}: DSE at the start {about(entropy, 2)} bits, accuracy after training {about(score)}"
    )

figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.4))
points = left.scatter(
    selection[:, 1],
    selection[:, 0],
    c=[g[2] for g in grid],
    cmap="coolwarm",
    s=28,
    edgecolor="k",
    lw=0.4,
)
left.set(
    title="24 networks",
    xlabel="DSMI(Z; Y), $\\sigma = 10$ (bits)",
    ylabel="test accuracy",
    ylim=(0, 1.02),
)
for epochs, colour in (
    (1, plt.get_cmap("coolwarm")(0.0)),
    (6, plt.get_cmap("coolwarm")(1.0)),
):
    left.scatter(
        [],
        [],
        color=colour,
        edgecolor="k",
        lw=0.4,
        label=f"{epochs} epoch" + "s" * (epochs > 1),
    )
left.legend(loc="lower right")
right.plot(starts[:, 0], starts[:, 1], marker="o", color="C2")
right.axvline(math.log2(400), color="0.4", ls=":")
right.set(
    title="One network, six starts",
    xlabel="DSE before training (bits)",
    ylabel="test accuracy",
    ylim=(0.6, 1.02),
)
plt.show()

# %% [markdown]
# DSMI ranks the 24 networks well. So does the median distance: better trained networks have larger features. On
# networks that differ mainly in how far they were trained, any measure of progress will do, and this experiment
# cannot tell more. On the right, starts near the dotted $\log_2 N$ end worst. But the best start is not the one with
# the least entropy: weights that are too small also have DSE 0.

# %% [markdown]
# ## Claims

# %%
rising = [(np.diff(row) > 0).all() for row in means["DSE"]]
saturated = means["binned"][1:, 2:].min() / math.log2(count)
ledger.claim(
    "DSE measures intrinsic dimension robustly under noise, where binned Shannon entropy saturates",
    paper="DSE grows with the dimension of the data at several noise levels; binned entropy approaches log N",
    measured=f"rank correlation of DSE with k {about(min(spearmanr(dims, row)[0] for row in means['DSE']), 2)} at the "
    f"worst noise level; binned entropy at least {about(saturated)} of log2 N; noise 0.1 moves DSE by up to "
    f"{about(shift[1].max(), 2)} bits, noise 0.3 by up to {about(shift[3].max(), 2)}",
    checks={
        "mean DSE strictly increasing in k = 1..8 at noise 0, 0.1, 0.2 and 0.3": all(
            rising
        ),
        "binned entropy >= 0.98 log2 N for every k >= 3 at noise >= 0.1": saturated
        >= 0.98,
        "noise of 0.1 moves DSE by at most 0.5 bit at every k": np.abs(shift[1]).max()
        <= 0.5,
        "noise of 0.3 moves DSE by at most 1 bit at every k": np.abs(shift[3]).max()
        <= 1,
    },
    fails={
        "noise of 0.3 moves DSE by at most 1 bit at every k": "In 50 dimensions noise of 0.3 shrinks all affinities "
        "by the factor 0.135, equation (8), and at t = 2 the lifted tail of the spectrum is still counted: the order "
        "of the dimensions survives, the level does not."
    },
)

# %%
ledger.claim(
    "DSE counts separated clusters; DSMI sees dependence and is zero without it",
    paper="DSE is bounded through the number of blobs; DSMI falls with label corruption",
    measured=f"|DSE - log2 k| up to {about(np.abs(blob_error).max(), 1)} bits; DSMI of 8 blobs {about(own)} bits; rank "
    f"correlation with the true information {about(orders[20]['DSMI, t = 1'], 2)} in 20 dimensions, "
    f"{about(orders[200]['DSMI, t = 1'], 2)} in 200",
    checks={
        "|DSE - log2 k| <= 0.05 bit for k = 2..10 blobs": np.abs(blob_error).max()
        <= 0.05,
        "DSMI >= 1 bit with the labels of 8 blobs": own >= 1,
        "mean over 8 shuffles within 0.05 bit of zero": abs(scrambled) <= 0.05,
        "rank correlation with the true information >= 0.8 in 20 and 200 dimensions, t = 1": min(
            orders[20]["DSMI, t = 1"], orders[200]["DSMI, t = 1"]
        )
        >= 0.8,
        "clean labels score above labels with a fifth replaced in 200 dimensions, t = 1": estimates[
            200
        ]["DSMI, t = 1"][0]
        > estimates[200]["DSMI, t = 1"][1],
    },
    fails={
        "clean labels score above labels with a fifth replaced in 200 dimensions, t = 1": "With sigma = sqrt(d) the "
        "points of one blob have affinity 1/e, so each class is a spread cloud with a high entropy of its own; a few "
        "strays add slow modes whose weight is taken from that tail, and the entropy of the class falls."
    },
)

# %%
neighbour_worst = max(
    np.abs(np.array(estimates[d]["neighbours"]) - true_bits).max() for d in estimates
)
mine_error = np.abs(np.array(estimates[200]["MINE"]) - true_bits).max()
binned_high = np.abs(estimates[200]["binned"]).max()
ledger.claim(
    "Binned entropy, nonparametric estimates and MINE fail in high dimension",
    paper="DSMI outperforms binning, a nearest-neighbour estimator and MINE on blobs of up to 20,000 dimensions",
    measured=f"binned information in 200 dimensions at most {about(binned_high, 1)} bits; nearest-neighbour entropy off by "
    f"{about(entropy_error.min(), 2)} to {about(entropy_error.max(), 2)} bits; nearest-neighbour information off by at most "
    f"{about(neighbour_worst, 2)} bits; MINE off by {about(mine_error, 2)}",
    checks={
        "binned information at most 0.05 bit in 200 dimensions, whatever the labels": binned_high
        <= 0.05,
        "nearest-neighbour entropy off by at least 5 bits in 50 dimensions": entropy_error.min()
        >= 5,
        "nearest-neighbour information off by at least 0.4 bit": neighbour_worst >= 0.4,
        "MINE off by at least 0.3 bit in 200 dimensions": mine_error >= 0.3,
    },
    fails={
        "nearest-neighbour information off by at least 0.4 bit": "The estimator for discrete labels follows the truth: "
        "the blobs are separated, so distances within a class say what they should in any dimension. It beats DSMI here."
    },
)

# %%
both = (seed, seed + 100)
ledger.claim(
    "DSE of representations increases during training",
    paper="rises for six architectures on three data sets, with true and with random labels",
    measured=f"true labels: {about(min(change(s, 'true labels', 'fixed at 10', 'dse') for s in both), 2)} bits or more at "
    f"sigma 10, {about(max(change(s, 'true labels', 're-estimated', 'dse') for s in both), 2)} or less when sigma is re-estimated",
    checks={
        "rises by >= 0.5 bit at sigma = 10, both kinds of labels, two seeds": all(
            change(s, kind, "fixed at 10", "dse") >= 0.5 for s, kind in runs
        ),
        "rises by >= 0.5 bit at the first epoch's median, both kinds of labels, two seeds": all(
            change(s, kind, "fixed, first epoch", "dse") >= 0.5 for s, kind in runs
        ),
        "rises with true labels when the scale is divided out": all(
            change(s, "true labels", "re-estimated", "dse") > 0 for s in both
        ),
    },
    fails={
        "rises with true labels when the scale is divided out": "The rise is growth of the features in units of sigma; "
        "in shape the cloud becomes simpler and DSE falls."
    },
)

# %%
gap = min(
    change(s, "true labels", "fixed at 10")
    - 2 * change(s, "random labels", "fixed at 10")
    for s in both
)
ledger.claim(
    "DSMI with the label increases in generalisable learning and stays flat when random labels are learned by heart",
    paper="rises with true labels, stagnant with random labels",
    measured=", ".join(
        f"{rule}: {about(np.mean([change(s, 'true labels', rule) for s in both]), 2)} against "
        f"{about(np.mean([change(s, 'random labels', rule) for s in both]), 2)} bits"
        for rule in rules
    ),
    checks={
        "rises by >= 0.2 bit with true labels, sigma = 10": all(
            change(s, "true labels", "fixed at 10") >= 0.2 for s in both
        ),
        "rises by >= 0.2 bit with true labels, sigma re-estimated": all(
            change(s, "true labels", "re-estimated") >= 0.2 for s in both
        ),
        "rises more than twice as much with true as with random labels, sigma = 10": gap
        > 0,
        "rises by at most 0.1 bit with random labels, sigma re-estimated": all(
            change(s, "random labels", "re-estimated") <= 0.1 for s in both
        ),
        "changes by at most 0.1 bit with random labels, sigma = 10": all(
            abs(change(s, "random labels", "fixed at 10")) <= 0.1 for s in both
        ),
        "rises by >= 0.2 bit with true labels, sigma from the first epoch": all(
            change(s, "true labels", "fixed, first epoch") >= 0.2 for s in both
        ),
    },
    fails={
        "changes by at most 0.1 bit with random labels, sigma = 10": "Learning by heart also makes the features grow, "
        "and structure that the random initial layer kept from the images comes within reach of sigma.",
        "rises by >= 0.2 bit with true labels, sigma from the first epoch": "The features grow more than tenfold "
        "afterwards; in units of that sigma every point is an island and all entropies are log N.",
    },
)

# %%
ledger.claim(
    "DSMI with the input rises on MNIST",
    paper="keeps increasing on MNIST",
    measured=f"8 by 8 digits, sigma 10: rises by {about(min(change(s, 'true labels', 'fixed at 10', 'dsmi_x') for s in both), 2)} "
    "bits or more",
    checks={
        "rises by >= 0.2 bit on digits, sigma = 10, two seeds": all(
            change(s, "true labels", "fixed at 10", "dsmi_x") >= 0.2 for s in both
        )
    },
)

# %%
ledger.untested(
    "DSMI with the input falls on CIFAR-10 and STL-10",
    paper="peaks early and then decreases",
    reason="Needs natural images and convolutional networks; digits have no counterpart. The full scale runs CIFAR-10.",
)

# %%
ledger.claim(
    "DSMI with the label predicts the accuracy of a network",
    paper="correlates with ImageNet accuracy over 962 pretrained models",
    measured=f"24 small networks: rank correlation {about(ranks['DSMI, sigma 10'], 2)} at sigma 10, "
    f"{about(ranks['DSMI, own sigma'], 2)} with own sigma; the median distance alone {about(ranks['median distance'], 2)}",
    checks={
        "rank correlation >= 0.5 over 24 networks, sigma = 10": ranks["DSMI, sigma 10"]
        >= 0.5,
        "rank correlation >= 0.5 over 24 networks, own sigma": ranks["DSMI, own sigma"]
        >= 0.5,
        "rank correlation at least 0.1 above that of the median distance": max(
            ranks["DSMI, sigma 10"], ranks["DSMI, own sigma"]
        )
        >= ranks["median distance"] + 0.1,
    },
    fails={
        "rank correlation at least 0.1 above that of the median distance": "These networks differ mostly in how far they "
        "were trained, and the size of the features follows that as well; only a zoo of well-trained models could separate "
        "the two."
    },
)

# %%
ledger.untested(
    "DSMI predicts ImageNet accuracy over 962 models",
    paper="positive correlation over 962 pretrained models of a public zoo",
    reason="Needs ImageNet's validation images and the weights of the 962 models.",
)

# %%
ledger.claim(
    "DSE guides initialisation: a start with low entropy trains better than one near log N",
    paper="ResNets on CIFAR-10 and STL-10 started with DSE near 0 converge faster and end higher than near log N",
    measured=f"accuracy {about(starts[1, 1])} from DSE {about(starts[1, 0], 1)} bits, {about(starts[-1, 1])} from "
    f"{about(starts[-1, 0], 3)} bits",
    checks={
        "default weights start below 0.5 bit, weights times 20 within 0.1 bit of log2 N": starts[
            1, 0
        ]
        < 0.5
        and starts[-1, 0] > math.log2(400) - 0.1,
        "accuracy at least 5 points higher from the low start": starts[1, 1]
        >= starts[-1, 1] + 0.05,
        "the start with the lowest entropy of six is the best": starts[:, 1].argmax()
        == starts[:, 0].argmin(),
    },
    fails={
        "the start with the lowest entropy of six is the best": "Weights that are too small also have an entropy of 0 and "
        "train more slowly: low entropy is a symptom of small features, not a recipe."
    },
)

# %%
ledger

# %% [markdown]
# ## What is different from the paper
#
# * **The operator.** The paper defines $P$ by (3); its package uses $K$, which is another walk, by (5). This chapter
#   follows the definition.
# * **Scale.** Digits of 64 pixels, perceptrons, 400 points; the paper has MNIST, CIFAR-10 and STL-10, six backbones and
#   about 5000 points. With `scale="full"` the cell below trains convolutional networks on MNIST and CIFAR-10, from
#   the folder named by `LOGIT_BOOK_DATA`, and measures 10,000 test images after each epoch, on the GPU if there is
#   one. It has no ResNet, no contrastive training and no zoo of pretrained models.
# * **Bandwidth.** The released training code keeps the package's default, $\sigma = 10$, throughout. Here three rules
#   stand side by side.
# * **Baselines.** The nearest-neighbour estimator is the one for discrete labels, and MINE is scored on held-out points.
# * **Left out.** The Chebyshev approximation of the spectrum, which the authors advise against; the entropy of the
#   entries of $P$ instead of its eigenvalues, an option of their package; curves for self-supervised training.

# %%
if scale == "full":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, train_set, test_set, shape in full_scale_data():
        train_set, test_set = (
            [part.to(device) for part in pair] for pair in (train_set, test_set)
        )
        for kind in ("true labels", "random labels"):
            torch.manual_seed(seed)
            target = (
                train_set[1]
                if kind == "true labels"
                else train_set[1][torch.randperm(len(train_set[1])).to(device)]
            )
            model = CNN(10, channels=(32, 64), width=256, **shape).to(device)
            batches = list(
                zip(
                    test_set[0][:10000].split(500),
                    test_set[1][:10000].split(500),
                    strict=True,
                )
            )
            layer = [
                module
                for module, _ in model.named_modules()
                if module and "head" not in module
            ][-1]
            watcher = DSECallback(batches, [layer], sigma=10.0)
            fit(
                model, lambda model, inputs, labels: F.cross_entropy(model(inputs), labels), (train_set[0], target),
                optimizer=torch.optim.Adam(model.parameters(), lr=1e-3), epochs=30, batch_size=128, seed=seed,
                callbacks=[watcher],
            )  # fmt: skip
            for what in ("dse", "dsmi_y", "dsmi_x"):
                print(
                    name,
                    kind,
                    what,
                    [about(value) for value in watcher.records[layer][what]],
                )

# %% [markdown]
# ## Exercises
#
# **1.** Write `rho_for(sigma, d, keep)`: the largest noise $s$ for which the affinities in (8) keep at least the
# share `keep`.


# %% tags=["exercise"]
def check_1(answer):
    for bandwidth, d, keep in ((1.5, 50, 0.135), (10.0, 512, 0.5), (1.0, 1, 0.9)):
        s = answer(bandwidth, d, keep)
        assert isinstance(s, float) and s > 0, "answer must return a positive float"
        assert abs(math.exp(-(s**2) * d / bandwidth**2) - keep) < 1e-9, (
            "that noise does not leave the share"
        )


# %% tags=["solution", "hide-cell"]
def rho_for(sigma, d, keep):
    return sigma * math.sqrt(-math.log(keep) / d)


check_1(rho_for)

# %% [markdown]
# **2.** DSE counts pieces where Shannon's entropy weighs them. Write `weighted_entropy(x, sigma, t)` that does weigh:
# the entropy of the *sizes* of the pieces. Hint: after many steps, where can a walker be who started at a given point?
# Points of one piece reach the same places.


# %% tags=["exercise"]
def check_2(answer):
    for members in ((10, 10, 10, 10), (34, 2, 2, 2), (20, 20)):
        shares = np.array(members) / sum(members)
        group = torch.repeat_interleave(
            torch.arange(len(members)), torch.tensor(members)
        )
        torch.manual_seed(0)
        x = 100 * torch.eye(4, dtype=torch.float64)[group] + 0.1 * torch.randn(
            len(group), 4, dtype=torch.float64
        )
        value = answer(x, 2.0, 64)
        assert isinstance(value, float), "answer must return a float"
        assert abs(value + (shares * np.log2(shares)).sum()) < 1e-6, (
            f"groups {members}: wrong entropy"
        )


# %% tags=["solution", "hide-cell"]
def weighted_entropy(x, sigma, t):
    walk = diffusion_operator(x, sigma, symmetric=False)
    rows = torch.linalg.matrix_power(walk, t)
    pieces = torch.unique((rows > 1e-9).long(), dim=0, return_inverse=True)[1]
    shares = pieces.bincount().double() / len(x)
    return float(torch.special.entr(shares).sum() / math.log(2))


check_2(weighted_entropy)

# %% [markdown]
# **3.** The reference is differentiable. Write `spread_out(x, sigma, steps)`, which moves points by gradient ascent
# on DSE (any optimizer) and returns them. Start: 30 points in a tight ball. Goal: two bits more.


# %% tags=["exercise"]
def check_3(answer):
    torch.manual_seed(0)
    x = 0.3 * torch.randn(30, 2, dtype=torch.float64)
    moved = answer(x, 1.0, 100)
    assert isinstance(moved, torch.Tensor) and moved.shape == x.shape, (
        "answer must return the moved points"
    )
    assert dse(moved, sigma=1.0) >= dse(x, sigma=1.0) + 2, (
        "the entropy has not risen by two bits"
    )


# %% tags=["solution", "hide-cell"]
def spread_out(x, sigma, steps):
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (-diffusion_spectral_entropy(x, sigma)).backward()
        optimizer.step()
    return x.detach()


check_3(spread_out)

# %% [markdown]
# ## Summary
#
# - DSE is the entropy of the eigenvalues of a random walk between points; $2^{\text{DSE}}$ counts the pieces that the
#   walker tells apart at resolution $\sigma$ after $t$ steps. It counts them; it does not weigh them.
# - Isotropic noise is a self-loop at every point. It lifts the small eigenvalues to a floor, and $t$ steps lower the
#   floor exponentially. Order survives more noise than level does.
# - DSMI compares sets of equal size, which makes it exactly unbiased for meaningless labels. Measure on held-out
#   points with true labels.
# - The bandwidth decides. In one training run DSE rises or falls, and DSMI rises or vanishes, depending on whether
#   $\sigma$ is fixed, and where. State the rule, and keep it for everything you compare.
# - The package takes eigenvalues of $K$, which are not those of $P$.
#
# **Further reading.** {cite:t}`coifman2006diffusion` for diffusion maps and the role of $\alpha$;
# {cite:t}`saxe2018information` on what binned information curves do and do not show; {cite:t}`vonluxburg2007tutorial`
# for eigenvalues that count clusters; {cite:t}`ross2014mutual` for the estimator that won the contest with the blobs.
