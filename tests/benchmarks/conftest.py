"""For the tests of benchmarks: many small trainings and reductions in one process."""

from __future__ import annotations

import gc
from importlib import import_module
from importlib.util import find_spec

import pytest

from lightning_compressm.compat import enable_mamba_ssm_cpu


@pytest.fixture(autouse=True, scope="session")
def _imports_are_no_garbage() -> None:
    """A reduction in training collects garbage; all that was imported need not be searched."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def mamba_ssm() -> None:
    """Skip where it is missing; it imports so much that the same holds for it."""
    if find_spec("mamba_ssm") is None:
        pytest.skip("mamba-ssm is missing")
    enable_mamba_ssm_cpu()
    import_module("mamba_ssm")
    gc.freeze()
