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
# # Two models, one text: switching by entropy
#
# Most tokens of a text are easy, and a large model spends as much on an easy one as on a hard one. Entropy adaptive
# decoding {cite:p}`entropy-adaptive-decoding` lets a small model write, watches how uncertain the writer is, and hands over to
# the large model while the uncertainty stays high. Nothing is verified: the text may differ from the large model's, and that is
# what buys the saving. You build the rule, count its cost in two ways of which the paper reports one, and find where it works
# and where it must fail: a hard token is caught only if uncertainty comes *before* it.

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
from scipy.stats import entropy as scipy_entropy
from torch.nn.utils.rnn import pad_sequence

from lib.claims import Ledger, about
from lib.information import entropy_from_logits
from lib.models import (
    GPT,
    entropy_adaptive,
    replay_switching,
    scheduled_switching,
    speculative,
)
from lib.train import fit

plt.style.use("lib.book")
torch.manual_seed(seed)
rng = np.random.default_rng(seed)
ledger = Ledger("entropy-adaptive-decoding", scale, seed)
settings = {
    "ci": dict(items=60, steps=230, width=64, depth=1, texts=100),
    "full": dict(items=500, steps=3000, width=128, depth=4, texts=1000),
}[scale]

# %% [markdown]
# ## The problem
#
# You need a text with easy and hard parts and an answer that can be checked. Here is one. The prompt is a list of letters and
# digits; the text reads the three digits out again, with much talk between. The talk is easy. A digit is hard: it has to be looked
# up.
#
# The prompt begins with a word for the style. In the `free` style the verb before a letter is any one of four, at random; in the
# `plain` style it is always *take*. This looks like a detail, and will decide everything.

# %%
LETTERS, DIGITS = "pqr", "0123456789"
VERBS = ["take", "find", "read", "note"]
OPENINGS = """here is how we read all of it .
let us see .
this is easy once you know how the list is made .""".splitlines()
LINKS = [
    "we start on the left and|to begin with you|the first letter is easy to find , so we",
    "then we move one on and|after that you|with this one done we go on to the next and",
    "at the very end we also|last you|now only one of them is left , which we",
]
LINKS = [text.split("|") for text in LINKS]
CLOSINGS = """this is all that there is to say so have a nice day .
and that was it .
you may check each of these three numbers with the list again .""".splitlines()
templates = [*OPENINGS, *itertools.chain(*LINKS), *CLOSINGS]
VOCABULARY = sorted({word for text in templates for word in text.split()} | set(VERBS))
VOCABULARY += [*LETTERS, *DIGITS, ":", "free", "plain", "<end>"]
NUMBER = {word: index for index, word in enumerate(VOCABULARY)}
END, V = NUMBER["<end>"], len(VOCABULARY)


def make_prompt(style, digits):
    pairs = itertools.chain(*zip(LETTERS, map(str, digits), strict=True))
    return [style, *pairs, ":"]


def make_item(rng, short=False):
    """Words of a prompt and its text; `short` ones are three look-ups and nothing else."""
    style, digits = rng.choice(["free", "plain"]), rng.integers(10, size=3)

    def pick(options):
        return options[rng.choice(3, p=(0.7, 0.2, 0.1))].split()

    def look_up(k):
        verb = VERBS[rng.integers(4)] if style == "free" else "take"
        return [verb, LETTERS[k], str(digits[k]), "."]

    words = make_prompt(style, digits)
    if short:
        return words + [word for k in rng.permutation(3) for word in look_up(k)]
    words += pick(OPENINGS)
    for k in range(3):
        words += pick(LINKS[k]) + look_up(k)
    return [*words, *pick(CLOSINGS), "<end>"]


def tensors(count, rng, short=False):
    """Inputs and targets; the prompt and the padding are not targets."""
    items = [make_item(rng, short) for _ in range(count)]
    rows = [torch.tensor([NUMBER[w] for w in item]) for item in items]
    padded = pad_sequence(rows, batch_first=True, padding_value=-100)
    targets = padded[:, 1:].clone()
    targets[:, :7] = -100
    return padded[:, :-1].clamp(min=0), targets


for style_seed in (seed, seed + 7):
    print(" ".join(make_item(np.random.default_rng(style_seed))))
print(f"{V} words")

# %% [markdown]
# Two transformers learn this language. The small one is a thirteenth of the large one, and it reads texts whose lists have been replaced
# by random ones. So it learns where a digit stands and not which: it must be uncertain there, and it knows the talk. The
# large one begins with 130 steps of look-ups without any talk. That is the pair that the method needs, in its purest form: a large model
# that is better, and a small one that is good at most tokens and honest about the others.

# %%
generator = torch.Generator().manual_seed(seed)


def batches(data, size, steps):
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (size,), generator=generator)
        yield data[0][rows], data[1][rows]


