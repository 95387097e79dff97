"""State-space models that shrink while they train: in-training balanced truncation (CompreSSM).

Names are loaded on first use, so that importing the package stays cheap and needs neither
Lightning nor any SSM package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_compressm.__about__ import __version__

if TYPE_CHECKING:
    from lightning_compressm.callbacks import CompreSSMCallback, HankelMonitor
    from lightning_compressm.compressor import compress, hankel_spectra
    from lightning_compressm.families import Family, register_family
    from lightning_compressm.model.layers import find_ssm_layers
    from lightning_compressm.model.loading import load_compressed
    from lightning_compressm.regularizer import HankelRegularizer

__all__ = [
    "CompreSSMCallback",
    "Family",
    "HankelMonitor",
    "HankelRegularizer",
    "__version__",
    "compress",
    "find_ssm_layers",
    "hankel_spectra",
    "load_compressed",
    "register_family",
]

_HOMES = {
    "CompreSSMCallback": "callbacks",
    "HankelMonitor": "callbacks",
    "HankelRegularizer": "regularizer",
    "Family": "families",
    "register_family": "families",
    "compress": "compressor",
    "hankel_spectra": "compressor",
    "find_ssm_layers": "model.layers",
    "load_compressed": "model.loading",
}


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted({*globals(), *__all__})
