"""Every stage of a reduction at which a failure is injected, how, and what must come of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightning_compressm.errors import CalibrationError, IllConditionedError, NonFiniteError

Outcome = Literal["skip", "error", "cpu", "reduce second"]
"""skip: trained on as if there were no callback; error: every rank stops, nothing was changed;
cpu: the undisturbed result, and a note; reduce second: one layer is skipped, the other reduced."""

Make = Callable[[], Exception]


@dataclass(frozen=True)
class Fault:
    """A failure of one function.

    Attributes:
        stage: what fails.
        target: "module:attribute", the function that fails.
        make: makes the exception.
        outcome: what must come of it.
        setup: the run that it is injected into, see ``fault_worker.SETUPS``.
        calls: which calls fail, counted from 1; ``None`` for all.
        after: fail when the function has done its work, not before.
    """

    stage: str
    target: str
    make: Make
    outcome: Outcome
    setup: str = "linear"
    calls: tuple[int, ...] | None = None
    after: bool = False

    @property
    def name(self) -> str:
        """Unique, and fit for a test's name."""
        calls = "" if self.calls is None else "-call" + "+".join(map(str, self.calls))
        function = self.target.rpartition(".")[2].rpartition(":")[2]
        late = "-after" if self.after else ""
        return f"{self.setup}-{self.stage}-{function}-{self.make.__name__}{calls}{late}"


def linalg() -> Exception:
    return torch.linalg.LinAlgError("the algorithm failed to converge")


def runtime() -> Exception:
    return RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED")


def memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def host_memory() -> Exception:
    return RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes")


def ill() -> Exception:
    return IllConditionedError("eigenvectors are too close to dependent")


def broken() -> Exception:
    return NonFiniteError("expected finite parameters, got NaN")


def no_data() -> Exception:
    return CalibrationError("expected calibration data, got none")


def bug() -> Exception:
    return TypeError("unsupported operand type(s)")


_PACKAGE = "lightning_compressm"
_LRU = f"{_PACKAGE}.families.lru:LRUFamily"
_MAMBA = f"{_PACKAGE}.families.mamba:MambaFamily"
_SELECTIVE = f"{_PACKAGE}.reduction.selective"
_BALANCE, _CALIBRATION = f"{_PACKAGE}.control.balance", f"{_PACKAGE}.control.calibration"
_APPLY, _OPTIMIZER = f"{_PACKAGE}.surgery.apply", f"{_PACKAGE}.surgery.optimizer"
_DDP = "lightning.pytorch.strategies:DDPStrategy"

