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
# # Don't take it literally: a loss that finds n-grams where they are
#
# Cross-entropy compares a sentence with its target place by place. Insert one word at the front of the target, and every word
# behind it counts as wrong. The edit-invariant sequence loss (EISL) of {cite:t}`edit-invariant-loss` asks instead whether each
# short piece of the target, each n-gram, occurs *somewhere* in the output. You derive it, see that it is a convolution of one
# small matrix, learn what its gradient does and where the argument for it is thinner than it looks, and train a small
# translator on targets that are shuffled, stuttered and full of gaps. At the end you can put the loss in the place of
# cross-entropy, and you know when not to.

# %% [markdown]
# ## Setup

# %% tags=["parameters"]
scale = "ci"
seed = 0

# %%
import copy
import functools
import itertools
import math
import re
from collections import Counter

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from lib.claims import Ledger, about
from lib.data import english_text
from lib.losses import eisl, ngram_match_map
from lib.models import Seq2Seq, greedy
from lib.noise import sequence_noise
from lib.ranking import corpus_bleu
from lib.train import PeakTensor, fit

plt.style.use("lib.book")
torch.manual_seed(seed)
ledger = Ledger("edit-invariant-loss", scale, seed)

# %% [markdown]
# ## The problem
#
# A model has learned a sentence of twelve words nearly perfectly: at each place it gives the right word a probability of 0.97
# and shares the rest among 299 others. Three people write the target. One writes the sentence. One puts another word in front,
# and the last word falls off the end. One changes the order of the two halves.


# %%
def confident(tokens, vocabulary=300, p=0.97):
    """Log-probabilities (1, T, V) of a model that gives each of `tokens` the probability p."""
    wrong = math.log((1 - p) / (vocabulary - 1))
    out = torch.full((1, len(tokens), vocabulary), wrong, dtype=torch.float64)
    out[0, torch.arange(len(tokens)), tokens] = math.log(p)
    return out


sentence = torch.arange(12)  # twelve different words
output = confident(sentence)
written = {
    "as the model says it": sentence,
    "one word inserted": torch.cat([torch.tensor([250]), sentence[:-1]]),
    "halves exchanged": torch.cat([sentence[6:], sentence[:6]]),
}
ce_of = {name: F.nll_loss(output[0], y).item() for name, y in written.items()}
for name, value in ce_of.items():
    print(f"{name:22} cross-entropy {about(value)} nats a word")

# %% [markdown]
# The model has not changed, and each of these targets holds almost the same text. Cross-entropy calls it nearly perfect once,
# and entirely wrong twice. It will spend its gradient on unlearning. A look at the matrix that holds, for each output place $t$
# and each target place $i$, the log-probability of the target word there shows what cross-entropy fails to see:

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 3.1), sharey=True)
for axis, (name, y) in zip(axes, written.items(), strict=True):
    axis.grid(False)
    picture = axis.imshow(ngram_match_map(output, y[None], 1)[0], cmap="Blues")
    axis.plot(range(12), range(12), ":", color="C1", lw=1)
    axis.set(title=name, xlabel="target place $i$", xticks=range(0, 12, 3))
axes[0].set(ylabel="output place $t$")
figure.colorbar(picture, ax=axes, label="log-probability (nats)", shrink=0.85)
plt.show()

# %% [markdown]
# Dark is right. Cross-entropy reads the dotted diagonal and nothing else. The text stands in unbroken diagonal strips in all
# three pictures; in two of them the strips lie beside the dotted line. A loss that looks for *diagonal strips* would know.
#
# ## Derivation
#
# ### Diagonals
#
# The output has places $t = 1, \dots, T$ with log-probabilities $L[t, v]$ of the tokens $v = 1, \dots, V$, the target is $y_1,
# \dots, y_S$. $S$ and $T$ may differ. Cross-entropy needs $S = T$:
#
# $$ \text{CE} = -\frac1T \sum_{t=1}^{T} L[t, y_t] . \tag{1} $$
#
# Gather the columns that matter, and score the n-gram that begins at target place $i$ against output place $t$:
#
# $$ G[t, i] = L[t, y_i], \qquad g_n(t, i) = \sum_{j=0}^{n-1} G[t + j,\, i + j] . \tag{2} $$
#
# If the places of the output are independent given the source, as in a parallel decoder {cite:p}`gu2018nonautoregressive`,
# $e^{g_n(t,i)}$ *is* the probability that the n-gram stands at $t$. In an autoregressive decoder $L[t, \cdot]$ also depends on
# the words that were fed in before $t$, and at another place those would be others. There (2) is an approximation, and the word
# "approximately" in the paper's "approximately a convolution" has this meaning.
#
# A sum along diagonals is a two-dimensional convolution (as deep learning counts: a cross-correlation) of $G$ with the $n
# \times n$ identity matrix $I_n$:
#
# $$ g_n = G \star I_n, \qquad G \in \mathbb R^{T \times S}, \quad g_n \in \mathbb R^{(T-n+1) \times (S-n+1)} . \tag{3} $$
#
# You may also see it as $S - n + 1$ kernels of size $n \times V$, one-hot in each row, sliding over $L$; this is the
# convolution of a text with its n-grams. The numbers are the same, but (3) never makes anything of size $V$.