def train_gpt(data, steps, rate, **shape):
    model = GPT(V, 96, **shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=0.1
    )
    fit(
        model, lambda model, x, y: model(x, y)[1], data, optimizer=optimizer, schedule=schedule,
        steps=steps, clip_norm=1.0, desc="training", progress=False,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


items, look_ups = tensors(1200, rng), tensors(2000, rng, short=True)
steps = settings["steps"]
large = train_gpt(
    itertools.chain(batches(look_ups, 64, 130), batches(items, 16, steps)),
    130 + steps, 8e-3, dim=settings["width"], depth=settings["depth"], num_heads=4,
)  # fmt: skip
blind = items[0].clone()
blind[:, 2:7:2] = NUMBER["0"] + torch.randint(10, (len(blind), 3), generator=generator)
small = train_gpt(
    batches((blind, items[1]), 16, 2 * steps), 2 * steps, 1.5e-2, dim=12, depth=1, num_heads=2
)  # fmt: skip
sizes = [sum(p.numel() for p in model.parameters()) for model in (small, large)]
print(f"parameters: {sizes[0]} and {sizes[1]}")

# %% [markdown]
# How uncertain is each model before each word of a text that the large one writes?

# %%
TEMPERATURE, LONGEST = 0.5, 80


def make_prompts(count, style, rng):
    digits = rng.integers(10, size=(count, 3))
    words = [make_prompt(style, row) for row in digits]
    return torch.tensor([[NUMBER[w] for w in row] for row in words]), digits


def words_of(tokens):
    words = [VOCABULARY[t] for t in tokens.tolist()]
    return words[: words.index("<end>")] if "<end>" in words else words


def solved(tokens, digits):
    """Whether each text reads out the three letters in order, each with its digit."""
    hits = []
    for row, truth in zip(tokens, digits, strict=True):
        words = words_of(row)
        said = [pair for pair in itertools.pairwise(words) if pair[0] in LETTERS]
        hits.append(said == list(zip(LETTERS, map(str, truth), strict=True)))
    return torch.tensor(hits).double()


def only(which, prompts, temperature=TEMPERATURE):
    plan = torch.full((len(prompts), LONGEST), which)
    draw = torch.Generator().manual_seed(seed)
    return scheduled_switching(
        small, large, prompts, plan, temperature=temperature, end=END, generator=draw
    )


prompt, _ = make_prompts(1, "free", np.random.default_rng(seed))
text, _ = only(True, prompt, temperature=0.0)
words = [*words_of(text[0]), "<end>"]
whole = torch.cat([prompt, text], 1)[:, :-1]
uncertainty = [
    entropy_from_logits(model(whole)[0, 7:], 2)[: len(words)]
    for model in (small, large)
]
figure, axes = plt.subplots(figsize=(9, 3.4))
place = np.arange(len(words))
for offset, bits, name in zip(
    (-0.2, 0.2), uncertainty, ("small", "large"), strict=True
):
    axes.bar(place + offset, bits, 0.4, label=f"{name} model")
axes.set_xticks(place, words, rotation=90, fontsize=7)
axes.set(
    title="The small model is lost at the digits, and both are unsure where anything goes",
    ylabel="entropy before the word (bits)",
)
axes.set_ylim(0, 4.2)
axes.legend(loc="upper center", ncols=2)
plt.show()

# %% [markdown]
# The small model does not know the digits: its entropy there is nearly $\log_2 10 \approx 3.3$ bits. Both are
# unsure at the verbs, two bits for four equal choices, and a little where a new phrase begins. Everywhere else the small model
# knows what comes. Two kinds of uncertainty look alike from outside: *I do not know*, at the digits, where the large model
# would help, and *anything goes*, at the verbs, where it would not.

# %% [markdown]
# ## Derivation
#
# ### Uncertainty in bits
#
# Let $\ell \in \mathbb R^V$ be the logits of the model that is about to write token $t$, $p = \mathrm{softmax}(\ell)$ at temperature 1.
# With $\log p_i = \ell_i - \mathrm{LSE}(\ell)$ its entropy is
#
# $$ H_t = -\sum_i p_i \log_2 p_i = \frac{1}{\ln 2} \Big( \mathrm{LSE}(\ell) - \sum_i p_i\, \ell_i \Big),
# \qquad 0 \le H_t \le \log_2 V . \tag{1} $$
#
# No logarithm of a small $p_i$ is taken. Two traps stand here. Entropy in nats is smaller by $\ln 2$, so a threshold in bits is too
# high for it. And the temperature of sampling must not enter, or the threshold changes its meaning with every setting.

# %%
logits = torch.randn(50, V, dtype=torch.float64) * 3
bits = entropy_from_logits(logits, 2)
assert np.allclose(bits, scipy_entropy(logits.softmax(1), axis=1, base=2))
assert torch.allclose(
    bits, (logits.logsumexp(1) - (logits.softmax(1) * logits).sum(1)) / math.log(2)
)
assert abs(entropy_from_logits(torch.zeros(V), 2) - math.log2(V)) < 1e-5

# %% [markdown]
# ### The rule
#
# One token is a poor witness, so the rule averages the last $w$ entropies, each of the model that wrote that token:
#
# $$ \bar H_t = \frac{1}{\min(w, t)} \sum_{s = \max(1, t - w + 1)}^{t} H_s, \qquad
# M_{t+1} = \begin{cases} \text{large} & \bar H_t > \tau \cr \text{small} & \text{otherwise,} \end{cases} \tag{2} $$
#
# and a model that took over stays for at least $m$ tokens. The window goes on across a switch. The paper takes $w = 5$ and
# names the condition of stability; this chapter takes $m$ as a parameter. What the rule says about the first token is
# a matter of taste; here an empty window counts as $\log_2 V$, knowing nothing. So $\tau \le 0$ is the large model alone and
# $\tau \ge \log_2 V$ the small one.
#
# Look at the indices. Token $t$ is written before $H_t$ can switch anything: running the large model as well, to see what *it* would
# say, would cost more than the large model alone. So $H_t$ decides about $t + 1$. Suppose a single token has entropy $h$ and its
# neighbours none. Then
#
# $$ \bar H_s = \frac{h}{w} \quad \text{for } s = t, \dots, t + w - 1, \tag{3} $$
#
# and it calls the large model if $h > w \tau$, for $w$ tokens, from token $t + 1$ on. The uncertain token itself has
# been written by the small model. Hence a statement that you can test:
#
# > The rule helps with a hard token only if uncertain tokens stand at most $w$ places before it.
#
# In the `free` style the verb is uncertain, two places before the digit. In the `plain` style nothing is.

# %%
spike = torch.zeros(1, 20).double()
spike[0, 6] = 2.0  # bits, at the seventh token
for tau in (0.39, 0.41):
    path = replay_switching(spike, spike, V, tau=tau, window=5, min_stay=1)
    print(f"tau {tau}: large model at tokens {(path[0].nonzero()[:, 0] + 1).tolist()}")

# %% [markdown]
# The first token is the large model's by the convention. The spike, of height $2 = 5 \cdot 0.4$ bits at token 7, calls it for
# tokens 8 to 12 at the lower threshold and not at the higher.
#
# ### What it costs
#
# Let the models have $P_S$ and $P_L$ parameters and let the large one write a share $\rho$ of $T$ tokens. With cost proportional to parameters,
#
# $$ \frac{C}{P_L T} = \rho + (1 - \rho) \frac{P_S}{P_L}, \qquad \text{saving} = (1 - \rho) \Big(1 - \frac{P_S}{P_L}\Big) . \tag{4} $$
#
# The figures of the abstract fit (4), which shows that this is how the cost was counted:

# %%
identities = {}
for pair, (rho, ratio, said, score, alone) in {
    "LLaMA 3B and 11B": (0.43, 3 / 11, 0.415, 50.4, 52.1),
    "Qwen 1.5B and 14B": (0.25, 1.5 / 14, 0.67, 74.3, 80.0),
}.items():
    saving = (1 - rho) * (1 - ratio)
    identities[pair] = abs(saving - said)
    print(
        f"{pair}: saving by (4) {saving:.3f}, reported {said}; quality {score / alone:.3f}"
    )

# %% [markdown]
# Equation (4) leaves something out. A transformer writes token $t + 1$ from the keys and values of tokens $1 \dots t$, and each model
# has its own. When a model comes back after $g$ tokens of the other, it must read them first. Keep both caches and fill them only
# when needed; then each model reads every token once, up to its own last turn. Let $n$ be the length of the prompt and $T_L, T_S$ the
# last tokens that each wrote ($n + T_M - 1$ tokens have been read by then, none if a model never wrote). Then
#
# $$ C_{\text{read}} = P_L\, (n + T_L - 1) + P_S\, (n + T_S - 1) . \tag{5} $$
#
# The share $\rho$ has gone. In arithmetic, the large model has saved only what comes **after its last turn**; if the
# final answer is hard, it has saved nothing. What (4) counts is something else, the number of *sequential passes* over the large
# model's weights: $g$ tokens read together cost one pass. Where passes are limited by reading weights from memory, as
# with one text at a time, (4) is near the truth; where arithmetic is the limit, as in a large batch, (5) is.
#
# ### What diverges
#
# The switched text has a law of its own, $Q$; the active model is a function of the text so far, so the chain rule of the
# divergence is exact:
#
# $$ \mathrm{KL}(P_L \,\|\, Q) = \mathbb E_{x \sim P_L} \sum_{t :\, M_t(x) = \text{small}}
# \mathrm{KL}\big( p_L(\cdot \mid x_{<t}) \,\|\, p_S(\cdot \mid x_{<t}) \big) . \tag{6} $$
#
# Tokens of the large model add zero. So the divergence can be measured on texts of the large model alone, by replaying the rule.
#
# Speculative decoding {cite:p}`leviathan2023fast` keeps it at zero. The small model proposes $x \sim q$; it is kept with probability
# $\min(1, p(x) / q(x))$, else a token is drawn from the normalised remainder $(p - q)_+$. A token $x$ then comes out with
# probability
#
# $$ q(x) \min\Big(1, \frac{p(x)}{q(x)}\Big) + \Big(1 - \sum_y \min(p(y), q(y))\Big)
# \frac{(p(x) - q(x))_+}{\sum_y (p(y) - q(y))_+} = p(x) , \tag{7} $$
#
# since $1 - \sum \min(p, q) = \sum (p - q)_+$ and $\min(p, q) + (p - q)_+ = p$. The price: the large model reads *every* token.
#
# ### What to compare with
#
# Toss a coin for each item, and let the large model write it with probability $\rho$. The expected accuracy is the **chord**
#
# $$ A(\rho) = \rho A_L + (1 - \rho) A_S . \tag{8} $$
#
# A coin for each *token* does worse when an item has several hard tokens: with $k$ of them, and a small model that never gets
# one right, accuracy is about $\rho^k A_L$. A rule that is worth its trouble lies above the chord, not only above the second curve.

# %% [markdown]
# ## Reference implementation
#
# Greedy, one text, no caches. `small` and `large` map a list of tokens to the logits of the next one.


# %% tags=["reference"]
import math

import torch


def entropy_adaptive_decoding(
    small, large, prompt, *, tau, window, min_stay, max_new, vocab_size
):
    """Tokens written after `prompt`, and for each whether the large model wrote it. Entropies and tau in bits."""
    text, path, entropies = list(prompt), [], []
    highest = math.log2(vocab_size)
    use_large, stayed = tau < highest, 0
    for _ in range(max_new):
        logits = (large if use_large else small)(text)
        log_probs = torch.log_softmax(logits, 0)
        entropies.append(-(log_probs.exp() * log_probs).sum().item() / math.log(2))
        text.append(int(logits.argmax()))
        path.append(use_large)
        stayed += 1
        recent = entropies[-window:]
        wanted = tau <= 0 or (tau < highest and sum(recent) / len(recent) > tau)
        if wanted != use_large and stayed >= min_stay:
            use_large, stayed = wanted, 0
    return text[len(prompt) :], path


# %% tags=["reference"]
import torch


def speculative_token(p, q, proposal, u):
    """Keep `proposal`, drawn from q, if the uniform number u allows it; else None, and the law to draw from instead."""
    if u * q[proposal] < p[proposal]:
        return proposal, None
    rest = (p - q).clamp(min=0)
    return None, rest / rest.sum()


# %% [markdown]
# By hand: a small model that is certain until the text ends with 1, then knows nothing (1 bit of 2 tokens), against a large one that
# always says 0. With $w = 2$ the doubt weighs half a bit. And $p = (0.5, 0.5)$, $q = (0.8, 0.2)$: token 0 is kept with
# probability $5/8$, what remains is all on token 1, and token 0 comes out with $0.8 \cdot 5/8 = 0.5$.


# %%
def doubtful(text):
    return torch.tensor([0.0, 0.0]) if text[-1] == 1 else torch.tensor([0.0, 99.0])


def certain(text):
    return torch.tensor([99.0, 0.0])


def by_hand(tau):
    return entropy_adaptive_decoding(
        doubtful, certain, [0], tau=tau, window=2, min_stay=1, max_new=5, vocab_size=2
    )


# the empty window calls the large model first, which is certain; then the small one writes 1, doubts, writes 0
assert by_hand(0.4) == ([0, 1, 0, 0, 0], [True, False, False, True, True])
assert by_hand(0.6) == ([0, 1, 0, 1, 0], [True, False, False, False, False])  # fmt: skip
assert by_hand(1.0)[1] == [False] * 5 and by_hand(0.0)[1] == [True] * 5

p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2])
assert speculative_token(p, q, 0, 0.62) == (0, None)
refused, rest = speculative_token(p, q, 0, 0.63)
assert refused is None and rest.tolist() == [0, 1]

