"""How arguments that only the kernels know are refused."""

from __future__ import annotations

from typing import Any

__all__ = ["refuse_given"]


def refuse_given(function: str, **arguments: Any) -> None:
    """Raise ``NotImplementedError`` if one of the arguments is neither None nor False."""
    given = [name for name, value in arguments.items() if value is not None and value is not False]
    if given:
        raise NotImplementedError(
            f"on a CPU {function} works without {', '.join(given)}, which "
            f"{'was' if len(given) == 1 else 'were'} given; leave that out, or use a CUDA device"
        )
