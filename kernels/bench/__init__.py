"""Benchmarks: one module an operation, and the harness that runs them, `python -m kernels.bench`.

The module kernels/bench/<operation>.py of an operation defines

- `SIZES`: for "cpu" and "cuda" a list of sizes, dictionaries of keyword arguments, from small to full;
- `inputs(device, dtype, **size)`: the tensors of one run by name, those that get a gradient with `requires_grad`;
- `peers(device, **size)`: by name what is compared, functions of the inputs that return a tensor. The first is the
  baseline, plain PyTorch. Names that start with "book" are this project's: "book, triton" is the kernel. What another
  package offers carries the package's name, is there only where the package is installed, and imports it when called;
- `work(element_bytes, **size)`: of the kernel, "forward_bytes" and "forward_flops", and where there is a gradient
  "backward_bytes" and "backward_flops": what it reads and writes at the least, and its operations.

Without a gradient no input has `requires_grad`. The harness adds torch.compile of the baseline on a GPU.
"""

import pkgutil


def operations() -> list[str]:
    """The names of all operations, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
