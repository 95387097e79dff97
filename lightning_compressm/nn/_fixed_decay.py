"""Linear attention with a fixed decay for each head, in chunks, and a plain layer around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LightningAttentionBlock", "decaying_attention"]

_CHUNK = 64


def decaying_attention(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Run :math:`S_t = e^{-r} S_{t-1} + k_t v_t^\top`, :math:`o_t = S_t^\top q_t`.

    Args:
        q: queries, (batch, H, L, K).
        k: keys, like ``q``.
        v: values, (batch, H, L, V).
        rate: r > 0, (H, 1, 1).
        state: S before the first step, (batch, H, K, V); zero if None.

    Returns:
        The outputs o, like ``v``, and the last S.

    Source:
        Qin et al. (2024), "Various Lengths, Constant Speed", arXiv 2405.17381, algorithm 1.

    Example:
        >>> one = torch.ones(1, 1, 3, 1)
        >>> outputs, _ = decaying_attention(one, one, one, torch.tensor([[[2.0]]]).log())
        >>> outputs.flatten()
        tensor([1.0000, 1.5000, 1.7500])
    """
    length = v.shape[2]
    chunk = min(_CHUNK, length)
    # In half precision the exponents would be too coarse.
    steps = torch.arange(chunk, device=v.device, dtype=torch.promote_types(v.dtype, torch.float32))
    ahead, rate = steps.unsqueeze(-1) - steps, rate.to(steps.dtype)
    within = ((-rate * ahead.clamp(min=0)).exp() * (ahead >= 0)).to(v.dtype)
    into = (-rate * (steps + 1).unsqueeze(-1)).exp().to(v.dtype)
    S = v.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state
    outputs = []
    for start in range(0, length, chunk):
        queries, keys, values = (t[:, :, start : start + chunk] for t in (q, k, v))
        size = queries.shape[2]
        mixed = (queries @ keys.mT * within[:, :size, :size]) @ values
        outputs.append(mixed + into[:, :size] * (queries @ S))
        # The last row of `within` says how much of each step is left at the end of the chunk.
        left = within[:, size - 1, :size].unsqueeze(-1)
        S = into[:, size - 1 : size] * S + (left * keys).mT @ values
    return torch.cat(outputs, 2), S


class LightningAttentionBlock(nn.Module):
    """Lightning attention as in MiniMax-01 (arXiv 2501.08313), with key channels of any number.

    Args:
        d_model: inputs and outputs; also the value channels of all heads together.
        head_k_dim: key channels of a head.
        heads: with a decay of their own.
    """

    def __init__(self, d_model: int, head_k_dim: int, heads: int = 2) -> None:
        super().__init__()
        self.num_attention_heads, self.head_dim = heads, d_model // heads
        self.head_k_dim = head_k_dim
        self.qkv_proj = nn.Linear(d_model, heads * (2 * head_k_dim + self.head_dim), bias=False)
        self.norm = nn.RMSNorm(d_model)
        self.output_gate = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        exponents = torch.arange(heads, dtype=torch.float32) + 1
        self.register_buffer("slope_rate", (2.0 ** (-8 / heads * exponents)).view(-1, 1, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (batch, L, d_model) to the same shape."""
        n = self.head_k_dim
        mixed = F.silu(self.qkv_proj(inputs))
        by_head = torch.unflatten(mixed, -1, (self.num_attention_heads, -1))
        q, k, v = torch.split(by_head.transpose(1, 2), [n, n, self.head_dim], -1)
        y, _ = decaying_attention(q, k, v, self.get_buffer("slope_rate"))
        y = self.norm(y.transpose(1, 2).flatten(2))
        projected: Tensor = self.out_proj(torch.sigmoid(self.output_gate(inputs)) * y)
        return projected
