"""What the loss asks of linear layers: Gramians of data and gradients, from ordinary training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compressm._rules import COUNT
from lightning_compressm.control import DiagonalLTI
from lightning_compressm.control.task_aware import TaskGramians
from lightning_compressm.errors import CompreSSMError
from lightning_compressm.families import Family
from lightning_compressm.model.layers import SSMLayer
from lightning_compressm.nn.moments import state_moments
from lightning_compressm.reduction.output_check import explains
from lightning_compressm.reduction.recorder import Attached, Kept, silent

__all__ = ["TaskRecorder"]


class TaskRecorder(Attached):
    """Records Gramians of the task in forward and backward passes, while it is attached to layers.

    A call counts when the gradient of the loss arrives at the layer's output, once for each
    backward pass: also with several calls of a layer, under activation checkpointing of either
    kind, with accumulated gradients and under autocast. Calls without gradients, or within
    transforms of ``torch.func``, do not count, nor do calls whose gradient or input is not finite,
    as in a step that a gradient scaler will skip. Each process records its own part of the data:
    add them up by :meth:`TaskGramians.summed`.

    A layer's system is read when recording starts, so its state dimension must not change before
    the end; optimizer steps in between make the Gramians those of a somewhat older layer.
    Recording adds two scans and two products of states to the backward pass: on a CPU a step takes
    two to three times as long for one system, some ten times for a bank with many channels. A
    model that was compiled before recording starts does not tell of its layers.

    Layers without such Gramians are named in :attr:`unavailable`; they have the Gramians of their
    systems: selective layers; layers whose module does not map sequences, as kernels of
    convolutions; layers whose output is not ``Re(C x) + D u``, the system's response from the zero
    state with any D, as with an activation, a dropout or a second direction inside (looked at in
    their first call); layers that are unstable; layers whose input is overwritten before the
    gradient arrives.

    Args:
        layers: to listen to.
        scale: by what the loss is multiplied, as a gradient scaler does; may be set anew between
            backward passes. It changes the scale of Q only.
        max_steps: steps of a call that count, >= 1: its first sequences, whole ones, at least one.

    Attributes:
        unavailable: layer name -> why it has no Gramians of the task; layers that were not called
            are in neither.
        scale: as given.
        max_steps: as given.

    Raises:
        ValueError: if ``max_steps`` is not an integer >= 1.

    Example:
        >>> import torch
        >>> from lightning_compressm.model.layers import find_ssm_layers
        >>> from lightning_compressm.nn import LRU
        >>> layer = LRU(4, 8)
        >>> with TaskRecorder(find_ssm_layers(layer)) as recorder:
        ...     layer(torch.randn(2, 20, 4)).square().mean().backward()
        >>> recorder.gramians[""].P.shape, recorder.gramians[""].steps
        (torch.Size([16, 16]), tensor(40., dtype=torch.float64))
    """

    def __init__(
        self, layers: Mapping[str, SSMLayer], *, scale: float = 1.0, max_steps: int = 4096
    ) -> None:
        COUNT.check("max_steps", max_steps)
        super().__init__()
        self.scale, self.max_steps = scale, max_steps
        self.unavailable: dict[str, str] = {}
        self._sums: dict[str, TaskGramians] = {}
        self._open: dict[str, _Listener] = {}
        for name, layer in layers.items():
            system = self._system_of(name, layer)
            if system is not None:
                self._open[name] = _Listener(self, layer, system)
        for listener in self._open.values():
            hook = listener.layer.module.register_forward_hook(listener, with_kwargs=True)
            self.handles.append(hook)

    @property
    def gramians(self) -> dict[str, TaskGramians]:
        """Layer name -> its Gramians, in the coordinates of ``family.system(module)``."""
        return {n: total for n, total in self._sums.items() if n not in self.unavailable}

    def add(self, name: str, gramians: TaskGramians) -> None:
        """Count what one call of a layer gave."""
        self._sums[name] = self._sums[name] + gramians if name in self._sums else gramians

    def _system_of(self, name: str, layer: SSMLayer) -> DiagonalLTI | None:
        if not isinstance(layer.family, Family):
            self.unavailable[name] = "it is selective"
            return None
        try:
            with torch.no_grad():
                system = layer.family.system(layer.module).check()
        except CompreSSMError as error:
            self.unavailable[name] = str(error)
            return None
        single = system.n_inputs == system.n_outputs == 1
        if not system.real_output or (system.batch_shape and not single):
            self.unavailable[name] = (
                "expected one system with real outputs, or a bank of them with one input and one "
                "output each"
            )
            return None
        return system


@dataclass(eq=False)
class _Listener:
    """Hears the calls of one layer; in a copy or a file of the module it does nothing."""

    recorder: TaskRecorder
    layer: SSMLayer
    system: DiagonalLTI
    checked: bool = False

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        missing = self.layer.name in self.recorder.unavailable
        if missing or not torch.is_grad_enabled() or _transformed():
            return
        family = self.layer.family
        assert isinstance(family, Family)
        call = family.sequences(module, args, kwargs, output)
        reason = self._refused(call)
        if reason:
            self.recorder.unavailable[self.layer.name] = reason
        elif call is not None and call[1].requires_grad:
            inputs, response = call
            hook = partial(self._arrived, Kept(inputs, copy=False))
            self.recorder.await_gradient(response, hook)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return silent, ()

    def _refused(self, call: tuple[Tensor, Tensor] | None) -> str:
        """Why a call is not one of the system; empty if it is."""
        if call is None:
            return "its module does not map a sequence to a sequence"
        inputs, response = (self._rows(tensor.detach()) for tensor in call)
        widths = _widths(self.system)
        if (inputs.shape[-1], response.shape[-1]) != widths or len(inputs) != len(response):
            return (
                f"expected {widths[0]} inputs and {widths[1]} outputs of its system, got sequences "
                f"of the shapes {tuple(call[0].shape)} and {tuple(call[1].shape)}"
            )
        if not self.checked and not explains(self.system, inputs, response):
            return "its output is not that of its system and a feedthrough"
        self.checked = True
        return ""

    def _rows(self, tensor: Tensor) -> Tensor:
        """(batch, L, H), whatever the layout."""
        rows = tensor.movedim(self.layer.family.length_dim, -2)
        return rows.reshape(-1, *rows.shape[-2:])

    @torch.no_grad()
    def _arrived(self, inputs: Kept, gradient: Tensor) -> None:
        if not inputs.intact:
            self.recorder.unavailable[self.layer.name] = (
                "its input is overwritten before the gradient arrives"
            )
            return
        u, g = self._rows(inputs.tensor), self._rows(gradient)
        count = max(1, self.recorder.max_steps // u.shape[1])
        u, g = u[:count], _widened(g[:count]) / self.recorder.scale
        s = self.system
        found = TaskGramians(
            state_moments(s.eigenvalues, s.B, u),
            state_moments(s.eigenvalues.conj(), s.C.mH, g, reverse=True),
            torch.tensor(float(u.shape[0] * u.shape[1]), dtype=torch.float64, device=u.device),
        )
        if bool(torch.isfinite(found.P).all() & torch.isfinite(found.Q).all()):
            self.recorder.add(self.layer.name, found)


def _widths(system: DiagonalLTI) -> tuple[int, int]:
    """Channels of input and output; those of a bank are its systems."""
    if not system.batch_shape:
        return system.n_inputs, system.n_outputs
    return len(system.eigenvalues), len(system.eigenvalues)


def _widened(tensor: Tensor) -> Tensor:
    """Divided in half precision, small gradients would vanish."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()
