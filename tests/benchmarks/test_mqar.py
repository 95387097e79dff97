from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.common.command import make_console, parse
from benchmarks.common.cuts import AS_TRAINED, Cut
from benchmarks.data.mqar import BLANK, IGNORED, SIZES, MQARDataModule, make_recall
from benchmarks.mqar import command as mqar
from benchmarks.mqar.run import KINDS, LATER, Settings, Sizes


def test_every_query_is_answered_by_the_value_of_its_key() -> None:
    tokens, targets = make_recall(n_tokens=16, pairs=3, length=12, size=50, seed=0)
    assert tokens.shape == targets.shape == (50, 12)
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[0:6:2], row[1:6:2], strict=True))
        assert len(pairs) == 3, "a key came twice"
        assert all(1 <= key < 8 <= value < 16 for key, value in pairs.items())
        asked = {row[i]: answers[i] for i in range(12) if answers[i] != IGNORED}
        assert asked == pairs
        assert all(i >= 6 for i in range(12) if answers[i] != IGNORED)
        assert [row[i] for i in range(6, 12) if answers[i] == IGNORED] == [BLANK] * 3


def test_the_seed_fixes_the_data_and_splits_differ() -> None:
    first = make_recall(n_tokens=16, pairs=3, length=12, size=20, seed=1)
    again = make_recall(n_tokens=16, pairs=3, length=12, size=20, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], make_recall(16, 3, 12, 20, seed=2)[0])
    data = MQARDataModule(n_tokens=16, pairs=3, length=12)
    assert not torch.equal(data.tensors("val")[0], data.tensors("test")[0][:500])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_tokens": 15, "pairs": 3, "length": 12}, "even number of tokens"),
        ({"n_tokens": 8, "pairs": 4, "length": 12}, "above 8"),
        ({"n_tokens": 16, "pairs": 3, "length": 8}, "need 9 steps"),
    ],
)
def test_sizes_that_leave_no_room_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recall(**sizes, size=1, seed=0)


def test_command_line() -> None:
    settings = parse(Settings, "mqar", None, ["--kind", "mamba2", "--criteria", "greedy"])
    assert settings.kinds == ("mamba2",)
    assert settings.criteria == ("greedy",)
    assert parse(Settings, "mqar", None, ["--seeds", "3"]) == Settings(seeds=(3,))
    assert Settings().kinds == KINDS
    for bad in (["--states", "0"], ["--target", "--states", "8"], ["--criteria", "biggest"]):
        with pytest.raises(SystemExit):
            mqar.main(bad)


def _cuts(accuracy: float, loss: float) -> list[Cut]:
    full = Cut(0, AS_TRAINED, 64, 1.0, 1.0)
    return [full, Cut(0, mqar.DEFAULT, mqar.TARGET_DIM, accuracy, loss)]


def test_targets() -> None:
    assert mqar.verdict("mamba1", _cuts(0.96, 9.0))[0]
    assert not mqar.verdict("mamba1", _cuts(0.94, 1.0))[0]
    assert mqar.verdict("mamba2", _cuts(0.0, 1.14))[0]
    assert not mqar.verdict("mamba2", _cuts(1.0, 1.16))[0]


@pytest.mark.usefixtures("mamba_ssm")
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_from_end_to_end(kind: mqar.Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.mqar.run.CALIBRATION_BATCHES", 1)
    for split, size in {"train": 200, "val": 20, "test": 50}.items():
        monkeypatch.setitem(SIZES, split, size)
    settings = Settings(
        kind=kind, seeds=(0,), steps=2, states=(4,), output=tmp_path, criteria=("random",)
    )
    run = mqar.Run(kind, settings, make_console(), Sizes(d_model=16, d_state=8, head_dim=8))
    cuts = run.measure()
    assert {(c.recipe, c.state_dim) for c in cuts} == {
        (AS_TRAINED, 8),
        ("uncut" + LATER, 8),
        (mqar.DEFAULT, 4),
        (mqar.DEFAULT + LATER, 4),
        ("random", 4),
    }
    assert all(0 <= c.accuracy <= 1 and c.loss > 0 for c in cuts)
    assert str(8) in mqar.note(run)
    assert len(list((tmp_path / "weights").iterdir())) == 1
