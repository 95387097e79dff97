"""Lightning modules around other people's Mamba blocks, trained on a small recall task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compressm import CompreSSMCallback, find_ssm_layers
from lightning_compressm.compat import (
    enable_fast_mamba_cpu,
    enable_mamba_ssm_cpu,
    enable_minimax_key_channels,
)

from .helpers import trainer

TOKENS, LENGTH, BATCH, BATCHES = 12, 16, 8, 4
LINEAR_ATTENTION = {"qwen3_next": "Qwen3NextConfig", "minimax": "MiniMaxConfig"}


def make_blocks(kind: str) -> nn.Module:
    """A causal language model over TOKENS tokens that gives logits."""
    if kind == "transformers":
        enable_fast_mamba_cpu()
        from transformers import MambaConfig, MambaForCausalLM

        config = MambaConfig(vocab_size=TOKENS, hidden_size=16, num_hidden_layers=2, state_size=16)
        return MambaForCausalLM(config)
    if kind in LINEAR_ATTENTION:
        return _linear_attention(kind)
    enable_mamba_ssm_cpu()
    from mamba_ssm import Mamba, Mamba2

    def block() -> nn.Module:
        return Mamba(16, 16) if kind == "mamba" else Mamba2(16, 16, headdim=8)

    blocks = [nn.Sequential(nn.RMSNorm(16), block()) for _ in range(2)]
    return nn.Sequential(nn.Embedding(TOKENS, 16), *blocks, nn.Linear(16, TOKENS))


def _linear_attention(kind: str) -> nn.Module:
    """Two layers of linear attention; experts that all take part leave nothing unused."""
    import transformers

    enable_minimax_key_channels()
    sizes: dict[str, Any] = {
        "vocab_size": TOKENS,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention"] * 2,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "use_cache": False,
    }
    delta = {"linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    extra: dict[str, Any] = {
        "qwen3_next": {**delta, "linear_key_head_dim": 16, "mlp_only_layers": [0, 1]},
        "minimax": {"num_local_experts": 2, "num_experts_per_tok": 2, "block_size": 8},
    }[kind]
    config = getattr(transformers, LINEAR_ATTENTION[kind])(**sizes, **extra)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


class Recall(pl.LightningModule):
    """Predict the next token; each rank takes its share of the same global batch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = make_blocks(kind)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        tokens = batch[0][self.global_rank :: self.trainer.world_size]
        logits = self.net(tokens)
        logits = getattr(logits, "logits", logits)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def loader() -> DataLoader[Any]:
    """Sequences that repeat their first half."""
    half = torch.randint(
        0, TOKENS, (BATCH * BATCHES, LENGTH // 2), generator=torch.Generator().manual_seed(0)
    )
    return DataLoader(TensorDataset(torch.cat([half, half], 1)), batch_size=BATCH)


def run(
    kind: str,
    tmp: Path,
    *,
    devices: int = 1,
    saving: pl.Callback | None = None,
    ckpt_path: Path | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Train through a reduction to 4 of 16 states, or by the loss where the kind says so."""
    kind, _, budget = kind.partition("+")
    model = Recall(kind)
    settings: dict[str, Any] = {"state_dim": 4, "window": (0.0, 0.6), "verbose": False}
    if budget:
        settings = {"loss_budget": 0.5, "verbose": False}
    callback = CompreSSMCallback(**(settings | arguments))
    if devices > 1:
        # transformers' blocks leave nothing unused, mamba_ssm's neither.
        strategy = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": devices}
    else:
        strategy = {}
    kept = [] if saving is None else [saving]
    options = {"max_epochs": 4, "enable_checkpointing": bool(kept), **strategy}
    fit = trainer(tmp, callback, *kept, **options)
    fit.fit(model, loader(), ckpt_path=ckpt_path)
    held = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    config = getattr(model.net, "config", None)
    return {
        "state_dict": model.state_dict(),
        "history": [{**event, "seconds": 0.0} for event in callback.history],
        "state_dims": callback.state_dims,
        "found": {name: layer.state_dim for name, layer in find_ssm_layers(model).items()},
        "losses": model.losses,
        "in_optimizer": held == {id(p) for p in model.parameters()},
        "optimizer": fit.optimizers[0].state_dict(),
        "config": None if config is None else config.to_dict(),
    }
