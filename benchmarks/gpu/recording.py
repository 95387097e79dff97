"""A plugin for pytest: every result goes into a file at once, so that none is lost with a process.

`COMPRESSM_RECORD` names the file; each line is an object in JSON.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest

VARIABLE = "COMPRESSM_RECORD"
STARTED = "started"
_MISSING = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")
_LENGTH = 2500  # of what is kept of a traceback


def pytest_runtest_logstart(nodeid: str) -> None:
    _record(nodeid, STARTED)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # Set-up and tear-down count where they fail; a set-up that skips is the test's result.
    if report.when == "call" or report.outcome != "passed":
        _record(report.nodeid, report.outcome, report.duration, _text(report))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome == "passed":
        return
    missing = _MISSING.search(report.longreprtext)
    if missing:
        _record(report.nodeid, "skipped", 0.0, f"the package {missing[1]} is missing")
    else:
        _record(report.nodeid, report.outcome, 0.0, _text(report))


def _text(report: pytest.TestReport | pytest.CollectReport) -> str:
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):  # (file, line, reason) of a test that was skipped
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return report.longreprtext[-_LENGTH:]


def _record(test: str, outcome: str, seconds: float = 0.0, text: str = "") -> None:
    line: dict[str, Any] = {"test": test, "outcome": outcome, "seconds": seconds, "text": text}
    with open(os.environ[VARIABLE], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
