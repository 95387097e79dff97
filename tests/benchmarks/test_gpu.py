"""The command for a machine with a CUDA device, as far as one without can show that it works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.data.files import DamagedDataError
from benchmarks.gpu import command, files, recording, sizes, tests, training
from benchmarks.gpu.images import MNISTFiles
from tests.benchmarks.tiny_files import write_mnist
from tests.conftest import REHEARSAL

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a rehearsal's results."""
    folder = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run"],
        cwd=ROOT,
        env=os.environ | {"OUT": str(folder)},
        text=True,
        capture_output=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_a_rehearsal_leaves_every_part_in_both_forms(rehearsed: Path) -> None:
    """No more than eight files, and none is hidden or half written."""
    assert {p.name for p in rehearsed.iterdir()} == {
        f"{part}.{ending}" for part in files.TITLES for ending in ("json", "md")
    }
    for part in files.TITLES:
        content = files.read(rehearsed, part)
        assert (content["status"], content["rehearsal"]) == ("done", True)
        assert content["results"]
        assert "Status: done\n" in (rehearsed / f"{part}.md").read_text()


@pytest.mark.slow
def test_a_rehearsal_runs_tests_and_measures_everything(rehearsed: Path) -> None:
    counts = files.read(rehearsed, "tests")["results"]["counts"]
    assert counts["passed"] > 50
    assert set(counts) == {"passed", "skipped"}
    sections = files.read(rehearsed, "speed")["results"]
    assert len(sections["Training steps"]) == len(sizes.REHEARSAL.steps)
    assert all("failed" not in section for section in sections.values())
    arms = files.read(rehearsed, "mnist")["results"]
    assert arms["full"]["readings"][-1][1] == 256
    assert arms["bare"]["readings"][-1][1] < 256
    assert all(0 <= arm["accuracy"] <= 1 for arm in arms.values())


@pytest.mark.slow
def test_without_a_device_every_part_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert command.main(["--out", str(tmp_path), "--parts", "card", "speed"]) == 1
    for part in ("card", "speed"):
        content = files.read(tmp_path, part)
        assert content["status"] == "skipped"
        assert "no CUDA device" in content["why"]


def settings(folder: Path) -> command.Settings:
    return command.Settings(1, ("speed",), folder, folder, True)


@pytest.mark.parametrize(
    ("code", "limit", "status", "why"),
    [
        ("print('so far'); raise SystemExit(3)", 60, "failed", "it ended with status 3"),
        ("print('so far', flush=True); import time; time.sleep(60)", 3, "stopped", "3 seconds"),
    ],
)
def test_a_part_that_breaks_or_hangs_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, limit: float, status: str, why: str
) -> None:
    """With what it had found by then, and the end of what it printed."""
    package = tmp_path / "benchmarks" / "gpu"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "worker.py").write_text(code)
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    started = time.monotonic()
    command.run("speed", limit, settings(tmp_path))
    assert time.monotonic() - started < 50
    content = files.read(tmp_path, "speed")
    assert content["status"] == status
    assert why in content["why"]
    assert "so far" in content["log"]
    assert "so far" in (tmp_path / "speed.md").read_text()


def test_a_broken_part_keeps_what_it_found(tmp_path: Path) -> None:
    files.write(tmp_path, "card", {"status": files.RUNNING, "results": {"a": 1}}, "| a | 1 |\n")
    files.end(tmp_path, "card", "failed", "it ended with status 1", "Traceback")
    content = files.read(tmp_path, "card")
    assert (content["status"], content["results"]) == ("failed", {"a": 1})
    page = (tmp_path / "card.md").read_text()
    assert "Status: failed: it ended with status 1\n" in page
    assert page.count("| a | 1 |") == page.count("Traceback") == page.count("# The card") == 1


TESTS = """
import pytest

def test_passes(): pass

def test_fails(): assert 1 == 2

def test_is_skipped(): pytest.skip("no reason")

@pytest.fixture
def broken():
    yield
    raise RuntimeError("after the test")

def test_breaks_afterwards(broken): pass

def test_ends_everything():
    import os
    os._exit(7)
"""


