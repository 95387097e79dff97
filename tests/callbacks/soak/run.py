"""Hundreds of random reductions in one pair of processes: `python -m tests.callbacks.soak`.

Every run is a real Trainer with DDP over two gloo ranks. After each optimizer step the ranks are
compared to the bit, and after each swap the old parameters and the old reducer must die. Then the
first runs are repeated: they must end as before, and memory must not grow. (During the first pass
it does a little, with or without the callback: oneDNN caches what it compiled for each new shape.)
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compressm import CompreSSMCallback

from ..helpers import trainer
from .plan import OPTIMIZERS, Net, Setting, plan
from .watch import Spoil, Watch, digest, gather, live, resident

BATCH = 4
REPEATED = 0.25  # of all reductions, again
GROWTH = 4.0  # megabytes that a process may have more after the repetition than before


class Regression(pl.LightningModule):
    """Predict the mean of a random walk; each rank takes its share of the same global batch."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        torch.manual_seed(setting.number)
        self.setting = setting
        self.net = Net(setting)
        self.finite = True

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        x = batch[0][self.global_rank :: self.trainer.world_size]
        output = self.net(x, batch_idx // self.setting.accumulate)
        loss = nn.functional.mse_loss(output, x.mean(1).to(output.dtype))
        self.finite &= math.isfinite(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.setting.optimizer](self.parameters())


@dataclass
class Figures:
    """What all runs came to, as this rank saw it."""

    reductions: int = 0
    swaps: int = 0
    runs: int = 0
    checks: int = 0
    seconds: float = 0.0
    by_family: Counter[str] = field(default_factory=Counter)
    by_optimizer: Counter[str] = field(default_factory=Counter)
    divergences: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    live: list[dict[str, int]] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)  # digest of what each run ended with
    once: int = -1  # the last run before the repetition

    def add(self, setting: Setting, watch: Watch, callback: CompreSSMCallback) -> None:
        done = [e for e in callback.history if e["action"] == "reduce"]
        self.reductions += len(done)
        self.by_family.update(event["family"] for event in done)
        self.by_optimizer[setting.optimizer] += len(done)
        self.runs += 1
        self.swaps += watch.swaps
        self.checks += watch.checks
        where = f"run {setting.number}: "
        self.divergences += [where + what for what in watch.divergences]
        self.problems += [f"{where}{what} outlived its swap" for what in watch.leaks]


def run(setting: Setting, figures: Figures, devices: int, spoil: str | None = None) -> None:
    """Train once, and note what happened."""
    model = Regression(setting)
    callback = CompreSSMCallback(
        window=(0, setting.steps),
        every_n_steps=setting.every_n_steps,
        min_reduction=0.0,
        verbose=False,
        **setting.arguments,
    )
    watch = Watch(callback)
    options = dict.fromkeys(setting.ddp, True)
    strategy = DDPStrategy(process_group_backend="gloo", **options)
    fit = trainer(
        tempfile.gettempdir(),
        callback,
        *([Spoil(spoil)] if spoil else []),
        watch,
        max_epochs=-1,
        max_steps=setting.steps,
        accumulate_grad_batches=setting.accumulate,
        devices=devices,
        strategy=strategy if devices > 1 else "auto",
    )
    fit.fit(model, _loader(setting))
    figures.add(setting, watch, callback)
    figures.ends.append(digest(model, fit.optimizers))
    if not model.finite:
        figures.problems.append(f"run {setting.number}: a loss was not finite")
    remains = {"the module": weakref.ref(model), "the wrapper": weakref.ref(fit.strategy.model)}
    # Lightning ties callbacks to the module by their `log`.
    del model, callback, watch, fit, strategy
    gc.collect()
    alive = [name for name, reference in remains.items() if reference() is not None]
    figures.problems += [f"run {setting.number}: {name} outlived its run" for name in alive]


def _loader(setting: Setting) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(setting.number)
    size = (BATCH * setting.epoch_steps * setting.accumulate, setting.length, 1)
    walks = torch.randn(size, generator=generator).cumsum(1) / setting.length**0.5
    return DataLoader(TensorDataset(walks), batch_size=BATCH)


