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
# # The weight of a hypothesis: why large models learn simple things fast
#
# A network with more parameters than samples should overfit, says the parameter count, and mostly it does not. This
# paper {cite:p}`universality-lens` counts something else. Average all models under a broad prior and predict with the
# average: how much log-loss you pay beyond the truth depends only on the prior weight of the models *near the truth*, and
# not at all on how many others there are. You derive that bound in five lines, compute it exactly for coins, for all
# context trees with 65 536 leaves and for all boolean functions that a small network can express, and then approximate the
# average of a real network by Langevin sampling. At the end you can use context tree weighting, a Langevin sampler and the
# bound itself, and you know where the argument stops to help.

# %% [markdown]
# ## Setup

# %% tags=["parameters"]
scale = "ci"
seed = 0

# %%
import copy
import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn
from tqdm import tqdm

from lib.claims import Ledger, about
from lib.data import digits, english_text
from lib.information import kl_ball_log_weight, universality_bound
from lib.models import BernoulliMixture, ContextTreeWeighting, FiniteMixture
from lib.train import fit, sgld
from lib.uncertainty import posterior_predictive

plt.style.use("lib.book")
torch.manual_seed(seed)
rng = np.random.default_rng(seed)
ledger = Ledger("universality-lens", scale, seed)

# %% [markdown]
# ## The problem
#
# A source writes bits. Each bit depends on the one before it and on nothing else, but you do not know that; you only know
# that no more than the last sixteen bits matter. So you estimate the chance of a one after every context of $d$ bits, by
# counting, with half a count added to either side. What should $d$ be?


# %%
def draw(tree, n, rng):
    """`n` bits of a tree source {recent bits, newest first: chance of a one}, and their log probabilities."""
    past, log_probs = [0] * 16, np.empty(n)
    for i, u in enumerate(rng.random(n)):
        leaf = ()
        while leaf not in tree:
            leaf = (*leaf, past[-len(leaf) - 1])
        past.append(int(u < tree[leaf]))
        log_probs[i] = math.log(tree[leaf] if past[-1] else 1 - tree[leaf])
    return past[16:], log_probs


def count_and_predict(bits, depth, added=0.5):
    """Log probability of each bit by the counts of its own context of `depth` bits."""
    counts, past, log_probs = {}, 0, np.empty(len(bits))
    for i, bit in enumerate(bits):
        seen = counts.setdefault(past % 2**depth, [added, added])
        log_probs[i] = math.log(seen[bit] / sum(seen))
        seen[bit] += 1
        past = (2 * past + bit) % 2**16
    return log_probs


simple_tree = {(0,): 0.1, (1,): 0.85}
bits, log_truth = draw(simple_tree, 8000, rng)
depths = range(17)
excess = [log_truth.sum() - count_and_predict(bits, depth).sum() for depth in depths]
ctw = ContextTreeWeighting(depth=16).fit(bits)
ctw_excess = log_truth.sum() - ctw.log_evidence

figure, axes = plt.subplots(figsize=(6.5, 3.2))
axes.semilogy(depths, excess, "o-", label="counting at one depth")
axes.axhline(ctw_excess, color="C1", label="mixture of all trees up to depth 16")
axes.set(
    title="8000 bits of a source that remembers one bit",
    xlabel="context length $d$ (bits)",
    ylabel="log-loss beyond the truth (nats)",
)
axes.legend()
plt.show()
assert int(np.argmin(excess)) == 1

# %% [markdown]
# The blue curve is the textbook picture of overfitting: one bit of context is right, and sixteen bits, 65 536 parameters
# for 8000 samples, cost a hundred times more. The orange line is a learner with *all* those parameters and more: it mixes
# every tree of contexts up to depth sixteen. It pays hardly more than the learner who was told the right depth. Nobody
# tuned anything. Whatever explains overfitting, it is not the number of parameters.
#
# And what does a learner without the added half pay?

# %%
with np.errstate(divide="ignore"):
    first = bits.index(1)
    print(f"bit {first} is the first one; zeros before it: {first}")
    print(
        "pure counting gives it probability 0, a loss of",
        -np.log(0 / max(first, 1)),
    )

# %% [markdown]
# Infinite: no later success repairs it. Clipping the zero would only hide it, so every learner in this chapter keeps some
# weight on everything.

# %% [markdown]
# ## Derivation
#
# ### The learner and its regret
#
# Let $\{P_\theta : \theta \in \Theta\}$ be the models, $w$ a prior on $\Theta$, and $P_0 = P_{\theta_0}$ the truth, which is
# one of them. The learner predicts with the **mixture**
#
# $$ Q(x^n) = \int w(\theta)\, P_\theta(x^n)\, d\theta, \qquad
# Q(x_i \mid x^{i-1}) = \int w(\theta \mid x^{i-1})\, P_\theta(x_i \mid x^{i-1})\, d\theta . \tag{1} $$
#
# The second form is the first one divided by itself, $Q(x^i)/Q(x^{i-1})$: average the predictions with the posterior
# weights. All logarithms in this chapter are natural, all losses in nats. The **regret** is the expected log-loss beyond the
# truth's. Three settings differ only in what is averaged:
#
# $$ R_{\text{online}} = \tfrac1n D(P_0^n \,\|\, Q^n), \qquad
# R_{\text{batch}} = \mathbb E\, D\big(P_0(\cdot \mid X^{n-1}) \,\|\, Q(\cdot \mid X^{n-1})\big), \qquad
# R_{\text{sup}} = \mathbb E\, D\big(P_0(y \mid x) \,\|\, Q(y \mid x; S)\big) . \tag{2} $$
#
# Online, you predict each symbol from its past; in a batch you see $n-1$ of them and predict one; supervised, you see
# pairs $S$ and predict the label of a fresh $x$. The regret is measured against the true source, not against the model that
# looks best in hindsight. By the chain rule of the divergence, online regret is the average of batch regrets over the
# lengths up to $n$, so a bound on the first speaks about the second.
#
# ### The bound
#
# Take any set $A \subset \Theta$ with weight $w(A) > 0$ and let $Q_A$ be the mixture over $A$ alone, with the weights
# renormalised. Dropping all other models can only make the sum smaller, $Q(x^n) \ge w(A)\, Q_A(x^n)$. Take logarithms and the
# expectation under the truth:
#
# $$ D(P_0^n \| Q^n) \;\le\; \log \tfrac{1}{w(A)} + D(P_0^n \| Q_A^n)
# \;\le\; \log \tfrac{1}{w(A)} + \sup_{\theta \in A} D(P_0^n \| P_\theta^n) . \tag{3} $$
#
# The second step is the convexity of the divergence in its second argument: the divergence to an average is at most the
# average of the divergences, and that is at most the largest. Now choose for $A$ the ball of all models within $\epsilon$ nats
# of the truth, $B_\epsilon = \{\theta : D(P_0 \| P_\theta) \le \epsilon\}$. For independent symbols the last term is at most
# $n\epsilon$, and you may choose the best radius:
#
# $$ \boxed{\; R_{\text{online}} \;\le\; \inf_{\epsilon > 0} \Big[\, \epsilon + \tfrac1n \log \tfrac{1}{w(B_\epsilon)} \Big] \;} \tag{4} $$
#
# That is the paper's result. The size of $\Theta$ does not occur; other models may be added by the billion, as long as
# they leave $w(B_\epsilon)$ alone. $w(B_\epsilon)$ is what the authors call the **weight** of the hypothesis. With a single
# model of positive weight, $\epsilon = 0$ gives $\frac1n \log \frac1{w(\theta_0)}$, and this one even holds for every
# single sequence, since no expectation was needed: $Q(x^n) \ge w(\theta_0) P_0(x^n)$.
#
# A cell holds (3) and (4) against brute force: forty coins, all $2^{10}$ sequences enumerated.

