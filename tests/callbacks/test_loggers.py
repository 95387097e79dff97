"""What loggers get: read back from the files that TensorBoard, W&B and MLflow have written."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_compressm import CompreSSMCallback, HankelMonitor

from .helpers import BATCHES, Classifier, trainer
from .names import NAMES, task

pytest.importorskip("matplotlib")
mlflow = pytest.importorskip("mlflow")
event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
pytest.importorskip("wandb")

PNG = b"\x89PNG"
LAYERS = ("net.first", "net.second")


@dataclass
class Run:
    """A Trainer after its run, with its callbacks by the names of their kinds."""

    folder: Path
    loggers: dict[str, Any]
    callbacks: list[Any]
    said: list[str] = field(default_factory=list)

    def events(self) -> Any:
        events = event_accumulator.EventAccumulator(
            self.loggers["TensorBoardLogger"].log_dir, size_guidance={"images": 0, "histograms": 0}
        )
        return events.Reload()

    def store(self) -> tuple[Any, str]:
        logger = self.loggers["MLFlowLogger"]
        return mlflow.MlflowClient(logger._tracking_uri), logger.run_id


def train(name: str, folder: Path, loggers: list[Any], **settings: Any) -> Run:
    """Two epochs, cut after the first batches of both; what was warned of comes along."""
    monitor = HankelMonitor(tolerance=0.1)
    cut = CompreSSMCallback(
        fraction=0.5, window=(0, 2 * BATCHES), every_n_steps=5, layers=["net.*"], verbose=False
    )
    package = import_module(name)
    model = task(name)()
    model.save_hyperparameters({"tolerance": "the module's own"})
    fit = trainer(
        folder, monitor, cut, package=package, logger=loggers, max_epochs=2, **settings
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit.fit(model)
    by_kind = {type(logger).__name__: logger for logger in loggers}
    return Run(folder, by_kind, [monitor, cut], [str(one.message) for one in said])


@pytest.fixture(scope="module", params=NAMES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run with four loggers at once, under either name of Lightning."""
    folder = tmp_path_factory.mktemp("loggers")
    kinds = import_module(f"{request.param}.loggers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        loggers = [
            kinds.TensorBoardLogger(folder),
            kinds.MLFlowLogger(tracking_uri=(folder / "mlflow").as_uri()),
            kinds.WandbLogger(save_dir=folder, offline=True),
            kinds.CSVLogger(folder / "csv"),
        ]  # fmt: skip
        yield train(request.param, folder, loggers)
        import_module("wandb").finish()


def test_tensorboard(run: Run) -> None:
    events = run.events()
    print(events.Tags()); print(run.said)


def test_mlflow(run: Run) -> None:
    client, run_id = run.store()
    print(client.get_run(run_id).data)
    print([str(p.relative_to(run.folder)) for p in run.folder.rglob("*") if p.is_file()])
