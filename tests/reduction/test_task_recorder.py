"""Gramians of the task, recorded in ordinary training, against a loop over time."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_compressm.control.task_aware import factorise_task
from lightning_compressm.families import find_family, registered_families
from lightning_compressm.families.lru import LRUFamily
from lightning_compressm.families.s4_diagonal import S4DiagonalFamily
from lightning_compressm.model.layers import SSMLayer, find_ssm_layers
from lightning_compressm.nn import LRU, S4D, S5
from lightning_compressm.reduction.output_check import explains
from lightning_compressm.reduction.task_recorder import TaskRecorder

LAYERS = [LRU, S4D, S5]


def states(system, weight, signals, *, reverse=False):
    """One step after the other: states (batch, L, N), or (batch, L, H, N) of a bank."""
    steps = signals.to(torch.complex128).unbind(1)
    state, found = 0, []
    for v in reversed(steps) if reverse else steps:
        driven = v.unsqueeze(-1) * weight[..., 0] if system.batch_shape else v @ weight.mT
        state = system.eigenvalues * state + driven
        found.append(state)
    return torch.stack(found, 1)


def moments(states):
    z = torch.cat((states.real, states.imag), -1)
    return (z.unsqueeze(-1) * z.unsqueeze(-2)).sum((0, 1))


def by_hand(layer, inputs, gradient):
    """P and Q of a call, from its input and the gradient at its output."""
    with torch.no_grad():
        system = find_family(layer).system(layer).double()
        adjoint = replace(system, eigenvalues=system.eigenvalues.conj())
        p = moments(states(system, system.B, inputs.detach()))
        return p, moments(states(adjoint, system.C.mH, gradient, reverse=True))


def loss_of(output):
    return torch.tanh(output).square().mean() + output[:, -1].sum()


def close(found, expected, tolerance=1e-5):
    return float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("cls", LAYERS)
def test_gramians_are_those_of_a_loop_over_time(cls):
    layer, inputs = cls(3, 5), torch.randn(4, 33, 3)
    with TaskRecorder(find_ssm_layers(layer)) as recorder:
        output = layer(inputs)
        output.retain_grad()
        loss_of(output).backward()
    found = recorder.gramians[""]
    p, q = by_hand(layer, inputs, output.grad)
    assert close(found.P, p)
    assert close(found.Q, q)
    assert float(found.steps) == 4 * 33


@pytest.mark.parametrize("cls", LAYERS)
def test_every_call_counts_in_every_backward_pass(cls):
    """Two calls in one forward pass, one inside of the other, and two batches accumulated."""
    layer, p, q = cls(3, 4), 0, 0
    with TaskRecorder(find_ssm_layers(layer)) as recorder:
        for _ in range(2):
            inputs = torch.randn(2, 20, 3)
            inner = layer(inputs)
            inner.retain_grad()
            outer = layer(inner)
            outer.retain_grad()
            loss_of(outer).backward()
            for call in (by_hand(layer, inputs, inner.grad), by_hand(layer, inner, outer.grad)):
                p, q = p + call[0], q + call[1]
    found = recorder.gramians[""]
    assert close(found.P, p)
    assert close(found.Q, q)
    assert float(found.steps) == 4 * 2 * 20


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_count_once(reentrant):
    """The forward pass runs twice: with or without gradients in the first, as the kind may be."""
    model = nn.Sequential(nn.Linear(3, 3), LRU(3, 4), nn.Tanh())
    inputs = torch.randn(2, 20, 3, requires_grad=True)
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        with TaskRecorder(find_ssm_layers(model)) as recorder:
            loss_of(run(inputs)).backward()
        found.append(recorder.gramians["1"])
    assert close(found[1].P, found[0].P, 1e-6)
    assert close(found[1].Q, found[0].Q, 1e-6)
    assert torch.equal(found[1].steps, found[0].steps)


def test_the_scale_of_the_loss_is_taken_out_in_single_precision():
    """In float16 the gradient divided by the scale is zero."""
    layer, inputs = LRU(3, 4), torch.randn(2, 20, 3)
    found = []
    for scale in (1.0, 2.0**15):
        half = inputs.half()
        with TaskRecorder(find_ssm_layers(layer), scale=scale) as recorder:
            (1e-6 * scale * layer(half).float().tanh().mean()).backward()
        found.append(recorder.gramians[""])
        assert torch.equal(found[0].P, found[-1].P)
    with TaskRecorder(find_ssm_layers(layer)) as recorder:
        (1e-6 * layer(inputs.half().float()).tanh().mean()).backward()
    exact = recorder.gramians[""].Q
    assert close(found[1].Q, exact, 1e-2)
    assert not close(found[0].Q, exact, 0.1)


def test_autocast_changes_little():
    model = nn.Sequential(nn.Linear(3, 8), S5(8, 4), nn.Linear(8, 1))
    inputs, found = torch.randn(4, 50, 3), []
    for enabled in (False, True):
        with (
            TaskRecorder(find_ssm_layers(model)) as recorder,
            torch.autocast("cpu", enabled=enabled),
        ):
            model(inputs).square().mean().backward()
        assert not recorder.unavailable
        found.append(recorder.gramians["1"])
    assert close(found[1].P, found[0].P, 0.02)
    assert close(found[1].Q, found[0].Q, 0.05)


class WithState(LRU):
    """Returns its states' size as well, as recurrent layers do."""

    def forward(self, inputs):
        return super().forward(inputs), self.d_state


