"""Trains on two ranks with a failure injected: `python -m ... OUT TIMEOUT END CASE...`.

A case is "WHERE/NAME" of a fault, or "reference/SETUP" and "undisturbed/SETUP". One launch runs
many, with the same process group: what one case leaves behind would show in the next. END is how
the failure ends what it hits: "raise", or one of ENDS.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_compressm import CompreSSMCallback
from lightning_compressm.nn._mamba import MambaBlock
from lightning_compressm.reduction import processes

from ..helpers import BATCHES, Classifier, loader, same, trainer
from .catalogue import EXCHANGE, FAULTS, REWRAP, Injection, armed

BY_NAME = {fault.name: fault for fault in (*FAULTS, *REWRAP, *EXCHANGE)}


class Manual(Classifier):
    """Steps at every second batch only, so that gradients are pending when the look comes."""

    def __init__(self) -> None:
        super().__init__("adamw")
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()


class Selective(Classifier):
    """A Mamba block in the place of the first LRU."""

    def __init__(self, normalise: bool = False) -> None:
        super().__init__("adamw")
        torch.manual_seed(0)
        self.net.first = MambaBlock(4, 12, normalise).double()


def _twins() -> Classifier:
    """Two states that nothing tells apart, so that the infinite Gramians are singular."""
    model = Classifier("adamw")
    with torch.no_grad():
        for name, parameter in model.net.first.named_parameters():
            states = parameter.mT if name.startswith("C") else parameter
            if name != "D":
                states[1] = states[0]
    return model


SETUPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (lambda: Classifier("adamw"), {"state_dim": 6}),
    "short": (lambda: Classifier("adamw"), {"state_dim": 6, "horizon": 4}),
    "twins": (_twins, {"state_dim": 6, "horizon": None, "balance": "real"}),
    "both": (lambda: Classifier("adamw"), {"state_dim": 6, "layers": None}),
    "manual": (Manual, {"state_dim": 6, "window": (0, 4)}),
    "selective": (Selective, {"state_dim": 6}),
    "local": (lambda: Selective(normalise=True), {"state_dim": 6}),
}


def _interrupt() -> None:
    raise KeyboardInterrupt


ENDS: dict[str, Callable[[], Any]] = {
    "exit": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "interrupt": _interrupt,
    "system-exit": lambda: sys.exit(4),
}


class Watch(pl.Callback):
    """Arms the failure when the look comes, and sees whether anything is different afterwards.

    With `train_on`, a rank that was stopped by an error makes another step through the strategy.
    """

    def __init__(self, injection: Injection | None, *, train_on: bool) -> None:
        self.injection = injection
        self.train_on = train_on
        self.started = self.waited = 0.0
        self.untouched: dict[str, bool] = {}
        self.gradients: list[torch.Tensor] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch > 0:
            return
        self.before = self._state(trainer, pl_module)
        self.started = time.monotonic()
        if self.injection is not None:
            self.injection.enabled = True

    def on_train_batch_start(self, *_: Any) -> None:
        if self.injection is not None:
            self.injection.enabled = False

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.injection is not None:
            self.injection.enabled = False
        if not hasattr(self, "before"):
            return
        self.waited = time.monotonic() - self.started
        now = self._state(trainer, pl_module)
        self.untouched = {key: same(now[key], self.before[key]) for key in now}
        if pl_module.automatic_optimization and self.train_on:
            self._train_on(trainer, pl_module)

    def _train_on(self, trainer: Any, pl_module: Any) -> None:
        """A forward and a backward pass through the strategy's wrapper."""
        pl_module.zero_grad()
        trainer.strategy.training_step(next(iter(loader())), 0).backward()
        self.gradients = [p.grad.clone() for p in pl_module.parameters()]

    def _state(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        optimizer = trainer.optimizers[0]
        bound = [p for group in optimizer.param_groups for p in group["params"]]
        parameters = list(pl_module.parameters())
        return {
            "objects": [id(p) for p in parameters],
            "values": [p.detach().clone() for p in parameters],
            "gradients": [None if p.grad is None else p.grad.clone() for p in parameters],
            "buffers": [b.clone() for b in pl_module.buffers()],
            "attributes": {n: m.d_state for n, m in pl_module.named_modules() if _has_states(m)},
            "bound": [id(p) for p in bound],
            "lists": [id(group["params"]) for group in optimizer.param_groups],
            "keys": [id(p) for p in optimizer.state],
            "optimizer": deepcopy(optimizer.state_dict()),
            "wrapper": id(trainer.strategy.model),
        }


def _has_states(module: torch.nn.Module) -> bool:
    return hasattr(module, "d_state")


def run(
    case: str, tmp: Path, *, devices: int, timeout: float = 60, end: str = "raise"
) -> dict[str, Any]:
    """Train one case, and say all that can be compared of it."""
    where, _, name = case.partition("/")
    fault = BY_NAME.get(name)
    # The rank that fails is the one that works on the layers.
    processes.owner_of = lambda index, size: int(where == "rank 1") % size
    make, arguments = SETUPS[name if fault is None else fault.setup]
    model = make()
    settings: dict[str, Any] = {"window": (0, BATCHES), "layers": ["net.first"], "verbose": False}
    callback = CompreSSMCallback(**(settings | {"max_output_error": None} | arguments))
    injection = None if fault is None else Injection(fault, ENDS.get(end))
    # What fails in the middle of an exchange, or ends a process, breaks the process group.
    whole = end == "raise" and (fault in FAULTS or (fault in REWRAP and where == "all"))
    watch = Watch(injection, train_on=whole)
    callbacks = [watch] if where == "reference" else [watch, callback]
    strategy: dict[str, Any] = {}
    if devices > 1:
        ddp = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=timeout))
        strategy = {"strategy": ddp, "devices": devices}
    fit = trainer(tmp, *callbacks, max_epochs=2, **strategy)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    error = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if injection is None or not armed(where, rank):  # type: ignore[arg-type]
                fit.fit(model, loader())
            else:
                with injection.installed():
                    fit.fit(model, loader())
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it
    return {
        "error": error,
        "waited": watch.waited,
        "whole": whole,
        "fired": 0 if injection is None else injection.fired,
        "history": [{**event, "seconds": 0.0} for event in callback.history],
        "warnings": [str(w.message) for w in caught],
        "losses": model.losses,
        "state_dict": model.state_dict(),
        "optimizer": fit.optimizers[0].state_dict(),
        "untouched": watch.untouched,
        "gradients": watch.gradients,
    }


def main(out: Path, timeout: float, end: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    rank = os.environ.get("LOCAL_RANK", "0")
    for case in cases:
        result = run(case, out, devices=2, timeout=timeout, end=end)
        torch.save(result, out / f"{case.replace('/', '--')}.{rank}.pt")
        if result["error"] and not result["whole"]:
            os._exit(7)  # as a program that ends with the error
    if torch.distributed.is_initialized():
        # Left alive, gloo's threads can abort the interpreter while it exits.
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4:])