# %%
n = 10
thetas = torch.rand(40, dtype=torch.float64) * 0.9 + 0.05
log_prior = torch.randn(40, dtype=torch.float64).log_softmax(0)


def coin_kl(truth, model):
    """D(coin || coin) in nats."""
    truth, model = torch.as_tensor(truth).double(), torch.as_tensor(model).double()
    terms = torch.xlogy(truth, truth / model)
    return terms + torch.xlogy(1 - truth, (1 - truth) / (1 - model))


sequences = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n))).double()
ones = sequences.sum(1, keepdim=True)
log_likelihood = ones * thetas.log() + (n - ones) * (1 - thetas).log()  # (1024, 40)
log_mixture = (log_prior + log_likelihood).logsumexp(1)
for truth in range(40):
    log_p0 = log_likelihood[:, truth]
    exact = (log_p0.exp() * (log_p0 - log_mixture)).sum().item() / n
    kl = coin_kl(thetas[truth], thetas)
    bound, radius = universality_bound(log_prior, kl, n)
    assert exact <= bound + 1e-12
    assert (log_p0 - log_mixture <= -log_prior[truth] + 1e-12).all()
    by_hand = min(e + -kl_ball_log_weight(log_prior, kl, e) / n for e in kl.tolist())
    assert abs(by_hand - bound) < 1e-12
print("bound (4) held for each of 40 truths, and the pointwise bound on 1024 sequences")

# %% [markdown]
# ### What the weight is made of
#
# Let the model have $k$ parameters which all matter: near the truth the divergence is a quadratic form,
# $D \approx \frac12 \delta^\top H \delta$ with the Fisher information $H$. The ball is an ellipsoid of volume
# proportional to $\epsilon^{k/2} / \sqrt{\det H}$, so with a constant $c$
#
# $$ w(B_\epsilon) \approx c\, \epsilon^{k/2}, \qquad \epsilon^\star = \frac{k}{2n}, \qquad
# R \approx \frac{k}{2n} \log n + O(1/n) . \tag{5} $$
#
# The parameter count comes back, as the price of a truth in *general* position. But a class can hold other truths. Let five
# parameters $a, b_1, \dots, b_4$ set the logits $a b_1, \dots, a b_4$ of four coins. The truth "all four are fair" is met by
# all of $a = 0$. Its ball only asks that $|a|$ be small:
#
# $$ w(B_\epsilon) \approx c\, \epsilon^{\ell}, \quad \ell = \tfrac12 \text{ instead of } \tfrac k2 = 2, \qquad
# R \approx \frac{\ell}{n} \log n . \tag{6} $$
#
# The exponent $\ell$ is known as the learning coefficient. The same class learns one truth four times as fast as another.
# Measure both exponents by sampling the prior:

# %%
prior_a, prior_b = torch.randn(400_000, 1), torch.randn(400_000, 4)
model_coins = torch.sigmoid(prior_a * prior_b)
radii = torch.logspace(-2, -0.5, 10)
slopes = {}
figure, axes = plt.subplots(figsize=(6.5, 3.2))
for name, logits in {
    "all four fair": torch.zeros(4),
    "general": torch.tensor([1.0, -0.7, 0.8, -1.2]),
}.items():
    kl = coin_kl(torch.sigmoid(logits), model_coins).sum(1)
    weights = [(kl <= radius).double().mean().item() for radius in radii]
    slopes[name] = np.polyfit(radii.log().numpy(), np.log(weights), 1)[0]
    axes.loglog(radii, weights, "o-", label=f"truth: {name}")
    print(f"{name:14} log w(B) grows like {about(slopes[name], 2)} log eps")
axes.set(
    title="One class, two truths: their weights differ by their exponent",
    xlabel=r"radius $\epsilon$ (nats)",
    ylabel=r"prior weight $w(B_\epsilon)$",
)
axes.legend()
plt.show()
assert abs(slopes["all four fair"] - 0.5) < 0.15 and abs(slopes["general"] - 2) < 0.3

# %% [markdown]
# The upper line falls like a square root, the lower one like a square. Over-parametrised networks are full of such
# truths: any function that a small part of the network can express leaves the rest free.
#
# ### No learner does better on average
#
# Draw the truth from the prior. For any learner $Q'$ with a distribution over sequences,
#
# $$ \int w(\theta)\, D(P_\theta^n \| Q') \, d\theta = \int w(\theta)\, D(P_\theta^n \| Q^n)\, d\theta + D(Q^n \| Q') , \tag{7} $$
#
# because the two sides differ by $\int w\, \mathbb E_{P_\theta} \log (Q^n/Q')$, and the average of $P_\theta$ is $Q^n$. So the
# mixture is the best learner **when the truth comes from the prior**. Remember the condition; the experiment will
# violate it. The cell checks (7) with the learner of Laplace as $Q'$.

