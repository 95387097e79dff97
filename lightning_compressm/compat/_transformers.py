"""The Mamba layers of transformers on a CPU, without their loop over time steps in autograd."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_compressm.nn._plain import is_exporting
from lightning_compressm.nn.selective_scan import selective_scan

__all__ = ["enable_fast_mamba_cpu"]

_MODELS = ("mamba", "falcon_mamba", "jamba", "zamba")
_SCAN = "mamba_selective_scan"


def enable_fast_mamba_cpu() -> None:
    """Let Mamba, FalconMamba, Jamba and Zamba of transformers use our scan for CPU tensors.

    Their fallback indexes one step of the whole sequence after the other, and its backward pass
    needs time and memory in proportion to the square of the length. The result is the same up to
    rounding. Tensors on other devices, and models that are being exported, go where they went
    before. Calling this again does nothing more; mamba-ssm is neither needed nor imported by it.

    Raises:
        ImportError: transformers is not installed, or a version that organises its Mamba layers
            in another way.

    Source:
        Gu & Dao (2023), arXiv 2312.00752, section 3.

    Example:
        >>> from importlib.util import find_spec
        >>> if find_spec("transformers"):
        ...     enable_fast_mamba_cpu()
    """
    if importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "transformers is not installed; pip install 'lightning_compressm[transformers]'",
            name="transformers",
        )
    modules = [importlib.import_module(f"transformers.models.{m}.modeling_{m}") for m in _MODELS]
    without = [module.__name__ for module in modules if not hasattr(module, _SCAN)]
    if without:
        raise ImportError(
            f"expected a function {_SCAN} in {', '.join(without)}, as in transformers 5.16, and "
            "found none; install transformers>=5.16.1, or do without enable_fast_mamba_cpu()"
        )
    for module in modules:
        slow = getattr(module, _SCAN)
        if not hasattr(slow, "_compressm_slow"):
            setattr(module, _SCAN, _fast(slow))


def _fast(slow: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(slow)
    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **options: Any,
    ) -> Any:
        tensors = (hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus)
        if hidden_states.device.type != "cpu" or is_exporting():
            return slow(*tensors, return_last_state, **options)
        return selective_scan(*tensors, return_last_state=return_last_state)

    scan._compressm_slow = slow  # type: ignore[attr-defined]
    return scan
