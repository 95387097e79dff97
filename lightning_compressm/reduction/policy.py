"""What to remove: every choice of a reduction in one validated, immutable object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_compressm._rules import (
    COUNT,
    FLAG,
    LIMIT,
    PATTERNS,
    POSITIVE_SHARE,
    SHARE,
    Rule,
    one_of,
    optional,
)
from lightning_compressm.control.balance import BALANCES, BalanceChoice
from lightning_compressm.control.criteria import CRITERIA
from lightning_compressm.control.truncation import Selection

__all__ = ["BalanceChoice", "HorizonChoice", "ReductionPolicy", "Selection"]

HorizonChoice = int | Literal["auto"] | None

DEFAULT_TOLERANCE = 0.05
DEFAULT_LOSS_BUDGET = 0.02
TARGETS = ("tolerance", "fraction", "state_dim", "loss_budget")
DEFAULT_OUTPUT_ERROR = 0.5

_HORIZON = Rule(
    "an integer >= 1, 'auto' or None", lambda v: v is None or v == "auto" or COUNT.accepts(v)
)
_RULES = {
    "tolerance": optional(SHARE),
    "fraction": optional(POSITIVE_SHARE),
    "state_dim": optional(COUNT),
    "loss_budget": optional(SHARE),
    "floor": SHARE,
    "min_reduction": SHARE,
    "min_state_dim": COUNT,
    "round_to": COUNT,
    "share_state_dim": FLAG,
    "layers": optional(PATTERNS),
    "ignore": optional(PATTERNS),
    "averages": optional(PATTERNS),
    "horizon": _HORIZON,
    "selection": one_of(*get_args(Selection)),
    "refit": FLAG,
    "max_output_error": optional(LIMIT),
    "trained_on": FLAG,
}


@dataclass(frozen=True, kw_only=True)
class ReductionPolicy:
    """How many states stay, which ones, in which layers, and how they are balanced.

    At most one of ``tolerance``, ``fraction``, ``state_dim`` and ``loss_budget``; none means
    ``tolerance=0.05``.

    Args:
        tolerance: share of a layer's Hankel energy (the sum of its Hankel singular values) that
            may be discarded, in [0, 1).
        fraction: share of the current states to drop, in (0, 1).
        state_dim: state dimension to go down to, >= 1.
        loss_budget: halve the states of each layer where the loss, tried on a training batch, rises
            by at most this share of the running loss, in [0, 1); only in training.
        floor: with ``loss_budget``, never below this share of the states at the start, in [0, 1).
        min_reduction: act only if at least this share of a layer's states goes, in [0, 1).
        min_state_dim: never go below this dimension, >= 1.
        round_to: round the kept number up to a multiple of this, >= 1.
        share_state_dim: one dimension for all layers of a family (the largest that one needs).
        layers: glob patterns of module names to consider; ``None`` for all.
        ignore: glob patterns of module names to leave alone.
        averages: glob patterns of layers that hold averages of others, and follow them.
        balance: see :func:`lightning_compressm.control.balanced_truncation`; ``"auto"`` is
            ``"real"``, the balancing of the real system that the layer computes, or ``"folded"``
            if the model is ``trained_on``. ``"modes"`` keeps states as they are and refits C.
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
        ValueError: expected at most one of tolerance, fraction and state_dim, or loss_budget; got \
tolerance=0.1 and fraction=0.5. Keep the one that you mean.
    """

    tolerance: float | None = None
    fraction: float | None = None
    state_dim: int | None = None
    loss_budget: float | None = None
    floor: float = 0.25
    min_reduction: float = 0.0
    min_state_dim: int = 1
    round_to: int = 1
    share_state_dim: bool = False
    layers: Sequence[str] | None = None
    ignore: Sequence[str] | None = None
    averages: Sequence[str] | None = None
    balance: BalanceChoice = "auto"
    horizon: HorizonChoice = "auto"
    selection: Selection = "largest"
    criterion: str = "auto"
    refit: bool = True
    max_output_error: float | None = DEFAULT_OUTPUT_ERROR
    trained_on: bool = False

    def __post_init__(self) -> None:
        """Refuse what can't be meant, before any model is looked at."""
        targets = {k: getattr(self, k) for k in TARGETS}
        given = [f"{name}={value}" for name, value in targets.items() if value is not None]
        if len(given) > 1:
            raise ValueError(
                "expected at most one of tolerance, fraction and state_dim, or loss_budget; got "
                f"{' and '.join(given)}. Keep the one that you mean."
            )
        if not given:
            object.__setattr__(self, "tolerance", DEFAULT_TOLERANCE)
        for name, rule in _RULES.items():
            rule.check(name, getattr(self, name))
        # Looked up late: more may have been registered since.
        one_of("auto", *BALANCES).check("balance", self.balance)
        one_of("auto", *CRITERIA).check("criterion", self.criterion)
        if self.fraction is not None and self.fraction < self.min_reduction:
            raise ValueError(
                f"fraction={self.fraction} drops less at a time than min_reduction="
                f"{self.min_reduction} asks for, so nothing would ever be reduced. Raise "
                "`fraction`, or lower `min_reduction`."
            )
