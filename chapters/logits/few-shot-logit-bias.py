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
# # Few-shot logit bias: what to add to a zero-shot classifier
#
# A model trained on images and captions classifies without a single labelled example: compare the image with the names of the classes. Now
# somebody gives you four labelled images of each class. This paper {cite:p}`few-shot-logit-bias` observes that most ways to use them
# add a *bias* to the zero-shot logits, and asks three questions about it: computed from which features, by which predictor, added with
# which weight. You derive when a bias can help at all, build the method that follows, AMU-Tuning, take it apart piece by
# piece on a small image-text model, and find out that one of its pieces carries the weight.

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
from scipy.stats import kurtosis as scipy_kurtosis
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from torch import nn

from lib.adapt import (
    AMU,
    CLIPAdapter,
    CoOp,
    LogitBias,
    TipAdapter,
    class_means,
    fit_logit_biases,
    normalize_logits,
)
from lib.claims import Ledger, about
from lib.data import DIGIT_NAMES, CharTokenizer, digits
from lib.models import CNN, TwoTower, encode_names
from lib.train import fit
from lib.uncertainty import fusion_weight, kurtosis_weight

plt.style.use("lib.book")
torch.manual_seed(seed)
ledger = Ledger("few-shot-logit-bias", scale, seed)

# %% [markdown]
# ## The problem
#
# You need an image-text model that is good but not perfect, as the ones trained on the web are. Take 1000 digits with captions: *the digit
# seven, slanted*. The style is read off the image; the digit is **wrong in three captions of ten**. Train two towers by
# contrast, an image network and a text network over characters, as CLIP does {cite:p}`radford2021learning`. Of the other 797 images,
# 20 of each class are the pool from which shots are drawn, 250 choose hyper-parameters, and 347 are the test.


# %%
def styles(images):
    """0 plain, 1 bold, 2 thin, 3 slanted: from the ink and from the covariance of its rows and columns."""
    ink, axis = images.mean((1, 2, 3)), torch.arange(8.0) - 3.5
    mass = images[:, 0] / images[:, 0].sum((1, 2), keepdim=True)
    row, column = (mass.sum(2) * axis).sum(1), (mass.sum(1) * axis).sum(1)
    slant = (mass * axis[:, None] * axis).sum((1, 2)) - row * column
    style = torch.zeros(len(images), dtype=torch.long)
    style[ink > ink.quantile(0.75)] = 1
    style[ink < ink.quantile(0.25)] = 2
    style[slant < slant.quantile(0.2)] = 3
    return style


(train_x, train_y), (rest_x, rest_y) = digits((1000, 797), seed=seed)
pool_rows = torch.cat([(rest_y == k).nonzero()[:20, 0] for k in range(10)])
others = torch.ones(797, dtype=torch.bool).index_fill_(0, pool_rows, False).nonzero()
parts = {"shots": pool_rows, "tune": others[:250, 0], "test": others[250:, 0]}
labels = {name: rest_y[rows] for name, rows in parts.items()}

captions = [
    f"the digit {name}{style}"
    for name in DIGIT_NAMES
    for style in ("", ", bold", ", thin", ", slanted")
]
tokenizer = CharTokenizer(captions)
tokens = encode_names(captions, tokenizer)  # (40, length)
wrong = torch.rand(1000) < 0.3
said = torch.where(wrong, (train_y + torch.randint(1, 10, (1000,))) % 10, train_y)
train_caption = said * 4 + styles(train_x)


def train(model, loss, data, steps, batch_size):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    fit(
        model,
        loss,
        data,
        optimizer=optimizer,
        schedule=cycle,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
    )
    model.requires_grad_(False)


clip = TwoTower(len(tokenizer), tokens.shape[1])
train(
    clip,
    lambda model, images, caption: model.loss(images, tokens[caption]),
    (train_x, train_caption),
    {"ci": 300, "full": 1000}[scale],
    64,
)


def accuracy(logits, targets):
    return (logits.argmax(1) == targets).float().mean().item()


# the name of a class is the mean over the four templates, as a unit vector
text_features = F.normalize(clip.encode_names(tokens).view(10, 4, -1).mean(1), dim=1)
logit_scale = 1 / clip.temperature.item()
image_features = {
    name: clip.encode_images(rest_x[rows]) for name, rows in parts.items()
}
zero_shot = LogitBias(text_features, logit_scale)
zero_accuracy = accuracy(zero_shot.logits(image_features["test"]), labels["test"])

figure, axes = plt.subplots(1, 6, figsize=(9, 2.2))
for axis, i in zip(axes, range(6), strict=True):
    axis.imshow(train_x[i, 0], cmap="gray_r")
    axis.axis("off")
    words = captions[train_caption[i]].removeprefix("the digit ")
    axis.set_title(words, fontsize=9, color="#c00000" if wrong[i] else "black")
figure.suptitle("Images and captions; a red one names a wrong digit")
plt.show()


def draw(n):
    """Rows of the pool: n shots of each class, (draws, 10 n)."""
    found = []
    for d in range(draws):
        generator = torch.Generator().manual_seed(1000 * seed + d)
        order = [torch.randperm(20, generator=generator)[:n] for _ in range(10)]
        found.append(torch.cat([20 * k + rows for k, rows in enumerate(order)]))
    return torch.stack(found)


draws = {"ci": 6, "full": 20}[scale]
four = draw(4)
shots_x, shots_y = image_features["shots"][four], labels["shots"][four]
test_x, test_y = image_features["test"], labels["test"]
own = []
for x, y in zip(shots_x, shots_y, strict=True):
    own.append(accuracy(test_x @ class_means(x, y, 10).T, test_y))
print(f"zero-shot: {about(zero_accuracy)}; ", end="")
print(f"class means of four shots, own features: {about(np.mean(own))}")

# %% [markdown]
# There is room for improvement. But the obvious use of the shots, class means in the model's own feature space,
# is far *worse* than using none: forty images know less than a thousand captions. The shots have to correct the zero-shot
# classifier, not to replace it.

# %% [markdown]
# ## Derivation
#
# ### One form for all of them
#
# Let $f_0 \in \mathbb R^{d_0}$ be the unit feature of an image and $W_0 \in \mathbb R^{d_0 \times K}$ the unit text features of $K$ classes. With the
# model's inverse temperature $\tau$ (learned; it ends at 100 in CLIP) the zero-shot logits and the form to which everything is brought are
#
# $$ s_0 = \tau f_0^\top W_0, \qquad s = s_0 + \beta\, s_b . \tag{1} $$
#
# **CoOp** {cite:p}`zhou2022learning` learns the words around the class name. That moves the text features to $W$, and by linearity
#
# $$ s = \tau f_0^\top W \quad\Longrightarrow\quad s_b = \tau f_0^\top (W - W_0), \quad \beta = 1. \tag{2} $$
#
# **CLIP-Adapter** {cite:p}`gao2021clip` moves the image feature to $f$, a normalised mixture of $f_0$ and the output of a small network:
#
# $$ s = \tau f^\top W_0 \quad\Longrightarrow\quad s_b = \tau (f - f_0)^\top W_0, \quad \beta = 1. \tag{3} $$
#
# **Tip-Adapter** {cite:p}`zhang2022tip` adds votes of the shots, $F \in \mathbb R^{d_0 \times n}$ their features and $L \in \{0,1\}^{n \times K}$ their labels:
#
# $$ s_b = \exp\!\big( -b\,(1 - f_0^\top F) \big)\, L, \quad \beta = \alpha . \tag{4} $$
#
# The right sides of (2) and (3) are rewriting, not theory. What they show is what the three have in common: **the bias is a function of
# the same $f_0$** from which $s_0$ is computed. Check them against the methods as their authors state them, after some training on four shots.


