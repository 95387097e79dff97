"""A small real training task, shared by the callback tests and the DDP workers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compressm.nn import LRU
from lightning_compressm.nn._mamba import MambaBlock

LENGTH, CLASSES, BATCH, BATCHES = 20, 3, 8, 6


def dataset(seed: int = 0) -> TensorDataset:
    """Noisy sines of three frequencies."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(BATCH * BATCHES) % CLASSES
    t = torch.arange(LENGTH) / LENGTH
    phase = torch.rand(len(y), 1, generator=generator) * 6.28
    x = torch.sin(6.28 * (1 + 2 * y[:, None]) * t + phase)
    x = x + 0.1 * torch.randn(x.shape, generator=generator)
    return TensorDataset(x[..., None].double(), y)


def loader(seed: int = 0) -> DataLoader[Any]:
    return DataLoader(dataset(seed), batch_size=BATCH)


class StatefulLoader:
    """Goes on in the middle of an epoch, which a plain DataLoader can't."""

    def __init__(self) -> None:
        self.batches, self.position = list(loader()), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        if self.position == len(self.batches):  # the last epoch was finished
            self.position = 0
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.position = state_dict["position"]


class Net(nn.Module):
    """Two LRU layers with unlike spectra between linear maps."""

    def __init__(self, d_state: int = 24, d_model: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, d_model)
        self.first = LRU(d_model, d_state)
        self.second = LRU(d_model, d_state // 2)
        self.decoder = nn.Linear(d_model, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        x = x + self.first(x)
        x = x + self.second(torch.tanh(x))
        return self.decoder(x.mean(1))


class Classifier(pl.LightningModule):
    """Trains :class:`Net`; each rank takes its share of the same global batch."""

    def __init__(
        self, optimizer: str = "adamw", d_state: int = 24, dtype: str = "float64", lr: float = 1e-2
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = Net(d_state).to(getattr(torch, dtype))
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = (t[self.global_rank :: self.trainer.world_size] for t in batch)
        loss = nn.functional.cross_entropy(self.net(x.to(self.net.encoder.weight.dtype)), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x.to(self.net.encoder.weight.dtype)), y)
        self.log("val_loss", loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        lr, params = self.hparams["lr"], self.parameters()
        make = {
            "sgd": lambda: torch.optim.SGD(params, lr=lr, momentum=0.9),
            "adamw": lambda: torch.optim.AdamW(params, lr=lr),
            "adamw_fused": lambda: torch.optim.AdamW(params, lr=lr, fused=True),
            "lbfgs": lambda: torch.optim.LBFGS(params, lr=lr, max_iter=2),
        }
        optimizer = make[self.hparams["optimizer"]]()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class SteppedByHand(pl.LightningModule):
    """Put before a module whose training_step gives a loss: its optimizers are stepped by hand."""

    automatic_optimization = False  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        made = self.optimizers()
        optimizers = made if isinstance(made, list) else [made]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()


class WithAverage(Classifier):
    """Keeps a running average of `net`, as self-supervised and reinforcement learning do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ema = deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for average, weight in zip(self.ema.parameters(), self.net.parameters(), strict=True):
                average.lerp_(weight, 0.2)


class Plain(Classifier):
    """A Mamba block of ours in the place of the first LRU."""

    def __init__(self) -> None:
        super().__init__()
        self.net.first = MambaBlock(4, 16).double()


def trainer(
    tmp: Path | str, *callbacks: pl.Callback, package: Any = pl, **kwargs: Any
) -> pl.Trainer:
    """A quiet CPU Trainer of one of Lightning's packages; keyword arguments override."""
    quiet()
    settings: dict[str, Any] = {
        "default_root_dir": tmp,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "callbacks": list(callbacks),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return package.Trainer(**(settings | kwargs))


def same(a: Any, b: Any) -> bool:
    """Whether nested states are equal, to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def quiet() -> None:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*no logger configured.*")
