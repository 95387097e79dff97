"""Complex matrices of a layer, stored as one complex tensor or as two real ones."""

from __future__ import annotations

from torch import Tensor

from lightning_compressm.surgery.plan import Combine, MomentRule

__all__ = ["matrix_rules", "matrix_values"]


def matrix_values(name: str, matrix: Tensor, *, split: bool) -> dict[str, Tensor]:
    """``{name: matrix}``, or its parts as ``name_re`` and ``name_im``."""
    return {f"{name}_re": matrix.real, f"{name}_im": matrix.imag} if split else {name: matrix}


def matrix_rules(
    name: str, dim: int, linear: Tensor, conjugate: Tensor, *, split: bool
) -> dict[str, MomentRule]:
    """Moments G of a matrix become ``linear G + conjugate conj(G)`` along ``dim``.

    Args:
        name: of the tensor, without ``_re`` and ``_im``.
        dim: the state dimension.
        linear: (new, old), complex.
        conjugate: (new, old), complex.
        split: whether real and imaginary part are tensors of their own.
    """
    plus, minus = linear + conjugate, linear - conjugate
    re, im = (f"{name}_re", f"{name}_im") if split else (f"{name}:re", f"{name}:im")
    real = {re: plus.real, im: -minus.imag}
    imag = {re: plus.imag, im: minus.real}
    if split:
        return {re: Combine(dim, {"": real}), im: Combine(dim, {"": imag})}
    return {name: Combine(dim, {":re": real, ":im": imag})}
