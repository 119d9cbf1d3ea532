"""What the tests of all kernels share: the device, tolerances, poisoned memory, tensors with far rows."""

import math

import numpy as np
import pytest
import torch

import kernels

if not kernels.HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# relative to the largest entry, for sums of a few hundred products; the interpreter cuts bfloat16 off instead of rounding
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture
def poison(monkeypatch):
    """Memory that is handed out uninitialised holds nan, so that an element that is not written shows."""

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def randn(*shape, dtype=torch.float32, scale=1.0, seed=0, grad=False):
    """Normal numbers on the device of the tests, the same on every machine."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale
    return numbers.to(DEVICE, dtype).requires_grad_(grad)


def assert_near(found, exact, dtype=None, factor=1.0):
    """Within `factor` times the tolerance of the dtype, relative to the largest exact entry; nan is never near."""
    tolerance = factor * TOLERANCE[found.dtype if dtype is None else dtype]
    assert found.shape == exact.shape
    if exact.numel():
        error = (found.double() - exact.double()).abs().max().item()
        assert error <= tolerance * max(exact.double().abs().max().item(), 1e-6), error


def far_rows(values: torch.Tensor) -> torch.Tensor:
    """The same matrix as a view whose last row begins beyond element 2^31 of its memory.

    An index computed in 32 bits wraps around there. Only the pages that are written count as memory.
    """
    rows, columns = values.shape
    stride = 2**31 // max(rows - 1, 1) + columns
    count = stride * (rows - 1) + columns
    if values.is_cuda:
        whole = torch.empty(count, dtype=values.dtype, device=values.device)
    else:
        numpy_dtype = {2: np.int16, 4: np.int32}[values.element_size()]
        whole = torch.from_numpy(np.zeros(count, numpy_dtype)).view(values.dtype)
    view = whole.as_strided((rows, columns), (stride, 1))
    view.copy_(values)
    return view


class Grid:
    """In place of a kernel: keeps the grid of a launch and launches nothing."""

    def __getitem__(self, grid):
        self.sizes = grid
        return lambda *args, **kwargs: None

    def fits(self) -> bool:
        """Whether CUDA takes it: dimensions after the first end at 65535."""
        return 0 < self.sizes[0] < 2**31 and all(0 < size < 2**16 for size in self.sizes[1:])
