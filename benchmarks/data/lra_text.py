"""The two byte-level text tasks of Long Range Arena: reviews (IMDB) and pairs of papers (AAN)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.data.files import LRA_PAGE, read_lines, require
from benchmarks.data.sequences import Split, TokenDataModule, shuffled_rows
from benchmarks.data.tokens import N_BYTE_TOKENS, padded_bytes

SPLIT_SEED = 0
IMDB_PAGE = (
    "https://ai.stanford.edu/~amaas/data/sentiment/ (Large Movie Review Dataset v1.0, "
    "aclImdb_v1.tar.gz)"
)


class IMDBDataModule(TokenDataModule):
    """Is a review for or against the film? Bytes (4096,), two classes, 25,000 train, 25,000 test.

    Args:
        root: The folder aclImdb, with train and test, each with neg and pos.
        batch_size: Sequences in a batch.
        seed: Fixes the order of the training batches.
        length: Steps; longer reviews are cut, shorter ones padded.
        val_share: Share of the training reviews that validates. With 0, as published, the test
            reviews validate, too: don't choose anything by that validation.

    Raises:
        MissingDataError: From `setup`: what to get from where, and where to put it.
        ValueError: `val_share` is not in [0, 1).

    Source:
        Maas et al. (2011), "Learning word vectors for sentiment analysis"; byte by byte: Tay et al.
        (2020), arXiv 2011.04006, section 2.2.2.

    Example:
        >>> IMDBDataModule().n_tokens
        256
    """

    n_tokens = N_BYTE_TOKENS
    n_classes = 2

    def __init__(
        self,
        root: str = "data/aclImdb",
        batch_size: int = 32,
        seed: int = 0,
        length: int = 4096,
        val_share: float = 0.0,
    ) -> None:
        super().__init__(batch_size, seed)
        if not 0 <= val_share < 1:
            raise ValueError(f"val_share must be in [0, 1), got {val_share}")
        self.root = Path(root)
        self.length = length
        self.val_share = val_share

    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        folders = [self.root / part / side for part in ("train", "test") for side in ("neg", "pos")]
        require(folders, "IMDB", IMDB_PAGE)
        train, test = self._read("train"), self._read("test")
        if not self.val_share:
            return {"train": train, "val": test, "test": test}
        texts, classes = train
        order = shuffled_rows(len(texts), SPLIT_SEED)
        kept, val = order.tensor_split([len(order) - round(self.val_share * len(order))])
        return {
            "train": (texts[kept], classes[kept]),
            "val": (texts[val], classes[val]),
            "test": test,
        }

    def _read(self, part: str) -> tuple[Tensor, Tensor]:
        rows: list[Tensor] = []
        classes: list[int] = []
        for label, side in enumerate(("neg", "pos")):
            for path in sorted((self.root / part / side).glob("*.txt")):
                rows.append(padded_bytes(path.read_bytes(), self.length))
                classes.append(label)
        if not rows:
            require([self.root / part / "pos" / "*.txt"], "IMDB", IMDB_PAGE)
        return torch.stack(rows), torch.tensor(classes)


class AANDataModule(TokenDataModule):
    """Does one paper cite the other? Two texts as bytes (2, 4000), two classes.

    The released files hold 147,086 pairs to train, 18,090 to validate and 17,437 to test.

    Args:
        root: Folder with new_aan_pairs.train.tsv, .eval.tsv and .test.tsv.
        batch_size: Pairs in a batch.
        seed: Fixes the order of the training batches.
        length: Steps; longer texts are cut, shorter ones padded.

    Raises:
        MissingDataError: From `setup`: what to get from where, and where to put it.
        ValueError: From `setup`: a line is not of the released form.

    Source:
        Radev et al. (2013), "The ACL anthology network corpus"; as pairs of bytes: Tay et al.
        (2020), arXiv 2011.04006, section 2.2.3.

    Example:
        >>> AANDataModule().length
        4000
    """

    n_tokens = N_BYTE_TOKENS
    n_classes = 2
    names: ClassVar[dict[Split, str]] = {"train": "train", "val": "eval", "test": "test"}

    def __init__(
        self,
        root: str = "data/lra_release/tsv_data",
        batch_size: int = 64,
        seed: int = 0,
        length: int = 4000,
    ) -> None:
        super().__init__(batch_size, seed)
        self.root = Path(root)
        self.length = length

    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        files = {name: self.root / f"new_aan_pairs.{part}.tsv" for name, part in self.names.items()}
        require(files.values(), "AAN", f"{LRA_PAGE}, folder tsv_data")
        return {name: read_pairs(path, self.length) for name, path in files.items()}


def read_pairs(path: Path, length: int) -> tuple[Tensor, Tensor]:
    """Pairs of texts (samples, 2, length), uint8, and classes (samples,).

    A line has a label (0.0 or 1.0), the names of two papers and their texts, with tabs between.

    Raises:
        ValueError: A line is not of that form.
    """
    rows: list[Tensor] = []
    classes: list[int] = []
    for number, line in enumerate(read_lines(path), start=1):
        fields = line.split(b"\t")
        if len(fields) != 5 or fields[0] not in (b"0.0", b"1.0", b"0", b"1"):
            raise ValueError(
                f"{path}, line {number}: expected label, two names and two texts with tabs "
                f"between, got {len(fields)} fields, the first {fields[0][:20]!r}"
            )
        rows.append(_pair(fields[3:], length))
        classes.append(int(float(fields[0])))
    return torch.stack(rows), torch.tensor(classes)


def _pair(texts: Iterable[bytes], length: int) -> Tensor:
    return torch.stack([padded_bytes(text, length) for text in texts])
