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
# # The Two-Pass Softmax Algorithm
#
# Softmax turns a vector of logits into a distribution. To keep the exponentials in range, everybody subtracts
# the maximum first, and that costs a whole extra sweep over memory. This chapter removes the sweep: every
# exponential is held as a *pair* of floats, a mantissa and an exponent, and such pairs can be added without
# knowing the maximum {cite:p}`two-pass-softmax`. You will build an exponential function from two constants
# and five coefficients, derive what it gets right and where it breaks, count every load and store that four
# softmax algorithms make, and leave with a reference cell, a differentiable library function and a fused
# kernel.

# %% [markdown]
# ## Setup

# %% tags=["parameters"]
scale = "ci"
seed = 0

# %%
import math
from collections import OrderedDict

import matplotlib.pyplot as plt
import mpmath
import numpy as np
import scipy.special
import torch

from lib.claims import Ledger, about

plt.style.use("lib.book")
torch.manual_seed(seed)
rng = np.random.default_rng(seed)
ledger = Ledger("two-pass-softmax", scale, seed)

# %% [markdown]
# ## The problem
#
# Softmax of a vector $x \in \mathbb{R}^N$ of logits is
#
# $$ y_i = \frac{e^{x_i}}{\sum_{j=1}^{N} e^{x_j}} . \tag{1} $$
#
# Typed in as it stands, it fails, because a float32 ends at about $3.4\cdot10^{38}$ and $e^x$ passes that for
# quite ordinary logits.

# %%
largest_exponent = math.log(torch.finfo(torch.float32).max)
print(
    f"float32 overflows at x = {largest_exponent:.2f}, float16 at x = {math.log(65504):.2f}"
)


def naive_softmax(x):
    exponential = torch.exp(x)
    return exponential / exponential.sum(-1, keepdim=True)


for row in ([1.0, 2.0, 3.0], [101.0, 102.0, 103.0], [-121.0, -122.0, -123.0]):
    x = torch.tensor(row)
    print(
        row,
        "naive:",
        [f"{v:.3f}" for v in naive_softmax(x)],
        " right:",
        [f"{v:.3f}" for v in x.softmax(0)],
    )

# %% [markdown]
# The three rows have the same softmax up to order, since only differences of logits matter. The formula gets
# one of them right. The second overflows to $\infty/\infty$, the third underflows to $0/0$. How common is
# that? Take rows of a thousand normal logits and let their spread grow.

# %%
spreads = np.linspace(1, 60, 60)
noise = torch.randn(100, 1000)
broken = {
    dtype: [
        1
        - torch.isfinite(naive_softmax((noise * float(s)).to(dtype)))
        .all(dim=1)
        .float()
        .mean()
        .item()
        for s in spreads
    ]
    for dtype in (torch.float16, torch.float32)
}
figure, axes = plt.subplots()
for dtype, style in ((torch.float16, "--"), (torch.float32, "-")):
    axes.plot(spreads, broken[dtype], style, label=str(dtype).removeprefix("torch."))
axes.set(
    title="The formula as written loses whole rows to overflow",
    xlabel="standard deviation of the 1000 logits of a row",
    ylabel="share of rows with nan",
)
axes.legend()
plt.show()

# %% [markdown]
# In float16 a spread of a few units is enough. In float32 the rows go between spreads of twenty and
# thirty-five. Nothing keeps the logits of a network below that, and the gradient of a single nan row turns
# every weight into nan.
#
# The standard repair subtracts the maximum. Softmax does not change when you subtract a constant from all
# logits, so with
#
# $$ \mu = \max_i x_i, \qquad \sigma = \sum_i e^{x_i-\mu}, \qquad y_i = \frac{e^{x_i-\mu}}{\sigma} \tag{2} $$
#
# no exponent is positive and one of them is zero: nothing overflows, and $\sigma \ge 1$. But look at the data
# flow. $\sigma$ needs $\mu$, and $y$ needs $\sigma$. Each of the three formulas is a sweep over the whole
# row. When the row is larger than the cache, every sweep fetches it from memory again. Softmax does little
# arithmetic per element, and in tuned code fetching is most of the work {cite:p}`two-pass-softmax`. Can you
# have safety without the first sweep?

# %% [markdown]
# ## Derivation
#
# ### A number as a pair
#
# Overflow is a matter of the exponent field of a float: it has eight bits. So keep the exponent somewhere
# roomier. Write
#
# $$ e^x = m \cdot 2^n, \qquad n = \operatorname{round}\!\left(\frac{x}{\ln 2}\right), \qquad
#    t = x - n \ln 2, \qquad m = e^t , \tag{3} $$
#
# and store $m$ **and** $n$, each as a float32 of its own. The paper calls the function $x \mapsto (m, n)$
# ExtExp, the extended exponential. Because $n$ is the nearest whole number, $|x/\ln 2 - n| \le \frac12$,
# hence
#
# $$ |t| \le \tfrac12 \ln 2 \approx 0.347, \qquad \tfrac{1}{\sqrt2} \le m \le \sqrt2 . \tag{4} $$
#
# The mantissa is always close to one. The exponent $n$ is about as large as $x$ itself. So neither can
# overflow as long as $x/\ln 2$ does not, which is for $|x| < \ln 2 \cdot 3.4\cdot10^{38}$. An `int8` for $n$,
# which is what a float32 uses, would not do: that is the range we want to get away from.
#
# Check (3) and (4) with fifty-digit arithmetic. `numpy.frexp` splits floats in the same manner, but puts $m$
# into $[\frac12, 1)$, so it may differ by one factor of two.

# %%
mpmath.mp.dps = 50
for value in rng.uniform(-1e4, 1e4, 100):
    n = round(value / math.log(2))
    m = mpmath.exp(mpmath.mpf(value) - n * mpmath.log(2))
    assert mpmath.sqrt(0.5) <= m <= mpmath.sqrt(2)
    assert (
        abs(m * mpmath.mpf(2) ** n / mpmath.exp(mpmath.mpf(value)) - 1)
        < mpmath.mpf(10) ** -40
    )
    if abs(value) < 700:  # float64 itself can hold e^x
        fraction, exponent = np.frexp(math.exp(value))
        assert (
            exponent - n in (0, 1)
            and abs(float(m) / (fraction * 2.0 ** (exponent - n)) - 1) < 1e-9
        )
print(
    "100 arguments of up to ten thousand: m within [0.7071, 1.4142], m 2^n = e^x to forty digits"
)

# %% [markdown]
# ### The small argument, without losing digits
#
# $t$ in (3) is a small difference of two large numbers, and $\ln 2$ is not a float. Rounding $n \ln 2$ to
# float32 costs up to half a unit in its last place, which for $x = 100$ is about $4\cdot10^{-6}$, a relative
# error of the same size in $e^t$. The remedy of {cite:t}`cody1980software` splits the constant,
# $\ln 2 = L_{hi} + L_{lo}$, so that $L_{hi}$ has few significant bits:
#
# $$ t = (x - n L_{hi}) - n L_{lo}, \qquad L_{hi} = \tfrac{355}{512}, \quad
#    L_{lo} = \ln 2 - L_{hi} \approx -2.12\cdot10^{-4} . \tag{5} $$
#
# A float32 holds whole numbers up to $2^{24}$, so the product $n L_{hi} = 355\,n/512$ is *exact* as long as
# $355\,|n| \le 2^{24}$, that is for $|n| \le 47\,259$. It is close to $x$, and the difference of two close
# floats is exact as well (Sterbenz's lemma). What remains are the roundings of the small product $n L_{lo}$
# and of the last subtraction. Writing $\operatorname{ulp}(a)$ for the spacing of float32 numbers at $a$ and
# $\varepsilon_L$ for the error of $L_{lo}$ as a float, the computed $\hat t$ obeys
#
# $$ |\hat t - t| \;\le\; \tfrac12 \operatorname{ulp}(n L_{hi})\,[\,355\,|n| > 2^{24}\,]
#    \;+\; \tfrac12 \operatorname{ulp}(n L_{lo}) \;+\; \tfrac12 \operatorname{ulp}(t) \;+\; |n|\,\varepsilon_L . \tag{6} $$
#
# The bracket is 1 when its condition holds and 0 otherwise. It is the term to watch: at $|n| = 47\,260$, that
# is at $|x| \approx 32\,760$, it jumps from nothing to about a thousandth. A processor with a fused
# multiply-add (FMA), which computes $a - bc$ with a single rounding, never pays the first two terms. The
# authors' code uses FMA, and so takes the float nearest to $\ln 2$ as its $L_{hi}$. PyTorch has no such
# operation on the CPU, so the reference below needs the short $L_{hi}$. `fused` in the next cell imitates
# FMA: it multiplies in float64, where a product of two float32 numbers is exact.

