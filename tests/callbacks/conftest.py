"""What Trainers leave behind in the process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _environment_stays() -> Iterator[None]:
    """A DDP Trainer sets LOCAL_RANK and others; processes started later would not start theirs."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
