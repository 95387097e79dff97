"""What a machine with a CUDA device has to show: the card, tests, speed, sequential MNIST.

Each part is a process with a limit of its own: one that fails or hangs does not stop the next. What
it has found lies in the folder of the results as soon as it is there. No network is needed, and of
packages only torch with Triton, Lightning and pytest; what else is missing is skipped by name.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import files

ROOT = Path(__file__).parents[2]
# Of the time that is left when a part begins, this share belongs to it rather than to the later
# ones: what one does not need, the next ones get.
WEIGHTS = {"card": 2, "tests": 7, "speed": 7, "mnist": 10}
# A part knows of a deadline so many seconds before it is ended.
GRACE = 6.0
SHOWN = 3000  # characters of a failed part's output


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        minutes: For all parts together.
        parts: Which, in this order.
        folder: Of the results.
        data: Folder with MNIST/raw.
        rehearsal: On a CPU, at tiny sizes.
    """

    minutes: float
    parts: tuple[str, ...]
    folder: Path
    data: Path
    rehearsal: bool


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line; argparse, since nothing else is sure to be there."""
    about = (__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=about)
    add = parser.add_argument
    add("--minutes", type=float, default=7.0, help="for all parts together (default: 7)")
    add("--parts", nargs="+", choices=WEIGHTS, default=list(WEIGHTS), help="default: all")
    add("--out", type=Path, help="folder of the results (default: $OUT, else results/gpu)")
    add("--data", type=Path, default=ROOT / "data", help="folder with MNIST/raw (default: data)")
    add("--dry-run", action="store_true", help="all that a CPU can run, at tiny sizes")
    chosen = parser.parse_args(arguments)
    if chosen.minutes <= 0:
        parser.error(f"--minutes must be positive, got {chosen.minutes}")
    folder = chosen.out or Path(os.environ.get("OUT") or ROOT / "results" / "gpu")
    parts = tuple(dict.fromkeys(chosen.parts))
    return Settings(chosen.minutes, parts, folder.absolute(), chosen.data, chosen.dry_run)


def run(part: str, limit: float, settings: Settings) -> None:
    """Run a part in a process of its own, and see that its files say how it ended."""
    for ending in ("json", "md"):
        (settings.folder / f"{part}.{ending}").unlink(missing_ok=True)
    words = [sys.executable, "-m", "benchmarks.gpu.worker", part]
    words += ["--folder", str(settings.folder), "--data", str(settings.data.absolute())]
    words += ["--deadline", str(time.time() + max(limit - GRACE, limit / 2))]
    words += ["--dry-run"] if settings.rehearsal else []
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # a group, so that whatever it has started ends with it
        )
        try:
            process.wait(limit)
            why = f"it ended with status {process.returncode}"
            status = "failed"
        except subprocess.TimeoutExpired:
            status, why = "stopped", f"its {limit:.0f} seconds were over"
        finally:
            _end(process)
        output.seek(0)
        log = output.read().decode(errors="replace")
    if files.read(settings.folder, part).get("status") in (None, files.RUNNING):
        files.end(settings.folder, part, status, why, log[-SHOWN:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End all processes of the group: also those that outlived the one that started them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parse(arguments)
    settings.folder.mkdir(parents=True, exist_ok=True)
    end = time.time() + 60 * settings.minutes
    found = {}
    for number, part in enumerate(settings.parts):
        weights = [WEIGHTS[later] for later in settings.parts[number:]]
        limit = (end - time.time()) * weights[0] / sum(weights)
        print(f"{part}: up to {limit:.0f} s", flush=True)
        run(part, limit, settings)
        found[part] = files.read(settings.folder, part)
        print((settings.folder / f"{part}.md").read_text("utf-8"), flush=True)
    rows = [[p, c["status"], c.get("why", ""), str(c.get("seconds", ""))] for p, c in found.items()]
    print(files.table(("part", "status", "why", "seconds"), rows))
    print(f"Results: {settings.folder}")
    said = [content["status"] for content in found.values()]
    return int("done" not in said or "failed" in said or "stopped" in said)
