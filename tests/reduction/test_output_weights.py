"""Selective layers are also cut by what the loss asks of their outputs."""

from __future__ import annotations

from statistics import mean

import pytest
import torch
from torch import Tensor, nn

from lightning_compressm.families import SelectiveFamily, registered_families
from lightning_compressm.model.layers import find_ssm_layers
from lightning_compressm.nn import LRU
from lightning_compressm.reduction.order import Order
from lightning_compressm.reduction.output_weights import OutputWeights, WeightRecorder
from lightning_compressm.reduction.policy import ReductionPolicy
from lightning_compressm.reduction.processes import Processes
from lightning_compressm.reduction.recorder import Seen
from lightning_compressm.reduction.selective import analyse_selective
from lightning_compressm.surgery.apply import apply_plan

FAMILIES = {n: f for n, f in registered_families().items() if isinstance(f, SelectiveFamily)}
LAST = 3  # steps of which the loss knows


def loss_of(layer: nn.Module, family: SelectiveFamily, inputs: Tensor, target: Tensor) -> Tensor:
    return (family.run(layer, inputs)[:, -LAST:] - target).square().mean()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_weights_are_the_norms_of_the_gradients_at_the_output(family: SelectiveFamily) -> None:
    torch.manual_seed(0)
    layer, inputs = family.example(8)
    with torch.no_grad():
        target = family.run(layer, inputs)[:, -LAST:] + 1
    with WeightRecorder(find_ssm_layers(layer)) as recorder:
        loss_of(layer, family, inputs, target).backward()
    (weights,) = recorder.found.values()
    (sizes,) = weights.sizes
    assert sizes.shape == inputs.shape[:2]
    width = target.shape[-1]
    assert torch.allclose(sizes[:, -LAST:], torch.tensor(2 * width**0.5 / target.numel()))
    assert not bool(sizes[:, :-LAST].any())
    assert torch.equal(weights.inputs[0], inputs)


def test_layers_without_weights() -> None:
    layer, inputs = FAMILIES["Mamba"].example(8)
    model = nn.Sequential(layer, LRU(inputs.shape[-1], 4))
    with WeightRecorder(find_ssm_layers(model)) as recorder:
        with torch.no_grad():
            model(inputs)
        (model(inputs) * float("nan")).sum().backward()
    assert recorder.found == {}
    model(inputs).sum().backward()
    assert recorder.found == {}


@pytest.mark.parametrize("name", ["Mamba", "Mamba-2"])
def test_a_loss_of_the_last_steps_is_better_kept(name: str) -> None:
    """Mean over some layers; the two cuts take as many states and are refitted alike."""
    family, policy = FAMILIES[name], ReductionPolicy(state_dim=2, max_output_error=None)
    rises: dict[str, list[float]] = {"": [], "weighted by the loss": []}
    for seed in range(6):
        torch.manual_seed(seed)
        layer, inputs = family.example(8)
        inputs = torch.randn(8, 24, inputs.shape[-1])
        (found,) = find_ssm_layers(layer).values()
        with torch.no_grad():
            target = family.run(layer, inputs)[:, -LAST:]
            noisy = target + 0.1 * torch.randn_like(target)
        with WeightRecorder({"": found}) as recorder:
            loss_of(layer, family, inputs, noisy).backward()
        seen = Seen(inputs={found.name: [inputs]})
        analysis = analyse_selective(found, policy, seen, Processes())
        order = Order(present=8, wanted=2, most=7)
        weights = next(iter(recorder.found.values()))
        cuts = [analysis.cut(order, policy, 0), *analysis.task_cuts(order, policy, weights)]
        for cut in cuts:
            copy, _ = family.example(8)
            copy.load_state_dict(layer.state_dict())
            apply_plan(copy, cut.plan)
            with torch.no_grad():
                rises[cut.event.reason].append(float(loss_of(copy, family, inputs, target)))
    assert rises["weighted by the loss"]
    assert mean(rises["weighted by the loss"]) < mean(rises[""])


def test_others_than_the_task_asks_about_keep_a_tenth() -> None:
    weights = OutputWeights([torch.zeros(2, 5, 1)], [torch.zeros(2, 5)])
    assert torch.allclose(weights.relative(lambda x: x)[0].square(), torch.tensor(0.1))
    two = OutputWeights([torch.zeros(1, 1, 1)] * 2, [torch.ones(1, 1), torch.full((1, 1), 3.0)])
    first, second = (float(w) ** 2 for w in two.relative(lambda x: x))
    assert first == pytest.approx(0.9 / 5 + 0.1)
    assert second == pytest.approx(0.9 * 9 / 5 + 0.1)
    both = two.relative(lambda total: 2 * total)  # another process with the same data
    assert float(both[1]) ** 2 == pytest.approx(second)
