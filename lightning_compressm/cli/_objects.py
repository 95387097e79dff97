"""Objects that the command line names: models by import path, samples by file or import path."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["load_model", "load_sample"]


def load_model(path: str) -> nn.Module:
    """A model by ``package.module:name``: a module, or what makes one without arguments.

    Raises:
        ValueError: if there is none.

    Example:
        >>> load_model("torch.nn:Identity")
        Identity()
    """
    made = _imported("--model", path)
    if not isinstance(made, nn.Module):
        try:
            made = made()
        except TypeError as error:
            raise ValueError(
                f"--model {path}: expected a module or a function without arguments that makes "
                f"one; calling it failed: {error}"
            ) from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"--model {path}: expected a torch module, got {type(made).__name__}")
    return made


def load_sample(path: str) -> Any:
    """A batch: from a file of torch.save (tensors only), or by ``package.module:name``.

    Raises:
        ValueError: if it can't be read.
    """
    if Path(path).is_file():
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"--sample {path}: expected a file written by torch.save(tensors, path), got one "
                f"that can't be read with weights_only=True ({type(error).__name__})"
            ) from error
    sample = _imported("--sample", path)
    return sample() if callable(sample) else sample


def _imported(option: str, path: str) -> Any:
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"{option}: expected package.module:name, got {path!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: one's own code lies in the current folder
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option} {path}: {error}") from error
    return found
