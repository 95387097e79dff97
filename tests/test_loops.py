"""Reductions in training without a Lightning Trainer: plain loops, Fabric, transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_compressm import CompreSSMCallback, compress, find_ssm_layers
from lightning_compressm.nn import LRU

from .callbacks.helpers import same, trainer
from .processes import run_pair
from .test_docs import blocks

PAGE = Path(__file__).parents[1] / "docs" / "other-loops.md"
STEPS, CUT_AT = 10, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.lru = nn.Linear(1, 4, dtype=torch.float64), LRU(4, 16).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.lru(self.encoder(x))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 20, 1, generator=generator).double() for _ in range(STEPS)]


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return (model(x) - x.cumsum(1)).square().mean()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adam(self.net)


def test_a_plain_loop_is_what_the_callback_does(tmp_path: Path) -> None:
    """The same cut after the same step: bitwise the same parameters at the end."""
    model = Net()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    for step, x in enumerate(batches(), 1):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
        scheduler.step()
        if step == CUT_AT:
            compress(model, state_dim=6, sample=x, balance="folded", optimizers=[optimizer])
    callback = CompreSSMCallback(
        state_dim=6, window=(CUT_AT - 1, CUT_AT), every_n_steps=CUT_AT, verbose=False
    )
    other = Module()
    data = torch.utils.data.DataLoader(torch.cat(batches()), batch_size=4)
    trainer(tmp_path, callback, max_epochs=1).fit(other, data)
    assert callback.state_dims == {"net.lru": 6}
    assert same(model.state_dict(), other.net.state_dict())


def through_fabric(fabric: Fabric, path: Path | None = None) -> nn.Module:
    model, optimizer = fabric.setup(bare := Net(), adam(bare))
    for step, x in enumerate(batches(), 1):
        own = x[fabric.global_rank :: fabric.world_size]
        optimizer.zero_grad()
        fabric.backward(loss_of(model, own))
        optimizer.step()
        if step == CUT_AT:
            bare, inner = model.module, optimizer.optimizer
            compress(bare, state_dim=6, sample=x, balance="folded", optimizers=[inner])
            model, optimizer = fabric.setup(bare, inner)
    if path is not None:
        torch.save(bare.state_dict(), path)
    return bare


def test_fabric_in_one_process_and_in_two(tmp_path: Path) -> None:
    """Two processes end alike, and as one that has all their data."""
    one = through_fabric(Fabric(accelerator="cpu", devices=1))
    assert one.lru.d_state == 6
    run_pair("fabric_worker", tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(first, second)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-6)


def test_transformers_trainer(tmp_path: Path) -> None:
    """By the callback on the page: it trains on, saves, and what is saved is read again."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    space: dict[str, Any] = {"compress": compress}
    exec(next(code for _, _, code in blocks(PAGE.read_text()) if "CutStates" in code), space)
    config = transformers.MambaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, state_size=8
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(0, 20, (24, 15))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    after: list[Tensor] = []

    class Watch(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            after.append(model.backbone.layers[0].mixer.A_log.detach().clone())

    cut = space["CutStates"]({2}, {"input_ids": tokens[:4]}, state_dim=3)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    run = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[cut, Watch()])
    run.train()
    assert {layer.state_dim for layer in find_ssm_layers(model).values()} == {3}
    assert [tuple(a.shape) for a in after] == [(32, 8)] + [(32, 3)] * 5
    assert not torch.equal(after[1], after[2])  # the optimizer holds the new parameters
    run.save_model(str(tmp_path / "small"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert again.config.state_size == 3
    assert torch.equal(again.eval()(tokens[:2]).logits, model.eval()(tokens[:2]).logits)
