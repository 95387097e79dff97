"""Text that is on every machine: bytes of a folder, by default Python's standard library."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.data.files import MissingDataError
from benchmarks.data.sequences import InMemoryDataModule, Split, TokenDataModule, shuffled_rows
from benchmarks.data.tokens import N_BYTE_TOKENS, byte_tokens

DATA_SEED = 1
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def find_texts(root: str | None, pattern: str) -> list[Path]:
    """Files below a folder, without installed packages and tests, the largest first.

    Args:
        root: None for the standard library of the running Python. Its files differ from version to
            version, and so do the data.
        pattern: As for `Path.glob`.

    Raises:
        MissingDataError: Fewer than ten files, of which none could be set aside.
    """
    folder = Path(root or sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    found = sorted(
        path
        for path in folder.glob(pattern)
        if path.is_file() and skipped.isdisjoint(path.relative_to(folder).parts)
    )
    if len(found) < 10:
        raise MissingDataError(
            f"expected at least ten files that match {pattern!r} in {folder.absolute()}, got "
            f"{len(found)}: give the data module another `root` or `pattern`"
        )
    return sorted(found, key=lambda path: -path.stat().st_size)


def split_files(paths: Sequence[Path]) -> dict[Split, list[Path]]:
    """Eight of ten files train, one validates, one tests: no text is in two splits.

    The ten are of about the same size, so that the splits' sizes come out as they should.
    """
    parts: dict[Split, list[Path]] = {name: [] for name in SPLITS}
    chance = random.Random(DATA_SEED)
    for start in range(0, len(paths), 10):
        ten = list(paths[start : start + 10])
        for name in ("val", "test"):
            if len(ten) > 2:
                parts[name].append(ten.pop(chance.randrange(len(ten))))
        parts["train"] += ten
    for part in parts.values():
        # With the largest first, a limit would leave all small files out.
        chance.shuffle(part)
    return parts


def passages(paths: Sequence[Path], length: int, limit: int | None = None) -> Tensor:
    """Tokens (passages, length), uint8: the files one after the other, cut into pieces.

    Args:
        paths: Of the files.
        length: Of a passage; what is left over at the end of a file goes.
        limit: Most passages.
    """
    rows = [torch.empty(0, length, dtype=torch.uint8)]
    for path in paths:
        tokens = byte_tokens(path.read_bytes())
        rows.append(tokens[: len(tokens) // length * length].view(-1, length))
        if limit is not None and sum(map(len, rows)) >= limit:
            break
    return torch.cat(rows)[:limit]


class TextDataModule(InMemoryDataModule):
    """The next byte, everywhere: tokens (length,) and the same one step later.

    Args:
        root: Folder; None for Python's standard library.
        pattern: Of the files, as for `Path.glob`.
        batch_size: Passages in a batch.
        seed: Fixes the order of the training batches.
        length: Steps of a passage.
        limit: Most training passages; a tenth as many in the other splits.

    Raises:
        MissingDataError: From `setup`: fewer than ten files.

    Example:
        >>> data = TextDataModule(length=32, limit=50)
        >>> tokens, targets = data.tensors("train")
        >>> tokens.shape, bool((tokens[:, 1:] == targets[:, :-1]).all())
        (torch.Size([50, 32]), True)
    """

    n_tokens = N_BYTE_TOKENS

    def __init__(
        self,
        root: str | None = None,
        pattern: str = "*.py",
        batch_size: int = 32,
        seed: int = 0,
        length: int = 256,
        limit: int = 10_000,
    ) -> None:
        super().__init__(batch_size, seed)
        self.root, self.pattern = root, pattern
        self.length = length
        self.limit = limit

    def prepare(self, sequences: Tensor) -> Tensor:
        """Tokens as int64, as an embedding wants them."""
        return sequences.long()

    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        files = split_files(find_texts(self.root, self.pattern))
        limits = {"train": self.limit}
        rows = {
            name: passages(part, self.length + 1, limits.get(name, max(1, self.limit // 10)))
            for name, part in files.items()
        }
        return {name: (part[:, :-1], part[:, 1:]) for name, part in rows.items()}


class TextSourceDataModule(TokenDataModule):
    """Which package is a passage from? Bytes (length,), one class for each pattern.

    The classes are equally frequent, and no file is in two splits.

    Args:
        root: Folder; None for Python's standard library.
        patterns: Of the files of each class, as for `Path.glob`. Two, as the data set has two
            classes.
        batch_size: Passages in a batch.
        seed: Fixes the order of the training batches.
        length: Steps of a passage.

    Raises:
        MissingDataError: From `setup`: a class has fewer than ten files.
        ValueError: There are not two patterns.

    Example:
        >>> TextSourceDataModule(length=256).n_classes
        2
    """

    n_tokens = N_BYTE_TOKENS
    n_classes = 2

    def __init__(
        self,
        root: str | None = None,
        patterns: Sequence[str] = ("asyncio/*.py", "email/*.py"),
        batch_size: int = 32,
        seed: int = 0,
        length: int = 256,
    ) -> None:
        super().__init__(batch_size, seed)
        if len(patterns) != self.n_classes:
            raise ValueError(f"expected two patterns, one for each class, got {list(patterns)}")
        self.root = root
        self.patterns = tuple(patterns)
        self.length = length

    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        sources = [split_files(find_texts(self.root, pattern)) for pattern in self.patterns]
        return {
            name: _balanced([passages(part[name], self.length) for part in sources])
            for name in SPLITS
        }


def _balanced(classes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """As many passages of each class, in turn."""
    fewest = min(map(len, classes))
    rows = torch.stack([part[:fewest] for part in classes], 1).flatten(0, 1)
    return rows, torch.arange(len(rows)) % len(classes)


class TextPairDataModule(TokenDataModule):
    """Are two passages from one file? Bytes (2, length), two classes, equally frequent.

    Args:
        root: Folder; None for Python's standard library.
        pattern: Of the files, as for `Path.glob`.
        batch_size: Pairs in a batch.
        seed: Fixes the order of the training batches.
        length: Steps of a passage.
        limit: Most training pairs; a tenth as many in the other splits.

    Raises:
        MissingDataError: From `setup`: fewer than ten files.

    Example:
        >>> data = TextPairDataModule(length=32, limit=40)
        >>> pairs, classes = data.tensors("train")
        >>> pairs.shape, classes.bincount().tolist()
        (torch.Size([40, 2, 32]), [20, 20])
    """

    n_tokens = N_BYTE_TOKENS
    n_classes = 2

    def __init__(
        self,
        root: str | None = None,
        pattern: str = "*.py",
        batch_size: int = 32,
        seed: int = 0,
        length: int = 256,
        limit: int = 4000,
    ) -> None:
        super().__init__(batch_size, seed)
        self.root, self.pattern = root, pattern
        self.length = length
        self.limit = limit

    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        files = split_files(find_texts(self.root, self.pattern))
        return {
            name: make_pairs(
                [passages([path], self.length) for path in part],
                self.limit if name == "train" else max(2, self.limit // 10),
                DATA_SEED + number,
            )
            for number, (name, part) in enumerate(files.items())
        }


def make_pairs(files: Sequence[Tensor], limit: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pairs of neighbours in a file, every second one broken up.

    Args:
        files: The passages (passages, length) of every file.
        limit: Most pairs.
        seed: Fixes which.

    Returns:
        Pairs (pairs, 2, length) and classes: 1 for two passages of one file, 0 for two files.
    """
    couples = torch.cat(
        [rows[: len(rows) // 2 * 2].unflatten(0, (-1, 2)) for rows in files if len(rows) > 1]
    )
    origin = torch.cat(
        [
            torch.full((len(rows) // 2,), number)
            for number, rows in enumerate(files)
            if len(rows) > 1
        ]
    )
    order = shuffled_rows(len(couples), seed)[: limit // 2 * 2]
    couples, origin = couples[order], origin[order]
    together = torch.arange(len(couples)) % 2
    # A broken pair gets the second half of the next broken pair, if that is of another file.
    broken = (together == 0).nonzero().flatten()
    partner = broken.roll(1)
    apart = origin[broken] != origin[partner]
    swapped = couples.clone()
    swapped[broken, 1] = couples[partner, 1]
    kept = torch.ones(len(couples), dtype=torch.bool)
    kept[broken[~apart]] = False
    return swapped[kept], together[kept]
