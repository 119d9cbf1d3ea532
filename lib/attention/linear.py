"""Linear attention, and the scan on which every recurrent mixer rests."""

import functools
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lib.attention.causal import causal_mask
from lib.backend import choose_impl

FEATURES = ("elu1", "relu", "identity", "taylor")


class _DiagonalScan(torch.autograd.Function):
    """h_i = decay_i * h_{i-1} + inputs_i with time first; keeps the decays and the states, one pass each way."""

    @staticmethod
    def forward(ctx, decay, inputs, initial):
        states = torch.empty_like(inputs)
        previous = initial
        for step, (factor, value) in enumerate(zip(decay.unbind(0), inputs.unbind(0), strict=True)):
            previous = torch.addcmul(value, factor, previous, out=states[step])
        ctx.save_for_backward(decay, states, initial)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_states):
        decay, states, initial = ctx.saved_tensors
        grad_inputs = grad_states.contiguous().clone()
        steps, factors = grad_inputs.unbind(0), decay.unbind(0)
        for step in range(len(steps) - 2, -1, -1):
            steps[step].addcmul_(factors[step + 1], steps[step + 1])
        grad_decay = torch.empty_like(states)
        torch.mul(grad_inputs[1:], states[:-1], out=grad_decay[1:])
        torch.mul(grad_inputs[0], initial, out=grad_decay[0])
        return grad_decay, grad_inputs, decay[0] * grad_inputs[0]


class _FusedScan(torch.autograd.Function):
    """`_DiagonalScan` by a Triton kernel; (outer, time, inner), and (outer, inner) for the first state."""

    @staticmethod
    def forward(ctx, decay, inputs, initial):
        from kernels.linear_scan import linear_scan_forward

        states = linear_scan_forward(decay, inputs, initial)
        ctx.save_for_backward(decay, states, initial)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from kernels.linear_scan import linear_scan_backward

        decay, states, initial = ctx.saved_tensors
        *grads, first = linear_scan_backward(decay, states, grad, initial, need_decay=ctx.needs_input_grad[0])
        return *grads, first if ctx.needs_input_grad[2] else None