# %%
class Prompt(nn.Module):
    """The text tower with free vectors in the place of the characters of "the digit "."""

    def __init__(self, towers, tokens):
        super().__init__()
        self.towers = copy.deepcopy(towers).requires_grad_(False)
        self.register_buffer("tokens", tokens)
        start = self.towers.characters(tokens[0, : len("the digit ")])
        self.context = nn.Parameter(start.clone())  # (10, dim)

    def forward(self):
        t = self.towers
        words = t.characters(self.tokens[:, len(self.context) :])
        context = self.context.expand(len(words), *self.context.shape)
        present = (self.tokens != t.padding).unsqueeze(-1)
        position = t.positions.weight[: self.tokens.shape[1]]
        each = torch.tanh(torch.cat([context, words], 1) + position) * present
        return t.name_tower(each.sum(1) / present.sum(1))


plain = encode_names([f"the digit {name}" for name in DIGIT_NAMES], tokenizer)
start = F.normalize(Prompt(clip, plain)(), dim=1)
assert torch.allclose(start, clip.encode_names(plain), atol=1e-5)
coop = [CoOp(text_features, Prompt(clip, plain), logit_scale) for _ in range(draws)]
adapters = [CLIPAdapter(text_features, logit_scale) for _ in range(draws)]
caches = [TipAdapter(text_features, logit_scale) for _ in range(draws)]
for models, rate in ((coop, 1e-2), (adapters, 1e-3), (caches, 1e-3)):
    fit_logit_biases(models, shots_x, shots_y, seeds=range(draws), epochs=25, lr=rate)
with torch.no_grad():
    learned = F.normalize(coop[0].prompt(), dim=1)
    mixed = F.normalize(0.2 * adapters[0].adapter(test_x) + 0.8 * test_x, dim=1)
    voted = zero_shot.logits(test_x)
    for key, label in zip(shots_x[0], shots_y[0], strict=True):
        voted[:, label] += torch.exp(-5.5 * (1 - test_x @ key))
    as_stated = {
        "CoOp": (coop[0], logit_scale * test_x @ learned.T),
        "CLIP-Adapter": (adapters[0], logit_scale * mixed @ text_features.T),
        "Tip-Adapter": (caches[0], voted),
    }
    unified_error, bias_size = {}, {}
    for name, (model, direct) in as_stated.items():
        bias, beta = model.bias(test_x)
        unified = zero_shot.logits(test_x) + beta * bias
        unified_error[name] = (unified - direct).abs().max().item()
        bias_size[name] = (beta * bias).std(1).mean().item()
        print(f"{name}: {about(unified_error[name], 1)} apart", end=", ")
        print(f"spread of the bias over the classes {about(bias_size[name], 2)}")
coop_accuracy = np.mean([accuracy(model.logits(test_x), test_y) for model in coop])
print(f"CoOp on four shots, test accuracy {about(coop_accuracy)}")

# %% [markdown]
# ### When can a bias help?
#
# Two classes. Write $m_0$ for the margin of the true class in the zero-shot logits and $m_b$ for its margin in the bias; a decision is
# right when its margin is positive. Suppose both are Gaussian over the test images, with means $\mu_0, \mu_b > 0$, standard deviations $\sigma_0, \sigma_b$ and
# correlation $\rho$. The fused margin $m_0 + \beta m_b$ is Gaussian too, so that the chance of being right is
#
# $$ \Pr[m_0 + \beta m_b > 0] = \Phi(d), \qquad
# d(\beta) = \frac{\mu_0 + \beta \mu_b}{\sqrt{\sigma_0^2 + 2 \beta \rho\, \sigma_0 \sigma_b + \beta^2 \sigma_b^2}} . \tag{5} $$
#
# Only ratios of mean to noise matter: $d_0 = \mu_0 / \sigma_0$ for the zero-shot classifier alone, $d_b = \mu_b / \sigma_b$ for the bias alone. Setting the derivative of (5) to zero gives
#
# $$ \beta^\ast = \frac{\sigma_0}{\sigma_b} \cdot \frac{d_b - \rho\, d_0}{d_0 - \rho\, d_b} , \qquad
# d(\beta^\ast)^2 = d_0^2 + \frac{(d_b - \rho\, d_0)^2}{1 - \rho^2} . \tag{6} $$
#
# provided $d_0 > \rho\, d_b$. (With both means equal this is the weight of least variance at a given sum of weights. It is Fisher's discriminant in two dimensions, and $d^2 = \mu^\top \Sigma^{-1} \mu$.)
# Read the second equation. The gain is zero at
#
# $$ \rho = \frac{d_b}{d_0} , \tag{7} $$
#
# and beyond it $\beta^\ast$ is negative: such a bias should be *subtracted*, as an estimate of the noise in $s_0$. No method here does that, so
# beyond (7) its gain is zero. For two predictors of equal quality (7) says $\rho = 1$: the gain vanishes as the errors become the same. For a worse
# predictor it vanishes much earlier. So a bias needs either quality, a large $d_b$, or difference, a small $\rho$; the paper
# calls these superiority and complementarity of the features. A predictor trained on forty values of $f_0$ has neither. **That is the case for A, auxiliary features**:
# $f_a$ from a second encoder, trained otherwise, on images without text; the paper compares several and settles on MoCo v3 {cite:p}`chen2021empirical`.

# %%
generator = np.random.default_rng(seed)
for d_0, d_b, rho in itertools.product((0.8, 1.5), (0.7, 1.2), (-0.3, 0.2, 0.45)):
    spread = np.array([1.7, 0.6])
    mean = np.array([d_0, d_b]) * spread
    covariance = np.outer(spread, spread) * np.array([[1, rho], [rho, 1]])
    best = spread[0] / spread[1] * (d_b - rho * d_0) / (d_0 - rho * d_b)
    d_best = math.sqrt(d_0**2 + (d_b - rho * d_0) ** 2 / (1 - rho**2))
    betas = np.linspace(0, 30, 60_001)
    weights = np.stack([np.ones_like(betas), betas])
    d = mean @ weights / np.sqrt(np.einsum("in,ij,jn->n", weights, covariance, weights))
    assert abs(d.max() - d_best) < 1e-4 and abs(betas[d.argmax()] - best) < 2e-3
    assert math.isclose(d_best**2, mean @ np.linalg.solve(covariance, mean))
    margins = generator.multivariate_normal(mean, covariance, 100_000)
    right = (margins @ [1, best] > 0).mean()
    assert abs(right - norm.cdf(d_best)) < 0.008

