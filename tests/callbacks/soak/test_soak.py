"""Hundreds of random reductions over two ranks, and that what watches over them is awake."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from ...processes import start_pair
from .plan import CHOICES, DDP, LAYERS, LINEAR, OPTIMIZERS, TARGETS, plan
from .run import Figures, Regression, growth, run
from .watch import digest

REDUCTIONS = 200


def _launch(out: Path, *arguments: str) -> tuple[int | None, list[dict[str, Any]]]:
    pair = start_pair("soak.__main__", "--json", out, *arguments)
    ended = [process.wait(840) for process in pair]
    print(*ended)
    assert out.exists(), ended
    return ended[0][0], json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_stay_equal_and_nothing_piles_up(tmp_path: Path) -> None:
    code, ranks = _launch(tmp_path / "soak.json", "--reductions", str(REDUCTIONS))
    for figures in ranks:
        assert figures["divergences"] == []
        assert figures["problems"] == []
        assert figures["reductions"] >= REDUCTIONS
        assert figures["checks"] > figures["swaps"] > figures["runs"]
        assert figures["by_optimizer"].keys() == OPTIMIZERS.keys()
        assert figures["by_family"].keys() == {"LRU", "S4D", "S5", "Mamba", "Mamba-2"}
    assert len(ranks) == 2
    assert code == 0


@pytest.mark.slow
def test_one_bit_on_one_rank_is_noticed(tmp_path: Path) -> None:
    code, ranks = _launch(tmp_path / "soak.json", "--reductions", "3", "--spoil", "ranks")
    assert code == 1
    assert all("tensors after step 2" in figures["divergences"][0] for figures in ranks)
    assert all(figures["problems"] == [] for figures in ranks)


@pytest.mark.parametrize("target", ["fraction", "tolerance"])
def test_old_parameters_that_live_on_are_noticed(target: str) -> None:
    setting = next(s for s in plan(0) if target in s.arguments and set(s.layers) <= LINEAR.keys())
    kept, freed = Figures(), Figures()
    run(setting, freed, 1)
    run(setting, kept, 1, spoil="memory")
    assert freed.problems == []
    assert freed.reductions == kept.reductions > 0
    assert kept.swaps == freed.swaps > 0
    replaced = {problem for problem in kept.problems if "outlived its swap" in problem}
    assert 0 < len(replaced) < len(list(Regression(setting).parameters()))


def test_what_is_left_at_the_end_is_noticed() -> None:
    counts = {"tensors": 5, "parameters": 3, "wrappers": 0}
    more = counts | {"wrappers": 1}
    assert growth(Figures(once=0, live=[counts, counts], megabytes=[900.0, 903.0])) == []
    found = growth(Figures(once=0, live=[counts, more], megabytes=[900.0, 990.0]))
    assert found == [
        "wrappers: 0 before the repetition, 1 at the end",
        "memory: 900 MB before the repetition, 990 MB at the end",
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_digest_sees_a_single_bit_of_everything(optimizer: str) -> None:
    model = Regression(next(plan(0)))
    optimizers = [OPTIMIZERS[optimizer](model.parameters())]

    def closure() -> torch.Tensor:
        optimizers[0].zero_grad()
        loss = model.net(torch.linspace(0, 1, 20).view(2, 10, 1), 0).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizers[0].step(closure)
    seen = {digest(model, optimizers)}
    state = next(iter(optimizers[0].state.values()))
    values = [v for x in state.values() for v in (x if isinstance(x, list) else [x])]
    tensors = [t for t in values if isinstance(t, torch.Tensor)]
    tensors += [p.detach() for p in model.parameters()]
    for tensor in tensors:
        entry = tensor.view(-1)[-1:]
        entry.copy_(torch.nextafter(entry, entry + 1))
        seen.add(digest(model, optimizers))
    optimizers[0].param_groups[0]["lr"] *= 2
    seen.add(digest(model, optimizers))
    assert len(seen) == len(tensors) + 2
    assert digest(model, optimizers) in seen


def test_the_plan_gives_every_choice_its_turn_and_repeats_itself() -> None:
    settings = list(islice(plan(0), 40))
    assert settings == list(islice(plan(0), 40))
    assert settings[:5] != list(islice(plan(1), 5))
    assert {kind for setting in settings for kind in setting.layers} == set(LAYERS)
    assert {setting.optimizer for setting in settings} == OPTIMIZERS.keys()
    assert {setting.ddp for setting in settings} == set(DDP)
    for name, values in CHOICES.items():
        assert {setting.arguments[name] for setting in settings} == set(values)
    targets = {name for name, _ in TARGETS}
    assert {name for setting in settings for name in setting.arguments} >= targets
