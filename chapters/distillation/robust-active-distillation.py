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
# # Robust Active Distillation
#
# A large teacher is expensive to ask, so a small student should ask only about the points that it can learn from. But the points that a student finds hard are those where the teacher
# errs. Robust active distillation {cite:p}`robust-active-distillation` makes a game of it: you choose a distribution over points, an adversary then chooses which answers are wrong. The game
# has a closed solution. You will derive it, check it against linear programmes, use it to choose queries for small students of digits, and see where a game in which a wrong
# answer is worth *nothing* describes distillation well, and where it does not.

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
from scipy.optimize import linprog

from lib.claims import Ledger, about, table
from lib.data import digits
from lib.distill import (
    active_distill,
    margin_gains,
    rad_sample,
    rad_weights,
    worst_case_value,
)
from lib.models import CNN, mlp
from lib.train import accuracy, fit_ensemble

plt.style.use("lib.book")
torch.manual_seed(seed)
ledger = Ledger("robust-active-distillation", scale, seed)

# %% [markdown]
# ## The problem
#
# Digits again, in eight independent splits: 100 labelled images train a teacher, a small convolutional network; 60 other labelled images belong to the student, a perceptron with 24 hidden
# units; some 1,000 images without labels are the pool, and 597 are the test. The student may ask the teacher about 240 images of the pool.
#
# What would it like to ask? Let $p_{(1)} \ge p_{(2)}$ be the two largest of the student's probabilities for a point. Their difference is its margin, and what it may gain from a label is
#
# $$ g = 1 - (p_{(1)} - p_{(2)}) . \tag{1} $$
#
# Train teachers and first students, sort the pool by the gain, and look at the teacher.


# %%
def adam(rate):
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def hard_loss(model, images, labels):
    return F.cross_entropy(model(images), labels)


def new_student(student_seed):
    with torch.random.fork_rng():
        torch.manual_seed(student_seed)
        return mlp((64, 24, 10))


runs = {"ci": 8, "full": 32}[scale]
taught, own = 100, 60
splits = [
    digits((taught, own, 1200 - taught - own, 597), seed=100 * seed + run)
    for run in range(runs)
]
parts = [  # [part][images or labels], each (runs, n, ...)
    [torch.stack([split[part][side] for split in splits]) for side in (0, 1)]
    for part in range(4)
]
(pool, pool_labels), (test_images, test_labels) = parts[2], parts[3]
labelled = parts[1][0].flatten(2), parts[1][1]

teachers = [CNN(channels=(8, 16), width=32) for _ in range(runs)]
fit_ensemble(
    teachers,
    hard_loss,
    parts[0],
    optimizer=adam(3e-3),
    epochs=40,
    seeds=range(runs),
    batch_size=50,
    desc="teachers",
)
first = [new_student(10**6 + run) for run in range(runs)]
fit_ensemble(
    first, hard_loss, labelled, optimizer=adam(1e-2), epochs=100, seeds=range(runs)
)
with torch.no_grad():
    answers = torch.stack(
        [t(x).softmax(1) for t, x in zip(teachers, pool, strict=True)]
    )
    opinions = torch.stack([s(x).softmax(1) for s, x in zip(first, pool, strict=True)])
gains = torch.stack([margin_gains(each) for each in opinions])  # (runs, n)
wrong = answers.argmax(-1) != pool_labels
teacher_test = np.mean(
    [accuracy(*each) for each in zip(teachers, *parts[3], strict=True)]
)
student_test = np.mean([accuracy(*each) for each in zip(first, *parts[3], strict=True)])
by_gain = wrong.gather(1, gains.argsort(1)).float()
deciles = [part.mean().item() for part in by_gain.tensor_split(10, 1)]

figure, axes = plt.subplots(figsize=(6, 2.8))
axes.bar(range(1, 11), [100 * share for share in deciles], color="C3")
axes.axhline(100 * wrong.float().mean(), color="0.4", linestyle="--", label="mean")
axes.set(
    title="The teacher errs where the student wants to ask",
    xlabel="tenth of the pool, by the student's gain (10: largest)",
    ylabel="teacher wrong (%)",
)
axes.legend()
plt.show()
print("test accuracy: teacher", about(100 * teacher_test, 3), "%", end=", ")
print("student with 60 labels", about(100 * student_test, 3), "%")

