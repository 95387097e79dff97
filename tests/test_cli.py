"""The command line, on files of every kind."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from lightning_compressm import compress, load_compressed
from lightning_compressm.cli import main
from lightning_compressm.errors import CheckpointError
from lightning_compressm.model.files import read_checkpoint
from lightning_compressm.nn import LRU, S4D, S5
from lightning_compressm.nn._mamba import MambaBlock


class Net(nn.Module):
    """Layers that are known by their tensors, one of them by its data only."""

    def __init__(self, states: int = 16) -> None:
        super().__init__()
        self.lru, self.s5, self.s4d = LRU(4, states), S5(4, states), S4D(4, states)
        self.mamba = MambaBlock(4, states)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mamba(self.s4d(self.s5(self.lru(x))))


MODEL = "tests.test_cli:Net"
SAMPLE = "tests.test_cli:sample"


def sample() -> torch.Tensor:
    return torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reduced() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    compress(net, state_dim=5, sample=sample(), max_output_error=None)
    return net


def as_state_dict(net: nn.Module, path: Path) -> Path:
    torch.save(net.state_dict(), path / "it.pt")
    return path / "it.pt"


def as_safetensors(net: nn.Module, path: Path) -> Path:
    save_file(net.state_dict(), path / "it.safetensors")
    return path / "it.safetensors"


def as_shards(net: nn.Module, path: Path) -> Path:
    tensors = list(net.state_dict().items())
    names = {}
    for number, part in enumerate((tensors[::2], tensors[1::2])):
        file = f"model-{number}.safetensors"
        save_file(dict(part), path / file)
        names |= dict.fromkeys(dict(part), file)
    index = {"metadata": {}, "weight_map": names}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def as_distributed(net: nn.Module, path: Path) -> Path:
    content = {"state_dict": net.state_dict(), "optimizer_0": {"lr": 0.1}}
    dcp.save(content, checkpoint_id=path / "it", no_dist=True)
    return path / "it"


def as_lightning(net: nn.Module, path: Path) -> Path:
    event = {"step": 7, "epoch": 0, "layer": "lru", "action": "reduce", "old_state_dim": 16,
             "new_state_dim": 5, "energy_kept": 0.9, "reason": ""}  # fmt: skip
    content = {
        "state_dict": net.state_dict(),
        "pytorch-lightning_version": "2.6.6",
        "hyper_parameters": {"states": 16},
        "callbacks": {"CompreSSMCallback{}": {"history": [event]}},
        "optimizer_states": [{}],
    }
    torch.save(content, path / "it.ckpt")
    return path / "it.ckpt"


KINDS = (as_state_dict, as_safetensors, as_shards, as_distributed, as_lightning)


@pytest.mark.parametrize("save", KINDS, ids=lambda save: save.__name__)
def test_every_kind_is_loaded_and_inspected(save, reduced, tmp_path, capsys) -> None:
    path = save(reduced, tmp_path)
    net = load_compressed(Net(), path)
    assert all(map(torch.equal, net.state_dict().values(), reduced.state_dict().values()))
    assert main(["inspect", str(path), "--json"]) == 0
    layers = {x["layer"]: x for x in json.loads(capsys.readouterr().out)["layers"]}
    assert {name: x["state_dim"] for name, x in layers.items()} == dict.fromkeys(
        ("lru", "s5", "s4d", "mamba"), 5
    )
    assert len(layers["lru"]["hankel_singular_values"]) == 5
    assert layers["s5"]["note"] == "give --model"  # its discretization is no tensor
    assert 1 <= layers["lru"]["states_for_tolerance"]["0.1"] <= 5


def test_the_history_of_a_run_is_told(reduced, tmp_path, capsys) -> None:
    assert main(["inspect", str(as_lightning(reduced, tmp_path))]) == 0
    told = capsys.readouterr().out
    assert "Lightning checkpoint" in told
    assert "16 -> 5" in told


def test_the_models_own_code_knows_more(reduced, tmp_path, capsys) -> None:
    path = as_state_dict(reduced, tmp_path)
    assert main(["inspect", str(path), "--model", MODEL, "--json"]) == 0
    layers = {x["layer"]: x for x in json.loads(capsys.readouterr().out)["layers"]}
    assert layers["s5"]["hankel_singular_values"] is not None


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_finished_checkpoint_is_compressed(suffix: str, tmp_path, capsys) -> None:
    torch.manual_seed(0)
    path, out = as_lightning(Net(), tmp_path), tmp_path / f"small{suffix}"
    options = ["--model", MODEL, "--sample", SAMPLE, "--state-dim", "4", "--json"]
    assert main(["compress", str(path), str(out), *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {e["new_state_dim"] for e in told["events"]} == {4}
    assert told["numbers"]["after"] < told["numbers"]["before"]
    net = load_compressed(Net(), out)
    assert (net.lru.d_state, net.mamba.d_state) == (4, 4)
    if suffix == ".ckpt":
        saved = read_checkpoint(out)
        assert saved.rest["hyper_parameters"] == {"states": 16}
        assert "optimizer_states" not in saved.rest
        assert [e["new_state_dim"] for e in saved.rest["compressm"]["history"]] == [5, 4, 4, 4, 4]


def test_a_picture_is_drawn(reduced, tmp_path) -> None:
    out = tmp_path / "it.png"
    assert main(["plot", str(as_state_dict(reduced, tmp_path)), str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("picture", ["state-dims", "before-after"])
def test_what_became_of_states_is_drawn(picture, reduced, tmp_path, capsys) -> None:
    full, small, out = (tmp_path / name for name in ("full.ckpt", "small.ckpt", "it.svg"))
    torch.save(Net().state_dict(), full)
    command = ["compress", str(full), str(small), "--model", MODEL, "--sample", SAMPLE]
    assert main([*command, "--state-dim", "5", "--layers", "lru"]) == 0
    assert main(["plot", str(small), str(out), "--picture", picture]) == 0
    shown = {"state-dims": "<!-- lru: 5 -->", "before-after": "<!-- 16 → 5 -->"}[picture]
    assert shown in out.read_text()
    assert main(["plot", str(full), str(out), "--picture", picture]) == 1
    assert "expected a history" in capsys.readouterr().err


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def malicious(path: Path) -> Path:
    torch.save({"state_dict": Evil(path / "owned")}, path / "it.ckpt")
    return path / "it.ckpt"


def malicious_distributed(path: Path) -> Path:
    (path / "it").mkdir()
    (path / "it" / ".metadata").write_bytes(pickle.dumps(Evil(path / "owned")))
    return path / "it"


def truncated(path: Path) -> Path:
    file = as_lightning(Net(), path)
    file.write_bytes(file.read_bytes()[:-200])
    return file


def shards_elsewhere(path: Path) -> Path:
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    return path


def without_a_shard(path: Path) -> Path:
    as_shards(Net(), path)
    (path / "model-1.safetensors").unlink()
    return path


def foreign(path: Path) -> Path:
    torch.save(nn.Linear(2, 2).state_dict(), path / "it.pt")
    return path / "it.pt"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (malicious, "can't read"),
        (malicious_distributed, "is no part of a checkpoint's metadata"),
        (truncated, "can't read"),
        (shards_elsewhere, "expected shards beside it, got '../other.safetensors'"),
        (without_a_shard, "can't read"),
        (foreign, "expected an SSM layer, found none"),
        (lambda path: path, "the folder has none of .metadata"),
        (lambda path: path / "none.ckpt", "can't read"),
    ],
    ids=["malicious", "malicious metadata", "truncated", "shards elsewhere", "a shard is missing",
         "foreign", "empty folder", "missing"],
)  # fmt: skip
def test_other_files_end_in_one_line(make, message: str, tmp_path, capsys) -> None:
    assert main(["inspect", str(make(tmp_path))]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert told.err.startswith("compressm: error: ")
    assert message in told.err
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nothing.here:Net"], "No module named 'nothing'"),
        (["--model", "tests.test_cli"], "expected package.module:name"),
        (["--model", "torch.nn:Linear"], "calling it failed"),
        (["--model", "torch:float32"], "calling it failed"),
        (["--model", "torch.nn:Identity"], "does not fit"),
        (["--model", MODEL, "--sample", "torch:nothing"], "has no attribute 'nothing'"),
        (["--model", MODEL], "expected calibration data"),
        (["--model", MODEL, "--state-dim", "2", "--fraction", "0.5"], "Keep the one that you mean"),
    ],
)  # fmt: skip
def test_wrong_arguments_write_nothing(options, message: str, tmp_path, capsys) -> None:
    path, out = as_state_dict(Net(), tmp_path), tmp_path / "out.pt"
    assert main(["compress", str(path), str(out), *options]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_the_file_that_is_read_is_not_written(tmp_path, capsys) -> None:
    path = as_state_dict(Net(), tmp_path)
    assert main(["compress", str(path), str(path), "--model", MODEL]) == 1
    assert "expected another file to write" in capsys.readouterr().err


def test_wrong_usage_exits_with_two() -> None:
    with pytest.raises(SystemExit) as exit:
        main(["inspect"])
    assert exit.value.code == 2


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    """From a folder with one's own code in it; importing the package loads no Lightning."""
    path = as_state_dict(LRU(2, 3), tmp_path)
    (tmp_path / "mine.py").write_text("from lightning_compressm.nn import LRU\nnet = LRU(2, 7)\n")
    command = [sys.executable, "-m", "lightning_compressm", "inspect", path, "--model", "mine:net"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "(model)" in done.stdout


def test_distributed_files_outside_the_folder_are_refused(tmp_path: Path) -> None:
    folder = as_distributed(LRU(2, 3), tmp_path)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"expected files in it, got '../elsewhere'"):
        read_checkpoint(folder)
