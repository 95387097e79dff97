"""Several steps of a change: all of them are done, or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

__all__ = ["all_or_nothing"]


@contextmanager
def all_or_nothing(undo: ExitStack | None = None) -> Iterator[ExitStack]:
    """Steps that are taken back, the latest first, if one of them fails.

    Args:
        undo: is given what takes all of them back later; closing it does so.

    Yields:
        A stack on which each step puts what takes it back.

    Example:
        >>> done, undo = [], ExitStack()
        >>> with all_or_nothing(undo) as steps:
        ...     done.append(1)
        ...     _ = steps.callback(done.pop)
        >>> undo.close()
        >>> done
        []
    """
    with ExitStack() as steps:
        yield steps
        kept = steps.pop_all()
        if undo is not None:
            undo.callback(kept.close)
