"""What older versions of torch and Lightning lack; tests that need it are skipped there."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from packaging.version import Version

_RECENT = {name.lower(): name for name in ("Adafactor", "Muon")}

needs_strict_ranks = pytest.mark.skipif(
    not hasattr(pl.strategies.DDPStrategy(), "_pl_static_graph_delay_done"),
    reason="manual optimization with static_graph: ranks drift apart below Lightning 2.6",
)


def from_lightning(version: str, reason: str) -> pytest.MarkDecorator:
    """Skips a test where an older Lightning does something wrong by itself."""
    return pytest.mark.skipif(Version(pl.__version__) < Version(version), reason=reason)


def from_torch(version: str, reason: str) -> pytest.MarkDecorator:
    """Skips a test of what an older torch does in another way."""
    return pytest.mark.skipif(Version(torch.__version__) < Version(version), reason=reason)


def needs(owner: ModuleType, name: str) -> pytest.MarkDecorator:
    """Skips a test where a module has no such name."""
    return pytest.mark.skipif(
        not hasattr(owner, name), reason=f"{owner.__name__}.{name} is not in this version"
    )


def optimizers(names: Iterable[str]) -> list[Any]:
    """Names of torch's optimizers as parameters, those marked that came late."""
    names = list(names)
    marks = {n: needs(torch.optim, _RECENT[n.lower()]) for n in names if n.lower() in _RECENT}
    return [pytest.param(n, marks=marks[n]) if n in marks else n for n in names]


needs_ema = needs(pl.callbacks, "EMAWeightAveraging")
needs_crc32_options = needs(torch.serialization, "get_crc32_options")
