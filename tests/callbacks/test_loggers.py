"""What loggers get: read back from the files that TensorBoard, W&B and MLflow have written."""

from __future__ import annotations

import csv
import struct
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_compressm import CompreSSMCallback, HankelMonitor
from lightning_compressm.callbacks._loggers import Gallery

from .helpers import BATCHES, trainer
from .names import NAMES, task

pytest.importorskip("matplotlib")
mlflow = pytest.importorskip("mlflow")
wandb = pytest.importorskip("wandb")
accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
hparams = pytest.importorskip("tensorboard.plugins.hparams.metadata")

LAYERS = ("net.first", "net.second")
CUTS = [5, 10]
FIGURES = {
    "compressm/spectrum/net.first": CUTS,
    "compressm/spectrum/net.second": CUTS,
    "compressm/state_dims": CUTS,
    "compressm/before_after": CUTS,
    "compressm/spectra_over_training": CUTS[1:],
    "hankel/spectrum/net.first": [BATCHES, 2 * BATCHES],
    "hankel/spectrum/net.second": [BATCHES, 2 * BATCHES],
    "hankel/spectra_over_training": [2 * BATCHES],
}
"""Tag -> optimizer steps at which there is a figure."""


class Run:
    """Two epochs, cut after steps 5 and 10 and measured after both epochs.

    Attributes:
        said: all warnings, in order.
    """

    def __init__(self, name: str, folder: Path, loggers: list[Any], *more: Any) -> None:
        self.loggers = {type(logger).__name__: logger for logger in loggers}
        cut = {"fraction": 0.5, "window": (0, 2 * BATCHES), "every_n_steps": 5, "verbose": False}
        self.callback = CompreSSMCallback(**cut)
        callbacks = [HankelMonitor(tolerance=0.1), self.callback, *more]
        self.model = task(name)()
        self.model.save_hyperparameters({"tolerance": "of the module itself"})
        settings = {"logger": loggers, "max_epochs": 2, "log_every_n_steps": 1}
        fit = trainer(folder, *callbacks, package=import_module(name), **settings)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fit.fit(self.model)
        self.said = [str(one.message) for one in said]


def events(logger: Any) -> Any:
    """A TensorBoard run, read back."""
    everything = {"images": 0, "histograms": 0, "scalars": 0}
    return accumulator.EventAccumulator(logger.log_dir, everything).Reload()


def is_picture(data: bytes) -> bool:
    """Whether it is a PNG, as large as it was drawn."""
    width, height = struct.unpack(">II", data[16:24])
    return data.startswith(b"\x89PNG") and width in (640, 900) and height >= 100


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """One run with several loggers at once."""
    folder = tmp_path_factory.mktemp("loggers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        loggers = [
            CSVLogger(folder),
            TensorBoardLogger(folder),
            MLFlowLogger(tracking_uri=(folder / "mlflow").as_uri()),
            WandbLogger(save_dir=folder, offline=True),
        ]
        yield Run("lightning.pytorch", folder, loggers)
        wandb.finish()


def test_nothing_is_said_of_loggers(run: Run) -> None:
    assert not [text for text in run.said if "CompreSSM" in text or "Hankel" in text]
    assert [e["step"] for e in run.callback.history if e["layer"] == "net.first"] == CUTS


def test_tensorboard(run: Run) -> None:
    read = events(run.loggers["TensorBoardLogger"])
    assert [point.value for point in read.Scalars("compressm/state_dim/net.first")] == [12, 6]
    assert len(read.Scalars("hankel/rank/net.second")) == 2
    tags = read.Tags()
    assert set(tags["images"]) == set(FIGURES)
    for tag, steps in FIGURES.items():
        images = read.Images(tag)
        assert [image.step for image in images] == steps
        assert all(is_picture(image.encoded_image_string) for image in images)
    (first, second) = read.Histograms("compressm/log10_hsv/net.first")
    assert (first.histogram_value.num, second.histogram_value.num) == (24, 12)


def test_tensorboard_shows_hyperparameters_of_all_together(run: Run) -> None:
    metadata = events(run.loggers["TensorBoardLogger"]).SummaryMetadata(
        hparams.SESSION_START_INFO_TAG
    )
    start = hparams.parse_session_start_info_plugin_data(metadata.plugin_data.content)
    assert start.hparams["tolerance"].string_value == "of the module itself"
    assert start.hparams["compressm/fraction"].number_value == 0.5
    assert start.hparams["compressm/learning_speed"].bool_value is False
    assert start.hparams["hankel/tolerance"].number_value == 0.1
    assert dict(run.model.hparams) == {"tolerance": "of the module itself"}


