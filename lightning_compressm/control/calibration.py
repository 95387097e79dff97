"""Statistics of selective recurrences on calibration data, and the Hankel energy of their states.

A selective layer is a bank of channels d in groups g that share B and C,

    h_k[d] = exp(dt_k[d] A[d]) h_{k-1}[d] + dt_k[d] x_k[d] B_k[g],   y_k[d] = C_k[g] . h_k[d],

with dt, B and C computed from the input (Mamba, arXiv 2312.00752, algorithm 2; Mamba-2, arXiv
2405.21060, equation 1). It has no Gramians of its own; these are sums over data that stand for
them. All are plain sums, so those of several batches, or processes, add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import reduce

import torch
from torch import Tensor

from lightning_compressm._precision import double
from lightning_compressm.control.hankel import hankel_singular_values
from lightning_compressm.control.system import DiagonalLTI
from lightning_compressm.errors import NonFiniteError

__all__ = ["SelectiveSignals", "SelectiveStatistics", "averaged_spectrum", "state_chunks"]

CHUNK = 16  # steps whose states are held at a time
_CHANNELS = 256  # channels whose averaged systems are analysed at a time
_LARGEST_POLE = 1 - 1e-12


@dataclass(frozen=True, eq=False)
class SelectiveSignals:
    """What a selective recurrence sees during one batch.

    Args:
        dt: step sizes > 0, shape (batch, L, G, D): G groups of D channels.
        A: negative decay rates, shape (G, D, N), or (G, D, 1) where all states decay alike.
        B: shape (batch, L, G, N).
        C: shape (batch, L, G, N).
        x: input of the recurrence, shape (batch, L, G, D).
        weight: how strongly each output counts (its gate), shape (batch, L, G, D).

    Raises:
        ValueError: if the shapes do not fit together.

    Example:
        >>> import torch
        >>> ones = torch.ones(2, 5, 1, 3)
        >>> signals = SelectiveSignals(
        ...     ones, -torch.ones(1, 3, 4), ones[..., :1].expand(2, 5, 1, 4),
        ...     ones[..., :1].expand(2, 5, 1, 4), ones, ones,
        ... )
        >>> signals.n_states
        4
    """

    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    x: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        """Compare the shapes."""
        batch, length, groups, channels = self.x.shape
        n = self.B.shape[-1]
        wanted = {
            "dt": (batch, length, groups, channels),
            "B": (batch, length, groups, n),
            "C": (batch, length, groups, n),
            "weight": (batch, length, groups, channels),
        }
        bad = {
            k: tuple(getattr(self, k).shape)
            for k, v in wanted.items()
            if tuple(getattr(self, k).shape) != v
        }
        if self.A.shape[:2] != (groups, channels) or self.A.shape[-1] not in (1, n):
            bad["A"] = tuple(self.A.shape)
        if bad:
            raise ValueError(
                f"expected signals of shape (batch, L, G, D) = {tuple(self.x.shape)} and "
                f"(batch, L, G, N) with N = {n}, got {bad}"
            )

    @property
    def n_states(self) -> int:
        """Number of states N of every channel."""
        return self.B.shape[-1]

    def double(self) -> SelectiveSignals:
        """The same in double precision: on the device, or on the CPU where it has none."""
        return SelectiveSignals(*(double(getattr(self, f.name).detach()) for f in fields(self)))


def state_chunks(signals: SelectiveSignals) -> Iterator[tuple[slice, Tensor]]:
    """Run the recurrence and hand out its states a few steps at a time.

    Args:
        signals: of one batch.

    Yields:
        The steps as a slice, and the states after each of them, (batch, steps, G, D, N); they may
        be overwritten.
    """
    batch, length, groups, channels = signals.x.shape
    state = signals.x.new_zeros(batch, groups, channels, signals.n_states)
    driven = signals.dt * signals.x
    rates = signals.A * math.log2(math.e)
    for start in range(0, length, CHUNK):
        steps = slice(start, min(start + CHUNK, length))
        # On a CPU exp takes three times as long as exp2.
        decay = (signals.dt[:, steps, ..., None] * rates).exp2_()
        states = driven[:, steps, ..., None] * signals.B[:, steps, :, None]
        for factor, following in zip(decay.unbind(1), states.unbind(1), strict=True):
            state = following.addcmul_(factor, state)
        # The next chunk starts from this state, whatever the caller does to the ones handed out.
        state = state.clone()
        yield steps, states


@dataclass(frozen=True, eq=False)
class SelectiveStatistics:
    """Sums over calibration data, float64; G groups of D channels with N states.

    Attributes:
        A: decay rates as in :class:`SelectiveSignals`; not a sum.
        count: number of (sequence, step) pairs, shape ().
        dt: sum of the step sizes, (G, D).
        drive: sum of (dt x)^2, (G, D).
        weight: sum of weight^2, (G, D).
        B: sum of B B^T, (G, N, N).
        C: sum of C C^T, (G, N, N).
        energy: sum over channels of (weight h)^2, (G, N).
        gram: sum over channels of weight^2 c c^T with the contributions c = C h, (G, N, N).

    Example:
        >>> import torch
        >>> one = torch.ones(1, 2, 1, 1)
        >>> signals = SelectiveSignals(one, torch.full((1, 1, 1), -1e3), one, one, one, one)
        >>> SelectiveStatistics.of([signals]).gram
        tensor([[[2.]]], dtype=torch.float64)
    """

    A: Tensor
    count: Tensor
    dt: Tensor
    drive: Tensor
    weight: Tensor
    B: Tensor
    C: Tensor
    energy: Tensor
    gram: Tensor

    @classmethod
    def of(cls, batches: Iterable[SelectiveSignals]) -> SelectiveStatistics:
        """The statistics of all batches.

        Raises:
            ValueError: if there is no batch.
            NonFiniteError: if a sum is NaN or infinite.
        """
        parts = [_statistics(signals.double()) for signals in batches]
        if not parts:
            raise ValueError("expected at least one calibration batch, got none")
        total = reduce(lambda a, b: a.combined(b), parts)
        for field in fields(cls):
            if not bool(torch.isfinite(getattr(total, field.name)).all()):
                raise NonFiniteError(
                    f"expected finite calibration statistics, got NaN or infinity in "
                    f"'{field.name}'; the parameters or the calibration batch hold some"
                )
        return total

    def combined(self, other: SelectiveStatistics) -> SelectiveStatistics:
        """The statistics of both data sets together."""
        return self.summed(lambda name, value: value + getattr(other, name))

    def summed(self, combine: Callable[[str, Tensor], Tensor]) -> SelectiveStatistics:
        """Replace every sum by ``combine(name, sum)``, e.g. to add those of other processes."""
        names = [field.name for field in fields(self)]
        values = {n: getattr(self, n) if n == "A" else combine(n, getattr(self, n)) for n in names}
        return SelectiveStatistics(**values)


def _statistics(signals: SelectiveSignals) -> SelectiveStatistics:
    groups, n = signals.B.shape[2:]
    energy, gram = signals.x.new_zeros(groups, n), signals.x.new_zeros(groups, n, n)
    for steps, states in state_chunks(signals):
        weighted = states.mul_(signals.weight[:, steps, ..., None])
        energy += weighted.square().sum((0, 1, 3))
        read = weighted.mul_(signals.C[:, steps, :, None])
        rows = read.movedim(2, 0).reshape(groups, -1, n)
        gram += rows.mT @ rows

    def second_moment(values: Tensor) -> Tensor:
        rows = values.movedim(2, 0).reshape(groups, -1, n)
        return rows.mT @ rows

    return SelectiveStatistics(
        A=signals.A,
        count=signals.x.new_tensor(float(signals.x.shape[0] * signals.x.shape[1])),
        dt=signals.dt.sum((0, 1)),
        drive=(signals.dt * signals.x).square().sum((0, 1)),
        weight=signals.weight.square().sum((0, 1)),
        B=second_moment(signals.B),
        C=second_moment(signals.C),
        energy=energy,
        gram=gram,
    )


def averaged_poles(statistics: SelectiveStatistics) -> Tensor:
    """Poles of the time-invariant systems at the mean step size, (G, D, N) or (G, D, 1)."""
    mean = statistics.dt / statistics.count
    return torch.exp(mean.unsqueeze(-1) * statistics.A).clamp(max=_LARGEST_POLE)


def averaged_spectrum(statistics: SelectiveStatistics) -> Tensor:
    """Hankel singular values of the time-invariant systems that the layer is on average.

    Each channel has the poles of the mean step size, and inputs and outputs with the second moments
    of B and C; its values are weighted with the size of its input and gate, and added up over the
    channels.

    Args:
        statistics: of a calibration data set.

    Returns:
        Descending, shape (G, N), float64.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 2, 1, 1)
        >>> signals = SelectiveSignals(one, torch.full((1, 1, 1), -1e3), one, one, one, one)
        >>> averaged_spectrum(SelectiveStatistics.of([signals]))
        tensor([[1.]], dtype=torch.float64)
    """
    poles = averaged_poles(statistics)
    size = channel_sizes(statistics)
    into, out = _factor(statistics.B / statistics.count), _factor(statistics.C / statistics.count)
    if poles.shape[-1] == 1:
        # All states decay alike: every channel has the same spectrum up to a factor.
        gain = (size / (1 - poles.squeeze(-1).square())).sum(-1, keepdim=True)
        values: Tensor = torch.linalg.svdvals(out.mT @ into) * gain
        return values
    spectrum = torch.zeros_like(statistics.energy)
    for start in range(0, poles.shape[1], _CHANNELS):
        chosen = slice(start, start + _CHANNELS)
        shape = (*poles[:, chosen].shape, poles.shape[-1])
        system = DiagonalLTI(
            poles[:, chosen],
            into.unsqueeze(1).expand(shape),
            out.mT.unsqueeze(1).expand(shape),
            real_output=False,
        )
        sigma = hankel_singular_values(system, balance="complex")
        spectrum += (sigma * size[:, chosen, None]).sum(1)
    return spectrum


def channel_sizes(statistics: SelectiveStatistics) -> Tensor:
    """Root mean squares of each channel's input and of its gate, multiplied; (G, D)."""
    sizes: Tensor = (statistics.drive * statistics.weight).sqrt() / statistics.count
    return sizes


def _factor(moment: Tensor) -> Tensor:
    """A square F with F F^T = moment."""
    values, vectors = torch.linalg.eigh(moment)
    factor: Tensor = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return factor
