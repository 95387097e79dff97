"""Tiny models of transformers' selective architectures, built from their configs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compressm import find_ssm_layers

STATES = 8
VOCABULARY = 50


@dataclass(frozen=True)
class Kind:
    """An architecture: its config class, what the config is made of, and how it names N."""

    config: str
    arguments: dict[str, Any]
    states: str
    family: str


_ATTENTION = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_ATTENTION_LAST = {"attn_layer_period": 3, "attn_layer_offset": 2}

KINDS = {
    "mamba": Kind("MambaConfig", {"num_hidden_layers": 2}, "state_size", "Mamba"),
    "falcon_mamba": Kind(
        "FalconMambaConfig", {"num_hidden_layers": 2}, "state_size", "Mamba, B and C normalised"
    ),
    "jamba": Kind(
        "JambaConfig",
        {"num_hidden_layers": 3, "num_experts": 2, **_ATTENTION, **_ATTENTION_LAST},
        "mamba_d_state",
        "Mamba, B and C normalised",
    ),
    "zamba": Kind(
        "ZambaConfig",
        {
            "num_hidden_layers": 4,
            "n_mamba_heads": 2,
            "mamba_dt_rank": 4,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            **_ATTENTION,
        },
        "mamba_d_state",
        "Zamba",
    ),
    "mamba2": Kind(
        "Mamba2Config",
        {"num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "n_groups": 2},
        "state_size",
        "Mamba-2",
    ),
    "bamba": Kind(
        "BambaConfig",
        {"num_hidden_layers": 3, "attn_layer_indices": [1], **_ATTENTION, **_MAMBA2},
        "mamba_d_state",
        "Mamba-2",
    ),
    "zamba2": Kind(
        "Zamba2Config",
        {
            "num_hidden_layers": 3,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "mamba_ngroups": 2,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "num_mem_blocks": 1,
            **_ATTENTION,
        },
        "mamba_d_state",
        "Mamba-2",
    ),
    "nemotron_h": Kind(
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "attention", "mamba"],
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            **_ATTENTION,
        },
        "ssm_state_size",
        "Mamba-2",
    ),
    "granitemoehybrid": Kind(
        "GraniteMoeHybridConfig",
        {
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "shared_intermediate_size": 48,
            **_ATTENTION,
            **_MAMBA2,
            **_EXPERTS,
        },
        "mamba_d_state",
        "Mamba-2",
    ),
    "falcon_h1": Kind(
        "FalconH1Config",
        {
            "num_hidden_layers": 2,
            "mamba_d_ssm": 64,
            "ssm_multipliers": [0.5, 0.7, 1.3, 0.9, 1.1],
            "ssm_in_multiplier": 1.2,
            **_ATTENTION,
            **_MAMBA2,
        },
        "mamba_d_state",
        "Mamba-2",
    ),
}

_HYBRID = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
}
_DELTA = {
    "linear_value_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **_HYBRID,
}
_QWEN_EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}

LINEAR_ATTENTION = {
    "qwen3_next": Kind(
        "Qwen3NextConfig",
        {**_DELTA, **_QWEN_EXPERTS, "mlp_only_layers": [0]},
        "linear_key_head_dim",
        "Gated DeltaNet",
    ),
    "qwen3_5": Kind("Qwen3_5TextConfig", _DELTA, "linear_key_head_dim", "Gated DeltaNet"),
    "qwen3_5_moe": Kind(
        "Qwen3_5MoeTextConfig",
        {**_DELTA, **_QWEN_EXPERTS},
        "linear_key_head_dim",
        "Gated DeltaNet",
    ),
    "olmo_hybrid": Kind(
        "OlmoHybridConfig",
        {**_DELTA, "head_dim": 8, "linear_allow_neg_eigval": True, "pad_token_id": None},
        "linear_key_head_dim",
        "Gated DeltaNet",
    ),
    "minimax": Kind(
        "MiniMaxConfig",
        {**_HYBRID, "block_size": 5, "num_local_experts": 2, "num_experts_per_tok": 2},
        "linear_key_head_dim",
        "Lightning attention",
    ),
}


_STIRRED = (
    *("in_proj", "conv1d", "x_proj", "out_proj", "o_proj", "output_gate"),
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "g_proj", "a_proj", "b_proj"),
)


def build(name: str) -> Any:
    """A new model whose SSM layers matter: fresh ones hardly use their states."""
    import transformers

    kind = (KINDS | LINEAR_ATTENTION)[name]
    config = getattr(transformers, kind.config)(
        vocab_size=VOCABULARY, hidden_size=32, **{kind.states: STATES}, **kind.arguments
    )
    # Every end-of-sequence token differs from the padding, and none ends a generation early.
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.pad_token_id = 0
    for layer in find_ssm_layers(model).values():
        _stir(layer.module)
    return model


@torch.no_grad()
def _stir(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if name == "A_log" and hasattr(module, "head_k_dim"):
            parameter.uniform_(-3, 0)  # fresh ones forget everything within a step
        elif name == "A_log":
            parameter += 0.3 * torch.randn_like(parameter)
        elif name in ("dt_bias", "dt_proj_bias", "dt_proj.bias"):
            parameter.uniform_(-2, 0)
        elif name.startswith(_STIRRED):
            parameter.normal_(0, 0.5 if name.startswith("conv1d") else 0.3)


def tokens(length: int = 12) -> Tensor:
    return torch.randint(1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    result: Tensor = model(tokens() if ids is None else ids, use_cache=False).logits
    return result


def generated(model: Any, **options: Any) -> Tensor:
    ids = tokens(5)
    result: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, **options
    )
    return result


_built: Callable[[str], Any] = cache(build)


def model_like(name: str) -> Any:
    """A copy of a model that is built once."""
    from copy import deepcopy

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return deepcopy(_built(name))
