"""Looks at a run of the matrix from inside, in every process, and saves what it saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor, nn

from lightning_compressm import CompreSSMCallback
from lightning_compressm.model.layers import find_ssm_layers

from ..helpers import dataset


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def plain(name: str) -> str:
    """A parameter's name without the wrappers of compilation and the renaming of pruning."""
    return name.replace("_orig_mod.", "").removesuffix("_orig")


class Watch(Callback):
    """Notes rates, which parameters each epoch's first step moves, and the end of the run."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.losses: list[float] = []
        self.rates: list[list[float]] = []
        self.batches: list[int] = []  # the step that loggers say
        self.moved: list[dict[str, bool]] = []
        self.owned: list[dict[str, int]] = []
        self.gradients: list[dict[str, bool]] = []
        self._before: dict[str, Tensor] | None = None
        self._step = -1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        self.rates.append(_rates(trainer))
        self.batches.append(trainer.fit_loop.epoch_loop._batches_that_stepped)
        if index == 0:
            self._before = _values(pl_module)
            self._step = trainer.global_step
            self.owned.append(_owners(trainer, pl_module))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        self.losses.append(outputs["loss"].item())
        if self._before is None or trainer.global_step == self._step:
            return  # still accumulating
        after = _values(pl_module)
        self.moved.append({n: not torch.equal(v, after[n]) for n, v in self._before.items()})
        self.gradients.append({plain(n): _nonzero(p.grad) for n, p in pl_module.named_parameters()})
        self._before = None

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        callback = next((c for c in trainer.callbacks if isinstance(c, CompreSSMCallback)), None)
        stops = [c.stopped_epoch for c in trainer.callbacks if isinstance(c, EarlyStopping)]
        checkpoint = trainer.checkpoint_callback
        found = find_ssm_layers(pl_module)
        result = {
            "history": [{**e, "seconds": 0.0} for e in callback.history] if callback else [],
            "state_dims": callback.state_dims if callback else {},
            "found": {name: layer.state_dim for name, layer in found.items()},
            "state_dict": {plain(n): v for n, v in pl_module.state_dict().items()},
            "trainable": {plain(n): p.requires_grad for n, p in pl_module.named_parameters()},
            "losses": self.losses,
            "logits": _logits(pl_module),
            "rates": [*self.rates, _rates(trainer)],
            "batches": self.batches,
            "moved": self.moved,
            "gradients": self.gradients,
            "owned": self.owned,
            "tied": _shared(pl_module),
            "stopped_epoch": max(stops, default=None),
            "epochs": trainer.current_epoch,
            "best": dict(checkpoint.best_k_models) if checkpoint else {},
            "last": checkpoint.last_model_path if checkpoint else "",
        }
        torch.save(result, self.out / f"{trainer.global_rank}.pt")


def _rates(trainer: Any) -> list[float]:
    return [group["lr"] for o in trainer.optimizers for group in o.param_groups]


def _nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(torch.isfinite(gradient).all()) and bool(gradient.any())


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {plain(n): p.detach().clone() for n, p in model.named_parameters()}


def _owners(trainer: Any, model: nn.Module) -> dict[str, int]:
    """How often each parameter occurs in the optimizers; what else they hold as ``stale``."""
    held = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
    names = {id(p): plain(n) for n, p in model.named_parameters()}
    counts = dict.fromkeys(names.values(), 0)
    counts["stale"] = 0
    for parameter in held:
        counts[names.get(id(parameter), "stale")] += 1
    return counts


def _logits(model: Any) -> Tensor:
    x = dataset(2).tensors[0].to(model.net.decoder.bias.dtype)
    with torch.no_grad():
        logits: Tensor = model.net(x)
    return logits.double()


def _shared(model: Any) -> bool:
    """Whether the two SSM layers hold the same tensors."""
    layers = [layer.module for layer in find_ssm_layers(model).values()]
    one, other = (dict(layer.named_parameters()) for layer in layers)
    return all(p is other[plain(n)] for n, p in one.items()) if len(layers) == 2 else False