# %%
LN2_HIGH, LN2_LOW = 355 / 512, math.log(2) - 355 / 512
largest_exact = 2**24 // 355
n = torch.arange(-largest_exact, largest_exact + 1, dtype=torch.float32)
assert ((n * LN2_HIGH).double() == n.double() * LN2_HIGH).all()  # exact, every one
assert (
    float(np.float32(largest_exact + 2) * np.float32(LN2_HIGH))
    != (largest_exact + 2) * LN2_HIGH
)
print(
    f"n L_hi is exact up to |n| = {largest_exact}, |x| = {largest_exact * math.log(2):.0f}"
)


def one_step(x):
    n = torch.round(x / math.log(2))
    return n, x - n * math.log(2)


def cody_waite(x):
    n = torch.round(x / math.log(2))
    return n, (x - n * LN2_HIGH) - n * LN2_LOW


def fused(x):
    n = torch.round(x / math.log(2))
    return n, (x.double() - n.double() * math.log(2)).float()


def ulp(a):
    return torch.from_numpy(np.spacing(a.abs().float().numpy())).double()


def column(value):  # `about` in a width that does not depend on the value, for tables
    return f"≈ {float(value):.1e}"


sizes = [10.0, 100.0, 1e3, 1e4, 2e4, 4e4, 1e5, 1e6]
print(
    f"{'|x| up to':>10}  {'one step':>14}  {'Cody-Waite':>14}  {'bound (6)':>14}  {'fused':>14}"
)
for size in sizes:
    x = (torch.rand(20000) * 2 - 1) * size
    errors = []
    for reduce in (one_step, cody_waite, fused):
        n, t = reduce(x)
        exact = x.double() - n.double() * math.log(2)
        errors.append((t.double() - exact).abs())
        if reduce is cody_waite:
            epsilon = abs(float(np.float32(LN2_LOW)) - LN2_LOW)
            bound = 0.5 * ulp(n * LN2_HIGH) * (n.abs() > largest_exact) + 0.5 * ulp(
                n * LN2_LOW
            )
            bound += 0.5 * ulp(exact) + n.double().abs() * epsilon
            assert (errors[-1] <= bound * (1 + 1e-6)).all()
    row = [errors[0].max(), errors[1].max(), bound.max(), errors[2].max()]
    print(f"{size:10g}  " + "  ".join(f"{column(v):>14}" for v in row))

# %% [markdown]
# Read the table downwards. One step loses digits in proportion to $|x|$. Cody–Waite stays near
# $3\cdot10^{-8}$, grows slowly with $|n L_{lo}|$, and collapses between 20 000 and 40 000, where the bracket
# in (6) opens. The bound (6) holds for every single argument and is close to the worst case. Fused arithmetic
# does not notice.
#
# ### The exponential on the small interval
#
# On $|t| \le \frac12\ln2$ a polynomial of degree five is enough for float32:
#
# $$ e^t \approx p(t) = 1 + c_1 t + c_2 t^2 + c_3 t^3 + c_4 t^4 + c_5 t^5 . \tag{7} $$
#
# The constant is held at 1, so that $e^0 = 1$ comes out exactly. The five others minimise the largest
# relative error $|p(t)e^{-t} - 1|$. The best polynomial has an error that swings between its extremes with
# equal size, as many times as there are unknowns plus one (see {cite:t}`muller2016elementary`). The Remez
# exchange finds it: fix six points, solve the linear equations $p(t_k) - e^{t_k} = \pm E\,e^{t_k}$ for $c$
# and $E$, move the points to where the error is largest, repeat. The error of (7) vanishes at $t=0$ whatever
# the coefficients are, and the swings on either side of it count separately; the factor
# $\operatorname{sign}(t)$ takes care of that.

# %%
half = math.log(2) / 2
grid = np.linspace(-half, half, 20001)


def relative_error(coefficients):
    return (1 + grid[:, None] ** np.arange(1, 6) @ coefficients) * np.exp(-grid) - 1


t = half * np.cos(
    np.pi * (np.arange(6)[::-1] + 0.5) / 6
)  # Chebyshev points to start from
for _ in range(6):
    swing = (-1.0) ** np.arange(6) * np.sign(t)
    system = np.column_stack([t[:, None] ** np.arange(1, 6), swing * np.exp(t)])
    coefficients = np.linalg.solve(system, np.exp(t) - 1)[:5]
    error = relative_error(coefficients) * np.sign(grid)
    arcs = np.split(
        np.arange(len(grid)), np.flatnonzero(np.diff(np.sign(error[error != 0]))) + 1
    )
    t = np.array([grid[arc[np.argmax(np.abs(error[arc]))]] for arc in arcs])

taylor = np.array([1 / math.factorial(k) for k in range(1, 6)])
rounded = coefficients.astype(np.float32).astype(float)
for name, c in (
    ("Taylor", taylor),
    ("minimax", coefficients),
    ("minimax, rounded to float32", rounded),
):
    print(
        f"{name:28} largest relative error 2^{np.log2(np.abs(relative_error(c)).max()):.1f}"
    )
print("c1 to c5:", [f"{c:.9f}" for c in coefficients])
print("c1, c2 as float32, in hexadecimal:", [float(c).hex()[:10] for c in rounded[:2]])
assert np.abs(relative_error(rounded)).max() < 2**-22

figure, axes = plt.subplots()
axes.plot(grid, relative_error(taylor), "--", color="C1", label="Taylor, same degree")
axes.plot(grid, relative_error(coefficients), color="C0", label="minimax")
axes.axhspan(
    -(2**-24),
    2**-24,
    color="C2",
    alpha=0.2,
    lw=0,
    label="half a unit in the last place",
)
axes.set(
    title="Five coefficients give $e^t$ to float32 precision",
    xlabel="$t$, from $-\\frac{1}{2}\\ln 2$ to $\\frac{1}{2}\\ln 2$",
    ylabel="relative error of $p(t)$",
    ylim=(-3e-7, 3e-7),
)
axes.legend(loc="upper center", ncols=3)
plt.show()

