"""LAMB and Lookahead: Adam with steps as long as the weights allow, and slow weights that follow fast ones."""

import math
from collections.abc import Callable
from contextlib import contextmanager

import torch


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, arXiv 1904.00962, Algorithm 2).

    Each tensor of parameters w moves by lr * trust * u, where u = m / (sqrt(v) + eps) + weight_decay * w with Adam's
    bias-corrected moments, and trust = min(||w||, max_norm) / ||u||, or 1 where a norm is zero. So a step is lr times as long as w,
    whatever the gradient's scale.

    Args:
        params: iterable of tensors or of groups.
        lr: relative length of a step.
        betas: decay of the two moments.
        eps: added to sqrt(v).
        weight_decay: decoupled, but inside the norm.
        max_norm: the largest norm of w that counts.

    Raises:
        ValueError: a hyperparameter out of range.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, *, max_norm=10.0):
        if not (lr >= 0 and eps > 0 and weight_decay >= 0 and max_norm > 0):
            raise ValueError(
                f"out of range: lr {lr}, eps {eps}, weight_decay {weight_decay}, max_norm {max_norm}"
            )
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"max_norm": max_norm})

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step. `closure`, if given, computes the loss anew and is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[p].update(step=0, **moments)
                self.state[p]["step"] += 1
            m, v = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
            steps, gradients = [self.state[p]["step"] for p in params], [p.grad for p in params]
            torch._foreach_lerp_(m, gradients, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
            root = torch._foreach_sqrt(v)
            torch._foreach_div_(root, [math.sqrt(1 - beta2**t) for t in steps])
            torch._foreach_add_(root, group["eps"])
            update = torch._foreach_div(m, [1 - beta1**t for t in steps])
            torch._foreach_div_(update, root)
            torch._foreach_add_(update, params, alpha=group["weight_decay"])
            length = torch.stack(torch._foreach_norm(params)).clamp(max=group["max_norm"])
            long = torch.stack(torch._foreach_norm(update))
            # without a branch on values, so that nothing waits for a GPU
            trust = torch.where((length > 0) & (long > 0), length / long.clamp_min(1e-30), 1.0)
            torch._foreach_mul_(update, list((-group["lr"] * trust).unbind()))
            torch._foreach_add_(params, update)
        return loss


class Lookahead(torch.optim.Optimizer):
    """Slow weights that follow the fast weights of another optimiser (Zhang et al. 2019, arXiv 1907.08610).

    After every `k` steps of `optimizer`, slow = slow + alpha * (fast - slow). With `synchronize` the fast weights then
    start again from the slow ones, as in the paper; without, they go their own way and the slow weights are a
    moving average of them. `slow_weights` puts the slow weights into the model for a while.

    Args:
        optimizer: the fast one. Its groups are shared, so that schedules act on both.
        k: steps between two of the slow weights.
        alpha: how far they go, in (0, 1].
        synchronize: whether the fast weights are pulled back.

    Raises:
        TypeError: `optimizer` is none.
        ValueError: k or alpha out of range.
    """

    def __init__(self, optimizer, k: int = 5, alpha: float = 0.5, *, synchronize: bool = True):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not isinstance(k, int) or k < 1 or not 0 < alpha <= 1:
            raise ValueError(f"k must be a positive integer and alpha in (0, 1], got {k!r} and {alpha!r}")
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.k, self.alpha, self.synchronize = optimizer, k, alpha, synchronize
        self.param_groups, self.steps = optimizer.param_groups, 0
        self._slow = [p.detach().clone() for p in self._parameters()]

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step of the fast weights, and of the slow ones if it is their turn."""
        loss = self.optimizer.step(closure)
        self.steps += 1
        if self.steps % self.k == 0:
            fast = self._parameters()
            torch._foreach_lerp_(self._slow, fast, self.alpha)
            if self.synchronize:
                torch._foreach_copy_(fast, self._slow)
        return loss

    @contextmanager
    def slow_weights(self):
        """A context in which the parameters hold the slow weights; the fast ones come back when it ends."""
        fast = [p.detach().clone() for p in self._parameters()]
        self._load(self._slow)
        try:
            yield
        finally:
            self._load(fast)

    def state_dict(self):
        """The state of both optimisers."""
        return {"optimizer": self.optimizer.state_dict(), "slow": self._slow, "steps": self.steps}

    def load_state_dict(self, state_dict):
        """Go on from what `state_dict` returned."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.param_groups, self.steps = self.optimizer.param_groups, state_dict["steps"]
        self._slow = [tensor.clone() for tensor in state_dict["slow"]]

    def _parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def _load(self, tensors):
        for p, tensor in zip(self._parameters(), tensors, strict=True):
            p.copy_(tensor)