# %% [markdown]
# ### The predictor and its scale
#
# The predictor is linear without intercept, $W_a \in \mathbb R^{d_a \times K}$, on the unit feature $f_a$. It starts as the class means of the shots, and its logits are
# standardised *over the classes of each image*:
#
# $$ W_a[:, k] \leftarrow \frac{1}{n_k} \sum_{i:\, y_i = k} f_{a,i} , \tag{8} $$
#
# $$ z = f_a^\top W_a , \qquad s_b = \frac{z - \bar z}{\mathrm{std}(z)} , \qquad
# \mathrm{std}(z)^2 = \frac{1}{K-1} \sum_k (z_k - \bar z)^2 . \tag{9} $$
#
# So the first prediction is that of the nearest class mean (for means of equal length), the classifier to which
# [networks converge by themselves](neural-collapse.ipynb). Two facts about (9) are worth having.
#
# **It is blind to two directions.** $s_b$ does not change when $W_a$ is multiplied by a positive number or when one vector is added to all its columns.
# So the gradient $G$ of any loss of $s_b$ satisfies
#
# $$ \langle G, W_a \rangle = 0, \qquad \sum_k G[:, k] = 0 . \tag{10} $$
#
# **Its size is fixed by $K$.** If one logit stands out and the others are equal, the gap after (9) is exactly
#
# $$ \frac{z_1 - z_2}{\sqrt{(z_1 - z_2)^2 / K}} = \sqrt K , \tag{11} $$
#
# whatever it was before. With $K = 1000$ that is 32, with $K = 10$ only 3.2. The released $\alpha = 0.5$ is a choice for ImageNet: for the same pull
# in the same softmax ten classes need $\alpha = 0.5 \sqrt{1000 / 10} = 5$. Keep that in mind when you take the hyper-parameter to another data set.
#
# ### M: two branches
#
# Train $W_a$ on the fused logits alone and the gradient that reaches the bias is
#
# $$ \frac{\partial}{\partial s_b} \mathrm{CE}(s_0 + \beta s_b, y) = \beta \big( \mathrm{softmax}(s) - e_y \big) , \tag{12} $$
#
# small when $\beta$ is, and small on every shot that the zero-shot logits classify already. The predictor learns to repair the errors on the shots and
# nothing else. So it also gets a loss of its own,
#
# $$ \mathcal L = \lambda\, \mathrm{CE}(s_0 + \beta s_b, y) + (1 - \lambda)\, \mathrm{CE}(s_b, y), \qquad \lambda = 0.35 . \tag{13} $$
#
# By (11) the second term cannot be driven to zero: on rows of mean 0 and deviation 1 it is least where the true class stands alone, and there it is
# $\log(1 + (K-1)\, e^{-\sqrt K})$, a third of a nat for $K = 10$. So the gradient of that branch stays alive.
#
# ### U: how many classes compete?
#
# The weight is $\beta = \alpha\, \kappa(s_0)$, with $p = \mathrm{softmax}(s_0)$ and its kurtosis over the classes (population moments, no minus three):
#
# $$ \kappa = \Big( \frac{k_4}{k_{\mathrm{ref}}} \Big)^{-\gamma}, \qquad
# k_4 = \frac1K \sum_k \Big( \frac{p_k - \bar p}{\mathrm{std}(p)} \Big)^4 , \qquad \gamma = 0.4 . \tag{14} $$
#
# What does it measure? Let $m$ classes share all the probability equally and put $q = m / K$. Each $p_k$ is then an affine function of a coin
# with chance $q$, and $k_4$ is the coin's kurtosis:
#
# $$ k_4 = \frac{1}{q (1 - q)} - 3, \qquad m = 1: \quad k_4 = \frac{K^2 - 3K + 3}{K - 1} \approx K . \tag{15} $$
#
# Thus kurtosis counts competitors. The released code has $k_{\mathrm{ref}} = 250$; by (15) that is a tie of four among a thousand. For another $K$ this chapter
# uses $k_{\mathrm{ref}} = K / 4$, a tie of about four again when $K$ is large, and between two and three when $K = 10$. With fewer competitors the bias is turned down, with more it is turned up.

# %%
z = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
assert torch.allclose(normalize_logits(3 * z + 1), normalize_logits(z))
aux_demo = torch.randn(6, 5).double()
w_demo = torch.randn(10, 5).double().requires_grad_()  # rows are the columns of (8)
loss = F.cross_entropy(normalize_logits(aux_demo @ w_demo.T), torch.arange(6))
(g,) = torch.autograd.grad(loss, w_demo)
assert abs((g * w_demo).sum()) < 1e-12 and g.sum(0).abs().max() < 1e-12  # (10)
for K in (10, 1000):
    gap = normalize_logits(7.0 * torch.eye(K)[:1])[0]
    assert abs((gap[0] - gap[1]).item() - math.sqrt(K)) < 1e-3  # (11)
rows = normalize_logits(torch.randn(20_000, 10).double() + 5 * torch.eye(10)[0])
floor = math.log(1 + 9 * math.exp(-math.sqrt(10)))
alone = normalize_logits(torch.eye(10)[:1].double())
assert math.isclose(-alone.log_softmax(1)[0, 0], floor)
assert floor <= -rows.log_softmax(1)[:, 0].max() < floor + 0.05
s_0, beta = torch.randn(6, 10).double(), 0.3
loss = F.cross_entropy(s_0 + beta * z, torch.arange(6), reduction="sum")
(g,) = torch.autograd.grad(loss, z)
by_hand = beta * (torch.softmax(s_0 + beta * z, 1) - torch.eye(10)[:6])
assert torch.allclose(g, by_hand)  # (12)
p = torch.softmax(s_0, 1).numpy()
k4 = torch.from_numpy(scipy_kurtosis(p, axis=1, fisher=False))
assert torch.allclose(kurtosis_weight(s_0, 1.0, 1.0)[:, 0], 1 / k4)  # (14)


def tie(m, K):
    """Kurtosis of the softmax when m of K logits are equal and far above the others."""
    logits = torch.full((1, K), -1000.0).index_fill_(1, torch.arange(m), 0.0)
    return 1 / kurtosis_weight(logits, 1.0, 1.0).item()


for K, m in itertools.product((10, 100, 1000), (1, 2, 4, 8)):
    q = m / K
    assert math.isclose(tie(m, K), 1 / (q * (1 - q)) - 3, rel_tol=1e-5)  # (15)
print("ties of a thousand classes:", end=" ")
print(", ".join(f"{m}: {tie(m, 1000):.0f}" for m in (1, 2, 3, 4, 5, 8)))
print("ties of ten classes:", end=" ")
print(", ".join(f"{m}: {tie(m, 10):.2f}" for m in (1, 2, 3, 4, 5)), "; K / 4 is 2.5")

# %% [markdown]
# ### Four traps
#
# - *Statistics over the batch.* (9) is a mean over the classes of one image. Over the batch, a prediction would depend on the other images, and on one image alone it
#   would not exist.
# - *Kurtosis of the logits.* It does not see the scale: evenly spaced logits look like a tie of three of ten, even where their softmax is one-hot.
# - *Minus three.* Library functions return excess kurtosis by default. It is negative for five ties of ten, and a negative number has no power $-0.4$.
# - *Kurtosis is not confidence.* It does not change under $p \to a p + b$. A distribution that is uniform up to one part in a thousand, with
#   one class ahead, counts as certain.

