"""One task for both names of Lightning; as a module, one rank of a DDP run: `NAME OUT`."""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

from lightning_compressm import CompreSSMCallback

from .helpers import BATCHES, Net, StatefulLoader, loader, trainer

NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            find_spec(name.partition(".")[0]) is None, reason=f"{name} is not installed"
        ),
    )
    for name in ("lightning.pytorch", "pytorch_lightning")
]
CUT = {"fraction": 0.5, "window": (0, 2 * BATCHES), "verbose": False}


class Task:
    """Training steps, to be put before either package's LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net().double()
        self.losses: list[float] = []

    def _loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ranks, rank = self.trainer.world_size, self.global_rank
        loss = self._loss([t[rank::ranks] for t in batch])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> Any:
        return StatefulLoader()


@cache
def task(name: str) -> Any:
    """The class of the task under this name."""
    return type("NamedTask", (Task, import_module(name).LightningModule), {})


def fit(name: str, tmp: Path, *callbacks: Any, path: Path | None = None, **settings: Any) -> Any:
    """A model of this name after training, and its Trainer."""
    model, package = task(name)(), import_module(name)
    run = trainer(tmp, *callbacks, package=package, **settings)
    run.fit(model, val_dataloaders=loader(1), ckpt_path=path)
    return model, run


def main(name: str, out: Path) -> None:
    torch.set_num_threads(1)
    callback = CompreSSMCallback(**CUT)
    strategy = import_module(name).strategies.DDPStrategy(process_group_backend="gloo")
    model, _ = fit(name, out, callback, devices=2, strategy=strategy)
    rank = os.environ["LOCAL_RANK"]
    torch.save({"state": model.state_dict(), "dims": callback.state_dims}, out / f"{rank}.pt")
    if Version(torch.__version__) < Version("2.5"):
        # There its end waits, now and then forever, for a thread that waits for Python's lock.
        os._exit(0)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