# %% [markdown]
# Teacher and student were trained on different images, and still agree about what is hard. In the tenth of the pool that margin sampling asks first, the teacher is wrong several times as
# often as on average. Uniform sampling meets fewer wrong answers, but asks mostly about images of which the student is sure already.
#
# ## Derivation
#
# ### The game
#
# There are $n$ points with gains $g_1 \ge g_2 \ge \dots \ge g_n \ge 0$. You choose a distribution $q$ over them. Then an adversary, who knows $q$, chooses a set $D$ of at most $m$ points on which
# the teacher is wrong. You draw a point by $q$; it is worth $g_i$ if the teacher is right, and nothing if it is wrong. The best that you can be sure of is
#
# $$ V = \max_{q} \; \min_{|D| \le m} \; \sum_{i \notin D} q_i \, g_i . \tag{2} $$
#
# The form is reconstructed from the paper's abstract; everything about its solution is proved here. Two assumptions are in it. The teacher's mistakes are bounded in number and in nothing else: they may be
# placed as badly as possible. And a wrong answer is worth zero, not less. Keep the second in mind.
#
# The adversary's part is easy. The sum loses $q_i g_i$ for every $i \in D$, so it takes the $m$ largest *products* $q_i g_i$, whatever the gains are.
#
# ### The solution
#
# A product larger than the others is the first to be taken. So make the products equal on the points that you use at all, which should be those of large gain, say the first $k > m$:
#
# $$ q_i = \frac{c_k}{g_i} \quad (i \le k), \qquad q_i = 0 \quad (i > k), \qquad c_k = \Bigl( \sum_{j \le k} \frac{1}{g_j} \Bigr)^{-1} . \tag{3} $$
#
# The adversary takes $m$ of $k$ equal products. What is left is
#
# $$ G_k = (k - m) \, c_k = \frac{k - m}{\sum_{j \le k} 1 / g_j} . \tag{4} $$
#
# Inside the support, the points from which the student would learn *less* are asked *more* often. That is the price of robustness: a smaller gain needs more probability to be as good a target.
#
# Which $k$? Adding a point turns the fraction $\frac{k - m}{S}$ into $\frac{(k - m) + 1}{S + 1/g_{k+1}}$ with $S = \sum_{j \le k} 1/g_j$. That is the mediant of $G_k$ and $\frac{1}{1 / g_{k+1}} = g_{k+1}$, and a mediant lies between its two
# fractions:
#
# $$ \min(G_k, g_{k+1}) \le G_{k+1} \le \max(G_k, g_{k+1}) , \qquad G_{k+1} > G_k \iff g_{k+1} > G_k . \tag{5} $$
#
# So $G$ rises as long as the next gain exceeds it. Once $g_{k+1} \le G_k$, also $g_{k+2} \le g_{k+1} \le G_{k+1}$, and it never rises again. One pass over the sorted gains finds the maximum $k^*$.
#
# ### No other distribution is better
#
# Let $V = G_{k^*}$, and let the adversary mix: it takes point $i$ with probability
#
# $$ \delta_i = 1 - \frac{V}{g_i} \quad (i \le k^*), \qquad \delta_i = 0 \quad (i > k^*) . \tag{6} $$
#
# These are legal. By (5), optimality of $k^*$ means $g_{k^*} \ge V$, so $0 \le \delta_i \le 1$; and they sum to $k^* - V \sum_{i \le k^*} 1/g_i = m$. Every vector in $[0, 1]^n$ with sum $m$ is a mixture of sets of $m$ points, as these sets are
# the corners of that polytope. Against this adversary a point of the support is worth $g_i (1 - \delta_i) = V$. A point outside is worth $g_i \le g_{k^* + 1} \le V$, again by (5). No $q$, then, gets more
# than $V$, and (3) gets $V$ against every adversary: it is the solution, and $V$ the value. $\square$
#
# Check all of it. The oracle is a linear programme with one constraint for each of the $\binom{n}{m}$ sets: maximise $v$ subject to $v \le \sum_{i \notin D} q_i g_i$.


