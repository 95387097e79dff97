"""Resumes in a fresh process with a full-size model: `python -m ... CHECKPOINT OUT EPOCHS`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lightning_compressm import CompreSSMCallback

from .helpers import Classifier, loader, trainer

SETTINGS = {"tolerance": 0.2, "window": (0.0, 0.5), "verbose": False}


def main(checkpoint: str, out: str, epochs: int) -> None:
    torch.set_num_threads(1)
    model, callback = Classifier("adamw"), CompreSSMCallback(**SETTINGS)
    assert model.net.first.d_state == 24
    fit = trainer(Path(out).parent, callback, max_epochs=epochs)
    fit.fit(model, loader(), loader(1), ckpt_path=checkpoint)
    torch.save(
        {
            "losses": model.losses,
            "state_dict": model.state_dict(),
            "optimizer": fit.optimizers[0].state_dict(),
            "history": callback.history,
        },
        out,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