# %% [markdown]
# ## The library
#
# `lib.models.entropy_adaptive` writes many texts at once. All rows advance together, each with its own active model and, if you
# like, its own threshold; each model keeps a cache for every row and reads what it missed in one pass. The
# `lib.models.GenerationTrace` says who wrote what, and what was read for it. It must agree with the reference, whose full forward
# passes cannot get a cache wrong.

# %%
styles = {
    name: make_prompts(settings["items"], name, rng) for name in ("free", "plain")
}
few = torch.cat([styles["free"][0][:3], styles["plain"][0][:3]])
forward = [
    lambda tokens, model=model: model(torch.tensor([tokens]))[0, -1]
    for model in (small, large)
]
mistakes, entropy_error, read_error = 0, 0.0, 0
for tau in (0.0, 0.3, 0.5, math.log2(V)):
    tokens, trace = entropy_adaptive(
        small, large, few, tau=tau, min_stay=2, max_new=30
    )  # fmt: skip
    for row in range(len(few)):
        expected, path = entropy_adaptive_decoding(
            *forward, few[row].tolist(), tau=tau, window=5, min_stay=2, max_new=30, vocab_size=V
        )  # fmt: skip
        mistakes += tokens[row].tolist() != expected or trace.large[row].tolist() != path  # fmt: skip
        whole = torch.cat([few[row], tokens[row]])[None, :-1]
        laws = torch.stack([m(whole)[0, 7:].double().softmax(-1) for m in (small, large)])  # fmt: skip
        wrote = laws[trace.large[row].long(), torch.arange(30)]
        exact = scipy_entropy(wrote, axis=1, base=2)
        entropy_error = max(entropy_error, np.abs(exact - trace.entropy[row].numpy()).max())  # fmt: skip
    if 0 < tau < 1:  # equation (5): each model reads up to its last turn, and once
        turns = torch.arange(1, 31)
        for mine in (trace.large, ~trace.large):
            read = ((1 + trace.prefill) * mine).sum(1)
            last = (turns * mine).amax(1)
            read_error += int((read != (few.shape[1] + last - 1) * (last > 0)).sum())
