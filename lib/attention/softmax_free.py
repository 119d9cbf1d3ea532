"""Attention without softmax (SOFT, arXiv 2207.03341): a Gaussian kernel, and its low-rank form through landmarks."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lib.attention.causal import causal_mask
from lib.backend import choose_impl

NORMS = ("none", "symmetric")
LANDMARKS = ("convolution", "average", "subset")


def gaussian_kernel(x: torch.Tensor, y: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """The kernel matrix exp(-scale |x_i - y_j|^2 / 2) (arXiv 2207.03341).

    The squared distance is expanded into two norms and a matrix product, computed in float32 at least, and clamped at 0:
    rounding may make it slightly negative, and the kernel larger than 1.

    Args:
        x: (..., n, dim).
        y: (..., m, dim); leading dimensions broadcast.
        scale: 1 / sqrt(dim) by default, which is the paper's division of every vector by dim^(1/4).

    Returns:
        (..., n, m), in the dtype of `x`; every entry in [0, 1].

    Raises:
        ValueError: shapes that do not fit together, or a `scale` that is not positive.
        TypeError: tensors that are not floating point.
    """
    scale = _check_vectors(("x", x), ("y", y), scale=scale)
    wide = torch.promote_types(x.dtype, torch.float32)
    return _kernel(x.to(wide), y.to(wide), scale).to(x.dtype)


def gaussian_kernel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    block_size: int = 256,
    return_weights: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention with a Gaussian kernel and no normalisation: out_i = sum_j exp(-scale |q_i - k_j|^2 / 2) v_j.

    Forward and backward walk over the keys in blocks and keep none of the weights, so that the memory is linear in both
    lengths; the result is once differentiable. The paper ties the keys to the queries: pass `q` twice.

    Args:
        q: (..., n, dim).
        k: (..., keys, dim).
        v: (..., keys, value_dim); leading dimensions of all three broadcast.
        causal: let query i see the keys j <= i + keys - n only.
        mask: boolean, broadcastable to (..., n, keys), True where a query may see a key. A query that sees none reads zeros.
        scale: as in `gaussian_kernel`.
        block_size: how many keys a block holds, with `impl="torch"`.
        return_weights: return all weights too; they are then computed at once.
        impl: `"torch"` walks over blocks of keys; `"triton"` is the kernel; `"auto"` takes the kernel on CUDA where it can. It
            takes neither float64, nor tensors of different dtypes, vectors longer than 256, `return_weights`, or a mask with
            more than two leading dimensions.

    Returns:
        (..., n, value_dim) in the dtype of `q`; with `return_weights` also the weights, (..., n, keys). Half precision is
        computed in float32; the kernel multiplies it as it is and sums in float32.

    Raises:
        ValueError: shapes that do not fit together, more queries than keys when causal, a `scale` or `block_size` that is not
            positive, an unknown `impl`, or `impl="triton"` with options that the kernel does not take.
        TypeError: tensors that are not floating point, or a mask that is not boolean; dtypes that the kernel does not take.
        RuntimeError: `impl="triton"` where Triton cannot be imported.
    """
    scale = _check_vectors(("q", q), ("k", k), scale=scale)
    if not v.is_floating_point():
        raise TypeError(f"v must be floating point, got {v.dtype}")
    if v.ndim < 2 or v.shape[-2] != k.shape[-2]:
        raise ValueError(f"k and v must hold one row for each key, got {tuple(k.shape)} and {tuple(v.shape)}")
    if block_size < 1:
        raise ValueError(f"block_size must be positive, got {block_size}")
    n, keys = q.shape[-2], k.shape[-2]
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean, got {mask.dtype}")
        try:
            mask = mask.expand(*lead, n, keys)
        except RuntimeError:
            raise ValueError(f"mask must broadcast to {(*lead, n, keys)}, got {tuple(mask.shape)}") from None
    limit = _kernel_limit(q, k, v, mask, return_weights)
    impl = "torch" if impl == "auto" and limit else choose_impl(impl, q, options=("torch", "triton"))
    if impl == "triton":
        if limit:
            raise limit
        return _attention_by_kernel(q, k, v, mask, scale, causal, lead)
    if causal:
        visible = causal_mask(n, keys, q.device)
        mask = visible if mask is None else mask & visible
    wide = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_ = (each.to(wide).expand(*lead, *each.shape[-2:]) for each in (q, k, v))
    if return_weights:
        weights = _kernel(q_, k_, scale)
        if mask is not None:
            weights = weights * mask
        return (weights @ v_).to(q.dtype), weights.to(q.dtype)
    return _Tiled.apply(q_, k_, v_, mask, scale, block_size).to(q.dtype)


