"""The rules of the folder, read off the source: imports, file sizes, names of the commands."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 300
PAGES = (ROOT / "README.md", ROOT / "Makefile", ROOT / "benchmarks" / "README.md")


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> set[str]:
    """Dotted names of all that is imported anywhere: `from a.b import c` gives `a.b` and `a.b.c`.

    Imports for types and inside functions count too: they hide a circle, they don't open it.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


SOURCES = {module_name(p): p.read_text("utf-8") for p in (ROOT / "benchmarks").rglob("*.py")}


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    return {name: imports(source) & sources.keys() for name, source in sources.items()}


def test_no_circle_of_imports() -> None:
    TopologicalSorter(graph(SOURCES)).prepare()


def test_a_circle_is_found_where_it_is_hidden() -> None:
    hidden = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a.b import name\n"
    sources = {"a": "", "a.b": "def f():\n    from a import c\n", "a.c": hidden}
    with pytest.raises(CycleError):
        TopologicalSorter(graph(sources)).prepare()


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_taken_from_the_tests(name: str) -> None:
    assert not [found for found in imports(SOURCES[name]) if found.split(".")[0] == "tests"]


@pytest.mark.parametrize("name", SOURCES)
def test_modules_stay_short(name: str) -> None:
    assert len(SOURCES[name].splitlines()) <= MAX_LINES


def documented_commands() -> set[str]:
    pages = [*PAGES, *(ROOT / "docs").glob("*.md")]
    texts = [page.read_text("utf-8") for page in pages] + list(SOURCES.values())
    return {name for text in texts for name in re.findall(r"-m (benchmarks\.[a-z]\w*)", text)}


def test_every_command_that_is_written_about_is_there() -> None:
    commands = documented_commands()
    assert {"benchmarks.train", "benchmarks.compare", "benchmarks.recipes"} <= commands
    for name in commands:
        spec = find_spec(name)
        assert spec is not None, name
        main = find_spec(f"{name}.__main__") if spec.submodule_search_locations else spec
        assert main is not None, name
        assert main.origin is not None
        assert '__name__ == "__main__"' in Path(main.origin).read_text("utf-8"), name
