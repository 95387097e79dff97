"""Checkpoints of every kind as they lie on a disk; nothing in them is executed."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lightning_compressm.errors import CheckpointError

__all__ = ["Checkpoint", "read_checkpoint", "safetensors_for"]

_EXPECTED = (
    "Expected a Lightning checkpoint, a file written by torch.save(model.state_dict(), path), a "
    ".safetensors file, a folder that transformers saved a model in, or a folder written by "
    "torch.distributed.checkpoint."
)
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_SHARDED = ".metadata"  # of torch.distributed.checkpoint
_MODEL = "state_dict."  # what Lightning calls the model's part of a checkpoint
# What the metadata of torch.distributed.checkpoint consist of; nothing else is looked up.
_METADATA = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"), ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"),
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        kind: what it is, for people.
        state_dict: the model's tensors by name.
        rest: everything else that a Lightning checkpoint has in it.
    """

    kind: str
    state_dict: Mapping[str, Any]
    rest: Mapping[str, Any] = field(default_factory=dict)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file or a folder; tensors come to the CPU.

    Args:
        path: a Lightning checkpoint or a plain state dict (read with ``weights_only=True``); a
            ``.safetensors`` file; a folder or an index file of transformers, sharded or not; a
            folder of torch.distributed.checkpoint, of which only tensors are read.

    Raises:
        CheckpointError: naming the file, if it is none of these, damaged, or would execute code.
        ImportError: for safetensors without the library.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"weight": torch.ones(2)}, Path(folder, "it.pt"))
        ...     read_checkpoint(Path(folder, "it.pt")).kind
        'state dict'
    """
    path = Path(path)
    try:
        return _read(path)
    except (CheckpointError, ImportError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"can't read '{path}' (weights_only=True): {_line(error)}. {_EXPECTED}"
        ) from error


def _read(path: Path) -> Checkpoint:
    if path.is_dir():
        return _read_folder(path)
    if path.name in _INDICES or path.name.endswith(".index.json"):
        return Checkpoint("sharded weights", _read_shards(path))
    if path.suffix == ".safetensors":
        return Checkpoint("safetensors", safetensors_for(path).load_file(path))
    return _of_content(path, _torch_load(path))


def _read_folder(path: Path) -> Checkpoint:
    if (path / _SHARDED).is_file():
        return _read_distributed(path)
    for name in _INDICES:
        if (path / name).is_file():
            return Checkpoint("sharded weights", _read_shards(path / name))
    for name in _SINGLE:
        if (path / name).is_file():
            return Checkpoint(f"folder with {name}", _read(path / name).state_dict)
    raise CheckpointError(
        f"can't read '{path}': the folder has none of {', '.join((_SHARDED, *_INDICES, *_SINGLE))}."
    )


def _torch_load(path: Path) -> Any:
    _check_sums(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _of_content(path: Path, content: Any) -> Checkpoint:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        rest = {key: value for key, value in content.items() if key != "state_dict"}
        kind = "Lightning checkpoint" if "pytorch-lightning_version" in rest else "checkpoint"
        return Checkpoint(kind, content["state_dict"], rest)
    if isinstance(content, Mapping):
        return Checkpoint("state dict", content)
    raise CheckpointError(
        f"'{path}': expected a state dict (a mapping of names to tensors), got "
        f"{type(content).__name__}."
    )


def safetensors_for(path: Path) -> Any:
    """The library that reads and writes such a file.

    Raises:
        ImportError: saying what to install.
    """
    try:
        return import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(f"'{path}' needs safetensors: pip install safetensors") from error


def _read_shards(index: Path) -> dict[str, Any]:
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    found: dict[str, Any] = {}
    for file in sorted(set(names.values())):
        shard = index.parent / file
        if shard.parent != index.parent:
            raise CheckpointError(f"'{index}': expected shards beside it, got '{file}'.")
        found |= _read(shard).state_dict
    if missing := sorted(names.keys() - found.keys()):
        raise CheckpointError(f"'{index}': its shards lack '{missing[0]}' ({len(missing)} in all).")
    return found


def _read_distributed(path: Path) -> Checkpoint:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return metadata

    with (path / _SHARDED).open("rb") as file:
        metadata = _Unpickler(file).load()
    stored = metadata.state_dict_metadata
    tensors = {n: m for n, m in stored.items() if isinstance(m, TensorStorageMetadata)}
    model = [name for name in tensors if name.startswith(_MODEL)] or list(tensors)
    wanted = {n: torch.empty(tensors[n].size, dtype=tensors[n].properties.dtype) for n in model}
    for info in metadata.storage_data.values():
        if (path / info.relative_path).parent != path:
            raise CheckpointError(f"'{path}': expected files in it, got '{info.relative_path}'.")
    _load_state_dict(wanted, storage_reader=Reader(path), no_dist=True)
    rest = _torch_load(path / "meta.pt") if (path / "meta.pt").is_file() else {}
    state_dict = {name.removeprefix(_MODEL): tensor for name, tensor in wanted.items()}
    return Checkpoint("distributed checkpoint", state_dict, rest)


class _Unpickler(pickle.Unpickler):
    """Knows the classes of metadata and nothing else, so that it can't call anything."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" else None
        if (module, name) in _METADATA or isinstance(dtype, torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"'{module}.{name}' is no part of a checkpoint's metadata")


def _check_sums(path: Path) -> None:
    """Compare the check sums that torch.save writes, which torch.load does not look at."""
    if not zipfile.is_zipfile(path):
        return  # the format of before torch 1.6 has none
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        damaged = [name for name in names if not _is_whole(archive, name)]
    # All differ where torch.serialization.set_crc32_options(False) left them out.
    if damaged and len(damaged) < len(names):
        raise zipfile.BadZipFile(f"the file is damaged: wrong check sum of '{damaged[0]}'")


def _is_whole(archive: zipfile.ZipFile, name: str) -> bool:
    try:
        with archive.open(name) as record:
            while record.read(1 << 20):
                pass
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError):
        return False
    return True


def _line(error: BaseException) -> str:
    """The first line of an error; torch's go on for a page about what could be switched off."""
    lines: Iterable[str] = str(error).strip().splitlines()
    return next(iter(lines), type(error).__name__).rstrip(".")
