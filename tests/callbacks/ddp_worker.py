"""Trains several cases in one pair of processes: `python -m ...ddp_worker OUT CASE...`.

Starting two interpreters with torch costs more than all cases together, so one launch runs many.
A case is "optimizer/strategy option"; each rank saves what it ended with.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from lightning_compressm import CompreSSMCallback

from .helpers import Classifier, WithAverage, loader, trainer

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static_graph": {"static_graph": True},
    "bucket_view": {"gradient_as_bucket_view": True},
    "find_unused": {"find_unused_parameters": True},
    "frozen": {},
    "manual_static": {"static_graph": True},
    "ema": {},
    "average": {},
    "rollback": {"static_graph": True},
    "two_rates": {},
    "budget": {},
}


class Scored(Classifier):
    """Its score gets worse after the reduction at the end of the second epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", float(self.current_epoch == 2 and not self.trainer.sanity_checking))


class TwoRates(Classifier):
    """The layers that are reduced train at a quarter of the others' rate."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        slow = [*self.net.first.parameters(), *self.net.second.parameters()]
        fast = [*self.net.encoder.parameters(), *self.net.decoder.parameters()]
        return torch.optim.AdamW([{"params": slow, "lr": 2.5e-3}, {"params": fast, "lr": 1e-2}])


def power_sgd() -> DDPStrategy:
    """Compressed gradients, with what is lost added the next time.

    In one bucket: on gloo the hook waits for its own threads if there are several.
    """
    state = PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    strategy = DDPStrategy(
        process_group_backend="gloo",
        ddp_comm_state=state,
        ddp_comm_hook=powerSGD_hook,
    )
    # Lightning registers hooks for CUDA alone, but gloo takes this one as well.
    strategy._register_ddp_hooks = lambda: strategy.model.register_comm_hook(state, powerSGD_hook)
    return strategy


class FailOnRank(Callback):
    """Makes the swap fail on one rank only."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 2:  # the swap comes next
            trainer.optimizers[0].mine = list(pl_module.parameters())


class Manual(Classifier):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        scheduler.step()


def run(case: str, tmp: Path, *, devices: int) -> dict[str, Any]:
    """Train one case; with one device it is the reference of the same global batch."""
    optimizer, option = case.split("/")
    models = {"manual_static": Manual, "rollback": Scored, "two_rates": TwoRates}
    models["average"] = WithAverage
    model = models.get(option, Classifier)(optimizer)
    if option == "frozen":
        model.net.first.requires_grad_(False)
    if option == "power_sgd":
        strategy = power_sgd()
    else:
        strategy = DDPStrategy(process_group_backend="gloo", **OPTIONS[option])
    callback = CompreSSMCallback(
        tolerance=0.2,
        window=(0.0, 0.6),
        every_n_epochs=2 if option == "rollback" else 1,
        layers=["net.*"] if option == "frozen" else None,
        averages=["ema.*"] if option == "average" else None,
        monitor="score" if option == "rollback" else None,
        verbose=False,
        learning_speed=option == "two_rates",
    )
    if option == "budget":
        callback = CompreSSMCallback(loss_budget=0.5, verbose=False)
    others = [callbacks.EMAWeightAveraging(decay=0.9)] if option == "ema" else []
    settings = {"strategy": strategy, "devices": devices} if devices > 1 else {}
    trainer(tmp, *others, callback, max_epochs=4, **settings).fit(model, loader(), loader(1))
    comm: Any = strategy._ddp_comm_state
    return {
        "losses": model.losses,
        "compressed": len(comm.error_dict) if comm else 0,
        "exchanges": comm.iter if comm else 0,
        "state_dict": model.state_dict(),
        "history": [{**event, "seconds": 0.0} for event in callback.history],
        "d_state": model.net.first.d_state,
    }


def run_failing(tmp: Path) -> dict[str, Any]:
    """One rank can't swap: every rank must stop with an error and an untouched model."""
    model = Classifier("adamw")
    callback = CompreSSMCallback(tolerance=0.2, window=(0, 2), verbose=False)
    fit = trainer(
        tmp, FailOnRank(1), callback, devices=2, strategy=DDPStrategy(process_group_backend="gloo")
    )
    try:
        fit.fit(model, loader())
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "d_state": model.net.first.d_state}
    return {"error": "", "d_state": model.net.first.d_state}


def run_case(case: str, out: Path) -> dict[str, Any]:
    kind, _, option = case.partition("/")
    if kind == "selective":
        from . import selective_models

        return selective_models.run(option, out, devices=2)
    return run_failing(out) if case == "failing" else run(case, out, devices=2)


def main(out: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    rank = os.environ.get("LOCAL_RANK", "0")
    for case in cases:
        result = run_case(case, out)
        torch.save(result, out / f"{case.replace('/', '-')}.{rank}.pt")
    if torch.distributed.is_initialized():
        # Left alive, gloo's threads can abort the interpreter while it exits.
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
