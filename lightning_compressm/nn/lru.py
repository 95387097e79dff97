"""The Linear Recurrent Unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_compressm._precision import wide_dtype
from lightning_compressm.nn._autocast import full_precision
from lightning_compressm.nn._checks import check_dtype, check_inputs, check_size, check_state
from lightning_compressm.nn._fused import fused_lru
from lightning_compressm.nn._resize import ResizableLayer

__all__ = ["LRU"]


class LRU(ResizableLayer):
    r"""Linear Recurrent Unit: a diagonal complex linear system between real sequences.

    .. math::
        x_k = \lambda \odot x_{k-1} + e^{\gamma^{log}} \odot (B u_k), \qquad
        y_k = \mathrm{Re}(C x_k) + D \odot u_k, \qquad
        \lambda = \exp(-e^{\nu^{log}} + i\, e^{\theta^{log}})

    so :math:`|\lambda| < 1` whatever the parameters are. All parameters are real: ``nu_log``,
    ``theta_log``, ``gamma_log`` (N,), ``B_re``, ``B_im`` (N, H), ``C_re``, ``C_im`` (H, N) and
    ``D`` (H,). At the start the eigenvalues are uniform on the ring ``r_min <= |lambda| <= r_max``
    with phases in (0, ``max_phase``], :math:`\gamma = \sqrt{1 - |\lambda|^2}`, and B, C, D are
    normal with variances 1/(2H), 1/N and 1. They are drawn on the CPU, so that a seed gives the
    same layer on every device.

    Half-precision parameters and inputs, autocast included, are computed in float32 (the
    eigenvalues and their powers in float64); the output has the dtype of the input. A checkpoint
    with another number of states resizes the layer when it is loaded. While it is exported or
    traced, and under the transforms of ``torch.func``, the layer runs in plain operations, which
    leave the number of sequences and of steps open.

    Args:
        d_model: inputs and outputs H, >= 1.
        d_state: complex states N, >= 1.
        r_min: smallest radius at the start, 0 <= r_min < r_max.
        r_max: largest radius at the start, < 1.
        max_phase: largest phase at the start in radians, 0 < max_phase <= 2 pi.
        device: of the parameters.
        dtype: of the parameters, a real floating-point type.

    Raises:
        TypeError: ``dtype`` is not a real floating-point type.
        ValueError: an argument is out of range.

    Source:
        Orvieto et al. (2023), "Resurrecting Recurrent Neural Networks for Long Sequences",
        arXiv 2303.06349, section 3 (parametrisation, ring initialisation, normalisation) and
        appendix A.

    Example:
        >>> import torch
        >>> layer = LRU(d_model=4, d_state=16)
        >>> layer(torch.randn(2, 100, 4)).shape
        torch.Size([2, 100, 4])
        >>> y, state = layer.step(torch.randn(2, 4), layer.initial_state(2))
        >>> y.shape, state.shape
        (torch.Size([2, 4]), torch.Size([2, 16]))
    """

    state_axes: ClassVar[Mapping[str, int]] = {
        **dict.fromkeys(("nu_log", "theta_log", "gamma_log", "B_re", "B_im"), 0),
        **dict.fromkeys(("C_re", "C_im"), 1),
    }

    def __init__(
        self,
        d_model: int,
        d_state: int,
        *,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 6.283,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(d_model, d_state, r_min, r_max, max_phase, dtype)
        self.d_model, self.d_state = d_model, d_state
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.nu_log, self.theta_log, self.gamma_log = (parameter(d_state) for _ in range(3))
        self.B_re, self.B_im = (parameter(d_state, d_model) for _ in range(2))
        self.C_re, self.C_im = (parameter(d_model, d_state) for _ in range(2))
        self.D = parameter(d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew, as at construction, from PyTorch's default CPU generator."""
        # 1 - rand lies in (0, 1]: a zero would make a logarithm infinite and freeze the state.
        radius, angle = 1 - torch.rand(2, *self.nu_log.shape, dtype=torch.float64, device="cpu")
        square = self.r_min**2 + radius * (self.r_max**2 - self.r_min**2)
        self.nu_log.copy_(torch.log(-0.5 * torch.log(square)))
        self.theta_log.copy_(torch.log(self.max_phase * angle))
        self.gamma_log.copy_(0.5 * torch.log1p(-square))
        for matrix in (self.B_re, self.B_im):
            matrix.copy_(_normal(*matrix.shape) / math.sqrt(2 * matrix.shape[1]))
        for matrix in (self.C_re, self.C_im):
            matrix.copy_(_normal(*matrix.shape) / math.sqrt(matrix.shape[1]))
        self.D.copy_(_normal(*self.D.shape))

    @property
    def eigenvalues(self) -> Tensor:
        """The eigenvalues lambda, (N,) complex128 (complex64 on devices without float64)."""
        decay, phase = self._decay_and_phase()
        eigenvalues: Tensor = torch.complex(-decay, phase).exp()
        return eigenvalues

    def forward(self, inputs: Tensor) -> Tensor:
        """Map a whole sequence, starting from the zero state.

        Args:
            inputs: (batch, L, d_model) real, L >= 1.

        Returns:
            (batch, L, d_model), in the dtype of ``inputs``.

        Raises:
            TypeError: ``inputs`` is not a real floating-point tensor.
            ValueError: ``inputs`` has another shape, or no steps.
        """
        check_inputs("LRU", inputs, "(batch, L, d_model)", self.d_model)
        with full_precision(inputs.device):
            weights = self._weights(self._compute_dtype(inputs))
            outputs = fused_lru(inputs.to(weights[0].dtype), *self._decay_and_phase(), *weights)
        return outputs.to(inputs.dtype)

    def step(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Advance by one step; equal to :meth:`forward` when applied along a sequence.

        Args:
            inputs: (batch, d_model) real.
            state: (batch, N) complex, from :meth:`initial_state` or the step before.

        Returns:
            The output (batch, d_model), in the dtype of ``inputs``, and the next state.

        Raises:
            TypeError: ``inputs`` is not real floating-point, or ``state`` is not complex.
            ValueError: a shape does not fit.
        """
        check_inputs("LRU", inputs, "(batch, d_model)", self.d_model)
        check_state(state, "(batch, N)", (inputs.shape[0], self.nu_log.shape[0]))
        with full_precision(inputs.device):
            dtype = self._compute_dtype(inputs)
            to_state, to_output, feedthrough = self._weights(dtype)
            u = inputs.to(dtype)
            driven = torch.view_as_complex((u @ to_state).view(len(u), -1, 2))
            eigenvalues = self.eigenvalues.to(driven.dtype)
            state = eigenvalues * state.to(driven.dtype) + driven
            outputs = torch.view_as_real(state).flatten(-2) @ to_output.t() + feedthrough * u
        return outputs.to(inputs.dtype), state

    def initial_state(self, batch: int) -> Tensor:
        """Return the zero state, (batch, N) complex, on the layer's device."""
        dtype = torch.promote_types(self.nu_log.dtype, torch.float32).to_complex()
        return torch.zeros(batch, self.nu_log.shape[0], dtype=dtype, device=self.nu_log.device)

    def extra_repr(self) -> str:
        """Name the sizes in the module's printed form."""
        return f"d_model={self.d_model}, d_state={self.d_state}"

    def _compute_dtype(self, inputs: Tensor) -> torch.dtype:
        dtype = torch.promote_types(inputs.dtype, self.B_re.dtype)
        return torch.promote_types(dtype, torch.float32)

    def _decay_and_phase(self) -> tuple[Tensor, Tensor]:
        """Return -log |lambda| and arg lambda, (N,)."""
        # Near the unit circle 1 - |lambda| is small: in float32 it would lose its digits.
        wide = wide_dtype(self.nu_log.device)
        return self.nu_log.to(wide).exp(), self.theta_log.to(wide).exp()

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return gamma B transposed and C, both (H, 2N) interleaved real pairs, and D."""
        gamma = self.gamma_log.to(dtype).exp().unsqueeze(-1)
        B = torch.stack((self.B_re.to(dtype).t(), self.B_im.to(dtype).t()), 2) * gamma
        C = torch.stack((self.C_re.to(dtype), -self.C_im.to(dtype)), 2)
        return B.flatten(1), C.flatten(1), self.D.to(dtype)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device="cpu")


def _check_arguments(
    d_model: int,
    d_state: int,
    r_min: float,
    r_max: float,
    max_phase: float,
    dtype: torch.dtype | None,
) -> None:
    check_size("d_model", d_model)
    check_size("d_state", d_state)
    check_dtype(dtype)
    if not 0 <= r_min < r_max < 1:
        raise ValueError(f"radii must satisfy 0 <= r_min < r_max < 1, got {r_min} and {r_max}")
    if not 0 < max_phase <= math.tau:
        raise ValueError(f"max_phase must lie in (0, 2 pi] radians, got {max_phase}")