# %% [markdown]
# The blue curve touches its extremes six times and lies below $2^{-22}$ by more than a factor of two. It
# barely leaves the green band, inside which a float32 could not tell the difference anyway. Taylor's
# polynomial of the same degree leaves the frame. The exchange recovers the first two constants that stand in
# XNNPACK's source, bit by bit; the others differ in the last places.
#
# ### Adding pairs
#
# Pairs are added at the larger exponent. With $k = \max(n_1, n_2)$,
#
# $$ (m_1, n_1) \oplus (m_2, n_2) = \left( m_1 2^{n_1-k} + m_2 2^{n_2-k},\; k \right) . \tag{8} $$
#
# Both exponents $n_i - k$ are zero or negative, so no factor exceeds 1, and one of them *is* 1. Four facts
# make this useful.
#
# 1. The value is right: $m_1 2^{n_1-k}\,2^k + m_2 2^{n_2-k}\,2^k = m_1 2^{n_1} + m_2 2^{n_2}$.
# 2. The operation is symmetric in its arguments, so it commutes exactly.
# 3. It is associative up to the rounding of the sums: both ways of bracketing three pairs end at
#    $k = \max(n_1,n_2,n_3)$ with the mantissa $\sum_i m_i 2^{n_i-k}$. So you may reduce in blocks or in a
#    tree.
# 4. The neutral element is $(0, -\infty)$: its factor is $2^{-\infty} = 0$. The pair $(1, 0)$ is not neutral:
#    it adds $e^0 = 1$.
#
# The factors are exact powers of two. Multiplying a float by such a power changes its exponent and no digit, unless
# the product underflows, in which case it was below $2^{-126}$ beside a sum of at least one half. So
#
# $$ \operatorname{fl}\!\left( m\,2^{n-k} \right) = m\,2^{n-k} \quad \text{whenever } m\,2^{n-k} \ge 2^{-126} . \tag{9} $$
#
# This distinguishes the pairs from the *online* softmax of {cite:t}`milakov2018online`, which also needs only
# two sweeps. It keeps a running maximum and, whenever that grows, rescales the sum so far:
#
# $$ \mu' = \max(\mu, x), \qquad \sigma' = \sigma\, e^{\mu - \mu'} + e^{x-\mu'} . \tag{10} $$
#
# Its factors $e^{\mu-\mu'}$ are rounded. On an ascending row every step rescales, and the roundings pile up.

# %%
rise = torch.sort(torch.rand(20000) * 8).values  # every element is a new maximum
mantissa, exponent = 0.0, -math.inf
maximum, total = -math.inf, np.float32(0)
n_all, t_all = cody_waite(rise)
for x, n, t in zip(rise.numpy(), n_all.tolist(), t_all.numpy(), strict=True):
    k = max(exponent, n)
    mantissa = np.float32(
        np.ldexp(np.float32(mantissa), int(max(exponent, -999) - k))
        + np.ldexp(np.exp(t), int(n - k))
    )
    exponent = k
    larger = max(maximum, x)
    total = np.float32(
        total * np.exp(np.float32(maximum - larger)) + np.exp(np.float32(x - larger))
    )
    maximum = larger
exact = scipy.special.logsumexp(rise.double().numpy())
pair_error = abs(math.log(mantissa) + exponent * math.log(2) - exact)
online_error = abs(math.log(total) + float(maximum) - exact)
print(
    "sum of e^x over 20000 ascending logits, element by element in float32, relative error of the sum"
)
print(f"  pairs : {about(pair_error, 2)}")
print(f"  online: {about(online_error, 2)}")

# %% [markdown]
# Both sums accumulate the roundings of twenty thousand additions. The online sum also multiplies by twenty
# thousand rounded factors, all close to one, and drifts further. Do not make too much of it: in practice you
# rescale once per block of a few thousand elements, and then neither error matters. What (9) buys is that the
# order of the blocks influences the result through the additions alone.
#
# ### Two sweeps
#
# Add all pairs in a first sweep, and divide in a second one that computes every pair again:
#
# $$ (M, K) = \bigoplus_{j=1}^{N} (m_j, n_j), \qquad \sum_j e^{x_j} = M\,2^K , \tag{11} $$
#
# $$ y_i = \frac{m_i}{M}\, 2^{n_i - K} . \tag{12} $$
#
# Nothing can overflow. The pair with $n_j = K$ enters the sum with factor 1, all others with smaller factors,
# so by (4)
#
# $$ \tfrac{1}{\sqrt2} \le M \le \sqrt2\,N, \tag{13} $$
#
# and in (12) $n_i - K \le 0$. When $y_i$ is too small for a float32 the factor becomes 0, which is the right
# answer. Note that $K$ plays the role of the maximum in (2), measured in whole powers of two. The difference
# is *when* you need it: adding at the larger exponent lets $K$ grow while you sum.
#
# Two results are almost free. The logarithm of the sum of exponentials, which every cross-entropy needs, is
#
# $$ \operatorname{LSE}(x) = \ln M + K \ln 2 , \tag{14} $$
#
# from the first sweep alone. And the gradient does not know how $y$ was computed: from
# $\partial y_i/\partial x_j = y_i(\delta_{ij} - y_j)$ and an incoming gradient $g$,
#
# $$ \frac{\partial \mathcal{L}}{\partial x_j} = \sum_i g_i\, y_i (\delta_{ij} - y_j)
#    = y_j \Bigl( g_j - \sum_i g_i y_i \Bigr) . \tag{15} $$
#
# ### What a sweep costs
#
# Count the words (numbers of the input's size) that travel between memory and processor when the row does not
# fit in the cache:
#
# | algorithm | reads | writes | words per element |
# |---|---|---|---|
# | three-pass, recompute: max · sum of $e^{x-\mu}$ · $e^{x-\mu}/\sigma$ | 3 | 1 | 4 |
# | three-pass, reload: max · store $e^{x-\mu}$ and sum · rescale it | 3 | 2 | 5 |
# | online (10), then $e^{x-\mu}/\sigma$ | 2 | 1 | 3 |
# | two-pass (11), (12) | 2 | 1 | 3 |
#
# If memory is the bottleneck, time is proportional to words, and the two-pass form can gain at most
#
# $$ \frac{3+1}{2+1} = \frac43 \quad\text{over recompute}, \qquad \frac{3+2}{2+1} = \frac53 \quad\text{over reload.} \tag{16} $$
#
# These are bounds: they assume that arithmetic costs nothing. Do not take the table on trust. Below, the
# algorithms run on an array that counts.
#
# ### What each form gets wrong
#
# Both safe forms begin with a subtraction, and each subtraction rounds. Max subtraction computes $x_i - \mu$.
# Its rounding error is up to half a unit in the last place of a number that can be large, and the exponential
# turns an absolute error of its argument into a relative error of its value:
#
# $$ \left|\frac{\Delta y_i}{y_i}\right| \lesssim \tfrac12 \operatorname{ulp}(x_i - \mu) \approx 2^{-24}\,|x_i-\mu|
#    \qquad\text{(max subtraction)} . \tag{17} $$
#
# So the *small* probabilities lose digits, up to about six bits before they underflow. (Unless the
# subtraction happens to be exact, as it is when $\mu$ is a round number.) ExtExp subtracts to get $t$, which
# is at most $0.347$, and (6) says that almost nothing is lost:
#
# $$ \left|\frac{\Delta y_i}{y_i}\right| \lesssim |\Delta t_i| + \max_j |\Delta t_j| + \text{a few } 2^{-24}
#    \qquad\text{(two-pass)} . \tag{18} $$
#
# But (6) depends on $|x|$ itself, not on differences. Add a large constant $c$ to all logits. Max subtraction
# cancels it in its first step, exactly. The two-pass form carries it through, and loses $t$ when $n$ gets
# large: beyond $|n| = 47\,259$ without FMA, and beyond $2^{24}$ with it, where floats are more than 1 apart,
# so that the float $n$ can no longer be the nearest whole number and $|t|$ grows with it.
# ({cite:t}`blanchard2021accurately` analyse the max-subtracting forms in depth.) The experiment draws both
# weaknesses side by side.
#
# ### Traps
#
# Each of these is one line away from working code.

# %%
pairs = lambda x: (torch.exp(cody_waite(x)[1]), cody_waite(x)[0])  # noqa: E731
x = torch.tensor([0.5, 0.25])

m, n = pairs(x)
print(
    "start at (1, 0):   the sum of e^x becomes",
    about(float((m * 2**n).sum() + 1)),
    "instead of",
    about(float(x.exp().sum())),
)

print(
    "exp of the whole x:",
    torch.exp(torch.tensor(200.0)).item(),
    "before you could split it",
)

print(
    "n kept as int8:    round(200 / ln 2) =",
    round(200 / math.log(2)),
    "becomes",
    torch.tensor(289.0).to(torch.int16).to(torch.int8).item(),
)

