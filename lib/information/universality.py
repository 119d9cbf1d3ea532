"""Weight of the models near the truth, and the regret that it promises.

Everything is in nats. The formulas are those of Feder, Urbanke and Fogel, "The Universality Lens" (arXiv 2506.07661).
"""

import torch


def kl_ball_log_weight(log_prior: torch.Tensor, kl: torch.Tensor, eps: float) -> float:
    """Logarithm of the prior weight of the models within `eps` of the truth, `log w(B_eps)`.

    Args:
        log_prior: logarithms of the prior weights, shape (models,); they need not sum to one exactly (a sample of
            an infinite class may be given).
        kl: divergence `D(P_0 || P_t)` of each model from the truth per symbol, in nats, shape (models,).
        eps: radius in nats.

    Returns:
        The log weight; minus infinity for an empty ball.

    Raises:
        ValueError: shapes that differ or are not (models,), a negative or undefined divergence, or a negative radius.
    """
    log_prior, kl = _checked(log_prior, kl)
    if not eps >= 0:
        raise ValueError(f"eps must be a radius >= 0, got {eps}")
    return torch.logsumexp(log_prior[kl <= eps], 0).item()


def universality_bound(log_prior: torch.Tensor, kl: torch.Tensor, n: int) -> tuple[float, float]:
    """The bound on the regret per symbol, `min over eps of eps + log(1 / w(B_eps)) / n`.

    It bounds the regret `D(P_0^n || Q^n) / n` of the mixture `Q` over the models, for independent symbols, whatever
    the number of models. The minimum is exact: only radii at which a model enters the ball can attain it.

    Args:
        log_prior: logarithms of the prior weights, shape (models,).
        kl: divergence of each model from the truth per symbol, in nats, shape (models,); infinity is allowed.
        n: number of symbols.

    Returns:
        The bound in nats per symbol, and the radius that attains it. Infinity twice if every model is infinitely far.

    Raises:
        ValueError: shapes that differ or are not (models,), a negative or undefined divergence, or `n < 1`.
    """
    log_prior, kl = _checked(log_prior, kl)
    if n < 1:
        raise ValueError(f"n must be a number of symbols >= 1, got {n}")
    radii, order = kl.sort()
    values = radii - log_prior[order].logcumsumexp(0) / n
    best = values.argmin()
    return values[best].item(), radii[best].item()


def _checked(log_prior: torch.Tensor, kl: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_prior, kl = torch.as_tensor(log_prior).double(), torch.as_tensor(kl).double()
    if log_prior.ndim != 1 or log_prior.shape != kl.shape or not len(kl):
        raise ValueError(
            f"log_prior and kl must both have shape (models,), got {tuple(log_prior.shape)} and {tuple(kl.shape)}"
        )
    if not (kl >= -1e-12).all():
        raise ValueError("kl must hold divergences >= 0; it holds negative or undefined values")
    return log_prior, kl.clamp_min(0)
