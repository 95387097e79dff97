from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.data import TextDataModule, TextPairDataModule, TextSourceDataModule
from benchmarks.data.files import MissingDataError
from benchmarks.data.text import find_texts, make_pairs, passages, split_files
from benchmarks.data.tokens import FIRST_BYTE
from benchmarks.models.classifier import PairClassifier, SequenceClassifier

SPLITS = ("train", "val", "test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two packages of twenty files each, in which every byte tells the file."""
    root = tmp_path / "texts"
    for package in range(2):
        (root / str(package)).mkdir(parents=True)
        for number in range(20):
            content = bytes([20 * package + number]) * (100 + number)
            (root / str(package) / f"{number}.py").write_bytes(content)
    (root / "site-packages").mkdir()
    (root / "site-packages" / "not_ours.py").write_bytes(b"x" * 500)
    return root


def file_of(row: torch.Tensor) -> set[int]:
    return {int(token) - FIRST_BYTE for token in row.flatten()}


def test_files_are_in_one_split_only(folder: Path) -> None:
    files = find_texts(str(folder), "*/*.py")
    parts = split_files(files)
    assert sum(map(len, parts.values())) == len(files) == 40
    assert {name: len(part) for name, part in parts.items()} == {"train": 32, "val": 4, "test": 4}
    assert len({path for part in parts.values() for path in part}) == 40
    assert split_files(find_texts(str(folder), "*/*.py")) == parts


def test_passages_are_pieces_of_one_file(folder: Path) -> None:
    rows = passages([folder / "0" / "3.py", folder / "1" / "4.py"], 50)
    assert [file_of(row) for row in rows] == [{3}] * 2 + [{24}] * 2
    assert len(passages([folder / "0" / "3.py"] * 5, 50, limit=3)) == 3


def test_too_few_files_are_refused(folder: Path) -> None:
    with pytest.raises(MissingDataError, match=r"at least ten files that match '\*.py'.*got 0"):
        TextDataModule(str(folder)).setup()


def test_next_byte(folder: Path) -> None:
    data = TextDataModule(str(folder), "*/*.py", length=20, limit=30)
    sizes = {}
    for split in SPLITS:
        tokens, targets = data.tensors(split)  # type: ignore[arg-type]
        assert tokens.dtype == targets.dtype == torch.int64
        assert tokens.shape == targets.shape == (len(tokens), 20)
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        sizes[split] = len(tokens)
    assert sizes == {"train": 30, "val": 3, "test": 3}


def test_sources_are_told_apart_by_their_pattern(folder: Path) -> None:
    data = TextSourceDataModule(str(folder), ["0/*.py", "1/*.py"], length=25)
    seen: list[set[int]] = []
    for split in SPLITS:
        rows, classes = data.tensors(split)  # type: ignore[arg-type]
        files = [file_of(row) for row in rows]
        assert all((max(f) >= 20) == bool(c) for f, c in zip(files, classes, strict=True))
        assert classes.bincount()[0] == classes.bincount()[1] > 0
        seen.append(set().union(*files))
    assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]
    with pytest.raises(ValueError, match="two patterns"):
        TextSourceDataModule(patterns=["*.py"])


def test_pairs_are_of_one_file_or_of_two(folder: Path) -> None:
    data = TextPairDataModule(str(folder), "*/*.py", length=10, limit=60)
    for split in SPLITS:
        pairs, classes = data.tensors(split)  # type: ignore[arg-type]
        assert pairs.shape[1:] == (2, 10)
        assert [len(file_of(pair)) for pair in pairs] == [2 - c for c in classes.tolist()]
        assert 0 < classes.float().mean() < 1


def test_every_passage_of_a_pair_comes_once() -> None:
    files = [torch.arange(8).view(4, 2) + 10 * n for n in range(6)]
    pairs, classes = make_pairs(files, limit=12, seed=0)
    assert len({tuple(row) for row in pairs.flatten(0, 1).tolist()}) == 2 * len(pairs)
    same = [a[0] // 10 == b[0] // 10 for a, b in pairs.tolist()]
    assert same == classes.bool().tolist()


@pytest.mark.parametrize(
    "data",
    [
        TextDataModule(length=64, limit=40),
        TextSourceDataModule(length=64),
        TextPairDataModule(length=64),
    ],
    ids=["next byte", "source", "pair"],
)
def test_the_standard_library_is_enough(data: TextDataModule | TextSourceDataModule) -> None:
    for split in SPLITS:
        rows, targets = data.tensors(split)  # type: ignore[arg-type]
        assert len(rows) == len(targets) > 1
        assert rows.min() >= FIRST_BYTE
        assert rows.max() < data.n_tokens


def test_a_pair_has_one_encoder() -> None:
    model = PairClassifier(None, 2, d_model=4, d_state=6, n_tokens=9, dropout=0.0).eval()
    pairs = torch.randint(9, (3, 2, 20))
    logits = model(pairs)
    assert logits.shape == (3, 2)
    expected = model.head(torch.cat([model.features(pairs[:, side]) for side in (0, 1)], 1))
    assert torch.allclose(logits, expected, atol=1e-6)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("inputs", [{"d_input": 1, "n_tokens": 4}, {"d_input": None}])
def test_channels_or_tokens(inputs: dict[str, int | None]) -> None:
    with pytest.raises(ValueError, match="either d_input"):
        SequenceClassifier(n_classes=2, d_model=4, d_state=4, **inputs)  # type: ignore[arg-type]