# %%
def game_by_programme(g, m, payoff=None):
    """Maximise over q the smallest payoff(D) @ q over all sets D of m points: value and q."""
    n = len(g)
    rows = []
    for chosen in itertools.combinations(range(n), m):
        kept = np.ones(n)
        kept[list(chosen)] = 0
        rows.append(kept * g if payoff is None else payoff(kept, g))
    programme = linprog(
        np.append(np.zeros(n), -1.0),
        A_ub=np.column_stack([-np.array(rows), np.ones(len(rows))]),
        b_ub=np.zeros(len(rows)),
        A_eq=np.append(np.ones(n), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * n + [(None, None)],
    )
    return -programme.fun, programme.x[:n]


rng = np.random.default_rng(seed)
programme_gap = reply_gap = marginal_gap = 0.0
improved = games = 0
rises_once = True
for _ in range(25):
    g = np.sort(rng.uniform(0.02, 1, rng.integers(2, 9)))[::-1].copy()
    n = len(g)
    for m in range(n):
        games += 1
        q, value, support = rad_weights(torch.from_numpy(g), m)
        programme_gap = max(programme_gap, abs(value - game_by_programme(g, m)[0]))
        reply_gap = max(
            reply_gap, abs(worst_case_value(q, torch.from_numpy(g), m) - value)
        )
        delta = np.where(np.arange(n) < support, 1 - value / g, 0)
        assert delta.min() > -1e-9 and delta.max() < 1 + 1e-9
        marginal_gap = max(marginal_gap, abs(delta.sum() - m))
        curve = (np.arange(1, n + 1) - m) / np.cumsum(1 / g)
        rises = np.diff(curve) > 0
        rises_once &= bool((np.diff(rises.astype(int)) <= 0).all())
        for _ in range(5):  # move some probability elsewhere
            other = 0.9 * q.numpy() + 0.1 * rng.dirichlet(np.ones(n))
            moved = worst_case_value(torch.from_numpy(other), torch.from_numpy(g), m)
            improved += moved > value + 1e-9
print(games, "games; linear programmes differ by", about(programme_gap, 1))
print("distributions that do better than the solution:", improved)

# %% [markdown]
# ### Three limits
#
# - $m = 0$: $G_k$ is the harmonic mean of the first $k$ gains, largest for $k = 1$. The teacher is trusted, and you take the point of largest gain.
# - $m \to n$: more and more points are needed to outnumber the mistakes. For $m = n$ nothing is safe, $V = 0$, and every distribution is as good as any other.
# - All gains equal: every $G_k$ is smaller than the next, the support is the whole pool, and $q$ is uniform.
#
# Below, the game on the pool of the first run. The support grows with $m$ to a good part of the pool, and the value falls.

# %%
ranked = gains[0].double().sort(descending=True).values
n = len(ranked)
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for share, colour in ((0.0, "0.5"), (0.05, "C0"), (0.15, "C1"), (0.3, "C2")):
    mistakes = math.ceil(share * n)
    curve = (torch.arange(1, n + 1) - mistakes) / (1 / ranked).cumsum(0)
    q, value, support = rad_weights(ranked, mistakes)
    label = f"{100 * share:.0f} % wrong"
    axes[0].plot(range(1, n + 1), curve, color=colour, label=label)
    axes[0].plot(support, value, "o", color=colour)
    if share:
        axes[1].plot(range(1, support + 1), n * q[:support], color=colour)
axes[0].set(
    title="The sure gain by size of the support",
    xlabel="points used, k",
    ylabel="$G_k$",
    ylim=(0, 1),
)
axes[0].legend()
axes[1].axhline(1, color="0.4", linestyle="--", linewidth=1)
axes[1].set(
    title="The solution, against uniform (dashed)",
    xlabel="rank of the point by gain",
    ylabel="n q",
    ylim=(0, None),
)
plt.show()

# %% [markdown]
# On the left each curve rises once and falls once, as (5) says, and the dots are its maxima. On the right the probability *grows* with the rank, up to the end of the support.
#
# ### What a draw is worth on average
#
# Under $q$ the mean gain of a draw is $\sum_{i \le k} q_i g_i = k / \sum_{i \le k} 1/g_i$: the harmonic mean of the gains in the support. A weight of $1 / (k q_i)$ on every drawn point would make it their arithmetic mean, as it
# makes any loss an unbiased estimate of its mean over the support. The method uses no such weights. It does not estimate anything; it chooses what to learn from.

# %%
q, value, support = rad_weights(ranked, math.ceil(0.15 * n))
inside = ranked[:support]
harmonic = support / (1 / inside).sum()
draws = q.multinomial(200_000, replacement=True)
weighted = (ranked[draws] / (support * q[draws])).mean()
assert abs(ranked[draws].mean() - harmonic) < 0.01
assert abs(weighted - inside.mean()) < 0.02
assert math.isclose(value, harmonic * (1 - math.ceil(0.15 * n) / support), rel_tol=1e-9)

# %% [markdown]
# ### Regret instead of gain
#
# The value (2) may be small because the game is hard. A relative form compares you with the best point that the adversary has left over (reconstructed, like the game itself):
#
# $$ \max_q \; \min_{|D| \le m} \; \frac{\sum_{i \notin D} q_i g_i}{\max_{i \notin D} g_i} . \tag{7} $$
#
# For a fixed $D$ the denominator is a number, so this is a linear programme too. The adversary now hesitates to take the best points, because that also lowers what you are compared with.

# %%
g = np.array([1.0, 0.9, 0.5, 0.4, 0.3, 0.2])
ratio, relative = game_by_programme(
    g, 2, payoff=lambda kept, g: kept * g / (kept * g).max()
)
absolute = rad_weights(torch.from_numpy(g), 2)
kept_share = worst_case_value(absolute.probabilities, torch.from_numpy(g), 2)
table(
    ("gain", *g),
    ("q of (2)", *(f"{each:.3f}" for each in absolute.probabilities)),
    ("q of (7)", *(f"{each:.3f}" for each in relative)),
)

# %% [markdown]
# Both forms hold back on the points of largest gain. The relative form keeps more probability on them. Everything below uses (2), the form with the closed solution.
#
# ## Reference implementation
#
# The solution in six lines, and a batch of queries drawn with it.


# %% tags=["reference"]
import torch


def robust_weights(gains, mistakes):
    """gains (n,), all positive; 0 <= mistakes < n. Sampling probabilities (n,) and the gain they are sure of."""
    ranked, order = gains.double().sort(descending=True)
    count = torch.arange(1, len(gains) + 1)
    sure = (count - mistakes) / (1 / ranked).cumsum(0)  # (4), for every k
    k = int(sure.argmax()) + 1
    probabilities = torch.zeros(len(gains), dtype=torch.float64)
    probabilities[order[:k]] = (1 / ranked[:k]) / (1 / ranked[:k]).sum()  # (3)
    return probabilities, sure[k - 1].item()


def robust_queries(student_probabilities, error_rate, budget):
    """student_probabilities (n, C); error_rate: the teacher's. Indices (budget,) of the points to ask about."""
    top = student_probabilities.topk(2, 1).values
    gains = (1 - (top[:, 0] - top[:, 1])).clamp_min(1e-9)  # (1)
    probabilities, _ = robust_weights(gains, int(error_rate * len(gains)))
    return torch.multinomial(probabilities, budget)  # without replacement


# %% [markdown]
# A case by hand: gains $1, 0.9, 0.5, 0.4, 0.1$. For $m = 1$, $G_2 = 1 / (1 + \frac{10}{9}) = \frac{9}{19}$, $G_3 = 2 / (\frac{19}{9} + 2) = \frac{18}{37}$, and $g_4 = 0.4$ is less than that: three points. For $m = 2$ there are four, and
# $V = 2 / (\frac{37}{9} + \frac 52) = \frac{36}{119}$.

# %%
hand = torch.tensor([0.5, 1.0, 0.1, 0.9, 0.4])
for m, fractions, sure in (
    (1, (18 / 37, 9 / 37, 0, 10 / 37, 0), 18 / 37),
    (2, (36 / 119, 18 / 119, 0, 20 / 119, 45 / 119), 36 / 119),
):
    probabilities, value = robust_weights(hand, m)
    expected = torch.tensor(fractions, dtype=torch.float64)
    assert torch.allclose(probabilities, expected, atol=1e-7)
    assert math.isclose(value, sure, rel_tol=1e-6)

# %% [markdown]
# ## The library
#
# `lib.distill.rad_weights` gives the same, and accepts what the reference does not: gains of zero, and as many mistakes as points. `lib.distill.worst_case_value` is the adversary: it says what *any* distribution is sure of.
# `lib.distill.rad_sample` draws a batch: where the support is smaller than the budget, as it is when the teacher is trusted, it takes the support whole and plays again on the rest. `lib.distill.select_queries` has
# the strategies of this chapter under one signature, and `lib.distill.active_distill` runs rounds of them with all students trained in one loop.

# %%
library_gap = 0.0
for run in range(runs):
    for mistakes in (0, 1, 50, 300):
        ours = rad_weights(gains[run], mistakes)
        theirs, value = robust_weights(gains[run].clamp_min(1e-9), mistakes)
        library_gap = max(library_gap, (ours.probabilities - theirs).abs().max().item())
        library_gap = max(library_gap, abs(ours.value - value))
hopeless = rad_weights(torch.tensor([0.4, 0.0, 0.0]), 1)
assert hopeless.value == 0 and hopeless.support == 3
greedy = rad_sample(gains[0], 0, 60)
is_greedy = set(greedy.tolist()) == set(gains[0].topk(60).indices.tolist())
print("reference and library differ by", about(library_gap, 1))

top = torch.zeros(n, dtype=torch.float64)
top[gains[0].topk(60).indices] = 1 / 60
even = torch.full((n,), 1 / n, dtype=torch.float64)
sure = {}
for name, q in (
    ("robust", rad_weights(gains[0], 150).probabilities),
    ("uniform", even),
    ("60 smallest margins", top),
):
    sure[name] = worst_case_value(q, gains[0], 150)
table(
    ("distribution", "gain without mistakes", "gain sure against 150 mistakes"),
    (
        "robust",
        about((rad_weights(gains[0], 150).probabilities * gains[0]).sum().item(), 2),
        about(sure["robust"], 2),
    ),
    ("uniform", about(gains[0].mean().item(), 2), about(sure["uniform"], 2)),
    ("60 smallest margins", about((top * gains[0]).sum().item(), 2), 0),
)

# %% [markdown]
# Margin sampling gains most if the teacher is right, and nothing is sure: 150 mistakes cover all its points.
#
# ## Experiment
#
# ### Design
#
# Three teachers answer the same students:
#
# - *perfect*: the true labels. The student knows that it makes no mistakes, $m = 0$;
# - *natural*: the convolutional network of the beginning, with its soft labels;
# - *adversary*: right, except on the 15 % of the pool with the largest gains of the first student, where it gives the wrong class that this student finds most likely. It errs about as often as the natural teacher, but where it
#   hurts most: the game's adversary. The students that ask are others than the one that the adversary knows.
#
# Each round, the strategy chooses 60 points by the current student's probabilities, and a *new* student is trained on the 60 labels and all answers so far, 100 steps on the whole batch. Learning rate ($10^{-2}$) and steps are
# the same everywhere: a student does not know where its labels come from. Strategies: the game (RAD); the 60 smallest margins; the 60 largest entropies; uniform; and the greedy $k$-center of
# the core-set method {cite:p}`sener2018active` on the features of the student. All runs are paired: same split, same first student.
#
# How many mistakes does RAD expect? The paper calls itself free of parameters. But $m$ must come from somewhere. Here it is the natural teacher's error on the student's 60 labelled images, which it was not trained on,
# times the size of the pool; for the adversary it is 15 %.

# %%
truth = F.one_hot(pool_labels, 10).float()
worst = truth.clone()
for run in range(runs):
    bad = gains[run].topk(int(0.15 * n)).indices
    tempting = opinions[run, bad].scatter(1, pool_labels[run, bad][:, None], 0)
    worst[run, bad] = F.one_hot(tempting.argmax(1), 10).float()
estimated = [1 - accuracy(t, x, y) for t, x, y in zip(teachers, *parts[1], strict=True)]
kinds = {
    "perfect": (truth, [0.0] * runs, ("rad", "margin", "uniform")),
    "natural": (
        answers,
        estimated,
        ("rad", "margin", "entropy", "uniform", "coreset"),
    ),
    "adversary": (worst, [0.15] * runs, ("rad", "margin", "uniform")),
}
members = [
    (kind, strategy, run)
    for kind, (_, _, strategies) in kinds.items()
    for strategy in strategies
    for run in range(runs)
]
which = torch.tensor([run for _, _, run in members])
scores, paid = [], torch.zeros(len(members), dtype=torch.long)


def ask(member, chosen):
    paid[member] += len(chosen)
    kind, _, run = members[member]
    return kinds[kind][0][run, chosen]


def score(done, students, queried):
    scores.append(
        [
            100 * accuracy(student, test_images[run], test_labels[run])
            for student, run in zip(students, which, strict=True)
        ]
    )


rounds, budget = 4, 60
queried = active_distill(
    new_student,
    ask,
    tuple(each[which] for each in labelled),
    pool[which].flatten(2),
    strategies=[strategy for _, strategy, _ in members],
    rounds=rounds,
    budget=budget,
    error_rates=[kinds[kind][1][run] for kind, _, run in members],
    optimizer=adam(1e-2),
    epochs=100,
    seeds=[1000 * seed + run for _, _, run in members],
    callback=score,
)
scores = torch.tensor(scores)  # (rounds + 1, members)
place = {}
for index, (kind, strategy, _) in enumerate(members):
    place.setdefault((kind, strategy), []).append(index)
curves = {key: scores[:, index] for key, index in place.items()}  # (rounds + 1, runs)
false_share = {}
for (kind, strategy), index in place.items():
    false = kinds[kind][0].argmax(-1) != pool_labels
    false_share[kind, strategy] = (
        100 * false[which[index][:, None], queried[index]].float()
    )
assert (paid == rounds * budget).all()
assert all(len(set(row.tolist())) == rounds * budget for row in queried)

# %% [markdown]
# ### Which points are asked
#
# First the mechanism: what do the queries of each strategy look like, in gain (of the first student) and correctness, with the natural teacher?

# %%
names = {
    "rad": "RAD",
    "margin": "margin",
    "entropy": "entropy",
    "uniform": "uniform",
    "coreset": "core set",
}
edges = torch.linspace(0, 1, 11)
figure, axes = plt.subplots(1, 5, figsize=(9, 2.6), sharey=True)
mean_gain = {}
for axis, (strategy, name) in zip(axes, names.items(), strict=True):
    index = place["natural", strategy]
    asked = queried[index]
    asked_gain = gains.gather(1, asked).flatten()
    asked_wrong = wrong.gather(1, asked).flatten()
    mean_gain[strategy] = asked_gain.mean().item()
    axis.hist(
        [asked_gain[~asked_wrong].numpy(), asked_gain[asked_wrong].numpy()],
        bins=edges.numpy(),
        stacked=True,
        color=["C0", "C3"],
        weights=[np.full(int(m.sum()), 1 / runs) for m in (~asked_wrong, asked_wrong)],
        label=["teacher right", "wrong"],
    )
    axis.set(title=name, xlabel="gain")
axes[0].set(ylabel="queries of 240")
axes[3].legend(fontsize=7)
plt.show()
table(
    ("natural teacher", *names.values()),
    (
        "wrong answers (%)",
        *(about(false_share["natural", s].mean().item(), 3) for s in names),
    ),
    ("mean gain", *(about(mean_gain[s], 2) for s in names)),
)

# %% [markdown]
# The gain is the first student's, so that later rounds also fill the left bins: later students are unsure of other points. Among margin sampling's queries there, about half of the answers are wrong. RAD gives up some
# of the gain, and with it a third of the wrong answers. Uniform sampling gets half as many wrong answers as RAD, and half the gain. So the game does what it says: it lies between the two, and nobody
# had to say where.
#
# ### What students learn from them

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 3))
colours = dict(zip(names, ("C1", "C0", "C4", "0.5", "C2"), strict=True))
for axis, kind in zip(axes, kinds, strict=True):
    for strategy in kinds[kind][2]:
        curve = curves[kind, strategy]
        error = curve.std(1) / runs**0.5
        axis.errorbar(
            range(0, rounds * budget + 1, budget),
            curve.mean(1),
            error,
            marker="o",
            markersize=3,
            linestyle="--" if strategy == "margin" else "-",
            color=colours[strategy],
            label=names[strategy],
        )
    axis.set(title=f"{kind} teacher", xlabel="queries")
