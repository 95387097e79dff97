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
    from lightning_compressm.model.layers import SSMLayer, find_ssm_layers
    from lightning_compressm.model.loading import load_compressed
    from lightning_compressm.model.padding import pad_state_dim
    from lightning_compressm.model.resizing import install_resize_hooks
    from lightning_compressm.reduction.events import CompressionReport, LayerEvent
    from lightning_compressm.regularizer import HankelRegularizer

__all__ = [
    "CompreSSMCallback",
    "CompressionReport",
    "Family",
    "HankelMonitor",
    "HankelRegularizer",
    "LayerEvent",
    "SSMLayer",
    "__version__",
    "compress",
    "find_ssm_layers",
    "hankel_spectra",
    "install_resize_hooks",
    "load_compressed",
    "pad_state_dim",
    "register_family",
]

_HOMES = {
    "CompreSSMCallback": "callbacks",
    "CompressionReport": "reduction.events",
    "Family": "families",
    "HankelMonitor": "callbacks",
    "HankelRegularizer": "regularizer",
    "LayerEvent": "reduction.events",
    "SSMLayer": "model.layers",
    "compress": "compressor",
    "find_ssm_layers": "model.layers",
    "hankel_spectra": "compressor",
    "install_resize_hooks": "model.resizing",
    "load_compressed": "model.loading",
    "pad_state_dim": "model.padding",
    "register_family": "families",
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
