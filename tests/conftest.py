"""For all tests: one thread, fixed seeds, quiet Lightning, a temporary working directory."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# The variable that lets `python -m benchmarks.gpu --dry-run` run tests for CUDA on the CPU.
REHEARSAL = "COMPRESSM_REHEARSAL"

# Inherited by the processes that tests start, and set before anything imports matplotlib.
os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"  # where forks are made, threads of a pool would be missed
# Without it, older versions of torch refuse matrix products on CUDA that must be repeatable.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)

if find_spec("hypothesis"):  # the tests marked `cuda` do without
    import hypothesis

    hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
    hypothesis.settings.register_profile(
        "ci", deadline=None, max_examples=50, derandomize=True, print_blob=True
    )
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") in ("true", "1") else "dev")

torch.set_num_threads(1)
for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(name).setLevel(logging.ERROR)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device; a rehearsal runs on the CPU what can be run there."""
    if torch.cuda.is_available():
        return
    rehearsed = bool(os.environ.get(REHEARSAL))
    for item in items:
        fixtures: list[str] = getattr(item, "fixturenames", [])
        if item.get_closest_marker("cuda") and not (rehearsed and "device" in fixtures):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seed every generator, and give the next test torch's global settings as they were."""
    dtype = torch.get_default_dtype()
    random.seed(0)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=False)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _environment_stays() -> Iterator[None]:
    """A DDP Trainer sets LOCAL_RANK and others; processes started later would not start theirs."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _runs_in_tmp_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer without `default_root_dir` writes checkpoints and logs to the working directory."""
    monkeypatch.chdir(tmp_path)