def newton_pinv(
    matrix: torch.Tensor,
    *,
    iters: int = 20,
    damping: float = 0.9,
    ridge: float = 0.0,
    impl: str = "auto",
) -> torch.Tensor:
    """The inverse of A + ridge I by Newton's iteration, with matrix products alone (arXiv 2207.03341).

    V_0 = alpha A^T and V_(k+1) = 2 V_k - V_k A V_k with alpha = 2 damping / (|A|_1 |A|_inf). After `iters` steps a singular
    value s of A is inverted up to the factor 1 - (1 - alpha s^2)^(2^iters): fully where s / |A|_1 is well above
    2^(-iters / 2), hardly at all below. For a singular A the limit is the Moore-Penrose inverse, but rounding errors outside
    the range double with every step; a `ridge` stops them.

    The gradient is the closed form dL/dA = -V^T (dL/dV) V^T with the V that was found, two products, whatever `iters` is; no
    iteration is kept. It is the gradient of the inverse, so for an invertible matrix it is exact as far as V has converged. For
    a singular one it leaves out the two terms by which the range of A turns. Once differentiable.

    Args:
        matrix: A, (..., m, m).
        iters: the number of steps, 0 or more.
        damping: in (0, 1]. At 1 the iteration stalls for a symmetric matrix with equal row sums.
        ridge: added to the diagonal first, 0 or more.
        impl: `"torch"` takes two batched products a step; `"triton"` keeps each matrix on the chip for all steps, up to 64 rows;
            `"auto"` is the kernel on CUDA where it can be, so not in float64.

    Returns:
        (..., m, m) in the dtype of `matrix`. Half precision is computed in float32.

    Raises:
        ValueError: matrices that are not square, options out of range, or more rows than the kernel takes.
        TypeError: a tensor that is not floating point, or float64 for the kernel.
    """
    if not matrix.is_floating_point():
        raise TypeError(f"matrix must be floating point, got {matrix.dtype}")
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix must be square, (..., m, m), got {tuple(matrix.shape)}")
    if iters < 0 or not 0 < damping <= 1 or not ridge >= 0:
        raise ValueError(
            f"iters and ridge must not be negative and damping must lie in (0, 1], got {iters}, {ridge} and {damping}"
        )
    chosen = choose_impl(impl, matrix, options=("torch", "triton"))
    if (
        impl == "auto"
        and chosen == "triton"
        and not (matrix.dtype != torch.float64 and matrix.shape[-1] <= 64)
    ):
        chosen = "torch"
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if ridge:
        wide = wide + ridge * torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    return _NewtonInverse.apply(wide, iters, damping, chosen).to(matrix.dtype)


