"""The gated delta rule and attention with a fixed decay: chunks against step by step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compressm.nn._delta import gated_delta_rule, unit
from lightning_compressm.nn._fixed_decay import decaying_attention
from tests.nn._reference import relative_error

LENGTHS = (1, 63, 64, 65, 150)


def delta_by_steps(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    state = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
    outputs, written = [], []
    for t in range(v.shape[1]):
        state = state * log_decay[:, t, :, None, None].exp()
        known = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        new = beta[:, t, :, None] * (v[:, t] - known)
        state = state + k[:, t, :, :, None] * new[:, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        written.append(new)
    return torch.stack(outputs, 1), torch.stack(written, 1)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("strength", [0.01, 3.0, 200.0], ids=["long", "short", "none"])
def test_the_delta_rule_in_chunks_is_that_of_single_steps(length: int, strength: float):
    shape = (2, length, 3)
    q, k = (torch.randn(*shape, 5, dtype=torch.float64) for _ in range(2))
    v = torch.randn(*shape, 4, dtype=torch.float64)
    log_decay = -strength * torch.rand(shape, dtype=torch.float64)
    beta = 2 * torch.rand(shape, dtype=torch.float64)
    given = [t.requires_grad_() for t in (q, k, v, log_decay, beta)]
    results = [
        run(given[0], unit(given[1]), *given[2:]) for run in (gated_delta_rule, delta_by_steps)
    ]
    weights = [torch.randn(v.shape, dtype=torch.float64) for _ in range(2)]
    gradients = []
    for pair in results:
        total = sum((part * w).sum() for part, w in zip(pair, weights, strict=True))
        assert isinstance(total, Tensor)
        gradients.append(torch.autograd.grad(total, given))
    for found, wanted in (*zip(*results, strict=True), *zip(*gradients, strict=True)):
        assert relative_error(found, wanted) < 1e-9 or float(wanted.abs().max()) < 1e-12


def test_what_is_written_drives_the_state():
    """S_t = a S_{t-1} + k w^T and o = S^T q hold for what comes back as w."""
    q, v = torch.randn(1, 70, 2, 3), torch.randn(1, 70, 2, 4)
    k, beta = unit(torch.randn(1, 70, 2, 3)), torch.rand(1, 70, 2)
    log_decay = -torch.rand(1, 70, 2)
    outputs, written = gated_delta_rule(q, k, v, log_decay, beta)
    state = torch.zeros(1, 2, 3, 4)
    for t in range(70):
        state = log_decay[:, t, :, None, None].exp() * state
        state = state + k[:, t, :, :, None] * written[:, t, :, None]
        wanted = torch.einsum("bhkv,bhk->bhv", state, q[:, t])
        torch.testing.assert_close(outputs[:, t], wanted, rtol=1e-4, atol=1e-5)


def attention_by_steps(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(v.shape[2]):
        state = (-rate).exp() * state + k[:, :, t, :, None] * v[:, :, t, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    return torch.stack(outputs, 2), state


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("start", [False, True], ids=["from zero", "from a state"])
def test_fixed_decay_in_chunks_is_that_of_single_steps(length: int, start: bool):
    q, k = (torch.randn(2, 3, length, 5, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 3, length, 4, dtype=torch.float64)
    rate = torch.tensor([1e-4, 0.3, 50.0], dtype=torch.float64).view(3, 1, 1)
    state = torch.randn(2, 3, 5, 4, dtype=torch.float64) * float(start)
    given = [t.requires_grad_() for t in (q, k, v)]
    outputs, last = decaying_attention(*given, rate, state if start else None)
    wanted, wanted_last = attention_by_steps(*given, rate, state)
    assert relative_error(outputs, wanted) < 1e-12
    assert relative_error(last, wanted_last) < 1e-12
    weights = F.normalize(torch.randn(v.shape, dtype=torch.float64), dim=-1)
    for found, want in zip(
        torch.autograd.grad((outputs * weights).sum(), given),
        torch.autograd.grad((wanted * weights).sum(), given),
        strict=True,
    ):
        assert relative_error(found, want) < 1e-12
