"""Sequential MNIST and sequential CIFAR-10: images read pixel by pixel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from benchmarks.data.files import check_md5, require
from benchmarks.data.sequences import SequenceDataModule, Split, shuffled_rows

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

# The split is part of the task, so it has a seed of its own that no option changes.
SPLIT_SEED = 0
VAL_SHARE = 0.1
MNIST_PAGE = (
    "http://yann.lecun.com/exdb/mnist/ (THE MNIST DATABASE of handwritten digits) or its mirror "
    "https://ossci-datasets.s3.amazonaws.com/mnist/"
)
CIFAR_PAGE = (
    "https://www.cs.toronto.edu/~kriz/cifar.html (CIFAR-10 python version, cifar-10-python.tar.gz)"
)


class ImageDataModule(SequenceDataModule):
    """Images kept as bytes; a tenth of the training images validates.

    Args:
        root: Folder of torchvision's data sets.
        batch_size: Sequences in a batch.
        seed: Fixes the order of the training batches.
    """

    def __init__(self, root: str = "data", batch_size: int = 50, seed: int = 0) -> None:
        super().__init__(batch_size, seed)
        self.root = Path(root)

    def with_validation(
        self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
    ) -> dict[Split, tuple[Tensor, Tensor]]:
        """Three splits; the tenth that validates is drawn once and for all."""
        images, classes = train
        order = shuffled_rows(len(images), SPLIT_SEED)
        val, rest = order.split(
            [int(VAL_SHARE * len(order)), len(order) - int(VAL_SHARE * len(order))]
        )
        return {
            "train": (images[rest], classes[rest]),
            "val": (images[val], classes[val]),
            "test": test,
        }


class SMNISTDataModule(ImageDataModule):
    """MNIST as sequences (784, 1) with values in [0, 1]: 54,000 train, 6,000 validate, 10,000 test.

    The four files lie in `root`/MNIST/raw, packed (.gz) or not, as published; packed ones are
    unpacked beside them. Their checksums are verified.

    Args:
        root: Folder of torchvision's data sets.
        batch_size: Sequences in a batch.
        seed: Fixes the order of the training batches.

    Raises:
        MissingDataError: From `prepare_data`: what to get from where, and where to put it.
        DamagedDataError: From `prepare_data`: a file is not the published one.

    Source:
        LeCun et al. (1998), "Gradient-based learning applied to document recognition"; read pixel
        by pixel: Le, Jaitly & Hinton (2015), arXiv 1504.00941.

    Example:
        >>> SMNISTDataModule(root="data").length
        784
    """

    d_input = 1
    n_classes = 10
    length = 784
    # MD5 sums of the unpacked files.
    checksums: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }

    def prepare_data(self) -> None:
        """Unpack what is packed; refuse what is missing or not genuine."""
        from torchvision.datasets.utils import extract_archive

        folder = self.root / "MNIST" / "raw"
        for name in self.checksums:
            packed = folder / f"{name}.gz"
            if packed.exists() and not (folder / name).exists():
                extract_archive(str(packed), str(folder))
        require([folder / name for name in self.checksums], "MNIST", MNIST_PAGE)
        for name, expected in self.checksums.items():
            check_md5(folder / name, expected, "MNIST", MNIST_PAGE)

    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        from torchvision.datasets import MNIST

        train, test = (MNIST(self.root, train=part) for part in (True, False))
        return self.with_validation(
            *((part.data.flatten(1).unsqueeze(-1), part.targets) for part in (train, test))
        )

    def prepare(self, sequences: Tensor) -> Tensor:
        """Bytes to [0, 1]."""
        return sequences / 255


class SCIFARDataModule(ImageDataModule):
    """CIFAR-10 as sequences (1024, 3): 45,000 train, 5,000 validate, 10,000 test.

    Every channel is normalised by the training images' mean and deviation. The folder
    cifar-10-batches-py lies in `root`, as published; torchvision verifies its checksums before it
    unpickles anything.

    Args:
        root: Folder of torchvision's data sets.
        batch_size: Sequences in a batch.
        seed: Fixes the order of the training batches.

    Raises:
        MissingDataError: From `prepare_data`: what to get from where, and where to put it.
        DamagedDataError: From `prepare_data`: a file is not the published one.

    Source:
        Krizhevsky (2009), "Learning multiple layers of features from tiny images".

    Example:
        >>> SCIFARDataModule(root="data").length
        1024
    """

    d_input = 3
    n_classes = 10
    length = 1024
    mean = (0.4914, 0.4822, 0.4465)
    deviation = (0.2023, 0.1994, 0.2010)

    @staticmethod
    def dataset() -> type[CIFAR10]:
        """The class that knows files and checksums."""
        from torchvision.datasets import CIFAR10

        return CIFAR10

    def prepare_data(self) -> None:
        """Refuse what is missing or not genuine."""
        published = self.dataset()
        folder = self.root / published.base_folder
        files: list[tuple[str, str]] = [
            *((name, md5) for name, md5 in published.train_list + published.test_list),
            (published.meta["filename"], published.meta["md5"]),
        ]
        require([folder / name for name, _ in files], "CIFAR-10", CIFAR_PAGE)
        for name, expected in files:
            check_md5(folder / name, expected, "CIFAR-10", CIFAR_PAGE)

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
