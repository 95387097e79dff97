"""Images read pixel by pixel: what all share, MNIST and Fashion-MNIST."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from benchmarks.data.files import DamagedDataError, check_md5, download, require
from benchmarks.data.sequences import SequenceDataModule, Split, shuffled_rows

if TYPE_CHECKING:
    from torchvision.datasets import MNIST

# The split is part of the task, so it has a seed of its own that no option changes.
SPLIT_SEED = 0
VAL_SHARE = 0.1
MNIST_PAGE = (
    "http://yann.lecun.com/exdb/mnist/ (THE MNIST DATABASE of handwritten digits) or its mirror "
    "https://ossci-datasets.s3.amazonaws.com/mnist/"
)
FASHION_PAGE = "https://github.com/zalandoresearch/fashion-mnist (Get the Data, four files)"


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


class PublishedImages(ImageDataModule):
    """Images in files that their makers offer, which torchvision downloads if that is asked for.

    Args:
        root: Folder of torchvision's data sets.
        batch_size: Sequences in a batch.
        seed: Fixes the order of the training batches.
        download: Fetch what is missing. Under DDP one process of a machine does.
    """

    title: ClassVar[str]
    page: ClassVar[str]

    def __init__(
        self, root: str = "data", batch_size: int = 50, seed: int = 0, download: bool = False
    ) -> None:
        super().__init__(root, batch_size, seed)
        self.download = download

    @staticmethod
    @abstractmethod
    def dataset() -> Any:
        """The class of torchvision that knows files and addresses."""

    @abstractmethod
    def files(self) -> dict[Path, str]:
        """Every file that is read, and its MD5 sum."""

    def is_there(self, path: Path) -> bool:
        """Whether there is a file, in whatever form."""
        return path.exists()

    def unpack(self) -> None:
        """Make files of packed ones; nothing to do, if a subclass says nothing."""

    def prepare_data(self) -> None:
        """Download if that is asked for; refuse what is missing or not genuine."""
        files = self.files()
        if self.download and not all(map(self.is_there, files)):
            download(self._fetch, files, self.title, self.page)
        self.unpack()
        advice = " With the option `download`, torchvision fetches it."
        require(files, self.title, self.page, advice)
        for path, expected in files.items():
            check_md5(path, expected, self.title, self.page)

    def _fetch(self) -> None:
        self.dataset()(self.root, download=True)


class SMNISTDataModule(PublishedImages):
    """MNIST as sequences (784, 1) with values in [0, 1]: 54,000 train, 6,000 validate, 10,000 test.

    The four files lie in `root`/MNIST/raw, packed (.gz) or not, as published; packed ones are
    unpacked beside them. Their checksums are verified.

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
        LeCun et al. (1998), "Gradient-based learning applied to document recognition"; read pixel
        by pixel: Le, Jaitly & Hinton (2015), arXiv 1504.00941.

    Example:
        >>> SMNISTDataModule(root="data").length
        784
    """

    title = "MNIST"
    page = MNIST_PAGE
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

    @staticmethod
    def dataset() -> type[MNIST]:
        """The class that knows files and addresses."""
        from torchvision.datasets import MNIST

        return MNIST

    def files(self) -> dict[Path, str]:
        """The four files, unpacked."""
        folder = self.root / self.dataset().__name__ / "raw"
        return {folder / name: expected for name, expected in self.checksums.items()}

    def is_there(self, path: Path) -> bool:
        """Packed or not."""
        return path.exists() or _packed(path).exists()

    def unpack(self) -> None:
        """Unpack what is packed, beside it."""
        for path in self.files():
            if _packed(path).exists() and not path.exists():
                self._unpack(path)

    def _unpack(self, path: Path) -> None:
        from torchvision.datasets.utils import extract_archive

        try:
            extract_archive(str(_packed(path)), str(path.parent))
        except (EOFError, OSError, zlib.error) as error:
            path.unlink(missing_ok=True)  # half of it
            raise DamagedDataError(
                f"{self.title}: {_packed(path)} can't be unpacked ({error}): it is incomplete, or "
                f"not the published file. Remove it, and get it again from {self.page}."
            ) from error

    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        train, test = (self.dataset()(self.root, train=part) for part in (True, False))
        return self.with_validation(
            *((part.data.flatten(1).unsqueeze(-1), part.targets) for part in (train, test))
        )

    def prepare(self, sequences: Tensor) -> Tensor:
        """Bytes to [0, 1]."""
        return sequences / 255


class SFashionMNISTDataModule(SMNISTDataModule):
    """Fashion-MNIST as sequences (784, 1) with values in [0, 1], split as `SMNISTDataModule`.

    The four files lie in `root`/FashionMNIST/raw, packed (.gz) or not, as published. They have the
    names and the format of MNIST's.

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
        Xiao, Rasul & Vollgraf (2017), "Fashion-MNIST: a novel image dataset for benchmarking
        machine learning algorithms", arXiv 1708.07747.

    Example:
        >>> SFashionMNISTDataModule(root="data").n_classes
        10
    """

    title = "Fashion-MNIST"
    page = FASHION_PAGE
    checksums: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    }

    @staticmethod
    def dataset() -> type[MNIST]:
        """The class that knows files and addresses."""
        from torchvision.datasets import FashionMNIST

        return FashionMNIST


def _packed(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")