def softmax_free_attention(
    q: torch.Tensor,
    landmarks: torch.Tensor,
    v: torch.Tensor,
    *,
    norm: str = "none",
    iters: int = 20,
    damping: float = 0.9,
    ridge: float = 0.01,
    scale: float | None = None,
) -> torch.Tensor:
    """Gaussian kernel attention of n tokens through m landmarks: P^T (A^+ (P v)), nowhere n x n (arXiv 2207.03341).

    A is the kernel of the landmarks with themselves, P that of the landmarks with the tokens. Queries and keys are one and the
    same: the approximation rests on the kernel matrix being symmetric. With landmarks taken from the rows of `q`, `ridge=0` and
    enough `iters` it is Nystrom's approximation of `gaussian_kernel_attention(q, q, v)`.

    Args:
        q: the tokens, queries and keys in one, (..., n, dim).
        landmarks: (..., m, dim).
        v: (..., n, value_dim).
        norm: `"symmetric"` replaces A^+ by D^(-1/2) A^+ D^(-1/2), D the row sums of A.
        iters, damping, ridge: of `newton_pinv`. The default ridge is the released code's; it keeps landmarks that coincide
            from blowing up.
        scale: as in `gaussian_kernel`.

    Returns:
        (..., n, value_dim) in the dtype of `q`.

    Raises:
        ValueError: shapes that do not fit together, an unknown `norm`, options out of range.
        TypeError: tensors that are not floating point.
    """
    scale = _check_vectors(("q", q), ("landmarks", landmarks), scale=scale)
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    if v.ndim < 2 or v.shape[-2] != q.shape[-2]:
        raise ValueError(
            f"q and v must hold one row for each token, got {tuple(q.shape)} and {tuple(v.shape)}"
        )
    if not v.is_floating_point():
        raise TypeError(f"v must be floating point, got {v.dtype}")
    wide = torch.promote_types(q.dtype, torch.float32)
    tokens, marks = q.to(wide), landmarks.to(wide)
    among = _kernel(marks, marks, scale)  # A, (..., m, m)
    across = _kernel(marks, tokens, scale)  # P, (..., m, n)
    inverse = newton_pinv(among, iters=iters, damping=damping, ridge=ridge)
    if norm == "symmetric":
        root = among.sum(-1, keepdim=True).rsqrt()  # D^(-1/2), (..., m, 1)
        inverse = root * inverse * root.mT
    return (across.mT @ (inverse @ (across @ v.to(wide)))).to(q.dtype)