huge = torch.tensor(1e30)
_, t = cody_waite(huge)
print(
    "t not clipped:     for x = 1e30 |t| > 1e20 is",
    bool(t.abs() > 1e20),
    "so that e^t 2^(n-K) is",
    (torch.exp(t.abs()) * 0.0).item(),
)

x = (torch.rand(200000) * 2 - 1) * 2e4
_, t = cody_waite(x)
beyond = (t.abs() - half).clamp(min=0)
print(
    "t clipped at 0.347:",
    about(int((beyond > 0).sum())),
    "of 200000 values of |x| < 2e4 are cut, by up to",
    about(float(beyond.max()), 2),
)

print(
    "-inf everywhere:   torch gives",
    torch.full((2,), -torch.inf).softmax(0).tolist(),
    "and -inf - (-inf) is",
    (torch.tensor(-torch.inf) - torch.tensor(-torch.inf)).item(),
)

# %% [markdown]
# The last but one deserves a word. Clipping $t$ is needed, since for astronomic $x$ it is pure rounding
# noise, $e^t$ is infinite and $\infty \cdot 0$ is nan. It is tempting to clip at the bound $\frac12\ln 2$ of
# (4). But that bound holds in exact arithmetic. The rounding of $x/\ln 2$ moves $n$ to the neighbour now and
# then, $|t|$ lands a little beyond $\frac12\ln2$, and clipping it there falsifies a result that was right.
# Clip at $\ln 2$: then $m \in [\frac12, 2]$, just as harmless.
#
# ## Reference implementation
#
# Equations (3), (5), (7), (8), (11) and (12), nothing else. The loops over chunks *are* the sweeps: every
# `x[...]` is a load and every `y[...] =` a store. `n` gets no gradient, since it is a step function;
# everything else is differentiated by autograd.

# %% tags=["reference"]
import torch


def ext_exp(x):
    """e^x as a pair (m, n) that stands for m * 2^n. float32 in, two float32 tensors of the same shape out."""
    n = torch.round(x.detach().clamp(-2.3e38, 2.3e38) * 1.4426950408889634)  # 1 / ln 2
    t = (x - n * 0.693359375) - n * -2.12194440054690583e-4  # x - n ln 2
    t = t.clamp(-0.6931472, 0.6931472)  # rounding noise for astronomic x
    m = 0.04189792929648374 + t * 0.008290314728168874
    m = 1.0 + t * (
        0.9999997071895316 + t * (0.4999914953071292 + t * (0.1666763619461443 + t * m))
    )
    masked = x == -torch.inf
    return m.masked_fill(masked, 0.0), n.masked_fill(masked, -torch.inf)


def at_exponent(m, n, k):
    """The mantissa of (m, n) at the exponent k >= n: m * 2^(n - k), an exact factor (1 for n = k = -inf)."""
    return m * torch.exp2(torch.nan_to_num(n - k))


def pair_add(first, second):
    (m1, n1), (m2, n2) = first, second
    k = torch.maximum(n1, n2)
    return at_exponent(m1, n1, k) + at_exponent(m2, n2, k), k


def pair_sum(m, n):
    k = n.amax(-1, keepdim=True)
    return at_exponent(m, n, k).sum(-1, keepdim=True), k


def two_pass_softmax(x, y=None, chunk=4096):
    """Softmax over the last dimension of float32 logits (..., N), into y if you give it."""
    y = torch.empty_like(x) if y is None else y
    starts = range(0, x.shape[-1], chunk)
    total = (torch.tensor(0.0), torch.tensor(-torch.inf))  # the neutral pair
    for i in starts:
        total = pair_add(total, pair_sum(*ext_exp(x[..., i : i + chunk])))
    for i in starts:
        m, n = ext_exp(x[..., i : i + chunk])
        y[..., i : i + chunk] = at_exponent(m / total[0], n, total[1])
    return y


# %% [markdown]
# By hand: logits that are multiples of $\ln 2$ are powers of two, $x = (1,2,3)\ln2$ gives $2, 4, 8$, with the
# sum 14. And $e^{1000\ln2} = 2^{1000}$ is far out of range, yet its pair is simply $(1, 1000)$.

# %%
log2 = torch.tensor([1.0, 2.0, 3.0]) * math.log(2)
assert torch.allclose(
    two_pass_softmax(log2), torch.tensor([2.0, 4.0, 8.0]) / 14, rtol=1e-6
)
m, n = ext_exp(torch.tensor([0.0, 1000 * math.log(2)]))
assert (
    n.tolist() == [0, 1000] and m[0] == 1 and abs(m[1] - 1) < 1e-4
)  # 1000 ln 2 is itself rounded
zero, two = (
    (torch.tensor(0.0), torch.tensor(-torch.inf)),
    (torch.tensor(1.0), torch.tensor(1.0)),
)
assert (
    pair_add(zero, two) == two
    and pair_add(two, zero) == two
    and pair_add(zero, zero) == zero
)
assert pair_add(two, (torch.tensor(1.5), torch.tensor(-1.0))) == (
    1.375,
    1.0,
)  # 2 + 0.75 = 1.375 * 2

# %% [markdown]
# The three rivals, in the same style, so that the comparison is between algorithms and not between
# programmers.

# %% tags=["reference"]
import torch


def three_pass_softmax(x, y=None, chunk=4096, reload=False):
    """Softmax over the last dimension; reload=True stores e^(x - max) in the second sweep and rescales it."""
    y = torch.empty_like(x) if y is None else y
    parts = [(..., slice(i, i + chunk)) for i in range(0, x.shape[-1], chunk)]
    largest, total = torch.tensor(-torch.inf), torch.tensor(0.0)
    for part in parts:
        largest = torch.maximum(largest, x[part].amax(-1, keepdim=True))
    for part in parts:
        exponential = torch.exp(x[part] - largest)
        total = total + exponential.sum(-1, keepdim=True)
        if reload:
            y[part] = exponential
    for part in parts:
        y[part] = (y[part] if reload else torch.exp(x[part] - largest)) / total
    return y


def online_softmax(x, y=None, chunk=4096):
    """Softmax over the last dimension with a running maximum (Milakov and Gimelshein, 2018)."""
    y = torch.empty_like(x) if y is None else y
    parts = [(..., slice(i, i + chunk)) for i in range(0, x.shape[-1], chunk)]
    largest, total = torch.tensor(-torch.inf), torch.tensor(0.0)
    for part in parts:
        block = x[part]
        larger = torch.maximum(largest, block.amax(-1, keepdim=True))
        total = total * torch.exp(largest - larger) + torch.exp(block - larger).sum(
            -1, keepdim=True
        )
        largest = larger
    for part in parts:
        y[part] = torch.exp(x[part] - largest) / total
    return y


# %%
rows = torch.randn(4, 1000) * 5
for function in (two_pass_softmax, three_pass_softmax, online_softmax):
    for chunk in (
        7,
        256,
        4096,
    ):  # a chunk that does not divide the row, one that does not fill it
        assert torch.allclose(
            function(rows, chunk=chunk), rows.softmax(-1), rtol=1e-5, atol=0
        )
assert torch.allclose(
    three_pass_softmax(rows, reload=True), rows.softmax(-1), rtol=1e-5, atol=0
)

x = rows.clone().requires_grad_()
g = torch.randn_like(rows)
(dx,) = torch.autograd.grad(two_pass_softmax(x), x, g)
y = rows.softmax(-1)
assert torch.allclose(dx, y * (g - (g * y).sum(-1, keepdim=True)), atol=1e-6)  # (15)

# %% [markdown]
# ## The library
#
# `lib.numerics.two_pass_softmax` is what you would import. It takes any shape, dimension and floating dtype,
# computes half precision in float32, gives nan where `torch.softmax` does, imitates the fused arithmetic that
# the reference lacks, and is differentiable any number of times by (15) instead of by recording the sweeps.
# `impl="auto"` picks the Triton kernel of `kernels.two_pass_softmax` for CUDA tensors. The pairs themselves
# are public: `lib.numerics.ext_exp`, `lib.numerics.pair_add`, `lib.numerics.pair_sum`; and so are
# `lib.numerics.two_pass_logsumexp` (14) and the rivals `lib.numerics.three_pass_softmax` and
# `lib.numerics.online_softmax`.

