"""From a utility, which only orders outcomes, back to probabilities: fitted strictly increasing maps.

After the idea of Huang and Yuan (2023), "Utility-Probability Duality of Neural Networks", arXiv 2305.14859; the maps here
(a power of the probability, and isotonic regression) need not be theirs.
"""

import torch
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression

from lib.calibration.scaling import check_fitted, check_logits

_RANGE = (-4.6, 4.6)  # of the logarithm of beta: 0.01 to 100
_TIE_SLOPE = 1e-3  # how much of the utility is added to the isotonic map, which alone has flat stretches


class UtilityToProbability:
    """A new distribution over outcomes from a utility u = log softmax(logits), strictly increasing in it.

    Decisions by argmax do not change. Sampling, expectations and minimum Bayes risk do.

    - `kind="power"`: q(y) proportional to exp(beta u(y)). beta maximises the held-out log-likelihood of the preferred
      outcomes, which is log of the total q of the preferred set where there are several.
    - `kind="isotonic"`: q(y) proportional to g(u(y)), where g is the isotonic regression of "y is preferred" on u(y), over all
      rows and outcomes. g has flat stretches; exp(0.001 u) is multiplied in so that the order stays strict.

    Args:
        kind: `"power"` or `"isotonic"`.

    Attributes:
        beta_: the fitted power (kind "power"), between 0.01 and 100.
        isotonic_: the fitted `sklearn.isotonic.IsotonicRegression` (kind "isotonic").
        floor_: smallest value of g that the sample can tell from zero, 1 / (2 n V) (kind "isotonic").

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, kind: str = "power"):
        if kind not in ("power", "isotonic"):
            raise ValueError(f'kind must be "power" or "isotonic", got {kind!r}')
        self.kind = kind

    def fit(self, u: torch.Tensor, outcome: torch.Tensor) -> "UtilityToProbability":
        """Learn the map from situations that the model was not trained on.

        Args:
            u: utilities or logits, floating point, (n, V).
            outcome: what was preferred: class indices (n,), or a boolean mask (n, V) with at least one outcome a row.

        Raises:
            TypeError: utilities that are not floating point, outcomes that are neither integers nor booleans.
            ValueError: shapes that do not fit, no rows, values that are not finite, a row without a preferred outcome.
        """
        if outcome.dtype == torch.bool:
            check_logits(u)
            if outcome.shape != u.shape:
                raise ValueError(
                    f"a mask of preferred outcomes must have the shape {tuple(u.shape)}, got {tuple(outcome.shape)}"
                )
            if not bool(outcome.any(1).all()):
                raise ValueError("every row needs at least one preferred outcome")
            preferred = outcome
        else:
            check_logits(u, outcome)
            preferred = torch.zeros_like(u, dtype=torch.bool).scatter(1, outcome.long().unsqueeze(1), True)
        if not len(u):
            raise ValueError("no rows to fit on")
        utility = torch.log_softmax(u.detach().double(), 1)
        if self.kind == "power":
            self.beta_ = _fit_power(utility, preferred)
        else:
            self.isotonic_ = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
            self.isotonic_.fit(utility.flatten().cpu().numpy(), preferred.flatten().double().cpu().numpy())
            self.floor_ = 1 / (2 * utility.numel())
        return self

    def transform(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities, of the shape (n, V) and the dtype of the logits.

        Raises:
            RuntimeError: not fitted.
            TypeError, ValueError: as in `fit`.
        """
        check_fitted(self, "beta_" if self.kind == "power" else "isotonic_")
        check_logits(logits)
        if self.kind == "power":
            return torch.log_softmax(self.beta_ * logits, 1)
        utility = torch.log_softmax(logits.double(), 1)
        weight = self.isotonic_.predict(utility.detach().flatten().cpu().numpy())
        weight = torch.as_tensor(weight, dtype=torch.float64, device=logits.device).view_as(utility)
        scores = weight.clamp(min=self.floor_).log() + _TIE_SLOPE * utility
        return torch.log_softmax(scores, 1).to(logits.dtype)


def _fit_power(utility: torch.Tensor, preferred: torch.Tensor) -> float:
    """beta with the highest mean log q(preferred set): the best of a grid, refined between its neighbours.

    With sets the likelihood need not be concave, hence the grid.
    """
    masked = utility.masked_fill(~preferred, -torch.inf)

    def cost(log_beta):
        beta = torch.tensor(float(log_beta), dtype=torch.float64).exp()
        return float((torch.logsumexp(beta * utility, 1) - torch.logsumexp(beta * masked, 1)).mean())

    grid = torch.linspace(*_RANGE, 47).tolist()
    best = min(range(len(grid)), key=lambda index: cost(grid[index]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    return float(torch.tensor(found.x, dtype=torch.float64).exp())
