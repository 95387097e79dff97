"""Starts the ranks of a run by hand, so that a test can see each of them end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def free_port() -> str:
    """A port that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def start_pair(module: str, *arguments: object) -> list[subprocess.Popen[str]]:
    """Two ranks of one run; Lightning starts none and kills none by itself."""
    port = free_port()
    return [start(module, *arguments, LOCAL_RANK=str(r), MASTER_PORT=port) for r in (0, 1)]


def start(module: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A process that runs a module of these tests."""
    command = [sys.executable, "-m", f"tests.callbacks.faults.{module}", *map(str, arguments)]
    ranks = {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0", "WORLD_SIZE": "2"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | (ranks | environment if environment else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait(process: subprocess.Popen[str], timeout: float = 200) -> tuple[int, str]:
    """Its exit status and the end of its output; killed if it does not end."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output[-5000:]
