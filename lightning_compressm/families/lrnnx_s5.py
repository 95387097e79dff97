"""The S5 of the lrnnx package, whose complex states have a real input matrix.

x' = A x + B u, y = Re(C x) + D u, discretized with a step exp(log_dt) for each state. Balanced
states have a complex input matrix, which no change of basis makes real for more than one input; so
layers keep states of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compressm._precision import double
from lightning_compressm.control import ChangeOfBasis, DiagonalLTI, Reduction
from lightning_compressm.control.balance import Balance
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.families._base import Family, tensor_of
from lightning_compressm.families._continuous import to_discrete
from lightning_compressm.families._registry import register_family
from lightning_compressm.nn._convolution import causal_convolution
from lightning_compressm.surgery.plan import Select, SurgeryPlan, TensorEdit, take

__all__ = ["LrnnxS5Family"]


@register_family
class LrnnxS5Family(Family):
    """``A`` (N, 2) as softplus^-1(-Re), Im; ``B`` (N, H), ``log_dt`` (N,), ``C`` (H, N, 2).

    Kept states keep their A, B and step, and C makes up for the others.

    Example:
        >>> layer, _ = LrnnxS5Family().example()
        >>> LrnnxS5Family().system(layer).order
        8
    """

    name: ClassVar[str] = "S5, real B"
    layers: ClassVar[str] = "lrnnx `S5`"
    only_balance: ClassVar[Balance | None] = "modes"

    def matches(self, module: nn.Module) -> bool:
        """Whether the parameters are there, with shapes that fit together."""
        own = module._parameters
        found = [own.get(name) for name in ("A", "B", "log_dt", "C")]
        if any(tensor is None or tensor.is_complex() for tensor in found):
            return False
        A, B, log_dt, C = (tuple(tensor.shape) for tensor in found if tensor is not None)
        return (
            len(log_dt) == 1
            and len(B) == 2
            and len(C) == 3
            and (A, B[:1], C[1:]) == ((*log_dt, 2), log_dt, (*log_dt, 2))
        )

    def refuse(self, module: nn.Module) -> None:
        """Refuse other discretizations: of those of the package, these alone keep poles stable."""
        _discretization(module)

    def state_axes(self, module: nn.Module) -> dict[str, int]:
        """Dimension 1 of C, 0 of everything else."""
        return {"A": 0, "B": 0, "log_dt": 0, "C": 1}

    def system(self, module: nn.Module) -> DiagonalLTI:
        """The discretized layer without D; the output is the real part."""
        own = {name: double(tensor_of(module, name)) for name in self.state_axes(module)}
        decay, frequency = own["A"].unbind(-1)
        poles = torch.complex(-F.softplus(decay), frequency)
        eigenvalues, gain = to_discrete(poles, own["log_dt"].exp(), "zoh")
        B = own["B"].to(gain.dtype)
        if _discretization(module) == "zoh":
            B = gain.unsqueeze(-1) * B
        return DiagonalLTI(eigenvalues, B, torch.complex(*own["C"].unbind(-1)), real_output=True)

    def write(self, module: nn.Module, system: DiagonalLTI) -> dict[str, Tensor]:
        """Refused: a system does not tell which states it has kept; plans do.

        Raises:
            UnsupportedLayerError: always.
        """
        raise UnsupportedLayerError(f"{self.name}: no other states can be written than its own")

    def reduction_plan(self, module: nn.Module, reduction: Reduction) -> SurgeryPlan:
        """States that stay as they are, moments included, and their new C."""
        return self._plan(module, reduction.basis, reduction.system.C)

    def projected_plan(self, module: nn.Module, projection: Mapping[str, Tensor]) -> SurgeryPlan:
        """The same states, which stand in for the others in the same way."""
        device = tensor_of(module, "C").device
        basis = ChangeOfBasis.from_dict(projection).each(lambda tensor: tensor.to(device))
        with torch.no_grad():
            return self._plan(module, basis, basis.outputs(self.system(module).C))

    def _plan(self, module: nn.Module, basis: ChangeOfBasis, C: Tensor) -> SurgeryPlan:
        index = basis.left.real.argmax(-1)
        edits = {}
        for name, dim in self.state_axes(module).items():
            tensor = tensor_of(module, name).detach()
            edits[name] = TensorEdit(take(tensor, dim, index.to(tensor.device)), Select(dim, index))
        if len(index) < self.state_dim(module):
            refitted = torch.view_as_real(C.resolve_conj()).to(edits["C"].value)
            edits["C"] = TensorEdit(refitted, edits["C"].moments)
        projection = basis.to_dict()
        return SurgeryPlan(edits, self.attributes(module, len(index)), {"": projection})

    def example(self, d_state: int = 8) -> tuple[nn.Module, Tensor]:
        """A layer with the same parameters, run as a convolution."""
        return LrnnxS5Example(4, d_state), torch.randn(2, 12, 4)


class LrnnxS5Example(nn.Module):
    """The smallest layer with these parameters; inputs are (batch, L, H)."""

    discretization = "zoh"

    def __init__(self, width: int, states: int) -> None:
        """Steps from 0.05 to 0.5, frequencies near n: no two poles are close."""
        super().__init__()
        self.d_state = states
        frequencies = torch.arange(states) + torch.rand(states) / 2
        self.A = nn.Parameter(torch.stack((torch.rand(states), frequencies), -1))
        self.B = nn.Parameter(torch.randn(states, width))
        self.log_dt = nn.Parameter(torch.linspace(-3, -0.7, states))
        self.C = nn.Parameter(torch.randn(width, states, 2))
        self.D = nn.Parameter(torch.randn(width, width))

    def forward(self, inputs: Tensor) -> Tensor:
        """Each input's response in each output, summed over the inputs."""
        A, B, log_dt, C = (_wide(t) for t in (self.A, self.B, self.log_dt, self.C))
        poles = torch.complex(-F.softplus(A[:, 0]), A[:, 1])
        times = torch.arange(inputs.shape[1], device=A.device)
        gain = ((poles * log_dt.exp()).exp() - 1) / poles
        powers = torch.exp((poles * log_dt.exp()).unsqueeze(-1) * times) * gain.unsqueeze(-1)
        kernel = torch.einsum("on,nl,ni->iol", torch.complex(*C.unbind(-1)), powers, B + 0j).real
        wide = _wide(inputs)
        responses = [
            causal_convolution(wide[..., i : i + 1].expand(-1, -1, len(C)), own)
            for i, own in enumerate(kernel)
        ]
        outputs: Tensor = sum(responses) + wide @ _wide(self.D)
        return outputs.to(inputs.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """Transforms know no half precision."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _discretization(module: nn.Module) -> str:
    method = getattr(module, "discretization", None)
    if method is None:
        method = getattr(getattr(module, "discretize_fn", None), "__name__", None)
    if method not in ("zoh", "dirac"):
        raise UnsupportedLayerError(
            f"expected an S5 layer of lrnnx with discretization='zoh' or 'dirac', got {method!r}: "
            "the others don't keep its poles inside the unit circle. Put it into `ignore`."
        )
    return str(method)