# %%
batch = torch.tensor([[2.0, 1.5, 0.0], [5.0, 0.0, 0.1], [4.0, 0.2, 0.0]])
over_batch = (batch - batch.mean(0)) / batch.std(0)
print(f"first image: class {batch[0].argmax()}; standardised ", end="")
print(f"over classes: class {normalize_logits(batch)[0].argmax()}; ", end="")
print(f"over the batch: class {over_batch[0].argmax()}")


def k4_of(logits):
    raw = scipy_kurtosis(logits[0].double().numpy(), fisher=False)
    return f"{raw:.2f} raw, {1 / kurtosis_weight(logits, 1.0, 1.0).item():.2f} of the softmax"


ramp, high = 20 * torch.arange(10.0)[None], 90 * torch.eye(10)[:1]
print("k4 of evenly spaced logits:", k4_of(ramp))
print(f"excess kurtosis of five ties of ten: {tie(5, 10) - 3:.2f}")
print(
    f"weight, uniform to one in a thousand: {kurtosis_weight(high / 9e4).item():.3f}",
    end="; ",
)
print(f"one-hot: {kurtosis_weight(high).item():.3f}; one logit far below:", end=" ")
print(f"{kurtosis_weight(-high).item():.3f}")

# %% [markdown]
# The last number is a fifth trap. One class *ruled out* counts like one class certain: nine equal probabilities and a zero are again a coin with $q (1 - q) = 0.09$, and in (15)
# $m$ and $K - m$ look the same. With a thousand classes that hardly occurs; with ten it can.

# %% [markdown]
# ## Reference implementation
#
# The method in two cells, the cache of (4) in a third.

# %% tags=["reference"]
import torch


def normalize(logits):
    centred = logits - logits.mean(1, keepdim=True)
    return centred / logits.std(1, keepdim=True)  # over classes, K - 1


def kurtosis(logits):
    """k4 of the class probabilities, (n, K) to (n, 1)."""
    p = torch.softmax(logits, 1)
    p = p - p.mean(1, keepdim=True)
    return (p**4).mean(1, keepdim=True) / (p**2).mean(1, keepdim=True) ** 2


def amu_logits(zero_shot, aux_features, weight, alpha=0.5, power=0.4):
    """Fused logits and bias. zero_shot: (n, K); aux_features: unit rows (n, d_a); weight: (K, d_a)."""
    bias = normalize(aux_features @ weight.T)
    beta = alpha * (kurtosis(zero_shot) / (zero_shot.shape[1] / 4)) ** -power
    return zero_shot + beta * bias, bias


# %% tags=["reference"]
import torch
import torch.nn.functional as F


def start_at_class_means(aux_features, labels, num_classes):
    means = [aux_features[labels == k].mean(0) for k in range(num_classes)]
    return torch.stack(means).requires_grad_()


def amu_loss(fused, bias, labels, lam=0.35):
    return lam * F.cross_entropy(fused, labels) + (1 - lam) * F.cross_entropy(
        bias, labels
    )


# %% tags=["reference"]
import torch
import torch.nn.functional as F


def tip_adapter(zero_shot, features, keys, labels, alpha=1.0, sharpness=5.5):
    """features (n, d) and keys (shots, d) are unit rows; labels: (shots,)."""
    values = F.one_hot(labels, zero_shot.shape[1]).to(features.dtype)
    return zero_shot + alpha * torch.exp(-sharpness * (1 - features @ keys.T)) @ values


# %% [markdown]
# By hand, four classes. Zero-shot: classes 0 and 1 tie, the others are out; so $q = \frac12$, $k_4 = 4 - 3 = 1 = K/4$ and $\kappa = 1$. Bias: the logits $(3, 1, 1, 1)$ have mean
# $1.5$, squared deviations $2.25 + 3 \cdot 0.25 = 3$, so standard deviation 1, and become $(1.5, -0.5, -0.5, -0.5)$; the gap is $2 = \sqrt 4$. With $\alpha = 0.5$ class 0
# gets $+0.75$ and class 1 gets $-0.25$: the tie is broken, by one nat.

# %%
s_0 = torch.tensor([[0.0, 0.0, -200.0, -200.0]])
w = torch.tensor([[3.0], [1], [1], [1]])
fused, bias = amu_logits(s_0, torch.ones(1, 1), w)
assert torch.allclose(bias, torch.tensor([[1.5, -0.5, -0.5, -0.5]]))
assert torch.allclose(fused[0, :2], torch.tensor([0.75, -0.25]))
loss = amu_loss(fused, bias, torch.tensor([0]))
ce_fused, ce_bias = math.log(1 + math.exp(-1)), math.log(1 + 3 * math.exp(-2))
assert math.isclose(loss.item(), 0.35 * ce_fused + 0.65 * ce_bias, rel_tol=1e-5)
three = torch.tensor([[1.0], [3.0], [5.0]])
assert start_at_class_means(three, torch.tensor([0, 0, 1]), 2).tolist() == [
    [2.0],
    [5.0],
]
keys, votes = torch.eye(2), torch.tensor([1, 0])
one_vote = tip_adapter(torch.zeros(1, 2), keys[:1], keys, votes, 2.0, 3.0)
assert torch.allclose(one_vote, torch.tensor([[2 * math.exp(-3), 2.0]]))

# %% [markdown]
# ## The library
#
# `lib.adapt` has the four methods as one family: `lib.adapt.LogitBias` is (1) with no bias, `lib.adapt.CoOp`, `lib.adapt.CLIPAdapter`,
# `lib.adapt.TipAdapter` (with `finetune=True` its keys are trained) and `lib.adapt.AMU` say what the bias is. All have `fit` and `logits`. The weights are
# `lib.uncertainty.kurtosis_weight` and `lib.uncertainty.fusion_weight`. Values and gradients are those of the reference; three things are added. Constant logits and uniform
# probabilities, where the reference divides zero by zero, have defined answers. Inputs are checked: features that are not unit rows are the usual mistake. And
# `lib.adapt.fit_logit_biases` trains many models in one loop, each on its own shots: the comparison below trains hundreds.

# %%
aux_demo = F.normalize(torch.randn(40, 64), dim=1)
model = AMU(text_features, 64, logit_scale, alpha=2.0)
model.prepare(shots_x[0], shots_y[0], aux_demo)
fused, loss = model(shots_x[0], aux_demo, shots_y[0])
loss.backward()
w = start_at_class_means(aux_demo, shots_y[0], 10)
expected, bias = amu_logits(model.zero_shot(shots_x[0]), aux_demo, w, alpha=2.0)
amu_loss(expected, bias, shots_y[0]).backward()
assert torch.allclose(fused, expected, atol=1e-4)
assert torch.allclose(model.predictor.weight.grad, w.grad, atol=1e-5)
direct = tip_adapter(zero_shot.logits(test_x), test_x, shots_x[0], shots_y[0])
assert torch.allclose(caches[0].logits(test_x), direct, atol=1e-5)
flat = torch.ones(1, 4)
assert normalize(flat).isnan().all() and kurtosis(flat).isnan().all()
print("equal logits:", normalize_logits(flat)[0].tolist(), end=", ")
print(f"weight {kurtosis_weight(flat).item():.3f}")
try:
    model.fit(shots_x[0], shots_y[0], 3 * aux_demo)
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# ## Experiment
#
# ### The second encoder
#
# It sees the same 1000 images, and no captions and no labels: two random views of an image (turned, scaled, slanted, moved, in another contrast, with
# noise) are to be closer to each other than to the views of other images {cite:p}`chen2020simple`. What is kept is the layer before the projection. Were it trained with
# labels, it would know the classes already, and nothing could be concluded about auxiliary *features*.


