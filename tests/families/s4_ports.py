"""Kernels with the parameters of the state-spaces/s4 code, and the layer around them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NAMES = {
    4: ("inv_dt", "A_real", "A_imag", -1, "l_kernel"),
    3: ("log_dt", "inv_A_real", "A_imag", 1, ""),
    2: ("log_dt", "inv_w_real", "w_imag", 1, "L"),
}
_TRANSFORMS = {
    "exp": (torch.exp, torch.log),
    "softplus": (F.softplus, lambda x: torch.log(torch.expm1(x))),
    "none": (lambda x: x, lambda x: x),
}


def legs(states: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS of 2N states as diagonal plus low rank: A, P, B of one half of the pairs."""
    n = torch.arange(2 * states, dtype=torch.float64)
    rows = (2 * n + 1).sqrt()
    dense = -torch.tril(torch.outer(rows, rows), -1) - torch.diag(n + 1)
    P, B = (n + 0.5).sqrt(), rows
    normal = dense + torch.outer(P, P)
    decay = normal.diagonal().mean()
    frequencies, vectors = torch.linalg.eigh(-1j * (normal - decay * torch.eye(2 * states)))
    half = vectors[:, :states].mH
    A = torch.complex(decay.expand(states), frequencies[:states])
    return A, half @ P.to(half.dtype), half @ B.to(half.dtype)


class S4Kernel(nn.Module):
    """A kernel of H systems with ``channels`` outputs, for a length: (channels, H, L).

    With a rank it is diagonal plus low rank and bilinear, and C is prepared for one length, which
    doubles where a longer one is asked for; without, it is diagonal.
    """

    def __init__(
        self,
        width: int,
        states: int,
        *,
        channels: int = 1,
        rank: int = 0,
        release: int = 4,
        copies: int | None = None,
        learned: bool = True,
        **flags: Any,
    ) -> None:
        super().__init__()
        self.H, self.N, self.channels, self.rank = width, states, channels, rank
        self.n_ssm = copies or width
        self.repeat = width // self.n_ssm
        self.disc, self.dt_tie, self.dt_fast, self.bandlimit = "zoh", True, False, None
        self.dt_transform = self.real_transform = "exp"
        self.imag_transform, self.is_real = "none", False
        for name, value in flags.items():
            setattr(self, name, value)
        self.names, self.learned = _NAMES[release], learned
        step, decay, frequency, sign, length = self.names
        steps = torch.linspace(math.log(0.02), math.log(0.3), width).exp().unsqueeze(-1)
        if not self.dt_tie:
            steps = steps * torch.linspace(0.7, 1.4, states)
        parameter = _TRANSFORMS[self.dt_transform][1](steps)
        parameter = torch.asinh(parameter) if self.dt_fast else parameter
        shape = (self.n_ssm, states)
        imag = math.pi * (torch.arange(states) + torch.rand(shape) / 2 + 0.4)
        self._add(step, parameter.squeeze(-1) if release < 4 else parameter)
        self._add(decay, _TRANSFORMS[self.real_transform][1](0.3 + torch.rand(shape)))
        self._add(frequency, -sign * imag)
        self._add("B", torch.randn(*(() if release == 3 else (1,)), *shape, 2))
        self.C = nn.Parameter(torch.randn(channels, width, states, 2))
        if rank:
            self._add("P", 0.3 * torch.randn(rank, *shape, 2))
            self.register_buffer(length, torch.tensor(0))

    def _add(self, name: str, value: Tensor) -> None:
        if not self.learned:
            self.register_buffer(name, value)
            return
        self.register_parameter(name, nn.Parameter(value))
        self.get_parameter(name)._optim = {"weight_decay": 0.0, "lr": 1e-3}

    @torch.no_grad()
    def start_as_legs(self) -> S4Kernel:
        """Set A, P and B, as layers of this kind start."""
        A, P, B = legs(self.N)
        _, decay, frequency, sign, _ = self.names
        self.get_parameter(decay).copy_(_TRANSFORMS[self.real_transform][1](-A.real))
        self.get_parameter(frequency).copy_(sign * A.imag)
        self.P.copy_(torch.view_as_real(P))
        self.B.copy_(torch.view_as_real(B))
        return self

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """A (H, 2N, 2N), B (H, 2N), C as it is kept (channels, H, 2N), in discrete time."""
        step, decay, frequency, sign, _ = self.names
        parameter = getattr(self, step)
        steps = parameter.sinh() if self.dt_fast else parameter
        steps = _TRANSFORMS[self.dt_transform][0](steps).view(self.H, -1).expand(-1, self.N)
        real = -_TRANSFORMS[self.real_transform][0](getattr(self, decay))
        poles = _both(torch.complex(real, sign * getattr(self, frequency)))
        poles, B = (x.repeat(self.repeat, 1) for x in (poles, _both(self.B.view(-1, self.N, 2))))
        steps, C = torch.cat((steps, steps), -1), _both(self.C)
        if self.disc == "zoh" and not self.rank:
            return (
                torch.diag_embed(torch.exp(steps * poles)),
                torch.expm1(steps * poles) / poles * B,
                C,
            )
        A = torch.diag_embed(poles)
        if self.rank:
            P = _both(self.P).repeat(1, self.repeat, 1)
            A = A - torch.einsum("rhm,rhn->hmn", P, P.conj())
        half, eye = steps.unsqueeze(-1) / 2 * A, torch.eye(2 * self.N, dtype=A.dtype)
        return (
            torch.linalg.solve(eye - half, eye + half),
            torch.linalg.solve(eye - half, steps * B),
            C,
        )

    @torch.no_grad()
    def _prepare(self, length: int) -> None:
        known = int(getattr(self, self.names[4]))
        while known < length:
            A, _, C = self.dense()
            new = 2 * known if known else length
            ahead = torch.linalg.matrix_power(A, known or length)
            moved = torch.einsum("chn,hnm->chm", C, ahead)
            C = (C + moved if known else C - moved)[..., : self.N]
            self.C.copy_(torch.view_as_real(C))
            known = new
            getattr(self, self.names[4]).fill_(known)

    def forward(
        self, state: Tensor | None = None, rate: float = 1.0, L: int | None = None
    ) -> tuple[Tensor, None]:
        assert L is not None
        if not self.rank:
            A, B, C = self.dense()
            powers = A.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) ** torch.arange(L)
            return torch.einsum("chn,hn,hnl->chl", C, B, powers).real, None
        self._prepare(L)
        A, B, C = self.dense()
        length = int(getattr(self, self.names[4]))
        turns = torch.arange(length, dtype=torch.float64) / length
        nodes = torch.exp(-2j * math.pi * turns).to(A.dtype)
        resolvents = torch.eye(2 * self.N) - nodes.view(-1, 1, 1, 1) * A
        states = torch.linalg.solve(resolvents, B.unsqueeze(-1)).squeeze(-1)
        spectrum = torch.einsum("chn,lhn->chl", C, states)
        return torch.fft.ifft(spectrum)[..., :L].real, None

    def setup_step(self) -> None:
        """Keep the matrices that a step needs."""
        with torch.no_grad():
            self.dA, self.dB, C = self.dense()
            length = int(getattr(self, self.names[4])) if self.rank else 0
            if length:
                eye = torch.eye(2 * self.N, dtype=C.dtype)
                C = torch.linalg.solve(
                    eye - torch.linalg.matrix_power(self.dA, length), C.movedim(1, 0), left=False
                ).movedim(0, 1)
            self.dC = C

    def recurrence(self, inputs: Tensor) -> Tensor:
        """What (batch, H, L) gives, one step after the other: (batch, channels, H, L)."""
        self.setup_step()
        state = inputs.new_zeros(len(inputs), self.H, 2 * self.N, dtype=self.dA.dtype)
        outputs = []
        for u in inputs.unbind(-1):
            state = torch.einsum("hmn,bhn->bhm", self.dA, state) + self.dB * u.unsqueeze(-1)
            outputs.append(torch.einsum("chn,bhn->bch", self.dC, state).real)
        return torch.stack(outputs, -1)


