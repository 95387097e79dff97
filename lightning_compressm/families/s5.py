"""S5: ours, and the S5SSM of the s5-pytorch package and of its forks.

One system x' = Lambda x + B u, y = Re(C x) (twice that in ours, where a state stands for a
conjugate pair), with a step exp(log_step) for each state (Smith et al. 2023, arXiv 2208.04933).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compressm._precision import double
from lightning_compressm.control import DiagonalLTI, Reduction
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.families._base import Family, tensor_of
from lightning_compressm.families._continuous import to_continuous, to_discrete
from lightning_compressm.families._matrices import matrix_rules, matrix_values
from lightning_compressm.families._registry import register_family
from lightning_compressm.nn._discretize import DISCRETIZATIONS
from lightning_compressm.surgery.plan import MomentRule, Refill

__all__ = ["S5Family"]


@register_family
class S5Family(Family):
    """S5 with real parameters (ours), or with complex ``Lambda`` and ``C`` (s5-pytorch).

    Ours has ``log_Lambda_re``, ``Lambda_im``, ``log_step`` (N,), ``B_re``, ``B_im`` (N, H) and
    ``C_re``, ``C_im`` (P, N). S5SSM has ``Lambda``, ``log_step`` (N,), ``B`` (N, H, 2) and ``C``
    (P, N), or (P, 2N) if it is bidirectional. Forks of it keep ``Lambda`` (N, 2) and ``C``
    (P, N, 2) as pairs of real numbers. The reduced states all get the geometric mean of the old
    steps; the reduction holds for the step scale 1 that layers are called with by default.

    A bidirectional layer runs the same states forwards and backwards: the two outputs are
    balanced as one system. Its C counts twice there, so that the error bound covers their sum.

    Example:
        >>> from lightning_compressm.nn import S5
        >>> S5Family().system(S5(4, 8)).order
        8
    """

    name: ClassVar[str] = "S5"
    layers: ClassVar[str] = "ours; s5-pytorch, also with real pairs (uzh-rpg/ssms_event_cameras)"

    def matches(self, module: nn.Module) -> bool:
        """Whether the parameters are there, with shapes that fit together."""
        own = module._parameters
        vectors: tuple[str, ...] = ("Lambda",)
        matrices: tuple[str, ...] = ("B", "C")
        if _is_split(module):
            vectors, matrices = ("log_Lambda_re", "Lambda_im"), ("B_re", "B_im", "C_re", "C_im")
        tensors = {name: own.get(name) for name in ("log_step", *vectors, *matrices)}
        shapes = {name: tensor.shape for name, tensor in tensors.items() if tensor is not None}
        if len(shapes) < len(tensors):
            return False
        steps = shapes["log_step"]
        if len(steps) != 1:
            return False
        if _is_split(module):
            return (
                all(shapes[name] == steps for name in vectors)
                and shapes["B_re"] == shapes["B_im"]
                and shapes["C_re"] == shapes["C_im"]
                and len(shapes["B_re"]) == len(shapes["C_re"]) == 2
                and shapes["B_re"][:1] == steps == shapes["C_re"][1:]
            )
        return (
            shapes["Lambda"] == (*steps, *_pair(own["Lambda"]))
            and shapes["B"] == (*steps, *shapes["B"][1:2], 2)
            and len(shapes["B"]) == 3
            and shapes["C"][2:] == _pair(own["C"])
            and shapes["C"][1:2] in (steps, (2 * steps[0],))
        )

    def refuse(self, module: nn.Module) -> None:
        """Refuse liquid S5, powers of B, and unknown discretizations."""
        _discretization(module)

    def state_axes(self, module: nn.Module) -> dict[str, int]:
        """Lambda, the steps and B along dimension 0, C along dimension 1 (bidirectional: 2N)."""
        if _is_split(module):
            vectors = ("log_Lambda_re", "Lambda_im", "log_step")
            return dict.fromkeys((*vectors, "B_re", "B_im"), 0) | {"C_re": 1, "C_im": 1}
        return {"Lambda": 0, "log_step": 0, "B": 0, "C": 1}

    def system(self, module: nn.Module) -> DiagonalLTI:
        """The discretized layer; the output is the real part.

        Raises:
            UnsupportedLayerError: if the layer is not linear in its input, or discretized in an
                unknown way.
        """
        method = _discretization(module)
        own = {n: double(tensor_of(module, n)) for n in self.state_axes(module)}
        if _is_split(module):
            poles = torch.complex(-own["log_Lambda_re"].exp(), own["Lambda_im"])
            B = torch.complex(own["B_re"], own["B_im"])
            C = 2 * torch.complex(own["C_re"], own["C_im"])
        else:
            poles, B, C = (_joined(own[name]) for name in ("Lambda", "B", "C"))
            if _is_bidirectional(module):
                C = 2 * torch.cat(C.chunk(2, 1))
        eigenvalues, gain = to_discrete(poles, own["log_step"].exp(), method)
        return DiagonalLTI(eigenvalues, gain.unsqueeze(-1) * B, C, real_output=True)

    def write(self, module: nn.Module, system: DiagonalLTI) -> dict[str, Tensor]:
        """Back to continuous time, with one step for all states."""
        log_step = _common_log_step(module).to(system.B.device).expand(system.order)
        poles, gain = to_continuous(system.eigenvalues, log_step.exp(), _discretization(module))
        B = system.B / gain.unsqueeze(-1)
        if _is_split(module):
            return (
                {"log_Lambda_re": torch.log(-poles.real), "Lambda_im": poles.imag}
                | {"log_step": log_step}
                | matrix_values("B", B, split=True)
                | matrix_values("C", system.C / 2, split=True)
            )
        C = system.C
        if _is_bidirectional(module):
            C = torch.cat(C.chunk(2), 1) / 2
        values = {"Lambda": poles, "B": B, "C": C}
        return {"log_step": log_step} | {
            name: value if tensor_of(module, name).is_complex() else torch.view_as_real(value)
            for name, value in values.items()
        }

    def moment_rules(
        self, module: nn.Module, reduction: Reduction, values: Mapping[str, Tensor]
    ) -> dict[str, MomentRule]:
        """B and C follow the change of basis and of gains; Lambda and the steps are refilled."""
        rules: dict[str, MomentRule] = {name: Refill() for name in values}
        split = _is_split(module)
        linear, conjugate = reduction.basis.output_gradient()
        if _is_bidirectional(module):
            linear, conjugate = _twice(linear), _twice(conjugate)
        if split or tensor_of(module, "C").is_complex():
            rules |= matrix_rules("C", 1, linear, conjugate, split=split)
        if split:  # pairs along a last dimension can't be combined
            old, new = self._gains(module, reduction)
            linear, conjugate = reduction.basis.input_gradient()
            gain = new.conj().unsqueeze(-1)
            rules |= matrix_rules(
                "B", 0, gain * linear / old.conj(), gain * conjugate / old, split=True
            )
        return rules

    def entries(self, module: nn.Module, index: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Both halves of a bidirectional C have an entry for each state."""
        entries = super().entries(module, index)
        if _is_bidirectional(module):
            entries["C"] = (1, torch.cat((index, index + self.state_dim(module))))
        return entries

    def example(self, d_state: int = 8) -> tuple[nn.Module, Tensor]:
        """Our own S5."""
        from lightning_compressm.nn import S5

        return S5(4, d_state), torch.randn(2, 12, 4)

    def _gains(self, module: nn.Module, reduction: Reduction) -> tuple[Tensor, Tensor]:
        """Input gains of the old and of the new states."""
        method, device = _discretization(module), reduction.system.B.device
        decay, frequency, log_step = (
            double(tensor_of(module, name).detach()).to(device)
            for name in ("log_Lambda_re", "Lambda_im", "log_step")
        )
        _, old = to_discrete(torch.complex(-decay.exp(), frequency), log_step.exp(), method)
        step = _common_log_step(module).to(device).exp()
        return old, to_continuous(reduction.system.eigenvalues, step, method)[1]


