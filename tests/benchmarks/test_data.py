from __future__ import annotations

import pytest
import torch

from benchmarks.data import DelayDataModule, DigitsDataModule
from benchmarks.data.delay import make_patterns, make_sequences
from benchmarks.data.sequences import SeededShuffle, SequenceDataModule

MODULES = (DigitsDataModule, DelayDataModule)
SPLITS = ("train", "val", "test")


def loaded(module: type[SequenceDataModule], **options: int) -> SequenceDataModule:
    data = module(**options)
    data.setup()
    return data


@pytest.mark.parametrize("module", MODULES)
def test_shapes_types_and_ranges(module: type[SequenceDataModule]) -> None:
    data = loaded(module)
    for split in SPLITS:
        sequences, classes = data.tensors(split)
        assert sequences.shape == (len(classes), data.length, data.d_input)
        assert (sequences.dtype, classes.dtype) == (torch.float32, torch.int64)
        assert classes.unique().tolist() == list(range(data.n_classes))
        assert sequences.isfinite().all()


def test_batches_of_fifty() -> None:
    data = loaded(DigitsDataModule)
    sizes = [len(classes) for _, classes in data.train_dataloader()]
    assert sizes == [50] * 25
    assert sum(len(classes) for _, classes in data.val_dataloader()) == 180
    assert sum(len(classes) for _, classes in data.test_dataloader()) == 360


def test_digits_lie_between_zero_and_one() -> None:
    sequences, _ = loaded(DigitsDataModule).tensors("train")
    assert sequences.min() == 0
    assert sequences.max() == 1


def test_digits_splits_share_no_sample_and_leave_none_out() -> None:
    from sklearn.datasets import load_digits

    data = loaded(DigitsDataModule)
    rows = [tuple(x.flatten().tolist()) for s in SPLITS for x in data.tensors(s)[0]]
    everything = torch.tensor(load_digits().data / 16.0, dtype=torch.float32)
    # All images differ, so equal sets mean disjoint and complete splits.
    assert len(set(rows)) == len(rows) == len(everything)
    assert set(rows) == {tuple(x.tolist()) for x in everything}


def test_digits_splits_are_stratified() -> None:
    data = loaded(DigitsDataModule)
    shares = [torch.bincount(data.tensors(s)[1]) / len(data.tensors(s)[1]) for s in SPLITS]
    for share in shares[1:]:
        assert torch.allclose(share, shares[0], atol=0.01)


@pytest.mark.parametrize("module", MODULES)
def test_the_seed_fixes_the_order_and_nothing_else(module: type[SequenceDataModule]) -> None:
    first, again, other = loaded(module), loaded(module), loaded(module, seed=1)
    for split in SPLITS:
        assert torch.equal(first.tensors(split)[0], other.tensors(split)[0])
    batches = [next(iter(data.train_dataloader()))[1] for data in (first, again, other)]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_the_order_depends_on_the_epoch_not_on_the_past() -> None:
    data = range(100)
    long_run, resumed = SeededShuffle(data, 0), SeededShuffle(data, 0)
    orders = []
    for epoch in range(3):
        long_run.set_epoch(epoch)
        orders.append(list(long_run))
    resumed.set_epoch(2)
    assert list(resumed) == orders[2]
    assert len({tuple(order) for order in orders}) == 3
    assert sorted(orders[0]) == list(data)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        DigitsDataModule(batch_size=0)


def test_patterns_have_zero_mean_and_unit_variance() -> None:
    patterns = make_patterns(10, 32)
    assert torch.allclose(patterns.mean(1), torch.zeros(10), atol=1e-6)
    assert torch.allclose(patterns.square().mean(1), torch.ones(10), atol=1e-5)


def test_a_matched_filter_finds_the_pattern() -> None:
    data = loaded(DelayDataModule)
    sequences, classes = data.tensors("test")
    patterns = make_patterns(data.n_classes, data.pattern_steps)
    scores = sequences[:, : data.pattern_steps, 0] @ patterns.T
    # All patterns have the same energy, so the best match is the likeliest class.
    assert (scores.argmax(1) == classes).double().mean() > 0.999


def test_after_the_pattern_there_is_only_noise() -> None:
    data = loaded(DelayDataModule)
    sequences, classes = data.tensors("train")
    late = sequences[:, data.pattern_steps :, 0]
    assert abs(late.mean().item()) < 0.01
    assert abs(late.std().item() - data.noise) < 0.01
    patterns = make_patterns(data.n_classes, data.pattern_steps)
    guesses = (late[:, -data.pattern_steps :] @ patterns.T).argmax(1)
    assert (guesses == classes).double().mean() < 0.15


def test_delay_and_noise_are_options() -> None:
    sequences, classes = make_sequences(make_patterns(3, 8), delay=5, noise=0.0, size=7, seed=0)
    assert sequences.shape == (7, 13, 1)
    assert torch.equal(sequences[:, :8, 0], make_patterns(3, 8)[classes])
    assert (sequences[:, 8:] == 0).all()
