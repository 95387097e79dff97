from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.data import (
    AANDataModule,
    GeneratedListOpsDataModule,
    GeneratedPathfinderDataModule,
    IMDBDataModule,
    ListOpsDataModule,
    PathfinderDataModule,
    listops,
    pathfinder_images,
)
from benchmarks.data.files import MissingDataError
from benchmarks.data.listops import (
    CLOSE,
    N_TOKENS,
    OPERATORS,
    TOKENS,
    VOCABULARY,
    Rules,
    draw_expression,
    draw_expressions,
    median,
    read_released,
)
from benchmarks.data.pathfinder_images import Scene, _arrange, draw_images
from benchmarks.data.tokens import END, FIRST_BYTE, PAD, UNKNOWN, byte_tokens, padded_bytes
from tests.benchmarks.tiny_files import write_imdb, write_pathfinder

SHORT = Rules(max_depth=4, max_args=4, min_length=4, max_length=40)


def value_of(tokens: list[str]) -> int:
    """An evaluator of its own kind: a stack, instead of the generator's recursion."""
    stack: list[list[str | int]] = [[]]
    for token in tokens:
        if token in OPERATORS:
            stack.append([token])
        elif token == CLOSE:
            operator, *values = stack.pop()
            numbers = [int(value) for value in values]
            results = {
                "[MIN": min(numbers),
                "[MAX": max(numbers),
                "[MED": int(np.median(numbers)),
                "[SM": sum(numbers) % 10,
            }
            stack[-1].append(results[str(operator)])
        else:
            stack[-1].append(int(token))
    ((value,),) = stack
    return int(value)


def depth_of(tokens: tuple[str, ...]) -> int:
    """Nesting, the outermost counted; a digit inside a list is one deeper than the list."""
    deepest = depth = 1
    for token in tokens:
        depth += (token in OPERATORS) - (token == CLOSE)
        deepest = max(deepest, depth)
    return deepest


def test_expressions_obey_the_rules_and_have_the_right_value() -> None:
    expressions = draw_expressions(SHORT, 300, seed=0)
    assert len({tokens for tokens, _ in expressions}) == 300
    for tokens, value in expressions:
        assert value_of(list(tokens)) == value
        assert SHORT.min_length < len(tokens) < SHORT.max_length
        assert depth_of(tokens) <= SHORT.max_depth
    assert {value for _, value in expressions} == set(range(10))
    assert {token for tokens, _ in expressions for token in tokens} == set(VOCABULARY)


def test_a_quarter_of_the_expressions_are_lists() -> None:
    chance = random.Random(0)
    lists = [len(draw_expression(Rules(), chance)[0]) > 1 for _ in range(4000)]
    assert abs(sum(lists) / 4000 - 0.25) < 0.03


def test_the_median_is_rounded_down() -> None:
    for size in range(1, 7):
        for seed in range(20):
            values = np.random.default_rng(seed).integers(0, 10, size).tolist()
            assert median(values) == int(np.median(values))


def test_rules_without_room_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listops, "FUTILE", 1000)
    with pytest.raises(ValueError, match="at least 2"):
        Rules(max_args=1)
    with pytest.raises(ValueError, match="room for at least one length"):
        Rules(min_length=10, max_length=11)
    with pytest.raises(ValueError, match="100000 are needed"):
        draw_expressions(Rules(2, 2, 3, 5), 100_000, seed=0)


def test_generated_listops() -> None:
    sizes = {"train_size": 50, "val_size": 10, "test_size": 20}
    data, again = (GeneratedListOpsDataModule(seed=seed, **sizes) for seed in (0, 1))
    rows = []
    for split, size in (("train", 50), ("val", 10), ("test", 20)):
        tokens, values = data.tensors(split)  # type: ignore[arg-type]
        assert tokens.shape == (size, 64)
        assert (tokens < N_TOKENS).all()
        assert ((tokens == END).sum(1) == 1).all()
        # The seed is that of the order; the data stay the same.
        assert torch.equal(tokens, again.tensors(split)[0])  # type: ignore[arg-type]
        names = {number: name for name, number in TOKENS.items()}
        for row, value in zip(tokens.tolist(), values.tolist(), strict=True):
            assert value_of([names[x] for x in row[: row.index(END)]]) == value
            assert set(row[row.index(END) + 1 :]) <= {PAD}
        rows += [tuple(row) for row in tokens.tolist()]
    assert len(set(rows)) == 80


