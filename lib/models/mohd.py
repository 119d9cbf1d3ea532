"""A mixture of hidden dimensions: wide layers of which each token uses some groups of coordinates (Chen et al. 2024)."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lib.backend import choose_impl
from lib.models.mlp import activation_module


def route_groups(
    x: torch.Tensor, centroids: torch.Tensor, n_shared: int, n_active: int, *, renormalise: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each token's groups: the first `n_shared` always, of the others those with the largest probability.

    Args:
        x: tokens, (..., dim).
        centroids: one row for each group, (groups, dim).
        n_shared: how many groups every token uses.
        n_active: how many groups a token uses in all, the shared ones included.
        renormalise: whether the balance loss reads the probabilities among the specialised groups. If not, it reads
            those among all groups, and can be lowered by moving probability to the shared ones.

    Returns:
        The gates, (..., groups): the softmax over all groups where a group is on, else 0. And the balance loss of Switch
        Transformers over the r = groups - n_shared specialised groups, r * sum_i f_i p_i, with f_i the share of the tokens that chose
        group i (without gradient) and p_i its mean probability. It is n_active - n_shared if the load is even; 0 where nothing
        is chosen. It has no weight yet.

    Raises:
        ValueError: shapes that do not fit, or counts out of range.
    """
    groups = centroids.shape[0]
    if centroids.ndim != 2 or x.shape[-1:] != centroids.shape[1:]:
        raise ValueError(
            f"x must be (..., dim) and centroids (groups, dim), got {tuple(x.shape)} and {tuple(centroids.shape)}"
        )
    _check_counts(groups, n_shared, n_active)
    logits = x @ centroids.mT
    gate = logits.softmax(-1)
    chosen, free = n_active - n_shared, groups - n_shared
    if not chosen:
        return torch.cat([gate[..., :n_shared], torch.zeros_like(gate[..., n_shared:])], -1), x.new_zeros(())
    special = gate[..., n_shared:]
    top = special.topk(chosen, -1).indices  # among the specialised alone: a shared group cannot be dropped
    on = torch.zeros_like(special, dtype=torch.bool).scatter(-1, top, True)
    probability = logits[..., n_shared:].softmax(-1) if renormalise else special
    load, probability = on.reshape(-1, free).to(x.dtype).mean(0), probability.reshape(-1, free).mean(0)
    gate = torch.cat([gate[..., :n_shared], special * on], -1)
    return gate, free * (load * probability).sum()


