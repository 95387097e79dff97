"""What replaces the kernels on a CPU, function by function; needs neither package."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_compressm.compat import (
    _convolutions,
    _mamba_ssm,
    _norms,
    _scans,
    enable_mamba_ssm_cpu,
)
from tests.compat.blocks import naive_conv
from tests.nn._reference import relative_error


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_causal_conv(length: int):
    x, weight, bias = double(2, 6, length), double(6, 4), double(6)
    y = _convolutions.causal_conv1d_fn(x, weight, bias, activation="silu")
    assert relative_error(y, naive_conv(x, weight[:, None], bias)) < 1e-12


def test_causal_conv_keeps_packed_sequences_apart():
    x, weight, bias = double(1, 6, 12), double(6, 4), double(6)
    lengths = [2, 7, 3]
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    y = _convolutions.causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
    apart = [naive_conv(part, weight[:, None], bias) for part in x.split(lengths, -1)]
    assert relative_error(y, torch.cat(apart, -1)) < 1e-12


def test_causal_conv_step_by_step():
    x, weight, bias = double(2, 6, 9), double(6, 4), double(6)
    state = torch.zeros(2, 6, 4, dtype=torch.float64)
    steps = [
        _convolutions.causal_conv1d_update(now, state, weight, bias, "silu") for now in x.unbind(-1)
    ]
    assert relative_error(torch.stack(steps, -1), naive_conv(x, weight[:, None], bias)) < 1e-12
    assert torch.equal(state, x[..., -4:])


def test_callers_can_take_views_of_a_scan():
    x, B = double(2, 9, 4, 3), double(2, 9, 1, 5)
    result = _scans.mamba_chunk_scan_combined(x, double(2, 9, 4), -double(4).abs(), B, B)
    assert result.view(2, 9, -1).shape == (2, 9, 12)


@pytest.mark.parametrize("groups", [1, 2])
def test_state_update_with_heads(groups: int):
    state, x, dt, z = double(2, 4, 3, 5), *(double(2, 4, 3) for _ in range(3))
    A, B, C = -double(4, 3, 5).abs(), double(2, groups, 5), double(2, groups, 5)
    D, bias = double(4, 3), double(4, 3)
    step = F.softplus(dt + bias)[..., None]
    b, c = (t.repeat_interleave(4 // groups, 1)[:, :, None] for t in (B, C))
    expected = state * torch.exp(step * A) + step * b * x[..., None]
    y = ((expected * c).sum(-1) + D * x) * z * torch.sigmoid(z)
    result = _scans.selective_state_update(state, x, dt, A, B, C, D, z, bias, True)
    assert relative_error(result, y) < 1e-12
    assert relative_error(state, expected) < 1e-12


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("in_fp32", [False, True])
def test_norm_with_residual(rms: bool, in_fp32: bool):
    x, weight, bias = (torch.randn(s).bfloat16() for s in ((2, 5, 8), (8,), (8,)))
    residual = torch.randn(2, 5, 8)
    total = x.double() + residual.double()
    centred = total if rms else total - total.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = expected * weight.double() + bias.double()
    y, kept = _norms.layer_norm_fn(
        x, weight, bias, residual, eps=1e-5, prenorm=True, is_rms_norm=rms
    )
    assert (y.dtype, kept.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(y.double(), expected) < 1e-2
    assert relative_error(kept.double(), total) < 1e-6
    # Without a residual the sum is in float32 only where that is asked for.
    _, kept = _norms.layer_norm_fn(
        x, weight, bias, prenorm=True, residual_in_fp32=in_fp32, is_rms_norm=rms
    )
    assert kept.dtype == (torch.float32 if in_fp32 else torch.bfloat16)
    alone = _norms.layer_norm_fn(x, weight, bias, residual, eps=1e-5, is_rms_norm=rms)
    assert torch.equal(alone, y)


def test_norm_applies_dropout_and_row_scales():
    x, weight = torch.ones(400, 8), torch.ones(8)
    scale = torch.arange(400.0)
    _, kept = _norms.rms_norm_fn(x, weight, None, rowscale=scale, prenorm=True)
    assert torch.equal(kept, scale[:, None].expand(-1, 8))
    _, kept = _norms.rms_norm_fn(x, weight, None, dropout_p=0.5, prenorm=True)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (kept == 0).double().mean() < 0.6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t: _norms.layer_norm_fn(t, t, None, x1=t), "x1"),
        (lambda t: _norms.rms_norm_fn(t, t, None, return_dropout_mask=True), "dropout_mask"),
        (lambda t: _convolutions.causal_conv1d_fn(t, t, initial_states=t), "initial_states"),
        (lambda t: _convolutions.causal_conv1d_update(t, t, t, cache_seqlens=t), "cache_seqlens"),
        (
            lambda t: _scans.selective_state_update(t, t, t, t, t, t, state_batch_indices=t),
            "state_batch_indices",
        ),
        (
            lambda t: _scans.mamba_chunk_scan_combined(
                t, t, t, t, t, 64, return_varlen_states=True
            ),
            "return_varlen_states",
        ),
    ],
)
def test_what_only_kernels_can_do_is_refused(call: Any, words: str):
    with pytest.raises(NotImplementedError, match=words):
        call(torch.ones(2, 2))


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="silu"):
        _convolutions.causal_conv1d_fn(torch.ones(1, 2, 3), torch.ones(2, 4), activation="gelu")


def test_mamba_inner_leaves_normed_projections_to_the_caller():
    t = torch.ones(2, 4)
    assert _scans.mamba_inner_fn(t, t, t, t, t, t, t, t, b_rms_weight=t) is None


def test_only_cpu_tensors_are_diverted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_mamba_ssm, "_dispatchers", {})

    def kernel(x: torch.Tensor, scale: float = 1.0) -> str:
        """Documented."""
        return f"kernel {scale}"

    _mamba_ssm._register(kernel, lambda x, scale=1.0: f"reference {scale}")
    (_, dispatch), *rest = _mamba_ssm._dispatchers.values()
    assert not rest
    assert dispatch.__doc__ == "Documented."
    assert dispatch(torch.ones(1), 2.0) == "reference 2.0"
    assert dispatch(x=torch.ones(1), scale=3.0) == "reference 3.0"
    assert dispatch(torch.ones(1, device="meta"), scale=4.0) == "kernel 4.0"
    _mamba_ssm._register(dispatch, lambda x: "twice")
    assert len(_mamba_ssm._dispatchers) == 1


def test_without_mamba_ssm_the_error_says_how_to_install(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="MAMBA_SKIP_CUDA_BUILD=TRUE pip install"):
        enable_mamba_ssm_cpu()