axes[0].set(ylabel="student's test accuracy (%)")
axes[1].axhline(100 * teacher_test, color="C3", linestyle=":", label="the teacher")
axes[1].legend(fontsize=7)
plt.show()


def lead(kind, strategy, rounds_from=1, rounds_to=None):
    """RAD's lead over a strategy in points, mean over rounds: mean over runs and its standard error."""
    paired = curves[kind, "rad"] - curves[kind, strategy]
    paired = paired[rounds_from:rounds_to].mean(0)
    return paired.mean().item(), (paired.std() / runs**0.5).item()


rows = [("teacher", "RAD less", "first round", "s.e.", "mean of rounds", "s.e.")]
for kind, strategy in place:
    if strategy != "rad":
        rows.append((kind, names[strategy]))
        for late in (2, None):
            mean, error = lead(kind, strategy, 1, late)
            rows[-1] += (about(mean, 2), about(error, 1))
table(*rows)

# %% [markdown]
# *Left*: with a perfect teacher RAD *is* margin sampling (the curves coincide), and informative points are worth several points of accuracy. *Right*: with the adversary, margin sampling falls far below the student that
# asked nothing. RAD stays near uniform sampling, but it is not ahead. The game promised a gain. Where is it?
#
# It is in the second assumption: a wrong label is worth nothing. The adversary's labels are worth *less* than nothing, because the student learns them. A game with that price would spread further (Exercise 3).
#
# *Middle*: with the natural teacher a third fewer wrong answers buy nothing. All strategies end within about a point. A wrong soft label is not noise here. It is what the teacher believes, and near the boundary it
# still says which two classes the image is between. What the student learns is the teacher's function, mistakes included. With its own 60 labels it passes the teacher (dotted), and with more queries it comes down
# towards it rather than up, whichever points it asks about.
#
# ## Claims