def soak(arguments: argparse.Namespace) -> Figures:
    """Run the plan until there are enough reductions, and some of it again.

    The ranks have equal histories, so that all of them stop after the same run.
    """
    figures, start = Figures(), time.perf_counter()
    done: list[Setting] = []
    for setting in plan(arguments.seed):
        if arguments.only in (None, setting.number):
            one_run(setting, figures, arguments)
            done.append(setting)
        if figures.reductions >= arguments.reductions or arguments.only == setting.number:
            break
    figures.once, first = figures.runs - 1, figures.reductions
    for number, setting in enumerate(done):
        one_run(setting, figures, arguments)
        if figures.ends[-1] != figures.ends[number]:
            figures.problems.append(f"run {setting.number} ended differently when repeated")
        if figures.reductions >= first + REPEATED * arguments.reductions:
            break
    figures.seconds = time.perf_counter() - start
    figures.problems += growth(figures)
    return figures


def one_run(setting: Setting, figures: Figures, arguments: argparse.Namespace) -> None:
    """Train once as `arguments` say, and see what is left in memory."""
    began, before = time.perf_counter(), figures.reductions
    try:
        run(setting, figures, arguments.devices, arguments.spoil)
    except BaseException:
        print(f"failed: {setting}", file=sys.stderr)
        raise
    if arguments.verbose and is_first():
        seconds = time.perf_counter() - began
        print(f"{seconds:5.1f} s {figures.reductions - before:3} reductions: {setting}")
    if figures.runs == 1:
        gc.freeze()  # what the imports made needs no counting
    figures.live.append(dict(live()))
    figures.megabytes.append(resident())


def is_first() -> bool:
    """Whether this is rank 0, also before there is a process group."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def growth(figures: Figures) -> list[str]:
    """What there is more of after the repetition than before."""
    before, after = figures.live[figures.once], figures.live[-1]
    found = [
        f"{what}: {before[what]} before the repetition, {after[what]} at the end"
        for what in before
        if after[what] > before[what]
    ]
    start, end = figures.megabytes[figures.once], figures.megabytes[-1]
    if end > start + GROWTH:
        found.append(f"memory: {start:.0f} MB before the repetition, {end:.0f} MB at the end")
    return found


def report(all_figures: Sequence[Figures]) -> str:
    """The figures in a few lines."""
    first = all_figures[0]
    lines = [
        f"reductions   {first.reductions} in {first.swaps} swaps of {first.runs} runs",
        f"by family    {_counts(first.by_family)}",
        f"by optimizer {_counts(first.by_optimizer)}",
        f"divergences  {len(first.divergences)} in {first.checks} comparisons of the ranks",
    ]
    for rank, figures in enumerate(all_figures):
        start, end = figures.megabytes[figures.once], figures.megabytes[-1]
        before, after = figures.live[figures.once], figures.live[-1]
        left = ", ".join(f"{what} {before[what]} -> {after[what]}" for what in before)
        lines += [
            f"rank {rank}       {start:.1f} MB after {figures.once + 1} runs, {end:.1f} MB at the "
            f"end, some of them repeated; left: {left}"
        ]
        lines += [f"rank {rank}       {what}" for what in (*figures.divergences, *figures.problems)]
    lines.append(f"seconds      {first.seconds:.0f}")
    return "\n".join(lines)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--reductions", type=int, default=300, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the plan (%(default)s)")
    parser.add_argument("--devices", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--only", type=int, help="the number of a run, to repeat it alone")
    parser.add_argument("--verbose", action="store_true", help="a line for each run")
    parser.add_argument(
        "--spoil", choices=("ranks", "memory"), help="break something, to see that it is noticed"
    )
    parser.add_argument("--json", type=Path, help="write the figures of all ranks here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(1)
    # Else torch keeps records of the latest 2000 collectives, which fill up during the first runs.
    os.environ["TORCH_FR_BUFFER_SIZE"] = "0"
    all_figures = gather(soak(arguments))
    if is_first():
        print(report(all_figures))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps([vars(figures) for figures in all_figures]))
    if torch.distributed.is_initialized():
        # Left alive, gloo's threads can abort the interpreter while it exits.
        torch.distributed.destroy_process_group()
    return int(any(figures.divergences or figures.problems for figures in all_figures))