# %%
log_laplace = torch.tensor(
    [-math.log(n + 1) - math.log(math.comb(n, int(k))) for k in ones[:, 0]]
).double()


def average_regret(log_q):
    gaps = log_likelihood - log_q[:, None]
    return (log_prior.exp() * (log_likelihood.exp() * gaps).sum(0)).sum()


surplus = (log_mixture.exp() * (log_mixture - log_laplace)).sum()
assert torch.isclose(average_regret(log_laplace), average_regret(log_mixture) + surplus)
assert surplus > 0

# %% [markdown]
# ### Who wins the posterior
#
# After $n$ symbols the expected log odds between the ball and a model $\theta$ at divergence $D_\theta$ are at least
#
# $$ \log \frac{w(B_\epsilon)}{w(\theta)} + n\,(D_\theta - \epsilon) , \tag{8} $$
#
# the log ratio of the weights plus $n$ times the difference of the divergences. Two truths that explain the data equally well
# are told apart by their weight alone, and then the flat one wins. By (5) the weight of a quadratic minimum is
# $-\log w(B_\epsilon) = \frac12 \log\det H + \text{const}$: **flat means heavy**.
#
# ### Langevin dynamics samples the posterior
#
# Nobody can integrate over a network's parameters. But the noisy gradient descent
#
# $$ \theta \leftarrow \theta - r\, \nabla U(\theta) + \sqrt{2 r}\; \xi, \quad \xi \sim N(0, I), \qquad
# U(\theta) = -\log P_\theta(S) - \log w(\theta) \tag{9} $$
#
# has, for small $r$, the stationary law $e^{-U} \propto w(\theta) P_\theta(S)$, which is the posterior: the Fokker-Planck
# equation $\partial_t p = \nabla \cdot (p \nabla U + \nabla p)$ of (9) vanishes at $p = e^{-U}$, where
# $\nabla p = -p \nabla U$ {cite:p}`welling2011sgld`. Two traps live in this line. $P_\theta(S)$ is a product, so $U$ holds the
# *sum* of the losses; with the mean the temperature is $n$ times too high. And without $\xi$ it is gradient descent, which
# finds a minimum and stays.
#
# Both facts show in one dimension: two minima of equal depth, one four times as wide. 4000 walkers start in the narrow one.


# %%
def double_well(t):
    wide, narrow = (t + 1.2).square() / 2, (t - 1.2).square() * 16 / 2
    return -torch.logaddexp(-wide, -narrow)


class Walkers(nn.Module):
    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.full((4000,), 1.2))


shares = {}
for temperature in (0.0, 1.0):
    (state,) = sgld(
        Walkers(), lambda model, _: double_well(model.t).sum(), (torch.zeros(1),),
        step=0.02, num_samples=1, burn_in=1500, temperature=temperature, seed=seed, progress=False,
    )  # fmt: skip
    shares[temperature] = (state["t"] < 0.72).double().mean().item()
grid = torch.linspace(-8, 8, 20001).double()
density = torch.exp(-double_well(grid))
by_integral = (density[grid < 0.72].sum() / density.sum()).item()
print(f"share in the wide minimum: without noise {shares[0.0]:.2f}, ", end="")
print(f"Langevin {about(shares[1.0], 2)}, by integration {about(by_integral, 2)}")
assert shares[0.0] == 0 and abs(shares[1.0] - by_integral) < 0.04

# %% [markdown]
# Equal depth, and four fifths of the posterior in the flat well. The learner (1) averages the *probabilities* of samples
# of (9). Averaging their logits, or their weights, is another learner.
#
# ### A class with an exact mixture: context trees
#
# In the problem above the model was a tree: the leaves are contexts, each with its own coin. Let a tree $S$ with $|S|$ leaves
# have the prior $2^{-(2|S|-1)}$ (one bit for every node, "stop" or "split"; nodes at the full depth need no bit), and each
# leaf the Beta$(\frac12, \frac12)$ prior, whose predictive rule is (ones $+ \frac12$)/(count $+ 1$)
# {cite:p}`krichevsky1981performance`. The number of trees is doubly exponential in the depth, but their mixture obeys a
# recursion {cite:p}`willems1995context`: with $P_e(s)$ the probability that the coin rule gives to all bits seen in
# context $s$,
#
# $$ P_w(s) = \tfrac12 P_e(s) + \tfrac12 P_w(0s)\, P_w(1s), \qquad P_w(s) = P_e(s) \text{ at full depth}, \tag{10} $$
#
# and $Q = P_w(\text{root})$. Each bit changes one path, $O(\text{depth})$ numbers. The coin rule costs at most
# $\frac12 \log m + \log 2$ nats on $m$ bits, and concavity of the logarithm spreads $n$ bits evenly over the leaves at worst, so for
# **every** sequence and every tree source
#
# $$ \log \frac{P_0(x^n)}{Q(x^n)} \;\le\; \log 2 \cdot \Big[ (2|S| - 1) + \frac{|S|}{2} \log_2 \frac{n}{|S|} + |S| \Big], \tag{11} $$
#
# whatever the depth (for $n \ge |S|$). The first term is $\log 1/w(S)$ of (3), the rest is (5) with $k = |S|$.

# %% [markdown]
# ## Reference implementation
#
# The bound (4) for a class of finitely many models.

# %% tags=["reference"]
import torch


def regret_bound(log_prior, kl, n):
    """inf over eps of eps + log(1 / w(B_eps)) / n, in nats per symbol; log_prior and kl of shape (models,)."""
    candidates = [eps - torch.logsumexp(log_prior[kl <= eps], 0) / n for eps in kl]
    return min(candidates).item()


# %% [markdown]
# The mixture over all context trees, by recursion (10), as plainly as it can be written.

# %% tags=["reference"]
import math


def context_tree_log_prob(bits, depth):
    """Natural log of the probability of `bits` under the mixture of all context trees; zeros come before them."""
    past = [0] * depth + list(bits)

    def weighted(context):  # newest bit first
        here = [
            past[i]
            for i in range(depth, len(past))
            if tuple(past[i - 1 - j] for j in range(len(context))) == context
        ]
        if not here:
            return 0.0
        counts, estimate = [0.5, 0.5], 0.0
        for bit in here:
            estimate += math.log(counts[bit] / sum(counts))
            counts[bit] += 1
        if len(context) == depth:
            return estimate
        split = weighted((*context, 0)) + weighted((*context, 1))
        high, low = max(estimate, split), min(estimate, split)
        return high + math.log1p(math.exp(low - high)) - math.log(2)

    return weighted(())