print(f"texts that differ from the reference: {mistakes} of 24; miscounted: {read_error}")  # fmt: skip
alone = [
    torch.equal(
        entropy_adaptive(small, large, few, tau=tau, max_new=LONGEST, end=END)[0],
        only(which, few, temperature=0.0)[0],
    )
    for tau, which in ((0.0, True), (math.log2(V), False))
]
assert all(alone)

# %% [markdown]
# One text of the method, its writers and its rolling entropy:

# %%
tau_shown = 0.4
tokens, trace = entropy_adaptive(
    small, large, styles["free"][0][:1], tau=tau_shown, min_stay=2, max_new=LONGEST, end=END
)  # fmt: skip
words = [VOCABULARY[t] for t in tokens[0].tolist()]
figure, axes = plt.subplots(figsize=(9, 3.4))
place = np.arange(len(words))
axes.bar(place, trace.entropy[0], color=np.where(trace.large[0], "C1", "C0"))
axes.plot(place, trace.rolling[0], "k.-", lw=1, label=r"rolling mean $\bar H_t$")
axes.axhline(tau_shown, color="grey", ls=":", label=r"threshold $\tau$")
axes.bar(0, 0, color="C0", label="small model wrote it")
axes.bar(0, 0, color="C1", label="large model wrote it")
axes.set_xticks(place, words, rotation=90, fontsize=7)
axes.set(title="The uncertain verb calls the large model in time", ylabel="entropy (bits)")  # fmt: skip
axes.set_ylim(0, 3.2)
axes.legend(ncols=2, fontsize=8, loc="upper right")
plt.show()

