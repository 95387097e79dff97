"""Handwritten digits of 8 x 8 pixels, read pixel by pixel: 64 steps of one number."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.data.sequences import SequenceDataModule, Split

# The split is part of the task, so it has a seed of its own that no option changes.
SPLIT_SEED = 0
TEST_SIZE = 360
VAL_SIZE = 180


class DigitsDataModule(SequenceDataModule):
    """The 1797 images that come with scikit-learn as sequences (64, 1) with values in [0, 1].

    The split is stratified and fixed: 1257 images to train, 180 to validate, 360 to test.

    Args:
        batch_size: Sequences in a batch.
        seed: Fixes the order of the training batches.

    Example:
        >>> data = DigitsDataModule(batch_size=50)
        >>> data.setup()
        >>> sequences, classes = next(iter(data.train_dataloader()))
        >>> sequences.shape, classes.shape
        (torch.Size([50, 64, 1]), torch.Size([50]))
    """

    d_input = 1
    n_classes = 10
    length = 64

    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        sequences = torch.tensor(digits.data / 16.0, dtype=torch.float32).unsqueeze(-1)
        classes = torch.tensor(digits.target, dtype=torch.long)

        def split(rows: list[int], size: int) -> tuple[list[int], list[int]]:
            kept, taken = train_test_split(
                rows, test_size=size, stratify=classes[rows], random_state=SPLIT_SEED
            )
            return kept, taken

        rest, test = split(list(range(len(classes))), TEST_SIZE)
        train, val = split(rest, VAL_SIZE)
        rows: dict[Split, list[int]] = {"train": train, "val": val, "test": test}
        return {name: (sequences[index], classes[index]) for name, index in rows.items()}