def write_listops(root: Path, lines: list[str]) -> None:
    for part in ("train", "val", "test"):
        text = "\n".join(["Source\tTarget", *lines]) + "\n"
        (root / f"basic_{part}.tsv").write_text(text, encoding="utf-8")


def test_released_listops(tmp_path: Path) -> None:
    # As released: round brackets around every step of building a list.
    write_listops(tmp_path, ["( ( ( ( [MED 4 ) ( ( ( [MAX 1 ) 9 ) ] ) ) 2 ) ] )\t4", "7\t7"])
    data = ListOpsDataModule(str(tmp_path))
    tokens, values = data.tensors("train")
    assert tokens.shape == (2, 2048)
    assert values.tolist() == [4, 7]
    sources = [tokens for tokens, _ in read_released(tmp_path / "basic_val.tsv")]
    assert sources[0] == ("[MED", "4", "[MAX", "1", "9", "]", "2", "]")
    assert tokens[0, :9].tolist() == [*(TOKENS[name] for name in sources[0]), END]
    assert (tokens[0, 9:] == PAD).all()
    assert value_of(list(sources[0])) == 4


def test_a_long_expression_is_cut(tmp_path: Path) -> None:
    write_listops(tmp_path, ["( [SM 1 2 3 ] )\t6"])
    tokens, _ = ListOpsDataModule(str(tmp_path), length=4).tensors("test")
    assert tokens.tolist() == [[TOKENS["[SM"], TOKENS["1"], TOKENS["2"], END]]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    write_listops(tmp_path, ["[SM 1 2 ]\t3", "[SM 1 2 ] 3"])
    with pytest.raises(ValueError, match=r"basic_train\.tsv, line 3: expected an expression"):
        ListOpsDataModule(str(tmp_path)).setup()


def test_every_byte_has_a_token() -> None:
    tokens = byte_tokens(bytes(range(256))).tolist()
    assert tokens[:253] == [*range(FIRST_BYTE, 256)]
    assert tokens[253:] == [UNKNOWN] * 3
    assert padded_bytes(b"abc", 3).tolist() == [*byte_tokens(b"ab").tolist(), END]


def test_imdb_from_its_folders(tmp_path: Path) -> None:
    write_imdb(tmp_path)
    data = IMDBDataModule(str(tmp_path), length=30)
    tokens, classes = data.tensors("train")
    assert tokens.shape == (4, 30)
    assert classes.tolist() == [0, 0, 1, 1]
    text = "train pos 1 café".encode()
    assert tokens[3].tolist() == padded_bytes(text, 30).tolist()
    # As published: the test set validates.
    assert torch.equal(data.tensors("val")[0], data.tensors("test")[0])
    held_out = IMDBDataModule(str(tmp_path), length=30, val_share=0.25)
    assert [len(held_out.tensors(s)[1]) for s in ("train", "val", "test")] == [3, 1, 2]
    rows = {tuple(x.tolist()) for s in ("train", "val") for x in held_out.tensors(s)[0]}
    assert rows == {tuple(x.tolist()) for x in tokens}
    with pytest.raises(ValueError, match="got 1"):
        IMDBDataModule(val_share=1)


