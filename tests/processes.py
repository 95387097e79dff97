"""Real processes for tests, forked from one that has imported everything and computed nothing.

An interpreter that imports torch and Lightning costs seconds, and the tests start more than a
hundred. What runs in a process is a module of these tests, as by ``python -m``.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRELOADED = (
    "torch._dynamo",
    "lightning.pytorch",
    "lightning_compressm.testing",
    "tests.callbacks.helpers",
)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))


class Started:
    """A process of its own."""

    def __init__(self, module: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        with tempfile.NamedTemporaryFile(prefix="output-", delete=False) as file:
            self.output = Path(file.name)
        self.process = _context.Process(
            target=_run, args=(module, arguments, dict(environment), str(self.output))
        )
        self.process.start()

    def wait(self, timeout: float = 200) -> tuple[int | None, str]:
        """Its exit status, `None` if it had to be killed, and the end of its output."""
        self.process.join(timeout)
        status = self.process.exitcode
        self.kill()
        output = self.output.read_text(errors="replace")
        self.output.unlink()
        return status, output[-5000:]

    def kill(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.process.join()


def start(module: str, *arguments: object, **environment: str) -> Started:
    """A process that runs a module of these tests."""
    return Started(f"tests.callbacks.{module}", [*map(str, arguments)], os.environ | environment)


def start_pair(module: str, *arguments: object) -> list[Started]:
    """Two ranks of one run; Lightning starts none and kills none by itself."""
    ranks = {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0", "WORLD_SIZE": "2"}
    ranks["MASTER_PORT"] = free_port()
    return [start(module, *arguments, **ranks, LOCAL_RANK=str(rank)) for rank in (0, 1)]


def run_one(module: str, *arguments: object, timeout: float = 240) -> None:
    """Run a module in a process to its end, which must be a good one."""
    _succeed([start(module, *arguments)], timeout)


def run_pair(module: str, *arguments: object, timeout: float = 240) -> None:
    """Run a module in two ranks to their end, which must be a good one."""
    _succeed(start_pair(module, *arguments), timeout)


def free_port() -> str:
    """A port that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def _succeed(processes: list[Started], timeout: float) -> None:
    # What all ranks said tells which one was lost, and why.
    ended = [process.wait(timeout) for process in processes]
    assert all(status == 0 for status, _ in ended), ended


def _run(module: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    """In the new process: what ``python -m module arguments`` does."""
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [module, *arguments]
    os.chdir(ROOT)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
