"""What loggers get beyond scalars: hyperparameters, figures and histograms.

Loggers are told apart by what they offer, so none of their packages is imported here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lightning_compressm.callbacks import _lightning as pl
from lightning_compressm.reduction.failures import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Figures", "Gallery", "LoggedCallback", "settled_arguments"]

Figures = Mapping[str, "Figure"]
"""Tag -> figure."""

Taker = Callable[[str, Any, int], object]
"""Takes a tag, what is shown under it, and the optimizer steps done."""


class Gallery:
    """Gives figures and histograms to the loggers of a Trainer, on rank 0; never ends a run.

    Args:
        owner: the callback that shows something, for messages.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._failed: set[int] = set()  # loggers, by their number in the Trainer
        self._drawable = True

    def show(
        self,
        trainer: pl.Trainer,
        step: int,
        draw: Callable[[], Figures],
        values: Mapping[str, Tensor],
    ) -> None:
        """Hand over what can be shown; nothing is drawn if no logger takes figures.

        Args:
            trainer: whose loggers they are.
            step: optimizer steps done.
            draw: makes the figures.
            values: tag -> what a histogram is made of.
        """
        figures: Figures | None = None
        for logger in self._loggers(trainer):
            with self._no_more_than_a_warning(trainer, logger):
                for tag, value in values.items():
                    _takes_histograms(logger)(tag, value, step)
                takes_figure = _takes_figures(logger)
                if takes_figure is not None and figures is None:
                    figures = self._drawn(draw)
                for tag, figure in (figures or {}).items():
                    if takes_figure is not None:
                        takes_figure(tag, figure, step)

    def log_hyperparameters(self, trainer: pl.Trainer, parameters: Mapping[str, Any]) -> None:
        """Log hyperparameters with all loggers; each of them knows how."""
        for logger in self._loggers(trainer):
            with self._no_more_than_a_warning(trainer, logger):
                logger.log_hyperparams(dict(parameters))

    def _loggers(self, trainer: pl.Trainer) -> list[Any]:
        if not trainer.is_global_zero:
            return []
        return [one for i, one in enumerate(trainer.loggers) if i not in self._failed]

    @contextmanager
    def _no_more_than_a_warning(self, trainer: pl.Trainer, logger: Any) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # A server that is away would be waited for at every figure.
            self._failed.add(trainer.loggers.index(logger))
            pl.rank_zero_warn(
                f"{self.owner}: {type(logger).__name__} could not take a figure, a histogram or "
                f"hyperparameters ({describe(error)}). It gets only scalars for the rest of this "
                "fit; training goes on."
            )

    def _drawn(self, draw: Callable[[], Figures]) -> Figures:
        if self._drawable:
            try:
                return draw()
            except ImportError as error:
                self._drawable = False
                pl.rank_zero_warn(f"{self.owner} logs no figures: {error}")
        return {}


class LoggedCallback(pl.Callback):
    """A callback whose hyperparameters and figures loggers get.

    Attributes:
        hyperparameters: argument -> value, with defaults that depend on others filled in.
    """

    _PREFIX: ClassVar[str]
    hyperparameters: dict[str, Any]

    def _open_gallery(self, trainer: pl.Trainer) -> tuple[Gallery, str]:
        """At the start of a fit: log the hyperparameters; what shows figures, and their prefix."""
        gallery = Gallery(type(self).__name__)
        prefixes = _prefixes(trainer)
        if next(iter(prefixes)) is self:
            # TensorBoard shows the hyperparameters that it gets first and no others, and Lightning
            # logs those of the module after this: so all go together.
            found = pl.logged_hyperparameters(trainer)
            for callback, prefix in prefixes.items():
                found |= {f"{prefix}/{k}": v for k, v in callback.hyperparameters.items()}
            gallery.log_hyperparameters(trainer, found)
        return gallery, prefixes[self]


def _prefixes(trainer: pl.Trainer) -> dict[LoggedCallback, str]:
    """For each of our callbacks a prefix of its own, in the Trainer's order."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    found: dict[LoggedCallback, str] = {}
    for callback in callbacks:
        if isinstance(callback, LoggedCallback):
            prefix = callback._PREFIX
            before = sum(prefix == other._PREFIX for other in found)
            found[callback] = f"{prefix}-{before + 1}" if before else prefix
    return found


def settled_arguments(function: Callable[..., None], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor, by the values that its local variables have at its end."""
    return {name: values[name] for name in inspect.signature(function).parameters if name != "self"}


def _takes_figures(logger: Any) -> Taker | None:
    """How a logger takes a figure; ``None`` if it takes none."""
    if hasattr(logger, "log_image"):  # Weights & Biases
        return lambda tag, figure, step: logger.log_image(tag, [figure], step)
    experiment = logger.experiment
    if hasattr(experiment, "add_figure"):  # TensorBoard
        return lambda tag, figure, step: experiment.add_figure(tag, figure, step)
    if hasattr(logger, "run_id") and hasattr(experiment, "log_figure"):  # MLflow
        return lambda tag, figure, step: experiment.log_figure(
            logger.run_id, figure, f"{tag}/step-{step:07d}.png"
        )
    return None


def _takes_histograms(logger: Any) -> Taker:
    """How a logger takes a histogram, if it does."""
    take: Taker = getattr(logger.experiment, "add_histogram", _nothing)
    return take


def _nothing(tag: str, value: Any, step: int) -> None:
    """For a logger that has no such thing."""
