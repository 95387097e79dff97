"""One part in a process of its own: `python -m benchmarks.gpu.worker PART ...`, by the command."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

from benchmarks.gpu.job import Job, Skipped

MODULES = {
    "card": "benchmarks.gpu.card",
    "tests": "benchmarks.gpu.tests",
    "speed": "benchmarks.gpu.speed",
    "mnist": "benchmarks.gpu.mnist",
}


def work(job: Job) -> int:
    """Run a part; 0 if it did what it can, 1 if something in it failed."""
    if not job.rehearsal and not torch.cuda.is_available():
        job.end("skipped", "there is no CUDA device (--dry-run rehearses on a CPU)")
        return 0
    try:
        # Only now, so that a missing package is no more than the end of this part.
        why: str = importlib.import_module(MODULES[job.part]).run(job)
    except Skipped as reason:
        job.end("skipped", str(reason))
        return 0
    except ModuleNotFoundError as error:
        job.end("skipped", f"the package {error.name} is missing")
        return 0
    job.end("failed" if why else "done", why)
    return int(bool(why))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=MODULES)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--deadline", type=float)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    chosen = parser.parse_args()
    job = Job(chosen.part, chosen.folder, chosen.deadline, chosen.data, chosen.dry_run)
    return work(job)


if __name__ == "__main__":
    sys.exit(main())
