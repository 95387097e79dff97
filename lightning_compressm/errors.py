"""Every error the package raises on purpose; all derive from :class:`CompreSSMError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "CompreSSMError",
    "IllConditionedError",
    "NonFiniteError",
    "SurgeryError",
    "UnstableSystemError",
    "UnsupportedLayerError",
    "UnsupportedOptimizerError",
    "UnsupportedStrategyError",
    "about",
    "add_note",
]


class CompreSSMError(Exception):
    """Base class: ``except CompreSSMError`` catches whatever the package refuses to do."""


class UnstableSystemError(CompreSSMError, ValueError):
    """An eigenvalue lies on or outside the unit circle, so the Gramians do not exist."""


class IllConditionedError(CompreSSMError, ValueError):
    """A change of basis is too badly conditioned for its result to be trusted."""


class NonFiniteError(CompreSSMError, ValueError):
    """NaN or infinity in a layer's parameters or in a result computed from them."""


class UnsupportedLayerError(CompreSSMError, TypeError):
    """A layer is not known, or is built in a way that can't be reduced safely."""


class UnsupportedStrategyError(CompreSSMError, TypeError):
    """A Trainer strategy or precision under which a reduction can't be done safely."""


class UnsupportedOptimizerError(CompreSSMError, TypeError):
    """An optimizer whose state can't be carried over to parameters of another shape."""


class SurgeryError(CompreSSMError, RuntimeError):
    """A plan does not fit the model; raised before anything is changed, or after undoing it."""


class CalibrationError(CompreSSMError, ValueError):
    """A selective layer can't be analysed without data that went through it."""


class CheckpointError(CompreSSMError, RuntimeError):
    """A checkpoint can't be read, or does not fit the model."""


@contextmanager
def about(what: object) -> Iterator[None]:
    r"""Errors from here say what they are about.

    Example:
        >>> try:
        ...     with about("layer 'lru'"):
        ...         raise NonFiniteError("eigenvalues: NaN")
        ... except NonFiniteError as error:
        ...     print(error, *getattr(error, "__notes__", ()), sep="\n")
        eigenvalues: NaN
        layer 'lru'
    """
    try:
        yield
    except (CompreSSMError, ValueError) as error:
        add_note(error, str(what))
        raise


def add_note(error: Exception, note: str) -> None:
    r"""Say more about an error: as a note, or in its message where Python (3.10) has none.

    Example:
        >>> error = ValueError("eigenvalues: NaN")
        >>> add_note(error, "layer 'lru'")
        >>> print(error, *getattr(error, "__notes__", ()), sep="\n")
        eigenvalues: NaN
        layer 'lru'
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.args = ("\n".join([*map(str, error.args[:1]), note]), *error.args[1:])
