from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import after_reduction
from benchmarks.after_reduction import DEFAULT, PUBLISHED, STATE_DIM, Cut, Settings
from benchmarks.common.command import parse
from benchmarks.models.classification import evaluate_classes


def test_rows_compare_with_the_network_as_trained() -> None:
    cuts = [
        Cut(seed, recipe, states, accuracy - 0.1 * seed, 0.5)
        for seed in (0, 1)
        for recipe, states, accuracy in (
            ("", STATE_DIM, 1.0), (PUBLISHED, 16, 0.8), (DEFAULT, 16, 0.99)
        )
    ]  # fmt: skip
    assert after_reduction.make_rows(cuts) == [
        ("as trained", "128", "0.950", "1.000 0.900", "", "0.5000"),
        (PUBLISHED, "16", "0.750", "0.800 0.700", "20.0", "0.5000"),
        (DEFAULT, "16", "0.940", "0.990 0.890", "1.0", "0.5000"),
    ]


def test_the_published_recipe_and_the_default_are_compared() -> None:
    recipes = after_reduction.recipes(64)
    assert recipes[PUBLISHED] == {"balance": "complex", "horizon": None}
    assert recipes[DEFAULT] == {}


def test_command_line() -> None:
    def read(*words: str) -> Settings:
        return parse(Settings, "after_reduction", None, words)

    assert read() == Settings()
    assert read("--task", "delay").planned_steps == 800
    assert read("--steps", "5").planned_steps == 5
    for wrong in (["--states", "0"], ["--steps", "0"], ["--target", "1", "--states", "8"]):
        with pytest.raises(SystemExit):
            read(*wrong)


def test_weights_are_kept_and_results_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=io.StringIO())
    settings = Settings(seeds=(0,), steps=2, states=(8,), output=tmp_path)
    first = after_reduction.run(settings, console)
    assert len(first) == 1 + len(after_reduction.recipes(64))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(after_reduction, "fit_with_bar", refuse)
    assert after_reduction.run(settings, console) == first
    rows = after_reduction.make_rows(first)
    markdown, numbers = after_reduction.write_results(rows, first, settings)
    assert "| as trained | 128 |" in markdown.read_text()
    assert len(json.loads(numbers.read_text())["cuts"]) == len(first)


def test_another_recipe_has_other_weights(tmp_path: Path) -> None:
    task = after_reduction.TASKS["digits"]
    module, _ = after_reduction.build(task, 0, 8, 4)
    paths = {
        after_reduction.weights_path(Settings(steps=steps, output=tmp_path), seed, module, task)
        for steps, seed in ((2, 0), (3, 0), (2, 1))
    }
    module.hparams["lr"] = 1.0
    paths.add(after_reduction.weights_path(Settings(steps=2, output=tmp_path), 0, module, task))
    assert len(paths) == 4


def test_accuracy_and_loss() -> None:
    logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0], [9.0, 0.0]])
    accuracy, loss = evaluate_classes(torch.nn.Identity(), logits, torch.tensor([0, 1, 1, 0]))
    assert accuracy == 0.75
    assert loss == pytest.approx(9.0 / 4, rel=1e-3)


@pytest.mark.parametrize(("target", "code"), [("100", 0), ("-100", 1)])
def test_a_missed_target_fails(
    target: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--seeds", "0", "--steps", "2", "--states", "16", "--output", str(tmp_path)]
    assert after_reduction.main([*small, "--target", target]) == code
    assert f"the target is {target}" in capsys.readouterr().out


def test_points_lost_are_those_of_the_recipe_and_size() -> None:
    made = [
        Cut(0, "", after_reduction.STATE_DIM, 0.9, 0.0),
        Cut(0, "a", 16, 0.8, 0.0),
        Cut(0, "b", 16, 0.1, 0.0),
        Cut(0, "a", 8, 0.2, 0.0),
    ]
    assert after_reduction.points_lost(made, "a", 16) == pytest.approx(10.0)
