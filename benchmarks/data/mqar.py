"""Multi-query associative recall: pairs of key and value, then the keys again, in any order."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.data.sequences import InMemoryDataModule, Split

# Where the target has this value, nothing is asked: the default of PyTorch's cross-entropy.
IGNORED = -100
BLANK = 0
# The data are part of the task, so their seeds are fixed.
SEEDS: dict[Split, int] = {"train": 1, "val": 2, "test": 3}
SIZES: dict[Split, int] = {"train": 40_000, "val": 500, "test": 1000}


def make_recall(
    n_tokens: int, pairs: int, length: int, size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw `size` sequences: `pairs` of key and value, then every key once, among blanks.

    Token 0 is the blank, the lower half of the others are keys, the upper half values. No key
    comes twice in a sequence's pairs; values may. The queries' order and places are random.

    Args:
        n_tokens: Size of the vocabulary; even.
        pairs: Pairs in a sequence, all asked for.
        length: Steps in a sequence, at least three for each pair.
        size: Number of sequences.
        seed: Fixes everything.

    Returns:
        Tokens (size, length) and targets (size, length): the value that belongs to the key at the
        places where one is asked for, `IGNORED` at all others. Both are int64.

    Source:
        Arora et al. (2023), arXiv 2312.04927; there the gaps follow a power law.

    Example:
        >>> tokens, targets = make_recall(n_tokens=8, pairs=2, length=6, size=1, seed=0)
        >>> sorted(tokens[0, [0, 2]].tolist()) == sorted(tokens[0, 4:].tolist())
        True
    """
    n_keys = n_tokens // 2 - 1
    if n_tokens % 2 or not 1 <= pairs <= n_keys:
        raise ValueError(
            f"an even number of tokens above {2 * pairs} is needed for {max(pairs, 1)} pairs, "
            f"got {n_tokens}"
        )
    if length < 3 * pairs:
        raise ValueError(f"{pairs} pairs and as many queries need {3 * pairs} steps, got {length}")
    generator = torch.Generator().manual_seed(seed)

    def ranks(width: int) -> Tensor:
        return torch.rand(size, width, generator=generator).argsort(1)

    keys = 1 + ranks(n_keys)[:, :pairs]
    values = torch.randint(n_tokens // 2, n_tokens, (size, pairs), generator=generator)
    tokens = torch.full((size, length), BLANK)
    targets = torch.full((size, length), IGNORED)
    tokens[:, 0 : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = values
    # The places are left in random order, so the queries' order is random too.
    places = 2 * pairs + ranks(length - 2 * pairs)[:, :pairs]
    tokens.scatter_(1, places, keys)
    targets.scatter_(1, places, values)
    return tokens, targets


class MQARDataModule(InMemoryDataModule):
    """Associative recall, the task on which a small state is felt most.

    Args:
        batch_size: Sequences in a batch.
        seed: Fixes the order of the training batches.
        n_tokens: Size of the vocabulary, blank, keys and values together.
        pairs: Pairs of key and value in a sequence.
        length: Steps in a sequence.

    Example:
        >>> data = MQARDataModule(n_tokens=32, pairs=8, length=32)
        >>> tokens, targets = data.tensors("test")
        >>> tokens.shape, (targets >= 0).sum(1).unique().tolist()
        (torch.Size([1000, 32]), [8])
    """

    def __init__(
        self,
        batch_size: int = 32,
        seed: int = 0,
        n_tokens: int = 32,
        pairs: int = 8,
        length: int = 32,
    ) -> None:
        super().__init__(batch_size, seed)
        self.n_tokens = n_tokens
        self.pairs = pairs
        self.length = length

    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        return {
            name: make_recall(self.n_tokens, self.pairs, self.length, size, SEEDS[name])
            for name, size in SIZES.items()
        }
