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
# # Scaling TransNormer to 175 Billion Parameters
#
# Linear attention promises time linear in the length and a memory of fixed size. In practice three things stood in its way: trained in the plain way it forms the same $L \times L$ matrix as
# softmax attention; with a decay, its usual form as a recurrence overflows; and its models were worse. TransNormerLLM {cite:p}`lightning-attention` addresses all three: tiled kernels, a
# recurrence without negative powers, and a block of gates and norms without weights. You will derive three algorithms for one sum, with their backward passes, count what they cost, see the
# overflow and its cure, and train the model beside a softmax GPT of the same size.

# %% [markdown]
# ## Setup

# %% tags=["parameters"]
scale = "ci"
seed = 0

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lib.attention import (
    diagonal_scan,
    lightning_attention,
    lightning_step,
    lrpe,
    transnormer_decay,
)
from lib.claims import Ledger, about
from lib.data import CharTokenizer, english_text, random_windows, token_windows
from lib.models import GLA, GPT, SGLU, TransNormer, ancestral_sample, srms_norm
from lib.train import PeakTensor, progress

plt.style.use("lib.book")
torch.manual_seed(seed)
generator = torch.Generator().manual_seed(seed)
ledger = Ledger("lightning-attention", scale, seed)


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# %% [markdown]
# ## The problem
#
# Take attention without softmax, in which a key counts for less the longer ago it was:
#
# $$ o_s = \sum_{t \le s} \lambda^{s-t} (q_s^\top k_t)\, v_t , \qquad 0 < \lambda \le 1 . \tag{1} $$
#
# Since $\lambda^{s-t} = \lambda^s \lambda^{-t}$, the decay can be put into queries and keys, $\tilde q_s = \lambda^s q_s$ and $\tilde k_t = \lambda^{-t} k_t$, and the sum
# $\sum_{t \le s} \tilde k_t v_t^\top$ is a plain running sum. That is the obvious way to generate text token by token. Try it on 2048 tokens.

# %%
length, width = 2048, 8
q, k, v = draw(3, length, width, dtype=torch.float32)


def running_sum(q, k, v, decay):
    """The decay as powers on both sides of a running sum: (L, d) each."""
    t = torch.arange(1, len(q) + 1, dtype=q.dtype)[:, None]
    past = ((k * decay**-t)[:, :, None] * v[:, None, :]).cumsum(0)
    return torch.einsum("td,tde->te", q * decay**t, past)


def first_bad(out):
    bad = (~out.isfinite().all(-1)).nonzero()
    return bad[0].item() + 1 if len(bad) else None


running, broken = {}, {}
for name, decay in {
    "0.9": 0.9,
    "0.99": 0.99,
    "1": 1.0,
    "exp(-8)": math.exp(-8),
}.items():
    running[name] = running_sum(q, k, v, decay)
    broken[name] = first_bad(running[name])
    limits = [
        "never"
        if decay == 1
        else math.floor(-math.log(torch.finfo(dtype).max) / math.log(decay))
        for dtype in (torch.float16, torch.float32)
    ]
    bad = "never" if broken[name] is None else about(broken[name], 2)
    print(f"decay {name:7}: first inf or nan in float32 at token {bad}; powers end at {limits[1]} (float16: {limits[0]})")  # fmt: skip

# %% [markdown]
# With $\lambda = 0.9$ it breaks after some eight hundred tokens, since $\lambda^{-t}$ exceeds the largest float32; in float16 after a hundred. $e^{-8}$ is not an invented case: it is the
# fastest head of the paper's own schedule, and there the form breaks at the twelfth token or before. The sum (1) itself is harmless. Only its form is wrong.

# %% [markdown]
# ## Derivation
#
# ### A norm instead of a denominator
#
# Linear attention {cite:p}`katharopoulos2020transformers` replaces the softmax weight by $\phi(q_s)^\top \phi(k_t)$ and divides a row by the sum of its weights. TransNormer leaves the division out and normalises what comes out of
# all heads together. $X \in \mathbb R^{L \times D}$ holds the tokens; for *gated linear attention*
#
# $$ Q = \phi(X W_q), \quad K = \phi(X W_k), \quad V = X W_v, \quad U = X W_u, \qquad \phi(x) = x\, \sigma(x) , \tag{2} $$
#
# $$ \mathrm{GLA}(X) = \big( \mathrm{SRMSNorm}(\mathrm{attn}(Q, K, V)) \odot U \big) W_o , \qquad \mathrm{SRMSNorm}(x) = \frac{x}{\lVert x \rVert_2 / \sqrt D} . \tag{3} $$
#
# $\sigma$ is the logistic function, $\phi$ is called swish; $U$ gets no activation. The norm has no weight. The second half of a block is a gated linear unit whose activation is removed, so that a product is all that bends:
#
# $$ \mathrm{SGLU}(X) = (X W_v' \odot X W_u') W_o' , \tag{4} $$
#
# and the block is $X \leftarrow X + \mathrm{GLA}(\mathrm{SRMSNorm}(X))$, then $X \leftarrow X + \mathrm{SGLU}(\mathrm{SRMSNorm}(X))$.
#
# Is the denominator not just undone by the norm? For one head with positive weights it is, as $\mathrm{SRMSNorm}(c\,x) = \mathrm{SRMSNorm}(x)$ for $c > 0$. But swish may be negative, so the sum may be negative or nearly zero; and with several heads
# under one norm each head would be divided by another number. The denominator makes another model.