# %% [markdown]
# And one step of Langevin dynamics (9).

# %% tags=["reference"]
import torch


def langevin_step(parameters, negative_log_posterior, step):
    """Move a list of tensors; `negative_log_posterior()` is a SUM over the examples, minus the log prior."""
    gradients = torch.autograd.grad(negative_log_posterior(), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            noise = torch.randn_like(parameter)
            parameter += -step * gradient + (2 * step) ** 0.5 * noise


# %% [markdown]
# By hand. Two models at divergences 0 and 1 with weights $\frac14, \frac34$ and $n = 1$: the radius 0 gives $\log 4$, the
# radius 1 gives $1 + \log 1$, so the bound is 1. One bit "1" at depth one: both the root's coin and the leaf's give it
# $\frac12$. Two bits "11" after a zero: the root's coin gives $\frac12 \cdot \frac34 = \frac38$, the two leaves give
# $\frac12 \cdot \frac12$, together $\frac12 (\frac38 + \frac14) = \frac5{16}$.

# %%
two_models = torch.tensor([0.25, 0.75]).log(), torch.tensor([0.0, 1.0])
assert abs(regret_bound(*two_models, n=1) - 1) < 1e-6
assert math.isclose(context_tree_log_prob([1], 1), math.log(1 / 2))
assert math.isclose(context_tree_log_prob([1, 1], 1), math.log(5 / 16))
walkers = [torch.zeros(20_000, requires_grad=True)]
for _ in range(60):
    langevin_step(walkers, lambda: 2 * walkers[0].square().sum(), step=0.1)
# one step maps the variance v to (1 - 4 r)^2 v + 2 r, whose fixed point is 0.3125 at r = 0.1
assert abs(walkers[0].var().item() - 0.3125) < 0.02

# %% [markdown]
# ## The library
#
# `lib.models.ContextTreeWeighting` stores at each node only the odds between stopping and splitting, so that a bit costs
# seventeen small updates at depth sixteen, where the recursion above would look at every node again.
# `lib.information.universality_bound` sorts once. `lib.train.sgld` takes mini-batches, a prior and a temperature, and draws
# its noise from its own generator. They agree with the reference:

# %%
sample = bits[:60]
for depth in range(4):
    learner = ContextTreeWeighting(depth)
    chances = []
    for bit in sample:
        chances.append(learner.prob() if bit else 1 - learner.prob())
        learner.update(bit)
    assert math.isclose(learner.log_evidence, context_tree_log_prob(sample, depth))
    assert math.isclose(learner.log_evidence, sum(map(math.log, chances)))
kl = coin_kl(0.3, thetas)
for n in (1, 30, 1000):
    reference = regret_bound(log_prior, kl, n)
    assert math.isclose(universality_bound(log_prior, kl, n)[0], reference)

mine = nn.Linear(3, 1).double()
theirs = copy.deepcopy(mine)
inputs, outputs = torch.randn(8, 3).double(), torch.randn(8, 1).double()


def half_square(model, x, y):
    return (model(x) - y).square().mean() / 2


sgld(
    mine, half_square, (inputs, outputs), step=1e-3, num_samples=1, prior_precision=2.0,
    temperature=0, progress=False,
)  # fmt: skip
posterior = 8 * half_square(theirs, inputs, outputs)
posterior = posterior + sum(p.square().sum() for p in theirs.parameters())
for p, g in zip(
    theirs.parameters(),
    torch.autograd.grad(posterior, tuple(theirs.parameters())),
    strict=True,
):
    p.data -= 1e-3 * g
assert torch.allclose(mine.weight, theirs.weight)
try:
    universality_bound(log_prior, kl[:5], 10)
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# ## Experiment
#
# ### Coins: the exact regret against the bound
#
# With a uniform prior on $[0, 1]$ the mixture is $Q(x^n) = 1 / \big((n+1) \binom nk\big)$ for $k$ ones, so the regret is a sum
# over $k$. For the bound, cut the interval into 4000 cells and give each the *larger* divergence of its two ends. The
# divergence is convex, so this only makes the ball smaller and the bound safe.

# %%
lengths = [10, 30, 100, 300, 1000]
edges = torch.linspace(0, 1, 4001).double()
coin_table = []
for truth in (0.5, 0.1, 0.02):
    at_edges = coin_kl(truth, edges)
    kl = torch.maximum(at_edges[1:], at_edges[:-1])
    for n in lengths:
        k = torch.arange(n + 1).double()
        log_choose = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
        log_p0 = k * math.log(truth) + (n - k) * math.log(1 - truth)
        log_q = -math.log(n + 1) - log_choose
        regret = ((log_choose + log_p0).exp() * (log_p0 - log_q)).sum().item()
        uniform = torch.full_like(kl, -math.log(4000))
        bound, radius = universality_bound(uniform, kl, n)
        coin_table.append((truth, n, regret, n * bound, radius))
learner = BernoulliMixture()
for bit in (1, 0, 1, 1):
    learner.update(bit)
assert math.isclose(learner.log_evidence, -math.log(5 * math.comb(4, 3)))
coin_table = np.array(coin_table)

# %% [markdown]
# ### Trees: the over-parametrised learner that does not mind
#
# Sources with 2, 4 and 16 leaves, grown by splitting random leaves; the chance of a one alternates between siblings.
# Four learners: the mixture over all trees to depth 16; the counting rule on the *true* tree, which knows everything but
# the coins; counting at depth 16; counting at the best depth in hindsight, which nobody can know.


# %%
def grow_tree(leaves, rng):
    tree = [()]
    while len(tree) < leaves:
        split = tree.pop(rng.integers(len(tree)))
        tree += [(*split, 0), (*split, 1)]
    return {leaf: 0.85 if sum(leaf) % 2 else 0.1 for leaf in tree}


def count_on_tree(bits, tree):
    counts, past, total = {leaf: [0.5, 0.5] for leaf in tree}, [0] * 16, []
    for bit in bits:
        leaf = ()
        while leaf not in tree:
            leaf = (*leaf, past[-len(leaf) - 1])
        total.append(math.log(counts[leaf][bit] / sum(counts[leaf])))
        counts[leaf][bit] += 1
        past.append(bit)
    return np.array(total)


n_bits, repeats = {"ci": (8000, 5), "full": (100_000, 20)}[scale]
marks = [200, 1000, n_bits]
learners = ("all trees (CTW)", "true tree", "depth 16", "best depth")
tree_regret = {leaves: np.zeros((repeats, 4, 3)) for leaves in (2, 4, 16)}
tree_bound_broken = 0
for leaves, repeat in tqdm(list(itertools.product(tree_regret, range(repeats)))):
    tree = grow_tree(leaves, rng)
    bits, log_truth = draw(tree, n_bits, rng)
    log_truth = log_truth.cumsum()
    learner, evidence = ContextTreeWeighting(16), np.empty(n_bits)
    for i, bit in enumerate(bits):
        learner.update(bit)
        evidence[i] = learner.log_evidence
    lengths_seen = np.arange(1, n_bits + 1)
    allowed = 2 * leaves - 1 + leaves / 2 * np.log2(lengths_seen / leaves) + leaves
    broken = (log_truth - evidence > math.log(2) * allowed)[leaves:]
    tree_bound_broken += int(broken.any())
    counted = [count_and_predict(bits, d).cumsum() for d in (0, 1, 2, 3, 4, 6, 8, 16)]
    curves = (evidence, count_on_tree(bits, tree).cumsum(), counted[-1])
    curves += (max(counted, key=lambda curve: curve[-1]),)
    for row, curve in enumerate(curves):
        tree_regret[leaves][repeat, row] = [(log_truth - curve)[m - 1] for m in marks]
print(f"{'regret in nats after':22}" + "".join(f"{m:>16}" for m in marks))
for leaves, table in tree_regret.items():
    for name, row in zip(learners, table.mean(0), strict=True):
        cells = "".join(f"{about(value, 3):>16}" for value in row)
        print(f"{leaves:2} leaves, {name:15}" + cells)

# %% [markdown]
# The mixture pays a constant more than the learner that was given the tree: the price of finding the tree, which does not
# grow with $n$. Counting at depth 16 pays and pays. The best single depth does as well as the mixture only while the true
# tree is itself of one depth; for sixteen leaves at different depths it has to buy all of the deepest level.
#
# Do real bits behave? English text in seven bits a character, 8400 bits of it. There is no known truth now, so compare code
# lengths.

# %%
text_bits = [int(b) for c in english_text()[:1200] for b in f"{ord(c) % 128:07b}"]
text_ctw = -ContextTreeWeighting(16).fit(text_bits).log_evidence
text_counted = [-count_and_predict(text_bits, depth).sum() for depth in depths]
best_depth = int(np.argmin(text_counted))
per_character = 1200 * math.log(2)
print(f"all trees to depth 16: {about(text_ctw / per_character)} bits a character")
for depth in (0, best_depth, 16):
    print(
        f"counting at depth {depth:2}: {about(text_counted[depth] / per_character)} bits a character"
    )

# %% [markdown]
# On text, too, the mixture beats each of the seventeen fixed depths, the best of them included.
#
# ### Boolean functions: the weight of a network's functions
#
# Now a network. Four inputs of $\pm 1$, one hidden layer of twelve tanh units, one output whose sign is a boolean function
# of four bits; 73 parameters, all drawn from a standard normal prior. There are 65 536 functions. Draw networks, and
# count how often each function appears: that is its weight $w$. Labels are flipped with probability 0.05, so the model
# of a function is a distribution, and the mixture over functions is exact. Functions seen fewer than 10 times are left out of the
# test as truths: their weight is too uncertain (a count $m$ has a relative standard error of $1/\sqrt m$). They stay in the
# mixture.

# %%
num_bits, draws, floor = {"ci": (4, 300_000, 10), "full": (4, 100_000_000, 100)}[scale]
corners = torch.tensor(list(itertools.product((1.0, -1.0), repeat=num_bits)))
powers = 2 ** torch.arange(len(corners))
flip = 0.05


def function_counts(width, draws, seed):
    """How often random tanh networks of one hidden layer compute each boolean function."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(2 ** len(corners), dtype=torch.long)
    chunk = 240_000 // width
    for start in tqdm(range(0, draws, chunk), desc="drawing networks", leave=False):
        m = min(chunk, draws - start)
        first, bias = (
            torch.randn(m, rows, width, generator=generator) for rows in (num_bits, 1)
        )
        second = torch.randn(m, width, 1, generator=generator)
        last = torch.randn(m, 1, generator=generator)
        output = (torch.tanh(corners @ first + bias) @ second)[..., 0] + last
        counts += torch.bincount(((output > 0) * powers).sum(1), minlength=len(counts))
    return counts


tables = ((torch.arange(2 ** len(corners))[:, None] // powers) % 2).double()


def noisy_regret(log_prior, truths, n, repeats, seed):
    """Online and supervised regret (nats), each (truths, repeats), of the mixture over all functions with weight."""
    generator = torch.Generator().manual_seed(seed)
    live = log_prior.isfinite()
    functions = tables[live]
    x = torch.randint(len(corners), (len(truths), repeats, n), generator=generator)
    clean = tables[truths][torch.arange(len(truths))[:, None, None], x]
    flipped = torch.rand(clean.shape, generator=generator) < flip
    label = torch.where(flipped, 1 - clean, clean)
    zero = torch.zeros(len(truths), repeats, len(corners)).double()
    ones_seen = zero.scatter_add(2, x, label)
    zeros_seen = zero.scatter_add(2, x, 1 - label)
    chance = functions * (1 - flip) + (1 - functions) * flip  # of a one, per corner
    mixture = FiniteMixture(log_prior[live].expand(len(truths), repeats, -1))
    mixture.update(ones_seen @ chance.log().T + zeros_seen @ (1 - chance).log().T)
    log_truth = torch.where(flipped, math.log(flip), math.log(1 - flip)).double()
    predicted = mixture.log_posterior.exp() @ chance
    truth = tables[truths] * (1 - flip) + (1 - tables[truths]) * flip
    supervised = coin_kl(truth[:, None], predicted).mean(-1)
    return log_truth.sum(-1) - mixture.log_evidence, supervised


counts = function_counts(12, draws, seed)
log_weight = counts.double().log() - math.log(draws)
testable = (counts >= floor).nonzero()[:, 0]
sizes = -log_weight[testable]
levels = torch.linspace(sizes.min(), sizes.max(), 24).double()
ranked = testable[sizes.argsort()]
positions = torch.searchsorted(sizes.sort().values, levels).clamp_max(len(ranked) - 1)
truths = ranked[positions.unique()]
online, supervised = noisy_regret(log_weight, truths, 32, 20, seed)
price = -log_weight[truths]
print(
    f"functions seen: {about(int((counts > 0).sum()), 2)}, often enough to test: {about(len(testable), 2)}"
)
correlations = {
    name: spearmanr(price, regret.mean(1))[0]
    for name, regret in {"online": online, "supervised": supervised}.items()
}
for name, value in correlations.items():
    print(f"{name}: rank correlation of regret with -log w {about(value, 2)}")

# %% [markdown]
# Two controls. First, a network with 601
# parameters instead of 73. Second, the uniform prior over all 65 536 functions, for which no function is simple.

# %%
wide_draws = draws // 5
wide_log_weight = function_counts(100, wide_draws, seed + 1).double().log()
simplest = truths[:6]
wide_online, _ = noisy_regret(wide_log_weight, simplest, 32, 20, seed)
flat_online, _ = noisy_regret(torch.zeros(len(counts)).double(), simplest, 32, 20, seed)
for name, regret in {
    "73 parameters": online[:6],
    "601 parameters": wide_online,
    "uniform over functions": flat_online,
}.items():
    print(f"{name:23} regret on the six simplest {about(regret.mean().item(), 2)} nats")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
for truth in np.unique(coin_table[:, 0])[::-1]:
    rows = coin_table[coin_table[:, 0] == truth]
    (line,) = axes[0].semilogx(rows[:, 1], rows[:, 2], "o-", label=f"coin {truth:g}")
    axes[0].semilogx(rows[:, 1], rows[:, 3], "--", color=line.get_color())
axes[0].set(
    title="Coins: regret and bound (dashed)",
    xlabel="number of bits $n$",
    ylabel="total regret (nats)",
)
axes[0].legend()
error = online.std(1) / online.shape[1] ** 0.5
axes[1].errorbar(price, online.mean(1), error, fmt="o", ms=4, label="73 parameters")
axes[1].plot(price[:6], flat_online.mean(1), "s", ms=4, label="uniform prior")
line = torch.tensor([float(price.min()) - 0.3, float(price.max()) + 0.3])
axes[1].plot(line, line, "--", color="0.4", label=r"bound $\log\,1/w$")
axes[1].set(
    title="Boolean functions: regret after 32 labels",
    xlabel=r"$-\log w$ of the true function (nats)",
    ylabel="total regret (nats)",
)
axes[1].legend()
plt.show()

# %% [markdown]
# Left, the coins: each doubling of $n$ costs the same, half a nat per factor $e$, and the dashed bound is a constant above.
# Right, the network: each point is one true function, with its standard error over twenty data sets. The regret follows the
# weight, below the dashed bound, from the constant functions at the left to rare ones at the right. Under the
# uniform prior (squares) the simple functions cost as much as any. What makes them cheap is that many
# parameters express them {cite:p}`valleperez2019deep`, and more parameters do not change that.
#
# ### A real network by Langevin sampling
#
# Twenty thousand parameters, 300 images of digits. The prior is standard normal after scaling each layer by
# $3/\sqrt{\text{inputs}}$. Start the sampler at a draw from the prior, walk 500 steps, then keep every 75th
# state, twenty in all. Rivals: the mean of the single samples; empirical risk minimisation (ERM) on the same network, by Adam,
# run to the end and stopped where 300 further images say so.
#
# Two sets of labels: **teacher** labels are drawn from a random network of the same prior, so the truth lies in the class,
# as (7) demands. **Real** labels are the digits.


# %%
class ScaledLinear(nn.Module):
    """A linear layer whose parameters are standard normal under the prior."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        scaled = self.weight * (3 / self.weight.shape[1] ** 0.5)
        return F.linear(x, scaled, 0.1 * self.bias)


def network():
    layers = [ScaledLinear(64, 160), nn.ReLU(), ScaledLinear(160, 56), nn.ReLU()]
    return nn.Sequential(*layers, ScaledLinear(56, 10))


def mean_nll(model, x, y):
    return F.cross_entropy(model(x), y)


def test_loss(model, x, y):
    with torch.no_grad():
        return mean_nll(model, x, y).item()


(x, y), (x_stop, y_stop), (x_free, _), (x_test, y_test) = digits(
    (300, 300, 600, 597), seed=seed, flat=True
)
chain = {"ci": dict(burn_in=500, thin=75), "full": dict(burn_in=20_000, thin=2000)}


def compare(y, y_stop, y_test):
    """Test log-losses of the learners on one set of labels, and the sampled states."""
    losses = {}
    erm = network()
    stops = []

    def record(model, _):
        stops.append(
            (test_loss(model, x_stop, y_stop), test_loss(model, x_test, y_test))
        )

    fit(
        erm, mean_nll, (x, y), optimizer=torch.optim.Adam(erm.parameters(), lr=1e-2),
        epochs=400, batch_size=300, seed=seed, callbacks=(record,), progress=False,
    )  # fmt: skip
    losses["ERM to the end"], losses["ERM stopped early"] = stops[-1][1], min(stops)[1]
    states = sgld(
        network(), mean_nll, (x, y), step=2e-3, num_samples=20, prior_precision=1.0,
        seed=seed, progress=False, **chain[scale],
    )  # fmt: skip
    with torch.no_grad():
        members = torch.stack(
            [torch.func.functional_call(net, s, (x_test,)) for s in states]
        ).log_softmax(-1)
    net_mean = {
        name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]
    }
    losses["mean of single samples"] = F.nll_loss(
        members.flatten(0, 1), y_test.repeat(len(states))
    ).item()
    mixed = posterior_predictive(net, states, x_test)
    losses["mixture of 20 samples"] = F.nll_loss(mixed, y_test).item()
    losses["mean of their logits"] = F.cross_entropy(members.mean(0), y_test).item()
    with torch.no_grad():
        averaged = torch.func.functional_call(net, net_mean, (x_test,))
    losses["mean of their weights"] = F.cross_entropy(averaged, y_test).item()
    return losses, states