# %%
exact = {
    "equal to the linear programme on all sets, in every game, to 1e-9": programme_gap < 1e-9,
    "worst case of the solution is the value, to 1e-9": reply_gap < 1e-9,
    "the adversary's marginals sum to m, to 1e-9": marginal_gap < 1e-9,
    "G rises once and falls once in every game": rises_once,
    "no perturbed distribution is sure of more": improved == 0,
    "library and reference agree to 1e-6": library_gap < 1e-6,
}  # fmt: skip
natural_wrong = {s: false_share["natural", s].mean().item() for s in names}
ledger.claim(
    "A min-max game against a teacher that errs on the worst points has an efficiently computable solution; it asks about points that are informative and likely to be labelled correctly",
    paper="theorem and experiments",
    measured=f"{games} games exact; wrong answers: RAD {about(natural_wrong['rad'], 3)} %, margin {about(natural_wrong['margin'], 3)} %, uniform {about(natural_wrong['uniform'], 3)} %",
    checks={
        **exact,
        "at least 5 points fewer wrong answers than margin and than entropy": natural_wrong["rad"] + 5 <= min(natural_wrong["margin"], natural_wrong["entropy"]),
        "mean gain at least 1.5 times that of uniform sampling": mean_gain["rad"] >= 1.5 * mean_gain["uniform"],
        "no more wrong answers than uniform sampling, plus 3 points": natural_wrong["rad"] <= natural_wrong["uniform"] + 3,
    },
    fails={
        "no more wrong answers than uniform sampling, plus 3 points": "informative points are harder for the teacher too, and q grows only as 1/g: the game hedges against mistakes that it cannot see, it does not avoid them",
    },
)  # fmt: skip

