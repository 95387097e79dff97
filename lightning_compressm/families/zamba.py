"""Mamba blocks of transformers' Zamba: several heads, each with a B and a C of its own.

Glorioso et al. 2024, arXiv 2405.16712; the recurrence is that of Mamba.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compressm.control.calibration import SelectiveSignals
from lightning_compressm.families._base import shape_source, tensor_of
from lightning_compressm.families._rates import RatesFamily, with_readout
from lightning_compressm.families._registry import register_family
from lightning_compressm.families._selective import rows_of_blocks
from lightning_compressm.families._transformers import config_attributes

__all__ = ["ZambaFamily"]


@register_family
class ZambaFamily(RatesFamily):
    """Mamba blocks with several heads, each with a B and a C of its own.

    Recognised by structure: ``x_proj_weight`` (heads, rank + 2 N, channels), ``dt_proj_weight`` and
    ``A_log`` (heads, channels, N).

    Example:
        >>> layer, _ = ZambaFamily().example(d_state=8)
        >>> ZambaFamily().groups(layer)
        2
    """

    name: ClassVar[str] = "Zamba"
    layers: ClassVar[str] = "transformers `ZambaMambaMixer`"
    refit: ClassVar[Literal["readout", "local"]] = "readout"

    def matches(self, module: nn.Module) -> bool:
        """Whether the parameters are there, with shapes that fit together."""
        own = module._parameters
        names = ("x_proj_weight", "dt_proj_weight", "A_log")
        tensors = [own.get(name) for name in names]
        if any(t is None or t.ndim != 3 for t in tensors) or not hasattr(module, "conv1d"):
            return False
        x_proj, dt_proj, a_log = (t.shape for t in tensors if t is not None)
        return (
            x_proj[0] == dt_proj[0] == a_log[0]
            and x_proj[2] == dt_proj[1] == a_log[1]
            and x_proj[1] == dt_proj[2] + 2 * a_log[2]
        )

    def groups(self, module: nn.Module) -> int:
        """The number of heads."""
        return int(shape_source(module, "A_log").shape[0])

    def state_entries(self, module: nn.Module, keep: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Head by head, since each keeps states of its own."""
        n, rank = self.state_dim(module), int(shape_source(module, "dt_proj_weight").shape[2])
        rows = [rows_of_blocks(rank + 2 * n, rank, k.unsqueeze(0), n, 2) for k in keep]
        return {"A_log": (2, keep), "x_proj_weight": (1, torch.stack(rows))}

    def readout_entries(self, module: nn.Module, states: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Head by head, the rows that make C."""
        rank = int(shape_source(module, "dt_proj_weight").shape[2])
        return {"x_proj_weight": (1, rank + self.state_dim(module) + states)}

    def signals(self, module: nn.Module, inputs: Tensor) -> SelectiveSignals:
        """Run the projections and the convolution again."""
        own: Any = module
        heads, length = self.groups(module), inputs.shape[1]
        x, z = own.in_proj(inputs).unflatten(-1, (-1, 2)).unbind(-1)
        x = torch.unflatten(F.silu(own.conv1d(x.mT)[..., :length].mT), -1, (heads, -1))
        rank, n = own.dt_proj_weight.shape[2], self.state_dim(module)
        projected = torch.einsum("blhp,hrp->blhr", x, own.x_proj_weight)
        dt, B, C = torch.split(projected, [rank, n, n], -1)
        dt = torch.einsum("blhr,hpr->blhp", dt, own.dt_proj_weight)
        dt = F.softplus(dt + own.dt_proj_bias)
        gate = torch.unflatten(F.silu(z), -1, (heads, -1))
        weight = gate * own.out_proj.weight.norm(dim=0).view(heads, -1)
        return SelectiveSignals(dt, -torch.exp(own.A_log.float()), B, C, x, weight)

    def write_readout(self, module: nn.Module, keep: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """New C rows of every head."""
        weight = tensor_of(module, "x_proj_weight").detach()
        rank, n = int(shape_source(module, "dt_proj_weight").shape[2]), self.state_dim(module)
        heads = zip(weight, keep, delta, strict=True)
        return {"x_proj_weight": torch.stack([with_readout(w, rank, n, k, d) for w, k, d in heads])}

    def shared_attributes(self, model: nn.Module, state_dims: Mapping[str, int]) -> dict[str, Any]:
        """The config of transformers' models."""
        return config_attributes(model, state_dims, ("mamba_d_state",))

    def example(self, d_state: int = 8) -> tuple[nn.Module, Tensor]:
        """A plain block of the same structure with two heads."""
        from lightning_compressm.nn._mamba import MultiHeadMambaBlock

        return MultiHeadMambaBlock(8, d_state, heads=2), torch.randn(2, 12, 8)
