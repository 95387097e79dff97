"""What every command does alike: read its options, start a process, print, write numbers."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
import torch
from jsonargparse import ArgumentParser
from rich.console import Console

S = TypeVar("S")


def parse(
    settings: type[S],
    name: str,
    about: str | None,
    arguments: Iterable[str] | None = None,
    epilog: str | None = None,
) -> S:
    """Read the options of a command, one for each field of a dataclass.

    A field's annotation is the type of its option, `bool` makes one without a value, and
    `tuple[X, ...]` one with several. Its help is what the dataclass says under "Attributes:".
    A ValueError of the dataclass ends the program as any wrong option does.

    Args:
        settings: A dataclass; every field has a default.
        name: Of the command, after `python -m benchmarks.`.
        about: The help text begins with its first line.
        arguments: Those of the command line, if None.
        epilog: The end of the help text.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Settings:
        ...     seeds: tuple[int, ...] = (0, 1)
        ...     dry_run: bool = False
        >>> parse(Settings, "x", None, ["--seeds", "3", "4", "--dry-run"])
        Settings(seeds=(3, 4), dry_run=True)
    """
    parser = ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=(about or "").split("\n", 1)[0],
        epilog=epilog,
        allow_abbrev=False,
    )
    assert dataclasses.is_dataclass(settings)
    hints = get_type_hints(settings)
    described = docstring_parser.parse(settings.__doc__ or "").params
    help_of = {entry.arg_name: " ".join((entry.description or "").split()) for entry in described}
    for field in dataclasses.fields(settings):
        flag = f"--{field.name.replace('_', '-')}"
        choices = field.metadata.get("choices")
        kind = _kind(hints[field.name], field.default, choices)
        parser.add_argument(flag, help=help_of.get(field.name, " "), **kind)
    namespace = parser.parse_args(None if arguments is None else list(arguments))
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in namespace.items()}
    try:
        return settings(**values)
    except ValueError as error:
        parser.error(str(error))


def _kind(hint: Any, default: Any, choices: tuple[str, ...] | None) -> dict[str, Any]:
    """Arguments of `add_argument` for a field of this type."""
    if hint is bool:
        return {"action": "store_true"}
    chosen = None if choices is None else Literal[choices]
    if get_origin(hint) is tuple:
        # A list, as jsonargparse writes into it.
        return {"type": chosen or get_args(hint)[0], "nargs": "+", "default": list(default)}
    return {"type": chosen or hint, "default": default}


def one_of(default: Any, choices: Iterable[str]) -> Any:
    """A field of settings with these choices only."""
    return dataclasses.field(default=default, metadata={"choices": tuple(choices)})


def check_least(flag: str, least: int, values: Sequence[int], why: str = "") -> None:
    """Raise ValueError unless all values of an option are at least `least`."""
    if min(values, default=least) < least:
        raise ValueError(f"{flag} must be at least {least}, got {min(values)}{why}")


def prepare(threads: int = 1) -> None:
    """Make a process quiet that has imported Lightning, and let it use so many threads.

    Models of these sizes gain nothing from a second thread, and times become steadier with one.
    """
    quiet()
    torch.set_num_threads(threads)


def quiet() -> None:
    """Keep Lightning's remarks out of the tables; its warnings of substance still come through.

    Lightning sets the level of its logger when it is imported: call this later.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    remarks = (
        ".*does not have many workers.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*no `validation_step`.*",
    )
    for remark in remarks:
        warnings.filterwarnings("ignore", remark)


def make_console(width: int = 100) -> Console:
    """A console as wide as the terminal; wide enough for the tables where there is none."""
    return Console(width=None if sys.stdout.isatty() else width)


def write_numbers(path: Path, content: dict[str, Any]) -> Path:
    """Write plain types and paths as JSON, into a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    return path