def diagonal_scan(
    decay: torch.Tensor,
    inputs: torch.Tensor,
    initial: torch.Tensor | None = None,
    *,
    dim: int = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """All states of h_i = decay_i * h_{i-1} + inputs_i, elementwise, in time and memory linear in the length.

    Nothing is divided, so decays of zero and products that underflow are harmless. The backward pass is a second scan
    from the right; it keeps the decays and the states and nothing else.

    Args:
        decay: broadcasts against `inputs`; constant along `dim` if it has size one there.
        inputs: any shape; `dim` is the time.
        initial: the state before the first step, of the shape of `inputs` without `dim`, or what broadcasts to it;
            zero if not given.
        dim: the dimension of the time, also of `decay` after broadcasting.
        impl: `"triton"` (`kernels.linear_scan`: float32, bfloat16 or float16, and states are rounded to that only when
            they are stored), `"torch"` (a launch a step), or `"auto"`: Triton for CUDA tensors of a dtype that it takes.

    Returns:
        The states, in the shape of `inputs` broadcast with `decay`.

    Raises:
        ValueError: shapes that do not broadcast, a scan over no steps, or an unknown impl.
        TypeError: `impl="triton"` with a dtype that it does not take.
        RuntimeError: `impl="triton"` without Triton.
    """
    try:
        decay, inputs = torch.broadcast_tensors(decay, inputs)
        dtype = torch.promote_types(decay.dtype, inputs.dtype)
        decay, inputs = (tensor.to(dtype).movedim(dim, 0) for tensor in (decay, inputs))
        start = inputs.new_zeros(()) if initial is None else initial.to(dtype)
        start = start.expand(inputs.shape[1:])
    except (RuntimeError, IndexError) as error:
        shapes = [tuple(tensor.shape) for tensor in (decay, inputs, initial) if tensor is not None]
        raise ValueError(f"decay, inputs and initial do not fit along dim {dim}: shapes {shapes}") from error
    if inputs.shape[0] == 0:
        raise ValueError("there must be at least one step to scan over")
    takes = impl != "auto" or dtype in (torch.float32, torch.bfloat16, torch.float16)
    if choose_impl(impl, inputs, ("triton", "torch") if takes else ("torch",)) == "torch":
        decay, inputs, start = (tensor.contiguous() for tensor in (decay, inputs, start))
        return _DiagonalScan.apply(decay, inputs, start).movedim(0, dim)
    place = dim % inputs.ndim  # what is before the time is the outer part, what is after it the inner
    decay, inputs = (tensor.movedim(0, place) for tensor in (decay, inputs))
    shape = inputs.shape
    size = math.prod(shape[:place]), shape[place], math.prod(shape[place + 1 :])
    states = _FusedScan.apply(
        decay.reshape(size),
        inputs.reshape(size),
        None if initial is None else start.reshape(size[0], size[2]),
    )
    return states.reshape(shape)


@functools.lru_cache(maxsize=64)
def _exponents(dim: int, degree: int) -> torch.Tensor:
    """The exponents of all monomials of `dim` variables up to `degree`, (features, dim)."""
    rows = []
    for total in range(degree + 1):
        for chosen in itertools.combinations_with_replacement(range(dim), total):
            rows.append([chosen.count(variable) for variable in range(dim)])
    return torch.tensor(rows, dtype=torch.int64)


def taylor_features(x: torch.Tensor, degree: int) -> torch.Tensor:
    """Features whose inner product is the exponential's Taylor polynomial: phi(q) . phi(k) = sum over p <= degree of (q.k)^p / p!.

    One feature a monomial, prod_c x_c^{a_c} / sqrt(a_c!), so math.comb(dim + degree, degree) in all. For |q.k| <= B the kernel
    is off by at most e^B B^(degree+1) / (degree+1)!. With an odd degree it may be negative.

    Args:
        x: (..., dim).
        degree: of the polynomial, 0 or more.

    Returns:
        (..., math.comb(dim + degree, degree)).

    Raises:
        ValueError: a negative degree.
    """
    if degree < 0:
        raise ValueError(f"degree must be at least 0, got {degree}")
    exponents = _exponents(x.shape[-1], degree).to(x.device)  # (features, dim)
    powers = [torch.ones_like(x)]
    for power in range(1, degree + 1):
        powers.append(powers[-1] * x / math.sqrt(power))
    table = torch.stack(powers, -1)  # (..., dim, degree + 1)
    features = table.new_ones(())
    for variable in range(x.shape[-1]):
        features = features * table[..., variable, exponents[:, variable]]
    return features


def feature_map(feature: str | Callable, *, degree: int = 2) -> Callable:
    """The map that linear attention applies to queries and keys.

    Args:
        feature: `"elu1"` (elu(x) + 1), `"relu"`, `"identity"`, `"taylor"` (`taylor_features`), or a function of its own, which is returned
            as it is.
        degree: of `"taylor"`.

    Raises:
        ValueError: an unknown name.
    """
    if callable(feature):
        return feature
    if feature == "elu1":
        return lambda x: F.elu(x) + 1
    if feature == "relu":
        return torch.relu
    if feature == "identity":
        return lambda x: x
    if feature == "taylor":
        return lambda x: taylor_features(x, degree)
    raise ValueError(f"feature must be one of {FEATURES} or a function, got {feature!r}")


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    feature: str | Callable = "elu1",
    degree: int = 2,
    eta: str | torch.Tensor | None = "query",
    chunk: int = 64,
    return_weights: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention with a separable kernel: out_i = sum_j phi(q_i).phi(k_j) v_j / eta_i (Katharopoulos et al. 2020).

    Without a mask no matrix of (queries, keys) is formed: time is linear in the length and, causally, the state is a matrix
    (features, value dim), carried from one chunk of queries to the next.

    Args:
        q: (..., Lq, dim).
        k: (..., Lk, dim).
        v: (..., Lk, value dim); leading dimensions broadcast.
        causal: query i sees keys j <= i + Lk - Lq: with fewer queries than keys, the queries are the last ones.
        mask: boolean, (..., Lq, Lk) or what broadcasts to it, True = may attend. Forms the matrix.
        scale: multiplies q . k before a `"taylor"` kernel (default dim ** -0.5, as in softmax attention), and q alone
            before any other feature (default 1).
        feature: see `feature_map`.
        degree: of `"taylor"`.
        eta: what divides: `"query"`, the sum of the row's weights; a tensor (..., Lq), any normaliser of your own, for instance
            exp(W u_i) of the paper's normalised attention; or None. A row whose weights sum to zero gives zero.
        chunk: queries taken at a time in the causal form.
        return_weights: also return the matrix phi(q_i).phi(k_j) / eta_i (which forms it).

    Returns:
        (..., Lq, value dim); with `return_weights` also (..., Lq, Lk).

    Raises:
        ValueError: shapes that do not fit, more queries than keys when causal, an unknown feature or eta.
    """
    if min(q.ndim, k.ndim, v.ndim) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        shapes = [tuple(tensor.shape) for tensor in (q, k, v)]
        raise ValueError(
            f"q (..., Lq, dim), k (..., Lk, dim) and v (..., Lk, value dim) do not fit together: {shapes}"
        )
    queries, keys = q.shape[-2], k.shape[-2]
    if causal and queries > keys:
        raise ValueError(f"causal attention needs at least as many keys as queries, got {keys} and {queries}")
    if isinstance(eta, str) and eta != "query":
        raise ValueError(f"eta must be 'query', a tensor (..., Lq) or None, got {eta!r}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if scale is None:
        scale = q.shape[-1] ** -0.5 if feature == "taylor" else 1.0
    phi = feature_map(feature, degree=degree)
    features, keys_mapped = phi(q * scale), phi(k)  # (..., L, n)
    own = eta == "query" if isinstance(eta, str) else False

    if mask is not None or return_weights:
        weights = features @ keys_mapped.transpose(-1, -2)
        allowed = mask
        if causal:
            corner = causal_mask(queries, keys, q.device)
            allowed = corner if mask is None else corner & mask
        if allowed is not None:
            weights = weights.masked_fill(~allowed, 0.0)
        weights = _divide(weights, weights.sum(-1) if own else eta)
        out = weights @ v
        return (out, weights) if return_weights else out

    if own:  # the sum of the weights is what the same sums give for values of one
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    if not causal:
        out = features @ (keys_mapped.transpose(-1, -2) @ v)
    else:
        past = keys - queries
        state = keys_mapped[..., :past, :].transpose(-1, -2) @ v[..., :past, :]  # (..., n, value dim)
        parts = []
        for start in range(0, queries, chunk):
            stop = min(start + chunk, queries)
            rows = features[..., start:stop, :]
            k_rows, v_rows = (
                keys_mapped[..., past + start : past + stop, :],
                v[..., past + start : past + stop, :],
            )
            parts.append((rows @ k_rows.transpose(-1, -2)).tril() @ v_rows + rows @ state)
            if stop < queries:
                state = state + k_rows.transpose(-1, -2) @ v_rows
        out = torch.cat(parts, -2) if parts else features @ state
    return _divide(out[..., :-1], out[..., -1]) if own else _divide(out, eta)


def linear_softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q over features) (softmax(k over positions)^T v): attention in linear time whose weights sum to one.

    Both factors are row-stochastic, (Lq, dim) and (dim, Lk), so their product is; it has rank dim, at most, and is never formed.

    Source: Shen et al., Efficient Attention (2021); the global contexts of MLIC++ (Jiang et al. 2023).

    Args:
        q: (..., Lq, dim).
        k: (..., Lk, dim).
        v: (..., Lk, value dim); leading dimensions broadcast.

    Returns:
        (..., Lq, value dim).

    Raises:
        ValueError: shapes that do not fit, or no keys.
    """
    fits = min(q.ndim, k.ndim, v.ndim) >= 2 and q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2] > 0
    if not fits:
        shapes = [tuple(tensor.shape) for tensor in (q, k, v)]
        raise ValueError(f"q (..., Lq, dim), k (..., Lk, dim), v (..., Lk, value dim) do not fit: {shapes}")
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def _divide(rows: torch.Tensor, eta: torch.Tensor | None) -> torch.Tensor:
    """rows / eta, one eta a row; 0 where eta is 0."""
    if eta is None:
        return rows
    zero = eta == 0
    return (rows / eta.masked_fill(zero, 1.0).unsqueeze(-1)).masked_fill(zero.unsqueeze(-1), 0.0)
