"""MNIST from its published files without torchvision, and images of noise for a rehearsal."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.data.files import DamagedDataError, require
from benchmarks.data.images import MNIST_PAGE, ImageDataModule, SMNISTDataModule
from benchmarks.data.sequences import Split


class MNISTFiles(SMNISTDataModule):
    """The same data set, read by itself; packed files stay as they are.

    Raises:
        MissingDataError: From `prepare_data`: what to get from where, and where to put it.
        DamagedDataError: From `setup`: a file is not the published one.
    """

    def __init__(self, root: str = "data", batch_size: int = 50, seed: int = 0) -> None:
        super().__init__(root, batch_size, seed)  # without torchvision nothing is downloaded

    def prepare_data(self) -> None:
        require([self._path(name) for name in self.checksums], "MNIST", MNIST_PAGE)

    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        train, test = ((self._images(p), self._idx(f"{p}-labels-idx1")) for p in ("train", "t10k"))
        return self.with_validation(train, test)

    def _path(self, name: str) -> Path:
        """The packed file where there is no other."""
        plain = self.root / "MNIST" / "raw" / name
        packed = plain.with_name(f"{name}.gz")
        return packed if packed.exists() and not plain.exists() else plain

    def _images(self, part: str) -> Tensor:
        return self._idx(f"{part}-images-idx3").flatten(1).unsqueeze(-1)

    def _idx(self, stem: str) -> Tensor:
        name = f"{stem}-ubyte"
        path = self._path(name)
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        got = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if got != self.checksums[name]:
            raise DamagedDataError(
                f"MNIST: {path} holds data with the MD5 sum {got}, expected "
                f"{self.checksums[name]}. Get it again from {MNIST_PAGE}."
            )
        return parse_idx(content)


def parse_idx(content: bytes) -> Tensor:
    """A tensor of bytes from the IDX format: two zeros, 8, rank, sizes, values in C order.

    Example:
        >>> parse_idx(bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 2, 5, 6]))
        tensor([[5, 6]], dtype=torch.uint8)
    """
    zeros, kind, rank = struct.unpack_from(">HBB", content)
    if (zeros, kind) != (0, 8):
        raise DamagedDataError(
            f"expected an IDX file of bytes, got one that begins {content[:4]!r}"
        )
    shape = struct.unpack_from(f">{rank}I", content, 4)
    # A copy: tensors may be written to, bytes not.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * rank).view(shape)


class NoiseImages(ImageDataModule):
    """Random images with random classes: nothing to be learnt, no files needed."""

    d_input, n_classes, length = 1, 10, 784

    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (600, self.length, 1), dtype=torch.uint8, generator=generator)
        classes = torch.randint(self.n_classes, (600,), generator=generator)
        return self.with_validation((pixels[:500], classes[:500]), (pixels[500:], classes[500:]))

    def prepare(self, sequences: Tensor) -> Tensor:
        """Bytes to [0, 1]."""
        return sequences / 255
