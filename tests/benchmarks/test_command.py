"""What all commands share: options from a dataclass, and what is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from benchmarks.common.command import check_least, one_of, parse, write_numbers


@dataclass(frozen=True)
class Settings:
    """Of no real command.

    Attributes:
        kind: What is
            measured.
        names: Several of these.
        seeds: As many as there are.
        target: Of the result.
        dry_run: Do nothing.
        output: Where to.
    """

    kind: Literal["one", "two"] = "one"
    names: tuple[str, ...] = one_of(("a", "b"), "abc")
    seeds: tuple[int, ...] = (0, 1)
    target: float | None = None
    dry_run: bool = False
    output: Path = Path("here")

    def __post_init__(self) -> None:
        check_least("--seeds", 0, self.seeds, ": that is all")


def read(*words: str) -> Settings:
    return parse(Settings, "nothing", "What it does.\n\nMore of it.", words)


def test_without_options_the_defaults_hold() -> None:
    assert read() == Settings()


def test_every_kind_of_option() -> None:
    words = ["--kind", "two", "--names", "c", "a", "--seeds", "7", "--target", "-100"]
    assert read(*words, "--dry-run", "--output=there") == Settings(
        "two", ("c", "a"), (7,), -100.0, True, Path("there")
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kind", "three"], "three"),
        (["--names", "a", "d"], "Got value: d"),
        (["--names"], "expected at least one argument"),
        (["--seeds", "1.5"], "Got value: 1.5"),
        (["--seed", "1"], "--seed"),
        (["--seeds", "3", "-1"], "--seeds must be at least 0, got -1: that is all"),
    ],
)
def test_what_can_not_be_meant_ends_the_program(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        read(*words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_help_is_that_of_the_dataclass(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("python -m benchmarks.nothing", "What it does.", "What is measured.", "default: "):
        assert part in printed
    assert "More of it." not in printed


def test_numbers_are_written_into_a_new_folder(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "new" / "x.json", {"path": tmp_path, "values": [1.5, None]})
    assert json.loads(path.read_text()) == {"path": str(tmp_path), "values": [1.5, None]}
