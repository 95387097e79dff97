"""The gated delta rule in plain PyTorch, in chunks, and a plain block around it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compressm.nn._autocast import full_precision

__all__ = ["GatedDeltaBlock", "gated_delta_rule", "unit"]

_CHUNK = 64
_KERNEL = 3
_EPS = 1e-6


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Run :math:`S_t = a_t S_{t-1} + k_t w_t^\top`, :math:`o_t = S_t^\top q_t`.

    What is written, :math:`w_t = \beta_t (v_t - a_t S_{t-1}^\top k_t)`, is the part of the value
    that the state does not give for this key already. Within a chunk the :math:`w_t` solve a
    triangular system; a loop runs over chunks. Decays are exponentials of differences of running
    sums, so nothing overflows for ``log_decay <= 0``. Computed in float32, or in float64 if the
    values are, under autocast as well.

    Args:
        q: queries, (batch, L, H, K).
        k: keys of norm one, like ``q``.
        v: values, (batch, L, H, V).
        log_decay: log of a, (batch, L, H).
        beta: share of a value that is written, (batch, L, H).

    Returns:
        The outputs o and what was written, w; both like ``v``.

    Source:
        Yang, Kautz & Hatamizadeh (2025), "Gated Delta Networks", arXiv 2412.06464, section 3.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    with full_precision(v.device):
        given = [t.to(wide).transpose(1, 2) for t in (q, k, v, log_decay, beta)]
        outputs, written = _in_chunks(given)
    return outputs.transpose(1, 2).to(v.dtype), written.transpose(1, 2).to(v.dtype)


def _in_chunks(heads_first: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The same with heads before time."""
    _, k, v, _, _ = heads_first
    state = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1])
    outputs, written = [], []
    for start in range(0, v.shape[2], _CHUNK):
        queries, keys, values, logs, rate = (t[:, :, start : start + _CHUNK] for t in heads_first)
        total = logs.cumsum(-1)
        mask = torch.ones(len(total[0, 0]), len(total[0, 0]), dtype=torch.bool, device=v.device)
        decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~mask.tril(), -math.inf)
        decay, into = decay.exp(), total.exp().unsqueeze(-1)
        system = rate.unsqueeze(-1) * (keys @ keys.mT) * decay
        wanted = rate.unsqueeze(-1) * (values - into * (keys @ state))
        new = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        outputs.append(into * (queries @ state) + ((queries @ keys.mT) * decay) @ new)
        written.append(new)
        left = (total[..., -1:] - total).exp().unsqueeze(-1)
        state = into[:, :, -1:] * state + (left * keys).mT @ new
    return torch.cat(outputs, 2), torch.cat(written, 2)


def unit(vectors: Tensor) -> Tensor:
    """Vectors along the last dimension, divided by their norms; close to zero they stay small.

    Example:
        >>> unit(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + _EPS)


class _GatedNorm(nn.Module):
    """A root-mean-square norm, times SiLU of a gate."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = _EPS

    def forward(self, inputs: Tensor, gate: Tensor) -> Tensor:
        """Both (..., size)."""
        mean = inputs.square().mean(-1, keepdim=True)
        return self.weight * inputs * torch.rsqrt(mean + self.eps) * F.silu(gate)


class GatedDeltaBlock(nn.Module):
    """A gated DeltaNet layer (arXiv 2412.06464, figure 1), with two value heads for a key head.

    Args:
        d_model: inputs and outputs.
        head_k_dim: key channels of a head.
        key_heads: heads with queries and keys of their own.
    """

    def __init__(self, d_model: int, head_k_dim: int, key_heads: int = 2) -> None:
        super().__init__()
        self.num_k_heads, self.num_v_heads = key_heads, 2 * key_heads
        self.head_k_dim, self.head_v_dim = head_k_dim, 2 * d_model // self.num_v_heads
        self.key_dim, self.value_dim = key_heads * head_k_dim, 2 * d_model
        self.conv_dim = 2 * self.key_dim + self.value_dim
        self.in_proj_qkv = nn.Linear(d_model, self.conv_dim, bias=False)
        self.in_proj_z = nn.Linear(d_model, self.value_dim, bias=False)
        self.in_proj_b = nn.Linear(d_model, self.num_v_heads, bias=False)
        self.in_proj_a = nn.Linear(d_model, self.num_v_heads, bias=False)
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, _KERNEL, groups=self.conv_dim, padding=_KERNEL - 1
        )
        self.A_log = nn.Parameter(torch.linspace(-2, 0, self.num_v_heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.num_v_heads))
        self.norm = _GatedNorm(self.head_v_dim)
        self.out_proj = nn.Linear(self.value_dim, d_model, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (batch, L, d_model) to the same shape."""
        mixed = F.silu(self.conv1d(self.in_proj_qkv(inputs).mT)[..., : inputs.shape[1]].mT)
        q, k, v = torch.split(mixed, [self.key_dim, self.key_dim, self.value_dim], -1)
        each = self.num_v_heads // self.num_k_heads
        q, k = (
            unit(torch.unflatten(t, -1, (self.num_k_heads, -1))).repeat_interleave(each, 2)
            for t in (q, k)
        )
        log_decay = -self.A_log.exp() * F.softplus(self.in_proj_a(inputs) + self.dt_bias)
        values = torch.unflatten(v, -1, (self.num_v_heads, -1))
        scaled = q * self.head_k_dim**-0.5
        y, _ = gated_delta_rule(scaled, k, values, log_decay, self.in_proj_b(inputs).sigmoid())
        gate = self.in_proj_z(inputs).unflatten(-1, (self.num_v_heads, -1))
        projected: Tensor = self.out_proj(self.norm(y, gate).flatten(-2))
        return projected
