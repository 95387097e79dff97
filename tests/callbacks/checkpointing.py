"""A run that leaves checkpoints behind, with any optimizer, and comparison with a resumed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import optim
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop, Rprop

from lightning_compressm import CompreSSMCallback

from .helpers import Classifier, StatefulLoader, SteppedByHand, loader, same, trainer

EPOCHS = 4
SETTINGS: dict[str, Any] = {"tolerance": 0.2, "window": (0.0, 0.6), "verbose": False}

OPTIMIZERS: dict[str, Any] = {
    "sgd momentum": lambda p: SGD(p, lr=1e-2, momentum=0.9),
    "sgd nesterov": lambda p: SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: AdamW(p, lr=1e-2),
    "adamw fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "adam amsgrad": lambda p: Adam(p, lr=1e-2, amsgrad=True),
    "rmsprop": lambda p: RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
    "adagrad": lambda p: Adagrad(p, lr=1e-2),
    "adafactor": lambda p: optim.Adafactor(p, lr=1e-2),
    "lbfgs": lambda p: LBFGS(p, lr=1e-2, max_iter=2),
    "nadam": lambda p: NAdam(p, lr=1e-2),
    "rprop": lambda p: Rprop(p, lr=1e-3),
}


class AnyOptimizer(Classifier):
    """Trained by one of OPTIMIZERS."""

    def __init__(self, optimizer: str) -> None:
        # NAdam's scalar mu_product is a float32; loading casts it to the parameters' type.
        super().__init__(optimizer, dtype="float32" if optimizer == "nadam" else "float64")

    def configure_optimizers(self) -> Optimizer:
        made: Optimizer = OPTIMIZERS[self.hparams["optimizer"]](self.parameters())
        return made


class WithMuon(SteppedByHand, Classifier):
    """Matrices by Muon and the rest by AdamW, stepped by hand."""

    def __init__(self, optimizer: str = "muon") -> None:
        super().__init__(optimizer)

    def configure_optimizers(self) -> list[Optimizer]:
        matrices = [p for p in self.parameters() if p.ndim == 2]
        others = [p for p in self.parameters() if p.ndim != 2]
        return [optim.Muon(matrices, lr=1e-3), AdamW(others, lr=1e-2)]


def make(optimizer: str) -> Classifier:
    return WithMuon() if optimizer == "muon" else AnyOptimizer(optimizer)


class EpochCheckpoint(ModelCheckpoint):
    """Another class name, so that its state is kept apart from the validated one's."""


class Run:
    """One uninterrupted run that leaves checkpoints of every kind behind."""

    def __init__(self, tmp: Path, model: Classifier, **arguments: Any) -> None:
        self.tmp, self.model, self.settings = tmp, model, SETTINGS | arguments
        self.callback = CompreSSMCallback(**self.settings)
        name = "{epoch}-{step}"
        kinds: list[pl.Callback] = [
            ModelCheckpoint(tmp / "validated", name, save_top_k=-1, save_on_train_epoch_end=False),
            EpochCheckpoint(tmp / "epoch", name, save_top_k=-1, save_on_train_epoch_end=True),
            ModelCheckpoint(tmp / "step", name, save_top_k=-1, every_n_train_steps=1),
        ]
        fit = trainer(tmp, self.callback, *kinds, max_epochs=EPOCHS, enable_checkpointing=True)
        fit.fit(model, StatefulLoader(), loader(1))
        self.optimizers = [optimizer.state_dict() for optimizer in fit.optimizers]

    def checkpoint(self, kind: str, epoch: int, batch: int = -1) -> Path:
        """The one of this epoch; of kind "step", the one after this batch."""
        done = sorted(
            (self.tmp / kind).glob(f"epoch={epoch}-*.ckpt"),
            key=lambda path: int(path.stem.partition("step=")[2]),
        )
        return done[batch]

    def resume(self, tmp: Path, model: Classifier, path: Path | str, **more: Any) -> None:
        """Go on from a checkpoint in ``model``; the end must be the same to the bit."""
        callback = CompreSSMCallback(**self.settings)
        fit = trainer(tmp, callback, max_epochs=EPOCHS, **more)
        fit.fit(model, StatefulLoader(), loader(1), ckpt_path=path)
        assert model.losses
        assert model.losses == self.model.losses[-len(model.losses) :]
        assert same(model.state_dict(), self.model.state_dict())
        assert same([o.state_dict() for o in fit.optimizers], self.optimizers)
        assert undated(callback) == undated(self.callback)


def undated(callback: CompreSSMCallback) -> list[dict[str, Any]]:
    return [{**event, "seconds": 0} for event in callback.history]
