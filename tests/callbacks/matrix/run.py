"""Runs one cell of the matrix in a real Trainer, and saves what each process ended with."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compressm import CompreSSMCallback
from lightning_compressm.compat import enable_mamba_ssm_cpu
from lightning_compressm.model.layers import find_ssm_layers
from lightning_compressm.model.resizing import install_resize_hooks
from lightning_compressm.nn import LRU, S4D

from ..helpers import BATCH, BATCHES, CLASSES, dataset, trainer
from .cells import Cell
from .watch import Watch, trainable

D_MODEL, STATES, EPOCHS = 4, 16, 3
# As many as matter: where a pole does not, rounding decides where it lies.
KEPT = {"LRU": 5, "S4D": 2, "mamba_ssm Mamba": 5}
OPTIONS = ("static_graph", "gradient_as_bucket_view", "find_unused_parameters")


def make_layer(kind: str) -> nn.Module:
    if kind == "LRU":
        return LRU(D_MODEL, STATES)
    if kind == "S4D":
        return S4D(D_MODEL, STATES)
    enable_mamba_ssm_cpu()
    from mamba_ssm import Mamba

    layer: nn.Module = Mamba(D_MODEL, STATES)
    return layer


class Net(nn.Module):
    """Two SSM layers between linear maps; ``spare`` is used by nobody."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, D_MODEL)
        self.first, self.second = make_layer(cell["layer"]), make_layer(cell["layer"])
        self.decoder = nn.Linear(D_MODEL, CLASSES)
        if cell["DDP option"] == "find_unused_parameters":
            self.spare = nn.Linear(D_MODEL, D_MODEL)
        if cell["training"] == "tied layers":
            _tie(self.first, self.second)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        x = x + self.first(x)
        x = x + self.second(torch.tanh(x))
        logits: Tensor = self.decoder(x.mean(1))
        return logits


def _tie(one: nn.Module, other: nn.Module) -> None:
    """All parameters of ``other`` become those of ``one``."""
    for name, parameter in one.named_parameters():
        path, _, key = name.rpartition(".")
        setattr(other.get_submodule(path), key, parameter)


class Task(pl.LightningModule):
    """Tells three frequencies apart, as the cell says; each rank takes its share of a batch."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = cell
        self.net = Net(cell)
        self.automatic_optimization = cell["training"] not in (
            "manual optimization",
            "several optimizers",
        )
        if cell["training"] == "frozen parameters":
            self.net.encoder.weight.requires_grad_(False)
            # One of the reduced tensors of a layer whose others are trained.
            next(p for p in self.net.first.parameters() if p.ndim > 1).requires_grad_(False)
        if cell["optimizer"] == "Muon" and cell["training"] != "several optimizers":
            for parameter in self.parameters():  # it takes matrices only
                parameter.requires_grad_(parameter.requires_grad and parameter.ndim == 2)
        if cell["around"] == "torch.compile, child":
            self.net.first = torch.compile(self.net.first, backend="aot_eager")

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x.to(self.net.decoder.bias.dtype)), y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        batch = [t[self.global_rank :: self.trainer.world_size] for t in batch]
        if not self.automatic_optimization:
            return self.optimize_by_hand(batch)
        return self.loss(batch)

    def optimize_by_hand(self, batch: list[Tensor]) -> Tensor:
        found = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]
        schedulers = self.lr_schedulers()
        done: list[Tensor] = []

        def closure() -> Tensor:
            self.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            done.append(loss.detach())
            return loss

        if self.cell["optimizer"] != "LBFGS":
            closure()
        for optimizer in optimizers:
            own = closure if isinstance(optimizer.optimizer, torch.optim.LBFGS) else None
            optimizer.step(own)
        if self.cell["learning rate"] != "StepLR by epoch" or self.trainer.is_last_batch:
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                scheduler.step()
        return done[0]

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> list[dict[str, Any]]:
        optimizers = list(self._optimizers())
        return [{"optimizer": o, "lr_scheduler": self._schedule(o)} for o in optimizers]

    def _optimizers(self) -> Iterator[torch.optim.Optimizer]:
        make, parameters = self._make_optimizer, trainable(self)
        ssm = _inside_layers(self)
        if self.cell["training"] == "several optimizers":
            muon = self.cell["optimizer"] == "Muon"
            mine = [p for p in parameters if (p.ndim == 2 if muon else id(p) in ssm)]
            own = {id(p) for p in mine}
            yield make(mine)
            yield torch.optim.AdamW([p for p in parameters if id(p) not in own], lr=1e-2)
        elif self.cell["training"] == "parameter groups":
            inside = [p for p in parameters if id(p) in ssm]
            rest = [p for p in parameters if id(p) not in ssm]
            yield make([{"params": rest}, {"params": inside, "lr": 5e-3, "weight_decay": 0.0}])
        else:
            yield make(parameters)

    def _make_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        optim, lr = torch.optim, 1e-2
        return {
            "SGD, momentum": lambda: optim.SGD(parameters, lr=lr, momentum=0.9),
            "AdamW": lambda: optim.AdamW(parameters, lr=lr),
            "AdamW, fused": lambda: optim.AdamW(parameters, lr=lr, fused=True),
            "AdamW, amsgrad": lambda: optim.AdamW(parameters, lr=lr, amsgrad=True),
            "RMSprop": lambda: optim.RMSprop(parameters, lr=lr / 4),
            "Adagrad": lambda: optim.Adagrad(parameters, lr=lr),
            "Adafactor": lambda: optim.Adafactor(parameters, lr=lr),
            "Muon": lambda: optim.Muon(parameters, lr=lr),
            "LBFGS": lambda: optim.LBFGS(parameters, lr=lr, max_iter=2),
        }[self.cell["optimizer"]]()

    def _schedule(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        make = torch.optim.lr_scheduler
        if self.cell["learning rate"] == "OneCycleLR":
            total = int(self.trainer.estimated_stepping_batches)
            rates = [group["lr"] for group in optimizer.param_groups]
            # LBFGS and Adagrad have no momentum that could be cycled.
            cycle = make.OneCycleLR(optimizer, rates, total_steps=total, cycle_momentum=False)
            return {"scheduler": cycle, "interval": "step"}
        interval = "epoch" if "epoch" in self.cell["learning rate"] else "step"
        size = 1 if interval == "epoch" else 4
        return {"scheduler": make.StepLR(optimizer, size, 0.9), "interval": interval}


def _inside_layers(model: nn.Module) -> set[int]:
    layers = find_ssm_layers(model).values()
    return {id(p) for layer in layers for p in layer.module.parameters()}


def loader(seed: int = 0) -> DataLoader[Any]:
    """In float32, which Lightning turns into what the precision asks for."""
    x, y = dataset(seed).tensors
    return DataLoader(TensorDataset(x.float(), y), batch_size=BATCH)


def compressor(cell: Cell) -> CompreSSMCallback:
    """To a fixed dimension at the first epoch's end, which no precision changes."""
    steps = BATCHES // 2 + 1 if "ccumulation" in cell["training"] else BATCHES + 1
    if cell["training"] == "several optimizers":  # each step of each optimizer counts
        steps = 2 * BATCHES + 1
    return CompreSSMCallback(
        state_dim=KEPT[cell["layer"]], window=(0, steps), max_output_error=None, verbose=False
    )


