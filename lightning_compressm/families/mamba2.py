"""Mamba-2 blocks: mamba_ssm, and transformers' Mamba2, Bamba, Zamba2, NemotronH and others.

z, xBC, dt = in_proj(u);  x, B, C = silu(conv(xBC));  dt = softplus(dt + dt_bias)
h_k = exp(dt_k a) h_{k-1} + dt_k x_k B_k^T,  y_k = h_k C_k + D x_k,  out = out_proj(norm(y, z))
(Dao & Gu 2024, arXiv 2405.21060, section 7). Each head has one decay rate a; groups of heads share
B and C. The convolution and its activation lie between the weights and C, so the read-out can't be
refitted in closed form: ``in_proj`` and ``conv1d`` are fitted to the block's old output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compressm.control.calibration import SelectiveSignals
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.families._base import shape_source
from lightning_compressm.families._registry import register_family
from lightning_compressm.families._selective import SelectiveFamily, rows_of_blocks
from lightning_compressm.families._transformers import config_attributes

__all__ = ["Mamba2Family"]

_GROUPS = ("ngroups", "n_groups")
_STATES = ("d_state", "ssm_state_size")
_LIMITS = ("dt_limit", "time_step_limit")


@register_family
class Mamba2Family(SelectiveFamily):
    """Mamba-2 blocks.

    Recognised by structure: ``in_proj, conv1d, out_proj``, and ``A_log`` and ``dt_bias`` with one
    entry for each head.

    Example:
        >>> layer, _ = Mamba2Family().example(d_state=8)
        >>> Mamba2Family().state_dim(layer), Mamba2Family().groups(layer)
        (8, 2)
    """

    name: ClassVar[str] = "Mamba-2"
    layers: ClassVar[str] = (
        "`mamba_ssm.Mamba2`; transformers `Mamba2Mixer`, `BambaMixer`, `Zamba2MambaMixer`, "
        "`NemotronHMamba2Mixer`, `GraniteMoeHybridMambaLayer`, `FalconH1Mixer`"
    )
    refit: ClassVar[Literal["readout", "local"]] = "local"
    state_dim_attributes: ClassVar[tuple[str, ...]] = _STATES

    def matches(self, module: nn.Module) -> bool:
        """Whether the parts are there, with shapes that fit together."""
        own = module._parameters
        a_log, dt_bias = own.get("A_log"), own.get("dt_bias")
        if a_log is None or dt_bias is None or a_log.ndim != 1 or a_log.shape != dt_bias.shape:
            return False
        parts = [module._modules.get(name) for name in ("in_proj", "conv1d", "out_proj")]
        if any(getattr(part, "weight", None) is None for part in parts):
            return False
        sizes = [_attribute(module, names) for names in (_GROUPS, _STATES)]
        return all(isinstance(size, int) for size in sizes)

    def refuse(self, module: nn.Module) -> None:
        """Refuse blocks that are split over processes."""
        if getattr(module, "process_group", None) is not None:
            raise UnsupportedLayerError(
                f"{type(module).__name__} is split over processes (tensor parallel); expected a "
                "block that one process holds as a whole. Build it without process_group, or put "
                "it into `ignore`."
            )

    def groups(self, module: nn.Module) -> int:
        """Groups of heads that share B and C."""
        return int(_attribute(module, _GROUPS))

    def state_dim(self, module: nn.Module) -> int:
        """The state dimension as the block holds it."""
        return int(_attribute(module, _STATES))

    def state_dim_in(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
        """From the number of saved channels of the convolution."""
        saved = tensors.get("conv1d.weight")
        if saved is None or saved.ndim != 3:
            return None
        states, rest = divmod(saved.shape[0] - self._channels(module), 2 * self.groups(module))
        return int(states) if states >= 1 and rest == 0 else None

    def state_entries(self, module: nn.Module, keep: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Rows of ``in_proj`` and channels of ``conv1d`` that make B and C."""
        n = self.state_dim(module)
        rows = int(shape_source(module, "in_proj.weight").shape[0])
        conv = int(shape_source(module, "conv1d.weight").shape[0])
        projected = rows_of_blocks(rows, self._start_of_b(module), keep, n, blocks=2)
        convolved = rows_of_blocks(conv, self._channels(module), keep, n, blocks=2)
        entries = {
            "in_proj.weight": (0, projected),
            "in_proj.bias": (0, projected),
            "conv1d.weight": (0, convolved),
            "conv1d.bias": (0, convolved),
        }
        there = {name: entry for name, entry in entries.items() if _has(module, name)}
        scales = getattr(module, "mup_vector", None)  # FalconH1 scales the projected entries
        if scales is not None:
            there["mup_vector"] = (scales.ndim - 1, projected)
        return there

    def attributes(self, module: nn.Module, state_dim: int) -> dict[str, Any]:
        """Also the sizes of the projection and of the convolution."""
        both = 2 * self.groups(module) * state_dim
        conv = self._channels(module) + both
        rows = int(shape_source(module, "in_proj.weight").shape[0])
        rows += both - 2 * self.groups(module) * self.state_dim(module)
        sizes = {"conv_dim": conv, "groups_time_state_size": both // 2}
        inner = {
            "in_proj.out_features": rows,
            "conv1d.in_channels": conv,
            "conv1d.out_channels": conv,
            "conv1d.groups": conv,
        }
        mine = {name: size for name, size in sizes.items() if hasattr(module, name)}
        return super().attributes(module, state_dim) | mine | inner

    def signals(self, module: nn.Module, inputs: Tensor) -> SelectiveSignals:
        """Run the projection and the convolution again."""
        own: Any = module
        groups, n, channels = self.groups(module), self.state_dim(module), self._channels(module)
        heads, start = own.A_log.shape[0], self._start_of_b(module)
        projected = own.in_proj(inputs * getattr(module, "ssm_in_multiplier", 1.0))
        projected = projected * getattr(module, "mup_vector", 1.0)
        z = projected[..., start - 2 * channels : start - channels]
        xbc = projected[..., start - channels : start + 2 * groups * n]
        xbc = F.silu(own.conv1d(xbc.mT)[..., : inputs.shape[1]].mT)
        x, B, C = torch.split(xbc, [channels, groups * n, groups * n], -1)
        dt = F.softplus(projected[..., -heads:] + own.dt_bias)
        dt = dt.clamp(*(_attribute(module, _LIMITS) or (0.0, float("inf"))))
        weight = F.silu(z) * own.out_proj.weight[:, -channels:].norm(dim=0)
        scale = getattr(getattr(module, "norm", None), "weight", None)
        if scale is not None:
            weight = weight * scale
        each = channels // heads

        def by_group(values: Tensor) -> Tensor:
            return torch.unflatten(values, -1, (groups, -1))

        rates = -torch.exp(own.A_log.float()).repeat_interleave(each)
        return SelectiveSignals(
            by_group(dt.repeat_interleave(each, -1)),
            by_group(rates).unsqueeze(-1),
            by_group(B),
            by_group(C),
            by_group(x),
            by_group(weight),
        )

    def readout_entries(self, module: nn.Module, states: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Rows of ``in_proj`` and channels of ``conv1d`` that make C; silu(0) is 0."""
        groups, n = self.groups(module), self.state_dim(module)
        offsets = n * torch.arange(groups, 2 * groups).unsqueeze(-1)
        entries = (offsets + states).flatten()
        starts = {"in_proj": self._start_of_b(module), "conv1d": self._channels(module)}
        return {
            f"{part}.{kind}": (0, start + entries)
            for part, start in starts.items()
            for kind in ("weight", "bias")
            if _has(module, f"{part}.{kind}")
        }

    def local_tensors(self, module: nn.Module) -> tuple[str, ...]:
        """The projection and the convolution."""
        names = ("in_proj.weight", "conv1d.weight", "conv1d.bias")
        return tuple(name for name in names if _has(module, name))

    def shared_attributes(self, model: nn.Module, state_dims: Mapping[str, int]) -> dict[str, Any]:
        """The config of transformers' models."""
        names = ("state_size", "mamba_d_state", "ssm_state_size")
        return config_attributes(model, state_dims, names)

    def example(self, d_state: int = 8) -> tuple[nn.Module, Tensor]:
        """A plain block with two groups."""
        from lightning_compressm.nn._mamba import Mamba2Block

        return Mamba2Block(8, d_state), torch.randn(2, 12, 8)

    def _channels(self, module: nn.Module) -> int:
        """Channels of the recurrence: heads times their dimension."""
        conv = int(shape_source(module, "conv1d.weight").shape[0])
        return conv - 2 * self.groups(module) * self.state_dim(module)

    def _start_of_b(self, module: nn.Module) -> int:
        """Where the rows of B start in ``in_proj``: before B, C and dt there are z and x."""
        rows = int(shape_source(module, "in_proj.weight").shape[0])
        heads = int(shape_source(module, "A_log").shape[0])
        return rows - heads - 2 * self.groups(module) * self.state_dim(module)


def _attribute(module: nn.Module, names: tuple[str, ...]) -> Any:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _has(module: nn.Module, name: str) -> bool:
    path, _, key = name.rpartition(".")
    return getattr(module.get_submodule(path), key, None) is not None
