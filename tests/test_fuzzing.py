"""Whatever is given: it works, or the error says what was wrong and nothing was changed."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compressm import (
    CompreSSMCallback,
    HankelMonitor,
    compress,
    hankel_spectra,
    load_compressed,
)
from lightning_compressm.errors import CheckpointError, CompreSSMError
from lightning_compressm.families import registered_families
from lightning_compressm.nn import LRU
from tests.callbacks.helpers import Classifier, loader, trainer
from tests.families.layers import PortedLRU

WORDS = [
    *("auto", "real", "min", "max", "largest", "random", "greedy", "transport", "x", ""),
    "val_loss",
]
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.floats(0, 1),
    st.floats(),
    st.sampled_from(WORDS),
    st.lists(st.one_of(st.integers(), st.floats(), st.sampled_from(["*", "x"])), max_size=3),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
)


def arguments_of(function: Callable[..., Any], *without: str) -> st.SearchStrategy[dict[str, Any]]:
    names = [n for n in inspect.signature(function).parameters if n not in ("self", *without)]
    return st.dictionaries(st.sampled_from(names), PLAIN, max_size=3)


def is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(type(k) in (str, int) and is_plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or type(value) in (str, int, float, bool) or isinstance(value, Tensor)


def assert_names(error: Exception, names: Iterable[str]) -> None:
    """One of the names is in the message."""
    assert any(name in str(error) for name in names), error


@pytest.mark.parametrize("kind", [CompreSSMCallback, HankelMonitor])
@given(data=st.data())
@settings(max_examples=300)
def test_callbacks_are_made_or_name_what_is_wrong(kind: Any, data: st.DataObject):
    given_arguments = data.draw(arguments_of(kind.__init__))
    try:
        callback = kind(**given_arguments)
    except (ValueError, TypeError, NotImplementedError) as error:
        assert_names(error, given_arguments)
        return
    state = callback.state_dict()
    assert is_plain(state)
    kind(**given_arguments).load_state_dict(state)


def picture(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    state = model.state_dict(keep_vars=True)
    return {name: (id(t), t.detach().clone()) for name, t in state.items()}


def assert_untouched(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    now = picture(model)
    assert now.keys() == before.keys()
    for name, (identity, value) in before.items():
        assert now[name][0] == identity, name
        if not value.is_meta:
            torch.testing.assert_close(now[name][1], value, rtol=0, atol=0, equal_nan=True)


@given(given_arguments=arguments_of(compress, "model"))
@settings(max_examples=200)
def test_compress_works_or_names_what_is_wrong(given_arguments: dict[str, Any]):
    torch.manual_seed(0)
    model, inputs = LRU(2, 6), torch.randn(2, 9, 2)
    before = picture(model)
    try:
        report = compress(model, **given_arguments)
    except (CompreSSMError, ValueError, TypeError) as error:
        assert_names(error, given_arguments)
        assert_untouched(model, before)
        return
    assert model.d_state == report.events[0].new_state_dim <= 6
    assert torch.isfinite(model(inputs)).all()


# -- states of callbacks in checkpoints ----------------------------------------------------------


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[type, dict[str, Any]]:
    """What real runs keep: with a plan that is yet to be carried out, a history, and spectra."""
    kept: dict[type, dict[str, Any]] = {}

    class Keep(pl.Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            for callback in trainer.callbacks:
                if isinstance(callback, CompreSSMCallback | HankelMonitor):
                    kept[type(callback)] = deepcopy(callback.state_dict())

    torch.manual_seed(0)
    callbacks = [
        CompreSSMCallback(tolerance=0.2, window=(0.0, 0.9), verbose=False),
        HankelMonitor(),
        Keep(),
        pl.callbacks.ModelCheckpoint(save_on_train_epoch_end=True),
    ]
    tmp = tmp_path_factory.mktemp("states")
    fit = trainer(tmp, *callbacks, max_epochs=3, limit_train_batches=2, enable_checkpointing=True)
    fit.fit(Classifier("adamw"), loader())
    kept[CompreSSMCallback]["pending"] = _pending_of(tmp)
    return kept


def _pending_of(tmp: Path) -> dict[str, Any]:
    """The plan that the end of the first epoch commits to."""
    found: list[Any] = []

    class Note(CompreSSMCallback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            found.append(deepcopy(self.state_dict()["pending"]))

    callback = Note(tolerance=0.2, window=(0.0, 0.9), verbose=False)
    trainer(tmp, callback, max_epochs=2, limit_train_batches=2).fit(Classifier("adamw"), loader())
    pending: dict[str, Any] = found[0]
    return pending


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [prefix] if prefix else []
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            found += paths(item, (*prefix, key))
    return found


DAMAGE = st.sampled_from([None, 3, -2, 1.5, "text", [], {}, [3], {"a": None}, {3: 3}, ...])


@pytest.mark.parametrize("kind", [CompreSSMCallback, HankelMonitor])
@given(data=st.data(), damage=DAMAGE)
@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_states_are_named_before_anything_is_taken_up(
    kind: type, states: dict[type, dict[str, Any]], data: st.DataObject, damage: Any
):
    state = deepcopy(states[kind])
    path = data.draw(st.sampled_from(paths(state)))
    place: Any = state
    for key in path[:-1]:
        place = place[key]
    if damage is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = damage
    callback = kind()
    before = deepcopy(callback.state_dict())
    try:
        callback.load_state_dict(state)
    except CheckpointError as error:
        assert_names(error, [f"'{path[0]}'"])
        assert str(callback.state_dict()) == str(before)
    else:  # it was a value that could be
        assert is_plain(callback.state_dict())
        CompreSSMCallback().load_state_dict(
            callback.state_dict()
        ) if kind is CompreSSMCallback else 0


@pytest.mark.parametrize("thing", [None, 3, "text", [], {}])
@pytest.mark.parametrize("kind", [CompreSSMCallback, HankelMonitor])
def test_things_that_are_no_state(kind: type, thing: Any):
    with pytest.raises(CheckpointError, match="callback's state"):
        kind().load_state_dict(thing)


def test_undamaged_states_are_taken_up(states: dict[type, dict[str, Any]]):
    assert states[CompreSSMCallback]["pending"]["plan"]["edits"]
    assert states[CompreSSMCallback]["history"]
    assert states[HankelMonitor]["history"]
    for kind, state in states.items():
        callback = kind()
        callback.load_state_dict(deepcopy(state))
        assert str(callback.state_dict()) == str(state)


# -- damaged files -------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), cut=st.booleans(), size=st.integers(1, 8))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_load_whole_or_not_at_all(seed: int, cut: bool, size: int, tmp_path: Path):
    torch.manual_seed(0)
    model, source, chance = LRU(2, 6), LRU(2, 4), random.Random(seed)
    path, before = tmp_path / "damaged.ckpt", picture(model)
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, path)
    content = bytearray(path.read_bytes())
    if cut:
        content = content[: chance.randrange(len(content))]
    else:
        for _ in range(size):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    try:
        load_compressed(model, path)
    except CheckpointError:
        assert_untouched(model, before)
        return
    # Padding between the records, or a byte of the directory that nobody reads.
    assert not cut
    assert model.d_state == 4
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[name], rtol=0, atol=0)


# -- layers --------------------------------------------------------------------------------------


def _not_contiguous(layer: nn.Module) -> None:
    for module in layer.modules():
        for name, p in module._parameters.items():
            if p is not None and p.ndim > 1:
                turned = p.detach().transpose(0, -1).contiguous().transpose(0, -1)
                module._parameters[name] = nn.Parameter(turned)


def _tied(layer: nn.Module) -> None:
    """The first two parameters of one shape become one."""
    seen: dict[torch.Size, nn.Parameter] = {}
    for module in layer.modules():
        for name, p in module._parameters.items():
            if p is not None and p.shape in seen:
                module._parameters[name] = seen[p.shape]
                return
            if p is not None:
                seen[p.shape] = p


def _fill(value: float) -> Callable[[nn.Module], None]:
    def fill(layer: nn.Module) -> None:
        with torch.no_grad():
            for p in layer.parameters():
                p.fill_(value)

    return fill


def _one_without_storage(layer: nn.Module) -> None:
    module = next(m for m in layer.modules() if any(p is not None for p in m._parameters.values()))
    name = next(n for n, p in module._parameters.items() if p is not None)
    module._parameters[name] = nn.Parameter(module._parameters[name].to("meta"))  # type: ignore[union-attr]


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda layer: None,
    "not contiguous": _not_contiguous,
    "frozen": lambda layer: layer.requires_grad_(False),
    "tied": _tied,
    "meta": lambda layer: layer.to("meta"),
    "partly meta": _one_without_storage,
    "zero": _fill(0.0),
    "infinite": _fill(float("inf")),
    "nan": _fill(float("nan")),
    "double": lambda layer: layer.double(),
    "half": lambda layer: layer.bfloat16(),
    "evaluated": lambda layer: layer.eval(),
}
SOUND = {"plain", "not contiguous", "frozen", "double", "half", "evaluated"}


def assert_useful(error: Exception, *, expected: bool) -> None:
    """A sound layer with data is not refused; what is refused is explained."""
    assert expected, error
    assert len(str(error)) > 40


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["LRU", "S4D", "S5", "Mamba", "Mamba-2"])
@given(
    d_state=st.integers(1, 6),
    order=st.integers(1, 7),
    batch=st.integers(0, 2),
    length=st.sampled_from([0, 1, 2, 3, 12]),
    spectra=st.booleans(),
)
@settings(max_examples=10)
def test_layers_are_reduced_or_left(
    name: str, change: str, d_state: int, order: int, batch: int, length: int, spectra: bool
):
    family = registered_families()[name]
    torch.manual_seed(0)
    layer, whole = family.example(d_state)
    CHANGES[change](layer)
    like = next(layer.parameters())
    whole = whole.to(like.dtype)
    sample = whole[:batch, :length].to(like.device)
    before = picture(layer)
    modes = [m.training for m in layer.modules()]
    try:
        if spectra:
            for sigma in hankel_spectra(layer, sample=sample).values():
                assert sigma.shape[-1] == d_state
                assert torch.isfinite(sigma).all()
                assert (sigma >= 0).all()
            assert_untouched(layer, before)
        else:
            report = compress(layer, state_dim=order, sample=sample)
            (event,) = report.events
            assert family.state_dim(layer) == event.new_state_dim <= d_state
            assert torch.isfinite(layer(whole)).all()
            flags = {n: p.requires_grad for n, p in layer.named_parameters()}
            assert set(flags.values()) == {change != "frozen"}
            assert {p.dtype for p in layer.parameters()} == {like.dtype}
    except (CompreSSMError, ValueError) as error:
        assert_untouched(layer, before)
        least = 2 if name.startswith("Mamba") else 1  # one step says nothing of a recurrence
        enough = batch >= 1 and length >= least
        assert_useful(error, expected=change not in SOUND or not enough)
    assert [m.training for m in layer.modules()] == modes


@pytest.mark.parametrize(("inputs", "outputs", "states"), [(3, 3, 0), (0, 3, 4), (3, 0, 4)])
def test_layers_with_a_dimension_of_zero(inputs: int, outputs: int, states: int):
    layer = PortedLRU(inputs, outputs, states)
    before = picture(layer)
    for act in (hankel_spectra, lambda m: compress(m, state_dim=2)):
        with pytest.raises((CompreSSMError, ValueError), match=r"\w{4,} .*"):
            act(layer)
        assert_untouched(layer, before)
