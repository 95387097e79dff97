"""The device under test."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from lightning_compressm.nn import _forms
from tests.conftest import REHEARSAL


@pytest.fixture
def device() -> torch.device:
    """CUDA; in a rehearsal the CPU, so that a test says nothing but that it runs."""
    return torch.device(os.environ.get(REHEARSAL) or "cuda")


@pytest.fixture
def cuda() -> torch.device:
    """CUDA, also in a rehearsal: tests that ask for it are skipped there."""
    return torch.device("cuda")


@pytest.fixture
def triton_scan(cuda: torch.device) -> None:
    """Skip where the kernel isn't made for the card; where it is, it has to be chosen."""
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        pytest.skip("Triton is missing")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the kernel is for compute capability 8.0 and later")
    where = torch.empty(0, device=cuda).device
    assert _forms.form_for(where, torch.complex64).name == "triton"