# %%
x = draw(3, 8)
assert torch.allclose(srms_norm(7 * x), srms_norm(x), atol=1e-5)
assert torch.allclose(
    srms_norm(x).square().mean(-1), torch.ones(3, dtype=x.dtype), atol=1e-4
)
heads_q, heads_k, heads_v = F.silu(draw(2, 2, 12, 4)).unbind(0) + (draw(2, 12, 4),)
ones = torch.ones(2, 12, 1, dtype=torch.float64)
rows, sums = lightning_attention(
    heads_q, heads_k, torch.cat([heads_v, ones], -1), 0.9
).split([4, 1], -1)


def joined(rows):
    return srms_norm(rows.transpose(0, 1).flatten(1))


assert (joined(rows) - joined(rows / sums)).abs().max() > 0.1

# %% [markdown]
# ### Positions: a phase and a decay
#
# The weight of a pair gets a phase for each coordinate $c$ and a decay, called LRPE-d:
#
# $$ a_{st} = \lambda^{s-t} \sum_c q_{sc} k_{tc}\, e^{i \theta_c (s-t)} . \tag{5} $$
#
# For real $q$ and $k$ the released code takes the real part. As $\cos(\alpha - \beta) = \cos\alpha\cos\beta + \sin\alpha\sin\beta$, it is again a product of a vector at $s$ and one at $t$, with twice the coordinates:
#
# $$ \operatorname{Re} \sum_c q_{sc} k_{tc}\, e^{i\theta_c(s-t)} = \begin{bmatrix} q_s \odot \cos(s\theta) & q_s \odot \sin(s\theta) \end{bmatrix} \begin{bmatrix} k_t \odot \cos(t\theta) & k_t \odot \sin(t\theta) \end{bmatrix}^\top . \tag{6} $$
#
# $\theta$ is learned. Only the *first* layer has phases (its state is twice as large); the others keep the decay alone.

# %%
theta = torch.rand(4, generator=generator, dtype=torch.float64)
place = torch.arange(12)
product = lrpe(heads_q, theta, place) @ lrpe(heads_k, theta, place).mT
gap = (place[:, None] - place)[..., None] * theta
assert torch.allclose(
    product, torch.einsum("hsc,htc,stc->hst", heads_q, heads_k, gap.cos())
)

# %% [markdown]
# The decay is fixed. Head $h = 1 \dots H$ of layer $l = 0 \dots N - 1$ has
#
# $$ \lambda_{h,l} = \exp\!\Big( -\frac{8h}{H} \Big( 1 - \frac{l}{N-1} \Big) \Big) . \tag{7} $$
#
# So both indices enter, and the deepest layer has $\lambda = 1$, no decay. (The paper writes $l / L$ and no base of the index; with $N - 1$ this is the convention of the released code.) The released code has another slope, $2^{-8h/H}$ as in ALiBi, in place of $8h/H$. That is no detail:
# a key $n$ tokens ago counts $\lambda^n$, and $1/(1-\lambda)$ is how many tokens a head sees in effect.

# %%
distance = torch.arange(0, 65)
figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
windows = {}
for axis, (schedule, title) in zip(
    axes, {"exp": "Equation (7)", "alibi": "The released code"}.items(), strict=True
):
    decays = transnormer_decay(8, 24, schedule)
    assert (decays[-1] == 1).all()
    windows[schedule] = 1 / (1 - decays[0])
    for layer in (0, 12, 20, 22):
        for head, style in (
            (0 if schedule == "exp" else 7, "-"),
            (7 if schedule == "exp" else 0, ":"),
        ):
            axis.plot(distance, decays[layer, head] ** distance, style, color=f"C{(0, 12, 20, 22).index(layer)}",
                      label=f"layer {layer}" if style == "-" else None)  # fmt: skip
    axis.set(title=f"{title}: what a key is worth", xlabel="tokens ago")
axes[0].set_ylabel("decay to that power")
axes[0].legend(loc="upper right")
plt.show()
for schedule, window in windows.items():
    print(
        f"{schedule:6} first layer of 24, 8 heads: from {window.min():.2f} to {window.max():.2f} tokens in effect"
    )

