"""What the soak looks at: whether ranks are equal to the bit, and what stays in memory."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_compressm import CompreSSMCallback, find_ssm_layers

STATUS = Path("/proc/self/status")
OWN = {"prev_loss"}  # LBFGS keeps the loss of its own rank's share of the batch


def digest(model: nn.Module, optimizers: list[Any]) -> str:
    """A hash of all parameters and buffers, and of all that the optimizers remember of them."""
    sha = hashlib.sha256()
    names = {id(p): name for name, p in model.named_parameters()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        _hash(sha, name, tensor)
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            _hash(sha, names[id(parameter)], state)
        for group in optimizer.param_groups:
            _hash(sha, "group", [names[id(p)] for p in group["params"]])
            _hash(sha, "options", {k: v for k, v in group.items() if k != "params"})
    return sha.hexdigest()


def _hash(sha: Any, name: str, value: Any) -> None:
    sha.update(name.encode())
    if isinstance(value, Tensor):
        sha.update(f"{tuple(value.shape)} {value.dtype}".encode())
        sha.update(value.detach().contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in OWN:
                _hash(sha, str(key), item)
    elif isinstance(value, list | tuple):
        for item in value:
            _hash(sha, "", item)
    else:
        sha.update(repr(value).encode())


def gather(value: Any) -> list[Any]:
    """What every rank has."""
    if not distributed.is_initialized():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def resident() -> float:
    """Megabytes of this process in memory, without those of files, which come and go."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what was freed is not always given back at once
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def live() -> Counter[str]:
    """How many tensors, parameters and DDP wrappers Python's collector knows."""
    gc.collect()
    count: Counter[str] = Counter(tensors=0, parameters=0, wrappers=0)
    for thing in gc.get_objects():
        kind = type(thing)  # isinstance() would wake lazy proxies
        count["tensors"] += issubclass(kind, Tensor)
        count["parameters"] += issubclass(kind, nn.Parameter)
        count["wrappers"] += issubclass(kind, DistributedDataParallel)
    return count


class Watch(pl.Callback):
    """Looks at a run after every optimizer step; put it after the callback that it watches.

    Attributes:
        divergences: what differed between ranks.
        leaks: what outlived a swap by more than a step.
        swaps: how many times parameters were replaced.
        checks: how many times the ranks were compared.
    """

    def __init__(self, callback: CompreSSMCallback) -> None:
        self.callback = callback
        self.divergences: list[str] = []
        self.leaks: list[str] = []
        self.swaps = self.checks = 0
        self._step = 0
        self._present: dict[str, weakref.ref[Any]] = {}
        self._old: dict[str, weakref.ref[Any]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._present = dict(_replaceable(trainer))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._notice_swap(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self.check_old()
        self._notice_swap(trainer)
        self._compare(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._compare(trainer, pl_module)

    def check_old(self) -> None:
        """What was replaced before the last step must be gone."""
        if any(reference() is not None for reference in self._old.values()):
            gc.collect()
        self.leaks += [n for n, reference in self._old.items() if reference() is not None]
        self._old = {}

    def _notice_swap(self, trainer: pl.Trainer) -> None:
        """Note what was replaced since the last call."""
        before, self._present = self._present, dict(_replaceable(trainer))
        now = self._present
        self._old |= {n: r for n, r in before.items() if n not in now or now[n]() is not r()}
        self.swaps += any(name != "reducer" for name in self._old)

    def _compare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.checks += 1
        found = {name: layer.state_dim for name, layer in find_ssm_layers(pl_module).items()}
        mine = {
            "state_dims": self.callback.state_dims,
            "found": found,
            "history": [{**event, "seconds": 0.0} for event in self.callback.history],
            "tensors": digest(pl_module, trainer.optimizers),
        }
        first, *others = gather(mine)
        for what in mine:
            if any(other[what] != first[what] for other in others):
                self.divergences.append(f"{what} after step {trainer.global_step}")
        if found != self.callback.state_dims:
            self.divergences.append(f"state_dims of the layers after step {trainer.global_step}")


class Spoil(pl.Callback):
    """Does what the watch must notice: `"ranks"` lets them drift apart, `"memory"` hoards."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.hoard: list[nn.Parameter] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.what == "memory":
            self.hoard += list(pl_module.parameters())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        if self.what == "ranks" and trainer.global_rank > 0 and trainer.global_step == 2:
            entry = next(pl_module.parameters()).data.view(-1)[:1]
            entry.copy_(torch.nextafter(entry, entry + 1))


def _replaceable(trainer: pl.Trainer) -> Iterator[tuple[str, weakref.ref[Any]]]:
    """Parameters, and the DDP wrapper with its reducer, which a swap makes anew."""
    for name, parameter in trainer.lightning_module.named_parameters():
        yield name, weakref.ref(parameter)
    wrapper = trainer.strategy.model
    if isinstance(wrapper, DistributedDataParallel):
        yield "wrapper", weakref.ref(wrapper)
        yield "reducer", weakref.ref(wrapper.reducer)
