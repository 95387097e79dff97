"""The YAML of the published runs and of their small twins.

The files are complete and can be read and copied without this one.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from benchmarks.train.published import (
    MAMBA_STATES,
    RECALL,
    TASKS,
    Options,
    Recall,
    Scale,
    Size,
    Task,
)

FOLDER = Path(__file__).parents[1] / "configs"
LRU_LAYER = {
    "class_path": "lightning_compressm.nn.LRU",
    "init_args": {"r_min": 0.9, "r_max": 0.999},
}


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
    return f"{task.title}, {what}. {_scale_note(task, scale)}"


def _scale_note(task: Task, scale: Scale) -> str:
    return "A small twin for a CPU." if scale == "cpu" else task.origin


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


def write() -> None:
    """Write all files into `FOLDER`."""
    for name, text in configurations().items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
