"""Sequential MNIST by the published recipe, all arms at the same time, as far as the time goes."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

from benchmarks.data.files import MissingDataError
from benchmarks.gpu import files
from benchmarks.gpu.images import MNISTFiles
from benchmarks.gpu.job import Job, Skipped
from benchmarks.gpu.training import Place, train
from benchmarks.mnist.arms import ARMS, PUBLISHED

NAMES = ("full", "tau1", "tau2", "tau4", "bare")
REHEARSED = ("full", "bare")
REHEARSED_STEPS = 10
# What is left at the end for the tests of the weights, seconds.
RESERVE = 12.0
HEADER = (
    "arm", "states", "steps", "test accuracy, %", "published, %", "ms before the first cut",
    "ms at the end", "looks and swaps, ms",
)  # fmt: skip


def run(job: Job) -> str:
    if not job.rehearsal:
        try:
            MNISTFiles(root=str(job.data)).prepare_data()
        except MissingDataError as error:
            raise Skipped(str(error).replace("\n", " ")) from None
    names = REHEARSED if job.rehearsal else NAMES
    place = Place(
        job.device.type,
        job.deadline - RESERVE,
        None if job.rehearsal else job.data,
        REHEARSED_STEPS if job.rehearsal else None,
    )
    # Spawned, not forked: a fork could not use the device.
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        found: Any = manager.dict()
        rates, barrier = context.Array("d", len(names)), context.Barrier(len(names))
        processes = [
            context.Process(
                target=train, args=(name, place, rates, index, barrier, found), daemon=True
            )
            for index, name in enumerate(names)
        ]
        for process in processes:
            process.start()
        while any(p.is_alive() for p in processes) and job.left > 0:
            time.sleep(1)
            job.tell(*summary(names, dict(found)))
        results, page = summary(names, dict(found))
        job.tell(results, page)
        for process in processes:
            process.kill()
            process.join()
    bad = [name for name in names if "accuracy" not in results.get(name, {})]
    return f"not through: {', '.join(bad)}" if bad else ""


def summary(names: tuple[str, ...], found: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """All that is known so far, as numbers and as Markdown."""
    rows = [_row(name, found[name]) for name in names if "readings" in found.get(name, {})]
    note = (
        f"One training each, seed 0, all at the same time on one device; published: "
        f"{PUBLISHED.full.steps:,} steps. The window and the looks are scaled with the steps. "
        "Milliseconds of a step are on the wall, beside the other trainings: they say how an arm "
        "compares with itself, not how fast it runs alone.\n\n"
    )
    failures = "".join(
        f"## {name} failed\n\n```text\n{entry['failed']}```\n\n"
        for name, entry in found.items()
        if "failed" in entry
    )
    return found, (files.table(HEADER, rows) + note + failures) if rows else failures


def _row(name: str, entry: dict[str, Any]) -> list[str]:
    arm, readings = ARMS[name], entry["readings"]
    step, states, last = readings[-1]
    history = entry.get("history", [])
    took = 1e3 * sum(event["seconds"] for event in history)
    return [
        arm.label,
        str(states) if states == arm.d_state else f"{arm.d_state} to {states}",
        f"{step:,} of {entry['planned']:,}",
        f"{100 * entry['accuracy']:.1f}" if "accuracy" in entry else "",
        "" if arm.published is None else f"{arm.published:.1f}",
        f"{1e3 * readings[0][2]:.2f}",
        f"{1e3 * last:.2f}",
        f"{took:.0f}" if history else "",
    ]
