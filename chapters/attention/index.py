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
# # Attention: how hidden vectors read each other
#
# A vector on its own knows nothing of its neighbours. Attention lets it ask: it compares itself with every other
# vector, turns the comparisons into weights, and takes a weighted average. This part looks at that one step from all
# sides: as an associative memory that stores patterns and recalls them, as a kernel that can be linearised, as a
# dynamical system, as something that may have its softmax replaced or taken away.
#
# Start with [Hopfield networks](hopfield-attention.ipynb). They show that one step of a certain memory's dynamics *is* softmax attention, which
# gives the score, the temperature and the average a meaning that the later chapters build on, and derive the
# online softmax by which every fused attention works. [Hopular](hopular.ipynb) makes a network of such memories for tables: every block may look up the whole training set.
#
# **The softmax and its temperature.** [Softplus attention](softplus-attention.ipynb) takes the softmax apart, and shows in closed form which part keeps a matching key alive among millions of others.
# [Selective attention](selective-attention.ipynb) gives every token a temperature as a query and a worth as a source. [Entropy-guided attention](entropy-guided-attention.ipynb)
# asks what happens to the weights when the other nonlinearities of a transformer are taken away, and steers their entropy back.
#
# **Without the matrix of all pairs.** [Softmax-free attention](softmax-free-attention.ipynb) replaces the softmax by a Gaussian kernel, so that a few landmarks stand for all tokens.
# [The dynamical systems view](dynamical-systems-view.ipynb) writes attention, state space models and gated networks as one linear system with changing matrices, and shows what really differs:
# the size of the state and what can forget. [Lightning attention](lightning-attention.ipynb) computes one such system, linear attention that forgets, in chunks and with a constant memory.
# [Probabilistic flash attention](probabilistic-flash-attention.ipynb) leaves blocks out by lot, beside four other ideas of the same essay.
#
# **Fewer vectors, fewer coordinates, no scores.** [The latency-adjustable encoder](adjustable-latency-encoder.ipynb) lets vectors leave layer by layer according to the attention they receive, and shows when that ranking beats drawing lots and
# when it does not. [The mixture of hidden dimensions](mixture-of-hidden-dimensions.ipynb) lets every token use its own groups of coordinates. [Lazy neurons](lazy-neurons.ipynb) counts how few neurons of a
# trained perceptron block are active, derives the push that silences them, and tests what a Top-k threshold buys. [Strip-MLP](strip-mlp.ipynb) takes the scores away: fixed matrices mix the rows and columns of a feature map, and
# it shows exactly which token maps such a cascade can and cannot represent.
#
# **Attention along a chain.** [Continuous thought](continuous-thought.ipynb) feeds hidden vectors back as inputs, so that a model can look again before it answers.

# %% [markdown]
# ## Side by side
#
# All of the part's causal attentions go by a name, and `lib.models.GPT` takes it as an argument: `GPT(..., attention="selective")`. The next cell trains the same small model with each of them on the same
# English text, with the same steps and *one* learning rate for all, and reads the held-out text at up to four times the length of training. It is a demonstration of the names, not a contest: the chapters give each method the
# comparison that is fair to it.

# %% tags=["parameters"]
scale = "ci"
seed = 0

# %%
import time

import matplotlib.pyplot as plt
import torch

from lib.attention.kinds import KINDS
from lib.claims import about
from lib.data import CharTokenizer, english_text, random_windows, token_windows
from lib.models import GPT
from lib.train import PeakTensor

plt.style.use("lib.book")
context, dim, steps = {"ci": (64, 48, 60), "full": (256, 256, 5000)}[scale]
tokenizer = CharTokenizer(english_text())
tokens = tokenizer.encode(english_text())
split = len(tokens) * 9 // 10
lengths = (context // 2, context, 2 * context, 4 * context)
without_rotary = ("alibi", "lightning")  # they know positions by themselves
losses, seconds, mebibytes = {}, {}, {}
for name in KINDS:
    torch.manual_seed(seed)
    positions = "none" if name in without_rotary else "rotary"
    model = GPT(
        len(tokenizer),
        context,
        dim=dim,
        depth=2,
        num_heads=4,
        attention=name,
        positions=positions,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=7e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 7e-3, steps, pct_start=0.1
    )
    draws = torch.Generator().manual_seed(seed)
    start = time.process_time()
    for _ in range(steps):
        loss = model(*random_windows(tokens[:split], context, 16, draws))[1]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds[name] = time.process_time() - start
    with torch.no_grad():
        held_out = [
            token_windows(tokens[split : split + 4097], length) for length in lengths
        ]
        losses[name] = [model(x, y)[1].item() for x, y in held_out]
    heads = [torch.randn(1, 4, 1024, dim // 4, requires_grad=True) for _ in range(3)]
    with (
        PeakTensor() as memory
    ):  # the attention alone, forward and backward, on 1024 tokens
        model.blocks[0].attention.kind(*heads).sum().backward()
    mebibytes[name] = memory.peak_bytes / 2**20

print(
    f"{'attention':12} nats at" + "".join(f"{n:>8}" for n in lengths) + "   time   MiB"
)
for name in losses:
    row = "".join(f"{about(loss):>8}" for loss in losses[name])
    spent = about(seconds[name] / seconds["softmax"], 2)
    print(f"{name:12}        {row} {spent:>6} {mebibytes[name]:>5.1f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
for number, (name, row) in enumerate(losses.items()):
    style = {"color": f"C{number % 7}", "marker": "o" if number < 7 else "s"}
    axes[0].plot(lengths, row, label=name, **style)
    axes[1].plot(seconds[name] / seconds["softmax"], mebibytes[name], **style)
axes[0].axvline(context, color="0.6", ls=":")
axes[0].set(
    title="Loss against length (dotted: of training)",
    xlabel="characters read",
    ylabel="held-out nats per character",
    xscale="log",
)
axes[0].set_xticks(lengths, lengths)
axes[0].minorticks_off()
axes[1].set(
    title="Time and memory",
    xlabel="time of training, softmax = 1",
    ylabel="MiB on 1024 tokens",
    yscale="log",
)
figure.legend(loc="outside lower center", ncols=6)
plt.show()

# %% [markdown]
# Left: after so few steps all kinds are within little more than a tenth of a nat, and the loss hardly moves beyond the training length, because the models read only a few characters back. What helps most at this stage is
# a strong preference for near characters, as ALiBi has it. Right: what it costs.
# The fused kernel of PyTorch serves softmax and whatever only rescales its arguments (the selective kind), and takes no memory to speak of; nor do the linear kinds, which never form the matrix of pairs. The others keep all pairs here, which is tens of times as
# much at this length. Most of them have a form that works in blocks, in their chapter and in the library, and a kernel of their own that the library takes on a GPU.
#
# ## Which chapters build on which
#
# ```{map} attention
# ```
#
# ## The chapters
#
# ```{chapters} attention
# ```
