"""The Triton kernel without a GPU: interpreted on the CPU, and compiled for GPUs but not run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.slow

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lightning_compressm.nn import _triton
# Rows of an odd number of states begin anywhere; torch's own allocations at multiples of 16.
aligned = {(i,): [["tt.divisibility", 16]] for i in range(5)}
for capability, attributes in ((80, {}), (90, {}), (90, aligned)):
    for real in ("*fp32", "*fp64"):
        for adjoint in (False, True):
            pointers = dict.fromkeys(("x_ptr", "powers_ptr", "other_ptr", "product_ptr"), real)
            fixed = {"REVERSE": adjoint, "PRODUCT": adjoint}
            fixed |= {"STEPS": _triton.STEPS, "STATES": _triton.STATES}
            signature = pointers | {"length": "i32", "count": "i32"}
            signature |= dict.fromkeys(fixed, "constexpr")
            source = ASTSource(_triton._scan_kernel, signature, constexprs=fixed, attrs=attributes)
            target = GPUTarget("cuda", capability, 32)
            kernel = triton.compile(source, target=target, options={"num_warps": 1})
            assert kernel.asm["cubin"]
            # One state a lane: nothing goes from lane to lane.
            assert kernel.metadata.shared == 0 and "shfl" not in kernel.asm["ptx"]
"""


def run_python(*arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_interpreted_kernel_equals_the_loop():
    """Triton reads the variable when it is imported, so the tests need a process of their own."""
    path = Path(__file__).with_name("interpreted_triton.py")
    run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(path), TRITON_INTERPRET="1")


def test_the_kernel_compiles_for_gpus_that_are_not_there(tmp_path: Path):
    run_python("-c", COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