net = network()
teacher = network()
with torch.no_grad():
    drawn = [
        torch.distributions.Categorical(logits=teacher(part)).sample()
        for part in (x, x_stop, x_test)
    ]
    truth_loss = F.cross_entropy(teacher(x_test), drawn[2]).item()
taught, taught_states = compare(*drawn)
real, _ = compare(y, y_stop, y_test)
print(f"{'test log-loss (nats)':25}{'teacher':>12}{'real':>12}")
for name in taught:
    print(f"{name:25}{about(taught[name]):>12}{about(real[name]):>12}")
print(f"{'the teacher itself':25}{about(truth_loss):>12}")

# %% [markdown]
# The left column is the theory at work: the mixture is better than its members, than both forms of ERM, and than the average of
# logits or of weights. The right column is not. With real labels the mixture still beats its members (it must: log-loss is
# convex), but it gains nothing on ERM, and an average of *logits*, which has no theory here, beats it clearly. Nothing is wrong
# with the sampler. A clean digit leaves little doubt, and a network drawn from this prior has much, so the truth
# has little weight: the mixture is honest about a prior that does not fit. Sharpening its predictions helps, which is known as
# the cold posterior effect {cite:p}`wenzel2020cold`.
#
# ### Distillation
#
# The mixture is twenty networks. Distillation fits *one* network to its predictions, on images without labels. Give a
# fresh network the 900 images that are not for testing and the mixture's probabilities on them (teacher labels again).

