"""Every cell of the matrix: real Trainers, one process and two, each against its references."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from packaging.version import Version

from ...features import needs_strict_ranks
from ...processes import run_one, run_pair
from . import cells, checks
from .cells import Cell, key
from .run import eager, run

HEAVY = 1200  # seconds for a launch that many cells share, on a busy machine


def _params(processes: int) -> list[object]:
    quick = cells.quick_cells()
    return [
        pytest.param(cell, id=key(cell), marks=[] if key(cell) in quick else pytest.mark.slow)
        for cell in cells.cells()
        if cells.processes(cell) == processes
    ]


def _lacking(cell: Cell) -> str:
    """What this machine, or its versions, can't run of a cell; empty if nothing."""
    by_hand = cell["training"] in ("manual optimization", "several optimizers")
    if cell["layer"] == "mamba_ssm Mamba" and find_spec("mamba_ssm") is None:
        return "mamba_ssm is not installed"
    if cell["around"] == "EMAWeightAveraging" and not hasattr(pl.callbacks, "EMAWeightAveraging"):
        return "this version of Lightning has no EMAWeightAveraging"
    if "Rich" in cell["around"] and Version(pl.__version__) < Version("2.5"):
        return "Lightning 2.4 fails in today's rich"
    if cell["optimizer"] in ("Adafactor", "Muon") and not hasattr(torch.optim, cell["optimizer"]):
        return f"this version of torch has no {cell['optimizer']}"
    if by_hand and cell["DDP option"] == "static_graph" and needs_strict_ranks.args[0]:
        return str(needs_strict_ranks.kwargs["reason"])
    return ""


def _need(cell: Cell) -> None:
    if reason := _lacking(cell):
        pytest.skip(reason)


def _load(out: Path, rank: int | str = 0) -> checks.Result:
    for error in out.glob("error.*.txt"):
        pytest.fail(error.read_text()[-3000:])
    result: checks.Result = torch.load(out / f"{rank}.pt")
    return result


def _judge(cell: Cell, results: list[checks.Result], out: Path, tmp: Path) -> None:
    run(eager(cell), tmp / "single", devices=1)
    run(eager(cell), tmp / "free", devices=1, reduce=False)
    single, free = _load(tmp / "single"), _load(tmp / "free")
    for result in (*results, single):
        checks.check_reduction(cell, result)
        checks.check_training(cell, result)
        checks.check_against_no_reduction(result, single, free)
    for result in results[1:]:
        checks.check_ranks(results[0], result)
    checks.check_against_one_process(cell, results, single)
    checks.check_around(cell, results[0], out)


@pytest.mark.parametrize("cell", _params(1))
def test_one_process(cell: Cell, tmp_path: Path) -> None:
    _need(cell)
    run(cell, tmp_path / "run", devices=1)
    _judge(cell, [_load(tmp_path / "run")], tmp_path / "run", tmp_path)


@pytest.fixture(scope="module")
def launched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Cell], Path]:
    """Where a cell's results are; one launch runs all that are asked for of its strategy."""
    out = tmp_path_factory.mktemp("matrix")
    items = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = [spec.params["cell"] for spec in items if spec and "cell" in spec.params]
    done: set[str] = set()

    def launch(cell: Cell) -> Path:
        if key(cell) not in done:
            alike = [c for c in chosen if c["strategy"] == cell["strategy"] and not _lacking(c)]
            _launch(out, cell["strategy"], [key(c) for c in alike])
            done.update(map(key, alike))
        return out / key(cell)

    return launch


def _launch(out: Path, strategy: str, keys: list[str]) -> None:
    # Forked and spawned pairs belong to a Trainer, in one process.
    start = run_pair if strategy == "ddp" else run_one
    start("matrix.worker", out, *keys, timeout=HEAVY)


@pytest.mark.timeout(HEAVY)
@pytest.mark.parametrize("cell", _params(2))
def test_two_processes(cell: Cell, launched: Callable[[Cell], Path], tmp_path: Path) -> None:
    _need(cell)
    out = launched(cell)
    _judge(cell, [_load(out, rank) for rank in (0, 1)], out, tmp_path)
    if cell["strategy"] != "ddp":
        # The Trainer's own process gets the smaller weights back.
        main = _load(out, "main")
        assert main["found"] == _load(out)["found"]


@pytest.mark.slow
@pytest.mark.timeout(HEAVY)
@pytest.mark.parametrize("cell", cells.averaged_cells(), ids=key)
def test_averaged(cell: Cell, launched: Callable[[Cell], Path], tmp_path: Path) -> None:
    """Their copies of the weights are carried through the reduction."""
    if cells.processes(cell) == 1:
        test_one_process(cell, tmp_path)
    else:
        test_two_processes(cell, launched, tmp_path)


# -- the cells themselves ----------------------------------------------------------------------


def test_every_possible_pair_is_in_a_cell() -> None:
    held = {pair for cell in cells.cells() for pair in cells.pairs_of(cell)}
    assert not set(cells.wanted_pairs()) - held
    assert not [cell for cell in cells.cells() if cells.obstacle(cell)]
    assert 60 <= len(cells.cells()) <= 110
    assert len({key(cell) for cell in cells.cells()}) == len(cells.cells())


def test_a_pair_that_is_left_out_has_a_reason() -> None:
    wanted = set(cells.wanted_pairs())
    for one, values in cells.AXES.items():
        for other in (axis for axis in cells.AXES if axis > one):
            for a in values:
                for b in cells.AXES[other]:
                    pair = ((one, a), (other, b))
                    spawned = not cells.is_wanted(pair)
                    assert pair in wanted or spawned or cells.obstacle({one: a, other: b})


def test_quick_cells_hold_nearly_every_value() -> None:
    quick = [cell for cell in cells.cells() if key(cell) in cells.quick_cells()]
    held = {item for cell in quick for item in cell.items()}
    heavy = {"mamba_ssm Mamba", "ddp_fork", "ddp_spawn"}
    missing = {v for axis, values in cells.AXES.items() for v in values if (axis, v) not in held}
    assert {value for value in missing if "torch.compile" not in value} <= heavy
