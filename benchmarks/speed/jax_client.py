"""Start the JAX process and have it measure in turn with what runs here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed.jax_worker import PARAMETERS
from lightning_compressm.nn import LRU

WORKER = Path(__file__).with_name("jax_worker.py")
INSTALL = "not installed: pip install jax"
# Of the largest output: rounding in float32 over thousands of steps stays below.
TOLERANCE = 2e-3


class JaxError(RuntimeError):
    """The JAX process is not there, has died, or does not compute what our layer does."""


class JaxLayer:
    """The published layer in a process of its own, to be used as a context.

    Args:
        python: An interpreter that can import jax; None for this one.
        threads: How many it may use.

    Raises:
        JaxError: There is no such interpreter, or it has no jax.
    """

    def __init__(self, python: Path | None, threads: int) -> None:
        self._cpu = threads == 1
        self._folder = tempfile.TemporaryDirectory()
        self._errors = Path(self._folder.name) / "errors"
        self._process: subprocess.Popen[str] | None = None
        try:
            with self._errors.open("w") as errors:  # a pipe that nobody reads would fill up
                self._process = subprocess.Popen(
                    [str(python or sys.executable), str(WORKER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=_environment(threads),
                )
            self.version = str(self._answer()["jax"])
        except (OSError, JaxError) as error:
            self.close()
            raise JaxError(f"{INSTALL} (tried {python or 'this Python'}): {error}") from error

    def __enter__(self) -> JaxLayer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def load(self, layer: LRU, inputs: Tensor, weights: Tensor) -> None:
        """Give it the parameters of a layer, and check that it computes the same.

        Raises:
            JaxError: Outputs or gradients of the inputs differ by more than rounding.
        """
        path = Path(self._folder.name) / "case.npz"
        tensors = {name: getattr(layer, name) for name in PARAMETERS}
        tensors |= {"inputs": inputs, "weights": weights}
        np.savez(path, **{name: tensor.detach().numpy() for name, tensor in tensors.items()})
        ours = inputs.detach().clone().requires_grad_()
        outputs = layer(ours)
        outputs.backward(weights)
        assert ours.grad is not None
        with np.load(self._ask({"load": str(path)})["outputs"]) as theirs:
            for name, tensor in (("outputs", outputs.detach()), ("grad", ours.grad)):
                difference = (torch.from_numpy(theirs[name]) - tensor).abs().max()
                if not difference <= TOLERANCE * tensor.abs().max():
                    raise JaxError(
                        f"expected the published layer's {name} to agree with ours, got a "
                        f"difference of {difference:.2g}; its times would compare nothing"
                    )

    def measure(self, count: int) -> float:
        """Seconds of one forward and backward pass, mean over `count`."""
        return float(self._ask({"measure": count})["cpu" if self._cpu else "wall"])

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            with suppress(OSError):
                self._process.communicate(timeout=10)  # an end of file ends it
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise JaxError(f"the JAX process died: {self._complaint()}") from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise JaxError(f"the JAX process died: {self._complaint()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _complaint(self) -> str:
        return (self._errors.read_text().strip() or "no message").splitlines()[-1]


def _environment(threads: int) -> dict[str, str]:
    many = str(threads > 1).lower()
    flags = f"--xla_cpu_multi_thread_eigen={many} intra_op_parallelism_threads={threads}"
    # Nothing of this repository on the path: the worker's Python may be of another version.
    rest = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**rest, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads)}
