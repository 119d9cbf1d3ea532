"""Every kernel compiles for a GPU, at the shapes of its benchmarks, within the GPU's registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kernels
from kernels.bench import operations

SHARED = 227 * 1024  # bytes that a block may have on an H100
SPILLS = {"bfloat16": 0, "float32": 64}  # bytes a thread; a few words cost nothing


@pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("operation", operations())
def test_compiles_for_an_h100(operation, tmp_path):
    script = Path(__file__).with_name("compile_kernels.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script, operation], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    # an operation without a kernel of its own is measured too
    assert compiled or not (Path(kernels.__file__).parent / f"{operation}.py").exists()
    for kernel in compiled:
        assert kernel["shared"] <= SHARED and kernel["spills"] <= SPILLS[kernel["dtype"]], kernel
