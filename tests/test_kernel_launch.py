"""What every kernel chooses before a launch."""

import pytest
import torch
from kernel_support import randn

from kernels._launch import dot_options


@pytest.fixture
def precision():
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "setting, allowed",
    [("highest", False), ("high", True), ("medium", True), ("ieee", False), ("tf32", True), (None, False)],
)
def test_float32_follows_either_way_of_setting_the_precision(setting, allowed, precision):
    if setting in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = setting
    elif setting:
        torch.set_float32_matmul_precision(setting)
    assert dot_options(randn(1))["PRECISION"] == ("tf32" if allowed else "ieee")
    assert dot_options(randn(1, dtype=torch.bfloat16))["PRECISION"] == "ieee"
