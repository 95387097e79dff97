"""Pathfinder: are two circles joined by a dashed path? Released images, and images of our own."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.data.files import LRA_PAGE, require
from benchmarks.data.pathfinder_images import Scene, draw_images
from benchmarks.data.sequences import SequenceDataModule, Split, shuffled_rows

Level = Literal["curv_baseline", "curv_contour_length_9", "curv_contour_length_14"]
# The split and the data are part of the task, so their seeds are fixed.
SPLIT_SEED = 0
DATA_SEED = 1
# One released image is an empty file.
EMPTY = "pathfinder32/curv_baseline/imgs/0/sample_172.png"


class PathfinderBase(SequenceDataModule):
    """Grey images as sequences (pixels, 1) with values in [0, 1], kept as bytes."""

    d_input = 1
    n_classes = 2

    def prepare(self, sequences: Tensor) -> Tensor:
        """Bytes to [0, 1]."""
        return sequences.unsqueeze(-1) / 255


class PathfinderDataModule(PathfinderBase):
    """The released images of Long Range Arena; 80% train, 10% validate, 10% test, drawn once.

    All images are read into memory, one byte a pixel: 200,000 of them take 0.2 GB with 32 x 32
    pixels and 3.3 GB with 128 x 128, in every process.

    Args:
        root: The folder pathfinder32 or pathfinder128.
        batch_size: Sequences in a batch.
        seed: Fixes the order of the training batches.
        resolution: Pixels along an edge.
        level: The published CompreSSM code trains on `curv_baseline`; Long Range Arena itself on
            the longest paths, `curv_contour_length_14`.

    Raises:
        MissingDataError: From `setup`: what to get from where, and where to put it.
        ValueError: From `setup`: an image has another size, or a line of the lists another form.

    Source:
        Linsley et al. (2018), arXiv 1805.08315; Tay et al. (2020), arXiv 2011.04006, section 2.2.5.

    Example:
        >>> PathfinderDataModule(resolution=128).length
        16384
    """

    def __init__(
        self,
        root: str = "data/lra_release/pathfinder32",
        batch_size: int = 64,
        seed: int = 0,
        resolution: int = 32,
        level: Level = "curv_baseline",
    ) -> None:
        super().__init__(batch_size, seed)
        self.root = Path(root)
        self.resolution = resolution
        self.level = level
        self.length = resolution**2

    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        samples = self._samples()
        with ThreadPoolExecutor() as pool:
            images = torch.stack(list(pool.map(self._read, [path for path, _ in samples])))
        classes = torch.tensor([label for _, label in samples])
        order = shuffled_rows(len(samples), SPLIT_SEED)
        tenth = len(order) // 10
        parts = order.tensor_split([len(order) - 2 * tenth, len(order) - tenth])
        names: tuple[Split, ...] = ("train", "val", "test")
        return {
            name: (images[rows], classes[rows]) for name, rows in zip(names, parts, strict=True)
        }

    def _samples(self) -> list[tuple[Path, int]]:
        """Files and labels, in the lists' order."""
        folder = self.root / self.level
        page = f"{LRA_PAGE}, folder pathfinder{self.resolution}"
        require([folder / "metadata"], "Pathfinder", page)
        lists = sorted((folder / "metadata").glob("*.npy"), key=lambda path: int(path.stem))
        if not lists:
            require([folder / "metadata" / "0.npy"], "Pathfinder", page)
        samples = [_sample(folder, path, line) for path in lists for line in _lines(path)]
        return [(path, label) for path, label in samples if not path.as_posix().endswith(EMPTY)]

    def _read(self, path: Path) -> Tensor:
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.array(image.convert("L"))
        if pixels.shape != (self.resolution, self.resolution):
            raise ValueError(
                f"{path}: expected {self.resolution} x {self.resolution} pixels, got "
                f"{pixels.shape}; give the data module the `resolution` of its `root`"
            )
        return torch.from_numpy(pixels).flatten()


def _lines(path: Path) -> list[str]:
    # Text, in spite of its name.
    return path.read_text(encoding="utf-8").splitlines()


def _sample(folder: Path, source: Path, line: str) -> tuple[Path, int]:
    fields = line.split()
    if len(fields) < 4 or fields[3] not in ("0", "1"):
        raise ValueError(
            f"{source}: expected folder, file, number and a label (0 or 1) in a line, got {line!r}"
        )
    return folder / fields[0] / fields[1], int(fields[3])


class GeneratedPathfinderDataModule(PathfinderBase):
    """Small Pathfinder images by the published rules: half of them with joined circles.

    Args:
        batch_size: Sequences in a batch.
        seed: Fixes the order of the training batches, not the data.
        train_size: Images to train with.
        val_size: Images to validate with.
        test_size: Images to test with.
        size: Pixels along an edge.
        dashes: Dashes of the two long paths.
        distractors: Shorter paths beside them.

    Source:
        Linsley et al. (2018), arXiv 1805.08315, section 3.

    Example:
        >>> data = GeneratedPathfinderDataModule(train_size=8, val_size=4, test_size=4)
        >>> sequences, classes = data.tensors("test")
        >>> sequences.shape, classes.bincount().tolist()
        (torch.Size([4, 256, 1]), [2, 2])
    """

    def __init__(
        self,
        batch_size: int = 50,
        seed: int = 0,
        train_size: int = 4000,
        val_size: int = 500,
        test_size: int = 1000,
        size: int = 16,
        dashes: int = 4,
        distractors: int = 2,
    ) -> None:
        super().__init__(batch_size, seed)
        self.scene = Scene(size=size, dashes=dashes, distractors=distractors)
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        self.length = size**2

    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        return {
            name: _drawn(self.scene, size, DATA_SEED + number)
            for number, (name, size) in enumerate(self.sizes.items())
        }


# A comparison builds the same data for every arm and seed, and each image takes 6 ms.
_drawn = functools.lru_cache(maxsize=8)(draw_images)
