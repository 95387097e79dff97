"""The layer of the published code in JAX, in a process of its own that measures on request.

`jax_client.py` starts it as a plain script, by any Python that has JAX and NumPy. It reads one
JSON object a line and answers each by one:

    {"load": "case.npz"}   parameters, inputs, weights of the outputs -> {"outputs": "file.npz"}
    {"measure": 3}         run forward and backward that often        -> {"cpu": s, "wall": s}
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

PARAMETERS = ("nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im", "D")


class PublishedLayer:
    """Orvieto et al. (2023), arXiv 2303.06349, appendix A: an associative scan over all steps."""

    def __init__(self) -> None:
        import jax

        self.jax = jax
        self.case: tuple[Any, ...] = ()
        self.batched = jax.vmap(self.layer, (None, 0))
        self.forward = jax.jit(self.batched)
        self.gradients = jax.jit(jax.value_and_grad(self.weighted, argnums=(0, 1)))

    def layer(self, p: dict[str, Any], inputs: Any) -> Any:
        """Map (L, H) to (L, H)."""
        jnp = self.jax.numpy
        eigenvalues = jnp.exp(-jnp.exp(p["nu_log"]) + 1j * jnp.exp(p["theta_log"]))
        B = (p["B_re"] + 1j * p["B_im"]) * jnp.exp(p["gamma_log"])[:, None]
        drive = inputs @ B.T
        decays = jnp.broadcast_to(eigenvalues, drive.shape)
        _, states = self.jax.lax.associative_scan(_combine, (decays, drive))
        return (states @ (p["C_re"] + 1j * p["C_im"]).T).real + p["D"] * inputs

    def weighted(self, p: dict[str, Any], inputs: Any, weights: Any) -> Any:
        return self.jax.numpy.vdot(self.batched(p, inputs), weights)

    def load(self, path: Path) -> dict[str, Any]:
        """Take a case, and save what comes out of it for the other side to check."""
        import numpy as np

        with np.load(path) as file:
            arrays = {name: self.jax.numpy.asarray(file[name]) for name in file.files}
        p = {name: arrays[name] for name in PARAMETERS}
        self.case = (p, arrays["inputs"], arrays["weights"])
        _, (_, grad) = self.gradients(*self.case)
        out = path.with_suffix(".out.npz")
        np.savez(out, outputs=np.asarray(self.forward(*self.case[:2])), grad=np.asarray(grad))
        return {"outputs": str(out)}

    def measure(self, count: int) -> dict[str, Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            self.jax.block_until_ready(self.gradients(*self.case))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"wall": wall / count, "cpu": cpu / count}


def _combine(left: tuple[Any, Any], right: tuple[Any, Any]) -> tuple[Any, Any]:
    return left[0] * right[0], right[0] * left[1] + right[1]


def serve() -> None:
    layer = PublishedLayer()
    _say({"jax": layer.jax.__version__})
    for line in sys.stdin:
        request = json.loads(line)
        path = request.get("load")
        _say(layer.load(Path(path)) if path else layer.measure(request["measure"]))


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
