"""mamba-ssm on a CPU: its kernels stay for CUDA tensors, all others go to plain PyTorch."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch

from lightning_compressm.compat import _convolutions, _norms, _scans

__all__ = ["enable_mamba_ssm_cpu"]

_Function = Callable[..., Any]
# Modules -> what stands in for their kernels on a CPU, under the kernels' own names.
_KERNELS: dict[str, tuple[_Function, ...]] = {
    "mamba_ssm.ops.selective_scan_interface": (_scans.selective_scan_fn, _scans.mamba_inner_fn),
    "mamba_ssm.ops.triton.ssd_combined": (
        _scans.mamba_chunk_scan_combined,
        _scans.mamba_split_conv1d_scan_combined,
    ),
    "mamba_ssm.ops.triton.selective_state_update": (_scans.selective_state_update,),
    "mamba_ssm.ops.triton.layernorm_gated": (_norms.rmsnorm_fn,),
    "mamba_ssm.ops.triton.layer_norm": (_norms.layer_norm_fn, _norms.rms_norm_fn),
    # Optional: without it mamba-ssm convolves by torch.nn.Conv1d.
    "causal_conv1d": (_convolutions.causal_conv1d_fn, _convolutions.causal_conv1d_update),
}
_EXTENSION = "selective_scan_cuda"
_INSTALL = (
    "install it without CUDA, once torch, wheel, setuptools, ninja, packaging and einops are "
    "there: MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE "
    "pip install --no-build-isolation mamba-ssm"
)

# Original kernels by identity: several modules bind the same function under their own names.
_dispatchers: dict[int, tuple[_Function, _Function]] = {}


def enable_mamba_ssm_cpu() -> None:
    """Make ``import mamba_ssm`` and its Mamba, Mamba2 and MambaLMHeadModel work on a CPU.

    The functions of mamba-ssm that call a kernel are wrapped, in every module that has bound
    them: CPU tensors go to plain PyTorch (outputs, gradients, ``step``, ``generate``), all other
    tensors to the original kernels as before. The same happens to causal-conv1d, where it is
    installed. transformers binds these kernels as well, and may be imported before or after;
    what it has bound already is replaced too. Calling this again does nothing more.

    Not covered: Mamba3, and calls of a kernel's own ``autograd.Function``. Arguments that only
    the kernels know raise ``NotImplementedError`` on a CPU.

    Raises:
        ImportError: mamba-ssm is not installed, or can't be imported for another reason than its
            missing CUDA extension; the message says what to install.

    Source:
        Gu & Dao (2023), arXiv 2312.00752; Dao & Gu (2024), arXiv 2405.21060.

    Example:
        >>> from importlib.util import find_spec
        >>> if find_spec("mamba_ssm"):
        ...     enable_mamba_ssm_cpu()
        ...     from mamba_ssm import Mamba
        ...     assert Mamba(8)(torch.ones(2, 5, 8)).shape == (2, 5, 8)
    """
    if "mamba_ssm" not in sys.modules and importlib.util.find_spec("mamba_ssm") is None:
        raise ModuleNotFoundError(f"mamba-ssm is not installed; {_INSTALL}", name="mamba_ssm")
    _provide_extension()
    for name, references in _KERNELS.items():
        module = _import(name)
        for reference in references if module is not None else ():
            _register(getattr(module, reference.__name__, None), reference)
    for bound in list(sys.modules.values()):
        _rebind(bound)


def _provide_extension() -> None:
    """Put an empty module where mamba-ssm imports its CUDA extension and there is none."""
    if _EXTENSION in sys.modules:
        return
    try:
        importlib.import_module(_EXTENSION)
    except ImportError as error:
        stub = ModuleType(_EXTENSION, "Stands in for the CUDA extension of mamba-ssm.")
        stub.__spec__ = importlib.machinery.ModuleSpec(_EXTENSION, None)
        reason = str(error)

        def missing(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            raise RuntimeError(
                f"{_EXTENSION}.{name} was called for CUDA tensors, but mamba-ssm's extension "
                f"could not be imported ({reason}); install mamba-ssm with CUDA, or move the "
                "model and its inputs to the CPU"
            )

        stub.__getattr__ = missing  # type: ignore[method-assign]
        sys.modules[_EXTENSION] = stub


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if not name.startswith("mamba_ssm"):
            return None
        raise ImportError(
            f"mamba-ssm is installed but {name} can't be imported: {error}. Install what is "
            f"missing (torch for Linux brings triton; einops and transformers are needed as "
            f"well), or reinstall mamba-ssm: {_INSTALL}",
            name=name,
        ) from error


def _register(kernel: _Function | None, reference: _Function) -> None:
    if kernel is None or any(kernel is dispatcher for _, dispatcher in _dispatchers.values()):
        return

    # transformers reads the signature of what it binds, and `wraps` keeps that of the kernel.
    @functools.wraps(kernel)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        devices = [value.device.type for value in given if isinstance(value, torch.Tensor)]
        return (reference if devices[:1] == ["cpu"] else kernel)(*args, **kwargs)

    _dispatchers[id(kernel)] = (kernel, dispatch)


def _rebind(module: ModuleType) -> None:
    """Replace the kernels among a module's names, and in the wrappers that transformers makes."""
    names = getattr(module, "__dict__", {})
    wrappers = str(names.get("__name__", "")).startswith("transformers.")
    for name, value in list(names.items()):
        if id(value) in _dispatchers:
            names[name] = _dispatchers[id(value)][1]
        elif wrappers and isinstance(value, FunctionType):
            for cell in value.__closure__ or ():
                # An empty cell, of a function whose definition still runs, raises ValueError.
                with contextlib.suppress(ValueError):
                    if id(cell.cell_contents) in _dispatchers:
                        cell.cell_contents = _dispatchers[id(cell.cell_contents)][1]
