"""Models on another device: nothing is computed with tensors of two devices at once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from lightning_compressm import CompreSSMCallback, HankelRegularizer, compress, hankel_spectra
from lightning_compressm.families import registered_families
from tests.callbacks.helpers import Classifier, Plain, loader, trainer
from tests.elsewhere import ELSEWHERE, Claiming, Watching, here, pretend


@pytest.fixture(autouse=True)
def _pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


def test_mixing_is_noticed() -> None:
    with Watching():
        there = torch.ones(3, device=ELSEWHERE)
        assert here(there + there.new_tensor([1.0, 2.0, 3.0])).tolist() == [2, 3, 4]
        with pytest.raises(RuntimeError, match="same device"):
            _ = there + torch.ones(3)


def run(layer: nn.Module, inputs: Tensor) -> tuple[str, list[Tensor]]:
    """Spectra, a cut with an optimizer carried along, and the layer after a further step."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    spectra = list(hankel_spectra(layer, sample=inputs).values())
    _output(layer, inputs).square().mean().backward()
    optimizer.step()
    report = compress(
        layer, state_dim=5, sample=inputs, max_output_error=None, optimizers=[optimizer]
    )
    optimizer.zero_grad()
    _output(layer, inputs).square().mean().backward()
    optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
    kinds = {isinstance(t, Claiming) for t in [*layer.parameters(), *moments]}
    assert kinds == {isinstance(inputs, Claiming)}
    return report.events[0].action, [here(t) for t in (*spectra, _output(layer, inputs))]


def _output(layer: nn.Module, inputs: Tensor) -> Tensor:
    found = layer(inputs)
    return found if isinstance(found, Tensor) else found[0]


@pytest.mark.parametrize("name", registered_families())
def test_every_family(name: str) -> None:
    layer, inputs = registered_families()[name].example(d_state=16)
    twin = copy.deepcopy(layer)
    action, expected = run(layer, inputs)
    with Watching():
        again, found = run(twin.to(ELSEWHERE), inputs.to(ELSEWHERE))
    assert again == action == "reduce"
    for one, other in zip(found, expected, strict=True):
        # Elsewhere layers take other forms, which round in another way.
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["LRU", "S4D", "S5"])
def test_a_penalty(name: str) -> None:
    layer, _ = registered_families()[name].example(d_state=6)
    gradients = []
    for where in (torch.device("cpu"), ELSEWHERE):
        with Watching():
            model = copy.deepcopy(layer).to(where)
            HankelRegularizer(0.1)(model).backward()
            gradients.append([here(p.grad) for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"state_dim": 4, "window": (0.0, 0.5)},
        {"state_dim": 4, "window": (0.0, 0.5), "monitor": "val_loss", "mode": "max",
         "max_degradation": 0.0},
    ],
    ids=["tried", "cut", "taken back"],
)  # fmt: skip
@pytest.mark.parametrize("make", [Classifier, Plain])
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*took the last reduction back.*")
def test_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: type[Classifier], settings: Any
) -> None:
    """Losses and decisions are those of the CPU."""
    monkeypatch.setattr(CPUAccelerator, "setup_device", lambda self, device: None)
    runs = []
    for where in (torch.device("cpu"), ELSEWHERE):
        with Watching():
            model, callback = make(), CompreSSMCallback(**settings, verbose=False)
            strategy = SingleDeviceStrategy(where, accelerator=CPUAccelerator())
            fit = trainer(tmp_path, callback, strategy=strategy, accelerator="auto", max_epochs=5)
            fit.fit(model, loader(), loader(1))
        runs.append((model.losses, [(e["action"], e["new_state_dim"]) for e in callback.history]))
    (losses, history), (others, again) = runs
    assert again == history
    assert any(action == "reduce" for action, _ in history)
    torch.testing.assert_close(others, losses, rtol=1e-6, atol=1e-6)
