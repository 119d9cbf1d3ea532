import pytest
import torch
from torch import nn

from lib.interp import jacobian_support


def test_support_of_a_convolution_and_of_a_linear_map():
    support = jacobian_support(
        nn.Conv1d(1, 1, 3, padding=1).double().eval(), torch.randn(1, 5, dtype=torch.float64)
    )
    place = torch.arange(5)
    assert torch.equal(support[0, :, 0], (place - place[:, None]).abs() <= 1)
    matrix = torch.tensor([[1.0, 0.0], [1e-4, 2.0]])
    assert jacobian_support(lambda x: matrix @ x, torch.ones(2)).tolist() == [[True, False], [True, True]]
    assert jacobian_support(lambda x: matrix @ x, torch.ones(2), tolerance=1e-3).sum() == 2


def test_bad_input():
    with pytest.raises(ValueError, match="eval"):
        jacobian_support(nn.Linear(2, 2), torch.ones(2))
    with pytest.raises(ValueError, match="tolerance"):
        jacobian_support(torch.sin, torch.ones(2), tolerance=-1)
    with pytest.raises(TypeError, match="floating"):
        jacobian_support(torch.sin, torch.ones(2, dtype=torch.long))
