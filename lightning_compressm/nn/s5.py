"""The S5 layer: one diagonal system with many inputs and outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_compressm._precision import wide_dtype
from lightning_compressm._rules import one_of
from lightning_compressm.nn._autocast import full_precision
from lightning_compressm.nn._checks import (
    check_dtype,
    check_inputs,
    check_size,
    check_state,
    check_time_steps,
)
from lightning_compressm.nn._discretize import DISCRETIZATIONS, Discretization, discretize
from lightning_compressm.nn._fused import fused_diagonal
from lightning_compressm.nn._hippo import hippo_normal
from lightning_compressm.nn._resize import ResizableLayer

__all__ = ["S5"]


class S5(ResizableLayer):
    r"""Simplified structured state-space layer: a diagonal complex system in continuous time.

    .. math::
        \dot x = \Lambda \odot x + B u, \qquad
        y = 2\, \mathrm{Re}(C x) + D \odot u, \qquad
        \Lambda = -e^{\Lambda^{re}} + i \Lambda^{im}

    discretized with a step :math:`\Delta_n` for each state. Each stored state stands for a
    conjugate pair. The parameters are real: ``log_Lambda_re``, ``Lambda_im``, ``log_step`` (N,),
    ``B_re``, ``B_im`` (N, H), ``C_re``, ``C_im`` (H, N) and ``D`` (H,). At the start the layer is
    HiPPO-N, the normal part of HiPPO-LegS, of 2N real states: B and C are real normal matrices of
    variances 1/H and 1/(2N) in its original coordinates, the steps are log-uniform, and D is
    normal. They are drawn on the CPU, so that a seed gives the same layer on every device.

    Half-precision parameters and inputs, autocast included, are computed in float32 (the
    eigenvalues and their powers in float64); the output has the dtype of the input. A checkpoint
    with another number of states resizes the layer when it is loaded. While it is exported or
    traced, and under the transforms of ``torch.func``, the layer runs in plain operations, which
    leave the number of sequences and of steps open.

    Args:
        d_model: inputs and outputs H, >= 1.
        d_state: complex states N, >= 1; counted as real states there are 2N.
        dt_min: smallest step at the start, > 0.
        dt_max: largest step at the start, >= dt_min.
        discretization: "zoh" (zero-order hold) or "bilinear".
        blocks: start from so many equal HiPPO-N blocks, a divisor of ``d_state``.
        device: of the parameters.
        dtype: of the parameters, a real floating-point type.

    Raises:
        TypeError: ``dtype`` is not a real floating-point type.
        ValueError: an argument is out of range.

    Source:
        Smith et al. (2023), "Simplified State Space Layers for Sequence Modeling", arXiv
        2208.04933, sections 3 (layer) and 4.3 and appendix B.1 (initialisation, blocks, conjugate
        pairs).

    Example:
        >>> import torch
        >>> layer = S5(d_model=4, d_state=16)
        >>> layer(torch.randn(2, 100, 4)).shape
        torch.Size([2, 100, 4])
        >>> y, state = layer.step(torch.randn(2, 4), layer.initial_state(2))
        >>> y.shape, state.shape
        (torch.Size([2, 4]), torch.Size([2, 16]))
    """

    state_axes: ClassVar[Mapping[str, int]] = {
        **dict.fromkeys(("log_Lambda_re", "Lambda_im", "log_step", "B_re", "B_im"), 0),
        **dict.fromkeys(("C_re", "C_im"), 1),
    }

    def __init__(
        self,
        d_model: int,
        d_state: int,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        discretization: Discretization = "zoh",
        blocks: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_state", d_state), ("blocks", blocks)):
            check_size(name, value)
        if d_state % blocks:
            raise ValueError(f"blocks must divide d_state = {d_state}, got {blocks}")
        check_time_steps(dt_min, dt_max)
        one_of(*DISCRETIZATIONS).check("discretization", discretization)
        check_dtype(dtype)
        self.d_model, self.d_state = d_model, d_state
        self.dt_min, self.dt_max, self.blocks = dt_min, dt_max, blocks
        self.discretization = discretization

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.log_Lambda_re, self.Lambda_im, self.log_step = (parameter(d_state) for _ in range(3))
        self.B_re, self.B_im = (parameter(d_state, d_model) for _ in range(2))
        self.C_re, self.C_im = (parameter(d_model, d_state) for _ in range(2))
        self.D = parameter(d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew, as at construction, from PyTorch's default CPU generator."""
        states, width = self.B_re.shape
        # A reduced layer may have a number of states that no longer splits into blocks.
        blocks = self.blocks if states % self.blocks == 0 else 1
        frequencies, vectors = hippo_normal(states // blocks)
        vectors = torch.block_diag(*[vectors] * blocks)  # type: ignore[no-untyped-call]
        B = vectors.mH @ _normal(2 * states, width).to(vectors.dtype) / math.sqrt(width)
        C = _normal(width, 2 * states).to(vectors.dtype) @ vectors / math.sqrt(2 * states)
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        uniform = torch.rand(states, dtype=torch.float64, device="cpu")
        self.log_Lambda_re.fill_(math.log(0.5))
        self.Lambda_im.copy_(frequencies.repeat(blocks))
        self.log_step.copy_(low + (high - low) * uniform)
        for parameter, value in (
            (self.B_re, B.real),
            (self.B_im, B.imag),
            (self.C_re, C.real),
            (self.C_im, C.imag),
            (self.D, _normal(width)),
        ):
            parameter.copy_(value)

    @property
    def eigenvalues(self) -> Tensor:
        """The discrete eigenvalues, (N,) complex128 (complex64 on devices without float64)."""
        re, im, _, _ = self._discrete()
        return torch.complex(re, im)

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
        check_inputs("S5", inputs, "(batch, L, d_model)", self.d_model)
        with full_precision(inputs.device):
            re, im, *weights = self._realised(self._compute_dtype(inputs))
            outputs = fused_diagonal(inputs.to(weights[0].dtype), re, im, *weights)
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
        check_inputs("S5", inputs, "(batch, d_model)", self.d_model)
        check_state(state, "(batch, N)", (len(inputs), len(self.Lambda_im)))
        with full_precision(inputs.device):
            dtype = self._compute_dtype(inputs)
            re, im, to_state, to_output, feedthrough = self._realised(dtype)
            u = inputs.to(dtype)
            driven = torch.view_as_complex((u @ to_state).view(len(u), -1, 2))
            state = torch.complex(re, im).to(driven.dtype) * state.to(driven.dtype) + driven
            outputs = torch.view_as_real(state).flatten(-2) @ to_output.t() + feedthrough * u
        return outputs.to(inputs.dtype), state

    def initial_state(self, batch: int) -> Tensor:
        """Return the zero state, (batch, N) complex, on the layer's device."""
        dtype = torch.promote_types(self.B_re.dtype, torch.float32).to_complex()
        return torch.zeros(batch, len(self.Lambda_im), dtype=dtype, device=self.B_re.device)

    def extra_repr(self) -> str:
        """Name the sizes in the module's printed form."""
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, "
            f"discretization={self.discretization!r}"
        )

    def _compute_dtype(self, inputs: Tensor) -> torch.dtype:
        dtype = torch.promote_types(inputs.dtype, self.B_re.dtype)
        return torch.promote_types(dtype, torch.float32)

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Eigenvalues and input gains, real and imaginary parts, (N,)."""
        # In float32 an eigenvalue near the unit circle would lose its digits.
        wide = wide_dtype(self.B_re.device)
        step, decay = self.log_step.to(wide).exp(), self.log_Lambda_re.to(wide).exp()
        return discretize(decay, self.Lambda_im.to(wide), step, self.discretization)

    def _realised(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Eigenvalues (N,) twice; input and output weight, (H, 2N) interleaved; and D."""
        re, im, gain_re, gain_im = self._discrete()
        g_re, g_im = gain_re.to(dtype).unsqueeze(-1), gain_im.to(dtype).unsqueeze(-1)
        b_re, b_im = self.B_re.to(dtype), self.B_im.to(dtype)
        B = torch.stack(((g_re * b_re - g_im * b_im).t(), (g_re * b_im + g_im * b_re).t()), 2)
        C = 2 * torch.stack((self.C_re.to(dtype), -self.C_im.to(dtype)), 2)
        return re, im, B.flatten(1), C.flatten(1), self.D.to(dtype)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device="cpu")