def _is_split(module: nn.Module) -> bool:
    return "log_Lambda_re" in module._parameters


def _is_bidirectional(module: nn.Module) -> bool:
    if _is_split(module):
        return False
    return tensor_of(module, "C").shape[1] == 2 * tensor_of(module, "log_step").shape[0]


def _pair(tensor: Tensor | None) -> tuple[int, ...]:
    """The dimension of a tensor that keeps complex numbers as pairs."""
    return () if tensor is None or tensor.is_complex() else (2,)


def _joined(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_complex() else torch.complex(*tensor.unbind(-1))


def _twice(matrix: Tensor) -> Tensor:
    """A block-diagonal matrix with the same block for both directions."""
    zero = torch.zeros_like(matrix)
    return torch.cat((torch.cat((matrix, zero), 1), torch.cat((zero, matrix), 1)))


def _common_log_step(module: nn.Module) -> Tensor:
    return double(tensor_of(module, "log_step").detach()).mean()


def _discretization(module: nn.Module) -> str:
    """How the layer is discretized; refuses what is no linear time-invariant system."""
    for name, plain in (("liquid", False), ("degree", 1)):
        value: Any = getattr(module, name, plain)
        if value != plain:
            raise UnsupportedLayerError(
                f"expected an S5 layer with {name}={plain}, got {name}={value}: its states do not "
                "follow a linear time-invariant system. Put this layer into `ignore`."
            )
    method = getattr(module, "discretization", None)
    if method is None:  # S5SSM only keeps the function
        function = getattr(module, "discretize", None)
        method = getattr(function, "__name__", "").removeprefix("discretize_")
    if method not in DISCRETIZATIONS:
        raise UnsupportedLayerError(
            f"expected an S5 layer discretized by {' or '.join(map(repr, DISCRETIZATIONS))}, got "
            f"{method!r}; put it into `ignore`, or register a Family of your own for it."
        )
    return str(method)
