"""Tries an installed package: `smoke.py none`, or the name of the Lightning that is there.

Needs nothing but what the wheel brings; `make dist` runs it outside of the checkout.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

import lightning_compressm
from lightning_compressm.nn import LRU

LIGHTNING = {"lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning"}


def without_lightning() -> None:
    """Compress an LRU, save it, and load it into a model of full size."""
    model, x = nn.Sequential(nn.Linear(1, 4), LRU(4, 32)), torch.randn(2, 50, 1)
    report = lightning_compressm.compress(model, state_dim=8, sample=x)
    assert [event.new_state_dim for event in report.events] == [8], report.table()
    torch.save(model.state_dict(), "small.pt")
    fresh = nn.Sequential(nn.Linear(1, 4), LRU(4, 32))
    loaded = lightning_compressm.load_compressed(fresh, "small.pt")
    assert torch.equal(loaded(x), model(x))
    found = {name.partition(".")[0] for name in sys.modules} & LIGHTNING
    assert not found, found
    message = ""
    try:
        print(lightning_compressm.CompreSSMCallback)
    except ModuleNotFoundError as error:
        message = str(error)
    assert "pip install 'lightning_compressm[lightning]'" in message, message


def with_lightning(name: str) -> None:
    """A small training with the callback, its checkpoint, and a look at the smaller layer."""
    pl = import_module(name)

    class Model(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.lru = LRU(2, 16)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return (self.lru(batch) - batch.cumsum(1)).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    callback = lightning_compressm.CompreSSMCallback(state_dim=6, window=(0.0, 0.5))
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=4, callbacks=[callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = Model()
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(12, 20, 2), batch_size=2))
    assert callback.state_dims == {"lru": 6}, callback.history
    trainer.save_checkpoint("small.ckpt")
    loaded, x = lightning_compressm.load_compressed(Model(), "small.ckpt"), torch.randn(1, 20, 2)
    assert torch.equal(loaded.lru(x), model.lru(x))


def main(lightning: str) -> None:
    torch.manual_seed(0)
    where = Path(lightning_compressm.__file__)
    assert "site-packages" in where.parts, f"expected an installed package, got {where}"
    if lightning == "none":
        without_lightning()
    else:
        with_lightning(lightning)
    print(f"{where.parent}: good with {lightning} Lightning, torch {torch.__version__}")


if __name__ == "__main__":
    main(sys.argv[1])
