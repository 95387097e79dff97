"""Data sets that are downloaded: from a server on this machine that has tiny ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import datasets

from benchmarks.data import SCIFARDataModule, SFashionMNISTDataModule, SMNISTDataModule
from benchmarks.data.files import DownloadError
from benchmarks.data.images import PublishedImages
from benchmarks.mnist import command as all_arms
from benchmarks.train.command import main
from benchmarks.train.configurations import FOLDER
from tests.benchmarks.tiny_files import md5, write_cifar, write_mnist

ROOT = Path(__file__).parents[2]
MODULES: tuple[type[PublishedImages], ...] = (
    SMNISTDataModule,
    SFashionMNISTDataModule,
    SCIFARDataModule,
)
CLOSED = "http://127.0.0.1:9/"  # the port for what nobody listens to

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter", "ignore:.*tensorboardX"),
    pytest.mark.usefixtures("no_proxy"),
]


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


class Server:
    """Serves a folder; counts which files were asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: Counter[str] = Counter()
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(folder))

            def log_message(self, *_: object) -> None:
                server.asked[self.path.rpartition("/")[2]] += 1

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}/"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Tiny data sets in the published formats, at the addresses that torchvision asks."""
    offered = tmp_path / "offered"
    running = Server(offered)
    for module, name in ((SMNISTDataModule, "MNIST"), (SFashionMNISTDataModule, "FashionMNIST")):
        sums = write_mnist(offered, 40, 20, packed=True, name=name)
        place_mnist(monkeypatch, module, sums, offered / name / "raw", running.address)
    sums = write_cifar(offered, 10)
    packed = offered / "cifar-10-python.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(offered / "cifar-10-batches-py", "cifar-10-batches-py")
    published = datasets.CIFAR10
    monkeypatch.setattr(published, "url", running.address + packed.name)
    monkeypatch.setattr(published, "tgz_md5", md5(packed.read_bytes()))
    for files in ("train_list", "test_list"):
        mine = [[name, sums[name]] for name, _ in getattr(published, files)]
        monkeypatch.setattr(published, files, mine)
    monkeypatch.setattr(published, "meta", published.meta | {"md5": sums["batches.meta"]})
    yield running
    running.close()


def place_mnist(
    monkeypatch: pytest.MonkeyPatch,
    module: type[SMNISTDataModule],
    sums: dict[str, str],
    folder: Path,
    address: str,
) -> None:
    """Let torchvision and the data module expect these files, at this address."""
    published = module.dataset()
    packed = [(f"{name}.gz", md5((folder / f"{name}.gz").read_bytes())) for name in sums]
    monkeypatch.setattr(published, "mirrors", [f"{address}{published.__name__}/raw/"])
    monkeypatch.setattr(published, "resources", packed)
    monkeypatch.setattr(module, "checksums", sums)


def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody answers at any address."""
    for published in (datasets.MNIST, datasets.FashionMNIST):
        monkeypatch.setattr(published, "mirrors", [CLOSED])
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{CLOSED}cifar-10-python.tar.gz")


@pytest.mark.parametrize("module", MODULES)
def test_what_is_missing_is_fetched_once(
    module: type[PublishedImages], server: Server, tmp_path: Path
) -> None:
    root = str(tmp_path / "mine")
    data = module(root, batch_size=5, download=True)
    assert data.tensors("test")[0].shape[1:] == (data.length, data.d_input)
    assert server.asked
    server.asked.clear()
    module(root, download=True).prepare_data()
    module(root).prepare_data()
    assert not server.asked


@pytest.mark.parametrize("module", MODULES)
def test_without_a_network_the_error_says_what_to_do(
    module: type[PublishedImages], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed(monkeypatch)
    data = module(str(tmp_path), download=True)
    with pytest.raises(DownloadError, match="Connection refused") as caught:
        data.prepare_data()
    assert data.page in str(caught.value)
    assert all(str(path) in str(caught.value) for path in data.files())


def test_a_file_that_was_changed_on_the_way_is_refused(server: Server, tmp_path: Path) -> None:
    with (tmp_path / "offered/MNIST/raw/t10k-labels-idx1-ubyte.gz").open("ab") as file:
        file.write(b"!")
    with pytest.raises(DownloadError, match="corrupted"):
        SMNISTDataModule(str(tmp_path / "mine"), download=True).prepare_data()
    assert server.asked


def test_files_that_are_there_in_another_packing_are_taken(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sums = [(name, "0" * 32) for name, _ in datasets.FashionMNIST.resources]
    monkeypatch.setattr(datasets.FashionMNIST, "resources", sums)
    SFashionMNISTDataModule(str(tmp_path / "offered"), download=True).prepare_data()
    assert not server.asked


def options(root: Path) -> list[str]:
    """One step of the published network in small."""
    return [
        f"--config={FOLDER / 'sfashion_baseline.yaml'}", f"--data.init_args.root={root}",
        "--data.init_args.batch_size=5", "--data.init_args.download=true",
        "--model.init_args.model.init_args.d_state=4", "--trainer.accelerator=cpu",
        "--trainer.max_steps=1", "--trainer.val_check_interval=1",
        f"--trainer.default_root_dir={root}", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]  # fmt: skip


def test_the_flag_of_the_command_fetches(server: Server, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    cli: Any = main(["fit", *options(root)])
    assert cli.trainer.global_step == 1
    assert len(cli.datamodule.splits["train"]) == 36
    assert set(server.asked) == {name for name, _ in datasets.FashionMNIST.resources}


def test_the_command_for_all_arms_fetches(server: Server, tmp_path: Path) -> None:
    """Into a folder where its data module then finds all."""
    root = tmp_path / "mine"
    settings = all_arms.Settings(root=root, download=True)
    all_arms.prepare_files(settings)
    assert server.asked
    SMNISTDataModule(str(root)).prepare_data()


PROGRAM = """
import json, os
from torchvision.datasets import FashionMNIST
from benchmarks.data import SFashionMNISTDataModule
from benchmarks.train.command import run_as_program

FashionMNIST.mirrors, FashionMNIST.resources, sums = json.loads(os.environ["TINY"])
SFashionMNISTDataModule.checksums = sums
run_as_program()
"""


@pytest.mark.slow
def test_one_of_two_processes_fetches(server: Server, tmp_path: Path) -> None:
    published = datasets.FashionMNIST
    main(["fit", *options(tmp_path / "one")])
    alone = Counter(server.asked)
    server.asked.clear()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    tiny = [published.mirrors, published.resources, SFashionMNISTDataModule.checksums]
    command = [sys.executable, program, "fit", *options(tmp_path / "two")]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TINY": json.dumps(tiny)}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert server.asked == alone
    (last,) = (tmp_path / "two").rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 1
