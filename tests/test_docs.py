"""The documentation is true: its code runs, its links lead somewhere, its site builds."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from docs.table import PLACES, split
from lightning_compressm.families import _registry

from .features import from_torch

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "DESCRIPTION.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *TUTORIALS,
]
BLOCK = re.compile(r"^```(?P<language>[\w{}-]+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def _page(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """Line number, language and content of each fenced block."""
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        yield line, match["language"], match["code"]


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub and MyST make them."""
    prose = BLOCK.sub("", text)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}


# It exports a layer with an open batch, which is tested for itself.
NEW_TORCH = {"supported.md": from_torch("2.13", "no export with an open batch")}
RUNNABLE = [pytest.param(p, marks=NEW_TORCH[p.name]) if p.name in NEW_TORCH else p for p in PAGES]


def run_page(path: Path) -> None:
    """Run the Python and doctest blocks of a page in order, in one namespace."""
    space: dict[str, Any] = {"__name__": "__page__"}
    for line, language, code in blocks(path.read_text()):
        if language == "python":
            padded = "\n" * (line - 1) + code
            exec(compile(padded, str(path), "exec"), space)
        elif language == "pycon":
            test = doctest.DocTestParser().get_doctest(code, space, _page(path), str(path), line)
            test.globs = space
            report: list[str] = []
            runner = doctest.DocTestRunner(optionflags=OPTIONS)
            runner.run(test, out=report.append, clear_globs=False)
            assert not runner.failures, "".join(report)


@pytest.fixture
def _families_restored() -> Iterator[None]:
    """Pages may register families; the other tests must not see them."""
    known = _registry.registered_families()
    yield
    _registry._families.clear()
    _registry._families.update(known)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("_families_restored")
@pytest.mark.parametrize("path", RUNNABLE, ids=_page)
def test_code_runs(path: Path):
    run_page(path)


@pytest.mark.parametrize("path", PAGES, ids=_page)
def test_code_blocks_are_run_or_no_python(path: Path):
    known = {"python", "pycon", "console", "text", "bibtex", "{eval-rst}", "{toctree}"}
    known |= {"{code-cell}"} if path in TUTORIALS else set()
    assert {language for _, language, _ in blocks(path.read_text())} <= known


@pytest.mark.parametrize("path", PAGES, ids=_page)
def test_internal_links_resolve(path: Path):
    for match in LINK.finditer(BLOCK.sub("", path.read_text())):
        target, _, anchor = match["target"].partition("#")
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        file = path.parent / target if target else path
        assert file.exists(), f"{_page(path)} links to {match['target']}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{_page(path)}: {match['target']}"


def test_the_description_of_the_package_stands_alone():
    """An index shows it without the files around it."""
    text = (ROOT / "DESCRIPTION.md").read_text()
    assert "long_description = file: DESCRIPTION.md" in (ROOT / "setup.cfg").read_text()
    targets = [match["target"] for match in LINK.finditer(BLOCK.sub("", text))]
    assert targets
    assert all(target.startswith("https:") for target in targets)


def test_every_page_is_in_the_contents():
    listed = set((ROOT / "docs" / "index.md").read_text().split())
    assert not [p.stem for p in (ROOT / "docs").glob("*.md") if p.stem not in listed | {"index"}]


def test_every_tutorial_is_in_the_contents_and_has_code():
    listed = set((ROOT / "docs" / "tutorials" / "index.md").read_text().split())
    pages = [path for path in TUTORIALS if path.stem != "index"]
    assert pages
    assert {path.stem for path in pages} <= listed
    for path in pages:
        assert path.read_text().startswith("---\njupytext:"), "else the build runs no cell"
        assert [code for _, kind, code in blocks(path.read_text()) if kind == "{code-cell}"]


def test_readme_has_a_place_for_the_demo():
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- demo:begin -->") == text.count("<!-- demo:end -->") == 1
    assert text.index("<!-- demo:begin -->") < text.index("<!-- demo:end -->")


@pytest.mark.parametrize(
    ("page", "place"), [(page, place) for page in PLACES for place in PLACES[page]]
)
def test_generated_tables_are_up_to_date(page: str, place: str):
    _, shown, _ = split((ROOT / page).read_text(), place)
    assert shown.strip() == PLACES[page][place]().strip(), "run `make table`"


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", tmp_path / "trees", ROOT / "docs", tmp_path / "html"],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "index.html").exists()
