"""The command line: ``python -m lightning_compressm``, or ``compressm``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from lightning_compressm.cli import commands
from lightning_compressm.cli._options import make_parser
from lightning_compressm.errors import CompreSSMError

__all__ = ["main"]

_COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": commands.inspect,
    "compress": commands.compress,
    "plot": commands.plot,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; None for the program's own.

    Returns:
        The exit status: 0, or 1 with one line on the standard error. Wrong usage exits with 2.

    Example:
        >>> import tempfile, torch
        >>> from lightning_compressm.nn import LRU
        >>> with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        ...     torch.save(LRU(2, 3).state_dict(), file.name)
        ...     main(["inspect", file.name, "--json"])  # doctest: +ELLIPSIS
        {
        ...
          "history": []
        }
        0
    """
    try:
        parser = make_parser()
    except ImportError:
        return _fail("the command line needs more: pip install 'lightning_compressm[cli]'")
    given = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    options = given[given.command].as_dict()
    options.pop("config", None)
    try:
        _COMMANDS[given.command](**options)
    except (CompreSSMError, ImportError, OSError, ValueError) as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    print(f"compressm: error: {' '.join(message.split())}", file=sys.stderr)
    return 1
