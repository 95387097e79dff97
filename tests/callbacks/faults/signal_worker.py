"""Trains until it gets a signal in a reduction: `python -m ...signal_worker OUT END FAULT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compressm import CompreSSMCallback

from ..helpers import BATCHES, Classifier, Plain, loader, trainer
from .catalogue import Fault, Injection
from .worker import BY_NAME, ENDS

EPOCHS = 4


class Arm(pl.Callback):
    """The second look is the one that is hit: by then there is a checkpoint."""

    def __init__(self, injection: Injection | None) -> None:
        self.injection = injection

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.injection is not None:
            self.injection.enabled = trainer.current_epoch == 1


def train(out: Path, fault: Fault, end: str = "", ckpt_path: Path | None = None) -> dict[str, Any]:
    """Train through two looks, saving the last checkpoint; `end` says what a failing call does."""
    model = Plain() if fault.setup == "selective" else Classifier("adamw")
    callback = CompreSSMCallback(
        fraction=0.4,
        window=(0, 2 * BATCHES),
        layers=["net.first"],
        max_output_error=None,
        verbose=False,
    )
    injection = Injection(fault, ENDS[end]) if end else None
    checkpoint = ModelCheckpoint(out, save_last=True, save_on_train_epoch_end=True)
    settings = {"max_epochs": EPOCHS, "enable_checkpointing": True}
    fit = trainer(out, Arm(injection), callback, checkpoint, **settings)
    if injection is None:
        fit.fit(model, loader(), ckpt_path=ckpt_path)
    else:
        with injection.installed():
            fit.fit(model, loader())
    return {
        "losses": model.losses,
        "state_dict": model.state_dict(),
        "optimizer": fit.optimizers[0].state_dict(),
        "history": [{**event, "seconds": 0.0} for event in callback.history],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), BY_NAME[sys.argv[3]], sys.argv[2])