LINEAR = [
    Fault("read", f"{_LRU}.system", linalg, "skip"),
    Fault("read", f"{_LRU}.system", memory, "cpu", calls=(1,)),
    Fault("read", f"{_LRU}.system", memory, "skip"),
    Fault("read", f"{_LRU}.system", host_memory, "skip"),
    Fault("read", f"{_LRU}.system", bug, "error"),
    Fault("read", f"{_LRU}.system", runtime, "error"),
    Fault("read", f"{_LRU}.system", broken, "error"),
    Fault("gramian", f"{_BALANCE}:gramians", runtime, "skip"),
    Fault("gramian", f"{_BALANCE}:gramians", memory, "cpu", calls=(1,)),
    Fault("gramian", f"{_BALANCE}:gramians", broken, "error", calls=(1,)),
    Fault("cholesky", "torch.linalg:cholesky_ex", linalg, "skip"),
    Fault("cholesky", "torch.linalg:cholesky_ex", memory, "cpu", calls=(1,)),
    Fault("eigh", "torch.linalg:eigh", linalg, "skip", setup="short"),
    Fault("eigh", "torch.linalg:eigh", memory, "cpu", setup="short", calls=(1,)),
    Fault("qr", "torch.linalg:qr", runtime, "skip", setup="twins"),
    Fault("svd", "torch.linalg:svd", runtime, "skip"),
    Fault("svd", "torch.linalg:svd", memory, "cpu", calls=(1,)),
    Fault("svd", "torch.linalg:svd", memory, "skip"),
    Fault("eig", "torch.linalg:eig", runtime, "skip"),
    Fault("eig", "torch.linalg:eig", memory, "cpu", calls=(1,)),
    Fault("eig", "torch.linalg:inv_ex", linalg, "skip"),
    Fault("eig", f"{_PACKAGE}.control._eigen:inverse", ill, "skip"),
    Fault("eig", f"{_PACKAGE}.control._eigen:inverse", broken, "skip"),
    Fault("svd", "torch.linalg:svd", runtime, "reduce second", setup="both", calls=(1,)),
    Fault("order", f"{_PACKAGE}.reduction.linear:LinearAnalysis.cut", bug, "error"),
    Fault("plan", f"{_LRU}.write", linalg, "skip"),
    Fault("plan", f"{_LRU}.reduction_plan", memory, "cpu", calls=(1,)),
    Fault("plan", f"{_LRU}.reduction_plan", bug, "error"),
    Fault("plan", f"{_PACKAGE}.surgery.plan:SurgeryPlan.merge", bug, "error"),
    Fault("plan", f"{_PACKAGE}.surgery.plan:SurgeryPlan.to_dict", memory, "error"),
    Fault("broadcast", "pickle:dumps", bug, "error", calls=(1,)),
]

SELECTIVE = [
    Fault("read", f"{_MAMBA}.signals", linalg, "skip", setup="selective"),
    Fault("read", f"{_MAMBA}.signals", memory, "cpu", setup="selective", calls=(1,)),
    Fault("read", f"{_MAMBA}.signals", bug, "error", setup="selective"),
    Fault("read", f"{_MAMBA}.check_finite", broken, "error", setup="selective"),
    Fault("read", f"{_MAMBA}.check_finite", no_data, "error", setup="selective"),
    Fault("statistics", f"{_CALIBRATION}:_statistics", runtime, "skip", setup="selective"),
    Fault("statistics", f"{_CALIBRATION}:_statistics", memory, "cpu", "selective", (1,)),
    Fault("statistics", f"{_CALIBRATION}:_statistics", memory, "skip", setup="selective"),
    Fault("eigh", "torch.linalg:eigh", linalg, "skip", setup="selective"),
    Fault("eigh", "torch.linalg:eigh", memory, "cpu", setup="selective", calls=(1,)),
    Fault("svd", "torch.linalg:svdvals", runtime, "skip", setup="selective"),
    Fault("rank", f"{_SELECTIVE}:rank_states", runtime, "skip", setup="selective"),
    Fault("rank", f"{_SELECTIVE}:rank_states", memory, "cpu", "selective", (1,)),
    Fault("refit", "torch.linalg:solve", linalg, "skip", setup="selective"),
    Fault("refit", "torch.linalg:solve", memory, "cpu", setup="selective", calls=(1,)),
    Fault("refit", f"{_MAMBA}.write_readout", bug, "error", setup="selective"),
    Fault("plan", f"{_MAMBA}.selection_plan", bug, "error", setup="selective"),
    Fault("plan", f"{_MAMBA}.selection_plan", memory, "cpu", setup="selective", calls=(1,)),
    Fault("check", f"{_MAMBA}.run", memory, "cpu", setup="selective", calls=(1,)),
    Fault("check", f"{_MAMBA}.run", memory, "cpu", setup="selective", calls=(2,)),
    Fault("check", f"{_MAMBA}.run", bug, "error", setup="selective", calls=(2,)),
    Fault("refit", f"{_PACKAGE}.reduction.output_fit:_gradients", memory, "cpu", "local", (3,)),
    Fault("refit", f"{_PACKAGE}.reduction.output_fit:_gradients", linalg, "skip", "local", (3,)),
    Fault("refit", f"{_PACKAGE}.reduction.output_fit:_gradients", bug, "error", "local", (3,)),
]

