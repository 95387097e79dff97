"""What kernels of the state-spaces/s4 code have in common, whatever their state matrix looks like.

Channel h is a system of one input and as many outputs as the kernel has ``channels``. Real tensors
with a last dimension of two hold complex numbers, and each state stands for a conjugate pair:
y = 2 Re(C x). Releases differ in names: :class:`Names` has those of one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compressm._precision import double
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.families._base import Family, shape_source, tensor_of

__all__ = [
    "Names",
    "S4KernelFamily",
    "complex_of",
    "length_of",
    "output_scale",
    "pairs_of",
    "refusal",
    "written_b",
]


@dataclass(frozen=True)
class Names:
    """What one release of the code calls its parameters.

    Attributes:
        step: of the steps, (H,), (H, 1) or (H, N), before ``dt_transform``.
        decay: of minus the real part of A, (S, N), before ``real_transform``.
        frequency: of the imaginary part of A, (S, N).
        sign: of that imaginary part in A.
        length: of the length that C was prepared for, a buffer of kernels with low rank.
    """

    step: str
    decay: str
    frequency: str
    sign: int
    length: str


_RELEASES = (
    Names("inv_dt", "A_real", "A_imag", -1, "l_kernel"),
    Names("log_dt", "inv_A_real", "A_imag", 1, "L"),
    Names("log_dt", "inv_w_real", "w_imag", 1, "L"),
)

# Parameter -> value, and back: those that reach every positive number.
_TRANSFORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "exp": (torch.exp, torch.log),
    "softplus": (F.softplus, lambda value: value + torch.log(-torch.expm1(-value))),
    "none": (lambda parameter: parameter, lambda value: value),
}
_CACHES = ("dA", "dB", "dC", "step_params")
_PLAIN = {"bandlimit": None, "is_real": False, "imag_transform": "none"}


class S4KernelFamily(Family):
    """A kernel with ``B``, ``C`` and, of the names of one release, steps and the diagonal of A.

    The kernel is the layer: it holds all states, and is called with the length of the sequence.
    With an even number of ``channels`` half of them may run backwards, and be added to the others:
    so C then counts sqrt(2) times, which makes the error bound cover the sum.
    """

    low_rank: ClassVar[bool]

    def matches(self, module: nn.Module) -> bool:
        """Whether the tensors are there, with shapes that fit together."""
        names, own = names_of(module), _own(module)
        if names is None or ("P" in own) != self.low_rank or _lends(module):
            return False
        decay, C = own[names.decay].shape, own["C"].shape
        pairs = () if _is_real(module) else (2,)
        if len(decay) != 2 or 0 in decay or len(C) != 3 + len(pairs):
            return False
        copies, n = decay
        channels = C[1]
        return (
            C[2:] == (n, *pairs)
            and channels % copies == 0
            and own["B"].shape in ((1, copies, n, *pairs), (copies, n, *pairs))
            and own[names.step].shape in ((channels,), (channels, 1), (channels, n))
            and (_is_real(module) or own[names.frequency].shape == decay)
            and (not self.low_rank or own["P"].shape[1:] == (copies, n, 2))
            and (not self.low_rank or names.length in own)
        )

    def refuse(self, module: nn.Module) -> None:
        """Refuse what is no bank of complex systems, each with an A of its own."""
        for name, plain in _PLAIN.items():
            value = getattr(module, name, plain)
            if value != plain:
                raise refusal(f"{name}={plain!r}", f"{name}={value!r}")
        for name in _transforms(module):
            if name not in _TRANSFORMS:
                known = " or ".join(map(repr, _TRANSFORMS))
                raise refusal(f"transforms of dt and Re(A) by {known}", repr(name))
        channels, copies = tensor_of(module, "C").shape[1], _diagonal_shape(module)[0]
        if channels != copies:
            raise refusal(
                f"an A for each of {channels} channels (n_ssm=None)",
                f"{copies} that channels share: these have no common basis",
            )
        self.discretization(module)

    def sequences(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> tuple[Tensor, Tensor] | None:
        """None: a kernel sees no sequence."""
        return None

    @abstractmethod
    def discretization(self, module: nn.Module) -> str:
        """How the layer is discretized; refuses what is unknown."""

    def state_axes(self, module: nn.Module) -> dict[str, int]:
        """Dimension 1 of A, the one before pairs of B, C and P; steps, where states have them."""
        names = _names(module)
        axes = {names.decay: 1}
        if not _is_real(module):
            axes[names.frequency] = 1
        axes |= {"B": shape_source(module, "B").ndim - (1 if _is_real(module) else 2), "C": 2}
        if self.low_rank:
            axes["P"] = 2
        if not _is_tied(module):
            axes[names.step] = 1
        return axes

    def attributes(self, module: nn.Module, state_dim: int) -> dict[str, Any]:
        """Also the matrices prepared for stepping: they have to be set up again."""
        stale = {name: None for name in _CACHES if name in vars(module)}
        return super().attributes(module, state_dim) | stale

    def sequence_length(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
        """Kernels are called with a length, by name or before anything else."""
        length = kwargs.get("L", args[0] if args else None)
        if isinstance(length, int) and not isinstance(length, bool):
            return length
        return super().sequence_length(args, kwargs)

    def steps(self, module: nn.Module) -> Tensor:
        """Lengths of the steps, (H, 1) or (H, N), float64."""
        parameter = double(tensor_of(module, _names(module).step))
        if parameter.ndim == 1:
            parameter = parameter.unsqueeze(-1)
        if getattr(module, "dt_fast", False):
            parameter = torch.sinh(parameter)
        return _TRANSFORMS[_transforms(module)[0]][0](parameter)

    def poles(self, module: nn.Module) -> Tensor:
        """The diagonal of A, (H, N), complex128."""
        names = _names(module)
        decay = _TRANSFORMS[_transforms(module)[1]][0](double(tensor_of(module, names.decay)))
        return torch.complex(-decay, names.sign * double(tensor_of(module, names.frequency)))

    def written_poles(self, module: nn.Module, poles: Tensor) -> dict[str, Tensor]:
        """The tensors that hold this diagonal of A, (H, r)."""
        names = _names(module)
        decay = _TRANSFORMS[_transforms(module)[1]][1](-poles.real)
        return {names.decay: decay, names.frequency: names.sign * poles.imag}

    def common_steps(self, module: nn.Module) -> Tensor:
        """One step for all states of a channel, (H, 1): the geometric mean of its steps."""
        return self.steps(module).detach().log().mean(-1, keepdim=True).exp()

    def written_steps(self, module: nn.Module, steps: Tensor, order: int) -> dict[str, Tensor]:
        """The tensor of the steps, (H, 1), if it has a state dimension."""
        if _is_tied(module):
            return {}
        parameter = _TRANSFORMS[_transforms(module)[0]][1](steps)
        if getattr(module, "dt_fast", False):
            parameter = torch.asinh(parameter)
        return {_names(module).step: parameter.expand(-1, order)}


def names_of(module: nn.Module) -> Names | None:
    """The release whose names the tensors of a module have."""
    own = _own(module)
    for names in _RELEASES:
        needed = {names.step, names.decay, "B", "C"}
        if needed <= own.keys() and (names.frequency in own or _is_real(module)):
            return names
    return None


def output_scale(module: nn.Module) -> float:
    """How often C counts: see the class."""
    return math.sqrt(2) if tensor_of(module, "C").shape[0] % 2 == 0 else 1.0


def length_of(module: nn.Module) -> int:
    """The length that C was prepared for; 0 if it was not."""
    return int(getattr(module, _names(module).length))


def complex_of(module: nn.Module, name: str) -> Tensor:
    """A tensor of pairs in complex128, without the last dimension."""
    return torch.complex(*double(tensor_of(module, name)).unbind(-1))


def pairs_of(values: Tensor) -> Tensor:
    """The inverse of :func:`complex_of`."""
    return torch.stack((values.real, values.imag), -1)


def written_b(module: nn.Module, values: Tensor) -> Tensor:
    """B with these values, (H, r), and as many dimensions as it has."""
    shape = (1,) * (shape_source(module, "B").ndim - 3)
    return pairs_of(values).view(*shape, *values.shape, 2)


def refusal(expected: str, got: str) -> UnsupportedLayerError:
    """The error that names what a kernel should have been like."""
    return UnsupportedLayerError(
        f"expected an S4 kernel with {expected}, got {got}; build the layer otherwise, or put it "
        "into `ignore`."
    )


def _own(module: nn.Module) -> dict[str, Tensor]:
    own = {**module._buffers, **module._parameters}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def _names(module: nn.Module) -> Names:
    names = names_of(module)
    assert names is not None
    return names


def _lends(module: nn.Module) -> bool:
    """Whether it only registers, a second time, what a kernel inside it has."""
    inner = (sub for sub in module.modules() if sub is not module)
    return any(_own(sub).get("C") is _own(module)["C"] for sub in inner)


def _is_real(module: nn.Module) -> bool:
    return bool(getattr(module, "is_real", False))


def _is_tied(module: nn.Module) -> bool:
    """Whether all states of a channel have one step; sizes alone don't tell with one state."""
    shape = shape_source(module, _names(module).step).shape
    return len(shape) == 1 or bool(getattr(module, "dt_tie", shape[1] == 1))


def _diagonal_shape(module: nn.Module) -> torch.Size:
    return tensor_of(module, _names(module).decay).shape


def _transforms(module: nn.Module) -> tuple[str, str]:
    """Those of the steps and of minus the real part of A."""
    decay = getattr(module, "real_transform", getattr(module, "real_type", "exp"))
    return str(getattr(module, "dt_transform", "exp")), str(decay)
