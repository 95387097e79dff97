"""The published runs and their small twins as data, and the YAML that is made of it.

One place for all figures, so that files for the same task can't drift apart. The files are complete
and can be read and copied without this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

Scale = Literal["full", "cpu"]
Options = dict[str, Any]
FOLDER = Path(__file__).parents[1] / "configs"
LRU_LAYER = {
    "class_path": "lightning_compressm.nn.LRU",
    "init_args": {"r_min": 0.9, "r_max": 0.999},
}


@dataclass(frozen=True)
class Size:
    """What differs between a published run and its twin on a CPU.

    Attributes:
        data: Data module and its arguments, batch size included.
        sizes: d_model, d_state, n_blocks.
        steps: Optimizer steps.
        lr: Peak learning rate.
        validate: Steps between validations.
        every: Steps between looks at the spectra.
        window: Steps between which the run is reduced.
        inputs: Where they are not the task's.
    """

    data: tuple[str, Options]
    sizes: tuple[int, int, int]
    steps: int
    lr: float
    validate: int
    every: int
    window: tuple[int, int]
    inputs: Options | None = None


@dataclass(frozen=True)
class Task:
    """One task, at both scales.

    Attributes:
        title: What the first comment says.
        classes: Number of them.
        inputs: d_input or n_tokens.
        taus: Shares of the Hankel energy that the published runs give up.
        recipe: Further arguments of `ClassifierModule`.
        dropout: Probability of dropping an activation.
        full: As published.
        cpu: The twin.
        model: Class of the network.
    """

    title: str
    classes: int
    inputs: Options
    taus: tuple[float, ...]
    recipe: Options
    dropout: float
    full: Size
    cpu: Size
    model: str = "SequenceClassifier"

    def size(self, scale: Scale) -> Size:
        return self.full if scale == "full" else self.cpu


def gentle(factor: float) -> Options:
    """The recipe of all tasks but sequential MNIST: warm-up over 10% of the steps, then cosine."""
    return {"ssm_lr_factor": factor, "weight_decay": 0.05, "warmup": 0.1}


LRA_TAUS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15)
DIGITS: tuple[str, Options] = ("DigitsDataModule", {"batch_size": 50})
# A look comes where the published code looks: where its intervals for reduction and for evaluation
# coincide (2000 and 5000 steps: every 10,000), up to the end of the window.
TASKS: dict[str, Task] = {
    "smnist": Task(
        title="Sequential MNIST",
        classes=10,
        inputs={"d_input": 1},
        taus=(0.01, 0.02, 0.04),
        recipe={"ssm_lr_factor": 1.0, "weight_decay": 0.0, "schedule": "constant"},
        dropout=0.1,
        full=Size(
            data=("SMNISTDataModule", {"root": "data", "batch_size": 50}),
            sizes=(8, 256, 1), steps=200_000, lr=4e-4,
            validate=5000, every=10_000, window=(0, 20_000),
        ),
        cpu=Size(
            data=DIGITS,
            sizes=(8, 128, 1), steps=2000, lr=4e-3, validate=250, every=100, window=(0, 200),
        ),
    ),
    "scifar": Task(
        title="Sequential CIFAR-10",
        classes=10,
        inputs={"d_input": 3},
        taus=(0.05, 0.1, 0.15),
        recipe=gentle(0.25),
        dropout=0.1,
        full=Size(
            data=("SCIFARDataModule", {"root": "data", "batch_size": 50}),
            sizes=(512, 384, 6), steps=180_000, lr=1e-3,
            validate=4500, every=18_000, window=(0, 18_000),
        ),
        cpu=Size(
            data=DIGITS,
            sizes=(32, 96, 2), steps=1500, lr=1e-2, validate=250, every=150, window=(0, 150),
            inputs={"d_input": 1},
        ),
    ),
    "listops": Task(
        title="Long Range Arena, ListOps",
        classes=10,
        inputs={"n_tokens": 18},
        taus=LRA_TAUS,
        recipe=gentle(0.5),
        dropout=0.0,
        full=Size(
            data=(
                "ListOpsDataModule",
                {"root": "data/lra_release/listops-1000", "batch_size": 32, "length": 2048},
            ),
            sizes=(128, 256, 6), steps=80_000, lr=1e-3,
            validate=2000, every=2000, window=(0, 8000),
        ),
        cpu=Size(
            data=("GeneratedListOpsDataModule", {"batch_size": 32}),
            sizes=(32, 64, 2), steps=1600, lr=4e-3, validate=250, every=40, window=(0, 160),
        ),
    ),
    "imdb": Task(
        title="Long Range Arena, Text (IMDB)",
        classes=2,
        inputs={"n_tokens": 256},
        taus=LRA_TAUS,
        recipe=gentle(0.1),
        dropout=0.2,
        full=Size(
            data=(
                "IMDBDataModule",
                {"root": "data/aclImdb", "batch_size": 32, "length": 4096, "val_share": 0.0},
            ),
            sizes=(256, 192, 1), steps=50_000, lr=1e-3,
            validate=1000, every=1000, window=(1000, 4000),
        ),
        cpu=Size(
            data=("TextSourceDataModule", {"batch_size": 32}),
            sizes=(32, 48, 1), steps=1000, lr=4e-3, validate=200, every=20, window=(20, 80),
        ),
    ),
    "aan": Task(
        title="Long Range Arena, Retrieval (AAN)",
        classes=2,
        inputs={"n_tokens": 256},
        taus=LRA_TAUS,
        recipe=gentle(0.5),
        dropout=0.1,
        full=Size(
            data=(
                "AANDataModule",
                {"root": "data/lra_release/tsv_data", "batch_size": 64, "length": 4000},
            ),
            sizes=(128, 256, 6), steps=100_000, lr=1e-3,
            validate=2500, every=2500, window=(0, 10_000),
        ),
        cpu=Size(
            data=("TextPairDataModule", {"batch_size": 32}),
            sizes=(32, 64, 2), steps=800, lr=4e-3, validate=200, every=20, window=(0, 80),
        ),
        model="PairClassifier",
    ),
    "pathfinder": Task(
        title="Long Range Arena, Pathfinder with 32 x 32 pixels",
        classes=2,
        inputs={"d_input": 1},
        taus=LRA_TAUS,
        recipe=gentle(0.25),
        dropout=0.0,
        full=Size(
            data=(
                "PathfinderDataModule",
                {
                    "root": "data/lra_release/pathfinder32",
                    "batch_size": 64,
                    "resolution": 32,
                    "level": "curv_baseline",
                },
            ),
            sizes=(192, 256, 6), steps=500_000, lr=1e-3,
            validate=12_500, every=12_500, window=(0, 50_000),
        ),
        cpu=Size(
            data=("GeneratedPathfinderDataModule", {"batch_size": 50}),
            sizes=(32, 64, 2), steps=1000, lr=4e-3, validate=200, every=25, window=(0, 100),
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Recall:
    """Mamba on associative recall, which needs no files. Steps and window as in `Size`."""

    data: Options
    sizes: tuple[int, int, int]
    steps: int
    lr: float
    validate: int
    look: int


RECALL: dict[Scale, Recall] = {
    "full": Recall(
        data={"batch_size": 64, "n_tokens": 512, "pairs": 64, "length": 256},
        sizes=(256, 128, 2), steps=50_000, lr=1e-3, validate=1250, look=5000,
    ),
    "cpu": Recall(
        data={"batch_size": 32, "n_tokens": 32, "pairs": 4, "length": 12},
        sizes=(32, 128, 2), steps=600, lr=5e-3, validate=200, look=60,
    ),
}  # fmt: skip
MAMBA_STATES = 12


def configurations() -> dict[str, str]:
    """All files: name relative to the folder, and text."""
    files: dict[str, str] = {}
    scales: tuple[tuple[Scale, str], ...] = (("full", ""), ("cpu", "cpu/"))
    for scale, folder in scales:
        for name, task in TASKS.items():
            for tau in (None, *task.taus):
                stem = f"{name}_baseline" if tau is None else f"{name}_tau{tau:.2f}"
                files[f"{folder}{stem}.yaml"] = _text(
                    _title(task, tau, scale), _classifier(task, tau, scale, stem)
                )
        for states in (None, MAMBA_STATES):
            stem = "mamba_baseline" if states is None else f"mamba_{states}"
            title = f"Mamba, {RECALL[scale].sizes[1]} states"
            title += "." if states is None else f", cut to {states} after a tenth of the steps."
            title += " A small twin for a CPU." if scale == "cpu" else " Our task and recipe."
            files[f"{folder}{stem}.yaml"] = _text(title, _mamba(RECALL[scale], states, scale, stem))
    return files


def _title(task: Task, tau: float | None, scale: Scale) -> str:
    what = "at full size" if tau is None else f"giving up {tau:.0%} of every layer's Hankel energy"
    return f"{task.title}, {what}. {_scale_note(scale)}"


def _scale_note(scale: Scale) -> str:
    return "A small twin for a CPU." if scale == "cpu" else "As published."


def _text(title: str, config: Options) -> str:
    body = yaml.safe_dump(config, sort_keys=False, width=100)
    where = "Data and command: benchmarks/README.md. Written by `python -m benchmarks.recipes`."
    return f"# {title}\n# {where}\n{body}"


def _classifier(task: Task, tau: float | None, scale: Scale, stem: str) -> Options:
    size = task.size(scale)
    d_model, d_state, n_blocks = size.sizes
    network = {
        "d_input": None,
        **(size.inputs or task.inputs),
        "n_classes": task.classes,
        "d_model": d_model,
        "d_state": d_state,
        "n_blocks": n_blocks,
        "dropout": task.dropout,
        "pool": "mean",
        "layer": LRU_LAYER,
    }
    model = {
        "class_path": "benchmarks.models.ClassifierModule",
        "init_args": {
            "model": {"class_path": f"benchmarks.models.{task.model}", "init_args": network},
            "n_classes": task.classes,
            "lr": size.lr,
            **task.recipe,
        },
    }
    compression = None if tau is None else _published(tau, size)
    return _run(model, size.data, _trainer(size.steps, size.validate, compression, scale, stem))


def _published(tau: float, size: Size) -> Options:
    # Complex balancing and infinite-horizon Gramians are what was published; the package's own
    # defaults do better, see the documentation.
    return {
        "tolerance": tau,
        "window": list(size.window),
        "every_n_steps": size.every,
        "balance": "complex",
        "horizon": None,
    }


def _mamba(recall: Recall, states: int | None, scale: Scale, stem: str) -> Options:
    d_model, d_state, n_blocks = recall.sizes
    network = {
        "n_tokens": recall.data["n_tokens"],
        "kind": "mamba1",
        "d_model": d_model,
        "d_state": d_state,
        "n_blocks": n_blocks,
    }
    model = {
        "class_path": "benchmarks.models.RecallModule",
        "init_args": {
            "model": {"class_path": "benchmarks.models.LanguageModel", "init_args": network},
            "lr": recall.lr,
        },
    }
    compression = states and {
        "state_dim": states,
        "window": [0, recall.look],
        "every_n_steps": recall.look,
        "calibration_batches": 8,
        # As many states as asked for, whatever it does to the output.
        "max_output_error": None,
    }
    trainer = _trainer(recall.steps, recall.validate, compression or None, scale, stem)
    trainer["gradient_clip_val"] = 1.0
    return _run(model, ("MQARDataModule", recall.data), trainer)


def _trainer(
    steps: int, validate: int, compression: Options | None, scale: Scale, stem: str
) -> Options:
    # With save_last alone, Lightning writes the last state only when it is the best one, too.
    kept = ({"monitor": "val_acc", "mode": "max", "filename": "best"}, {"filename": "last"})
    callbacks: list[Options] = [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {**which, "enable_version_counter": False},
        }
        for which in kept
    ]
    if compression:
        # The last one, so that --trainer.callbacks.tolerance on the command line means it.
        callbacks.append(
            {"class_path": "lightning_compressm.CompreSSMCallback", "init_args": compression}
        )
    folder = "results/train/cpu" if scale == "cpu" else "results/train"
    return {
        "accelerator": "cpu" if scale == "cpu" else "auto",
        "devices": 1,
        "max_steps": steps,
        "max_epochs": -1,
        "val_check_interval": validate,
        "check_val_every_n_epoch": None,
        "callbacks": callbacks,
        "default_root_dir": f"{folder}/{stem}",
    }


def _run(model: Options, data: tuple[str, Options], trainer: Options) -> Options:
    name, arguments = data
    return {
        "seed_everything": 0,
        "trainer": trainer,
        "model": model,
        "data": {"class_path": f"benchmarks.data.{name}", "init_args": arguments},
    }


def main() -> None:
    for name, text in configurations().items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