class SOFTAttention(nn.Module):
    """The attention layer of SOFT (arXiv 2207.03341) for tokens on a grid.

    One projection makes queries and keys, another the values. A convolution whose kernel and stride are `ratio` makes the
    landmarks of each head, followed by LayerNorm and GELU; a depthwise convolution of the values is added to what
    `softmax_free_attention` returns; heads are merged and projected. The weights of both convolutions are shared by the
    heads and by the channels of a head respectively, as in the released code.

    The number of landmarks is n / ratio^2: keep that, rather than `ratio`, fixed where the cost has to be linear in n.

    Args:
        dim: the width of the tokens.
        num_heads: a divisor of `dim`.
        ratio: the grid's height and width are multiples of it.
        conv_size: of the depthwise convolution, odd; 0 leaves it out.
        norm: as in `softmax_free_attention`.
        landmarks: `"convolution"`; `"average"` takes the mean of each patch, without parameters; `"subset"` takes its first
            token, so that `ratio=1` makes the tokens their own landmarks.
        iters, damping, ridge: of `newton_pinv`.

    Raises:
        ValueError: sizes that do not fit together, an unknown `norm` or `landmarks`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ratio: int,
        *,
        conv_size: int = 3,
        norm: str = "none",
        landmarks: str = "convolution",
        iters: int = 20,
        damping: float = 0.9,
        ridge: float = 0.01,
    ):
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads or ratio < 1:
            raise ValueError(
                f"dim must be a multiple of num_heads and ratio positive, got {dim}, {num_heads} and {ratio}"
            )
        if conv_size < 0 or (conv_size and conv_size % 2 == 0):
            raise ValueError(f"conv_size must be odd, or 0 for none, got {conv_size}")
        if norm not in NORMS or landmarks not in LANDMARKS:
            raise ValueError(
                f"norm must be one of {NORMS} and landmarks one of {LANDMARKS}, got {norm!r} and {landmarks!r}"
            )
        self.num_heads, self.ratio, self.norm, self.landmarks = num_heads, ratio, norm, landmarks
        self.options = {"iters": iters, "damping": damping, "ridge": ridge}
        width = dim // num_heads
        self.query = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        if landmarks == "convolution":
            self.sample = nn.Conv2d(width, width, ratio, stride=ratio, bias=False)
            self.sample_norm = nn.LayerNorm(width)
        self.local = (
            nn.Conv2d(num_heads, num_heads, conv_size, padding=conv_size // 2, groups=num_heads, bias=False)
            if conv_size
            else None
        )

    def forward(self, x: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        """Attend.

        Args:
            x: the tokens row by row, (batch, n, dim).
            grid: height and width, whose product is n.

        Returns:
            (batch, n, dim).

        Raises:
            ValueError: a grid that does not have n places, or is not a multiple of `ratio`.
        """
        height, width = grid
        if x.ndim != 3 or height * width != x.shape[1] or height % self.ratio or width % self.ratio:
            raise ValueError(
                f"x must be (batch, height * width, dim) and the grid a multiple of ratio={self.ratio}, "
                f"got {tuple(x.shape)} and {tuple(grid)}"
            )
        q, v = (self._split(projection(x)) for projection in (self.query, self.value))
        out = softmax_free_attention(q, self.sample_landmarks(q, grid), v, norm=self.norm, **self.options)
        if self.local is not None:
            out = out + _local_branch(self.local, v, grid)
        return self.out(out.transpose(1, 2).flatten(2))

    def sample_landmarks(self, q: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        """The landmarks, (batch, heads, n / ratio^2, head_dim), of queries (batch, heads, n, head_dim).

        The convolution sees queries of the scale that the kernel does: divided by head_dim^(1/4), and its LayerNorm sets the
        scale of what it returns, which is multiplied back here.
        """
        shrink = q.shape[-1] ** -0.25
        image = (q * shrink).flatten(0, 1).mT.unflatten(-1, tuple(grid))  # (batch * heads, head_dim, h, w)
        if self.landmarks == "convolution":
            image = self.sample(image)
        elif self.landmarks == "average":
            image = nn.functional.avg_pool2d(image, self.ratio)
        else:
            image = image[..., :: self.ratio, :: self.ratio]
        marks = image.flatten(2).mT.unflatten(0, q.shape[:2])
        if self.landmarks == "convolution":
            marks = nn.functional.gelu(self.sample_norm(marks))
        return marks / shrink

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _local_branch(convolution: nn.Conv2d, v: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """A depthwise convolution over the grid, one filter for each head, of values (batch, heads, n, head_dim)."""
    width = v.shape[-1]
    image = v.mT.flatten(1, 2).unflatten(-1, tuple(grid))  # (batch, dim, h, w)
    # the filter of a head repeated for its channels: one group each is the form that convolutions are fast in
    filters = convolution.weight.repeat_interleave(width, 0)
    image = nn.functional.conv2d(image, filters, padding=convolution.padding, groups=image.shape[1])
    return image.flatten(2).mT.unflatten(-1, (-1, width)).transpose(1, 2)


class _NewtonInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix, iters, damping, impl):
        if impl == "triton":
            from kernels.newton_pinv import newton_inverse

            flat = matrix.reshape(math.prod(matrix.shape[:-2]), *matrix.shape[-2:])
            inverse = newton_inverse(flat, iters, damping).reshape(matrix.shape)
            ctx.save_for_backward(inverse)
            return inverse
        size = matrix.abs()
        bound = size.sum(-1).amax(-1) * size.sum(-2).amax(-1)  # at least the largest singular value, squared
        inverse = (2 * damping / bound.clamp_min(torch.finfo(bound.dtype).tiny))[..., None, None] * matrix.mT
        shape, count = matrix.shape, matrix.shape[:-2].numel()
        flat, inverse = matrix.reshape(count, *shape[-2:]), inverse.reshape(count, *shape[-2:])
        for _ in range(iters):
            inverse = torch.baddbmm(inverse, inverse, flat @ inverse, beta=2, alpha=-1)  # 2 V - V A V
        inverse = inverse.reshape(shape)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT), None, None, None


class _Tiled(torch.autograd.Function):
    """Kernel attention over blocks of keys; q, k, v have the same leading dimensions."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale, block_size):
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, ctx.block_size = scale, block_size
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        for part in _blocks(k.shape[-2], block_size):
            out += _visible(_kernel(q, k[..., part, :], scale), mask, part) @ v[..., part, :]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, mask = ctx.saved_tensors
        grad_q = torch.zeros_like(q)
        grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
        for part in _blocks(k.shape[-2], ctx.block_size):
            keys = k[..., part, :]
            weights = _visible(_kernel(q, keys, ctx.scale), mask, part)
            grad_v[..., part, :] = weights.mT @ grad
            weights *= grad @ v[..., part, :].mT  # dL/dS * S
            grad_q += weights @ keys - weights.sum(-1, keepdim=True) * q
            grad_k[..., part, :] = weights.mT @ q - weights.sum(-2).unsqueeze(-1) * keys
        return ctx.scale * grad_q, ctx.scale * grad_k, grad_v, None, None, None


