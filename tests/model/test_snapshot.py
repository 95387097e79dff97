"""Going back to kept values after the shape has changed."""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_compressm import compress
from lightning_compressm.errors import SurgeryError
from lightning_compressm.families import registered_families
from lightning_compressm.model.change import change
from lightning_compressm.model.snapshot import Snapshot
from lightning_compressm.nn import LRU
from tests.deciding import decided
from tests.features import optimizers

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=1e-2, max_iter=2),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(3)
        self.lru = LRU(3, 12)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.lru(self.norm(x.mT).mT)


def train(model: nn.Module, optimizer: Any, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 10, 3, generator=generator)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("name", optimizers(OPTIMIZERS))
def test_training_after_going_back_is_bitwise_that_of_before(name: str, tmp_path: Any) -> None:
    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())
    average = AveragedModel(model)
    train(model, optimizer, 3, seed=1)
    average.update_parameters(model)
    snapshot = Snapshot.take(model, [optimizer], [average])
    torch.save(snapshot.to_dict(), tmp_path / "kept.pt")
    averaged = deepcopy(average.state_dict())
    twin_state = deepcopy((model.state_dict(), optimizer.state_dict()))

    train(model, optimizer, 3, seed=2)
    after = (deepcopy(model.state_dict()), model.count.item())

    twin = Net()
    twin_optimizer = OPTIMIZERS[name](twin.parameters())
    twin.load_state_dict(twin_state[0])
    twin_optimizer.load_state_dict(twin_state[1])
    assert snapshot.model["count"] == after[1] - (6 if name == "lbfgs" else 3)

    plan = decided(model, state_dim=4).plan
    change(model, plan, [optimizer], averages=[average])
    train(model, optimizer, 2, seed=3)
    average.update_parameters(model)
    loaded = Snapshot.from_dict(torch.load(tmp_path / "kept.pt", weights_only=True))
    loaded.restore(model, [optimizer], [average])
    assert model.lru.d_state == average.module.lru.d_state == 12
    assert all(torch.equal(v, averaged[k]) for k, v in average.state_dict().items())
    for net, opt in ((model, optimizer), (twin, twin_optimizer)):
        train(net, opt, 3, seed=2)
    for key, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("name", sorted(registered_families()))
def test_every_family_grows_back(name: str) -> None:
    torch.manual_seed(0)
    family = registered_families()[name]
    layer, inputs = family.example(d_state=8)
    n = family.state_dim(layer)
    snapshot, before = Snapshot.take(layer), layer(inputs)
    compress(layer, state_dim=3, sample=inputs, max_output_error=None)
    assert family.state_dim(layer) == 3
    snapshot.restore(layer)
    assert family.state_dim(layer) == n
    after = layer(inputs)

    def first(out: Any) -> torch.Tensor:
        return out[0] if isinstance(out, tuple) else out

    assert torch.equal(first(before), first(after))


class Twins(nn.Module):
    """Two layers that share all their tensors."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.second = layer, deepcopy(layer)
        pairs = zip(self.first.modules(), self.second.modules(), strict=True)
        for one, two in pairs:
            two._parameters.update(one._parameters)
            two._buffers.update(one._buffers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.first(*args, **kwargs)
        return self.second(*args, **kwargs)


@pytest.mark.parametrize("name", sorted(registered_families()))
def test_tied_layers_grow_back_both(name: str) -> None:
    torch.manual_seed(0)
    family = registered_families()[name]
    layer, inputs = family.example(d_state=8)
    model = Twins(layer)
    n = family.state_dim(layer)
    attributes = [_plain_attributes(module) for module in (model.first, model.second)]
    snapshot = Snapshot.take(model)
    compress(model, state_dim=3, sample=inputs, max_output_error=None)
    assert family.state_dim(model.first) == family.state_dim(model.second) == 3
    snapshot.restore(model)
    assert family.state_dim(model.first) == family.state_dim(model.second) == n
    assert [_plain_attributes(module) for module in (model.first, model.second)] == attributes
    model(inputs)


def _plain_attributes(module: nn.Module) -> list[dict[str, int]]:
    return [
        {name: value for name, value in vars(part).items() if type(value) is int}
        for part in module.modules()
    ]


def test_undo_and_failure_leave_everything() -> None:
    model = Net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, 2, seed=1)
    snapshot = Snapshot.take(model, [optimizer])
    change(model, decided(model, state_dim=4).plan, [optimizer])
    train(model, optimizer, 2, seed=2)
    objects = list(model.parameters())
    values = deepcopy(model.state_dict())
    states = deepcopy(optimizer.state_dict()["state"])

    def unchanged() -> bool:
        same = all(a is b for a, b in zip(objects, model.parameters(), strict=True))
        equal = all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
        now = optimizer.state_dict()["state"]
        kept = all(torch.equal(states[i][k], now[i][k]) for i in states for k in states[i])
        return same and equal and kept and model.lru.d_state == 4

    with ExitStack() as undo:
        snapshot.restore(model, [optimizer], undo=undo)
        assert model.lru.d_state == 12
    assert unchanged()
    with pytest.raises(SurgeryError, match="expected 1 optimizers as when the state was kept"):
        snapshot.restore(model, [])
    model.extra = nn.Linear(1, 1)
    with pytest.raises(SurgeryError, match=r"extra\.bias"):
        snapshot.restore(model, [optimizer])
    del model.extra
    assert unchanged()