# %%
unlabelled = torch.cat([x, x_stop, x_free])
soft = posterior_predictive(net, taught_states, unlabelled).exp()
student = network()
fit(
    student, mean_nll, (unlabelled, soft), optimizer=torch.optim.Adam(student.parameters(), lr=1e-2),
    epochs=25, batch_size=100, seed=seed, progress=False,
)  # fmt: skip
taught["distilled student"] = test_loss(student, x_test, drawn[2])
with torch.no_grad():
    mixed = posterior_predictive(net, taught_states, x_test)
    gap = (mixed.exp() * (mixed - student(x_test).log_softmax(-1))).sum(1).mean()
print(f"student {about(taught['distilled student'])}, ", end="")
print(f"divergence from the mixture {about(gap.item(), 2)} nats")

figure, axes = plt.subplots(figsize=(7.5, 3.2))
names = list(taught)
rows = np.arange(len(names))
axes.barh(rows - 0.2, [taught[name] for name in names], 0.4, label="teacher labels")
axes.barh(rows + 0.2, [real.get(name, 0) for name in names], 0.4, label="real labels")
axes.axvline(truth_loss, color="C0", ls=":", label="the teacher itself")
axes.set_yticks(rows, names)
axes.invert_yaxis()
axes.set(
    title="Mixing helps where the truth is in the class",
    xlabel="test log-loss (nats)",
)
axes.legend()
plt.show()

