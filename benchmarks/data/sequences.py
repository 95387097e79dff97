"""What all data sets share: sequences in memory, three splits, an order fixed by seed and epoch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sized
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

Split = Literal["train", "val", "test"]


class SeededShuffle(Sampler[int]):
    """Shuffle by a seed and the number of the epoch.

    A generator that lives as long as the loader would restart its sequence when a run is resumed.
    Here epoch 7 has the same order in a resumed run as in an uninterrupted one: Lightning calls
    `set_epoch` before every epoch.
    """

    def __init__(self, data: Sized, seed: int) -> None:
        self.data = data
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        # The multiplier keeps (seed 0, epoch 1) apart from (seed 1, epoch 0).
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(len(self.data), generator=generator).tolist())


class Rows(TensorDataset):
    """Sequences and targets, read by the batch: one index operation instead of one a sample.

    Args:
        sequences: One row for a sample, as compact as they are kept.
        targets: One row for a sample.
        prepare: Makes of rows what the model gets.
    """

    def __init__(
        self, sequences: Tensor, targets: Tensor, prepare: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(sequences, targets)
        self.prepare = prepare

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch, as torch's loader asks for it."""
        sequences, targets = self.tensors
        return self.prepare(sequences[rows]), targets[rows].long()

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        sequences, targets = self.__getitems__([row])
        return sequences[0], targets[0]


def _as_it_is(batch: Any) -> Any:
    """The rows come collated already. At the top level, so that workers can import it."""
    return batch


class InMemoryDataModule(L.LightningDataModule):
    """Pairs of sequences and targets, held in memory.

    A subclass builds its three splits; nothing is left to chance but the order of the training
    batches, which `seed` fixes. What is kept as bytes is made into what a model gets by `prepare`,
    batch by batch.

    Args:
        batch_size: Sequences in a batch. The last, shorter training batch of an epoch is left out.
        seed: Fixes the order of the training batches, not the data.
    """

    length: int

    def __init__(self, batch_size: int = 50, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.seed = seed
        self.splits: dict[Split, Rows] = {}

    @abstractmethod
    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        """Return sequences and targets, each with one row for a sample, by split."""

    def prepare(self, sequences: Tensor) -> Tensor:
        """What a model gets for these rows; the rows themselves, if a subclass says nothing."""
        return sequences

    def setup(self, stage: str | None = None) -> None:
        if not self.splits:
            self.splits = {
                name: Rows(*pair, self.prepare) for name, pair in self.build_splits().items()
            }

    def tensors(self, split: Split) -> tuple[Tensor, Tensor]:
        """All sequences and targets of a split, as a model gets them."""
        self.prepare_data()
        self.setup()
        sequences, targets = self.splits[split].tensors
        return self.prepare(sequences), targets.long()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        data = self.splits["train"]
        order = SeededShuffle(data, self.seed)
        return DataLoader(
            data, self.batch_size, sampler=order, drop_last=True, collate_fn=_as_it_is
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._in_order("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._in_order("test")

    def _in_order(self, split: Split) -> DataLoader[tuple[Tensor, ...]]:
        # Nothing is learnt here, so the batches may be bigger.
        return DataLoader(self.splits[split], batch_size=4 * self.batch_size, collate_fn=_as_it_is)


class SequenceDataModule(InMemoryDataModule):
    """Sequences (samples, length, d_input), float32, with one class each: (samples,), int64."""

    d_input: ClassVar[int]
    n_classes: ClassVar[int]


class TokenDataModule(InMemoryDataModule):
    """Tokens (samples, length) or pairs (samples, 2, length), kept as uint8; one class each."""

    n_tokens: ClassVar[int]
    n_classes: ClassVar[int]

    def prepare(self, sequences: Tensor) -> Tensor:
        """Tokens as int64, as an embedding wants them."""
        return sequences.long()


def shuffled_rows(size: int, seed: int) -> Tensor:
    """The numbers below `size` in an order that the seed fixes."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))
