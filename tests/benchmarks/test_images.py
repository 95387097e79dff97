from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from benchmarks.data import SCIFARDataModule, SFashionMNISTDataModule, SMNISTDataModule
from benchmarks.data.files import DamagedDataError, MissingDataError
from tests.benchmarks.tiny_files import write_cifar, write_mnist


def mnist(
    root: Path, sums: dict[str, str], published: type[SMNISTDataModule] = SMNISTDataModule
) -> SMNISTDataModule:
    """The data module with the checksums of tiny files instead of the published ones."""
    tiny = type("Tiny", (published,), {"checksums": sums})
    return tiny(str(root), batch_size=5)


def cifar(root: Path, sums: dict[str, str]) -> SCIFARDataModule:
    class TinyCIFAR10(CIFAR10):
        train_list = [[name, sums[name]] for name, _ in CIFAR10.train_list]  # noqa: RUF012
        test_list = [["test_batch", sums["test_batch"]]]  # noqa: RUF012
        meta = CIFAR10.meta | {"md5": sums["batches.meta"]}

    class Tiny(SCIFARDataModule):
        @staticmethod
        def dataset() -> type[CIFAR10]:
            return TinyCIFAR10

    return Tiny(str(root), batch_size=5)


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_from_its_files(tmp_path: Path, packed: bool) -> None:
    data = mnist(tmp_path, write_mnist(tmp_path, 40, 20, packed=packed))
    sizes = {}
    for split in ("train", "val", "test"):
        sequences, classes = data.tensors(split)
        sizes[split] = len(classes)
        assert sequences.shape == (len(classes), 784, 1)
        assert (sequences.dtype, classes.dtype) == (torch.float32, torch.int64)
        assert 0 <= sequences.min() < sequences.max() <= 1
    assert sizes == {"train": 36, "val": 4, "test": 20}
    assert data.tensors("test")[1].tolist() == [*range(10)] * 2


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_lies_beside_mnist(tmp_path: Path, packed: bool) -> None:
    write_mnist(tmp_path, 50, 10, packed=packed)
    sums = write_mnist(tmp_path, 40, 20, packed=packed, name="FashionMNIST")
    data = mnist(tmp_path, sums, SFashionMNISTDataModule)
    assert {s: len(data.tensors(s)[1]) for s in ("train", "val", "test")} == {
        "train": 36,
        "val": 4,
        "test": 20,
    }
    raw = (tmp_path / "FashionMNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:]
    expected = np.frombuffer(raw, np.uint8).reshape(20, 784, 1) / 255
    assert np.allclose(data.tensors("test")[0].numpy(), expected, atol=1e-6)


def test_half_of_a_packed_file_is_refused(tmp_path: Path) -> None:
    data = mnist(tmp_path, write_mnist(tmp_path, 40, 20, packed=True))
    packed = tmp_path / "MNIST/raw/train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-1000])
    with pytest.raises(DamagedDataError, match=r"idx3-ubyte.gz can't be unpacked.*Remove it"):
        data.prepare_data()
    assert not packed.with_suffix("").exists()


def test_mnist_pixels_keep_their_order(tmp_path: Path) -> None:
    data = mnist(tmp_path, write_mnist(tmp_path, 40, 20, packed=True))
    data.prepare_data()
    raw = (tmp_path / "MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:]
    expected = np.frombuffer(raw, np.uint8).reshape(20, 784, 1) / 255
    assert np.allclose(data.tensors("test")[0].numpy(), expected, atol=1e-6)


def test_training_and_validation_share_no_image(tmp_path: Path) -> None:
    data = mnist(tmp_path, write_mnist(tmp_path, 40, 20, packed=False))
    rows = [tuple(row.flatten().tolist()) for s in ("train", "val") for row in data.tensors(s)[0]]
    assert len(set(rows)) == len(rows) == 40


def test_batches_are_those_of_the_tensors(tmp_path: Path) -> None:
    data = mnist(tmp_path, write_mnist(tmp_path, 40, 20, packed=False))
    data.prepare_data()
    data.setup()
    batches = list(data.test_dataloader())
    assert torch.equal(torch.cat([x for x, _ in batches]), data.tensors("test")[0])
    assert torch.equal(torch.cat([y for _, y in batches]), data.tensors("test")[1])
    assert [len(y) for _, y in data.train_dataloader()] == [5] * 7


def test_cifar_from_its_files(tmp_path: Path) -> None:
    data = cifar(tmp_path, write_cifar(tmp_path, 10))
    assert {s: len(data.tensors(s)[1]) for s in ("train", "val", "test")} == {
        "train": 45,
        "val": 5,
        "test": 10,
    }
    sequences, classes = data.tensors("test")
    assert sequences.shape == (10, 1024, 3)
    assert sequences.dtype == torch.float32
    assert classes.tolist() == [*range(10)]
    # A file holds all of red, then green, then blue, row by row.
    import pickle

    stored = pickle.loads((tmp_path / "cifar-10-batches-py/test_batch").read_bytes())["data"]
    mean, deviation = torch.tensor(data.mean), torch.tensor(data.deviation)
    pixels = ((sequences * deviation + mean) * 255).round().to(torch.uint8)
    assert np.array_equal(pixels.numpy(), stored.reshape(10, 3, 1024).transpose(0, 2, 1))


def test_files_that_are_not_the_published_ones_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, 40, 20, packed=True)
    with pytest.raises(DamagedDataError, match="6bbc9ace898e44ae57da46a324031adb"):
        SMNISTDataModule(str(tmp_path)).prepare_data()
    write_mnist(tmp_path, 40, 20, packed=True, name="FashionMNIST")
    with pytest.raises(DamagedDataError, match="f4a8712d7a061bf5bd6d2ca38dc4d50a"):
        SFashionMNISTDataModule(str(tmp_path)).prepare_data()
    write_cifar(tmp_path, 10)
    with pytest.raises(DamagedDataError, match="c99cafc152244af753f735de768cd75f"):
        SCIFARDataModule(str(tmp_path)).prepare_data()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    sums = write_cifar(tmp_path, 10)
    with (tmp_path / "cifar-10-batches-py" / "data_batch_3").open("ab") as file:
        file.write(b"!")
    with pytest.raises(DamagedDataError, match="data_batch_3"):
        cifar(tmp_path, sums).prepare_data()


@pytest.mark.parametrize(
    ("module", "page", "place"),
    [
        (SMNISTDataModule, "yann.lecun.com/exdb/mnist", "MNIST/raw/t10k-labels-idx1-ubyte"),
        (SFashionMNISTDataModule, "zalandoresearch", "FashionMNIST/raw/train-images-idx3-ubyte"),
        (SCIFARDataModule, "toronto.edu/~kriz/cifar.html", "cifar-10-batches-py/test_batch"),
    ],
)
def test_missing_files_are_not_downloaded(
    module: type[SMNISTDataModule | SCIFARDataModule], page: str, place: str, tmp_path: Path
) -> None:
    with pytest.raises(MissingDataError) as caught:
        module(str(tmp_path)).prepare_data()
    assert page in str(caught.value)
    assert str(tmp_path / place) in str(caught.value)
    assert not list(tmp_path.iterdir())