# %%
def random_views(images, count, generator):
    """Random affine maps with contrast and noise, (n, count, 1, 8, 8)."""

    def uniform(*shape, width):
        return (torch.rand(*shape, generator=generator) * 2 - 1) * width

    views, n = [], len(images)
    for _ in range(count):
        angle, zoom = uniform(n, width=0.35), 1 + uniform(n, width=0.2)
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = zoom * angle.cos()
        theta[:, 0, 1] = -angle.sin() + uniform(n, width=0.25)
        theta[:, 1, 0] = angle.sin()
        theta[:, :, 2] = uniform(n, 2, width=0.2)
        grid = F.affine_grid(theta, images.shape, align_corners=False)
        view = F.grid_sample(images, grid, align_corners=False)
        view = view * (1 + uniform(n, 1, 1, 1, width=0.3))
        views.append(view + 0.05 * torch.randn(view.shape, generator=generator))
    return torch.stack(views, 1)


def contrastive_loss(model, views):
    """Two of the views of each image: find the partner among all others; temperature 0.2."""
    n, count = views.shape[:2]
    first, rows = torch.randint(count, (n,)), torch.arange(n)
    second = (first + torch.randint(1, count, (n,))) % count
    z = F.normalize(model(torch.cat([views[rows, first], views[rows, second]])), dim=1)
    similarity = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, (torch.arange(2 * n) + n) % (2 * n))


torch.manual_seed(seed + 1)
views = random_views(train_x, 16, torch.Generator().manual_seed(seed))
second_encoder = CNN(32, channels=(8, 16))
ssl_steps = {"ci": 250, "full": 1500}[scale]
train(second_encoder, contrastive_loss, (views,), ssl_steps, 96)
aux, padded = {}, {}
for name, rows in parts.items():
    aux[name] = F.normalize(second_encoder.features(rest_x[rows]), dim=1)
    # the image-text model's own features with 32 zeros behind them: both kinds have 64 numbers
    padded[name] = F.pad(image_features[name], (0, 32))

# %% [markdown]
# Before any training: are these features better than the model's own, and do their errors differ? Take the predictor as it starts, (8) and (9), on both,
# with the margins of the true class over each other class as $m_0$ and $m_b$ in (5) and (6).

# %%
s_test = zero_shot.logits(test_x)
zero_wrong = s_test.argmax(1) != test_y


def pair_margins(logits):
    """Margins of the true class over each of the others, (9 n,)."""
    mine = logits.gather(1, test_y[:, None])
    return (mine - logits)[~F.one_hot(test_y, 10).bool()]


m_0 = pair_margins(s_test)
d_0 = (m_0.mean() / m_0.std()).item()
print(
    f"zero-shot: d_0 {about(d_0, 2)}, pairs in order {about((m_0 > 0).float().mean().item())}"
)
quality = {}
for name, features in (("own", padded), ("auxiliary", aux)):
    found = []
    for rows, y in zip(four, shots_y, strict=True):
        prototype = class_means(features["shots"][rows], y, 10)
        bias = normalize_logits(features["test"] @ prototype.T)
        m_b = pair_margins(bias)
        d_b = (m_b.mean() / m_b.std()).item()
        rho = torch.corrcoef(torch.stack([m_0, m_b]))[0, 1].item()
        best = (m_0.std() / m_b.std()).item() * (d_b - rho * d_0) / (d_0 - rho * d_b)
        d = math.sqrt(d_0**2 + (d_b - rho * d_0) ** 2 / (1 - rho**2))
        fused = m_0 + best * m_b
        assert abs(d - (fused.mean() / fused.std()).item()) < 0.01  # (6) is exact
        share = (bias.argmax(1) != test_y)[zero_wrong].float().mean().item()
        in_order = (fused > 0).float().mean().item()
        found.append((accuracy(bias, test_y), d_b, rho, best, d - d_0, in_order, share))
    quality[name] = acc, d_b, rho, best, gain, in_order, share = np.mean(found, 0)
    print(f"{name} features: accuracy {about(acc)}, d_b {about(d_b, 2)}, rho", end=" ")
    print(
        f"{about(rho, 2)} (limit (7) {about(d_b / d_0, 2)}), beta* {about(best, 2)}",
        end=", ",
    )
    print(f"gain in d {about(gain, 2)}, pairs in order {about(in_order)}", end=", ")
    print(f"also wrong where zero-shot is: {about(share, 2)}")

# %% [markdown]
# The model's own features are not far from the limit (7): most of what they could tell, $s_0$ has said. The auxiliary ones are better *and* less correlated, and the
# gain in $d$ is several times as large. Where the zero-shot answer is wrong, the own features are mostly wrong too.
#
# ### The comparison
#
# One, four and sixteen shots; six draws of them, three for sixteen, since those share most of their images. Each arm has **one number tuned, with six values, on the tuning images**: the weight $\alpha$ for AMU, its ablations
# and both forms of Tip-Adapter (times three values of $b$ without training, two with), the ratio for CLIP-Adapter. The value with the best mean accuracy over the draws is taken, and only then
# do the test images count. (The released code reports the best *epoch on the test set*; here it is always the last.) Training is as released, for all arms: AdamW, $10^{-3}$
# with a cosine, weight decay 0.01, $\epsilon = 10^{-4}$, batches of eight, 50 epochs, but 25 for sixteen shots.
#
# The ablations: minus A uses the model's own features; minus M has $\lambda = 1$; minus U has $\gamma = 0$, so that $\kappa = 1$; minus initialisation starts at random. *Bias alone* is the linear
# classifier on auxiliary features with no zero-shot logits at all ($\lambda = 0$). And one control asks whether the second encoder
# needs AMU: Tip-Adapter's cache, untrained and filled with $f_a$, as one half of the method of {cite:t}`zhang2023prompt`.

# %%
alphas = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
ratios = (0.1, 0.2, 0.4, 0.6, 0.8, 0.95)
shot_counts = {"ci": (1, 4, 16), "full": (1, 2, 4, 8, 16)}[scale]
options = {"minus M": dict(lam=1.0), "minus U": dict(power=0.0)}
options |= {"minus initialisation": dict(init="random"), "bias alone": dict(lam=0.0)}
ablations = ("minus A", "minus M", "minus U", "minus initialisation")
rivals = ("Tip-Adapter", "Tip-Adapter-F", "CLIP-Adapter")
grids = {arm: alphas for arm in ("AMU", *ablations)}
grids |= {"bias alone": (1.0,), "CLIP-Adapter": ratios}
grids["Tip-Adapter"] = tuple(itertools.product(alphas, (5.5, 20.0, 60.0)))
grids["Tip-Adapter-F"] = tuple(itertools.product(alphas, (5.5, 20.0)))


