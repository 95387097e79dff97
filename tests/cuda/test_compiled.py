"""A compiled model through a cut; a file of its own, since compiling takes so long."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_compressm import CompreSSMCallback
from tests.callbacks.helpers import Classifier, loader
from tests.cuda.test_training import CUT, there

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("whole", [True, False])
def test_compiled(device: torch.device, tmp_path: Path, whole: bool) -> None:
    """The same dimensions, and losses that differ by rounding, as without torch.compile."""
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "eager"
    runs = []
    for compiled in (False, True):
        model, callback = Classifier(dtype="float32"), CompreSSMCallback(**CUT)
        fit = there(tmp_path, device, callback)
        if compiled and not whole:
            model.net.encoder = torch.compile(model.net.encoder, backend=backend)
            model.net.first = torch.compile(model.net.first, backend=backend)
        outer = torch.compile(model, backend=backend) if compiled and whole else model
        fit.fit(outer, loader())
        runs.append((list(callback.state_dims.values()), model.losses))
    assert runs[0][0] == runs[1][0] == [4, 4]
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-2, atol=1e-2)
