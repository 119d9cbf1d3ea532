"""Per-token statistics of a language model's logits, and tests of who wrote a string."""

import math
from typing import NamedTuple

import torch


class TokenStats(NamedTuple):
    """Of every token of a string, in nats.

    Attributes:
        nll: minus the log-probability of the token that stands there.
        entropy: the mean of that quantity under the model.
        varentropy: its variance under the model.
    """

    nll: torch.Tensor
    entropy: torch.Tensor
    varentropy: torch.Tensor


def token_stats(logits: torch.Tensor, tokens: torch.Tensor) -> TokenStats:
    """Surprise, entropy and varentropy of each token (Radvand et al. 2025, section on log-perplexity).

    Args:
        logits: (..., V), floating point; log-probabilities do as well. Minus infinity means probability zero.
        tokens: (...), int64 in [0, V).

    Returns:
        Three tensors of the shape of `tokens`, at least float32.

    Raises:
        TypeError: logits that are not floating point, or tokens that are not integers.
        ValueError: shapes that do not fit, or a token out of range.
    """
    _check(logits, tokens)
    log_probs = torch.log_softmax(logits.float() if logits.dtype.itemsize < 4 else logits, -1)
    probs = log_probs.exp()
    surprise = -log_probs.masked_fill(probs == 0, 0.0)  # what has no probability adds nothing to a mean
    entropy = (probs * surprise).sum(-1)
    varentropy = (probs * (surprise - entropy.unsqueeze(-1)).square()).sum(-1)
    return TokenStats(-log_probs.gather(-1, tokens.unsqueeze(-1))[..., 0], entropy, varentropy)