def make(arm, value):
    if arm == "CLIP-Adapter":
        return CLIPAdapter(text_features, logit_scale, ratio=value)
    if arm.startswith("Tip"):
        (a, b), tuned = value, arm == "Tip-Adapter-F"
        tip = dict(alpha=a, sharpness=b, finetune=tuned)
        return TipAdapter(text_features, logit_scale, **tip)
    return AMU(text_features, 64, logit_scale, alpha=value, **options.get(arm, {}))


def score(arm, model, part, alone=False):
    x = image_features[part], (padded if arm == "minus A" else aux)[part]
    with torch.no_grad():
        logits = model.bias(*x)[0] if alone or arm == "bias alone" else model.logits(*x)
    return accuracy(logits, labels[part])


test_accuracy, chosen, trained = {}, {}, {}
for n in shot_counts:
    count = draws if n < 16 else draws // 2
    shots = draw(n)[:count]
    torch.manual_seed(seed + 2)
    for group in (("AMU", *ablations, "bias alone"), *((arm,) for arm in rivals)):
        members = [
            (arm, v, d) for arm in group for v in grids[arm] for d in range(count)
        ]
        models = [make(arm, value) for arm, value, _ in members]
        rows = torch.stack([shots[d] for *_, d in members])
        kinds = [padded if arm == "minus A" else aux for arm, *_ in members]
        fit_logit_biases(
            models,
            image_features["shots"][rows],
            labels["shots"][rows],
            torch.stack([x["shots"][r] for x, r in zip(kinds, rows, strict=True)]),
            seeds=[d for *_, d in members],
            epochs=25 if scale == "ci" and n == 16 else 50,
        )
        for (arm, value, d), model in zip(members, models, strict=True):
            trained[arm, n, value, d] = model
    for arm, grid in grids.items():
        tuned = [[trained[arm, n, v, d] for d in range(count)] for v in grid]
        tune = [np.mean([score(arm, model, "tune") for model in row]) for row in tuned]
        best = int(np.argmax(tune))
        chosen[arm, n] = grid[best]
        test_accuracy[arm, n] = [score(arm, model, "test") for model in tuned[best]]
    test_accuracy["zero-shot", n] = [zero_accuracy]
    # a control: the cache of (4), but of auxiliary features
    cache = {}
    for part in ("tune", "test"):
        s_0, y = zero_shot.logits(image_features[part]), labels[part]
        for value in grids["Tip-Adapter"]:
            for rows in shots:
                keys, votes = aux["shots"][rows], labels["shots"][rows]
                logits = tip_adapter(s_0, aux[part], keys, votes, *value)
                cache.setdefault((part, value), []).append(accuracy(logits, y))
    chosen["cache on f_a", n] = max(
        grids["Tip-Adapter"], key=lambda value: np.mean(cache["tune", value])
    )
    test_accuracy["cache on f_a", n] = cache["test", chosen["cache on f_a", n]]

mean_of = {key: float(np.mean(values)) for key, values in test_accuracy.items()}
print(" " * 21 + "".join(f"{n:>8} shots" for n in shot_counts) + "   tuned, 4 shots")
for arm in (*grids, "cache on f_a", "zero-shot"):
    cells = "".join(f"{about(mean_of[arm, n]):>14}" for n in shot_counts)
    value = chosen.get((arm, 4), ())
    value = value if isinstance(value, tuple) else (value,)
    print(f"{arm:21}{cells}   " + ", ".join(about(v) for v in value))

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True)
panels = (
    ("AMU", "bias alone", "cache on f_a", *rivals, "zero-shot"),
    ("AMU", *ablations),
)
for axis, names in zip(axes, panels, strict=True):
    for i, arm in enumerate(names):
        axis.errorbar(
            [n * 2 ** (0.06 * (i - 2)) for n in shot_counts],
            [100 * mean_of[arm, n] for n in shot_counts],
            [100 * np.std(test_accuracy[arm, n]) for n in shot_counts],
            fmt="o--" if arm == "zero-shot" else "o-",
            ms=4,
            lw=2.5 if arm == "AMU" else 1.3,
            capsize=2,
            label=arm,
        )
    axis.set(xscale="log", xlabel="shots of each class")
    axis.set_xticks(shot_counts, [str(n) for n in shot_counts])
    axis.minorticks_off()
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=3)
axes[0].set(title="Against other methods", ylabel="test accuracy, %")
axes[1].set(title="AMU without one of its parts")
plt.show()

# %% [markdown]
# Left: the methods on the image-text model's own features move a little from the zero-shot line, and need many shots for it. AMU is far above from the first shot on. It also beats its own
# bias alone, most of all with one shot: that gap is what the zero-shot logits still contribute; it closes as shots grow. Now look at the control. **An untrained cache does as well as AMU, once it holds
# the same features.** So what beats the earlier methods is the second encoder, and AMU is one of several good ways to read it.
#
# Right, the same from the other side: without A the rest of AMU is about as good as Tip-Adapter. The start at class means matters as long as shots are few, since fifty epochs over ten images do
# not take a random start far. The second branch is worth little. Without U nothing is lost. Bars are standard deviations over the draws. The tuned $\alpha$ is above the released 0.5, as (11) predicts.
#
# ### The second branch, looked at
#
# Take the shots and the predictor as it starts, and compute both gradients of (13) at the bias, without their factors $\lambda$ and $1 - \lambda$. Then compare the trained biases *by themselves*.

# %%
fused_size, own_size = [], []
for rows, x, y in zip(four, shots_x, shots_y, strict=True):
    model = AMU(text_features, 64, logit_scale, alpha=0.5)
    model.prepare(x, y, aux["shots"][rows])
    with torch.no_grad():
        bias, beta = model.bias(x, aux["shots"][rows])
        fused = torch.softmax(model.zero_shot(x) + beta * bias, 1)
        target = F.one_hot(y, 10)
        fused_size.append((beta * (fused - target)).norm(dim=1).median().item())
        own_size.append((torch.softmax(bias, 1) - target).norm(dim=1).median().item())
fused_size, own_size = np.mean(fused_size), np.mean(own_size)
by_itself = {}
for arm in ("AMU", "minus M"):
    every = [trained[arm, 4, a, d] for a in alphas for d in range(draws)]
    by_itself[arm] = 100 * np.mean([score(arm, m, "test", alone=True) for m in every])
print(f"median gradient, fused branch {about(fused_size, 2)}, own {about(own_size, 2)}")
print(
    f"accuracy of the bias by itself, mean over alpha: {about(by_itself['AMU'])} %",
    end=" ",
)
print(f"with two branches, {about(by_itself['minus M'])} % with one")

# %% [markdown]
# The median shot gives the fused branch a far smaller gradient, as (12) says: it is classified already. But the optimiser is Adam, which divides by the size
# of the gradients, so size alone decides little. The direction is what differs: with one branch the predictor is taught only by the
# shots that the zero-shot classifier gets wrong. By itself it becomes the worse classifier; fused, it hardly matters.
#
# ### Uncertainty, looked at
#
# Does $\kappa$ know where the zero-shot logits are wrong? And does the fusion profit? For the second question take the predictors of *bias alone* at four shots, and fuse them by four of
# the released weights and by a constant, all scaled to the same mean weight. So the only difference is how the same total is spread over the images.