class _GaussianAttention(torch.autograd.Function):
    """The kernel, on tensors of four dimensions."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale, causal):
        from kernels.gaussian_attention import gaussian_attention_forward

        ctx.save_for_backward(q, k, v, mask)
        ctx.options = {"scale": scale, "causal": causal}
        return gaussian_attention_forward(q, k, v, mask=mask, **ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from kernels.gaussian_attention import gaussian_attention_backward

        q, k, v, mask = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = gaussian_attention_backward(q, k, v, grad, mask=mask, needs=needs, **ctx.options)
        return *grads, None, None, None


def _kernel_limit(q, k, v, mask, return_weights) -> Exception | None:
    """What the kernel does not take, as the exception to raise where it was asked for."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return TypeError(
            "the kernel takes q, k, v of one dtype, float32, bfloat16 or float16, "
            f"got {q.dtype}, {k.dtype} and {v.dtype}; use impl='torch'"
        )
    if return_weights:
        return ValueError("the kernel has no weights to return; use impl='torch'")
    if max(q.shape[-1], v.shape[-1]) > 256:
        return ValueError(
            f"the kernel takes vectors up to 256, got {q.shape[-1]} and {v.shape[-1]}; use impl='torch'"
        )
    if mask is not None and mask.ndim > 4:
        return ValueError(
            f"the kernel takes masks with two leading dimensions, got {tuple(mask.shape)}; use impl='torch'"
        )
    return None


def _attention_by_kernel(q, k, v, mask, scale, causal, lead):
    def four_dimensions(tensor):
        """(batch, heads, rows, columns); a view for up to two leading dimensions, so that a shared mask stays shared."""
        tensor = tensor.expand(*lead, *tensor.shape[-2:])
        if len(lead) > 2:
            return tensor.flatten(0, -4)
        return tensor[(None,) * (2 - len(lead))]

    mask = mask if mask is None else four_dimensions(mask)
    out = _GaussianAttention.apply(*(four_dimensions(each) for each in (q, k, v)), mask, scale, causal)
    return out.reshape(*lead, *out.shape[-2:])


def _blocks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _visible(weights: torch.Tensor, mask: torch.Tensor | None, part: slice) -> torch.Tensor:
    return weights if mask is None else weights * mask[..., part]


def _kernel(x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    squares = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
    # autocast would round the product, and with it what is left of the difference
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        return torch.exp((squares - 2 * (x @ y.mT)).clamp_min(0) * (-scale / 2))


def _check_vectors(*named: tuple[str, torch.Tensor], scale: float | None) -> float:
    for name, tensor in named:
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    (first, x), (second, y) = named
    if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"{first} and {second} must be (..., length, dim) with the same dim, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if scale is None:
        return x.shape[-1] ** -0.5
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return float(scale)
