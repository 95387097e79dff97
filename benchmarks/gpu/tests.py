"""All tests marked `cuda`: each file in a process of its own, since a kernel that fails takes its
process's whole device with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import files
from benchmarks.gpu.job import Job, Skipped
from benchmarks.gpu.recording import STARTED, VARIABLE

ROOT = Path(__file__).parents[2]
MARK = "mark.cuda"
AT_A_TIME = 6
REHEARSAL = "COMPRESSM_REHEARSAL"
# Seconds of one test after which pytest prints where it stands.
SLOW_TEST = 60


def marked() -> list[Path]:
    """Files with such tests, slow ones first: those that compile."""
    found = [p for p in (ROOT / "tests").rglob("test_*.py") if MARK in p.read_text("utf-8")]
    return sorted(found, key=lambda p: (p.stem != "test_compiled", p))


class Group:
    """Test files in one process, and what it has recorded."""

    def __init__(self, paths: Sequence[Path], folder: Path, rehearsal: bool) -> None:
        name = paths[0].stem if len(paths) == 1 else "all"
        self.record, self.log = folder / f"{name}.jsonl", folder / f"{name}.log"
        self.record.touch()
        words = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "cuda"]
        # What torch says of a fallback of its own is no failure; what our kernel says of one is.
        words += ["--continue-on-collection-errors", "-W", "default::UserWarning"]
        # The project's own options name plugins that need not be there.
        words += ["-o", "addopts=", "-o", f"faulthandler_timeout={SLOW_TEST}"]
        words += ["-p", "no:cacheprovider", "-p", "benchmarks.gpu.recording"]
        environment = os.environ | {VARIABLE: str(self.record)}
        if rehearsal:
            environment[REHEARSAL] = "cpu"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*words, *map(str, paths)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def results(self) -> list[dict[str, Any]]:
        """The last of what was recorded of every test; a line that is being written is left out."""
        last: dict[str, dict[str, Any]] = {}
        for line in self.record.read_text("utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                entry = json.loads(line)
                # A tear-down that fails comes after its test passed; never the reverse.
                last[entry["test"]] = entry
        return list(last.values())

    @property
    def broken(self) -> str:
        """What is wrong with the process, apart from its tests."""
        status = self.process.poll()
        # 1: tests failed; 5: none was collected, which a missing package explains.
        if status in (None, 0, 1) or (status in (2, 5) and self.results()):
            return ""
        return f"status {status}: {self.log.read_text(errors='replace')[-1500:]}"


def run(job: Job) -> str:
    paths = marked()
    if not paths:
        raise Skipped("no test is marked `cuda`")
    waiting = [paths] if job.rehearsal else [[path] for path in paths]
    groups: list[Group] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or any(g.process.poll() is None for g in groups):
                if job.left <= 0:
                    break
                running = sum(g.process.poll() is None for g in groups)
                while waiting and running < AT_A_TIME:
                    groups.append(Group(waiting.pop(0), Path(folder), job.rehearsal))
                    running += 1
                time.sleep(0.5)
                job.tell(*summary(groups))
        finally:
            late = [g for g in groups if g.process.poll() is None]
            for group in late:
                group.process.kill()
                group.process.wait()
        results, page = summary(groups)
        job.tell(results, page)
    return verdict(results, len(waiting) + len(late))


def verdict(results: dict[str, Any], late: int) -> str:
    """What is to be said against the part; nothing if all is well."""
    counts = results["counts"]
    bad = {name: counts.get(name, 0) for name in ("failed", STARTED)}
    said = [f"{bad['failed']} tests failed"] if bad["failed"] else []
    said += [f"{bad[STARTED]} tests did not come to an end"] if bad[STARTED] else []
    said += [f"{len(results['broken'])} processes broke"] if results["broken"] else []
    said += [f"{late} files were not through in time"] if late else []
    return ", ".join(said)


def summary(groups: Iterable[Group]) -> tuple[dict[str, Any], str]:
    """Everything as numbers and as Markdown."""
    groups = list(groups)
    entries = [entry for group in groups for entry in group.results()]
    counts = Counter(entry["outcome"] for entry in entries)
    files_of: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        files_of.setdefault(entry["test"].partition("::")[0], []).append(entry)
    rows = [
        [name, *(str(_count(tests, o)) for o in ("passed", "failed", "skipped", STARTED)),
         f"{sum(t['seconds'] for t in tests):.1f}"]
        for name, tests in sorted(files_of.items())
    ]  # fmt: skip
    page = files.table(("file", "passed", "failed", "skipped", "not ended", "seconds"), rows)
    reasons = Counter(entry["text"] for entry in entries if entry["outcome"] == "skipped")
    page += "".join(f"- {count} skipped: {reason}\n" for reason, count in reasons.most_common())
    for entry in entries:
        if entry["outcome"] in ("failed", STARTED):
            page += f"\n## {entry['test']}: {entry['outcome']}\n\n```text\n{entry['text']}\n```\n"
    broken = [group.broken for group in groups if group.broken]
    page += "".join(f"\n## A process broke\n\n```text\n{text}\n```\n" for text in broken)
    return {"counts": dict(counts), "broken": broken, "tests": entries}, page


def _count(tests: Sequence[dict[str, Any]], outcome: str) -> int:
    return sum(test["outcome"] == outcome for test in tests)
