"""Lightning attention: linear attention with a fixed decay for each head, as in MiniMax.

q, k, v = silu(qkv_proj(u));  S_t = e^(-r) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t
out = out_proj(sigmoid(output_gate(u)) norm(o)), the norm over all value channels of all heads
(Qin et al. 2024, arXiv 2405.17381; MiniMax 2025, arXiv 2501.08313). The states that go are key
channels: rows of S, which do not mix. Dropping some is exact where the query does not read them;
an activation lies between the weights and the query, so ``qkv_proj`` is fitted to the old output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_compressm.control.calibration import SelectiveSignals
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.families._base import shape_source
from lightning_compressm.families._linear_attention import with_biases
from lightning_compressm.families._registry import register_family
from lightning_compressm.families._selective import SelectiveFamily, rows_of_blocks
from lightning_compressm.families._transformers import config_attributes
from lightning_compressm.nn._fixed_decay import LightningAttentionBlock

__all__ = ["LightningAttentionFamily"]

_PARTS = ("qkv_proj", "output_gate", "norm", "out_proj")
_SIZES = ("num_attention_heads", "head_dim")


@register_family
class LightningAttentionFamily(SelectiveFamily):
    """Linear attention with a fixed decay; the states are the key channels of a head.

    Recognised by structure: ``qkv_proj, output_gate, norm, out_proj``, and ``slope_rate`` of shape
    (heads, 1, 1). The layers of transformers have as many key channels as value channels, until
    :func:`~lightning_compressm.compat.enable_minimax_key_channels` is called.

    Example:
        >>> layer, _ = LightningAttentionFamily().example(d_state=8)
        >>> LightningAttentionFamily().state_dim(layer), LightningAttentionFamily().groups(layer)
        (8, 2)
    """

    name: ClassVar[str] = "Lightning attention"
    layers: ClassVar[str] = (
        "transformers `MiniMaxLightningAttention`, after `compat.enable_minimax_key_channels()`"
    )
    refit: ClassVar[Literal["readout", "local"]] = "local"
    state_dim_attributes: ClassVar[tuple[str, ...]] = ("head_k_dim",)

    def matches(self, module: nn.Module) -> bool:
        """Whether the parts are there, with shapes that fit together."""
        parts = [getattr(module._modules.get(name), "weight", None) for name in _PARTS]
        heads, each = (getattr(module, name, None) for name in _SIZES)
        rates = module._buffers.get("slope_rate")
        if any(weight is None for weight in parts) or rates is None:
            return False
        if not isinstance(heads, int) or not isinstance(each, int):
            return False
        rows = shape_source(module, "qkv_proj.weight").shape[0]
        return rates.shape == (heads, 1, 1) and rows % heads == 0 and rows // heads > each

    def refuse(self, module: nn.Module) -> None:
        """Refuse layers whose keys must have as many channels as their values."""
        if not hasattr(module, "head_k_dim"):
            raise UnsupportedLayerError(
                f"{type(module).__name__} has one head_dim for keys and values alike; expected a "
                "layer with a head_k_dim of its own for keys. Call lightning_compressm.compat."
                "enable_minimax_key_channels() before the model is built, or put it into `ignore`."
            )

    def groups(self, module: nn.Module) -> int:
        """The number of heads."""
        return _sizes(module)[0]

    def state_dim(self, module: nn.Module) -> int:
        """Key channels of a head, from the rows of the projection."""
        return _key_channels(module, shape_source(module, "qkv_proj.weight"))

    def state_dim_in(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
        """From the rows of the saved projection."""
        saved = tensors.get("qkv_proj.weight")
        if saved is None or saved.ndim != 2:
            return None
        n = _key_channels(module, saved)
        heads, each = _sizes(module)
        return n if n >= 1 and saved.shape[0] == heads * (2 * n + each) else None

    def state_entries(self, module: nn.Module, keep: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Rows of ``qkv_proj`` that make queries and keys, head by head."""
        n, each = self.state_dim(module), _sizes(module)[1]
        size = 2 * n + each
        rows = [size * h + rows_of_blocks(size, 0, k.repeat(2, 1), n) for h, k in enumerate(keep)]
        return with_biases(module, {"qkv_proj": torch.cat(rows)})

    def attributes(self, module: nn.Module, state_dim: int) -> dict[str, Any]:
        """Also the size of the projection."""
        heads, each = _sizes(module)
        found = super().attributes(module, state_dim)
        return found | {"qkv_proj.out_features": heads * (2 * state_dim + each)}

    def signals(self, module: nn.Module, inputs: Tensor) -> SelectiveSignals:
        """Run the projection again."""
        own: Any = module
        n, (heads, each) = self.state_dim(module), _sizes(module)
        activation = getattr(module, "act_fn", nn.functional.silu)
        by_head = activation(own.qkv_proj(inputs)).unflatten(-1, (heads, -1))
        q, k, v = by_head.split([n, n, each], -1)
        columns = own.out_proj.weight.norm(dim=0) * own.norm.weight
        weight = torch.sigmoid(own.output_gate(inputs)) * columns
        rates = -own.slope_rate.expand(heads, each, 1)
        return SelectiveSignals(
            torch.ones_like(v), rates.to(v), k, q, v, torch.unflatten(weight, -1, (heads, each))
        )

    def readout_entries(self, module: nn.Module, states: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Rows of ``qkv_proj`` that make queries; the activation of 0 is 0."""
        size = 2 * self.state_dim(module) + _sizes(module)[1]
        rows = size * torch.arange(len(states)).unsqueeze(-1) + states
        return with_biases(module, {"qkv_proj": rows.flatten()})

    def local_tensors(self, module: nn.Module) -> tuple[str, ...]:
        """The projection of queries, keys and values."""
        return tuple(with_biases(module, {"qkv_proj": torch.empty(0)}))

    def shared_attributes(self, model: nn.Module, state_dims: Mapping[str, int]) -> dict[str, Any]:
        """The config of transformers' models."""
        return config_attributes(model, state_dims, ("linear_key_head_dim",))

    def example(self, d_state: int = 8) -> tuple[nn.Module, Tensor]:
        """A plain layer with two heads."""
        return LightningAttentionBlock(8, d_state), torch.randn(2, 12, 8)


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Heads, and value channels of a head."""
    heads, each = (int(getattr(module, name)) for name in _SIZES)
    return heads, each


def _key_channels(module: nn.Module, weight: Tensor) -> int:
    heads, each = _sizes(module)
    return (weight.shape[0] // heads - each) // 2