class S4Layer(nn.Module):
    """A layer around the kernel, on (batch, H, L); channels add up."""

    def __init__(
        self, width: int, states: int, *, bidirectional: bool = False, l_max: int | None = None,
        **arguments: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        channels = 2 if bidirectional else arguments.pop("channels", 1)
        self.bidirectional, self.l_max = bidirectional, l_max
        self.kernel = S4Kernel(width, states, channels=channels, **arguments)
        self.D = nn.Parameter(torch.randn(width))
        self.out = nn.Linear(width, width)

    def convolved(self, u: Tensor) -> Tensor:
        """The part that states make."""
        length = u.shape[-1]
        used = length if self.l_max is None else min(length, self.l_max)
        kernel, _ = self.kernel(L=used, rate=1.0, state=None)
        if self.bidirectional:
            there, back = (_causal(k, v) for k, v in ((kernel[0], u), (kernel[1], u.flip(-1))))
            return there + back.flip(-1)
        return sum(_causal(k, u) for k in kernel)

    def forward(self, u: Tensor) -> Tensor:
        return self.out((self.convolved(u) + self.D.unsqueeze(-1) * u).mT).mT


def _causal(kernel: Tensor, inputs: Tensor) -> Tensor:
    size = kernel.shape[-1] + inputs.shape[-1]
    spectrum = torch.fft.rfft(kernel, n=size) * torch.fft.rfft(inputs, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., : inputs.shape[-1]]


def _both(values: Tensor) -> Tensor:
    """Conjugate pairs of what is one half of them, or of pairs of real numbers."""
    half = values if values.is_complex() else torch.view_as_complex(values)
    return torch.cat((half, half.conj()), -1)
