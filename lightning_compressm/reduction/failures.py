"""What went wrong while a layer was looked at, how far it reaches, and what is done about it.

Some failures say something about one layer only: then that layer stays as it is, and training goes
on. Others say that the model, the program or another process is broken: then the run has to stop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import torch

from lightning_compressm.errors import CompreSSMError, IllConditionedError

__all__ = ["LinAlgError", "Reach", "TroubleError", "describe", "numerics", "reach_of"]

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


class Reach(IntEnum):
    """How far a failure reaches, worst last: processes go by the worst that one of them met."""

    NONE = 0
    DEVICE = 1  # out of memory: once more on the CPU
    LAYER = 2  # this layer stays as it is
    RUN = 3  # the run stops


class TroubleError(Exception):
    """Work on one layer failed, on this process or another one; all of them know.

    Attributes:
        reach: ``DEVICE`` or ``LAYER``.
        reason: what happened, for people.
    """

    def __init__(self, reach: Reach, reason: str) -> None:
        super().__init__(reason)
        self.reach = reach
        self.reason = reason


def reach_of(error: Exception) -> Reach:
    """How far an exception reaches.

    Example:
        >>> reach_of(torch.linalg.LinAlgError("svd did not converge")).name
        'LAYER'
        >>> reach_of(TypeError("no such argument")).name
        'RUN'
    """
    # The CPU's allocator has no exception type of its own.
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if memory or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return Reach.DEVICE
    if isinstance(error, LinAlgError | IllConditionedError):
        return Reach.LAYER
    return Reach.RUN


def describe(error: BaseException) -> str:
    """Type, first line and notes of an exception.

    Example:
        >>> describe(ValueError("too small"))
        'ValueError: too small'
    """
    lines = str(error).strip().splitlines()
    said = ": ".join([type(error).__name__, *lines[:1]])
    notes = ", ".join(getattr(error, "__notes__", ()))
    return f"{said} ({notes})" if notes else said


@contextmanager
def numerics() -> Iterator[None]:
    """A block of linear algebra: an unexpected ``RuntimeError`` of it is about the numbers.

    LAPACK, MAGMA and cuSOLVER report what they can't do in many ways.

    Raises:
        LinAlgError: in the place of any other ``RuntimeError`` but those with a
            meaning of their own (out of memory, the package's errors, missing kernels).

    Example:
        >>> with numerics():
        ...     raise RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED")
        Traceback (most recent call last):
            ...
        torch._C._LinAlgError: cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED
    """
    try:
        yield
    except (CompreSSMError, NotImplementedError, RecursionError):
        raise
    except RuntimeError as error:
        if reach_of(error) is not Reach.RUN:
            raise
        raise LinAlgError(str(error)) from error
