"""What a part gets to know, and how it tells what it found."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import files


class Skipped(Exception):  # noqa: N818  # no error: what is needed is not there
    """A part can't be run here; the message says what is missing."""


@dataclass
class Job:
    """One part of the whole.

    Attributes:
        part: Its name.
        folder: Of the results.
        deadline: When it has to be through, in seconds as `time.time` counts them.
        data: Folder with MNIST/raw.
        rehearsal: Tiny sizes on the CPU, to see that everything runs.
    """

    part: str
    folder: Path
    deadline: float
    data: Path
    rehearsal: bool
    _start: float = field(default_factory=time.time)
    _content: dict[str, Any] = field(default_factory=dict)
    _body: str = ""

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return torch.device("cpu" if self.rehearsal else "cuda")

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.time()

    def tell(self, results: dict[str, Any], body: str) -> None:
        """Write all that is known so far."""
        self._content, self._body = results, body
        self._write(files.RUNNING, "")

    def end(self, status: str, why: str = "") -> None:
        """Say how it ended."""
        self._write(status, why)

    def _write(self, status: str, why: str) -> None:
        content = {
            "status": status,
            "why": why,
            "rehearsal": self.rehearsal,
            "seconds": round(time.time() - self._start, 1),
            "results": self._content,
        }
        body = self._body
        if self.rehearsal:
            body = f"A rehearsal on a CPU at tiny sizes: its figures mean nothing.\n\n{body}"
        files.write(self.folder, self.part, content, body)
