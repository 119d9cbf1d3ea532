"""Binary patterns on a sphere with a label that does not change when the sphere is turned."""

import itertools
import math
import os

import torch


def szt_patterns(
    n_inputs: int = 12, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """All binary patterns on `n_inputs` points of a sphere, and a rotation-invariant yes or no.

    A construction in the manner of Shwartz-Ziv and Tishby (arXiv 1703.00810), whose own rule is in `szt_file`. The points
    are the vertices of an icosahedron for 12 inputs and a Fibonacci spiral else. A pattern x has the powers
    `p_l = sum_ij x_i x_j P_l(v_i . v_j)`, l = 0 ... 4, with Legendre polynomials P_l: by the addition theorem, up to a
    factor, the power of its spherical harmonics of order l, which no rotation or reflection changes. Each is divided by
    its standard deviation. The score is p_0, which is the square of the number of active points, plus 0.25 times a normal
    number times each of the others, and the label is whether the score is above its median. So, as in the original, the
    number of active points alone tells most labels.

    Args:
        n_inputs: points, 2 to 20.
        generator: of the four numbers, on the CPU.

    Returns:
        Patterns (2^n, n), float32 of 0 and 1, in binary order, and labels (2^n,), int64, about one half of them 1.

    Raises:
        ValueError: n_inputs is not between 2 and 20.
    """
    if not 2 <= n_inputs <= 20:
        raise ValueError(f"n_inputs must be between 2 and 20, got {n_inputs}")
    points = _icosahedron() if n_inputs == 12 else _spiral(n_inputs)
    patterns = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n_inputs)), dtype=torch.float64)
    cosine = points @ points.T
    legendre = [torch.ones_like(cosine), cosine]
    for order in range(2, 5):
        legendre.append(((2 * order - 1) * cosine * legendre[-1] - (order - 1) * legendre[-2]) / order)
    powers = torch.stack([((patterns @ kernel) * patterns).sum(1) for kernel in legendre], 1)
    powers = powers / powers.std(0).clamp(min=1e-12)
    weights = torch.randn(4, generator=generator, dtype=torch.float64)
    score = powers[:, 0] + 0.25 * powers[:, 1:] @ weights
    score = (score * 1e9).round()  # patterns that a rotation carries into each other agree to rounding
    return patterns.float(), (score > score.median()).long()


def szt_file(path: str | os.PathLike) -> tuple[torch.Tensor, torch.Tensor]:
    """The patterns of Shwartz-Ziv and Tishby from their MATLAB file `var_u.mat`: `F` (n, 12) and `y` (1, n).

    Returns:
        Patterns (n, d), float32, and labels (n,), int64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file lacks one of the two, or their sizes do not fit.
    """
    from scipy.io import loadmat

    content = loadmat(os.fspath(path))
    if not {"F", "y"} <= content.keys():
        raise ValueError(f"{path} must hold F and y, it has {sorted(k for k in content if k[0] != '_')}")
    patterns, labels = torch.from_numpy(content["F"]), torch.from_numpy(content["y"]).flatten()
    if patterns.ndim != 2 or len(patterns) != len(labels):
        raise ValueError(
            f"{path}: F must be (n, d) and y hold n labels, got {tuple(patterns.shape)} and {len(labels)}"
        )
    return patterns.float(), labels.long()


def _icosahedron() -> torch.Tensor:
    golden = (1 + math.sqrt(5)) / 2
    corners = [(0.0, a, b * golden) for a in (-1, 1) for b in (-1, 1)]
    turned = [corner[-k:] + corner[:-k] for corner in corners for k in (0, 1, 2)]
    points = torch.tensor(turned, dtype=torch.float64)
    return points / points.norm(dim=1, keepdim=True)


def _spiral(count: int) -> torch.Tensor:
    number = torch.arange(count, dtype=torch.float64)
    z = 1 - (2 * number + 1) / count
    angle = number * math.pi * (3 - math.sqrt(5))
    radius = (1 - z**2).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin(), z], 1)