# %%
kept_promise = True
for run in range(runs):
    real = int(wrong[run].sum())
    q, value, _ = rad_weights(gains[run], real)
    kept_promise &= bool((q * gains[run])[~wrong[run]].sum() >= value - 1e-9)
margin_lead, uniform_lead = (
    lead("adversary", "margin"),
    lead("adversary", "uniform", 1, 2),
)
ledger.claim(
    "The guarantee holds in the worst case over the teacher's mistakes, and the method has no parameter to tune",
    paper="bounds on the expected performance",
    measured=f"adversarial teacher: after the first round RAD is {about(margin_lead[0], 2)} points ahead of margin, {about(uniform_lead[0], 2)} of uniform",
    checks={
        "expected gain of the first round at least V, for the real mistakes of every natural teacher": kept_promise,
        "sure of more than uniform sampling, and margin sure of nothing": sure["robust"] > sure["uniform"] and sure["60 smallest margins"] == 0,
        "adversary: at least half a point ahead of margin after the first round": margin_lead[0] >= 0.5,
        "adversary: at least 1 point ahead of uniform sampling after the first round": uniform_lead[0] >= 1,
    },
    fails={
        "adversary: at least 1 point ahead of uniform sampling after the first round": "the guarantee is on the gain, where a mistake counts zero; a student is harmed by a confident wrong label, and the fewer of them the better",
    },
)  # fmt: skip

