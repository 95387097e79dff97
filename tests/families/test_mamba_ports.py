"""Mamba blocks that are recognised by their structure: mamba.py's, and those of mamba-minimal."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compressm import compress, find_ssm_layers, load_compressed
from lightning_compressm.errors import CheckpointError, UnsupportedLayerError
from lightning_compressm.model.padding import pad_state_dim
from tests.families.selective import drop_others, relative, scanned, seen, stop_reading

OPTIONS = [
    {},
    {"pscan": False},
    {"inner_layernorms": True},
    {"inner_layernorms": True, "mup": True},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


class MinimalBlock(nn.Module):
    """Laid out as in mamba-minimal: sizes in ``args``, N read off ``A_log``, a plain loop."""

    def __init__(self, d_model: int, d_state: int, dt_rank: int = 2) -> None:
        super().__init__()
        inner = 2 * d_model
        self.args = SimpleNamespace(d_model=d_model, d_inner=inner, dt_rank=dt_rank)
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj = nn.Linear(inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, inner)
        self.A_log = nn.Parameter(torch.rand(inner, d_state))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        x, res = self.in_proj(inputs).split(self.args.d_inner, -1)
        x = F.silu(self.conv1d(x.mT)[..., : inputs.shape[1]].mT)
        n = self.A_log.shape[1]
        delta, B, C = self.x_proj(x).split([self.args.dt_rank, n, n], -1)
        delta = F.softplus(self.dt_proj(delta))
        A, state = -torch.exp(self.A_log), x.new_zeros(len(x), self.args.d_inner, n)
        outputs = []
        for k in range(x.shape[1]):
            drive = (delta[:, k] * x[:, k])[..., None] * B[:, k, None]
            state = torch.exp(delta[:, k, :, None] * A) * state + drive
            outputs.append((state * C[:, k, None]).sum(-1))
        y = torch.stack(outputs, 1) + x * self.D
        return self.out_proj(y * F.silu(res))


@torch.no_grad()
def stir(model: nn.Module) -> Any:
    for name, value in model.named_parameters():
        if name.endswith(("x_proj.weight", "A_log", "conv1d.weight")):
            value += 0.4 * torch.randn_like(value)
        if name.endswith("dt_proj.bias"):
            value.uniform_(-2, 0)
    return model


def mamba_py(d_state: int = 8, **options: Any) -> Any:
    package = pytest.importorskip("mambapy.mamba")
    return package.Mamba(package.MambaConfig(16, 2, d_state=d_state, **options))


def minimal() -> nn.Module:
    return nn.Sequential(MinimalBlock(16, 8), MinimalBlock(16, 8))


def reduce(model: nn.Module, x: Tensor, state_dim: int = 3, **options: Any) -> None:
    compress(model, state_dim=state_dim, sample=x, max_output_error=None, **options)


def stepped(model: Any, x: Tensor) -> Tensor:
    config = model.config
    caches = [(None, x.new_zeros(len(x), config.d_inner, config.d_conv - 1)) for _ in model.layers]
    outputs = []
    for step in x.unbind(1):
        y, caches = model.step(step, caches)
        outputs.append(y)
    return torch.stack(outputs, 1)


each_port = pytest.mark.parametrize("make", [mamba_py, minimal], ids=["mamba.py", "mamba-minimal"])


@each_port
def test_states_that_are_not_read_go_without_a_trace(make: Callable[[], Any]):
    model, x = stir(make()), torch.randn(2, 14, 16)
    whole, keep = model(x), stop_reading(model, kept=5)
    before = model(x)
    assert relative(before, whole) > 1e-3
    drop_others(model, keep)
    assert relative(model(x), before) < 1e-6


@each_port
def test_the_signals_are_what_the_block_computes(make: Callable[[], Any]):
    check_signals(stir(make()))


@each_option
def test_the_signals_of_mamba_py(options: dict[str, Any]):
    check_signals(stir(mamba_py(**options)))


def check_signals(model: nn.Module) -> None:
    x = torch.randn(2, 14, 16)
    for layer in find_ssm_layers(model).values():
        module: Any = layer.module
        calls = seen(module, model, x)
        with torch.no_grad():
            signals = layer.family.signals(module, calls[""][0])
        gate = (signals.weight.flatten(2) / module.out_proj.weight.norm(dim=0)).double()
        assert relative(scanned(signals, module.D) * gate, calls["out_proj"][0].double()) < 1e-5


@each_option
def test_the_config_that_blocks_read_follows(options: dict[str, Any]):
    model, x = stir(mamba_py(**options)), torch.randn(2, 14, 16)
    names = {layer.family.name for layer in find_ssm_layers(model).values()}
    assert names == {"Mamba, B and C normalised" if "inner_layernorms" in options else "Mamba"}
    reduce(model, x, share_state_dim=True)
    assert model.config.d_state == 3
    assert relative(stepped(model, x), model(x)) < 1e-5
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    fresh = load_compressed(mamba_py(**options), model.state_dict())
    assert torch.equal(fresh(x), model(x))
    assert fresh.config.d_state == 3


def test_blocks_with_one_config_need_one_state_dim():
    model, x = stir(mamba_py()), torch.randn(2, 14, 16)
    before, tensors = model(x), dict(model.named_parameters())
    with pytest.raises(UnsupportedLayerError, match=r"from one config.*got 8 and 3.*share_state"):
        reduce(model, x, layers=["layers.0.mixer"])
    assert all(tensors[name] is value for name, value in model.named_parameters())
    assert torch.equal(model(x), before)
    other = mamba_py(d_state=3).layers[0].mixer
    uneven = model.state_dict() | {
        f"layers.0.mixer.{name}": value for name, value in other.state_dict().items()
    }
    with pytest.raises(CheckpointError, match="from one config"):
        load_compressed(model, uneven)
    assert torch.equal(model(x), before)


def test_the_config_follows_padding():
    model, x = stir(mamba_py()), torch.randn(2, 14, 16)
    before = model(x)
    pad_state_dim(model, 11)
    assert model.config.d_state == 11
    assert relative(model(x), before) < 1e-6


def test_a_language_model_and_jamba_of_mamba_py():
    lm, jamba = (pytest.importorskip(f"mambapy.{name}") for name in ("lm", "jamba"))
    config = pytest.importorskip("mambapy.mamba").MambaConfig(16, 2, d_state=8)
    hybrid = jamba.JambaLMConfig(
        16,
        3,
        mlp_size=24,
        d_state=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=2,
        attn_layer_period=3,
        attn_layer_offset=2,
        vocab_size=50,
    )
    tokens = torch.randint(0, 50, (2, 12))
    for model in (lm.LM(config, vocab_size=50), jamba.JambaLM(hybrid)):
        reduce(model.eval(), tokens, share_state_dim=True)
        assert {layer.state_dim for layer in find_ssm_layers(model).values()} == {3}
        outputs = model(tokens)
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        assert torch.isfinite(logits).all()


def test_mamba_minimal_needs_no_shared_state_dim():
    model, x = stir(minimal()), torch.randn(2, 14, 16)
    before = model(x)
    reduce(model, x, 6, layers=["0"])
    assert [layer.state_dim for layer in find_ssm_layers(model).values()] == [6, 8]
    assert 0 < relative(model(x), before) < 0.3
    assert torch.equal(load_compressed(minimal(), model.state_dict())(x), model(x))


def test_blocks_that_read_backwards_as_well_are_refused():
    vim = pytest.importorskip("mambapy.vim")
    model, x = vim.VMamba(vim.MambaConfig(16, 1)), torch.randn(2, 14, 16)
    with pytest.raises(UnsupportedLayerError, match="VMambaBlock reads the sequence in both"):
        reduce(model, x)
    one_way = vim.VMamba(vim.MambaConfig(16, 1, bidirectional=False))
    reduce(one_way, x)
    assert torch.isfinite(one_way(x)).all()


def test_blocks_that_normalise_by_a_function_are_refused():
    """transformers below 5.16: B and C are normalised where nobody can see it."""

    class FalconMambaMixer(MinimalBlock):
        rms_eps = 1e-6

    with pytest.raises(UnsupportedLayerError, match=r"FalconMambaMixer.*transformers>=5\.16\.1"):
        compress(FalconMambaMixer(8, 8), state_dim=3, sample=torch.randn(2, 12, 8))