def callbacks_around(cell: Cell, model: Task, out: Path) -> list[Callback]:
    around = cell["around"]
    rows: dict[str, list[Callback]] = {
        "ModelCheckpoint": [
            ModelCheckpoint(out / "top", monitor="val_loss", save_top_k=2, save_last=True)
        ],
        # No epoch but the first is an improvement, so that the run ends after the third.
        "EarlyStopping": [EarlyStopping("val_loss", min_delta=100.0, patience=2)],
        "LearningRateMonitor": [LearningRateMonitor(logging_interval="step")],
        "TQDMProgressBar, ModelSummary": [TQDMProgressBar(), ModelSummary(max_depth=3)],
        "RichProgressBar, RichModelSummary": [RichProgressBar(), RichModelSummary(max_depth=3)],
        "StochasticWeightAveraging": [StochasticWeightAveraging(5e-3, swa_epoch_start=1)],
    }
    found = rows.get(around, [])
    if around == "EMAWeightAveraging":  # from Lightning 2.6
        found = [pl.callbacks.EMAWeightAveraging(decay=0.9)]
    if around == "ModelPruning of other layers":
        pairs = [(model.net.encoder, "weight"), (model.net.decoder, "weight")]
        # With true precisions other than float32 Lightning's copies of the first weights don't fit.
        ticket = cell["precision"] not in ("64-true", "bf16-true")
        found = [
            ModelPruning(
                "l1_unstructured", pairs, amount=0.25, use_lottery_ticket_hypothesis=ticket
            )
        ]
    if cell["training"] == "GradientAccumulationScheduler":
        found = [*found, GradientAccumulationScheduler({0: 2, EPOCHS - 1: 1})]
    return found


def settings(cell: Cell, out: Path, devices: int) -> dict[str, Any]:
    """The Trainer's arguments."""
    chosen: dict[str, Any] = {
        "max_epochs": 2 * EPOCHS if cell["around"] == "EarlyStopping" else EPOCHS,
        "precision": cell["precision"],
        "enable_checkpointing": cell["around"] == "ModelCheckpoint",
        "enable_progress_bar": "ProgressBar" in cell["around"],
        "enable_model_summary": "ModelSummary" in cell["around"],
    }
    if cell["around"] == "LearningRateMonitor":
        chosen |= {"logger": CSVLogger(out / "csv"), "log_every_n_steps": 1}
    if cell["training"] == "accumulation":
        chosen["accumulate_grad_batches"] = 2
    if cell["training"].startswith("clipping"):
        algorithm = cell["training"].split(", ")[1]
        chosen |= {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm}
    if devices > 1:
        chosen |= {"devices": devices, "strategy": strategy_of(cell)}
    return chosen


def strategy_of(cell: Cell) -> DDPStrategy:
    method = {"ddp": "popen", "ddp_fork": "fork", "ddp_spawn": "spawn"}[cell["strategy"]]
    option = {name: True for name in OPTIONS if name == cell["DDP option"]}
    return DDPStrategy(
        process_group_backend="gloo",
        start_method=method,  # type: ignore[arg-type]
        timeout=timedelta(seconds=120),
        **option,
    )


def eager(cell: Cell) -> Cell:
    """The same cell without ``torch.compile``."""
    compiled = cell["around"].startswith("torch.compile")
    return {**cell, "around": "none"} if compiled else cell


def run(cell: Cell, out: Path, *, devices: int, reduce: bool = True) -> Task:
    """Train a cell; each process saves ``{rank}.pt`` in ``out``. With one device: the reference."""
    out.mkdir(parents=True, exist_ok=True)
    torch._dynamo.reset()
    model = Task(cell)
    install_resize_hooks(model)  # what comes back from spawned processes is smaller
    mine = [compressor(cell)] if reduce else []
    around = callbacks_around(cell, model, out)
    fit = trainer(out, *mine, *around, Watch(out), **settings(cell, out, devices))
    whole = cell["around"] == "torch.compile, whole module"
    fit.fit(torch.compile(model, backend="eager") if whole else model, loader(), loader(1))
    return model
