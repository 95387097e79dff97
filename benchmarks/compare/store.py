"""Results in files, one for each task and seed, so that an interrupted comparison goes on."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning
import torch

from benchmarks.compare.tasks import CompareTask
from benchmarks.compare.unit import FULL, SMALL, Job, Result
from lightning_compressm import __version__


@dataclass(frozen=True)
class Store:
    """A folder of results.

    Attributes:
        folder: Made when the first result is saved.
    """

    folder: Path

    def load(self, task: CompareTask, seed: int) -> list[Result]:
        """What is there of a task and seed; nothing if it was measured in another way."""
        path = self._path(task, seed)
        if not path.exists():
            return []
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["recipe"] != recipe_key(task):
            return []
        return [Result(**result) for result in content["results"]]

    def save(self, task: CompareTask, seed: int, results: Iterable[Result]) -> None:
        """Add results; those of the same arm and size are replaced."""
        kept = {(r.arm, r.size): r for r in (*self.load(task, seed), *results)}
        content = {
            "recipe": recipe_key(task),
            "versions": versions(),
            "results": [result.to_dict() for result in kept.values()],
        }
        path = self._path(task, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is complete: an interrupted run leaves nothing half written.
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(path)

    def _path(self, task: CompareTask, seed: int) -> Path:
        return self.folder / f"{task.name}-seed{seed}.json"


def missing_jobs(jobs: Sequence[Job], there: Iterable[Result]) -> list[Job]:
    """Jobs without results, those they need, and full and small, for their times."""
    found = {(result.arm, result.size) for result in there}

    def is_missing(job: Job) -> bool:
        return any((job.arm.name, size) not in found for size in job.sizes)

    missing = [job for job in jobs if is_missing(job)]
    if not missing:
        return []
    again = {FULL, SMALL, *(job.arm.needs for job in missing)}
    return [job for job in jobs if job in missing or job.arm.name in again]


@functools.cache
def recipe_key(task: CompareTask) -> str:
    """Changes with all that decides a task's results, but for the code itself."""
    module, data = task.build(0, task.d_state)
    parts = (
        repr(module),
        sorted((k, str(v)) for k, v in module.hparams.items()),
        type(data).__name__,
        sorted((k, str(v)) for k, v in vars(data).items() if isinstance(v, int | float | str)),
        {name: [list(t.shape) for t in split.tensors] for name, split in data.splits.items()},
        (task.steps, task.d_state, task.look, task.clip),
        torch.__version__,
    )
    return sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def versions() -> dict[str, Any]:
    """What the figures were made with."""
    return {
        "lightning_compressm": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }
