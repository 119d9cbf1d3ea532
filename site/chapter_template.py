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
# # TITLE
#
# One paragraph: the problem, the idea, what you will be able to do at the end. {cite:p}`SLUG`

# %% [markdown]
# ## Setup

# %% tags=["parameters"]
scale = "ci"
seed = 0

# %%
import matplotlib.pyplot as plt
import torch

from lib.claims import Ledger, about

plt.style.use("lib.book")
torch.manual_seed(seed)
ledger = Ledger("SLUG", scale, seed)

# %% [markdown]
# ## The problem

# %% [markdown]
# ## Derivation
#
# $$ y_i = \frac{e^{x_i}}{\sum_j e^{x_j}} \tag{1} $$

# %% [markdown]
# ## Reference implementation


# %% tags=["reference"]
def twice(x):
    return x + x


# %% [markdown]
# By hand: twice three is six.

# %%
assert twice(3) == 6

# %% [markdown]
# ## The library

# %% [markdown]
# ## Experiment

# %%
figure, axes = plt.subplots()
axes.plot([1, 2, 4])
axes.set(title="Each step doubles", xlabel="step", ylabel="value")
plt.show()

# %% [markdown]
# ## Claims

# %%
ledger.claim(
    "The claim in words",
    paper="69.90 % to 71.96 %",
    measured=f"{about(0.71963)}",
    checks={"the accuracy rises on both splits": True},
)

# %%
ledger

# %% [markdown]
# ## What is different from the paper

# %% [markdown]
# ## Exercises
#
# **1.** What to do. The check below says whether you did it.


# %% tags=["exercise"]
def check_1(answer):
    assert answer(3) == 9, "answer(3) must be 9"


# %% tags=["solution", "hide-cell"]
def solution_1(x):
    return 3 * x


check_1(solution_1)

# %% [markdown]
# ## Summary
#
# - …
#
# **Further reading.** …