# %%
import kernels
from lib import numerics

device = "cuda" if torch.cuda.is_available() else "cpu"
x = (torch.randn(3, 5000) * 5).requires_grad_()
g = torch.randn(3, 5000)
expected = two_pass_softmax(x)
(expected_grad,) = torch.autograd.grad(expected, x, g)
for impl in ("torch", "triton") if kernels.HAS_TRITON else ("torch",):
    where = x.to(device) if impl == "triton" else x
    y = numerics.two_pass_softmax(where, impl=impl)
    (dx,) = torch.autograd.grad(y, x, g.to(y.device))
    assert torch.allclose(y.cpu(), expected, rtol=2e-6, atol=0) and torch.allclose(
        dx, expected_grad, atol=1e-7
    )
print("values and gradients of the library and of the kernel agree with the reference")

wide = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
assert torch.autograd.gradcheck(lambda z: numerics.two_pass_softmax(z, dim=1), wide)
assert torch.autograd.gradgradcheck(lambda z: numerics.two_pass_softmax(z, dim=1), wide)
assert torch.autograd.gradcheck(lambda z: numerics.two_pass_logsumexp(z, dim=1), wide)
print("first and second derivatives agree with finite differences in float64")

minus = -torch.inf
print(
    "masks:",
    numerics.two_pass_softmax(
        torch.tensor([[minus, 0.0, 0.0], [minus, minus, minus]])
    ).tolist(),
)
try:
    numerics.two_pass_softmax(torch.arange(3))
except TypeError as message:
    print("TypeError:", message)

# %% [markdown]
# A softmax written out in PyTorch makes a temporary of the size of the row at every step. The library works
# through blocks of $2^{16}$ elements that stay in the cache. `lib.train.PeakTensor` adds up what is alive at
# the same time; the output itself is not counted.

# %%
from lib.train import PeakTensor


def written_out(x):
    exponential = torch.exp(x - x.amax(-1, keepdim=True))
    return exponential / exponential.sum(-1, keepdim=True)


print(
    f"{'row length':>11}  {'output':>8}  {'written out, beside it':>23}  {'two-pass, beside it':>20}"
)
for length in (2**17, 2**19, 2**21):
    extra, row = [], torch.zeros(1, length)
    for function in (written_out, numerics.two_pass_softmax):
        with PeakTensor() as memory, torch.no_grad():
            function(row)
        extra.append(memory.peak_bytes - 4 * length)
    print(
        f"{length:11}  {4 * length / 2**20:5.1f} MB  {extra[0] / 2**20:20.1f} MB  {extra[1] / 2**20:17.1f} MB"
    )

# %% [markdown]
# Beside its output the formula needs another whole row. The library needs a few blocks, whatever the length
# of the row. Do not expect it to be faster than `torch.softmax` on a CPU, though. There, one vectorised loop
# does everything without temporaries, while the library spends a dozen PyTorch calls on every block. The
# PyTorch path is for correctness and for memory; the saving of time is a matter for native code, such as the
# kernel.

# %%
import time

row = torch.randn(1, 2**19)
for name, function in (
    ("torch.softmax", torch.softmax),
    ("lib.numerics.two_pass_softmax", numerics.two_pass_softmax),
):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        function(row, -1)
        seconds.append(time.perf_counter() - start)
    print(f"{name:31} {about(1000 * min(seconds), 2, 'ms')}")

# %% [markdown]
# ## Experiment
#
# ### Correctness
#
# Three sources of logits: a linear classifier fitted to the handwritten digits of scikit-learn, the
# next-character logits of the book's small language model, and normal rows of growing spread and length. The
# judge is `torch.softmax` in float64. The error is the largest relative error over all elements with
# $y > 10^{-30}$.

# %%
from sklearn.linear_model import LogisticRegression

from lib.data import digits, english_text, random_windows
from lib.models.zoo import char_gpt

(train_images, train_labels), (images, _) = digits((1200, 597), seed=seed, flat=True)
classifier = LogisticRegression(max_iter=200).fit(
    train_images.numpy(), train_labels.numpy()
)
everything = torch.cat([train_images, images]).numpy()
cases = {
    "digits, 1797 x 10": torch.from_numpy(
        classifier.decision_function(everything)
    ).float()
}

model = char_gpt()
tokens = model.tokenizer.encode(english_text())
windows, _ = random_windows(
    tokens, model.context, 16, generator=torch.Generator().manual_seed(seed)
)
with torch.no_grad():
    cases["next character"] = model(windows).flatten(0, 1).float()
for spread in (1, 10, 50):
    for length in (10, 1000, 2**16, 2**20) + ((2**24,) if scale == "full" else ()):
        cases[f"N(0, {spread}^2), N = {length}"] = (
            torch.randn(1 if length > 1000 else 20, length) * spread
        )

algorithms = {
    "three-pass": lambda x: numerics.three_pass_softmax(x),
    "reload": lambda x: numerics.three_pass_softmax(x, variant="reload"),
    "online": lambda x: numerics.online_softmax(x),
    "two-pass, reference": two_pass_softmax,
    "two-pass, library": lambda x: numerics.two_pass_softmax(x),
}


def worst(y, exact):
    return float(((y.double() - exact).abs() / exact)[exact > 1e-30].max())


errors, row_sums = {name: {} for name in algorithms}, {}
print(f"{'largest relative error':24}" + "".join(f"{name:>21}" for name in algorithms))
for case, x in cases.items():
    exact = x.double().softmax(-1)
    for name, function in algorithms.items():
        y = function(x)
        errors[name][case] = worst(y, exact)
        if name.startswith("two-pass"):
            row_sums[name, case] = float((y.double().sum(-1) - 1).abs().max())
    print(
        f"{case:24}"
        + "".join(f"{column(errors[name][case]):>21}" for name in algorithms)
    )
print("rows of the two-pass form sum to 1 within", about(max(row_sums.values()), 2))

# %% [markdown]
# The two-pass columns stay at about $10^{-6}$ or below. The others reach four times that, wherever logits lie
# far below the maximum: this is (17). Reload and recompute agree to the last digit, since they divide the
# same numbers.
#
# ### Where each form is weak
#
# Left: rows with a random maximum between 0 and 8 and logits spread evenly over the 69 nats below it, with
# the error drawn against the distance from the maximum. Right: a thousand normal logits of standard deviation
# 3, plus a common offset $c$, rounded to float32. The judge sees the rounded logits too, so the error is that
# of the algorithm alone.

# %%
x = 8 * torch.rand(64, 1) - torch.cat(
    [torch.zeros(64, 1), 69 * torch.rand(64, 2048)], dim=1
)
exact = x.double().softmax(-1)
distance = x.amax(dim=1, keepdim=True) - x
bins = torch.arange(1, 69)
tail = {}
for name in ("three-pass", "two-pass, library"):
    error = (algorithms[name](x).double() - exact).abs() / exact
    tail[name] = [
        float(error[(distance >= b - 1) & (distance < b)].max()) for b in bins
    ]

offsets = 10 ** np.arange(0, 7.7, 0.2)
offset_error = {name: [] for name in algorithms}
normal = torch.randn(8, 1000) * 3
for c in offsets:
    x = normal + float(c)
    exact = x.double().softmax(-1)
    for name, function in algorithms.items():
        offset_error[name].append(worst(function(x), exact))

figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.9))
left.plot(bins, tail["three-pass"], color="C0", label="three-pass")
left.plot(bins, tail["two-pass, library"], color="C1", label="two-pass")
left.plot(
    bins,
    2.0**-24 * 2 ** np.floor(np.log2(np.maximum(bins.numpy() - 1e-9, 1))),
    ":",
    color="C6",
    lw=1.2,
    label="$\\frac{1}{2}$ulp$(x-\\mu)$",
)
left.set(
    title="Max subtraction blurs the tail",
    xlabel="distance from the maximum, $\\mu - x$ (nats)",
    ylabel="largest relative error of $y$",
    yscale="log",
    ylim=(3e-8, 3e-5),
)
left.legend(loc="upper left")
styles = {
    "three-pass": ("C0", "-", 3.2), "reload": ("C5", "--", 1.8), "online": ("C2", ":", 2.2),
    "two-pass, reference": ("C1", "--", 1.8), "two-pass, library": ("C1", "-", 1.8),
}  # fmt: skip
for name, (color, line, width) in styles.items():
    label = {
        "two-pass, reference": "two-pass, plain arithmetic",
        "two-pass, library": "two-pass, fused arithmetic",
    }.get(name, name)
    right.plot(
        offsets,
        np.maximum(offset_error[name], 1e-8),
        line,
        color=color,
        lw=width,
        label=label,
    )
for position in (largest_exact * math.log(2), 2**24 * math.log(2)):
    right.axvline(position, color="#a1a1aa", lw=0.8)
right.set(
    title="A common offset blurs the pairs",
    xlabel="common offset $c$ of all logits (nats)",
    ylabel="largest relative error of $y$",
    xscale="log",
    yscale="log",
    ylim=(1e-8, 1e3),
)
right.legend(loc="upper left")
plt.show()

# %% [markdown]
# Left, the error of max subtraction climbs in steps along (17), the dotted line: the spacing of floats
# doubles at every power of two. The two-pass form is flat: $t$ is small wherever $x$ is.
#
# Right, the tables turn. The three forms that subtract a maximum lie on top of one another and do not mind
# the offset. (They even gain by it: from some 30 on all logits share a coarser grid, and the subtraction
# becomes exact.) Plain two-pass arithmetic follows them until the first grey line at $47\,259 \ln2$, where
# the product $nL_{hi}$ stops being exact, and then loses three digits at once. With fused arithmetic it holds
# until the second line at $2^{24}\ln2$, where $n$ stops being every whole number. Logits with an offset of
# twelve million, themselves more than 1 apart, are no use to anybody. Logits with an offset of 40 000 are
# rare but possible, so use the fused form or remove the offset first (exercise 2).
#
# ### Range

# %%
base = torch.randn(4, 64) * 3
mask = torch.rand(4, 64) < 0.5
mask[:, 0] = False
spike = base.clone()
spike[:, 7] = 1e30
extremes = {
    "shifted by +1e4": base + 1e4,
    "shifted by -1e4": base - 1e4,
    "one logit of 1e30": spike,
    "half of it masked by -inf": base.masked_fill(mask, -math.inf),
    "masked by the smallest float32": base.masked_fill(
        mask, torch.finfo(torch.float32).min
    ),
    "+200 and -200 in a row": torch.cat([base + 200, base - 200], dim=1),
}
finite, range_error, naive_broken = {}, {}, {}
print(f"{'':32}{'naive has nan':>14}{'two-pass has nan':>18}{'largest error of y':>20}")
for name, x in extremes.items():
    exact = x.double().softmax(-1)
    y = [two_pass_softmax(x), numerics.two_pass_softmax(x)]
    finite[name] = all(bool(torch.isfinite(z).all()) for z in y)
    range_error[name] = max(float((z.double() - exact).abs().max()) for z in y)
    naive_broken[name] = not bool(torch.isfinite(naive_softmax(x)).all())
    print(
        f"{name:32}{str(naive_broken[name]):>14}{str(not finite[name]):>18}{column(range_error[name]):>20}"
    )

# %% [markdown]
# No row is lost, and the values are right: the last column is the largest absolute error of a probability.
#
# ### Counting loads and stores
#
# Now the traffic. `CountedArray` behaves like a tensor that you can only read and write in slices, and a
# shared `Memory` counts the elements. It can also play a cache: `capacity` lines of 64 elements, the least
# recently used line leaves first, a line that was written to is written back when it leaves. The reference
# cells run on it as they are.


# %%
class Memory:
    """Counts loads and stores; with a capacity (in lines) also what a cache would move to and from memory."""

    def __init__(self, capacity=None, line=64, fetch_on_write=False):
        self.loads = self.stores = self.moved = 0
        self.capacity, self.line, self.fetch_on_write = capacity, line, fetch_on_write
        self.cache = OrderedDict()  # (array, line number) -> has it been written to?

    def access(self, array, start, stop, write):
        count = stop - start
        self.loads, self.stores = (
            self.loads + count * (not write),
            self.stores + count * write,
        )
        if self.capacity is None:
            return
        for number in range(start // self.line, -(-stop // self.line)):
            key = (array, number)
            if key not in self.cache and (not write or self.fetch_on_write):
                self.moved += self.line
            self.cache[key] = self.cache.pop(key, False) or write
            if len(self.cache) > self.capacity:
                self.moved += self.line * self.cache.popitem(last=False)[1]

    def flush(self):
        self.moved += self.line * sum(self.cache.values())
        self.cache.clear()


class CountedArray:
    """A vector that can be read and written by `array[..., start:stop]` only, through a `Memory`."""

    def __init__(self, data, memory):
        self.data, self.memory, self.shape = data, memory, data.shape

    def _access(self, key, write):
        start, stop, _ = key[1].indices(self.shape[-1])
        self.memory.access(id(self), start, stop, write)

    def __getitem__(self, key):
        self._access(key, write=False)
        return self.data[key].clone()

    def __setitem__(self, key, value):
        self._access(key, write=True)
        self.data[key] = value


counted_algorithms = {
    "three-pass, recompute": three_pass_softmax,
    "three-pass, reload": lambda x, y, chunk: three_pass_softmax(
        x, y, chunk, reload=True
    ),
    "online": online_softmax,
    "two-pass": two_pass_softmax,
}


def run_counted(function, logits, **cache):
    memory = Memory(**cache)
    y = CountedArray(torch.full_like(logits, math.nan), memory)
    function(CountedArray(logits, memory), y, chunk=64)
    memory.flush()
    assert torch.allclose(
        y.data, logits.softmax(-1), rtol=2e-5, atol=0
    )  # it did compute the softmax
    return memory


logits = torch.randn(4096) * 5
traffic = {}
for name, function in counted_algorithms.items():
    memory = run_counted(function, logits)
    traffic[name] = (memory.loads, memory.stores)
    reads, writes = memory.loads / 4096, memory.stores / 4096
    print(
        f"{name:22} {memory.loads:6} loads {memory.stores:5} stores, per element {reads:g} + {writes:g}"
    )

# %% [markdown]
# The counters confirm the table. Whether a load reaches memory depends on the cache, so let the row grow from
# a quarter of the cache to four times its size.

# %%
capacity = 64 if scale == "ci" else 512
ratios = np.array([0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0])
moved = {
    name: [
        run_counted(f, torch.randn(int(r * capacity) * 64), capacity=capacity).moved
        / (int(r * capacity) * 64)
        for r in ratios
    ]
    for name, f in counted_algorithms.items()
}
with_fetch = {
    name: run_counted(
        f, torch.randn(4 * capacity * 64), capacity=capacity, fetch_on_write=True
    ).moved
    / (4 * capacity * 64)
    for name, f in counted_algorithms.items()
}

figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.6), width_ratios=(1, 1.25))
names = list(traffic)
reads = [4 * traffic[name][0] / 4096 for name in names]
writes = [4 * traffic[name][1] / 4096 for name in names]
colors = ["C0", "C5", "C2", "C1"]
left.barh(names, reads, color=colors)
left.barh(names, writes, left=reads, color=colors, alpha=0.45)
for position, (r, w) in enumerate(zip(reads, writes, strict=True)):
    left.text(r / 2, position, f"read {r:g}", ha="center", va="center", color="white")
    left.text(
        r + w / 2,
        position,
        f"write {w:g}" if w > 4 else f"{w:g}",
        ha="center",
        va="center",
    )
