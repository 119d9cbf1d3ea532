"""Fused Triton kernels: one module an operation, forward and backward. Imports torch and triton, nothing else.

On a machine without a GPU the kernels run in Triton's interpreter, which is chosen here, before any kernel
module imports triton. `HAS_TRITON` says whether Triton can be imported at all.
"""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

HAS_TRITON = importlib.util.find_spec("triton") is not None
