"""What tests of benchmarks share."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import pytest

from lightning_compressm.compat import enable_mamba_ssm_cpu


@pytest.fixture(scope="session")
def mamba_ssm() -> None:
    """Skip where it is missing."""
    if find_spec("mamba_ssm") is None:
        pytest.skip("mamba-ssm is missing")
    enable_mamba_ssm_cpu()
    import_module("mamba_ssm")
