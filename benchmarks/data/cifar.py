"""Sequential CIFAR-10: images read pixel by pixel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.data.images import PublishedImages
from benchmarks.data.sequences import Split

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

CIFAR_PAGE = (
    "https://www.cs.toronto.edu/~kriz/cifar.html (CIFAR-10 python version, cifar-10-python.tar.gz)"
)


class SCIFARDataModule(PublishedImages):
    """CIFAR-10 as sequences (1024, 3): 45,000 train, 5,000 validate, 10,000 test.

    Every channel is normalised by the training images' mean and deviation. The folder
    cifar-10-batches-py lies in `root`, as published; torchvision verifies its checksums before it
    unpickles anything.

    Args:
        root: Folder of torchvision's data sets.
        batch_size: Sequences in a batch.
        seed: Fixes the order of the training batches.
        download: Fetch what is missing. Under DDP one process of a machine does.

    Raises:
        MissingDataError: From `prepare_data`: what to get from where, and where to put it.
        DownloadError: From `prepare_data`: the download failed.
        DamagedDataError: From `prepare_data`: a file is not the published one.

    Source:
        Krizhevsky (2009), "Learning multiple layers of features from tiny images".

    Example:
        >>> SCIFARDataModule(root="data").length
        1024
    """

    title = "CIFAR-10"
    page = CIFAR_PAGE
    d_input = 3
    n_classes = 10
    length = 1024
    mean = (0.4914, 0.4822, 0.4465)
    deviation = (0.2023, 0.1994, 0.2010)

    @staticmethod
    def dataset() -> type[CIFAR10]:
        """The class that knows files and addresses."""
        from torchvision.datasets import CIFAR10

        return CIFAR10

    def files(self) -> dict[Path, str]:
        """Five training batches, the test batch, the names of the classes."""
        published = self.dataset()
        folder = self.root / published.base_folder
        batches = dict(published.train_list + published.test_list)
        files = {**batches, published.meta["filename"]: published.meta["md5"]}
        return {folder / name: expected for name, expected in files.items()}

    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        train, test = (self.dataset()(self.root, train=part) for part in (True, False))
        return self.with_validation(*(_pixels(part) for part in (train, test)))

    def prepare(self, sequences: Tensor) -> Tensor:
        """Bytes to zero mean and unit variance."""
        mean, deviation = torch.tensor(self.mean), torch.tensor(self.deviation)
        return (sequences / 255 - mean) / deviation


def _pixels(images: Any) -> tuple[Tensor, Tensor]:
    """Rows of pixels (samples, 1024, 3), uint8, and classes."""
    return torch.from_numpy(images.data).flatten(1, 2), torch.tensor(images.targets)