# %% [markdown]
# The student, one network, keeps most of what the mixture knows.

# %% [markdown]
# ## Claims

# %%
broken = int((coin_table[:, 2] > coin_table[:, 3]).sum())
broken += tree_bound_broken + int((online > price[:, None] + 1e-9).sum())
growth = wide_online.mean().item() - online[:6].mean().item()
ledger.claim(
    "Regret is governed by the prior weight of the models near the truth, not by the size of the class",
    paper="theorem",
    measured=f"rank correlation of regret and -log w {about(correlations['online'], 2)}; eight times the parameters "
    f"add {about(growth, 2)} nats, a uniform prior {about((flat_online.mean() - online[:6].mean()).item(), 2)}",
    checks={
        "the bound is never broken: coins, trees, functions": broken == 0,
        "coins: the bound is within 2 nats of the exact regret": bool(
            (coin_table[:, 3] - coin_table[:, 2] < 2).all()
        ),
        "functions: rank correlation of online regret with -log w >= 0.8": correlations[
            "online"
        ]
        >= 0.8,
        "eight times the parameters add less than 1.5 nats on the six simplest functions": growth
        < 1.5,
        "a uniform prior over functions adds more than 2 nats on them": (
            flat_online.mean() - online[:6].mean()
        ).item()
        > 2,
    },
)

# %%
ratio = {
    leaves: table.mean(0)[:, -1] / table.mean(0)[1, -1]
    for leaves, table in tree_regret.items()
}
ledger.claim(
    "An over-parametrised class learns simple truths fast: simple means large weight means few samples",
    paper="follows from the theorem",
    measured=f"two leaves among 65 536: {about(ratio[2][0], 3)} times the regret of the true tree, counting at depth 16 "
    f"{about(ratio[2][2], 2)} times; text {about(text_ctw / per_character)} bits a character against "
    f"{about(text_counted[best_depth] / per_character)} at the best fixed depth",
    checks={
        "two leaves: all trees <= 1.5 x the regret of the true tree": ratio[2][0]
        <= 1.5,
        "two leaves: counting at depth 16 >= 5 x": ratio[2][2] >= 5,
        "16 leaves: all trees below the best single depth": ratio[16][0] < ratio[16][3],
        "mean regret grows with the number of leaves": (
            np.diff([table.mean(0)[0, -1] for table in tree_regret.values()]) > 0
        ).all(),
        "text: all trees below every fixed depth": text_ctw < min(text_counted),
        "exponent of the weight: 0.5 at the simple truth, 2 at a general one, within 0.3": abs(
            slopes["all four fair"] - 0.5
        )
        < 0.3
        and abs(slopes["general"] - 2) < 0.3,
    },
)

# %%
ledger.claim(
    "Langevin sampling and averaging approximate the mixture, and the mixture beats training to the minimum",
    paper="stated, not measured",
    measured=f"teacher labels: mixture {about(taught['mixture of 20 samples'])}, ERM "
    f"{about(taught['ERM to the end'])} (stopped early {about(taught['ERM stopped early'])}); real digits: "
    f"{about(real['mixture of 20 samples'])} against {about(real['ERM to the end'])}",
    checks={
        "teacher labels: mixture <= ERM - 0.3 nat": taught["mixture of 20 samples"]
        <= taught["ERM to the end"] - 0.3,
        "teacher labels: mixture <= ERM stopped early - 0.05": taught[
            "mixture of 20 samples"
        ]
        <= taught["ERM stopped early"] - 0.05,
        "teacher labels: mixture <= mean of single samples - 0.1": taught[
            "mixture of 20 samples"
        ]
        <= taught["mean of single samples"] - 0.1,
        "teacher labels: probabilities averaged, not logits": taught[
            "mixture of 20 samples"
        ]
        <= taught["mean of their logits"],
        "real digits: mixture <= mean of single samples - 0.1": real[
            "mixture of 20 samples"
        ]
        <= real["mean of single samples"] - 0.1,
        "real digits: mixture <= ERM stopped early - 0.05": real[
            "mixture of 20 samples"
        ]
        <= real["ERM stopped early"] - 0.05,
        "real digits: probabilities averaged, not logits": real["mixture of 20 samples"]
        <= real["mean of their logits"],
    },
    fails={
        "real digits: mixture <= ERM stopped early - 0.05": "Clean labels are more certain than networks of this prior, "
        "so the truth has little weight.",
        "real digits: probabilities averaged, not logits": "The average of logits is a sharper prediction, and "
        "sharper is better where the prior is too unsure.",
    },
)

