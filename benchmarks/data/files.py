"""Files that have to be there: what to say when they are not, and whether they are genuine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from http.client import HTTPException
from pathlib import Path

LRA_PAGE = (
    'https://github.com/google-research/long-range-arena, section "Dataset Setup": lra_release.gz'
)


class MissingDataError(FileNotFoundError):
    """A data set is not where it should be; nothing is downloaded without being asked."""


class DownloadError(MissingDataError):
    """A data set was to be downloaded, and could not be."""


class DamagedDataError(RuntimeError):
    """A file is there, but not the one that was published."""


def require(paths: Iterable[Path], name: str, page: str, advice: str = "") -> None:
    """Raise unless all paths exist.

    Args:
        paths: Files or folders.
        name: Of the data set.
        page: Where its makers offer it, and under which name.
        advice: A further way to get it; ends the message.

    Raises:
        MissingDataError: Says which are missing, from where to get them, and where to put them.

    Example:
        >>> require([Path("nowhere/x.tsv")], "ListOps", "its page")
        Traceback (most recent call last):
        ...
        benchmarks.data.files.MissingDataError: ListOps: ...
    """
    missing = [path for path in paths if not path.exists()]
    if missing:
        places = "\n".join(f"  {path.absolute()}" for path in missing)
        raise MissingDataError(
            f"{name}: expected these, and none is downloaded by itself:\n{places}\n"
            f"Get the data set from {page}, and put it there (or give the data module another "
            f"`root`).{advice}"
        )


def download(fetch: Callable[[], object], paths: Iterable[Path], name: str, page: str) -> None:
    """Fetch a data set that is to be downloaded.

    Args:
        fetch: Does it, and raises where it fails.
        paths: What it brings.
        name: Of the data set.
        page: Where its makers offer it, and under which name.

    Raises:
        DownloadError: What went wrong, and how to do without a network.

    Example:
        >>> def fetch() -> None:
        ...     raise OSError("no route to host")
        >>> download(fetch, [Path("data/x")], "MNIST", "its page")
        Traceback (most recent call last):
        ...
        benchmarks.data.files.DownloadError: MNIST: the download failed: no route to host...
    """
    try:
        fetch()
    except (OSError, RuntimeError, HTTPException) as error:
        places = "\n".join(f"  {path.absolute()}" for path in paths)
        raise DownloadError(
            f"{name}: the download failed: {str(error).strip()}\nTry again where there is a "
            f"network, or get the data set from {page}, and put these there:\n{places}"
        ) from error


def check_md5(path: Path, expected: str, name: str, page: str) -> None:
    """Raise unless a file has the published checksum.

    Raises:
        DamagedDataError: Expected checksum, actual checksum, what to do.
    """
    with path.open("rb") as file:
        got = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if got != expected:
        raise DamagedDataError(
            f"{name}: {path} has the MD5 sum {got}, expected {expected}: it is incomplete, or not "
            f"the published file. Get it again from {page}."
        )


def read_lines(path: Path) -> Iterable[bytes]:
    """Lines without their end, one after the other: some files don't fit into memory."""
    with path.open("rb") as file:
        for line in file:
            yield line.rstrip(b"\r\n")
