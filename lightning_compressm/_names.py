"""Names of modules, and the glob patterns by which users mean several of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

__all__ = ["check_patterns", "is_inside", "matches", "plain_name"]


def plain_name(path: str) -> str:
    """A module's name without the wrappers of ``torch.compile``.

    Example:
        >>> plain_name("net._orig_mod.ssm")
        'net.ssm'
    """
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def is_inside(name: str, path: str) -> bool:
    """Whether a name is that of a module, or of something in it; everything is in the root.

    Example:
        >>> is_inside("net.ssm", "net"), is_inside("network", "net")
        (True, False)
    """
    return not path or name == path or name.startswith(f"{path}.")


def matches(name: str, patterns: Iterable[str] | None) -> bool:
    """Whether a name is what one of the glob patterns describes.

    Example:
        >>> matches("net.ssm", ["net.*"])
        True
    """
    return any(fnmatchcase(name, pattern) for pattern in patterns or ())


def check_patterns(argument: str, patterns: Iterable[str] | None, names: Sequence[str]) -> None:
    """Refuse a glob pattern that describes none of the names.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> check_patterns("layers", ["net.*"], ["net.ssm"])
    """
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{argument}: the pattern {pattern!r} matches no SSM layer; expected one of: "
                f"{', '.join(map(repr, names))}."
            )
