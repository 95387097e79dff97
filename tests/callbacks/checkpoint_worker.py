"""Two gloo processes save, and resume from their own checkpoint and from that of one process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_compressm import CompreSSMCallback

from .checkpointing import EPOCHS, SETTINGS, make, undated
from .helpers import BATCHES, StatefulLoader, loader, trainer


def run(tmp: Path, ckpt_path: Path | None, *callbacks: Any) -> dict[str, Any]:
    model, callback = make("adamw"), CompreSSMCallback(**SETTINGS)
    fit = trainer(
        tmp,
        callback,
        *callbacks,
        max_epochs=EPOCHS,
        enable_checkpointing=bool(callbacks),
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
    )
    fit.fit(model, StatefulLoader(), loader(1), ckpt_path=ckpt_path)
    return {"state_dict": model.state_dict(), "history": undated(callback)}


def main(tmp: Path) -> None:
    torch.set_num_threads(1)
    rank = os.environ.get("LOCAL_RANK", "0")
    keep = ModelCheckpoint(tmp / "two", "{step}", save_top_k=-1, save_on_train_epoch_end=True)
    (theirs,) = (tmp / "single" / "epoch").glob(f"*-step={BATCHES}.ckpt")
    ours = tmp / "two" / f"step={BATCHES}.ckpt"
    for case, path, callbacks in (
        ("two", None, [keep]),
        ("resumed", ours, []),
        ("from_one", theirs, []),
    ):
        torch.save(run(tmp, path, *callbacks), tmp / f"{case}.{rank}.pt")
    # Left alive, gloo's threads can abort the interpreter while it exits.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
