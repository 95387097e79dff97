"""Reports as data, as a table and as a picture."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from lightning_compressm import compress
from lightning_compressm.nn import LRU
from lightning_compressm.reduction.decision import Decision
from lightning_compressm.reduction.events import CompressionReport, LayerEvent, format_table

REDUCED = LayerEvent(
    layer="net.first",
    family="LRU",
    old_state_dim=128,
    new_state_dim=9,
    energy_kept=0.9512,
    error_bound=0.012345,
    balance="real",
)
SKIPPED = LayerEvent(
    layer="", family="LRU", old_state_dim=8, new_state_dim=8, action="skip", reason="all needed"
)


def test_the_table_is_aligned():
    lines = format_table([REDUCED, SKIPPED]).splitlines()
    assert lines == [
        "layer      family  action  states    energy kept  error bound  note",
        "---------  ------  ------  --------  -----------  -----------  ----------",
        "net.first  LRU     reduce  128 -> 9  95.1%        0.0123",
        "(model)    LRU     skip    8 -> 8    100.0%       -            all needed",
    ]


def test_a_table_of_nothing_has_a_header():
    assert len(format_table([]).splitlines()) == 2


def test_a_report_prints_as_its_table():
    report = CompressionReport([REDUCED])
    assert str(report) == report.table() == format_table([REDUCED])


def test_events_are_plain_data():
    report = CompressionReport([REDUCED, SKIPPED], {"net.first": torch.ones(3)})
    data = json.loads(json.dumps(report.to_dict()))
    assert [LayerEvent(**event) for event in data["events"]] == [REDUCED, SKIPPED]
    needed = {"step", "epoch", "layer", "family", "action", "old_state_dim", "new_state_dim"}
    assert needed | {"energy_kept", "error_bound", "seconds"} <= data["events"][0].keys()


def test_events_are_dated_without_changing():
    (dated,) = Decision(events=[REDUCED]).at(40, 2).events
    assert (dated.step, dated.epoch) == (40, 2)
    assert (REDUCED.step, REDUCED.epoch) == (0, 0)
    assert replace(dated, step=0, epoch=0) == REDUCED


def test_a_real_report_is_plain_data_too():
    torch.manual_seed(0)
    report = compress(LRU(2, 12), state_dim=3)
    (event,) = json.loads(json.dumps(report.to_dict()))["events"]
    assert (event["old_state_dim"], event["new_state_dim"], event["layer"]) == (12, 3, "")
    assert event["seconds"] > 0
    assert 0 < event["energy_kept"] < 1
    assert "12 -> 3" in report.table()


# -- the picture ---------------------------------------------------------------------------------


def test_a_reports_picture_marks_what_was_kept():
    report = compress(torch.nn.Sequential(LRU(2, 12), LRU(2, 6)), state_dim=3)
    told = [[text.get_text() for text in axes.texts] for axes in report.plot().axes]
    assert told == [["3 kept", "9 discarded"], ["3 kept", "3 discarded"]]


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"lightning_compressm\[plot\]"):
        CompressionReport([]).plot()
