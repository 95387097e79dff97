"""transformers' MiniMax with fewer key channels than value channels."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compressm.nn._fixed_decay import decaying_attention

__all__ = ["enable_minimax_key_channels"]

_MODULE = "transformers.models.minimax.modeling_minimax"
_LAYER = "MiniMaxLightningAttention"
_SIZE = "linear_key_head_dim"


def enable_minimax_key_channels() -> None:
    """Let MiniMax's lightning attention have a number of key channels of its own.

    As shipped, one ``head_dim`` says how many channels keys and values have, in softmax attention
    too, so that no key channel can go. Layers built after this call have a ``head_k_dim``; the
    config has it as ``linear_key_head_dim``, which is ``head_dim`` unless it says otherwise, so
    that reduced models are saved and loaded by ``save_pretrained`` and ``from_pretrained``. A
    layer that was not reduced runs as before. Without this call, loading a reduced model raises
    because shapes differ. Calling it again does nothing more.

    Raises:
        ImportError: transformers is not installed, or a version without such layers.

    Source:
        MiniMax (2025), arXiv 2501.08313, section 2.2.

    Example:
        >>> from importlib.util import find_spec
        >>> if find_spec("transformers"):
        ...     enable_minimax_key_channels()
    """
    if importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "transformers is not installed; pip install 'lightning_compressm[transformers]'",
            name="transformers",
        )
    layer: Any = getattr(importlib.import_module(_MODULE), _LAYER, None)
    if layer is None:
        raise ImportError(
            f"expected a class {_LAYER} in {_MODULE}, as in transformers 5.16, and found none; "
            "install transformers>=5.16.1, or do without enable_minimax_key_channels()"
        )
    if not hasattr(layer.forward, "_compressm_shipped"):
        layer.__init__ = _with_key_channels(layer.__init__)
        layer.forward = _forward(layer.forward)


def _with_key_channels(shipped: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(shipped)
    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        shipped(self, config, *args, **kwargs)
        if getattr(config, _SIZE, None) is None:
            setattr(config, _SIZE, self.head_dim)
        self.head_k_dim = getattr(config, _SIZE)
        if self.head_k_dim != self.head_dim:
            rows = self.num_attention_heads * (2 * self.head_k_dim + self.head_dim)
            self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=False)

    return build


def _forward(shipped: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(shipped)
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        n = getattr(self, "head_k_dim", self.head_dim)
        if n == self.head_dim:
            given = (position_embeddings, attention_mask, past_key_values)
            result: tuple[Tensor, Tensor] = shipped(self, hidden_states, *given, **kwargs)
            return result
        mixed = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:
            mixed = mixed * attention_mask.unsqueeze(-1).to(mixed.dtype)
        by_head = mixed.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        q, k, v = by_head.split([n, n, self.head_dim], -1)
        cache = past_key_values
        state = None if cache is None else cache.get_linear_cache(self.layer_idx)
        outputs, state = decaying_attention(q, k, v, self.slope_rate, state)
        if cache is not None:
            cache.set_linear_cache(self.layer_idx, state)
        outputs = self.norm(outputs.transpose(1, 2).flatten(2))
        gate = torch.sigmoid(self.output_gate(hidden_states))
        return self.out_proj(gate * outputs), state

    forward._compressm_shipped = shipped  # type: ignore[attr-defined]
    return forward