# %%
kappa = kurtosis_weight(s_test)[:, 0]
auroc = roc_auc_score(zero_wrong, kappa)
auroc_max = roc_auc_score(zero_wrong, fusion_weight(s_test, "max")[:, 0])
strengths = np.geomspace(0.1, 16, 23)
predictors = [trained["bias alone", 4, 1.0, d] for d in range(draws)]
with torch.no_grad():
    biases = [model.bias(test_x, aux["test"])[0] for model in predictors]
spread_curves = {}
for kind in ("constant", "kurtosis", "entropy", "max", "margin"):
    weight = torch.ones(len(s_test), 1)
    if kind != "constant":
        weight = fusion_weight(s_test, kind)
    weight = weight / weight.mean()
    spread_curves[kind] = 100 * np.array(
        [
            np.mean([accuracy(s_test + total * weight * b, test_y) for b in biases])
            for total in strengths
        ]
    )
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
bins = np.linspace(kappa.min().item(), kappa.max().item(), 22)
for mask, name in ((~zero_wrong, "zero-shot right"), (zero_wrong, "zero-shot wrong")):
    axes[0].hist(kappa[mask].numpy(), bins, density=True, alpha=0.6, label=name)
axes[0].set(title=r"$\kappa$ knows where zero-shot is wrong", xlabel=r"$\kappa(s_0)$")
axes[0].set(ylabel="density over the test images")
for kind, curve in spread_curves.items():
    style = "k--" if kind == "constant" else "-"
    axes[1].semilogx(strengths, curve, style, label=kind)
axes[1].set(title="The same total, spread by five weights", xlabel="mean weight")
axes[1].set(ylabel="test accuracy, %")
for axis in axes:
    axis.legend(fontsize=8)
plt.show()
advantage = spread_curves["kurtosis"] - spread_curves["constant"]
timid = advantage[strengths < 1].mean()
print(
    f"AUROC for zero-shot errors: kurtosis {about(auroc)}, largest p {about(auroc_max)}"
)
print(
    f"kurtosis minus constant, mean weights below 1: {about(timid, 2)} points", end="; "
)
peaks = spread_curves["kurtosis"].max() - spread_curves["constant"].max()
print(f"each at its best: {about(peaks, 1)} points")

# %% [markdown]
# Left: $\kappa$ ranks errors well, about as well as the largest probability, which is simpler. Right: with a timid weight the
# kurtosis is worth something, since it moves the little there is to the images that need it. Once the weight is large enough the
# curves meet: where the zero-shot logits are sure they are sure by a margin that the bias does not overturn, so adding it in full does no harm there. The right panel uses the test
# images to *describe*; nothing is chosen by it.

# %% [markdown]
# ## Claims

# %%
probe = trained["AMU", 4, 4.0, 0]
with torch.no_grad():
    weight = probe.predictor.weight
    want, rows = amu_logits(s_test, aux["test"], weight, alpha=4.0)
    amu_error = (probe.logits(test_x, aux["test"]) - want).abs().max().item()
    amu_error = max(amu_error, rows.mean(1).abs().max(), (rows.std(1) - 1).abs().max())
apart, least = max(unified_error.values()), min(bias_size.values())
ledger.claim(
    "Methods for few shots add a logit bias and differ in features, predictor and fusion",
    paper="a unified formulation of CoOp, CLIP-Adapter, Tip-Adapter and others",
    measured=f"as stated and by (1) at most {about(apart, 1)} apart, spread of the biases "
    f"at least {about(least, 2)}; AMU and its equations {about(float(amu_error), 1)} apart",
    checks={
        "CoOp, CLIP-Adapter, Tip-Adapter after training: (1) within 1e-3": apart
        <= 1e-3,
        "none of the biases is trivial: spread over classes >= 0.02": least >= 0.02,
        "AMU is (1) with (9) and (14), within 1e-3": amu_error <= 1e-3,
    },
)

# %%
gain = 100 * (mean_of["AMU", 4] - zero_accuracy)
lead, over_bias, over_cache = [], [], []
for n in (1, 4, 16):
    lead.append(100 * (mean_of["AMU", n] - max(mean_of[arm, n] for arm in rivals)))
    over_bias.append(100 * (mean_of["AMU", n] - mean_of["bias alone", n]))
    over_cache.append(100 * (mean_of["AMU", n] - mean_of["cache on f_a", n]))
same_features = "2 points over an untrained cache on the same features, mean of shots"
ledger.claim(
    "A, M and U together beat the earlier methods",
    paper="ahead of the compared methods on ImageNet and ten other sets, 1 to 16 shots",
    measured=f"four shots: {about(gain)} points over zero-shot; lead over the best of three "
    f"others at 1, 4, 16 shots {', '.join(about(x, 2) for x in lead)}; over the bias alone "
    f"{', '.join(about(x, 2) for x in over_bias)}; over a cache on auxiliary features "
    f"{', '.join(about(x, 2) for x in over_cache)} points",
    checks={
        "four shots: at least 2 points over zero-shot": gain >= 2,
        "1, 4, 16 shots: at least 1 point over each other method": min(lead) >= 1,
        "1, 4 shots: at least 1 point over its bias alone": min(over_bias[:2]) >= 1,
        same_features: np.mean(over_cache) >= 2,
    },
    fails={
        same_features: "Given the second encoder, Tip-Adapter's cache does as well without "
        "any training: the lead over the earlier methods is that of the features.",
    },
)

# %%
lost = {}
for arm in ablations:
    lost[arm] = 100 * np.mean(
        [mean_of["AMU", n] - mean_of[arm, n] for n in shot_counts]
    )
gains = {n: 100 * (mean_of["AMU", n] - zero_accuracy) for n in shot_counts}
start_share = sum(
    100 * (mean_of["AMU", n] - mean_of["minus initialisation", n]) for n in (1, 4)
) / (gains[1] + gains[4])
a_share = lost["minus A"] / np.mean(list(gains.values()))
no_u = "uncertainty is worth half of A, alpha tuned with and without"
no_m = "the second branch is worth half of A"
ledger.claim(
    "Each of the parts contributes",
    paper="ablations of A, M and U on ImageNet",
    measured="points lost, mean over 1, 4, 16 shots: "
    + ", ".join(f"{arm} {about(x, 2)}" for arm, x in lost.items()),
    checks={
        "without A a third of the gain over zero-shot is lost": a_share >= 1 / 3,
        "without class means a tenth, at 1 and 4 shots": start_share >= 0.1,
        "no ablation is better by more than 1 point": min(lost.values()) >= -1,
        no_m: lost["minus M"] >= lost["minus A"] / 2,
        no_u: lost["minus U"] >= lost["minus A"] / 2,
    },
    fails={
        no_m: "The bias starts at class means, which are good already, and Adam rescales "
        "small gradients.",
        no_u: "Where the zero-shot logits are sure, a bias of tuned size does not overturn "
        "them anyway; the released command leaves this fusion switched off, too.",
    },
)

