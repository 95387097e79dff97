"""How many states to keep."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from lightning_compressm.control.hankel import NEGLIGIBLE
from lightning_compressm.errors import NonFiniteError

__all__ = ["constrain_order", "order_for_energy", "order_for_fraction"]


def order_for_energy(sigma: Tensor, tolerance: float) -> int:
    """Smallest order whose Hankel singular values reach ``1 - tolerance`` of their sum.

    The energy is the sum of the values, not of their squares (CompreSSM, arXiv 2510.02823, section
    3). States below 1e-14 of the largest value are rounding and never counted, so ``tolerance=0``
    keeps all states that exist numerically, and the result is at most N.

    Args:
        sigma: Values in descending order, shape ``(N,)``; or ``(systems, N)`` for a bank of systems
            that shares one order: then the energies of all systems are pooled.
        tolerance: Share of the energy that may be discarded, in ``[0, 1)``.

    Returns:
        Order between 1 and N.

    Raises:
        ValueError: If the shape, the values' order or the tolerance is not valid, or all are zero.
        NonFiniteError: If a value is NaN or infinite.

    Example:
        >>> import torch
        >>> order_for_energy(torch.tensor([8.0, 1.5, 0.4, 0.1]), tolerance=0.1)
        2
        >>> order_for_energy(torch.tensor([[8.0, 1.0], [1.0, 0.0]]), tolerance=0.0)
        2
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"expected a tolerance in [0, 1), got {tolerance}")
    energy = _pooled(sigma)
    total = float(energy.sum())
    if total == 0:
        raise ValueError(
            "this layer has zero Hankel energy: its inputs never reach its outputs (B or C is zero)"
            ", so no order can be chosen; leave the layer out or fix its initialisation"
        )
    # Tails are summed from the small end: 1 - cumsum loses them to rounding.
    tails = energy.flip(0).cumsum(0).flip(0)
    needed = int((tails > tolerance * float(tails[0])).sum())
    rank = int((energy > NEGLIGIBLE * energy[0]).sum())
    return max(1, min(needed, rank))


def _pooled(sigma: Tensor) -> Tensor:
    if sigma.ndim not in (1, 2) or 0 in sigma.shape:
        raise ValueError(
            f"expected sigma of shape (N,) or (systems, N), N >= 1, got {tuple(sigma.shape)}"
        )
    values = sigma.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError("expected finite Hankel singular values, got NaN or infinity")
    if bool((values < 0).any()) or bool((values.diff(dim=-1) > 0).any()):
        raise ValueError("expected values >= 0 in descending order; sort them first")
    return values if values.ndim == 1 else values.sum(0)


def order_for_fraction(n: int, fraction: float) -> int:
    """Order that is left after dropping a share of the states.

    Args:
        n: Present number of states, at least 1.
        fraction: Share to drop, in ``[0, 1)``; the number of dropped states is rounded down.

    Returns:
        Order between 1 and n.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> order_for_fraction(256, 0.1)
        231
    """
    if n < 1:
        raise ValueError(f"expected at least 1 state, got {n}")
    if not 0 <= fraction < 1:
        raise ValueError(f"expected a fraction in [0, 1), got {fraction}")
    return max(1, n - int(n * fraction + 1e-9))  # 0.29 * 100 is just below 29 in floating point


def constrain_order(order: int, n: int, *, min_state_dim: int = 1, round_to: int = 1) -> int:
    """Raise an order to a lower limit, then up to a multiple, and cap it at the present one.

    Args:
        order: Wanted order, at least 1.
        n: Present number of states; never exceeded, even if it is no multiple of ``round_to``.
        min_state_dim: Lower limit, at least 1.
        round_to: The result is a multiple of this, at least 1.

    Returns:
        Order between 1 and n.

    Raises:
        ValueError: If an argument is below 1.

    Example:
        >>> constrain_order(13, 64, round_to=8), constrain_order(61, 62, round_to=8)
        (16, 62)
    """
    arguments = {"order": order, "n": n, "min_state_dim": min_state_dim, "round_to": round_to}
    for name, value in arguments.items():
        if operator.index(value) < 1:
            raise ValueError(f"expected {name} >= 1, got {value}")
    wanted = max(order, min_state_dim)
    return min(n, -(-wanted // round_to) * round_to)
