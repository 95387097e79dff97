"""`lightning`, but what is behind it is `pytorch_lightning`.

With this folder first on PYTHONPATH every test that imports Lightning runs under its other name, in
all processes that it starts (`make test-other-name`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytorch_lightning

_BEHIND = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}

__version__ = pytorch_lightning.__version__


class _Behind(MetaPathFinder, Loader):
    """Gives the module of the other name instead of making one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = ".".join(fullname.split(".")[:2])
        if package not in _BEHIND:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        package = ".".join(spec.name.split(".")[:2])
        module = importlib.import_module(spec.name.replace(package, _BEHIND[package]))
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It was executed under its own name, which it keeps."""
        if module.__spec__ is not None:
            module.__spec__ = self._specs[module.__spec__.name]

    _specs: dict[str, ModuleSpec | None]

    def __init__(self) -> None:
        self._specs = {}


sys.meta_path.insert(0, _Behind())

from lightning.pytorch import (  # noqa: E402
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)

__all__ = ["Callback", "LightningDataModule", "LightningModule", "Trainer", "seed_everything"]
