from __future__ import annotations

from itertools import pairwise

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.data import DigitsDataModule
from benchmarks.models.classification import ClassifierModule
from benchmarks.models.classifier import ResidualBlock, SequenceClassifier
from benchmarks.models.schedule import warmup_cosine
from benchmarks.train.trainer import TASKS, build, make_trainer
from lightning_compressm import find_ssm_layers
from lightning_compressm.nn import LRU


def small(**options: object) -> SequenceClassifier:
    return SequenceClassifier(1, 10, d_model=4, d_state=6, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_forward_and_backward(pool: str) -> None:
    model = small(n_blocks=2, pool=pool)
    logits = model(torch.randn(3, 20, 1))
    assert logits.shape == (3, 10)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_last_step_is_read() -> None:
    model = small(pool="last").eval()
    x = torch.randn(2, 20, 1)
    changed = x.clone()
    changed[:, -1] += 1
    assert not torch.equal(model(x), model(changed))


def test_an_unknown_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="'max'"):
        small(pool="max")


def test_the_norm_is_over_batch_and_time() -> None:
    block = small().blocks[0].train()
    x = 3 + 2 * torch.randn(5, 50, 4)
    seen = []
    block.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block(x)
    assert torch.allclose(seen[0].mean((0, 1)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(seen[0].std((0, 1), correction=0), torch.ones(4), atol=1e-3)
    assert not list(block.norm.parameters())


def test_any_layer_can_be_plugged_in() -> None:
    made = []

    def factory(d_model: int, d_state: int) -> nn.Module:
        made.append((d_model, d_state))
        return LRU(d_model, d_state, r_min=0.5, r_max=0.6)

    model = small(n_blocks=2, layer=factory)
    assert made == [(4, 6), (4, 6)]
    assert list(find_ssm_layers(model)) == ["blocks.0.layer", "blocks.1.layer"]


def test_warm_up_then_cosine() -> None:
    factors = [warmup_cosine(step, 100, 0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[10] == 1
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert factors[100] == pytest.approx(0)


def test_state_space_parameters_learn_gently_and_do_not_decay() -> None:
    module, data = build(TASKS["digits"], seed=0, d_state=6, d_model=4)
    trainer = make_trainer(3)
    trainer.fit(module, data)
    rest, ssm = trainer.optimizers[0].param_groups
    assert {id(p) for p in ssm["params"]} == {id(p) for p in module.model.ssm_parameters()}
    assert (rest["weight_decay"], ssm["weight_decay"]) == (0.05, 0.0)
    assert ssm["initial_lr"] == 0.25 * rest["initial_lr"]
    held = {id(p) for group in (rest, ssm) for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert trainer.global_step == 3


def test_an_endless_run_is_refused() -> None:
    module, data = ClassifierModule(small(), 10), DigitsDataModule()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="give the Trainer max_steps"):
        trainer.fit(module, data)


def test_a_seed_fixes_a_training() -> None:
    weights = []
    for seed in (0, 0, 1):
        module, data = build(TASKS["digits"], seed=seed, d_state=6, d_model=4)
        make_trainer(3).fit(module, data)
        weights.append(module.model.head.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_metrics_are_logged() -> None:
    module, data = build(TASKS["digits"], seed=0, d_state=6, d_model=4)
    trainer = make_trainer(26, validations=1)
    trainer.fit(module, data)
    names = {f"{stage}_{metric}" for stage in ("train", "val") for metric in ("loss", "acc")}
    assert names <= set(trainer.callback_metrics)
    (scalars,) = trainer.test(module, data, verbose=False)
    assert 0 <= scalars["test_acc"] <= 1
    assert scalars["test_loss"] > 0


@pytest.mark.parametrize("d_model", [4, 16, 17])
def test_a_block_computes_what_its_standard_modules_do(d_model: int) -> None:
    block = ResidualBlock(d_model, 6, LRU, dropout=0.0).double()
    ours = torch.randn(3, 20, d_model, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    hidden = F.gelu(block.layer(block.norm(theirs.flatten(0, 1)).view_as(theirs)))
    expected = theirs + F.glu(block.gate(hidden))
    outputs = block(ours)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(outputs)
    parameters = list(block.parameters())
    found = torch.autograd.grad((outputs * weights).sum(), [ours, *parameters])
    wanted = torch.autograd.grad((expected * weights).sum(), [theirs, *parameters])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