# %%
greedy_lead = lead("perfect", "uniform")
baselines = [s for s in names if s != "rad"]
leads = {s: lead("natural", s)[0] for s in baselines}
adversary_gap = curves["adversary", "uniform"] - curves["adversary", "margin"]
same = all(
    torch.equal(queried[a].sort().values, queried[b].sort().values)
    for a, b in zip(place["perfect", "rad"], place["perfect", "margin"], strict=True)
)
ledger.claim(
    "It beats margin, entropy, core-set and uniform sampling, where greedy margin sampling can be worse than uniform",
    paper="ahead on CIFAR, SVHN and ImageNet",
    measured="natural teacher, points ahead, mean of rounds: "
    + ", ".join(f"{names[s]} {about(leads[s], 1)}" for s in baselines)
    + f"; adversary: uniform ahead of margin by {about(adversary_gap[1].mean().item(), 2)} after one round",
    checks={
        "perfect teacher: asks exactly what margin sampling asks": same and is_greedy,
        "perfect teacher: at least 1 point ahead of uniform, mean over rounds": greedy_lead[0] >= 1,
        "natural teacher: not more than 1.25 points behind any baseline": min(leads.values()) >= -1.25,
        "adversary: margin at least 2 points below uniform after one round": adversary_gap[1].mean() >= 2,
        "natural teacher: at least 1 point ahead of every baseline": min(leads.values()) >= 1,
    },
    fails={
        "natural teacher: at least 1 point ahead of every baseline": "the student learns the teacher's function, wrong soft labels included, and ends near the teacher's accuracy whichever points it asks about",
    },
)  # fmt: skip

# %%
ledger

# %% [markdown]
# ## What is different from the paper
#
# - Only the abstract was at hand, not the theorems: the game (2) and its relative form (7) are reconstructed, and the proof is this chapter's own. The way to set $m$ is a reconstruction too.
# - Digits, a perceptron with 24 hidden units and 240 queries, instead of CIFAR, SVHN and ImageNet with deep networks and thousands of queries. There a student is far from its teacher, and what it learns of a wrong answer may be
#   different.
# - The perfect teacher and the adversary are constructions of this chapter, the limits between which the natural teacher lies.
# - `scale="full"` runs 32 splits instead of eight.
#
# ## Exercises
#
# **1.** How many mistakes can a pool bear? Write `largest_safe(gains, floor)`: the largest number of mistakes for which the robust distribution is still sure of a gain of at least `floor > 0`, or `None` if not even for zero mistakes.


