"""Plain Mamba and Mamba-2 blocks: examples of their families that need no other package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compressm.nn._dual import state_space_dual
from lightning_compressm.nn.selective_scan import selective_scan

__all__ = ["Mamba2Block", "MambaBlock", "MultiHeadMambaBlock"]

_RANK = 2
_KERNEL = 3


def _depthwise(channels: int) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, _KERNEL, groups=channels, padding=_KERNEL - 1)


def _convolved(inputs: Tensor, layer: nn.Conv1d, time: int) -> Tensor:
    """Causal depthwise convolution along dimension ``time``, 0 or 1, of three; channels last.

    Faster than the layer itself, which wants time last.
    """
    assert layer.bias is not None
    ahead = (0, 0) * (2 - time) + (_KERNEL - 1, 0)
    padded, outputs = F.pad(inputs, ahead), layer.bias
    for tap in range(_KERNEL):
        past = padded.narrow(time, tap, inputs.shape[time])
        outputs = torch.addcmul(outputs, past, layer.weight[:, 0, tap])
    return outputs


def _rates(*shape: int) -> nn.Parameter:
    """Logarithms of the decay rates 1 .. N."""
    return nn.Parameter(torch.arange(1.0, shape[-1] + 1).log().expand(shape).contiguous())


class MambaBlock(nn.Module):
    """Gu & Dao (2023), arXiv 2312.00752, figure 3; B and C optionally normalised over the states.

    Args:
        d_model: inputs and outputs; there are twice as many channels inside.
        d_state: states N.
        normalise: root-mean-square norms of dt, B and C.
    """

    def __init__(self, d_model: int, d_state: int, normalise: bool = False) -> None:
        super().__init__()
        channels = 2 * d_model
        self.d_state = d_state
        self.in_proj = nn.Linear(d_model, 2 * channels, bias=False)
        self.conv1d = _depthwise(channels)
        self.x_proj = nn.Linear(channels, _RANK + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(_RANK, channels)
        self.A_log = _rates(channels, d_state)
        self.D = nn.Parameter(torch.ones(channels))
        self.out_proj = nn.Linear(channels, d_model, bias=False)
        self.dt_layernorm = nn.RMSNorm(_RANK) if normalise else None
        self.b_layernorm = nn.RMSNorm(d_state) if normalise else None
        self.c_layernorm = nn.RMSNorm(d_state) if normalise else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (batch, L, d_model) to the same shape."""
        # With time first from here on, the scan need not copy what is wider than the inputs.
        x, z = self.in_proj(inputs.transpose(0, 1).contiguous()).chunk(2, -1)
        x = F.silu(_convolved(x, self.conv1d, 0))
        n = self.A_log.shape[1]
        dt, B, C = self.x_proj(x).split([_RANK, n, n], -1)
        if self.b_layernorm is not None:
            assert self.dt_layernorm is not None
            assert self.c_layernorm is not None
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        dt, A = self.dt_proj(dt), -self.A_log.exp()
        u, dt, B, C, z = (t.permute(1, 2, 0) for t in (x, dt, B, C, z))
        outputs = selective_scan(u, dt, A, B, C, self.D, z=z, delta_softplus=True)
        assert isinstance(outputs, Tensor)
        projected: Tensor = self.out_proj(outputs.permute(2, 0, 1))
        return projected.transpose(0, 1)


class MultiHeadMambaBlock(nn.Module):
    """A Mamba block whose heads have B and C of their own, as in Zamba (arXiv 2405.16712)."""

    def __init__(self, d_model: int, d_state: int, heads: int) -> None:
        super().__init__()
        channels, each = 2 * d_model, 2 * d_model // heads
        self.d_state = d_state
        self.in_proj = nn.Linear(d_model, 2 * channels, bias=False)
        self.conv1d = _depthwise(channels)
        scale = each**-0.5
        self.x_proj_weight = nn.Parameter(scale * torch.randn(heads, _RANK + 2 * d_state, each))
        self.dt_proj_weight = nn.Parameter(torch.randn(heads, each, _RANK) / 2)
        self.dt_proj_bias = nn.Parameter(torch.zeros(heads, each))
        self.A_log = _rates(heads, each, d_state)
        self.D = nn.Parameter(torch.ones(heads, each))
        self.out_proj = nn.Linear(channels, d_model, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (batch, L, d_model) to the same shape."""
        heads, n = self.A_log.shape[0], self.A_log.shape[2]
        x, z = self.in_proj(inputs).unflatten(-1, (-1, 2)).unbind(-1)
        x = F.silu(self.conv1d(x.mT)[..., : inputs.shape[1]])
        outputs = []
        parts = zip(x.chunk(heads, 1), z.mT.chunk(heads, 1), strict=True)
        for head, (u, gate) in enumerate(parts):
            projected = u.mT @ self.x_proj_weight[head].mT
            dt, B, C = torch.split(projected, [_RANK, n, n], -1)
            dt = F.softplus(dt @ self.dt_proj_weight[head].mT + self.dt_proj_bias[head])
            A = -self.A_log[head].exp()
            y = selective_scan(u, dt.mT, A, B.mT, C.mT, self.D[head], z=gate)
            assert isinstance(y, Tensor)
            outputs.append(y)
        joined: Tensor = self.out_proj(torch.cat(outputs, 1).mT)
        return joined


class Mamba2Block(nn.Module):
    """Dao & Gu (2024), arXiv 2405.21060, figure 6, with two groups of B and C."""

    def __init__(self, d_model: int, d_state: int, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        channels = 2 * d_model
        self.d_state, self.ngroups = d_state, groups
        self.in_proj = nn.Linear(d_model, 2 * channels + 2 * groups * d_state + heads, bias=False)
        self.conv1d = _depthwise(channels + 2 * groups * d_state)
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.A_log = _rates(heads)
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(channels)
        self.out_proj = nn.Linear(channels, d_model, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (batch, L, d_model) to the same shape."""
        channels, heads = self.out_proj.in_features, self.A_log.shape[0]
        states = self.ngroups * self.d_state
        z, xbc, dt = self.in_proj(inputs).split([channels, channels + 2 * states, heads], -1)
        xbc = F.silu(_convolved(xbc, self.conv1d, 1))
        x, B, C = torch.split(xbc, [channels, states, states], -1)
        y, _ = state_space_dual(
            torch.unflatten(x, -1, (heads, -1)),
            dt,
            -self.A_log.exp(),
            torch.unflatten(B, -1, (self.ngroups, -1)),
            torch.unflatten(C, -1, (self.ngroups, -1)),
            self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
        )
        projected: Tensor = self.out_proj(self.norm(y.flatten(-2) * F.silu(z)))
        return projected
