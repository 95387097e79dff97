"""The one place that imports Lightning, by whichever of its two names it is installed.

``lightning.pytorch`` and ``pytorch_lightning`` hold the same code in classes of their own. Each
class here is that of the one that is there, or the union of both, as `isinstance` takes it.
"""

from __future__ import annotations

import sys
from functools import reduce
from importlib import import_module
from operator import or_
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import (
        GradientAccumulationScheduler,
        ModelPruning,
        StochasticWeightAveraging,
        WeightAveraging,
    )
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
    from lightning.pytorch.strategies.launchers import (
        _MultiProcessingLauncher as MultiProcessingLauncher,
    )
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
    from lightning.pytorch.utilities.seed import isolate_rng
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

__all__ = [
    "PACKAGES",
    "Callback",
    "DDPStrategy",
    "GradientAccumulationScheduler",
    "LightningModule",
    "ModelPruning",
    "MultiProcessingLauncher",
    "SingleDeviceStrategy",
    "StochasticWeightAveraging",
    "Strategy",
    "Trainer",
    "WeightAveraging",
    "goes_on_within_epoch",
    "is_param_in_hook_signature",
    "isolate_rng",
    "logged_hyperparameters",
    "rank_zero_info",
    "rank_zero_warn",
]

_NAMES = ("lightning.pytorch", "pytorch_lightning")
_RANK_ZERO = "lightning_utilities.core.rank_zero"


def _packages() -> tuple[str, ...]:
    """Those of the two that can be imported; both are then.

    Raises:
        ModuleNotFoundError: if there is none, saying what to install.
    """
    at_work = {name for name in _NAMES if name in sys.modules}
    logger = getattr(sys.modules.get(_RANK_ZERO), "log", None)
    found, reasons = [], []
    # The one imported last is where messages go that both share; without a choice, `lightning`.
    for name in reversed(_NAMES):
        try:
            import_module(name)
            found.append(name)
        except ImportError as error:
            reasons.append(str(error))
    if not found:
        raise ModuleNotFoundError(
            "CompreSSMCallback and HankelMonitor expect PyTorch Lightning, as lightning or as "
            f"pytorch_lightning, and neither can be imported ({'; '.join(reasons)}). Install the "
            "one that your code imports: pip install 'lightning_compressm[lightning]' or pip "
            "install 'lightning_compressm[pytorch-lightning]'. compress() does without.",
            name="lightning",
        )
    if at_work:
        vars(sys.modules[_RANK_ZERO])["log"] = logger
    return tuple(reversed(found))


PACKAGES = _packages()
"""Of ``lightning.pytorch`` and ``pytorch_lightning`` those that are there."""


def _each(module: str, name: str) -> list[Any]:
    """What the packages call ``name``, without those that have none; once where it is the same."""
    modules = [import_module(f"{package}{module}") for package in PACKAGES]
    return [*dict.fromkeys(getattr(m, name) for m in modules if hasattr(m, name))]


def _either(module: str, name: str) -> Any:
    """The union of the packages' classes; one without instances where none has it."""
    return reduce(or_, _each(module, name) or [type(name, (), {})])


if not TYPE_CHECKING:
    # Lightning asks for its own base: below 2.6 whatever is none of its kind is an error.
    Callback = type("Callback", tuple(_each("", "Callback")), {"__doc__": "Base of callbacks."})
    LightningModule, Trainer = _either("", "LightningModule"), _either("", "Trainer")
    GradientAccumulationScheduler = _either(".callbacks", "GradientAccumulationScheduler")
    ModelPruning = _either(".callbacks", "ModelPruning")
    StochasticWeightAveraging = _either(".callbacks", "StochasticWeightAveraging")
    WeightAveraging = _either(".callbacks", "WeightAveraging")  # from Lightning 2.6
    DDPStrategy = _either(".strategies", "DDPStrategy")
    SingleDeviceStrategy = _either(".strategies", "SingleDeviceStrategy")
    Strategy = _either(".strategies", "Strategy")
    MultiProcessingLauncher = _either(".strategies.launchers", "_MultiProcessingLauncher")
    rank_zero_info = _each(".utilities", "rank_zero_info")[0]
    rank_zero_warn = _each(".utilities", "rank_zero_warn")[0]
    is_param_in_hook_signature = _each(".utilities.signature_utils", "is_param_in_hook_signature")[
        0
    ]
    isolate_rng = _each(".utilities.seed", "isolate_rng")[0]


def logged_hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """What Lightning logs by itself: hyperparameters that module and data module have saved."""
    found: dict[str, Any] = {}
    for holder in (trainer.lightning_module, trainer.datamodule):  # type: ignore[attr-defined]
        if holder is not None and holder._log_hyperparams:
            found |= holder.hparams_initial
    found.pop("_class_path", None)  # LightningCLI's own
    return found


def goes_on_within_epoch(trainer: Trainer) -> bool:
    """Whether a run was resumed in the middle of an epoch and no batch has come since.

    Lightning 2.4 calls ``on_train_epoch_start`` again there.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return trainer.fit_loop.restarting and progress.current.ready > 0 and not progress.is_last_batch
