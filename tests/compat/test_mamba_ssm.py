"""mamba-ssm's own modules on a CPU: values, gradients, steps, generation, import orders."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compressm.compat import enable_mamba_ssm_cpu
from tests.compat.blocks import naive_mamba, naive_mamba2
from tests.nn._reference import relative_error

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mamba_ssm") is None,
    reason="mamba-ssm is not installed; `make install` builds it without CUDA",
)

MAMBA2 = [
    {},
    {"ngroups": 2},
    {"ngroups": 2, "rmsnorm": False},
    {"D_has_hdim": True, "norm_before_gate": True},
    {"dt_limit": (0.01, 0.05), "ngroups": 4},
    {"d_ssm": 16, "rmsnorm": False},
    {"d_ssm": 16, "ngroups": 2},
]


@pytest.fixture(scope="module")
def mamba() -> SimpleNamespace:
    """The public classes of mamba-ssm."""
    enable_mamba_ssm_cpu()
    package = importlib.import_module("mamba_ssm")
    config = importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig
    params = importlib.import_module("mamba_ssm.utils.generation").InferenceParams
    return SimpleNamespace(
        Mamba=package.Mamba,
        Mamba2=package.Mamba2,
        LM=package.MambaLMHeadModel,
        Config=config,
        InferenceParams=params,
    )


def vary(layer: nn.Module) -> Any:
    """Move every parameter off its initial value: ones and zeros hide mistakes."""
    with torch.no_grad():
        for value in layer.parameters():
            value += 0.1 * torch.randn_like(value)
    return layer


def assert_equal_with_gradients(
    layer: nn.Module, naive: Callable[[Any, Tensor], Tensor], inputs: Tensor
) -> None:
    named = {"inputs": inputs.requires_grad_(), **dict(layer.named_parameters())}
    outputs = [layer(inputs), naive(layer, inputs)]
    assert relative_error(outputs[0].double(), outputs[1]) < 1e-5
    weights = torch.randn(outputs[0].shape, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad((y.double() * weights).sum(), list(named.values())) for y in outputs
    )
    for name, value, want in zip(named, found, expected, strict=True):
        assert relative_error(value.double(), want.double()) < 1e-4, name


@pytest.mark.parametrize("fast", [True, False])
def test_mamba(mamba: SimpleNamespace, fast: bool):
    layer = vary(mamba.Mamba(16, d_state=5, use_fast_path=fast))
    assert_equal_with_gradients(layer, naive_mamba, torch.randn(2, 37, 16))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", MAMBA2, ids=str)
def test_mamba2(mamba: SimpleNamespace, options: dict[str, Any], fused: bool):
    layer = mamba.Mamba2(16, d_state=6, headdim=4, use_mem_eff_path=fused, **options)
    assert_equal_with_gradients(vary(layer), naive_mamba2, torch.randn(2, 70, 16))


def test_mamba_inner_is_the_unfused_block(mamba: SimpleNamespace):
    """Only with causal-conv1d does Mamba call it, but transformers calls it in training."""
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    layer = vary(mamba.Mamba(16, d_state=5))
    inputs = torch.randn(2, 9, 16)
    y = interface.mamba_inner_fn(
        (inputs @ layer.in_proj.weight.T).mT,
        layer.conv1d.weight,
        layer.conv1d.bias,
        layer.x_proj.weight,
        layer.dt_proj.weight,
        layer.out_proj.weight,
        layer.out_proj.bias,
        -torch.exp(layer.A_log),
        D=layer.D,
        delta_bias=layer.dt_proj.bias,
    )
    assert relative_error(y.double(), naive_mamba(layer, inputs)) < 1e-5


def test_packed_sequences_stay_apart(mamba: SimpleNamespace):
    layer = vary(mamba.Mamba2(16, d_state=6, headdim=4, ngroups=2))
    inputs, lengths = torch.randn(1, 20, 16), [3, 12, 5]
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].int()
    packed = layer(inputs, seq_idx=seq_idx)
    apart = torch.cat([layer(part) for part in inputs.split(lengths, 1)], 1)
    assert relative_error(packed, apart) < 1e-5
    assert relative_error(layer(inputs), apart) > 1e-3


def layers_that_step(mamba: SimpleNamespace) -> list[nn.Module]:
    # With D_has_hdim mamba-ssm's own step does not work.
    options = [o for o in MAMBA2 if "D_has_hdim" not in o and "dt_limit" not in o]
    two = [mamba.Mamba2(16, d_state=6, headdim=4, layer_idx=0, **o) for o in options]
    return [mamba.Mamba(16, d_state=5, layer_idx=0), *two]


def test_steps_equal_the_parallel_form(mamba: SimpleNamespace):
    for layer in layers_that_step(mamba):
        inputs = torch.randn(2, 9, 16)
        state = vary(layer).allocate_inference_cache(2, 9)
        with torch.no_grad():
            steps = [layer.step(now, *state)[0] for now in inputs.split(1, dim=1)]
            assert relative_error(torch.cat(steps, 1), layer(inputs)) < 1e-5


def test_prefill_then_steps(mamba: SimpleNamespace):
    for layer in layers_that_step(mamba):
        inputs, params = torch.randn(2, 9, 16), mamba.InferenceParams(9, 2)
        vary(layer)
        with torch.no_grad():
            parts = [layer(inputs[:, :6], inference_params=params)]
            for k in range(6, 9):
                params.seqlen_offset = k
                parts.append(layer(inputs[:, k : k + 1], inference_params=params))
            assert relative_error(torch.cat(parts, 1), layer(inputs)) < 1e-5


def language_model(mamba: SimpleNamespace, kind: str, **options: Any) -> nn.Module:
    ssm = {"layer": kind, "d_state": 6, **({"headdim": 8} if kind == "Mamba2" else {})}
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 24, "d_intermediate": 20} | options
    return mamba.LM(mamba.Config(ssm_cfg=ssm, **config))


@pytest.mark.parametrize("kind", ["Mamba1", "Mamba2"])
def test_language_model_learns(mamba: SimpleNamespace, kind: str):
    model = language_model(mamba, kind)
    tokens = torch.randint(0, 24, (4, 33))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        logits = model(tokens[:, :-1]).logits
        loss = F.cross_entropy(logits[..., :24].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not missing
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("fp32", [True, False])
def test_fused_and_separate_norms_agree(mamba: SimpleNamespace, rms: bool, fp32: bool):
    fused, separate = (
        language_model(mamba, "Mamba1", fused_add_norm=fused, rms_norm=rms, residual_in_fp32=fp32)
        for fused in (True, False)
    )
    separate.load_state_dict(vary(fused).state_dict())
    tokens = torch.randint(0, 24, (2, 11))
    assert relative_error(separate(tokens).logits, fused(tokens).logits) < 1e-5


@pytest.mark.parametrize("kind", ["Mamba1", "Mamba2"])
def test_generate_equals_uncached_decoding(mamba: SimpleNamespace, kind: str):
    model = vary(language_model(mamba, kind)).eval()
    tokens = torch.randint(0, 24, (3, 5))
    generated = model.generate(tokens, max_length=15, top_k=1)
    expected = tokens
    with torch.no_grad():
        for _ in range(10):
            following = model(expected).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, following], 1)
    assert torch.equal(generated, expected)
    assert len(generated.unique()) > 3, "a constant output would prove nothing"


@pytest.mark.parametrize("kind", ["Mamba1", "Mamba2"])
def test_autocast(mamba: SimpleNamespace, kind: str):
    model = vary(language_model(mamba, kind))
    tokens = torch.randint(0, 24, (2, 40))
    expected = model(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens).logits
    logits.float().logsumexp(-1).sum().backward()
    assert relative_error(logits.float(), expected) < 0.05
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_every_module_that_bound_a_kernel_gets_the_same_wrapper(mamba: SimpleNamespace):
    def bound() -> dict[str, int]:
        names = {
            "selective_scan_fn": ["ops.selective_scan_interface", "modules.mamba_simple"],
            "mamba_inner_fn": ["ops.selective_scan_interface", "modules.mamba_simple"],
            "selective_state_update": ["modules.mamba_simple", "modules.mamba2"],
            "mamba_chunk_scan_combined": ["ops.triton.ssd_combined", "modules.mamba2"],
            "mamba_split_conv1d_scan_combined": ["ops.triton.ssd_combined", "modules.mamba2"],
            "layer_norm_fn": ["ops.triton.layer_norm", "modules.block", "models.mixer_seq_simple"],
            "rms_norm_fn": ["ops.triton.layer_norm", "models.mixer_seq_simple"],
            "rmsnorm_fn": ["ops.triton.layernorm_gated", "ops.triton.ssd_combined"],
        }
        found = {}
        for name, modules in names.items():
            loaded = [importlib.import_module(f"mamba_ssm.{module}") for module in modules]
            values = [getattr(module, name) for module in loaded]
            assert all(value is values[0] for value in values), name
            assert hasattr(values[0], "__wrapped__"), name
            assert not hasattr(values[0].__wrapped__, "__wrapped__"), name
            found[name] = id(values[0])
        return found

    once = bound()
    enable_mamba_ssm_cpu()
    assert bound() == once


def test_the_missing_extension_explains_itself(mamba: SimpleNamespace):
    extension = importlib.import_module("selective_scan_cuda")
    if getattr(extension, "__file__", None):
        pytest.skip("mamba-ssm is installed with its CUDA extension")
    with pytest.raises(RuntimeError, match="install mamba-ssm with CUDA, or move"):
        extension.fwd  # noqa: B018


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
def test_cuda_tensors_go_to_the_kernels_and_agree(mamba: SimpleNamespace, kind: str):
    extension = importlib.import_module("selective_scan_cuda")
    if kind == "Mamba" and not getattr(extension, "__file__", None):
        pytest.skip("mamba-ssm is installed without its CUDA extension")
    options = {"headdim": 16, "use_mem_eff_path": False} if kind == "Mamba2" else {}
    layer = vary(getattr(mamba, kind)(64, d_state=16, **options))
    inputs = torch.randn(2, 70, 64)
    expected = layer(inputs)
    assert relative_error(layer.cuda()(inputs.cuda()).cpu(), expected) < 1e-2


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


TRANSFORMERS = """
def transformers_result():
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
    torch.set_num_threads(1)
    results = []
    common = dict(vocab_size=24, hidden_size=16, state_size=6, num_hidden_layers=2)
    for cls, config in (
        (MambaForCausalLM, MambaConfig(**common)),
        (Mamba2ForCausalLM, Mamba2Config(head_dim=8, num_heads=4, n_groups=2, **common)),
    ):
        torch.manual_seed(0)
        model = cls(config)
        tokens = torch.randint(1, 24, (2, 9))
        for mode in (True, False):
            model.train(mode)
            loss = model(tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            results.append(loss.item())
        results.append(sum(p.grad.abs().sum().item() for p in model.parameters()))
        results += model.generate(tokens, max_new_tokens=6, do_sample=False).flatten().tolist()
    print(results)
"""
STUB = """
import sys, types
sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
"""
ENABLE = """
from lightning_compressm.compat import enable_mamba_ssm_cpu
enable_mamba_ssm_cpu()
"""
MODELS = """
import transformers.models.mamba.modeling_mamba, transformers.models.mamba2.modeling_mamba2
"""
USE = """
import torch
from mamba_ssm import Mamba
assert Mamba(8)(torch.ones(1, 3, 8)).isfinite().all()
"""
BOUND = """
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
"""
USE_BOUND = """
import torch
one = torch.ones(1, 2, 3)
assert selective_scan_fn(one, one, -torch.ones(2, 1), one[:, :1], one[:, :1]).isfinite().all()
"""
ORDERS = {
    "enabled first": ENABLE + TRANSFORMERS + USE,
    "transformers first": MODELS + ENABLE + TRANSFORMERS + USE,
    "kernels bound by transformers first": STUB + MODELS + ENABLE + TRANSFORMERS + USE,
    "kernels bound by the user first": STUB + BOUND + ENABLE + TRANSFORMERS + USE + USE_BOUND,
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_orders_of_import_with_transformers(order: str):
    """transformers binds kernels when it is imported; results must be those of its own code."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    call = "\ntransformers_result()\n"
    hidden = 'import sys\nsys.modules["mamba_ssm"] = None\n'
    expected = eval(run(hidden + TRANSFORMERS + call))
    found = eval(run(ORDERS[order] + call))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_causal_conv1d_is_replaced_where_it_is_installed(tmp_path: Path):
    """With that package, Mamba and Mamba2 call it instead of torch's convolution."""
    (tmp_path / "causal_conv1d").mkdir()
    (tmp_path / "causal_conv1d" / "__init__.py").write_text(
        textwrap.dedent(
            """
            def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
                raise AssertionError("kernel called")

            def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None):
                raise AssertionError("kernel called")
            """
        )
    )
    code = """
        import sys, torch
        sys.path.insert(0, PATH)
        from lightning_compressm.compat import enable_mamba_ssm_cpu
        enable_mamba_ssm_cpu()
        from mamba_ssm import Mamba, Mamba2
        from mamba_ssm.modules import mamba_simple
        from tests.compat.blocks import naive_mamba, naive_mamba2
        assert mamba_simple.causal_conv1d_fn is not None
        for naive, layer in (
            (naive_mamba, Mamba(16)),
            (naive_mamba, Mamba(16, use_fast_path=False)),
            (naive_mamba2, Mamba2(16, headdim=8, d_state=8)),
            (naive_mamba2, Mamba2(16, headdim=8, d_state=8, use_mem_eff_path=False)),
        ):
            u = torch.randn(2, 9, 16)
            y, expected = layer(u), naive(layer, u)
            assert torch.allclose(y.double(), expected, atol=1e-5), (layer, y - expected)
            state = layer.allocate_inference_cache(2, 9)
            steps = torch.cat([layer.step(now, *state)[0] for now in u.split(1, 1)], 1)
            assert torch.allclose(steps.double(), expected, atol=1e-5)
        print("done")
    """
    assert run(code.replace("PATH", repr(str(tmp_path)))) == "done"