# %% [markdown]
# The small model (blue) writes until the verb lifts the mean (black) above the threshold; the large one (orange) then writes letter
# and digit, and stays while the verb is in the window. Doubts at the beginning of a phrase call it too, sometimes for nothing.
#
# ## Experiment
#
# Both styles, sampled at temperature 0.5 (entropies are taken before it), with five thresholds between the extremes, $w = 5$ and
# $m = 2$. Random switching tosses a coin for every token, with the share that the rule had; periodic switching uses the large model in
# the first $10 \rho$ of every ten tokens, from a random offset. Thresholds are rows of one batch.

# %%
inner = (0.2, 0.3, 0.4, 0.5, 0.7)
taus = (0.0, *inner, math.log2(V))


def sweep(style, taus, plan=None, **options):
    """Accuracy, share, cost by (4), cost by (5) and switches, one row a threshold, or a share if `plan` is given."""
    prompts, digits = styles[style]
    count = len(prompts)
    draw = torch.Generator().manual_seed(seed + 1)
    every, truth = prompts.repeat(len(taus), 1), np.tile(digits, (len(taus), 1))
    values = torch.tensor(taus, dtype=torch.float64).repeat_interleave(count)
    common = dict(temperature=TEMPERATURE, end=END, generator=draw)
    if plan:
        tokens, trace = scheduled_switching(small, large, every, plan(values, draw), **common)  # fmt: skip
    else:
        tokens, trace = entropy_adaptive(
            small, large, every, tau=values, max_new=LONGEST, **(dict(min_stay=2) | options), **common
        )  # fmt: skip
    costs = trace.cost(*sizes), trace.cost(*sizes, prefill=True)
    columns = [solved(tokens, truth), trace.share(), *costs, trace.switches()]
    return torch.stack([c.double().view(len(taus), -1).mean(1) for c in columns], 1).numpy()  # fmt: skip


def coin(shares, draw):
    return torch.rand(len(shares), LONGEST, generator=draw) < shares[:, None]


def periodic(shares, draw):
    offset = torch.randint(10, (len(shares), 1), generator=draw)
    return (torch.arange(LONGEST) + offset) % 10 < 10 * shares[:, None]


results = {style: sweep(style, taus) for style in styles}
chance = {style: sweep(style, results[style][1:-1, 1], coin) for style in styles}
clock = {style: sweep(style, results[style][1:-1, 1], periodic) for style in styles}
for style in styles:
    print(f"{style}: accuracy, share of the large model, cost by (4), cost by (5), switches; random, periodic")  # fmt: skip
    for tau, row, *others in zip(
        taus, results[style], [None, *chance[style], None], [None, *clock[style], None], strict=True
    ):  # fmt: skip
        cells = [about(x, 2) for x in (*row, *(r[0] for r in others if r is not None))]
        print(f"  tau {tau:.2f} " + "".join(f"{cell:>9}" for cell in cells))

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
for axes, style in zip(panels, styles, strict=True):
    table = results[style]
    ends = table[[0, -1]]
    axes.plot(ends[:, 2], ends[:, 0], "k--", lw=1, label="chord: a coin for each item")
    axes.plot(table[:, 2], table[:, 0], "o-", label="entropy adaptive, cost by (4)")
    axes.plot(table[:, 3], table[:, 0], "o:", color="C0", mfc="w", label="the same, cost by (5)")  # fmt: skip
    axes.plot(chance[style][:, 2], chance[style][:, 0], "s", color="C1", label="a coin for each token")  # fmt: skip
    axes.plot(clock[style][:, 2], clock[style][:, 0], "^", color="C2", label="periodic")  # fmt: skip
    axes.set_xlabel("cost (large model alone = 1)")
panels[0].set(title="Announced digits: far above the chord", ylabel="items solved")
panels[1].set_title("Unannounced digits: below chance")
panels[1].legend(fontsize=8, loc="upper left")
plt.show()

