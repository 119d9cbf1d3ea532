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
# # Entropy and information: measuring what a layer knows
#
# How much does a layer know about its input, and about the label? Entropy and mutual information answer in bits, if they
# can be estimated. This part measures layers in several ways that do not agree, shows when each is right, and then
# turns to what information theory does best: codes.
#
# **Measuring layers.** Begin with [adaptive estimators](adaptive-information-estimators.ipynb): bins and noise that follow the activity of a layer, and a clear view of which part of an information plane is the
# network and which the ruler. [The information bottleneck by lossy compression](lossy-information-bottleneck.ipynb) goes to continuous variables of many dimensions: compress both sides, estimate from nearest neighbours, and test
# it on images whose information is known exactly. [Diffusion spectral entropy](diffusion-spectral-entropy.ipynb) measures a cloud of vectors by the spectrum of a random walk on it.
#
# **Training with information.** [The Cauchy-Schwarz bottleneck](cauchy-schwarz-bottleneck.ipynb) takes a divergence that kernels estimate without bounds or a decoder, uses it as the whole objective of a regression, and finds what such a
# number does and does not guarantee. [Minimum-entropy coupling](minimum-entropy-coupling.ipynb) asks the opposite question: given two distributions, which joint distribution says most?
#
# **Codes.** [The channel-wise codec](channelwise-image-codec.ipynb) turns probabilities into files: transform, entropy model, coder, and another process that decodes every byte. [The multi-reference
# codec](multi-reference-image-codec.ipynb) adds more places to look before a symbol is coded, skips symbols that are not worth it, and refines the latents of a single picture. The two belong together, in this order.

# %% [markdown]
# ## Side by side
#
# The estimators of this part answer different questions, but all can be asked one that has an answer. Three channels with known mutual information, 600 samples, six draws of each; bars are one standard deviation
# over the draws.
#
# - *Gaussian*: $T = X + \sigma Z$, with $I = \frac12 \log_2 (1 + 1/\sigma^2)$;
# - *binary symmetric*: a fair bit that is flipped with probability $f$, with $I = 1 - H(f)$;
# - *four classes*: $T = Y + \sigma Z$ with four equally likely $Y$, with $I$ by numerical integration.

# %% tags=["parameters"]
scale = "ci"
seed = 0

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import torch

from lib.claims import about, table
from lib.information import (
    akde_mi,
    cs_qmi,
    dsmi,
    ebab_mi,
    mine,
    mutual_information,
)
from lib.train import progress

plt.style.use("lib.book")
samples, draws = {"ci": (600, 6), "full": (4000, 20)}[scale]
generator = torch.Generator().manual_seed(seed)
bit = math.log(2)


