"""ListOps: what is the value of a nested list of operations on digits?"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.data.files import LRA_PAGE, require
from benchmarks.data.sequences import Split, TokenDataModule
from benchmarks.data.tokens import END, PAD, UNKNOWN

Expression = tuple[tuple[str, ...], int]
OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: median(values),
    "[SM": lambda values: sum(values) % 10,
}
CLOSE = "]"
# Any fixed order will do: the model learns an embedding of its own.
VOCABULARY = (*OPERATORS, CLOSE, *map(str, range(10)))
TOKENS = {name: number for number, name in enumerate(VOCABULARY, start=END + 1)}
N_TOKENS = END + 1 + len(VOCABULARY)
OPERATOR_SHARE = 0.25
# The data are part of the task, so their seed is fixed.
DATA_SEED = 1
FUTILE = 200_000


def median(values: Sequence[int]) -> int:
    """The middle value, or the mean of the two in the middle, rounded down.

    Example:
        >>> median([9, 1, 4, 2])
        3
    """
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


@dataclass(frozen=True)
class Rules:
    """What a generated expression may look like. The defaults are those of Long Range Arena.

    Attributes:
        max_depth: Of nesting, the outermost digit or list counted.
        max_args: Most operands of an operator; the fewest are two.
        min_length: An expression has more tokens, brackets and operators included.
        max_length: An expression has fewer tokens.
    """

    max_depth: int = 10
    max_args: int = 10
    min_length: int = 500
    max_length: int = 2000

    def __post_init__(self) -> None:
        if self.max_depth < 2 or self.max_args < 2:
            raise ValueError(
                f"max_depth and max_args must be at least 2, got {self.max_depth} and "
                f"{self.max_args}"
            )
        # The shortest list is an operator, two digits and the bracket.
        if not 0 <= self.min_length < self.max_length - 1 or self.max_length < 5:
            raise ValueError(
                "expected room for at least one length between min_length and max_length, both "
                f"excluded, and lists of 4 tokens; got {self.min_length} and {self.max_length}"
            )


def draw_expression(rules: Rules, chance: random.Random, depth: int = 1) -> Expression:
    """Draw one expression of any length: a digit, or with probability 1/4 an operator's list.

    Args:
        rules: Depth and operands are obeyed, lengths are not.
        chance: Source of the draws.
        depth: Where the expression will stand.

    Returns:
        Tokens and value.

    Source:
        Nangia & Bowman (2018), arXiv 1804.06028; lengths and depths: Tay et al. (2020),
        arXiv 2011.04006, section 2.2.1.
    """
    if depth >= rules.max_depth or chance.random() >= OPERATOR_SHARE:
        digit = chance.randrange(10)
        return (str(digit),), digit
    operands = [
        draw_expression(rules, chance, depth + 1) for _ in range(chance.randint(2, rules.max_args))
    ]
    operator = chance.choice(list(OPERATORS))
    tokens = (operator, *(token for operand, _ in operands for token in operand), CLOSE)
    return tokens, OPERATORS[operator]([value for _, value in operands])


def draw_expressions(rules: Rules, size: int, seed: int) -> list[Expression]:
    """Draw `size` different expressions by the rules.

    Raises:
        ValueError: The rules hardly allow for so many.

    Example:
        >>> rules = Rules(max_depth=3, max_args=3, min_length=3, max_length=12)
        >>> tokens, value = draw_expressions(rules, 1, seed=0)[0]
        >>> tokens[-1], value in range(10)
        (']', True)
    """
    chance = random.Random(seed)
    found: dict[tuple[str, ...], int] = {}
    futile = 0
    while len(found) < size:
        tokens, value = draw_expression(rules, chance)
        if rules.min_length < len(tokens) < rules.max_length and tokens not in found:
            found[tokens] = value
            futile = 0
        futile += 1
        if futile > FUTILE:
            raise ValueError(
                f"{rules} allow for hardly more than {len(found)} different expressions, but "
                f"{size} are needed: allow for more lengths, depth or operands, or ask for fewer"
            )
    return list(found.items())


def encode(tokens: Iterable[str], length: int) -> Tensor:
    """Tokens as numbers (length,), uint8: the beginning, the end mark, padding.

    Example:
        >>> encode(["[MAX", "1", "]"], 6).tolist()
        [4, 9, 7, 2, 0, 0]
    """
    numbers = [TOKENS.get(token, UNKNOWN) for token in tokens][: length - 1]
    numbers.append(END)
    return torch.tensor(numbers + [PAD] * (length - len(numbers)), dtype=torch.uint8)


def encode_all(expressions: Iterable[Expression], length: int) -> tuple[Tensor, Tensor]:
    """Tokens (samples, length), uint8, and values (samples,)."""
    rows = [(encode(tokens, length), value) for tokens, value in expressions]
    return torch.stack([row for row, _ in rows]), torch.tensor([value for _, value in rows])


def read_released(path: Path) -> list[Expression]:
    """Expressions of a released file: a header, then source and target with a tab between.

    The round brackets only show the order in which the lists were built, so they go.

    Raises:
        ValueError: A line is not of that form.
    """
    expressions: list[Expression] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            source, _, target = line.rstrip("\n").rpartition("\t")
            if number == 1 and target == "Target":
                continue
            if target not in set("0123456789"):
                raise ValueError(
                    f"{path}, line {number}: expected an expression, a tab and a digit, got "
                    f"{line!r}"
                )
            expressions.append((_lists_only(source), int(target)))
    return expressions


def _lists_only(source: str) -> tuple[str, ...]:
    return tuple(source.replace("(", " ").replace(")", " ").split())


class ListOpsDataModule(TokenDataModule):
    """The released ListOps of Long Range Arena: tokens (2048,), ten classes.

    Args:
        root: Folder with basic_train.tsv, basic_val.tsv and basic_test.tsv.
        batch_size: Sequences in a batch.
        seed: Fixes the order of the training batches.
        length: Steps; longer expressions are cut, shorter ones padded.

    Raises:
        MissingDataError: From `setup`: what to get from where, and where to put it.

    Source:
        Tay et al. (2020), arXiv 2011.04006, section 2.2.1.

    Example:
        >>> ListOpsDataModule().n_tokens
        18
    """

    n_tokens = N_TOKENS
    n_classes = 10

    def __init__(
        self,
        root: str = "data/lra_release/listops-1000",
        batch_size: int = 32,
        seed: int = 0,
        length: int = 2048,
    ) -> None:
        super().__init__(batch_size, seed)
        self.root = Path(root)
        self.length = length

    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        names: tuple[Split, ...] = ("train", "val", "test")
        files = {name: self.root / f"basic_{name}.tsv" for name in names}
        require(files.values(), "ListOps", f"{LRA_PAGE}, folder listops-1000")
        return {name: encode_all(read_released(path), self.length) for name, path in files.items()}


class GeneratedListOpsDataModule(TokenDataModule):
    """ListOps by the published rules, as short as you like; no expression comes twice.

    Args:
        batch_size: Sequences in a batch.
        seed: Fixes the order of the training batches, not the data.
        train_size: Expressions to train with.
        val_size: Expressions to validate with.
        test_size: Expressions to test with.
        max_depth: Of nesting.
        max_args: Most operands of an operator.
        min_length: An expression has more tokens.
        max_length: An expression has fewer tokens; the sequences have as many steps.

    Example:
        >>> data = GeneratedListOpsDataModule(train_size=20, val_size=4, test_size=4)
        >>> tokens, values = data.tensors("test")
        >>> tokens.shape, values.shape
        (torch.Size([4, 64]), torch.Size([4]))
    """

    n_tokens = N_TOKENS
    n_classes = 10

    def __init__(
        self,
        batch_size: int = 32,
        seed: int = 0,
        train_size: int = 8000,
        val_size: int = 500,
        test_size: int = 1000,
        max_depth: int = 4,
        max_args: int = 4,
        min_length: int = 8,
        max_length: int = 64,
    ) -> None:
        super().__init__(batch_size, seed)
        self.rules = Rules(max_depth, max_args, min_length, max_length)
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        self.length = max_length

    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        # An expression is shorter than max_length, so that its end mark still fits in.
        expressions = draw_expressions(self.rules, sum(self.sizes.values()), DATA_SEED)
        tokens, values = encode_all(expressions, self.length)
        sizes = list(self.sizes.values())
        parts = zip(tokens.split(sizes), values.split(sizes), strict=True)
        return dict(zip(self.sizes, parts, strict=True))