def grouped_gather_linear(
    x: torch.Tensor, weight: torch.Tensor, choice: torch.Tensor, *, combine: bool = False, impl: str = "auto"
) -> torch.Tensor:
    """Linear maps of groups, each computed for the tokens that chose it and for no other.

    Args:
        x: (tokens, d), each row used for all groups of its token; or (tokens, chosen, d), one row for each choice.
        weight: (groups, s, d), of the same dtype. Inside of autocast both are cast to its dtype first.
        choice: which groups each token uses, all different: integers (tokens, chosen) in [0, groups).
        combine: whether to add up the outputs of a token.
        impl: `"torch"` goes through the groups one by one; `"triton"` makes one grouped product of all; `"auto"` is the kernel on
            CUDA, except in float64.

    Returns:
        (tokens, chosen, s) in the order of `choice`, or (tokens, s) with `combine`.

    Raises:
        TypeError: dtypes that do not fit, or that the kernel does not take.
        ValueError: shapes that do not fit, or a group out of range (the kernel does not look).
    """
    if weight.ndim != 3 or x.ndim not in (2, 3) or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            "x must be (tokens, d) or (tokens, chosen, d) and weight (groups, s, d), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if choice.ndim != 2 or choice.shape[: x.ndim - 1] != x.shape[:-1]:
        raise ValueError(f"choice must be (tokens, chosen) for x {tuple(x.shape)}, got {tuple(choice.shape)}")
    if choice.is_floating_point() or choice.dtype == torch.bool:
        raise TypeError(f"choice must hold integers, got {choice.dtype}")
    device = x.device.type
    if (
        device != "meta"
        and torch.is_autocast_enabled(device)
        and torch.float64 not in (x.dtype, weight.dtype)
    ):
        x, weight = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (x, weight))
    chosen = choose_impl(impl, x, options=("torch", "triton"))
    if chosen == "triton" and not (impl == "auto" and x.dtype == torch.float64):
        out = _Grouped.apply(x, weight, choice)
        return out.sum(1) if combine else out
    if choice.numel() and not (0 <= choice.min() and choice.max() < len(weight)):
        raise ValueError(
            f"choice must lie in [0, {len(weight)}), got {choice.min().item()} to {choice.max().item()}"
        )
    tokens, slots = choice.shape
    rows, out = x.flatten(0, -2), x.new_zeros(tokens if combine else tokens * slots, weight.shape[1])
    for group, matrix in enumerate(weight):
        pairs = (choice.flatten() == group).nonzero()[:, 0]
        part = F.linear(rows[pairs // max(slots, 1) if x.ndim == 2 else pairs], matrix)
        out = out.index_add(0, pairs // max(slots, 1) if combine else pairs, part)
    return out if combine else out.view(tokens, slots, weight.shape[1])


class _Grouped(torch.autograd.Function):
    """Pairs of a token with a group, sorted by group; the kernels read and write rows where they are."""

    @staticmethod
    def forward(ctx, x, weight, choice):
        from kernels.grouped_gather_linear import grouped_product

        tokens, slots = choice.shape
        flat = choice.flatten()
        order = flat.argsort(stable=True)
        bounds = torch.arange(len(weight) + 1, device=x.device, dtype=flat.dtype)
        offsets = torch.searchsorted(flat[order], bounds, out_int32=True)
        order = order.to(torch.int32)
        index = order if x.ndim == 3 else order // max(slots, 1)
        out = grouped_product(x.flatten(0, -2), weight, offsets, index, order)
        ctx.save_for_backward(x, weight, offsets, index, order)
        return out.view(tokens, slots, weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from kernels.grouped_gather_linear import grouped_outer, grouped_product

        x, weight, offsets, index, order = ctx.saved_tensors
        flat = grad.flatten(0, 1).to(x.dtype)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped_product(flat, weight.mT, offsets, order, order).view(
                *grad.shape[:2], x.shape[-1]
            )
            grad_x = grad_x.sum(1) if x.ndim == 2 else grad_x
        if ctx.needs_input_grad[1]:
            grad_weight = grouped_outer(flat, x.flatten(0, -2), offsets, order, index)
        return grad_x, grad_weight, None


class Monarch(nn.Module):
    """A linear map of dim = b1 * b2 coordinates as two block-diagonal ones with a permutation between (Dao et al. 2022).

    The first has b2 blocks of b1 neighbouring coordinates, the second b1 blocks, each of the b2 coordinates that have the same place in
    their first block. So every output depends on every input, for dim * (b1 + b2) parameters. Starts random and keeps the mean square.

    Args:
        dim: coordinates.
        b1: size of the first blocks.
        b2: size of the second blocks.

    Raises:
        ValueError: dim is not b1 * b2.
    """

    def __init__(self, dim: int, b1: int, b2: int):
        super().__init__()
        if min(b1, b2) < 1 or b1 * b2 != dim:
            raise ValueError(f"dim must be b1 * b2, got {dim}, {b1} and {b2}")
        self.first = nn.Parameter(torch.randn(b2, b1, b1) / math.sqrt(b1))  # (block, out, in)
        self.second = nn.Parameter(torch.randn(b1, b2, b2) / math.sqrt(b2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) to (..., dim)."""
        blocks = x.unflatten(-1, (len(self.first), len(self.second)))  # (..., b2, b1)
        blocks = torch.einsum("koi,...ki->...ko", self.first, blocks)
        blocks = torch.einsum("koi,...ik->...ok", self.second, blocks)
        return blocks.flatten(-2)

    def matrix(self) -> torch.Tensor:
        """The map as a (dim, dim) matrix."""
        size = self.first.shape[0] * self.first.shape[1]
        return self(torch.eye(size, dtype=self.first.dtype, device=self.first.device)).mT


class BlockDiagonal(nn.Module):
    """A linear map inside each group of `size` neighbouring coordinates: dim * size parameters, and nothing passes between groups."""

    def __init__(self, dim: int, size: int):
        super().__init__()
        if size < 1 or dim % size:
            raise ValueError(f"dim must be a multiple of size, got {dim} and {size}")
        self.blocks = nn.Parameter(torch.randn(dim // size, size, size) / math.sqrt(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) to (..., dim)."""
        blocks = x.unflatten(-1, self.blocks.shape[:2])
        return torch.einsum("koi,...ki->...ko", self.blocks, blocks).flatten(-2)


class MoHDLinear(nn.Module):
    """A linear map without bias whose wide output lies in groups, of which each token computes some.

    What a group returns is multiplied by its gate, by the activation scaling alpha = groups * (sum of the gates), and is then mixed with the
    others by the fusion. The last forward pass leaves the layer's balance loss in `auxiliary`.

    Args:
        d_in: width of the input.
        dim: width of the output, a multiple of `groups`.
        groups: into how many groups the output is cut.
        shared: how many of them every token computes.
        active: how many of them a token computes in all.
        fusion: "monarch" (blocks of a group, then across the groups), "blockdiag" (inside each group) or None.
        scaling: whether to multiply by alpha.
        unit_shared: a different design: the shared groups are multiplied by exactly 1 instead of by gate and alpha.
        gather: whether to compute only the rows of `weight` that a token uses, group after group. If not, all are computed and masked,
            which is the same map and faster while the layer is small.

    Raises:
        ValueError: sizes that do not fit or an unknown fusion.
    """

    def __init__(
        self,
        d_in: int,
        dim: int,
        groups: int,
        shared: int,
        active: int,
        fusion: str | None = "monarch",
        scaling: bool = True,
        *,
        unit_shared: bool = False,
        gather: bool = False,
    ):
        super().__init__()
        _check_counts(groups, shared, active)
        if d_in < 1 or dim < 1 or dim % groups:
            raise ValueError(f"dim must be a positive multiple of groups, got {dim} and {groups}")
        size = dim // groups
        if fusion not in ("monarch", "blockdiag", None):
            raise ValueError(f"fusion must be monarch, blockdiag or None, got {fusion!r}")
        self.groups, self.shared, self.active, self.size = groups, shared, active, size
        self.scaling, self.unit_shared, self.gather = scaling, unit_shared, gather
        self.weight = nn.Parameter(torch.empty(dim, d_in).uniform_(-(d_in**-0.5), d_in**-0.5))
        self.centroids = nn.Parameter(
            0.02 * torch.randn(groups, d_in)
        )  # starts almost even, so that (gate * alpha) does
        self.fusion = (
            Monarch(dim, size, groups)
            if fusion == "monarch"
            else BlockDiagonal(dim, size)
            if fusion
            else None
        )
        self.auxiliary = None

    def gains(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each group is multiplied by, (..., groups), 0 where it is off, and the gates."""
        gate, self.auxiliary = route_groups(x, self.centroids, self.shared, self.active)
        gain = gate * (self.groups * gate.sum(-1, keepdim=True)) if self.scaling else gate
        if self.unit_shared:
            gain = torch.cat([torch.ones_like(gain[..., : self.shared]), gain[..., self.shared :]], -1)
        return gain, gate

    def rows(self, groups: slice) -> torch.Tensor:
        """The weights of some neighbouring groups: (groups, size, d_in)."""
        return self.weight.unflatten(0, (self.groups, self.size))[groups]

    def always(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """The gated outputs of the shared groups for tokens (n, d_in): (n, shared, size)."""
        rows = self.rows(slice(0, self.shared))
        return F.linear(x, rows.flatten(0, 1)).unflatten(-1, rows.shape[:2]) * gain[:, : self.shared, None]

    def chosen(self, x: torch.Tensor, gain: torch.Tensor, gate: torch.Tensor):
        """The gated outputs of each token's specialised groups, (n, active - shared, size), and which groups they are."""
        choice = gate[:, self.shared :].topk(self.active - self.shared, sorted=False).indices
        part = grouped_gather_linear(x, self.rows(slice(self.shared, None)), choice)
        return part * gain[:, self.shared :].gather(1, choice)[..., None], choice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_in) to (..., dim)."""
        gain, gate = self.gains(x)
        if self.gather:
            flat_x, flat_gain, flat_gate = x.flatten(0, -2), gain.flatten(0, -2), gate.flatten(0, -2)
            part, choice = self.chosen(flat_x, flat_gain, flat_gate)
            special = part.new_zeros(len(flat_x), self.groups - self.shared, self.size)
            special = special.scatter(1, choice[..., None].expand(part.shape), part)
            out = torch.cat([self.always(flat_x, flat_gain), special], 1)
            y = out.view(*x.shape[:-1], -1)
        else:
            y = (F.linear(x, self.weight).unflatten(-1, (self.groups, self.size)) * gain[..., None]).flatten(
                -2
            )
        return y if self.fusion is None else self.fusion(y)

    def activated_parameters(self) -> int:
        """How many parameters one token uses: its rows of `weight`, the router, and its part of the fusion."""
        used = self.active * self.size * self.weight.shape[1] + self.centroids.numel()
        if self.fusion is not None:
            # a group of zeros need not be multiplied, in neither factor
            across = self.groups if isinstance(self.fusion, Monarch) else 0
            used += self.active * self.size * (self.size + across)
        return used


class MoHDFFN(nn.Module):
    """A perceptron whose hidden width is a mixture: for `GPT` as `mlp=lambda dim, activation: MoHDFFN(dim, 4 * dim, ...)`.

    Without a Monarch fusion a token's other groups are zero behind the activation as well, and the second layer computes only the
    columns of its active groups. A Monarch fusion fills all groups, and the second layer is dense.

    Args:
        dim: width of input and output.
        hidden: the hidden width, a multiple of `groups`.
        groups: as in `MoHDLinear`.
        shared: as in `MoHDLinear`.
        active: as in `MoHDLinear`.
        fusion: as in `MoHDLinear`.
        scaling: as in `MoHDLinear`.
        activation: a name that `lib.models.mlp` knows, of a function with f(0) = 0.
        unit_shared: as in `MoHDLinear`.
        gather: as in `MoHDLinear`, for both layers. The hidden width is never stored as a whole, unless a Monarch fusion needs it.

    Raises:
        ValueError: as in `MoHDLinear`, or an activation that is not 0 at 0.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        groups: int,
        shared: int,
        active: int,
        fusion: str | None = "monarch",
        scaling: bool = True,
        *,
        activation: str = "gelu",
        unit_shared: bool = False,
        gather: bool = False,
    ):
        super().__init__()
        self.up = MoHDLinear(
            dim, hidden, groups, shared, active, fusion, scaling, unit_shared=unit_shared, gather=gather
        )
        self.activation = activation_module(activation)
        if self.activation(torch.zeros(1)).item() != 0:
            raise ValueError(f"activation must be 0 at 0, or inactive groups would speak: got {activation!r}")
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) to (..., dim)."""
        up = self.up
        if not up.gather or isinstance(up.fusion, Monarch):
            return self.down(self.activation(up(x)))
        flat = x.flatten(0, -2)
        gain, gate = up.gains(flat)
        columns = self.down.weight.unflatten(1, (up.groups, up.size)).movedim(1, 0)  # (groups, dim, size)
        shared, blocks = up.always(flat, gain), None if up.fusion is None else up.fusion.blocks
        part, choice = up.chosen(flat, gain, gate)
        if blocks is not None:
            shared = torch.einsum("koi,nki->nko", blocks[: up.shared], shared)
            part = grouped_gather_linear(part, blocks[up.shared :], choice)
        out = F.linear(
            self.activation(shared).flatten(1), columns[: up.shared].movedim(0, 1).flatten(1), self.down.bias
        )
        out = out + grouped_gather_linear(self.activation(part), columns[up.shared :], choice, combine=True)
        return out.view_as(x)

    def activated_parameters(self) -> int:
        """How many parameters one token uses, router, fusion and bias included."""
        width = self.up.groups if isinstance(self.up.fusion, Monarch) else self.up.active
        return (
            self.up.activated_parameters()
            + width * self.up.size * self.down.out_features
            + self.down.out_features
        )


def balance_loss(model: nn.Module) -> torch.Tensor:
    """The sum of the balance losses that the last forward pass left in a model's `MoHDLinear` layers, each counted once.

    Add it with a small weight to the training loss only.

    Raises:
        ValueError: no such layer, or one that has not been called yet.
    """
    losses = [module.auxiliary for module in model.modules() if isinstance(module, MoHDLinear)]
    if not losses or any(loss is None for loss in losses):
        raise ValueError("the model must hold MoHDLinear layers that have been called")
    return torch.stack(losses).sum()


def _check_counts(groups, shared, active):
    if not 0 <= shared <= active <= groups or active < 1:
        raise ValueError(
            f"counts must satisfy 0 <= shared <= active <= groups and active >= 1, got {shared}, {active}, {groups}"
        )