# %%
tiny, word = torch.randn(7, 5).double().log_softmax(1), torch.randint(5, (6,))
one_hot, convolution_gap = F.one_hot(word, 5).double(), 0.0
for n in (1, 2, 3, 6):
    identity = torch.eye(n).double()[None, None]
    by_identity = F.conv2d(tiny[None, None][..., word], identity)[0, 0]
    by_kernels = F.conv1d(tiny.T[None], one_hot.unfold(0, n, 1))[0].T
    mine = ngram_match_map(tiny[None], word[None], n)[0]
    for other in (by_identity, by_kernels):
        convolution_gap = max(convolution_gap, (mine - other).abs().max().item())
assert convolution_gap < 1e-12

# %% [markdown]
# ### Somewhere
#
# You want to say: the n-gram $i$ occurs somewhere. With a prior $\pi$ over places, the ideal loss of this n-gram is
#
# $$ \ell_i = -\log \sum_t \pi(t)\, e^{g_n(t, i)} \;\le\; \sum_t q(t) \big(-g_n(t,i)\big) + \text{KL}(q \,\|\, \pi)
# \quad \text{for every } q . \tag{4} $$
#
# This is Jensen's inequality for $\sum_t q(t) \frac{\pi(t)}{q(t)} e^{g}$. With $q = \pi$ the second term is zero, and what
# remains is linear in the log-probabilities, as cross-entropy is. But a fixed $\pi$ would ask for every n-gram at *every*
# place. The paper lets $q$ follow the model:
#
# $$ h(t,i) = \tfrac1n\, g_n(t, i), \qquad
# q_i(t) = \frac{e^{(h(t,i) + \gamma_{t,i}) / \tau}}{\sum_{s} e^{(h(s,i) + \gamma_{s,i}) / \tau}} , \tag{5} $$
#
# a softmax over *output places*, one for each target n-gram. $\gamma$ is Gumbel noise, redrawn at each step, so that $q$ is a
# relaxed random choice of a place {cite:p}`jang2017categorical`; $\tau$ is its temperature, 1 in the released code. The
# division by $n$ makes scores of different lengths comparable. Then
#
# $$ \boxed{\; \text{EISL}_n = -\frac{1}{S - n + 1} \sum_{i=1}^{S-n+1} \sum_{t} q_i(t)\, h(t, i), \qquad
# \text{EISL} = \sum_n w_n\, \text{EISL}_n \;} \tag{6} $$
#
# with weights $w_n$ of sum one, and the loss of training is $a_{\text{ce}} \text{CE} + a_{\text{ng}} \text{EISL}$. The released
# code also floors $L$ at $-20$, so that one impossible word does not drown everything. Two ends of the family: $n = S = T$
# leaves one place, and EISL is cross-entropy; with $\tau \to 0$ and no noise each n-gram goes to its best match.
#
# ### The bound that is no longer one
#
# Be careful with (4). It holds for every $q$ *with* its KL term; the loss (6) follows $q$ to the model and drops the term. Take
# $\tau = 1$, no noise, $N$ places. For any scores $h$ the softmax $q$ satisfies
#
# $$ -\sum_t q(t)\, h(t) = -\log \sum_t e^{h(t)} + H(q), \qquad 0 \le H(q) \le \log N , \tag{7} $$
#
# because $\log q(t) = h(t) - \log \sum_s e^{h(s)}$; average that under $q$. So the loss lies *between* the two readings of
# "somewhere":
#
# $$ -\log \sum_t e^{h(t)} \;\le\; -\sum_t q(t)\, h(t) \;\le\; -\log \frac1N \sum_t e^{h(t)} . \tag{8} $$
#
# It is below the ideal (4) with the uniform prior, not above: minimising it is sensible, but it does not minimise a bound on
# the ideal. What is missing is exactly $\log N - H(q)$, the price of having chosen a place.

# %%
h = torch.randn(20_000, 8, dtype=torch.float64) * torch.rand(20_000, 1).double() * 6
q = h.softmax(1)
surrogate = -(q * h).sum(1)
entropy = -(q * q.log()).sum(1)
assert torch.allclose(surrogate, -h.logsumexp(1) + entropy)
ideal = -h.logsumexp(1) + math.log(8)
assert (surrogate <= ideal + 1e-12).all() and (surrogate >= -h.logsumexp(1)).all()
assert torch.allclose(surrogate + (q * (q * 8).log()).sum(1), ideal)
print("in 20000 draws the loss was never above the ideal it stands for")

# %% [markdown]
# ### The gradient
#
# Hold $q$ fixed first. Each n-gram hands its weight to the cells that it covers, which gives **soft counts**:
#
# $$ r[t, v] = \frac{1}{n\,(S - n + 1)} \sum_{i, j:\; y_{i+j} = v} q_i(t - j), \qquad
# \frac{\partial\, \text{EISL}_n}{\partial L[t, v]} = -r[t, v] . \tag{9} $$
#
# Behind a softmax of logits $z$ with probabilities $p$, and with $c[t] = \sum_v r[t, v]$,
#
# $$ \frac{\partial\, \text{EISL}_n}{\partial z[t, v]} = c[t]\, p[t, v] - r[t, v] . \tag{10} $$
#
# It is cross-entropy against soft labels $r[t, \cdot] / c[t]$ which the model chose itself: wherever it nearly says the n-gram
# already, it is told to say it. But the released code also differentiates $q$. Without noise, the chain rule through (5) gives
#
# $$ \frac{\partial}{\partial h(t)} \Big( -\sum_s q(s)\, h(s) \Big)
# = -q(t) \Big( 1 + \frac{h(t) - \bar h}{\tau} \Big), \qquad \bar h = \sum_s q(s)\, h(s) . \tag{11} $$
#
# Good places are pushed more than their share, and places with $h(t) < \bar h - \tau$ are pushed *down*: the model unlearns the
# n-gram where it half says it. The choice of a place gets sharper through this term. Check both.

