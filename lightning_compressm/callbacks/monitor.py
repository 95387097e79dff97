"""A callback that only watches: Hankel spectra over training."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from lightning_compressm._rules import COUNT
from lightning_compressm.callbacks import _lightning as pl
from lightning_compressm.callbacks._checkpoint import read_spectra
from lightning_compressm.callbacks._loggers import LoggedCallback, settled_arguments
from lightning_compressm.callbacks._pictures import SpectrumPictures
from lightning_compressm.callbacks._ranks import decide_together
from lightning_compressm.callbacks._watch import TrainingWatch
from lightning_compressm.control import order_for_energy
from lightning_compressm.model.layers import select_layers
from lightning_compressm.model.resizing import install_resize_hooks
from lightning_compressm.reduction.decide import measure_spectra
from lightning_compressm.reduction.policy import BalanceChoice, ReductionPolicy
from lightning_compressm.reduction.processes import Processes

__all__ = ["HankelMonitor"]


class HankelMonitor(LoggedCallback):
    """Log how many states each SSM layer needs, and keep its spectra; changes nothing.

    Logs ``hankel/rank/<layer>``: the states whose Hankel singular values hold ``1 - tolerance`` of
    the layer's energy, and ``hankel/energy/<layer>``: the sum of all. TensorBoard, W&B and MLflow
    also get the spectra as figures.

    Args:
        tolerance: share of the energy that may be missing, in [0, 1).
        every_n_epochs: look at the end of every n-th epoch.
        layers: glob patterns of module names; ``None`` for all.
        ignore: glob patterns of module names to leave out.
        balance: as for :class:`CompreSSMCallback`.
        horizon: as for :class:`CompreSSMCallback`.

    Attributes:
        history: one dict for each look: ``step``, ``epoch``, and ``spectra``, a dict of layer name
            to descending Hankel singular values (a CPU tensor).

    Raises:
        ValueError: for values out of range.

    Example:
        >>> HankelMonitor(tolerance=0.01).history
        []
    """

    _PREFIX = "hankel"
    _pictures: SpectrumPictures

    def __init__(
        self,
        tolerance: float = 0.05,
        *,
        every_n_epochs: int = 1,
        layers: list[str] | None = None,
        ignore: list[str] | None = None,
        balance: BalanceChoice = "auto",
        horizon: int | Literal["auto"] | None = "auto",
    ) -> None:
        COUNT.check("every_n_epochs", every_n_epochs)
        self.policy = ReductionPolicy(
            tolerance=tolerance,
            layers=layers,
            ignore=ignore,
            balance=balance,
            horizon=horizon,
            trained_on=True,
        )
        self.tolerance = tolerance
        self.every_n_epochs = every_n_epochs
        self._fitting = True  # a test of some checkpoint must not replace the history of training
        self._reset()
        self.hyperparameters = settled_arguments(HankelMonitor.__init__, locals())

    def _reset(self) -> None:
        self.history: list[dict[str, Any]] = []
        self._watch = TrainingWatch(self.policy, batches=1)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make checkpoints of reduced models loadable."""
        self._fitting = stage == "fit"
        if self._fitting and trainer.global_step == 0:
            self._reset()
        install_resize_hooks(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse patterns that match nothing before the first step."""
        self._watch.start(select_layers(pl_module, self.policy.layers, self.policy.ignore))
        self._pictures = SpectrumPictures(*self._open_gallery(trainer))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the layers for lengths and calibration data."""
        self._watch.attach(looking=True)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop watching."""
        self._watch.detach()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record and log the spectra."""
        self._watch.drop()
        if (trainer.current_epoch + 1) % self.every_n_epochs or not self._watch.ready:
            return  # a resume at an epoch's end has no data to calibrate on

        layers = select_layers(pl_module, self.policy.layers, self.policy.ignore)

        def measure(processes: Processes) -> dict[str, Tensor]:
            seen = self._watch.seen
            found = measure_spectra(layers, self.policy, seen, processes, leave_out=True)
            return {name: sigma.cpu() for name, sigma in found.items()}

        spectra = decide_together(trainer.strategy, measure)
        self.history.append(
            {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "spectra": spectra,
            }
        )
        ranks = self._ranks(spectra)
        metrics = {f"hankel/energy/{name}": float(sigma.sum()) for name, sigma in spectra.items()}
        metrics |= {f"hankel/rank/{name}": float(rank) for name, rank in ranks.items()}
        pl_module.log_dict(metrics, sync_dist=trainer.world_size > 1)
        self._pictures.show(trainer, spectra, ranks)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the spectra of all looks together."""
        looks = [entry | {"kept": self._ranks(entry["spectra"])} for entry in self.history]
        self._pictures.show_history(trainer, looks)

    def _ranks(self, spectra: dict[str, Tensor]) -> dict[str, int]:
        """Layer name -> states that hold the share of the energy that is to stay."""
        # A layer whose B or C is zero, as some are initialised, needs no state.
        return {
            name: order_for_energy(sigma, self.tolerance) if sigma.any() else 0
            for name, sigma in spectra.items()
        }

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Detach from the layers."""
        self._watch.detach()

    def state_dict(self) -> dict[str, Any]:
        """The history; plain types and tensors."""
        return {"history": list(self.history), "sequences": self._watch.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the history of a checkpoint that is trained on.

        Raises:
            CheckpointError: if it is damaged; the callback is as it was then.
        """
        if not self._fitting:
            return
        self.history, sequences = read_spectra(state_dict)
        self._watch.load_state_dict(sequences)
