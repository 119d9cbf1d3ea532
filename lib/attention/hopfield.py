"""The continuous modern Hopfield network (arXiv 2008.02217): an associative memory whose update rule is attention."""

import math

import torch
from scipy.special import wrightomega
from torch import nn

from lib.attention.fused import FlashAttention, FlashHopfield, fused_impl, with_heads
from lib.attention.online import StreamingAttention


def hopfield_retrieve(
    state: torch.Tensor,
    stored: torch.Tensor,
    *,
    values: torch.Tensor | None = None,
    beta: float | torch.Tensor | None = None,
    steps: int | None = 1,
    tol: float = 1e-4,
    max_steps: int = 10_000,
    mask: torch.Tensor | None = None,
    impl: str = "auto",
    block_size: int = 1024,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Let states fall to fixed points of a Hopfield network and read out what is there (arXiv 2008.02217, eq. 3 and 10).

    Each step is state = softmax(beta state stored^T) stored. The last one reads `values` instead, where they are given;
    so one step with beta = 1 / sqrt(d) is softmax attention with q = state, k = stored, v = values.

    With `steps=None` every head (dimension -3) is updated until none of its own states moves by `tol` or more, and is
    then left alone until the last step reads. The energy falls by half the squared length of each step or more, so this
    ends; `max_steps` is for a `tol` below the resolution of the dtype.

    Args:
        state: the queries, (..., heads, S, d), or fewer dimensions.
        stored: the patterns, (..., heads, N, d); leading dimensions broadcast. N is at least 1.
        values: read out in the last step, (..., heads, N, dim); `stored` by default.
        beta: the inverse temperature, above 0: a number, or a tensor (taken as it is) with one for each head, (heads,).
            1 / sqrt(d) by default.
        steps: the number of updates, at least 1; None iterates to convergence.
        tol: the Euclidean length below which a step counts as none.
        max_steps: the most steps with `steps=None`.
        mask: boolean, broadcastable to (..., heads, S, N), True where a state may see a pattern. A state that may see
            none reads zeros.
        impl: `"torch"` keeps all S x N weights, `"streaming"` walks over the stored patterns in blocks with the online
            softmax, forward and backward, and keeps none (once differentiable). `"triton"` is a fused kernel that keeps the
            states of all steps besides; it takes neither a mask nor `steps=None`, and dims up to 128, it multiplies half
            precision as it is, and it is differentiable once. `"auto"` is the kernel for CUDA tensors where it takes what
            is given, else streaming where N exceeds `block_size`.
        block_size: how many patterns a block of `"streaming"` holds.

    Returns:
        The read-out, (..., heads, S, dim), in the dtype of `state`, and a dict with `steps`, the steps done, reading
        included, and `change`, the length of the longest last move of a state (nan where none moved), both
        (heads,), and `query`, the states from which the last step read. Half precision is computed in float32, by the
        kernel all but the products and the states between steps.

    Raises:
        ValueError: shapes that do not fit together, a `beta` that is not positive, `steps` below 1, an unknown `impl`, or
            `impl="triton"` with something that the kernel does not take.
        TypeError: tensors that are not floating point, or a mask that is not boolean.
        RuntimeError: a head has not converged after `max_steps` steps.
    """
    lead = _check(state, stored, values, mask)
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ValueError(
            f"steps must be a positive integer, or None to iterate to convergence, got {steps!r}"
        )
    if not tol > 0 or max_steps < 1 or block_size < 1:
        raise ValueError(
            f"tol, max_steps and block_size must be positive, got {tol}, {max_steps} and {block_size}"
        )
    choice = "streaming" if stored.shape[-2] > block_size else "torch"
    unfit = {"mask": mask is not None, "steps=None": steps is None}
    chosen = fused_impl(
        impl,
        state,
        stored,
        stored if values is None else values,
        unfit,
        options=("torch", "streaming", "triton"),
        cpu=choice,
    )
    if chosen == "triton":
        return _fused(state, stored, values, beta, steps, lead)
    if chosen == "streaming":
        associate = lambda q, k, v, b, allowed: _stream(q, k, v, b, allowed, block_size)  # noqa: E731
    else:
        associate = _attend
    dtype = state.dtype
    compute = torch.promote_types(dtype, torch.float32)
    xi = state.to(compute).expand(*lead, *state.shape[-2:])  # (..., heads, S, d)
    keys = stored.to(compute)
    beta = _beta(beta, xi)  # scalar, or (heads, 1, 1)
    heads = lead[-1:]
    active = torch.arange(math.prod(heads), device=xi.device)
    count = torch.zeros_like(active)
    change = xi.new_full(active.shape, torch.nan)
    # the updates before the last step, which reads
    for _ in range(max_steps if steps is None else steps - 1):
        q, k, b, allowed = (_of_heads(each, active, heads) for each in (xi, keys, beta, mask))
        new = associate(q, k, k, b, allowed)
        moved = _longest(new - q)  # (active heads,)
        xi = new if len(active) == len(count) else xi.index_copy(-3, active, new)
        count[active] += 1
        change[active] = moved
        if steps is None:
            active = active[moved >= tol]
            if not len(active):
                break
    if steps is None and len(active):
        raise RuntimeError(
            f"heads {active.tolist()} have not converged after {max_steps} steps: their last step was "
            f"{change[active].tolist()} long, tol is {tol}; raise tol or max_steps"
        )
    out = associate(xi, keys, keys if values is None else values.to(compute), beta, mask)
    if values is None:
        change = _longest(out - xi)
    info = {"steps": (count + 1).reshape(heads), "change": change.reshape(heads), "query": xi.to(dtype)}
    return out.to(dtype), info


def hopfield_energy(
    state: torch.Tensor,
    stored: torch.Tensor,
    beta: float | torch.Tensor | None = None,
    *,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The energy that the update of `hopfield_retrieve` lowers (arXiv 2008.02217, eq. 2).

    E = -log(sum_i exp(beta x_i . state)) / beta + |state|^2 / 2 + log(N) / beta + M^2 / 2 with M = max_i |x_i|. It is never
    negative, and at most 2 M^2 where |state| <= M.

    Args:
        state: (..., heads, S, d).
        stored: (..., heads, N, d).
        beta: as in `hopfield_retrieve`.
        mask: as in `hopfield_retrieve`; N and M are those of the patterns that a state may see.

    Returns:
        (..., heads, S). inf for a state that may see no pattern.

    Raises:
        ValueError, TypeError: as `hopfield_retrieve`.
    """
    lead = _check(state, stored, None, mask)
    xi = state.expand(*lead, *state.shape[-2:])
    beta = _beta(beta, xi)
    scores = xi @ stored.mT * beta  # (..., S, N)
    squares = stored.square().sum(-1).unsqueeze(-2)  # (..., 1, N)
    number = torch.tensor(float(stored.shape[-2]), dtype=xi.dtype, device=xi.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
        squares = squares.masked_fill(~mask, 0.0)
        number = mask.expand(scores.shape).sum(-1).to(xi.dtype).clamp(min=1)
    beta = beta.squeeze(-1)  # against (..., S)
    return (torch.log(number) - scores.logsumexp(-1)) / beta + (xi.square().sum(-1) + squares.amax(-1)) / 2


def hopfield_capacity(d: int, K: float, beta: float, p: float) -> dict[str, float | bool]:
    """How many random patterns provably fit into a Hopfield network (arXiv 2008.02217, theorem 3).

    For patterns drawn uniformly from the sphere of radius K sqrt(d - 1): with probability at least 1 - p all of
    sqrt(p) c^((d - 1) / 4) patterns are stored, each with a fixed point of its own nearby. The Lambert function is
    evaluated as omega(a + log b) = W_0(exp(a + log b)), which does not overflow.

    Args:
        d: the dimension, at least 2.
        K: the radius of the sphere over sqrt(d - 1).
        beta: the inverse temperature.
        p: the probability of failure, in (0, 1].

    Returns:
        `c`, `a_plus_log_b`, `n_patterns` (inf where it overflows), `log_n_patterns`, and `proven`: whether the theorem's
        condition c >= (2 / sqrt(p))^(4 / (d - 1)) holds, that is, whether it promises two patterns or more, and n_patterns
        beta M^2 > 1, without which the fixed points of different patterns need not be different.

    Raises:
        ValueError: an argument out of range.
    """
    if d < 2 or not (0 < K < math.inf and 0 < beta < math.inf and 0 < p <= 1):
        raise ValueError(f"need d >= 2, K > 0, beta > 0 and 0 < p <= 1, got {d}, {K}, {beta} and {p}")
    log_gain = math.log(beta) + 2 * math.log(K)  # log(beta K^2)
    a = 2 / (d - 1) * (1 + math.log(2 * p * (d - 1)) + log_gain)
    a_plus_log_b = a + math.log(2 / 5) + log_gain
    omega = float(wrightomega(a_plus_log_b))
    log_c = omega - a  # c = b / omega, and omega + log(omega) = a + log(b)
    log_n = 0.5 * math.log(p) + (d - 1) / 4 * log_c
    return {
        "c": math.exp(log_c) if log_c < 709 else math.inf,
        "a_plus_log_b": a_plus_log_b,
        "n_patterns": math.exp(log_n) if log_n < 709 else math.inf,
        "log_n_patterns": log_n,
        "proven": log_n >= math.log(2) and log_n + log_gain + math.log(d - 1) > 0,
    }


def fixed_point_kind(
    state: torch.Tensor,
    stored: torch.Tensor,
    beta: float | torch.Tensor | None = None,
    mass: float = 0.9,
    *,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list]:
    """Over how many patterns a state averages, and what the paper calls that (arXiv 2008.02217, section 2).

    k is the least number of patterns whose weights in softmax(beta stored state) sum to `mass`. One is `"single"`, more
    than half of the patterns that the state may see is `"global"`, what lies between is `"metastable"`.

    Args:
        state: (..., heads, S, d); meant to be a fixed point or the query of an attention head.
        stored: (..., heads, N, d).
        beta: as in `hopfield_retrieve`.
        mass: in (0, 1].
        mask: as in `hopfield_retrieve`.

    Returns:
        k, (..., heads, S), integers, 0 for a state that may see no pattern; and the kinds as lists nested in the same
        shape (`"none"` for k = 0).

    Raises:
        ValueError: a mass out of range, and as `hopfield_retrieve`.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be in (0, 1], got {mass}")
    lead = _check(state, stored, None, mask)
    xi = state.expand(*lead, *state.shape[-2:]).to(torch.promote_types(state.dtype, torch.float32))
    weights = _weights(xi, stored.to(xi.dtype), _beta(beta, xi), mask)
    smallest = weights.sort(-1).values.cumsum(-1)  # ascending, so that small weights lose no digits
    slack = 8 * torch.finfo(weights.dtype).eps  # nine weights of 0.1 are not short of 0.9
    k = weights.shape[-1] - (smallest <= 1 - mass + slack).sum(-1)
    seen = weights.shape[-1] if mask is None else mask.expand(weights.shape).sum(-1)
    names = ("none", "single", "metastable", "global")
    code = torch.where(k == 0, 0, torch.where(k == 1, 1, torch.where(2 * k > seen, 3, 2)))

    def named(codes):
        return [named(each) for each in codes] if isinstance(codes, list) else names[codes]

    return k, named(code.tolist())


class Hopfield(nn.Module):
    """Associates raw states with raw stored patterns (arXiv 2008.02217, section 3, the layer `Hopfield`).

    Q = norm(state) W_Q and K = norm(stored) W_K live in the associative space; `steps` updates move Q, and the last reads
    the values. With `values="connected"`, the paper's form and the default, these are projected keys, V = norm(projection)
    W_K W_V with one W_V for each head; with `values="free"` they are norm(projection) W_V, as in transformers. The heads
    are then joined by a linear map.

    Args:
        input_size: of the states.
        stored_size: of the stored patterns; `input_size` by default.
        projection_size: of what the values are made of; `stored_size` by default, and necessarily so if connected.
        hidden_size: of the associative space of one head; input_size / num_heads by default.
        value_size: of the values of one head; `hidden_size` by default.
        output_size: `input_size` by default.
        num_heads: how many associative spaces.
        beta: at the start, a number or one for each head; 1 / sqrt(hidden_size) by default.
        learn_beta: whether each head learns its own (as its logarithm, so that it stays positive).
        steps, tol, max_steps, impl, block_size: as in `hopfield_retrieve`.
        values: `"connected"` or `"free"`.
        normalize_state, normalize_stored, normalize_projection: whether the raw patterns go through a layer norm, each
            through its own.
        bias: whether the linear maps have one.

    Raises:
        ValueError: a size that is missing or does not fit, or an unknown `values`.
    """

    def __init__(
        self,
        input_size: int,
        *,
        stored_size: int | None = None,
        projection_size: int | None = None,
        hidden_size: int | None = None,
        value_size: int | None = None,
        output_size: int | None = None,
        num_heads: int = 1,
        beta: float | torch.Tensor | None = None,
        learn_beta: bool = False,
        steps: int | None = 1,
        tol: float = 1e-4,
        max_steps: int = 10_000,
        values: str = "connected",
        normalize_state: bool = True,
        normalize_stored: bool = True,
        normalize_projection: bool = True,
        bias: bool = True,
        impl: str = "auto",
        block_size: int = 1024,
    ):
        super().__init__()
        stored_size = input_size if stored_size is None else stored_size
        projection_size = stored_size if projection_size is None else projection_size
        if values not in ("connected", "free"):
            raise ValueError(f"values must be 'connected' or 'free', got {values!r}")
        if values == "connected" and projection_size != stored_size:
            raise ValueError(
                f"connected values go through W_K, so projection_size must be stored_size, "
                f"got {projection_size} and {stored_size}"
            )
        if num_heads < 1 or (hidden_size is None and input_size % num_heads):
            raise ValueError(
                f"without hidden_size, input_size must be a multiple of num_heads, got {input_size} and {num_heads}"
            )
        hidden_size = input_size // num_heads if hidden_size is None else hidden_size
        value_size = hidden_size if value_size is None else value_size
        output_size = input_size if output_size is None else output_size
        sizes = (input_size, stored_size, projection_size, hidden_size, value_size, output_size)
        if min(sizes) < 1:
            raise ValueError(f"all sizes must be at least 1, got {sizes}")
        self.num_heads, self.hidden_size, self.values = num_heads, hidden_size, values
        self.retrieval = {
            "steps": steps,
            "tol": tol,
            "max_steps": max_steps,
            "impl": impl,
            "block_size": block_size,
        }
        self.state_norm = nn.LayerNorm(input_size) if normalize_state else nn.Identity()
        self.stored_norm = nn.LayerNorm(stored_size) if normalize_stored else nn.Identity()
        self.projection_norm = nn.LayerNorm(projection_size) if normalize_projection else nn.Identity()
        self.query = nn.Linear(input_size, num_heads * hidden_size, bias=bias)
        self.key = nn.Linear(stored_size, num_heads * hidden_size, bias=bias)
        from_size = hidden_size if values == "connected" else projection_size
        self.value = nn.Parameter(torch.empty(num_heads, from_size, value_size))
        nn.init.uniform_(self.value, -(from_size**-0.5), from_size**-0.5)  # as nn.Linear does
        self.out = nn.Linear(num_heads * value_size, output_size, bias=bias)
        start = torch.as_tensor(hidden_size**-0.5 if beta is None else beta, dtype=torch.get_default_dtype())
        if start.shape not in ((), (num_heads,)) or not (start > 0).all():
            raise ValueError(f"beta must be positive, one number or ({num_heads},), got {beta}")
        log_beta = start.log().expand(num_heads).clone()
        self.log_beta = nn.Parameter(log_beta, requires_grad=learn_beta)

    @property
    def beta(self) -> torch.Tensor:
        """The inverse temperatures, (num_heads,)."""
        return self.log_beta.exp()

    def forward(
        self,
        state: torch.Tensor,
        stored: torch.Tensor | None = None,
        projection: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the states read.

        Args:
            state: (batch, S, input_size).
            stored: (batch, N, stored_size); `state` by default.
            projection: what the values are made of, (batch, N, projection_size); `stored` by default.
            mask: boolean, (batch, N) or (batch, S, N), True where a pattern may be seen.

        Returns:
            (batch, S, output_size).
        """
        values = self._values(state, stored, projection)
        read, _ = self._retrieve(state, stored, mask, values)
        return self.out(read.transpose(-3, -2).flatten(-2))

    def association(
        self, state: torch.Tensor, stored: torch.Tensor | None = None, *, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The weights with which the last step reads, (batch, heads, S, N). Arguments as of `forward`."""
        _, info = self._retrieve(state, stored, mask, None)
        keys = self._split(self.key(self.stored_norm(state if stored is None else stored)))
        return _weights(info["query"], keys, _beta(self.beta, info["query"]), _by_head(mask))

    def _retrieve(self, state, stored, mask, values):
        queries = self._split(self.query(self.state_norm(state)))
        keys = self._split(self.key(self.stored_norm(state if stored is None else stored)))
        return hopfield_retrieve(
            queries, keys, values=values, beta=self.beta, mask=_by_head(mask), **self.retrieval
        )

    def _values(self, state, stored, projection):
        stored = state if stored is None else stored
        source = self.projection_norm(stored if projection is None else projection)
        if self.values == "connected":
            return self._split(self.key(source)) @ self.value  # (batch, heads, N, value_size)
        return source.unsqueeze(-3) @ self.value

    def _split(self, joined):
        return joined.unflatten(-1, (self.num_heads, -1)).transpose(
            -3, -2
        )  # (batch, heads, length, hidden_size)


class HopfieldPooling(nn.Module):
    """Pools a set with learned queries (arXiv 2008.02217, section 3, the layer `HopfieldPooling`).

    Args:
        input_size: of the members of the set.
        quantity: how many queries, and so how many vectors a set becomes.
        **options: of `Hopfield`, except `stored_size`.

    Raises:
        ValueError: a quantity below 1, and as `Hopfield`.
    """

    def __init__(self, input_size: int, *, quantity: int = 1, **options):
        super().__init__()
        if quantity < 1:
            raise ValueError(f"quantity must be at least 1, got {quantity}")
        self.hopfield = Hopfield(input_size, **options)
        self.state = nn.Parameter(torch.randn(quantity, input_size))

    def forward(self, stored: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, N, input_size), with a mask (batch, N) that is True for members, to (batch, quantity, output_size)."""
        return self.hopfield(self.state.expand(len(stored), -1, -1), stored, mask=mask)

    def association(self, stored: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The weights of the members, (batch, heads, quantity, N)."""
        return self.hopfield.association(self.state.expand(len(stored), -1, -1), stored, mask=mask)


class HopfieldLayer(nn.Module):
    """A lookup table: the stored patterns are parameters (arXiv 2008.02217, section 3, the layer `HopfieldLayer`).

    Connected values are made of the same patterns. With `values="free"` the table has a second column, `projection`, of
    learned vectors of `projection_size` for the values.

    Args:
        input_size: of the states.
        num_stored: how many patterns.
        **options: of `Hopfield`.

    Raises:
        ValueError: `num_stored` below 1, and as `Hopfield`.
    """

    def __init__(self, input_size: int, num_stored: int, **options):
        super().__init__()
        if num_stored < 1:
            raise ValueError(f"num_stored must be at least 1, got {num_stored}")
        stored_size = options.get("stored_size") or input_size
        self.hopfield = Hopfield(input_size, **options)
        self.stored = nn.Parameter(torch.randn(num_stored, stored_size))
        free = options.get("values") == "free"
        size = options.get("projection_size") or stored_size
        self.projection = nn.Parameter(torch.randn(num_stored, size)) if free else None

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """(batch, S, input_size) to (batch, S, output_size)."""
        batch = len(state)
        stored = self.stored.expand(batch, -1, -1)
        projection = None if self.projection is None else self.projection.expand(batch, -1, -1)
        return self.hopfield(state, stored, projection)

    def association(self, state: torch.Tensor) -> torch.Tensor:
        """The weights of the stored patterns, (batch, heads, S, num_stored)."""
        return self.hopfield.association(state, self.stored.expand(len(state), -1, -1))


# --- one step of association


def _weights(q, k, beta, mask):
    scores = (q * beta) @ k.mT  # (..., S, N)
    if mask is None:
        return scores.softmax(-1)
    # the second fill turns the nan of a row without patterns into zeros; the first keeps it out of the gradient
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0.0)


def _attend(q, k, v, beta, mask):
    return _weights(q, k, beta, mask) @ v


def _stream(q, k, v, beta, mask, block_size):
    lead = q.shape[:-2]
    k, v = (each.expand(*lead, *each.shape[-2:]) for each in (k, v))
    return StreamingAttention.apply(q, k, v, beta, mask, block_size)


def _fused(state, stored, values, beta, steps, lead):
    """The answer of `hopfield_retrieve` by the kernel."""
    xi = state.expand(*lead, *state.shape[-2:])
    factor = _beta(beta, xi.float()).expand(*lead, xi.shape[-2], 1)
    q, k, v, factor = with_heads(lead, xi, stored, values, factor)
    factor, moved = factor[..., 0], []
    updates = steps if values is None else steps - 1
    if updates:
        moved = list(FlashHopfield.apply(q, k, factor, updates))
    out = moved.pop() if values is None else None
    path = [q, *moved]
    if values is None:
        change = out - path[-1]
    else:
        out, _ = FlashAttention.apply(path[-1], k, v, factor, False, dict(scale=1.0))
        change = path[-1] - path[-2] if moved else None
    heads = lead[-1:]
    if change is None:
        change = torch.full(heads, torch.nan, dtype=torch.float32, device=q.device)
    else:
        change = _longest(change.detach().float().reshape(xi.shape)).reshape(heads)
    info = {
        "steps": torch.full(heads, steps, device=q.device),
        "change": change,
        "query": path[-1].reshape(xi.shape),
    }
    return out.reshape(*lead, *out.shape[-2:]), info


# --- shapes


def _check(state, stored, values, mask):
    """Validate what all functions share; the leading dimensions of the result, of which the last is that of the heads."""
    tensors = {"state": state, "stored": stored} | ({} if values is None else {"values": values})
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
        if tensor.ndim < 2:
            raise ValueError(f"{name} must have the shape (..., length, dim), got {tuple(tensor.shape)}")
    if state.shape[-1] != stored.shape[-1] or not stored.shape[-1]:
        raise ValueError(
            f"state (..., S, d) and stored (..., N, d) need the same d, got {tuple(state.shape)} and {tuple(stored.shape)}"
        )
    if not stored.shape[-2]:
        raise ValueError("stored holds no patterns")
    if values is not None and values.shape[-2] != stored.shape[-2]:
        raise ValueError(f"got {values.shape[-2]} values for {stored.shape[-2]} stored patterns")
    leads = [tensor.shape[:-2] for tensor in tensors.values()]
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            raise TypeError("mask must be a boolean tensor, True where a state may see a pattern")
        leads.append(mask.shape[:-2])
    try:
        lead = torch.broadcast_shapes(*leads)
        if mask is not None:
            torch.broadcast_shapes(mask.shape, (*lead, state.shape[-2], stored.shape[-2]))
            if mask.ndim < 1 or mask.shape[-1] not in (1, stored.shape[-2]):
                raise RuntimeError
            if mask.ndim > 1 and mask.shape[-2] not in (1, state.shape[-2]):
                raise RuntimeError
    except RuntimeError:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        shapes |= {} if mask is None else {"mask": tuple(mask.shape)}
        raise ValueError(f"the shapes do not broadcast: {shapes}") from None
    return tuple(lead)


def _beta(beta, xi):
    """beta as a tensor that broadcasts against (..., heads, S, d)."""
    if beta is None:
        return torch.tensor(xi.shape[-1] ** -0.5, dtype=xi.dtype, device=xi.device).reshape(1, 1)
    if not isinstance(beta, torch.Tensor):
        if not (isinstance(beta, int | float) and 0 < beta < math.inf):
            raise ValueError(f"beta must be a positive number, got {beta!r}")
        return torch.tensor(float(beta), dtype=xi.dtype, device=xi.device).reshape(1, 1)
    beta = beta.to(xi)
    if beta.ndim == 0:
        return beta.reshape(1, 1)
    if beta.ndim != 1 or xi.ndim < 3 or len(beta) != xi.shape[-3]:
        raise ValueError(
            f"beta must be a number or (heads,) where dimension -3 of the states is the heads, "
            f"got {tuple(beta.shape)} for {tuple(xi.shape)}"
        )
    return beta.reshape(-1, 1, 1)


def _of_heads(tensor, active, heads):
    """The active heads of a tensor, which may be missing, or broadcast over them."""
    if tensor is None or not heads or len(active) == heads[0] or tensor.ndim < 3 or tensor.shape[-3] == 1:
        return tensor
    return tensor.index_select(-3, active)


def _longest(step):
    """The largest Euclidean length over all states of each head, (heads,)."""
    lengths = step.detach().norm(dim=-1)  # (..., heads, S)
    by_head = lengths.transpose(-2, -1).flatten(0, -2) if lengths.ndim > 1 else lengths.unsqueeze(-1)
    return torch.cat([by_head, by_head.new_zeros(1, by_head.shape[-1])]).amax(0)  # no states move by 0


def _by_head(mask):
    if mask is None:
        return None
    if mask.ndim not in (2, 3):
        raise ValueError(f"mask must be (batch, N) or (batch, S, N), got {tuple(mask.shape)}")
    return mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