# %% [markdown]
# Each colour is a layer, its slowest head solid, its fastest dotted. With (7) the first layer sees its own token and next to nothing else, and even in the middle the slowest reaches two or three: memory is the affair of the last few layers. With the released slopes
# every layer has heads that remember hundreds of tokens. Both are measured below.
#
# ### Tiles: the same matrix, never stored
#
# With $M_{st} = \lambda^{s-t}$ for $s \ge t$ and $0$ otherwise, (1) for one head is
#
# $$ O = \big( (Q K^\top) \odot M \big) V . \tag{8} $$
#
# There is no softmax over the row, so nothing has to be known of a row before its parts are added up. Cut rows and columns into blocks of $C$:
#
# $$ O_i = \sum_{j \le i} \big( (Q_i K_j^\top) \odot M_{ij} \big) V_j , \qquad (M_{ij})_{rc} = \lambda^{(i-j) C + r - c} \mathbb 1[\,(i - j) C + r \ge c\,] . \tag{9} $$
#
# Only one tile of $C \times C$ exists at a time, and the backward pass makes it again. This is the paper's **Lightning Attention**. Its memory is $O(L d)$, but it visits all pairs: its time is still $O(L^2 d)$.
# Linear memory and linear time are two different things.
#
# ### Chunks: the past as a state
#
# The tiles left of the diagonal need not be visited. Let $S_j = \sum_{t \le jC} \lambda^{jC - t} k_t v_t^\top$ be the $d \times d$ state after chunk $j$. For row $r = 1 \dots C$ of chunk $j$, everything before the chunk counts
# $\lambda^{r}$ times what it counted at the chunk's border:
#
# $$ O_j = \underbrace{\big( (Q_j K_j^\top) \odot M_C \big) V_j}_{\text{inside}} + \underbrace{E\, Q_j S_{j-1}}_{\text{before}} , \qquad E = \operatorname{diag}(\lambda^1, \dots, \lambda^C) , \tag{10} $$
#
# $$ S_j = \lambda^C S_{j-1} + (F K_j)^\top V_j , \qquad F = \operatorname{diag}(\lambda^{C-1}, \dots, \lambda^0) . \tag{11} $$
#
# All exponents are non-negative: nothing can overflow. (Writing $F$ as $\lambda^C E^{-1}$, as is tempting, brings the overflow back for $\lambda = e^{-8}$ at a chunk of twelve.) A chunk costs $O(C^2 d + C d^2)$, the whole $O(L C d + L d^2)$: linear in $L$. This form was published later,
# as Lightning Attention-2 {cite:p}`qin2024lightning`.
#
# ### Its backward pass
#
# Autograd through a loop over chunks would keep every chunk's tile and state. Do it by hand instead. $G_j$ is the gradient of the loss with respect to $O_j$, $D_j$ that with respect to $S_j$. $S_{j-1}$ enters the loss through $O_j$ and $S_j$, by (10) and (11):
#
# $$ D_{j-1} = \lambda^C D_j + Q_j^\top E\, G_j . \tag{12} $$
#
# This is the same recurrence from the right. With $A_j = (Q_j K_j^\top) \odot M_C$ and $P_j = (G_j V_j^\top) \odot M_C$, the gradient of the inside weights before the mask, the chain rule gives
#
# $$ \mathrm dQ_j = P_j K_j + E\, G_j S_{j-1}^\top , \tag{13} $$
#
# $$ \mathrm dK_j = P_j^\top Q_j + F V_j D_j^\top , \qquad \mathrm dV_j = A_j^\top G_j + F K_j D_j . \tag{14} $$
#
# (13) needs states from the left: one pass forward, in which they are made again. (14) needs $D_j$ from the right: one pass backward. $Q$, $K$ and $V$ are all that has to be kept.
#
# ### Robust inference
#
# A chunk of one token gives the recurrence for generating text,
#
# $$ S_t = \lambda S_{t-1} + k_t v_t^\top , \qquad o_t = S_t^\top q_t . \tag{15} $$
#
# It is the running sum of the beginning, $\lambda^t \sum_{j \le t} \lambda^{-j} k_j v_j^\top$. By induction: at $t = 1$ both are $k_1 v_1^\top$. If they agree at $t - 1$, then
#
# $$ \lambda^t \sum_{j \le t} \lambda^{-j} k_j v_j^\top = \lambda \cdot \lambda^{t-1} \sum_{j \le t-1} \lambda^{-j} k_j v_j^\top + k_t v_t^\top = \lambda S_{t-1} + k_t v_t^\top = S_t . \tag{16} $$
#
# So the two agree wherever the naive one is finite, and (15) has no power to overflow. It is a linear dynamical system with state matrix $\lambda I$, one of those in [the dynamical systems view](dynamical-systems-view.ipynb), and costs $3 d^2$ multiplications a head and token, however long the text is.

# %%
keys, values, queries = draw(3, 40, 4)
outer = keys[:, :, None] * values[:, None, :]
states = diagonal_scan(
    torch.tensor(0.9, dtype=torch.float64).view(1, 1, 1), outer, dim=0
)
by_recurrence = torch.einsum("td,tde->te", queries, states)
assert torch.allclose(by_recurrence, running_sum(queries, keys, values, 0.9))
assert torch.allclose(
    by_recurrence, lightning_attention(queries, keys, values, 0.9, chunk=7)
)

# %% [markdown]
# ## Reference implementation

# %% tags=["reference"]
import torch


def lightning_parallel(q, k, v, decay):
    """(L, d) each, one head with one decay: equation (8)."""
    t = torch.arange(len(q))
    gap = t[:, None] - t
    return ((q @ k.T) * (decay ** gap.clamp(min=0)).tril()) @ v


def lightning_chunked(q, k, v, decay, chunk):
    """Equations (10) and (11); the last chunk may be shorter."""
    state, parts = torch.zeros(q.shape[1], v.shape[1], dtype=q.dtype), []
    for a, b, c in zip(q.split(chunk), k.split(chunk), v.split(chunk), strict=True):
        n = len(a)
        powers = decay ** torch.arange(n + 1, dtype=q.dtype)[:, None]
        before = powers[1:] * (a @ state)
        parts.append(lightning_parallel(a, b, c, decay) + before)
        state = decay**n * state + (powers[:n].flip(0) * b).T @ c
    return torch.cat(parts)


