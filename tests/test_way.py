"""One reduction is a short way: few functions that call each other across files, walked once."""

from __future__ import annotations

import inspect
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
from lightning_compressm.model.layers import SSMLayer
from lightning_compressm.nn import LRU
from lightning_compressm.surgery import apply
from tests.callbacks.helpers import Classifier, loader, trainer

PACKAGE = Path(lightning_compressm.__file__).parent
MOST = 20


def _place(code: CodeType) -> str | None:
    """A file's path within the package."""
    path = code.co_filename
    return os.path.relpath(path, PACKAGE) if path.startswith(f"{PACKAGE}{os.sep}") else None


_PROPERTIES = {
    value.fget.__code__ for value in vars(SSMLayer).values() if isinstance(value, property)
}


def _is_station(code: CodeType) -> bool:
    """Mathematics and architectures are rooms of their own; checks and blocks lead nowhere."""
    aside = _place(code).startswith(("control", "families", "_"))  # type: ignore[union-attr]
    check = code.co_name.startswith(("check", "refuse", "_", "<"))
    block = code.co_flags & inspect.CO_GENERATOR
    return not (aside or check or block or code in _PROPERTIES)


def _caller(frame: FrameType | None) -> str | None:
    """The file of ours that a call comes from, through whatever lies between."""
    while frame is not None:
        if (place := _place(frame.f_code)) is not None:
            return place
        frame = frame.f_back
    return None


def stations(work: Callable[[], Any]) -> Counter[str]:
    """Functions that are entered from another file before the first tensor is assigned."""
    found: Counter[str] = Counter()
    end = apply._set_tensor.__code__
    arrived: list[bool] = []

    def watch(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or arrived or _place(code) is None:
            return
        if code is end:
            arrived.append(True)
        elif _is_station(code) and _caller(frame.f_back) != _place(code):
            found[f"{_place(code)}:{code.co_qualname}"] += 1

    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
    assert arrived, "nothing was reduced"
    return found


def test_compress_passes_few_functions_and_selects_layers_once():
    layer = LRU(4, 16)
    compress(LRU(4, 8), state_dim=4)  # what is imported late is there
    passed = stations(lambda: compress(layer, state_dim=4))
    assert len(passed) <= MOST, sorted(passed)
    assert passed["model/layers.py:select_layers"] == 1
    assert len({name.partition(":")[0] for name in passed}) <= 14, sorted(passed)


def test_a_look_in_training_passes_the_same_ones(tmp_path: Path):
    alone = stations(lambda: compress(nn.Sequential(LRU(4, 16)), state_dim=4))
    callback = CompreSSMCallback(state_dim=4, layers=["net.first"], window=(0, 2), verbose=False)
    fit = trainer(tmp_path, callback, max_epochs=2)
    passed = stations(lambda: fit.fit(Classifier(), loader()))
    # A Trainer's processes have an `agree` and a `together` of their own.
    way = {n for n in alone if n.startswith(("reduction", "model")) and "processes.py" not in n}
    assert len(way) >= 10
    assert way <= set(passed), way - set(passed)
