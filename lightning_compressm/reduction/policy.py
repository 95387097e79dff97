"""What to remove: every choice of a reduction in one validated, immutable object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_compressm.control.criteria import CRITERIA

__all__ = ["Balance", "BalanceChoice", "HorizonChoice", "ReductionPolicy", "Selection"]

Balance = Literal["real", "folded", "complex"]
BalanceChoice = Literal["auto", "real", "folded", "complex"]
HorizonChoice = int | Literal["auto"] | None
Selection = Literal["largest", "smallest", "random"]

DEFAULT_TOLERANCE = 0.05
DEFAULT_OUTPUT_ERROR = 0.5


@dataclass(frozen=True, kw_only=True)
class ReductionPolicy:
    """How many states stay, which ones, in which layers, and how they are balanced.

    At most one of ``tolerance``, ``fraction`` and ``state_dim``; none means ``tolerance=0.05``.

    Args:
        tolerance: share of a layer's Hankel energy (the sum of its Hankel singular values) that
            may be discarded, in [0, 1).
        fraction: share of the current states to drop, in (0, 1).
        state_dim: state dimension to go down to, >= 1.
        min_reduction: act only if at least this share of a layer's states goes, in [0, 1).
        min_state_dim: never go below this dimension, >= 1.
        round_to: round the kept number up to a multiple of this, >= 1.
        share_state_dim: one dimension for all layers of a family (the largest that one needs).
        layers: glob patterns of module names to consider; ``None`` for all.
        ignore: glob patterns of module names to leave alone.
        balance: see :func:`lightning_compressm.control.balanced_truncation`; ``"auto"`` is
            ``"real"``, the balancing of the real system that the layer computes, or ``"folded"``
            if the model is ``trained_on``.
        horizon: steps of a time-limited Gramian, ``None`` for infinite, ``"auto"`` for the length
            of the sequences that the layer was seen to process (infinite if it was not seen).
        selection: ``"largest"`` keeps the states of largest Hankel singular value; the other two
            are ablations.
        criterion: which states of a selective layer stay: a name in
            :data:`~lightning_compressm.control.criteria.CRITERIA`; ``"auto"`` is the package's
            choice. Linear layers are balanced and need none.
        refit: let the rest of a selective layer make up for the states that go.
        max_output_error: refuse a cut of a selective layer that changes its output on the
            calibration data by more than this share (root mean squares), after trying with more
            states; ``None`` for no limit.
        trained_on: whether the model is trained further; what ``balance="auto"`` depends on.

    Raises:
        ValueError: for more than one target, and for values out of range.

    Example:
        >>> ReductionPolicy().tolerance
        0.05
        >>> ReductionPolicy(tolerance=0.1, fraction=0.5)
        Traceback (most recent call last):
            ...
        ValueError: expected at most one of tolerance, fraction and state_dim; got tolerance=0.1 \
and fraction=0.5. Keep the one that you mean.
    """

    tolerance: float | None = None
    fraction: float | None = None
    state_dim: int | None = None
    min_reduction: float = 0.0
    min_state_dim: int = 1
    round_to: int = 1
    share_state_dim: bool = False
    layers: Sequence[str] | None = None
    ignore: Sequence[str] | None = None
    balance: BalanceChoice = "auto"
    horizon: HorizonChoice = "auto"
    selection: Selection = "largest"
    criterion: str = "auto"
    refit: bool = True
    max_output_error: float | None = DEFAULT_OUTPUT_ERROR
    trained_on: bool = False

    def __post_init__(self) -> None:
        """Refuse what can't be meant, before any model is looked at."""
        targets = {k: getattr(self, k) for k in ("tolerance", "fraction", "state_dim")}
        given = [f"{name}={value}" for name, value in targets.items() if value is not None]
        if len(given) > 1:
            raise ValueError(
                "expected at most one of tolerance, fraction and state_dim; got "
                f"{' and '.join(given)}. Keep the one that you mean."
            )
        if not given:
            object.__setattr__(self, "tolerance", DEFAULT_TOLERANCE)
        check_share("tolerance", self.tolerance)
        check_share("fraction", self.fraction, zero=False)
        check_share("min_reduction", self.min_reduction)
        if self.fraction is not None and self.fraction < self.min_reduction:
            raise ValueError(
                f"fraction={self.fraction} drops less at a time than min_reduction="
                f"{self.min_reduction} asks for, so nothing would ever be reduced. Raise "
                "`fraction`, or lower `min_reduction`."
            )
        for name in ("state_dim", "min_state_dim", "round_to"):
            check_count(name, getattr(self, name), optional=name == "state_dim")
        check_patterns("layers", self.layers)
        check_patterns("ignore", self.ignore)
        check_choice("balance", self.balance, get_args(BalanceChoice))
        check_choice("selection", self.selection, get_args(Selection))
        check_choice("criterion", self.criterion, ("auto", *CRITERIA))
        check_limit("max_output_error", self.max_output_error)
        check_flag("share_state_dim", self.share_state_dim)
        check_flag("refit", self.refit)
        check_flag("trained_on", self.trained_on)
        if isinstance(self.horizon, str):
            check_choice("horizon", self.horizon, ("auto",))
        else:
            check_count("horizon", self.horizon, optional=True)


def check_share(name: str, value: object, *, zero: bool = True) -> None:
    """Raise unless ``value`` is None or a number in [0, 1) (or (0, 1) without ``zero``).

    Example:
        >>> check_share("tolerance", 0.05)
    """
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 <= value < 1) or (value == 0 and not zero):  # type: ignore[operator]
        bounds = "[0, 1)" if zero else "(0, 1)"
        raise ValueError(f"{name}: expected a share in {bounds}, got {value!r}.")


def check_count(name: str, value: object, *, optional: bool = False, least: int = 1) -> None:
    """Raise unless ``value`` is an int of at least ``least`` (or None, if optional).

    Example:
        >>> check_count("round_to", 8)
    """
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}.")


def check_limit(name: str, value: object) -> None:
    """Raise unless ``value`` is None or a number > 0.

    Example:
        >>> check_limit("max_output_error", 0.5)
    """
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{name}: expected a number > 0 or None, got {value!r}.")


def check_amount(name: str, value: object) -> None:
    """Raise unless ``value`` is a number >= 0.

    Example:
        >>> check_amount("max_degradation", 0.02)
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
        raise ValueError(f"{name}: expected a number >= 0, got {value!r}.")


def check_text(name: str, value: object) -> None:
    """Raise unless ``value`` is None or text that is not empty.

    Example:
        >>> check_text("monitor", "val_loss")
    """
    if value is not None and not (isinstance(value, str) and value):
        raise ValueError(f"{name}: expected text or None, got {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Raise unless ``value`` is True or False.

    Example:
        >>> check_flag("refit", True)
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}.")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``choices``.

    Example:
        >>> check_choice("mode", "min", ("min", "max"))
    """
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {value!r}.")


def check_patterns(name: str, value: object) -> None:
    """Raise unless ``value`` is None or a list of strings.

    Example:
        >>> check_patterns("layers", ["encoder.*"])
    """
    if value is None:
        return
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name}: expected a list of glob patterns, got {value!r}.")
    if not all(isinstance(pattern, str) for pattern in value):
        raise ValueError(f"{name}: expected strings as patterns, got {value!r}.")