def lightning_recurrent(q, k, v, decay):
    """Equation (15)."""
    state, parts = torch.zeros(q.shape[1], v.shape[1], dtype=q.dtype), []
    for a, b, c in zip(q, k, v, strict=True):
        state = decay * state + torch.outer(b, c)
        parts.append(a @ state)
    return torch.stack(parts)


# %% tags=["reference"]
import torch
import torch.nn.functional as F


def srms(x):
    return (
        x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    )  # a row of zeros stays zero


def transnormer_block(x, Wq, Wk, Wv, Wu, Wo, Sv, Su, So, decays):
    """x (L, D), a decay for each head: equations (2) to (4) and the two residuals. The first five matrices are (D, D)."""
    L, D = x.shape
    y, t = srms(x), torch.arange(L)
    q, k, v = F.silu(y @ Wq), F.silu(y @ Wk), y @ Wv
    q, k, v = (m.view(L, len(decays), -1).transpose(0, 1) for m in (q, k, v))
    mask = (decays[:, None, None] ** (t[:, None] - t).clamp(min=0)).tril()
    mixed = (((q @ k.mT) * mask) @ v).transpose(0, 1).reshape(L, D)
    x = x + (srms(mixed) * (y @ Wu)) @ Wo
    y = srms(x)
    return x + ((y @ Sv) * (y @ Su)) @ So


# %% [markdown]
# By hand: three tokens with $q = k = 1$, values $1, 2, 4$ and $\lambda = \tfrac12$: $1$, then $\tfrac12 + 2$, then $\tfrac14 + 1 + 4$.

# %%
one = torch.ones(3, 1)
small = torch.tensor([[1.0], [2.0], [4.0]])
by_hand = torch.tensor([[1.0], [2.5], [5.25]])
assert torch.equal(lightning_parallel(one, one, small, 0.5), by_hand)
assert torch.equal(lightning_chunked(one, one, small, 0.5, 2), by_hand)
assert torch.equal(lightning_recurrent(one, one, small, 0.5), by_hand)

# %% [markdown]
# ## The library
#
# `lib.attention.lightning_attention` has all three algorithms under their names, `impl="naive"`, `"blocked"` and `"chunked"`, the last two with the backward passes derived above. On a GPU it takes the third as fused kernels, `kernels.lightning_attention`, which multiply in half precision what comes in half precision. `lib.attention.lightning_step` is (15);
# `lib.attention.lrpe` and `lib.attention.transnormer_decay` are (6) and (7). Lengths that are no multiple of the chunk, values and gradients, against the reference in float64:

# %%
value_gap = gradient_gap = 0.0
for size in (48, 67, 130):
    data = [part.requires_grad_() for part in draw(3, 3, size, 8).unbind(0)]
    probe = draw(3, size, 8)
    decays = torch.tensor([math.exp(-8), 0.9, 1.0], dtype=torch.float64)
    theirs = torch.stack(
        [lightning_parallel(*(part[h] for part in data), decays[h]) for h in range(3)]
    )
    wanted = torch.autograd.grad((theirs * probe).sum(), data)
    forms = [lightning_attention(*data, decays, impl="naive")]
    for chunk in (16, 32, 64):
        forms += [
            lightning_attention(*data, decays, chunk=chunk, impl=impl)
            for impl in ("blocked", "chunked")
        ]
        forms.append(
            torch.stack(
                [
                    lightning_chunked(*(p[h] for p in data), decays[h], chunk)
                    for h in range(3)
                ]
            )
        )
    for ours in forms:
        value_gap = max(value_gap, (ours - theirs).abs().max().item())
        for mine, right in zip(
            torch.autograd.grad((ours * probe).sum(), data), wanted, strict=True
        ):
            gradient_gap = max(gradient_gap, (mine - right).abs().max().item())
    state, steps = torch.zeros(3, 8, 8, dtype=torch.float64), []
    with torch.no_grad():
        for token in zip(*(part.unbind(1) for part in data), strict=True):
            out, state = lightning_step(state, *token, decays)
            steps.append(out)
        value_gap = max(value_gap, (torch.stack(steps, 1) - theirs).abs().max().item())
assert value_gap < 1e-10 and gradient_gap < 1e-8

layer = GLA(12, 3, torch.tensor([0.3, 0.9, 1.0], dtype=torch.float64)).double()
mixer = SGLU(12).double()
x = draw(9, 12)
matrices = [m.T for m in (*layer.qkvu.weight.split(12), layer.out.weight, *mixer.vu.weight.split(24), mixer.out.weight)]  # fmt: skip
hidden = x + layer(srms_norm(x)[None])[0][0]
hidden = hidden + mixer(srms_norm(hidden))
block_gap = (hidden - transnormer_block(x, *matrices, layer.decay)).abs().max().item()
assert block_gap < 1e-10

# %% [markdown]
# Three things it takes care of. **Packed documents**: the decay must not carry one document's state into the next. `documents=` gives each token the number of its document. **Precision**: whatever the inputs are, sums and state are float32 or
# wider. **Handing on**: `return_state=True` reads a prompt in chunks and gives the state to go on with.

# %%
pack = draw(3, 30, 8)
numbers = torch.tensor([0] * 11 + [1] + [2] * 18)
alone = torch.cat(
    [
        lightning_attention(*pack[:, a:b].unbind(0), 0.9)
        for a, b in ((0, 11), (11, 12), (12, 30))
    ]
)
packed = lightning_attention(*pack.unbind(0), 0.9, chunk=8, documents=numbers)
packing_gap = (packed - alone).abs().max().item()
leak = (lightning_attention(*pack.unbind(0), 0.9) - alone)[12].norm() / alone[12].norm()
print(
    "packed, borders ignored: relative error of the third document's first token",
    about(leak.item(), 2),
)