def test_an_output_may_be_the_first_of_several():
    layer, inputs = WithState(3, 4), torch.randn(2, 20, 3)
    with TaskRecorder(find_ssm_layers(layer)) as recorder:
        output, _ = layer(inputs)
        output.retain_grad()
        loss_of(output).backward()
    assert close(recorder.gramians[""].Q, by_hand(layer, inputs, output.grad)[1])


class ChannelsFirst(LRU):
    def forward(self, inputs):
        return super().forward(inputs.mT).mT


class ChannelsFirstFamily(LRUFamily):
    length_dim = -1


def test_time_is_where_the_family_says():
    layer, inputs = ChannelsFirst(3, 4), torch.randn(2, 3, 20)
    with TaskRecorder({"": SSMLayer("", "", layer, ChannelsFirstFamily())}) as recorder:
        output = layer(inputs)
        output.retain_grad()
        output.tanh().sum().backward()
    p, q = by_hand(layer, inputs.mT, output.grad.mT)
    assert close(recorder.gramians[""].P, p)
    assert close(recorder.gramians[""].Q, q)


def test_long_batches_count_in_part():
    layer, inputs = LRU(3, 4), torch.randn(9, 20, 3)
    with TaskRecorder(find_ssm_layers(layer), max_steps=50) as recorder:
        loss_of(layer(inputs)).backward()
    found = recorder.gramians[""]
    assert float(found.steps) == 40
    assert close(found.P, by_hand(layer, inputs[:2], inputs[:2])[0])


def test_passes_without_a_gradient_do_not_count():
    layer, inputs = LRU(3, 4), torch.randn(2, 20, 3)
    with TaskRecorder(find_ssm_layers(layer)) as recorder:
        with torch.no_grad():
            layer(inputs)
        torch.func.vmap(layer)(inputs.unsqueeze(0))
        layer(inputs)  # no backward pass follows
        layer.requires_grad_(False)(inputs)
    assert recorder.gramians == {}
    assert recorder.unavailable == {}


def test_a_gradient_that_is_not_finite_does_not_count():
    """As in a step that a gradient scaler will skip."""
    layer, inputs = LRU(3, 4), torch.randn(2, 20, 3)
    with TaskRecorder(find_ssm_layers(layer)) as recorder:
        loss_of(layer(inputs)).backward()
        (loss_of(layer(inputs)) * torch.inf).backward()
    assert float(recorder.gramians[""].steps) == 40


