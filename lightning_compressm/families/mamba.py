"""Mamba blocks of mamba_ssm, transformers, mamba.py and mamba-minimal.

x, z = in_proj(u);  x = silu(conv(x));  dt, B, C = x_proj(x);  dt = softplus(dt_proj(dt))
h_k = exp(dt_k A) h_{k-1} + dt_k B_k x_k,  y_k = C_k h_k + D x_k,  out = out_proj(y silu(z))
(Gu & Dao 2023, arXiv 2312.00752, algorithm 2 and section 3.4).

The states of a channel do not mix, so dropping some is exact where C does not read them; C is
linear in x_proj, so that the read-out of the others can be refitted in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compressm.control.calibration import SelectiveSignals
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.families._base import shape_source, tensor_of
from lightning_compressm.families._rates import RatesFamily, with_readout
from lightning_compressm.families._registry import register_family
from lightning_compressm.families._selective import rows_of_blocks
from lightning_compressm.families._transformers import config_attributes

__all__ = ["MambaFamily", "NormalisedMambaFamily"]

_PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
# The other direction of Vision Mamba's blocks, as its authors and as mamba.py call it.
_BACKWARD = ("A_b_log", "A_log_b")
_NORMS = ("b_layernorm", "B_layernorm", "c_layernorm", "C_layernorm")


@register_family
class MambaFamily(RatesFamily):
    """Mamba blocks in which B and C are linear in ``x_proj``.

    Recognised by structure: ``in_proj, conv1d, x_proj, dt_proj, out_proj``, and ``A_log`` of shape
    (channels, N).

    Example:
        >>> layer, _ = MambaFamily().example(d_state=8)
        >>> MambaFamily().state_dim(layer)
        8
    """

    name: ClassVar[str] = "Mamba"
    layers: ClassVar[str] = (
        "`mamba_ssm.Mamba`; transformers `MambaMixer`; blocks of mamba.py and mamba-minimal"
    )
    refit: ClassVar[Literal["readout", "local"]] = "readout"

    def matches(self, module: nn.Module) -> bool:
        """Whether the parts are there, with shapes that fit together, and no norms of B and C."""
        return _is_mamba(module) and not _norms(module)

    def refuse(self, module: nn.Module) -> None:
        """Refuse blocks that also read the sequence backwards, or normalise B and C unseen."""
        if hasattr(module, "rms_eps") and not _norms(module):
            raise UnsupportedLayerError(
                f"{type(module).__name__} normalises B and C by a function that can't be seen from "
                "outside; expected modules of their own for that, as transformers has them from "
                "5.16.1 on. Install transformers>=5.16.1, or put it into `ignore`."
            )
        if any(name in module._parameters for name in _BACKWARD):
            raise UnsupportedLayerError(
                f"{type(module).__name__} reads the sequence in both directions and has states of "
                "its own for each; expected a block with one direction. Put it into `ignore`."
            )

    def state_entries(self, module: nn.Module, keep: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Columns of ``A_log``; rows of ``x_proj`` that make B and C."""
        n, rank, size = self.state_dim(module), _dt_rank(module), _rows(module)
        return {
            "A_log": (1, keep[0]),
            "x_proj.weight": (0, rows_of_blocks(size, rank, keep, n, blocks=2)),
        }

    def attributes(self, module: nn.Module, state_dim: int) -> dict[str, Any]:
        """Also the size of ``x_proj``, and the config that mamba.py's blocks read."""
        found = super().attributes(module, state_dim)
        found["x_proj.out_features"] = _dt_rank(module) + 2 * state_dim
        return found | ({"config.d_state": state_dim} if _reads_config(module) else {})

    def readout_entries(self, module: nn.Module, states: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Rows of ``x_proj`` that make C."""
        return {"x_proj.weight": (0, _dt_rank(module) + self.state_dim(module) + states[0])}

    def signals(self, module: nn.Module, inputs: Tensor) -> SelectiveSignals:
        """Run the projections and the convolution again."""
        part: dict[str, Any] = {name: getattr(module, name) for name in _PARTS}
        x, z = part["in_proj"](inputs).chunk(2, -1)
        x = F.silu(part["conv1d"](x.mT)[..., : inputs.shape[1]].mT)
        n, rank = self.state_dim(module), _dt_rank(module)
        dt, B, C = part["x_proj"](x).split([rank, n, n], -1)
        norms = _all_norms(module)
        dt, B, C = (norms.get(k, _same)(v) for k, v in (("dt", dt), ("b", B), ("c", C)))
        dt = F.softplus(F.linear(dt, part["dt_proj"].weight, part["dt_proj"].bias))
        weight = F.silu(z) * part["out_proj"].weight.norm(dim=0)
        A = -torch.exp(shape_source(module, "A_log").float())
        one = [t.unsqueeze(2) for t in (dt, B, C, x, weight)]
        return SelectiveSignals(one[0], A.unsqueeze(0), *one[1:])

    def write_readout(self, module: nn.Module, keep: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """New C rows of ``x_proj``: those of the kept states plus ``delta`` times all."""
        weight = tensor_of(module, "x_proj.weight").detach()
        n, rank = self.state_dim(module), _dt_rank(module)
        return {"x_proj.weight": with_readout(weight, rank, n, keep[0], delta[0])}

    def shared_attributes(self, model: nn.Module, state_dims: Mapping[str, int]) -> dict[str, Any]:
        """The config of transformers' models; mamba.py's has room for one state dimension."""
        names = ("state_size", "mamba_d_state", "d_state")
        found = config_attributes(model, state_dims, names)
        readers: dict[int, tuple[str, int]] = {}
        for path, state_dim in state_dims.items():
            block: Any = model.get_submodule(path)
            if not _reads_config(block):
                continue
            other, theirs = readers.setdefault(id(block.config), (path, state_dim))
            if theirs != state_dim:
                raise UnsupportedLayerError(
                    f"'{path}' and '{other}' read their state dimension from one config, so they "
                    f"need the same one; got {state_dim} and {theirs}. Use share_state_dim=True "
                    "(and leave no layer of this kind out)."
                )
        return found

    def example(self, d_state: int = 8) -> tuple[nn.Module, Tensor]:
        """A plain block of the same structure."""
        from lightning_compressm.nn._mamba import MambaBlock

        return MambaBlock(8, d_state), torch.randn(2, 12, 8)


@register_family
class NormalisedMambaFamily(MambaFamily):
    """Mamba blocks that normalise B and C over the states: FalconMamba and Jamba.

    Which states are there changes the norm of the others, so dropping is approximate, and
    ``x_proj`` is refitted to the block's output.

    Example:
        >>> layer, _ = NormalisedMambaFamily().example(d_state=8)
        >>> NormalisedMambaFamily().state_dim(layer)
        8
    """

    name: ClassVar[str] = "Mamba, B and C normalised"
    layers: ClassVar[str] = "transformers `FalconMambaMixer`, `JambaMambaMixer`"
    refit: ClassVar[Literal["readout", "local"]] = "local"
    approximate: ClassVar[bool] = True

    def matches(self, module: nn.Module) -> bool:
        """Whether it is a Mamba block with norms of B and C."""
        return _is_mamba(module) and bool(_norms(module))

    def state_entries(self, module: nn.Module, keep: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Also the weights of the norms."""
        norms = {name: (0, keep[0]) for name in _norm_weights(module)}
        return super().state_entries(module, keep) | norms

    def attributes(self, module: nn.Module, state_dim: int) -> dict[str, Any]:
        """Also the shape that torch's own norms check."""
        shapes = {
            f"{name}.normalized_shape": (state_dim,)
            for name in _norms(module)
            if hasattr(getattr(module, name), "normalized_shape")
        }
        return super().attributes(module, state_dim) | shapes

    def local_tensors(self, module: nn.Module) -> tuple[str, ...]:
        """``x_proj`` and the trainable weights of the norms."""
        weights = ((name, shape_source(module, name)) for name in _norm_weights(module))
        return ("x_proj.weight", *(n for n, w in weights if isinstance(w, nn.Parameter)))

    def example(self, d_state: int = 8) -> tuple[nn.Module, Tensor]:
        """A plain block of the same structure, with norms."""
        from lightning_compressm.nn._mamba import MambaBlock

        return MambaBlock(8, d_state, normalise=True), torch.randn(2, 12, 8)


def _is_mamba(module: nn.Module) -> bool:
    a_log = module._parameters.get("A_log")
    parts = [module._modules.get(name) for name in _PARTS]
    if a_log is None or a_log.ndim != 2 or any(part is None for part in parts):
        return False
    weights = [getattr(module._modules[name], "weight", None) for name in ("x_proj", "dt_proj")]
    if any(w is None or w.ndim != 2 for w in weights):
        return False
    x_proj, dt_proj = (w.shape for w in weights if w is not None)
    channels, n = a_log.shape
    return bool(
        x_proj[1] == dt_proj[0] == channels
        and x_proj[0] == dt_proj[1] + 2 * n
        and getattr(module.x_proj, "bias", None) is None
    )


def _norms(module: nn.Module) -> list[str]:
    """Names of the norms of B and C that are there."""
    return [name for name in _NORMS if module._modules.get(name) is not None]


def _norm_weights(module: nn.Module) -> list[str]:
    """Names of the weights that these norms have; some have none."""
    norms = {name: getattr(module, name) for name in _norms(module)}
    return [
        f"{n}.weight" for n, norm in norms.items() if torch.is_tensor(getattr(norm, "weight", None))
    ]


def _all_norms(module: nn.Module) -> dict[str, Any]:
    """The norms by what they are applied to: dt, b, c."""
    names = ("dt_layernorm", *_norms(module))
    there = {name: module._modules.get(name) for name in names}
    return {name.split("_")[0].lower(): norm for name, norm in there.items() if norm is not None}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _dt_rank(module: nn.Module) -> int:
    return int(shape_source(module, "dt_proj.weight").shape[1])


def _rows(module: nn.Module) -> int:
    return int(shape_source(module, "x_proj.weight").shape[0])


def _reads_config(module: nn.Module) -> bool:
    """mamba.py's blocks have no size of their own."""
    own = hasattr(module, "d_state") or hasattr(module, "ssm_state_size")
    return hasattr(getattr(module, "config", None), "d_state") and not own