drift = {}
for dtype in (torch.float32, torch.bfloat16):
    state = torch.zeros(width, width, dtype=dtype)
    exact = torch.zeros(width, width, dtype=torch.float64)
    for key, value in zip(k, v, strict=True):
        _, state = lightning_step(state, key, key, value, 1.0)
    exact = k.double().T @ v.double()
    drift[dtype] = ((state - exact).norm() / exact.norm()).item()
rounding = ((exact.bfloat16() - exact).norm() / exact.norm()).item()
print(f"state after {length} tokens without decay: float32 off by {about(drift[torch.float32], 1)}, "
      f"bfloat16 by {about(drift[torch.bfloat16], 1)}; rounding once would be {about(rounding, 1)}")  # fmt: skip

# %% [markdown]
# A state kept in bfloat16 drifts: each token is rounded against a sum that is hundreds of times larger. The robust form is robust against overflow, not against that.
#
# Now what the three algorithms cost: multiplications in matrix products, and the peak of live bytes, forward and backward, one sequence with two heads of width 16 and $C = 32$. Both are counts, not times.

# %%
lengths = {"ci": (32, 64, 128, 256), "full": (1024, 2048, 4096, 8192, 16384)}[scale]
products, peaks = {}, {}
for impl in ("naive", "blocked", "chunked"):
    for size in progress(lengths, impl):
        parts = draw(3, 2, size, 16, dtype=torch.float32).requires_grad_().unbind(0)
        with PeakTensor() as memory, FlopCounterMode(display=False) as counter:
            lightning_attention(*parts, 0.9, chunk=32, impl=impl).sum().backward()
        products[impl, size], peaks[impl, size] = (
            counter.get_total_flops() // 2,
            memory.peak_bytes,
        )
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for impl, style in (("naive", "o-"), ("blocked", "s-"), ("chunked", "^--")):
    axes[0].loglog(
        lengths, [products[impl, size] for size in lengths], style, label=impl, base=2
    )
    axes[1].loglog(
        lengths, [peaks[impl, size] for size in lengths], style, label=impl, base=2
    )
axes[0].set(
    title="Multiplications in matrix products",
    xlabel="length L",
    ylabel="forward and backward",
)
axes[1].set(title="Peak memory", xlabel="length L", ylabel="bytes alive")
axes[0].legend()
plt.show()
last, before = lengths[-1], lengths[-2]
for impl in ("naive", "blocked", "chunked"):
    print(f"{impl:8} twice the length: {products[impl, last] / products[impl, before]:.2f} times the products, "
          f"{peaks[impl, last] / peaks[impl, before]:.2f} times the memory")  # fmt: skip

# %% [markdown]
# Left, tiling alone (blocked) saves the half above the diagonal and then spends it on making tiles twice: it stays quadratic. Only the chunked form is linear. Right, both are linear in memory. The paper's factor of four is that of one
# implementation at one length; against the full matrix the factor grows without bound.

# %% [markdown]
# ## Experiment
#
# ### Robust inference
#
# The 2048 tokens of the beginning through `lib.attention.lightning_step`, in float32. Without decay the outputs grow to several hundred, so differences are given relative to the largest output.

# %%
robust, naive_gap = {}, {}
for name, decay in {
    "0.9": 0.9,
    "0.99": 0.99,
    "1": 1.0,
    "exp(-8)": math.exp(-8),
}.items():
    state, steps = torch.zeros(width, width), []
    for token in zip(q, k, v, strict=True):
        out, state = lightning_step(state, *token, decay)
        steps.append(out)
    stepped = torch.stack(steps)
    parallel = lightning_attention(q, k, v, decay, impl="naive")
    size = parallel.abs().max()
    assert stepped.isfinite().all()
    robust[name] = ((stepped - parallel).abs().max() / size).item()
    finite = slice(0, broken[name] and broken[name] - 1)
    naive_gap[name] = ((running[name] - stepped)[finite].abs().max() / size).item()
    print(f"decay {name:7}: recurrence against parallel form {about(robust[name], 1)}, "
          f"against the running sum while that is finite {about(naive_gap[name], 1)}")  # fmt: skip

# %% [markdown]
# ### A language model
#
# English text, reduced to the 26 letters and the space, so that a small model soon gets to what needs memory. Two blocks of width 32 with four heads, contexts of 64, softmax attention with rotary positions in `lib.models.GPT`, and
# `lib.models.TransNormer` with as many parameters (the SGLU's width is chosen for that; without the gate it is wider). All weights start five times as large as usual, as both models want at this width. Adam starts with a rate of $0.01$, which falls nearly to zero. Of $0.005$, $0.01$ and
# $0.02$ it was the best for the GPT and, within a few hundredths of a nat, for each of the others. Beside the paper's model: the released slopes; no decay; phases in all layers; no gate; and, as a control, $\lambda = 0$, where a token sees
# nothing but itself.

