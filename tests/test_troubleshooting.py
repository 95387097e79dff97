"""The troubleshooting page quotes errors as the source has them, and covers those of users."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_compressm"
PAGE = ROOT / "docs" / "troubleshooting.md"
ANY = "\0"  # what a message fills in
TORCH = {"size mismatch"}  # texts on the page that are not ours

# Where errors come from that users meet. The rest checks what families, or other parts, hand over.
COVERED = [
    *sorted((PACKAGE / "callbacks").glob("*.py")),
    *sorted((PACKAGE / "model").glob("*.py")),
    *sorted((PACKAGE / "cli").glob("*.py")),
    *sorted((PACKAGE / "compat").glob("*.py")),
    *sorted((PACKAGE / "surgery").glob("*.py")),
    *(PACKAGE / name for name in ("_names.py", "_rules.py", "_tensors.py", "compressor.py")),
    *(PACKAGE / "reduction" / name for name in ("decide.py", "policy.py", "selective.py")),
    *(PACKAGE / "families" / f"{name}.py" for name in ("mamba", "mamba2", "s4d", "s5", "_s4")),
    PACKAGE / "regularizer.py",
]
# Passed on between parts of the package, with the text of another error.
INNER = {"TroubleError", "AttributeError", "IllConditionedError"}
# Without words of their own, or always part of another message.
PLAIN = {
    f"{ANY}: expected {ANY}, got {ANY}.",  # an argument: the page says how to read it
    f"{ANY} {ANY}: {ANY}",  # an option of the command line, and why its import failed
    f"expected fewer states than {ANY}, at least 1; got {ANY}",  # "the callback's state is damaged"
}
SHORTEST = 10  # letters without a gap: less would be found in every message


def written(node: ast.AST, known: dict[str, str]) -> str:
    """The text of an expression, as far as it stands in the source."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(written(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return written(node.value, known)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return written(node.left, known) + written(node.right, known)
    return known.get(node.id, ANY) if isinstance(node, ast.Name) else ANY


def messages(path: Path) -> list[tuple[int, str, str]]:
    """Line, class and text of each error that a file makes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = {
        node.targets[0].id: written(node.value, {})
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and re.search(r"(Error|BadZipFile)$", ast.unparse(node.func)):
            text = written(node.args[0], known) if node.args else ""
            if text.strip(ANY):
                found.append((node.lineno, ast.unparse(node.func), text))
    return found


def entries() -> list[str]:
    """The texts that the page explains: terms of its definition lists."""
    return re.findall(r"^`([^`\n]+)`\n: ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def quotes(entry: str, message: str) -> bool:
    """Whether an entry, `...` for what is filled in, is a piece of a message."""
    return bool(re.search(".*".join(map(re.escape, entry.split("..."))), message, re.DOTALL))


EVERYWHERE = [m for path in sorted(PACKAGE.rglob("*.py")) for _, _, m in messages(path)]


def helper_texts() -> list[str]:
    """Messages that functions return for others to raise."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Return) and isinstance(node.value, ast.JoinedStr):
                found.append(written(node.value, {}))
    return found


@pytest.mark.parametrize("entry", entries())
def test_what_the_page_quotes_is_in_the_source(entry: str) -> None:
    if entry not in TORCH:
        assert any(quotes(entry, message) for message in [*EVERYWHERE, *helper_texts()])


def test_no_text_has_two_entries() -> None:
    assert len(set(entries())) == len(entries())


@pytest.mark.parametrize("path", COVERED, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_errors_that_users_meet_are_on_the_page(path: Path) -> None:
    missing = [
        f"line {line}: {message}"
        for line, kind, message in messages(path)
        if kind not in INNER
        and message not in PLAIN
        and not any(quotes(entry, message) for entry in entries())
    ]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("entry", entries())
def test_entries_say_enough_to_be_searched_for(entry: str) -> None:
    assert max(map(len, entry.split("..."))) >= SHORTEST


def test_the_check_can_fail() -> None:
    assert quotes("expected a ... window", f"{ANY}: expected a {ANY} window, got {ANY}")
    assert not quotes("expected a window", f"expected a {ANY} window")