# %% [markdown]
# Left, the `free` style: at half the cost the method solves nearly what the large model solves, far above the chord and the
# coins. Right, the same models, the same rule, the same digits, and no uncertain verb: the curve falls to the bottom at once, *below*
# a coin for each token. The rule sends the large model where it is not needed, at the beginnings of phrases, and calls it after each
# digit, when the harm is done. The dotted curve is the left one with every token read paid for, equation (5): it hugs the right
# edge.
#
# ### The window and the stay

# %%
grid = {}
for window, stay in ((1, 1), (1, 2), (3, 1), (5, 1), (5, 2), (5, 5), (10, 1)):
    grid[window, stay] = sweep("free", (0.3, 0.4), window=window, min_stay=stay).mean(0)
print(
    "free style, mean over tau = 0.3, 0.4: accuracy, share of the large model, switches"
)
for (window, stay), row in grid.items():
    print(f"  w {window:2d}, m {stay}" + "".join(f"{about(row[i], 2):>9}" for i in (0, 1, 4)))  # fmt: skip

# %% [markdown]
# With $w = 1$, one token, the alarm of the verb lasts one token; the letter, which is easy, cancels it, and the small model writes
# the digit. Averaging makes an alarm *last*, which (3) says and which matters more here than smoothing. The minimum stay cuts both
# ways. It keeps the large model; and after a false alarm it keeps the small one, through the next digit if that
# comes soon. With $m = w = 5$ more than half of the gain is lost.
#
# ### Two traps

# %%
texts = make_prompts(settings["texts"], "free", rng)[0]
long_tokens, long_trace = only(True, texts)
written = long_trace.written
whole = torch.cat([texts, long_tokens], 1)[:, :-1]
logits = [model(whole)[:, 7:].double() for model in (small, large)]
rule = dict(tau=0.4, min_stay=2)
for name, factor, base in (("right", 1, 2), ("in nats", 1, math.e), ("after temperature", 1 / TEMPERATURE, 2)):  # fmt: skip
    entropies = [entropy_from_logits(factor * x, base) for x in logits]
    path = replay_switching(*entropies, V, **rule)
    print(f"entropy {name}: large model writes {about(path[written].double().mean().item(), 2)} of the tokens")  # fmt: skip
print(f"running both models on every token costs {about(1 + sizes[0] / sizes[1], 3)} times the large one")  # fmt: skip

# %% [markdown]
# Same threshold, other unit, other behaviour. And whoever evaluates the large model to decide whether to use it has no saving left.
#
# ### What diverges, measured
#
# Texts of the large model, the rule replayed on them, and (6) summed with the probabilities at the temperature of sampling. The same
# number comes another way: the mean log ratio of the two laws over the same texts, which needs no sum over the vocabulary.

# %%
entropies = [entropy_from_logits(x, 2) for x in logits]
log_small, log_large = [(x / TEMPERATURE).log_softmax(-1) for x in logits]
terms = F.kl_div(log_small, log_large, log_target=True, reduction="none").sum(-1)
picked = long_tokens.unsqueeze(-1)
ratios = (log_large - log_small).gather(-1, picked)[..., 0]
divergence = []
for tau in taus:
    by_small = ~replay_switching(*entropies, V, tau=tau, min_stay=2) & written
    exact, sampled = [(x * by_small).sum(1) / math.log(2) for x in (terms, ratios)]
    noise = (sampled - exact).std() / len(texts) ** 0.5
    divergence.append([exact.mean().item(), sampled.mean().item(), noise.item()])
divergence = np.array(divergence)
print("tau, KL(large || switched) by (6), by the log ratio, bits a text:")
for tau, row in zip(taus, divergence, strict=True):
    print(f"  {tau:.2f} {about(row[0]):>10} {about(row[1]):>10}")

# %% [markdown]
# ### Speculative decoding
#
# The same pair with drafts of four tokens. At temperature 0 the text must be that of the large model, token for token. How many
# passes of the large model does it need, and how many tokens does it read?

# %%
greedy_spec, count = speculative(small, large, texts[:16], draft=4, max_new=LONGEST, end=END)  # fmt: skip
greedy_large, plain_trace = only(True, texts[:16], temperature=0.0)
tokens_written = count.written.sum().item()
passes = count.passes.sum().item() / tokens_written
read = (count.drafted + count.passes).sum().item() / tokens_written
identical = torch.equal(greedy_spec, greedy_large)
print(f"large model: {about(passes, 2)} passes and {about(read, 2)} tokens read for each token written")  # fmt: skip
print(f"drafts accepted: {about((count.accepted.sum() / count.drafted.sum()).item(), 2)}")  # fmt: skip

# the law of one token, (7), by the reference: every proposal and its chance
p, q = log_large[0, 5].exp(), log_small[0, 5].exp()
kept = torch.minimum(p, q)
_, rest = speculative_token(p, q, int((q - p).argmax()), 1.0)
assert torch.allclose(kept + (1 - kept.sum()) * rest, p)

# %% [markdown]
# Speculative decoding needs *fewer* passes than switching does, with not a word changed: most words are easy, so most drafts stand. It
# pays in arithmetic, since the large model reads every token and the refused ones too. So counted in passes, by which the
# saving was reported, the exact method wins here; counted in arithmetic, neither saves much.

