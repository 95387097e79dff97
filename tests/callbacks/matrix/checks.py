"""What a cell of the matrix has to have ended with."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_compressm import load_compressed

from ..helpers import trainer
from .cells import Cell
from .run import EPOCHS, KEPT, STATES, Task, loader

Result = dict[str, Any]

# Largest difference of losses and logits between two and one process, and between compiled and
# eager. They add up the same numbers in another order, which the low precisions round differently.
TOLERANCES = {
    "64-true": 1e-6,
    "32-true": 1e-2,
    "bf16-mixed": 0.1,
    "16-mixed": 0.1,  # on a CPU Lightning runs it as bf16-mixed
    "bf16-true": 0.3,
}


def tolerance(cell: Cell) -> float:
    """Muon iterates in bfloat16 whatever the precision."""
    return max(TOLERANCES[cell["precision"]], 0.1 if cell["optimizer"] == "Muon" else 0.0)


def check_reduction(cell: Cell, result: Result) -> None:
    """In the middle of training, and everything that tells a dimension agrees."""
    reduced = [event for event in result["history"] if event["action"] == "reduce"]
    tied = cell["training"] == "tied layers"
    assert len(reduced) == (1 if tied else 2)
    kept = KEPT[cell["layer"]]
    assert {event["new_state_dim"] for event in reduced} == {kept}
    assert {event["epoch"] for event in reduced} == {0}
    assert set(result["state_dims"].values()) == {kept}
    assert result["found"] == result["state_dims"]
    assert len(result["found"]) == 2
    assert result["tied"] == tied
    assert result["epochs"] == EPOCHS
    assert torch.isfinite(torch.tensor(result["losses"])).all()
    assert all(v.isfinite().all() for v in result["state_dict"].values())


def check_training(cell: Cell, result: Result) -> None:
    """Each trained parameter is in one optimizer and is moved by the next step; no other is."""
    assert len(result["owned"]) == len(result["moved"]) == EPOCHS
    for owned, moved, gradients in zip(
        result["owned"], result["moved"], result["gradients"], strict=True
    ):
        assert owned.pop("stale") == 0
        for name, wanted in result["trainable"].items():
            used = wanted and ".spare." not in name
            assert owned[name] == wanted, f"{name} is in {owned[name]} optimizers"
            went = moved[name] or (_rounds_away(cell) and gradients[name])
            assert went if used else not moved[name], f"{name}: moved is {moved[name]}"


def _rounds_away(cell: Cell) -> bool:
    """Whether a step may be lost in rounding: a coarse precision, or steps as small as gradients.

    The gradient itself must then be there.
    """
    return cell["precision"] == "bf16-true" or cell["optimizer"] in ("SGD, momentum", "LBFGS")


def check_ranks(first: Result, second: Result) -> None:
    """Two processes end alike, bit for bit."""
    assert first["history"] == second["history"]
    assert first["state_dims"] == second["state_dims"]
    assert first["rates"] == second["rates"]
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), f"{name} differs between ranks"


def difference(results: list[Result], single: Result) -> float:
    """How far losses and outputs are from those of a single process, at most."""
    losses = torch.tensor([result["losses"] for result in results], dtype=torch.float64)
    apart = _apart(losses.mean(0), torch.tensor(single["losses"], dtype=torch.float64))
    return max(apart, _apart(results[0]["logits"], single["logits"]))


def check_against_one_process(cell: Cell, results: list[Result], single: Result) -> None:
    """The same global batches give the same losses, outputs and, in float64, parameters."""
    assert results[0]["state_dims"] == single["state_dims"]
    assert difference(results, single) <= tolerance(cell)
    if tolerance(cell) < 1e-3:
        for name, value in results[0]["state_dict"].items():
            assert _apart(value, single["state_dict"][name]) <= 1e-5, name


def _apart(one: Tensor, other: Tensor) -> float:
    return (one.double() - other.double()).abs().max().item()


def check_against_no_reduction(result: Result, single: Result, free: Result) -> None:
    """Learning rates are those of a run without the callback; so is all before the reduction."""
    assert result["rates"] == free["rates"]
    first_epoch = len(free["losses"]) // EPOCHS
    assert single["losses"][:first_epoch] == free["losses"][:first_epoch]
    assert set(free["found"].values()) == {STATES}


def check_around(cell: Cell, result: Result, out: Path) -> None:
    """What the other callback is there for has happened."""
    around = cell["around"]
    if around == "ModelCheckpoint":
        _check_checkpoints(cell, result, out)
    if around == "EarlyStopping":
        assert result["stopped_epoch"] == EPOCHS - 1
    if around == "ModelPruning of other layers":
        for name in ("encoder", "decoder"):
            weight = result["state_dict"][f"net.{name}.weight"]
            assert (weight == 0).double().mean() >= 0.25
    if around == "LearningRateMonitor":
        _check_logged_rates(result, out)


def _check_logged_rates(result: Result, out: Path) -> None:
    """Each column holds, step by step, the rates of one parameter group."""
    with next((out / "csv").rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in rows[0] if name.startswith("lr-")]
    groups = list(zip(*result["rates"], strict=True))
    assert len(columns) == len(groups)
    for column in columns:
        logged = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        assert {step for step, _ in logged} == set(result["batches"])
        assert any(set(logged) <= set(zip(result["batches"], g, strict=False)) for g in groups)


def _check_checkpoints(cell: Cell, result: Result, out: Path) -> None:
    last = load_compressed(Task(cell), result["last"])
    for name, value in last.state_dict().items():
        assert torch.equal(value, result["state_dict"][name].to(value.dtype)), name
    assert len(result["best"]) == 2
    for path, score in result["best"].items():
        model = load_compressed(Task(cell), path)
        fit = trainer(out, precision=cell["precision"])
        (found,) = fit.validate(model, loader(1), verbose=False)
        assert abs(found["val_loss"] - score.item()) < 1e-5
