"""The diagonal S4 layer: a bank of independent single-input, single-output systems."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compressm._precision import wide_dtype
from lightning_compressm._rules import one_of
from lightning_compressm.nn._autocast import full_precision
from lightning_compressm.nn._bank import bank_chunk, chunked_bank
from lightning_compressm.nn._checks import (
    check_dtype,
    check_inputs,
    check_size,
    check_state,
    check_time_steps,
)
from lightning_compressm.nn._convolution import batched_product, causal_convolution
from lightning_compressm.nn._discretize import DISCRETIZATIONS, Discretization, discretize
from lightning_compressm.nn._hippo import hippo_normal
from lightning_compressm.nn._plain import CHUNK, wants_plain_operations
from lightning_compressm.nn._powers import powers_by_doubling
from lightning_compressm.nn._resize import ResizableLayer

__all__ = ["S4D"]

Init = Literal["lin", "inv", "quad", "legs"]


class S4D(ResizableLayer):
    r"""Diagonal S4: every channel has a diagonal complex system of its own.

    .. math::
        \dot x_h = A_h \odot x_h + u_h, \qquad
        y_h = 2\, \mathrm{Re}(C_h x_h) + D_h u_h, \qquad
        A = -e^{A^{real}} + i A^{imag}

    in continuous time, discretized with one step :math:`\Delta_h = e^{dt_h}` a channel. Each
    stored state stands for a conjugate pair, and the input matrix is folded into C. The parameters
    are real: ``log_dt`` (H,), ``log_A_real``, ``A_imag`` (H, N), ``C`` (H, N, 2) as pairs of real
    and imaginary part, and ``D`` (H,). At the start the steps are log-uniform, real parts are -1/2,
    C is complex normal of variance 1 and D normal. They are drawn on the CPU, so that a seed gives
    the same layer on every device.

    With few states, on a CPU, sequences are run in chunks of 32 steps, as matrix products.
    Otherwise they are convolved by FFT, with a kernel made of two factors of about
    :math:`\sqrt L` powers each. Powers are computed in float64. Half-precision parameters and
    inputs, autocast included, are computed in float32; the output has the dtype of the input. A
    checkpoint with another number of states resizes the layer when it is loaded. While it is
    exported or traced, and under the transforms of ``torch.func``, the layer runs in plain
    operations, which leave the number of sequences and of steps open.

    Args:
        d_model: channels H, >= 1.
        d_state: complex states N of each channel, >= 1; counted as real states there are 2N.
        dt_min: smallest step at the start, > 0.
        dt_max: largest step at the start, >= dt_min.
        discretization: "zoh" (zero-order hold) or "bilinear".
        init: imaginary parts at the start: "lin" (pi n), "inv" (2N / pi (2N / (2n + 1) - 1)),
            "quad" ((2n + 1)^2 / pi), or "legs", the eigenvalues of HiPPO-LegS's normal part.
        device: of the parameters.
        dtype: of the parameters, a real floating-point type.

    Raises:
        TypeError: ``dtype`` is not a real floating-point type.
        ValueError: an argument is out of range.

    Source:
        Gu et al. (2022), "On the Parameterization and Initialization of Diagonal State Space
        Models", arXiv 2206.11893, sections 3 (layer) and 4 (initialisation).

    Example:
        >>> import torch
        >>> layer = S4D(d_model=4, d_state=16)
        >>> layer(torch.randn(2, 100, 4)).shape
        torch.Size([2, 100, 4])
        >>> y, state = layer.step(torch.randn(2, 4), layer.initial_state(2))
        >>> y.shape, state.shape
        (torch.Size([2, 4]), torch.Size([2, 4, 16]))
    """

    state_axes: ClassVar[Mapping[str, int]] = {"log_A_real": 1, "A_imag": 1, "C": 1}

    def __init__(
        self,
        d_model: int,
        d_state: int,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        discretization: Discretization = "zoh",
        init: Init = "lin",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("d_model", d_model)
        check_size("d_state", d_state)
        check_time_steps(dt_min, dt_max)
        one_of(*DISCRETIZATIONS).check("discretization", discretization)
        one_of(*get_args(Init)).check("init", init)
        check_dtype(dtype)
        self.d_model, self.d_state = d_model, d_state
        self.dt_min, self.dt_max = dt_min, dt_max
        self.discretization, self.init = discretization, init

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.log_dt = parameter(d_model)
        self.log_A_real, self.A_imag = (parameter(d_model, d_state) for _ in range(2))
        self.C = parameter(d_model, d_state, 2)
        self.D = parameter(d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew, as at construction, from PyTorch's default CPU generator."""
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        uniform = torch.rand(self.log_dt.shape, dtype=torch.float64, device="cpu")
        self.log_dt.copy_(low + (high - low) * uniform)
        self.log_A_real.fill_(math.log(0.5))
        self.A_imag.copy_(_frequencies(self.init, self.A_imag.shape[1]).expand(self.A_imag.shape))
        for parameter, scale in ((self.C, math.sqrt(0.5)), (self.D, 1.0)):
            normal = torch.randn(parameter.shape, dtype=torch.float64, device="cpu")
            parameter.copy_(scale * normal)

    @property
    def eigenvalues(self) -> Tensor:
        """The discrete eigenvalues, (H, N) complex128 (complex64 on devices without float64)."""
        re, im, _, _ = self._discrete()
        return torch.complex(re, im)

    def kernel(self, length: int) -> Tensor:
        """The impulse response of every channel without D.

        Args:
            length: steps L >= 1.

        Returns:
            (H, L), in the dtype of the parameters or float32.

        Raises:
            ValueError: ``length`` is not an integer >= 1.
        """
        check_size("length", length)
        with full_precision(self.C.device):
            return self._kernel(length, torch.promote_types(self.C.dtype, torch.float32))

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
        check_inputs("S4D", inputs, "(batch, L, d_model)", self.d_model)
        with full_precision(inputs.device):
            dtype = self._compute_dtype(inputs)
            outputs = self._respond(inputs.to(dtype))
        return outputs.to(inputs.dtype)

    def _respond(self, u: Tensor) -> Tensor:
        if wants_plain_operations():
            chunk: int | None = CHUNK
        elif u.device.type == "cpu":
            chunk = bank_chunk(u.shape[0], u.shape[1], self.A_imag.shape[1])
        else:  # only on a CPU was it measured which form is faster
            chunk = None
        if chunk is not None:
            re, im, gain_re, gain_im = self._discrete()
            weights = self._read_out(gain_re, gain_im)
            return chunked_bank(chunk, u, (re, im), weights, self.D)
        convolved: Tensor = causal_convolution(u, self._kernel(u.shape[1], u.dtype))
        return convolved + self.D.to(u.dtype) * u

    def step(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Advance by one step; equal to :meth:`forward` when applied along a sequence.

        Args:
            inputs: (batch, d_model) real.
            state: (batch, d_model, N) complex, from :meth:`initial_state` or the step before.

        Returns:
            The output (batch, d_model), in the dtype of ``inputs``, and the next state.

        Raises:
            TypeError: ``inputs`` is not real floating-point, or ``state`` is not complex.
            ValueError: a shape does not fit.
        """
        check_inputs("S4D", inputs, "(batch, d_model)", self.d_model)
        check_state(state, "(batch, d_model, N)", (len(inputs), *self.A_imag.shape))
        with full_precision(inputs.device):
            dtype = self._compute_dtype(inputs)
            re, im, gain_re, gain_im = (part.to(dtype) for part in self._discrete())
            u = inputs.to(dtype)
            driven = torch.complex(gain_re, gain_im) * u.unsqueeze(-1)
            state = torch.complex(re, im) * state.to(driven.dtype) + driven
            weights = self.C.to(dtype)
            read = (weights[..., 0] * state.real - weights[..., 1] * state.imag).sum(-1)
            outputs = 2 * read + self.D.to(dtype) * u
        return outputs.to(inputs.dtype), state

    def initial_state(self, batch: int) -> Tensor:
        """Return the zero state, (batch, d_model, N) complex, on the layer's device."""
        dtype = torch.promote_types(self.C.dtype, torch.float32).to_complex()
        return torch.zeros(batch, *self.A_imag.shape, dtype=dtype, device=self.C.device)

    def extra_repr(self) -> str:
        """Name the sizes in the module's printed form."""
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, "
            f"discretization={self.discretization!r}"
        )

    def _compute_dtype(self, inputs: Tensor) -> torch.dtype:
        dtype = torch.promote_types(inputs.dtype, self.C.dtype)
        return torch.promote_types(dtype, torch.float32)

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Eigenvalues and input gains, real and imaginary parts, (H, N)."""
        # In float32 an eigenvalue near the unit circle would lose its digits.
        wide = wide_dtype(self.C.device)
        step = self.log_dt.to(wide).exp().unsqueeze(-1)
        decay, frequency = self.log_A_real.to(wide).exp(), self.A_imag.to(wide)
        return discretize(decay, frequency, step, self.discretization)

    def _read_out(self, gain_re: Tensor, gain_im: Tensor) -> tuple[Tensor, Tensor]:
        """2 C times the input gains, real and imaginary part, (H, N)."""
        c_re, c_im = (2 * self.C.to(gain_re.dtype)).unbind(-1)
        return gain_re * c_re - gain_im * c_im, gain_re * c_im + gain_im * c_re

    def _kernel(self, length: int, dtype: torch.dtype) -> Tensor:
        """Powers lambda^(iQ + j) = lambda^(iQ) lambda^j, so the kernel is a matrix product."""
        re, im, gain_re, gain_im = self._discrete()
        chunk = math.isqrt(length - 1) + 1
        inner_re, inner_im, top_re, top_im = powers_by_doubling(re, im, chunk)
        outer_re, outer_im, _, _ = powers_by_doubling(top_re, top_im, -(-length // chunk))
        weight_re, weight_im = (w.unsqueeze(-1) for w in self._read_out(gain_re, gain_im))
        rows_re = weight_re * outer_re - weight_im * outer_im
        rows_im = weight_re * outer_im + weight_im * outer_re
        rows = torch.cat((rows_re, -rows_im), 1).mT.to(dtype)
        columns = torch.cat((inner_re, inner_im), 1).to(dtype)
        return batched_product(rows, columns).flatten(1)[:, :length]


def _frequencies(init: str, states: int) -> Tensor:
    """Imaginary parts of A, (N,) float64."""
    n = torch.arange(states, dtype=torch.float64, device="cpu")
    if init == "lin":
        return math.pi * n
    if init == "inv":
        return 2 * states / math.pi * (2 * states / (2 * n + 1) - 1)
    if init == "quad":
        return (2 * n + 1).square() / math.pi
    return hippo_normal(states)[0]