# %% [markdown]
# ## Claims

# %%
ledger.claim(
    "The two extremes are the single models, and caches that are filled lazily change nothing",
    paper="by construction",
    measured=f"{mistakes} of 24 texts differ from full forward passes; entropies within {about(entropy_error, 1)} bit",
    checks={
        "tau = 0 and tau = log2 V: the single models, token for token": all(alone),
        "tokens and writers equal the reference without caches": mistakes == 0,
        "entropies equal scipy's, in bits, within 0.001": entropy_error < 1e-3,
        "each model reads each token once, up to its last turn": read_error == 0,
    },
)  # fmt: skip

# %%
ledger.claim(
    "The reported savings are those of the parameter count",
    paper="41.5 % with 43 % of tokens on 11B; 67 % with 25 % on 14B",
    measured="41.5 % and 67.0 % by equation (4), quality 96.7 % and 92.9 %",
    checks={f"{pair}: within 0.001": error < 1e-3 for pair, error in identities.items()},
)  # fmt: skip

# %%
free, plain = results["free"], results["plain"]


def keeps(table, cost):
    """Whether some inner threshold has 90 % of the large model's accuracy at 70 % of its cost."""
    return bool(((table[1:-1, 0] >= 0.9 * table[0, 0]) & (table[1:-1, cost] <= 0.7)).any())  # fmt: skip


best = free[1:-1][free[1:-1, 2] <= 0.7]
best = best[best[:, 0].argmax()]
ledger.claim(
    "Switching keeps 90 % of the large model's quality at 70 % of its cost",
    paper="96.7 % at 58.5 %, 92.9 % at 33 %",
    measured=f"announced digits: {about(best[0] / free[0, 0], 3)} of the quality at cost {about(best[2], 2)} by (4), "
    f"{about(best[3], 2)} by (5); unannounced: at most {about(plain[1:-1, 0].max() / plain[0, 0], 2)}",
    checks={
        "large model solves >= 85 %, small one <= 50 %, both styles": min(free[0, 0], plain[0, 0]) >= 0.85
        and max(free[-1, 0], plain[-1, 0]) <= 0.5,
        "announced: some threshold has >= 0.9 of the accuracy at cost (4) <= 0.7": keeps(free, 2),
        "announced: the same with every token read paid for, cost (5) <= 0.7": keeps(free, 3),
        "unannounced: some threshold has >= 0.9 of the accuracy at cost (4) <= 0.7": keeps(plain, 2),
    },
    fails={
        "announced: the same with every token read paid for, cost (5) <= 0.7": "The last digit stands near the end, and the "
        "large model reads all that precedes its last turn.",
        "unannounced: some threshold has >= 0.9 of the accuracy at cost (4) <= 0.7": "The rule decides about the token "
        "after the uncertain one; a digit without warning is written before it can switch.",
    },
)  # fmt: skip

# %%
chord = free[-1, 0] + (free[0, 0] - free[-1, 0]) * free[1:-1, 1]
gain = (free[1:-1, 0] - chance["free"][:, 0]).mean()
over_clock = (free[1:-1, 0] - clock["free"][:, 0]).max()
loss = (plain[1:-1, 0] - chance["plain"][:, 0]).mean()
ledger.claim(
    "Entropy chooses better than chance which tokens need the large model",
    paper="implied; no random switching is compared",
    measured=f"announced: {about(gain, 2)} above a coin for each token, at best {about(over_clock, 2)} above "
    f"periodic and {about((free[1:-1, 0] - chord).max(), 2)} above the chord; unannounced: {about(loss, 2)}",
    checks={
        "announced: >= 5 points above random switching at equal share, mean of five thresholds": gain >= 0.05,
        "announced: some threshold >= 20 points above periodic switching at equal share": over_clock >= 0.2,
        "announced: some threshold >= 20 points above the chord": (free[1:-1, 0] - chord).max() >= 0.2,
        "unannounced: >= 5 points above random switching at equal share": loss >= 0.05,
    },
    fails={
        "unannounced: >= 5 points above random switching at equal share": "Nothing warns of the digit; the large model is "
        "called to the wrong places, which is worse than chance.",
    },
)  # fmt: skip

# %%
ledger.claim(
    "A rolling mean over five tokens serves better than the last token's entropy",
    paper="w = 5 is used, against fluctuation",
    measured=f"accuracy with w = 5 {about(grid[5, 1][0], 2)}, w = 1 {about(grid[1, 1][0], 2)} (m = 1); w = 5 with m = 5 "
    f"{about(grid[5, 5][0], 2)}",
    checks={
        "m = 1: w = 5 solves >= 30 points more than w = 1": grid[5, 1][0] >= grid[1, 1][0] + 0.3,
        "m = 1: w = 5 switches less often than w = 1": grid[5, 1][4] < grid[1, 1][4],
        "w = 5: a stay of m = 5 does not cost more than 10 points against m = 1": grid[5, 5][0] >= grid[5, 1][0] - 0.1,
    },
    fails={
        "w = 5: a stay of m = 5 does not cost more than 10 points against m = 1": "After a false alarm the small model has to stay "
        "as well, and the next digit often comes within five tokens.",
    },
)  # fmt: skip

