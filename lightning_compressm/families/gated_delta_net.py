"""Gated DeltaNet layers: transformers' Qwen3-Next, Qwen3.5 and OLMo hybrid.

q, k, v = silu(conv(proj(u)));  q, k normalised to norm one over the channels of a head
S_t = a_t S_{t-1} + k_t w_t^T,  w_t = beta_t (v_t - a_t S_{t-1}^T k_t),  o_t = S_t^T q_t / sqrt(K)
out = proj(norm(o) silu(z)), the norm over the value channels of a head
(Yang, Kautz & Hatamizadeh 2025, arXiv 2412.06464). The states that go are key channels: rows of S.
With what is written, w, as input the recurrence is a diagonal one with B = k and C = q.

Nothing here is exact: norms and w depend on all key channels, and the factor 1 / sqrt(K) changes
with K, though the norm behind takes that back but for its epsilon. So projections and convolution
are fitted to the layer's old output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compressm.control.calibration import SelectiveSignals
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.families._linear_attention import with_biases
from lightning_compressm.families._registry import register_family
from lightning_compressm.families._selective import SelectiveFamily, rows_of_blocks
from lightning_compressm.families._transformers import config_attributes
from lightning_compressm.nn._delta import GatedDeltaBlock, gated_delta_rule, unit

__all__ = ["GatedDeltaNetFamily"]

_SIZES = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
_LAYOUTS = (
    ("in_proj_qkvz", "in_proj_ba", "norm", "out_proj"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "norm", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj", "o_norm", "o_proj"),
)
_SILU = ("silu", "swish")
_SMALLEST_STEP = 1e-8  # of -log a: no division by zero where a head forgets nothing


@register_family
class GatedDeltaNetFamily(SelectiveFamily):
    """Linear attention by the gated delta rule; the states are the key channels of a head.

    Recognised by structure: ``num_k_heads, num_v_heads, head_k_dim, head_v_dim``, a ``conv1d`` over
    queries, keys and values, ``A_log`` and ``dt_bias`` with one entry for each value head, and the
    projections of one of three layouts: ``in_proj_qkvz`` (Qwen3-Next), ``in_proj_qkv`` (Qwen3.5),
    or ``q_proj, k_proj, v_proj`` (OLMo hybrid).

    Example:
        >>> layer, _ = GatedDeltaNetFamily().example(d_state=8)
        >>> GatedDeltaNetFamily().state_dim(layer), GatedDeltaNetFamily().groups(layer)
        (8, 2)
    """

    name: ClassVar[str] = "Gated DeltaNet"
    layers: ClassVar[str] = (
        "transformers `Qwen3NextGatedDeltaNet`, `Qwen3_5GatedDeltaNet`, "
        "`Qwen3_5MoeGatedDeltaNet`, `OlmoHybridGatedDeltaNet`"
    )
    refit: ClassVar[Literal["readout", "local"]] = "local"
    approximate: ClassVar[bool] = True
    state_dim_attributes: ClassVar[tuple[str, ...]] = ("head_k_dim",)

    def matches(self, module: nn.Module) -> bool:
        """Whether sizes, parameters and parts are there and fit together."""
        own, parts = module._parameters, module._modules
        shapes = [getattr(own.get(name), "shape", None) for name in ("A_log", "dt_bias")]
        sizes = [getattr(module, name, None) for name in _SIZES]
        if any(not isinstance(size, int) for size in sizes) or _layout(module) is None:
            return False
        if any(shape != (sizes[1],) for shape in shapes):
            return False
        weight = getattr(parts.get("conv1d"), "weight", None)
        channels = 2 * self.groups(module) * self.state_dim(module) + _values(module)
        return weight is not None and weight.ndim == 3 and weight.shape[0] == channels

    def refuse(self, module: nn.Module) -> None:
        """Refuse other activations: silu of zero is zero, and kernels know no other."""
        activation = getattr(module, "activation", "silu")
        if activation not in _SILU:
            raise UnsupportedLayerError(
                f"{type(module).__name__} has the activation {activation!r} behind its "
                "convolution; expected 'silu'. Put it into `ignore`."
            )

    def groups(self, module: nn.Module) -> int:
        """Heads with queries and keys of their own."""
        return _sizes(module)[0]

    def state_dim(self, module: nn.Module) -> int:
        """Key channels of a head."""
        return _sizes(module)[2]

    def state_dim_in(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
        """From the number of saved channels of the convolution."""
        saved = tensors.get("conv1d.weight")
        if saved is None or saved.ndim != 3:
            return None
        channels, rest = divmod(saved.shape[0] - _values(module), 2 * self.groups(module))
        return int(channels) if channels >= 1 and rest == 0 else None

    def state_entries(self, module: nn.Module, keep: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Rows of the projections, and channels of ``conv1d``, that make queries and keys."""
        n, both = self.state_dim(module), 2 * len(keep) * self.state_dim(module)
        mixed = rows_of_blocks(both + _values(module), 0, keep, n, blocks=2)
        rows = {"in_proj_qkv": mixed, "conv1d": mixed}
        rows["q_proj"] = rows["k_proj"] = rows_of_blocks(both // 2, 0, keep, n)
        rows["in_proj_qkvz"] = _rows_by_head(module, keep)
        return with_biases(module, rows)

    def attributes(self, module: nn.Module, state_dim: int) -> dict[str, Any]:
        """Also the sizes of the projections and of the convolution."""
        keys, values = self.groups(module) * state_dim, _values(module)
        mixed = 2 * keys + values
        features = {
            "in_proj_qkvz": mixed + values,
            "in_proj_qkv": mixed,
            "q_proj": keys,
            "k_proj": keys,
        }
        parts = module._modules
        inner = {f"{k}.out_features": size for k, size in features.items() if k in parts}
        inner |= {f"conv1d.{k}": mixed for k in ("in_channels", "out_channels", "groups")}
        mine = {"key_dim": keys, "conv_dim": mixed}
        inner |= {name: size for name, size in mine.items() if hasattr(module, name)}
        return super().attributes(module, state_dim) | inner

    def signals(self, module: nn.Module, inputs: Tensor) -> SelectiveSignals:
        """Run the projections, the convolution and the delta rule again."""
        own: Any = module
        key_heads, heads, n, _ = _sizes(module)
        each = heads // key_heads
        mixed, gate, rate, step = _projected(module, inputs)
        mixed = F.silu(own.conv1d(mixed.mT)[..., : inputs.shape[1]].mT)
        q, k, v = torch.split(mixed, [key_heads * n, key_heads * n, _values(module)], -1)
        q, k = (unit(torch.unflatten(t, -1, (key_heads, n))) for t in (q, k))
        q, v = q * n**-0.5, torch.unflatten(v, -1, (heads, -1))
        beta = rate.sigmoid() * (2 if getattr(module, "allow_neg_eigval", False) else 1)
        decay = own.A_log.exp() * F.softplus(step + own.dt_bias)
        decay = decay.clamp(min=_SMALLEST_STEP)
        queries, keys = (t.repeat_interleave(each, 2) for t in (q, k))
        outputs, written = gated_delta_rule(queries, keys, v, -decay, beta)
        weight = _weight(module, outputs, torch.unflatten(gate, -1, (heads, -1)))
        dt = decay.unsqueeze(-1).expand_as(written)

        def by_group(values: Tensor) -> Tensor:
            return torch.unflatten(values.flatten(2), -1, (key_heads, -1))

        x = by_group(written / dt)
        A = -x.new_ones(x.shape[2:]).unsqueeze(-1)
        return SelectiveSignals(by_group(dt), A, k, q, x, by_group(weight))

    def readout_entries(self, module: nn.Module, states: Tensor) -> dict[str, tuple[int, Tensor]]:
        """What makes channels of the queries; silu(0) is 0."""
        n, heads = self.state_dim(module), torch.arange(len(states)).unsqueeze(-1)
        rows = (n * heads + states).flatten()
        packed = (_rows_of_a_head(module) * heads + states).flatten()
        starts = {"q_proj": rows, "in_proj_qkv": rows, "in_proj_qkvz": packed, "conv1d": rows}
        return with_biases(module, starts)

    def local_tensors(self, module: nn.Module) -> tuple[str, ...]:
        """The projections of queries and keys, and the convolution."""
        keep = torch.zeros(self.groups(module), 1, dtype=torch.long)
        return tuple(self.state_entries(module, keep))

    def shared_attributes(self, model: nn.Module, state_dims: Mapping[str, int]) -> dict[str, Any]:
        """The config of transformers' models."""
        return config_attributes(model, state_dims, ("linear_key_head_dim",))

    def example(self, d_state: int = 8) -> tuple[nn.Module, Tensor]:
        """A plain layer with two key heads and four value heads."""
        return GatedDeltaBlock(8, d_state), torch.randn(2, 12, 8)


def _sizes(module: nn.Module) -> tuple[int, int, int, int]:
    """Key heads, value heads, key channels and value channels of a head."""
    key_heads, heads, keys, values = (int(getattr(module, name)) for name in _SIZES)
    return key_heads, heads, keys, values


def _values(module: nn.Module) -> int:
    """Value channels of all heads."""
    _, heads, _, each = _sizes(module)
    return heads * each


def _layout(module: nn.Module) -> tuple[str, ...] | None:
    """Names of the projections and of the norm, if all those of one layout are there."""
    parts = module._modules
    return next((names for names in _LAYOUTS if all(n in parts for n in names)), None)


def _rows_of_a_head(module: nn.Module) -> int:
    """Rows of ``in_proj_qkvz`` for a key head: query, key, values and gates."""
    key_heads, heads, keys, values = _sizes(module)
    return 2 * keys + 2 * values * heads // key_heads


def _rows_by_head(module: nn.Module, keep: Tensor) -> Tensor:
    """Rows of ``in_proj_qkvz`` that stay, head by head."""
    n, size = _sizes(module)[2], _rows_of_a_head(module)
    rows = [size * g + rows_of_blocks(size, 0, k.repeat(2, 1), n) for g, k in enumerate(keep)]
    return torch.cat(rows)


def _projected(module: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is convolved, the gate, and the inputs of beta and of the decay, (batch, L, ...)."""
    own: Any = module
    key_heads, _, n, _ = _sizes(module)
    if "q_proj" in module._modules:
        mixed = torch.cat([own.q_proj(inputs), own.k_proj(inputs), own.v_proj(inputs)], -1)
        return mixed, own.g_proj(inputs), own.b_proj(inputs), own.a_proj(inputs)
    if "in_proj_qkv" in module._modules:
        gate, rate, step = (part(inputs) for part in (own.in_proj_z, own.in_proj_b, own.in_proj_a))
        return own.in_proj_qkv(inputs), gate, rate, step
    by_head = own.in_proj_qkvz(inputs).unflatten(-1, (key_heads, -1))
    values = (by_head.shape[-1] - 2 * n) // 2
    q, k, v, gate = (t.flatten(2) for t in by_head.split([n, n, values, values], -1))
    both = own.in_proj_ba(inputs).unflatten(-1, (key_heads, -1))
    rate, step = (t.flatten(2) for t in both.chunk(2, -1))
    return torch.cat([q, k, v], -1), gate, rate, step


def _weight(module: nn.Module, outputs: Tensor, gate: Tensor) -> Tensor:
    """How strongly each output counts: by its norm, its gate and its column of the projection."""
    layout = _layout(module)
    assert layout is not None
    norm, projection = (getattr(module, name) for name in layout[-2:])
    size = torch.rsqrt(outputs.square().mean(-1, keepdim=True) + _epsilon(norm))
    # The norm of ones is one: what is left are its weights and the gate.
    gated = norm(torch.ones_like(outputs), gate)
    columns = projection.weight.norm(dim=0).unflatten(0, gate.shape[2:])
    weight: Tensor = gated * size * columns
    return weight


def _epsilon(norm: nn.Module) -> float:
    """What a root-mean-square norm adds to the mean square."""
    names = (name for name in ("variance_epsilon", "eps") if hasattr(norm, name))
    return float(getattr(norm, next(names, ""), 0.0))