def write_aan(root: Path, lines: list[str]) -> None:
    for part in ("train", "eval", "test"):
        (root / f"new_aan_pairs.{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_aan_from_its_files(tmp_path: Path) -> None:
    # A quotation mark is a byte like any other.
    write_aan(tmp_path, ['1.0\tP1\tP2\tone "text\tanother', "0.0\tP3\tP4\tx\ty"])
    data = AANDataModule(str(tmp_path))
    pairs, classes = data.tensors("val")
    assert pairs.shape == (2, 2, 4000)
    assert classes.tolist() == [1, 0]
    assert torch.equal(pairs[0, 0], padded_bytes(b'one "text', 4000).long())
    assert torch.equal(pairs[0, 1], padded_bytes(b"another", 4000).long())


def test_a_broken_pair_is_named(tmp_path: Path) -> None:
    write_aan(tmp_path, ["1.0\tP1\tP2\tone\tanother", "1.0\tP1\tP2\tone"])
    with pytest.raises(ValueError, match=r"line 2: .* got 4 fields"):
        AANDataModule(str(tmp_path)).setup()


@pytest.mark.parametrize("pixels", [32, 128])
def test_released_pathfinder(tmp_path: Path, pixels: int) -> None:
    root = tmp_path / f"pathfinder{pixels}"
    images = write_pathfinder(root, "curv_contour_length_14", 10, pixels)
    data = PathfinderDataModule(str(root), resolution=pixels, level="curv_contour_length_14")
    assert [len(data.tensors(s)[1]) for s in ("train", "val", "test")] == [16, 2, 2]
    labels = {image.tobytes(): number % 2 for number, image in enumerate(images)}
    seen = set()
    for split in ("train", "val", "test"):
        sequences, classes = data.tensors(split)  # type: ignore[arg-type]
        assert sequences.shape[1:] == (pixels**2, 1)
        for row, label in zip(sequences, classes.tolist(), strict=True):
            content = (row * 255).round().to(torch.uint8).numpy().tobytes()
            assert labels[content] == label
            seen.add(content)
    assert seen == set(labels)


def test_the_empty_file_among_the_released_is_left_out(tmp_path: Path) -> None:
    root = tmp_path / "pathfinder32"
    write_pathfinder(root, "curv_baseline", 10, 32)
    folder = root / "curv_baseline"
    (folder / "imgs/0/sample_172.png").touch()
    with (folder / "metadata/0.npy").open("a", encoding="utf-8") as file:
        file.write("imgs/0 sample_172.png 172 1\n")
    data = PathfinderDataModule(str(root))
    assert sum(len(data.tensors(s)[1]) for s in ("train", "val", "test")) == 20


def test_another_resolution_is_refused(tmp_path: Path) -> None:
    write_pathfinder(tmp_path, "curv_baseline", 2, 16)
    with pytest.raises(ValueError, match="expected 32 x 32 pixels, got"):
        PathfinderDataModule(str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (ListOpsDataModule, "basic_val.tsv"),
        (IMDBDataModule, "test/neg"),
        (AANDataModule, "new_aan_pairs.eval.tsv"),
        (PathfinderDataModule, "curv_baseline/metadata"),
    ],
)
def test_missing_files_say_what_to_get_from_where(
    data: type[ListOpsDataModule], place: str, tmp_path: Path
) -> None:
    with pytest.raises(MissingDataError, match=r"Get the data set from https://") as caught:
        data(str(tmp_path)).setup()
    assert str(tmp_path / place) in str(caught.value)


def test_circles_lie_at_ends_of_long_paths() -> None:
    scene = Scene(size=16)
    for seed in range(20):
        for joined in (True, False):
            paths, circles = _arrange(scene, joined, np.random.default_rng(seed))
            assert [len(path) // 2 for path in paths] == [4, 4, 1, 1]
            owners = [
                [
                    n
                    for n, path in enumerate(paths)
                    if any((end == c).all() for end in path[[0, -1]])
                ]
                for c in circles
            ]
            assert owners == ([[0], [0]] if joined else [[0], [1]])


def test_paths_keep_clear_of_each_other_and_stay_inside() -> None:
    scene = Scene(size=32, dashes=8, distractors=3)
    for seed in range(10):
        paths, _ = _arrange(scene, True, np.random.default_rng(seed))
        for number, path in enumerate(paths):
            assert path.min() >= scene.radius
            assert path.max() <= scene.size - scene.radius
            for other in paths[:number]:
                gaps = np.linalg.norm(path[:, None] - other[None], axis=-1)
                assert gaps.min() >= scene.clearance


def test_pathfinder_images_are_fixed_by_their_seed_and_balanced() -> None:
    images, classes = draw_images(Scene(), 20, seed=3)
    again, _ = draw_images(Scene(), 20, seed=3)
    other, _ = draw_images(Scene(), 20, seed=4)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert classes.bincount().tolist() == [10, 10]
    assert images.dtype == torch.uint8
    # Two bright circles, dimmer dashes, mostly black.
    assert (images.amax(1) == 255).all()
    assert ((images == 0).float().mean(1) > 0.5).all()


def test_generated_pathfinder() -> None:
    data = GeneratedPathfinderDataModule(train_size=8, val_size=4, test_size=4, size=20)
    sequences, classes = data.tensors("train")
    assert sequences.shape == (8, 400, 1)
    assert 0 <= sequences.min() < sequences.max() == 1
    assert classes.bincount().tolist() == [4, 4]
    assert not torch.equal(data.tensors("val")[0], data.tensors("test")[0])


def test_scenes_without_room_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathfinder_images, "SCENE_TRIES", 5)
    with pytest.raises(ValueError, match="no room in 12 x 12 pixels"):
        draw_images(Scene(size=12, dashes=9), 1, seed=0)
    with pytest.raises(ValueError, match="at least 8 pixels"):
        Scene(size=4)
