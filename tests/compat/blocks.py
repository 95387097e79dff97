"""The blocks of mamba-ssm from their parameters, in float64 and with plain loops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.nn._selective_reference import naive_dual, naive_selective


def parameters(layer: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters by name, in float64 and still attached to the layer's."""
    return {name: value.double() for name, value in layer.named_parameters()}


def naive_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Causal depthwise convolution and SiLU; x (batch, dim, L), weight (dim, 1, width)."""
    width = weight.shape[-1]
    padded = torch.cat([x.new_zeros(*x.shape[:2], width - 1), x], -1)
    taps = [weight[:, 0, k, None] * padded[..., k : k + x.shape[-1]] for k in range(width)]
    y = sum(taps) + bias[:, None]
    return y * torch.sigmoid(y)


def naive_mamba(layer: Any, inputs: Tensor) -> Tensor:
    p = parameters(layer)
    x, z = (inputs.double() @ p["in_proj.weight"].T).mT.chunk(2, 1)
    x = naive_conv(x, p["conv1d.weight"], p["conv1d.bias"])
    rank, states = layer.dt_rank, layer.d_state
    dt, B, C = (x.mT @ p["x_proj.weight"].T).split([rank, states, states], -1)
    y, _ = naive_selective(
        x,
        (dt @ p["dt_proj.weight"].T).mT,
        -p["A_log"].exp(),
        B.mT,
        C.mT,
        p["D"],
        z,
        p["dt_proj.bias"],
        True,
    )
    return y.mT @ p["out_proj.weight"].T


def naive_mamba2(layer: Any, inputs: Tensor) -> Tensor:
    p = parameters(layer)
    batch = len(inputs)
    heads, width, groups, states = layer.nheads, layer.headdim, layer.ngroups, layer.d_state
    dim, mlp = heads * width, layer.d_inner - layer.d_ssm
    projected = inputs.double() @ p["in_proj.weight"].T
    sizes = [mlp, mlp, dim, dim + 2 * groups * states, heads]
    z0, x0, z, mixed, dt = projected.split(sizes, -1)
    mixed = naive_conv(mixed.mT, p["conv1d.weight"], p["conv1d.bias"]).mT
    x, B, C = mixed.split([dim, groups * states, groups * states], -1)
    x = x.unflatten(-1, (heads, width))
    B, C = (t.unflatten(-1, (groups, states)) for t in (B, C))
    dt = F.softplus(dt + p["dt_bias"]).clamp(*layer.dt_limit)
    start = x.new_zeros(batch, heads, width, states)
    y, _ = naive_dual(x, dt, -p["A_log"].exp(), B, C, start, None)
    D = p["D"].view(heads, width) if layer.D_has_hdim else p["D"][:, None]
    y = (y + D * x).flatten(2)
    gate = z * torch.sigmoid(z)
    if not layer.rmsnorm:
        y = y * gate
    else:
        y = y if layer.norm_before_gate else y * gate
        grouped = y.unflatten(-1, (groups, -1))
        scale = (grouped.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt()
        y = (grouped / scale).flatten(2) * p["norm.weight"]
        y = y * gate if layer.norm_before_gate else y
    if mlp:
        y = torch.cat([z0 * torch.sigmoid(z0) * x0, y], -1)
    return y @ p["out_proj.weight"].T