# %%
steps_of_noise = np.abs(divergence[1:, 0] - divergence[1:, 1]) / divergence[1:, 2].clip(1e-9)  # fmt: skip
ledger.claim(
    "Accepting divergence is what buys the saving; speculative decoding verifies every token",
    paper="stated",
    measured=f"KL(large || switched) {about(divergence[3, 0], 2)} bits a text at tau = 0.4, {about(divergence[-1, 0], 2)} at the "
    f"small extreme; speculative: large model reads {about(read, 3)} tokens a token, in {about(passes, 2)} passes",
    checks={
        "speculative decoding writes the large model's greedy text": identical,
        "it reads at least one token with the large model for each token written": read >= 1,
        "divergence 0 at tau = 0, and the small extreme diverges most": divergence[0, 0] == 0
        and divergence[-1, 0] == divergence[:, 0].max() > 1,
        "sum (6) and sampled log ratio agree within 5 standard errors": bool((steps_of_noise < 5).all()),
        "switching needs fewer passes of the large model than speculative decoding": best[1] < passes,
    },
    fails={
        "switching needs fewer passes of the large model than speculative decoding": "The small model is right about most words, so "
        "that most drafts of four stand as they are.",
    },
)  # fmt: skip

# %%
ledger.untested(
    "LLaMA and Qwen pairs on MATH: 96.7 % and 92.9 % of the larger model's score",
    paper="50.4 against 52.1; 74.3 against 80.0",
    reason="The models are five orders of magnitude larger than those here.",
)

# %%
ledger

# %% [markdown]
# ## What is different from the paper
#
# The paper decodes MATH with pairs of instruction-tuned models; here two tiny transformers, the larger wider and not deeper, read three
# digits out of a list, and the small one was kept from learning how. The task was built so that the two cases of the derivation can
# be told apart, so the size of the gain says nothing about mathematics. The paper's text at switching time and its minimum stay were taken from descriptions of the
# method: the decision about the next token and the parameter $m$ are this chapter's reading of it. Quality there is one run a threshold; cost is (4), without
# the tokens read at a switch. The minimum stay of the main sweep, the temperature and the margins of the claims were chosen after seeing texts of this kind, and the best
# threshold is picked on the items that are reported, so the best quality is an optimistic figure; the failures are not. Random switching, the chord, the second way to count and the unannounced case are additions.
# `scale="full"` trains larger models for longer, with five hundred items a style; it does not load the paper's models.

# %% [markdown]
# ## Exercises
#
# **1.** Write `two_costs(path, prompt, small, large)`: the costs (4) and (5), each relative to the large model alone, for a list of booleans
# `path` (True: the large model wrote the token) and a prompt of `prompt` tokens.


# %% tags=["exercise"]
def check_1(answer):
    path = [True, False, False, True, True, False]
    plan = torch.tensor([path])
    _, trace = scheduled_switching(small, large, few[:1], plan)
    expected = [trace.cost(1.0, 9.0, prefill=p).item() for p in (False, True)]
    assert np.allclose(answer(path, few.shape[1], 1.0, 9.0), expected, atol=1e-5)
    assert np.allclose(answer([True] * 3, 4, 1.0, 9.0), (1, 1)), (
        "a model that never writes reads nothing"
    )


# %% tags=["solution", "hide-cell"]
def two_costs(path, prompt, small, large):
    share = sum(path) / len(path)
    naive = share + (1 - share) * small / large
    read = 0
    for price, mine in ((large, path), (small, [not p for p in path])):
        if any(mine):
            last = max(t for t, turn in enumerate(mine) if turn)
            read += price * (prompt + last)
    return naive, read / (large * (prompt + len(path) - 1))


check_1(two_costs)

# %% [markdown]
# **2.** Let the acceptance of a draft be $\alpha$ for each token, independently, and drafts have $k$ tokens. Write `tokens_per_pass(alpha,
# k)`, the expected number of tokens that one pass of the large model yields.


# %% tags=["exercise"]
def check_2(answer):
    assert math.isclose(answer(0.0, 4), 1), "one token always comes"
    assert math.isclose(answer(1.0, 4), 5)
    assert math.isclose(answer(0.5, 2), 1.75)


# %% tags=["solution", "hide-cell"]
def tokens_per_pass(alpha, k):
    return sum(alpha**i for i in range(k + 1))


check_2(tokens_per_pass)

# %% [markdown]
# ## Summary
#
# - Average the last five entropies, in bits, before the temperature; let the large model write while the mean is above a threshold.
# - The decision comes one token late. Where uncertainty announces the hard token, half the cost keeps nearly all of the
#   quality; where it does not, the rule is worse than tossing a coin.
# - The reported saving counts passes over the weights. In arithmetic the large model reads everything before its last turn, and the saving
#   is the tail of the text.
# - Compare with random switching *and* with the chord: a coin for each item is the better baseline.
# - Speculative decoding changes nothing in the text and needs few passes as well; it is the rival to beat.
#
# **Further reading.** {cite:t}`leviathan2023fast` on speculative decoding, with its expected speed. The entropy of (1) takes one pass
# over the logits, as in [Two-pass softmax](two-pass-softmax.ipynb). What else the same entropies can tell is the subject of
# [tests on log-perplexity](log-perplexity-tests.ipynb).