# %%
text = "".join(c if "a" <= c <= "z" else " " for c in english_text().lower())
text = " ".join(text.split())
tokenizer = CharTokenizer(text)
tokens = tokenizer.encode(text)
split = len(tokens) * 9 // 10
dim, depth, heads, context, batch, steps = {"ci": (32, 2, 4, 64, 6, 160), "full": (512, 8, 8, 1024, 32, 20_000)}[scale]  # fmt: skip
rate = {"ci": 1e-2, "full": 6e-4}[scale]
device = "cuda" if scale == "full" and torch.cuda.is_available() else "cpu"
inputs, targets = token_windows(tokens[split:], context)
inputs, targets = inputs[:100].to(device), targets[:100].to(device)
inner = {"ci": 78, "full": 1194}[scale]


def transnormer(**options):
    return TransNormer(
        len(tokenizer),
        dim=dim,
        depth=depth,
        num_heads=heads,
        **{"hidden": inner, **options},
    )


arms = {
    "softmax GPT": lambda: GPT(len(tokenizer), context, dim=dim, depth=depth, num_heads=heads, positions="rotary", norm="rms"),
    "TransNormer": transnormer,
    "released slopes": lambda: transnormer(decay="alibi"),
    "no decay": lambda: transnormer(decay=None),
    "phases everywhere": lambda: transnormer(phase="all"),
    "no gate": lambda: transnormer(gate=False, hidden=inner + dim // 3 + 1),
    "sees itself alone": lambda: transnormer(decay=torch.zeros(depth, heads)),
}  # fmt: skip


def train(make):
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if scale == "ci" and parameter.ndim == 2 and not name.endswith("theta"):
                parameter *= 5
    model.to(device)
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, steps)
    for _ in range(steps):
        x, y = random_windows(tokens[:split], context, batch, draws)
        loss = model(x.to(device), y.to(device))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        logits = model(inputs)
        nats = F.cross_entropy(logits.mT, targets, reduction="none").mean(0).cpu()
    return model.eval().requires_grad_(False).cpu(), nats


