"""What tests of selective layers share: the recurrence step by step, and states nobody reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_compressm import find_ssm_layers
from lightning_compressm.control.calibration import SelectiveSignals
from lightning_compressm.families import SelectiveFamily
from lightning_compressm.surgery.apply import apply_plan


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def scanned(signals: SelectiveSignals, D: Tensor) -> Tensor:
    """h_k = exp(dt A) h + dt B x, y = C h + D x; (batch, L, channels)."""
    s = signals.double()
    state = torch.zeros((*s.x[:, 0].shape, s.n_states), dtype=torch.float64)
    outputs = []
    for k in range(s.x.shape[1]):
        dt, x = s.dt[:, k, ..., None], s.x[:, k, ..., None]
        state = torch.exp(dt * s.A) * state + dt * x * s.B[:, k, :, None]
        outputs.append((state * s.C[:, k, :, None]).sum(-1))
    each = s.x[0, 0].numel() // D.numel()
    through = s.x.flatten(2) * D.detach().double().flatten().repeat_interleave(each)
    return torch.stack(outputs, 1).flatten(2) + through


def seen(
    module: nn.Module, run: nn.Module, *args: object, **kwargs: object
) -> dict[str, tuple[Tensor, ...]]:
    """Run a model; what was given to a layer, and to its last parts ``norm`` and ``out_proj``."""
    calls: dict[str, tuple[Tensor, ...]] = {}
    handles = []

    def listen(name: str, part: nn.Module) -> None:
        def record(_: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            calls[name] = tuple(t for t in (*given, *named.values()) if torch.is_tensor(t))

        handles.append(part.register_forward_pre_hook(record, with_kwargs=True))

    listen("", module)
    for name in ("norm", "out_proj"):
        if getattr(module, name, None) is not None:
            listen(name, getattr(module, name))
    with torch.no_grad():
        run(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return calls


@torch.no_grad()
def stop_reading(model: nn.Module, kept: int) -> dict[str, Tensor]:
    """Zero what makes C of some random states of each layer; layer -> the others, (groups, r)."""
    keep = {}
    for name, layer in find_ssm_layers(model).items():
        module, n = layer.module, layer.state_dim
        assert isinstance(layer.family, SelectiveFamily)
        order = torch.stack([torch.randperm(n) for _ in range(layer.family.groups(module))])
        keep[name], dropped = order[:, :kept].sort().values, order[:, kept:]
        if hasattr(module, "x_proj_weight"):
            for weight, states in zip(module.x_proj_weight, dropped, strict=True):
                weight[len(weight) - n + states] = 0
        elif hasattr(module, "x_proj"):
            module.x_proj.weight[len(module.x_proj.weight) - n + dropped[0]] = 0
        else:
            states = (torch.arange(len(dropped))[:, None] * n + dropped).flatten()
            size = dropped.shape[0] * n
            for part, behind in ((module.in_proj, len(module.A_log)), (module.conv1d, 0)):
                for tensor in (part.weight, part.bias):
                    if tensor is not None:
                        tensor[len(tensor) - behind - size + states] = 0
    return keep


def drop_others(model: nn.Module, keep: dict[str, Tensor]) -> None:
    for name, layer in find_ssm_layers(model).items():
        assert isinstance(layer.family, SelectiveFamily)
        apply_plan(layer.module, layer.family.selection_plan(layer.module, keep[name]))