def test_nothing_is_left_behind():
    """After a failure, and for a gradient that arrives after the end."""
    layer, inputs = LRU(3, 4), torch.randn(2, 20, 3)
    recorder, outputs = TaskRecorder(find_ssm_layers(layer)), []

    def failing():
        with recorder:
            outputs.append(layer(inputs))
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    loss_of(outputs[0]).backward()
    loss_of(layer(inputs)).backward()
    assert not layer._forward_hooks
    assert recorder.gramians == {}


def test_a_copy_of_the_model_is_not_heard():
    layer, inputs = LRU(3, 4), torch.randn(2, 20, 3)
    with TaskRecorder(find_ssm_layers(layer)) as recorder:
        loss_of(deepcopy(layer)(inputs)).backward()
    assert recorder.gramians == {}


class Activated(LRU):
    def forward(self, inputs):
        return nn.functional.gelu(super().forward(inputs))


class BothWays(LRU):
    def forward(self, inputs):
        return super().forward(inputs) + super().forward(inputs.flip(1)).flip(1)


class Joined(LRU):
    def forward(self, inputs):
        return torch.cat((super().forward(inputs), inputs), -1)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [(Activated, "feedthrough"), (BothWays, "feedthrough"), (Joined, "3 outputs of its system")],
)
def test_layers_that_are_more_than_their_system_have_none(cls, reason):
    layer, inputs = cls(3, 4), torch.randn(2, 40, 3)
    with TaskRecorder(find_ssm_layers(layer)) as recorder:
        loss_of(layer(inputs)).backward()
    assert recorder.gramians == {}
    assert reason in recorder.unavailable[""]


def test_kernels_have_none():
    kernel, _ = S4DiagonalFamily().example()
    with TaskRecorder(find_ssm_layers(kernel)) as recorder:
        kernel(torch.randn(2, 9, 4)).sum().backward()
    assert "does not map a sequence" in recorder.unavailable[""]


def test_unstable_layers_have_none():
    layer = LRU(3, 4)
    nn.init.constant_(layer.nu_log, -60.0)
    with TaskRecorder(find_ssm_layers(layer)) as recorder:
        pass
    assert "inside the unit circle" in recorder.unavailable[""]


def test_selective_layers_have_none():
    layer, inputs = registered_families()["Mamba"].example()
    with TaskRecorder(find_ssm_layers(layer)) as recorder:
        layer(inputs).sum().backward()
    assert set(recorder.unavailable.values()) == {"it is selective"}


def test_inputs_that_are_overwritten_are_told():
    """The layer has a copy of its own in single precision, so that autograd sees no harm."""
    layer, inputs = LRU(3, 4), torch.randn(2, 20, 3).bfloat16()
    with TaskRecorder(find_ssm_layers(layer)) as recorder:
        output = layer(inputs)
        inputs.mul_(2)
        loss_of(output).backward()
    assert recorder.gramians == {}
    assert "overwritten" in recorder.unavailable[""]


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("full", [False, True])
def test_any_feedthrough_is_one_but_no_other_function(cls, full):
    layer, inputs = cls(3, 4), torch.randn(2, 200, 3)
    with torch.no_grad():
        system = find_family(layer).system(layer)
        output = layer(inputs)
        through = inputs @ torch.randn(3, 3) if full else 5 * inputs
        assert explains(system, inputs, output + through) == (cls is not S4D or not full)
        assert not explains(system, inputs, output + 0.2 * through.square())
        assert not explains(system, inputs, output + 0.2 * inputs.roll(1, 1))


def test_recorded_gramians_can_be_balanced():
    """From a trained-on layer to factors, without a word about coordinates in between."""
    model = nn.Sequential(S4D(2, 8), nn.Linear(2, 1))
    layers = find_ssm_layers(model)
    with TaskRecorder(layers) as recorder:
        model(torch.randn(4, 64, 2)).square().mean().backward()
    layer = layers["0"]
    factors = factorise_task(layer.family.system(layer.module), recorder.gramians["0"], horizon=64)
    assert factors.sigma.shape == (2, 8)
    assert bool((factors.sigma[:, 0] > 0).all())