left.invert_yaxis()
left.grid(axis="y", visible=False)
left.set(title="Bytes loaded and stored", xlabel="bytes per float32 element")
lines = {
    "three-pass, recompute": "-",
    "three-pass, reload": "-",
    "online": "--",
    "two-pass": "-",
}
for name, color in zip(names, colors, strict=True):
    right.plot(
        ratios,
        4 * np.array(moved[name]),
        lines[name],
        color=color,
        marker="o",
        lw=3 if name == "online" else 1.8,
        label=name,
    )
right.set(
    title="Bytes that reach memory, by row length",
    xlabel="row length / cache size",
    ylabel="bytes per element",
    xscale="log",
    xticks=[0.25, 0.5, 1, 2, 4],
    xticklabels=["1/4", "1/2", "1", "2", "4"],
    ylim=(0, 29),
)
right.minorticks_off()
right.legend(ncols=2, loc="upper left")
plt.show()
gain = (
    moved["three-pass, recompute"][-1] / moved["two-pass"][-1],
    moved["three-pass, reload"][-1] / moved["two-pass"][-1],
)
fetch_gain = (
    with_fetch["three-pass, recompute"] / with_fetch["two-pass"],
    with_fetch["three-pass, reload"] / with_fetch["two-pass"],
)
print(
    f"row of 4 cache sizes: recompute moves {gain[0]:.3f} and reload {gain[1]:.3f} times the bytes of two-pass"
)
print(
    f"where a store first fetches its line: {fetch_gain[0]:.3f} and {fetch_gain[1]:.3f} times"
)

# %% [markdown]
# On the left, dark is read and light is written. On the right, all four cost the unavoidable eight bytes, one
# read and one write, while the row and its output fit in the cache together. As soon as the row alone is
# longer than the cache every sweep misses, and the curves arrive at the counts on the left. So the sentence
# "two passes are faster" is about *long rows*. For a row that fits in the cache, or in the registers of a GPU
# block, there is no traffic to save.
#
# The last line printed shows how fragile the bound (16) is. On many processors an ordinary store first
# fetches the cache line it is about to overwrite. That adds one word to every algorithm, and the bound drops
# from $\frac43$ to $\frac54$.
#
# ### On a GPU
#
# At `scale="full"` on a machine with a CUDA GPU, the next cell times the kernel against a three-pass kernel
# with the same tiling and against `torch.softmax`.

# %%
bandwidth = {}
if scale == "full" and torch.cuda.is_available() and kernels.HAS_TRITON:
    from triton.testing import do_bench

    from kernels.two_pass_softmax import softmax_forward
    from kernels.two_pass_softmax import three_pass_softmax as three_pass_kernel

    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    contenders = {
        "two-pass": softmax_forward,
        "three-pass": three_pass_kernel,
        "torch": lambda z: z.softmax(-1),
    }
    for vocabulary in (2**15, 2**17, 2**18, 2**20, 2**26):
        for count in (1, 64, 4096):
            if count * vocabulary > 2**30:  # 4 GB of input
                continue
            x = torch.randn(count, vocabulary, device="cuda")
            milliseconds = {
                name: do_bench(lambda f=f, x=x: f(x)) for name, f in contenders.items()
            }
            bandwidth[count, vocabulary] = milliseconds
            gigabytes = {
                name: 8e-6 * x.numel() / ms for name, ms in milliseconds.items()
            }
            print(
                f"{count:5} x {vocabulary:9}",
                {
                    name: about(value, 3, "GB/s of input and output")
                    for name, value in gigabytes.items()
                },
            )
else:
    print("needs scale='full' and a CUDA GPU")

# %% [markdown]
# ## Claims

# %%
ledger.claim(
    "Softmax needs two sweeps over memory instead of three",
    paper="two-pass 2 reads + 1 write per element; three-pass 3 reads + 1 write (recompute) or 3 reads + 2 writes (reload)",
    measured=", ".join(
        f"{name} {r // 4096}R+{w // 4096}W" for name, (r, w) in traffic.items()
    ),
    checks={
        "three-pass with recomputation: 3 loads and 1 store per element, exactly": traffic[
            "three-pass, recompute"
        ]
        == (3 * 4096, 4096),
        "three-pass with reloading: 3 loads and 2 stores, exactly": traffic[
            "three-pass, reload"
        ]
        == (3 * 4096, 2 * 4096),
        "two-pass: 2 loads and 1 store, exactly": traffic["two-pass"]
        == (2 * 4096, 4096),
        "online softmax: 2 loads and 1 store, exactly": traffic["online"]
        == (2 * 4096, 4096),
    },
)

# %%
two_pass_names = ("two-pass, reference", "two-pass, library")
ledger.claim(
    "The pair of mantissa and exponent needs no maximum and neither overflows nor underflows",
    paper="avoids overflow without normalising the inputs by the maximum",
    measured=f"largest error of a probability on the range cases {about(max(range_error.values()), 2)}",
    checks={
        "no nan or inf in any of six range cases": all(finite.values()),
        "the formula as written has nan in at least four of them": sum(
            naive_broken.values()
        )
        >= 4,
        "every probability within 1e-5 of float64 there": max(range_error.values())
        <= 1e-5,
        "rows sum to 1 within 1e-5 in all correctness cases": max(row_sums.values())
        <= 1e-5,
    },
)

# %%
worst_two = max(max(errors[name].values()) for name in two_pass_names)
worst_three = max(errors["three-pass"].values())
at_1e5 = int(np.argmin(np.abs(np.log(offsets / 1e5))))
ledger.claim(
    "Doing without the maximum costs no accuracy in float32",
    paper="presented as a replacement for the max-subtracting softmax",
    measured=f"largest relative error {about(worst_two, 2)}, three-pass {about(worst_three, 2)}; at a common offset of 1e5 fused "
    f"{about(offset_error['two-pass, library'][at_1e5], 2)}, plain {about(offset_error['two-pass, reference'][at_1e5], 2)}",
    checks={
        "relative error <= 4e-6 where y > 1e-30": worst_two <= 4e-6,
        "in every case <= 2 x the three-pass error + 1e-6": all(
            errors[name][case] <= 2 * errors["three-pass"][case] + 1e-6
            for name in two_pass_names
            for case in cases
        ),
        "fused arithmetic: relative error <= 4e-6 for every common offset up to 4e6": all(
            e <= 4e-6
            for e, c in zip(offset_error["two-pass, library"], offsets, strict=True)
            if c <= 4e6
        ),
        "plain arithmetic: relative error <= 4e-6 at a common offset of 1e5": offset_error[
            "two-pass, reference"
        ][at_1e5]
        <= 4e-6,
        "relative error <= 4e-6 at a common offset of 4e7": offset_error[
            "two-pass, library"
        ][-1]
        <= 4e-6,
    },
    fails={
        "plain arithmetic: relative error <= 4e-6 at a common offset of 1e5": "Without a fused multiply-add n times the "
        "first part of ln 2 is inexact once |n| exceeds 2^24 / 355.",
        "relative error <= 4e-6 at a common offset of 4e7": "Even with it, a float n beyond 2^24 is not every "
        "whole number, so that t leaves its interval; max subtraction cancels the offset first.",
    },
)

# %%
ledger.claim(
    "On inputs larger than the cache the saved sweep is saved traffic, and nothing is saved in the cache",
    paper="bandwidth cost 4N and 5N against 3N, out of cache",
    measured=f"simulated cache, row of 4 cache sizes: {gain[0]:.3f} and {gain[1]:.3f} times the bytes of two-pass",
    checks={
        "recompute moves 4/3 of the bytes of two-pass, within 1 %": abs(
            gain[0] / (4 / 3) - 1
        )
        <= 0.01,
        "reload moves 5/3, within 1 %": abs(gain[1] / (5 / 3) - 1) <= 0.01,
        "all four move the same bytes when row and output fit in the cache": len(
            {values[0] for values in moved.values()}
        )
        == 1,
    },
)

