"""Control theory on tensors: systems, Gramians, Hankel singular values, balanced truncation."""

from lightning_compressm.control.basis import ChangeOfBasis
from lightning_compressm.control.gramians import gramians, real_gramians
from lightning_compressm.control.hankel import hankel_singular_values, per_state_energy
from lightning_compressm.control.modes import Modes as _Modes  # noqa: F401 (registers itself)
from lightning_compressm.control.order import constrain_order, order_for_energy, order_for_fraction
from lightning_compressm.control.projection import Projection
from lightning_compressm.control.system import DiagonalLTI
from lightning_compressm.control.truncation import Reduction, balanced_truncation

__all__ = [
    "ChangeOfBasis",
    "DiagonalLTI",
    "Projection",
    "Reduction",
    "balanced_truncation",
    "constrain_order",
    "gramians",
    "hankel_singular_values",
    "order_for_energy",
    "order_for_fraction",
    "per_state_energy",
    "real_gramians",
]