# %%
scores = (3 * torch.randn(9, dtype=torch.float64)).requires_grad_()
tau = 0.7
q = (scores / tau).softmax(0)
(gradient,) = torch.autograd.grad(-(q * scores).sum(), scores)
by_formula = -q * (1 + (scores - (q * scores).sum()) / tau)
chosen_error = (gradient - by_formula).abs().max().item()
assert chosen_error < 1e-12
assert (gradient.min() < 0) and (gradient.max() > 0)

n, logits = 2, torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
y = torch.tensor([0, 3, 3, 1])
q = (ngram_match_map(logits.log_softmax(1)[None], y[None], n)[0] / n).softmax(0)
counts = torch.zeros(6, 5).double()
for t, i, j in itertools.product(range(5), range(3), range(n)):
    counts[t + j, y[i + j]] += q[t, i].item() / (n * 3)
options = dict(ngrams=(2,), gumbel=False, detach_q=True)
loss = eisl(logits.log_softmax(1)[None], y[None], **options)
(gradient,) = torch.autograd.grad(loss, logits)
p = logits.softmax(1).detach()
by_counts = counts.sum(1, keepdim=True) * p - counts
count_error = (gradient - by_counts).abs().max().item()
assert count_error < 1e-12

# %% [markdown]
# ### What an edit costs
#
# Cut the target into $k$ blocks and put them in another order. Every n-gram *inside* a block is still there, and the loss of an
# n-gram does not ask where it stands. Only those across a seam are new:
#
# $$ \text{changed n-grams} \le (k - 1)(n - 1) \quad \text{of} \quad S - n + 1 . \tag{12} $$
#
# Longer pieces break more often; $n = 1$ never does. An inserted word costs the $n$ n-grams that hold it, a deletion the $n -
# 1$ across the gap, a repetition the same. Cross-entropy pays for every word after the edit. For the exchanged halves of the
# example the rise is exact: a new n-gram fits nowhere, so its loss is $-\log$ of the wrong words' probability.


# %%
def rise_of(n):
    """Rise of EISL_n when the halves are exchanged, its prediction, the clean value."""
    clean, swapped = (
        eisl(output, written[name][None], ngrams=(n,), gumbel=False).item()
        for name in ("as the model says it", "halves exchanged")
    )
    wrong = -output.min().item()
    return swapped - clean, (n - 1) / (12 - n + 1) * (wrong - clean), clean


ce_clean = ce_of["as the model says it"]
ce_rise = ce_of["halves exchanged"] - ce_clean
rises = {n: rise_of(n) for n in (1, 2, 3, 4)}
for n, (rise, predicted, _) in rises.items():
    assert abs(rise - predicted) < 1e-9
    print(f"n = {n}: EISL rises by {about(rise, 2)} nats, CE by {about(ce_rise, 2)}")

# %% [markdown]
# A text ten times as long has one seam as well, and ten times as many n-grams to share its cost. Cross-entropy's rise stays.
#
# ### Nothing keeps two n-grams apart
#
# Now the weakness. Each n-gram chooses its place alone. No term says that two of them must not choose the same place, and with
# $q$ following the model, the first guess decides. So the paper trains with cross-entropy first. To see why, let free logits
# learn one target of twelve words, 100 times from random values: by EISL from the start, and after thirty steps of
# cross-entropy.