SWAP = [
    Fault("swap", f"{_APPLY}:_new_tensor", memory, "skip", calls=(2,)),
    Fault("swap", f"{_APPLY}:_new_tensor", broken, "error", calls=(2,)),
    Fault("swap", f"{_APPLY}:_set_tensor", bug, "error", calls=(3,)),
    Fault("swap", f"{_APPLY}:_set_tensor", memory, "skip", calls=(3,)),
    Fault("swap", f"{_APPLY}:_attribute_restorer", bug, "error"),
    Fault("optimizer", f"{_OPTIMIZER}:transport_states", memory, "skip"),
    Fault("optimizer", f"{_OPTIMIZER}:transport_states", bug, "error"),
    Fault("optimizer", f"{_OPTIMIZER}:_swap", memory, "skip", after=True),
    Fault("optimizer", f"{_OPTIMIZER}:_swap", bug, "error", after=True),
    Fault("gradients", f"{_PACKAGE}.model.change:carry_gradients", memory, "skip", "manual"),
    Fault("gradients", f"{_PACKAGE}.model.change:carry_gradients", bug, "error", "manual"),
    Fault(
        "gradients", f"{_PACKAGE}.model.change:carry_gradients", bug, "error", "manual", after=True
    ),
]

REWRAP = [
    Fault("rewrap", f"{_DDP}.configure_ddp", runtime, "error"),
    Fault("rewrap", f"{_DDP}.configure_ddp", memory, "error", after=True),
]

# The first calls of `reduce` are those of Lightning's logging.
EXCHANGE = [
    Fault("exchange", f"{_DDP}.reduce", runtime, "error", setup="selective", calls=(12,)),
    Fault("exchange", f"{_DDP}.broadcast", runtime, "error", setup="selective", calls=(2,)),
]

FAULTS = [*LINEAR, *SELECTIVE, *SWAP]
"""All that one process can meet, alone or among others."""

Where = Literal["alone", "all", "rank 0", "rank 1"]

WHERE: tuple[Where, ...] = ("alone", "all", "rank 0", "rank 1")

# A rank that fails here leaves the other in the middle of an exchange, until it ends.
BREAKING: list[tuple[Fault, Where]] = [
    (fault, where) for where in WHERE[2:] for fault in (*REWRAP, *EXCHANGE)
]


def armed(where: Where, rank: int) -> bool:
    """Whether the failure happens on this rank."""
    return where in ("alone", "all", f"rank {rank}")


def fits(fault: Fault, where: Where) -> bool:
    """Rank 1 sends nothing, so that nothing can fail there."""
    return not (fault.stage == "broadcast" and where in ("alone", "rank 1"))


class Injection:
    """Makes a function fail, and counts.

    Attributes:
        enabled: only then calls are counted and can fail.
        fired: how many calls have failed.
    """

    def __init__(self, fault: Fault, fail: Callable[[], None] | None = None) -> None:
        self.fault = fault
        self.enabled = False
        self.calls = self.fired = 0
        self._fail = fail or self._raise

    def _raise(self) -> None:
        raise self.fault.make()

    def _due(self) -> bool:
        if not self.enabled:
            return False
        self.calls += 1
        due = self.fault.calls is None or self.calls in self.fault.calls
        self.fired += due
        return due

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put the failing function in the place of the real one."""
        module, _, path = self.fault.target.partition(":")
        owner: Any = importlib.import_module(module)
        *parts, name = path.split(".")
        for part in parts:
            owner = getattr(owner, part)
        own = vars(owner).get(name)
        real = getattr(owner, name)

        def failing(*args: Any, **kwargs: Any) -> Any:
            due = self._due()
            if due and not self.fault.after:
                self._fail()
            result = real(*args, **kwargs)
            if due:
                self._fail()
            return result

        setattr(owner, name, staticmethod(failing) if isinstance(own, staticmethod) else failing)
        try:
            yield
        finally:
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
