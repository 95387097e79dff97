"""Writes tiny data sets in the published formats, byte by byte as the formats say."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def idx(values: Bytes) -> bytes:
    """The IDX format of MNIST: two zeros, type (8 for bytes), rank, sizes, values in C order."""
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_mnist(
    root: Path, train: int, test: int, *, packed: bool, name: str = "MNIST"
) -> dict[str, str]:
    """Random digits in `root`/`name`/raw; the MD5 sum of every file, unpacked."""
    chance = np.random.default_rng(0)
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    sums: dict[str, str] = {}
    for part, size in (("train", train), ("t10k", test)):
        arrays = {
            f"{part}-images-idx3-ubyte": chance.integers(0, 256, (size, 28, 28), dtype=np.uint8),
            f"{part}-labels-idx1-ubyte": (np.arange(size) % 10).astype(np.uint8),
        }
        for name, values in arrays.items():
            content = idx(values)
            sums[name] = md5(content)
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return sums


def write_cifar(root: Path, size: int) -> dict[str, str]:
    """Five training batches, a test batch and the names of the classes, pickled; MD5 sums."""
    chance = np.random.default_rng(0)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    sums: dict[str, str] = {}

    def write(name: str, content: object) -> None:
        pickled = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(pickled)
        sums[name] = md5(pickled)

    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        pixels = chance.integers(0, 256, (size, 3072), dtype=np.uint8)
        write(name, {"data": pixels, "labels": [number % 10 for number in range(size)]})
    write("batches.meta", {"label_names": list("abcdefghij")})
    return sums


def write_imdb(root: Path) -> None:
    """Two reviews of each kind to train, one to test."""
    for part, size in (("train", 2), ("test", 1)):
        for side in ("neg", "pos"):
            folder = root / part / side
            folder.mkdir(parents=True)
            for number in range(size):
                text = f"{part} {side} {number} caf\u00e9"
                (folder / f"{number}_7.txt").write_text(text, encoding="utf-8")


def write_pathfinder(root: Path, level: str, images: int, pixels: int) -> list[Bytes]:
    """Images in two folders, with the lists that say which is which; the images."""
    from PIL import Image

    chance = np.random.default_rng(0)
    drawn: list[Bytes] = []
    base = root / level
    (base / "metadata").mkdir(parents=True)
    for folder in range(2):
        (base / "imgs" / str(folder)).mkdir(parents=True)
        lines = []
        for number in range(images):
            image = chance.integers(0, 256, (pixels, pixels), dtype=np.uint8)
            drawn.append(image)
            Image.fromarray(image).save(base / "imgs" / str(folder) / f"sample_{number}.png")
            lines.append(f"imgs/{folder} sample_{number}.png {number} {number % 2} 1.8 6 2 0.75")
        (base / "metadata" / f"{folder}.npy").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return drawn