# %%
(_, own_d, own_rho, _, own_gain, *_), (_, aux_d, aux_rho, _, aux_gain, *_) = (
    quality.values()
)
ledger.claim(
    "Good auxiliary features are better and complementary: their errors are other errors",
    paper="superiority and complementarity decide among auxiliary models",
    measured=f"auxiliary and own: d_b {about(aux_d, 2)} and {about(own_d, 2)}, rho "
    f"{about(aux_rho, 2)} and {about(own_rho, 2)}, gain {about(aux_gain, 2)} and "
    f"{about(own_gain, 2)}",
    checks={
        "auxiliary features have the larger d_b": aux_d > own_d,
        "their margins correlate less with those of zero-shot": aux_rho < own_rho,
        "the gain in d by (6) is at least three times as large": aux_gain
        >= 3 * own_gain,
    },
)

# %%
ledger.claim(
    "With the fused loss alone the predictor is trained badly; a loss of its own mends that",
    paper="multi-branch training improves the predictor",
    measured=f"median gradients {about(fused_size, 2)} and {about(own_size, 2)}; bias by "
    f"itself {about(by_itself['AMU'])} % against {about(by_itself['minus M'])} %",
    checks={
        "fused branch: median gradient at most a third": fused_size <= own_size / 3,
        "two branches: the bias by itself is 1 point better": by_itself["AMU"]
        >= by_itself["minus M"] + 1,
    },
)

# %%
kappa_wrong, kappa_right = kappa[zero_wrong].mean(), kappa[~zero_wrong].mean()
ledger.claim(
    "The kurtosis of the zero-shot probabilities tells when the bias is needed",
    paper="uncertainty-based fusion by kurtosis",
    measured=f"AUROC {about(auroc)} (largest probability {about(auroc_max)}), mean weight "
    f"{about(kappa_wrong.item(), 2)} where wrong, {about(kappa_right.item(), 2)} where right; "
    f"against a constant of the same small mean {about(timid, 2)} points",
    checks={
        "AUROC for zero-shot errors >= 0.75": auroc >= 0.75,
        "equal mean weights below 1: better than a constant on average": timid > 0,
    },
)

# %%
ledger.untested(
    "State of the art on ImageNet, ten further sets and shifted ImageNets, with CLIP and MoCo v3",
    paper="eleven benchmarks, 1 to 16 shots",
    reason="needs the weights of CLIP and MoCo v3 and the image sets; the model here knows ten digits",
)

# %%
ledger

# %% [markdown]
# ## What is different from the paper
#
# The image-text model is two small networks on 1000 digits with captions of which three in ten are wrong, in place of CLIP; the second encoder is trained by a contrast of views
# on the same images, in place of MoCo v3 on ImageNet. With $K = 10$ the reference kurtosis is $K/4$ instead of 250, and $\alpha$ is tuned from 0.5 to 16, since
# (11) makes the released value too small. Shots are not augmented, so that all features are computed once. The kurtosis uses population moments; the
# released code divides by a sample deviation, which multiplies $k_4$ by $((K-1)/K)^2$, a constant that $\alpha$ absorbs. Five hundred images are more than a user of few shots
# has for tuning and testing. CoOp is trained, but stays out of the comparison.
#
# Three remarks on the released code: its command does not switch the uncertainty on (`uncent_type` is `none` unless set), it reports the best epoch on the test images, and it
# divides zero by zero for equal logits. `scale="full"` takes all five shot counts, twenty draws, longer training of both encoders and 50 epochs throughout; CLIP itself is not loaded.

# %% [markdown]
# ## Exercises
#
# **1.** How many of $K$ classes may compete before AMU turns the bias *up*? Write `competitors(K)`, the largest $m \le K/2$ with
# $\kappa \le 1$ for a tie of $m$, with $k_{\mathrm{ref}} = K / 4$.


# %% tags=["exercise"]
def check_1(answer):
    for K in (10, 37, 100, 1000):
        m = answer(K)
        assert tie(m, K) >= K / 4 > tie(m + 1, K), f"wrong for {K} classes"


# %% tags=["solution", "hide-cell"]
def competitors(K):
    limit = 1 / (K / 4 + 3)  # q (1 - q) at which (15) equals K / 4
    return math.floor(K * (1 - math.sqrt(1 - 4 * limit)) / 2)


check_1(competitors)

# %% [markdown]
# **2.** You carry $\alpha$ from `K_old` classes to `K_new`, at the same temperature. Write `carry(alpha, K_old, K_new)` so that a bias with one
# class ahead of equal others opens the same gap, on an image where the zero-shot probabilities are one-hot (mind $\kappa$).


# %% tags=["exercise"]
def check_2(answer):
    for K_old, K_new in ((1000, 10), (10, 100), (47, 47)):
        gaps = []
        for K, alpha in ((K_old, 0.5), (K_new, answer(0.5, K_old, K_new))):
            one_hot = torch.eye(K)[:1].double()
            bias = alpha * kurtosis_weight(1000 * one_hot) * normalize_logits(one_hot)
            gaps.append((bias[0, 0] - bias[0, 1]).item())
        assert math.isclose(*gaps, rel_tol=1e-6)


# %% tags=["solution", "hide-cell"]
def carry(alpha, K_old, K_new):
    def pull(K):
        k4 = (K * K - 3 * K + 3) / (K - 1)
        return math.sqrt(K) * (k4 / (K / 4)) ** -0.4

    return alpha * pull(K_old) / pull(K_new)


check_2(carry)

# %% [markdown]
# **3.** Two biases are at hand, with $(d_b, \rho)$ each. Write `better(d_0, first, second)`, which returns 0 or 1: the one whose fusion with a zero-shot classifier of quality
# $d_0$ is better when $\beta$ must not be negative.


# %% tags=["exercise"]
def check_3(answer):
    assert (
        answer(1.0, (0.9, 0.95), (0.6, 0.0)) == 1
    )  # worse and different beats similar
    assert answer(1.0, (1.2, 0.5), (0.6, 0.5)) == 0
    assert answer(2.0, (0.5, 0.1), (1.0, 0.9)) == 0  # the second is beyond (7)


# %% tags=["solution", "hide-cell"]
def better(d_0, first, second):
    gains = [max(d - rho * d_0, 0) ** 2 / (1 - rho**2) for d, rho in (first, second)]
    return int(gains[1] > gains[0])


check_3(better)

# %% [markdown]
# ## Summary
#
# - CoOp, CLIP-Adapter, Tip-Adapter and AMU are all zero-shot logits plus a weight times a bias. The first three compute the bias from the feature that the logits came from.
# - A bias of quality $d_b$ whose margins correlate with the zero-shot margins by $\rho$ adds $(d_b - \rho d_0)^2 / (1 - \rho^2)$ to $d^2$. Look for features that are better
#   or different, before you look for a better predictor.
# - A standardised logit that stands out has a gap of $\sqrt K$, so the weight does not carry over between numbers of classes.
# - Kurtosis of the probabilities counts competing classes: $1/(q(1-q)) - 3$ for a share $q$ of them. It does not see how sure a nearly uniform distribution is.
# - On ten digits the auxiliary features do the work: an untrained cache of them is as good as AMU. Within AMU the start at class means matters, the second branch adds a little, and uncertainty only while the
#   weight is too small.
#
# **Further reading.** {cite:t}`zhang2022tip` for the cache, {cite:t}`radford2021learning` for the model under all of this. What a confidence is worth is the subject of
# [correctness-aware calibration](correctness-aware-calibration.ipynb); why class means are a good classifier, of [neural collapse](neural-collapse.ipynb).