def normal(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def ranks(x, bins):
    """Which of `bins` equally filled bins each value is in."""
    return x[:, 0].argsort().argsort() * bins // len(x)


def diffusion(t, labels):
    sigma = 0.25 * t.std().item()
    return dsmi(t, labels, sigma=sigma, generator=generator)[0]


# name: (style, estimate in bits from x (n, 1), t (n, 1) and the variance of the noise)
continuous = {
    "nearest neighbours": ("C0o", lambda x, t, v: mutual_information(x, t)[0] / bit),
    "the same, KSG": ("C1s", lambda x, t, v: mutual_information(x, t, method="ksg")[0] / bit),
    "kernel density": ("C2^", lambda x, t, v: mutual_information(x, t, method="kde")[0] / bit),
    "8 x 8 adaptive bins": ("C3v", lambda x, t, v: ebab_mi(t, ranks(x, 8), bins=8)[1]),
    "aKDE, upper bound": ("C4<", lambda x, t, v: akde_mi(x, torch.zeros(len(x), dtype=torch.long), variance=v)[0]),
    "aKDE, lower bound": ("C4>", lambda x, t, v: akde_mi(x, torch.zeros(len(x), dtype=torch.long), bound="lower", variance=v)[0]),
    "diffusion": ("C5D", lambda x, t, v: diffusion(t, ranks(x, 10))),
    "MINE": ("kx", lambda x, t, v: mine(x, t, steps=200, batch_size=128, lr=3e-3)[0] / bit),
}  # fmt: skip
labelled = {
    "nearest neighbours": ("C0o", lambda y, t, v: mutual_information(t, y, y_discrete=True)[0] / bit),
    "the same, KSG": ("C1s", lambda y, t, v: mutual_information(t, y, y_discrete=True, method="ksg")[0] / bit),
    "kernel density": ("C2^", lambda y, t, v: mutual_information(t, y, y_discrete=True, method="kde")[0] / bit),
    "8 x 8 adaptive bins": ("C3v", lambda y, t, v: ebab_mi(t, y, bins=8)[1]),
    "aKDE, upper bound": ("C4<", lambda y, t, v: akde_mi(y[:, None].double(), y, variance=v)[0]),
    "aKDE, lower bound": ("C4>", lambda y, t, v: akde_mi(y[:, None].double(), y, bound="lower", variance=v)[0]),
    "diffusion": ("C5D", lambda y, t, v: diffusion(t, y)),
}  # fmt: skip
counted = {
    "counts": ("C6P", lambda x, t: mutual_information(x, t, x_discrete=True, y_discrete=True)[0] / bit),
    "8 x 8 adaptive bins": ("C3v", lambda x, t: ebab_mi(t[:, None].double(), x, bins=8)[1]),
    "diffusion": ("C5D", lambda x, t: diffusion(t[:, None].double(), x)),
}  # fmt: skip


def gaussian_channel(bits):
    v = 1 / (4**bits - 1) if bits else 1e9
    x = normal(samples, 1)
    return x, x + math.sqrt(v) * normal(samples, 1), v


def class_channel(sigma):
    y = torch.randint(4, (samples,), generator=generator)
    return y, y[:, None] + sigma * normal(samples, 1), sigma**2


def class_bits(sigma):
    grid = np.linspace(-10, 13, 20_001)
    density = np.exp(-((grid[:, None] - np.arange(4)) ** 2) / (2 * sigma**2)).mean(1)
    density /= sigma * math.sqrt(2 * math.pi)
    terms = -density * np.log2(np.maximum(density, 1e-300))
    return terms.sum() * (grid[1] - grid[0]) - 0.5 * math.log2(
        2 * math.pi * math.e * sigma**2
    )


def binary_channel(flip):
    x = torch.randint(2, (samples,), generator=generator)
    return x, x ^ (torch.rand(samples, generator=generator) < flip).long()


def binary_bits(flip):
    return 1 + sum(p * math.log2(p) for p in (flip, 1 - flip) if p)


panels = {
    "Gaussian channel": (continuous, gaussian_channel, {b: b for b in (0, 1, 2, 3)}),
    "Four classes and noise": (labelled, class_channel, {s: class_bits(s) for s in (0.1, 0.3, 0.6, 1.2)}),
    "Binary channel": (counted, binary_channel, {f: binary_bits(f) for f in (0.0, 0.05, 0.15, 0.3, 0.5)}),
}  # fmt: skip
results = {}  # panel, estimator: (settings, draws)
for title, (estimators, channel, truth) in panels.items():
    for name in estimators:
        results[title, name] = np.zeros((len(truth), draws))
    for i, setting in enumerate(progress(truth, title)):
        for draw in range(draws):
            sample = channel(setting)
            for name, (_, estimate) in estimators.items():
                if name != "MINE" or draw < draws // 3:  # a training each
                    results[title, name][i, draw] = float(estimate(*sample))
                else:
                    results[title, name][i, draw] = np.nan

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 4.2), width_ratios=(1.2, 1, 0.8))
shown = {}
for axis, (title, (estimators, _, truth)) in zip(axes, panels.items(), strict=True):
    answers = np.array(list(truth.values()))
    limits = [answers.min(), answers.max()]
    axis.plot(limits, limits, color="0.8", linewidth=5, zorder=0)
    for number, (name, (style, _)) in enumerate(estimators.items()):
        values = results[title, name]
        place = answers + 0.012 * limits[1] * (number - len(estimators) / 2)
        shown[name] = axis.errorbar(
            place,
            np.nanmean(values, 1),
            np.nanstd(values, 1, ddof=1),
            color=style[:-1],
            marker=style[-1],
            markersize=4,
            linestyle="",
            linewidth=1,
        )
    axis.set(title=title, xlabel="true information (bits)")