trained = {name: train(make) for name, make in progress(arms.items(), "seven models")}
nats = {name: by_place.mean().item() for name, (_, by_place) in trained.items()}
for name, (model, _) in trained.items():
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{name:18} {size:6} parameters, {about(nats[name])} nats a character, held out"
    )

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(1.1, 1))
colours = ["0.4", "C0", "C1", "C2", "C3", "C4", "0.75"]
names = list(nats)
axes[0].scatter([nats[name] for name in names], names, c=colours, s=60)
axes[0].invert_yaxis()
axes[0].set(title="Held-out loss", xlabel="nats a character")
for name in (
    "softmax GPT",
    "TransNormer",
    "released slopes",
    "no decay",
    "sees itself alone",
):
    smooth = trained[name][1].unflatten(0, (-1, context // 16)).mean(1)
    place = (torch.arange(16) + 0.5) * context / 16
    axes[1].plot(place, smooth, color=colours[names.index(name)], label=name)
axes[1].set(
    title="… by place in the context", xlabel="tokens before", ylabel="nats a character"
)
plt.show()

# %% [markdown]
# The control says what there is to win: without context a model predicts from pairs of letters. The softmax model does better than that. With the slopes of (7) the linear model does too, but how much depends on the seed, and
# sometimes it is hardly anything: its first layer is as good as blind, as the picture of the decays said, and its second has no decay at all. With the released slopes it is as good as softmax attention or better. With no decay in either layer
# next to nothing is won: all that was read is in the sum with equal weight. These are models after a few steps; what is learned *soon* is not what is learned in the end. Gate and phases move the loss of the model with (7) up or
# down with the seed: nothing can be said of them here. By place, the curves part within the first few characters: what these models learn is the nearest past.
#
# ### Decoding
#
# What a model has to keep for the next token, and how many bytes of tensors it makes to compute it. Both are exact counts. The states are those of the trained models after reading a text of that length.

# %%
gpt, model = trained["softmax GPT"][0], trained["TransNormer"][0]
read = {"ci": (64, 128, 256, 512, 1024), "full": (1024, 4096, 16384)}[scale]
kept, made = {"GPT": [], "TransNormer": []}, {"GPT": [], "TransNormer": []}
for size in read:
    prompt = tokens[split : split + size][None]
    for name, reader in (("GPT", gpt), ("TransNormer", model)):
        _, state = reader.extend(prompt, reader.start(1))
        parts = state if isinstance(state, tuple) else (state,)
        kept[name].append(sum(part.nbytes for part in parts))
        with PeakTensor() as memory:
            reader.step(prompt[:, -1], state)
        made[name].append(memory.made_bytes)
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for axis, counts, title in (
    (axes[0], kept, "State between two tokens"),
    (axes[1], made, "Tensors made for one token"),
):
    axis.loglog(
        read, counts["GPT"], "o-", color="0.4", label="GPT: keys and values", base=2
    )
    axis.loglog(
        read, counts["TransNormer"], "s-", color="C0", label="TransNormer", base=2
    )
    axis.set(title=title, xlabel="tokens before", ylabel="bytes")
axes[0].legend()
plt.show()
head = dim // heads
state_products = (
    depth * heads * 3 * head**2 + heads * 3 * head**2
)  # the first layer's keys are twice as long
cache_products = [depth * heads * 2 * size * head for size in read]
print(
    f"state: {kept['TransNormer'][0]} bytes at any length, the cache {kept['GPT'][0]} to {kept['GPT'][-1]}"
)
print(
    f"multiplications with it: {state_products} at any length, {cache_products[0]} to {cache_products[-1]} with the cache"
)

state, pieces = model.start(2), []
for token in inputs[:2].cpu().unbind(1):
    out, state = model.step(token, state)
    pieces.append(out)
decode_gap = (torch.stack(pieces, 1) - model(inputs[:2].cpu())).abs().max().item()
written = ancestral_sample(model.step, model.start(1), start=tokenizer.encode(" ")[0], end=tokenizer.encode("z")[0],
                           max_length=20, generator=generator)  # fmt: skip
assert 1 <= written.tokens.shape[1] <= 20

# %% [markdown]
# The cache grows by a key and a value a token, and so does what is made (the cache is copied to grow). The state stays as it is: (15) is `step`, and gives what the parallel form gives. A prompt beyond the training context is read in the same way. That is constant cost, not unlimited memory:
# $d \times d$ numbers a head is all that can be remembered.

# %% [markdown]
# ## Claims

# %%
naive_ratio = peaks["naive", last] / peaks["chunked", last]
ledger.claim(
    "Lightning Attention computes linear attention with decay without the matrix of all pairs, at a fraction of the memory",
    paper="memory a quarter of that of the baseline implementation",
    measured=f"forms agree within {about(value_gap, 1)}, gradients {about(gradient_gap, 1)}; at length {last} the full matrix takes {naive_ratio:.0f} times the memory",
    checks={
        "full matrix, tiles, chunks, recurrence and reference agree within 1e-10 in float64": value_gap <= 1e-10,
        "gradients of q, k and v within 1e-8": gradient_gap <= 1e-8,
        "a block of the model is that of the reference within 1e-10": block_gap <= 1e-10,
        "packed documents as if alone, within 1e-10": packing_gap <= 1e-10,
        "memory of tiles and chunks at most doubles with the length": max(
            peaks[impl, last] / peaks[impl, before] for impl in ("blocked", "chunked")
        ) <= 2.01,
        "memory of the full matrix grows more than 3.9 times": peaks["naive", last] / peaks["naive", before] > 3.9,
        "at the greatest length the full matrix takes more than 4 times the memory": naive_ratio > 4,
    },
)  # fmt: skip

# %%
ledger.claim(
    "Its cost is linear in the length",
    paper="linear complexity; the paper's tiles and the later chunks carry the same name",
    measured=f"products for twice the length: chunks {products['chunked', last] / products['chunked', before]:.2f} times, "
    f"tiles {products['blocked', last] / products['blocked', before]:.2f} times",
    checks={
        "chunks: products grow at most 2.1 times": products["chunked", last] <= 2.1 * products["chunked", before],
        "tiles: products grow more than 3.5 times": products["blocked", last] > 3.5 * products["blocked", before],
    },
)  # fmt: skip

# %%
ledger.claim(
    "Robust inference is stable at any length, where the form with powers of the decay overflows",
    paper="proved to be the same sum, without the powers",
    measured=f"first inf or nan of the naive form at token {about(broken['0.9'], 2)} for 0.9 and {about(broken['exp(-8)'], 2)} for exp(-8); "
    f"recurrence against parallel form at most {about(max(robust.values()), 1)} of the largest output",
    checks={
        "float32, 0.9: the naive form breaks between tokens 700 and 843": 700 <= broken["0.9"] <= 843,
        "exp(-8), the fastest head of the paper: it breaks by token 12": broken["exp(-8)"] <= 12,
        "without decay it does not break in 2048 tokens": broken["1"] is None,
        "the recurrence is within 1e-4 of the parallel form at 0.9, 0.99, 1 and exp(-8)": max(robust.values()) <= 1e-4,
        "and of the naive form wherever that is finite": max(naive_gap.values()) <= 1e-4,
        "a state in bfloat16 is off by at least 5 times its rounding": drift[torch.bfloat16] >= 5 * rounding,
        "a state in float32 by less than 1e-5": drift[torch.float32] < 1e-5,
    },
)  # fmt: skip

# %%
ledger.claim(
    "A token costs the same, whatever the length",
    paper="constant memory and constant speed of inference",
    measured=f"state {kept['TransNormer'][0]} bytes, the cache {kept['GPT'][0]} to {kept['GPT'][-1]} bytes from {read[0]} to {read[-1]} tokens",
    checks={
        "the state has the same bytes at all lengths": len(set(kept["TransNormer"])) == 1,
        "a step makes the same bytes at all lengths": len(set(made["TransNormer"])) == 1,
        "the cache grows in proportion": kept["GPT"][-1] * read[0] == kept["GPT"][0] * read[-1],
        "a step with the cache makes more bytes at each length": sorted(set(made["GPT"])) == made["GPT"],
        "token by token gives the logits of the whole within 1e-3": decode_gap <= 1e-3,
    },
)  # fmt: skip

# %%
softmax_nats, released = nats["softmax GPT"], nats["released slopes"]
ledger.claim(
    "A model of linear attention, decay and norms is as good as a softmax transformer of its size",
    paper="better than softmax models at 385M to 7B parameters",
    measured=f"released slopes {about(released)}, slopes of (7) {about(nats['TransNormer'])}, GPT {about(softmax_nats)}, "
    f"no decay {about(nats['no decay'])}, no context at all {about(nats['sees itself alone'])} nats",
    checks={
        "released slopes: at most 0.10 nats above the GPT": released <= softmax_nats + 0.10,
        "the decay matters: at least 0.04 nats below the model without": released <= nats["no decay"] - 0.04,
        "context is used: at least 0.06 nats below the model without": released <= nats["sees itself alone"] - 0.06,
    },
)  # fmt: skip

# %%
ledger.untested(
    "Lightning Attention at least doubles the speed of linear attention; gate and norm make the model more than 20 per cent faster",
    paper="more than twice; more than 20 per cent",
    reason="These are times of fused GPU kernels; on a CPU they would be times of something else. Counts of products and bytes are checked above.",
)

# %%
ledger.untested(
    "The first linear-attention LLM to beat softmax models in accuracy and speed",
    paper="benchmarks of the 385M, 1B and 7B models",
    reason="It needs the trained models and their corpus; the comparison above is one of some 27,000 parameters.",
)

# %%
ledger

# %% [markdown]
# ## What is different from the paper
#
# Models of two blocks and 27,000 parameters on letters and spaces, 160 steps, against 385M to 7B on a corpus of trillions of tokens. The base of the layer index and the real part in (6) follow the released code, not the paper's text; the $10^{-5}$ that it adds to the bracket of (7) is left out.
# The chunked form and its backward pass are of the sequel. The paper also splits the matrices of (2) to (4) over devices, by columns and then by rows, with one sum over the devices each way; there is one device here. `scale="full"` trains the
# seven models at width 512, eight blocks and contexts of 1024, on a GPU if there is one, and counts up to length 16,384.

# %% [markdown]
# ## Exercises
#
# **1.** Write `last_safe_token(decay, largest)`: the last $t$ for which $\lambda^{-t}$ does not exceed `largest`, for $0 < \lambda < 1$.


# %% tags=["exercise"]
def check_1(answer):
    for decay, largest in (
        (0.9, 65504.0),
        (0.9, 3.4e38),
        (math.exp(-8), 3.4e38),
        (0.5, 1000.0),
    ):
        t = answer(decay, largest)
        assert isinstance(t, int)
        assert decay**-t <= largest < decay ** -(t + 1)


# %% tags=["solution", "hide-cell"]
def last_safe_token(decay, largest):
    return math.floor(math.log(largest) / -math.log(decay))


check_1(last_safe_token)

# %% [markdown]
# **2.** The chunked form costs $2 L (C + d) d$ and some more products a head. Two chunks can be joined: write `join(first, second)` for pairs `(decay, state)`, where `decay` is $\lambda^n$ of the chunk's $n$ tokens and `state` its own state from zero; the
# result is the pair of both chunks one after the other. As it is associative, all states can be found in parallel.


# %% tags=["exercise"]
def check_2(answer):
    draws = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 9, 3, generator=draws, dtype=torch.float64)

    def piece(a, b):
        weights = 0.7 ** torch.arange(b - a - 1, -1, -1, dtype=torch.float64)
        return 0.7 ** (b - a), (weights[:, None] * keys[a:b]).T @ values[a:b]

    a, b, c = piece(0, 2), piece(2, 6), piece(6, 9)
    for decay, state in (answer(answer(a, b), c), answer(a, answer(b, c))):
        assert math.isclose(decay, 0.7**9)
        assert torch.allclose(state, piece(0, 9)[1])


# %% tags=["solution", "hide-cell"]
def join(first, second):
    return first[0] * second[0], second[0] * first[1] + second[1]


check_2(join)

# %% [markdown]
# **3.** (13) needs states from the left, (14) from the right. Write `value_gradient(q, k, grad, decay)` for a recurrence of single tokens, `(L, d)` each: the gradient with respect to the values, with one matrix that runs from the right and no matrix of pairs.


# %% tags=["exercise"]
def check_3(answer):
    draws = torch.Generator().manual_seed(2)
    q, k, v, grad = torch.randn(4, 7, 3, generator=draws, dtype=torch.float64)
    v.requires_grad_()
    (expected,) = torch.autograd.grad(
        (lightning_parallel(q, k, v, 0.8) * grad).sum(), v
    )
    assert torch.allclose(answer(q, k, grad, 0.8), expected)


# %% tags=["solution", "hide-cell"]
def value_gradient(q, k, grad, decay):
    running, rows = torch.zeros(q.shape[1], grad.shape[1], dtype=q.dtype), []
    for a, b, g in zip(q.flip(0), k.flip(0), grad.flip(0), strict=True):
        running = decay * running + torch.outer(
            a, g
        )  # the gradient of the state, (12) for a chunk of one
        rows.append(b @ running)
    return torch.stack(rows).flip(0)


check_3(value_gradient)

# %% [markdown]
# ## Summary
#
# - Linear attention with decay needs no denominator if its output is normalised; with several heads under one norm the two are different models.
# - Tiles make the memory linear, chunks with a state make the time linear as well. They are two algorithms, and both are exact.
# - The backward pass of the chunked form is the same recurrence once from the left and once from the right; $Q$, $K$ and $V$ are all it keeps.
# - Never raise a decay to a negative power. In the recurrence nothing overflows; keep its state in float32 all the same.
# - How slow the slowest head forgets decides what the model can use: look at $1/(1-\lambda)$ before training.
#
# **Further reading.** [The dynamical systems view](dynamical-systems-view.ipynb) puts this recurrence beside state-space models and gated networks.
