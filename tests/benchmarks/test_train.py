"""Every configuration is built; some small ones train, one of them as two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import yaml

from benchmarks.models import ClassifierModule, SequenceClassifier
from benchmarks.train import command as train
from benchmarks.train.command import main
from benchmarks.train.configurations import FOLDER, configurations
from benchmarks.train.published import TASKS
from lightning_compressm import CompreSSMCallback, find_ssm_layers, load_compressed

ROOT = Path(__file__).parents[2]
FILES = sorted(configurations())
# One that compresses for each task at both scales; the others of a task differ in a number.
LARGEST_TAU = [
    f"{folder}{name}_tau{task.taus[-1]:.2f}.yaml"
    for folder in ("", "cpu/")
    for name, task in TASKS.items()
]
# What else there is: nothing is compressed, or Mamba layers are.
OTHER_FORMS = [name for name in FILES if "baseline" in name or "mamba" in name]
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
# States, channels, blocks, steps, batch, learning rate; from the published configurations.
# Fashion-MNIST is as MNIST.
PUBLISHED = {
    "smnist": (256, 8, 1, 200_000, 50, 4e-4),
    "sfashion": (256, 8, 1, 200_000, 50, 4e-4),
    "scifar": (384, 512, 6, 180_000, 50, 1e-3),
    "listops": (256, 128, 6, 80_000, 32, 1e-3),
    "imdb": (192, 256, 1, 50_000, 32, 1e-3),
    "aan": (256, 128, 6, 100_000, 64, 1e-3),
    "pathfinder": (256, 192, 6, 500_000, 64, 1e-3),
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter", "ignore:.*tensorboardX"
)


@pytest.fixture(autouse=True)
def _seed_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets these for the whole process."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


def build(name: str, *options: str) -> Any:
    if "mamba" in name and find_spec("mamba_ssm") is None:
        pytest.skip("mamba-ssm is missing")
    return main(["--config", str(FOLDER / name), *options], run=False)


def fit(
    name: str, folder: Path, *, max_steps: int, ckpt_path: Path | None = None, **compression: object
) -> Any:
    """A few steps, each validated; the last callback of the list is the one that compresses."""
    trainer = {"max_steps": max_steps, "val_check_interval": 1, "limit_val_batches": 1}
    options = [f"--trainer.{key}={value}" for key, value in trainer.items()]
    options += [f"--trainer.callbacks.{key}={value}" for key, value in compression.items()]
    options += [f"--trainer.default_root_dir={folder}", *QUIET]
    options += [f"--ckpt_path={ckpt_path}"] if ckpt_path else []
    return main(["fit", "--config", str(FOLDER / name), *options])


def check(name: str) -> None:
    cli = build(name)
    expected = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    network = expected["model"]["init_args"]["model"]["init_args"]
    layers = find_ssm_layers(cli.model)
    assert [layer.state_dim for layer in layers.values()] == [network["d_state"]] * network[
        "n_blocks"
    ]
    callbacks = [c for c in cli.trainer.callbacks if isinstance(c, CompreSSMCallback)]
    assert len(callbacks) == ("baseline" not in name)
    assert cli.trainer.max_steps == expected["trainer"]["max_steps"]
    assert cli.datamodule.batch_size == expected["data"]["init_args"]["batch_size"]


def test_the_files_are_those_of_the_table() -> None:
    found = {p.relative_to(FOLDER).as_posix(): p.read_text("utf-8") for p in FOLDER.rglob("*.yaml")}
    assert found == configurations(), "run python -m benchmarks.recipes"


def test_every_file_has_a_twin() -> None:
    full = {name for name in FILES if "/" not in name}
    assert {f"cpu/{name}" for name in full} == set(FILES) - full


@pytest.mark.parametrize("task", TASKS)
def test_published_figures(task: str) -> None:
    for path in sorted(FOLDER.glob(f"{task}_*.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        module = config["model"]["init_args"]
        network = module["model"]["init_args"]
        assert PUBLISHED[task] == (
            network["d_state"],
            network["d_model"],
            network["n_blocks"],
            config["trainer"]["max_steps"],
            config["data"]["init_args"]["batch_size"],
            module["lr"],
        )
        tau = re.search(r"tau(.*)\.yaml", path.name)
        compressions = [
            callback["init_args"]
            for callback in config["trainer"]["callbacks"]
            if "CompreSSM" in callback["class_path"]
        ]
        assert [c["tolerance"] for c in compressions] == ([float(tau[1])] if tau else [])
        assert all((c["balance"], c["horizon"]) == ("complex", None) for c in compressions)


@pytest.mark.parametrize("name", LARGEST_TAU)
def test_a_file_of_every_task_is_built(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_FORMS)
def test_a_file_of_every_other_form_is_built(name: str) -> None:
    check(name)


@pytest.mark.parametrize("built", LARGEST_TAU)
def test_the_other_files_of_a_task_differ_in_a_number(built: str) -> None:
    task = built.removeprefix("cpu/").split("_")[0]
    stem, _ = built.split("_tau")
    names = [name for name in FILES if name.startswith(f"{stem}_tau")]
    assert len(names) == len(TASKS[task].taus)
    for name in names:
        text, wanted = ((FOLDER / n).read_text(encoding="utf-8") for n in (name, built))
        config, expected = yaml.safe_load(text), yaml.safe_load(wanted)
        assert config["trainer"].pop("default_root_dir").endswith(name.removesuffix(".yaml"))
        del expected["trainer"]["default_root_dir"]
        compression = config["trainer"]["callbacks"][-1]["init_args"]
        assert CompreSSMCallback(**compression).state_dims == {}
        for each in (config, expected):
            del each["trainer"]["callbacks"][-1]["init_args"]["tolerance"]
        assert config == expected


def test_eight_devices_and_half_precision_need_no_other_file() -> None:
    options = ("--trainer.devices=8", "--trainer.strategy=ddp", "--trainer.precision=bf16-mixed")
    trainer = build("smnist_tau0.02.yaml", "--trainer.accelerator=cpu", *options).trainer
    assert (trainer.num_devices, trainer.precision) == (8, "bf16-mixed")
    assert type(trainer.strategy).__name__ == "DDPStrategy"


def test_printing_a_configuration_gives_one_that_works(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(FOLDER / "cpu/imdb_tau0.05.yaml"), "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    again = yaml.safe_load(printed.read_text(encoding="utf-8"))
    assert again["model"]["init_args"]["model"]["init_args"]["d_state"] == 48


@pytest.mark.parametrize("name", ["smnist_tau0.02", "aan_tau0.10"])
def test_two_steps_of_a_twin(name: str, tmp_path: Path) -> None:
    options = {"max_steps": 2, "window": "[0, 1]", "every_n_steps": 1, "tolerance": 0.3}
    cli = fit(f"cpu/{name}.yaml", tmp_path, **options)
    assert cli.trainer.global_step == 2
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, CompreSSMCallback))
    built = yaml.safe_load((FOLDER / "cpu" / f"{name}.yaml").read_text(encoding="utf-8"))
    d_state = built["model"]["init_args"]["model"]["init_args"]["d_state"]
    assert all(kept < d_state for kept in callback.state_dims.values())
    assert cli.trainer.callback_metrics["val_loss"].isfinite()
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert len(list(tmp_path.rglob("best.ckpt"))) == 1
    fresh = build(f"cpu/{name}.yaml").model
    load_compressed(fresh, last)
    kept = {layer: ssm.state_dim for layer, ssm in find_ssm_layers(fresh).items()}
    assert kept == callback.state_dims


@pytest.mark.slow
@pytest.mark.usefixtures("mamba_ssm")
def test_a_twin_of_mamba_is_cut(tmp_path: Path) -> None:
    look = {"window": "[0, 2]", "every_n_steps": 2, "calibration_batches": 1}
    cli = fit("cpu/mamba_12.yaml", tmp_path, max_steps=3, **look)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, CompreSSMCallback))
    assert set(callback.state_dims.values()) == {12}
    assert 0 <= cli.trainer.callback_metrics["val_acc"] <= 1


@pytest.mark.slow
def test_two_processes_in_half_precision(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.train", "fit", *QUIET]
    command += ["--config", str(FOLDER / "cpu/smnist_tau0.02.yaml")]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.precision=bf16-mixed"]
    command += ["--trainer.max_steps=4", "--trainer.val_check_interval=2"]
    command += ["--trainer.callbacks.window=[0, 2]", "--trainer.callbacks.every_n_steps=2"]
    command += [f"--trainer.default_root_dir={tmp_path}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (last,) = tmp_path.rglob("last.ckpt")
    model = build("cpu/smnist_tau0.02.yaml").model
    load_compressed(model, last)
    (layer,) = find_ssm_layers(model).values()
    assert layer.state_dim < 128
    assert torch.load(last, weights_only=True)["global_step"] == 4


def test_the_program_ends_without_a_process_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = f"file://{tmp_path / 'store'}"
    monkeypatch.setattr(
        train, "main", lambda: dist.init_process_group("gloo", store, rank=0, world_size=1)
    )
    try:
        train.run_as_program()
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_model_and_data_have_to_agree(tmp_path: Path) -> None:
    module = ClassifierModule(SequenceClassifier(1, 7, d_model=4, d_state=4), n_classes=7)
    data = build("cpu/smnist_baseline.yaml").datamodule
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="DigitsDataModule has 10 classes, the model 7"):
        trainer.fit(module, data)


def test_a_constant_rate() -> None:
    module = ClassifierModule(
        SequenceClassifier(1, 2, d_model=4, d_state=4), 2, lr=0.1, schedule="constant"
    )
    assert isinstance(module.configure_optimizers(), torch.optim.AdamW)


@pytest.mark.slow
def test_a_compressed_run_goes_on_and_is_tested(tmp_path: Path) -> None:
    name = "cpu/smnist_tau0.02.yaml"
    compression = {"window": "[0, 1]", "every_n_steps": 1, "tolerance": 0.3}
    first = fit(name, tmp_path / "first", max_steps=2, **compression)
    (last,) = (tmp_path / "first").rglob("last.ckpt")
    second = fit(name, tmp_path / "second", max_steps=4, ckpt_path=last, **compression)
    assert second.trainer.global_step == 4
    kept = [{n: x.state_dim for n, x in find_ssm_layers(c.model).items()} for c in (first, second)]
    assert kept[0] == kept[1]
    (last,) = (tmp_path / "second").rglob("last.ckpt")
    options = [f"--ckpt_path={last}", f"--trainer.default_root_dir={tmp_path}", *QUIET]
    tested = main(["test", "--config", str(FOLDER / name), *options])
    assert 0 <= tested.trainer.callback_metrics["test_acc"] <= 1
    assert {n: x.state_dim for n, x in find_ssm_layers(tested.model).items()} == kept[0]
