"""Speed: training steps, tokens a second, looks and cuts. One that fails leaves the others."""

from __future__ import annotations

import traceback
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu import dual, looks, sizes, steps
from benchmarks.gpu.job import Job

SECTIONS = {
    "Training steps": steps.measure,
    "Mamba-2, tokens a second": dual.measure,
    "Looks and cuts": looks.measure,
}


def run(job: Job) -> str:
    chosen = sizes.REHEARSAL if job.rehearsal else sizes.CARD
    found: dict[str, Any] = {}
    pages: list[str] = []
    failed = []
    for number, (title, measure) in enumerate(SECTIONS.items()):
        share = max(1.0, job.left / (len(SECTIONS) - number) / 2)
        limited = replace(chosen, rounds=replace(chosen.rounds, seconds=share))
        try:
            if job.left < 0:
                raise TimeoutError("no time was left for it")
            found[title], page = measure(job, chosen if job.rehearsal else limited)
        except Exception:
            failed.append(title)
            found[title], page = {"failed": traceback.format_exc()}, _quoted()
        pages.append(f"## {title}\n\n{page}")
        job.tell(found, "\n".join(pages))
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
    return f"failed: {', '.join(failed)}" if failed else ""


def _quoted() -> str:
    return f"```text\n{traceback.format_exc()}```\n"
