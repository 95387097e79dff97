"""The callback that shrinks SSM layers while they train."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

from torch.optim import Optimizer

from lightning_compressm._rules import COUNT, FLAG, one_of, optional
from lightning_compressm.callbacks import _lightning as pl
from lightning_compressm.callbacks._averages import (
    align_averages,
    average_to_current,
    install_hooks_on_averages,
)
from lightning_compressm.callbacks._checkpoint import check_optimizer_states
from lightning_compressm.callbacks._limits import is_last_step
from lightning_compressm.callbacks._loggers import settled_arguments
from lightning_compressm.callbacks._pictures import ReductionPictures
from lightning_compressm.callbacks._refusals import check_fit, check_setup
from lightning_compressm.callbacks._reports import RunReports
from lightning_compressm.callbacks._rollback import RollbackGuard
from lightning_compressm.callbacks._run import ReductionRun
from lightning_compressm.callbacks._show import show_summary
from lightning_compressm.callbacks.schedule import schedule_of
from lightning_compressm.model.resizing import install_resize_hooks
from lightning_compressm.reduction.policy import (
    DEFAULT_LOSS_BUDGET,
    DEFAULT_OUTPUT_ERROR,
    BalanceChoice,
    ReductionPolicy,
    Selection,
)
from lightning_compressm.surgery.optimizer import OptimizerStatePolicy

__all__ = ["CompreSSMCallback"]


class CompreSSMCallback(RunReports):
    """Remove states of little Hankel energy from SSM layers early in training.

    Without arguments it looks after 10, 20 and 30% of the training steps, balances every SSM
    layer, and halves the states of those where that hardly changes the loss, tried on a training
    batch: down to a quarter of the first states, and once the loss has fallen to half of what it
    was at the first look, down to a sixteenth.

    With ``tolerance``, ``fraction`` or ``state_dim`` it looks at the ends of epochs inside
    ``window``; the swap comes before the next epoch's first step, after checkpoints were written,
    so that every checkpoint holds the weights that its metric was measured on. With
    ``every_n_steps``, or if no epoch ends inside the window, it acts right after an optimizer step.
    Every run gets at least one look.

    Loggers get state dimensions; TensorBoard, W&B and MLflow also figures of what each look cuts.

    Args:
        tolerance: share of each layer's Hankel energy that may go, in [0, 1). At most one of
            ``tolerance``, ``fraction``, ``state_dim`` and ``loss_budget``.
        fraction: drop this share of the current states at every look, in [``min_reduction``, 1).
        state_dim: go down to this dimension.
        loss_budget: at each look halve the states of layers, or take a quarter, as long as the loss
            of a training batch rises by at most this share of the running loss, in [0, 1). The
            default, 0.02.
        floor: with ``loss_budget``, the least share of a layer's first states that stays; a quarter
            of that from the third look on, if the running loss has fallen to half by then.
        window: two floats: shares of the training run; two ints: optimizer steps. ``None`` for
            (0.1, 0.3) with ``loss_budget``, which looks three times, evenly, else (0.0, 0.1).
        every_n_epochs: look at the end of every n-th epoch.
        every_n_steps: instead, look every n optimizer steps.
        min_reduction: act only if at least this share of a layer's states goes, in [0, 1).
        min_state_dim: never go below.
        round_to: round the kept dimension up to a multiple.
        share_state_dim: one dimension for all layers of a family.
        layers: glob patterns of module names to reduce; ``None`` for all that are not frozen.
        ignore: glob patterns of module names to leave alone.
        averages: glob patterns of layers that hold averages of others (EMA by hand, target
            networks); they get the same projection as what they average.
        balance: ``"real"``, ``"folded"`` or ``"complex"`` (as published); ``"auto"`` is folded,
            which leaves no states with real poles, whose phases could not be trained.
        horizon: steps of time-limited Gramians, ``None`` for infinite (as published), ``"auto"``
            for the length of the training sequences.
        criterion: which states of selective layers stay: ``"averaged_lti"``, ``"empirical"``,
            ``"greedy"``, or the ablations ``"smallest"`` and ``"random"``; ``"auto"`` is the
            package's choice.
        selection: ``"largest"``, or the ablations ``"smallest"`` and ``"random"``.
        calibration_batches: the latest training batches, as many as selective layers are calibrated
            on; added up over the ranks.
        refit: let the rest of a selective layer make up for the states that go.
        max_output_error: refuse a cut of a selective layer that changes its output on the
            calibration batches by more than this share (root mean squares); before that, try with
            more states. ``None`` for no limit.
        monitor: name of a logged validation metric. The next validation after a reduction decides:
            if it got worse than at the last validation before, the state of before the reduction
            comes back (weights, buffers, optimizer state, averaged models; schedules go on), and
            nothing is reduced any more. No reduction comes before the first validation then.
        mode: whether lower (``"min"``) or higher (``"max"``) values of ``monitor`` are better.
        max_degradation: by how much ``monitor`` may get worse, in its own unit.
        rollback_dir: folder that keeps the state of before a reduction until it is judged, one file
            for each rank; ``None`` for host memory, from where it goes into checkpoints.
        optimizer_state: ``"transport"`` carries optimizer moments through the change of basis,
            ``"truncate"`` slices them, ``"reset"`` drops them.
        learning_speed: multiply the steps of a cut layer's parameters by N / r, never beyond the
            highest learning rate of another group (Adam and its kin; others are left alone). Not at
            all where all is in one group. ``None``: only without a target of your own.
        verbose: on rank 0, print a table of every event and a summary at the end, and show the sum
            of the state dimensions in the progress bar.

    Attributes:
        history: one dict for each layer and look: ``step, epoch, layer, family, action,
            old_state_dim, new_state_dim, energy_kept, error_bound, seconds`` and more.

    Raises:
        ValueError: for contradictory or out-of-range arguments.

    Source:
        CompreSSM, arXiv 2510.02823, algorithm 1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(accelerator="cpu", logger=False, callbacks=[CompreSSMCallback()])
    """

    def __init__(
        self,
        tolerance: float | None = None,
        *,
        fraction: float | None = None,
        state_dim: int | None = None,
        loss_budget: float | None = None,
        floor: float = 0.25,
        window: tuple[int | float, int | float] | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        min_reduction: float = 0.05,
        min_state_dim: int = 1,
        round_to: int = 1,
        share_state_dim: bool = False,
        layers: list[str] | None = None,
        ignore: list[str] | None = None,
        averages: list[str] | None = None,
        balance: BalanceChoice = "auto",
        horizon: int | Literal["auto"] | None = "auto",
        criterion: str = "auto",
        selection: Selection = "largest",
        calibration_batches: int = 1,
        refit: bool = True,
        max_output_error: float | None = DEFAULT_OUTPUT_ERROR,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        max_degradation: float = 0.02,
        rollback_dir: str | None = None,
        optimizer_state: OptimizerStatePolicy = "transport",
        learning_speed: bool | None = None,
        verbose: bool = True,
    ) -> None:
        one_of(*get_args(OptimizerStatePolicy)).check("optimizer_state", optimizer_state)
        COUNT.check("calibration_batches", calibration_batches)
        optional(FLAG).check("learning_speed", learning_speed)
        FLAG.check("verbose", verbose)
        if tolerance is None and fraction is None and state_dim is None and loss_budget is None:
            loss_budget = DEFAULT_LOSS_BUDGET
        by_loss = loss_budget is not None
        learning_speed = by_loss if learning_speed is None else learning_speed
        self.policy = ReductionPolicy(
            tolerance=tolerance,
            fraction=fraction,
            state_dim=state_dim,
            loss_budget=loss_budget,
            floor=floor,
            min_reduction=min_reduction,
            min_state_dim=min_state_dim,
            round_to=round_to,
            share_state_dim=share_state_dim,
            layers=layers,
            ignore=ignore,
            averages=averages,
            balance=balance,
            horizon=horizon,
            selection=selection,
            criterion=criterion,
            refit=refit,
            max_output_error=max_output_error,
            trained_on=True,
        )
        schedule = schedule_of(by_loss, window, every_n_epochs, every_n_steps)
        new_guard = partial(RollbackGuard, monitor, mode, max_degradation, rollback_dir)
        self._new_run = partial(
            ReductionRun,
            self.policy,
            schedule,
            calibration_batches,
            optimizer_state,
            new_guard,
            verbose,
            learning_speed,
        )
        self._run = self._new_run()
        self.hyperparameters = settled_arguments(CompreSSMCallback.__init__, locals())

    # -- before training ---------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what can't work; make checkpoints of reduced models loadable."""
        self._fitting = stage == "fit"
        if self._fitting:
            check_setup(trainer, pl_module)
            if not self._run.goes_on(trainer, pl_module):
                self._run = self._new_run()
        install_resize_hooks(pl_module)
        install_hooks_on_averages(trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check layers and optimizers."""
        self._run.take(trainer, pl_module)
        check_fit(trainer, self._run.layers.values())
        self._run.guard.check(trainer, len(_all_together(trainer)))
        align_averages(trainer, pl_module)
        self._run.pictures = ReductionPictures(*self._open_gallery(trainer))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tie the window to this run; check what a checkpoint gave the optimizers only now."""
        self._logged = {}
        self._run.begin(trainer)
        check_optimizer_states(trainer.optimizers, pl_module)

    # -- training ----------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go back, or swap what the end of the last epoch committed to."""
        if pl.goes_on_within_epoch(trainer):
            return
        self._run.roll_back(trainer, pl_module)
        # A checkpoint written during validation is older than its epoch's look: catch up.
        self._run.after_epoch(trainer, pl_module, trainer.current_epoch - 1)
        self._run.execute(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the layers, as long as something about the data is to be learnt."""
        self._run.listen()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """See that every layer that needs data gets some."""
        self._run.before_step(optimizer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Act right after an optimizer step, where the schedule says so."""
        self._run.clock.tick()
        self._run.after_batch(trainer, pl_module, outputs, (batch, batch_idx))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the latest reductions."""
        self._run.clock.pause()
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._run.guard.judge(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the spectra and commit to a plan; log the dimensions of this epoch."""
        self._run.clock.pause()
        self._run.watch.drop()
        self._log_dimensions(trainer, pl_module, _all_together(trainer))
        if not is_last_step(trainer):
            self._run.after_epoch(trainer, pl_module, trainer.current_epoch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go back if the last validation wants it."""
        if self._run.roll_back(trainer, pl_module):
            average_to_current(trainer, pl_module)
        if self._run.verbose:
            show_summary(trainer, self._run.clock, self.history, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Detach from the layers."""
        self._run.leave(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember the weights as this fit leaves them."""
        if stage == "fit":
            self._run.leave(pl_module)


def _all_together(trainer: pl.Trainer) -> list[CompreSSMCallback]:
    """All that reduce the Trainer's model, in its order of callbacks."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, CompreSSMCallback)]