# %%
long_rows = [
    times["three-pass"] / times["two-pass"]
    for (count, vocabulary), times in bandwidth.items()
    if 4 * vocabulary > cache_bytes
]
if long_rows:
    ledger.claim(
        "The saved sweep is saved time",
        paper="up to 28 % (AVX512) and 18 % (AVX2) faster than three-pass on out-of-cache inputs, Skylake-X",
        measured=f"on this GPU, rows longer than the L2 cache: {about(min(long_rows))} to {about(max(long_rows))} times three-pass",
        checks={
            "at least 1.2 times as fast as three-pass once a row exceeds the L2 cache": min(
                long_rows
            )
            >= 1.2
        },
    )
else:
    ledger.untested(
        "All passes of a tuned softmax are bound by memory bandwidth, so the saved sweep is saved time",
        paper="up to 28 % (AVX512) and 18 % (AVX2) faster than three-pass on out-of-cache inputs, Skylake-X",
        reason="The figures are those of vectorised native code. PyTorch calls on the CPU spend their time on arithmetic and "
        "dispatch, not on memory, so their wall time says nothing about it; the traffic is counted instead. "
        "scale='full' times the Triton kernels on a GPU.",
    )

# %%
ledger

# %% [markdown]
# ## What is different from the paper
#
# - **No native CPU code.** The paper tunes AVX2 and AVX512 kernels and times every pass. Here the algorithms
#   run in PyTorch, their traffic is counted and the cache is simulated. No statement about speed is made at
#   `scale="ci"`.
# - **Arithmetic.** The authors' code uses fused multiply-adds and splits $\ln 2$ after 24 bits. The reference
#   has none and splits after nine; the library imitates FMA in float64 and takes `torch.exp` of the small
#   argument instead of a polynomial; the kernel uses FMA and the polynomial.
# - **Tiny probabilities.** XNNPACK's AVX2 kernels replace factors of $2^{-127}$ and less by zero. The library
#   and the kernel produce subnormal outputs as `torch.softmax` does.
# - **Additions.** The accuracy analysis, the offset limit and the comparison with online softmax in this
#   chapter are not from the paper. Nor are the backward pass and (14).
# - `scale="full"` adds rows of 16 million logits, a larger simulated cache, and GPU timings of rows up to 67
#   million.
#
# ## Exercises
#
# **1.** Logits arrive as a stream of chunks, and only one fits in memory. Write `answer(chunks)` that returns
# the log-sum-exp of all of them as a float, from an iterator of float32 vectors, looking at each once. A
# chunk may be all `-inf`.


# %% tags=["exercise"]
def check_1(answer):
    torch.manual_seed(0)
    values = torch.cat(
        [
            torch.full((5,), -math.inf),
            torch.randn(1000) * 30 + 200,
            torch.tensor([-5000.0]),
        ]
    )
    for size in (5, 64, 2000):
        result = answer(iter(values.split(size)))
        assert (
            result is not None
            and abs(float(result) - float(values.logsumexp(0))) < 1e-3
        )
    assert answer(iter([torch.full((3,), -math.inf)])) == -math.inf, (
        "an empty sum has the logarithm -inf"
    )


# %% tags=["solution", "hide-cell"]
def solution_1(chunks):
    total = (torch.tensor(0.0), torch.tensor(-torch.inf))
    for chunk in chunks:
        total = pair_add(total, pair_sum(*ext_exp(chunk)))
    m, n = total
    return float(torch.log(m) + n * math.log(2))


check_1(solution_1)

# %% [markdown]
# **2.** Repair the weakness on the right of the accuracy figure without a third sweep. Write `answer(x, y)`
# that fills `y` with the softmax of `x`, both `CountedArray`s of one row, correct to $4\cdot10^{-6}$ under an
# offset of a million, with at most one load more than $2N$. All logits are finite. Then think of a row on
# which your repair does harm.


# %% tags=["exercise"]
def check_2(answer):
    torch.manual_seed(0)
    for offset in (0.0, 1e5, -1e6):
        logits = torch.randn(1000) + offset
        memory = Memory()
        y = CountedArray(torch.full_like(logits, math.nan), memory)
        answer(CountedArray(logits, memory), y)
        exact = logits.double().softmax(-1)
        assert (
            float(((y.data.double() - exact).abs() / exact).nan_to_num(1.0).max())
            < 4e-6
        ), f"wrong at offset {offset}"
        assert memory.loads <= 2 * 1000 + 1 and memory.stores == 1000, (
            "too much traffic"
        )


# %% tags=["solution", "hide-cell"]
def solution_2(x, y, chunk=100):
    anchor = x[
        ..., 0:1
    ]  # any logit cancels the common offset; it need not be the maximum
    total = (torch.tensor(0.0), torch.tensor(-torch.inf))
    for i in range(0, x.shape[-1], chunk):
        total = pair_add(total, pair_sum(*ext_exp(x[..., i : i + chunk] - anchor)))
    for i in range(0, x.shape[-1], chunk):
        m, n = ext_exp(x[..., i : i + chunk] - anchor)
        y[..., i : i + chunk] = at_exponent(m / total[0], n, total[1])


# It does harm when the first logit is an outlier, such as -1e30: then all differences of the others are rounded away.
check_2(solution_2)

# %% [markdown]
# **3.** Attention reads out $\sum_j y_j v_j$ with $y = \operatorname{softmax}(x)$. Give the pairs *vector*
# mantissas and compute the read-out in **one** sweep over `x` and `v`. Write `answer(x, v, chunk)` for logits
# `x` of shape $(N,)$ and values `v` of shape $(N, d)$ that never holds more than a chunk of the
# probabilities.


# %% tags=["exercise"]
def check_3(answer):
    torch.manual_seed(0)
    x, v = torch.randn(500) * 40, torch.randn(500, 8)
    expected = (x.double().softmax(0) @ v.double()).float()
    for chunk in (1, 33, 500):
        result = answer(x, v, chunk)
        assert result is not None and torch.allclose(result, expected, atol=1e-5)


# %% tags=["solution", "hide-cell"]
def solution_3(x, v, chunk):
    top, total = torch.zeros(v.shape[1]), torch.tensor(0.0)
    k = torch.tensor(-torch.inf)
    for i in range(0, len(x), chunk):
        m, n = ext_exp(x[i : i + chunk])
        larger = torch.maximum(k, n.max())
        weight = at_exponent(m, n, larger)
        top = at_exponent(top, k, larger) + weight @ v[i : i + chunk]
        total, k = at_exponent(total, k, larger) + weight.sum(), larger
    return top / total


check_3(solution_3)

# %% [markdown]
# ## Summary
#
# - $e^x = m\,2^n$ with $m$ within $[\frac1{\sqrt2}, \sqrt2]$: store both, and no logit is too large or too
#   small.
# - Pairs add at the larger exponent, by exact powers of two, in any order. One sweep gives the normaliser and
#   the log-sum-exp, a second one the output: three words per element instead of four or five.
# - The gain exists for rows that exceed the cache. There it is bounded by $\frac43$, and by less when stores
#   fetch.
# - Max subtraction blurs small probabilities; the pairs do not. A large common offset blurs the pairs; max
#   subtraction does not notice.
# - Start the sum at $(0, -\infty)$, keep $n$ a float, clip $t$ at $\ln2$ and not at half of it.
#
# **Further reading.** {cite:t}`milakov2018online` for the running maximum, which attention kernels adopted.
# {cite:t}`muller2016elementary` for range reduction and minimax polynomials.
# {cite:t}`blanchard2021accurately` for rounding errors of softmax and log-sum-exp. The next step in this book
# is to never write the logits at all: [Cut Your Losses](../logits/cut-cross-entropy.ipynb).
