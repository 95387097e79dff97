"""Reductions are tried on a copy of the model and the latest training batch, before one is made."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compressm.callbacks import _lightning as pl
from lightning_compressm.model.layers import find_ssm_layers
from lightning_compressm.reduction.analysis import Task
from lightning_compressm.reduction.failures import TroubleError, describe
from lightning_compressm.reduction.output_weights import WeightRecorder
from lightning_compressm.reduction.policy import ReductionPolicy
from lightning_compressm.reduction.processes import Processes
from lightning_compressm.reduction.task_recorder import TaskRecorder
from lightning_compressm.reduction.trial import Trial
from lightning_compressm.surgery.apply import apply_plan
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = ["LossTrials"]

_RUNNING = 50  # steps over which the running loss is taken
# Once the running loss has fallen to this share of that of the first look, the floor is as much
# lower.
_LEARNT, _DEEPER = 0.5, 0.25

Batch = tuple[Any, int]
"""A training batch and its number in the epoch."""


class LossTrials:
    """The running loss, and what the loss of the latest batch would be after a reduction.

    Attributes:
        starts: layer name -> states at the beginning of the run.
        losses: of the latest steps, as training_step returned them.
        reference: the running loss at the first look.
    """

    def __init__(self) -> None:
        self.starts: dict[str, int] = {}
        self.losses: deque[Tensor | float] = deque(maxlen=_RUNNING)
        self.reference: float | None = None
        self._told = False

    def begin(self, state_dims: Mapping[str, int]) -> None:
        """Remember the states at the start, unless a checkpoint told them."""
        self.starts = self.starts or dict(state_dims)

    def note(self, loss: Tensor) -> None:
        """Take up the loss of a step; it is not waited for."""
        self.losses.append(loss.detach().clone())

    def prepare(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Batch,
        policy: ReductionPolicy,
        state_dims: Mapping[str, int],
        processes: Processes,
    ) -> Trial | None:
        """A trial of reductions on this batch; ``None``, said once, where the loss can't be told.

        The copy shares its parameters' memory, so that little room is needed, and has buffers,
        metrics and counters of its own. It is run in evaluation mode, without gradients, in the
        Trainer's precision; logging is off, and random numbers are as before afterwards.
        """
        assert policy.loss_budget is not None
        scale = self._running(trainer, processes)
        floors = self._floors(policy, scale)
        if all(n <= max(policy.min_state_dim, floors.get(x, 0)) for x, n in state_dims.items()):
            return Trial(lambda _: float("nan"), policy.loss_budget, scale, floors)  # none to try
        run = _Run(trainer, pl_module, batch)
        failure = run.prepare()
        failed = processes.add_up(torch.tensor(float(bool(failure))))
        if failed > 0:
            self._say(failure or "it fails in another process")
            return None

        def local(plan: SurgeryPlan) -> float:
            try:
                return processes.together(lambda: run.loss(plan))
            except TroubleError:
                return float("inf")

        def loss(plan: SurgeryPlan) -> float:
            total = processes.add_up(torch.tensor(local(plan), dtype=torch.float64))
            return processes.agree(float(total) / processes.size)

        task = _shared(run.task(self.starts), processes)
        return Trial(loss, policy.loss_budget, scale, floors, task)

    def _running(self, trainer: pl.Trainer, processes: Processes) -> float:
        """The mean loss of the latest steps, over all processes; that of the first look is kept."""
        mean = torch.tensor([float(loss) for loss in self.losses], dtype=torch.float64).mean()
        # Lightning divides the losses that it reports by the number of batches in a step.
        steps = trainer.accumulate_grad_batches / processes.size
        scale = processes.agree(abs(float(processes.add_up(mean))) * steps)
        self.reference = scale if self.reference is None else self.reference
        return scale

    def _floors(self, policy: ReductionPolicy, scale: float) -> dict[str, int]:
        """Least states of each layer: before much is learnt, cuts cost nothing and tell nothing."""
        learnt = self.reference is not None and scale <= _LEARNT * self.reference
        share = policy.floor * (_DEEPER if learnt else 1)
        return {name: math.ceil(start * share) for name, start in self.starts.items()}

    def _say(self, why: str) -> None:
        if not self._told:
            self._told = True
            pl.rank_zero_warn(
                "CompreSSMCallback can't tell what a reduction costs, since training_step can't be "
                f"run for a trial: {why}. It goes by tolerance=0.05 instead; give `tolerance`, "
                "`fraction` or `state_dim` to choose yourself."
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return {
            "starts": dict(self.starts),
            "losses": [float(loss) for loss in self.losses],
            "reference": self.reference,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a saved state."""
        self.starts = dict(state_dict["starts"])
        self.losses = deque(state_dict["losses"], maxlen=_RUNNING)
        self.reference = state_dict["reference"]