# %%
def free_logits(warm_steps, steps=100):
    """Shares of right outputs, and of neighbours in right order, of 100 sets of logits."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(100, 12, 20, generator=generator).requires_grad_()
    y = torch.arange(12).expand(100, 12)
    optimizer = torch.optim.Adam([z], lr=0.15)
    for step in range(warm_steps + steps):
        log_p = z.log_softmax(-1)
        if step < warm_steps:
            loss = F.nll_loss(log_p.transpose(1, 2), y, reduction="sum")
        else:
            loss = eisl(log_p, y, ngrams=(1, 2, 3, 4), gumbel=False, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    out = z.argmax(-1)
    right, ordered = (out == y).all(1), out.diff(dim=1) == 1
    return right.double().mean().item(), ordered.double().mean().item()


cold_share, cold_order = free_logits(0)
warm_share, _ = free_logits(30)
print(f"right at the end: EISL alone {about(cold_share, 2)}, ", end="")
print(f"after cross-entropy {about(warm_share, 2)}")
print(f"EISL alone: share of neighbours in the right order {about(cold_order, 2)}")
assert warm_share > 0.95 and cold_share < 0.4 < cold_order

# %% [markdown]
# Alone, the loss finds most of the order, at the wrong places: the sentence shifted by a word or two, its end fallen off, one
# piece said twice. There it stays; it searches among the orders that the model already thinks possible. So warm up with
# cross-entropy, then switch. The experiment below keeps to the rule.
#
# ## Reference implementation
#
# One output, one target. Gather, convolve with the identity, choose places, average.

# %% tags=["reference"]
import torch
import torch.nn.functional as F


def edit_invariant_loss(log_probs, targets, ngrams=(2, 3, 4), gumbel=False):
    """EISL of one sequence: log_probs (T, V) from a log-softmax, targets (S,); all ngrams at most T and S."""
    match = log_probs.clamp_min(-20)[:, targets]  # (T, S)
    total = 0.0
    for n in ngrams:
        identity = torch.eye(n, dtype=match.dtype, device=match.device)
        h = F.conv2d(match[None, None], identity[None, None])[0, 0] / n
        noise = -torch.empty_like(h).exponential_().log() if gumbel else 0.0
        q = torch.softmax(h + noise, dim=0)  # over output places
        total = total - (q * h).sum(0).mean()
    return total / len(ngrams)


# %% [markdown]
# By hand: two places, two tokens, target "0 1". Let both tokens have probability $\frac12$ everywhere. Every match costs $\log
# 2$, whatever $n$. Now let the output be sure of "0" at both places, up to $e^{-3}$: with $n = 1$, token 0 costs about 0 and
# token 1 costs 3, mean 1.5. And if you take the softmax over the wrong side, *target* places, each output place finds its token
# 0, and the missing 1 is never missed:

# %%
both, even = torch.tensor([0, 1]), torch.full((2, 2), 0.5).log()
for ngrams in [(1,), (2,), (1, 2)]:
    assert abs(edit_invariant_loss(even, both, ngrams).item() - math.log(2)) < 1e-6
repeats = torch.tensor([[0.0, -3.0], [0.0, -3.0]])
assert abs(edit_invariant_loss(repeats, both, (1,)).item() - 1.5) < 1e-6
q_wrong = repeats.softmax(1)  # over target places: do not do this
wrong_side = -(q_wrong * repeats).sum(1).mean().item()
print(
    f"one word missing: loss {about(1.5)}, with the wrong softmax {about(wrong_side, 2)}"
)
assert wrong_side < 0.2

# %% [markdown]
# ## The library
#
# `lib.losses.eisl` works on batches, masks padding on both sides, takes weights, a temperature, a generator for its noise, and
# can detach $q$. In place of the convolution it adds $n$ shifted views of $G$, which is $n$ additions per cell and not $n^2$
# products. `lib.losses.ngram_match_map` gives the map (2). Values and gradients agree with the reference:

# %%
batch = torch.randn(4, 9, 20, dtype=torch.float64, requires_grad=True)
log_p, y = batch.log_softmax(-1), torch.randint(1, 20, (4, 7))
for ngrams in [(2,), (1, 2, 3, 4), (7,)]:
    mine = eisl(log_p, y, ngrams=ngrams, gumbel=False)
    rows = [edit_invariant_loss(*row, ngrams) for row in zip(log_p, y, strict=True)]
    theirs = torch.stack(rows).mean()
    gap = [torch.autograd.grad(x, batch, retain_graph=True)[0] for x in (mine, theirs)]
    assert torch.allclose(mine, theirs) and torch.allclose(*gap)
same_length = torch.randint(20, (4, 9))
ce = F.nll_loss(log_p.transpose(1, 2), same_length)
ce_gap = eisl(log_p, same_length, ngrams=(9,)) - ce
assert ce_gap.abs() < 1e-12  # n = S = T is cross-entropy
assert torch.equal(eisl(log_p, y, gumbel=False), eisl(log_p, y, gumbel=False))

# %% [markdown]
# **Padding** is the trap of every batch. Left in, it is an easy n-gram: a model that has learned to pad finds "pad pad" with
# certainty, and the loss looks wonderful. Here five words are followed by seven paddings, and the model knows nothing of the
# words: the loss should be $\log 300 \approx 5.7$.

# %%
padded = torch.cat([torch.arange(1, 6), torch.zeros(7, dtype=torch.long)])
undecided = torch.full((1, 12, 300), 1 / 300, dtype=torch.float64).log()
undecided[0, 5:] = confident(padded[5:])[0]  # sure of the padding, not of the words
mask = dict(pad_id=0, output_lengths=torch.tensor([5]))
naive = eisl(undecided, padded[None], gumbel=False).item()
masked = eisl(undecided, padded[None], gumbel=False, **mask).item()
print(f"loss with padding counted {about(naive)}, masked {about(masked)}")
assert abs(masked - math.log(300)) < 1e-9 and naive < masked / 2

# %% [markdown]
# **Memory.** A batch of four outputs of 32 places over 32 000 tokens. What does the loss make beyond the gradient that
# cross-entropy needs as well?

# %%
shape = (4, 32, 32_000)
large = torch.randn(shape).log_softmax(-1).requires_grad_()
large_target = torch.randint(shape[2], shape[:2])
with PeakTensor(ignore=[shape]) as memory:
    eisl(large, large_target, ngrams=(1, 2, 3, 4), gumbel=False).backward()
numbers = math.prod(memory.largest_shape)
print(f"largest tensor besides the gradient: {memory.largest_shape}; ", end="")
print(f"one-hot 4-grams would hold {4 * 29 * 4 * shape[2]} numbers")
assert numbers <= 4 * 32 * 32

# %% [markdown]
# ## Experiment
#
# ### The data
#
# Sentences of the Python manual, reduced to its most frequent words, six to twelve of them left. The "translation" replaces
# each word by its partner in a secret dictionary, and three words in ten change places with the word that follows them. So
# there is one right translation, and it needs a look at the neighbours. 400 sentences are kept for testing. The **training
# targets** are spoiled once, before training:
#
# - *shuffle*: four words in ten, adjacent ones, in random order,
# - *repetition*: each word is written twice with probability 0.2,
# - *delete*: each word is left out with probability 0.2,
# - *two orders*: not noise but choice. In half of the targets the two halves of the sentence are exchanged. Both orders are
#   right, and both are references in the test; the trouble of parallel decoders with such data is well known
#   {cite:p}`gu2018nonautoregressive`.
#
# The test is always against clean targets.

# %%
longest, held_out = 12, 400
vocabulary_size = {"ci": 300, "full": 1500}[scale]


def sentences(size):
    """Sentences as numbers from 2 (0 is padding, 1 a blank), only the frequent words."""
    text = english_text().lower()
    frequent = Counter(re.findall(r"[a-z]+", text)).most_common(size)
    number = {word: i + 2 for i, (word, _) in enumerate(frequent)}
    rows = set()
    for piece in re.split(r"\n\s*\n|(?<=[.!?:;,()])\s+", text):
        row = [number[w] for w in re.findall(r"[a-z]+", piece) if w in number]
        if 6 <= len(row) <= longest:
            rows.add(tuple(row + [0] * (longest - len(row))))
    return torch.tensor(sorted(rows))


def translate(sources, size, generator):
    """A secret dictionary, and words that change places with the next one."""
    cipher = torch.cat([torch.arange(2), 2 + torch.randperm(size, generator=generator)])
    late = torch.rand(size + 2, generator=generator) < 0.3
    targets = []
    for row in sources.tolist():
        i, length = 0, sum(word > 0 for word in row)
        while i + 1 < length:
            if late[row[i]]:
                row[i], row[i + 1] = row[i + 1], row[i]
                i += 1
            i += 1
        targets.append(row)
    return cipher[torch.tensor(targets)]


def exchange_halves(rows):
    rows = rows.clone()
    for row, length in zip(rows, (rows > 0).sum(1).tolist(), strict=True):
        row[:length] = row[:length].roll(length - length // 2)
    return rows


draws = torch.Generator().manual_seed(seed)
sources = sentences(vocabulary_size)
sources = sources[torch.randperm(len(sources), generator=draws)]
clean = translate(sources, vocabulary_size, draws)
train_x, test_x = sources[:-held_out], sources[-held_out:]
train_y, test_y = clean[:-held_out], clean[-held_out:]
print(f"{about(len(train_x))} sentences for training, {len(test_x)} for testing")

# %% [markdown]
# ### Model, losses, metric
#
# A parallel decoder: one transformer layer over the source, one distribution for each place, as many places as the source has
# words. Each setting is trained with cross-entropy; then three copies go on for equally many steps, with the same optimiser and
# schedule: cross-entropy, cross-entropy with smoothed labels {cite:p}`szegedy2016rethinking`, and EISL with $n = 1, 2, 3, 4$.
# Where a target is longer than the output, cross-entropy sees its beginning; EISL sees all of it. The metric is BLEU
# {cite:p}`papineni2002bleu` over the test sentences. Cross-entropy may show its *better* state, after the warm-up or at the
# end, judged on the clean test set: an advantage that the others do not get.


# %%
class ParallelTranslator(nn.Module):
    """Transformer layers; logits (B, T, V) for all places at once."""

    def __init__(self, size, dim, depth):
        super().__init__()
        self.words, self.places = nn.Embedding(size, dim), nn.Embedding(longest, dim)
        options = dict(dropout=0.0, batch_first=True, norm_first=True)
        layers = [nn.TransformerEncoderLayer(dim, 4, 2 * dim, **options) for _ in range(depth)]  # fmt: skip
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(dim, size)

    def forward(self, x):
        hidden = self.words(x) + self.places.weight[: x.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=x == 0)
        return self.head(hidden)


def parallel(model, x, y):
    """Logits and the lengths of the outputs, for targets y."""
    return model(x), (x > 0).sum(1)


def cross_entropy(logits, y, lengths, smoothing=0.0):
    logits, y = logits.transpose(1, 2), y[:, : logits.shape[1]]
    return F.cross_entropy(logits, y, ignore_index=0, label_smoothing=smoothing)


def edit_invariant(logits, y, lengths):
    options = dict(ngrams=(1, 2, 3, 4), pad_id=0, output_lengths=lengths)
    return eisl(logits.log_softmax(-1), y, **options)


losses = {"CE": cross_entropy, "EISL": edit_invariant}
losses["smoothed CE"] = functools.partial(cross_entropy, smoothing=0.2)
warm_steps, more_steps = {"ci": (90, 55), "full": (1500, 1000)}[scale]
dim, depth, rate = {"ci": (48, 1, 1e-2), "full": (128, 3, 2e-3)}[scale]


def train(model, forward, loss, y, steps):
    def loss_fn(model, x, y):
        logits, lengths = forward(model, x, y)
        return loss(logits, y, lengths)

    torch.manual_seed(seed)  # of the Gumbel noise
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    fit(
        model, loss_fn, (train_x, y), optimizer=optimizer, steps=steps, batch_size=40,
        schedule=torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps),
        seed=seed, progress=False,
    )  # fmt: skip
    return model


def cut(rows, lengths):
    return [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]


def bleu_of(outputs, lengths, kind):
    answers = [test_y, exchange_halves(test_y)] if kind == "two orders" else [test_y]
    references = [cut(answer, (test_x > 0).sum(1)) for answer in answers]
    return corpus_bleu(cut(outputs, lengths), list(zip(*references, strict=True)))


def spoil(kind, level):
    generator = torch.Generator().manual_seed(seed)
    if kind == "two orders":
        turned = torch.rand(len(train_y), 1, generator=generator) < level
        return torch.where(turned, exchange_halves(train_y), train_y)
    return sequence_noise(train_y, kind, level, blank_id=1, generator=generator)


settings = {
    "ci": [("shuffle", 0.0), ("shuffle", 0.4), ("repetition", 0.2), ("delete", 0.2), ("two orders", 0.5)],
    "full": [(kind, level) for kind in ("shuffle", "repetition", "delete", "blank", "two orders")
             for level in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)],
}[scale]  # fmt: skip
results, trained = {}, {}
for kind, level in tqdm(settings, desc="settings"):
    y = spoil(kind, level)
    torch.manual_seed(seed)
    model = ParallelTranslator(vocabulary_size + 2, dim, depth)
    warm = train(model, parallel, cross_entropy, y, warm_steps)
    models = {"warm-up": warm}
    for name, loss in losses.items():
        models[name] = train(copy.deepcopy(warm), parallel, loss, y, more_steps)
    with torch.no_grad():
        found = {name: model(test_x).argmax(-1) for name, model in models.items()}
    row = {name: bleu_of(out, (test_x > 0).sum(1), kind) for name, out in found.items()}
    trained[kind, level] = models
    row["best of CE"] = max(row["CE"], row["warm-up"])
    results[kind, level] = row
columns = ("best of CE", "smoothed CE", "EISL")
print(f"{'BLEU':18}" + "".join(f"{name:>18}" for name in columns))
for (kind, level), row in results.items():
    label = f"{kind} {level:.0%}" if level else "clean"
    print(f"{label:18}" + "".join(f"{about(row[name]):>18}" for name in columns))

# %%
figure, axes = plt.subplots(figsize=(8, 3.4))
if scale == "ci":
    for shift, name in zip((-0.27, 0, 0.27), columns, strict=True):
        heights = [row[name] for row in results.values()]
        axes.bar([i + shift for i in range(len(results))], heights, 0.26, label=name)
    labels = [f"{kind} {level:.0%}" if level else "clean" for kind, level in results]
    axes.set_xticks(range(len(results)), labels)
else:
    for color, kind in enumerate(dict.fromkeys(kind for kind, _ in results)):
        levels = [level for other, level in results if other == kind]
        for style, name in zip(("--", ":", "-"), columns, strict=True):
            values = [results[kind, level][name] for level in levels]
            axes.plot(levels, values, style, color=f"C{color}", label=f"{kind}, {name}")
    axes.set(xlabel="noise level")
axes.set(title="Trained on spoiled targets, tested on clean ones", ylabel="BLEU")
axes.legend(ncols=1 if scale == "ci" else 3)
plt.show()

# %% [markdown]
# On clean targets (left) there is little to gain or to lose: one right word at each place is what cross-entropy is made for.
# Shuffled words cost cross-entropy a good part of its score; EISL wins part of it back, and smoothed labels a smaller part.
# The three on the right are another matter. One repeated or missing word shifts the rest of the target, so cross-entropy learns
# at each place a mixture of neighbouring words, and says some twice and others never. For EISL the sentence is still there, in
# pieces. The same happens when two orders are right: cross-entropy answers with a blend, EISL with one of them.
#
# ### What the model sees
#
# Take a test sentence of full length, the model that EISL trained on repetitions, and a target with repeated words.

# %%
index = max(range(held_out), key=lambda row: len(test_y[row].unique()))
times = torch.tensor([1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 1, 1])
stuttered = test_y[index : index + 1].repeat_interleave(times, dim=1)
with torch.no_grad():
    logits = trained["repetition", 0.2]["EISL"](test_x[index : index + 1])
words = ngram_match_map(logits.log_softmax(-1), stuttered, 1)[0]
pairs = ngram_match_map(logits.log_softmax(-1), stuttered, 2)[0]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
for axis, values, name, label in (
    (axes[0], words.clamp_min(-20), "$G$: words", "log-probability (nats)"),
    (axes[1], (pairs / 2).softmax(0), "$q$: places of the bigrams", "weight"),
):
    axis.grid(False)
    figure.colorbar(axis.imshow(values, cmap="Blues"), ax=axis, label=label, shrink=0.8)
    axis.set(title=name, xlabel="target place $i$", ylabel="output place $t$")
plt.show()

# %% [markdown]
# Left, the dark diagonal takes a step to the right at the third and at the eighth word. The model is not perfect: where it says
# a word at two neighbouring places, two cells of a column are dark. Right, the weights (5) of the bigrams follow the diagonal
# across both steps. Nobody told the loss where the repetitions were.
#
# ### Autoregressive decoders
#
# Here waits a trap that the formulas do not show. With teacher forcing the decoder *reads* the target, one word late. A loss
# that does not ask where the words stand is satisfied by a decoder that says at each place the word it just read:

# %%
copier = confident(torch.cat([torch.tensor([299]), sentence[:-1]]))
copier_ce = F.nll_loss(copier[0], sentence).item()
copier_eisl = eisl(copier, sentence[None], ngrams=(1, 2, 3, 4), gumbel=False).item()
print(f"a copier: cross-entropy {about(copier_ce)}, EISL {about(copier_eisl)} nats")
assert copier_eisl < copier_ce / 5

# %% [markdown]
# Cross-entropy calls the copier useless, EISL finds nearly everything in place. So an autoregressive decoder needs
# cross-entropy *beside* EISL to the end, $a_{\text{ce}} > 0$. The functions below train `lib.models.Seq2Seq` with their sum; it
# takes minutes, so it runs at `scale="full"` only.


# %%
def teacher_forced(model, x, y):
    prefix = torch.full_like(y[:, :1], vocabulary_size + 2)
    return model(x, torch.cat([prefix, y[:, :-1]], 1)), (y > 0).sum(1)


def with_cross_entropy(logits, y, lengths):
    return cross_entropy(logits, y, lengths) + edit_invariant(logits, y, lengths)


def autoregressive_bleu(kind, level, loss, warm, more):
    start, end = vocabulary_size + 2, vocabulary_size + 3
    y = F.pad(spoil(kind, level), (0, 1))
    y[torch.arange(len(y)), (y > 0).sum(1)] = end
    torch.manual_seed(seed)
    model = Seq2Seq(vocabulary_size + 2, vocabulary_size + 4, dim=dim)
    train(model, teacher_forced, cross_entropy, y, warm)
    train(model, teacher_forced, loss, y, more)
    limits = dict(start=start, end=end, max_length=2 * longest)
    with torch.no_grad():
        found = greedy(model.step, model.start(test_x), **limits).tokens
    return bleu_of(found, (found != end).sum(1), kind)


if scale == "full":
    for kind, level in (("shuffle", 0.4), ("repetition", 0.2), ("blank", 0.2)):
        for loss in (cross_entropy, with_cross_entropy):
            value = autoregressive_bleu(kind, level, loss, warm_steps, more_steps)
            print(f"{kind} {level:.0%}, {loss.__name__}: BLEU {about(value)}")

# %% [markdown]
# ## Claims

# %%
mean_rise = sum(rise for rise, _, _ in rises.values()) / 4
mean_clean = sum(value for _, _, value in rises.values()) / 4
ledger.claim(
    "Matching n-grams at all places makes the loss (nearly) invariant to the order of the target's blocks",
    paper="stated",
    measured=f"exchanged halves of twelve words: EISL rises by {about(mean_rise, 2)} nats, CE by {about(ce_rise, 2)}",
    checks={
        "the rise is (n-1)/(S-n+1) of a wrong n-gram's cost, n = 1..4, to 1e-9": all(
            abs(rise - predicted) < 1e-9 for rise, predicted, _ in rises.values()
        ),
        "EISL rises by at most 20 % of CE's rise": mean_rise <= 0.2 * ce_rise,
        "CE rises by at least 100 % of its clean value": ce_rise >= ce_clean,
        "EISL rises by at most 20 % of its clean value": mean_rise <= mean_clean / 5,
    },
    fails={
        "EISL rises by at most 20 % of its clean value": "The clean loss of a confident model is close to 0, and one seam "
        "costs whole nats: the cost is one per seam, not a percentage.",
    },
)


# %%
def gain(kind, level, rival):
    return results[kind, level]["EISL"] - results[kind, level][rival]


def gains(margins):
    return {
        f"{kind} {level:.0%}: EISL >= {rival} + {margin} BLEU": gain(kind, level, rival)
        >= margin
        for (kind, level, rival), margin in margins.items()
    }


margins = {
    ("shuffle", 0.4, "best of CE"): 2, ("shuffle", 0.4, "smoothed CE"): 0,
    ("repetition", 0.2, "best of CE"): 12, ("repetition", 0.2, "smoothed CE"): 10,
    ("delete", 0.2, "best of CE"): 10, ("delete", 0.2, "smoothed CE"): 8,
}  # fmt: skip
over = [f"{key[0]} over {key[2]} {about(gain(*key), 2)}" for key in margins]
ledger.claim(
    "Training is robust to shuffles, insertions (repetition) and deletions in the targets",
    paper="stated, with figures for translation",
    measured="BLEU: " + ", ".join(over),
    checks=gains(margins),
)

# %%
ledger.claim(
    "The loss is a convolution of the log-probabilities with the target's n-grams: cheap, and a drop-in for cross-entropy",
    paper="stated",
    measured=f"largest extra tensor {memory.largest_shape}; clean targets: {about(results['shuffle', 0.0]['EISL'])} "
    f"BLEU against {about(results['shuffle', 0.0]['CE'])}",
    checks={
        "map = convolution with I_n = with n-grams, to 1e-12": convolution_gap < 1e-12,
        "its gradient is (10) with q fixed and (11) with q following, to 1e-12": max(
            count_error, chosen_error
        )
        < 1e-12,
        "n = S = T is cross-entropy, to 1e-12": ce_gap.abs().item() < 1e-12,
        "no extra tensor larger than B T S": numbers <= 4 * 32 * 32,
        "clean targets: within 4 BLEU of CE": abs(gain("shuffle", 0.0, "CE")) <= 4,
    },
)

# %%
ledger.claim(
    "It helps non-autoregressive generation where the order is not given",
    paper="significantly better than cross-entropy",
    measured=f"two right orders: EISL {about(results['two orders', 0.5]['EISL'])}, best of cross-entropy "
    f"{about(results['two orders', 0.5]['best of CE'])} BLEU",
    checks=gains(
        {("two orders", 0.5, "best of CE"): 10, ("two orders", 0.5, "smoothed CE"): 8}
    ),
)

# %%
ledger.claim(
    "Places are chosen by the model, so it needs cross-entropy first",
    paper="used in all experiments",
    measured=f"free logits that end at the target: {about(warm_share, 2)} with, {about(cold_share, 2)} without",
    checks={
        "after cross-entropy at least 95 % end at the target": warm_share >= 0.95,
        "from random values at most 40 % do": cold_share <= 0.4,
        "padding, not masked, halves the loss": naive < masked / 2,
        "padding, masked, changes nothing": abs(masked - math.log(300)) < 1e-9,
        "a copier of its prefix: EISL below a fifth of CE": copier_eisl < copier_ce / 5,
    },
)

# %%
ledger.untested(
    "It beats cross-entropy in autoregressive translation with noisy targets",
    paper="Multi30k with a pretrained BART, growing levels of noise",
    reason="Needs a pretrained model or minutes of training; scale full trains a small GRU.",
)
ledger.untested(
    "It beats strong baselines in unsupervised style transfer",
    paper="better than the baselines",
    reason="Needs style corpora and trained classifiers as judges.",
)

# %%
ledger

# %% [markdown]
# ## What is different from the paper
#
# The paper translates, transfers style and decodes in parallel at the size of BART and of full transformers; here one layer
# learns a secret dictionary of 300 words. The noise kinds are the paper's in spirit, not in their exact recipe, "delete" and
# "two orders" are ours. The experiment includes $n = 1$, which the example settings of the released code leave out: short
# pieces survive a shuffle better, by (12). The lengths of the outputs are given. The derivation is not the paper's either: it
# keeps the KL term of (4), and so shows that the loss with chosen places is no upper bound. `scale="full"` takes 1500 words, a
# larger model, five kinds of noise at six levels, and the autoregressive decoder. It reads nothing from disk.
#
# ## Exercises
#
# **1.** A target of $S$ words is cut into $k$ blocks, which are put in another order so that no two stay neighbours. Write
# `kept_share(S, n, k)`, the share of its n-grams that still are n-grams of the clean text (all words differ, all blocks are at
# least $n$ long).


# %% tags=["exercise"]
def check_1(answer):
    assert math.isclose(answer(12, 2, 2), 10 / 11), "one seam, one new bigram"
    text = list(range(20))
    blocks = [text[15:], text[10:15], text[5:10], text[:5]]
    turned = sum(blocks, [])
    for n in (1, 2, 3, 4):
        pieces = [{tuple(x[i : i + n]) for i in range(21 - n)} for x in (text, turned)]
        assert math.isclose(answer(20, n, 4), len(pieces[0] & pieces[1]) / (21 - n))


# %% tags=["solution", "hide-cell"]
def kept_share(S, n, k):
    return 1 - (k - 1) * (n - 1) / (S - n + 1)


check_1(kept_share)

# %% [markdown]
# **2.** Repair the bound: add to $-\sum_t q(t) h(t)$ what (4) asks for with a uniform prior, for any $q$. Write `repaired(h,
# q)` for vectors. It must be at least the ideal loss for every $q$, and equal to it at the softmax.


# %% tags=["exercise"]
def check_2(answer):
    for _ in range(20):
        h, q = torch.randn(7).double() * 3, torch.rand(7).double()
        ideal = math.log(7) - h.logsumexp(0).item()
        at_best, elsewhere = answer(h, h.softmax(0)), answer(h, q / q.sum())
        assert at_best is not None and abs(float(at_best) - ideal) < 1e-9
        assert float(elsewhere) > ideal, "an upper bound for every q"


# %% tags=["solution", "hide-cell"]
def repaired(h, q):
    return -(q * h).sum() + (q * (q * len(q)).log()).sum()


check_2(repaired)

# %% [markdown]
# ## Summary
#
# - Gather the target's columns; a clean passage is a diagonal strip of this small matrix, wherever it stands. Sums along
#   diagonals score n-grams, a softmax over output places chooses where to look.
# - An edit costs a few n-grams; cross-entropy pays for every word behind it. The gain is largest where edits *shift* the target
#   or where several orders are right. On clean targets there is none.
# - The gradient is cross-entropy against labels that the model chooses itself. Hence: cross-entropy first, EISL second.
# - Mask the padding, take the softmax over *output* places, and average over n-grams. The chosen places drop a KL term: the
#   loss is useful, but no bound.
#
# **Further reading.** {cite:t}`gu2018nonautoregressive` introduced the parallel decoder and describe why several right answers
# hurt it; {cite:t}`jang2017categorical` is the source of the relaxed choice. For labels that lie about *which* class and not
# about *where*, see [label distributionally robust losses](label-distribution-robust-loss.ipynb).