def test_mlflow(run: Run) -> None:
    logger = run.loggers["MLFlowLogger"]
    client = mlflow.MlflowClient(logger._tracking_uri)
    data = client.get_run(logger.run_id).data
    assert data.metrics["compressm/state_dim/net.first"] == 6
    assert data.params["tolerance"] == "of the module itself"
    assert data.params["compressm/fraction"] == "0.5"
    assert data.params["hankel/tolerance"] == "0.1"
    root = Path(client.download_artifacts(logger.run_id, ""))
    pictures = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.png")}
    wanted = {f"{tag}/step-{step:07d}.png" for tag, steps in FIGURES.items() for step in steps}
    assert set(pictures) == wanted
    assert all(map(is_picture, pictures.values()))


def test_wandb(run: Run) -> None:
    logger = run.loggers["WandbLogger"]
    assert logger.experiment.config["compressm/fraction"] == 0.5
    assert logger.experiment.config["tolerance"] == "of the module itself"
    root = Path(logger.experiment.dir) / "media" / "images"
    for tag, steps in FIGURES.items():
        pictures = [p.read_bytes() for p in root.rglob("*.png") if f"{tag}_" in str(p)]
        assert len(pictures) == len(steps), tag
        assert all(map(is_picture, pictures))


def test_csv_gets_scalars_and_hyperparameters(run: Run) -> None:
    folder = Path(run.loggers["CSVLogger"].log_dir)
    with (folder / "metrics.csv").open() as file:
        assert "compressm/state_dim/net.first" in next(csv.reader(file))
    assert "compressm/fraction: 0.5" in (folder / "hparams.yaml").read_text()
    assert not list(folder.rglob("*.png"))


# -- what goes wrong -----------------------------------------------------------------------------


class Broken(TensorBoardLogger):
    """Its server takes no figures."""

    @property
    def experiment(self) -> Any:
        writer = super().experiment
        writer.add_figure = self._refuse
        return writer

    def _refuse(self, *_: Any) -> None:
        raise ConnectionError("no route to host")


def test_a_logger_that_fails_ends_nothing_and_is_named_once(tmp_path: Path) -> None:
    broken, whole = Broken(tmp_path / "broken"), TensorBoardLogger(tmp_path / "whole")
    run = Run("lightning.pytorch", tmp_path, [broken, whole])
    (said,) = [text for text in run.said if text.startswith("CompreSSMCallback")]
    assert "Broken" in said
    assert "ConnectionError: no route to host" in said
    assert run.callback.state_dims == {"net.first": 6, "net.second": 3}
    assert len(events(broken).Scalars("compressm/state_dim/net.first")) == 2
    assert set(events(whole).Tags()["images"]) == set(FIGURES)


def test_without_matplotlib_there_are_histograms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    loggers = [TensorBoardLogger(tmp_path / "one"), TensorBoardLogger(tmp_path / "two")]
    run = Run("lightning.pytorch", tmp_path, loggers)
    (said,) = [text for text in run.said if text.startswith("CompreSSMCallback")]
    assert "pip install 'lightning_compressm[plot]'" in said
    tags = events(loggers[1]).Tags()
    assert not tags["images"]
    assert {f"compressm/log10_hsv/{name}" for name in LAYERS} <= set(tags["histograms"])


@pytest.mark.parametrize("name", NAMES[1:])
def test_several_callbacks_keep_apart_under_the_other_name(name: str, tmp_path: Path) -> None:
    logger = import_module(f"{name}.loggers").TensorBoardLogger(tmp_path)
    second = {"layers": ["net.second"], "window": (0, 8), "every_n_steps": 7, "verbose": False}
    Run(name, tmp_path, [logger], CompreSSMCallback(fraction=0.25, **second))
    assert logger.hparams["compressm/fraction"] == 0.5
    assert logger.hparams["compressm-2/fraction"] == 0.25
    read = events(logger)
    assert [image.step for image in read.Images("compressm/before_after")] == CUTS
    assert [image.step for image in read.Images("compressm-2/before_after")] == [7]


def test_other_ranks_draw_nothing(tmp_path: Path) -> None:
    fit = SimpleNamespace(is_global_zero=False, loggers=[TensorBoardLogger(tmp_path)])
    drawn: list[int] = []
    for fit.is_global_zero in (False, True):
        Gallery("it").show(fit, 1, lambda: drawn.append(1) or {}, {})
        assert len(drawn) == fit.is_global_zero
