"""A language model mixed with the uniform law, so that no token is impossible."""

import math

import torch
from torch import nn


class SmoothedLM(nn.Module):
    """`(1 - eps) model + eps / V`: every token has a probability of at least `eps / V`.

    Args:
        model: tokens (batch, seq) to logits (batch, seq, V), such as `lib.models.GPT`.
        eps: the weight of the uniform law, in (0, 1].

    Raises:
        ValueError: `eps` out of range.
    """

    def __init__(self, model: nn.Module, eps: float):
        super().__init__()
        if not 0 < eps <= 1:
            raise ValueError(f"eps must lie in (0, 1], got {eps}")
        self.model, self.eps = model, eps

    def bound(self, vocab_size: int) -> float:
        """The largest surprise of a token, `log(V / eps)` nats."""
        return math.log(vocab_size / self.eps)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities, (batch, seq, V)."""
        return self._mix(self.model(tokens))

    def start(self, batch: int):
        """The first state of `step`, that of the model."""
        return self.model.start(batch)

    def step(self, tokens: torch.Tensor, state) -> tuple[torch.Tensor, object]:
        """A step function of `lib.models.decode`: log-probabilities (batch, V) and the new state."""
        logits, state = self.model.step(tokens, state)
        return self._mix(logits), state

    def _mix(self, logits):
        log_probs = torch.log_softmax(logits, -1)
        if self.eps == 1:
            return torch.full_like(log_probs, -math.log(logits.shape[-1]))
        uniform = log_probs.new_tensor(math.log(self.eps / logits.shape[-1]))
        return torch.logaddexp(log_probs + math.log1p(-self.eps), uniform)