def test_every_result_is_recorded_at_once(tmp_path: Path) -> None:
    """Also where a test takes the whole process along, or a file can't be imported."""
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_missing.py").write_text("import no_such_package\n")
    group = tests.Group.__new__(tests.Group)
    group.record, group.log = tmp_path / "record", tmp_path / "log"
    words = ["-m", "pytest", "-q", "-p", "benchmarks.gpu.recording", "-p", "no:cacheprovider"]
    words += ["--continue-on-collection-errors", "--rootdir", str(tmp_path), str(tmp_path)]
    environment = os.environ | {recording.VARIABLE: str(group.record)}
    with group.log.open("w") as log:
        group.process = subprocess.Popen(
            [sys.executable, *words], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
        group.process.wait(100)
    found = {entry["test"].rpartition("::")[2]: entry for entry in group.results()}
    assert {name: entry["outcome"] for name, entry in found.items()} == {
        "test_missing.py": "skipped",
        "test_passes": "passed",
        "test_fails": "failed",
        "test_is_skipped": "skipped",
        "test_breaks_afterwards": "failed",
        "test_ends_everything": recording.STARTED,
    }
    assert found["test_missing.py"]["text"] == "the package no_such_package is missing"
    assert found["test_is_skipped"]["text"] == "no reason"
    assert "assert 1 == 2" in found["test_fails"]["text"]
    assert "status 7" in group.broken
    results, page = tests.summary([group])
    said = tests.verdict(results, 0)
    assert said == "2 tests failed, 1 tests did not come to an end, 1 processes broke"
    assert "after the test" in page


def test_the_files_with_tests_for_cuda_are_found() -> None:
    names = [path.name for path in tests.marked()]
    assert names[0] == "test_compiled.py"
    assert {"test_scans.py", "test_layers.py", "test_training.py"} <= set(names)
    assert tests.REHEARSAL == REHEARSAL


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_read_without_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """The same as torchvision reads; and packed files stay packed."""
    sums = write_mnist(tmp_path, 20, 5, packed=packed)
    monkeypatch.setattr(MNISTFiles, "checksums", sums)
    before = sorted((tmp_path / "MNIST" / "raw").iterdir())
    data = MNISTFiles(root=str(tmp_path))
    sequences, classes = data.tensors("train")
    test, labels = data.tensors("test")
    assert sorted((tmp_path / "MNIST" / "raw").iterdir()) == before
    assert (sequences.shape, test.shape) == ((18, 784, 1), (5, 784, 1))
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert len(classes) == 18
    datasets = pytest.importorskip("torchvision.datasets")
    if not packed:
        theirs = datasets.MNIST(tmp_path, train=False).data.flatten(1).unsqueeze(-1) / 255
        assert torch.equal(test, theirs)


def test_files_that_are_not_mnist_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, 20, 5, packed=True)
    with pytest.raises(DamagedDataError, match=r"MD5 sum .*, expected"):
        MNISTFiles(root=str(tmp_path)).setup()


def test_as_many_steps_as_the_time_allows() -> None:
    assert training.affordable(1e-3, 100.0) == 85_000
    assert training.affordable(1.0, 1.0) == training.FEWEST
    assert training.affordable(1e-9, 100.0) == 200_000


BARE = """
import builtins, importlib, sys
found = builtins.__import__
def needed(name, globals=None, *rest, **more):
    ours = (globals or {}).get("__name__", "").split(".")[0]
    if name.split(".")[0] in BLOCKED and ours in ("benchmarks", "lightning_compressm", "tests"):
        raise ModuleNotFoundError(name)  # what Lightning imports where it is there is not ours
    return found(name, globals, *rest, **more)
builtins.__import__ = needed
sys.modules["hypothesis"] = None
for part in PARTS:
    importlib.import_module(part)
"""


def test_only_torch_lightning_and_pytest_are_needed() -> None:
    blocked = {"rich", "jsonargparse", "docstring_parser", "torchvision", "sklearn", "matplotlib"}
    blocked |= {"hypothesis", "scipy", "threadpoolctl", "transformers", "mamba_ssm", "yaml"}
    names = ("card", "tests", "speed", "mnist", "recording", "worker")
    parts = [f"benchmarks.gpu.{name}" for name in names] + ["tests.conftest"]
    parts += [f"tests.cuda.{path.stem}" for path in (ROOT / "tests" / "cuda").glob("test_*.py")]
    code = f"BLOCKED, PARTS = {blocked}, {parts}\n{BARE}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_numbers_are_written_whole(tmp_path: Path) -> None:
    files.write(tmp_path, "speed", {"status": "done", "path": Path("x")}, "")
    assert json.loads((tmp_path / "speed.json").read_text()) == {
        "part": "speed", "status": "done", "path": "x",
    }  # fmt: skip