# %% tags=["exercise"]
def check_1(answer):
    rng = np.random.default_rng(1)
    for _ in range(20):
        gains = torch.from_numpy(rng.uniform(0.05, 1, 12))
        for floor in (0.1, 0.4, 0.8):
            sure = [rad_weights(gains, m).value for m in range(13)]
            safe = [m for m in range(13) if sure[m] >= floor]
            assert answer(gains, floor) == (max(safe) if safe else None)


# %% tags=["solution", "hide-cell"]
def largest_safe(gains, floor):
    # G_k >= floor for some k: m <= k - floor * (sum of the k smallest 1 / g); the value falls with m
    costs = (1 / gains.double()).sort().values.cumsum(0)
    count = torch.arange(1, len(gains) + 1)
    most = math.floor((count - floor * costs).max().item() + 1e-12)
    return most if most >= 0 else None


check_1(largest_safe)

# %% [markdown]
# **2.** Somebody draws inside the support in proportion to $g_i$ rather than $1 / g_i$, "because larger gains are better". Write `loss_of_greed(gains, m)`: how much of the sure gain this costs, $V$ less what the adversary leaves
# of that distribution, on the support of the solution.


# %% tags=["exercise"]
def check_2(answer):
    assert abs(answer(torch.tensor([0.5, 0.5, 0.5]), 1)) < 1e-9
    # by hand: q = (10, 9, 5) / 24, products (10, 8.1, 2.5) / 24
    expected = 18 / 37 - (8.1 + 2.5) / 24
    assert abs(answer(torch.tensor([1, 0.9, 0.5, 0.4, 0.1]), 1) - expected) < 1e-6


# %% tags=["solution", "hide-cell"]
def loss_of_greed(gains, m):
    q, value, _ = rad_weights(gains, m)
    greedy = torch.where(q > 0, gains.double(), 0.0)
    return value - worst_case_value(greedy / greedy.sum(), gains, m)


check_2(loss_of_greed)

# %% [markdown]
# **3.** Give a wrong label a price $h \ge 0$: the payoff is $\sum_{i \notin D} q_i g_i - h \sum_{i \in D} q_i$. The adversary now takes the largest $q_i (g_i + h)$. Write `robust_with_harm(gains, m, h)` that returns the best $q$ (a float64 tensor) of
# the form "equal $q_i (g_i + h)$ on the $k$ largest gains". Where does $q$ go for $h \to \infty$?


# %% tags=["exercise"]
def check_3(answer):
    rng = np.random.default_rng(2)
    for h in (0.0, 0.5, 3.0):
        for m in (0, 1, 3):
            g = np.sort(rng.uniform(0.05, 1, 7))[::-1].copy()
            q = answer(torch.from_numpy(g), m, h).numpy()
            assert abs(q.sum() - 1) < 1e-9 and q.min() >= 0
            payoff = (q * g).sum() - np.sort(q * (g + h))[::-1][:m].sum()
            best, _ = game_by_programme(
                g, m, payoff=lambda kept, g, h=h: kept * g - h * (1 - kept)
            )
            assert abs(payoff - best) < 1e-9


# %% tags=["solution", "hide-cell"]
def robust_with_harm(gains, m, h):
    ranked, order = gains.double().sort(descending=True)
    price = 1 / (ranked + h)
    sure = ((ranked * price).cumsum(0) - m) / price.cumsum(0)
    k = int(sure.argmax()) + 1
    q = torch.zeros(len(gains), dtype=torch.float64)
    q[order[:k]] = price[:k] / price[:k].sum()
    return q  # uniform on its support for large h, and the support grows to the whole pool if m > 0


check_3(robust_with_harm)

# %% [markdown]
# ## Summary
#
# - A teacher errs most where a student wants to ask. Choosing whom to ask is a game against its mistakes.
# - The game has a closed solution: sort by gain, take the $k^*$ that maximises (4), and draw in proportion to $1 / g$. It is exact, and costs a sort.
# - It gets a third fewer wrong answers than margin sampling, at more than uniform sampling's gain. With a teacher that never errs it becomes margin sampling.
# - Fewer wrong answers are not better students. A teacher's wrong soft labels teach what the teacher believes; an adversary's do harm that the game does not price.
# - The number of mistakes is not a parameter to tune, but it must be measured, on labels that the teacher has not seen.
#
# Further reading: the core-set view of active learning {cite:p}`sener2018active`; [Normalized distillation](normalized-distillation.ipynb) takes the soft label apart.