def entropy_from_logits(logits: torch.Tensor, base: float = math.e) -> torch.Tensor:
    """Shannon entropy of `softmax(logits)`, (..., V) to (...), in units of `base`: bits for 2, nats by default.

    Raises:
        TypeError: logits that are not floating point.
        ValueError: no dimension of classes, or a base that is not above 1.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if not logits.ndim or not logits.shape[-1] or not base > 1:
        raise ValueError(f"expected logits (..., V >= 1) and base > 1, got {tuple(logits.shape)} and {base}")
    log_probs = torch.log_softmax(logits.float() if logits.dtype.itemsize < 4 else logits, -1)
    probs = log_probs.exp()
    return -(probs * log_probs.masked_fill(probs == 0, 0.0)).sum(-1) / math.log(base)


class PerplexityTest(NamedTuple):
    """The outcome of `perplexity_test`, one entry a string.

    Attributes:
        statistic: log-perplexity minus average entropy, nats per token.
        threshold: how far from 0 it may be.
        reject: whether it is farther: the model did not write the string.
        p_bound: an upper bound of the p-value, at most 1 (for `"normal"` an approximation).
    """

    statistic: torch.Tensor
    threshold: torch.Tensor
    reject: torch.Tensor
    p_bound: torch.Tensor


def perplexity_test(
    nll: torch.Tensor,
    entropy: torch.Tensor,
    *,
    alpha: float = 0.05,
    method: str = "azuma",
    bound: float | None = None,
    varentropy: torch.Tensor | None = None,
    levels: int = 8,
) -> PerplexityTest:
    """Did this model write these strings? Two-sided, of log-perplexity against average entropy (Radvand et al. 2025).

    If the model wrote a string, `nll - entropy` is a martingale difference sequence, whatever the dependence on history.

    - `"azuma"`: by Azuma and Hoeffding, for surprises in [0, bound].
    - `"freedman"`: by Freedman's inequality, for surprises in [0, bound] and their conditional variances. The inequality needs a
      variance bound fixed beforehand; `levels` of them, `bound^2 / 4` halved again and again, share `alpha`, and the smallest that
      the string respects is used. The p-value bound allows for that.
    - `"normal"`: by the martingale central limit theorem; not a guarantee at any length.

    Args:
        nll: (..., N), nats.
        entropy: (..., N), of the same model along the same string.
        alpha: probability of rejecting a string that the model wrote, in (0, 1).
        method: see above.
        bound: the largest surprise possible, such as `SmoothedLM.bound`; needed except by `"normal"`.
        varentropy: (..., N); needed except by `"azuma"`.
        levels: of the variance, at least 1.

    Raises:
        ValueError: an unknown method, shapes that do not fit, a missing or impossible argument, or a surprise above the bound.
    """
    if nll.ndim < 1 or not nll.shape[-1] or entropy.shape != nll.shape:
        raise ValueError(
            f"nll and entropy must both be (..., N >= 1), got {tuple(nll.shape)} and {tuple(entropy.shape)}"
        )
    if not 0 < alpha < 1 or levels < 1:
        raise ValueError(f"alpha must lie in (0, 1) and levels be at least 1, got {alpha} and {levels}")
    if method not in ("azuma", "freedman", "normal"):
        raise ValueError(f"method must be 'azuma', 'freedman' or 'normal', got {method!r}")
    if method != "normal":
        if bound is None or not bound > 0:
            raise ValueError(f"method {method!r} needs a positive bound of the surprise, got {bound}")
        if (nll > bound * (1 + 1e-5)).any() or (nll < -1e-5 * bound).any():
            raise ValueError(
                f"nll must lie in [0, bound = {bound:.6g}], got {nll.min():.6g} to {nll.max():.6g}"
            )
    if method != "azuma" and (varentropy is None or varentropy.shape != nll.shape):
        raise ValueError(f"method {method!r} needs varentropy of shape {tuple(nll.shape)}")
    n = nll.shape[-1]
    statistic = (nll - entropy).mean(-1)
    size = statistic.abs()
    if method == "azuma":
        threshold = torch.full_like(size, bound * math.sqrt(math.log(2 / alpha) / (2 * n)))
        p_bound = 2 * torch.exp(-2 * n * size.square() / bound**2)
    elif method == "freedman":
        variance = varentropy.mean(-1).clamp(min=bound**2 / 4 * 2.0 ** (1 - levels), max=bound**2 / 4)
        steps = ((bound**2 / 4) / variance).log2().mul(1 + 1e-6).floor()
        level = bound**2 / 4 * torch.exp2(-steps)  # the smallest one above the variance
        log_term = math.log(2 * levels / alpha)
        third = bound * log_term / 3
        threshold = (third + (third**2 + 2 * n * level * log_term).sqrt()) / n
        p_bound = 2 * levels * torch.exp(-n * size.square() / (2 * (level + bound * size / 3)))
    else:
        deviation = (varentropy.mean(-1) / n).sqrt()
        quantile = torch.special.ndtri(torch.tensor(1 - alpha / 2, dtype=torch.float64)).item()
        threshold = quantile * deviation
        p_bound = 2 * torch.special.ndtr(-size / deviation)
    return PerplexityTest(statistic, threshold, size > threshold, p_bound.clamp(max=1.0))


class SourceTest(NamedTuple):
    """The outcome of `source_test`.

    Attributes:
        statistic: mean of `log a - log b` over the tokens, nats; (...).
        is_a: whether `a` is the likelier author.
    """

    statistic: torch.Tensor
    is_a: torch.Tensor


def source_test(logits_a: torch.Tensor, logits_b: torch.Tensor, tokens: torch.Tensor) -> SourceTest:
    """Which of two known models wrote these strings? By the sign of the mean log-likelihood ratio.

    Under `a` its mean is the average KL(a || b) along the string, under `b` it is minus the average KL(b || a). For sets
    of models, pass for each token the logits of the member with the least log-perplexity.

    Args:
        logits_a, logits_b: (..., N, V); log-probabilities do as well.
        tokens: (..., N).

    Raises:
        TypeError: logits that are not floating point, or tokens that are not integers.
        ValueError: shapes that do not fit, a token out of range, or one that neither model can write.
    """
    if logits_a.shape != logits_b.shape:
        raise ValueError(
            f"both models need logits of one shape, got {tuple(logits_a.shape)} and {tuple(logits_b.shape)}"
        )
    nll_a, nll_b = (_nll(logits, tokens) for logits in (logits_a, logits_b))
    if (nll_a.isinf() & nll_b.isinf()).any():
        raise ValueError("a token has probability zero under both models")
    statistic = nll_b.mean(-1) - nll_a.mean(-1)
    if statistic.isnan().any():
        raise ValueError("each model gives probability zero to some token of the same string")
    return SourceTest(statistic, statistic > 0)


def _nll(logits, tokens):
    _check(logits, tokens)
    log_probs = torch.log_softmax(logits.float() if logits.dtype.itemsize < 4 else logits, -1)
    return -log_probs.gather(-1, tokens.unsqueeze(-1))[..., 0]


def _check(logits, tokens):
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if not logits.ndim or logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"logits must be (..., V) and tokens (...), got {tuple(logits.shape)} and {tuple(tokens.shape)}"
        )
    if tokens.numel() and not (0 <= int(tokens.min()) and int(tokens.max()) < logits.shape[-1]):
        raise ValueError(
            f"tokens must lie in 0..{logits.shape[-1] - 1}, got {int(tokens.min())}..{int(tokens.max())}"
        )