# %%
ledger.claim(
    "Flat minima weigh more, and distillation keeps the mixture in one network",
    paper="stated, not measured",
    measured=f"share of the flat minimum {about(shares[1.0], 2)} (integral {about(by_integral, 2)}); student "
    f"{about(taught['distilled student'])} against mixture {about(taught['mixture of 20 samples'])} and ERM "
    f"{about(taught['ERM to the end'])}",
    checks={
        "two minima of equal depth: shares within 0.04 of the integral": abs(
            shares[1.0] - by_integral
        )
        < 0.04,
        "the student closes two thirds of the gap from ERM to the mixture": (
            taught["ERM to the end"] - taught["distilled student"]
        )
        >= 2 / 3 * (taught["ERM to the end"] - taught["mixture of 20 samples"]),
    },
)

# %%
ledger.claim(
    "The bound speaks about online, batch and supervised learning alike",
    paper="theorem",
    measured=f"supervised regret after 32 labels {about(supervised.mean(1)[0].item(), 2)} to "
    f"{about(supervised.mean(1)[-1].item(), 2)} nats, rank correlation {about(correlations['supervised'], 2)}",
    checks={
        "functions: rank correlation of supervised regret with -log w >= 0.6": correlations[
            "supervised"
        ]
        >= 0.6,
    },
)

# %%
ledger

# %% [markdown]
# ## What is different from the paper
#
# The paper is theory; it has no experiments. All of those here are ours: the weight of boolean functions follows an idea of
# {cite:t}`valleperez2019deep`, context tree weighting is a classic of universal coding. The paper speaks of a nearly uniform
# prior over parameters; a network's parameters have no uniform law, so this chapter takes normal ones and shows with the
# uniform prior over *functions* that the two are far apart. Twenty samples from one short chain are a rough picture of a
# posterior of twenty thousand dimensions. `scale="full"` draws $10^8$ networks, takes 100 000 bits a source with twenty
# repetitions, and runs the chain forty times longer.

# %% [markdown]
# ## Exercises
#
# **1.** A class of $M$ models has a truth of weight $\frac12$; the other half of the weight is spread over the others. Write
# `samples_needed(weight, regret)`, the number of symbols after which the bound with $\epsilon = 0$ promises at most `regret`
# nats per symbol. Does $M$ enter?


# %% tags=["exercise"]
def check_1(answer):
    assert math.isclose(answer(0.5, 0.01), math.log(2) / 0.01), "log(1/w) / n = regret"
    assert math.isclose(answer(1e-6, 0.5), math.log(1e6) / 0.5)


# %% tags=["solution", "hide-cell"]
def samples_needed(weight, regret):
    return math.log(1 / weight) / regret


check_1(samples_needed)

# %% [markdown]
# **2.** The bound uses the largest divergence in the ball. By convexity the *average* divergence over the ball, with the
# renormalised weights, will do as well, and is smaller. Write `averaged_bound(log_prior, kl, n)` with it.


# %% tags=["exercise"]
def check_2(answer):
    prior = torch.tensor([0.1, 0.2, 0.7]).double().log()
    divergences = torch.tensor([0.0, 0.5, 2.0]).double()
    assert abs(answer(prior, divergences, 1) - 1.5) < 1e-6, "the ball of all three"
    assert abs(answer(prior, divergences, 100) - math.log(10) / 100) < 1e-6
    many = coin_kl(0.3, thetas)
    assert answer(log_prior, many, 20) < universality_bound(log_prior, many, 20)[0]


# %% tags=["solution", "hide-cell"]
def averaged_bound(log_prior, kl, n):
    values = []
    for eps in kl:
        inside = kl <= eps
        log_ball = log_prior[inside].logsumexp(0)
        weights = (log_prior[inside] - log_ball).exp()
        values.append((weights * kl[inside]).sum() - log_ball / n)
    return min(values).item()


check_2(averaged_bound)

# %% [markdown]
# **3.** Somebody samples with the gradient of the *mean* loss in place of the sum, with $n = 300$ examples. Which posterior
# do the samples follow? Give `temperature(n)`, in the sense of `lib.train.sgld`.


# %% tags=["exercise"]
def check_3(answer):
    assert answer(300) == 300 and answer(7) == 7, (
        "the log likelihood is divided by n: exp(-U/T)"
    )


# %% tags=["solution", "hide-cell"]
def temperature_of_mean_loss(n):
    return n


check_3(temperature_of_mean_loss)

# %% [markdown]
# ## Summary
#
# - Dropping models from a mixture only lowers it. From this alone, the regret is at most
#   $\epsilon + \frac1n \log \frac1{w(B_\epsilon)}$: the weight near the truth counts, not the number of models.
# - Simple truths are those that many parameters express. One class learns them with few samples and others with many.
# - Context tree weighting is the exact mixture over doubly exponentially many trees, at the price of seventeen updates a bit.
# - Langevin sampling and averaging probabilities approximate the mixture of a network. It is the best learner when the truth is
#   drawn from the prior; with real digits it gains nothing on plain training, because the prior does not fit.
#
# **Further reading.** {cite:t}`merhav1998universal` is the survey of universal prediction on which the argument stands;
# {cite:t}`wenzel2020cold` ask why Bayesian networks want to be cold. What a small loss promises about errors is the
# subject of [comp-sum losses](comp-sum-losses.ipynb); [diffusion spectral
# entropy](../information/diffusion-spectral-entropy.ipynb) measures what a trained network has kept.
