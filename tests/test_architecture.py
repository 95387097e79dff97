"""The rules of the house, read off the source: who imports whom, what is public, file sizes."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_compressm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_compressm"
NAME = "lightning_compressm"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Lowest first: whoever lives on a floor knows those below, and nobody beside.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "__about__",
        "errors",
        "_averages",
        "_names",
        "_plain",
        "_precision",
        "_rules",
        "_undo",
    ),
    ("_tensors",),
    ("control", "nn", "plot", "surgery"),
    ("families", "compat"),
    ("model",),
    ("reduction",),
    ("compressor", "callbacks", "regularizer"),
    ("testing", "cli"),
    ("__main__",),
)
MAX_LINES = 300

# Scripts outside this repository call these names: removing one breaks them.
PUBLIC = {
    "": {
        "CompreSSMCallback",
        "Family",
        "HankelMonitor",
        "compress",
        "find_ssm_layers",
        "hankel_spectra",
        "load_compressed",
        "register_family",
    },
    ".nn": {"LRU", "S4D", "S5", "linear_recurrence", "selective_scan"},
    ".compat": {"enable_fast_mamba_cpu", "enable_mamba_ssm_cpu"},
    ".control": {
        "DiagonalLTI",
        "balanced_truncation",
        "gramians",
        "hankel_singular_values",
        "order_for_energy",
    },
}


def _name(path: Path) -> str:
    """Path of a source file relative to the package, as pytest shows it."""
    return path.relative_to(PACKAGE).as_posix()


def _part(path: Path) -> str:
    """Folder of the package that a file lies in; empty for the top level."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def _statements(tree: ast.AST, lazy: bool, types: bool = False) -> Iterator[ast.AST]:
    """Nodes that run on import; with `lazy` function bodies, with `types` TYPE_CHECKING blocks."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not types:
            for other in node.orelse:
                yield other
                yield from _statements(other, lazy)
            continue
        if not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield node
        yield from _statements(node, lazy, types)


def imports(path: Path, *, lazy: bool = True, types: bool = False) -> set[str]:
    """Absolute dotted names of all that a file imports: `from a.b import c` gives `a.b.c`."""
    package = [NAME, *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in _statements(ast.parse(path.read_text()), lazy, types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def _within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _modules() -> list[str]:
    found = pkgutil.walk_packages(lightning_compressm.__path__, NAME + ".")
    missing = () if importlib.util.find_spec("triton") else (f"{NAME}.nn._triton",)
    return [NAME, *(m.name for m in found if not m.name.endswith(("__main__", *missing)))]


def _exports() -> list[tuple[str, str]]:
    """Every (module, name) listed in an `__all__` of the package or of one of its folders."""
    packages = [NAME, *(m for m in _modules() if hasattr(importlib.import_module(m), "__path__"))]
    listed = dict.fromkeys(packages)
    return [(m, n) for m in listed for n in getattr(importlib.import_module(m), "__all__", [])]


def test_the_reader_of_imports_sees_all_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "nn").mkdir()
    path = tmp_path / "nn" / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "import a.b\n"
        "from . import c\n"
        "from ..d import e\n"
        "if TYPE_CHECKING:\n    import hidden\n"
        "try:\n    import f\nexcept ImportError:\n    pass\n"
        "class K:\n    import g\n    def method(self):\n        import late\n"
    )
    now = {"typing.TYPE_CHECKING", "a.b", f"{NAME}.nn.c", f"{NAME}.d.e", "f", "g"}
    assert imports(path, lazy=False) == now
    assert imports(path) == now | {"late"}
    assert imports(path, types=True) == now | {"late", "hidden"}


LIGHTNING = ("lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning")


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_one_file_imports_lightning(path: Path):
    """Types count as well: written for one of its two names, they would be wrong for the other."""
    if _name(path) == "callbacks/_lightning.py":
        return
    found = [n for n in imports(path, types=True) if _within(n, *LIGHTNING)]
    assert not found, f"{_name(path)} imports {found}; only callbacks/_lightning.py may"


@pytest.mark.parametrize("path", [p for p in SOURCES if _part(p) == "control"], ids=_name)
def test_control_is_tensors_only(path: Path):
    found = imports(path)
    assert not [n for n in found if _within(n, "torch.nn", "torch.optim", "torch.utils")]
    own = [n for n in found if _within(n, NAME)]
    allowed = tuple(f"{NAME}.{n}" for n in ("control", "errors", "_precision", "_rules"))
    assert not [n for n in own if not _within(n, *allowed)]
    nodes = ast.walk(ast.parse(path.read_text()))
    attributes = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)]
    assert not [a for a in attributes if _within(a, "torch.nn", "torch.optim")]


def _room(name: str) -> str:
    """The folder or the file at the top of the package that a dotted name leads to."""
    return name.removeprefix(f"{NAME}.").partition(".")[0]


def _floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def _own_imports(path: Path) -> set[str]:
    """Dotted names of our own that a file imports, whenever; the lazy face names its in a table."""
    return {n for n in imports(path) if _within(n, NAME) and n != f"{NAME}.__about__.__version__"}


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_nothing_reaches_up(path: Path):
    """A room knows itself and those on lower floors."""
    if _name(path) == "__init__.py":
        return
    own = _part(path) or path.stem
    for name in _own_imports(path):
        room = _room(name)
        assert room == own or _floor(room) < _floor(own), f"{_name(path)} imports {name}"


def test_every_room_has_a_floor():
    rooms = {_part(path) or path.stem for path in SOURCES} - {"__init__"}
    assert rooms == {room for rooms in FLOORS for room in rooms}


def test_no_file_is_reached_from_itself():
    files = {".".join([NAME, *p.relative_to(PACKAGE).with_suffix("").parts]): p for p in SOURCES}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}

    def home(name: str) -> str:
        while name not in modules:
            name = name.rpartition(".")[0]
        return name

    arrows = {m: {home(n) for n in _own_imports(p)} - {m} for m, p in modules.items() if m != NAME}
    try:
        list(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_no_import_of_our_own_inside_a_function(path: Path):
    """What a file needs stands at its top; an example's layer, for tests alone, comes late."""
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    late = {
        f"{function.name}: {ast.unparse(node)}"
        for function in functions
        if not (_part(path) == "families" and function.name == "example")
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom | ast.Import) and NAME in ast.unparse(node)
    }
    assert not late, f"{_name(path)} imports {late}"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_optional_packages_are_imported_late(path: Path):
    if _part(path) == "compat":
        return
    optional = ("mamba_ssm", "transformers", "matplotlib", "rich", "jsonargparse", "sklearn")
    if _name(path) != "nn/_triton.py":
        optional = (*optional, "triton", f"{NAME}.nn._triton")
    found = [n for n in imports(path, lazy=False) if _within(n, *optional)]
    assert not found, f"{_name(path)} imports {found} when it is imported"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_modules_stay_short(path: Path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{_name(path)} has {lines} lines; split it (limit {MAX_LINES})"


def test_version_is_written_once():
    from lightning_compressm.__about__ import __version__

    assert lightning_compressm.__version__ == __version__
    tracked = [*SOURCES, ROOT / "setup.cfg", ROOT / "pyproject.toml", *ROOT.glob("docs/*.py")]
    again = [p for p in tracked if f'"{__version__}"' in p.read_text() and p.stem != "__about__"]
    assert not again
    assert f"= {__version__}" not in (ROOT / "setup.cfg").read_text()


def test_import_is_light():
    """Nothing optional is imported, and Lightning only with the first callback that is named."""
    optional = ["mamba_ssm", "transformers", "matplotlib", "sklearn", "rich", "jsonargparse"]
    # torch's compiler imports triton itself where it is installed; the kernel is ours.
    optional.append(f"{NAME}.nn._triton")
    code = (
        f"import json, sys; import {NAME}, {NAME}.control, {NAME}.nn, {NAME}.compat;"
        f"from {NAME} import Family;"
        f"heavy = [m for m in {[*LIGHTNING, *optional]!r} if m in sys.modules];"
        f"from {NAME} import CompreSSMCallback;"
        f"print(json.dumps([heavy, any(m in sys.modules for m in {LIGHTNING!r})]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[], True]


def test_star_import_and_dir():
    space: dict[str, object] = {}
    exec(f"from {NAME} import *", space)
    names = lightning_compressm.__all__
    assert not [n for n in names if n not in space or n not in dir(lightning_compressm)]


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        lightning_compressm.no_such_name  # noqa: B018


@pytest.mark.parametrize("module", PUBLIC)
def test_public_surface(module: str):
    loaded = importlib.import_module(NAME + module)
    missing = {n for n in PUBLIC[module] if n not in loaded.__all__ or not hasattr(loaded, n)}
    assert not missing


@pytest.mark.parametrize("module", _modules())
def test_all_resolves(module: str):
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", [])
    assert len(names) == len(set(names)), f"{module}.__all__ names something twice"
    assert not [n for n in names if not hasattr(loaded, n)]


@pytest.mark.parametrize(("module", "name"), _exports())
def test_public_things_are_documented_with_an_example(module: str, name: str):
    thing = getattr(importlib.import_module(module), name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return
    doc = inspect.getdoc(thing)
    assert doc, f"{module}.{name} has no docstring"
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return
    assert "Example:" in doc, f"{module}.{name} has no Example: section"
    assert ">>>" in doc, f"the example of {module}.{name} does not run (no >>>)"


def test_every_folder_is_a_package():
    """A folder without `__init__.py` works from a checkout and is missing from the wheel."""
    folders = {p.parent for p in SOURCES}
    assert not [f for f in folders if not (f / "__init__.py").exists()]
    assert (PACKAGE / "py.typed").exists()