axes[0].set(ylabel="estimate (bits)")
figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5)
plt.show()

rows = [("error (bits)", *panels)]
for name in {**continuous, **counted}:
    row = [name]
    for title, (_, _, truth) in panels.items():
        if (title, name) in results:
            errors = results[title, name] - np.array(list(truth.values()))[:, None]
            row.append(about(math.sqrt(np.nanmean(errors**2)), 2))
        else:
            row.append("")
    rows.append(row)
table(*rows)

# %% [markdown]
# The grey line is the truth; the table has the root mean square of the error over all settings and draws.
#
# - *Nearest neighbours and kernel densities* estimate the information itself, without bias that could be seen in one dimension. What happens in eight is in
#   [their chapter](lossy-information-bottleneck.ipynb).
# - *Bins* throw away what is inside a bin, and so fall behind as soon as the channel resolves more than they do, however large the sample. For a discrete channel they are exact, and as good as counting. With few samples
#   both are a little too high.
# - *aKDE* knows the channel and looks at the inputs only: its two numbers are bounds, up to a bit apart, and not estimates.
# - *Diffusion* answers another question. It lies below where clusters overlap, and reads nothing where the points of both labels lie in the same two places; it was made to compare layers, not to count bits.
# - *MINE* trains a network, which takes far longer than all others together, and scatters most.
#
# Error bars are the spread over draws. Where an estimator is biased, they say nothing about how wrong it is.
#
# The last of the part's measures is not an estimate of Shannon's information at all. The quadratic information of Cauchy and Schwarz has its own closed form: two Gaussian variables with correlation $r$, each blurred by the
# kernel to the variance $a = 1 + \sigma^2/2$, have
#
# $$ I_{CS} = \frac12 \log_2 \frac{(4 a^2 - r^2)^2}{16\, a^2\, (a^2 - r^2)} \ \text{bits}. $$

# %%
correlations = np.array([0.0, 0.4, 0.7, 0.9, 0.98])
widths = (0.25, 0.5, 1.0)
figure, axis = plt.subplots(figsize=(6, 3.4))
fine = np.linspace(0, 0.985, 100)
axis.plot(fine, -0.5 * np.log2(1 - fine**2), color="0.5", label="Shannon")
quadratic_gap = 0.0
for number, width in enumerate(widths):
    a = 1 + width**2 / 2
    formula = [
        0.5 * math.log2((4 * a * a - r * r) ** 2 / (16 * a * a * (a * a - r * r)))
        for r in (*fine, *correlations)
    ]
    axis.plot(
        fine, formula[: len(fine)], color=f"C{number}", label=f"I_CS, width {width:g}"
    )
    values = np.zeros((len(correlations), draws))
    for i, r in enumerate(correlations):
        for draw in range(draws):
            x = normal(samples, 1)
            t = r * x + math.sqrt(1 - r * r) * normal(samples, 1)
            values[i, draw] = float(cs_qmi(x, t, width, width, base=2))
    quadratic_gap = max(
        quadratic_gap, np.abs(values.mean(1) - formula[len(fine) :]).max()
    )
    axis.errorbar(
        correlations,
        values.mean(1),
        values.std(1, ddof=1),
        fmt=f"C{number}o",
        markersize=4,
    )
axis.set(
    title="Another quantity, with the same zero", xlabel="correlation", ylabel="bits"
)
axis.legend()
plt.show()
print("largest error of the mean of the draws:", about(quadratic_gap, 2), "bits")

# %% [markdown]
# The estimates lie on their curves, which depend on the width of the kernel; for no width are they Shannon's. What the curves share is the zero at independence.
#
# ## Which chapters build on which
#
# ```{map} information
# ```
#
# ## The chapters
#
# ```{chapters} information
# ```