class _Run:
    """A copy of the model, and the batch that it is run on."""

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch) -> None:
        self.trainer, self.pl_module, self.batch = trainer, pl_module, batch
        # The class's own: an instance may hold a compiled one, of the original.
        self.step = type(pl_module).training_step
        self.copy = pl_module
        self.before = float("nan")  # the loss of the model as it is

    def prepare(self) -> str:
        """Why the loss can't be told; empty if it can."""
        if not self.pl_module.automatic_optimization:
            return "it optimizes by hand"
        if pl.is_param_in_hook_signature(self.step, "dataloader_iter", explicit=True):
            return "it takes a `dataloader_iter`"
        try:
            self.copy = _copy(self.pl_module)
            self.copy.trainer = self.trainer
            self.copy.eval()
            with torch.no_grad():
                self.before = float(self._forward())
        except Exception as error:
            return describe(error)
        return ""

    def loss(self, plan: SurgeryPlan) -> float:
        """The loss after a plan."""
        if not plan:
            return self.before
        with ExitStack() as undo, torch.no_grad():
            apply_plan(self.copy, plan, undo)
            return float(self._forward())

    def task(self, names: Collection[str]) -> dict[str, Task]:
        """Layer name -> what the loss of this batch asks of it, where that can be told."""
        layers = {n: layer for n, layer in find_ssm_layers(self.copy).items() if n in names}
        try:
            with TaskRecorder(layers) as gramians, WeightRecorder(layers) as weights:
                torch.autograd.backward(self._forward())
        except Exception as error:
            pl.rank_zero_info(f"CompreSSMCallback: no task-aware cuts ({describe(error)})")
            return {}
        finally:
            self.copy.zero_grad()
        return {**gramians.gramians, **weights.found}

    def _forward(self) -> Tensor:
        takes_number = pl.is_param_in_hook_signature(self.step, "batch_idx", min_args=2)
        with (
            pl.isolate_rng(),
            warnings.catch_warnings(),
            _force_eager(),
            self.trainer.precision_plugin.train_step_context(),
        ):
            warnings.simplefilter("ignore")
            output = self.step(self.copy, *self.batch[: 1 + takes_number])
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"expected a loss from training_step, got {type(loss).__name__}")
        return loss


def _force_eager() -> AbstractContextManager[Any]:
    """Each try would be compiled otherwise, as it is below torch 2.6, which knows no stance."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    return set_stance("force_eager") if set_stance else nullcontext()


def _shared(own: Mapping[str, Task], processes: Processes) -> dict[str, Task]:
    """What all processes' batches ask, of the layers that all of them ask something of."""
    names = processes.agree(sorted(own))
    there = {n: float(processes.add_up(torch.tensor(float(n in own)))) for n in names}
    return {n: own[n].summed(processes.add_up) for n in names if there[n] == processes.size}


def _copy(pl_module: pl.LightningModule) -> pl.LightningModule:
    """A copy with parameters of its own over the same memory, that logs nothing."""
    memo: dict[int, Any] = {}
    for parameter in pl_module.parameters():
        if type(parameter) is nn.Parameter:
            shared = nn.Parameter(parameter.detach(), parameter.requires_grad)
            shared.__dict__.update(parameter.__dict__)
            memo[id(parameter)] = shared
    copy = deepcopy(pl_module, memo)
    for module in copy.modules():
        if isinstance(module, pl.LightningModule):
            vars(module).update(log=_nothing, log_dict=_nothing)
    return copy


def _nothing(*_: Any, **__: Any) -> None:
    """Logs of a trial are not those of the run."""
