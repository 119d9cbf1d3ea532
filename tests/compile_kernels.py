"""Compile for a GPU what the benchmarks would launch on it. No GPU is needed::

    TRITON_INTERPRET=0 python tests/compile_kernels.py [--capability 90] operation …

Every peer named "book, triton" runs forward and backward on tensors without memory that claim to be on CUDA, at every
"cuda" size of its benchmark, in bfloat16 and float32. Each launch is compiled down to the machine code of the GPU instead of
being made. Prints a line of JSON for every kernel: its name, warps, bytes of shared memory, registers of a thread and
bytes that did not fit in them (spills).
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, MockTensor


class AbsentGPU:
    """What Triton asks its driver before it compiles."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")

    def get_device_interface(self):
        return torch.cuda


class Properties:
    multi_processor_count = 132
    major, minor = 9, 0


def pretend():
    """Tensors on the meta device say that they are on CUDA, and their entries, where host code reads one, are 0."""
    torch.cuda.current_device = lambda: None  # the index of the meta device
    torch.cuda.get_device_properties = lambda device=None: Properties
    torch.Tensor.is_cuda = property(lambda self: True)
    torch.Tensor.item = lambda self: 0
    for method, zero in {"__int__": 0, "__index__": 0, "__bool__": False, "__float__": 0.0}.items():
        setattr(torch.Tensor, method, lambda self, zero=zero: zero)


def resources(compiled):
    """Registers a thread and bytes of spill stores, from the assembler."""
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        architecture = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
        command = [assembler, "-v", f"--gpu-name={architecture}", source, "-o", Path(folder) / "out"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"Used (\d+) registers", said)[1]), int(re.search(r"(\d+) bytes spill st", said)[1])


def compile_instead_of_launching(label):
    """Every launch from now on prints what it compiled to, with the entries of `label`, and launches nothing."""
    launch, seen = JITFunction.run, set()

    def mock(argument):
        is_tensor = isinstance(argument, torch.Tensor)
        return MockTensor(argument.dtype, list(argument.shape)) if is_tensor else argument

    def run(self, *arguments, grid, warmup, **options):
        options = {name: mock(value) for name, value in options.items()}
        compiled = launch(self, *map(mock, arguments), grid=grid, warmup=True, **options)
        if compiled is not None and compiled.hash not in seen:
            seen.add(compiled.hash)
            registers, spills = resources(compiled)
            found = dict(
                kernel=self.__name__, warps=compiled.metadata.num_warps, shared=compiled.metadata.shared
            )
            print(json.dumps(label | found | dict(registers=registers, spills=spills)), flush=True)
        return compiled

    JITFunction.run = run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operations", nargs="+", metavar="operation")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU; 90 is an H100")
    options = parser.parse_args()
    driver.set_active(AbsentGPU(options.capability))
    pretend()
    label = {}
    compile_instead_of_launching(label)
    for operation in options.operations:
        module = importlib.import_module(f"kernels.bench.{operation}")
        for dtype in (torch.bfloat16, torch.float32):
            label.update(operation=operation, dtype=str(dtype).removeprefix("torch."))
            for size in module.SIZES["cuda"]:
                peer = module.peers("cuda", **size).get("book, triton")
                if peer is None:
                    continue
                tensors = module.inputs("meta", dtype, **size)
                result = peer(**tensors)
                if any(tensor.requires_grad for tensor in tensors.values()):
                    result.backward(torch.empty_like(result))


if __name__ == "__main__":
    main()
