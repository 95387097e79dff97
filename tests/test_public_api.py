"""What other people's code may call, name by name: a change of it is a change of this list.

`python -m tests.test_public_api` writes the list anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

LIST = Path(__file__).with_name("public_api.txt")
PACKAGE = "lightning_compressm"
MODULES = ("", ".compat", ".control", ".families", ".nn", ".plot", ".testing")
HOOKS = ("on_", "setup", "teardown")  # of Lightning, which calls them


def public_api() -> list[str]:
    """A line for each public name: where it is, and how it is called."""
    return [line for module in MODULES for line in _of_module(f"{PACKAGE}{module}")]


def _of_module(module: str) -> Iterator[str]:
    package = import_module(module)
    for name in sorted(package.__all__):
        if not name.startswith("__"):
            yield from _of_object(f"{module}.{name}", getattr(package, name))


def _of_object(path: str, value: Any) -> Iterator[str]:
    if not callable(value):
        yield path
        return
    yield f"{path}{_arguments(value)}"
    if inspect.isclass(value):
        for name in dir(value):
            owner = next(c for c in value.__mro__ if name in vars(c))
            ours = owner.__module__.startswith(PACKAGE) and not name.startswith(("_", *HOOKS))
            if ours:
                member = inspect.getattr_static(value, name)
                plain = getattr(member, "__func__", member)  # of static and class methods
                yield f"{path}.{name}{_arguments(plain) if inspect.isfunction(plain) else ''}"


def _arguments(value: Any) -> str:
    """Names, kinds and defaults; annotations are spelled differently from version to version."""
    try:
        signature = inspect.signature(value)
    except ValueError:  # a class in C
        return ""
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def test_public_names_are_called_as_they_were() -> None:
    assert public_api() == LIST.read_text(encoding="utf-8").splitlines(), (
        "the public API has changed: if that is meant, run `python -m tests.test_public_api`, read "
        "the difference of tests/public_api.txt, and write it into CHANGELOG.md"
    )


if __name__ == "__main__":
    LIST.write_text("\n".join(public_api()) + "\n", encoding="utf-8")
