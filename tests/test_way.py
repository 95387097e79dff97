"""The way of one reduction: how many functions it passes, what it does once, who walks it."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from torch import nn

import lightning_compressm
from lightning_compressm import CompreSSMCallback, compress
from lightning_compressm.nn import LRU
from lightning_compressm.surgery import apply
from tests.callbacks.helpers import Classifier, loader, trainer

PACKAGE = Path(lightning_compressm.__file__).parent
MOST = 20


def _place(code: CodeType) -> str | None:
    """A file's path within the package."""
    path = code.co_filename
    return os.path.relpath(path, PACKAGE) if path.startswith(f"{PACKAGE}{os.sep}") else None


def _is_station(code: CodeType) -> bool:
    """Mathematics, architectures and the tools of the lowest floor are rooms of their own.

    Private functions and those of private classes are a file's own.
    """
    aside = _place(code).startswith(("control", "families", "errors", "_"))  # type: ignore[union-attr]
    return not (aside or any(part.startswith(("_", "<")) for part in code.co_qualname.split(".")))


def stations(work: Callable[[], Any]) -> Counter[str]:
    """Functions with public names that are called before the first tensor is assigned."""
    found: Counter[str] = Counter()
    end = apply._set_tensor.__code__
    arrived: list[bool] = []

    def watch(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or arrived or _place(code) is None:
            return
        if code is end:
            arrived.append(True)
        elif _is_station(code):
            found[f"{_place(code)}:{code.co_qualname}"] += 1

    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
    assert arrived, "nothing was reduced"
    return found


def test_compress_passes_no_more_functions_and_selects_layers_once():
    layer = LRU(4, 16)
    compress(LRU(4, 8), state_dim=4)  # what is imported late is there
    passed = stations(lambda: compress(layer, state_dim=4))
    assert len(passed) <= MOST, sorted(passed)
    assert passed["model/layers.py:select_layers"] == 1
    assert passed["model/layers.py:find_ssm_layers"] == 1


def test_a_look_in_training_passes_the_same_ones(tmp_path: Path):
    alone = stations(lambda: compress(nn.Sequential(LRU(4, 16)), state_dim=4))
    callback = CompreSSMCallback(state_dim=4, layers=["net.first"], window=(0, 2), verbose=False)
    fit = trainer(tmp_path, callback, max_epochs=2)
    passed = stations(lambda: fit.fit(Classifier(), loader()))
    # A Trainer's processes have an `agree` and a `together` of their own.
    way = {n for n in alone if n.startswith(("reduction", "model")) and "processes.py" not in n}
    assert len(way) >= 10
    assert way <= set(passed), way - set(passed)
